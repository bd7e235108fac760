"""The command: its table, its notes, its files, its errors; and real runs from beginning to end."""

import csv
import functools
import itertools
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas
import pytest

from analysis import acquisition, estimates
from analysis.outcomes import acquired, compare, forgotten
from analysis.runs import read_run
from olmo.exceptions import exit_status
from tests.run_folders import AFTER, BEFORE, TASKS, direct_k, probe_table, write_injections, write_run
from tests.run_folders import direct_k_published as diluted
from tests.running import command as process
from tests.running import train, write_world

command = functools.partial(exit_status, acquisition.main)
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _fewer_resamples(monkeypatch):
    monkeypatch.setattr(estimates, "RESAMPLES", 1000)


@pytest.fixture
def no_figures(monkeypatch):
    """They take most of the time."""
    monkeypatch.setattr("analysis.figures.acquisition.save_acquisition", lambda result, folder: None)


SINGLE = "note: differences of single runs have intervals over their entries; another seed may add more"


def table_of(output: str) -> tuple[list[dict[str, str]], list[str]]:
    """(the table's rows by its heads, the lines after it), of what was printed."""
    lines = output.splitlines()
    cells = [re.split(r"  +", line) for line in lines]
    rows = [dict(zip(cells[0], row, strict=True)) for row in itertools.takewhile(lambda r: len(r) > 1, cells[1:])]
    return rows, lines[1 + len(rows) :]


def test_the_command_prints_a_line_a_run_and_writes_what_it_prints(tmp_path, capsys):
    tables = {0: probe_table(BEFORE), 20: probe_table(AFTER)}
    worse = {0: probe_table(BEFORE), 20: probe_table(BEFORE)}
    losses = {0: {"general": [4.0, 5.0]}, 20: {"general": [4.4, 5.5]}}
    accuracy = {step: dict.fromkeys(TASKS, p) for step, p in ((0, 0.5), (20, 0.4))}
    one = write_run(tmp_path / "one", tables, losses, accuracy, injections=[10, 20])
    other = write_run(tmp_path / "other", worse, losses)
    (other / "config.yaml").write_text("load_path: checkpoints/pretrained_1B/369000-unsharded\n")
    output = tmp_path / "deep" / "output"
    assert command([str(one), str(other), "--output", str(output)]) == 0
    rows, rest = table_of(capsys.readouterr().out)
    assert [row["run"] for row in rows] == ["one", "other"]
    assert [row["start"] for row in rows] == ["?", "369000"]
    assert rows[0] | {"A %": "", "A published %": "", "run": ""} == {
        "run": "",
        "start": "?",
        "step": "20",
        "K before": "-5.8750",
        "K after": "-4.3125",
        "A %": "",
        "K published before": f"{diluted(tables[0]):.4f}",
        "K published after": f"{diluted(tables[20]):.4f}",
        "A published %": "",
        "P before": "0.5000",
        "P after": "0.4000",
        "F %": "+20.00 [+20.00, +20.00]",
        "rise of general %": "+10.00 [+10.00, +10.00]",
    }
    assert rows[0]["A %"].startswith("+26.60 [+")
    assert (rows[1]["F %"], rows[1]["A %"]) == ("-", "+0.00 [+0.00, +0.00]")
    assert rest[0] == ("note: one: injections.jsonl is missing (an older run); effectivity and retainability need it")
    assert rest[1] == SINGLE
    [line] = rest[2:]
    assert line.startswith("other minus one: A -26.60 points [") and ", K after -1.5625 [" in line
    assert line.endswith("rise of general +0.00 points [+0.00, +0.00]") and "F " not in line

    result = json.loads((output / "acquisition.json").read_text(), parse_constant=pytest.fail)
    first, second = (read_run(folder) for folder in (one, other))
    assert [r["run"] for r in result["runs"]] == ["one", "other"]
    assert result["runs"][0]["A"] == acquired([first]).as_json()
    assert result["runs"][0]["downstream"] == forgotten([first])
    assert result["runs"][0]["A_by_setting"]["once"] == acquired([first], "once").as_json()
    assert result["runs"][0]["A_by_kind"]["semantic"] == acquired([first], None, "semantic").as_json()
    part = result["runs"][0]["by_setting_and_kind"]["once_semantic"]
    assert part["A"] == acquired([first], "once", "semantic").as_json()
    assert (part["K_before"]["value"], part["K_after"]["value"]) == pytest.approx((-31 / 5, -28 / 5))
    assert result["comparisons"][0]["A"] == compare([first], [second])["A"].as_json()
    part = result["comparisons"][0]["by_setting_and_kind"]["once_semantic"]
    assert part["K_after"] == compare([first], [second], "once", "semantic")["K_after"].as_json()
    assert (result["comparisons"][0]["from"], result["comparisons"][0]["to"]) == ("one", "other")
    with (output / "acquisition.csv").open() as file:
        written = list(csv.DictReader(file))
    assert float(written[0]["A low"]) == result["runs"][0]["A"]["low"] and written[1]["F"] == ""
    drawn = {p.name for p in output.iterdir()} - {"acquisition.json", "acquisition.csv"}
    stems = ("acquisition_and_forgetting", "outcomes_over_pretraining", "probes_by_kind", "probes_over_steps")
    assert drawn == {f"{stem}.{kind}" for stem in stems for kind in ("png", "pdf", "csv")}


