"""Knowledge entropy while a model trains (method section 1): the same instances at every evaluation."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from ..config.schema import EvaluatorConfig, TrainConfig
from ..data.masks import open_masks, padded
from ..data.order import instances_at
from ..data.sources import check_tokens, open_source
from ..distributed.ranks import Ranks
from ..memory.entropy import CoefficientAverages, jackknife_error, layer_entropy
from ..memory.observation import instance_means, observe
from ..model.causal_lm import Model


class EntropyBatch:
    """The instances whose knowledge entropy an evaluator measures: the first of its own data, or, if it has none, the
    first that the run trains on."""

    def __init__(self, evaluator: EvaluatorConfig, config: TrainConfig, limit: int | None):
        own = bool(evaluator.data.paths or evaluator.data.dataset_path)
        data = evaluator.data if own else config.data
        section = f"evaluators.{evaluator.label}.data" if own else "data"
        source = open_source(data, config.model.max_sequence_length, key=section)
        count = min(limit or (len(source) if own else config.global_train_batch_size), len(source))
        shuffle = not own and config.data_shuffling
        places = instances_at(np.arange(count), len(source), config.data_seed, config.epoch or 0, shuffle)
        self.label = evaluator.label
        masks, where = open_masks(data, config.model.pad_token_id, source), f"evaluators.{evaluator.label}"
        self.rows: list[NDArray[np.int64]] = masks.rows(source, places, where)
        for row, place in zip(self.rows, places):
            check_tokens(row[None], np.array([place]), config.model.rows, f"{where}: ")

    def evaluate(
        self, model: Model, batch_size: int, device: torch.device, ranks: Ranks, progress: Callable[[int], None]
    ) -> dict[str, float]:
        """H, its standard error and the H of every layer that has memories, under their names in metrics.jsonl.

        Costs a forward pass up to the last memory coefficient. float32 within an instance, float64 across.
        """
        mine = np.arange(ranks.rank, len(self.rows), ranks.world_size)
        with observe(model) as observation:
            averages = CoefficientAverages(observation.sizes)
            for start in range(0, len(mine), batch_size):
                chosen = mine[start : start + batch_size]
                ids, mask = padded([self.rows[i] for i in chosen], device)
                averages.add(torch.cat(instance_means(model, observation, ids, mask), 1), chosen)
                progress(len(chosen))
        averages.reduce(ranks)
        try:
            layers = layer_entropy(averages.layers.values())
        except ValueError as undefined:
            raise ValueError(f"eval/{self.label}/knowledge_entropy: {undefined}") from undefined
        found = {f"eval/{self.label}/knowledge_entropy": float(layers.sum())}
        error = float(jackknife_error(averages.leave_one_out().sum(1)))
        if np.isfinite(error):  # nan for a single instance
            found[f"eval/{self.label}/standard_error"] = error
        return found | {f"eval/{self.label}/layer_{number}": float(h) for number, h in zip(averages.sizes, layers)}
