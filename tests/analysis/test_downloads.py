"""Checkpoints of the hub in `python -m analysis.entropy`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis import job, series
from olmo import checkpoint
from tests.analysis.measuring import LENGTH, direct, entropies, made_model, olmo_places, write
from tests.analysis.series_folders import INSTANCES, SERIES, names, read, run, run_of_three, tokens_file
from tests.reference import to_transformers
from tests.running import ROOT
from tests.serving import Server, hub_serving

COMMITS = {step: f"{step}".rjust(40, "a") for step in (10, 20, 30)}


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokens_file(tmp_path_factory.mktemp("data"))


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    return run_of_three(tmp_path / "run")


@pytest.fixture(autouse=True)
def _undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures take longer than all else."""
    monkeypatch.setattr(series, "draw", lambda *_: None)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """The hub with three revisions; its client is real but for the address and the cache."""
    with hub_serving(tmp_path / "hub", monkeypatch) as server:
        for step, commit in COMMITS.items():
            server.add_hub_model("owner/name", f"step{step}-tokens{step}B", hub_files(tmp_path, step), commit)
        yield server


def hub_files(tmp_path: Path, seed: int) -> dict[str, bytes]:
    folder = tmp_path / f"published{seed}"
    to_transformers(made_model(seed)).save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def hub_id(step: int) -> str:
    return f"owner/name@step{step}-tokens{step}B"


