"""A study in files, as scripts.study leaves it, with effects of our choice."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from analysis.measure import Measurement
from olmo.memory import CoefficientAverages
from tests.run_folders import TASKS, probe_table, write_run

STEPS = {"early": 90, "middle": 450, "last": 720}
INSTANCES, LAYERS, MEMORIES = 128, 2, 24


def coefficients(sharpness: float, seed: int, noise: float = 0.5) -> np.ndarray:
    """Mean coefficients of each instance (n, L, M), float32; the noise of an instance depends on `seed` only."""
    level = np.exp(-sharpness * np.arange(MEMORIES) / MEMORIES)
    generator = np.random.default_rng(seed)
    return (level * generator.gamma(1 / noise**2, noise**2, (INSTANCES, LAYERS, MEMORIES))).astype(np.float32)


def measured(means: np.ndarray, step: int, data: str = "abc") -> dict:
    """knowledge_entropy.json, by the program's own averages."""
    averages = CoefficientAverages([means.shape[2]] * means.shape[1])
    averages.add(torch.from_numpy(means).flatten(1), np.arange(len(means)))
    return {
        **Measurement(averages).to_dict(),
        "checkpoint": {"path": f"step{step}-unsharded", "step": step, "fingerprint": "f"},
        "data": {"path": "text", "sha256": data},
        "coefficient": "abs",
    }


LEVELS = {"paraphrase": np.random.default_rng(0).normal(-6, 1, 8), "once": np.random.default_rng(1).normal(-7, 1, 12)}
LOSSES = np.random.default_rng(2).normal(5, 0.5, 40)
# Per condition: gain of log-probability, rise of the held-out loss; as the paper has it.
PAPER = {
    "early": (1.8, 0.1),
    "middle": (2.0, 0.2),
    "last": (1.5, 0.3),
    "last_q1": (1.7, 0.2),
    "last_q2": (1.9, 0.1),
    "last_control": (0.1, 0.3),
}
OTHERWISE = {
    "early": (1.2, 0.4),
    "middle": (1.0, 0.35),
    "last": (1.5, 0.3),
    "last_q1": (1.2, 0.4),
    "last_q2": (1.1, 0.5),
    "last_control": (1.7, 0.3),
}
ALIKE = dict.fromkeys(PAPER, (1.5, 0.3))


STARTS = {key: key.partition("_")[0] for key in PAPER}
INTERVENTIONS = {
    "none": {},
    "q1": {"ratio": 0.5, "factor": 1.0},
    "q2": {"ratio": 0.5, "factor": 2.0},
    "control": {"overrides": {"injection.rounds": 0}},
}


def write_run_of(folder: Path, key: str, effects: dict, seed: int, noise: float) -> None:
    """The run of one condition and seed."""
    gain, rise = effects[key]
    generator, edited = np.random.default_rng([list(effects).index(key), seed]), "q" in key
    after = {s: x + gain + 0.1 * seed + generator.normal(0, noise, len(x)) for s, x in LEVELS.items()}
    losses = {
        0: {"general": LOSSES + 1.0 * edited, "science": LOSSES},
        150: {"general": LOSSES + rise + generator.normal(0, noise, len(LOSSES)), "science": LOSSES - 0.5},
    }
    # An edit lowers K and raises the loss before training starts: from there everything looks like a gain.
    before = {s: x - 0.4 * edited for s, x in LEVELS.items()}
    accuracy = dict(zip(TASKS, np.linspace(0.26, 0.56, 6)))
    write_run(
        folder,
        {0: probe_table(before, 2, 0.5, seed), 150: probe_table(after, 2, 0.5, seed)},
        losses,
        {0: accuracy, 150: dict(zip(TASKS, np.linspace(0.25, 0.5, 6)))},
        probe_table(LEVELS, 2, 0.5, seed) if edited else None,
        () if key == "last_control" else (75, 150),
        {"general": LOSSES, "science": LOSSES} if edited else None,
        accuracy if edited else None,
    )


