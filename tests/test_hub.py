"""The stand-in for the hub, asked by the hub's real client."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import HfApi, HfFileSystem, hf_hub_download, snapshot_download
from huggingface_hub.utils import (
    EntryNotFoundError,
    GatedRepoError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tests.hub import Hub
from tests.serving import hub_serving

WEIGHTS = bytes(range(256)) * 40


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub_serving(tmp_path / "cache", monkeypatch, Hub) as hub:
        yield hub


def test_refs_trees_and_files_of_each_revision(hub: Hub) -> None:
    first = hub.add("owner/name", {"config.json": b"{}", "model.safetensors": WEIGHTS})
    second = hub.add("owner/name", {"config.json": b"[]", "sub/deep/a b.txt": b"text"}, "step1")
    tag = hub.add("owner/name", {"README.md": b"#"}, "v1.0", tag=True)
    hub.page = 1
    api = HfApi()
    found = api.list_repo_refs("owner/name")
    assert {b.name: b.target_commit for b in found.branches} == {"main": first, "step1": second}
    assert [(t.name, t.ref, t.target_commit) for t in found.tags] == [("v1.0", "refs/tags/v1.0", tag)]
    assert api.list_repo_files("owner/name", revision="step1") == ["config.json", "sub/deep/a b.txt"]
    tree = {one.path: one for one in api.list_repo_tree("owner/name", expand=True)}
    assert tree["model.safetensors"].lfs.size == tree["model.safetensors"].size == len(WEIGHTS)
    assert tree["model.safetensors"].last_commit.oid == first and tree["config.json"].lfs is None
    [folder, below] = api.list_repo_tree("owner/name", "sub", revision="step1", recursive=True)
    assert (folder.path, below.path, below.size) == ("sub/deep", "sub/deep/a b.txt", 4)
    [given] = api.get_paths_info("owner/name", ["config.json", "none"], revision="step1")
    assert (given.path, given.size) == ("config.json", 2)
    assert api.model_info("owner/name", revision="v1.0").sha == tag
    sizes = {s.rfilename: s.size for s in api.model_info("owner/name", files_metadata=True).siblings}
    assert sizes == {"config.json": 2, "model.safetensors": len(WEIGHTS)}
    assert [c.commit_id for c in api.list_repo_commits("owner/name")] == [tag, second, first]
    folder = Path(snapshot_download("owner/name", revision="step1"))
    assert folder.name == second and (folder / "sub/deep/a b.txt").read_bytes() == b"text"
    assert Path(hf_hub_download("owner/name", "model.safetensors")).read_bytes() == WEIGHTS
    assert hub.bytes_sent(".safetensors") == len(WEIGHTS)


def test_a_download_that_breaks_off_continues_where_it_was(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = hub.add("owner/name", {"model.safetensors": WEIGHTS})
    [sha256] = hub.stored
    path = f"/lfs/{sha256}/{commit}/model.safetensors"
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 500)
    hub.cuts[path] = [1000]
    hf_hub_download("owner/name", "model.safetensors")
    assert hub.sent(path) == [1000, len(WEIGHTS) - 1000]


def test_datasets_are_read_in_ranges(hub: Hub) -> None:
    hub.add("owner/texts", {"data/train.parquet": WEIGHTS, "data/a.jsonl": b"line"}, kind="datasets")
    files = HfFileSystem(endpoint=hub.url, skip_instance_cache=True)
    assert files.glob("datasets/owner/texts/data/*") == [
        f"datasets/owner/texts/data/{n}" for n in ("a.jsonl", "train.parquet")
    ]
    with files.open("datasets/owner/texts/data/train.parquet", block_size=100) as file:
        file.seek(5000)
        assert file.read(10) == WEIGHTS[5000:5010]
    assert hub.bytes_sent(".parquet") < 1000
    with pytest.raises(RepositoryNotFoundError):
        HfApi().model_info("owner/texts")


def test_what_is_missing_private_or_gated_is_refused_as_the_hub_does(hub: Hub) -> None:
    hub.add("owner/name", {"config.json": b"{}"})
    hub.add("owner/hidden", {"config.json": b"{}"}, private=True)
    hub.add("owner/gated", {"config.json": b"{}"}, gated=True)
    api = HfApi()
    for name in ("owner/none", "owner/hidden"):
        with pytest.raises(RepositoryNotFoundError):
            api.list_repo_refs(name)
    with pytest.raises(RevisionNotFoundError):
        api.model_info("owner/name", revision="step7")
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("owner/name", "model.safetensors")
    assert [b.name for b in api.list_repo_refs("owner/gated").branches] == ["main"]
    with pytest.raises(GatedRepoError):
        hf_hub_download("owner/gated", "config.json")
    for name in ("owner/gated", "owner/hidden"):
        assert Path(hf_hub_download(name, "config.json", token=hub.token)).read_bytes() == b"{}"
    assert api.whoami(token=hub.token)["name"] == "owner"
