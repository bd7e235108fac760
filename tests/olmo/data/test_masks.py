"""Label and attention masks: where they come from, and that padding neither counts nor is seen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import get_args

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from olmo.config import DataConfig, InstanceFilterConfig, PaddingDirection
from olmo.data.masks import Masked, Masks, open_masks
from olmo.data.sources import PADDING, TokenFiles, open_source


def lists(masked: Masked) -> tuple[list, list | None, list | None]:
    """Input ids, label mask and attention mask, the masks as zeros and ones."""
    labels, attention = (None if mask is None else mask.int().tolist() for mask in masked[1:])
    return masked.input_ids.tolist(), labels, attention


def read(data: DataConfig, indices: list[int], pad_token_id: int = 1) -> tuple[list, list | None, list | None]:
    """These instances of four tokens with their masks, as the loader of a run gets them."""
    source = open_source(data, 4)
    return lists(open_masks(data, pad_token_id, source).apply(source.read(indices), np.array(indices)))


def test_without_padding_there_are_no_masks() -> None:
    tokens = np.arange(6).reshape(2, 3)
    assert lists(Masks(pad_token_id=1).apply(tokens, np.arange(2))) == (tokens.tolist(), None, None)


@pytest.mark.parametrize(
    ("padding", "labels", "attention"),
    [
        ([0, 0, 0, 0], None, None),
        # At the end of a row nothing that counts comes after it.
        ([0, 0, 1, 1], [1, 1, 0, 0], None),
        ([0, 1, 1, 1], [1, 0, 0, 0], None),
        ([1, 1, 1, 1], [0, 0, 0, 0], None),
        # The first token after padding alone cannot be predicted.
        ([1, 1, 0, 0], [0, 0, 0, 1], [0, 0, 1, 1]),
        ([1, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1]),
        # In the middle, tokens before it predict those after it.
        ([0, 1, 0, 0], [1, 0, 1, 1], [1, 0, 1, 1]),
        ([0, 0, 1, 0], [1, 1, 0, 1], [1, 1, 0, 1]),
        ([1, 0, 1, 0], [0, 0, 0, 1], [0, 1, 0, 1]),
    ],
)
def test_padding_neither_counts_nor_is_seen(padding: list, labels: list | None, attention: list | None) -> None:
    tokens = np.where(padding, PADDING, [5, 6, 7, 8])[None]
    found = lists(Masks(pad_token_id=9).apply(tokens, np.arange(1)))
    assert found[0] == [[9 if pad else token for pad, token in zip(padding, (5, 6, 7, 8))]]
    assert found[1:] == (labels and [labels], attention and [attention])
    # The same where the token itself says that it is padding.
    again = Masks(pad_token_id=9, pad_tokens=True).apply(np.array(found[0]), np.arange(1))
    assert lists(again) == found


@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=6))
def test_rows_pad_alone(padded: list[list[bool]]) -> None:
    """A row's masks do not depend on the others, but for whether they are spelled out."""
    tokens = np.where(padded, PADDING, 3)
    masks = Masks(pad_token_id=2)
    together = masks.apply(tokens, np.arange(len(tokens)))
    for row in range(len(tokens)):
        alone = masks.apply(tokens[row : row + 1], np.arange(1))
        assert alone.input_ids[0].equal(together.input_ids[row])
        if alone.label_mask is not None:
            assert together.label_mask is not None and alone.label_mask[0].equal(together.label_mask[row])
        if alone.attention_mask is not None:
            assert together.attention_mask is not None and alone.attention_mask[0].equal(together.attention_mask[row])


