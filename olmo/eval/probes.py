"""Log-probabilities of target spans (method section 4), all probes of all evaluators in one packed pass.

An evaluator `type: lm` with `data.dataset_path` scores one kind of probe of one setting; its label is
`{setting}_{kind}`: setting paraphrase, once or duplicate; kind memorization, semantic, composition, or paragraph,
the loss on `train_context`. A kind with `_full` behind it is the loss on the probe's whole sentence, prompt and target,
which Chang et al. record as `full`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from ..config.schema import EvaluatorConfig, TrainConfig
from ..distributed.ranks import Ranks
from ..exceptions import ConfigurationError
from ..knowledge.entries import KINDS, SETTINGS, Probe, load_entries, make_probes
from ..model.causal_lm import Model
from ..tokenizer import encode, truncate
from .batches import batched_by_length
from .scoring import perplexity, score_in_parts

PARAGRAPH = "paragraph"
FULL = "_full"
LABEL_KINDS = (*KINDS, PARAGRAPH, *(f"{kind}{FULL}" for kind in KINDS))


@dataclass(frozen=True)
class ProbeTable:
    """One row for each probe, in order; log-probabilities are natural, computed in float32."""

    probes: Sequence[Probe]
    tokens: NDArray[np.int64]  # in the target span
    sum_log_prob: NDArray[np.float64]  # of the target span given the prompt
    first_log_prob: NDArray[np.float64]  # of its first token
    first_rank: NDArray[np.int64]  # number of tokens of the vocabulary that are more probable than its first token
    exact_match: NDArray[np.bool_]  # greedy decoding would give the whole target span
    positions: NDArray[np.int64] | None = None  # of `padded`, over which the published loss is a mean; None: unknown

    @property
    def mean_log_prob(self) -> NDArray[np.float64]:
        """l(p; theta) of method section 4."""
        return self.sum_log_prob / self.tokens

    def padded(self, batch_sizes: Mapping[str, int]) -> ProbeTable:
        """The table with its `positions`; `batch_sizes`: label -> its `device_eval_batch_size`.

        Positions of a probe: the T - 1 predictions of a padded batch of T tokens, of the label's probes in file order.
        Paragraphs and whole sentences (`_full`) have their own tokens only.
        """
        labels = np.array([f"{p.setting}_{p.kind}" for p in self.probes])
        lengths, positions = np.array([len(p.input_ids) for p in self.probes]), self.tokens.copy()
        for label in dict.fromkeys(labels[[p.kind in KINDS for p in self.probes]].tolist()):
            chosen = np.flatnonzero(labels == label)
            for start in range(0, len(chosen), batch_sizes[label]):
                batch = chosen[start : start + batch_sizes[label]]
                positions[batch] = lengths[batch].max() - 1
        return replace(self, positions=positions)

    def columns(self) -> dict[str, Any]:
        """As columns of a Parquet table."""
        return {
            **{name: [getattr(p, name) for p in self.probes] for name in ("setting", "entry", "kind", "index")},
            "tokens": self.tokens,
            **({} if self.positions is None else {"positions": self.positions}),
            "sum_log_prob": self.sum_log_prob,
            "mean_log_prob": self.mean_log_prob,
            "first_token_log_prob": self.first_log_prob,
            "first_token_rank": self.first_rank,
            "exact_match": self.exact_match,
        }


def parse_label(label: str) -> tuple[str, str]:
    """'paraphrase_memorization' -> ('paraphrase', 'memorization'); a ConfigurationError for anything else."""
    setting, _, kind = label.partition("_")
    if setting not in SETTINGS or kind not in LABEL_KINDS:
        raise ConfigurationError(
            f"evaluators.{label}: the label of a probe evaluator must be {{{'|'.join(SETTINGS)}}}_"
            f"{{{'|'.join(LABEL_KINDS)}}}"
        )
    return setting, kind


def probes_of(evaluator: EvaluatorConfig, tokenizer: Tokenizer, config: TrainConfig) -> list[Probe]:
    """The probes of an evaluator, in file order.

    A paragraph counts as a probe whose prompt is its first token; it is cut to the model's context length. So does the
    sentence of a kind with `_full`.
    """
    setting, kind = parse_label(evaluator.label)
    entries = load_entries(str(evaluator.data.dataset_path))
    length = config.model.max_sequence_length
    if kind != PARAGRAPH:
        probes = make_probes(entries, setting, tokenizer, [kind.removesuffix(FULL)])
        if kind.endswith(FULL):
            probes = [replace(probe, kind=kind, target_start=1) for probe in probes]
        longest = max((len(probe.input_ids) for probe in probes), default=0)
        if longest > length:
            raise ConfigurationError(
                f"evaluators.{evaluator.label}: a probe of {longest} tokens exceeds model.max_sequence_length: {length}"
            )
        return probes
    texts = encode(tokenizer, [entry.train_context for entry in entries])
    for number, ids in enumerate(texts):
        if len(ids) < 2:
            raise ValueError(f"{evaluator.data.dataset_path}: entry {number}: 'train_context' is a single token")
    return [
        Probe(setting, kind, number, 0, tuple(truncate(ids, length, config.tokenizer)), 1)
        for number, ids in enumerate(texts)
    ]


@torch.no_grad()
def score_probes(
    model: Model,
    probes: Sequence[Probe],
    tokens_per_batch: int,
    device: torch.device,
    ranks: Ranks,
    progress: Callable[[int], None] = lambda _: None,
) -> ProbeTable:
    """Score every probe once, whatever the number of ranks.

    Probes are sorted by length and packed into batches of at most `tokens_per_batch` padded tokens; only the hidden
    states before target tokens are scored over the vocabulary. The packing changes no more than float rounding.
    `progress` is called with the number of probes scored since the last call.
    """
    order = sorted(range(len(probes)), key=lambda i: -len(probes[i].input_ids))
    mine = order[ranks.rank :: ranks.world_size]
    scores = np.zeros((len(probes), 4), dtype=np.float64)
    for batch in batched_by_length([len(probes[i].input_ids) for i in mine], tokens_per_batch):
        chosen = mine[batch]
        scores[chosen] = _score([probes[i] for i in chosen], model, device)
        progress(len(chosen))
    scores = ranks.sum(scores)
    return ProbeTable(
        probes,
        np.array([len(p.input_ids) - p.target_start for p in probes], dtype=np.int64),
        scores[:, 0],
        scores[:, 1],
        scores[:, 2].astype(np.int64),
        scores[:, 3] == 0,
    )


def _score(probes: Sequence[Probe], model: Model, device: torch.device) -> NDArray[np.float64]:
    """(n, 4): sum of log-probabilities, that of the first target token, its rank, wrong greedy tokens.

    probes: the longest first.
    """
    longest = len(probes[0].input_ids)
    # Causal attention ignores padding on the right, so its id does not matter.
    ids = torch.tensor([list(p.input_ids) + [0] * (longest - len(p.input_ids)) for p in probes], device=device)
    rows = [r for r, p in enumerate(probes) for _ in range(p.target_start, len(p.input_ids))]
    places = [t for p in probes for t in range(p.target_start, len(p.input_ids))]
    row, place = torch.tensor(rows, device=device), torch.tensor(places, device=device)
    first = torch.tensor([t == probes[r].target_start for r, t in zip(rows, places)], device=device)
    hidden, targets = model.hidden_states(ids[:, :-1])[row, place - 1], ids[row, place]
    scored = score_in_parts(model, hidden, _predictions, targets, first)
    log_prob, wrong, rank = (torch.cat(part).cpu().double() for part in zip(*scored))  # MPS has no float64
    total, mistakes = (log_prob.new_zeros(len(probes)).index_add(0, row.cpu(), x) for x in (log_prob, wrong))
    return torch.stack((total, log_prob[first.cpu()], rank, mistakes), dim=1).numpy()


def _predictions(logits: Tensor, targets: Tensor, first: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability (n,), float32, of each target and whether greedy decoding gives another token (n,); of those in
    `first` (n,), bool, also the rank. logits (n, V) float32."""
    chosen = logits.gather(1, targets[:, None])
    wrong = logits.amax(1) > chosen[:, 0]
    # Of equally probable tokens, which are common in bfloat16, greedy decoding takes the first; argmax is slow.
    wrong[~wrong] = logits[~wrong].argmax(1) != targets[~wrong]
    rank = (logits[first] > chosen[first]).sum(1)
    return -F.cross_entropy(logits, targets, reduction="none"), wrong, rank


