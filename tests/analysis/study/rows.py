"""study.json of our own numbers: two models, two settings, edits, temperatures; every number follows from its names."""

from __future__ import annotations

from typing import Any

STARTS = {
    "1B": {"118k": 118_000, "369k": 369_000, "554k": 554_000, "738k": 738_000},
    "7B": {"s1": 100_000, "s2": 557_000},
}
INTERVENTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "half": {"ratio": 0.5, "factor": 0.5},
    "one": {"ratio": 0.5, "factor": 1.0},
    "two": {"ratio": 0.5, "factor": 2.0, "selection": "lowest"},
    "few": {"ratio": 0.25, "factor": 1.0},
    "most": {"ratio": 0.9, "factor": 1.0},
    "random": {"ratio": 0.5, "factor": 2.0, "selection": "random"},
    "highest": {"ratio": 0.5, "factor": 2.0, "selection": "highest"},
    "warm": {"overrides": {"model.temperature_attention": 1.5}},
    "hot": {"overrides": {"model.temperature_attention": 3.0}},
    "control": {"overrides": {"injection.rounds": 0}},
}


def e(value: float, half: float = 0.5) -> dict[str, float]:
    return {"value": value, "low": value - half, "high": value + half}


def of(a: float, f: float, k: float, p: float) -> dict[str, Any]:
    return {
        "K_before": e(-6.0, 0.1),
        "K_after": e(k, 0.1),
        "A": e(a),
        "K_published_before": None,
        "K_published_after": None,
        "A_published": None,
        "P_before": e(60.0),
        "P_after": e(p),
        "F": e(f),
        "loss_rise": {"general": e(f / 2), "science": e(-5.0)},
    }


def condition(model: str, start: str, intervention: str, setting: str = "baseline") -> dict[str, Any]:
    step = STARTS[model][start]
    place = list(INTERVENTIONS).index(intervention)
    a = 30 - step / 50_000 + place - 4 * (setting != "baseline") + 3 * (model == "7B")
    outcomes = of(a, step / 50_000 - place / 2, -5 + a / 100, 60 - step / 100_000)
    names = [start, *([intervention] if intervention != "none" else []), *([setting] if setting != "baseline" else [])]
    parts = {key: outcomes[key] for key in ("K_before", "K_after", "A")}
    once = {**parts, "A": e(a - 25), "K_after": e(-7.0)}
    return {
        "name": ", ".join(names),
        **{"start": start, "step": step, "model": model, "intervention": intervention, "setting": setting},
        "seeds": [[0, 0]],
        "outcomes": outcomes,
        "common_start": outcomes,
        "by_setting": {"paraphrase": parts, "once": once},
        "by_kind": {"semantic": parts},
        "accuracy": {},
        "per_seed": {name: [outcomes[name]["value"]] for name in ("K_before", "K_after", "A", "P_after", "F")},
        "curve": [{"step": s, "K": -6 + s / 100, "K_once": -7 + s / 100} for s in (0, 50, 100)],
        "injections": [50, 100],
    }


def entropy(model: str, start: str, intervention: str = "none") -> dict[str, Any]:
    step = STARTS[model][start]
    h = (144.0 if model == "1B" else 297.0) - step / 2e6 + 0.05 * list(INTERVENTIONS).index(intervention)
    return {
        **{"data": "Dolma", "coefficient": "abs", "precision": "fp32", "start": start, "step": step, "tokens": None},
        **{
            "intervention": intervention,
            "model": model,
            "H": e(h, 0.01),
            "standard_error": 0.005,
            "layers": [9.0, 8.9],
        },
        **{"layer_standard_errors": [0.001, 0.001], "layer_numbers": [0, 1], "maximum": 144.17, "attention": None},
        **{"next_token": None, "per_seed": [h], "breadth": None},
    }


def rich() -> dict[str, Any]:
    conditions = [condition(m, s, "none", t) for m, of_m in STARTS.items() for s in of_m for t in ("baseline", "c4")]
    conditions += [condition("1B", "738k", i) for i in INTERVENTIONS if i != "none"]
    conditions += [condition("1B", s, i) for s in ("118k", "369k", "554k") for i in ("one", "two")]
    effects = [
        {
            **{key: c[key] for key in ("name", "start", "setting", "intervention")},
            "kind": kind,
            "seeds": 1,
            "H": e(0.05 * list(INTERVENTIONS).index(c["intervention"]), 0.01),
            **{"A": e(1.0), "K_after": e(0.2, 0.1), "F": e(-0.5), "loss_rise.general": e(-0.2)},
        }
        for c in conditions
        for kind in [{"random": "random rows", "warm": "attention temperature"}.get(c["intervention"], "resuscitation")]
        if c["intervention"] not in ("none", "control")
    ]
    return {
        "title": "Rich",
        **{"description": "", "about": "model", "repeats": None, "seeds": [[6198]], "notes": [], "stages": []},
        "interventions": INTERVENTIONS,
        "settings": {"baseline": {}, "c4": {}},
        "starts": [
            {"name": name, "step": step, "model": model, "tokens": None}
            for model, of_model in STARTS.items()
            for name, step in of_model.items()
        ],
        "entries": {"paraphrase": 70, "once": 60},
        "entropies": [entropy(m, s) for m, of_m in STARTS.items() for s in of_m]
        + [entropy("1B", "738k", i) for i in INTERVENTIONS if i not in ("none", "control")],
        "conditions": conditions,
        "directions": [],
        "effects": effects,
        "joined": None,
        "missing": [],
        "warnings": [],
        "environment": {},
    }


def joined() -> dict[str, Any]:
    """The same with points and correlations of H and outcomes."""
    study = rich()
    measured = {(e["start"], e["intervention"]): e["H"]["value"] for e in study["entropies"]}
    chosen = [c for c in study["conditions"] if (c["start"], c["intervention"]) in measured and c["model"] == "1B"]
    points = [
        {key: c[key] for key in ("name", "start", "intervention", "setting")}
        | {"H": measured[c["start"], c["intervention"]]}
        | {name: c["common_start"][name]["value"] for name in ("A", "F", "K_after", "P_after")}
        for c in chosen
    ]
    correlations = [
        {"x": "H", "y": y, "over": "starts, baseline", "points": 4, "pearson": e(0.9, 0.1), "spearman": e(0.8, 0.2)}
        for y in ("A", "F", "K_after")
    ]
    text = {"resampled": "", "warning": ""}
    return {
        **study,
        "joined": {"data": "Dolma", "coefficient": "abs", "points": points, "correlations": correlations, **text},
    }