def test_label_masks_lie_beside_the_token_files(tmp_path: Path) -> None:
    """Three instances in two files, each with a rest; any byte but 0 is a token that counts."""
    for number, count in enumerate((10, 5)):
        np.arange(100 * number, 100 * number + count, dtype="<u2").tofile(tmp_path / f"tokens-{number}.npy")
    np.array([0, 1, 1, 0, 255, 0, 0, 1, 1, 1], dtype="u1").tofile(tmp_path / "mask-0.npy")
    np.array([False, True, True, True, True]).tofile(tmp_path / "mask-1.npy")
    data = DataConfig(paths=[str(tmp_path / "tokens-{0..1}.npy")], label_mask_paths=[str(tmp_path / "mask-{0..1}.npy")])
    assert read(data, [2, 1, 0]) == (
        [[100, 101, 102, 103], [4, 5, 6, 7], [0, 1, 2, 3]],
        [[0, 1, 1, 1], [1, 0, 0, 1], [0, 1, 1, 0]],
        None,
    )
    # Padding does not count whatever the mask says.
    data.generate_attention_mask = True
    assert read(data, [1], pad_token_id=4)[1:] == ([[0, 0, 0, 1]], [[0, 1, 1, 1]])
    assert read(data, [0], pad_token_id=2)[1:] == ([[0, 1, 0, 0]], [[1, 1, 0, 1]])


def test_columns_of_a_datasets_folder(tmp_path: Path) -> None:
    columns = {
        "input_ids": [[5, 6, 7, 8], [5, 6], [1, 1, 5, 6]],
        "attention_mask": [[1, 1, 1, 1], [1, 1], [0, 0, 1, 1]],
        "label_mask": [[False, True, True, True], [True, True], [True, True, False, True]],
    }
    datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / "all")
    data = DataConfig(dataset_path=str(tmp_path / "all"), pad_rows=True)
    assert read(data, [0]) == ([[5, 6, 7, 8]], [[0, 1, 1, 1]], None)
    assert read(data, [1]) == ([[5, 6, 1, 1]], [[1, 1, 0, 0]], None)
    assert read(data, [2]) == ([[1, 1, 5, 6]], [[0, 0, 0, 1]], [[0, 0, 1, 1]])
    data.pad_direction = "left"
    assert read(data, [1, 0]) == (
        [[1, 1, 5, 6], [5, 6, 7, 8]],
        [[0, 0, 0, 1], [0, 1, 1, 1]],
        [[0, 0, 1, 1], [1, 1, 1, 1]],
    )


@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        ([8, 4], r"^data\.label_mask_paths: 2 files, data\.paths has 1$"),
        ([16], r"mask-0\.npy: 16 bytes for the 8 tokens of .*tokens\.npy; a mask has one byte a token$"),
        ([7], r"mask-0\.npy: 7 bytes for the 8 tokens of .*tokens\.npy; a mask has one byte a token$"),
    ],
)
def test_label_masks_of_other_files(tmp_path: Path, sizes: list[int], told: str) -> None:
    np.arange(8, dtype="<u2").tofile(tmp_path / "tokens.npy")
    masks = [tmp_path / f"mask-{number}.npy" for number in range(len(sizes))]
    for path, size in zip(masks, sizes):
        np.ones(size, dtype=bool).tofile(path)
    data = DataConfig(paths=[str(tmp_path / "tokens.npy")], label_mask_paths=[str(path) for path in masks])
    with pytest.raises(ValueError, match=told):
        open_masks(data, 1, TokenFiles(data.paths or [], 4))


def test_label_masks_that_are_not_there(tmp_path: Path) -> None:
    np.arange(8, dtype="<u2").tofile(tmp_path / "tokens.npy")
    source = TokenFiles([tmp_path / "tokens.npy"], 4)
    with pytest.raises(ValueError, match=r"^no label masks given \(data\.label_mask_paths is empty\)$"):
        open_masks(DataConfig(label_mask_paths=[]), 1, source)
    with pytest.raises(FileNotFoundError, match=r"^nowhere\.npy: no such label mask \(data\.label_mask_paths\)$"):
        open_masks(DataConfig(label_mask_paths=["nowhere.npy"]), 1, source)


