"""Measures besides H in a series: their paired differences by hand, their figures, and results of earlier versions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from analysis import entropy_series, series
from analysis.figures import entropy as figures
from olmo.exceptions import exit_status
from tests.analysis.measuring import made_model, rows_of
from tests.analysis.series_folders import SERIES, read, run, run_of_three
from tests.analysis.test_breadth import SPLITS, by_definition, most_active
from tests.reference import to_transformers

SIZE = 20  # instances, each a group
ALL = "knowledge,attention,next_token"


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, tokens: Path) -> Path:
    """A folder with the results of three checkpoints; tests change copies."""
    folder = tmp_path_factory.mktemp("measured")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(series, "draw", lambda *_: None)
        argv = ["--checkpoint", run_of_three(folder / "run") / "step*", "--data", tokens, "--data_size", SIZE]
        assert run(*argv, "--measures", ALL, "--output", folder / "out") == 0
    return folder / "out"


@torch.no_grad()
def by_hand(step: int, rows: np.ndarray) -> dict[str, np.ndarray]:
    """attention (N,), next_token (N,) and mean coefficients (N, L, M) of every instance, by transformers' own model."""
    theirs = to_transformers(made_model(step))
    theirs.set_attn_implementation("eager")
    seen: dict[int, torch.Tensor] = {}
    for number, layer in enumerate(theirs.model.layers):
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, args, number=number: seen.update({number: args[0]}))
    output = theirs(torch.as_tensor(rows), output_attentions=True)
    attention = sum(-torch.special.xlogy(a.double(), a.double()).sum(-1).mean((1, 2)) for a in output.attentions)
    p = output.logits.double().softmax(-1)
    next_token = -torch.special.xlogy(p, p).sum(-1).mean(1)
    coefficients = torch.stack([seen[number].double().abs().mean(1) for number in sorted(seen)], 1)
    return {"attention": attention.numpy(), "next_token": next_token.numpy(), "coefficients": coefficients.numpy()}


def test_paired_differences_and_overlaps_are_those_by_hand(measured: Path, tokens: Path) -> None:
    rows = {row["checkpoint"]["step"]: row for row in read(measured / SERIES)["rows"]}
    hand = {step: by_hand(step, rows_of(tokens)[:SIZE]) for step in rows}
    others = (("from_previous", 10, 9), ("from_previous", 100, 10), ("from_first", 100, 9), ("from_last", 9, 100))
    for measure in ("attention", "next_token"):
        for step, row in rows.items():
            one = row["measures"][measure]
            assert one["value"] == pytest.approx(hand[step][measure].mean(), abs=1e-5)
            assert one["standard_error"] == pytest.approx(hand[step][measure].std(ddof=1) / SIZE**0.5, rel=1e-3)
        for key, step, other in others:
            # Leaving out one of n values of a mean at a time gives its usual standard error.
            difference = hand[step][measure] - hand[other][measure]
            pair = rows[step]["measures"][measure][key]
            assert pair["value"] == pytest.approx(difference.mean(), abs=1e-5)
            assert pair["standard_error"] == pytest.approx(difference.std(ddof=1) / SIZE**0.5, rel=1e-3)
        assert rows[9]["measures"][measure]["from_first"] is rows[100]["measures"][measure]["from_last"] is None
    chosen = [half for split in SPLITS[:, :SIZE] for half in (split, ~split)]
    for key, step, other in others:
        both = [
            np.array([[by_definition(layer) for layer in hand[s]["coefficients"][half].mean(0)] for half in chosen])
            for s in (other, step)
        ]
        halves = np.diff(both, axis=0)[0].mean(1)  # (2 S, 3)
        wanted = np.sqrt((((halves[::2] - halves[1::2]) / 2) ** 2).mean(0))
        for place, measure in enumerate(("effective", "gini")):
            pair = rows[step]["measures"][measure][key]
            assert pair["standard_error"] == pytest.approx(wanted[place], rel=1e-2)
            values = [rows[s]["measures"][measure]["value"] for s in (other, step)]
            assert pair["value"] == pytest.approx(values[1] - values[0])
    for key, step, other in others[:3]:
        sets = [[most_active(layer) for layer in hand[s]["coefficients"].mean(0)] for s in (step, other)]
        common = np.mean([len(one & two) / len(one) for one, two in zip(*sets)])
        found = rows[step]["overlap"][key]
        assert found["value"] == pytest.approx(common) and found["standard_error"] > 0
    assert rows[9]["overlap"] == {"from_previous": None, "from_first": None}


