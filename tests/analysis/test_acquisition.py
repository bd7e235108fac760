"""Acquisition and forgetting against direct computations from the tables, and the intervals' properties."""

import functools
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas
import pytest

from analysis import acquisition
from analysis.acquisition import (
    acquired,
    acquired_against_original,
    bootstrap,
    compare,
    compare_loss_after,
    compare_loss_rise,
    forgotten,
    loss_rise,
    percent_change,
    read_run,
    strata,
    summarise,
)
from olmo.config import TrainConfig
from olmo.eval.evaluators import Evaluation
from olmo.eval.probes import ProbeTable
from olmo.exceptions import exit_status
from olmo.knowledge.entries import Probe
from olmo.reporting import Reporter
from tests.run_folders import KINDS, TASKS, direct_k, probe_table, write_run

command = functools.partial(exit_status, acquisition.main)
ROOT = Path(__file__).resolve().parents[2]
# One number an entry, of different sizes so that weighing the settings alike would give another K.
BEFORE = {"paraphrase": [-4.0, -5.0, -7.0], "once": [-6.0, -9.0, -3.0, -5.0, -8.0]}
AFTER = {"paraphrase": [-2.0, -1.5, -3.0], "once": [-5.5, -8.0, -3.5, -5.0, -6.0]}


@pytest.fixture(autouse=True)
def _fewer_resamples(monkeypatch):
    monkeypatch.setattr(acquisition, "RESAMPLES", 1000)