def weights_asked(server: Server) -> list[str]:
    """The steps whose weights were downloaded, in order."""
    return [asked.path.split("/")[2].lstrip("a") for asked in server.asked if asked.path.endswith(".safetensors")]


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_revisions_of_the_hub_are_measured_and_known_again_without_their_weights(
    tmp_path: Path, hub: Server, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["--data", tokens, "--data_size", 5, "--output", tmp_path / "out", "--checkpoint"]
    revisions = [hub_id(step) for step in COMMITS]
    assert run(*argv, *revisions) == 0
    assert weights_asked(hub) == ["10", "20", "30"]
    rows = read(tmp_path / "out" / SERIES)["rows"]
    assert [(r["name"], r["checkpoint"]["step"], r["tokens"]) for r in rows] == [
        (f"name@step{step}-tokens{step}B", step, step * 10**9) for step in COMMITS
    ]
    assert [r["checkpoint"]["commit"] for r in rows] == list(COMMITS.values())
    rows_of_tokens = np.fromfile(tokens, "<u2").reshape(INSTANCES, LENGTH).astype(np.int64)[:5]
    for step, row in zip(COMMITS, rows):
        average = direct(to_transformers(made_model(step)), olmo_places(), rows_of_tokens)
        np.testing.assert_allclose(row["layers"], entropies(average), rtol=0, atol=1e-6)

    shutil.rmtree(tmp_path / "hub")
    hub.asked.clear()
    monkeypatch.setattr(job, "measure", lambda *a, **k: pytest.fail("it was measured"))
    assert run(*argv, *revisions) == 0
    assert weights_asked(hub) == []
    assert [p.name for p in (tmp_path / "out").rglob(".download")] == []


def test_a_revision_that_has_moved_is_measured_again(tmp_path: Path, hub: Server, tokens: Path) -> None:
    argv = ["--data", tokens, "--data_size", 5, "--output", tmp_path / "out", "--checkpoint", hub_id(10)]
    assert run(*argv) == 0
    before = read(tmp_path / "out/knowledge_entropy.json")
    hub.add_hub_model("owner/name", "step10-tokens10B", hub_files(tmp_path, 99), "b" * 40)
    assert run(*argv) == 2 and read(tmp_path / "out/knowledge_entropy.json") == before
    assert run(*argv, "--overwrite") == 0
    after = read(tmp_path / "out/knowledge_entropy.json")
    assert after["checkpoint"]["commit"] == "b" * 40
    assert after["knowledge_entropy"] != before["knowledge_entropy"]


def test_keep_none_removes_what_this_command_downloaded_and_nothing_else(
    tmp_path: Path, hub: Server, tokens: Path
) -> None:
    """What the user has of the hub, complete or not, and local folders stay as they are; and are used."""
    assert run("--data", tokens, "--data_size", 4, "--output", tmp_path / "had", "--checkpoint", hub_id(10)) == 0
    checkpoint.download(hub_id(30), weights=False)
    local = write(tmp_path / "run/step5-unsharded", made_model(5))
    before, here = content(tmp_path / "hub"), content(tmp_path / "run")
    hub.asked.clear()
    argv = ["--data", tokens, "--data_size", 5, "--output", tmp_path / "out", "--keep", "none", "--checkpoint"]
    assert run(*argv, local, *(hub_id(step) for step in COMMITS)) == 0
    assert weights_asked(hub) == ["20", "30"]
    assert content(tmp_path / "hub") == before and content(tmp_path / "run") == here
    for folder in ("step5-unsharded", *(f"step{step}-tokens{step}B" for step in COMMITS)):
        assert names(tmp_path / "out" / folder) == {"knowledge_entropy.json", "mlp_average_coefficients.safetensors"}


def test_keep_none_holds_two_downloads_at_most(
    tmp_path: Path, hub: Server, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there: list[int] = []
    real = job.measure

    def measure(*args: Any, **kwargs: Any) -> Any:
        result = real(*args, **kwargs)
        there.append(len([*(tmp_path / "out").rglob("blobs")]))
        return result

    monkeypatch.setattr(job, "measure", measure)
    argv = ["--data", tokens, "--data_size", 5, "--output", tmp_path / "out", "--keep", "none", "--checkpoint"]
    assert run(*argv, *(hub_id(step) for step in COMMITS)) == 0
    assert len(there) == 3 and 1 <= max(there) <= 2
    assert not [*(tmp_path / "out").rglob(".download")]


def test_without_the_hub_an_earlier_download_will_do(
    tmp_path: Path, hub: Server, tokens: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--data", tokens, "--data_size", 5, "--checkpoint", hub_id(10), hub_id(20), "--output"]
    assert run(*argv[:-2], "--output", tmp_path / "first") == 0
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    before = content(tmp_path / "hub")
    for keep in ("all", "none"):
        capsys.readouterr()
        assert run(*argv, tmp_path / keep, "--keep", keep) == 1
        errors = capsys.readouterr().err.splitlines()
        assert len(errors) == 2 and errors[0].startswith(
            f"{hub_id(20)}: no such folder, and the hub does not provide it"
        )
        assert [row["checkpoint"]["step"] for row in read(tmp_path / keep / SERIES)["rows"]] == [10]
        assert content(tmp_path / "hub") == before


def test_two_processes_take_the_same_path(tmp_path: Path, hub: Server, run_folder: Path, tokens: Path) -> None:
    """From the hub and from folders, one of them damaged, one measured before: what one process gives."""
    broken = run_folder / "step10-unsharded/model.safetensors"
    broken.write_bytes(broken.read_bytes()[:100])
    argv = [*("--data", tokens, "--data_size", 9, "--device", "cpu", "--keep", "none")]
    argv += ["--checkpoint", hub_id(10), run_folder / "step10-unsharded", hub_id(20), run_folder / "step9-unsharded"]
    assert run(*argv, "--output", tmp_path / "one") == 1
    two = tmp_path / "two"
    shutil.copytree(tmp_path / "one/step9-unsharded", two / "step9-unsharded")
    hub.asked.clear()
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_ENDPOINT": hub.url,
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_HUB_OFFLINE": "0",
    }
    done = subprocess.run(
        [*launch, "analysis.entropy", *map(str, argv), "--output", str(two)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert "error: 1 of 4 could not be measured" in done.stderr, done.stderr[-3000:]
    assert done.stderr.count(f"{broken}: damaged") == 1 and done.stdout.count(": H = ") == 3
    assert weights_asked(hub) == ["10", "20"], "once for both processes"
    ones, twos = (read(tmp_path / name / SERIES)["rows"] for name in ("one", "two"))
    assert [row["name"] for row in ones] == [row["name"] for row in twos]
    np.testing.assert_allclose(
        [row["knowledge_entropy"] for row in ones], [row["knowledge_entropy"] for row in twos], atol=1e-6
    )
    assert not [*two.rglob(".download")]
