"""Score the probes of fictional knowledge on a model in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch import nn

from analysis.choices import BATCH_SIZE
from analysis.context import context_length
from analysis.estimates import ratio
from analysis.module import own_forward, own_precision, restored
from analysis.probes import Knowledge
from analysis.published import Diluted
from analysis.score_settings import probe_files
from knowledge_entropy.injecting import Entries, entries_of, tokenizer_of
from olmo.config import ModelConfig
from olmo.console import fixed
from olmo.distributed import Ranks
from olmo.eval.probes import ProbeTable, score_probes
from olmo.knowledge.entries import KINDS, SETTINGS, Entry, Probe, make_probes
from olmo.memory.unwrap import is_sharded, unwrapped
from olmo.model import OLMo
from olmo.model.causal_lm import CausalLM, Model
from olmo.tokenizer import tokenizer_of_folder


@dataclass(frozen=True, eq=False, repr=False)
class Scores:
    """Log-probabilities of target spans, and K, their mean over entries of the mean over an entry's probes.

    Attributes:
        numbers: `K`, `K_{setting}`, `K_{setting}_{kind}`, and `K_published` alike.
        table: columns of one row for each probe, as of the tables of a run: setting, entry, kind, index, tokens,
            positions, sum_log_prob, mean_log_prob, first_token_log_prob, first_token_rank, exact_match.
    """

    numbers: dict[str, float]
    table: dict[str, Any]

    @classmethod
    def of(cls, table: ProbeTable) -> Scores:
        """Of probes that are `padded`."""
        assert table.positions is not None
        settings, entries, kinds = (
            np.array([getattr(probe, name) for probe in table.probes]) for name in ("setting", "entry", "kind")
        )
        log_prob = table.mean_log_prob
        diluted = Diluted.of(settings, entries, kinds, log_prob * ratio(table.tokens, table.positions))
        return cls(Knowledge.of(settings, entries, kinds, log_prob).means() | diluted.means(), table.columns())

    @property
    def K(self) -> float:
        """K(theta) of all settings, in nats."""
        return self.numbers["K"]

    @property
    def by_setting(self) -> dict[str, float]:
        """K of each setting."""
        return {setting: self.numbers[f"K_{setting}"] for setting in SETTINGS if f"K_{setting}" in self.numbers}

    @property
    def by_kind(self) -> dict[str, float]:
        """K of each kind of probe of each setting, by `{setting}_{kind}`."""
        names = (f"{setting}_{kind}" for setting in SETTINGS for kind in KINDS)
        return {name: self.numbers[f"K_{name}"] for name in names if f"K_{name}" in self.numbers}

    def __repr__(self) -> str:
        parts = "".join(f", {setting} {fixed(value, 4)}" for setting, value in self.by_setting.items())
        return f"Scores(K {fixed(self.K, 4)}{parts}, {len(self.table['entry'])} probes)"


def score(
    model: nn.Module,
    entries: Entries | Mapping[str, Entries],
    *,
    tokenizer: Any = None,
    setting: str = "paraphrase",
    batch_size: int = BATCH_SIZE,
    sequence_length: int | None = None,
) -> Scores:
    """The probes of entries, scored on a model as it is, in evaluation mode: what analysis.score writes for the saved
    model (`knowledge` of score.json). Training mode and torch's random states are afterwards as before.

    Args:
        model: a module, one of transformers or ours.
        entries: a folder of fictional knowledge, with all its settings; a file or a list of Entry, of `setting`; or a
            dictionary of such by setting.
        tokenizer: as of `measure`; by default that of the folder that the model was loaded from.
        setting: of entries that do not name theirs: paraphrase, duplicate or once.
        batch_size: probes of a forward pass, by default 16; K_published depends on it.
        sequence_length: tokens of a probe at most; by default the model's context.

    Raises:
        ValueError: in one line, for what cannot be scored.
        OSError: for a file that cannot be read.
    """
    probes = probes_of(model, entries, tokenizer, setting, sequence_length)
    return score_probes_of(model, probes, batch_size, sequence_length)


def probes_of(
    model: nn.Module,
    entries: Entries | Mapping[str, Entries],
    tokenizer: Any = None,
    setting: str = "paraphrase",
    sequence_length: int | None = None,
) -> list[Probe]:
    """The probes of `score`, in the order of a run's evaluators."""
    inner = unwrapped(model)
    if not isinstance(inner, OLMo) and not hasattr(inner, "get_output_embeddings"):
        raise ValueError(f"{type(inner).__name__}: no language model of transformers, or of ours")
    if tokenizer is None:
        folder = str(getattr(inner, "name_or_path", "") or "")
        tokenizer = tokenizer_of_folder(Path(folder)) if folder and Path(folder).is_dir() else None
        if tokenizer is None:
            raise ValueError(f"{type(inner).__name__}: names no tokenizer; give tokenizer")
    opened, length = tokenizer_of(tokenizer).tokenizer, sequence_length or context_length(inner)
    probes: list[Probe] = []
    for name, of_setting in _by_setting(entries, setting).items():
        kinds = [kind for kind in KINDS if any(entry.probes.get(kind) for entry in of_setting)]
        for kind in kinds:
            probes += make_probes(of_setting, name, opened, [kind])
    if not probes:
        raise ValueError("entries: none has probes")
    if (longest := max(len(probe.input_ids) for probe in probes)) > length:
        raise ValueError(f"entries: a probe of {longest} tokens exceeds sequence_length {length}")
    known = inner.config.rows if isinstance(inner, OLMo) else cast(Any, inner).get_input_embeddings().num_embeddings
    if (largest := max(max(probe.input_ids) for probe in probes)) >= known:
        raise ValueError(f"tokenizer: a probe has token {largest}, the model has {known}; it belongs to another model")
    return probes


