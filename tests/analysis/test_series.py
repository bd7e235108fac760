"""The table, paired differences and figures of several checkpoints, and `analysis.entropy_series`."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from analysis import entropy_series, pairs, series
from analysis.figures import entropy as figures
from olmo.exceptions import exit_status
from tests.analysis.measuring import LENGTH, direct, entropies, made_model, olmo_places, write
from tests.analysis.series_folders import INSTANCES, SERIES, names, read, run, run_of_three, tokens_file
from tests.reference import to_transformers

FIGURES = {
    f"{name}.{kind}"
    for name in ("knowledge_entropy", "knowledge_entropy_layers", "coefficient_distributions", "breadth")
    for kind in ("png", "pdf", "csv")
}


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokens_file(tmp_path_factory.mktemp("data"))


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    return run_of_three(tmp_path / "run")


DRAW = series.draw


@pytest.fixture(autouse=True)
def _undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures take longer than all else; tests of them draw with DRAW."""
    monkeypatch.setattr(series, "draw", lambda *_: None)


def test_rows_and_paired_differences_are_those_of_each_instance_by_hand(
    tmp_path: Path,
    run_folder: Path,
    tokens: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
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
    assert names(tmp_path / "out") == {SERIES, *(f"step{s}-unsharded" for s in rows)}


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
    tmp_path: Path,
    run_folder: Path,
    tokens: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = ["--checkpoint", run_folder / "step*", "--data", tokens, "--data_size", 5]
    assert run(*argv, "--output", tmp_path / "out") == 0
    first = (tmp_path / "out" / SERIES).read_text()
    shutil.rmtree(run_folder)
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "out/step9-unsharded", tmp_path / "elsewhere")  # from another machine
    places = [tmp_path / "out", tmp_path / "elsewhere/step9-unsharded/knowledge_entropy.json"]
    monkeypatch.setattr(series, "draw", DRAW)
    argv = [str(place) for place in (*places, "--output", tmp_path / "again")]
    assert exit_status(entropy_series.main, argv) == 0
    assert (tmp_path / "again" / SERIES).read_text() == first
    assert names(tmp_path / "again") == {SERIES, *FIGURES}
    capsys.readouterr()
    (tmp_path / "elsewhere/step9-unsharded/mlp_average_coefficients.safetensors").unlink()
    assert exit_status(entropy_series.main, argv) == 0
    assert capsys.readouterr().out.endswith(f"{tmp_path / 'again' / SERIES}: this table; its figures beside it\n")
    assert read(tmp_path / "again" / SERIES)["distributions"] == []


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (["--coefficient", "relu"], "different coefficients (abs, relu)"),
        (["--precision", "bf16"], "different precisions (fp32, bf16)"),
        (["--data_size", "6"], "different numbers of instances (5 instances, 6 instances)"),
        (["--sequence_length", "8"], "different sequence lengths (16 tokens, 8 tokens)"),
        (["--data", "other.npy"], "different data (tokens.npy, other.npy)"),
    ],
)
def test_results_of_different_kinds_are_neither_paired_nor_joined_in_one_line(
    changed: list[str],
    said: str,
    tmp_path: Path,
    run_folder: Path,
    tokens: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("other.npy").write_bytes(tokens.read_bytes()[2:])
    argv = ["--data", tokens, "--data_size", 5, "--checkpoint"]
    assert run(*argv, run_folder / "step9-unsharded", run_folder / "step10-unsharded") == 0
    assert run(*argv, run_folder / "step100-unsharded", *changed) == 0
    capsys.readouterr()
    assert exit_status(entropy_series.main, [str(run_folder), "--output", str(tmp_path / "out")]) == 0
    *lines, _ = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and lines[3].startswith("step100-unsharded") and "+-" in lines[2] and "+-" not in lines[3]
    assert lines[4].startswith(f"not paired with step9-unsharded: step100-unsharded: {said}")
    rows = read(tmp_path / "out" / SERIES)["rows"]
    assert rows[1]["from_first"] is not None and rows[2]["from_first"] is rows[2]["from_previous"] is None
    assert rows[0]["kind"] == rows[1]["kind"] != rows[2]["kind"] and lines[3].endswith(rows[2]["kind"])
    drawn: dict[str, Figure] = {}
    monkeypatch.setattr(figures, "save", lambda figure, stem, rows: drawn.update({stem.name: figure}))
    DRAW(read(tmp_path / "out" / SERIES), tmp_path)
    (axes,) = drawn["knowledge_entropy"].axes
    joined = [(line.get_label(), line.lines[0].get_xdata().tolist()) for line in axes.containers]
    assert joined == [(rows[0]["kind"], [9, 10]), (rows[2]["kind"], [100])]
    shown = [text.get_text() for text in drawn["knowledge_entropy"].legends[0].get_texts()]
    assert shown == [rows[0]["kind"], rows[2]["kind"]] and len(drawn["knowledge_entropy_layers"].axes) == 2
    with pytest.raises(ValueError, match="measured with different"):
        pairs.paired_difference(*(read(run_folder / f"step{s}-unsharded/knowledge_entropy.json") for s in (9, 100)))


def test_a_checkpoint_that_is_named_twice_is_one_result(
    tmp_path: Path, run_folder: Path, tokens: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its difference from itself would be printed as a difference of 0 between two checkpoints."""
    link = tmp_path / "step9-without"
    link.symlink_to(run_folder / "step9-unsharded")
    named = [run_folder / "step9-unsharded", link, run_folder / "step10-unsharded"]
    assert run("--checkpoint", *named, "--data", tokens, "--data_size", 5, "--output", tmp_path / "out") == 0
    for _ in range(2):
        table = capsys.readouterr().out.split("checkpoint ")[1].splitlines()[1:4]
        assert [line.split()[0] for line in table] == ["step9-unsharded", "step10-unsharded", "left"]
        assert table[2] == f"left out: {link} has the weights of {named[0]}" and "0.0000" not in "".join(table)
        assert exit_status(entropy_series.main, [str(tmp_path / "out"), "--output", str(tmp_path / "out")]) == 0


def test_each_result_of_a_long_series_is_read_once(
    tmp_path: Path, run_folder: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the whole series is written again with a few of them only; both were done with each of them."""
    assert run("--data", tokens, "--data_size", 3, "--checkpoint", run_folder / "step9-unsharded") == 0
    content = read(run_folder / "step9-unsharded/knowledge_entropy.json")
    read_files: list[Path] = []
    writes: list[int] = []
    real_read, real_write = series.read_result, series.write
    monkeypatch.setattr(series, "read_result", lambda path: read_files.append(path) or real_read(path))
    monkeypatch.setattr(series, "write", lambda results, out: writes.append(len(results)) or real_write(results, out))
    results = series.Series([tmp_path / "out" / str(step) for step in range(60)], tmp_path / "out")
    for step in range(60):
        (tmp_path / "out" / str(step)).mkdir(parents=True)
        content["checkpoint"] |= {"step": step, "path": f"run/{step}", "fingerprint": str(step)}
        (tmp_path / "out" / str(step) / "knowledge_entropy.json").write_text(json.dumps(content))
        results.add(tmp_path / "out" / str(step), new=True)
    assert len(read_files) == 60 and writes[0] == 1 and len(writes) <= 20
    results.draw()
    assert len(read(tmp_path / "out" / SERIES)["rows"]) == 60 and len(read_files) == 60


def test_checkpoints_of_several_folders_without_steps(
    tmp_path: Path, tokens: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No common place for a file, then named by their paths."""
    folders = [write(tmp_path / name / "model", made_model(seed)) for seed, name in enumerate(("b", "a"))]
    assert run("--checkpoint", *folders, "--data", tokens, "--data_size", 1) == 0
    assert "name one with --output to save this table" in capsys.readouterr().out
    assert not [*tmp_path.rglob(SERIES)]
    files = [folder / "knowledge_entropy.json" for folder in folders]
    rows = series.gather([(series.read_result(file), file) for file in files])["rows"]
    assert [row["name"] for row in rows] == [str(folder) for folder in folders]
    assert rows[1]["from_first"]["standard_error"] is None  # one instance gives no error


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no knowledge_entropy.json there"),
        ("{", "not JSON"),
        ("[]", "not a result"),
        ('{"layers": []}', "it has no"),
        ({"knowledge_entropy": math.nan}, "numbers that are finite"),
        ({"layers": [math.inf, 1.0]}, "numbers that are finite"),
        ({"layers": []}, "numbers that are finite"),
        ({"layer_numbers": [0, 2], "layer_sizes": [48]}, "numbers that are finite"),
        ({"layer_numbers": [0, "2"], "layer_sizes": [48, 48]}, "numbers that are finite"),
        ({"layer_numbers": [0, 2]}, "numbers that are finite"),
        ({"leave_one_group_out": [[math.nan, 1.0]]}, "numbers that are finite"),
        ({"leave_one_group_out": None}, "numbers that are finite"),
        ({"data": "tokens.npy"}, "numbers that are finite"),
        ({"checkpoint": {"path": "x", "step": None}}, "numbers that are finite"),
    ],
)
def test_no_result_is_one_line(
    content: str | dict[str, Any] | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if isinstance(content, dict):
        sound = {"checkpoint": {"path": "run/step1", "step": 1}, "data": {"path": "t.npy", "sha256": "0"}}
        sound |= {"layers": [1.0, 2.0], "layer_standard_errors": [0.1, 0.1], "leave_one_group_out": [[1.0, 2.0]]}
        sound |= {"knowledge_entropy": 3.0, "standard_error": 0.1, "maximum": 4.0, "number_of_instances": 1}
        content = json.dumps({**sound, "coefficient": "abs", **content})
    if content is not None:
        (tmp_path / "knowledge_entropy.json").write_text(content)
    assert exit_status(entropy_series.main, [str(tmp_path), "--output", str(tmp_path / "out")]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: ") and said in shown and shown.count("\n") == 1
    assert not (tmp_path / "out").exists()