def test_table_and_figures_anew_from_the_json_alone(tmp_path, capsys):
    """The runs are gone."""
    tables, accuracy = {0: probe_table(BEFORE), 20: probe_table(AFTER)}, {s: dict.fromkeys(TASKS, 0.5) for s in (0, 20)}
    write_run(tmp_path / "run", tables, accuracy=accuracy, injections=[10])
    first, again = tmp_path / "first", tmp_path / "again"
    assert command([str(tmp_path / "run"), "--output", str(first)]) == 0
    said = capsys.readouterr().out
    shutil.rmtree(tmp_path / "run")
    assert command([str(first / "acquisition.json"), "--output", str(again)]) == 0
    assert capsys.readouterr().out == said
    assert {p.name for p in again.iterdir()} == {p.name for p in first.iterdir()}
    for name in ("acquisition.json", "acquisition.csv", "probes_over_steps.png"):
        assert (again / name).read_bytes() == (first / name).read_bytes()


def test_the_command_works_without_losses_and_downstream_tasks(tmp_path, capsys):
    folder = write_run(tmp_path / "run", {0: probe_table(BEFORE), 20: probe_table(AFTER)})
    assert command([str(folder), "--output", str(tmp_path / "output")]) == 0
    assert (tmp_path / "output" / "probes_over_steps.png").is_file()
    assert capsys.readouterr().out.count("\n") == 2  # nothing was injected, nothing is said of it


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path, capsys):
    for seed in (0, 1):
        write_run(tmp_path / f"seed{seed}" / "run", {0: probe_table(BEFORE), 20: probe_table(AFTER, 5, 0.1, seed)})
    assert command([str(tmp_path / f"seed{seed}" / "run") for seed in (0, 1)]) == 0
    rows, _ = table_of(capsys.readouterr().out)
    assert [row["run"] for row in rows] == [f"{tmp_path}/seed{seed}/run" for seed in (0, 1)]


