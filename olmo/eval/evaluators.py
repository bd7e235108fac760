"""All evaluators of a run behind one call: probes, held-out losses, downstream tasks, knowledge entropy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ..config.schema import EvaluatorConfig, TrainConfig
from ..console import Progress, log
from ..data.sources import TokenFiles
from ..distributed.ranks import Ranks
from ..exceptions import ConfigurationError
from ..knowledge.entries import Probe
from ..model.causal_lm import Model
from .downstream import DownstreamTask
from .entropy import EntropyBatch
from .perplexity import instance_losses
from .probes import ProbeTable, probe_metrics, probes_of, score_probes
from .scoring import perplexity


@dataclass
class Evaluation:
    """The result of one evaluation: scalars for metrics.jsonl, and the tables they are computed from."""

    metrics: dict[str, float] = field(default_factory=dict)
    probes: ProbeTable | None = None
    losses: dict[str, NDArray[np.float64]] = field(default_factory=dict)  # label -> loss of each instance


class Evaluators:
    """Built once from the configuration (files read, text tokenized), run any number of times."""

    def __init__(self, config: TrainConfig, tokenizer: Tokenizer | None, device: torch.device, ranks: Ranks):
        self.config, self.device, self.ranks = config, device, ranks
        self.length = config.model.max_sequence_length
        self.probes: list[tuple[EvaluatorConfig, list[Probe]]] = []
        self.sources: list[tuple[EvaluatorConfig, str, TokenFiles]] = []
        self.tasks: list[tuple[EvaluatorConfig, DownstreamTask]] = []
        self.entropies: list[tuple[EvaluatorConfig, EntropyBatch]] = []
        with Progress("preparing", len(config.evaluators), "evaluators", show=ranks.is_first) as progress:
            for evaluator in config.evaluators:
                self._prepare(evaluator, tokenizer)
                progress.advance()

    def _prepare(self, evaluator: EvaluatorConfig, tokenizer: Tokenizer | None) -> None:
        if evaluator.type == "downstream":
            task = DownstreamTask(evaluator.label, self.config)
            if (limit := self._limit(evaluator)) is not None:
                task.limit(limit)
            task.check()
            self.tasks.append((evaluator, task))
        elif evaluator.type == "knowledge_entropy":
            self.entropies.append((evaluator, EntropyBatch(evaluator, self.config, self._limit(evaluator))))
        elif evaluator.data.dataset_path:
            assert tokenizer is not None
            probes, rows = (
                probes_of(evaluator, tokenizer, self.config)[: self._limit(evaluator)],
                self.config.model.rows,
            )
            if (largest := max((max(probe.input_ids) for probe in probes), default=0)) >= rows:
                raise ConfigurationError(
                    f"evaluators.{evaluator.label}: a probe has token {largest}, the model's vocabulary has {rows}; "
                    "tokenizer.identifier belongs to another model"
                )
            self.probes.append((evaluator, probes))
        else:
            for label, paths in _token_files(evaluator).items():
                key = f"evaluators.{evaluator.label}.data"
                source = TokenFiles(paths, self.length, evaluator.data.memmap_dtype, key=key)
                for remark in source.remarks() if self.ranks.is_first else ():
                    log.info("evaluators.%s: %s", label, remark)
                self.sources.append((evaluator, label, source))

    def _batch_size(self, evaluator: EvaluatorConfig) -> int:
        return evaluator.device_eval_batch_size or self.config.device_eval_batch_size

    def _limit(self, evaluator: EvaluatorConfig) -> int | None:
        """How many instances all ranks together evaluate; None: all."""
        batches = evaluator.subset_num_batches
        batches = self.config.eval_subset_num_batches if batches is None else batches
        return None if batches < 0 else batches * self._batch_size(evaluator)

    def due(self, step: int) -> list[EvaluatorConfig]:
        """The evaluators whose interval ends with this step."""
        return [e for e in self.config.evaluators if step % (e.eval_interval or self.config.eval_interval) == 0]

    def with_probes(self, due: Sequence[EvaluatorConfig]) -> list[EvaluatorConfig]:
        """The evaluators that are due and all that score probes, in the order of the configuration."""
        probing = [evaluator for evaluator, _ in self.probes]
        return [e for e in self.config.evaluators if e in due or e in probing]

    @torch.no_grad()
    def run(self, model: Model, chosen: Sequence[EvaluatorConfig], description: str = "evaluating") -> Evaluation:
        """Evaluate the model with the chosen evaluators; its training mode is restored afterwards.

        Log-probabilities in the precision of the run, reduced in float32 and float64. Raises ValueError, on every rank,
        if a metric is not finite; the perplexity of a loss beyond float64 is left out.
        """
        config, device, ranks = self.config, self.device, self.ranks
        probes = [probe for evaluator, asked in self.probes if evaluator in chosen for probe in asked]
        sources = [item for item in self.sources if item[0] in chosen]
        tasks = [item for item in self.tasks if item[0] in chosen]
        entropies = [item for item in self.entropies if item[0] in chosen]
        items = len(probes) + sum(min(len(source), self._limit(e) or len(source)) for e, _, source in sources)
        items += sum(len(task) for _, task in tasks) + sum(len(batch.rows) for _, batch in entropies)
        result, training = Evaluation(), model.training
        model.eval()
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "amp_bf16")
        share = -(-items // ranks.world_size)
        with Progress(description, share, "items", show=ranks.is_first) as progress, autocast:
            if probes:
                tokens_per_batch = config.device_eval_batch_size * self.length
                sizes = {evaluator.label: self._batch_size(evaluator) for evaluator, _ in self.probes}
                scored = score_probes(model, probes, tokens_per_batch, device, ranks, progress.advance)
                result.probes = scored.padded(sizes)
                result.metrics.update(probe_metrics(result.probes))
            for evaluator, label, source in sources:
                size, limit = self._batch_size(evaluator), self._limit(evaluator)
                where = f"evaluators.{label}: "
                losses = instance_losses(model, source, size, device, ranks, limit, progress.advance, where)
                result.losses[label] = losses
                result.metrics[f"eval/{label}/CrossEntropyLoss"] = float(losses.mean())
                result.metrics[f"eval/{label}/Perplexity"] = perplexity(float(losses.mean()))
            for evaluator, task in tasks:
                tokens_per_batch = self._batch_size(evaluator) * self.length
                result.metrics.update(task.evaluate(model, tokens_per_batch, device, ranks, progress.advance))
            for evaluator, batch in entropies:
                size = self._batch_size(evaluator)
                result.metrics.update(batch.evaluate(model, size, device, ranks, progress.advance))
        model.train(training)
        for name, value in list(result.metrics.items()):
            if value == math.inf and name.endswith("/Perplexity"):
                log.warning("%s: %s is left out, it exceeds every number", description, name)
                del result.metrics[name]
            elif not math.isfinite(value):
                raise ValueError(
                    f"{description}: {name} is {value}; the weights, or the data of this evaluator, are wrong"
                )
        return result


def _token_files(evaluator: EvaluatorConfig) -> dict[str, list[str]]:
    """Label -> token files: one label for `data.paths`, or one for each source of `data.datasets`."""
    if evaluator.data.datasets:
        return {f"{evaluator.label}/{name}": paths for name, paths in evaluator.data.datasets.items()}
    return {evaluator.label: evaluator.data.paths or []}
