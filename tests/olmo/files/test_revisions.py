"""Names of published checkpoints, as they are on the hub."""

from __future__ import annotations

import random

import pytest

from olmo.exceptions import ConfigurationError
from olmo.files.revisions import before, matching, order, parse, thinned

B = 10**9
# Of each model some of its real names, in the order of its training.
PUBLISHED = {
    "allenai/OLMo-1B-hf": ["step20000-tokens84B", "step117850-tokens494B", "step738020-tokens3095B", "main"],
    "allenai/OLMo-2-0425-1B": [
        "stage1-step0-tokens0B",
        "stage1-step140000-tokens294B",
        "stage1-step1907359-tokens4001B",
        "stage2-ingredient1-step2000-tokens5B",
        "stage2-ingredient1-step23852-tokens51B",
        "stage2-ingredient3-step22000-tokens47B",
        "stage2-ingredient3-step23852-tokens51B",
        "main",
    ],
    "allenai/OLMo-2-1124-7B": [
        "step150-tokens1B",  # some names of stage 1 lack it
        "stage1-step1000-tokens5B",
        "step2150-tokens10B",
        "stage1-step928646-tokens3896B",
        "stage2-ingredient1-step1000-tokens5B",
        "stage2-ingredient1-step11931-tokens50B",
        "stage2-ingredient3-step2000-tokens9B",
        "stage2-ingredient3-step11931-tokens50B",
        "main",
    ],
    "allenai/OLMo-2-1124-13B": [
        "stage1-step0-tokens0B",
        "stage1-step102500-tokens860B",
        "stage1-step596057-tokens5001B",
        "stage2-ingredient1-step11931-tokens101B",
        "stage2-ingredient4-step32000-tokens269B",
        "stage2-ingredient4-step35773-tokens300B",
        "main",
    ],
    "allenai/OLMo-2-0325-32B": ["stage1-step289000-tokens2425B", "stage1-step721901-tokens6056B", "main"],
    "allenai/Olmo-3-1025-7B": [
        "stage1-step337000",
        "stage1-step656000",
        "stage2-ingredient1-step0",
        "stage2-ingredient1-step21000",
        "stage3-step1000",
    ],
    "EleutherAI/pythia-1.4b": ["step0", "step1", "step2", "step512", "step1000", "step99000", "step143000", "main"],
    "HuggingFaceTB/SmolLM2-1.7B-intermediate-checkpoints": ["step-125000", "step-1000000", "step-5125000", "main"],
    "HuggingFaceTB/SmolLM3-3B-checkpoints": [
        "stage1-step-40000",
        "stage1-step-3440000",
        "stage2-step-3480000",
        "stage2-step-4200000",
        "stage3-step-4720000",
        "lc-4k-to-32k-step-4000",
        "lc-4k-to-32k-step-20000",
        "lc-32k-to-64k-step-4000",
        "it-LC-expert",
        "it-SFT",
        "main",
    ],
    "bigscience/tr5b-1B3-multilingual-alpha-checkpoints": ["global_step1500", "global_step118500", "main"],
    "OpenLLM-France/Lucie-7B": ["step0050000", "step0750000"],
}


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_names_sort_by_stage_ingredient_and_step(model: str) -> None:
    names = list(PUBLISHED[model])
    random.Random(0).shuffle(names)
    assert sorted(names, key=order) == PUBLISHED[model]


@pytest.mark.parametrize(
    ("name", "stage", "step", "tokens"),
    [
        ("step738020-tokens3095B", "", 738020, 3095 * B),
        ("stage1-step140000-tokens294B", "stage1", 140000, 294 * B),
        ("stage2-ingredient3-step2000-tokens9B", "stage2-ingredient3", 2000, 9 * B),
        ("stage2-ingredient1-step0", "stage2-ingredient1", 0, None),
        ("stage1-step-40000", "stage1", 40000, None),
        ("lc-32k-to-64k-step-4000", "lc-32k-to-64k", 4000, None),
        ("step-125000", "", 125000, None),
        ("step_360", "", 360, None),
        ("global_step118500", "", 118500, None),
        ("global_step_40", "", 40, None),
        ("iter_0001000", "", 1000, None),
        ("checkpoint-500", "", 500, None),
        ("step0050000", "", 50000, None),
        ("1000", "", 1000, None),
        ("738020-unsharded", "", 738020, None),
        ("step90-unsharded", "", 90, None),
        ("main", "", -1, None),
        ("v1.0", "", -1, None),
        ("it-SFT", "", -1, None),
        ("stage2", "", -1, None),
        ("OLMo-1B-step1000", "", -1, None),
        ("7B-hf", "", -1, None),
        ("73802cbdf3d0d0de9e6ba2c6a4b0ee56ee0b5cf3", "", -1, None),
    ],
)
def test_what_a_name_states(name: str, stage: str, step: int, tokens: int | None) -> None:
    found = parse(name)
    assert (found.stage, found.step, found.tokens) == (stage, step, tokens)


