"""`--data hub:...`: the numbers of the same texts or rows in a file, and what the result records of them."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest
from tokenizers import Tokenizer

from analysis import entropy
from analysis.hub_data import HubData, opened
from analysis.kinds import labels
from knowledge_entropy import measure
from olmo.distributed import Ranks
from olmo.exceptions import exit_status
from tests.analysis.measuring import LENGTH, check, direct, made_model, olmo_places, result_in, run, write
from tests.hub import Hub
from tests.hub_texts import add_c4, made_texts, parquet, texts_serving
from tests.reference import tiny_tokenizer, to_transformers

TEXTS = ["The warden of the silver lake, in the town of stone.", " \n", *made_texts(60, 4), "", "Rain."]
NAME = "hub:owner/c4:en"
IDS = [list(range(2 + i, 2 + i + LENGTH - i % 3)) + [0] * (i % 3) for i in range(12)]
MASK = [[1] * (LENGTH - i % 3) + [0] * (i % 3) for i in range(12)]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with pytest.MonkeyPatch.context() as patch, texts_serving(tmp_path_factory.mktemp("cache"), patch) as hub:
        add_c4(hub, TEXTS)
        hub.add("owner/ids", {"train.parquet": parquet(input_ids=IDS, attention_mask=MASK)}, kind="datasets")
        yield hub


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two of one tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoints")
    tokenizer = str(tiny_tokenizer(folder / "tokenizer.json"))
    return [write(folder / f"step{seed}-unsharded", made_model(seed), tokenizer) for seed in range(2)]


@pytest.mark.parametrize("pack", ["eos", "none"])
def test_texts_give_the_numbers_of_a_file(tmp_path: Path, hub: Hub, checkpoints: list[Path], pack: str) -> None:
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    argv = ["--checkpoint", checkpoints[1], "--data_size", 20, "--pack", pack]
    run(*argv, "--data", NAME, "--output", tmp_path / "hub")
    run(*argv, "--data", tmp_path / "texts.jsonl", "--output", tmp_path / "file")
    ours, theirs = (result_in(tmp_path / place) for place in ("hub", "file"))
    assert ours["layers"] == theirs["layers"] and ours["number_of_tokens"] == theirs["number_of_tokens"]
    assert ours["data"]["sha256"] == theirs["data"]["sha256"]
    tokenizer = Tokenizer.from_file(str(checkpoints[1].parent / "tokenizer.json"))
    encoded = [tokenizer.encode(text, add_special_tokens=False).ids for text in TEXTS if text.strip()]
    eos = made_model(1).config.eos_token_id
    stream = [token for ids in encoded for token in (*ids, eos)]
    packed = [stream[start : start + LENGTH] for start in range(0, 20 * LENGTH, LENGTH)]
    rows = packed if pack == "eos" else [ids[:LENGTH] for ids in encoded][:20]
    check(tmp_path / "hub", direct(to_transformers(made_model(1)), olmo_places(), rows))


def test_checkpoints_of_a_command_share_what_is_downloaded(
    tmp_path: Path, checkpoints: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("analysis.series.Series.draw", lambda self: None)
    with texts_serving(tmp_path, monkeypatch) as hub:
        add_c4(hub, TEXTS)
        run("--checkpoint", *checkpoints, "--data_size", 20, "--data", NAME, "--output", tmp_path / "out")
        one, other = (result_in(tmp_path / "out" / folder.name) for folder in checkpoints)
        assert one["data"] == other["data"] and one["layers"] != other["layers"]
        fetched = [asked.path for asked in hub.asked if asked.sent and "/en/train-0" in asked.path]
        assert len(fetched) == 2  # for its columns, and for its texts


def test_a_result_names_the_commit_by_which_the_same_instances_are_found_again(
    tmp_path: Path, hub: Hub, checkpoints: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.repositories["datasets", "owner/c4"].branches["main"]
    argv = ["--checkpoint", checkpoints[0], "--data_size", 20, "--output"]
    hub.asked.clear()
    run(*argv, tmp_path / "first", "--data", NAME)
    result = result_in(tmp_path / "first")
    source = f"hub:owner/c4@{commit}:en:train:text"
    recorded = {key: result["data"][key] for key in ("path", "commit", "source", "instances")}
    assert recorded == {"path": NAME, "commit": commit, "source": source, "instances": 20}
    # The same again needs the commit of the branch; with the commit, nothing of the hub.
    hub.asked.clear()
    run(*argv, tmp_path / "first", "--data", NAME)
    assert [asked.path for asked in hub.asked] == ["/api/datasets/owner/c4?expand=sha"]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    run(*argv, tmp_path / "second", "--data", source)
    again = result_in(tmp_path / "second")
    assert again["data"]["sha256"] == result["data"]["sha256"] and again["layers"] == result["layers"]
    other = {**again, "data": {**again["data"], "sha256": "0" * 64}}
    assert labels([result, other]) == ["c4:en", f"c4@{commit[:7]}:en:train:text"]
    # In a program the same.
    measured = measure(checkpoints[0], NAME, data_size=20)
    assert measured.layers.tolist() == result["layers"]
    assert measured.to_dict()["data"]["source"] == source


def test_token_ids_give_the_numbers_of_a_dataset_folder(tmp_path: Path, hub: Hub, checkpoints: list[Path]) -> None:
    datasets.Dataset.from_dict({"input_ids": IDS, "attention_mask": MASK}).save_to_disk(str(tmp_path / "folder"))
    argv = ["--checkpoint", checkpoints[0], "--data_size", 9]
    for place, data in (("hub", "hub:owner/ids"), ("disk", tmp_path / "folder")):
        run(*argv, "--data", data, "--output", tmp_path / place)
    ours, theirs = (result_in(tmp_path / place) for place in ("hub", "disk"))
    assert ours["layers"] == theirs["layers"] and ours["data"]["sha256"] == theirs["data"]["sha256"]
    assert (ours["sequence_length"], ours["number_of_tokens"], ours["data"]["pack"]) == (LENGTH, 9 * (LENGTH - 1), None)
    run(*argv, "--data", "hub:owner/ids", "--sequence_length", 5, "--output", tmp_path / "short")
    assert result_in(tmp_path / "short")["number_of_tokens"] == 9 * 5


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([NAME, "--data_size", "400"], 1, f"{NAME}: 1358 tokens, 84 instances of 16; --data_size asks for 400: use"),
        (["hub:owner/ids", "--data_size", "13"], 1, "hub:owner/ids: 12 instances, --data_size asks for 13"),
        (["hub:owner/ids", "--pack", "eos"], 2, "--pack: only for text as --data; hub:owner/ids holds tokens"),
        (["hub:owner/c4:fr"], 2, "hub:owner/c4:fr: 'fr' is no configuration (en, de)"),
        (["hub:owner/gone"], 2, "hub:owner/gone: the hub has no dataset owner/gone"),
    ],
)
def test_data_that_does_not_suffice_is_one_line(
    tmp_path: Path,
    hub: Hub,
    checkpoints: list[Path],
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    status: int,
    message: str,
) -> None:
    argv = ["--checkpoint", str(checkpoints[0]), "--output", str(tmp_path / "out"), "--data", *arguments]
    assert exit_status(entropy.main, argv) == status
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: {message}") and shown.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_other_processes_read_what_the_first_one_has_found_and_kept(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    class Second(Ranks):
        def share_from_first(self, work: object, heartbeat: float) -> object:
            return pickle.loads(pickle.dumps(column))

    first = opened(NAME, 5, Ranks())
    assert isinstance(first, HubData) and first.texts is not None
    column, texts = first.column, list(first.texts.documents)
    hub.asked.clear()
    second = opened(NAME, 5, Second(1, 2))
    assert isinstance(second, HubData) and second.texts is not None
    assert second.column == column and list(second.texts.documents) == texts == TEXTS
    assert hub.asked == []
