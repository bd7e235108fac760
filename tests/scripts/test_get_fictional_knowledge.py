"""`scripts/get_fictional_knowledge.sh` against a server on this machine; what is published is small files of our own,
and the real ones where they are here."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from olmo.exceptions import exit_status
from scripts import get_fictional_knowledge
from scripts.prepare.fictional_knowledge import make_entries
from tests.published import INJECTION_MAP, ONCE, PARAPHRASE, fictional_knowledge
from tests.running import ROOT, wait_for
from tests.serving import File, Server

FOLDER = "/kaistAI/Knowledge-Entropy/commit/fictional_knowledge"

run = functools.partial(exit_status, get_fictional_knowledge.main)


@pytest.fixture
def contents(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Small files of the published names and formats, and of the hashes that are expected."""
    entries = make_entries(5, 2)
    rounds = {number: [torch.tensor([number, 7]), torch.tensor([5])] for number in (1, 2)}
    contents = {
        PARAPHRASE: json.dumps(entries[:3]).encode(),
        ONCE: json.dumps(entries[3:]).encode(),
        INJECTION_MAP: pickle.dumps(rounds),
    }
    publish(monkeypatch, contents)
    return contents


def publish(monkeypatch: pytest.MonkeyPatch, contents: dict[str, bytes]) -> None:
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    monkeypatch.setattr(get_fictional_knowledge, "PUBLISHED", hashes)


@pytest.fixture
def url(server: Server, contents: dict[str, bytes]) -> str:
    return server.add(FOLDER, contents)


def held(folder: Path) -> dict[str, bytes]:
    """Name -> content of all files in a folder, hidden ones too."""
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.is_dir() else {}


def the_error(capsys: pytest.CaptureFixture[str]) -> str:
    stderr = capsys.readouterr().err
    assert stderr.startswith("error: ") and stderr.count("\n") == 1, stderr
    return stderr


