"""The tables of a study's report: rows of text from the numbers of study.json, which `page` puts into its template.

A table is {"title", "head", "rows", "note"}, a cell text, or a pair of texts: a number and its interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from olmo.console import fixed

Table = dict[str, Any]
# measure -> (name, digits, sign of positive numbers)
MEASURES = {
    "H": ("H", 4, ""),
    "H_last_layer": ("H of the last layer", 4, ""),
    "K_before": ("K before", 3, ""),
    "K_after": ("K after", 3, ""),
    "A": ("A, %", 2, "+"),
    "P_before": ("P before", 4, ""),
    "P_after": ("P after", 4, ""),
    "F": ("F, %", 2, "+"),
    "K_published_before": ("published K before", 4, ""),
    "K_published_after": ("published K after", 4, ""),
    "A_published": ("published A, %", 2, "+"),
    "attention": ("attention entropy", 4, ""),
    "next_token": ("next-token entropy", 4, ""),
}
BREADTH = {"effective": "effective share", "gini": "Gini", "dead": "dead share"}  # measures of analysis/breadth.py
POINT = ("name", "start", "intervention", "setting")  # what names a condition
CONSTANT = "A measure that does not vary has no correlation, and no row."
DASH = "-"


def number(value: Any, digits: int | None = None, sign: str = "") -> str:
    """A cell's text: a dash for what was not measured, four significant digits where none are given."""
    if value is None:
        return DASH
    if isinstance(value, bool | str | int):
        return str(value)
    if not math.isfinite(value):
        return "?"
    if digits is None:
        digits = 4 if value == 0 else min(max(3 - math.floor(math.log10(abs(value))), 0), 6)
    return fixed(value, digits, sign)


def shown(estimate: Any, digits: int | None = None, sign: str = "") -> Any:
    """An estimate as (number, interval), an unknown end as '?'; without `digits`, with those of `places`. Anything else
    as a text."""
    if not isinstance(estimate, Mapping):
        return number(estimate, digits, sign)
    if estimate["value"] is None:
        return DASH
    value, low, high = (estimate[part] for part in ("value", "low", "high"))
    if low is None and high is None:
        return number(value, digits, sign)
    digits = places(estimate) if digits is None else digits
    low, high = ("?" if end is None else number(end, digits, sign) for end in (low, high))
    return number(value, digits, sign), f"[{low}, {high}]"


def places(estimate: Mapping[str, Any]) -> int:
    """Digits after the point that show two of the half-width of an interval, between 2 and 6."""
    if estimate["value"] is None:
        return 3
    low, high = (estimate["value"] if estimate[end] is None else estimate[end] for end in ("low", "high"))
    return min(max(1 - math.floor(math.log10((high - low) / 2)), 2), 6) if high > low else 3


def measure(name: str) -> tuple[str, int | None, str]:
    """Name in a heading, digits, and sign of a measure, such as A, K_after.semantic, loss_rise.general."""
    whole, _, part = name.partition(".")
    if whole == "loss_rise":
        return f"rise of {part} loss, %", 2, "+"
    label, digits, sign = MEASURES.get(whole, (whole.replace("_", " "), None, ""))
    return f"{label} ({part})" if part else label, digits, sign


def names(found: Iterable[Any]) -> list[Any]:
    """Each once, in order of appearance."""
    return list(dict.fromkeys(found))


def table(title: str, head: Sequence[str], rows: Iterable[Sequence[Any]], note: str = "") -> Table:
    return {"title": title, "head": list(head), "rows": [list(row) for row in rows], "note": note}


