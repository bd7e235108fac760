"""Text as data: packed to full instances as a tokenizer packs it directly, or an instance each."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from analysis import entropy
from analysis.texts import eos_of, fill, packed
from olmo.exceptions import exit_status
from scripts.prepare.sampling import Settings, collect, resolve
from tests.analysis.measuring import LENGTH, TEXTS, check, direct, made_model, olmo_places, result_in, run, write
from tests.reference import tiny_tokenizer, to_transformers

KINDS = ["list.json", "object.json", "lines.jsonl", "lines.json", "plain.txt", "lines.jsonl.gz", "plain.gz"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_file(str(tiny_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")))


def write_texts(folder: Path, name: str) -> tuple[Path, list[str]]:
    """TEXTS in a file of some kind, and its documents: a plain text is one."""
    objects = [{"text": text, "id": 1} for text in TEXTS]
    kind = name.split(".")[0]
    content = {
        "list": json.dumps(objects, indent=1),
        "object": json.dumps(objects[2], indent=1),
        "lines": "".join(json.dumps(one) + "\n" for one in objects),
        "plain": "\n\n".join(TEXTS) + "\n",
    }[kind]
    path = folder / name
    path.write_bytes(gzip.compress(content.encode()) if name.endswith(".gz") else content.encode())
    return path, {"plain": [content], "object": [TEXTS[2]]}.get(kind, TEXTS)


@pytest.mark.parametrize("kind", KINDS)
def test_documents_are_packed_as_a_tokenizer_does_directly(kind: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    path, documents = write_texts(tmp_path, kind)
    stream = [i for text in documents for i in [*tokenizer.encode(text, add_special_tokens=False).ids, 0]]
    count = len(stream) // 8
    rows = packed(path, tokenizer, 0, count, 8)
    np.testing.assert_array_equal(rows, np.reshape(stream[: count * 8], (count, 8)))
    with pytest.raises(ValueError, match=f"{len(stream)} tokens, {count} instances of 8; .* use --data_size {count}"):
        packed(path, tokenizer, 0, count + 1, 8)


def test_documents_are_those_that_are_prepared_for_training(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path, _ = write_texts(tmp_path, "lines.jsonl")
    tiny_tokenizer(tmp_path / "tokenizer.json")
    events, _, _ = collect([path], Settings("text", 0, str(tmp_path / "tokenizer.json"), 0, "<u2"), tmp_path, 1, 1e9)
    documents, _ = resolve(events)
    spilled = np.concatenate([np.fromfile(file, "<u2") for file in tmp_path.glob("*.tokens")])
    prepared = np.empty(int(documents["tokens"].sum()), np.int64)
    in_file_order = np.sort(documents, order="start")
    fill(prepared, (spilled[d["start"] // 2 :][: d["tokens"]] for d in in_file_order))
    np.testing.assert_array_equal(packed(path, tokenizer, 0, len(prepared), 1), prepared[:, None])


def test_only_the_start_of_a_long_plain_text_is_encoded(tmp_path: Path, tokenizer: Tokenizer) -> None:
    text = " ".join(TEXTS) * 4000
    (tmp_path / "a.txt").write_text(text)
    read: list[int] = []

    class Counting:
        def encode_batch(self, texts: list[str], add_special_tokens: bool) -> object:
            read.append(sum(map(len, texts)))
            return tokenizer.encode_batch(texts, add_special_tokens=add_special_tokens)

    rows = packed(tmp_path / "a.txt", Counting(), 0, 4000, 16)  # type: ignore[arg-type]
    whole = tokenizer.encode(text, add_special_tokens=False).ids[: 4000 * 16]
    assert np.concatenate(rows).tolist() == whole and read[0] == 2**16 and len(text) / 2 > read[-1] > read[0]


def test_the_result_is_that_of_full_instances_and_states_their_lengths(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path / "checkpoint", made_model(0), str(tiny_tokenizer(tmp_path / "tokenizer.json")))
    path, _ = write_texts(tmp_path, "lines.jsonl")
    argv = ["--checkpoint", folder, "--data", path, "--output"]
    run(*argv, tmp_path / "full", "--data_size", 3)
    shown = capsys.readouterr()
    stream = [i for text in TEXTS for i in [*tokenizer.encode(text, add_special_tokens=False).ids, 0]]
    rows = np.reshape(stream[: 3 * LENGTH], (3, LENGTH))
    check(tmp_path / "full", direct(to_transformers(made_model(0)), olmo_places(), rows))
    result = result_in(tmp_path / "full")
    assert f"3 instances of {LENGTH} tokens, at most" in shown.out and not shown.err
    assert (result["number_of_tokens"], result["mean_length"], result["shortest_length"]) == (48, LENGTH, LENGTH)
    assert result["data"]["pack"] == "eos"
    run(*argv, tmp_path / "short", "--data_size", 5, "--pack", "none")
    result, shown = result_in(tmp_path / "short"), capsys.readouterr()
    lengths = [len(tokenizer.encode(text).ids[:LENGTH]) for text in TEXTS]
    assert (result["mean_length"], result["shortest_length"]) == (sum(lengths) / 5, min(lengths))
    assert f"5 instances ({sum(lengths)} tokens, mean {sum(lengths) / 5:.1f}, shortest {min(lengths)})" in shown.out
    assert result["data"]["pack"] is None and ("warning: " in shown.err) == (sum(lengths) / 5 < LENGTH / 2)
    run(*argv, tmp_path / "few", "--data_size", 2, "--pack", "none", "--sequence_length", LENGTH)
    (tmp_path / "tiny.txt").write_text("a\n\nof\n\nit")
    run("--checkpoint", folder, "--data", tmp_path / "tiny.txt", "--data_size", 3, "--pack", "none", "--output", folder)
    assert capsys.readouterr().err.startswith("warning: ")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--data", "lines.jsonl"], "token 50 ends a document, the tokenizer has none; --pack none measures each text"),
        (["--data", "tokens.npy", "--pack", "none"], "--pack: only for text as --data; tokens.npy holds tokens"),
        (["--data", "tokens.npy", "--tokenizer", "x"], "--tokenizer: only for text as --data; tokens.npy holds tokens"),
    ],
)
def test_what_cannot_be_packed_is_one_line(
    argv: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_texts(tmp_path, "lines.jsonl")
    vocabulary = {"the": 0, "owl": 1}
    (tmp_path / "words.json").write_text(
        json.dumps({"version": "1.0", "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "the"}})
    )
    folder = write(tmp_path / "checkpoint", made_model(0), "words.json")
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("eos_token_id: 0", "eos_token_id: 50"))
    assert exit_status(entropy.main, ["--checkpoint", "checkpoint", "--output", "out", *argv]) == 2
    shown = capsys.readouterr().err
    assert said in shown and shown.count("\n") == 1


def test_documents_end_as_where_the_model_trains(tmp_path: Path) -> None:
    """By the tokenizer's EOS, which need not be the first of config.json's list, as of chat models."""
    vocabulary = {"the": 0, "owl": 1, "of": 2}
    words = {"version": "1.0", "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "the"}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(words))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": [2, 1]}))
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert eos_of(tmp_path, tokenizer) == 2
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "owl"}))
    assert eos_of(tmp_path, tokenizer) == 1
