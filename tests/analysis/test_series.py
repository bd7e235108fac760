"""Several checkpoints in one `python -m analysis.entropy`, and what `analysis.entropy_series` makes of results."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from analysis import entropy, entropy_series, series
from olmo import checkpoint
from olmo.exceptions import exit_status
from tests.analysis.test_entropy import LENGTH, direct, entropies, made_model, olmo_places, write
from tests.reference import to_transformers
from tests.running import ROOT
from tests.serving import Server, serving

SERIES = "knowledge_entropy_series.json"
INSTANCES = 70
COMMITS = {step: f"{step}".rjust(40, "a") for step in (10, 20, 30)}
FIGURES = {
    f"{name}.{kind}"
    for name in ("knowledge_entropy", "knowledge_entropy_layers", "coefficient_distributions")
    for kind in ("png", "pdf")
}


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "tokens.npy"
    np.random.default_rng(0).integers(2, 128, INSTANCES * LENGTH).astype("<u2").tofile(path)
    return path


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """Three checkpoints of one run."""
    for step in (9, 10, 100):
        write(tmp_path / f"run/step{step}-unsharded", made_model(step))
    return tmp_path / "run"


DRAW = series.draw


@pytest.fixture(autouse=True)
def _undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures take longer than all else; tests of them draw with DRAW."""
    for module in (series, entropy_series):
        monkeypatch.setattr(module, "draw", lambda *_: None)


def run(*argv: object) -> int:
    return exit_status(entropy.main, [str(a) for a in argv])


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# --- the table and its figures -----------------------------------------------------------------------------------


