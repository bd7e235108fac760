"""All evaluators of a run behind one call: probes, held-out losses and downstream tasks."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ..config import EvaluatorConfig, EvaluatorType, TrainConfig
from ..data.sources import TokenFiles
from ..distributed import Ranks
from ..model import OLMo
from ..reporting import Progress
from .downstream import DownstreamTask
from .perplexity import instance_losses
from .probes import ProbeTable, probe_metrics, probes_of, score_probes


@dataclass
class Evaluation:
    """What one evaluation found: scalars for metrics.jsonl, and the tables behind them."""

    metrics: dict[str, float] = field(default_factory=dict)
    probes: ProbeTable | None = None
    losses: dict[str, NDArray[np.float64]] = field(default_factory=dict)  # label -> loss of each instance


class Evaluators:
    """Built once from the configuration (files read, text tokenized), run any number of times."""

    def __init__(self, config: TrainConfig, tokenizer: Tokenizer | None, device: torch.device, ranks: Ranks):
        self.config, self.device, self.ranks = config, device, ranks
        self.length = config.model.max_sequence_length
        language = [e for e in config.evaluators if e.type == EvaluatorType.lm]
        asking = [e for e in language if e.data.dataset_path]
        self.probes = probes_of(asking, tokenizer, config) if asking and tokenizer is not None else []
        self.sources: dict[str, tuple[TokenFiles, EvaluatorConfig]] = {}
        for evaluator in language:
            named = evaluator.data.datasets or {evaluator.label: evaluator.data.paths or []}
            for name, paths in named.items() if not evaluator.data.dataset_path else ():
                label = name if evaluator.data.datasets is None else f"{evaluator.label}/{name}"
                self.sources[label] = (TokenFiles(paths, self.length, evaluator.data.memmap_dtype), evaluator)
        self.tasks: list[tuple[DownstreamTask, EvaluatorConfig]] = []
        for evaluator in config.evaluators:
            if evaluator.type == EvaluatorType.downstream:
                task = DownstreamTask(evaluator.label, config)
                batches = self._batches(evaluator)
                if batches is not None:
                    task.limit(batches, self._batch_size(evaluator))
                self.tasks.append((task, evaluator))

    def _batch_size(self, evaluator: EvaluatorConfig) -> int:
        return evaluator.device_eval_batch_size or self.config.device_eval_batch_size

    def _batches(self, evaluator: EvaluatorConfig) -> int | None:
        """Batches of all ranks together to evaluate; None: all."""
        batches = evaluator.subset_num_batches
        batches = self.config.eval_subset_num_batches if batches is None else batches
        return None if batches < 0 else batches

    def __bool__(self) -> bool:
        return bool(self.probes or self.sources or self.tasks)

    def run(self, model: OLMo, description: str = "evaluating") -> Evaluation:
        """Evaluate the model as it is; its training mode is restored afterwards.

        Log-probabilities in the precision of the run, reduced in float32 and float64.
        """
        result, training = Evaluation(), model.training
        model.eval()
        pieces = len(self.probes) + sum(len(t.task.samples) for t, _ in self.tasks)
        pieces += sum(self._limit(s, e) for s, e in self.sources.values())
        each_rank = -(-pieces // self.ranks.world_size)
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "amp_bf16")
        with Progress(description, each_rank, "items", show=self.ranks.is_first) as progress, autocast:
            tokens = self.config.device_eval_batch_size * self.length
            if self.probes:
                result.probes = score_probes(model, self.probes, tokens, self.device, self.ranks, progress.advance)
                result.metrics.update(probe_metrics(result.probes, self.config.device_eval_batch_size))
            for label, (source, evaluator) in self.sources.items():
                losses = instance_losses(
                    model,
                    source,
                    self._batch_size(evaluator),
                    self.device,
                    self.ranks,
                    self._limit(source, evaluator),
                    progress.advance,
                )
                result.losses[label] = losses
                result.metrics[f"eval/{label}/CrossEntropyLoss"] = float(losses.mean())
                result.metrics[f"eval/{label}/Perplexity"] = float(np.exp(losses.mean()))
            for task, evaluator in self.tasks:
                room = self._batch_size(evaluator) * self.length
                result.metrics.update(task.evaluate(model, room, self.device, self.ranks, progress.advance))
        model.train(training)
        return result

    def _limit(self, source: TokenFiles, evaluator: EvaluatorConfig) -> int:
        batches = self._batches(evaluator)
        return len(source) if batches is None else min(len(source), batches * self._batch_size(evaluator))
