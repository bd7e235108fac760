"""Data by name on the Hugging Face hub: `hub:owner/name[@revision][:config][:split][:column]`.

What the name leaves open is the dataset's own default: its configuration, split `train`, column `text` or `input_ids`.
A part may also be left out in between, as in `hub:owner/name:validation`, where the dataset has a split of this name
and no configuration. A revision is resolved to a commit, and everything is read from that commit; how, is described in
`analysis/hub_column.py`. Code that a dataset may contain is never executed.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from analysis.choices import FORM, PREFIX
from analysis.given import Given, token_rows
from analysis.hub_column import MASK, HubColumn, Values, failure, quiet, streams
from analysis.texts import Texts
from olmo.console import log
from olmo.data.ranges import cache_folder
from olmo.exceptions import ConfigurationError, did_you_mean
from olmo.files.atomic import write_text
from olmo.files.paths import read_json
from olmo.net import TransferInterrupted, retry

if TYPE_CHECKING:
    from olmo.distributed import Ranks

_HEARTBEAT = 60.0  # seconds after which waiting processes hear from the first one
_MOST = 12  # names in an error


@dataclass(frozen=True)
class HubData(Given):
    """Texts, or the first rows of token ids, of a column on the hub; both are read when they are needed."""

    column: HubColumn | None = None

    @property
    def longest(self) -> int | None:
        """None: as those of a file, instances have the model's context."""
        return None

    @property
    def about(self) -> dict[str, Any]:
        """The commit, and the name by which --data finds the same instances again."""
        assert self.column is not None
        return {"commit": self.column.commit, "source": str(self.column)}


class _FirstRows(Sequence[NDArray[np.int64]]):
    """The first `count` rows of token ids, or all where there are fewer."""

    def __init__(self, name: str, values: Values, count: int):
        self._name, self._values, self._count = name, values, count

    @cached_property
    def _rows(self) -> list[NDArray[np.int64]]:
        return token_rows(islice(self._values, self._count), self._name)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: Any) -> Any:
        return self._rows[place]


def opened(data: str, count: int, ranks: Ranks) -> str | HubData:
    """Data by its name: that of a dataset on the hub opened, any other as it is. A collective, as all processes must
    read the same commit. count: rows of token ids that are needed. Raises as `find`."""
    if not data.startswith(PREFIX):
        return data
    column = ranks.share_from_first(lambda: find(data), _HEARTBEAT)
    values = Values(column, data)
    if column.is_text:
        return HubData(data, texts=Texts(data, values), column=column)
    return HubData(data, rows=_FirstRows(data, values, count), column=column)


def find(name: str) -> HubColumn:
    """The column that a name stands for, in the commit that its revision has now.

    Where the hub is out of reach, it is the column of the last time, with a warning. Raises ConfigurationError for a
    name that is malformed or of something that does not exist, PermissionError for a gated dataset, OSError where the
    hub is out of reach, and ValueError for a dataset that cannot be read.
    """
    match = re.fullmatch(r"hub:([\w.-]+/[\w.-]+)(?:@([\w./-]+))?((?::[^:]*){0,3})", name)
    if match is None:
        raise ConfigurationError(f"{name}: expected {FORM}")
    dataset, revision, parts = match[1], match[2], match[3].split(":")[1:]
    known = _known(name)
    is_commit = re.fullmatch(r"[0-9a-f]{40}", revision or "") is not None
    try:
        commit = str(revision) if is_commit else _asked(name, dataset, lambda: _commit(name, dataset, revision))
        if known is None or known.commit != commit:
            known = _asked(name, dataset, lambda: _found(name, dataset, commit, parts))
            for one in (name, str(known)):  # results record the latter
                _record_of(one).parent.mkdir(parents=True, exist_ok=True)
                write_text(_record_of(one), json.dumps({"name": one, **asdict(known)}))
    except OSError as error:
        if known is None or not isinstance(error.__cause__, ConnectionError | TransferInterrupted):
            raise
        log.warning("%s; continuing with commit %s of earlier", error, known.commit)
    return known


def _asked(name: str, dataset: str, work: Any) -> Any:
    """What `work` returns, which asks the hub, repeated where that may help; errors as of `failure`."""

    def attempt() -> Any:
        try:
            with quiet():
                return work()
        except Exception as error:  # of many types, from all libraries below
            raise failure(error, name, dataset) from error

    return retry(attempt, name)


