"""`scripts/get_model.sh` against a hub on this machine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file, save_file

from analysis.locations import FOLDERS
from olmo import checkpoint
from olmo.model import OLMo
from tests.fetching import HUB_ID, OTHER, WEIGHTS, files, finish, run, start, the_error, tiny_model
from tests.hub import Hub
from tests.serving import File, Server, hub_serving


def hub_files(folder: Path, model: OLMo) -> dict[str, bytes]:
    """The files of allenai/OLMo-1B, small: OLMo's keys prefixed `model.`, OLMo's settings in config.json."""
    raw = {key: getattr(value, "value", value) for key, value in asdict(model.config).items()}
    raw = {key: value for key, value in raw.items() if key not in ("resuscitation", "save_grad_")}
    state = {f"model.{name}": tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "weights", metadata={"format": "pt"})
    config = json.dumps({**raw, "model_type": "hf_olmo"}).encode()
    return {"config.json": config, "tokenizer.json": b"{}", "model.safetensors": (folder / "weights").read_bytes()}


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_a_model_of_the_hub_lands_where_the_analysis_looks_and_loads(
    weights: str, root: Path, tmp_path: Path, server: Server
) -> None:
    model = tiny_model()
    published = hub_files(tmp_path, model)
    torch.save(load_file(tmp_path / "weights"), tmp_path / "weights.bin")
    published["pytorch_model.bin"] = (tmp_path / "weights.bin").read_bytes()
    if weights == "pytorch_model.bin":
        del published["model.safetensors"]
    server.add_hub_model("allenai/OLMo-1B", "step738020-tokens3095B", {**published, "sub/x.json": b"", "a.py": b""})
    status, _, stderr = finish(start(root, server, HUB_ID))
    assert (status, stderr) == (0, "")
    folder = root / FOLDERS["1B"] / "738020-unsharded"
    assert files(folder) == {"config.json", "tokenizer.json", weights}
    loaded = checkpoint.load_model(folder, torch.device("cpu")).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())


@pytest.fixture
def hub(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """The hub's client, real but for its address."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    files = {"config.json": b"{}", "model.safetensors": WEIGHTS}
    server.add_hub_model("owner/name", "first", files)
    return server


def test_a_download_from_the_hub_continues_and_is_verified(
    tmp_path: Path, hub: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = "/cdn/model.safetensors"
    hub.cuts = {weights: [2**21] + [0] * 9}
    assert run(["owner/name@first", f"--output={tmp_path}"]) == 1
    assert "the same command continues" in the_error(capsys)
    hub.cuts = {}
    true, hub.files[weights] = hub.files[weights], File(OTHER)  # same name, same length, other bytes
    assert run(["owner/name@first", f"--output={tmp_path}"]) == 1
    assert "does not have the sha256 hash" in the_error(capsys)
    assert "model.safetensors" not in files(tmp_path)
    hub.files[weights] = true
    assert run(["owner/name@first", f"--output={tmp_path}"]) == 0
    assert (tmp_path / "model.safetensors").read_bytes() == WEIGHTS
    assert files(tmp_path) == {"config.json", "model.safetensors"}
    hub.asked.clear()
    assert run(["owner/name@first", f"--output={tmp_path}"]) == 0
    assert [asked.path for asked in hub.asked] == ["/api/models/owner/name/revision/first?blobs=true"], "no file"


def test_another_revision_of_the_hub_replaces_the_weights_of_the_same_size(tmp_path: Path, hub: Server) -> None:
    assert run(["owner/name@first", f"--output={tmp_path}"]) == 0
    hub.add_hub_model("owner/name", "second", {"config.json": b"{}", "model.safetensors": OTHER})
    assert run(["owner/name@second", f"--output={tmp_path}"]) == 0
    assert (tmp_path / "model.safetensors").read_bytes() == OTHER
    assert files(tmp_path) == {"config.json", "model.safetensors"}


def test_a_name_that_begins_like_anothers_is_another_file(tmp_path: Path, hub: Server) -> None:
    published = {"config.json": b"{}", "model.safetensors": WEIGHTS, "model.safetensors.index.json": b"{}"}
    hub.add_hub_model("owner/name", "first", published)
    assert run(["owner/name@first", f"--output={tmp_path}"]) == 0
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == published


def test_a_file_in_gits_own_store_is_verified(tmp_path: Path, hub: Server, capsys: pytest.CaptureFixture[str]) -> None:
    (path,) = (path for path in hub.files if path.endswith("config.json"))
    hub.files[path] = File(b"[]")
    assert run(["owner/name@first", f"--output={tmp_path}"]) == 1
    assert "config.json: the download does not have the git hash" in the_error(capsys)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("owner/name@third", "404 Not Found; list the known checkpoints with: bash scripts/get_model.sh --list"),
        ("allenai/OLMo-1B@step738020-tokens3094B", f"404 Not Found; try the hub: bash scripts/get_model.sh {HUB_ID}"),
        ("allenai/OLMo-1B@step1000-tokens4B", "the hub's nearest known one is allenai/OLMo-1B@step20000-tokens84B"),
    ],
)
def test_a_revision_that_the_hub_has_not(
    name: str, said: str, tmp_path: Path, hub: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([name, f"--output={tmp_path}"]) == 1
    error = the_error(capsys)
    assert error.startswith(f"error: {name}: 404") and said in error


def test_a_hub_out_of_reach_is_one_line(
    tmp_path: Path, hub: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert run([HUB_ID, f"--output={tmp_path}"]) == 1
    assert the_error(capsys) == f"error: {HUB_ID}: Connection refused\n"


@pytest.fixture
def real_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    with hub_serving(tmp_path / "cache", monkeypatch, Hub) as hub:
        yield hub


@pytest.mark.parametrize("damaged", [False, True])
def test_what_the_cache_of_the_hub_has_is_copied(
    damaged: bool, tmp_path: Path, real_hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    commit = real_hub.add("owner/name", {"config.json": b"{}", "model.safetensors": WEIGHTS}, "step1")
    cached = Path(hf_hub_download("owner/name", "model.safetensors", revision=commit))
    if damaged:
        cached.resolve().write_bytes(OTHER)
    before = real_hub.bytes_sent("model.safetensors")
    assert run(["owner/name@step1", f"--output={tmp_path / 'new'}"]) == 0
    assert (tmp_path / "new/model.safetensors").read_bytes() == WEIGHTS
    assert real_hub.bytes_sent("model.safetensors") - before == (len(WEIGHTS) if damaged else 0)
    assert "2 of 2 files to fetch" in (out := capsys.readouterr().out) and "1 of them in the cache of the hub" in out


def test_a_gated_and_a_private_model_need_a_login(
    tmp_path: Path, real_hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"config.json": b"{}", "model.safetensors": WEIGHTS}
    real_hub.add("owner/gated", files, gated=True)
    real_hub.add("owner/private", files, private=True)
    folder = f"--output={tmp_path / 'new'}"
    assert run(["owner/gated", folder]) == 1
    error = the_error(capsys)
    assert "config.json: 401 Unauthorized: Access to model owner/gated is restricted." in error
    assert "hf auth login" in error and "attempts" not in error
    assert run(["owner/private", folder]) == 1
    assert "owner/private: 401 Unauthorized; private, or no such model; to log in" in the_error(capsys)
    monkeypatch.setenv("HF_TOKEN", real_hub.token)
    assert run(["owner/private", folder]) == 0
    assert (tmp_path / "new/model.safetensors").read_bytes() == WEIGHTS
    assert not [h for h in real_hub.received if h.get("Host", "").startswith("localhost") and "Authorization" in h]
