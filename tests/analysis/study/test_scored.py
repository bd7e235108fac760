"""Scores of a study's starts: from their files to a table of the page."""

import json

import pytest

from analysis.study import sections
from analysis.study.plan_file import Plan
from analysis.study.scored import read_scores

TASKS = ("sciq", "winogrande", "piqa", "openbook_qa", "hellaswag", "arc_easy")


@pytest.fixture
def plan(tmp_path):
    def write(step: int, k: float) -> str:
        folder = tmp_path / f"score/step{step}"
        folder.mkdir(parents=True)
        result = {
            "checkpoint": {"path": f"run/step{step}", "step": step},
            "evaluators": {},
            "knowledge": {"K": k, "K_once": k},
            "metrics": {f"eval/downstream/{task}_acc": 0.5 for task in TASKS} | {"eval/general/CrossEntropyLoss": 4.0},
        }
        (folder / "score.json").write_text(json.dumps(result))
        return f"score/step{step}"

    members = [
        {"start": "early", "pretraining": 0, "folder": write(10, -7.0), "stage": "score, seed 0"},
        {"start": "last", "pretraining": 0, "folder": write(20, -6.0), "stage": "score, seed 0"},
        {"start": "last", "pretraining": 1, "folder": "score/none"},
        {"start": "last", "pretraining": 2, "folder": "score/none", "stage": "score, seed 2"},
    ]
    states = {"score, seed 0": "finished", "score, seed 2": "failed"}
    stages = [{"name": name, "state": state, "reason": None, "log": None} for name, state in states.items()]
    return Plan(tmp_path, {"scores": members, "stages": stages})


def test_scores_are_a_row_for_each_start_and_what_is_missing_is_named(plan):
    found, missing = read_scores(plan)
    assert found["head"] == ["start", "seed", "step", "K", "K_once", "P", "loss general"]
    assert found["rows"] == [["early", 0, 10, -7.0, -7.0, 0.5, 4.0], ["last", 0, 20, -6.0, -6.0, 0.5, 4.0]]
    assert [line.partition(":")[0] for line in missing] == ["scores of last, seed 1", "scores of last, seed 2"]
    [table] = sections.scores({"scores": found})
    assert table["rows"][0][:4] == ["early", "0", "10", "-7.0000"]


def test_a_study_without_scores_has_no_table(tmp_path):
    found, missing = read_scores(Plan(tmp_path, {"stages": []}))
    assert missing == [] and sections.scores({"scores": found}) == []


def test_a_damaged_result_is_named(plan):
    path = plan.folder / "score/step10/score.json"
    path.write_text('{"checkpoint": {"path": "x", "step": 1}, "metrics": {}, "knowledge": 3, "evaluators": {}}')
    with pytest.raises(ValueError, match=r"score\.json: .*knowledge"):
        read_scores(plan)