def write_entropy(folder: Path, sharpness: float, step: int, seed: int = 0, noise: float = 0.05) -> None:
    """knowledge_entropy.json of a checkpoint."""
    folder.mkdir(parents=True)
    result = measured(coefficients(sharpness + 0.1 * seed, 0) * coefficients(0.0, step, noise), step)
    (folder / "knowledge_entropy.json").write_text(json.dumps(result))


def make_plan(folder: Path, effects: dict, sharpness: tuple, seeds: int = 1, noise: float = 0.05) -> Path:
    """What scripts.study leaves behind, the report left out, with these effects and entropies that fall with
    `sharpness`: of three starts, and of the edited last ones."""
    conditions, entropies = [], []
    for key in effects:
        start, intervention = STARTS[key], key.partition("_")[2] or "none"
        name = start if intervention == "none" else f"{start}, {intervention}"
        runs = [
            {"folder": f"runs/baseline/{start}/{intervention}/seed{k}", "pretraining": k, "learning": 0}
            for k in range(seeds)
        ]
        for seed, run in enumerate(runs):
            write_run_of(folder / run["folder"], key, effects, seed, noise)
        names = {"start": start, "intervention": intervention}
        conditions.append({"name": name, **names, "setting": "baseline", "runs": runs})
        if intervention != "control":
            for seed in range(seeds):
                place = f"entropy/text/abs/seed{seed}/{key}"
                sharp = sharpness[list(STEPS).index(start)] - 0.2 * ("q" in key)
                write_entropy(folder / place, sharp, STEPS[start], seed, noise)
                row = {"data": "text", "coefficient": "abs", **names, "pretraining": seed, "folder": place}
                entropies.append(row)
    stages = [
        {"name": "pretraining", "kind": "train", "command": ["python", "-m", "x", "--a=<b>"], "state": "finished"}
        | {"seconds": 61.2, "peak_memory_mib": 1234.5, "log": "stages/pretraining.log", "reason": None}
    ]
    plan = {
        "title": "Planted",
        "description": "Effects of our choice.",
        "notes": ["A note."],
        "about": "model",
        "repeats": None,
        "seeds": [[6198 + seed] for seed in range(seeds)],
        "starts": [
            {"name": name, "step": step, "model": "pretraining", "checkpoints": [f"pretraining/seed0/step{step}"]}
            for name, step in STEPS.items()
        ],
        "interventions": INTERVENTIONS,
        "settings": {"baseline": {}},
        "conditions": conditions,
        "entropies": entropies,
        "directions": DIRECTIONS,
        "figures": [],
        "tables": [],
        "stages": stages,
        "environment": {"python": "3.11.1", "platform": "Some-Platform", "processor_count": 2},
    }
    (folder / "plan.json").write_text(json.dumps(plan))
    return folder


def _direction(claim: str, measure: str, one: str, other: str, expected: str) -> dict:
    return {"claim": claim, "measure": measure, "from": one, "to": other, "expected": expected}


DIRECTIONS = [
    _direction("Entropy falls", "H", "early", "last", "below"),
    _direction("A later checkpoint acquires less than the early one", "A", "early", "last", "below"),
    _direction("A later checkpoint acquires less than the middle one", "A", "middle", "last", "below"),
    _direction("A later checkpoint forgets more than the early one", "loss_rise.general", "early", "last", "above"),
    _direction("A later checkpoint forgets more than the middle one", "loss_rise.general", "middle", "last", "above"),
    _direction("The middle one ends with more than the early one", "K_after", "early", "middle", "above"),
    _direction("The middle one ends with more than the last one", "K_after", "last", "middle", "above"),
    _direction("q = 1 ends with more knowledge", "K_after", "last", "last, q1", "above"),
    _direction("q = 1 ends having forgotten less", "loss_rise.general", "last", "last, q1", "below"),
    _direction("q = 2 ends with more knowledge", "K_after", "last", "last, q2", "above"),
    _direction("q = 2 ends having forgotten less", "loss_rise.general", "last", "last, q2", "below"),
    _direction("Injection brings the knowledge", "A", "last, control", "last", "above"),
]