def test_a_pattern_leaves_out_what_has_no_step_where_others_have_one() -> None:
    names = PUBLISHED["allenai/OLMo-2-1124-7B"]
    assert matching([*reversed(names), names[0]], "*") == (names[:-1], ["main"])
    assert matching(names, "stage2-ingredient3-*") == (names[6:8], [])
    assert matching(["main", "v2.0", "v1.0"], "*") == (["main", "v1.0", "v2.0"], [])
    assert matching(names, "step*") == ([names[0], names[2]], [])
    assert matching(names, "nothing*") == ([], [])


def kept(names: list[str], every: int) -> list[str]:
    return [name for name, keep in zip(names, thinned(names, every)) if keep]


def test_every_keeps_steps_of_one_grid_and_the_last_of_each_stage() -> None:
    """Pythia: steps 1, 2, 4, ..., 512, then each thousandth."""
    pythia = [f"step{n}" for n in (0, *(2**k for k in range(10)), *range(1000, 144000, 1000))]
    assert len(pythia) == 154
    assert kept(pythia, 20000) == [f"step{n}" for n in (*range(0, 143000, 20000), 143000)]
    irregular = [f"step{n}" for n in (500, 20000, 52000, 55000, 117850, 119000)]
    assert kept(irregular, 10000) == ["step500", "step20000", "step52000", "step117850", "step119000"]
    assert kept(PUBLISHED["allenai/OLMo-2-0425-1B"][:-1], 10**7) == [
        "stage1-step0-tokens0B",
        "stage1-step1907359-tokens4001B",
        *PUBLISHED["allenai/OLMo-2-0425-1B"][3:7],
    ]
    assert kept(["step5"], 100) == ["step5"]
    with pytest.raises(ConfigurationError, match="--every: main has no step in its name"):
        thinned(["step1", "main"], 10)


@pytest.mark.parametrize(
    ("model", "name", "steps", "tokens"),
    [
        ("allenai/OLMo-2-1124-7B", "stage2-ingredient3-step2000-tokens9B", 928646, 3896 * B),
        ("allenai/OLMo-2-0425-1B", "stage2-ingredient1-step2000-tokens5B", 1907359, 4001 * B),
        ("allenai/Olmo-3-1025-7B", "stage2-ingredient1-step0", 656000, None),
        ("allenai/Olmo-3-1025-7B", "stage3-step1000", 656000 + 21000, None),
        ("HuggingFaceTB/SmolLM3-3B-checkpoints", "stage3-step-4240000", 0, 0),  # its steps count on
        ("HuggingFaceTB/SmolLM3-3B-checkpoints", "lc-32k-to-64k-step-4000", 4720000 + 20000, None),
    ],
)
def test_the_training_before_a_stage(model: str, name: str, steps: int, tokens: int | None) -> None:
    assert before(parse(name), PUBLISHED[model]) == (steps, tokens)


def test_the_training_before_a_stage_is_not_guessed() -> None:
    stage3 = parse("stage3-step1000-tokens9B")
    assert before(stage3, PUBLISHED["allenai/OLMo-2-1124-13B"]) is None, "ingredients ended at different steps"
    assert before(stage3, PUBLISHED["allenai/OLMo-2-0325-32B"]) is None, "no stage 2"
    assert before(parse("stage2-step1-tokens1B"), ["stage2-step1-tokens1B"]) is None, "no stage 1"
