"""A plan written by the command is injected as the entries or the map that it was made from."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch

from olmo.exceptions import exit_status
from olmo.knowledge.plan_files import read_plan, write_plan
from olmo.tokenizer import encode, load_tokenizer
from scripts.injection_plan import main
from tests.published import INJECTION_MAP, OLMO_TOKENIZER, ONCE, PARAPHRASE, fictional_knowledge, olmo_tokenizer
from tests.running import metrics, train, write_world

KEEP = ("--injection=null", "--evaluators=[]")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("suffix", ["json", "safetensors"])
def test_a_run_with_the_file_is_the_run_with_the_entries(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str
) -> None:
    written = tmp_path / "plans" / f"plan.{suffix}"
    main([str(world / "config.yaml"), "--output", str(written)])
    plan = read_plan(written)
    tokens = sum(len(text.input_ids) for texts in plan.rounds for text in texts)
    assert capsys.readouterr().out == f"{written}: 3 rounds, 12 texts, {tokens:,} tokens\n"
    assert (plan.tokenizer, plan.eos_token_id, plan.steps_passed) == (str(world / "tokenizer.json"), 0, None)
    settings = ("--evaluators=[]", "--stop_at=4")
    train(world / "config.yaml", tmp_path / "entries", *settings)
    train(world / "config.yaml", tmp_path / "file", *settings, "--injection=null", f"--inject_indices_map={written}")
    assert metrics(tmp_path / "file") == metrics(tmp_path / "entries")
    logs = [(tmp_path / name / "injections.jsonl").read_bytes() for name in ("file", "entries")]
    assert logs[0] == logs[1] != b""


def test_json_has_the_words_that_the_tokens_spell(world: Path, tmp_path: Path) -> None:
    main([str(world / "config.yaml"), "--output", str(tmp_path / "plan.json")])
    tokenizer = load_tokenizer(str(world / "tokenizer.json"))
    texts = [text for of_round in json.loads((tmp_path / "plan.json").read_text())["rounds"] for text in of_round]
    assert [[*ids, 0] for ids in encode(tokenizer, [t["text"] for t in texts])] == [t["input_ids"] for t in texts]
    entries = json.loads((world / "paraphrase.json").read_text())
    assert [text["text"] for text in texts[4:7]] == [entry["paraphrases"][0] for entry in entries]


def test_a_file_can_be_written_anew_in_the_other_form(world: Path, tmp_path: Path) -> None:
    """Names, steps and the tokenizer come along; words only stand in JSON."""
    pickled = {"10": [torch.tensor([5, 0])], "30": [torch.tensor([6, 0])]}
    (tmp_path / "map.pkl").write_bytes(pickle.dumps(pickled))
    config = [str(world / "config.yaml"), *KEEP, "--inject_interval=null"]
    for source, target in (("map.pkl", "a.json"), ("a.json", "b.safetensors"), ("b.safetensors", "c.json")):
        main([*config, f"--inject_indices_map={tmp_path / source}", "--output", str(tmp_path / target)])
        plan = read_plan(tmp_path / target)
        assert (plan.steps_passed, plan.eos_token_id, plan.tokenizer) == ((10, 30), 0, None)
        assert [[(t.entry, t.input_ids) for t in texts] for texts in plan.rounds] == [
            [("map/0", (5, 0))],
            [("map/0", (6, 0))],
        ]
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "c.json").read_bytes()
    main([str(world / "config.yaml"), "--output", str(tmp_path / "d.json")])
    for source, target in (("d.json", "e.safetensors"), ("e.safetensors", "f.json")):
        named = f"--inject_indices_map={tmp_path / source}"
        main([str(world / "config.yaml"), *KEEP, named, "--output", str(tmp_path / target)])
    assert read_plan(tmp_path / "d.json") == read_plan(tmp_path / "f.json")
    assert read_plan(tmp_path / "f.json").tokenizer == str(world / "tokenizer.json")


def test_the_published_map_gets_the_names_of_the_published_entries(tmp_path: Path) -> None:
    folder = fictional_knowledge()
    olmo_tokenizer()
    config = tmp_path / "config.yaml"
    evaluators = "".join(
        f"- {{label: {setting}_memorization, data: {{dataset_path: '{folder / name}'}}}}\n"
        for setting, name in (("paraphrase", PARAPHRASE), ("once", ONCE))
    )
    config.write_text(
        "model: {max_sequence_length: 1024, vocab_size: 50280, embedding_size: 50304, eos_token_id: 50279}\n"
        f"tokenizer: {{identifier: {OLMO_TOKENIZER}}}\nglobal_train_batch_size: 128\ninject_interval: 160\n"
        f"inject_indices_map: {folder / INJECTION_MAP}\nevaluators:\n{evaluators}"
    )
    main([str(config), "--output", str(tmp_path / "map.json")])
    entries = f"{{paraphrase: {folder / PARAPHRASE}, once: {folder / ONCE}}}"
    main(
        [str(config), f"--injection={entries}", "--inject_indices_map=null", "--output", str(tmp_path / "entries.json")]
    )
    assert (tmp_path / "map.json").read_bytes() == (tmp_path / "entries.json").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--injection=null"], 2, "config.yaml: injects nothing; give injection and its rounds, or inject_indices_map"),
        (["--injection.rounds=0"], 2, "config.yaml: injects nothing; give injection and its rounds, or inject"),
        (["--output", "{tmp}/plan.pkl"], 2, "/plan.pkl: the name of a plan must end in .json or .safetensors"),
        (["--output", "{tmp}/there.json"], 2, "/there.json: already exists; delete it or choose another place"),
        (["--global_train_batch_size=1"], 1, "injection round 1, row 0: "),
        ([*KEEP, "--inject_indices_map={tmp}/nowhere.json"], 1, "/nowhere.json: no such injection plan"),
        (
            [*KEEP, "--inject_indices_map={tmp}/there.json"],
            1,
            "/there.json: version 9 of the format, this program reads",
        ),
    ],
)
def test_errors_are_one_line_and_write_nothing(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], status: int, said: str
) -> None:
    (tmp_path / "there.json").write_text('{"format": "knowledge-entropy injection plan", "version": 9}')
    output = [] if "--output" in arguments else ["--output", str(tmp_path / "plan.json")]
    filled = [argument.format(tmp=tmp_path) for argument in arguments]
    assert exit_status(main, [str(world / "config.yaml"), *filled, *output]) == status
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["there.json"]


def test_a_plan_that_is_read_and_written_again_is_the_same_file(tmp_path: Path, world: Path) -> None:
    """A plan that is read and written again is the same file, byte for byte."""
    main([str(world / "config.yaml"), "--output", str(tmp_path / "plan.json")])
    write_plan(tmp_path / "again.json", read_plan(tmp_path / "plan.json"))
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "plan.json").read_bytes()