def directions(study: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of each direction: claim, what was measured, difference, verdict, and the difference of every seed."""
    found = []
    for d in study["directions"]:
        unit = f" ({d['unit']})" if d.get("unit") else ""
        what = measure(d["measure"])[0].replace(", %", "")
        found.append(
            {
                "claim": d["claim"],
                "measured": f"{what}: {d['to']} minus {d['from']}{unit}, expected {d['expected']} 0",
                "difference": shown(d, sign="+"),
                "verdict": d["verdict"],
                "per_seed": ", ".join(number(value, places(d), "+") for value in d["per_seed"][1:] and d["per_seed"]),
            }
        )
    return found


def design(study: Mapping[str, Any]) -> list[Table]:
    """What the study consists of: starts, interventions, settings."""
    starts = [
        (s["name"], *(f"{s[key]:,}" if s.get(key) is not None else DASH for key in ("step", "tokens")), s.get("model"))
        for s in study["starts"]
    ]
    found = [table("Starts", ("start", "step", "tokens", "model"), starts)]
    for key, none in (("interventions", "the weights as they are"), ("settings", "the configuration as it is")):
        if study.get(key):
            rows = [(name, _settings(made) or none) for name, made in study[key].items()]
            found.append(table(key.capitalize(), (key.removesuffix("s"), "what it changes"), rows))
    return found


def _settings(made: Any, prefix: str = "") -> str:
    if not isinstance(made, Mapping):
        return f"{prefix} = {made}"
    inner = {k: v for k, v in made.items() if v not in (None, {})}
    return ", ".join(_settings(v, k if prefix in ("", "overrides") else f"{prefix}.{k}") for k, v in inner.items())


def _point(entry: Mapping[str, Any]) -> str:
    edited = entry.get("intervention") not in (None, "none")
    return f"{entry['start']}, {entry['intervention']}" if edited else entry["start"]


def entropies(study: Mapping[str, Any]) -> list[Table]:
    """A table for all entropies of one kind (model, data, coefficient, precision), and one of their layers."""

    def kind(e: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(str(e.get(key) or "") for key in ("model", "data", "coefficient", "precision"))

    found = []
    for of in names(map(kind, study["entropies"])):
        group = [e for e in study["entropies"] if kind(e) == of]
        model, data, *made = of
        title = f"{', '.join(part for part in (model, data) if part)} ({', '.join(part for part in made if part)})"
        others = [key for key in ("attention", "next_token") if any(e.get(key) for e in group)]
        breadth = [key for key in BREADTH if any(key in (e.get("breadth") or {}) for e in group)]
        repeated = any(len(e.get("per_seed") or ()) > 1 for e in group)
        head = ["start", "step", "H", "standard error", *(measure(key)[0] for key in others)]
        head += [BREADTH[key] for key in breadth] + ["H of each seed"] * repeated
        rows = []
        for e in group:
            row = [_point(e), number(e.get("step")), shown(e["H"], 4), number(e.get("standard_error"), 4)]
            row += [shown(e.get(key), 4) for key in others]
            row += [_with_error((e.get("breadth") or {}).get(key)) for key in breadth]
            rows.append(row + [", ".join(number(h, 4) for h in e.get("per_seed") or ())] * repeated)
        most = group[0].get("maximum")
        note = "" if most is None else f"The maximum of H is {number(most, 2)} nats."
        found.append(table(f"H: {title}", head, rows, note))
        found.append(_layers(group, f"H of each layer: {title}"))
    return found


def _with_error(found: Mapping[str, Any] | None) -> str:
    """A measure of breadth with its standard error."""
    return DASH if found is None else f"{number(found['value'], 4)} ± {number(found['standard_error'], 4)}"


def _layers(group: Sequence[Mapping[str, Any]], title: str) -> Table:
    """Layers as columns, or as rows where there are more of them than checkpoints."""
    by_layer = [dict(zip(e.get("layer_numbers") or range(len(e["layers"])), e["layers"])) for e in group]
    layers, points = sorted({layer for of in by_layer for layer in of}), list(map(_point, group))
    cells = [[number(of.get(layer), 4) for layer in layers] for of in by_layer]
    if len(layers) <= len(points):
        return table(title, ["start", *map(str, layers)], ([p, *row] for p, row in zip(points, cells)))
    return table(title, ["layer", *points], ([str(layer), *row] for layer, *row in zip(layers, *cells)))


def _flat(outcome: Mapping[str, Any]) -> dict[str, Any]:
    """Outcomes with the rise of each held-out loss as a measure of its own."""
    rises = {f"loss_rise.{label}": rise for label, rise in (outcome.get("loss_rise") or {}).items()}
    return {**{key: value for key, value in outcome.items() if key != "loss_rise"}, **rises}


def _by_condition(
    study: Mapping[str, Any], title: str, of: Callable[[Any], Any], wanted: Callable[[str], bool], note: str = ""
) -> list[Table]:
    """A row a condition, a column a measure that any of them has; no table where there is neither."""
    found = [(c["name"], _flat(outcome)) for c in study["conditions"] if (outcome := of(c))]
    measures = [key for key in names(k for _, o in found for k in o) if wanted(key)]
    measures = [key for key in measures if any(outcome.get(key) for _, outcome in found)]
    heads = {key: measure(key) for key in measures}
    rows = [[name, *(shown(outcome.get(key), *heads[key][1:]) for key in measures)] for name, outcome in found]
    return [table(title, ["condition", *(head for head, _, _ in heads.values())], rows, note)] if measures else []


def scores(study: Mapping[str, Any]) -> list[Table]:
    """Starts as analysis.score measured them, without training."""
    found = study["scores"]
    rows = [[*map(number, row[:3]), *(number(value, 4) for value in row[3:])] for row in found["rows"]]
    return [table("As analysis.score measures them", found["head"], rows)] if rows else []


def outcomes(study: Mapping[str, Any]) -> list[Table]:
    """What every condition acquired and forgot: in all, on the paper's scale, against edited weights, by setting, by
    kind, of each seed, and the spread between seeds."""

    def published(key: str) -> bool:
        return "published" in key

    def ours(key: str) -> bool:
        return not published(key) and key != "P_chance"

    found = _by_condition(study, "Acquisition and forgetting", lambda c: c["common_start"], ours)
    note = (
        "Minus the loss of the published evaluator, a mean over all positions of a probe, prompt and padding included."
    )
    found += _by_condition(study, "On the paper's scale", lambda c: c["common_start"], published, note)
    note = "What the edit changed at once is not counted here; the other tables and all figures count it."
    title = "Against the edited weights"
    edited = ("K_before", "A", "F")
    found += _by_condition(
        study,
        title,
        lambda c: c["outcomes"] if c["outcomes"] != c["common_start"] else None,
        lambda key: key in edited or key.startswith("loss_rise"),
        note,
    )
    found += _parts(study)
    return found + _accuracies(study) + _seeds(study) + _spread(study)


def _parts(study: Mapping[str, Any]) -> list[Table]:
    """A table a measure, a column a setting and a kind of probe."""
    conditions = study["conditions"]
    parts = names((key, n) for key in ("by_setting", "by_kind") for c in conditions for n in c.get(key) or {})
    measures = sorted(names(m for c in conditions for key, n in parts for m in (c.get(key) or {}).get(n) or {}))
    found = []
    for name, digits, sign, key in ((*measure(key), key) for key in measures):
        rows = [
            [c["name"], *(shown(((c.get(part) or {}).get(n) or {}).get(key), digits, sign) for part, n in parts)]
            for c in conditions
        ]
        found.append(table(f"{name} by setting and kind of probe", ["condition", *(n for _, n in parts)], rows))
    return found


def _seeds(study: Mapping[str, Any]) -> list[Table]:
    """A row a run, where any condition has several: outcomes of every seed."""
    conditions = study["conditions"]
    heads = {key: measure(key) for key in names(k for c in conditions for k in c["per_seed"])}
    rows = []
    for c in conditions:
        for place, (pretraining, learning) in enumerate(c["seeds"]):
            values = (c["per_seed"][key][place] if key in c["per_seed"] else None for key in heads)
            cells = [number(value, *head[1:]) for value, head in zip(values, heads.values())]
            rows.append([c["name"], str(study["seeds"][pretraining][learning]), *cells])
    head = ["condition", "seed", *(name for name, _, _ in heads.values())]
    return [table("Outcomes of every seed", head, rows)] if len(rows) > len(conditions) else []


def _accuracies(study: Mapping[str, Any]) -> list[Table]:
    """Accuracy of every task minus that of guessing, before and after."""
    conditions = [c for c in study["conditions"] if c.get("accuracy")]

    def text(found: Mapping[str, Any] | None) -> str:
        if found is None or found["chance"] is None:
            return DASH
        return " → ".join(fixed(found[when] - found["chance"], 3, "+") for when in ("before", "after"))

    tasks = names(task for c in conditions for task in c["accuracy"])
    rows = [[task, *(text(c["accuracy"].get(task)) for c in conditions)] for task in tasks]
    chances = {number(c["common_start"].get("P_chance"), 4) for c in conditions} - {DASH}
    note = (
        f"P is the mean over the six tasks of the paper; of guessing it is {', '.join(sorted(chances)) or 'unknown'}."
    )
    head = ["task", *(c["name"] for c in conditions)]
    return [table("Accuracy minus that of guessing, before → after", head, rows, note)] if rows else []


def _spread(study: Mapping[str, Any]) -> list[Table]:
    """Standard deviations between seeds at each level, of every measure that has any."""
    conditions = [c for c in study["conditions"] if c.get("spread")]
    levels = {"pretraining": "between pretrainings", "learning": "between seeds of continual learning"}
    columns = [
        (key, level)
        for key in names(k for c in conditions for k in c["spread"])
        for level in levels
        if any((c["spread"].get(key) or {}).get(level) is not None for c in conditions)
    ]
    head = ["condition", *(f"{measure(key)[0]}: {levels[level]}" for key, level in columns)]
    rows = [
        [c["name"], *(number((c["spread"].get(k) or {}).get(level), 4) for k, level in columns)] for c in conditions
    ]
    note = "Standard deviations. A level that one seed alone represents has none."
    found = [table("Spread between seeds", head, rows, note)] if columns else []
    of_differences = [d for d in study["directions"] if any((d.get("spread") or {}).values())]
    rows = [[d["claim"], *(number(d["spread"][level], 4) for level in levels)] for d in of_differences]
    head = ["difference", *levels.values()]
    return found + ([table("Spread of the differences between seeds", head, rows, note)] if rows else [])


def joined(study: Mapping[str, Any]) -> list[Table]:
    """Entropy beside outcomes, and their correlations over conditions."""
    of = study.get("joined") or {}
    found = []
    if points := of.get("points"):
        measures = [key for key in names(k for p in points for k in p) if key not in POINT]
        heads = [measure(key) for key in measures]
        rows = [[p["name"], *(shown(p.get(key), *head[1:]) for key, head in zip(measures, heads))] for p in points]
        note = f"H on {of['data']}, coefficient {of['coefficient']}."
        found.append(table("Entropy and outcomes", ["condition", *(head for head, _, _ in heads)], rows, note))
    if correlations := [c for c in of.get("correlations") or () if c["pearson"]["value"] is not None]:
        head = ("correlation", "over", "points", "seeds", "Pearson", "Spearman", "published Pearson")
        rows = [
            [
                " with ".join(measure(c[axis])[0].replace(", %", "") for axis in ("x", "y")),
                c["over"],
                number(c["points"]),
                number(c["seeds"]),
                *(shown(c[key], 2, "+") for key in ("pearson", "spearman")),
                number(c["published"], 2, "+"),
            ]
            for c in correlations
        ]
        found.append(table("Correlations", head, rows, f"{of['warning']} {of['resampled']} {CONSTANT}"))
    return found + _effects(study)


def _effects(study: Mapping[str, Any]) -> list[Table]:
    """What each intervention changed, measure by measure."""
    effects = study.get("effects") or ()
    measures = [k for k in names(k for e in effects for k in e) if any(isinstance(e.get(k), Mapping) for e in effects)]
    head = ["start, setting", "intervention", *(measure(key)[0] for key in measures)]
    rows = [
        [
            f"{e['start']}, {e['setting']}",
            e["intervention"],
            *(shown(e.get(key), measure(key)[1], "+") for key in measures),
        ]
        for e in effects
    ]
    note = "Differences from the same start and setting without the intervention, over the seeds that both have."
    return [table("Effects of interventions", head, rows, note)] if rows else []


def tables(study: Mapping[str, Any]) -> list[Table]:
    """The paper's tables that the study names, as study.json has them."""
    return [
        table(
            t["title"],
            [str(head) for head in t["head"]],
            [list(map(shown, row)) for row in t["rows"]],
            t.get("note") or "",
        )
        for t in study["tables"]
    ]
