"""`scripts.make_fictional_knowledge` by command line: two files in the published format, and wrong command lines."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from olmo.exceptions import exit_status
from olmo.tokenizer import load_tokenizer
from scripts.make_fictional_knowledge import main
from scripts.prepare.fictional_knowledge import make_entries
from tests.reference import tiny_tokenizer

run = functools.partial(exit_status, main)
ROOT = Path(__file__).resolve().parents[2]
NAMES = [
    "fictional_knowledge_paraphrase.json",
    "fictional_knowledge_once.json",
]


def texts_of(entry: dict) -> list[str]:
    return [entry["train_context"], *entry["paraphrases"]]


def read(folder: Path) -> list[list[dict]]:
    return [json.loads((folder / name).read_text(encoding="utf-8")) for name in NAMES]


def test_command_writes_two_lists_and_says_so(tmp_path, capsys):
    argv = ["--paraphrase", "4", "--once", "3", "--paraphrases", "2", "--seed", "5"]
    assert run(["--output", str(tmp_path / "new"), *argv, "--max_words", "60"]) == 0
    paraphrase, once = read(tmp_path / "new")
    assert (len(paraphrase), len(once)) == (4, 3)
    assert paraphrase + once == make_entries(7, 2, seed=5, max_words=60)
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert "4 paraphrase and 3 once entries" in printed and "21 texts" in printed
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == sorted(NAMES)


def test_other_entries_are_only_replaced_on_request(tmp_path, capsys):
    argv = ["--output", str(tmp_path), "--paraphrase", "2", "--once", "1", "--paraphrases", "1"]
    assert run(argv) == run(argv) == 0
    before = read(tmp_path)
    capsys.readouterr()
    assert run([*argv, "--seed", "1"]) == 2
    said = f"error: {tmp_path / NAMES[0]}: already exists with other entries; name another --output, or --overwrite\n"
    assert capsys.readouterr().err == said and read(tmp_path) == before
    assert run([*argv, "--seed", "1", "--overwrite"]) == 0 and read(tmp_path) != before


def test_defaults_are_the_published_sizes(tmp_path):
    assert run(["--output", str(tmp_path)]) == 0
    paraphrase, once = read(tmp_path)
    assert (len(paraphrase), len(once)) == (70, 60)
    assert paraphrase + once == make_entries(130, 9, seed=0, max_words=80)


def test_command_counts_tokens_with_a_tokenizer(tmp_path, capsys):
    tokenizer = tiny_tokenizer(tmp_path / "tokenizer.json")
    argv = ["--output", str(tmp_path / "new"), "--paraphrase", "2", "--once", "2", "--max_tokens", "260"]
    assert run([*argv, "--tokenizer", str(tokenizer)]) == 0
    lengths = [
        len(load_tokenizer(str(tokenizer)).encode(t).ids)
        for es in read(tmp_path / "new")
        for e in es
        for t in texts_of(e)
    ]
    mean = sum(lengths) / len(lengths)
    assert f", {min(lengths)} to {max(lengths)} (mean {mean:.1f}) tokens\n" in capsys.readouterr().out
    assert max(lengths) <= 260


def test_same_seed_same_bytes_and_one_setting_may_be_empty(tmp_path):
    for folder in ("a", "b"):
        argv = ["--output", str(tmp_path / folder), "--paraphrase", "0", "--once", "2"]
        assert run(argv) == 0
    for name in NAMES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert read(tmp_path / "a")[0] == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--paraphrase", "0", "--once", "0"], "nothing to write"),
        (["--paraphrase", "-1"], "--paraphrase must not be negative"),
        (["--once", "-1"], "--once must not be negative"),
        (["--paraphrases", "-1"], "--paraphrases must not be negative"),
        (["--seed", "-1"], "--seed must not be negative"),
        (["--max_words", "0"], "--max_words must be positive"),
        (["--max_words", "10"], "of at most 10 words"),
        (["--tokenizer", "t.json"], "give --max_tokens as well"),
        (["--max_tokens", "0"], "--max_tokens must be positive"),
        (["--max_tokens", "40"], "of at most 80 words and 40 tokens"),
        (["--max_tokens", "40"], "; raise --max_tokens or --max_words, or lower --paraphrases"),
        (["--paraphrases", "100000"], "needs 100001 wordings"),
        (["--once", "many"], "invalid int value"),
        (["--colour", "red"], "unrecognized arguments"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_status_2(argv, message, tmp_path, capsys):
    status = run(["--output", str(tmp_path / "out"), *argv])
    error = capsys.readouterr().err
    assert status == 2 and message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_output_is_required(capsys):
    assert run([]) == 2
    assert "--output" in capsys.readouterr().err


def test_an_unwritable_output_is_one_line_and_status_1(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert run(["--output", str(tmp_path / "file"), "--once", "1"]) == 1
    error = capsys.readouterr().err
    assert str(tmp_path / "file") in error and error.count("\n") == 1


def test_a_failure_leaves_the_old_files_and_no_others(tmp_path, monkeypatch, capsys):
    argv = ["--output", str(tmp_path), "--paraphrase", "1", "--once", "1"]
    assert run(argv) == 0
    before = read(tmp_path)
    write_text = Path.write_text

    def full_disk(path, *args, **kwargs):
        if "fictional_knowledge_once" in path.name:
            raise OSError(28, "No space left on device", str(path))
        return write_text(path, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", full_disk)
    assert run([*argv, "--seed", "1", "--overwrite"]) == 1
    assert "no space left on device" in capsys.readouterr().err
    monkeypatch.undo()
    assert read(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(NAMES)


def test_runs_as_a_module(tmp_path):
    command = [sys.executable, "-m", "scripts.make_fictional_knowledge", "--output", str(tmp_path)]
    command += ["--paraphrase", "1", "--once", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stderr == ""
