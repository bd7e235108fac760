"""What is read from a run's folder: which steps are compared, and what is not there yet."""

import json

import numpy as np
import pandas
import pytest

from analysis.outcomes import forgotten
from analysis.probes import read_probes
from analysis.runs import probing_steps, read_encounters, read_run
from olmo.config import TrainConfig
from olmo.eval.evaluators import Evaluation
from olmo.eval.probes import ProbeTable
from olmo.knowledge.entries import Probe
from olmo.report.reporter import Reporter
from tests.run_folders import AFTER, BEFORE, KINDS, TASKS, probe_table, write_injections, write_run


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
    run = read_run(tmp_path / "run")
    assert [k.entries().tolist() for k in (run.original, run.before, run.after)] == [[-4.0] * 4, [-5.0] * 4, [-3.0] * 4]
    assert [(step, losses.tolist()) for step, losses in run.losses["general"]] == [(0, [3.5, 4.5]), (20, [3.7, 4.7])]
    assert run.injections == [10] and run.encounters is None
    assert [(step, values["K"]) for step, values in run.curve] == [(0, -5.0), (20, -3.0)]
    assert (run.accuracy_before, run.accuracy_after, run.chance) == ({"sciq": 0.5}, {"sciq": 0.5}, {"sciq": 0.25})
    assert run.start == 0  # of new weights, says its config.yaml


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
    assert set(read_run(write_run(tmp_path / "run", tables, losses)).losses) == {"general"}


def test_tables_of_pandas_are_tables_of_the_trainer(tmp_path):
    """The helper of these tests writes the columns that the trainer writes, as far as the analysis reads them."""
    folder = write_run(tmp_path / "run", {0: probe_table(BEFORE)}, {0: {"general": [1.0]}})
    written = pandas.read_parquet(folder / "probes" / "step0.parquet")
    table = ProbeTable([], *(np.zeros(0, dtype=np.int64) for _ in range(6)))
    assert set(written.columns) <= {"step", *table.columns()}


def test_losses_and_accuracies_are_the_newest_up_to_the_newest_probes(tmp_path):
    """A window of probes after the injection at step 20: K is of step 22, losses and accuracies of step 10 or 5; what
    was evaluated later than any probes does not count."""
    tables = {step: probe_table({"once": [-9.0 + 0.1 * step]}) for step in (0, 10, 19, 20, 21, 22)}
    losses = {step: {"general": [4.0 + step, 5.0 + step]} for step in (0, 5, 10, 30)}
    losses[5]["rare"] = [1.0]
    losses[0]["rare"] = [2.0]
    accuracy = {step: dict.fromkeys(TASKS, 0.5 - 0.01 * step) for step in (0, 10, 30)}
    accuracy[20] = {"sciq": 0.9}  # not all that were asked before
    folder = write_run(tmp_path / "run", tables, losses, accuracy, injections=[20])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 30, **{f"eval/downstream/{task}_acc": 0.1 for task in TASKS}}) + "\n")
    run = read_run(folder)
    assert (run.first_step, run.step) == (0, 22)
    assert run.after.entries()[0] == pytest.approx(-6.8)
    assert {label: [step for step, _ in pair] for label, pair in run.losses.items()} == {
        "general": [0, 10],
        "rare": [0, 5],
    }
    assert run.losses["general"][1][1].tolist() == [14.0, 15.0] and run.losses["rare"][1][1].tolist() == [1.0]
    assert run.accuracy_steps == (0, 10)
    assert run.accuracy_after == dict.fromkeys(TASKS, 0.4)
    assert [step for step, _ in run.curve] == [0, 10, 19, 20, 21, 22]


def test_losses_of_other_instances_are_not_compared(tmp_path):
    tables = {0: probe_table(BEFORE), 20: probe_table(AFTER)}
    losses = {0: {"general": [4.0, 5.0]}, 10: {"general": [4.5, 5.5]}, 20: {"general": [4.0]}}
    [(label, pair)] = read_run(write_run(tmp_path / "run", tables, losses)).losses.items()
    assert label == "general" and [step for step, _ in pair] == [0, 10]