def test_an_edited_run_is_compared_from_the_common_start(tmp_path, capsys, monkeypatch):
    """What the edit lost at once is no gain: it ends with the same K and a higher loss, and seems to have learned more
    and to have forgotten less when measured from its own start."""
    bars = {}
    monkeypatch.setattr(
        "analysis.figures.acquisition.acquisition_and_forgetting", lambda rows, _: bars.update(rows=rows)
    )
    monkeypatch.setattr("analysis.figures.acquisition.save", lambda figure, stem, rows: None)
    losses = {0: {"general": [4.0, 5.0]}, 20: {"general": [4.2, 5.2]}}
    accuracy = {step: dict.fromkeys(TASKS, p) for step, p in ((0, 0.5), (20, 0.4))}
    plain = write_run(tmp_path / "plain", {0: probe_table(BEFORE), 20: probe_table(AFTER)}, losses, accuracy)
    lowered = {setting: [level - 1 for level in levels] for setting, levels in BEFORE.items()}
    end = {setting: [level + 1e-3 for level in levels] for setting, levels in AFTER.items()}
    losses = {0: {"general": [6.0, 6.0]}, 20: {"general": [4.4, 5.5]}}
    accuracy = {step: dict.fromkeys(TASKS, p) for step, p in ((0, 0.3), (20, 0.35))}
    original = (probe_table(BEFORE), (), {"general": [4.0, 5.0]}, dict.fromkeys(TASKS, 0.5))
    tables = {0: probe_table(lowered), 20: probe_table(end)}
    edited = write_run(tmp_path / "edited", tables, losses, accuracy, *original)
    assert command([str(plain), str(edited), "--output", str(tmp_path / "output")]) == 0
    rows, rest = table_of(capsys.readouterr().out)
    assert rows[1]["rise of general %"].startswith("-17.50 [")
    assert rows[1]["rise of general % of original"].startswith("+10.00 [") and rows[0]["F % of original"] == "-"
    assert (rows[1]["F %"][:6], rows[1]["F % of original"][:6]) == ("-16.67", "+30.00")
    assert rest[0] == SINGLE
    assert rest[1].startswith("edited minus plain, both from the original weights: A +0.02 points [")
    assert "F +10.00 points [" in rest[1] and "rise of general +5.56 points [" in rest[1]
    drawn = {row["name"]: row for row in bars["rows"]}
    (edited / "losses" / "original.parquet").unlink()
    assert command([str(edited)]) == 0
    assert "the losses of the original weights on general are not known" in capsys.readouterr().out
    assert drawn["edited"]["loss_rise"]["value"] == pytest.approx(10)
    assert drawn["edited"]["A"]["value"] - drawn["plain"]["A"]["value"] == pytest.approx(100e-3 / 5.875)


# --- dynamics ----------------------------------------------------------------------------------------------------


def write_injected_run(folder: Path, slope: float = 0.2, gain: float = 1.0, last: int = 60) -> Path:
    """Entries that gain by `gain` at step 3, and lose `slope` of it with every tenfold of the steps since."""
    level = {s: -6.0 + gain * (s >= 3) * (1 - slope * np.log10(max(s - 3, 1))) for s in range(last + 1)}
    names = {"paraphrase": 3, "once": 4}
    tables = {s: probe_table({k: [v] * n for k, n in names.items()}, per_kind=2) for s, v in level.items()}
    write_run(folder, tables, injections=[3])
    write_injections(folder, {3: [f"{k}/{n}" for k, count in names.items() for n in range(count)]})
    return folder


def test_dynamics_in_table_and_json(tmp_path, capsys, no_figures):
    runs = [
        write_injected_run(tmp_path / name, slope, gain) for name, slope, gain in (("one", 0.2, 1), ("two", 0.3, 0.5))
    ]
    output = tmp_path / "output"
    assert command([*map(str, runs), "--window", "10", "--fit_range", "2-40", "--output", str(output)]) == 0
    rows, rest = table_of(capsys.readouterr().out)
    assert [row["effectivity"] for row in rows] == ["+1.0000 [+1.0000, +1.0000]", "+0.5000 [+0.5000, +0.5000]"]
    assert [row["a"] for row in rows] == ["+0.2000 [+0.2000, +0.2000]", "+0.3000 [+0.3000, +0.3000]"]
    [note, line] = rest
    assert note == SINGLE
    assert "effectivity -0.5000 [-0.5000, -0.5000], a +0.1000 [+0.1000, +0.1000]" in line
    result = json.loads((output / "acquisition.json").read_text(), parse_constant=pytest.fail)
    found = result["runs"][0]["dynamics"]
    assert (found["window"], found["outlier_factor"], found["fit_range"]) == (10, 1.5, [2, 40])
    fit = found["groups"]["once_semantic"]["decay"]
    assert fit["a"]["value"] == pytest.approx(0.2) and fit["times"] == 39
    assert fit["x_intercept"]["value"] == pytest.approx(1e5)
    assert result["comparisons"][0]["dynamics"]["once"]["a"]["value"] == pytest.approx(0.1)


