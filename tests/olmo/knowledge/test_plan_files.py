"""Plans written and read as JSON and safetensors, and errors that name file and place."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from olmo.exceptions import ConfigurationError
from olmo.knowledge.plan import Text
from olmo.knowledge.plan_files import PlanFile, read_plan, write_plan
from tests.published import INJECTION_MAP, fictional_knowledge

EOS = 50279


def tokens_of(plan: PlanFile) -> list[list[list[int]]]:
    return [[list(text.input_ids) for text in texts] for texts in plan.rounds]


# --- our own format ----------------------------------------------------------------------------------------------

ANY_TEXT = st.builds(
    lambda entry, ids, wording: Text(entry, (*ids, EOS), wording),
    st.text(min_size=1, max_size=8),
    st.lists(st.integers(0, 2**31 - 1), max_size=6),
    st.none() | st.text(max_size=12),
)
ANY_ROUNDS = st.lists(st.lists(ANY_TEXT, max_size=5).map(tuple), min_size=1, max_size=4).map(tuple)


def wordings(plan: PlanFile) -> list[list[str | None]]:
    return [[text.wording for text in texts] for texts in plan.rounds]


@settings(max_examples=30)
@given(rounds=ANY_ROUNDS, tokenizer=st.none() | st.text(max_size=9), by_step=st.booleans(), data=st.data())
def test_what_is_written_is_what_is_read(
    tmp_path_factory: pytest.TempPathFactory,
    rounds: tuple[tuple[Text, ...], ...],
    tokenizer: str | None,
    by_step: bool,
    data: st.DataObject,
) -> None:
    count = len(rounds)
    steps = st.sets(st.integers(0, 10**6), min_size=count, max_size=count).map(sorted).map(tuple)
    plan = PlanFile(rounds, data.draw(steps) if by_step else None, tokenizer, EOS)
    folder = tmp_path_factory.mktemp("plans")
    for suffix in (".json", ".safetensors"):
        write_plan(folder / f"plan{suffix}", plan)
        assert read_plan(folder / f"plan{suffix}") == plan
    assert wordings(read_plan(folder / "plan.json")) == wordings(plan)  # of which equality does not tell
    assert sorted(path.name for path in folder.iterdir()) == ["plan.json", "plan.safetensors"]


def test_json_has_a_line_a_text_that_a_person_can_read(tmp_path: Path) -> None:
    plan = PlanFile(((Text("once/3", (5, 6, 0), "Anwën waits."), Text("map/1", (7, 0))),), None, "gpt2", 0)
    write_plan(tmp_path / "plan.json", plan)
    assert (tmp_path / "plan.json").read_text(encoding="utf-8").splitlines() == [
        "{",
        '  "format": "knowledge-entropy injection plan",',
        '  "version": 1,',
        '  "tokenizer": "gpt2",',
        '  "eos_token_id": 0,',
        '  "steps_passed": null,',
        '  "rounds": [',
        "    [",
        '      {"entry": "once/3", "text": "Anwën waits.", "input_ids": [5, 6, 0]},',
        '      {"entry": "map/1", "input_ids": [7, 0]}',
        "    ]",
        "  ]",
        "}",
    ]


def test_a_plan_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    plan = PlanFile(((Text("a", (2**40, 0)),),), None, None, 0)  # beyond int32
    with pytest.raises((RuntimeError, ValueError, OverflowError)):
        write_plan(tmp_path / "plan.safetensors", plan)
    with pytest.raises(UnicodeEncodeError):  # while writing
        write_plan(tmp_path / "plan.json", PlanFile(((Text("a", (5, 0), "half a pair: \ud800"),),), None, None, 0))
    with pytest.raises(ConfigurationError, match=r"plan\.pkl: the name of a plan must end in \.json or \.safetensors"):
        write_plan(tmp_path / "plan.pkl", plan)
    assert list(tmp_path.iterdir()) == []


def raw_plan(**changed: Any) -> dict[str, Any]:
    good = {
        "format": "knowledge-entropy injection plan",
        "version": 1,
        "tokenizer": None,
        "eos_token_id": 0,
        "steps_passed": None,
        "rounds": [[{"entry": "a", "input_ids": [5, 0]}], [{"entry": "b", "input_ids": [6, 0], "text": "b"}]],
    }
    return {key: value for key, value in {**good, **changed}.items() if value != "left out"}


def one_text(**changed: Any) -> dict[str, Any]:
    return raw_plan(rounds=[[{"entry": "a", "input_ids": [5, 0], **changed}]])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([], "not an injection plan; its 'format' is not 'knowledge-entropy injection plan'"),
        ({"1": [[5, 0]]}, "not an injection plan; its 'format' is not"),
        (raw_plan(version=2), "version 2 of the format, this program reads version 1"),
        (raw_plan(version=2, rounds="left out"), "version 2 of the format, this program reads version 1"),
        (raw_plan(version="left out"), "version None of the format, this program reads version 1"),
        (raw_plan(rounds="left out"), "'rounds' is missing"),
        (raw_plan(note="mine"), "unknown key 'note'"),
        (raw_plan(tokenizer=3), "'tokenizer' must be a name or null"),
        (raw_plan(eos_token_id=None), "'eos_token_id' must be a token id"),
        (raw_plan(eos_token_id=True), "'eos_token_id' must be a token id"),
        (raw_plan(rounds=[]), "'rounds' must be a list of lists of texts, at least one"),
        (raw_plan(rounds=[3]), "'rounds' must be a list of lists of texts, at least one"),
        (raw_plan(steps_passed=[0]), "'steps_passed' must be null or increasing numbers from 0, one for each round"),
        (raw_plan(steps_passed=[5, 5]), "'steps_passed' must be null or increasing"),
        (raw_plan(steps_passed=[-1, 5]), "'steps_passed' must be null or increasing"),
        (raw_plan(steps_passed=[0, 1.5]), "'steps_passed' must be null or increasing"),
        (raw_plan(rounds=[["a"]]), "round 1, text 0: expected 'entry', 'input_ids' and optionally 'text'"),
        (one_text(ids=[3]), "round 1, text 0: expected 'entry', 'input_ids' and optionally 'text'"),
        (one_text(entry=""), "round 1, text 0: 'entry' must be a name"),
        (one_text(text=3), "round 1, text 0: 'text' must be a string of characters"),
        (one_text(text="half \ud800"), "round 1, text 0: 'text' must be a string of characters"),
        (one_text(input_ids="5 0"), "round 1, text 0 (a): 'input_ids' must be a list of token ids"),
        (one_text(input_ids=[True, 0]), "round 1, text 0 (a): 'input_ids' must be a list of token ids"),
        (one_text(input_ids=[-5, 0]), "round 1, text 0 (a): 'input_ids' must be a list of token ids"),
        (one_text(input_ids=[2**31, 0]), "round 1, text 0 (a): 'input_ids' must be a list of token ids"),
        (one_text(input_ids=[5.0, 0]), "round 1, text 0 (a): 'input_ids' must be a list of token ids"),
        (one_text(input_ids=[0, 5]), "round 1, text 0 (a): 'input_ids' must end with eos_token_id 0"),
        (one_text(input_ids=[]), "round 1, text 0 (a): 'input_ids' must end with eos_token_id 0"),
    ],
)
def test_errors_of_our_format_name_file_and_place(tmp_path: Path, content: Any, said: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError) as caught:
        read_plan(path)
    assert str(caught.value).startswith(f"{path}: {said}")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000])
def test_what_is_no_json_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "plan.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"plan\.json: not JSON: "):
        read_plan(tmp_path / "plan.json")


TENSORS = {
    "input_ids": torch.tensor([5, 0, 6, 0], dtype=torch.int32),
    "lengths": torch.tensor([2, 2], dtype=torch.int32),
}


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"input_ids": TENSORS["input_ids"]}, "expected tensors input_ids and lengths"),
        ({**TENSORS, "more": torch.zeros(1)}, "expected tensors input_ids and lengths"),
        ({**TENSORS, "lengths": torch.tensor([2, 2])}, "expected tensors input_ids and lengths"),
        ({**TENSORS, "lengths": torch.tensor([[2, 2]], dtype=torch.int32)}, "expected tensors input_ids and lengths"),
        ({**TENSORS, "lengths": torch.tensor([4], dtype=torch.int32)}, "expected tensors input_ids and lengths"),
        ({**TENSORS, "lengths": torch.tensor([5, -1], dtype=torch.int32)}, "expected tensors input_ids and lengths"),
        ({**TENSORS, "lengths": torch.tensor([2, 1], dtype=torch.int32)}, "4 tokens, but the lengths add up to 3"),
        ({**TENSORS, "lengths": torch.tensor([3, 1], dtype=torch.int32)}, "round 1, text 0 (a): 'input_ids' must end"),
        ({**TENSORS, "input_ids": -TENSORS["input_ids"]}, "round 1, text 0 (a): 'input_ids' must be a list"),
    ],
)
def test_errors_of_safetensors_name_the_file(tmp_path: Path, tensors: dict[str, torch.Tensor], said: str) -> None:
    path = tmp_path / "plan.safetensors"
    header = json.dumps(raw_plan(rounds=[["a"], ["b"]]))
    save_file(TENSORS, path, metadata={"injection_plan": header})
    assert tokens_of(read_plan(path)) == [[[5, 0]], [[6, 0]]]
    save_file(tensors, path, metadata={"injection_plan": header})
    with pytest.raises(ValueError) as caught:
        read_plan(path)
    assert str(caught.value).startswith(f"{path}: {said}")


def test_safetensors_of_another_version_or_kind_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.safetensors"
    for metadata, said in (
        ({"injection_plan": json.dumps(raw_plan(version=7))}, "version 7 of the format, this program reads version 1"),
        ({"injection_plan": json.dumps(raw_plan(rounds=3))}, "expected tensors input_ids and lengths"),
        ({"injection_plan": "["}, "damaged or not a safetensors file"),
        ({"format": "pt"}, "not an injection plan"),
        (None, "not an injection plan"),
    ):
        save_file(TENSORS, path, metadata=metadata)
        with pytest.raises(ValueError, match=rf"plan\.safetensors: {said}"):
            read_plan(path)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match=r"plan\.safetensors: damaged or not a safetensors file"):
        read_plan(path)


def test_the_published_map_in_our_formats_keeps_every_token(tmp_path: Path) -> None:
    published = replace(read_plan(fictional_knowledge() / INJECTION_MAP), eos_token_id=EOS)
    for name in ("plan.json", "plan.safetensors"):
        write_plan(tmp_path / name, published)
        assert read_plan(tmp_path / name) == published
    with safe_open(tmp_path / "plan.safetensors", "pt") as file:
        assert len(file.get_tensor("input_ids")) == 271_407 and len(file.get_tensor("lengths")) == 760
