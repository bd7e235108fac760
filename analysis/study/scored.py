"""The scores of a study's starts, which nothing was trained from: results of analysis.score as a table."""

from __future__ import annotations

from typing import Any

from analysis import shapes
from analysis.scores import RESULT, rows
from analysis.study.plan_file import Plan
from olmo.files.paths import read_json

RESULT_SHAPE: dict[str, Any] = {
    "checkpoint": {"path": str, "step": int},
    "metrics": {"*": float},
    "knowledge": {"*": float},
    "evaluators": dict,
}


def read_scores(plan: Plan) -> tuple[dict[str, Any], list[str]]:
    """(`head` and `rows` of one table, a row for each start and pretraining; a line for each that is missing).

    Raises ValueError where a file is damaged.
    """
    results, names, missing = [], [], []
    for member in plan.content.get("scores", []):
        path = plan.place(member["folder"]) / RESULT
        reason = plan.unfinished(member) or ("" if path.is_file() else f"{path}: no such file")
        if reason:
            missing.append(f"scores of {member['start']}, seed {member['pretraining']}: {reason}")
            continue
        results.append(read_json(path))
        shapes.check(path, results[-1], RESULT_SHAPE)
        names.append((member["start"], member["pretraining"]))
    if not results:
        return {"head": [], "rows": []}, missing
    head, *found = rows(results)
    return {
        "head": ["start", "seed", *head[1:]],
        "rows": [[*name, *row[1:]] for name, row in zip(names, found)],
    }, missing