def _commit(name: str, dataset: str, revision: str | None) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.utils import RevisionNotFoundError

    api = HfApi()
    try:
        return str(api.dataset_info(dataset, revision=revision, expand=["sha"]).sha)
    except RevisionNotFoundError:
        refs = api.list_repo_refs(dataset, repo_type="dataset")
        raise _unknown(str(revision), revision=[ref.name for ref in (*refs.branches, *refs.tags)]) from None


def _found(name: str, dataset: str, commit: str, parts: list[str]) -> HubColumn:
    """The column that `parts` (configuration, split, column) name; each of them may be missing."""
    import datasets
    from huggingface_hub import HfApi

    script = f"{dataset.partition('/')[2]}.py"
    if HfApi().file_exists(dataset, script, repo_type="dataset", revision=commit):
        raise ConfigurationError(
            f"its rows are made by a program, {script}, which is not executed; use a dataset of data files, or name a "
            "file that holds its texts"
        )
    parts, tried = list(parts), dict[str, list[str]]()

    def choice(kind: str, known: list[str], defaults: Iterable[str], remaining: int) -> str:
        """The next part if it is one of `known`, otherwise a default."""
        tried[kind] = known
        if parts and (parts[0] in ("", *known) or len(parts) > remaining):
            part = parts.pop(0)
            if part and part not in known:
                raise _unknown(part, **tried)
            tried.clear()
            if part:
                return part
        default = next((one for one in defaults if one in known), known[0] if len(known) == 1 else None)
        if default is None:
            if parts and parts[0]:
                raise _unknown(parts[0], **{kind: known})
            raise ConfigurationError(f"name one of its {kind}s: {_listed(known)} ({FORM})")
        return default

    configs = datasets.get_dataset_config_names(dataset, revision=commit)
    config = choice("configuration", configs, [_default_config(dataset, commit, configs), "default"], 2)
    of_splits = streams(dataset, commit, config)
    split = choice("split", [str(name) for name in of_splits], ["train"], 1)
    stream = of_splits[split]
    features: Mapping[str, Any] = stream.features or next(iter(stream.take(1)), {})
    kinds = {column: _kind(feature) for column, feature in features.items()}
    texts = [column for column, kind in kinds.items() if kind == "text"]
    only = texts if len(texts) == 1 else []
    column = choice("column", list(kinds), ["text", "input_ids", *only], 0)
    if kinds[column] not in ("text", "token ids"):
        raise ConfigurationError(
            f"column '{column}' holds {kinds[column]}, neither text nor token ids"
            + (f"; text is in {_listed(texts)}" if texts else "")
        )
    is_text = kinds[column] == "text"
    return HubColumn(dataset, commit, config, split, column, is_text, is_masked=not is_text and MASK in kinds)


def _default_config(dataset: str, commit: str, configs: list[str]) -> str:
    import datasets

    return configs[0] if len(configs) == 1 else datasets.get_dataset_default_config_name(dataset, revision=commit) or ""


def _kind(feature: Any) -> str:
    """What a column holds, by its feature or by its first value."""
    inner = feature[0] if isinstance(feature, list) and feature else getattr(feature, "feature", None)
    dtype = str(getattr(feature, "dtype", ""))
    if isinstance(feature, str) or dtype in ("string", "large_string", "string_view"):
        return "text"
    if type(inner) is int or re.match(r"u?int\d", str(getattr(inner, "dtype", ""))):
        return "token ids"
    return dtype if dtype and type(feature).__name__ == "Value" else type(feature).__name__


def _unknown(part: str, **known: list[str]) -> ConfigurationError:
    """The error of a part that is none of the known names."""
    kinds = " or ".join(f"{kind} ({_listed(names)})" for kind, names in known.items())
    return ConfigurationError(f"'{part}' is no {kinds}{did_you_mean(part, chain(*known.values()))}")


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _MOST
    return ", ".join(names[:_MOST]) + (f" and {more} more" if more > 0 else "")


def _record_of(name: str) -> Path:
    return cache_folder() / "hub" / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.json"


def _known(name: str) -> HubColumn | None:
    """What the name stood for the last time; None where nothing is recorded."""
    try:
        content = read_json(_record_of(name))
        return HubColumn(**{key: value for key, value in content.items() if key != "name"})
    except (OSError, ValueError, TypeError, AttributeError):
        return None
