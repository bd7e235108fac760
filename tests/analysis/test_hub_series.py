"""Series of revisions by pattern: which are measured, in which order, and what a killed command downloads again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from analysis import job, series
from analysis.figures.entropy import series_over_pretraining
from analysis.locations import checkpoint_locations, folder_names, training_of
from olmo import checkpoint
from olmo.exceptions import ConfigurationError
from olmo.model import OLMo
from tests.analysis.measuring import LENGTH, made_model
from tests.analysis.series_folders import SERIES, read, run, tokens_file
from tests.hub import Hub
from tests.reference import tiny_config, to_transformers
from tests.running import ROOT
from tests.serving import hub_serving

NAME = "allenai/OLMo-2-0425-1B"
STAGES = [
    "stage1-step1000-tokens3B",
    "stage1-step2000-tokens5B",
    "stage2-ingredient1-step1000-tokens3B",
    "stage2-ingredient2-step1000-tokens3B",
]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokens_file(tmp_path_factory.mktemp("data"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(series, "draw", lambda *_: None)  # figures take longer than all else
    with hub_serving(tmp_path / "cache", monkeypatch, Hub) as hub:
        yield hub


@cache
def files(seed: int, layers: int = 2) -> dict[str, bytes]:
    """A published model, in memory."""
    model = made_model(seed) if layers == 2 else OLMo(tiny_config(max_sequence_length=LENGTH, n_layers=layers)).eval()
    with tempfile.TemporaryDirectory() as folder:
        to_transformers(model).save_pretrained(folder)
        found = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    return found


def named(found: list[Any], name: str = NAME) -> list[str]:
    return [str(location).removeprefix(f"{name}@") for location in found]


def test_a_pattern_is_asked_of_the_hub_sorted_and_counted(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    weights = {"config.json": b"{}", "model.safetensors": bytes(30_000_000), "pytorch_model.bin": bytes(1000)}
    for revision in reversed(STAGES):
        hub.add(NAME, weights, revision)
    hub.add(NAME, {"config.json": b"{}"}, "stage2-step7", tag=True)
    assert named(checkpoint_locations(None, "1B", [f"{NAME}@*"])) == [*STAGES[:2], "stage2-step7", *STAGES[2:]]
    assert capsys.readouterr().err == (
        f"{NAME}@*: 5 of 6 revisions, {STAGES[0]} to {STAGES[3]}, about 0.0 GB each, 0 GB in all; "
        "left out, without a step: main\n"
    )
    assert named(checkpoint_locations(None, "1B", [f"{NAME}@stage1-*", f"{NAME}@main"])) == [*STAGES[:2], "main"]
    assert named(checkpoint_locations(None, "1B", [f"{NAME}@*"], every=5000)) == [
        STAGES[0],
        STAGES[1],
        "stage2-step7",
        *STAGES[2:],
    ]
    hub.asked.clear()
    assert checkpoint_locations(None, "1B", ["owner/other@step5"]) == ["owner/other@step5"] and not hub.asked


def test_every_selects_folders_and_needs_a_pattern(tmp_path: Path, hub: Hub) -> None:
    for step in (500, 1000, 1500, 2000):
        (tmp_path / f"out/checkpoint-{step}").mkdir(parents=True)
    found = checkpoint_locations(None, "1B", ["out/checkpoint-*"], every=1000)
    assert [place.name for place in found if isinstance(place, Path)] == [f"checkpoint-{n}" for n in (500, 1000, 2000)]
    with pytest.raises(ConfigurationError, match="--every: selects from what a pattern"):
        checkpoint_locations(None, "1B", [f"{NAME}@main"], every=2)
    with pytest.raises(ConfigurationError, match="--every must be at least 1"):
        checkpoint_locations(None, "1B", [f"{NAME}@*"], every=0)


def test_what_the_hub_does_not_have_is_one_line_with_a_remedy(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (1, 2, 100):
        hub.add(NAME, files(1), f"step{step}")
    hub.add("owner/gated", files(1), "step1", gated=True)

    def error(wanted: str) -> str:
        capsys.readouterr()
        status = run("--checkpoint", wanted, "--data", "t.npy", "--output", tmp_path / "out")
        lines = capsys.readouterr().err.splitlines()
        assert status != 0 and len([line for line in lines if line.startswith("error: ")]) == 1, lines
        return lines[-1]

    tokens_file(tmp_path).rename(tmp_path / "t.npy")
    assert error(f"{NAME}@stpe1*").endswith("none of 4 revisions matches; for instance step1, step100, step2")
    assert "there is no owner/none, or it is private; check the name, or log in: hf auth login" in error("owner/none@*")
    assert error("owner/none").endswith(
        "there is no owner/none, or it is private; check the name, or log in: hf auth login"
    )
    assert f"{NAME} has no revision step10, did you mean 'step100'?" in error(f"{NAME}@step10")
    assert error("owner/gated@*").endswith("accept its conditions on its page there, then log in: hf auth login")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "no revision that matches step* was downloaded before" in error(f"{NAME}@step*")


def test_without_the_hub_a_pattern_matches_earlier_downloads(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Complete ones only: of step2 there is no more than the configuration."""
    for step in (1, 2, 3):
        hub.add(NAME, files(1), f"step{step}")
    for step in (3, 1):
        checkpoint.download(f"{NAME}@step{step}")
    checkpoint.download(f"{NAME}@step2", weights=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    capsys.readouterr()
    assert named(checkpoint_locations(None, "1B", [f"{NAME}@step*"])) == ["step1", "step3"]
    warning, line = capsys.readouterr().err.splitlines()
    assert warning.startswith(f"warning: {NAME}: the hub does not list its revisions: ")
    assert warning.endswith(f"{NAME}@step* matches only revisions that were downloaded before")
    assert line == f"{NAME}@step*: 2 of 2 revisions, step1 to step3"


def test_labels_have_the_model_where_two_of_the_hub_have_one_revision() -> None:
    named = ["EleutherAI/pythia-70m@step1", "EleutherAI/pythia-14m@step1", "EleutherAI/pythia-14m@step2"]
    assert folder_names(named) == ["pythia-70m@step1", "pythia-14m@step1", "pythia-14m@step2"]
    assert folder_names(named[1:]) == ["step1", "step2"]
    assert folder_names(["a/m@step1", "b/m@step1", Path("x/step1")]) == ["a--m@step1", "b--m@step1", "step1"]
    with pytest.raises(ConfigurationError, match="two checkpoint folders of one name, step1"):
        folder_names([Path("x/step1"), Path("y/step1"), "a/m@step1"])


def test_what_results_state_of_a_stage(hub: Hub, tmp_path: Path) -> None:
    """Steps and tokens of earlier stages are known from the revisions; not of a folder, nor without the hub."""
    for revision in STAGES:
        hub.add(NAME, {"config.json": b"{}"}, revision)
    first = {"step": 2000, "tokens": 5 * 10**9, "stage": "stage1"}
    assert training_of(f"{NAME}@{STAGES[1]}", tmp_path) == first
    later = {"step": 1000, "stage": "stage2-ingredient1", "steps_before": 2000, "tokens": 8 * 10**9}
    assert training_of(f"{NAME}@{STAGES[2]}", tmp_path) == later
    unknown = {"step": 1000, "stage": "stage2-ingredient1", "tokens": None}
    assert training_of(tmp_path / STAGES[2], tmp_path) == training_of(f"owner/none@{STAGES[2]}", tmp_path) == unknown
    assert training_of("a/b@step1-tokens2B", tmp_path) == {"step": 1, "tokens": 2 * 10**9}


def test_stages_are_lines_of_one_axis_and_models_too(hub: Hub, tmp_path: Path, tokens: Path) -> None:
    """Ingredients are branches that begin where stage 1 ends; two sizes are lines with a panel each."""
    for seed, revision in enumerate(STAGES):
        hub.add(NAME, files(seed), revision)
    hub.add("owner/small", files(9, layers=1), "stage1-step1000-tokens3B")
    argv = ["--data", tokens, "--data_size", 3, "--output", tmp_path / "out", "--keep", "none", "--checkpoint"]
    assert run(*argv, f"{NAME}@stage*", "owner/small@stage*") == 0
    labels = [f"OLMo-2-0425-1B@{revision}" for revision in STAGES]
    rows = {row["name"]: row for row in read(tmp_path / "out" / SERIES)["rows"]}
    assert rows.keys() == {*labels, "small@stage1-step1000-tokens3B"}
    assert {path.parent.name for path in (tmp_path / "out").glob("*/knowledge_entropy.json")} == rows.keys()
    assert [(rows[n]["position"], rows[n]["tokens"]) for n in labels] == [
        (1000, 3 * 10**9),
        (2000, 5 * 10**9),
        (3000, 8 * 10**9),
        (3000, 8 * 10**9),
    ]
    two, one = "2 layers of 48 memories", "1 layers of 48 memories"
    assert [rows[n]["kind"] for n in labels] == [
        f"{two}, {stage}, {NAME}" for stage in ("stage1", "stage1", "stage2-ingredient1", "stage2-ingredient2")
    ]
    assert rows["small@stage1-step1000-tokens3B"]["kind"] == f"{one}, stage1, owner/small"
    assert rows[labels[1]]["from_previous"]["value"] is not None
    for scale, places in {"tokens": [3e9, 5e9, 8e9], "share": [1 / 3, 2 / 3, 1.0], "step": [1e3, 2e3, 3e3]}.items():
        _, points = series_over_pretraining(read(tmp_path / "out" / SERIES)["rows"], scale)
        assert sorted({p["x"] for p in points if NAME in p["line"]}) == pytest.approx(places)
        assert len({(p["panel"], p["line"]) for p in points}) == 4


def test_results_of_earlier_versions_that_knew_no_stages(tmp_path: Path, hub: Hub, tokens: Path) -> None:
    """Their step was -1, and their tokens those of the stage alone."""
    hub.add(NAME, files(2), STAGES[2])
    assert (
        run("--data", tokens, "--data_size", 3, "--output", tmp_path / "out", "--checkpoint", f"{NAME}@{STAGES[2]}")
        == 0
    )
    path = tmp_path / "out/knowledge_entropy.json"
    result = read(path)
    assert result["checkpoint"].pop("stage") == "stage2-ingredient1"
    result["checkpoint"] |= {"step": -1, "tokens": 3 * 10**9}
    path.write_text(json.dumps(result))
    about = series.read_result(path)["checkpoint"]
    assert (about["step"], about["stage"], about["tokens"]) == (1000, "stage2-ingredient1", None)
    hub.asked.clear()
    assert (
        run("--data", tokens, "--data_size", 3, "--output", tmp_path / "out", "--checkpoint", f"{NAME}@{STAGES[2]}")
        == 0
    )
    assert read(path) == result, "it is not measured again"
    assert hub.bytes_sent(".safetensors") == 0


def test_a_series_that_was_killed_downloads_nothing_complete_again(
    tmp_path: Path, hub: Hub, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third download stalls and the process is killed; afterwards the first two need no weights."""
    for step in (1, 2, 3, 4):
        hub.add(NAME, files(step), f"step{step}")
    size = len(files(1)["model.safetensors"])
    sha256 = next(s for s, content in hub.stored.items() if content == files(3)["model.safetensors"])
    place = f"/lfs/{sha256}/{hub.repositories['models', NAME].branches['step3']}/model.safetensors"
    hub.stall[place] = 1000
    argv = [*("--data", str(tokens), "--data_size", "3", "--output", str(tmp_path / "out"), "--device", "cpu")]
    argv += ["--checkpoint", f"{NAME}@step*"]
    process = subprocess.Popen(
        [sys.executable, "-m", "analysis.entropy", *argv],
        env={
            **os.environ,
            **hub.environment(tmp_path),
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "PYTHONPATH": str(ROOT),
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 120
        done = tmp_path / "out/step2/knowledge_entropy.json"
        while not (done.exists() and hub.sent(place)) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    assert hub.bytes_sent(".safetensors") == 2 * size + 1000
    hub.stall.clear()
    before = [asked.path for asked in hub.asked if asked.path.startswith("/lfs/")]
    measured = []
    real = job.measure
    monkeypatch.setattr(job, "measure", lambda *a, **k: (measured.append(1), real(*a, **k))[1])
    assert run(*argv) == 0
    assert len(measured) == 2 and len(read(tmp_path / "out" / SERIES)["rows"]) == 4
    after = [asked.path for asked in hub.asked if asked.path.startswith("/lfs/")][len(before) :]
    assert [path for path in after if path in before] == [place], "only what was not complete"
    # The hub's client begins a file of which a part is here again.
    assert hub.bytes_sent(".safetensors") == 4 * size + 1000
