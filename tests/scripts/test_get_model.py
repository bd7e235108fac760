"""`scripts/get_model.sh` against servers on this machine: an old checkpoint site, a hub, and what goes wrong there."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import requests
import torch
from safetensors.torch import load_file, save_file

from analysis.locations import FOLDERS
from olmo import checkpoint, net
from olmo.config import TrainConfig
from olmo.exceptions import exit_status
from olmo.files.lock import Lock
from olmo.model import OLMo
from scripts import get_model
from scripts.prepare import download
from tests.reference import tiny_config
from tests.running import ROOT, wait_for
from tests.serving import File, Server

FOLDER = "/ai2-llm/olmo-small/g4g72enr/step738020-unsharded"
HUB_ID = "allenai/OLMo-1B@step738020-tokens3095B"
CONFIG = b"model: {}\n"
WEIGHTS = random.Random(0).randbytes(3 * 2**20 + 12345)  # three pieces and some
OTHER = random.Random(1).randbytes(len(WEIGHTS))
MODEL = f"{FOLDER}/model.pt"

run = functools.partial(exit_status, get_model.main)


@pytest.fixture
def url(server: Server) -> str:
    return server.add(FOLDER, {"config.yaml": CONFIG, "model.pt": WEIGHTS})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The repository at another place, so that nothing is fetched into this one."""
    root = tmp_path / "root"
    root.mkdir()
    for name in ("scripts", "olmo", "configs"):
        (root / name).symlink_to(ROOT / name)
    return root