def test_all_probes_of_all_tables_by_step(tmp_path):
    """Whatever the order of their rows; a table of some has gaps, paragraphs are left out, a column is one probe."""
    full = probe_table(BEFORE, spread=1.0, seed=1)
    other = probe_table(BEFORE, spread=1.0, seed=2)
    paragraph = other.iloc[:1].assign(kind="paragraph", mean_log_prob=-99.0)
    some = other[other.kind == "semantic"].sample(frac=1, random_state=0)
    tables = {0: full.sample(frac=1, random_state=1), 7: pandas.concat([paragraph, some]), 30: full}
    series = read_probes(write_run(tmp_path / "run", tables))
    assert series.steps.tolist() == [0, 7, 30]
    assert series.values.shape == (3, 8 * 15)
    for row, table in enumerate((full, some, full)):
        by_probe = table.groupby(["setting", "entry", "kind"]).mean_log_prob.apply(lambda values: sorted(values))
        for (setting, entry, kind), wanted in by_probe.items():
            chosen = (series.settings == setting) & (series.entries == entry) & (series.kinds == kind)
            assert sorted(series.values[row, chosen]) == wanted
    assert np.isnan(series.values[1]).sum() == 8 * 10
    assert np.array_equal(series.values[0], series.values[2])
    assert list(dict.fromkeys(zip(series.settings.tolist(), series.entries.tolist()))) == [
        *(("paraphrase", number) for number in range(3)),
        *(("once", number) for number in range(5)),
    ]


def test_a_table_that_is_none_is_named(tmp_path):
    folder = write_run(tmp_path / "run", {0: probe_table(BEFORE), 20: probe_table(AFTER)})
    (folder / "probes" / "step10.parquet").write_bytes(b"PAR1 no table")
    with pytest.raises(ValueError, match=r"step10\.parquet: not a table of probes"):
        read_run(folder)


def test_downstream_tasks_that_were_asked_once_changed_nothing_that_is_known(tmp_path):
    tables = {0: probe_table(BEFORE), 20: probe_table(AFTER)}
    run = read_run(write_run(tmp_path / "run", tables, accuracy={0: dict.fromkeys(TASKS, 0.5)}))
    assert run.accuracy_before and (run.accuracy_after, run.accuracy_steps) == ({}, None)
    assert forgotten([run]) is None


def test_a_run_that_diverged(tmp_path):
    """Between two logged steps the loss is not looked at, so an evaluation may find weights that are no numbers."""
    lost = probe_table(BEFORE).assign(mean_log_prob=np.nan)
    run = read_run(write_run(tmp_path / "run", {0: probe_table(BEFORE), 20: probe_table(AFTER), 30: lost}))
    assert run.step == 20 and [step for step, _ in run.curve] == [0, 20]


# --- injections --------------------------------------------------------------------------------------------------


def test_steps_at_which_entries_entered(tmp_path):
    """In order, each once; texts of a map that are of no known entry are left out."""
    folder = tmp_path / "run"
    folder.mkdir()
    assert read_encounters(folder) is None
    rounds = {20: ["once/3", "paraphrase/0", "paraphrase/0", "map/4"], 10: ["paraphrase/0", "duplicate/12"]}
    write_injections(folder, rounds)
    assert read_encounters(folder) == {
        ("once", 3): [20],
        ("paraphrase", 0): [10, 20],
        ("duplicate", 12): [10],
    }


def test_a_half_written_last_line_of_injections_is_yet_to_come(tmp_path):
    write_injections(tmp_path, {10: ["once/0"], 20: ["once/0", "once/1"]})
    path = tmp_path / "injections.jsonl"
    path.write_text(path.read_text()[:-10])
    assert read_encounters(tmp_path) == {("once", 0): [10]}


@pytest.mark.parametrize("line", ["nonsense", "[1]", '{"round": 1}'])
def test_a_line_of_something_else_is_named(tmp_path, line):
    write_injections(tmp_path, {10: ["once/0"]})
    with (tmp_path / "injections.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=r"injections\.jsonl: line 2 is no"):
        read_encounters(tmp_path)


# --- the checkpoint at the start ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "start", "begins"),
    [
        ("reset_trainer_state: true\nload_path: checkpoints/pretrained_1B/738020-unsharded/\n", 738020, 0),
        ("reset_trainer_state: false\nload_path: runs/demo/pretrain/step90-unsharded\n", 90, 90),
        ("load_path: runs/demo/pretrain/step90\n", 90, 90),  # the default
        ("reset_trainer_state: true\nload_path: allenai/OLMo-1B@step20000-tokens84B\n", 20000, 0),
        ("load_path: allenai/OLMo-1B\n", None, None),
        ("load_path: null\n", 0, 0),
        (None, None, 0),
    ],
)
def test_the_pretraining_step_of_the_start_and_the_runs_own(tmp_path, text, start, begins):
    folder = write_run(tmp_path / "run", {0: probe_table(BEFORE), 20: probe_table(AFTER)})
    if text is not None:
        (folder / "config.yaml").write_text(text)
    run = read_run(folder)
    assert (run.start, run.begins) == (start, begins)


def test_the_steps_that_a_run_probed_after_injections(tmp_path):
    assert probing_steps(tmp_path) is None
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    assert probing_steps(tmp_path) is None
    (tmp_path / "config.yaml").write_text("probing: {steps: 7, interval: 2}\n")
    assert probing_steps(tmp_path) == 7
