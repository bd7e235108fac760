"""Zero-shot downstream tasks: `olmo_eval` has data, prompts and metrics; the forward pass is ours."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config.schema import TrainConfig
from ..distributed.ranks import Ranks
from ..exceptions import ConfigurationError, did_you_mean, needs
from ..model.causal_lm import Model
from ..tokenizer import tokenizer_file, tokenizer_of_run
from .batches import batched_by_length
from .scoring import score_in_parts

ACCURACIES = ("acc", "len_norm", "pmi_dc")  # metrics that count documents whose most probable choice is right


@lru_cache(maxsize=1)  # reading it takes a tenth of a second, and all tasks of a run have the same
def _read_tokenizer(made: type, file: str, pad_token_id: int, eos_token_id: int) -> Any:
    return made(file, pad_token_id=pad_token_id, eos_token_id=eos_token_id)


class DownstreamTask:
    """One task of `olmo_eval`, tokenized once; `evaluate` may be called any number of times."""

    def __init__(self, label: str, config: TrainConfig):
        olmo_eval = needs("olmo_eval", "eval", f"evaluators.{label}")
        if label not in (tasks := olmo_eval.list_tasks()):
            raise ConfigurationError(f"evaluators.{label}: olmo_eval has no such task{did_you_mean(label, tasks)}")
        file = tokenizer_file(tokenizer_of_run(config))
        tokenizer = _read_tokenizer(olmo_eval.HFTokenizer, file, config.model.pad_token_id, config.model.eos_token_id)
        # The library logs the first tokens of every task.
        logging.getLogger("olmo_eval").setLevel(logging.WARNING)
        self.label, self.length = label, config.model.max_sequence_length
        try:
            self.task = olmo_eval.build_task(label, tokenizer, model_ctx_len=self.length)
        except Exception as error:  # of any kind: files that a release lacks, another format
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise ConfigurationError(f"evaluators.{label}: olmo_eval cannot build this task: {reason}") from error
        self._make_metric = lambda: olmo_eval.ICLMetric(metric_type=self.task.metric_type)

    def __len__(self) -> int:
        """Number of (document, continuation) samples."""
        return len(self.task.samples)

    def limit(self, samples: int) -> None:
        """Keep the documents that are complete within the first `samples`, at least one."""
        documents = [s["doc_id"] for s in self.task.samples]
        if samples < len(documents):
            complete = documents.index(documents[samples])
            self.task.samples = self.task.samples[: complete or documents.count(documents[0])]

    def check(self) -> None:
        """Raise ConfigurationError for a sample without context: the library cuts a query from the left to the model's
        context length, and one token must remain before the continuation."""
        crowded = [s["cont_len"] for s in self.task.samples if s["ctx_len"] < 1]
        if crowded:
            raise ConfigurationError(
                f"evaluators.{self.label}: continuations of up to {max(crowded)} tokens leave no room for a context; "
                f"leave this task out, use fewer of its documents (subset_num_batches), or raise "
                f"model.max_sequence_length: {self.length}"
            )

    @property
    def chance(self) -> float:
        """Expected accuracy of guessing: the mean of 1 / number of choices over the documents."""
        choices: dict[int, int] = defaultdict(int)
        for sample in self.task.samples:
            choices[sample["doc_id"]] += len(sample["choices"]) if self.task.fast_mc else 1
        return sum(1 / n for n in choices.values()) / len(choices)

    @torch.no_grad()
    def evaluate(
        self,
        model: Model,
        tokens_per_batch: int,
        device: torch.device,
        ranks: Ranks,
        progress: Callable[[int], None] = lambda _: None,
    ) -> dict[str, float]:
        """{metric name: value}, as the library's own metric computes it, the same for any number of ranks; accuracies
        with that of guessing. NaN if the score of a choice is not finite.

        Samples are sorted by length and distributed over the ranks in turn, each once. Only hidden states before
        continuation tokens are scored over the vocabulary, and only these tokens' log-probabilities leave the device.
        """
        samples = sorted(self.task.samples, key=lambda s: -len(s["query"]))[ranks.rank :: ranks.world_size]
        metric, kind = self._make_metric(), self.task.metric_type
        if not samples:
            metric.update({}, None)  # the library's collective needs every rank
        for part in batched_by_length([len(s["query"]) for s in samples], tokens_per_batch):
            chosen = samples[part]
            batch, logits, domain = self._scored(chosen, model, device)
            metric.update(batch, logits, domain)
            progress(len(chosen))
        undefined = sum(
            not math.isfinite(score) for document, _, score in metric.loglikelihoods if document is not None
        )
        value = _f1(metric) if kind == "f1" else float(metric.compute()[f"{kind}_v1"])
        if ranks.sum(np.array([float(undefined)]))[0]:  # choices without an order: their accuracy means nothing
            value = math.nan
        found = {f"eval/downstream/{self.label}_{kind}": value}
        return {**found, f"eval/downstream/{self.label}_chance": self.chance} if kind in ACCURACIES else found

    def _scored(
        self, samples: Sequence[dict[str, Any]], model: Model, device: torch.device
    ) -> tuple[dict[str, Any], Tensor, Tensor | None]:
        """Inputs of the metric: a batch, logits, and for `pmi_dc` the logits after the domain's own prompt.

        The metric looks up tokens (C choices of one, or else C = 1) in the log-softmax of logits (n, W, V). It gets
        logits (n, W, C + 1), the log-probabilities of these tokens and of all others together, whose log-softmax is
        themselves; tokens are renumbered accordingly, and contexts are one token long. Of the domain's logits
        ai2-olmo-eval 0.9 takes the log-softmax too, 0.8 does not: these are the model's own, for both.
        """
        batch: dict[str, Any] = self.task.collate_fn(samples)
        targets = batch["choice_ids"][:, None] if self.task.fast_mc else batch["continuation"][..., None]  # (n, W, C)
        counted = torch.arange(targets.shape[1]) < batch["cont_len"][:, None]
        tokens = targets[counted].clamp(min=0).to(device)

        def logits_of(ids: Tensor, context: Tensor, normalise: bool) -> Tensor:  # (n, W, C + 1)
            place = (context[:, None] - 1 + torch.arange(targets.shape[1]))[counted].to(device)
            row = counted.nonzero()[:, 0].to(device)
            hidden = model.hidden_states(ids.to(device))[row, place]

            def of_wanted(logits: Tensor, wanted: Tensor) -> Tensor:
                logits = logits.log_softmax(-1) if normalise else logits
                total = logits.new_zeros(len(logits), 1) if normalise else logits.logsumexp(-1, keepdim=True)
                return torch.cat((logits.gather(1, wanted), total), dim=-1)

            found = torch.zeros(*targets.shape[:2], targets.shape[2] + 1)
            found[counted] = torch.cat(score_in_parts(model, hidden, of_wanted, tokens)).cpu()
            of_tokens, total = found[..., :-1], found[..., -1:]
            present = (of_tokens - total).exp().masked_fill(targets < 0, 0).sum(-1, keepdim=True)
            return torch.cat((of_tokens, total + torch.log1p(-present.clamp(max=1))), dim=-1)

        longest = len(samples[0]["query"])
        logits = logits_of(batch["input_ids"][:, :longest], batch["ctx_len"], normalise=True)
        domain = None
        if self.task.metric_type == "pmi_dc":
            domain = logits_of(batch["dc_input_ids"], batch["dc_len"], normalise=False)
            batch["dc_len"] = torch.ones_like(batch["dc_len"])
        batch["ctx_len"] = torch.ones_like(batch["ctx_len"])
        batch["continuation"] = torch.zeros_like(batch["continuation"])
        if self.task.fast_mc:
            numbers = torch.arange(targets.shape[2]).expand(len(samples), -1)
            batch["choice_ids"] = numbers.masked_fill(batch["choice_ids"] < 0, -1)
        return batch, logits, domain


def _f1(metric: Any) -> float:
    """`ICLMetric.compute` for 'f1', without its assertion that always fails (ai2-olmo-eval 0.8.5)."""
    with metric.sync_context():
        labels = {document: label for document, _, label in reversed(metric.labels) if document is not None}
        scores: dict[int, dict[int, float]] = defaultdict(dict)
        for document, choice, score in metric.loglikelihoods:
            if document is not None:
                scores[document].setdefault(choice, score)
    predictions = [max(sorted(of_document), key=of_document.__getitem__) for of_document in scores.values()]
    return float(metric.custom_f1_score([labels[document] for document in scores], predictions, pos_label=0))
