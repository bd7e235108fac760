"""inspect_data and extract_data, by the command line, against numpy's own recipe of OLMo's order."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

from olmo.data import order as order_module
from olmo.exceptions import exit_status
from olmo.tokenizer import encode, load_tokenizer
from scripts.extract_data import main as extract
from scripts.inspect_data import main as inspect
from tests.running import BATCH, LENGTH, SHORT, instances, order, series, train, write_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


def seen_by(run: Path) -> dict[int, list[int]]:
    """What the run itself noted, row by row: step -> instance numbers."""
    noted = (run / "data-indices/rank0.tsv").read_text(encoding="utf-8").splitlines()
    return {int(step): list(map(int, row)) for step, *row in (line.split("\t") for line in noted)}


def lines(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict]:
    inspect([*arguments, "--json"])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_batch_is_the_one_that_training_sees(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(world / "plain.yaml", tmp_path)
    seen = seen_by(tmp_path)
    assert max(seen) == 7  # into the second epoch
    for step in (1, 4, 5, 7):
        rows = lines(capsys, str(world / "plain.yaml"), "--step", str(step))
        assert [row["row"] for row in rows] == list(range(BATCH))
        assert [row["index"] for row in rows] == seen[step]
        epoch, number = divmod(step - 1, 25 // BATCH)
        expected = order(11, epoch)[number * BATCH : (number + 1) * BATCH]
        assert [row["index"] for row in rows] == expected.tolist()
        assert [row["input_ids"] for row in rows] == instances(world, SHORT)[expected].tolist()
        assert all(row["injected"] == [] for row in rows)


def test_what_is_injected_stands_at_the_front(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entries = json.loads((world / "paraphrase.json").read_text())
    tokenizer = load_tokenizer(str(world / "tokenizer.json"))
    config = str(world / "config.yaml")
    rows = lines(capsys, config, "--step", "2", "--inject_interval=2", "--injection.rounds=3")
    assert rows[0]["injected"] == ["paraphrase/0"]
    first = encode(tokenizer, [entries[0]["train_context"]])[0]
    assert rows[0]["input_ids"][: len(first) + 1] == [*first, 0] and len(rows[0]["input_ids"]) == LENGTH
    assert [row["injected"] for row in rows[:4]] == [["paraphrase/0"], ["paraphrase/1"], ["paraphrase/2"], ["once/0"]]
    later = lines(capsys, config, "--step", "3", "--inject_interval=2", "--injection.rounds=3")
    assert all(row["injected"] == [] for row in later)


def test_the_knobs_of_injection_show(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What training sees with them, against rows put together by hand."""
    entries = json.loads((world / "paraphrase.json").read_text())
    tokenizer = load_tokenizer(str(world / "tokenizer.json"))
    text = [*encode(tokenizer, [entries[0]["train_context"]])[0], 0]
    config = [str(world / "config.yaml"), "--inject_start_step=3", "--inject_position=document"]
    assert all(row["injected"] == [] for row in lines(capsys, *config, "--step", "2"))
    rows, plain = (lines(capsys, *config, "--step", "3", more) for more in ("--run_name=a", "--injection=null"))
    assert [row["injected"] for row in rows] == [
        ["paraphrase/0"],
        ["paraphrase/1"],
        ["paraphrase/2"],
        ["once/0"],
        [],
        [],
    ]
    old, new = plain[0]["input_ids"], rows[0]["input_ids"]
    ends = [place + 1 for place, token in enumerate(old) if token == 0 and place + 1 + len(text) <= LENGTH]
    place = ends[0] if ends else 0
    assert place > 0, "the first row has no document that ends early enough to tell"
    assert new == [*old[:place], *text, *old[place:]][:LENGTH]


