"""l(p; theta), the log-probability of a probe's target span: of one evaluation, and of all evaluations of a run."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

import numpy as np
import pyarrow
import pyarrow.parquet
from numpy.typing import NDArray

from analysis.estimates import Values, ratio
from olmo.knowledge.entries import KINDS, SETTINGS

Integers = NDArray[np.int64]
Form = TypeVar("Form", bound="Knowledge")
MOST_ENTRIES = 10**6  # of a setting; an array has room for each


def settings_of(
    asked: Container[tuple[str, str]], setting: str | None, kind: str | None
) -> list[list[tuple[str, str]]]:
    """The [setting, kind] of probes that were asked, of one setting or all and of one kind or all, a list a setting.
    Raises ValueError where there are none."""
    named = [[(s, k) for k in ((kind,) if kind else KINDS)] for s in ((setting,) if setting else SETTINGS)]
    found = [keys for of_setting in named if (keys := [key for key in of_setting if key in asked])]
    if not found:
        raise ValueError(f"no probes of setting {setting or 'any'} and kind {kind or 'any'}")
    return found


@dataclass(frozen=True)
class Knowledge:
    """One evaluation: per [setting, kind] the sum of l over each entry's probes (entries,), and how many probes these
    are. An entry may have more probes of one kind than of another; in K every probe has the same weight."""

    sums: dict[tuple[str, str], Values]
    counts: dict[tuple[str, str], Integers]

    @classmethod
    def of(cls: type[Form], settings: NDArray, entries: NDArray, kinds: NDArray, values: NDArray) -> Form:
        """From one row a probe."""
        sums: dict[tuple[str, str], Values] = {}
        counts: dict[tuple[str, str], Integers] = {}
        for setting in SETTINGS:
            size = entries[settings == setting].max(initial=-1) + 1
            for kind in KINDS:
                chosen = (settings == setting) & (kinds == kind)
                if chosen.any():
                    sums[setting, kind] = np.bincount(entries[chosen], values[chosen], size).astype(np.float64)
                    counts[setting, kind] = np.bincount(entries[chosen], None, size)
        return cls(sums, counts)

    @property
    def settings(self) -> list[str]:
        """The settings that have probes, in the order of SETTINGS."""
        return [s for s in SETTINGS if any(setting == s for setting, _ in self.sums)]

    @property
    def kinds(self) -> list[str]:
        """The kinds of probes, in the order of KINDS."""
        return [k for k in KINDS if any(kind == k for _, kind in self.sums)]

    def entries(self, setting: str | None = None, kind: str | None = None) -> Values:
        """Means of the entries (n,) of one setting or all, over the probes of one kind or all."""
        found = []
        for keys in settings_of(self.sums, setting, kind):
            total = np.sum([self.sums[k] for k in keys], axis=0)
            count = np.sum([self.counts[k] for k in keys], axis=0)
            found.append(total[count > 0] / count[count > 0])
        return np.concatenate(found)

    def same_probes(self, other: Knowledge) -> bool:
        """Whether both have the same numbers of probes of the same entries, settings and kinds."""
        return self.counts.keys() == other.counts.keys() and all(
            np.array_equal(self.counts[key], other.counts[key]) for key in self.counts
        )

    def means(self) -> dict[str, float]:
        """K, K_{setting} and K_{setting}_{kind}, for those that have probes."""
        return {
            "K": float(self.entries().mean()),
            **{f"K_{s}": float(self.entries(s).mean()) for s in self.settings},
            **{f"K_{s}_{k}": float(self.entries(s, k).mean()) for s, k in self.sums},
        }


@dataclass(frozen=True)
class ProbeSeries:
    """l of all Q probes of a run in all of its T tables, settings one after the other, entries in order."""

    steps: Integers  # (T,) ascending, optimizer steps done
    settings: NDArray[np.str_]  # (Q,)
    entries: Integers  # (Q,)
    kinds: NDArray[np.str_]  # (Q,)
    values: Values  # (T, Q), NaN where a table lacks the probe or has no finite number for it
    not_finite: dict[int, int] = field(default_factory=dict)  # step -> probes without a finite number, if there are any
    shares: Values | None = None  # (T, Q) target tokens / padded positions; NaN where unknown, in tables of older runs

    def same(self, other: ProbeSeries) -> bool:
        """Whether both have the same probes."""
        names = ("settings", "entries", "kinds")
        return all(np.array_equal(getattr(self, name), getattr(other, name)) for name in names)

    def knowledge(self, place: int) -> Knowledge:
        """The evaluation at steps[place]."""
        there = ~np.isnan(self.values[place])
        columns = (self.settings, self.entries, self.kinds, self.values[place])
        return Knowledge.of(*(column[there] for column in columns))


def table_paths(folder: Path) -> dict[int, Path]:
    """Step -> table, of a run's folder of tables. A table is renamed to this once it is complete; files of any other
    name are no tables."""
    found = ((re.fullmatch(r"step(\d+)", path.stem), path) for path in folder.glob("step*.parquet"))
    return {int(named[1]): path for named, path in found if named}


def read_table(
    path: Path,
    columns: Mapping[str, Callable[[pyarrow.DataType], bool]],
    optional: Mapping[str, Callable[[pyarrow.DataType], bool]] = MappingProxyType({}),
) -> pyarrow.Table:
    """These columns of a Parquet file, and those of `optional` that it has, of types that the functions accept; raises
    ValueError for another file."""
    try:
        there = pyarrow.parquet.read_schema(path).names
        expected = {**columns, **{name: is_expected for name, is_expected in optional.items() if name in there}}
        table = pyarrow.parquet.read_table(path, columns=list(expected))
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: not a table of {path.parent.name}: {str(error).splitlines()[0]}") from error
    for name, is_expected in expected.items():
        if name not in table.column_names or not is_expected(table.schema.field(name).type):
            found = table.schema.field(name).type if name in table.column_names else "missing"
            raise ValueError(f"{path}: not a table of {path.parent.name}: its column {name} is {found}")
    return table


def finite_or_nan(column: pyarrow.ChunkedArray) -> Values:
    """A column as float64, NaN for what is no finite number."""
    values = column.to_numpy().astype(np.float64)
    return np.where(np.isfinite(values), values, np.nan)


def is_text(of_column: pyarrow.DataType) -> bool:
    return pyarrow.types.is_string(of_column) or pyarrow.types.is_large_string(of_column)


_KEYS = ("setting", "entry", "kind", "index")
_COLUMNS = {
    "setting": is_text,
    "entry": pyarrow.types.is_integer,
    "kind": is_text,
    "index": pyarrow.types.is_integer,
    "mean_log_prob": pyarrow.types.is_floating,
}
_OF_SHARES = dict.fromkeys(("tokens", "positions"), pyarrow.types.is_integer)


def _table_of_probes(path: Path) -> tuple[pyarrow.Table, Values, Values]:
    """(setting, entry, kind and index of each row, mean_log_prob of each row, NaN where it is not finite, and the
    share of targets in its padded positions, NaN in a table of an older run)."""
    table = read_table(path, _COLUMNS, _OF_SHARES)
    entries = table["entry"].to_numpy()
    if len(entries) and not 0 <= entries.min() <= entries.max() < MOST_ENTRIES:
        raise ValueError(f"{path}: entries are numbered from {entries.min()} to {entries.max()}")
    shares = np.full(len(table), np.nan)
    if set(_OF_SHARES) <= set(table.column_names):
        shares = ratio(table["tokens"].to_numpy(), table["positions"].to_numpy())
    return table.select(list(_KEYS)), finite_or_nan(table["mean_log_prob"]), shares


def read_probes(folder: Path, before: Mapping[int, Path] | None = None) -> ProbeSeries:
    """All tables of probes in a run's folder, and those of `before` at their steps, without paragraphs, which are no
    probes."""
    return read_tables({**table_paths(folder / "probes"), **(before or {})})


def read_tables(paths: Mapping[int, Path]) -> ProbeSeries:
    """Tables of probes by step, as the trainer wrote them; raises ValueError where one is none."""
    place_of: dict[tuple[str, int, str, int], int] = {}  # probe -> its number, in order of appearance
    found: list[tuple[int, Integers, Values]] = []  # step, numbers of its n probes, values and shares (2, n)
    keys, chosen, numbers = None, np.zeros(0, dtype=bool), np.zeros(0, dtype=np.int64)
    for step in sorted(paths):
        of_table, values, shares = _table_of_probes(paths[step])
        if keys is None or not of_table.equals(keys):  # usually the first only
            keys = of_table
            rows = list(zip(*(of_table[name].to_pylist() for name in _KEYS)))
            chosen = np.array([row[0] in SETTINGS and row[2] in KINDS for row in rows], dtype=bool)
            asked = [row for row, is_chosen in zip(rows, chosen) if is_chosen]
            numbers = np.array([place_of.setdefault(row, len(place_of)) for row in asked], dtype=np.int64)
        if len(numbers):
            found.append((step, numbers, np.stack((values, shares))[:, chosen]))
    probes = list(place_of)
    kinds = list(KINDS)
    order = sorted(
        range(len(probes)),
        key=lambda i: (SETTINGS.index(probes[i][0]), probes[i][1], kinds.index(probes[i][2]), probes[i][3]),
    )
    not_finite = {step: int(np.isnan(scores[0]).sum()) for step, _, scores in found if np.isnan(scores[0]).any()}
    values = np.full((2, len(found), len(probes)), np.nan)
    for row, (_, columns, scores) in enumerate(found):
        values[:, row, columns] = scores
    return ProbeSeries(
        np.array([step for step, _, _ in found], dtype=np.int64),
        np.array([probes[i][0] for i in order]),
        np.array([probes[i][1] for i in order], dtype=np.int64),
        np.array([probes[i][2] for i in order]),
        values[0][:, order],
        not_finite,
        values[1][:, order],
    )