@pytest.mark.parametrize(("options", "probed", "window"), [([], 7, 7), ([], None, 50), (["--window", "10"], 7, 10)])
def test_the_window_is_the_probed_one_unless_told(tmp_path, no_figures, options, probed, window):
    """That of the first run; a run without probing windows says nothing of it."""
    runs = [write_injected_run(tmp_path / name, gain=gain, last=8) for name, gain in (("one", 1.0), ("two", 2.0))]
    for run, steps in zip(runs, (probed, 9)):
        (run / "config.yaml").write_text(f"probing: {{steps: {steps}, interval: 1}}\n" if steps else "probing: null\n")
    assert command([*map(str, runs), *options, "--output", str(tmp_path / "output")]) == 0
    found = json.loads((tmp_path / "output" / "acquisition.json").read_text())["runs"]
    assert [run["dynamics"]["window"] for run in found] == [window, window]


@pytest.mark.parametrize(("option", "factor"), [("none", 0), ("0", 0), ("2.5", 2.5)])
def test_the_outlier_factor_reaches_the_measurement(tmp_path, no_figures, option, factor):
    folder, output = write_injected_run(tmp_path / "run", last=8), tmp_path / "output"
    assert command([str(folder), "--outlier_factor", option, "--output", str(output)]) == 0
    assert json.loads((output / "acquisition.json").read_text())["runs"][0]["dynamics"]["outlier_factor"] == factor


