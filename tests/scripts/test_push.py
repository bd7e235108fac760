"""`scripts.convert --push`: uploads to a hub on this machine, by the hub's own client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from olmo.exceptions import exit_status
from scripts.convert import main
from scripts.prepare.upload import published_files
from tests.architectures import built
from tests.hub_uploads import UploadHub
from tests.reference import tiny_tokenizer
from tests.serving import File, hub_serving


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[UploadHub]:
    from huggingface_hub import constants

    for name, value in (
        *(("HF_HUB_DISABLE_XET", True), ("HF_HUB_DISABLE_PROGRESS_BARS", True)),
        ("HF_TOKEN_PATH", str(tmp_path / "token")),
    ):
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    with hub_serving(tmp_path / "cache", monkeypatch, UploadHub) as hub:
        monkeypatch.setenv("HF_TOKEN", hub.token)
        yield hub


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkpoint of a run of another family, with what a run has beside."""
    folder = tmp_path / "step3-unsharded"
    built("Llama").save_pretrained(folder, max_shard_size="20KB")
    tiny_tokenizer(tmp_path / "words.json")
    PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "words.json")).save_pretrained(folder)
    (folder / "config.yaml").write_text("run_name: mine\nmodel:\n  transformers: owner/llama\n")
    for name in ("optim.pt", "train.pt", "manifest.json", ".env"):
        (folder / name).write_text("{}")
    return folder


def push(source: Path, target: Path, *flags: str) -> int:
    return exit_status(main, [str(source), str(target), "--to", "hf", "--push", "owner/model", *flags])


def head(hub: UploadHub, branch: str = "main") -> dict[str, bytes]:
    repository = hub.repositories["models", "owner/model"]
    return repository.commits[repository.branches[branch]].files


def test_all_of_the_folder_and_nothing_of_the_run_is_uploaded_at_once(
    hub: UploadHub, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert push(source, tmp_path / "hf", "--private") == 0
    out = capsys.readouterr().out
    assert out.endswith(f"{hub.url}/owner/model/tree/main\n")
    files = {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()}
    assert {name: content for name, content in head(hub).items() if name != ".gitattributes"} == files
    assert not files.keys() & {"config.yaml", "optim.pt", "train.pt", "manifest.json", ".env"}
    assert "# mine\n" in files["README.md"].decode() and "model.safetensors.index.json" in files
    repository = hub.repositories["models", "owner/model"]
    assert repository.private and len(repository.commits) == 2  # the one that creates it, and ours
    opened = AutoModelForCausalLM.from_pretrained("owner/model", token=hub.token)
    wanted = AutoModelForCausalLM.from_pretrained(source).state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in opened.state_dict().items())
    hub.calls.clear()
    assert push(source, tmp_path / "hf", "--private") == 0  # again
    assert capsys.readouterr().out == f"{hub.url}/owner/model/tree/main has these files already\n"
    assert not [path for method, path in hub.calls if method != "GET"]


