"""plan.json: damaged, foreign and inconsistent ones are one line that names the place."""

import json
import re

import pytest

from analysis.study.plan_file import read_plan
from tests.study import PAPER, make_plan


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    folder = make_plan(tmp_path_factory.mktemp("plan") / "study", PAPER, (1.0, 1.5, 2.0))
    return json.loads((folder / "plan.json").read_text())


def test_no_plan_names_the_command(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"plan\.json: missing; run the study first: python -m scripts\.study"):
        read_plan(tmp_path)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda p: p.update(about="models"), "about: expected model or checkpoint, not 'models'"),
        (
            lambda p: p["conditions"][0].update(start="earl"),
            "conditions[0]: unknown start 'earl', did you mean 'early'?",
        ),
        (
            lambda p: p["conditions"][3].update(intervention="contrl"),
            "conditions[3]: unknown intervention 'contrl', did you mean 'control'?",
        ),
        (lambda p: p["conditions"][0].update(setting="x"), "conditions[0]: unknown setting 'x'"),
        (lambda p: p["entropies"][1].update(start="lost"), "entropies[1]: unknown start 'lost', did you mean 'last'?"),
        (lambda p: p["conditions"].append(p["conditions"][0]), "conditions: two of the name 'early'"),
        (lambda p: p["starts"].append(p["starts"][2]), "starts: two of the name 'last'"),
        (lambda p: p["directions"][0].update(expected="down"), "'Entropy falls': expected is 'above' or 'below'"),
        (lambda p: p.pop("seeds"), "has no seeds; it is damaged, or of another version"),
        (lambda p: p["conditions"][0]["runs"][0].pop("pretraining"), "has no conditions[0].runs[0].pretraining"),
        (lambda p: p.update(figures="all"), "figures: expected a list, not 'all'"),
    ],
)
def test_a_plan_that_does_not_fit_together_is_one_line(tmp_path, planned, change, expected):
    plan = json.loads(json.dumps(planned))
    change(plan)
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(ValueError, match=re.escape(expected)) as caught:
        read_plan(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}/plan.json: ") and "\n" not in str(caught.value)


def test_a_path_is_relative_to_the_plan_or_absolute(tmp_path, planned):
    (tmp_path / "plan.json").write_text(json.dumps(planned))
    plan = read_plan(tmp_path)
    assert plan.place("runs/x") == tmp_path / "runs" / "x" and str(plan.place("/data/x")) == "/data/x"
