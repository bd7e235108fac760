"""Zero-shot downstream tasks: data, prompts and metric are `olmo_eval`'s; the forward pass is ours."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from ..config import TrainConfig
from ..distributed import Ranks
from ..exceptions import ConfigurationError
from ..model import OLMo
from ..tokenizer import tokenizer_file


class DownstreamTask:
    """One task of `olmo_eval`, tokenized once; `evaluate` may be called any number of times."""

    def __init__(self, label: str, config: TrainConfig):
        try:
            import olmo_eval
        except ImportError as error:
            raise ConfigurationError(f"evaluators.{label}: downstream tasks need the package ai2-olmo-eval") from error
        if label not in olmo_eval.list_tasks():
            raise ConfigurationError(f"evaluators.{label}: olmo_eval has no such task")
        tokenizer = olmo_eval.HFTokenizer(
            tokenizer_file(config.tokenizer.identifier),
            pad_token_id=config.model.pad_token_id,
            eos_token_id=config.model.eos_token_id,
        )
        # The library announces the first tokens of every task; that is no news to the user of a run.
        logging.getLogger("olmo_eval").setLevel(logging.WARNING)
        self.label = label
        self.task = olmo_eval.build_task(label, tokenizer, model_ctx_len=config.model.max_sequence_length)
        self._make_metric = lambda: olmo_eval.ICLMetric(metric_type=self.task.metric_type)

    def __len__(self) -> int:
        """Number of (document, continuation) samples."""
        return len(self.task.samples)

    def limit(self, batches: int, batch_size: int) -> None:
        """Keep the documents of the first `batches` batches, whole documents only."""
        samples = self.task.samples
        if batches * batch_size < len(samples):
            cut = samples[batches * batch_size]["doc_id"]
            self.task.samples = [s for s in samples if s["doc_id"] < max(cut, 1)]

    @property
    def chance(self) -> float:
        """Expected accuracy of guessing: the mean of 1 / number of choices over the documents."""
        choices: dict[int, int] = {}
        for sample in self.task.samples:
            choices[sample["doc_id"]] = choices.get(sample["doc_id"], 0) + 1
        return sum(1 / n for n in choices.values()) / len(choices)

    @torch.no_grad()
    def evaluate(
        self,
        model: OLMo,
        tokens_per_batch: int,
        device: torch.device,
        ranks: Ranks,
        progress: Callable[[int], None] = lambda _: None,
    ) -> dict[str, float]:
        """{metric name: value}, as the library's own metric computes it, the same for any number of ranks;
        beside it what guessing would score.

        Samples are sorted by length and dealt to the ranks in turn; only hidden states in front of continuation
        tokens reach the vocabulary. The metric sees them as if the context were one token long.
        """
        samples = sorted(self.task.samples, key=lambda s: -len(s["query"]))[ranks.rank :: ranks.world_size]
        metric = self._make_metric()
        start = 0
        while start < len(samples):
            longest = max(len(samples[start]["query"]), 1)
            chosen = samples[start : start + max(1, tokens_per_batch // longest)]
            batch: dict[str, Any] = self.task.collate_fn(chosen)
            ids = batch["input_ids"][:, :longest].to(device)
            width = batch["continuation"].shape[1]
            first = batch["ctx_len"].to(device) - 1
            places = (first[:, None] + torch.arange(width, device=device)).clamp(max=longest - 1)
            hidden = model.hidden_states(ids).gather(1, places[..., None].expand(-1, -1, model.config.d_model))
            batch["ctx_len"] = torch.ones_like(batch["ctx_len"])
            domain_logits = None
            if self.task.metric_type == "pmi_dc":
                domain_logits = model(batch["dc_input_ids"].to(device)).float().cpu()
            metric.update(batch, model.logits(hidden).float().cpu(), domain_logits)
            progress(len(chosen))
            start += len(chosen)
        name = f"{self.task.metric_type}_v1"
        prefix = f"eval/downstream/{self.label}"
        return {
            f"{prefix}_{self.task.metric_type}": float(metric.compute()[name]),
            f"{prefix}_chance": self.chance,
        }