def score_probes_of(
    model: nn.Module,
    probes: Sequence[Probe],
    batch_size: int = BATCH_SIZE,
    sequence_length: int | None = None,
    ranks: Ranks = Ranks(),  # noqa: B008
) -> Scores:
    """`score` of probes that are tokenized already, shared out among `ranks`; a collective."""
    if batch_size < 1:
        raise ValueError(f"batch_size: {batch_size} must be at least 1")
    inner = unwrapped(model)
    if is_sharded(inner):
        raise ValueError(f"{type(inner).__name__}: FSDP has sharded its weights; score a saved checkpoint instead")
    length, device = sequence_length or context_length(inner), next(inner.parameters()).device
    labels = {f"{probe.setting}_{probe.kind}" for probe in probes}
    with restored(model), own_precision(device), own_forward(inner):
        inner.eval()  # before CausalLM computes with it
        adapted: Model = inner if isinstance(inner, OLMo) else CausalLM(inner, ModelConfig(), [])
        table = score_probes(adapted, probes, batch_size * length, device, ranks)
    if not np.isfinite(table.sum_log_prob).all():
        raise ValueError(f"{type(inner).__name__}: a log-probability is not finite; its weights are NaN or infinite")
    return Scores.of(table.padded(dict.fromkeys(labels, batch_size)))


def _by_setting(entries: Entries | Mapping[str, Entries], setting: str) -> dict[str, list[Entry]]:
    folder = Path(entries) if isinstance(entries, (str, Path)) and Path(entries).is_dir() else None
    if (folder is not None or isinstance(entries, Mapping)) and setting != "paraphrase":
        raise ValueError(f"setting: {setting!r} has no effect on entries that name their settings; pass those of one")
    if folder is not None:
        named: Mapping[str, Entries] = probe_files(folder)
        if not named:
            raise ValueError(f"entries: no fictional knowledge in {entries}")
    else:
        named = entries if isinstance(entries, Mapping) else {setting: entries}
    for name in named:
        if name not in SETTINGS:
            raise ValueError(f"setting: {name!r} is none of {', '.join(SETTINGS)}")
    return {name: entries_of(named[name]) for name in SETTINGS if name in named}
