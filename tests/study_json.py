"""study.json of a study that never ran, in every form that a report must show, and a reader of the page."""

from __future__ import annotations

import html.parser
from itertools import product
from typing import Any

STEPS = {"early": 90, "middle": 450, "last": 720}
EDITS = {
    "none": {},
    "q1": {"ratio": 0.5, "factor": 1.0, "selection": "lowest"},
    "attention": {"overrides": {"model.temperature_attention": 2.0}},
    "control": {"overrides": {"injection.rounds": 0}},
}
LONG = ["--evaluators.6.data.paths=[runs/demo/text/general_heldout.npy,it's]", "--a=<b>"] + [
    f"--a_long_key_of_the_configuration_{n}=/a/long/path/without/any/space/to/break/at/{n}" for n in range(8)
]


def estimate(value: float, half: float = 0.01) -> dict[str, float | None]:
    return {"value": value, "low": value - half, "high": value + half}


def outcomes(number: int, edited: bool = False) -> dict[str, Any]:
    base = number / 100
    return {
        "K_before": estimate(-8.5 + base - 0.25 * edited),
        "K_after": estimate(-6.5 + base),
        "A": estimate(23.5 + base + 2 * edited),
        "K_published_before": estimate(-0.51 + base),
        "K_published_after": estimate(-0.41 + base),
        "A_published": estimate(19.6 + base),
        "P_before": estimate(0.31 + base),
        "P_after": estimate(0.29 + base),
        "P_chance": 0.25,
        "F": estimate(6.45 + base, 3.0),
        "loss_rise": {"general": estimate(4.0 + base - edited, 0.3), "science": estimate(-9.0 + base, 0.3)},
    }


def condition(number: int, start: str, edit: str, setting: str, seeds: list[list[int]], settings: int) -> dict:
    names = [start, *([edit] if edit != "none" else []), *([setting] if settings > 1 else [])]
    edited, common = edit == "q1", outcomes(number)
    parts = ("K_before", "K_after", "A")
    some = {key: common[key] for key in parts}
    seed_numbers = range(sum(map(len, seeds)))
    return {
        "name": ", ".join(names),
        "start": start,
        "step": STEPS.get(start),
        "intervention": edit,
        "setting": setting,
        "outcomes": outcomes(number, edited),
        "common_start": common,
        "by_setting": dict.fromkeys(("paraphrase", "once"), some),
        "by_kind": dict.fromkeys(("memorization", "semantic", "composition"), some),
        "seeds": [[k, j] for k, of in enumerate(seeds) for j in range(len(of))],
        "accuracy": {"sciq": {"before": 0.31 + number / 100, "after": 0.28, "chance": 0.25}},
        "per_seed": {
            "A": [23.5 + number / 100 + seed / 7 for seed in seed_numbers],
            "K_after": [-6.5 + seed / 9 for seed in seed_numbers],
        },
        "spread": {"A": {"pretraining": 0.731, "learning": None}, "K_after": {"pretraining": 0.0512, "learning": 0.02}},
        "curve": [],
        "injections": [15, 30],
    }


def entropy(number: int, start: str, edit: str, data: str, coefficient: str, layers: int) -> dict[str, Any]:
    level = 13.1 - number / 50
    return {
        "data": data,
        "coefficient": coefficient,
        "precision": "fp32",
        "start": start,
        "step": STEPS.get(start),
        "intervention": edit,
        "model": "pretraining",
        "H": estimate(level, 0.05),
        "standard_error": 0.0123,
        "layers": [level / layers - n / 1000 for n in range(layers)],
        "layer_standard_errors": [0.005] * layers,
        "layer_numbers": list(range(layers)),
        "maximum": 13.8629 * layers / 2,
        "attention": estimate(9.876 + number / 100),
        "next_token": None,
        "per_seed": [level + 0.011, level - 0.023, level + 0.007],
        "breadth": {"most_active": 0.1, "gini": {"value": 0.456, "standard_error": 0.0021, "layers": []}},
    }


def direction(claim: str, measure: str, value: float, half: float, expected: str, verdict: str, seeds: int) -> dict:
    return {
        "claim": claim,
        "measure": measure,
        "from": "early",
        "to": "last",
        "expected": expected,
        "unit": {"A": "points", "H": "nats"}.get(measure, ""),
        **estimate(value, half),
        "verdict": verdict,
        "spread": {"pretraining": 0.345, "learning": None} if seeds > 1 else None,
        "seeds": seeds,
        "per_seed": [value + n / 100 for n in range(seeds)],
    }


