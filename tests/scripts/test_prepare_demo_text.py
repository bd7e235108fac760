"""`scripts.prepare_demo_text` by command line."""

import functools
import json

import datasets
import pytest
from tokenizers import Tokenizer, models

from olmo.exceptions import exit_status
from scripts.prepare import demo_sources, demo_text
from scripts.prepare_demo_text import main

run = functools.partial(exit_status, main)
SMALLEST = [s for s in demo_sources.SOURCES if s.name in ("piqa, the rest", "openbookqa test")]


@pytest.mark.parametrize(
    "flags, status, says",
    [
        ([], 2, "--output"),
        (["--output", "{out}", "--vocab_size", "257"], 2, "--vocab_size"),
        (["--output", "{out}", "--vocab_size", "65537"], 2, "--vocab_size"),
        (["--output", "{out}", "--sequence_length", "0"], 2, "--sequence_length"),
        (["--output", "{out}", "--seed", "-1"], 2, "--seed"),
        (["--output", "{out}", "--sede", "1"], 2, "--sede"),
        (["--output", "{out}", "--seed", "one"], 2, "--seed"),
        (["--output", "{out}", "--tokenizer", "a", "--vocab_size", "300"], 2, "--tokenizer trains none"),
        # Before any text is read, which takes longer.
        (["--output", "{out}", "--tokenizer", "{out}.none"], 1, "no such tokenizer file or folder"),
        (["--output", "{out}", "--tokenizer", "{out}.json"], 2, "name it as eos_token in its tokenizer_config.json"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_status_2(tmp_path, capsys, flags, status, says):
    out = tmp_path / "out"
    Tokenizer(models.WordLevel({"a": 0}, "a")).save(f"{out}.json")
    assert run([flag.format(out=out) for flag in flags]) == status
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert says in error
    assert not out.exists()


def test_flags_reach_the_output_and_finished_work_is_not_done_twice(tmp_path, monkeypatch, capsys):
    small = tmp_path / "out"
    whole = demo_text.prepare
    monkeypatch.setattr(demo_text, "prepare", lambda *args: whole(*args, sources=SMALLEST))
    flags = [
        "--vocab_size",
        "300",
        "--sequence_length",
        "32",
        "--seed",
        "7",
        "--output",
        str(small),
    ]
    assert run(flags) == 0
    summary = json.loads((small / demo_text.SUMMARY).read_text())
    settings = summary["settings"]
    assert [settings[k] for k in ("vocab_size", "sequence_length", "seed")] == [300, 32, 7]
    assert Tokenizer.from_file(str(small / "tokenizer.json")).get_vocab_size() == 300
    assert len(datasets.load_from_disk(str(small / demo_text.SCIENCE_TRAIN))[0]["input_ids"]) == 32
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]

    monkeypatch.setattr(demo_text, "prepare", lambda *args: pytest.fail("done twice"))
    assert run(flags) == 0
    assert "nothing to do" in capsys.readouterr().err
    assert run([*flags, "--seed", "8"]) == 1  # other settings: not ours to replace
    (small / "general_train.npy").unlink()
    assert run(flags) == 1
    errors = capsys.readouterr().err
    assert errors.count("holds something else") == errors.count("\n") == 2


def test_a_missing_package_is_one_line_and_status_1(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo_sources.importlib.util, "find_spec", lambda name: None)
    assert run(["--output", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "pip install 'knowledge-entropy[demo]'" in error