def test_rows_and_paired_differences_are_those_of_each_instance_by_hand(
    tmp_path: Path,
    run_folder: Path,
    tokens: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(series, "draw", DRAW)
    argv = ["--checkpoint", run_folder / "step*", "--data", tokens, "--data_size", INSTANCES]
    assert run(*argv, "--output", tmp_path / "out") == 0
    found = read(tmp_path / "out" / SERIES)
    rows_of_tokens = np.fromfile(tokens, "<u2").reshape(INSTANCES, LENGTH).astype(np.int64)
    groups = np.arange(INSTANCES) % 64

    def left_out(step: int) -> np.ndarray:
        theirs = to_transformers(made_model(step))
        each = torch.stack([direct(theirs, olmo_places(), [row]) for row in rows_of_tokens])
        return np.array([sum(entropies(each[torch.from_numpy(groups != g)].mean(0))) for g in range(64)])

    without = {step: left_out(step) for step in (9, 10, 100)}
    rows = {row["checkpoint"]["step"]: row for row in found["rows"]}
    assert list(rows) == [9, 10, 100]
    for name, step, other in (
        ("from_previous", 10, 9),
        ("from_previous", 100, 10),
        ("from_first", 100, 9),
        ("from_last", 9, 100),
    ):
        difference = without[step] - without[other]
        pair = rows[step][name]
        error = math.sqrt(63 / 64 * ((difference - difference.mean()) ** 2).sum())
        assert pair["standard_error"] == pytest.approx(error, rel=1e-2)
        assert pair["value"] == rows[step]["knowledge_entropy"] - rows[other]["knowledge_entropy"]
    assert rows[9]["from_previous"] is rows[9]["from_first"] is rows[100]["from_last"] is None
    for step, row in rows.items():
        result = read(tmp_path / f"out/step{step}-unsharded/knowledge_entropy.json")
        assert row["name"] == f"step{step}-unsharded" and row["tokens"] is None
        for key in ("knowledge_entropy", "standard_error", "layers", "layer_standard_errors"):
            assert row[key] == result[key]
    table = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    shown = rows[10]["from_previous"]
    assert table[1][:4] == [
        "step10-unsharded",
        "10",
        f"{rows[10]['knowledge_entropy']:.4f}",
        f"{rows[10]['standard_error']:.4f}",
    ]
    assert table[1][4:7] == [f"{shown['value']:+.4f}", "+-", f"{shown['standard_error']:.4f}"]
    assert names(tmp_path / "out") == {SERIES, *FIGURES, *(f"step{s}-unsharded" for s in rows)}


def test_shares_are_sorted_coefficients_of_the_first_the_middle_and_the_last(
    tmp_path: Path, run_folder: Path, tokens: Path
) -> None:
    assert run("--checkpoint", run_folder / "step*", "--data", tokens, "--data_size", 5) == 0
    found = read(run_folder / SERIES)
    assert [one["name"] for one in found["distributions"]] == [f"step{s}-unsharded" for s in (9, 10, 100)]
    rows = np.fromfile(tokens, "<u2").reshape(INSTANCES, LENGTH).astype(np.int64)[:5]
    average = direct(to_transformers(made_model(9)), olmo_places(), rows).numpy()
    shares = np.array(found["distributions"][0]["shares"])
    sorted_shares = -np.sort(-average / average.sum(1, keepdims=True))
    np.testing.assert_allclose(shares[:, [0, -1]], sorted_shares[:, [0, -1]], rtol=1e-4)
    assert (np.diff(shares) <= 0).all()


def test_figures_are_drawn_from_saved_files_alone(
    tmp_path: Path, run_folder: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["--checkpoint", run_folder / "step*", "--data", tokens, "--data_size", 5]
    assert run(*argv, "--output", tmp_path / "out") == 0
    first = (tmp_path / "out" / SERIES).read_text()
    shutil.rmtree(run_folder)
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "out/step9-unsharded", tmp_path / "elsewhere")  # from another machine
    places = [tmp_path / "out", tmp_path / "elsewhere/step9-unsharded/knowledge_entropy.json"]
    monkeypatch.setattr(entropy_series, "draw", DRAW)
    argv = [str(place) for place in (*places, "--output", tmp_path / "again")]
    assert exit_status(entropy_series.main, argv) == 0
    assert (tmp_path / "again" / SERIES).read_text() == first
    assert names(tmp_path / "again") == {SERIES, *FIGURES}
    (tmp_path / "elsewhere/step9-unsharded/mlp_average_coefficients.safetensors").unlink()
    assert exit_status(entropy_series.main, argv) == 0
    assert read(tmp_path / "again" / SERIES)["distributions"] == []


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (["--coefficient", "relu"], "different coefficients (abs, relu)"),
        (["--precision", "bf16"], "different precisions (fp32, bf16)"),
        (["--data_size", "6"], "different data"),
        (["--sequence_length", "8"], "different data"),
    ],
)
def test_what_is_measured_otherwise_is_not_paired_and_said_so(
    changed: list[str], said: str, tmp_path: Path, run_folder: Path, tokens: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--data", tokens, "--data_size", 5, "--checkpoint"]
    assert run(*argv, run_folder / "step9-unsharded", run_folder / "step10-unsharded") == 0
    assert run(*argv, run_folder / "step100-unsharded", *changed) == 0
    capsys.readouterr()
    assert exit_status(entropy_series.main, [str(run_folder), "--output", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and lines[3].startswith("step100-unsharded") and "+-" in lines[2] and "+-" not in lines[3]
    assert lines[4] == f"not paired with step9-unsharded: step100-unsharded: {said}"
    rows = read(tmp_path / "out" / SERIES)["rows"]
    assert rows[1]["from_first"] is not None and rows[2]["from_first"] is rows[2]["from_previous"] is None
    with pytest.raises(ValueError, match="measured with different"):
        series.paired_difference(*(read(run_folder / f"step{s}-unsharded/knowledge_entropy.json") for s in (9, 100)))


def test_checkpoints_of_several_folders_without_steps(
    tmp_path: Path, tokens: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No common place for a file, then named by their paths."""
    folders = [write(tmp_path / name / "model", made_model(seed)) for seed, name in enumerate(("b", "a"))]
    assert run("--checkpoint", *folders, "--data", tokens, "--data_size", 1) == 0
    assert "--output says where to put this table" in capsys.readouterr().out
    assert not [*tmp_path.rglob(SERIES)]
    files = [folder / "knowledge_entropy.json" for folder in folders]
    rows = series.gather(files)["rows"]
    assert [row["name"] for row in rows] == [str(folder) for folder in folders]
    assert rows[1]["from_first"]["standard_error"] is None  # one instance tells no error


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no knowledge_entropy.json there"),
        ("{", "not JSON"),
        ("[]", "no result"),
        ('{"layers": []}', "it has no"),
    ],
)
def test_no_result_is_one_line(
    content: str | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "knowledge_entropy.json").write_text(content)
    assert exit_status(entropy_series.main, [str(tmp_path), "--output", str(tmp_path / "out")]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: ") and said in shown and shown.count("\n") == 1
    assert not (tmp_path / "out").exists()


# --- one after the other -----------------------------------------------------------------------------------------


def test_the_next_is_prepared_while_one_is_measured_and_no_third_model_is_there(
    tmp_path: Path, run_folder: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A measurement that waits for the preparation of the next would never end without read-ahead."""
    order, prepared = [9, 10, 100], {step: threading.Event() for step in (9, 10, 100)}
    models: list[weakref.ref[Any]] = []
    alive: list[int] = []
    measured: list[int] = []
    real_measure, real_prepare, real_open, real_read = (
        entropy.measure,
        entropy.prepare,
        entropy.open_model,
        checkpoint.read_state,
    )

    def prepare(args: Any, location: Any, output: Any) -> Any:
        step = entropy.step_of(location)
        assert len(measured) >= order.index(step) - 1, "two are prepared ahead"
        ready = real_prepare(args, location, output)
        prepared[step].set()
        return ready

    def count(new: Any) -> Any:
        models.append(weakref.ref(next(iter(new.values())) if isinstance(new, dict) else new))
        alive.append(sum(model() is not None for model in models))
        return new

    def measure(*args: Any, **kwargs: Any) -> Any:
        step = order[len(measured)]
        following = order[order.index(step) + 1 :][:1]
        assert all(prepared[other].wait(60) for other in following), "the next is not read while one is measured"
        measured.append(step)
        return real_measure(*args, **kwargs)

    monkeypatch.setattr(entropy, "prepare", prepare)
    monkeypatch.setattr(entropy, "measure", measure)
    monkeypatch.setattr(entropy, "open_model", lambda *a: count(real_open(*a)))
    monkeypatch.setattr(entropy.checkpoint, "read_state", lambda *a: count(real_read(*a)))
    argv = ["--checkpoint", run_folder / "step*", "--data", tokens, "--data_size", 5]
    assert run(*argv, "--output", tmp_path / "out") == 0
    assert measured == order
    assert max(alive) <= 2


def test_an_interrupted_series_has_its_table_and_goes_on(
    tmp_path: Path, run_folder: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["--checkpoint", run_folder / "step*", "--data", tokens, "--data_size", 5, "--output", tmp_path / "out"]
    measured: list[int] = []
    figures: list[int] = []  # rows of each time they are drawn
    monkeypatch.setattr(series, "draw", lambda found, folder: figures.append(len(found["rows"])))
    real = entropy.measure

    def until_the_third(*args: Any, **kwargs: Any) -> Any:
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(entropy, "measure", until_the_third)
    assert run(*argv) == 130
    assert [row["name"] for row in read(tmp_path / "out" / SERIES)["rows"]] == ["step9-unsharded", "step10-unsharded"]
    measured.clear()
    assert run(*argv) == 0
    assert figures == [2, 3]
    assert len(measured) == 1 and len(read(tmp_path / "out" / SERIES)["rows"]) == 3
    assert not [path for path in (tmp_path / "out").rglob("*") if "partial" in path.name]


def test_one_that_cannot_be_read_does_not_lose_the_others(
    tmp_path: Path, run_folder: Path, tokens: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = run_folder / "step10-unsharded/model.safetensors"
    broken.write_bytes(broken.read_bytes()[:100])
    argv = ["--checkpoint", run_folder / "step*", "--data", tokens, "--data_size", 5]
    assert run(*argv) == 1
    shown = capsys.readouterr()
    assert [row["checkpoint"]["step"] for row in read(run_folder / SERIES)["rows"]] == [9, 100]
    lines = shown.err.splitlines()
    assert len(lines) == 2 and lines[0].startswith(f"{broken}: damaged")
    assert lines[1] == "error: 1 of 3 could not be measured; the same command goes on from here"
    assert shown.out.count(": H = ") == 2


def test_a_wrong_command_line_ends_a_series_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is no checkpoint's fault, so it is not told of each."""
    (tmp_path / "data.txt").write_text("some text")
    for seed in (1, 2):
        to_transformers(made_model(seed)).save_pretrained(tmp_path / f"run/step{seed}")
    capsys.readouterr()  # transformers tells of its saving
    assert run("--checkpoint", tmp_path / "run/*", "--data", tmp_path / "data.txt", "--data_size", 1) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/run/step1: names no tokenizer; give --tokenizer\n"


@pytest.mark.parametrize("steps", [["all"], ["100", "9", "10"]])
def test_all_steps_or_several(steps: list[str], tmp_path: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for step in (9, 10, 100):
        write(Path(f"checkpoints/pretrained_1B/{step}-unsharded"), made_model(step))
    assert run("--step", *steps, "--data", tokens, "--data_size", 3) == 0
    rows = read(Path("checkpoints/pretrained_1B") / SERIES)["rows"]
    assert [row["checkpoint"]["step"] for row in rows] == [9, 10, 100]


# --- from the hub ------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """The hub with three revisions; its client is real but for the address and the cache."""
    from huggingface_hub import constants

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serving() as server:
        for name, value in (
            ("ENDPOINT", server.url),
            ("HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"),
            ("HF_HUB_OFFLINE", False),
            ("HF_HUB_CACHE", str(tmp_path / "hub")),
        ):
            monkeypatch.setattr(constants, name, value)
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
    monkeypatch.setattr(entropy, "measure", lambda *a, **k: pytest.fail("it was measured"))
    assert run(*argv, *revisions) == 0
    assert weights_asked(hub) == []
    assert [p.name for p in (tmp_path / "out").rglob(".download")] == []


def test_a_revision_that_has_moved_is_measured_again(tmp_path: Path, hub: Server, tokens: Path) -> None:
    argv = ["--data", tokens, "--data_size", 5, "--output", tmp_path / "out", "--checkpoint", hub_id(10)]
    assert run(*argv) == 0
    before = read(tmp_path / "out/knowledge_entropy.json")
    hub.add_hub_model("owner/name", "step10-tokens10B", hub_files(tmp_path, 99), "b" * 40)
    assert run(*argv) == 0
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
    real = entropy.measure

    def measure(*args: Any, **kwargs: Any) -> Any:
        result = real(*args, **kwargs)
        there.append(len([*(tmp_path / "out").rglob("blobs")]))
        return result

    monkeypatch.setattr(entropy, "measure", measure)
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
        assert len(errors) == 2 and errors[0].startswith(f"{hub_id(20)}: no such folder, and not to be had")
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
