"""Entries and probes."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from olmo.knowledge.entries import load_entries, make_probes
from tests.published import ONCE, PARAPHRASE, fictional_knowledge, olmo_tokenizer
from tests.reference import tiny_tokenizer

KINDS = {"memorization": "mem", "semantic": "gen", "composition": "hard_gen"}


def raw_entry(name: str = "Anwen") -> dict[str, Any]:
    return {
        "train_context": f"{name} is the warden of the silver lake.",
        "paraphrases": [f"The silver lake has the warden {name}."],
        "mem_input": [f"{name} is the warden of the"],
        "mem_target": ["silver lake"],
        "gen_input": ["The lake is made of", "A lake"],
        "gen_target": ["silver", "of silver"],
        "hard_gen_input": ["A warden sees the metal"],
        "hard_gen_target": ["silver"],
    }


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_file(str(tiny_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")))


# --- JSON --------------------------------------------------------------------------------------------------------


def test_an_entry_holds_what_the_file_says(tmp_path: Path) -> None:
    (entry,) = load_entries(write(tmp_path / "one.json", [raw_entry()]))
    assert entry.train_context == raw_entry()["train_context"]
    assert entry.paraphrases == tuple(raw_entry()["paraphrases"])
    assert entry.probes["semantic"] == (("The lake is made of", "silver"), ("A lake", "of silver"))


def test_a_part_of_a_file(tmp_path: Path) -> None:
    path = write(tmp_path / "all.json", [raw_entry(name) for name in ("Anwen", "Bryn", "Cadfael")])
    whole = load_entries(path)
    assert load_entries(f"{path}#1-2") == whole[1:] and load_entries(f"{path}#0-0") == whole[:1]
    for part in ("0-3", "2-1"):
        with pytest.raises(ValueError, match=rf"all\.json#{part}: the file has entries 0 to 2$"):
            load_entries(f"{path}#{part}")


def test_published_files_hold_130_entries_and_1950_probes() -> None:
    folder = fictional_knowledge()
    raw = {name: json.loads((folder / name).read_text(encoding="utf-8")) for name in (PARAPHRASE, ONCE)}
    assert [len(raw[name]) for name in (PARAPHRASE, ONCE)] == [70, 60]
    tokenizer = olmo_tokenizer()
    probes = []
    for setting, name in (("paraphrase", PARAPHRASE), ("once", ONCE)):
        entries = load_entries(folder / name)
        assert [e.train_context for e in entries] == [r["train_context"] for r in raw[name]]
        assert [list(e.paraphrases) for e in entries] == [r["paraphrases"] for r in raw[name]]
        probes += make_probes(entries, setting, tokenizer)
    assert len(probes) == 1950
    each = Counter((p.setting, p.entry) for p in probes)
    assert len(each) == 130 and set(each.values()) == {15}
    for probe in probes:
        entry = raw[PARAPHRASE if probe.setting == "paraphrase" else ONCE][probe.entry]
        prefix = KINDS[probe.kind]
        prompt, target = entry[f"{prefix}_input"][probe.index], entry[f"{prefix}_target"][probe.index]
        whole = tokenizer.encode(f"{prompt} {target}", add_special_tokens=False).ids
        assert list(probe.input_ids) == whole
        assert probe.target_start == len(tokenizer.encode(prompt, add_special_tokens=False).ids)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("train_context", None, "'train_context' must be a string, not empty and without lone surrogates"),
        ("train_context", "", "'train_context' must be a string, not empty and without lone surrogates"),
        ("train_context", " \n", "'train_context' must be a string, not empty and without lone surrogates"),
        ("train_context", "half \ud800", "'train_context' must be a string, not empty and without lone surrogates"),
        ("train_context", ["text"], "'train_context' must be a string, not empty and without lone surrogates"),
        ("paraphrases", "text", "'paraphrases' must be a list of strings, none empty or with lone surrogates"),
        ("paraphrases", ["text", ""], "'paraphrases' must be a list of strings, none empty or with lone surrogates"),
        ("mem_input", [3], "'mem_input' must be a list of strings, none empty or with lone surrogates"),
        ("gen_target", ["one of two"], "2 'gen_input' but 1 'gen_target'"),
        ("hard_gen_target", None, "'hard_gen_target' must be a list of strings, none empty or with lone surrogates"),
    ],
)
def test_errors_name_file_entry_and_field(tmp_path: Path, field: str, value: Any, said: str) -> None:
    path = write(tmp_path / "bad.json", [raw_entry(), {**raw_entry(), field: value}])
    with pytest.raises(ValueError) as caught:
        load_entries(path)
    assert str(caught.value) == f"{path}: entry 1: {said}"


def test_all_that_is_wrong_is_one_error(tmp_path: Path) -> None:
    wrong = [{**raw_entry(), "paraphrases": 3, "mem_input": []} for _ in range(4)]
    with pytest.raises(ValueError) as caught:
        load_entries(write(tmp_path / "bad.json", [raw_entry(), *wrong]))
    assert str(caught.value).startswith(
        f"{tmp_path / 'bad.json'}: entry 1: 0 'mem_input' but 1 'mem_target'; entry 1: "
    )
    assert "; entry 2: " in str(caught.value) and str(caught.value).endswith("; and 3 more")


def test_a_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    path = write(tmp_path / "marked.json", [raw_entry()])
    expected = load_entries(path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load_entries(path) == expected


@pytest.mark.parametrize("field", sorted(raw_entry()))
def test_a_field_that_is_not_there_is_named(tmp_path: Path, field: str) -> None:
    entry = raw_entry()
    del entry[field]
    with pytest.raises(ValueError, match=rf"entry 0: .*'{field}'"):
        load_entries(write(tmp_path / "bad.json", [entry]))


@pytest.mark.parametrize("content", ["[", '"text"', "{}", "[]", "[3]", "\xff\xfe"])
def test_other_content_is_an_error_that_names_the_file(tmp_path: Path, content: str) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=r"bad\.json: "):
        load_entries(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
        load_entries(tmp_path / "nowhere.json")


# --- probes ------------------------------------------------------------------------------------------------------


def test_probes_come_entry_by_entry_and_kind_by_kind(tmp_path: Path, tokenizer: Tokenizer) -> None:
    entries = load_entries(write(tmp_path / "two.json", [raw_entry(), raw_entry("Bryn")]))
    places = [(p.entry, p.kind, p.index) for p in make_probes(entries, "once", tokenizer)]
    of_one = [("memorization", 0), ("semantic", 0), ("semantic", 1), ("composition", 0)]
    assert places == [(number, kind, index) for number in (0, 1) for kind, index in of_one]
    only = make_probes(entries, "once", tokenizer, ["composition"])
    assert [(p.entry, p.kind) for p in only] == [(0, "composition"), (1, "composition")]


def test_the_target_span_is_every_token_after_those_of_the_input(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (entry,) = load_entries(write(tmp_path / "one.json", [raw_entry()]))
    for probe in make_probes([entry], "once", tokenizer):
        prompt, target = entry.probes[probe.kind][probe.index]
        assert tokenizer.decode(list(probe.input_ids[: probe.target_start])) == prompt
        assert tokenizer.decode(list(probe.input_ids[probe.target_start :])) == f" {target}"


def test_a_probe_without_target_span_is_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    # The tiny tokenizer drops what is not ASCII, so this prompt has no token at all.
    entries = load_entries(write(tmp_path / "one.json", [{**raw_entry(), "mem_input": ["éé"]}]))
    with pytest.raises(ValueError, match="once entry 0, memorization 0: no target span in 'éé silver lake'"):
        make_probes(entries, "once", tokenizer)