def test_an_interrupted_upload_is_continued_by_the_same_command(
    hub: UploadHub, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = len(list(source.glob("*.safetensors")))
    hub.refused_uploads = [200, 403] + [403] * (shards - 2)
    assert push(source, tmp_path / "hf") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: --push owner/model: 403 Forbidden") and "same command continues" in error
    assert set(head(hub)) == {".gitattributes"}, "nothing of it appears before all has arrived"
    before = (tmp_path / "hf/README.md").stat().st_mtime_ns
    hub.calls.clear()
    hub.refused_uploads.clear()  # uploads that the first refusal kept from beginning
    assert push(source, tmp_path / "hf") == 0
    assert len([path for method, path in hub.calls if method == "PUT"]) == shards - 1, "one has arrived already"
    assert (tmp_path / "hf/README.md").stat().st_mtime_ns == before, "the conversion is not repeated"
    assert set(head(hub)) == {path.name for path in (tmp_path / "hf").iterdir()} | {".gitattributes"}


def test_what_others_commit_during_the_upload_is_kept(
    hub: UploadHub, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.add("owner/model", {".gitattributes": b""})
    answer = hub.answer

    def answer_after_theirs(method: str, target: str, *rest: Any) -> File | None:
        if method == "PUT" and "config.json" not in head(hub):
            hub.add("owner/model", {"config.json": b"theirs"})
        return answer(method, target, *rest)

    monkeypatch.setattr(hub, "answer", answer_after_theirs)
    assert push(source, tmp_path / "hf") == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: --push owner/model: 412")
    assert head(hub) == {"config.json": b"theirs"}


def test_files_of_others_are_kept_without_overwrite(
    hub: UploadHub, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    others = {"config.json": b"{}", "pytorch_model.bin": b"weights"}
    hub.add("owner/model", others)
    assert push(source, tmp_path / "hf") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: --push owner/model: has another config.json already") and "--overwrite" in error
    assert head(hub) == others
    assert push(source, tmp_path / "hf", "--private") == 2
    assert "exists and is public" in capsys.readouterr().err
    assert push(source, tmp_path / "hf", "--revision", "step3") == 0  # a new branch
    written = {path.name for path in (tmp_path / "hf").iterdir()}
    assert head(hub) == others and set(head(hub, "step3")) == written
    assert push(source, tmp_path / "hf", "--overwrite") == 0
    assert set(head(hub)) == written


def test_without_a_token_nothing_is_converted(
    hub: UploadHub, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_old")
    assert push(source, tmp_path / "hf") == 2
    assert "does not accept the token; log in with `hf auth login`" in capsys.readouterr().err
    monkeypatch.delenv("HF_TOKEN")
    assert push(source, tmp_path / "hf") == 2
    error = capsys.readouterr().err
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert push(source, tmp_path / "hf") == 1
    assert "HF_HUB_OFFLINE" in capsys.readouterr().err
    assert error.startswith("error: --push owner/model: no token of the Hugging Face hub here; log in")
    assert error.count("\n") == 1 and not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--to", "hf", "--private"], "--private: needs --push"),
        (["--to", "hf", "--revision", "x"], "--revision: needs --push"),
        (["--to", "olmo", "--push", "owner/model"], "--push: needs --to hf"),
        (["--to", "hf", "--push", "model"], "--push model: not a repository of the hub, owner/name"),
    ],
)
def test_flags_that_do_not_fit(flags: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(main, [str(tmp_path), str(tmp_path / "hf"), *flags]) == 2
    assert capsys.readouterr().err.startswith(f"error: {said}")


@pytest.mark.parametrize("card", [None, "---\nlicense: mit\n---\n# Mine\n"])
def test_another_checkpoint_is_not_taken_for_the_folder_that_exists(
    hub: UploadHub, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], card: str | None
) -> None:
    if card is not None:  # which is kept, and names no weights
        (source / "README.md").write_text(card)
    assert push(source, tmp_path / "hf") == 0
    shard = next(iter(sorted(source.glob("*.safetensors"))))
    save_file({name: tensor + 1 for name, tensor in load_file(shard).items()}, shard, {"format": "pt"})
    assert push(source, tmp_path / "hf") == 2
    assert f"{tmp_path / 'hf'}: already exists; name a new folder" in capsys.readouterr().err


def test_a_card_of_ones_own_is_kept(hub: UploadHub, source: Path, tmp_path: Path) -> None:
    (source / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    assert push(source, tmp_path / "hf") == 0 and push(source, tmp_path / "hf") == 0
    assert head(hub)["README.md"] == (source / "README.md").read_bytes()


def test_the_folders_of_this_machine_are_not_published(tmp_path: Path) -> None:
    record = {"checkpoint": "/home/a/step3", "resuscitation": "/home/a/x.pt", "settings": {"coefficients": "/home/a/c"}}
    (tmp_path / "resuscitation.json").write_text(json.dumps(record))
    (tmp_path / "resuscitation.json").with_name(".hidden").write_text("")
    (found,) = published_files(tmp_path).values()
    assert isinstance(found, bytes) and b"/home" not in found and json.loads(found)["checkpoint"] == "step3"
