"""1,950 probes of 130 entries of our own in one packed pass, against the published way: one evaluator at a time, its
probes in file order, padded batches, logits of all positions.

Both must find the same diluted losses. The model is small, its vocabulary OLMo's. In wider and deeper models the
vocabulary matters less, and the ratio approaches that of the padded tokens, which is also printed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

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


def bench_probes(folder: Path, rounds: int) -> None:
    """Seconds and ratio, and the padded tokens of both."""
    entries, evaluators = make_entries(130, paraphrases=0), []
    for setting, part in (("paraphrase", entries[:70]), ("once", entries[70:])):
        (folder / setting).write_text(json.dumps(part), encoding="utf-8")
        data = DataConfig(dataset_path=str(folder / setting))
        evaluators += [EvaluatorConfig(f"{setting}_{kind}", data=data) for kind in KINDS]
    tokenizer = TokenizerConfig(OLMO_TOKENIZER)
    config = TrainConfig(
        model=small_model(), tokenizer=tokenizer, evaluators=evaluators, device_eval_batch_size=BATCH, precision="fp32"
    )
    device = pick_device()
    torch.manual_seed(0)
    model = OLMo(config.model).to(device).eval()
    packed = Evaluators(config, run_tokenizer(config), device, Ranks())
    labels = {evaluator.label: probes for evaluator, probes in packed.probes}

    def timed(work: Callable[[], dict[str, float]]) -> tuple[float, dict[str, float]]:
        started = time.perf_counter()
        metrics = work()  # ends with numbers on the CPU
        return time.perf_counter() - started, metrics

    works = {
        "packed": partial(timed, lambda: packed.run(model, evaluators).metrics),
        "padded": partial(timed, lambda: one_at_a_time(model, labels, device)),
    }
    alternate(1, works)  # warm up
    ours, theirs = alternate(rounds, works).values()
    apart = max(
        abs(of_ours[f"eval/{name}/CrossEntropyLoss"] - value)
        for (_, of_ours), (_, of_theirs) in zip(ours, theirs)
        for name, value in of_theirs.items()
    )
    own, other = (np.array([seconds for seconds, _ in results]) for results in (ours, theirs))
    lengths = [[len(probe.input_ids) for probe in probes] for probes in labels.values()]
    padded = sum(max(of[i : i + BATCH]) * len(of[i : i + BATCH]) for of in lengths for i in range(0, len(of), BATCH))
    print(
        f"probes, {sum(map(len, lengths)):,} in one pass / one padded evaluator at a time: {spread(other / own)} over "
        f"{rounds} rounds ({np.median(own):.2f} s, {np.median(other):.2f} s); its padded tokens / all tokens: "
        f"{padded / sum(map(sum, lengths)):.2f} x; diluted losses within {apart:.0e}",
        flush=True,
    )