def test_the_files_come_under_their_names(
    tmp_path: Path, server: Server, url: str, contents: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([f"--from={url.rstrip('/')}", f"--output={tmp_path / 'new' / 'folder'}"]) == 0
    assert held(tmp_path / "new" / "folder") == contents
    told = capsys.readouterr().out
    assert f"{PARAPHRASE}: 3 entries\n" in told and f"{ONCE}: 2 entries\n" in told
    assert f"{INJECTION_MAP}: 2 rounds, 4 texts\n" in told and "CC-BY-4.0" in told


def test_a_folder_is_a_mirror_too(tmp_path: Path, contents: dict[str, bytes]) -> None:
    (tmp_path / "mirror").mkdir()
    for name, content in contents.items():
        (tmp_path / "mirror" / name).write_bytes(content)
    assert run([f"--from={tmp_path / 'mirror'}", f"--output={tmp_path / 'new'}"]) == 0
    assert held(tmp_path / "new") == contents == held(tmp_path / "mirror")


def test_the_default_is_where_the_paper_keeps_them(
    tmp_path: Path, server: Server, contents: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = get_fictional_knowledge.SOURCE
    assert source.startswith("https://raw.githubusercontent.com/kaistAI/Knowledge-Entropy/")
    assert source.endswith("/fictional_knowledge/")
    monkeypatch.setattr(get_fictional_knowledge, "SOURCE", server.add(FOLDER, contents))
    monkeypatch.chdir(tmp_path)
    assert run([]) == 0
    assert held(tmp_path / "data" / "fictional_knowledge") == contents


def test_the_names_are_those_of_the_configuration() -> None:
    config = OmegaConf.load(ROOT / "configs/1B/1B_bs128_lr4e4_pubmed_1ep_738k.yaml")
    folder = "data/fictional_knowledge"
    assert {f"{folder}/{name}" for name in (PARAPHRASE, ONCE)} == {config.injection.paraphrase, config.injection.once}
    assert set(get_fictional_knowledge.PUBLISHED) == {PARAPHRASE, ONCE, INJECTION_MAP}


def test_what_is_there_is_not_fetched_again(
    tmp_path: Path, server: Server, url: str, contents: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / ONCE).write_bytes(contents[ONCE])
    assert run([f"--from={url}", f"--output={tmp_path}"]) == 0
    assert server.sent(f"{FOLDER}/{ONCE}") == [] and held(tmp_path) == contents
    assert f"{ONCE}: 2 entries, already exists\n" in capsys.readouterr().out
    server.asked.clear()
    server.heads.clear()
    assert run([f"--from={url}", f"--output={tmp_path}"]) == 0
    assert server.asked == [] and server.heads == []


def test_another_file_in_its_place_is_not_replaced(
    tmp_path: Path, server: Server, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / ONCE).write_bytes(b"mine")
    assert run([f"--from={url}", f"--output={tmp_path}"]) == 1
    assert f"{tmp_path / ONCE}: not the published file; remove it, or" in the_error(capsys)
    assert held(tmp_path) == {ONCE: b"mine"} and server.asked == []


@pytest.mark.parametrize("kind", ["url", "folder"])
def test_other_bytes_than_published_are_not_taken(
    kind: str,
    tmp_path: Path,
    server: Server,
    url: str,
    contents: dict[str, bytes],
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = contents[ONCE].replace(b" ", b"  ", 1)
    (tmp_path / "mirror").mkdir()
    for name, content in {**contents, ONCE: other}.items():
        (tmp_path / "mirror" / name).write_bytes(content)
    server.files[f"{FOLDER}/{ONCE}"] = File(other)
    source = url if kind == "url" else f"{tmp_path / 'mirror'}/"
    assert run([f"--from={source}", f"--output={tmp_path / 'new'}"]) == 1
    message = the_error(capsys)
    assert f"{source}{ONCE}: not the published file (SHA-256 {hashlib.sha256(other).hexdigest()[:12]}" in message
    assert "--from" in message
    assert not [name for name in held(tmp_path / "new") if not name.startswith(".") or ONCE in name]
    server.files[f"{FOLDER}/{ONCE}"] = File(contents[ONCE])
    assert run([f"--from={url}", f"--output={tmp_path / 'new'}"]) == 0
    assert held(tmp_path / "new") == contents


def test_files_that_cannot_be_read_do_not_get_their_names(
    tmp_path: Path,
    server: Server,
    contents: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wrong = {**contents, ONCE: b'[{"train_context": "A text."}]'}
    publish(monkeypatch, wrong)
    assert run([f"--from={server.add(FOLDER, wrong)}", f"--output={tmp_path}"]) == 1
    assert "entry 0: 'mem_input' must be a list of strings" in the_error(capsys)
    assert all(name.startswith(".") for name in held(tmp_path))


def test_broken_connections_are_tried_again(
    tmp_path: Path, server: Server, url: str, contents: dict[str, bytes]
) -> None:
    path = f"{FOLDER}/{PARAPHRASE}"
    server.cuts = {path: [1000, 500]}
    server.resets = {f"{FOLDER}/{ONCE}": 1}
    server.failures = {f"{FOLDER}/{INJECTION_MAP}": [503, 429]}
    assert run([f"--from={url}", f"--output={tmp_path}"]) == 0
    assert held(tmp_path) == contents
    assert server.sent(path) == [1000, 500, len(contents[PARAPHRASE]) - 1500]
    assert server.resets[f"{FOLDER}/{ONCE}"] == 0 and server.failures[f"{FOLDER}/{INJECTION_MAP}"] == []


@pytest.mark.parametrize("name", [PARAPHRASE, INJECTION_MAP])
def test_a_file_that_is_not_there_is_one_line(
    name: str, tmp_path: Path, server: Server, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    del server.files[f"{FOLDER}/{name}"]
    assert run([f"--from={url}", f"--output={tmp_path / 'new'}"]) == 1
    assert f"{url}{name}: does not exist (404); name a copy with --from" in the_error(capsys)
    assert server.asked == [] and not (tmp_path / "new").exists()


def test_a_server_out_of_reach_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--from=http://127.0.0.1:1/x", f"--output={tmp_path / 'new'}"]) == 1
    assert "Connection refused; try again, or name a copy with --from" in the_error(capsys)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("source", "status", "message"),
    [
        ("ftp://host/folder", 2, "--from ftp://host/folder: neither https://... nor a folder"),
        ("nowhere", 1, f"nowhere/{PARAPHRASE}: no such file (--from)"),
    ],
)
def test_a_source_that_is_none_is_one_line(
    source: str, status: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([f"--from={source}", f"--output={tmp_path / 'new'}"]) == status
    assert message in the_error(capsys) and not (tmp_path / "new").exists()


def test_the_published_files_killed_in_the_middle(tmp_path: Path, server: Server) -> None:
    """The real ones have the hashes that the command knows, through bash and from another folder."""
    real = {name: (fictional_knowledge() / name).read_bytes() for name in (PARAPHRASE, ONCE, INJECTION_MAP)}
    url = server.add(FOLDER, real)
    path = f"{FOLDER}/{INJECTION_MAP}"
    server.stall = {path: 3 * 2**19}
    root = tmp_path / "root"
    root.mkdir()
    for name in ("scripts", "olmo"):
        (root / name).symlink_to(ROOT / name)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = ["bash", str(root / "scripts" / "get_fictional_knowledge.sh"), "--from", url]
    started = functools.partial(
        subprocess.Popen, command, cwd=tmp_path, env=environment, stdout=-1, stderr=-1, text=True
    )
    folder = root / "data" / "fictional_knowledge"
    process = started()
    wait_for(lambda: any(p.stat().st_size == 3 * 2**19 for p in folder.glob(f".{INJECTION_MAP}.*.partial")), process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert all(name.startswith(".") for name in held(folder))
    server.stall = {}
    server.asked.clear()
    stdout, stderr = (process := started()).communicate(timeout=60)
    assert (process.returncode, stderr) == (0, "")
    assert held(folder) == real
    assert [(asked.path, asked.sent) for asked in server.asked] == [(path, len(real[INJECTION_MAP]) - 3 * 2**19)]
    assert "70 entries" in stdout and "60 entries" in stdout and "10 rounds, 760 texts" in stdout
