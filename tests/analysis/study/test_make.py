"""The command that makes a study's report anew, from results alone."""

import base64
import contextlib
import functools
import io
import json
import shutil

import pytest

from analysis import estimates, report
from analysis.study.page import lines, make
from olmo.exceptions import exit_status
from scripts.study import main as run_study
from tests.study import ALIKE, OTHERWISE, PAPER, make_plan
from tests.study_json import Page

command = functools.partial(exit_status, report.main)
SEEN, OPPOSITE, NOISE = "seen", "not seen (the opposite)", "within noise at this scale"
ONE_RUN = "one run; not a verdict"
pytestmark = pytest.mark.usefixtures("few_resamples")


def test_the_report_is_made_anew_from_results_alone(planted, tmp_path, capsys):
    folder = tmp_path / "moved"
    shutil.copytree(planted, folder)
    assert command([str(folder)]) == 0
    printed = capsys.readouterr().out.splitlines()
    study = json.loads((folder / "study.json").read_text(), parse_constant=pytest.fail)
    page = Page((folder / "report.html").read_text())
    assert [line.partition(": ")[0] for line in printed[:-1]] == [d["verdict"] for d in study["directions"]]
    assert printed[0].startswith(
        f"{study['directions'][0]['verdict']}: Entropy falls; H: last minus early (nats), expected below 0: -"
    )
    assert printed[-1] == f"wrote {folder}/report.html and study.json"
    assert [row[0] for row in page.sections["outcomes"][0][1:]] == [c["name"] for c in study["conditions"]]
    first = (folder / "report.html").read_bytes(), (folder / "study.json").read_bytes()
    assert command([str(folder)]) == 0
    assert ((folder / "report.html").read_bytes(), (folder / "study.json").read_bytes()) == first
    assert not [path for path in folder.rglob("*") if "partial" in path.name]


def test_an_error_of_the_report_is_that_of_the_study(tmp_path, capfd):
    with pytest.raises(SystemExit) as end:
        run_study(["--report", str(tmp_path / "none")])
    assert end.value.code == 1
    error = capfd.readouterr().err
    assert error.startswith(f"error: {tmp_path}/none") and error.count("\n") == 1


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
def test_other_data_give_other_verdicts(tmp_path, effects, sharpness, noise, seeds, expected):
    """No verdict is written down anywhere: every one of them follows the data."""
    study = make(make_plan(tmp_path / "study", effects, sharpness, seeds, noise))
    verdicts = [d["verdict"] for d in study["directions"]]
    # Of a dozen true nulls one in twenty is expected to leave its interval: with these seeds, at most one does.
    assert verdicts.count(expected) >= len(verdicts) - (expected == NOISE)
    assert [line.partition(": ")[0] for line in lines(study)] == verdicts


@pytest.fixture(scope="module")
def made(planted, tmp_path_factory):
    """A study of which a run is missing, with two figures, and what its report printed."""
    folder = tmp_path_factory.mktemp("made") / "study"
    shutil.copytree(planted, folder)
    shutil.rmtree(folder / "runs" / "baseline" / "last" / "q1" / "seed1")
    plan = json.loads((folder / "plan.json").read_text())
    (folder / "plan.json").write_text(json.dumps({**plan, "figures": ["figure_4a", "figure_15"]}))
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setattr(estimates, "RESAMPLES", 300)
        assert command([str(folder)]) == 0
    return folder, printed.getvalue()


def test_what_is_missing_is_printed_and_on_the_page(made):
    folder, printed = made
    assert "missing: condition last, q1, runs/baseline/last/q1/seed1" in printed
    text = (folder / "report.html").read_text()
    assert "condition last, q1, runs/baseline/last/q1/seed1" in text[: text.index('id="findings"')]


def test_figures_are_those_that_the_plan_names(made):
    text = (made[0] / "report.html").read_text()
    image = Page(text).images[0]
    assert base64.b64decode(image["src"].partition(",")[2]) == (made[0] / "figures" / "figure_4a.png").read_bytes()
    shown = [href for href in Page(text).links if href.startswith("figures/")]
    assert shown == [f"figures/figure_4a.{suffix}" for suffix in ("png", "pdf", "csv")]
    assert all((made[0] / href).is_file() for href in shown)
    assert text.count("Not drawn: needs") == 1


def test_a_folder_without_a_plan_is_one_line(tmp_path, capsys):
    assert command([str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path}/plan.json: missing") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"repeats": "paper_1B"}, "repeats: unknown 'paper_1B', did you mean 'paper_1b'?"),
        ({"figures": ["figure_4c"]}, "unknown figure 'figure_4c'"),
        ({"tables": ["table_3"]}, "unknown table 'table_3'"),
        ({"acquisition": {"window": 0}}, "acquisition.window: 0 is no such setting"),
        ({"acquisition": {"fit_range": "9-3"}}, "acquisition.fit_range: '9-3' is no such setting"),
        ({"measure": "K_aftr"}, "unknown measure 'K_aftr', did you mean 'K_after'?"),
        ({"measure": "H", "to": "last, control"}, "to: the study has no entropy 'last, control'"),
        ({"measure": "A", "from": "text"}, "from: the study has no condition 'text'"),
    ],
)
def test_names_that_no_report_has_are_found_before_anything_runs(planted, tmp_path, capsys, change, message):
    plan = json.loads((planted / "plan.json").read_text())
    direction = plan["directions"][0]
    direction.update({key: value for key, value in change.items() if key in direction})
    plan.update({key: value for key, value in change.items() if key not in direction})
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    assert command([str(tmp_path), "--check"]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    (tmp_path / "plan.json").write_bytes((planted / "plan.json").read_bytes())
    assert command([str(tmp_path), "--check"]) == 0
