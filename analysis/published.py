"""K on the paper's scale: from the published evaluator's loss, which prompt and padding dilute.

That evaluator divides the log-probability of a probe's target span by all its `positions`, the T - 1 predictions of a
padded batch of T tokens (olmo/eval/probes.py), and weights every probe alike, also in a smaller last batch:

    K_published of a setting = mean over the kinds of probe of the mean over the kind's probes
    K_published              = mean over settings, weighted by their numbers of entries
    A_published              = (K_published(after) - K_published(before)) / |K_published(before)|

With the published entries the weights are 70 (paraphrase) and 60 (once), as in the paper; `duplicate`, which the paper
has not, enters with the number of its entries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from analysis.estimates import Values
from analysis.probes import Knowledge, ProbeSeries, settings_of

LabelLosses = Mapping[str, float]  # label -> CrossEntropyLoss of one evaluation


@dataclass(frozen=True)
class Diluted(Knowledge):
    """One evaluation on the paper's scale; as `Knowledge`, with sums of diluted log-probabilities."""

    def entries(self, setting: str | None = None, kind: str | None = None) -> Values:
        """What the entries (n,) of one setting or all contribute: K_published, of one kind or all, is their mean. Where
        all entries have as many probes of a kind, this is the mean over an entry's probes."""
        found = []
        for keys in settings_of(self.sums, setting, kind):
            asked = np.sum([self.counts[key] for key in keys], axis=0) > 0
            parts = [self.sums[key] * (asked.sum() / self.counts[key].sum()) for key in keys]
            found.append(np.mean(parts, axis=0)[asked])
        return np.concatenate(found)

    def means(self) -> dict[str, float]:
        """K_published, K_published_{setting} and K_published_{setting}_{kind}, for those that have probes."""
        return {name.replace("K", "K_published", 1): value for name, value in super().means().items()}


def from_losses(losses: LabelLosses, asked: Knowledge) -> Diluted | None:
    """From the CrossEntropyLoss of each label {setting}_{kind}, for the entries that were asked: their mean is right,
    but not how they differ. None where a label is missing."""
    if not all(f"{s}_{k}" in losses for s, k in asked.counts):
        return None
    return Diluted({(s, k): n * np.float64(-losses[f"{s}_{k}"]) for (s, k), n in asked.counts.items()}, asked.counts)


@dataclass(frozen=True)
class Published:
    """The evaluations of a run on the paper's scale."""

    before: Diluted
    after: Diluted
    original: Diluted | None  # of the weights before resuscitation
    curve: dict[int, dict[str, float]]  # step -> `Diluted.means`
    of_entries: bool  # from tables of probes; False: from logged losses, which do not hold how entries differ
    same_batches: bool  # probes were padded to the same lengths in all three, as far as is known


def from_tables(series: ProbeSeries, place: int) -> Diluted | None:
    """The evaluation at steps[place], of the probes of its K; None where `positions` of any are unknown."""
    asked = ~np.isnan(series.values[place])
    if series.shares is None or np.isnan(series.shares[place, asked]).any():
        return None
    columns = (series.settings, series.entries, series.kinds, series.values[place] * series.shares[place])
    return Diluted.of(*(column[asked] for column in columns))


def read_published(
    series: ProbeSeries, first: int, last: int, original: ProbeSeries | None, losses: Mapping[int | str, LabelLosses]
) -> Published | None:
    """The evaluations of a run at steps[first], steps[last] and all others, and of `original`, a single one of the
    weights before resuscitation. losses: the logged ones by step, or of "original". None where neither knows them."""
    places = [place for place in range(len(series.steps)) if not np.isnan(series.values[place]).all()]
    found = {place: from_tables(series, place) for place in places}
    of_original = None if original is None else from_tables(original, 0)
    of_entries = None not in (found[first], found[last]) and (original is None or of_original is not None)
    if not of_entries:
        found = {p: from_losses(losses.get(int(series.steps[p]), {}), series.knowledge(p)) for p in places}
        if original is not None:
            of_original = from_losses(losses.get("original", {}), original.knowledge(0))
    before, after = found[first], found[last]
    if before is None or after is None or (original is not None and of_original is None):
        return None
    curve = {int(series.steps[place]): one.means() for place, one in found.items() if one is not None}
    shares = [
        s.shares[place] for s, place in ((series, first), (series, last), (original, 0)) if s and s.shares is not None
    ]
    same = all(np.array_equal(shares[0], other, equal_nan=True) for other in shares)
    return Published(before, after, of_original, curve, of_entries, same)
