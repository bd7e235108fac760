"""Runs of one setting with several seeds, the baseline of a comparison, and runs that are one run."""

import functools
import json
import shutil
import statistics
from pathlib import Path

import pandas
import pytest

from analysis import acquisition
from olmo.exceptions import exit_status
from tests.run_folders import AFTER, BEFORE, direct_k, probe_table, write_run

command = functools.partial(exit_status, acquisition.main)
pytestmark = pytest.mark.usefixtures("few_resamples")


def make(folder: Path, config: str, noise: int, gain: float = 0.0) -> Path:
    """A run whose end has `gain` more than AFTER; `noise`: seed of the differences between its probes."""
    after = {setting: [level + gain for level in levels] for setting, levels in AFTER.items()}
    losses = {0: {"general": [4.0, 5.0]}, 20: {"general": [4.4 + 0.1 * noise, 5.5]}}
    write_run(folder, {0: probe_table(BEFORE), 20: probe_table(after, 5, 0.3, noise)}, losses)
    (folder / "config.yaml").write_text(config)
    return folder


def config(name: str, seed: int, rate: float = 1.0) -> str:
    return f"run_name: {name}\nsave_folder: x/{name}\nseed: {seed}\noptimizer: {{learning_rate: {rate}}}\n"


def k_after(run: Path) -> float:
    return direct_k(pandas.read_parquet(run / "probes" / "step20.parquet"))


@pytest.fixture
def runs(tmp_path) -> dict[str, Path]:
    """Two settings: three seeds of `base`, two of `other`."""
    named = {f"base_seed{s}": make(tmp_path / f"base_seed{s}", config(f"base_seed{s}", s), s) for s in (1, 2, 3)}
    for s in (1, 2):
        named[f"other_seed{s}"] = make(tmp_path / f"other_seed{s}", config(f"other_seed{s}", s, 2.0), 10 + s, 0.5)
    return named


def measured(arguments: list, output: Path) -> dict:
    assert command([*map(str, arguments), "--output", str(output)]) == 0
    return json.loads((output / "acquisition.json").read_text(), parse_constant=pytest.fail)


@pytest.fixture
def no_figures(monkeypatch):
    monkeypatch.setattr("analysis.figures.acquisition.save_acquisition", lambda result, folder: None)


def test_runs_that_differ_in_their_seed_are_taken_together(runs, tmp_path, capsys, no_figures):
    found = measured(list(runs.values()), tmp_path / "output")
    base, _ = found["conditions"]
    assert base["run"] == "mean of base (3 seeds)" and base["runs"] == ["base_seed1", "base_seed2", "base_seed3"]
    before, after = direct_k(probe_table(BEFORE)), [k_after(runs[name]) for name in base["runs"]]
    a = [100 * (k - before) / abs(before) for k in after]
    assert base["K_after"]["value"] == pytest.approx(statistics.mean(after))
    assert base["A"]["value"] == pytest.approx(statistics.mean(a))
    assert base["spread"]["A"] == pytest.approx(statistics.stdev(a))
    assert base["spread"]["K_after"] == pytest.approx(statistics.stdev(after))
    # The seeds' entries are the same entries: the interval is as wide as one run's, or wider by the seeds.
    one = found["runs"][0]["A"]
    half = 4.303 * statistics.stdev(a) / 3**0.5
    assert base["A"]["high"] - base["A"]["low"] > 0.9 * (one["high"] - one["low"])
    assert base["A"]["high"] - base["A"]["value"] >= half
    # Seeds are compared in pairs: of those that both have.
    [comparison] = found["comparisons"]
    assert comparison["runs"] == [["base_seed1", "other_seed1"], ["base_seed2", "other_seed2"]]
    wanted = statistics.mean(k_after(runs[o]) - k_after(runs[b]) for b, o in comparison["runs"])
    assert comparison["K_after"]["value"] == pytest.approx(wanted)
    printed = capsys.readouterr().out
    assert "other minus base (2 seeds): A +" in printed
    assert f"standard deviation between the seeds: K before 0.0000, K after {base['spread']['K_after']:.4f}" in printed
    assert (tmp_path / "output" / "acquisition.csv").read_text().count("\nmean of") == 2
    assert measured([tmp_path / "output" / "acquisition.json"], tmp_path / "again") == found


def test_the_baseline_is_the_one_asked_for(runs, tmp_path, capsys, no_figures):
    """By its folder or its name, also where it is not among the runs."""
    one, other, third = runs["base_seed1"], runs["other_seed1"], runs["other_seed2"]
    (third / "config.yaml").write_text(config("third", 9, 3.0))
    for baseline in (other, "other_seed1"):
        found = measured([one, other, third, "--baseline", baseline], tmp_path / "output")
        assert [(c["from"], c["to"]) for c in found["comparisons"]] == [
            ("other_seed1", "base_seed1"),
            ("other_seed1", "other_seed2"),
        ]
    found = measured([one, "--baseline", other], tmp_path / "output")
    assert [run["run"] for run in found["runs"]] == ["other_seed1", "base_seed1"]
    [comparison] = found["comparisons"]
    assert comparison["K_after"]["value"] == pytest.approx(k_after(one) - k_after(other))
    assert command([str(one), "--baseline", str(tmp_path / "absent")]) == 1
    assert "absent: no run here" in capsys.readouterr().err


def test_seeds_can_be_named(runs, tmp_path, capsys, no_figures):
    """Where configurations differ in more, such as the folders of each seed's own pretraining."""
    for number, run in enumerate(runs.values()):
        (run / "config.yaml").write_text(config(run.name, number, number))
    base, other = list(runs.values())[:3], list(runs.values())[3:]
    found = measured(["--seeds", *base, "--seeds", *other], tmp_path / "output")
    assert [row["runs"] for row in found["conditions"]] == [[r.name for r in base], [r.name for r in other]]
    assert found["comparisons"][0]["K_after"] is None
    assert "other minus base: not compared, they have no seed in common" in capsys.readouterr().out
    assert command(["--seeds", str(base[0]), "--seeds", str(base[0])]) == 2
    shutil.copy(base[0] / "probes" / "step0.parquet", base[0] / "probes" / "original.parquet")
    assert command(["--seeds", *map(str, base)]) == 1
    assert "no seeds of one setting: one began with edited weights" in capsys.readouterr().err
    assert command([]) == 2


@pytest.mark.parametrize("how", ["path", "other path", "link", "copy", "seed"])
def test_a_run_that_is_named_twice_is_one_run(runs, tmp_path, capsys, no_figures, how):
    one, twice = runs["base_seed1"], tmp_path / "twice"
    if how == "path":
        twice = one
    elif how == "other path":
        twice = one / ".." / one.name
    elif how == "link":
        twice.symlink_to(one)
    else:
        shutil.copytree(one, twice)
    if how == "seed":  # a seed that varies nothing
        (twice / "config.yaml").write_text(config("twice", 2))
    found = measured([one, twice, runs["other_seed1"]], tmp_path / "output")
    assert len(found["runs"]) == 2 and len(found["comparisons"]) == 1 and found["conditions"] == []
    assert len(found["identical"]) == 1
    printed = capsys.readouterr().out
    assert (
        ("named twice" if how == "path" else "has exactly the metrics of") in printed
        and "counts once" in printed
        and "+0.00 [+0.00, +0.00]" not in printed
    )