def test_the_table_has_the_other_entropies_below(measured: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(series, "draw", lambda *_: None)
    assert exit_status(entropy_series.main, [str(measured), "--output", str(tmp_path)]) == 0
    printed, _, _ = capsys.readouterr().out.rstrip().rpartition("\n")  # the last line is where they are
    blocks = [block.splitlines() for block in printed.split("\n\n")]
    assert [block[0].split("  ")[0] for block in blocks] == ["checkpoint"] * 3 and [*map(len, blocks)] == [4] * 3
    assert "attention entropy" in blocks[1][0] and "next-token entropy" in blocks[2][0]
    for block, measure in zip(blocks[1:], ("attention", "next_token")):
        one = read(tmp_path / SERIES)["rows"][2]["measures"][measure]
        first = one["from_first"]
        assert block[3].split()[:3] == ["step100-unsharded", f"{one['value']:.4f}", f"{one['standard_error']:.4f}"]
        assert block[3].endswith(f"{first['value']:+.4f} +- {first['standard_error']:.4f}")


def test_results_of_earlier_versions_have_what_their_files_give(measured: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    shutil.copytree(measured, old)
    for folder in old.glob("step*"):
        result = read(folder / "knowledge_entropy.json")
        for key in ("breadth", "edit_files", "temperature_attention", "temperature_MLP"):
            del result[key]
        (folder / "knowledge_entropy.json").write_text(json.dumps(result))
        tensors = load_file(folder / "mlp_average_coefficients.safetensors")
        del tensors["most_active_memories"]
        save_file(tensors, folder / "mlp_average_coefficients.safetensors")

    def rows_in(folder: Path) -> list[dict[str, Any]]:
        files = sorted(folder.glob("step*/knowledge_entropy.json"))
        return series.gather([(series.read_result(file), file) for file in files])["rows"]

    for row, new in zip(rows_in(old), rows_in(measured), strict=True):
        assert row["from_first"] == new["from_first"]
        assert row["measures"]["attention"] == new["measures"]["attention"]
        for measure in ("effective", "gini", "dead"):
            one = row["measures"][measure]
            assert one["value"] == pytest.approx(new["measures"][measure]["value"]) and one["standard_error"] is None
        for key, found in new["overlap"].items():
            assert row["overlap"][key] == (found and {"value": found["value"], "standard_error": None})
    # A new result beside an old one, and results without any coefficients.
    shutil.rmtree(old / "step9-unsharded")
    shutil.copytree(measured / "step9-unsharded", old / "step9-unsharded")
    pair = rows_in(old)[1]["measures"]["gini"]["from_first"]
    assert pair["value"] != 0 and pair["standard_error"] is None
    for folder in old.glob("step*"):
        (folder / "mlp_average_coefficients.safetensors").unlink()
    assert [set(row["measures"]) for row in rows_in(old)[1:]] == [{"attention", "next_token"}] * 2
    assert all(set(row["overlap"].values()) == {None} for row in rows_in(old))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("breadth", {"gini": {"value": 1.0}}),
        ("breadth", {"gini": {"value": "x", "half_differences": []}}),
        ("attention_leave_one_group_out", None),
        ("attention_entropy", float("nan")),
    ],
)
def test_a_damaged_measure_is_one_line(key: str, value: Any, measured: Path, tmp_path: Path, capsys) -> None:
    result = read(measured / "step9-unsharded/knowledge_entropy.json")
    (tmp_path / "knowledge_entropy.json").write_text(json.dumps({**result, key: value}))
    assert exit_status(entropy_series.main, [str(tmp_path), "--output", str(tmp_path / "out")]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: ") and "numbers that are finite" in shown and shown.count("\n") == 1


# --- the x axis --------------------------------------------------------------------------------------------------


def some_rows(steps: list[int], model: str = "1B", kind: str = "", tokens: int | None = 4_000_000) -> list[dict]:
    return [
        {
            "name": f"step{step}",
            "kind": kind,
            "model": model,
            "run": None,
            "tokens": None if tokens is None else step * tokens,
            "checkpoint": {"step": step},
            "knowledge_entropy": 100.0 - step,
            "standard_error": 0.5,
        }
        for step in steps
    ]


def drawn(rows: list[dict], scale: str) -> list[tuple[str, str, list[float]]]:
    """(panel, x label, x) of every line."""
    figure, _ = figures.series_over_pretraining(rows, scale)
    panels = [(axes, line) for axes in figure.axes if axes.get_visible() for line in axes.containers]
    return [(a.get_title(), a.get_xlabel(), line.lines[0].get_xdata().tolist()) for a, line in panels]


def test_the_x_axis_is_the_step_its_share_or_the_tokens() -> None:
    large = some_rows([100, 400], "7B", "7B")
    rows = [*some_rows([10, 40, 80], "1B", "1B, dolma"), *some_rows([10, 40], "1B", "1B, c4"), *large]
    assert drawn(rows, "step") == [
        ("1B", "pretraining step", [10, 40, 80]),
        ("1B", "pretraining step", [10, 40]),
        ("7B", "pretraining step", [100, 400]),
    ]
    # The last step is that of the run, whatever data a line is measured on.
    shares = [
        (panel, [0.125, 0.5, 1.0][: len(x)] if panel == "1B" else [0.25, 1.0]) for panel, _, x in drawn(rows, "step")
    ]
    assert drawn(rows, "share") == [(panel, "share of the last step", x) for panel, x in shares]
    assert drawn(rows, "tokens")[1] == ("1B", "tokens of pretraining, millions", [4e7, 1.6e8])
    assert drawn(some_rows([1000], tokens=4_000_000), "tokens")[0][1:] == ("tokens of pretraining, billions", [4e9])
    # Seeds that end at other steps each have their own last one.
    seeds = [
        {**row, "run": n, "kind": str(n)} for n, steps in enumerate(([5, 10], [5, 20])) for row in some_rows(steps)
    ]
    assert [x for _, _, x in drawn(seeds, "share")] == [[0.5, 1.0], [0.25, 1.0]]


def test_checkpoints_stand_side_by_side_where_steps_repeat_or_are_unknown() -> None:
    for rows in (some_rows([10, 10, 40]), some_rows([-1, 10])):
        for number, row in enumerate(rows):
            row["name"] = f"checkpoint {number}"
        assert drawn(rows, "step") == [("", "", [*range(len(rows))])]
    # One step in two lines is no repetition.
    assert [x for _, _, x in drawn([*some_rows([10, 40], kind="a"), *some_rows([10, 40], kind="b")], "step")] == [
        [10, 40]
    ] * 2


@pytest.mark.parametrize(("scale", "said"), [("tokens", "--x tokens: "), ("share", "--x share: ")])
def test_a_scale_that_a_result_has_not_is_one_line(
    scale: str, said: str, measured: Path, tmp_path: Path, capsys
) -> None:
    shutil.copytree(measured, tmp_path / "results")
    file = tmp_path / "results/step10-unsharded/knowledge_entropy.json"
    result = read(file)
    about = {**result["checkpoint"], "path": "runs/latest-unsharded", "step": -1}
    file.write_text(json.dumps({**result, "checkpoint": about}))
    argv = [str(tmp_path / "results"), "--output", str(tmp_path / "out"), "--x", scale]
    assert exit_status(entropy_series.main, argv) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: {said}") and "knowledge_entropy.json" in shown and shown.count("\n") == 1


def test_figures_of_all_measures_with_their_numbers(measured: Path, tmp_path: Path, monkeypatch) -> None:
    saved: dict[str, list[dict[str, Any]]] = {}
    monkeypatch.setattr(figures, "save", lambda figure, stem, rows: saved.update({stem.name: rows}))
    argv = [str(measured), "--output", str(tmp_path), "--x", "share"]
    assert exit_status(entropy_series.main, argv) == 0
    rows, table = read(tmp_path / SERIES)["rows"], saved["other_entropies"]
    assert [row["panel"] for row in table] == ["attention entropy (nats)"] * 3 + ["next-token entropy (nats)"] * 3
    assert [row["x"] for row in table] == [0.09, 0.1, 1.0] * 2
    one = rows[1]["measures"]["attention"]
    shown = [table[1][key] for key in ("value", "low", "high")]
    assert shown == pytest.approx([one["value"] + n * one["standard_error"] for n in (0, -2, 2)])
    panels = [row["panel"] for row in saved["breadth"]]
    assert len(set(panels)) == 5 and len(panels) == 3 * 3 + 2 * 2