@pytest.mark.parametrize(
    ("name", "mask", "told"),
    [
        ("label_mask", [1, 1, 1], "column 'label_mask': a mask of 3 numbers for 2 tokens"),
        ("attention_mask", [1], "column 'attention_mask': a mask of 1 numbers for 2 tokens"),
        ("label_mask", None, "column 'label_mask': a value is missing"),
        ("attention_mask", [1, None], "column 'attention_mask': a value is missing"),
    ],
)
def test_masks_that_do_not_fit_their_row(tmp_path: Path, name: str, mask: list | None, told: str) -> None:
    rows = {"input_ids": [[5, 6, 7], [5, 6]], name: [[1, 1, 1], mask]}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "data")
    data = DataConfig(dataset_path=str(tmp_path / "data"), pad_rows=True)
    read(data, [0])
    with pytest.raises(ValueError, match=f"data: instance 1, {told}$"):
        read(data, [1])


# --- instances that repeat themselves ---

FILTER = InstanceFilterConfig(repetition_max_count=4)


def test_what_repeats_itself_does_not_count() -> None:
    tokens = np.array([[5, 5, 5, 5, 6, 7], [1, 2, 3, 4, 5, 6]])
    masks = Masks(instance_filter=FILTER)
    assert lists(masks.apply(tokens, np.arange(2)))[1:] == ([[0] * 6, [1] * 6], None)
    assert lists(masks.apply(tokens[1:], np.arange(1)))[1:] == (None, None)
    masks = replace(masks, labels=lambda instances: np.array([[1, 0, 1, 1, 0, 1]] * len(instances)))
    assert lists(masks.apply(tokens, np.arange(2)))[1] == [[0] * 6, [1, 0, 1, 1, 0, 1]]


def test_padding_is_no_repetition(tmp_path: Path) -> None:
    """Neither that of short rows nor what an attention mask says; a pad token in the data is a token like any other."""
    short = np.array([[1, 2, 3, PADDING, PADDING, PADDING, PADDING, PADDING], [7, 7, 7, 7, PADDING, PADDING, 1, 2]])
    masks = Masks(pad_token_id=1, instance_filter=FILTER)
    assert lists(masks.apply(short, np.arange(2)))[1] == [[1, 1, 1, 0, 0, 0, 0, 0], [0] * 8]
    masked = replace(masks, attention=lambda instances: np.array([[1, 1, 1, 0, 0, 0, 0, 0]]))
    full = np.array([[4, 2, 3, 1, 1, 1, 1, 1]])
    assert lists(masked.apply(full, np.arange(1)))[1] == [[1, 1, 1, 0, 0, 0, 0, 0]]
    assert lists(replace(masks, pad_tokens=True).apply(full, np.arange(1)))[1] == [[0] * 8]


# --- rows without padding ---


def test_rows_without_padding(tmp_path: Path) -> None:
    columns = {"input_ids": [[5, 6, 9, 9], [5, 9]], "attention_mask": [[1, 1, 0, 0], [1, 1]]}
    datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / "data")
    for side in get_args(PaddingDirection):
        data = DataConfig(dataset_path=str(tmp_path / "data"), pad_direction=side, pad_rows=True)
        source = open_source(data, 4)
        found = open_masks(data, 0, source).rows(source, np.arange(2), "here")
        assert [row.tolist() for row in found] == [[5, 6], [5, 9]]
        data.generate_attention_mask = True
        found = open_masks(data, 9, source).rows(source, np.arange(2), "here")
        assert [row.tolist() for row in found] == [[5, 6], [5]]
        with pytest.raises(ValueError, match=r"^here: instance 1 holds no token$"):
            open_masks(data, 5, source).rows(Only9(), np.array([0, 1]), "here")


class Only9:
    """A source whose second row is padding alone."""

    sequence_length = 4

    def __len__(self) -> int:
        return 2

    def read(self, indices: object) -> np.ndarray:
        return np.array([[5, 6, 9, 9], [5, 5, PADDING, PADDING]])
