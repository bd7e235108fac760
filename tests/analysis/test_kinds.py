"""The kind of a result: names made of what differs, and what is no difference."""

from __future__ import annotations

import copy
from typing import Any

from analysis.kinds import difference, labels

RESULT: dict[str, Any] = {
    "layers": [3.8, 3.7],
    "maximum": 7.742402,  # 2 log 48
    "number_of_instances": 5,
    "sequence_length": 16,
    "coefficient": "abs",
    "precision": "fp32",
    "resuscitation": None,
    "tolerance": None,
    "checkpoint": {"path": "runs/a/step9", "step": 9},
    "data": {"path": "tokens.npy", "sha256": "a" * 64, "instances": 5},
}


def changed(**settings: Any) -> dict[str, Any]:
    """RESULT with other settings: those of its data and checkpoint among them."""
    result = copy.deepcopy(RESULT)
    for name, value in settings.items():
        place = next((result[part] for part in ("data", "checkpoint") if name in result[part]), result)
        place[name] = value
    return result


def test_a_legend_is_made_of_what_differs() -> None:
    later = changed(path="runs/a/step10", step=10)
    assert labels([RESULT, later]) == ["", ""] and difference(RESULT, later) is None
    assert labels([RESULT, changed(coefficient="relu", precision="bf16")]) == ["abs, fp32", "relu, bf16"]
    assert labels([RESULT, changed(maximum=7.0)]) == ["2 layers of 48 memories", "2 layers of 33 memories"]
    unlike = changed(maximum=7.0, layer_numbers=[0, 2], layer_sizes=[48, 60])
    said = ["2 layers of 48 memories", "48 memories in layer 0, 60 memories in layer 2"]
    assert labels([RESULT, unlike]) == said
    other = changed(maximum=7.0, layer_numbers=[0, 2], layer_sizes=[60, 48])  # of the same ceiling
    assert difference(unlike, other) is not None and difference(unlike, unlike) is None
    shorter = changed(sequence_length=8, sha256="b" * 64)  # other instances, which follow from the length
    assert labels([RESULT, shorter]) == ["16 tokens", "8 tokens"]
    other = changed(sequence_length=8, sha256="b" * 64)
    other["data"]["path"] = "other.npy"
    assert labels([RESULT, other]) == ["16 tokens, tokens.npy", "8 tokens, other.npy"]
    named = [changed(sha256=letter * 64) for letter in "abc"]  # of one name: by their folders, or their content
    for result, place in zip(named, ("c4/text.npy", "pubmed/text.npy", "c4/text.npy")):
        result["data"]["path"] = place
    assert labels(named[:2]) == ["c4/text.npy", "pubmed/text.npy"]
    assert labels(named) == ["text.npy aaaaaaaa", "text.npy bbbbbbbb", "text.npy cccccccc"]
    assert difference(*named[:2]) == "different data (c4/text.npy, pubmed/text.npy)"
    packed = changed(sha256="b" * 64)  # a text; what earlier versions measured has no such key
    packed["data"]["pack"] = "eos"
    assert labels([RESULT, packed]) == ["texts or rows as they are", "packed texts"]
    moved = copy.deepcopy(RESULT)
    moved["data"]["path"] = "/elsewhere/tokens.npy"  # the same instances
    assert difference(RESULT, moved) is None


def test_edited_checkpoints_are_compared_with_their_originals_but_not_joined() -> None:
    edited = changed(resuscitation="c" * 64)
    assert difference(RESULT, edited) is None and labels([RESULT, edited]) == ["as saved", "edited"]
    # Two edits of one checkpoint are two kinds; those of other checkpoints have other content and the same name.
    files = [{"resuscitation": f"resuscitation_ratio0.5_amplifying{q}.safetensors"} for q in (1.0, 2.0)]
    edits = [changed(resuscitation=str(n), edit_files=files[n], step=step) for n in (0, 1) for step in (9, 10)]
    warm = changed(temperature_attention=2.0, temperature_MLP="d", edit_files={"temperature_MLP": "divisors.pt"})
    assert labels([*edits, warm]) == [
        *(f"edited by resuscitation_ratio0.5_amplifying{q}" for q in (1.0, 1.0, 2.0, 2.0)),
        "attention temperature 2, memory temperatures divisors",
    ]


def test_a_tolerance_joins_what_needed_other_numbers_of_instances() -> None:
    results = [changed(tolerance=0.01), changed(tolerance=0.01, number_of_instances=4, step=10)]
    assert labels(results) == ["", ""]
    assert difference(*results) == "different numbers of instances (5 instances, 4 instances)"


def test_two_results_of_one_step_are_of_two_runs() -> None:
    results = [RESULT, changed(), changed(step=10)]
    results[1]["checkpoint"]["path"] = "runs/b/step9"
    assert labels(results) == ["runs/a", "runs/b", "runs/a"]
