"""The sample of documents: what lies up to the limit is exact; packing loses nothing."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.texts import fill
from scripts.prepare import OLMO_TOKENIZER, packing, sampling
from tests.pubmed import EOS, TOKENIZER, Contents, expected_texts, read, stream_of, words, write_files

ARTICLES = st.tuples(st.integers(1, 12), st.integers(1, 2), st.sampled_from([None, *map(words, range(8))]))
SETS = st.builds(Contents, st.lists(ARTICLES, max_size=12), st.lists(st.integers(1, 12), max_size=2))


def settings(**changes: Any) -> sampling.Settings:
    values = {"corpus": "pubmed", "seed": 0, "tokenizer": OLMO_TOKENIZER, "eos_token_id": EOS, "dtype": "<u2"}
    return sampling.Settings(**{**values, **changes})


@given(st.lists(SETS, min_size=1, max_size=4), st.integers(0, 3), st.integers(1, 400))
def test_what_lies_up_to_the_limit_is_exactly_the_start_of_the_sample(
    files: list[Contents], seed: int, wanted: int
) -> None:
    expected = expected_texts(files, seed)
    with tempfile.TemporaryDirectory() as name:
        paths = write_files(Path(name, "in"), files)
        events, limit, _ = sampling.collect(paths, settings(seed=seed), Path(name), 1, wanted)
        found, counts = sampling.resolve(events)
        tokens = np.fromfile(Path(name, f"{os.getpid()}.tokens"), "<u2")
    texts = [TOKENIZER.decode(tokens[start // 2 :][: n - 1]) for start, n in found[["start", "tokens"]].tolist()]
    assert texts == expected[: len(texts)]
    assert limit < sampling.NO_LIMIT or texts == expected
    assert counts["documents"] == len(texts)


def test_all_is_read_again_when_what_was_kept_is_replaced_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = Contents([(pmid, 1, words(pmid)) for pmid in range(1, 200)], [])
    # Two files are under way at a time: with two between, the limit has fallen when the deletions come.
    between = [Contents([(pmid, 1, words(pmid))], []) for pmid in (901, 902)]
    files = [many, *between, Contents([], list(range(1, 160)))]
    paths = write_files(tmp_path / "in", files)
    calls: list[float] = []
    collect = packing.collect
    monkeypatch.setattr(packing, "collect", lambda *a: calls.append(a[-1]) or collect(*a))
    packing.prepare(paths, tmp_path / "out", settings(), 20, 64, 1)
    assert calls == [1600 * 2**i for i in range(len(calls))] and len(calls) > 1
    stream = stream_of(expected_texts(files, 0))
    assert read(tmp_path / "out", 64).reshape(-1).tolist() == stream[: 20 * 64]


@given(st.lists(st.lists(st.integers(0, 9), max_size=7), max_size=12), st.integers(0, 40))
def test_packing_loses_and_invents_nothing(documents: list[list[int]], size: int) -> None:
    stream = [i for document in documents for i in document]
    tokens = np.full(size, -1, np.int32)
    assert fill(tokens, (np.array(d, np.uint16) for d in documents)) == min(size, len(stream))
    assert tokens.tolist() == (stream + [-1] * size)[:size]
