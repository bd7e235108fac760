"""`python -m scripts.prepare_pubmed --corpus hub:...`: rows of the first texts of a dataset on the hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from analysis import hub_column
from olmo.exceptions import exit_status
from scripts import prepare_pubmed
from scripts.prepare import hub_corpus
from scripts.prepare.documents import hash_of
from tests.hub import Hub
from tests.hub_texts import add_c4, made_texts, texts_serving
from tests.pubmed import read, run, stream_of

TEXTS = [*made_texts(60, 5), " \n", *made_texts(3, 5), *made_texts(200, 5, seed=1)]  # some of them twice
OPTIONS = ("--corpus", "hub:owner/c4:en", "--sequence_length", 16, "--seed", 3, "--instances")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(hub_column, "PIECE", 300)
    monkeypatch.setattr("scripts.prepare.sampling.BATCH", 500)
    with texts_serving(tmp_path / "cache", monkeypatch) as hub:
        add_c4(hub, TEXTS)
        yield hub


def test_the_sample_is_the_first_texts_that_are_needed_shuffled(tmp_path: Path, hub: Hub) -> None:
    assert run("--output", tmp_path / "out", *OPTIONS, 100, "--processes", 1) == 2  # has no effect
    assert prepared(tmp_path / "out", 100) == 0
    about = json.loads((tmp_path / "out/about.json").read_text())
    commit = hub.repositories["datasets", "owner/c4"].branches["main"]
    assert about["corpus"] == f"hub:owner/c4@{commit}:en:train:text"
    first = TEXTS[: about["read"]["records"]]
    assert 60 < len(first) < len(TEXTS) / 2
    ordered = sorted({text for text in first if text.strip()}, key=lambda text: hash_of(text.encode(), 3))
    stream = stream_of(ordered)
    assert 100 * 16 <= len(stream) < 100 * 16 + 700
    assert read(tmp_path / "out", 16).reshape(-1).tolist() == stream[: 100 * 16]
    assert 0 < about["sample"]["same_text"] <= 3
    # As many more texts as there are on this machine by now, and still the same rows; without the hub's files.
    assert prepared(tmp_path / "more", 200) == 0
    hub.asked.clear()
    assert prepared(tmp_path / "again", 100) == 0
    assert [asked.path for asked in hub.asked] == ["/api/datasets/owner/c4?expand=sha"]
    assert (read(tmp_path / "again", 16) == read(tmp_path / "out", 16)).all()
    assert json.loads((tmp_path / "again/about.json").read_text()) == about


def prepared(output: Path, instances: int) -> int:
    return exit_status(prepare_pubmed.main, ["--output", str(output), *map(str, OPTIONS), str(instances)])


def test_a_command_that_was_ended_continues(
    tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    encode, calls = hub_corpus.encode_documents, list[int]()

    def ended(*arguments: object) -> list[list[int]]:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(hub_corpus, "encode_documents", ended)
        assert prepared(tmp_path / "out", 100) == 130
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    sent = hub.bytes_sent("train-0.json.gz")
    kept = sorted(path.name for path in tmp_path.glob("cache/xdg/knowledge-entropy/hub/*/*.jsonl"))
    assert len(kept) > 3
    assert prepared(tmp_path / "out", 100) == 0
    assert read(tmp_path / "out", 16).shape == (100, 16) and hub.bytes_sent("train-0.json.gz") > sent
    assert kept == sorted(path.name for path in tmp_path.glob("cache/xdg/knowledge-entropy/hub/*/*.jsonl"))[: len(kept)]
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["hub:owner/c4:en", "--instances", 900], 1, "hub:owner/c4@{commit}:en:train:text holds "),
        (["hub:owner/c4:en:url", "--input", "a"], 2, "prepare_pubmed: --input: not with --corpus hub:..."),
        (["hub:owner/c4"], 2, "hub:owner/c4: name one of its configurations: en, de"),
        (["c5", "--input", "a"], 2, "prepare_pubmed: --corpus c5 is none of pubmed, c4, text and hub:owner/name"),
        (
            ["text"],
            2,
            "prepare_pubmed: --corpus text needs --input; without it, name a dataset on the hub: --corpus hub:",
        ),
    ],
)
def test_what_is_wrong_is_one_line(
    tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str], arguments: list[object], status: int, message: str
) -> None:
    argv = ["--output", tmp_path / "out", "--sequence_length", 16, "--corpus", *arguments]
    assert exit_status(prepare_pubmed.main, list(map(str, argv))) == status
    shown = capsys.readouterr().err
    commit = hub.repositories["datasets", "owner/c4"].branches["main"]
    assert shown.startswith(f"error: {message.format(commit=commit)}") and shown.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} <= {"cache"}
