"""Token files of another type than they are read as: named, and never where the type is right."""

import functools
import logging
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from olmo.data.sources import TokenFiles
from olmo.data.token_type import HEAD, TYPES, wrong_type
from olmo.tokenizer import load_tokenizer
from scripts.prepare import OLMO_TOKENIZER
from tests.serving import Server

ROOT = Path(__file__).resolve().parents[3]
LENGTH = 64


@functools.cache
def tokens(kind: str) -> NDArray[np.int64]:
    """Real text: as OLMo's tokenizer makes tokens of it, by a tokenizer of more than 2^16 ids, or as bytes."""
    pages = [path.read_text("utf-8") for path in sorted((ROOT / "docs").glob("*.md"))]
    if kind == "bytes":
        return np.frombuffer("".join(pages).encode(), np.uint8).astype(np.int64)
    ids = [encoding.ids for encoding in load_tokenizer(OLMO_TOKENIZER).encode_batch(pages)]
    found = np.array([token for page in ids for token in (*page, 50279)])
    return found if kind == "olmo" else found * 3 % 128_256


def content_of(kind: str, dtype: str, start: int, count: int) -> bytes:
    return tokens(kind)[start : start + count].astype(np.dtype(dtype).newbyteorder("<")).tobytes()[:HEAD]


FITS = {"olmo": TYPES[1:], "wide": TYPES[2:], "bytes": TYPES}  # which types can hold the ids


@given(
    kind=st.sampled_from(list(FITS)),
    start=st.integers(0, 10_000),
    count=st.integers(1, 2**14),
    data=st.data(),
)
@settings(max_examples=60)
def test_real_text_is_read_as_any_type(kind: str, start: int, count: int, data: st.DataObject) -> None:
    """The right type is never refused; a wrong one gets no other name than the right one, and its name if enough of
    the file is there."""
    held, read = data.draw(st.sampled_from(FITS[kind])), data.draw(st.sampled_from(TYPES))
    content = content_of(kind, held, start, count)
    found = wrong_type(content, read)
    if held == read:
        assert found is None
        return
    wider = np.dtype(held).itemsize > np.dtype(read).itemsize
    assert found in (None, held) if wider or read == "uint16" else found in (None, held, "uint8 or uint16")
    # Of 16-bit tokens read as bytes, and of bytes read as 16-bit tokens, more is needed.
    if len(content) >= (2**13 if {held, read} == {"uint8", "uint16"} else 512) and (held, read) != ("uint16", "uint8"):
        assert found is not None


@given(
    st.integers(1, 2**16),
    st.integers(0, 2**14),
    st.sampled_from(["random", "sorted", "constant", "padded"]),
    st.integers(0, 2**16 - 1),
)
@settings(max_examples=60)
def test_tokens_of_no_language_are_not_refused(largest: int, count: int, order: str, pad: int) -> None:
    """What tests and experiments train on: random ids, counts, one id, long runs of padding."""
    ids = np.random.default_rng(pad).integers(0, largest, count)
    if order == "padded":
        ids[: count // 2] = pad
    ids = {"sorted": np.sort(ids), "constant": np.full(count, largest - 1)}.get(order, ids)
    assert wrong_type(ids.astype("<u2").tobytes()[:HEAD], "uint16") is None


@pytest.mark.parametrize("kind, held", [("olmo", "int32"), ("wide", "uint32"), ("olmo", "int64"), ("bytes", "uint8")])
@pytest.mark.parametrize("remote", [False, True])
def test_a_file_of_another_type_is_an_error(
    tmp_path: Path, server: Server, caplog: pytest.LogCaptureFixture, kind: str, held: str, remote: bool
) -> None:
    """Where no type is given; where one is, it is a warning, and the rows are those of that type."""
    fits, content = held if held.startswith("u") else f"u{held}", content_of(kind, held, 0, 2**14)
    (tmp_path / "a.npy").write_bytes(content)
    server.add("/typed", {"a.npy": content})
    path = f"{server.url}/typed/a.npy" if remote else str(tmp_path / "a.npy")
    with pytest.raises(ValueError) as caught:
        TokenFiles([path], LENGTH, key="evaluators.e.data").read(range(40))
    assert str(caught.value) == (
        f"{path}: its content looks like tokens of {fits}, not of uint16; give the type as "
        f"evaluators.e.data.memmap_dtype: {fits} in a configuration, or evaluators.e.data.memmap_dtype: uint16 if this "
        "is the right one"
    )
    with caplog.at_level(logging.WARNING):
        rows = TokenFiles([path], LENGTH, "uint16", key="data.paths").read(range(40))
    assert rows.ravel().tolist() == np.frombuffer(content, "<u2")[: 40 * LENGTH].tolist()
    warned = f"{path}: its content looks like tokens of {fits}, not of uint16, which data.memmap_dtype states"
    assert caplog.messages == [warned]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        TokenFiles([path], LENGTH, fits).read([0])
    assert not caplog.messages


def test_a_remote_file_of_numpy_save(tmp_path: Path, server: Server) -> None:
    np.save(tmp_path / "a.npy", np.arange(4 * LENGTH, dtype="<u2"))
    server.add("/saved", {"a.npy": (tmp_path / "a.npy").read_bytes()})
    source = TokenFiles([f"{server.url}/saved/a.npy"], LENGTH)
    source.read([1])
    with pytest.raises(ValueError, match=r"a\.npy: begins with the header of numpy\.save; a token file has none"):
        source.read([2, 0])


def test_label_masks_are_not_tokens(tmp_path: Path) -> None:
    np.zeros(4096, "<u4").tofile(tmp_path / "a.npy")
    TokenFiles([tmp_path / "a.npy"], LENGTH, "uint8", key="data.label_mask_paths").read([0])