def a_study(
    seeds: int = 3, learning: int = 1, about: str = "model", settings: int = 1, failed: bool = False, layers: int = 2
) -> dict[str, Any]:
    """The demo's form: three starts with and without interventions."""
    numbers = [[6198 + k + 1000 * j for j in range(learning)] for k in range(seeds)]
    named = {f"setting {'abcde'[n]}": {"overrides": {"optimizer.learning_rate": 1e-3 * n}} for n in range(settings)}
    kinds = [("early", "none"), ("middle", "none"), *(("last", edit) for edit in EDITS)]
    conditions = [
        condition(n, start, edit, setting, numbers, settings)
        for n, ((start, edit), setting) in enumerate(product(kinds, named))
    ]
    single = (seeds if about == "model" else learning) == 1
    verdicts = (
        ["one run; not a verdict"] * 3 if single else ["seen", "not seen (the opposite)", "within noise at this scale"]
    )
    claims = ["A later checkpoint acquires less", "A later checkpoint forgets more", "Entropy falls during pretraining"]
    measures, values = ["A", "loss_rise.general", "H"], [(-2.34, 0.5), (-1.25, 0.7), (-0.0123, 0.02)]
    stages = [
        {
            "name": f"{name}, seed {seed}",
            "kind": kind,
            "command": ["python", "-m", module, *LONG],
            "state": "finished",
            "seconds": 61.2,
            "peak_memory_mib": 1234.5,
            "log": f"stages/{kind} {seed}.log",
            "reason": None,
        }
        for seed in range(seeds)
        for name, kind, module in (
            ("pretraining", "train", "scripts.train"),
            ("H of early", "entropy", "analysis.entropy"),
        )
    ]
    if failed:
        bad = {"state": "failed", "reason": "exit status 1: error: load_path: /no/such/folder does not exist"}
        stages[1] = {**stages[1], **bad}
        left = {"state": "waiting", "reason": None, "seconds": None, "peak_memory_mib": None, "log": None}
        stages[-1] = {**stages[-1], **left}
    rows = [["A %", estimate(25.2, 0.4), 25.2, None], ["F %", estimate(10.5, 2.0), 10.5, "a text"]]
    points = [
        {"name": c["name"], "start": c["start"], "intervention": c["intervention"], "H": 13.1 - n / 50, "A": 23.5 + n}
        for n, c in enumerate(conditions)
    ]
    correlation = {"x": "H", "y": "A", "over": "starts", "points": len(points), "seeds": seeds, "published": 0.94}
    return {
        "title": "Knowledge entropy at small scale",
        "description": "A small OLMo model is pretrained on general text, then trained on science and medicine.",
        "notes": ["The settings were chosen before the program existed.", "A second paragraph."],
        "about": about,
        "repeats": None,
        "seeds": numbers,
        "entries": {"paraphrase": 26, "once": 60},
        "starts": [
            {"name": s, "step": step, "tokens": 4096 * step, "model": "pretraining"} for s, step in STEPS.items()
        ],
        "interventions": EDITS,
        "settings": named,
        "scores": {
            "head": ["start", "seed", "step", "K", "P", "loss general"],
            "rows": [["early", 0, 90, -8.1357, 0.3579, None]],
        },
        "entropies": [
            entropy(n, start, edit, data, coefficient, layers)
            for data, coefficient in (("pretraining text", "abs"), ("science", "relu"))
            for n, (start, edit) in enumerate(kinds[:4])
        ],
        "conditions": conditions,
        "directions": [
            direction(claim, measure, value, half, "below", verdict, 1 if single else seeds)
            for claim, measure, (value, half), verdict in zip(claims, measures, values, verdicts)
        ],
        "joined": {
            "data": "pretraining text",
            "coefficient": "abs",
            "points": points,
            "correlations": [{**correlation, "pearson": estimate(0.61, 0.3), "spearman": estimate(0.5, 0.4)}],
            "resampled": "Intervals: conditions are drawn with replacement.",
            "warning": "Six points share a trend.",
        },
        "effects": [
            {
                "name": "last, q1",
                "start": "last",
                "setting": "setting a",
                "intervention": "q1",
                "kind": "edit",
                "seeds": seeds,
            }
            | {
                "H": estimate(-0.0254, 0.004),
                "A": estimate(1.25, 0.5),
                "F": None,
                "loss_rise.general": estimate(-1.5, 0.25),
            }
        ],
        "figures": [],
        "tables": [
            {
                "name": "table_1",
                "title": "Table 1: A and F by start",
                "head": ["measure", "here", "published", "note"],
                "rows": rows,
                "note": "The paper's models are larger.",
            }
        ],
        "stages": stages,
        "environment": {
            "python": "3.11.1",
            "platform": "Some-Platform",
            "processor_count": 2,
            "versions": {"torch": "2.6", "numpy": "2.0"},
            "git": "abc123",
        },
        "missing": ["last, q1, seed 2: runs/baseline/last/q1/seed2 has no run"] if failed else [],
        "warnings": [],
    }


class Page(html.parser.HTMLParser):
    """What a page holds: images, attributes, and by the id of its section its tables as rows of text."""

    def __init__(self, text: str):
        super().__init__()
        self.images: list[dict] = []
        self.tables: list[list[list[str]]] = []
        self.sections: dict[str, list[list[list[str]]]] = {}
        self.attributes: list[tuple[str, str, str]] = []
        self.tags: list[str] = []
        self.pre: list[str] = []
        self.links: list[str] = []
        self._into: list[str] | None = None
        self._section: list = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag == "h2":
            self._section = self.sections.setdefault(dict(attrs)["id"], [])
        elif tag == "a":
            self.links.append(dict(attrs)["href"])
        elif tag == "img":
            self.images.append(dict(attrs))
        elif tag == "table":
            self.tables.append([])
            self._section.append(self.tables[-1])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th", "pre"):
            self._into = self.pre if tag == "pre" else self.tables[-1][-1]
            self._into.append("")
        elif tag == "br" and self._into:
            self._into[-1] += "\n"

    def handle_endtag(self, tag):
        if tag in ("td", "th", "pre"):
            self._into = None

    def handle_data(self, data):
        if self._into is not None:
            self._into[-1] += data
