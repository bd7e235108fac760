"""Token ids by instance number: files end to end, remainders dropped, and every way a source can be wrong."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import get_args
from unittest.mock import ANY

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from olmo.config import DataConfig, PaddingDirection
from olmo.data.sources import PADDING, TokenDataset, TokenFiles, expand_ranges, open_source

DTYPES = ["uint8", "uint16", "uint32", "uint64"]


def write(path: Path, tokens: Sequence[int], dtype: str = "uint16") -> Path:
    np.asarray(tokens, dtype=np.dtype(dtype).newbyteorder("<")).tofile(path)
    return path


def dataset(path: Path, **columns: list) -> Path:
    datasets.Dataset.from_dict(columns).save_to_disk(path)
    return path


# --- token files ---


def test_a_file_of_numpy_save_is_no_token_file(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(100, dtype="<u2"))
    with pytest.raises(ValueError, match=r"a\.npy: begins with the header of numpy\.save; a token file has none"):
        TokenFiles([tmp_path / "a.npy"], 4)


@given(
    counts=st.lists(st.integers(0, 23), min_size=1, max_size=4),
    length=st.integers(1, 6),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
)
def test_instances_are_numbered_through_the_files(
    tmp_path_factory: pytest.TempPathFactory, counts: list[int], length: int, dtype: str, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("tokens")
    values = np.random.default_rng(0).integers(0, 256, sum(counts)).tolist()
    files, expected = [], []
    for number, count in enumerate(counts):
        tokens, values = values[:count], values[count:]
        files.append(write(folder / f"{number}.npy", tokens, dtype))
        while len(tokens) >= length:  # the rest is dropped
            expected.append(tokens[:length])
            tokens = tokens[length:]
    if not expected:
        with pytest.raises(ValueError, match=f"fewer than {length} tokens, not one instance"):
            TokenFiles(files, length, dtype)
        return
    source = TokenFiles(files, length, dtype)
    assert len(source) == len(expected)
    assert source.sequence_length == length
    wanted = data.draw(st.lists(st.integers(0, len(expected) - 1), max_size=10))
    rows = source.read(wanted)
    assert rows.dtype == np.int64 and rows.shape == (len(wanted), length)
    assert rows.tolist() == [expected[number] for number in wanted]


def test_files_keep_the_order_of_the_configuration(tmp_path: Path) -> None:
    first, second = write(tmp_path / "z.npy", [1, 2, 3]), write(tmp_path / "a.npy", [4, 5, 6, 7])
    assert TokenFiles([first, second], 2).read([0, 1, 2]).tolist() == [[1, 2], [4, 5], [6, 7]]
    assert TokenFiles([second, first], 2).read([0, 1, 2]).tolist() == [[4, 5], [6, 7], [1, 2]]


def test_bytes_are_little_endian_without_a_header(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes([1, 2, 3, 4, 5, 6, 7, 8]))
    assert TokenFiles([tmp_path / "a"], 2).read([1]).tolist() == [[0x0605, 0x0807]]
    assert TokenFiles([tmp_path / "a"], 1, "uint32").read([1]).tolist() == [[0x08070605]]


def test_large_token_ids_survive(tmp_path: Path) -> None:
    path = write(tmp_path / "a", [65535, 0, 2**32 - 1, 70000], "uint32")
    assert TokenFiles([path], 4, "uint32").read([0]).tolist() == [[65535, 0, 2**32 - 1, 70000]]


def test_indices_of_any_integer_kind(tmp_path: Path) -> None:
    source = TokenFiles([write(tmp_path / "a", range(10))], 2)
    for dtype in (np.uint32, np.int64, np.uint8):
        assert source.read(np.array([3, 0], dtype=dtype)).tolist() == [[6, 7], [0, 1]]


def test_rows_belong_to_the_caller(tmp_path: Path) -> None:
    source = TokenFiles([write(tmp_path / "a", range(4))], 4)
    source.read([0])[:] = 9
    assert source.read([0]).tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("index", [-1, 5, 2**31])
def test_index_beyond_the_files(tmp_path: Path, index: int) -> None:
    path = write(tmp_path / "a", range(10))
    with pytest.raises(
        ValueError, match=rf"^instance {index} is beyond the data set of 5 instances .*{path}.*disagree"
    ):
        TokenFiles([path], 2).read([0, index, 1])


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.npy: no such token file"):
        TokenFiles([write(tmp_path / "a", range(4)), tmp_path / "nowhere.npy"], 2)
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}: no such token file"):
        TokenFiles([tmp_path], 2)


@pytest.mark.parametrize("size, dtype", [(3, "uint16"), (6, "uint32"), (12, "uint64")])
def test_size_that_fits_no_whole_token(tmp_path: Path, size: int, dtype: str) -> None:
    (tmp_path / "a").write_bytes(bytes(size))
    with pytest.raises(ValueError, match=f"a: {size} bytes are no whole number of {dtype} tokens"):
        TokenFiles([tmp_path / "a"], 1, dtype)


def test_no_instances_at_all(tmp_path: Path) -> None:
    short, empty = write(tmp_path / "short", range(3)), write(tmp_path / "empty", [])
    with pytest.raises(ValueError, match=r"empty, .*short: fewer than 4 tokens, not one instance"):
        TokenFiles([empty, short], 4)
    with pytest.raises(ValueError, match=r"data\.paths is empty"):
        TokenFiles([], 4)


@pytest.mark.parametrize("path", ["gs://bucket/a.npy", "file:///a.npy", "s3://bucket", "https://host/"])
def test_a_place_that_cannot_be_read_is_refused_by_name(path: str) -> None:
    with pytest.raises(ValueError, match=f"^{path}: neither http"):
        TokenFiles([path], 4)


@pytest.mark.parametrize("dtype", ["word", "float32", "int16", ">u2", ""])
def test_wrong_type_of_token(tmp_path: Path, dtype: str) -> None:
    with pytest.raises(ValueError, match=rf"^data\.memmap_dtype: '{dtype}' is none of uint8, uint16, uint32, uint64$"):
        TokenFiles([write(tmp_path / "a", range(4))], 2, dtype)


# --- datasets folders ---


def test_dataset_rows(tmp_path: Path) -> None:
    rows = [[1, 2, 3], [4, 5, 6], [70000, 8, 9]]
    source = TokenDataset(dataset(tmp_path / "d", input_ids=rows, text=["a", "b", "c"]), 3)
    assert len(source) == 3
    assert source.sequence_length == 3
    read = source.read(np.array([2, 0, 2], dtype=np.uint32))
    assert read.dtype == np.int64
    assert read.tolist() == [rows[2], rows[0], rows[2]]


@pytest.mark.parametrize("side", get_args(PaddingDirection))
def test_short_dataset_rows_are_padded(tmp_path: Path, side: PaddingDirection) -> None:
    source = TokenDataset(dataset(tmp_path / "d", input_ids=[[1, 2, 3, 4], [1, 2, 3], [], [9]]), 4, side)
    right = [[1, 2, 3, 4], [1, 2, 3, -1], [-1, -1, -1, -1], [9, -1, -1, -1]]
    left = [[1, 2, 3, 4], [-1, 1, 2, 3], [-1, -1, -1, -1], [-1, -1, -1, 9]]
    assert source.read([0, 1, 2, 3]).tolist() == (left if side == "left" else right)
    assert PADDING == -1


@pytest.mark.parametrize(
    ("lengths", "told"),
    [
        ([3, 3, 3], "3 tokens, model.max_sequence_length is 4: set it to 3, or make rows of 4 tokens (scripts."),
        ([4, 1, 4], "1 to 4 (mean 3.0) tokens, model.max_sequence_length is 4: make rows of 4 tokens"),
        ([5, 5, 5], "5 tokens, model.max_sequence_length is 4: set it to 5, or make rows of 4 tokens (scripts."),
        ([2, 4, 5], "2 to 5 (mean 3.7) tokens, model.max_sequence_length is 4: make rows of 4 tokens"),
    ],
)
def test_dataset_rows_of_another_length(tmp_path: Path, lengths: list[int], told: str) -> None:
    """An error with both numbers, when the data are opened; short rows are padded where that was asked for."""
    folder = dataset(tmp_path / "d", input_ids=[[1] * length for length in lengths])
    with pytest.raises(ValueError) as caught:
        open_source(DataConfig(dataset_path=str(folder)), 4, key="evaluators.e.data")
    assert str(caught.value).startswith(f"{folder}: its rows have {told}")
    pads, asked = "; with evaluators.e.data.pad_rows: true, short rows are padded", max(lengths) <= 4
    assert str(caught.value).endswith(pads) == asked
    padded = DataConfig(dataset_path=str(folder), pad_rows=True)
    if not asked:
        with pytest.raises(ValueError, match=r"tokens, model\.max_sequence_length is 4"):
            open_source(padded, 4)
        return
    source = open_source(padded, 4)
    share = 1 - sum(lengths) / 12
    assert isinstance(source, TokenDataset) and source.padded_share(slice(None)) == pytest.approx(share)
    assert source.padded_share(np.array([1])) == 1 - lengths[1] / 4
    assert list(source.remarks()) == [
        f"rows of {min(lengths)} to {max(lengths)} tokens are padded to 4: {share:.1%} of what is read is padding"
    ]
    assert list(open_source(padded, max(lengths)).remarks()) == ([] if len(set(lengths)) == 1 else [ANY])


@pytest.mark.parametrize(
    ("column", "told"),
    [
        ([[5.7, 6.2]], "column 'input_ids' holds List\\(Value\\('float64'\\)\\), not lists of whole numbers"),
        ([5, 6], "column 'input_ids' holds Value\\('int(32|64)'\\), not lists"),
        (["a b", "c"], "column 'input_ids' holds Value\\('string'\\), not lists"),
        ([[5], None], "instance 1, column 'input_ids': a value is missing"),
        ([[5], [6, None]], "instance 1, column 'input_ids': a value is missing"),
        ([[5, 6], [6, None]], "instance 1, column 'input_ids': a value is missing"),
        ([[True], [False]], "column 'input_ids' holds List\\(Value\\('bool'\\)\\), not lists of whole numbers"),
        ([[5], [6, -1]], "instance 1, column 'input_ids': -1 is not a token"),
    ],
)
def test_dataset_rows_that_are_no_tokens(tmp_path: Path, column: list, told: str) -> None:
    with pytest.raises(ValueError, match=f"d: {told}"):
        TokenDataset(dataset(tmp_path / "d", input_ids=column), 2).read([0, 1])


@pytest.mark.parametrize("offsets", [[9, 12, 15], [-3, 0, 3], [0, 3, 9], [0, 3, 0]])
def test_a_damaged_dataset_is_not_read(tmp_path: Path, offsets: list[int]) -> None:
    """Rows beyond the values would be what else is in memory, or end the process."""
    folder = dataset(tmp_path / "d", input_ids=[[1, 2, 3], [4, 5, 6]])
    file = next(folder.glob("*.arrow"))
    true, content = np.array([0, 3, 6], "<i4").tobytes(), file.read_bytes()
    assert content.count(true) == 1
    file.write_bytes(content.replace(true, np.array(offsets, "<i4").tobytes()))
    with pytest.raises(ValueError, match=r"d: column 'input_ids' is damaged: .*[Oo]ffset"):
        TokenDataset(folder, 3)


def test_a_dataset_has_its_files_in_its_folder(tmp_path: Path) -> None:
    dataset(tmp_path / "a", input_ids=[[1]])
    folder = dataset(tmp_path / "d", input_ids=[[1]])
    state = json.loads((folder / "state.json").read_text())
    state["_data_files"][0]["filename"] = outside = f"../a/{state['_data_files'][0]['filename']}"
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match=f"state.json names a file outside of the folder: {outside}$"):
        TokenDataset(folder, 1)


def test_a_token_file_that_changes_size(tmp_path: Path) -> None:
    """Reading what is mapped and no longer there would end the process without a word."""
    path = write(tmp_path / "a.npy", range(4096))
    source = TokenFiles([path], 8)
    source.read([500])
    write(path, range(8))
    with pytest.raises(ValueError, match=r"a\.npy: the file has 16 bytes now, it had 8192$"):
        source.read([500])


@pytest.mark.parametrize("token", [2**64 - 1, 2**63])
def test_a_token_beyond_all_integers(tmp_path: Path, token: int) -> None:
    path = tmp_path / "a.npy"
    np.array([1, 2, 3, token], dtype="<u8").tofile(path)
    with pytest.raises(ValueError, match=rf"token {token} is none; is data\.memmap_dtype uint64\?"):
        TokenFiles([path], 2, "uint64").read([1])
    assert TokenFiles([path], 2, "uint64").read([0]).tolist() == [[1, 2]]


@pytest.mark.parametrize("index", [-1, 2])
def test_index_beyond_the_dataset(tmp_path: Path, index: int) -> None:
    source = TokenDataset(dataset(tmp_path / "d", input_ids=[[1], [2]]), 1)
    with pytest.raises(ValueError, match=f"^instance {index} is beyond the data set of 2 instances"):
        source.read([index])


def test_folders_that_are_no_such_dataset(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such dataset folder \(data\.dataset_path\)"):
        TokenDataset(tmp_path / "nowhere", 3)
    with pytest.raises(ValueError, match=r"d: expected a dataset with a column 'input_ids'"):
        TokenDataset(dataset(tmp_path / "d", tokens=[[1]]), 1)
    with pytest.raises(ValueError, match=r"empty: (not a dataset folder, damaged or empty|the dataset is empty)"):
        TokenDataset(dataset(tmp_path / "empty", input_ids=[]), 1)
    split = datasets.DatasetDict({"train": datasets.Dataset.from_dict({"input_ids": [[1]]})})
    split.save_to_disk(tmp_path / "split")
    with pytest.raises(ValueError, match=r"split: holds several datasets; name one of .*split/train$"):
        TokenDataset(tmp_path / "split", 1)
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=r"folder: not a dataset folder, damaged or empty"):
        TokenDataset(tmp_path / "folder", 1)


def test_what_of_token_files_is_not_used(tmp_path: Path) -> None:
    files = [write(tmp_path / str(count), range(count)) for count in (0, 3, 8, 10)]
    assert list(TokenFiles(files, 4).remarks()) == [
        f"{tmp_path / '0'} and 1 more: fewer than 4 tokens, not one instance",
        "5 of 21 tokens are not used: at the ends of files they fill no instance of 4 tokens",
    ]
    assert list(TokenFiles(files[2:3], 4).remarks()) == []


def test_open_source(tmp_path: Path) -> None:
    path = write(tmp_path / "a", range(6), "uint32")
    files = open_source(DataConfig(paths=[str(path)], memmap_dtype="uint32"), 3)
    assert isinstance(files, TokenFiles)
    assert files.read([1]).tolist() == [[3, 4, 5]]
    folder = dataset(tmp_path / "d", input_ids=[[7, 8]])
    opened = open_source(DataConfig(dataset_path=str(folder)), 2)
    assert isinstance(opened, TokenDataset)
    assert opened.read([0]).tolist() == [[7, 8]]
    with pytest.raises(ValueError, match=r"data\.paths is empty"):
        open_source(DataConfig(), 2)


def test_brace_ranges_expand_as_in_a_shell(tmp_path: Path) -> None:
    assert expand_ranges("part-{08..10}-{0..1}.npy") == [f"part-{a}-{b}.npy" for a in ("08", "09", "10") for b in "01"]
    assert expand_ranges("plain-{a,b}.npy") == ["plain-{a,b}.npy"]
    with pytest.raises(ValueError, match=r"\{3\.\.1\} in a\{3\.\.1\} runs backwards"):
        expand_ranges("a{3..1}")
    for number in range(2):
        np.full(8, number, dtype="<u2").tofile(tmp_path / f"part-{number:02d}.npy")
    source = TokenFiles([tmp_path / "part-{00..01}.npy"], 4)
    assert source.read(range(4))[:, 0].tolist() == [0, 0, 1, 1]
