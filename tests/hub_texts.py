"""Datasets on a stand-in for the hub (tests/hub.py), which the real `datasets` streams."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from analysis import hub_column
from olmo import net
from tests.hub import Hub
from tests.serving import hub_serving

README = b"""---
configs:
- config_name: en
  data_files:
  - {split: train, path: en/train-*.json.gz}
  - {split: validation, path: en/validation.json.gz}
- config_name: de
  data_files:
  - {split: train, path: de/train.json.gz}
---
"""


@contextmanager
def texts_serving(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A stand-in for the hub, whose client and `datasets` are real; what is kept of it is in `cache`."""
    import datasets

    with hub_serving(cache / "hub", monkeypatch, Hub) as hub:
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
        place = "/datasets/{repo_id}/resolve/{revision}/{path}"
        monkeypatch.setattr(datasets.config, "HUB_DATASETS_URL", hub.url + place)
        monkeypatch.setattr(net, "WAIT", 0.0)
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache / "xdg"))
        hub_column._builder.cache_clear()  # it has the address of the hub
        yield hub


def made_texts(count: int, words: int = 30, seed: int = 0) -> list[str]:
    """Texts of letters and spaces that no compression shortens much."""
    rng = np.random.default_rng(seed)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz  \n\u00e9"))
    return [f"{i} " + "".join(rng.choice(letters, 5 * words)) for i in range(count)]


def json_lines(texts: Sequence[Any], column: str = "text") -> bytes:
    """As C4 has them: an object a line, compressed."""
    lines = (json.dumps({column: text, "url": f"http://a/{i}"}) + "\n" for i, text in enumerate(texts))
    return gzip.compress("".join(lines).encode(), 1, mtime=0)


def parquet(rows: int = 50, **columns: Any) -> bytes:
    """A file of these columns, in groups of some rows."""
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), buffer, row_group_size=rows)
    return buffer.getvalue()


def add_c4(hub: Hub, texts: Sequence[str]) -> str:
    """owner/c4, with two configurations; all texts are in two files of en:train. Returns the commit."""
    half = len(texts) // 2
    files = {
        "README.md": README,
        "en/validation.json.gz": json_lines(texts[:5]),
        "de/train.json.gz": json_lines(["ja"]),
    }
    parts = {"en/train-0.json.gz": json_lines(texts[:half]), "en/train-1.json.gz": json_lines(texts[half:])}
    return hub.add("owner/c4", {**files, **parts}, kind="datasets")
