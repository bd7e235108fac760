"""Columns of datasets on the hub: streamed as far as needed, kept, and continued after whatever ended a command."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import datasets
import pytest

from analysis import hub_column
from analysis.hub_column import HubColumn, Values
from analysis.hub_data import find
from olmo.exceptions import ConfigurationError
from tests.hub import Hub
from tests.hub_texts import add_c4, json_lines, made_texts, parquet, texts_serving

TEXTS = made_texts(200)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(hub_column, "PIECE", 4000)  # some 26 texts
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    with texts_serving(tmp_path, monkeypatch) as hub:
        yield hub


def opened(name: str) -> tuple[HubColumn, Values]:
    column = find(name)
    return column, Values(column, name)


def place(hub: Hub, dataset: str, path: str) -> str:
    """The path of requests for a file of the main branch."""
    commit = hub.repositories["datasets", dataset].commit("main")
    assert commit is not None
    return f"/lfs/{hashlib.sha256(commit.files[path]).hexdigest()}/{commit.sha}/{path}"


@pytest.mark.parametrize("kind", ["json", "parquet", "text"])
def test_values_are_those_of_the_files_in_order(hub: Hub, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [text.replace("\n", " ").strip() for text in TEXTS] if kind == "text" else TEXTS
    halves = texts[:90], texts[90:]
    if kind == "json":
        files = {f"train-{i}.jsonl.gz": json_lines(half) for i, half in enumerate(halves)}
    elif kind == "parquet":
        files = {f"train-{i}.parquet": parquet(text=half, n=[i] * len(half)) for i, half in enumerate(halves)}
    else:  # of which each line is a row
        files = {f"train-{i}.txt": "".join(f"{line}\n" for line in half).encode() for i, half in enumerate(halves)}
    hub.add("owner/texts", files, kind="datasets")
    column, values = opened("hub:owner/texts")
    assert list(islice(values, 30)) == texts[:30]
    assert len(list(column.folder.glob("*.jsonl"))) == 2
    monkeypatch.setattr("datasets.IterableDataset.skip", None)
    assert list(Values(column, "again")) == texts  # another command continues there, in the middle of a file
    hub.asked.clear()
    assert list(values) == list(Values(column, "again")) == texts
    assert hub.asked == []


def test_only_as_much_is_downloaded_as_is_needed(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fsspec.spec.AbstractBufferedFile.DEFAULT_BLOCK_SIZE", 2**14)
    files = {f"data/train-{i}.parquet": parquet(5, text=TEXTS[:50], other=made_texts(50, 4000)) for i in range(2)}
    hub.add("owner/texts", files, kind="datasets")
    _, values = opened("hub:owner/texts")
    assert list(islice(values, 20)) == TEXTS[:20]
    assert hub.bytes_sent("train-1.parquet") == 0
    assert 4000 < hub.bytes_sent("train-0.parquet") < len(files["data/train-0.parquet"]) / 2


def test_connections_that_break_off_lose_no_value_and_repeat_none(hub: Hub) -> None:
    add_c4(hub, TEXTS)
    column, values = opened("hub:owner/c4:en:train")
    first, second = (place(hub, "owner/c4", f"en/train-{i}.json.gz") for i in range(2))
    # The hub's client itself makes six attempts at a range.
    hub.cuts = {first: [100] * 7 + [10**9] * 9, second: [100] * 8 + [10**9] * 9}
    assert list(values) == TEXTS
    hub.cuts = {}
    assert list(Values(column, "again")) == TEXTS


def test_the_same_command_continues_where_the_connection_ended_another(hub: Hub) -> None:
    add_c4(hub, TEXTS)
    column, values = opened("hub:owner/c4:en:train")
    second = place(hub, "owner/c4", "en/train-1.json.gz")
    hub.failures[second] = [500] * 60
    with pytest.raises(
        OSError, match=r"hub:owner/c4:en:train: 500 .*5 attempts\); the same command continues from here"
    ):
        list(values)
    kept = sorted(column.folder.glob("*.jsonl"))
    known = [json.loads(line) for piece in kept for line in piece.read_text("utf-8").splitlines()]
    assert known == TEXTS[: len(known)] and 50 < len(known) <= 100
    assert not list(column.folder.glob(".*"))
    hub.failures.clear()
    for state in ("its state", "no state", "another version's"):  # the last two are read from the first value on
        if state == "no state":
            (column.folder / "resume.json").unlink()
            kept.pop().unlink()
        elif state != "its state":
            resume = json.loads((column.folder / "resume.json").read_text())
            (column.folder / "resume.json").write_text(json.dumps({**resume, "datasets": "2.0", "state": {}}))
        for piece in set(column.folder.glob("*.jsonl")) - set(kept):
            piece.unlink()
        assert list(Values(column, "again")) == TEXTS


def test_a_stream_that_has_skipped_values_continues_by_its_state_too(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    add_c4(hub, TEXTS)
    column, values = opened("hub:owner/c4:en:train")
    assert list(islice(values, 40)) == TEXTS[:40]
    (column.folder / "resume.json").unlink()  # as of a command that was killed before it wrote that
    assert list(islice(Values(column, "skips"), 80)) == TEXTS[:80]
    skipped: list[int] = []
    skip = datasets.IterableDataset.skip
    monkeypatch.setattr(datasets.IterableDataset, "skip", lambda self, n: skipped.append(n) or skip(self, n))
    assert list(Values(column, "continues")) == TEXTS
    assert skipped == [json.loads((column.folder / "resume.json").read_text())["skipped"]] and skipped[0] < 80


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": ["a", None]}, "row 1 of column 'text' has no value"),
        ({"input_ids": [[1], None]}, "row 1 of column 'input_ids' has no value"),
        (
            {"input_ids": [[1], [2, None]]},
            "row 1 of column 'input_ids' is not a list of token ids, whole numbers from 0",
        ),
        ({"input_ids": [[1], [-2]]}, "row 1 of column 'input_ids' is not a list of token ids"),
        ({"input_ids": [[1], [2, 3]], "attention_mask": [[1], [1]]}, "row 1 of column 'input_ids' has 2 tokens, its"),
    ],
)
def test_a_value_that_is_missing_or_of_another_kind_is_named(hub: Hub, columns: dict, message: str) -> None:
    hub.add("owner/odd", {"train.parquet": parquet(**columns)}, kind="datasets")
    column, values = opened("hub:owner/odd")
    with pytest.raises(ConfigurationError) as raised:
        list(values)
    assert str(raised.value).startswith(f"hub:owner/odd: {message}")
    assert not list(column.folder.glob("*.jsonl"))


def test_padding_is_left_out(hub: Hub) -> None:
    ids = {"input_ids": [[1, 2, 0], [0, 3, 4], [5, 6, 7]], "attention_mask": [[1, 1, 0], [0, 1, 1], [1, 1, 1]]}
    hub.add("owner/ids", {"train.parquet": parquet(**ids)}, kind="datasets")
    assert list(opened("hub:owner/ids")[1]) == [[1, 2], [3, 4], [5, 6, 7]]


def test_a_damaged_piece_is_named(hub: Hub) -> None:
    add_c4(hub, TEXTS)
    column, values = opened("hub:owner/c4:en:validation")
    list(values)
    (piece,) = column.folder.glob("*.jsonl")
    piece.write_text('"a"\n"b')
    with pytest.raises(ValueError, match=f"{piece}: damaged; delete it"):
        list(values)


def test_what_datasets_and_the_hubs_client_print_and_try_is_as_before_afterwards(
    hub: Hub, capfd: pytest.CaptureFixture[str]
) -> None:
    import datasets
    from huggingface_hub import utils

    def settings() -> tuple[object, ...]:
        tried = {key: value for key, value in vars(datasets.config).items() if key.startswith("STREAMING")}
        levels = datasets.logging.get_verbosity(), utils.logging.get_verbosity()
        return tried, levels, datasets.are_progress_bars_disabled(), utils.are_progress_bars_disabled()

    before = settings()
    add_c4(hub, TEXTS)
    list(opened("hub:owner/c4:en:train")[1])
    with pytest.raises(ConfigurationError):
        find("hub:owner/none")
    assert settings() == before
    assert capfd.readouterr() == ("", "")
