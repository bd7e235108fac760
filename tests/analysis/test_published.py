"""K_published and A_published: the formula over losses and over entries, and runs of older versions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas
import pytest

from analysis import acquisition
from analysis.dynamics import Options
from analysis.estimates import bootstrap, percent_change
from analysis.outcomes import as_json, compare, k_and_a, on_both_scales
from analysis.runs import from_original, on_published_scale, read_run
from analysis.summaries import summarise
from analysis.summary_table import notes
from olmo.exceptions import exit_status
from tests import run_folders
from tests.run_folders import KINDS, probe_table, write_run
from tests.run_folders import direct_k_published as formula
from tests.run_folders import label_losses as losses_of

BEFORE = {**run_folders.BEFORE, "duplicate": [-4.0, -6.5]}
AFTER = {**run_folders.AFTER, "duplicate": [-1.0, -2.0]}
SIZES = {"paraphrase": 3, "once": 5, "duplicate": 2}
STEPS = (0, 20)


def tables() -> dict[int, pandas.DataFrame]:
    """Before and after, of three settings of unequal numbers of entries."""
    before = probe_table(BEFORE, spread=1.0, seed=1)
    return dict(zip(STEPS, (before, probe_table(AFTER, spread=1.0, seed=1))))


def change(before: float, after: float) -> float:
    return 100 * (after - before) / abs(before)


def log_losses(run: Path, evaluations: dict[int | str, pandas.DataFrame]) -> None:
    """Lines of metrics.jsonl with the diluted losses of evaluations, as every version of the trainer writes them."""
    with (run / "metrics.jsonl").open("a") as file:
        for step, table in evaluations.items():
            prefix = "original/" if step == "original" else ""
            line = {f"{prefix}eval/{label}/CrossEntropyLoss": loss for label, loss in losses_of(table).items()}
            file.write(json.dumps({"step": 0 if prefix else step, **line}) + "\n")


def of_an_older_version(run: Path) -> Path:
    """Its tables of probes without the column `positions`."""
    for path in (run / "probes").glob("*.parquet"):
        pandas.read_parquet(path).drop(columns="positions").to_parquet(path)
    return run


def test_k_published_is_the_formula_in_every_part(tmp_path):
    before, after = tables().values()
    run = read_run(write_run(tmp_path / "run", tables()))
    found = as_json(k_and_a([run]))
    assert found["K_published_before"]["value"] == pytest.approx(formula(before), rel=1e-12)
    assert found["K_published_after"]["value"] == pytest.approx(formula(after), rel=1e-12)
    assert found["A_published"]["value"] == pytest.approx(change(formula(before), formula(after)), rel=1e-12)
    for setting in SIZES:
        part = as_json(k_and_a([run], setting))
        assert part["K_published_after"]["value"] == pytest.approx(formula(after, (setting,)), rel=1e-12)
        wanted = change(formula(before, (setting,)), formula(after, (setting,)))
        assert part["A_published"]["value"] == pytest.approx(wanted, rel=1e-12)
        one = as_json(k_and_a([run], setting, "semantic"))["K_published_before"]
        assert one["value"] == pytest.approx(-losses_of(before)[f"{setting}_semantic"], rel=1e-12)
    for kind in KINDS:
        part = as_json(k_and_a([run], None, kind))["K_published_before"]
        assert part["value"] == pytest.approx(formula(before, kinds=(kind,)), rel=1e-12)
    assert run.curve[1][1]["K_published"] == pytest.approx(formula(after), rel=1e-12)
    assert run.curve[1][1]["K_published_once"] == pytest.approx(formula(after, ("once",)), rel=1e-12)


def test_its_interval_is_over_entries_each_with_its_own_probes(tmp_path):
    columns = []
    for table in tables().values():
        diluted = table.assign(diluted=table.sum_log_prob / table.positions)
        means = diluted.groupby(["setting", "entry"]).diluted.mean()
        columns.append(np.concatenate([means[setting] for setting in SIZES])[None])
    wanted = bootstrap(columns, percent_change, list(SIZES.values()))
    found = as_json(k_and_a([read_run(write_run(tmp_path / "run", tables()))]))["A_published"]
    assert found == pytest.approx(wanted.as_json())
    assert found["low"] < found["value"] < found["high"]


def test_kinds_with_unequal_numbers_of_probes_weigh_alike(tmp_path):
    """As in the formula, which is a mean of three means: entries with fewer probes of one kind are no exception."""
    fewer = {step: t[(t.kind != "semantic") | (t["index"] < 1 + t.entry)] for step, t in tables().items()}
    found = as_json(k_and_a([read_run(write_run(tmp_path / "run", fewer))]))
    assert found["K_published_before"]["value"] == pytest.approx(formula(fewer[0]), rel=1e-12)
    assert found["A_published"]["value"] == pytest.approx(change(*map(formula, fewer.values())), rel=1e-12)


def test_an_edited_run_is_measured_from_both_weights(tmp_path):
    original = probe_table({s: [x - 1 for x in levels] for s, levels in BEFORE.items()}, spread=1.0, seed=1)
    before, after = tables().values()
    run = read_run(write_run(tmp_path / "run", tables(), original=original))
    shared = as_json(k_and_a([from_original(run)]))
    assert shared["K_published_before"]["value"] == pytest.approx(formula(original), rel=1e-12)
    assert shared["A_published"]["value"] == pytest.approx(change(formula(original), formula(after)), rel=1e-12)
    assert as_json(k_and_a([run]))["K_published_before"]["value"] == pytest.approx(formula(before), rel=1e-12)
    of_older = of_an_older_version(run.folder)
    log_losses(of_older, {**tables(), "original": original})
    assert as_json(k_and_a([from_original(read_run(of_older))]))["A_published"] == pytest.approx(
        {"value": shared["A_published"]["value"], "low": None, "high": None}
    )


def test_an_older_run_has_it_from_its_logged_losses_without_an_interval(tmp_path):
    new = as_json(k_and_a([read_run(write_run(tmp_path / "new", tables()))]))
    run = of_an_older_version(write_run(tmp_path / "old", tables()))
    log_losses(run, tables())
    old = as_json(k_and_a([read_run(run)]))
    for name in ("K_published_before", "K_published_after", "A_published"):
        assert old[name] == pytest.approx({"value": new[name]["value"], "low": None, "high": None}), name
    assert old["A"] == new["A"], "whose interval does not need the column"
    scaled = on_published_scale(read_run(run))
    assert scaled.after.means()["K_published_once_semantic"] == pytest.approx(-losses_of(tables()[20])["once_semantic"])


@pytest.mark.parametrize("logged", [False, True])
def test_the_command_shows_what_it_knows_of_an_older_run(tmp_path, capsys, monkeypatch, logged):
    monkeypatch.setattr("analysis.figures.acquisition.save_acquisition", lambda result, folder: None)
    run, output = of_an_older_version(write_run(tmp_path / "old", tables())), tmp_path / "output"
    if logged:
        log_losses(run, tables())
    later = probe_table({**AFTER, "once": BEFORE["once"]}, spread=1.0, seed=1)
    newer = write_run(tmp_path / "new", {0: tables()[0], 20: later})
    assert exit_status(acquisition.main, [str(run), str(newer), "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    result = json.loads((output / "acquisition.json").read_text())
    old, [difference] = result["runs"][0], result["comparisons"]
    assert "A_published" in (output / "acquisition.csv").read_text().partition("\n")[0]
    assert f"{formula(later):.4f}" in printed
    [note] = [line for line in printed.splitlines() if "K_published" in line]
    if logged:
        assert note == (
            "note: old: K_published is that of the logged losses, without an interval (tables of an older run lack "
            "`positions`)"
        )
        assert f"{formula(tables()[20]):.4f}" in printed
        assert old["K_published_of"] == "logged losses" and old["A_published"]["low"] is None
        more = formula(later) - formula(tables()[20])
        assert difference["K_published_after"] == pytest.approx({"value": more, "low": None, "high": None})
        assert f"K published after {more:+.4f} [?, ?]" in printed
    else:
        assert note == (
            "note: old: K_published is not known: tables of probes lack `positions` (an older run), and metrics.jsonl "
            "lacks the CrossEntropyLoss of their labels"
        )
        assert old["K_published_of"] is None and old["A_published"] is old["by_setting"]["once"]["A_published"] is None
        assert difference["K_published_after"] is None and difference["A"] is not None


def test_differences_are_paired_on_both_scales(tmp_path):
    """Two runs of the same entries whose probes differ: paired over entries."""
    later = probe_table({**AFTER, "once": BEFORE["once"]}, spread=1.0, seed=1)
    one = read_run(write_run(tmp_path / "one", tables()))
    other = read_run(write_run(tmp_path / "other", {0: tables()[0], 20: later}))
    found = as_json(on_both_scales(compare, [one], [other]))
    k = formula(tables()[0])
    points = change(k, formula(later)) - change(k, formula(tables()[20]))
    assert found["A_published"]["value"] == pytest.approx(points, rel=1e-12)
    assert found["A_published"]["low"] < points < found["A_published"]["high"]


def test_padded_batches_of_unequal_sizes_are_named(tmp_path):
    """`before` scored with another device_eval_batch_size: its probes were padded to other lengths."""
    before, after = tables().values()
    run = write_run(tmp_path / "run", {0: before.assign(positions=before.positions + 5), 20: after})
    assert not read_run(run).published.same_batches
    result = summarise([run], Options())
    [row] = result["runs"]
    assert row["K_published_of"] == "probes in other batches" and row["A_published"] is not None
    assert [n for n in notes(result) if "K_published" in n] == [
        "note: run: K_published before and after are of unequal batches (device_eval_batch_size); A_published includes "
        "that"
    ]
