"""`python -m scripts.prepare_pubmed`: baseline XML and other text to rows that a run reads; what goes wrong."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from io import BytesIO
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from tokenizers import Tokenizer, models

from olmo.files.lock import Lock
from scripts.prepare import OLMO_TOKENIZER, documents, sampling
from scripts.prepare.demo_text import train_tokenizer
from scripts.prepare.documents import MB, NO_TEXT, hash_of, text_records
from tests.pubmed import (
    EOS,
    FILES,
    RECORDS,
    Contents,
    article,
    article_set,
    expected_texts,
    read,
    run,
    stream_of,
    words,
    write_files,
)
from tests.reference import tiny_config
from tests.running import ROOT, command


@pytest.fixture(scope="module")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_files(tmp_path_factory.mktemp("baseline"), FILES)


@pytest.mark.parametrize(("seed", "instances"), [(0, 30), (1, 200)])
def test_the_command_gives_the_sample_whatever_the_processes(
    tmp_path: Path, baseline: list[Path], seed: int, instances: int
) -> None:
    outputs = {}
    for processes, files in ((1, baseline), (2, baseline[::-1])):
        output = tmp_path / f"data/pubmed{processes}"
        options = (
            f"--output {output} --instances {instances} --sequence_length 64 --seed {seed} --processes {processes}"
        )
        done = command(["-m", "scripts.prepare_pubmed", *options.split(), "--input", *map(str, files)], tmp_path)
        assert done.returncode == 0, done.stderr
        assert not [line for line in done.stderr.splitlines() if not line.startswith("reading: ")]  # when it takes long
        outputs[processes] = {path.name: path.read_bytes() for path in output.iterdir()}
        assert f"read 3 files, {RECORDS} records, 0 of them without PMID" in done.stdout and "MB/s" in done.stdout
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["pubmed1", "pubmed2"]
    assert outputs[1]["data-00000-of-00001.arrow"] == outputs[2]["data-00000-of-00001.arrow"]
    assert outputs[1]["about.json"] == outputs[2]["about.json"]

    stream = stream_of(expected_texts(FILES, seed))[: instances * 64]
    assert read(tmp_path / "data/pubmed1", 64).reshape(-1).tolist() == stream
    about = json.loads(outputs[1]["about.json"])
    inputs = [(path.name, path.stat().st_size, hashlib.md5(path.read_bytes()).hexdigest()) for path in baseline]
    assert about["read"].pop("inputs") == [{"file": n, "bytes": b, "md5": m} for n, b, m in inputs]
    sizes = [len(gzip.decompress(path.read_bytes())) for path in baseline]
    assert about["read"] == {"files": 3, "records": RECORDS, "bytes": sum(sizes)}
    sample = about.pop("sample")
    assert sample["documents"] == stream.count(EOS) + (stream[-1] != EOS)
    gone = ("replaced_or_deleted", "without_text", "same_text")
    assert sample["records"] == sample["documents"] + sum(sample[key] for key in gone)
    assert (about["seed"], about["eos_token_id"], about["tokenizer"]) == (seed, EOS, OLMO_TOKENIZER)


def test_a_run_of_the_trainer_reads_the_folder(tmp_path: Path, baseline: list[Path]) -> None:
    tokenizer = tmp_path / "small.json"
    train_tokenizer((words(i) for i in range(50)), 300).save(str(tokenizer))
    options = ("--instances", 12, "--sequence_length", 32, "--tokenizer", tokenizer)
    assert run("--output", tmp_path / "data", "--input", *baseline, *options) == 0
    rows = read(tmp_path / "data", 32)
    assert rows.shape == (12, 32) and (rows == 0).any() and rows.max() < 300  # <|endoftext|> is 0 there
    config = {
        "run_name": "pubmed",
        "model": dict(OmegaConf.structured(tiny_config(max_sequence_length=32, vocab_size=300, embedding_size=320))),
        "tokenizer": {"identifier": str(tokenizer)},
        "data": {"dataset_path": str(tmp_path / "data")},
        "max_duration": 3,
        "global_train_batch_size": 4,
        "device_train_microbatch_size": 4,
        "precision": "fp32",
        "save_folder": str(tmp_path / "run"),
        "no_pre_train_checkpoint": True,
    }
    OmegaConf.save(OmegaConf.create(config), tmp_path / "config.yaml")
    done = command(["-m", "scripts.train", str(tmp_path / "config.yaml")], tmp_path)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").open()][-1] == 3


def test_the_folder_of_any_model_names_the_end_of_its_documents(
    tmp_path: Path, baseline: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """And its tokenizer; the output states which they were. A vocabulary beyond 65,536 tokens is no obstacle."""
    folder = tmp_path / "model"
    folder.mkdir()
    tokenizer = train_tokenizer((words(i) for i in range(50)), 300)
    tokenizer.add_special_tokens([f"<extra{i}>" for i in range(66_000)] + ["<end>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<end>"}', "utf-8")
    (folder / "config.json").write_text('{"model_type": "llama", "eos_token_id": [2, 3]}', "utf-8")
    end = tokenizer.token_to_id("<end>")
    assert end > 2**16
    options = ("--instances", 12, "--sequence_length", 32, "--input", *baseline, "--tokenizer")
    for number, identifier in enumerate((folder, folder / "tokenizer.json")):
        output = tmp_path / f"data{number}"
        assert run("--output", output, *options, identifier) == 0
        rows = read(output, 32)
        assert (rows == end).sum() >= 2 and not (rows == 0).any()
        about = json.loads((output / "about.json").read_text())
        assert (about["eos_token_id"], about["tokenizer"]) == (end, str(identifier))
        assert f"documents end with token {end}" in capsys.readouterr().out


def test_more_than_there_is_names_how_many_there_are(
    tmp_path: Path, baseline: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    have = len(stream_of(expected_texts(FILES, 0)))
    arguments = ("--output", tmp_path / "out", "--sequence_length", 64, "--input", *baseline, "--instances")
    assert run(*arguments, have // 64 + 1) == 1
    stderr = capsys.readouterr().err
    assert f"3 files hold {have} tokens" in stderr and f"--instances {have // 64} is the most" in stderr
    assert list(tmp_path.iterdir()) == []
    assert run(*arguments, have // 64) == 0


def test_no_document_at_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (path,) = write_files(tmp_path, [Contents([(1, 1, None)], [])])
    assert run("--output", tmp_path / "out", "--input", path) == 1
    assert "hold 0 tokens in 0 documents (of 1 records 1 without text" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "taken"], "taken exists; remove it or choose another --output"),
        (["--output", "o", "--instances", "0"], "--instances must be at least 1"),
        (["--output", "o", "--seed", "-1"], "--seed must be in"),
        (["--output", "o", "--corpus", "c4"], "--corpus c4 needs --input"),
        (["--output", "o", "--input", "a", "--files", "3"], "are for downloading"),
        (["--output", "o", "--input", "a", "--tokenizer", "no.json"], "no.json: no such tokenizer file"),
        (["--output", "o", "--input", "a", "--tokenizer", "bare.json"], "give its id with --eos_token_id"),
        (["--output", "o", "--input", "no*.gz"], "--input no*.gz: no such file"),
    ],
)
def test_wrong_command_lines(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("taken").mkdir()
    Path("taken/file").touch()
    Path("a").write_bytes(gzip.compress(article_set(article(1))))
    Tokenizer(models.WordLevel({"a": 0}, "a")).save("bare.json")
    assert run(*arguments) == (1 if "no such" in message else 2)
    stderr = capsys.readouterr().err
    assert stderr.startswith("error: ") and message in stderr and stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "bare.json", "taken"]


def test_an_md5_beside_a_file_is_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (path,) = write_files(tmp_path, FILES[:1])
    stated = path.with_name(path.name + ".md5")
    options = ("--output", tmp_path / "out", "--input", path, "--instances", 2)
    stated.write_text(f"MD5({path.name})= {'0' * 32}\n")
    assert run(*options) == 1
    assert f"{path}: does not have the MD5 that {stated.name} states" in capsys.readouterr().err
    stated.write_text(f"MD5({path.name})= {hashlib.md5(path.read_bytes()).hexdigest().upper()}\n")
    assert run(*options) == 0


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_an_end_from_outside_leaves_neither_files_nor_processes(
    tmp_path: Path, number: signal.Signals, status: int
) -> None:
    lines = gzip.compress(json.dumps({"text": words(1, 10**5)}).encode() + b"\n") * 500  # minutes of work
    for name in "ab":
        (tmp_path / f"{name}.json.gz").write_bytes(lines)
    arguments = "-m scripts.prepare_pubmed --output out --corpus c4 --processes 2 --input a.json.gz b.json.gz"
    process = subprocess.Popen(
        [sys.executable, *arguments.split(" ")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    for _ in range(2000):
        if len(list(tmp_path.glob(".out.*/*/*.tokens"))) == 2:
            break
        time.sleep(0.01)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=20)  # returns when nobody holds its end of the pipe
    said = "interrupted\n" if number == signal.SIGINT else "ended by SIGTERM\n"
    assert (process.returncode, stderr) == (status, said)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json.gz", "b.json.gz"]


def test_c4_and_plain_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [*(f"{words(i)}\n  kept as it is " for i in range(50)), "", " \n"]
    lines = [json.dumps({"text": text, "url": "u"}, ensure_ascii=i % 2 == 0) for i, text in enumerate(texts)]
    (tmp_path / "c4-train.00000.json.gz").write_bytes(gzip.compress("\n".join(lines[:30]).encode()))
    (tmp_path / "c4-train.00001.json.gz").write_bytes(gzip.compress("\n".join([*lines[20:], ""]).encode()))
    ordered = sorted((text for text in texts if text.strip()), key=lambda text: hash_of(text.encode(), 5))
    options = ("--instances", 50, "--sequence_length", 64, "--seed", 5)
    assert run("--output", tmp_path / "c4", "--corpus", "c4", "--input", tmp_path / "c4*.gz", *options) == 0
    stream = stream_of(ordered)[: 50 * 64]
    assert read(tmp_path / "c4", 64).reshape(-1).tolist() == stream
    sample = json.loads((tmp_path / "c4/about.json").read_text())["sample"]
    assert 0 < sample["same_text"] <= 10 and sample["replaced_or_deleted"] == 0

    for i, text in enumerate(texts[:40]):
        (tmp_path / f"{i}.txt").write_text(text, encoding="utf-8")
    (tmp_path / "more.jsonl").write_text("\n".join(lines[40:]))
    files = (tmp_path / "*.txt", tmp_path / "more.jsonl")
    assert run("--output", tmp_path / "text", "--corpus", "text", "--input", *files, *options) == 0
    assert read(tmp_path / "text", 64).reshape(-1).tolist() == stream
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "name, what", [("a.jsonl.gz", "line 1 has more than 2 MB"), ("a.txt.gz", "unpacks to more than 100 times its size")]
)
def test_a_document_without_end_is_not_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str, what: str
) -> None:
    monkeypatch.setattr(documents, "LONGEST", 2 * MB)
    monkeypatch.setattr(sampling, "LONGEST", 2 * MB)
    (tmp_path / name).write_bytes(gzip.compress(b'{"text": "' + b"a" * 3 * MB))
    assert run("--output", tmp_path / "out", "--corpus", "text", "--input", tmp_path / name) == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / name}: {what}")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_plain_text_is_a_document_of_any_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "LONGEST", 10)
    (tmp_path / "a.txt").write_text(words(20))
    options = ("--corpus", "text", "--instances", 2, "--sequence_length", 8)
    assert run("--output", tmp_path / "out", "--input", tmp_path / "a.txt", *options) == 0
    assert read(tmp_path / "out", 8).shape == (2, 8)


def test_one_process_writes_an_output_and_deletes_what_a_killed_one_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text(words(1))
    arguments = ("--output", tmp_path / "out", "--corpus", "text", "--input", tmp_path / "a.txt")
    arguments += ("--instances", 1, "--sequence_length", 8)
    left = tmp_path / ".out.abcd.partial"
    left.mkdir()
    (left / "rows").write_bytes(b"half")
    with Lock(tmp_path / ".out.lock"):
        assert run(*arguments) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'out'}: another process is writing it\n"
    assert left.exists()
    assert run(*arguments) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "out"]


@pytest.mark.parametrize(
    "line", [b"[1]", b'{"text": 3}', b'{"url": "u"}', b"{", b'"text"', b'{"text": "\\ud800"}', b'{"text": "\xff"}']
)
def test_a_bad_line_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], line: bytes) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'{"text": "fine"}\n\n' + line)
    assert run("--output", tmp_path / "out", "--corpus", "c4", "--input", path) == 1
    assert f"{path}: line 3 is not a JSON object with a string 'text'" in capsys.readouterr().err
    assert next(text_records(BytesIO(b" "), 0, 2**64, False, Counter())).kind == NO_TEXT
    path = path.rename(tmp_path / "a.txt")
    path.write_bytes(b"\xff")
    assert run("--output", tmp_path / "out", "--corpus", "text", "--input", path) == 1
    assert f"{path}: not UTF-8 text" in capsys.readouterr().err
