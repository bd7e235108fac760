"""1,950 probes of 130 entries of our own in one packed pass, against the published way: one evaluator at a time, its
probes in file order, padded batches, logits of all positions.

Both must find the same diluted losses. The model is small, its vocabulary OLMo's. In wider and deeper models the
vocabulary matters less, and the ratio approaches that of the padded tokens, which is also printed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from olmo.config import DataConfig, EvaluatorConfig, ModelConfig, TokenizerConfig, TrainConfig, load
from olmo.distributed import Ranks, pick_device
from olmo.eval.evaluators import Evaluators
from olmo.knowledge.entries import KINDS, Probe
from olmo.model import OLMo
from olmo.tokenizer import run_tokenizer
from scripts.benchmarks.rounds import alternate, spread
from scripts.prepare import OLMO_TOKENIZER
from scripts.prepare.fictional_knowledge import make_entries

SHAPE = {"d_model": 256, "n_heads": 4, "n_layers": 4, "max_sequence_length": 1024, "init_device": "cpu"}
BATCH = 16  # device_eval_batch_size of the published configurations


@torch.no_grad()
def one_at_a_time(model: OLMo, labels: dict[str, list[Probe]], device: torch.device) -> dict[str, float]:
    """The published evaluator of each label: mean over the probes of the masked cross-entropy, over all positions."""
    found = {}
    for label, probes in labels.items():
        losses = []
        for start in range(0, len(probes), BATCH):
            batch = probes[start : start + BATCH]
            shape = (len(batch), max(len(probe.input_ids) for probe in batch))
            ids, targets = torch.full(shape, model.config.pad_token_id), torch.full(shape, -100)
            for row, probe in enumerate(batch):
                text = torch.tensor(probe.input_ids)
                ids[row, : len(text)] = text
                targets[row, probe.target_start : len(text)] = text[probe.target_start :]
            ids, targets = ids.to(device), targets.to(device)
            logits = model(ids)[:, :-1].flatten(0, 1).float()
            loss = F.cross_entropy(logits, targets[:, 1:].flatten(), ignore_index=-100, reduction="none")
            losses += loss.view(len(batch), -1).mean(1).tolist()
        found[label] = float(np.mean(losses))
    return found


def small_model() -> ModelConfig:
    """OLMo-1B in everything but its size."""
    official = load(Path("configs/official/OLMo-1B.yaml")).model
    return ModelConfig(**{**vars(official), **SHAPE})


@dataclass(frozen=True)
class Contest:
    """Both ways to score the probes of one model; each returns seconds and the diluted loss of every label."""

    works: Mapping[str, Callable[[], tuple[float, dict[str, float]]]]  # packed, padded
    lengths: list[list[int]]  # tokens of the probes of each label

    def apart(self, ours: Sequence[tuple[float, dict[str, float]]], theirs: Sequence[Any]) -> float:
        """The largest difference of a diluted loss."""
        pairs = ((of_ours, of_theirs) for (_, of_ours), (_, of_theirs) in zip(ours, theirs))
        return max(abs(own[name] - value) for own, other in pairs for name, value in other.items())

    @property
    def padded_share(self) -> float:
        """Tokens of the padded batches over all tokens."""
        padded = sum(
            max(of[i : i + BATCH]) * len(of[i : i + BATCH]) for of in self.lengths for i in range(0, len(of), BATCH)
        )
        return padded / sum(map(sum, self.lengths))


def contest(
    folder: Path, entries: list[dict[str, Any]], tokenizer: str, model: OLMo, precision: str, device: torch.device
) -> Contest:
    """Entries in the shares of the paper, 70 of 130 as paraphrases, for a model on the device."""
    evaluators, most = [], len(entries) * 7 // 13
    for setting, part in (("paraphrase", entries[:most]), ("once", entries[most:])):
        (folder / setting).write_text(json.dumps(part), encoding="utf-8")
        data = DataConfig(dataset_path=str(folder / setting))
        evaluators += [EvaluatorConfig(f"{setting}_{kind}", data=data) for kind in KINDS]
    config = TrainConfig(
        model=model.config,
        tokenizer=TokenizerConfig(tokenizer),
        evaluators=evaluators,
        device_eval_batch_size=BATCH,
        precision=precision,
    )
    packed = Evaluators(config, run_tokenizer(config), device, Ranks())
    labels = {evaluator.label: probes for evaluator, probes in packed.probes}

    def ours() -> dict[str, float]:
        metrics = packed.run(model, evaluators).metrics
        return {label: metrics[f"eval/{label}/CrossEntropyLoss"] for label in labels}

    def theirs() -> dict[str, float]:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "amp_bf16"):
            return one_at_a_time(model, labels, device)

    def timed(work: Callable[[], dict[str, float]]) -> tuple[float, dict[str, float]]:
        started = time.perf_counter()
        losses = work()  # ends with numbers on the CPU
        return time.perf_counter() - started, losses

    works = {"packed": partial(timed, ours), "padded": partial(timed, theirs)}
    return Contest(works, [[len(probe.input_ids) for probe in probes] for probes in labels.values()])


def bench_probes(folder: Path, rounds: int) -> None:
    """Seconds and ratio, and the padded tokens of both."""
    device = pick_device()
    torch.manual_seed(0)
    model = OLMo(small_model()).to(device).eval()
    both = contest(folder, make_entries(130, paraphrases=0), OLMO_TOKENIZER, model, "fp32", device)
    alternate(1, both.works)  # warm up
    ours, theirs = alternate(rounds, both.works).values()
    own, other = (np.array([seconds for seconds, _ in results]) for results in (ours, theirs))
    print(
        f"probes, {sum(map(len, both.lengths)):,} in one pass / one padded evaluator at a time: {spread(other / own)} "
        f"over {rounds} rounds ({np.median(own):.2f} s, {np.median(other):.2f} s); its padded tokens / all tokens: "
        f"{both.padded_share:.2f} x; diluted losses within {both.apart(ours, theirs):.0e}",
        flush=True,
    )
