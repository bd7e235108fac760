"""Entries, probes, and pickles that try to run code."""

from __future__ import annotations

import io
import json
import os
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from olmo.knowledge.entries import load_entries, load_injection_map, make_probes
from tests.published import INJECTION_MAP, ONCE, PARAPHRASE, fictional_knowledge, olmo_tokenizer
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
        ("train_context", None, "'train_context' must be a text"),
        ("train_context", "", "'train_context' must be a text"),
        ("train_context", ["text"], "'train_context' must be a text"),
        ("paraphrases", "text", "'paraphrases' must be a list of texts"),
        ("paraphrases", ["text", ""], "'paraphrases' must be a list of texts"),
        ("mem_input", [3], "'mem_input' must be a list of texts"),
        ("gen_target", ["one of two"], "2 'gen_input' but 1 'gen_target'"),
        ("hard_gen_target", None, "'hard_gen_target' must be a list of texts"),
    ],
)
def test_errors_name_file_entry_and_field(tmp_path: Path, field: str, value: Any, said: str) -> None:
    path = write(tmp_path / "bad.json", [raw_entry(), {**raw_entry(), field: value}])
    with pytest.raises(ValueError) as caught:
        load_entries(path)
    assert str(caught.value) == f"{path}: entry 1: {said}"


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


# --- the injection map -------------------------------------------------------------------------------------------


def test_the_published_map_is_read() -> None:
    rounds = load_injection_map(fictional_knowledge() / INJECTION_MAP)
    assert list(rounds) == list(range(1, 11))
    assert [len(texts) for texts in rounds.values()] == [76] * 10
    assert sum(len(text) for texts in rounds.values() for text in texts) == 271_407
    assert all(0 <= token <= 50279 for texts in rounds.values() for text in texts for token in text)
    assert all(text[-1] == 50279 for texts in rounds.values() for text in texts)


def test_a_map_of_views_into_shared_storage_is_read(tmp_path: Path) -> None:
    base = torch.arange(20)
    rounds = {2: [base[3:7], base[::2].clone()], 1: [base[1::4]]}  # offset, copy, stride
    path = tmp_path / "map.pkl"
    path.write_bytes(pickle.dumps(rounds))
    assert load_injection_map(path) == {1: [[1, 5, 9, 13, 17]], 2: [[3, 4, 5, 6], list(range(0, 20, 2))]}


class Calls:
    """Pickles to a call of `function(*arguments)` when it is loaded."""

    def __init__(self, function: Any, *arguments: Any):
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


class SomeClass:
    """A class of this file that a map has no business naming."""


def torch_bytes(content: Any, legacy: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def hostile(kind: str, touched: Path) -> Any:
    bomb = Calls(os.system, f"touch '{touched}'")
    rebuild, load = torch._utils._rebuild_tensor_v2, torch.storage._load_from_bytes
    return {
        "call": bomb,
        "call in a round": {1: [torch.arange(3), bomb]},
        "eval": {1: [Calls(eval, f"open({str(touched)!r}, 'w')")]},
        "open": {1: [Calls(open, str(touched), "w")]},
        "class": {1: [SomeClass()]},
        "torch.load": {1: [Calls(torch.load, str(touched))]},
        "getattr": {1: [Calls(getattr, Calls(__import__, "os"), "system")]},
        "nested storage": {1: [Calls(load, pickle.dumps(bomb))]},
        "nested zip storage": {1: [Calls(load, torch_bytes({"a": bomb}, legacy=False))]},
        "nested legacy storage": {1: [Calls(load, torch_bytes([bomb], legacy=True))]},
        "storage that is none": {1: [Calls(rebuild, 3, 0, (3,), (1,), False, {})]},
        "view beyond its storage": {
            1: [Calls(rebuild, Calls(load, torch_bytes(torch.arange(3).storage(), True)), 0, (10**6,), (1,), False, {})]
        },
        "negative offset": {
            1: [Calls(rebuild, Calls(load, torch_bytes(torch.arange(3).storage(), True)), -8, (3,), (1,), False, {})]
        },
        "one token a billion times": {
            1: [Calls(rebuild, Calls(load, torch_bytes(torch.arange(3).storage(), True)), 0, (10**9,), (0,), False, {})]
        },
    }[kind]


HOSTILE = [
    "call",
    "call in a round",
    "eval",
    "open",
    "class",
    "torch.load",
    "getattr",
    "nested storage",
    "nested zip storage",
    "nested legacy storage",
    "storage that is none",
    "view beyond its storage",
    "negative offset",
    "one token a billion times",
]


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated", "ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_pickle_is_refused_and_runs_nothing(tmp_path: Path, kind: str, protocol: int) -> None:
    path, touched = tmp_path / "map.pkl", tmp_path / "touched"
    path.write_bytes(pickle.dumps(hostile(kind, touched), protocol=protocol))
    with pytest.raises(ValueError, match=r"map\.pkl: no safe injection map"):
        load_injection_map(path)
    assert not touched.exists()


@pytest.mark.parametrize("kind", ["call", "call in a round", "eval", "open", "nested storage"])
def test_the_hostile_pickles_are_live(tmp_path: Path, kind: str) -> None:
    """What a plain unpickler does with them; otherwise the test above would prove nothing."""
    touched = tmp_path / "touched"
    content = hostile(kind, touched)
    if kind == "nested storage":
        content = content[1][0].call[1][0]  # torch.load itself refuses by now; what lies inside does not
        pickle.loads(content)
    else:
        pickle.loads(pickle.dumps(content))
    assert touched.exists()


@pytest.mark.parametrize(
    "content",
    [
        [],
        {},
        {0: [torch.arange(3)]},
        {1: [torch.arange(3)], 3: [torch.arange(3)]},
        {"1": [torch.arange(3)]},
        {1: torch.arange(3)},
        {1: (torch.arange(3),)},
        {1: [[1, 2, 3]]},
        {1: [torch.arange(3, dtype=torch.int32)]},
        {1: [torch.arange(3.0)]},
        {1: [torch.arange(4).view(2, 2)]},
        {1: [torch.tensor(3)]},
        {1: [torch.arange(0)]},
        {1: ["text"]},
        3,
        None,
    ],
    ids=repr,
)
def test_a_map_of_another_shape_is_an_error_that_names_the_file(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "map.pkl"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=r"map\.pkl: "):
        load_injection_map(path)


def test_a_truncated_map_is_an_error_wherever_it_ends(tmp_path: Path) -> None:
    path = tmp_path / "map.pkl"
    whole = pickle.dumps({1: [torch.arange(5), torch.arange(9)], 2: [torch.arange(4)]})
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"map\.pkl: "):
            load_injection_map(path)


def test_a_missing_map_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pkl"):
        load_injection_map(tmp_path / "nowhere.pkl")