def varied(size: int, level: float, deviation: float, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(level, deviation, size)


def knowledge_run(folder: Path, before: dict, after: dict, **extra) -> acquisition.Run:
    return read_run(write_run(folder, {0: probe_table(before), 20: probe_table(after)}, **extra))


# --- K and A -----------------------------------------------------------------------------------------------------


def test_k_and_a_equal_a_direct_computation(tmp_path):
    """Of everything, of each setting and of each kind, from probes that all differ."""
    before, after = probe_table(BEFORE, spread=0.7, seed=1), probe_table(AFTER, spread=0.7, seed=2)
    run = read_run(write_run(tmp_path / "run", {0: before, 20: after}))
    found = summarise(run)
    assert found["step"] == 20
    assert found["K_before"] == pytest.approx(direct_k(before), rel=1e-12)
    assert found["K_after"] == pytest.approx(direct_k(after), rel=1e-12)

    def direct_a(choose) -> float:
        first, last = direct_k(before[choose(before)]), direct_k(after[choose(after)])
        return 100 * (last - first) / abs(first)

    assert found["A"]["value"] == pytest.approx(direct_a(lambda t: t.entry >= 0), rel=1e-12)
    assert set(found["A_by_setting"]) == set(BEFORE)
    for setting, estimate in found["A_by_setting"].items():
        assert estimate["value"] == pytest.approx(direct_a(lambda t, s=setting: t.setting == s), rel=1e-12)
    assert set(found["A_by_kind"]) == set(KINDS)
    for kind, estimate in found["A_by_kind"].items():
        assert estimate["value"] == pytest.approx(direct_a(lambda t, k=kind: t.kind == k), rel=1e-12)


def test_settings_weigh_as_much_as_they_have_entries(tmp_path):
    """method.md section 4, in numbers that can be checked by hand: K = (3 * -16/3 + 5 * -31/5) / 8."""
    run = knowledge_run(tmp_path / "run", BEFORE, AFTER)
    assert summarise(run)["K_before"] == pytest.approx(-47 / 8)
    assert acquired([run]).value == pytest.approx(100 * (47 - 34.5) / 47)


def test_every_probe_of_an_entry_weighs_alike(tmp_path):
    """Also where an entry has fewer probes of one kind, or none; and the trainer's own K says the same."""
    before, after = probe_table(BEFORE, spread=1.0, seed=1), probe_table(AFTER, spread=1.0, seed=2)
    gone = (before.kind == "semantic") & (before["index"] > 1)
    gone |= (before.kind == "composition") & (before.setting == "once") & (before.entry == 4)
    before, after = before[~gone], after[~gone]
    run = read_run(write_run(tmp_path / "run", {0: before, 20: after}))
    assert summarise(run)["K_before"] == pytest.approx(direct_k(before), rel=1e-12)
    assert summarise(run)["K_after"] == pytest.approx(run.curve[-1][1]["K"], rel=1e-12)
    last_of_once = before[(before.setting == "once") & (before.entry == 4)].mean_log_prob.mean()
    assert run.before.entries("once")[4] == pytest.approx(last_of_once, rel=1e-12)


def test_a_kind_that_only_one_setting_has(tmp_path):
    """An interval needs the numbers of entries that were probed with this kind."""
    before, after = (probe_table(x)[lambda t: (t.setting == "once") | (t.kind != "semantic")] for x in (BEFORE, AFTER))
    run = read_run(write_run(tmp_path / "run", {0: before, 20: after}))
    assert strata(run, None, "semantic") == [5]
    assert strata(run) == [3, 5]
    assert summarise(run)["A_by_kind"]["semantic"]["value"] == acquired([run], "once").value


@pytest.mark.parametrize(("gain", "sign"), [(0.5, 1), (-0.5, -1)])
def test_a_is_positive_when_knowledge_was_gained(tmp_path, gain, sign):
    after = {s: np.add(levels, gain) for s, levels in BEFORE.items()}
    estimate = acquired([knowledge_run(tmp_path / "run", BEFORE, after)])
    assert sign * estimate.low > 0 and sign * estimate.high > 0
    assert estimate.low <= estimate.value <= estimate.high


def test_a_against_the_weights_before_resuscitation(tmp_path):
    """The edited start is worse; A against it looks like a gain, A against the original weights does not."""
    edited = {s: np.subtract(levels, 1.0) for s, levels in BEFORE.items()}
    run = knowledge_run(tmp_path / "run", edited, BEFORE, original=probe_table(BEFORE))
    k_original, k_edited = direct_k(probe_table(BEFORE)), direct_k(probe_table(edited))
    assert acquired([run]).value == pytest.approx(100 * (k_original - k_edited) / abs(k_edited))
    assert acquired_against_original([run]).value == pytest.approx(0.0, abs=1e-12)
    assert summarise(run)["K_original"] == pytest.approx(k_original)
    plain = knowledge_run(tmp_path / "plain", BEFORE, AFTER)
    assert acquired_against_original([plain]) is None
    assert acquired_against_original([run, plain]) is None


# --- forgetting --------------------------------------------------------------------------------------------------


def test_p_and_f_equal_a_direct_computation(tmp_path):
    first = dict(zip(TASKS, (0.3, 0.5, 0.6, 0.25, 0.26, 0.31)))
    last = dict(zip(TASKS, (0.28, 0.52, 0.55, 0.25, 0.25, 0.3)))
    tables = {0: probe_table(BEFORE), 10: probe_table(AFTER), 20: probe_table(AFTER)}
    # A task that is none of P's six must not enter it.
    accuracy = {0: {**first, "copa": 0.9}, 20: {**last, "copa": 0.1}}
    run = read_run(write_run(tmp_path / "run", tables, accuracy=accuracy))
    p_before, p_after = sum(first.values()) / 6, sum(last.values()) / 6
    assert forgotten(run) == pytest.approx(
        {"P_before": p_before, "P_after": p_after, "P_chance": 0.25, "F": 100 * (p_before - p_after) / p_before}
    )
    assert forgotten(run)["F"] > 0  # performance was lost


def test_no_f_without_all_six_tasks(tmp_path):
    tables = {0: probe_table(BEFORE), 20: probe_table(AFTER)}
    five = dict.fromkeys(TASKS[:5], 0.5)
    run = read_run(write_run(tmp_path / "run", tables, accuracy={0: five, 20: five}))
    assert forgotten(run) is None
    assert summarise(run)["downstream"] is None


def test_loss_rise_equals_a_direct_computation(tmp_path):
    tables = {0: probe_table(BEFORE), 20: probe_table(AFTER)}
    losses = {
        0: {"general": [4.0, 5.0, 6.0], "science": [3.0, 3.0]},
        20: {"general": [4.5, 5.5, 6.5], "science": [2, 3]},
    }
    run = read_run(write_run(tmp_path / "run", tables, losses))
    assert loss_rise([run], "general").value == pytest.approx(10.0)  # 0.5 of 5
    assert loss_rise([run], "science").value == pytest.approx(-100 / 6)
    assert set(summarise(run)["loss_rise"]) == {"general", "science"}


# --- reading -----------------------------------------------------------------------------------------------------


def test_reads_what_the_trainer_writes(tmp_path):
    """Through the trainer's own Reporter: tables, metrics, the evaluation of the original weights."""
    reporter = Reporter(TrainConfig(save_folder=str(tmp_path / "run")), active=True, resume_step=None)
    probes = [Probe(s, k, e, i, (1, 2, 3), 1) for s in BEFORE for e in range(2) for k in KINDS for i in range(5)]
    ranks, matches = np.zeros(len(probes), dtype=np.int64), np.zeros(len(probes), dtype=bool)

    def evaluation(k: float, loss: float) -> Evaluation:
        total = np.full(len(probes), 2 * k)  # of targets of two tokens
        table = ProbeTable(probes, np.full(len(probes), 2), total, total / 2, ranks, matches)
        metrics = {"eval/K": k, "eval/downstream/sciq_acc": 0.5, "eval/downstream/sciq_chance": 0.25}
        return Evaluation(metrics, table, {"general": np.array([loss, loss + 1])})

    reporter.evaluation(0, evaluation(-4.0, 3.0), prefix="original")
    reporter.evaluation(0, evaluation(-5.0, 3.5))
    reporter.metrics(10, {"train/CrossEntropyLoss": 2.0, "injection/round": 1.0})
    reporter.evaluation(20, evaluation(-3.0, 3.7))
    reporter.close()
    found = summarise(read_run(tmp_path / "run"))
    assert (found["K_original"], found["K_before"], found["K_after"]) == (-4.0, -5.0, -3.0)
    assert found["A"]["value"] == pytest.approx(40.0) and found["A_against_original"]["value"] == pytest.approx(25.0)
    assert found["loss_rise"]["general"]["value"] == pytest.approx(5.0)
    assert found["injections"] == [10]
    assert found["curve"] == [{"step": 0, "K": -5.0}, {"step": 20, "K": -3.0}]
    assert (found["accuracy_before"], found["chance"]) == ({"sciq": 0.5}, {"sciq": 0.25})


def test_before_and_after_are_the_first_and_the_newest_step(tmp_path):
    """By number: step 90 comes before step 100."""
    tables = {step: probe_table({"once": [-float(step) - 1]}) for step in (0, 90, 100)}
    run = read_run(write_run(tmp_path / "run", tables))
    assert (run.step, run.before.entries()[0], run.after.entries()[0]) == (100, -1.0, -101.0)


def test_a_run_that_is_still_going(tmp_path):
    """Its last line half written, and tables of an evaluation whose line is not there yet: step 20 counts."""
    folder = write_run(tmp_path / "run", {0: probe_table(BEFORE), 20: probe_table(AFTER), 30: probe_table(AFTER)})
    metrics = folder / "metrics.jsonl"
    text = metrics.read_text()
    cut = text.index('"step": 30') + 30
    assert "\n" not in text[cut - 5 : cut]
    metrics.write_text(text[:cut])
    assert read_run(folder).step == 20


def test_an_evaluation_of_some_probes_is_not_compared_with_one_of_all(tmp_path):
    """Evaluators of different intervals: at step 30 only one kind was due."""
    some = probe_table(AFTER)[lambda t: t.kind == "memorization"]
    folder = write_run(tmp_path / "run", {0: probe_table(BEFORE), 20: probe_table(AFTER), 30: some})
    assert read_run(folder).step == 20
    other = write_run(tmp_path / "other", {0: probe_table(BEFORE), 30: some})
    with pytest.raises(ValueError, match="no evaluation after step 0 has the same probes"):
        read_run(other)


def test_losses_that_the_newest_evaluation_lacks_are_left_out(tmp_path):
    tables = {0: probe_table(BEFORE), 20: probe_table(AFTER)}
    losses = {0: {"general": [4.0, 5.0], "rare": [1.0]}, 20: {"general": [4.5, 5.5]}}
    assert set(summarise(read_run(write_run(tmp_path / "run", tables, losses)))["loss_rise"]) == {"general"}


# --- intervals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("statistic", ["mean", "A"])
def test_an_interval_holds_the_truth_as_often_as_it_says(statistic):
    """200 repetitions; of a binomial of 200 at 95 %, 88 to 99 % leaves out far less than one in a thousand."""
    generator, covered = np.random.default_rng(0), 0
    for _ in range(200):
        before = generator.normal(-6, 2, 80)
        after = before + generator.normal(1, 1, 80)
        if statistic == "mean":
            estimate, truth = bootstrap([before[None]], lambda mean: mean), -6.0
        else:
            estimate, truth = bootstrap([before[None], after[None]], percent_change), 100 / 6
        covered += estimate.low <= truth <= estimate.high
    assert 0.88 <= covered / 200 <= 0.99


def test_entries_are_drawn_within_their_setting():
    """Two settings far apart, without variation inside: nothing varies, unless the numbers of each were drawn."""
    values = np.array([[-1.0] * 20 + [-9.0] * 30])
    within = bootstrap([values], lambda mean: mean, [20, 30])
    assert within.low == pytest.approx(within.high) and within.value == pytest.approx(-5.8)
    free = bootstrap([values], lambda mean: mean)
    assert free.high - free.low > 1


def test_differences_are_paired_over_entries(tmp_path):
    """Entries differ much, the two runs' gains little: pairing takes the entries' differences out."""
    before = {"paraphrase": varied(30, -6, 2, 0), "once": varied(40, -7, 2, 1)}

    def gained(gain: float, seed: int) -> dict:
        return {s: levels + gain + varied(len(levels), 0, 0.05, seed) for s, levels in before.items()}

    one = knowledge_run(tmp_path / "one", before, gained(1.0, 2))
    other = knowledge_run(tmp_path / "other", before, gained(1.1, 3))
    paired = compare([one], [other])["K_after"]
    apart = [bootstrap([r.after.entries()[None]], lambda mean: mean, strata(r)) for r in (one, other)]
    unpaired = math.hypot(*(e.high - e.low for e in apart))
    assert paired.high - paired.low < unpaired / 10
    assert 0 < paired.low < 0.1 < paired.high
    # And it is the right width: of the mean of 70 differences.
    differences = other.after.entries() - one.after.entries()
    assert paired.value == pytest.approx(differences.mean())
    assert paired.high - paired.low == pytest.approx(2 * 1.96 * differences.std() / math.sqrt(70), rel=0.15)


def test_a_comparison_is_the_second_minus_the_first(tmp_path):
    one = knowledge_run(tmp_path / "one", BEFORE, AFTER)
    other = knowledge_run(tmp_path / "other", AFTER, BEFORE)
    found = compare([one], [other])
    assert found["A"].value == pytest.approx(acquired([other]).value - acquired([one]).value)
    assert found["K_after"].value == pytest.approx(direct_k(probe_table(BEFORE)) - direct_k(probe_table(AFTER)))
    assert compare([one], [one])["A"] == acquisition.Estimate(0.0, 0.0, 0.0)


def test_a_comparison_of_loss_rises_is_paired_over_instances(tmp_path):
    tables, first = {0: probe_table(BEFORE), 20: probe_table(AFTER)}, varied(100, 5, 1, 0)
    runs = []
    for name, rise in (("one", 0.5), ("other", 0.75)):
        losses = {0: {"general": first}, 20: {"general": first + rise}}
        runs.append(read_run(write_run(tmp_path / name, tables, losses)))
    found = compare_loss_rise(runs[:1], runs[1:], "general")
    assert found.value == pytest.approx(100 * 0.25 / first.mean())
    # Every instance rose by as much, so that only the mean of the first losses varies.
    assert found.high - found.low < 0.1 * found.value


def test_losses_after_training_do_not_favour_a_start_that_was_made_worse(tmp_path):
    """The edited one starts at 6 instead of 5 and ends where the other does: it rose less, and is no better."""
    tables, first = {0: probe_table(BEFORE), 20: probe_table(AFTER)}, varied(100, 5, 1, 0)
    runs = []
    for name, start, end in (("one", 0.0, 0.5), ("edited", 1.0, 0.5), ("better", 1.0, 0.25)):
        losses = {0: {"general": first + start}, 20: {"general": first + end}}
        runs.append(read_run(write_run(tmp_path / name, tables, losses)))
    one, edited, better = ([run] for run in runs)
    assert compare_loss_rise(one, edited, "general").high < 0
    assert compare_loss_after(one, edited, "general") == acquisition.Estimate(0.0, 0.0, 0.0)
    found = compare_loss_after(one, better, "general")
    assert found.value == pytest.approx(-100 * 0.25 / first.mean())
    assert found.low < found.value < found.high < 0


def test_runs_with_other_entries_are_not_compared(tmp_path):
    one = knowledge_run(tmp_path / "one", BEFORE, AFTER)
    fewer = knowledge_run(tmp_path / "fewer", *({**x, "once": x["once"][:4]} for x in (BEFORE, AFTER)))
    with pytest.raises(ValueError, match="one and fewer were probed with different entries"):
        compare([one], [fewer])
    # As many entries, but not the same ones.
    renamed = {"once": BEFORE["paraphrase"], "paraphrase": AFTER["once"]}
    swapped = knowledge_run(tmp_path / "swapped", renamed, renamed)
    alone = knowledge_run(tmp_path / "alone", {"paraphrase": BEFORE["once"]}, {"paraphrase": AFTER["once"]})
    once = knowledge_run(tmp_path / "once", {"once": BEFORE["once"]}, {"once": AFTER["once"]})
    for first, second in ((one, swapped), (alone, once)):
        with pytest.raises(ValueError, match="probed with different entries"):
            compare([first], [second])


def test_several_seeds_widen_the_interval(tmp_path):
    """What seeds differ by is noise of the result too. One value a seed: the interval of the mean spans them."""
    before = {"once": varied(50, -6, 0.5, 0)}
    runs = [
        knowledge_run(tmp_path / f"seed{i}", before, {"once": before["once"] + gain})
        for i, gain in enumerate((0.5, 1.0, 1.5))
    ]
    one, all_three = acquired(runs[1:2]), acquired(runs)
    assert all_three.value == pytest.approx(one.value, rel=0.01)
    assert all_three.high - all_three.low > 4 * (one.high - one.low)
    alike = acquired([runs[1]] * 3)
    assert alike.value == pytest.approx(one.value)
    assert alike.high - alike.low == pytest.approx(one.high - one.low, rel=0.1)


def test_seeds_are_paired_in_a_comparison(tmp_path):
    """What a seed does to both conditions alike is not noise of their difference."""
    before = {"once": varied(50, -6, 0.5, 0)}
    groups = [
        [knowledge_run(tmp_path / f"{c}{s}", before, {"once": before["once"] + gain + seed}) for s, seed in shifts]
        for c, gain in (("one", 1.0), ("other", 1.25))
        for shifts in [list(enumerate((-0.5, 0.0, 0.5)))]
    ]
    difference = compare(*groups)["K_after"]
    assert difference.value == pytest.approx(0.25)
    assert difference.high - difference.low < 1e-9


def test_intervals_are_the_same_every_time(tmp_path):
    run = knowledge_run(tmp_path / "run", BEFORE, AFTER)
    assert acquired([run]) == acquired([run])
    values = varied(50, 0, 1, 0)[None]
    other = bootstrap([values], lambda mean: mean, seed=1)
    assert bootstrap([values], lambda mean: mean) != other


# --- command -----------------------------------------------------------------------------------------------------


def test_the_command_prints_a_line_a_run_and_writes_what_it_prints(tmp_path, capsys):
    tables = {0: probe_table(BEFORE), 20: probe_table(AFTER)}
    worse = {0: probe_table(BEFORE), 20: probe_table(BEFORE)}
    losses = {0: {"general": [4.0, 5.0]}, 20: {"general": [4.4, 5.5]}}
    accuracy = {step: dict.fromkeys(TASKS, p) for step, p in ((0, 0.5), (20, 0.4))}
    one = write_run(tmp_path / "one", tables, losses, accuracy, injections=[10, 20])
    other = write_run(tmp_path / "other", worse, losses)
    output = tmp_path / "deep" / "output"
    assert command([str(one), str(other), "--output", str(output)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["run", "one", "other", "other"]
    assert "-5.8750" in lines[1] and "+26.60" in lines[1] and "general +10.00, F +20.00" in lines[1]
    assert lines[3].startswith("other minus one: A -26.60 points [")
    result = json.loads((output / "acquisition.json").read_text())
    assert [r["run"] for r in result["runs"]] == ["one", "other"]
    assert result["runs"][0] == summarise(read_run(one))
    assert result["comparisons"][0]["A"] == compare([read_run(one)], [read_run(other)])["A"].as_json()
    assert (result["comparisons"][0]["from"], result["comparisons"][0]["to"]) == ("one", "other")
    drawn = {p.name for p in output.iterdir()} - {"acquisition.json"}
    stems = ("acquisition_and_forgetting", "probes_over_steps")
    assert drawn == {f"{stem}.{kind}" for stem in stems for kind in ("png", "pdf")}


def test_the_command_works_without_losses_and_downstream_tasks(tmp_path, capsys):
    folder = write_run(tmp_path / "run", {0: probe_table(BEFORE), 20: probe_table(AFTER)})
    assert command([str(folder), "--output", str(tmp_path / "output")]) == 0
    assert (tmp_path / "output" / "probes_over_steps.png").is_file()


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
        (only_paragraphs, "no probes in this table"),
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


@pytest.mark.parametrize("arguments", [[], ["run", "--nonsense"]])
def test_a_wrong_command_line_is_status_2(capsys, arguments):
    assert command(arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_module_as_a_program(tmp_path):
    """Exit status and one line on stderr, as a user sees them."""
    done = subprocess.run(
        [sys.executable, "-m", "analysis.acquisition", str(tmp_path / "absent")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: {tmp_path}/absent: no run here (no metrics.jsonl)\n"


def test_tables_of_pandas_are_tables_of_the_trainer(tmp_path):
    """The helper of these tests writes the columns that the trainer writes, as far as the analysis reads them."""
    folder = write_run(tmp_path / "run", {0: probe_table(BEFORE)}, {0: {"general": [1.0]}})
    written = pandas.read_parquet(folder / "probes" / "step0.parquet")
    table = ProbeTable([], *(np.zeros(0, dtype=np.int64) for _ in range(5)))
    assert set(written.columns) <= {"step", *table.columns()}


def test_a_few_seeds_are_covered_as_often_as_the_interval_says():
    """What seeds share is not resampled; what they differ by has Student's t, so three seeds are wide enough."""
    generator = np.random.default_rng(5)
    hits = 0
    for _ in range(300):
        values = generator.normal(0.0, 1.0, (3, 1)) + generator.normal(0.0, 0.05, (3, 40))
        estimate = bootstrap([values], lambda mean: mean)
        hits += estimate.low <= 0.0 <= estimate.high
    assert 0.90 <= hits / 300 <= 0.99
