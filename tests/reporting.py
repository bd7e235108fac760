"""What a test reports, through the trainer's Reporter, and how it reads it back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from olmo.config import TrainConfig
from olmo.eval.evaluators import Evaluation
from olmo.eval.probes import ProbeTable
from olmo.knowledge.entries import Probe
from olmo.knowledge.plan import Text
from olmo.report.reporter import Reporter


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def an_evaluation() -> Evaluation:
    probes = [Probe("once", "semantic", 0, 1, (5, 6, 7), 1), Probe("once", "semantic", 2, 0, (5, 6), 1)]
    table = ProbeTable(
        probes,
        tokens=np.array([2, 1]),
        sum_log_prob=np.array([-4.0, -3.0]),
        first_log_prob=np.array([-1.0, -3.0]),
        first_rank=np.array([0, 9]),
        exact_match=np.array([True, False]),
    )
    losses = {"general": np.array([1.5, 2.5]), "science": np.array([3.0])}
    return Evaluation({"eval/K": -2.5, "eval/general/CrossEntropyLoss": 2.0}, table, losses)


def run_to(config: TrainConfig, steps: list[int], resume_step: int | None = None) -> None:
    reporter = Reporter(config, active=True, resume_step=resume_step)
    for step in steps:
        reporter.metrics(step, {"train/CrossEntropyLoss": float(step)})
        reporter.injection(step, step % 3, [(0, Text(f"once/{step}", (1, 2))), (5, Text("map/1", (3,)))])
        reporter.evaluation(step, an_evaluation())
    reporter.close()