def test_texts_of_a_map_show_the_names_that_the_run_logs(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = json.loads((world / "once.json").read_text())
    once = encode(load_tokenizer(str(world / "tokenizer.json")), [entries[2]["train_context"]])[0]
    texts = {"0": [torch.tensor([5, 0])], "2": [torch.tensor([*once, 0]), torch.tensor([6, 0])]}
    (tmp_path / "map.pkl").write_bytes(pickle.dumps(texts))
    named = [f"--inject_indices_map={tmp_path / 'map.pkl'}", "--injection=null", "--inject_interval=null"]
    config = [str(world / "config.yaml"), *named]
    assert [row["injected"] for row in lines(capsys, *config, "--step", "3")][:3] == [["once/2"], ["map/1"], []]
    train(world / "config.yaml", tmp_path / "run", *named, "--stop_at=4", "--eval_interval=100")
    logged = [json.loads(line) for line in (tmp_path / "run/injections.jsonl").read_text().splitlines()]
    assert logged == [
        {"step": 1, "round": 1, "tokens": 2, "texts": [{"entry": "map/0", "row": 0, "tokens": 2}]},
        {"step": 3, "round": 2, "tokens": len(once) + 3, "texts": [
            {"entry": "once/2", "row": 0, "tokens": len(once) + 1}, {"entry": "map/1", "row": 1, "tokens": 2}]},
    ]  # fmt: skip


def test_rows_and_text(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(world / "config.yaml")
    asked = ["--step", "2", "--inject_interval=2", "--injection.rounds=3"]
    inspect([config, *asked, "--rows", "1-2", "--decode"])
    shown = capsys.readouterr().out
    entries = json.loads((world / "paraphrase.json").read_text())
    assert shown.count("--- step 2, row ") == 2 and "row 1, instance" in shown and "injected paraphrase/1" in shown
    assert " ".join(entries[1]["train_context"].split()[:4]) in " ".join(shown.split())
    text = lines(capsys, config, *asked, "--rows", "3", "--decode")
    assert len(text) == 1 and text[0]["row"] == 3 and "text" in text[0]


def test_a_run_that_goes_on_from_a_checkpoint(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(world / "plain.yaml", tmp_path / "first", "--stop_at=3", "--save_interval=3")
    load_path = f"--load_path={tmp_path / 'first/step3'}"
    train(world / "plain.yaml", tmp_path / "second", load_path)
    rows = lines(capsys, str(world / "plain.yaml"), "--step", "5", load_path)
    assert [row["index"] for row in rows] == seen_by(tmp_path / "second")[5]
    assert exit_status(inspect, [str(world / "plain.yaml"), "--step", "3", load_path]) == 2
    assert capsys.readouterr().err == "error: step 3: the run begins with step 4\n"


def test_extracted_steps_train_the_same(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(world / "plain.yaml", tmp_path / "first", "--stop_at=2", "--save_interval=2")
    load_path = f"--load_path={tmp_path / 'first/step2'}"
    train(world / "plain.yaml", tmp_path / "true", load_path)
    extract([str(world / "plain.yaml"), "--steps", "3-7", "--output", str(tmp_path / "next.npy")])
    assert "30 instances of 32 tokens, uint16" in capsys.readouterr().out
    tokens = np.fromfile(tmp_path / "next.npy", "<u2").reshape(-1, SHORT)
    wanted = [number for step in range(3, 8) for number in seen_by(tmp_path / "true")[step]]
    assert np.array_equal(tokens, instances(world, SHORT)[wanted])
    data = (f"--data.paths=[{tmp_path / 'next.npy'}]", "--data_shuffling=false", "--restore_dataloader=false")
    train(world / "plain.yaml", tmp_path / "again", load_path, *data, "--epoch=0")
    assert series(tmp_path / "again") == series(tmp_path / "true")


def test_extracted_text_is_that_of_the_tokens(world: Path, tmp_path: Path) -> None:
    extract([str(world / "plain.yaml"), "--steps", "3-4", "--output", str(tmp_path / "next.npy")])
    extract([str(world / "plain.yaml"), "--steps", "3-4", "--output", str(tmp_path / "next.jsonl")])
    tokenizer = load_tokenizer(str(world / "tokenizer.json"))
    rows = np.fromfile(tmp_path / "next.npy", "<u2").reshape(-1, SHORT)
    expected = [tokenizer.decode([int(token) for token in row if token]) for row in rows]  # 0 is the end of a document
    texts = [json.loads(line)["text"] for line in (tmp_path / "next.jsonl").read_text("utf-8").splitlines()]
    assert texts == expected and any(texts)


def test_masks_are_shown_and_not_lost(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [list(range(1, SHORT + 1))] * 5 + [[7, 8, 9]]
    datasets.Dataset.from_dict({"input_ids": rows}).save_to_disk(tmp_path / "data")
    data = ["--data.paths=null", f"--data.dataset_path={tmp_path / 'data'}", "--data_shuffling=false"]
    data.append("--data.pad_rows")
    config = str(world / "plain.yaml")
    right = lines(capsys, config, "--step", "1", *data)
    assert right[5]["input_ids"] == [7, 8, 9] + [1] * (SHORT - 3)
    assert right[5]["label_mask"] == [1] * 3 + [0] * (SHORT - 3) and "attention_mask" not in right[5]
    left = lines(capsys, config, "--step", "1", *data, "--data.pad_direction=left")
    assert left[5]["label_mask"] == [0] * (SHORT - 2) + [1] * 2
    assert left[5]["attention_mask"] == [0] * (SHORT - 3) + [1] * 3 and left[0]["attention_mask"] == [1] * SHORT
    assert exit_status(extract, [config, "--steps", "1", "--output", str(tmp_path / "out.npy"), *data]) == 2
    assert capsys.readouterr().err == "error: step 1: a token file has neither label masks nor short rows\n"
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_what_follows_from_the_tokens_is_no_obstacle(world: Path, tmp_path: Path) -> None:
    """A run over the file with the same settings finds the same padding and the same repetitions again."""
    arguments = [str(world / "plain.yaml"), "--steps", "1-3", "--output"]
    extract([*arguments, str(tmp_path / "plain.npy")])
    token = np.fromfile(tmp_path / "plain.npy", "<u2")[5]
    settings = ["--data.generate_attention_mask", f"--model.pad_token_id={token}"]
    extract([*arguments, str(tmp_path / "masked.npy"), *settings, "--data.instance_filter={repetition_max_count: 1}"])
    assert (tmp_path / "plain.npy").read_bytes() == (tmp_path / "masked.npy").read_bytes()


def test_nothing_is_written_over(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Least of all what the steps are extracted from."""
    before = (world / f"a{SHORT}.npy").read_bytes()
    output = str(world / f"a{SHORT}.npy")
    assert exit_status(extract, [str(world / "plain.yaml"), "--steps", "1", "--output", output]) == 2
    assert capsys.readouterr().err == f"error: {output}: already exists; delete it or choose another place\n"
    assert (world / f"a{SHORT}.npy").read_bytes() == before


@pytest.mark.parametrize("steps", ["2-5", "6"])
def test_extracting_from_a_large_order(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: str
) -> None:
    """One that is not held in memory; nothing of it stays."""
    arguments = [str(world / "plain.yaml"), "--steps", steps, "--output"]
    extract([*arguments, str(tmp_path / "small.npy")])
    monkeypatch.setattr(order_module, "LARGE", 10)
    extract([*arguments, str(tmp_path / "large.npy")])
    assert (tmp_path / "small.npy").read_bytes() == (tmp_path / "large.npy").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large.npy", "small.npy"]


@pytest.mark.parametrize(
    "command, arguments, told",
    [
        (inspect, ["--step", "0"], "step 0: the run begins with step 1"),
        (extract, ["--steps", "0-2", "--output", "y"], "step 0: the run begins with step 1"),
        (inspect, ["--step", "8"], "step 8: the run ends with step 7; --max_duration=8 continues beyond it"),
        (
            inspect,
            ["--step", "5", "--max_duration=1ep"],
            "step 5: the run ends with step 4; --max_duration=5 continues beyond it",
        ),
        (
            extract,
            ["--steps", "1-9", "--output", "y"],
            "step 9: the run ends with step 7; --max_duration=9 continues beyond it",
        ),
        (inspect, ["--step", "1", "--rows", "4-6"], "--rows: row 6, the global batch has 6"),
        (inspect, ["--step", "1", "--rows", "5-2"], "argument --rows: expected N or A-B, got '5-2'"),
        (inspect, ["--step", "1", "--row", "2"], "expected --key.sub=value, got '2'"),
        (inspect, [], "the following arguments are required: --step"),
        (extract, ["--steps", "1-2"], "the following arguments are required: --output"),
        (extract, ["--steps", "x", "--output", "y"], "argument --steps: expected N or A-B, got 'x'"),
    ],
)
def test_mistakes_are_one_line(world, tmp_path, capsys, command, arguments, told) -> None:
    assert exit_status(command, [str(world / "plain.yaml"), *arguments]) in (1, 2)
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.endswith(f"{told}\n") and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_tokens_that_the_file_cannot_hold(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [[70_000] * SHORT] * BATCH
    datasets.Dataset.from_dict({"input_ids": rows}).save_to_disk(tmp_path / "data")
    data = ["--data.paths=null", f"--data.dataset_path={tmp_path / 'data'}", "--model.vocab_size=70001"]
    arguments = [str(world / "plain.yaml"), "--steps", "1", "--output", str(tmp_path / "out.npy"), *data]
    arguments.append("--model.embedding_size=null")
    assert exit_status(extract, arguments) == 2
    assert capsys.readouterr().err.endswith("error: data.memmap_dtype: token 70000 does not fit uint16\n")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    extract([*arguments, "--data.memmap_dtype=uint32"])
    assert np.fromfile(tmp_path / "out.npy", "<u4").tolist() == [70_000] * SHORT * BATCH