def test_what_could_not_be_measured_is_said(tmp_path, capsys):
    """Tables at 0, 30 and 31 only, injections at 10 and 31, K of different steps, losses of an older one."""
    tables = {step: probe_table({"once": [-6.0 + 0.1 * step] * 2}, per_kind=1) for step in (0, 30, 31)}
    losses = {step: {"general": [4.0 + step, 5.0]} for step in (0, 30)}
    folder = write_run(tmp_path / "sparse", tables, losses, injections=[10, 31])
    write_injections(folder, {10: ["once/0", "once/1"], 31: ["once/1"]})
    tables = dict.fromkeys((5, 9), tables[0])
    other = write_run(tmp_path / "other", tables, injections=[6])
    write_injections(other, {6: ["map/0"]})
    assert command([str(folder), str(other), "--window", "5"]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert said == [
        "note: sparse: the loss of general was evaluated at steps 0 and 30",
        "note: sparse: 6 of 9 pairs of probe and injection have no probing window, and no effectivity: set probing "
        "in the run's configuration, such as --probing.steps=5 --probing.interval=1",
        "note: sparse: a maximum is over 1.0 tables of the 5 steps on average",
        "note: sparse: 3 of 9 windows end after the newest table; their maxima may still rise",
        "note: sparse: of 6 probes 0 acquired nothing and have no retainability, 6 lack a table for it",
        "note: sparse: no decay constant of once: fewer than two tables 1 or more steps after their maxima",
        "note: other: was first evaluated at step 5; eval_on_load evaluates the start itself",
        "note: other: injections.jsonl names no entry that is probed; effectivity and retainability need it",
        "note: sparse and other are no pair: injected texts differ, first in round 1",
        "note: the runs were evaluated up to different steps; their differences include that",
        SINGLE,
    ]


def test_without_probing_windows_a_dash_and_one_note(tmp_path, capsys, no_figures):
    """Evaluations at injections only, as in configs/tiny."""
    tables = {step: probe_table({"once": [-6.0 + 0.1 * step] * 2}, per_kind=1) for step in (0, 15, 30, 45)}
    runs = [write_run(tmp_path / name, tables, injections=[15, 30]) for name in ("a", "b", "c", "d")]
    for number, run in enumerate(runs):
        write_injections(run, {15: ["once/0"], 30: ["once/1"]})
        probe_table({"once": [-1.0 * number] * 2}, per_kind=1).to_parquet(run / "probes" / "step45.parquet")
    output = tmp_path / "output"
    assert command([*map(str, runs), "--output", str(output)]) == 0
    rows, rest = table_of(capsys.readouterr().out)
    assert {(row["effectivity"], row["a"]) for row in rows} == {("-", "-")}
    assert [line for line in rest if line.startswith("note")] == [
        "note: a, b and 2 more runs: 6 of 6 pairs of probe and injection have no probing window, and no effectivity: "
        "set probing in the run's configuration, such as --probing.steps=50 --probing.interval=1",
        SINGLE,
    ]
    for run in json.loads((output / "acquisition.json").read_text(), parse_constant=pytest.fail)["runs"]:
        groups = run["dynamics"]["groups"].values()
        assert {(group["effectivity"], group["decay"]) for group in groups} == {(None, None)}


@pytest.mark.parametrize(("evaluated", "said"), [(90, False), (95, True)])
def test_a_run_that_counts_on_from_its_checkpoint_was_evaluated_at_its_start(tmp_path, capsys, evaluated, said):
    folder = write_run(tmp_path / "run", {evaluated: probe_table(BEFORE), 100: probe_table(AFTER)})
    (folder / "config.yaml").write_text("load_path: runs/before/step90\n")
    assert command([str(folder)]) == 0
    assert ("was first evaluated at step" in capsys.readouterr().out) == said


# --- errors ------------------------------------------------------------------------------------------------------


def missing(folder: Path) -> None:
    """Nothing at all."""


def empty(folder: Path) -> None:
    folder.mkdir()


def one_evaluation(folder: Path) -> None:
    write_run(folder, {0: probe_table(BEFORE)})


def only_paragraphs(folder: Path) -> None:
    table = probe_table(BEFORE).assign(kind="paragraph")
    write_run(folder, {0: table, 20: table})


def no_probes(folder: Path) -> None:
    write_run(folder, {})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (missing, "no run here (no metrics.jsonl)"),
        (empty, "no run here (no metrics.jsonl)"),
        (one_evaluation, "1 evaluation(s) with probes, before and after are needed"),
        (no_probes, "0 evaluation(s) with probes, before and after are needed"),
        (only_paragraphs, "0 evaluation(s) with probes, before and after are needed"),
    ],
)
def test_a_folder_without_what_is_needed_is_an_error_that_names_it(tmp_path, capsys, make, message):
    folder = tmp_path / "the_run"
    make(folder)
    assert command([str(folder)]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(folder) in said and message in said


def test_runs_with_other_entries_end_the_command_with_one_line(tmp_path, capsys):
    one = write_run(tmp_path / "one", {0: probe_table(BEFORE), 20: probe_table(AFTER)})
    fewer = probe_table({"once": [-5.0]})
    other = write_run(tmp_path / "other", {0: fewer, 20: fewer})
    assert command([str(one), str(other)]) == 1
    assert capsys.readouterr().err == "error: one and other were probed with different entries\n"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["run", "--nonsense"],
        ["run", "--window", "0"],
        ["run", "--outlier_factor", "-1"],
        ["run", "--outlier_factor", "inf"],
        ["run", "--fit_range", "0-9"],
        ["run", "--fit_range", "9-9"],
    ],
)
def test_a_wrong_command_line_is_status_2(capsys, arguments):
    assert command(arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_module_as_a_program(tmp_path):
    """Exit status and one line on stderr, as a user sees them."""
    done = process(["-m", "analysis.acquisition", str(tmp_path / "absent")], ROOT)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: {tmp_path}/absent: no run here (no metrics.jsonl)\n"


def test_results_stand_alone(tmp_path, capsys):
    result = tmp_path / "acquisition.json"
    result.write_text('{"runs": []}')
    assert command([str(result)]) == 1
    assert capsys.readouterr().err == f"error: {result}: not written by analysis.acquisition\n"
    for flags in (["--baseline", "x"], ["--seeds", "x"], ["--window", "3"], ["--outlier_factor", "0"]):
        assert command([str(result), *flags]) == 2, flags
        assert "has no effect" in (said := capsys.readouterr().err) or "give a file of results alone" in said
    assert command([str(result), "run"]) == 2
    assert capsys.readouterr().err == f"error: {result}: give a file of results alone, or folders of runs\n"


def test_a_place_that_cannot_be_written_is_known_before_anything_is_read(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert command(["nowhere", "--output", str(tmp_path / "file" / "output")]) == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/file/output: cannot be written")


# --- from beginning to end ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> list[Path]:
    """Two runs of the trainer: one from new weights, one from its checkpoint of step 4; all is evaluated at every step,
    six entries enter at steps 2, 4 and 6, `once` entries in one round each."""
    world = write_world(tmp_path_factory.mktemp("trained"))
    common = ("--eval_interval=1", "--eval_on_load=true", "--save_interval_unsharded=4")
    runs = [world / "first", world / "second"]
    train(world / "config.yaml", runs[0], *common)
    train(
        world / "config.yaml", runs[1], *common, f"--load_path={runs[0]}/step4-unsharded", "--reset_trainer_state=true"
    )
    for run in runs:
        if not (run / "injections.jsonl").exists():
            entered = [f"paraphrase/{number}" for number in range(3)]
            write_injections(run, {step: [*entered, f"once/{number}"] for number, step in enumerate((2, 4, 6))})
    return runs


def test_real_runs_from_beginning_to_end(trained, tmp_path, capsys):
    output = tmp_path / "output"
    assert command([*map(str, trained), "--outlier_factor", "none", "--output", str(output)]) == 0
    rows, _ = table_of(capsys.readouterr().out)
    assert [(row["run"], row["start"], row["step"]) for row in rows] == [("first", "0", "7"), ("second", "4", "7")]
    result = json.loads((output / "acquisition.json").read_text(), parse_constant=pytest.fail)
    for run, found in zip(trained, result["runs"]):
        tables = {step: pandas.read_parquet(run / "probes" / f"step{step}.parquet") for step in range(8)}
        tables = {step: table[table.kind != "paragraph"] for step, table in tables.items()}
        k = {step: direct_k(table) for step, table in tables.items()}
        assert found["A"]["value"] == pytest.approx(100 * (k[7] - k[0]) / abs(k[0]))
        assert [point["K"] for point in found["curve"]] == pytest.approx(list(k.values()))
        assert set(found["loss_rise"]) == {"walk/heldout", "walk/other"}
        measured = found["dynamics"]
        # 15 probes of three entries at three steps each, and of three entries at one.
        assert measured["coverage"]["pairs"] == measured["coverage"]["measured"] == 45 * 3 + 45
        assert measured["coverage"]["no_window"] == 0
        level = {
            step: table.set_index(["setting", "entry", "kind", "index"]).mean_log_prob for step, table in tables.items()
        }
        gains = []
        for number, step in enumerate((2, 4, 6)):
            gain = pandas.concat([level[step], level[step + 1]], axis=1).max(axis=1) - level[step - 1]
            gains += gain.loc["paraphrase"].tolist()
            to_the_end = pandas.concat([level[s] for s in range(step, 8)], axis=1).max(axis=1) - level[step - 1]
            gains += to_the_end.xs("once").xs(number).tolist()
        assert len(gains) == 180
        by_injection = measured["groups"]["all"]["effectivity_by_injection"]
        assert (by_injection["at"], by_injection["values"]) == ([1, 2, 3], [90, 45, 45])
        assert measured["groups"]["all"]["effectivity"]["value"] == pytest.approx(np.mean(gains))
    figures = ("acquisition_and_forgetting", "outcomes_over_pretraining", "probes_over_steps", "probes_by_kind")
    figures += ("effectivity", "retainability", "retainability_tokens")
    assert all((output / f"{name}.{kind}").stat().st_size for name in figures for kind in ("png", "pdf", "csv"))


def test_a_real_run_that_is_still_going(trained, tmp_path, capsys, no_figures):
    """Cut off in the middle of the lines of step 5, whose tables are there already."""
    run = tmp_path / "going"
    shutil.copytree(trained[0], run)
    for name in ("metrics.jsonl", "injections.jsonl"):
        text = (run / name).read_text()
        cut = text.index('"step": 5') if name == "metrics.jsonl" else text.index('"step": 6')
        (run / name).write_text(text[: cut + 12])
    for step in (6, 7):
        (run / "probes" / f"step{step}.parquet").unlink()
        (run / "losses" / f"step{step}.parquet").unlink()
    assert command([str(run), "--output", str(tmp_path / "output")]) == 0
    rows, rest = table_of(capsys.readouterr().out)
    assert rows[0]["step"] == "4"
    [found] = json.loads((tmp_path / "output" / "acquisition.json").read_text())["runs"]
    assert found["loss_steps"] == {"walk/heldout": [0, 4], "walk/other": [0, 4]}
    assert found["dynamics"]["coverage"]["pairs"] == 45 * 2 + 30
    assert any("windows end after the newest table" in line for line in rest)
