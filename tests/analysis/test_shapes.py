"""Files that were cut, edited or written by something else end in one line, or in a dash and a note."""

import functools
import json
import random
from pathlib import Path

import numpy as np
import pandas
import pytest

from analysis import acquisition
from olmo.exceptions import exit_status
from tests.run_folders import AFTER, BEFORE, TASKS, probe_table, write_injections, write_run

command = functools.partial(exit_status, acquisition.main)
pytestmark = [pytest.mark.usefixtures("few_resamples"), pytest.mark.filterwarnings("error")]


@pytest.fixture
def run(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setattr("analysis.figures.acquisition.save_acquisition", lambda result, folder: None)
    tables = {0: probe_table(BEFORE), 10: probe_table(BEFORE), 20: probe_table(AFTER)}
    losses = {0: {"general": [4.0, 5.0]}, 20: {"general": [4.4, 5.5]}}
    accuracy = {step: dict.fromkeys(TASKS, p) for step, p in ((0, 0.5), (20, 0.4))}
    folder = write_run(tmp_path / "run", tables, losses, accuracy, injections=[10])
    write_injections(folder, {10: ["once/0"]})
    return folder


def change_table(path: Path, **columns) -> None:
    pandas.read_parquet(path).assign(**columns).to_parquet(path)


@pytest.mark.parametrize(
    ("table", "columns", "dash", "note"),
    [
        ("probes", {"mean_log_prob": np.nan}, None, "120 log-probabilities, the first at step 20, are not finite numb"),
        ("probes", {"mean_log_prob": -np.inf}, None, "; step 10 is compared, the newest without any"),
        ("losses", {"loss": [np.nan, 5.0]}, "rise of general %", "1 losses of general are not finite numbers"),
        ("losses", {"loss": np.inf}, "rise of general %", "2 losses of general are not finite numbers"),
        ("metrics", {'_acc": 0.4': '_acc": NaN'}, "F %", "3 accuracies are not finite numbers"),
        ("metrics", {'_acc": 0.4': '_acc": -Infinity'}, "F %", "3 accuracies are not finite numbers"),
    ],
)
def test_what_is_no_number_is_a_dash_null_and_a_note(run, tmp_path, capsys, table, columns, dash, note):
    if table == "metrics":
        text = (run / "metrics.jsonl").read_text()
        [(old, new)] = columns.items()
        (run / "metrics.jsonl").write_text(text.replace(old, new))
    else:
        change_table(run / table / "step20.parquet", **columns)
    assert command([str(run), "--output", str(tmp_path / "output")]) == 0
    printed = capsys.readouterr().out
    assert note in printed and "nan" not in printed and "inf" not in printed.replace("finite", "")
    assert dash is None or dash not in printed.splitlines()[0]  # a column that no run has
    json.loads((tmp_path / "output" / "acquisition.json").read_text(), parse_constant=pytest.fail)


def lines(change):
    def apply(run: Path) -> None:
        path = run / "metrics.jsonl"
        path.write_text(change(path.read_text()))

    return apply


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda run: change_table(run / "probes/step20.parquet", entry=-1), "entries are numbered from -1 to -1"),
        (lambda run: change_table(run / "probes/step20.parquet", entry=10**12), "step20.parquet: entries are numbered"),
        (lambda run: change_table(run / "probes/step20.parquet", entry="x"), "step20.parquet: not a table of probes"),
        (lambda run: change_table(run / "losses/step20.parquet", loss="x"), "its column loss is"),
        (
            lambda run: (run / "probes/step20.parquet").write_bytes(b"PAR1xxxxPAR1"),
            "step20.parquet: not a table of probes",
        ),
        (lines(lambda text: text[:30] + text[60:]), "metrics.jsonl: line 1 is not JSON"),
        (lines(lambda text: "[" * 100_000 + "\n" + text), "metrics.jsonl: line 1 is not JSON"),
        (lines(lambda text: text.replace('"step": 20', '"step": true')), "is not an object with a step"),
        (lambda run: (run / "injections.jsonl").write_text('{"step": 10, "texts": [3]}\n'), "texts of step 10 are not"),
        (
            lambda run: (run / "config.yaml").write_text("a: !!python/object/apply:os.getcwd []\n"),
            "config.yaml: not YAML",
        ),
    ],
)
def test_a_damaged_run_is_one_line_that_names_the_file(run, capsys, change, said):
    change(run)
    assert command([str(run)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(run) in error and said in error


def test_lines_written_twice_after_a_restart_change_nothing(run, capsys):
    assert command([str(run)]) == 0
    once = capsys.readouterr().out
    lines(lambda text: text + text)(run)
    assert command([str(run)]) == 0
    assert capsys.readouterr().out == once


def places(value, where=()):
    yield where
    items = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*where, key))


def replaced(value, where, new):
    value = json.loads(json.dumps(value))
    if not where:
        return new
    holder = value
    for key in where[:-1]:
        holder = holder[key]
    holder[where[-1]] = new
    return value


def test_a_result_that_was_changed_anywhere_is_one_line_or_harmless(run, tmp_path, capsys):
    """Numbers, texts and lists of other types at random places of acquisition.json."""
    assert command([str(run), "--output", str(tmp_path / "output")]) == 0
    file = tmp_path / "output" / "acquisition.json"
    content = json.loads(file.read_text())
    generator = random.Random(0)
    everywhere = [(where, new) for where in places(content) for new in (None, "<b>", [], {}, -1, 1e999, True)]
    failed = 0
    for where, new in generator.sample(everywhere, 100):
        file.write_text(json.dumps(replaced(content, where, new)))
        status = command([str(file)])
        error = capsys.readouterr().err
        assert (status, error.count("\n")) in ((0, 0), (1, 1)), (where, new, error)
        assert status == 0 or str(file) in error
        failed += status
    assert failed > 20
