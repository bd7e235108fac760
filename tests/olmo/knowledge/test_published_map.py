"""Published maps in both key styles, and pickles that try to run code."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from olmo.knowledge.plan_files import PlanFile, read_plan
from tests.hostile import HOSTILE, hostile
from tests.published import INJECTION_MAP, fictional_knowledge

EOS = 50279


def tokens_of(plan: PlanFile) -> list[list[list[int]]]:
    return [[list(text.input_ids) for text in texts] for texts in plan.rounds]


def test_the_published_map_is_read() -> None:
    plan = read_plan(fictional_knowledge() / INJECTION_MAP)
    assert plan.steps_passed is None
    assert [[text.entry for text in texts] for texts in plan.rounds] == [[f"map/{n}" for n in range(76)]] * 10
    texts = tokens_of(plan)
    assert sum(len(text) for of_round in texts for text in of_round) == 271_407
    assert all(0 <= token <= 50279 for of_round in texts for text in of_round for token in text)
    assert all(text[-1] == 50279 for of_round in texts for text in of_round)


def test_a_map_of_views_into_shared_storage_is_read(tmp_path: Path) -> None:
    base = torch.arange(20)
    rounds = {2: [base[3:7], base[::2].clone()], 1: [base[1::4]]}  # offset, copy, stride
    path = tmp_path / "map.pkl"
    path.write_bytes(pickle.dumps(rounds))
    assert tokens_of(read_plan(path)) == [[[1, 5, 9, 13, 17]], [[3, 4, 5, 6], list(range(0, 20, 2))]]


def test_a_map_of_steps_passed_is_read(tmp_path: Path) -> None:
    """Chang et al.: texts of digits as keys, by their value and not by their spelling; later rounds may be shorter."""
    path = tmp_path / "7b-360000.pkl"
    path.write_bytes(pickle.dumps({"100": [torch.tensor([7, 0])], "0": [torch.tensor([5, 0]), torch.tensor([6, 0])],
                                   "20": [torch.tensor([8, 0])]}))  # fmt: skip
    plan = read_plan(path)
    assert plan.steps_passed == (0, 20, 100)
    assert tokens_of(plan) == [[[5, 0], [6, 0]], [[8, 0]], [[7, 0]]]


def test_a_map_of_instances_is_refused_with_its_reason(tmp_path: Path) -> None:
    path = tmp_path / "map.pkl"
    path.write_bytes(pickle.dumps({"737280003": torch.tensor([5, 0]), "737282051": torch.tensor([6, 0])}))
    with pytest.raises(
        ValueError, match=r"map\.pkl: its keys are numbers of instances, .* a plan needs steps or rounds"
    ):
        read_plan(path)


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated", "ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_pickle_is_refused_and_runs_nothing(tmp_path: Path, kind: str, protocol: int) -> None:
    path, touched = tmp_path / "map.pkl", tmp_path / "touched"
    path.write_bytes(pickle.dumps(hostile(kind, touched), protocol=protocol))
    with pytest.raises(ValueError, match=r"map\.pkl: not a safe injection map"):
        read_plan(path)
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
        {1: torch.arange(3)},
        {1: (torch.arange(3),)},
        {1: [[1, 2, 3]]},
        {1: [torch.arange(3, dtype=torch.int32)]},
        {1: [torch.arange(3.0)]},
        {1: [torch.arange(4).view(2, 2)]},
        {1: [torch.tensor(3)]},
        {1: [torch.arange(0)]},
        {1: [torch.tensor([-1, 0])]},
        {1: [torch.tensor([2**31, 0])]},
        {1: [torch.arange(3)], "5": [torch.arange(3)]},
        {"1-0": [torch.arange(3)]},
        {"-1": [torch.arange(3)]},
        {"5": [torch.arange(3)], "05": [torch.arange(3)]},
        {"5": [torch.arange(3)], "6": torch.arange(3)},
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
        read_plan(path)


def test_a_truncated_map_is_an_error_wherever_it_ends(tmp_path: Path) -> None:
    path = tmp_path / "map.pkl"
    whole = pickle.dumps({1: [torch.arange(5), torch.arange(9)], 2: [torch.arange(4)]})
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"map\.pkl: "):
            read_plan(path)


def test_a_missing_map_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pkl"):
        read_plan(tmp_path / "nowhere.pkl")
