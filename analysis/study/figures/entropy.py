"""The paper's figures of entropy over pretraining, each from study.json: (figure, rows of its CSV).

One line is of one model, text, coefficient and precision, of checkpoints without an intervention. Models have panels of
their own: of the 144 nats of one and the 298 of another, changes of 0.1 are not seen on one axis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from analysis.breadth import BREADTHS
from analysis.canvas import GREY, LINES, palette
from analysis.figures.lines import Point, over_pretraining
from analysis.pairs import OTHERS
from analysis.study import published
from analysis.study.figures.choice import Study, in_order, need, start_labels
from analysis.study.interventions import UNCHANGED, kind

Row = dict[str, Any]
Drawn = tuple[Figure, list[Point]]

H = "knowledge entropy H (nats)"
PUBLISHED = "published, about"


def _unchanged(study: Study) -> list[Row]:
    rows = [row for row in study["entropies"] if kind(study["interventions"][row["intervention"]]) == UNCHANGED]
    need(rows, "entropies of checkpoints without an intervention")
    models = [start["model"] for start in study["starts"]]
    return sorted(in_order(study, rows), key=lambda row: models.index(row["model"]))  # type: ignore[arg-type]


def _main(study: Study, *keys: str) -> list[Row]:
    """Of each model those of its first text, coefficient and precision in the study; each of `keys` has any."""
    rows = _unchanged(study)
    first: dict[str, Row] = {}
    for row in study["entropies"]:
        if row in rows:
            first.setdefault(row["model"], row)
    fixed = [key for key in ("data", "coefficient", "precision") if key not in keys]
    return [row for row in rows if all(row[key] == first[row["model"]][key] for key in fixed)]


def _point(study: Study, row: Row, panel: str, found: Mapping[str, Any], line: str = "") -> Point:
    """A number of a row, named by its start."""
    return {
        "panel": panel,
        "line": line,
        "name": start_labels(study)[row["start"]],
        "step": row["step"],
        "tokens": row["tokens"],
        "run": row["model"],
        **{end: found[end] for end in ("value", "low", "high")},
    }


def _bars(value: float, error: float | None) -> dict[str, float | None]:
    """A 95 % interval of a standard error."""
    low, high = (None, None) if error is None else (value - 1.96 * error, value + 1.96 * error)
    return {"value": value, "low": low, "high": high}


def _models(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["model"] for row in rows))


def figure_2(study: Study) -> Drawn:
    """H over the share of each model's last step, with the ends of the published line of a model of its ceiling."""
    rows = _main(study)
    points = [_point(study, row, row["model"], row["H"]) for row in rows]
    for name in ("paper_1b", "paper_7b") if study["repeats"] is not None else ():
        known = published.study(name)["entropy"]
        for model in _models([row for row in rows if abs(row["maximum"] - known["ceiling"]) < 0.05]):
            of_model = [point for point in points if point["panel"] == model and not point["line"]]
            for place, value in zip((of_model[0], of_model[-1]), known["ends"]):
                points.append({**place, "line": PUBLISHED, "value": value, "low": None, "high": None})
    return over_pretraining(points, "share", H, {"": LINES[0], PUBLISHED: GREY})


def figure_3(study: Study) -> Drawn:
    """Attention and next-token entropy, of one coefficient, on which they do not depend."""
    rows, points = _main(study, "coefficient"), []
    several = len(_models(rows)) > 1
    for name, title in OTHERS.items():
        of_start: dict[tuple[str, str], Row] = {}
        for row in rows:
            if row[name] is not None:
                of_start.setdefault((row["model"], row["start"]), row)
        for model in _models(rows):
            panel = f"{title}, {model}" if several else title
            of_model = [row for row in of_start.values() if row["model"] == model]
            points += [_point(study, row, panel, row[name]) for row in of_model]
    need(points, "attention or next-token entropy (measures: [knowledge, attention, next_token])")
    return over_pretraining(points)


def figure_6(study: Study) -> Drawn:
    """H over the steps of each model, under its ceiling."""
    points = [_point(study, row, f"{row['model']} (at most {row['maximum']:.2f})", row["H"]) for row in _main(study)]
    return over_pretraining(points, label=H)


def figure_7(study: Study) -> Drawn:
    """H on several texts, a line each."""
    rows = _main(study, "data")
    need(len({row["data"] for row in rows}) > 1, "entropies on two texts")
    return over_pretraining([_point(study, row, row["model"], row["H"], row["data"]) for row in rows], label=H)


def figure_8(study: Study) -> Drawn:
    """H of each layer, a line each."""
    rows = _main(study)
    numbers = sorted({number for row in rows for number in row["layer_numbers"]})
    points = [
        _point(study, row, row["model"], _bars(value, error), f"layer {number}")
        for row in rows
        for number, value, error in zip(row["layer_numbers"], row["layers"], row["layer_standard_errors"])
    ]
    colors = dict(zip((f"layer {number}" for number in numbers), palette(len(numbers))))
    return over_pretraining(points, label="entropy of the layer (nats)", colors=colors)


def figure_9(study: Study) -> Drawn:
    """H by coefficient; a panel each, because their levels differ by more than H changes."""
    rows = _main(study, "coefficient")
    need(len({row["coefficient"] for row in rows}) > 1, "entropies of two coefficients (coefficients: [abs, relu])")
    named = {model: f"{model}, " if len(_models(rows)) > 1 else "" for model in _models(rows)}
    points = [
        _point(study, row, f"{named[row['model']]}{row['coefficient']}", row["H"], row["coefficient"]) for row in rows
    ]
    return over_pretraining(points, label=H)


def breadth(study: Study) -> Drawn:
    """Further measures of how broadly memories are used, a line a model."""
    rows = [row for row in _main(study) if row["breadth"] is not None]
    need(rows, "measures of breadth, which results of earlier versions do not have")
    points = [
        _point(study, row, title, _bars(found["value"], found["standard_error"]), row["model"])
        for name, title in BREADTHS.items()
        for row in rows
        for found in [row["breadth"][name]]
    ]
    return over_pretraining(points)