def start(root: Path, server: Server, *arguments: str) -> subprocess.Popen[str]:
    """`bash scripts/get_model.sh ARGUMENTS`, called from elsewhere."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "PYTHONPATH"))}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    hub = {"HF_ENDPOINT": server.url, "HF_HOME": str(root / "hf")}
    return subprocess.Popen(
        ["bash", str(root / "scripts" / "get_model.sh"), *arguments],
        cwd=root.parent,
        env={**inherited, "PATH": path, **hub},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    stdout, stderr = process.communicate(timeout=60)
    return process.returncode, stdout, stderr


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def the_error(capsys: pytest.CaptureFixture[str]) -> str:
    stderr = capsys.readouterr().err
    assert stderr.startswith("error: ") and stderr.count("\n") == 1, stderr
    return stderr


# --- from the old site -------------------------------------------------------------------------------------------


def tiny_model() -> OLMo:
    torch.manual_seed(0)
    return OLMo(tiny_config())


def test_a_folder_of_the_site_lands_where_the_analysis_looks_and_loads(
    root: Path, tmp_path: Path, server: Server
) -> None:
    model = tiny_model()
    TrainConfig(model=model.config).save(tmp_path / "config.yaml")
    torch.save(model.state_dict(), tmp_path / "model.pt")
    names = ("config.yaml", "model.pt")
    url = server.add(FOLDER, {name: (tmp_path / name).read_bytes() for name in names})
    server.add(FOLDER, {"train.pt": b"training", "optim.pt": b"moments"})
    status, stdout, stderr = finish(start(root, server, url))
    assert (status, stderr) == (0, "")
    folder = root / FOLDERS["1B"] / "738020-unsharded"
    assert f"{FOLDERS['1B']}/738020-unsharded: 3 of 3 files" in stdout
    assert files(folder) == {*names, "train.pt"}
    loaded = checkpoint.load_model(folder, torch.device("cpu")).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())


def test_the_environment_of_the_repository_comes_first(root: Path, server: Server) -> None:
    python = root / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "$PWD:$@"\n')
    python.chmod(0o755)
    assert finish(start(root, server, "a b", "--list"))[1] == f"{root}:-m scripts.get_model a b --list\n"


def test_killed_in_the_middle_it_continues(root: Path, tmp_path: Path, server: Server, url: str) -> None:
    server.stall = {MODEL: 5 * 2**19}  # in the third of four pieces
    output = tmp_path / "output"
    process = start(root, server, url, f"--output={output}")
    wait_for(lambda: any(p.stat().st_size == 2**21 for p in output.glob(".model.pt.*.partial")), process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert {name[0] for name in files(output)} == {"."}, "an incomplete checkpoint has no files under their names"
    server.stall = {}
    server.asked.clear()
    status, _, stderr = finish(start(root, server, url, f"--output={output}"))
    assert (status, stderr) == (0, "")
    assert files(output) == {"config.yaml", "model.pt"}
    assert (output / "model.pt").read_bytes() == WEIGHTS
    assert server.sent(MODEL) == [len(WEIGHTS) - 2**21]
    assert server.sent(f"{FOLDER}/config.yaml") == [], "what had come whole does not come again"


def test_safetensors_are_preferred(tmp_path: Path, server: Server, url: str) -> None:
    server.add(FOLDER, {"model.safetensors": b"tensors"})
    assert run([url, f"--output={tmp_path}"]) == 0
    assert files(tmp_path) == {"config.yaml", "model.safetensors"}


@pytest.mark.parametrize("name", ["optim.pt", "optim.safetensors"])
def test_the_optimizers_state_comes_on_demand(
    name: str, tmp_path: Path, server: Server, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([url, f"--output={tmp_path}", "--with_optimizer"]) == 1
    assert "no optimizer state" in the_error(capsys) and not files(tmp_path)
    server.add(FOLDER, {name: b"moments"})
    assert run([url, f"--output={tmp_path}", "--with_optimizer"]) == 0
    assert files(tmp_path) == {"config.yaml", "model.pt", name}


# --- connections that break, servers that cannot continue, files that change -------------------------------------


def test_a_broken_connection_is_taken_up_where_it_broke(tmp_path: Path, server: Server, url: str) -> None:
    server.cuts = {MODEL: [2**20 + 5, 2**20, 100]}
    assert run([url, f"--output={tmp_path}"]) == 0
    assert (tmp_path / "model.pt").read_bytes() == WEIGHTS
    first, *others = (asked for asked in server.asked if asked.path == MODEL)
    assert first.range is None and len(others) == 3
    assert all(asked.range and asked.condition == server.files[MODEL].tag for asked in others[1:])
    assert sum(server.sent(MODEL)) < len(WEIGHTS) + 2**20, "no more than a piece comes twice"


def test_without_ranges_it_starts_again(tmp_path: Path, server: Server, url: str) -> None:
    server.behaviour = "no ranges"
    server.cuts = {MODEL: [2**21]}
    assert run([url, f"--output={tmp_path}"]) == 0
    assert (tmp_path / "model.pt").read_bytes() == WEIGHTS
    assert server.sent(MODEL) == [2**21, len(WEIGHTS)]


@pytest.mark.parametrize("behaviour", ["ranges", "no ranges", "careless ranges"])
@pytest.mark.parametrize("validators", [{}, {"ETag": None}, {"ETag": 'W/"1"'}], ids=["tag", "date", "weak tag"])
def test_a_file_that_changes_between_two_attempts_is_not_spliced(
    behaviour: str, validators: dict[str, str | None], tmp_path: Path, server: Server, url: str
) -> None:
    server.behaviour = behaviour  # type: ignore[assignment]
    server.cuts = {MODEL: [2**21]}
    server.files[MODEL].headers = validators
    newer = File(OTHER, validators, modified="Thu, 01 Feb 2024 10:00:00 GMT")

    def change(path: str) -> None:
        if server.sent(MODEL):  # the second attempt has looked already
            server.files[MODEL] = newer

    server.before_get = change
    assert run([url, f"--output={tmp_path}"]) == 0
    assert (tmp_path / "model.pt").read_bytes() == OTHER
    assert files(tmp_path) == {"config.yaml", "model.pt"}, "nothing of the older version stays"


def test_without_any_validator_nothing_is_continued(tmp_path: Path, server: Server, url: str) -> None:
    server.cuts = {MODEL: [2**21]}
    server.files[MODEL].headers = {"ETag": None, "Last-Modified": None}

    def change(path: str) -> None:
        if server.sent(MODEL):
            server.files[MODEL].content = OTHER

    server.before_get = change
    assert run([url, f"--output={tmp_path}"]) == 0
    assert (tmp_path / "model.pt").read_bytes() == OTHER
    assert [asked.range for asked in server.asked] == [None] * 3


def test_it_gives_up_in_one_line_and_keeps_what_came(
    tmp_path: Path, server: Server, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    server.cuts = {MODEL: [2**21] + [0] * 9}
    assert run([url, f"--output={tmp_path}"]) == 1
    assert "model.pt: the connection broke off (5 attempts); the same command continues" in the_error(capsys)
    assert len(server.sent(MODEL)) == net.ATTEMPTS
    assert {name[0] for name in files(tmp_path)} == {"."}
    server.cuts = {}
    assert run([url, f"--output={tmp_path}"]) == 0
    assert (tmp_path / "model.pt").read_bytes() == WEIGHTS
    assert server.sent(MODEL)[-1] == len(WEIGHTS) - 2**21


@pytest.mark.parametrize("difference", [-1, 1])
def test_a_file_of_another_length_than_announced_is_not_taken(
    difference: int, tmp_path: Path, server: Server, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tag = server.files[MODEL].tag
    announced: dict[str, str | None] = {"ETag": tag, "Content-Length": str(len(WEIGHTS) + difference)}

    def answer(path: str) -> None:
        server.files[MODEL].headers = {"ETag": tag}

    server.files[MODEL].headers = announced
    server.before_get = answer
    look = functools.partial(download.describe, requests.Session(), url)
    (remote,) = filter(None, [look("model.pt")])
    with pytest.raises(OSError, match=f"{len(WEIGHTS)} of {len(WEIGHTS) + difference} bytes came"):
        download.fetch(requests.Session(), lambda name: remote, "model.pt", tmp_path)
    assert "model.pt" not in files(tmp_path)


def test_a_server_that_fails_for_a_while_is_asked_again(tmp_path: Path, server: Server, url: str) -> None:
    server.cuts = {MODEL: [2**21]}
    server.failures = {MODEL: [200, 503, 429]}
    assert run([url, f"--output={tmp_path}"]) == 0
    assert (tmp_path / "model.pt").read_bytes() == WEIGHTS
    assert [asked.status for asked in server.asked if asked.path == MODEL] == [200, 503, 429, 206]


def test_a_file_without_a_stated_size_comes_too(tmp_path: Path, server: Server, url: str) -> None:
    server.files[f"{FOLDER}/config.yaml"].headers = {"Content-Length": None, "Connection": "close"}
    assert run([url, f"--output={tmp_path}"]) == 0
    assert (tmp_path / "config.yaml").read_bytes() == CONFIG


# --- what is verified, what is already there ---------------------------------------------------------------------


def encoded(algorithm: str, content: bytes) -> str:
    return base64.b64encode(hashlib.new(algorithm, content).digest()).decode()


STATEMENTS: dict[str, Callable[[bytes], dict[str, str | None]]] = {
    "Content-MD5": lambda content: {"Content-MD5": encoded("md5", content)},
    "Digest": lambda content: {"Digest": f"SHA-256={encoded('sha256', content)}"},
    "Repr-Digest": lambda content: {"Repr-Digest": f"md5=:AAAA:, sha-256=:{encoded('sha256', content)}:"},
    "Google": lambda content: {"x-goog-hash": f"crc32c=AAAAAA==, md5={encoded('md5', content)}"},
    "Amazon": lambda content: {"x-amz-checksum-sha256": encoded("sha256", content)},
    "S3": lambda content: {"ETag": f'"{hashlib.md5(content).hexdigest()}"', "x-amz-request-id": "1"},
}


@pytest.mark.parametrize("kind", STATEMENTS)
def test_a_stated_hash_is_verified(
    kind: str, tmp_path: Path, server: Server, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    statement = STATEMENTS[kind]
    server.files[MODEL].headers = statement(OTHER)
    assert run([url, f"--output={tmp_path}"]) == 1
    assert "what came has not the" in the_error(capsys)
    assert not [name for name in files(tmp_path) if "model" in name], "damaged bytes are not kept"
    server.files[MODEL].headers = statement(WEIGHTS)
    assert run([url, f"--output={tmp_path}"]) == 0
    assert (tmp_path / "model.pt").read_bytes() == WEIGHTS


@pytest.mark.parametrize(
    "headers",
    [
        {"ETag": '"' + "0" * 32 + '"'},  # of any server
        {"ETag": '"' + "0" * 32 + '-5"', "x-amz-request-id": "1"},  # uploaded in parts
        {"ETag": '"' + "0" * 32 + '"', "x-amz-request-id": "1", "x-amz-server-side-encryption": "aws:kms"},
        {"x-amz-checksum-sha256": "A" * 43 + "-2"},
        {"Digest": "sha-256=too short", "Content-MD5": "not base64"},
    ],
)
def test_what_is_no_hash_of_the_content_is_not_taken_for_one(headers: dict[str, str]) -> None:
    assert download.stated_digest(headers) is None


@pytest.mark.parametrize("headers", [{}, STATEMENTS["Digest"](WEIGHTS)], ids=["size and date", "hash"])
def test_finished_files_are_not_fetched_again(
    headers: dict[str, str | None], tmp_path: Path, server: Server, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    server.files[MODEL].headers = headers
    assert run([url, f"--output={tmp_path}"]) == 0
    server.asked.clear()
    assert run([url, f"--output={tmp_path}"]) == 0
    assert not server.asked and "0 of 2 files to fetch" in capsys.readouterr().out
    (tmp_path / "model.pt").write_bytes(WEIGHTS[:-1])  # cut short by something else
    assert run([url, f"--output={tmp_path}"]) == 0
    assert (tmp_path / "model.pt").read_bytes() == WEIGHTS
    # All steps of a model have one size.
    server.files[MODEL] = File(OTHER, STATEMENTS["Digest"](OTHER) if headers else {}, "Fri, 02 Feb 2024 10:00:00 GMT")
    assert run([url, f"--output={tmp_path}"]) == 0
    assert (tmp_path / "model.pt").read_bytes() == OTHER


def test_weights_of_another_layout_are_not_mixed_in(
    tmp_path: Path, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"of another checkpoint")  # would be read instead of model.pt
    assert run([url, f"--output={tmp_path}"]) == 1
    assert "model.safetensors: not of this checkpoint; remove it" in the_error(capsys)
    assert files(tmp_path) == {"model.safetensors"}


def test_two_processes_do_not_write_one_file(
    tmp_path: Path, server: Server, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    server.cuts = {MODEL: [2**21] + [0] * 9}
    run([url, f"--output={tmp_path}"])
    capsys.readouterr()
    (partial,) = tmp_path.glob(".model.pt.*")
    with Lock(tmp_path / ".model.pt.lock"):
        assert run([url, f"--output={tmp_path}"]) == 1
    assert "model.pt: another process is fetching it" in the_error(capsys)
    assert partial.stat().st_size == 2**21


def test_a_checkpoint_larger_than_the_disk_is_not_begun(
    tmp_path: Path, server: Server, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    server.files[MODEL].headers = {"Content-Length": str(10**18)}
    assert run([url, f"--output={tmp_path}"]) == 1
    assert "do not fit on this disk" in the_error(capsys) and not server.asked


# --- what is not there -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folder", "named"),
    [
        (FOLDER, f"try the hub: bash scripts/get_model.sh {HUB_ID}"),
        ("/ai2-llm/olmo-medium/p067ktg9/step557000-unsharded", "allenai/OLMo-7B@step557000-tokens2464B"),
        ("/ai2-llm/olmo-small/w1r5xfzt/step1000-unsharded", "nearest known one is allenai/OLMo-1B@step20000-tokens84B"),
        ("/elsewhere/step738020-unsharded", "--list shows the known checkpoints"),
    ],
)
@pytest.mark.parametrize("has", ["nothing", "config alone", "a page for everything", "no server"])
def test_what_the_site_has_not_is_on_the_hub(
    folder: str, named: str, has: str, tmp_path: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"{server.url}{folder}"
    if has == "config alone":
        server.add(folder, {"config.yaml": CONFIG})
    if has == "a page for everything":
        server.add(folder, {"config.yaml": b"<p>", "model.pt": b"<p>"}, **{"Content-Type": "text/html; charset=utf-8"})
    if has == "no server":
        url = f"http://127.0.0.1:9{folder}"  # the port that discards everything, hardly open anywhere
    assert run([url, f"--output={tmp_path / 'output'}"]) == 1
    error = the_error(capsys)
    assert error.startswith(f"error: {url}/: ") and named in error
    assert ("Connection refused" if has == "no server" else "404") in error
    assert not files(tmp_path)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["738020"],
        ["ftp://olmo-checkpoints.org/ai2-llm/olmo-small/g4g72enr/step738020-unsharded/"],
        ["https://example.org/olmo/step5-unsharded/"],
        ["https://olmo-checkpoints.org/ai2-llm/olmo-small/g4g72enr/"],
        ["allenai/OLMo-1B"],
        ["allenai/OLMo-1B@main"],
        ["allenai/OLMo-1B-0724-hf@step1000-tokens2B"],  # another model: its step 1000 is not ours
        [HUB_ID, "--outptu=x"],
    ],
)
def test_a_wrong_command_line_is_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 2
    the_error(capsys)


# --- what is known -----------------------------------------------------------------------------------------------


def test_the_list_has_one_line_a_step(root: Path, server: Server) -> None:
    status, stdout, stderr = finish(start(root, server, "--list"))
    assert (status, stderr) == (0, "")
    header = [line for line in stdout.splitlines() if line.startswith("#")]
    assert "computed" in " ".join(header)
    rows = [line.split() for line in stdout.splitlines() if not line.startswith("#")]
    assert {len(row) for row in rows} == {4}
    assert [sum(row[0] == name for row in rows) for name in ("1B", "7B")] == [351, 527]
    site = "https://olmo-checkpoints.org/ai2-llm/olmo-small"
    assert ["1B", "738020", f"{site}/g4g72enr/step738020-unsharded/", HUB_ID] in rows
    for name, step, url, hub_id in rows:
        for address in {url, hub_id} - {"-"}:
            model, found = get_model.locate(address)
            assert model is get_model.known_models()[name] and found == int(step)


# Revisions of the hub, as public programs name them; some are near the middle between two numbers of tokens.
@pytest.mark.parametrize(
    ("model", "revisions"),
    [
        ("1B", ["step20000-tokens84B", "step332000-tokens1393B", "step404000-tokens1694B", "step738020-tokens3095B"]),
        ("7B", ["step1000-tokens4B", "step72000-tokens319B", "step452000-tokens2000B", "step557000-tokens2464B"]),
    ],
)
def test_revisions_are_those_of_the_hub(model: str, revisions: list[str]) -> None:
    known = get_model.known_models()[model]
    steps = [int(revision.partition("-")[0].removeprefix("step")) for revision in revisions]
    assert [known.hub_id(step) for step in steps] == [f"allenai/OLMo-{model}@{revision}" for revision in revisions]


def test_the_list_can_be_cut_short(root: Path, server: Server) -> None:
    process = start(root, server, "--list")
    assert process.stdout and process.stdout.readline().startswith("#")
    process.stdout.close()
    assert process.stderr and process.stderr.read() == ""
    assert process.wait() == 0


def test_checkpoints_go_where_the_analysis_looks() -> None:
    assert {name: Path(model.folder) for name, model in get_model.known_models().items()} == FOLDERS


# --- from the hub ------------------------------------------------------------------------------------------------


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
    assert "has not the sha256 hash" in the_error(capsys)
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
    assert "config.json: what came has not the git hash" in the_error(capsys)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("owner/name@third", "404 Not Found; bash scripts/get_model.sh --list shows"),
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
