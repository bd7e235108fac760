"""The command of the report: what it prints and writes, and its errors."""

import functools
import json
import shutil

import pytest

from analysis import report
from olmo.exceptions import exit_status
from tests.study import ALIKE, OTHERWISE, PAPER, Page, make_study

command = functools.partial(exit_status, report.main)
SEEN, OPPOSITE, NOISE = "seen", "not seen (the opposite)", "within noise at this scale"
ONE_RUN = "one run; not a verdict"
pytestmark = pytest.mark.usefixtures("few_resamples")


@pytest.mark.parametrize(
    ("effects", "sharpness", "noise", "seeds", "expected"),
    [
        (PAPER, (1.0, 1.5, 2.0), 0.05, 3, SEEN),
        (OTHERWISE, (2.0, 1.5, 1.0), 0.05, 3, OPPOSITE),
        (ALIKE, (1.0, 1.0, 1.0), 0.3, 3, NOISE),
        (PAPER, (1.0, 1.5, 2.0), 0.05, 1, ONE_RUN),
    ],
    ids=["as the paper", "the opposite", "no effect", "one seed"],
)
def test_other_data_give_other_verdicts(
    tmp_path, capsys, monkeypatch, figures_of_study, effects, sharpness, noise, seeds, expected
):
    """No verdict is written down anywhere: every one of them follows the data."""
    monkeypatch.setattr(report, "draw", lambda found, folder: figures_of_study)
    folder = make_study(tmp_path / "demo", effects, sharpness, seeds, noise)
    assert command([str(folder)]) == 0
    directions = json.loads((folder / "report.json").read_text())["directions"]
    verdicts = [d["verdict"] for d in directions]
    # Of a dozen true nulls one in twenty is expected to leave its interval: with these seeds, at most one does.
    assert verdicts.count(expected) >= len(directions) - (expected == NOISE)
    shown = Page((folder / "report.html").read_text()).tables[0]
    assert [row[-1] for row in shown[1:]] == verdicts
    printed = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[0] for line in printed[:-1]] == verdicts


def test_report_json_is_json_and_nothing_is_left_half_written(study, saved):
    json.loads((study / "report.json").read_text(), parse_constant=pytest.fail)
    assert not list(study.glob("*.partial")) + list(study.glob(".*.partial"))
    assert saved["stages"] == json.loads((study / "demo.json").read_text())["stages"]


def test_a_study_that_has_not_finished_is_one_line(tmp_path, capsys):
    folder = make_study(tmp_path / "demo", PAPER, (1.0, 1.5, 2.0), seeds=2)
    runs = folder / "seed0" / "continual", folder / "seed1" / "continual"
    for name in ("metrics.jsonl", "probes/step0.parquet", "probes/step150.parquet", "losses/step150.parquet"):
        shutil.copy(runs[0] / "early" / name, runs[1] / "early" / name)
    assert command([str(folder)]) == 1
    assert f"error: {runs[1]}/early has exactly the metrics of {runs[0]}/early" in capsys.readouterr().err
    manifest = json.loads((folder / "demo.json").read_text())
    del manifest["conditions"]["last_control"]
    for unfinished in (manifest, {"stages": manifest["stages"]}):
        (folder / "demo.json").write_text(json.dumps(unfinished))
        assert command([str(folder)]) == 1
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "has not finished" in said
    assert command([]) == 2