def probe_metrics(table: ProbeTable) -> dict[str, float]:
    """Metrics of a pass over the probes, under OLMo's names; of a table that is `padded`.

    eval/{label}/log_probability: mean l(p; theta) of the label's probes.
    eval/{label}/CrossEntropyLoss: the published, diluted variant (method section 4, known discrepancy): the
    negative log-probability of a probe's target divided by its `positions`, mean over the label's probes. For
    paragraphs and whole sentences (`_full`) it is the mean over their own tokens, without padding.
    eval/{label}/exact_match: share of probes whose whole target greedy decoding gives.
    eval/K, eval/K_{setting}: K(theta), the mean over entries of the mean over their probes.

    The published variant (kaistAI/Knowledge-Entropy, `eval_batch` of olmo/train.py and `update_metrics` of
    olmo/eval/evaluator.py) updates its MeanMetric with one number a probe, so that a smaller last batch weights its
    probes as the others do. The value here is that of its single process (docs/differences.md).
    """
    assert table.positions is not None
    labels = np.array([f"{p.setting}_{p.kind}" for p in table.probes])
    settings = np.array([p.setting if p.kind in KINDS else "" for p in table.probes])
    metrics: dict[str, float] = {}
    for label in dict.fromkeys(labels):
        chosen = np.flatnonzero(labels == label)
        metrics[f"eval/{label}/log_probability"] = float(table.mean_log_prob[chosen].mean())
        if not label.endswith((f"_{PARAGRAPH}", FULL)):
            metrics[f"eval/{label}/exact_match"] = float(table.exact_match[chosen].mean())
        loss = float((-table.sum_log_prob[chosen] / table.positions[chosen]).mean())
        metrics[f"eval/{label}/CrossEntropyLoss"] = loss
        metrics[f"eval/{label}/Perplexity"] = perplexity(loss)
    means = []
    for setting in (s for s in SETTINGS if s in settings):
        chosen = np.flatnonzero(settings == setting)
        entries = np.array([p.entry for p in table.probes])[chosen]
        values = table.mean_log_prob[chosen]
        count = np.bincount(entries)  # 0 for an entry without probes
        per_entry = np.bincount(entries, values)[count > 0] / count[count > 0]
        metrics[f"eval/K_{setting}"] = float(per_entry.mean())
        means.append(per_entry)
    if means:
        metrics["eval/K"] = float(np.concatenate(means).mean())
    return metrics
