"""What a reader may conclude follows from the seeds, their level, the number of points, and the scale."""

import math

import pytest

from analysis.study.conclusions import may, may_not, repeated, scale
from tests.study_json import a_study


def test_verdicts_are_about_the_level_that_was_repeated():
    model, checkpoint = a_study(), a_study(seeds=1, learning=3, about="checkpoint")
    assert "models pretrained as these were" in " ".join(may(model))
    assert not any("Another pretraining" in line for line in may_not(model))
    assert "continual learning from these checkpoints" in " ".join(may(checkpoint))
    assert any("Another pretraining" in line and "may give the other sign" in line for line in may_not(checkpoint))
    assert repeated(model) == "3 pretrainings with different seeds, each with 1 seed of continual learning."
    assert repeated(checkpoint) == "3 seeds of continual learning from every start."


@pytest.mark.parametrize("form", [{"seeds": 1, "learning": 5}, {"seeds": 5, "about": "checkpoint"}])
def test_seeds_of_the_other_level_are_no_repetition(form):
    found = " ".join(may(a_study(**form)))
    assert "so no verdict is given" in found and "A verdict is about" not in found


def test_entropies_of_a_checkpoint_have_verdicts_with_one_seed():
    study = a_study(seeds=1, about="checkpoint")
    assert "so no verdict is given." in may(study)[0]
    study["directions"][0]["verdict"] = "seen"
    assert "so no verdict is given, except of entropies, which no seed changes." in may(study)[0]


def test_the_counts_are_those_of_the_study():
    study = a_study()
    assert "Of 3 directions: 1 seen, 1 not seen (the opposite), 1 within noise at this scale." in may(study)
    found = " ".join(may_not(study))
    assert "of 3 intervals of 95 %, about 0.1 exclude 0 by chance" in found or "about 0.2" in found
    assert "3 seeds give wide intervals" in found and "correlation over 6 conditions" in found
    assert "2 layers of 1,024 memories" in found and "One training setting" in found
    other = " ".join(may_not(a_study(seeds=6, settings=2)))
    assert "wide intervals" not in other and "One training setting" not in other


def test_a_study_that_compares_nothing_claims_nothing():
    study = {**a_study(), "directions": [], "joined": None, "conditions": []}
    assert repeated(study) == "3 pretrainings."
    assert may(study)[0].endswith("The study compares nothing.")
    assert len(may_not(study)) == 1  # the scale


def test_pairs_that_are_none_take_the_sentence_about_effects_with_them():
    paired = "is an effect of the intervention"
    assert paired in " ".join(may(a_study()))
    assert paired not in " ".join(may({**a_study(), "warnings": ["early and last differ in their order"]}))


def test_models_of_the_papers_size_are_not_called_small():
    study = a_study(layers=16)
    for entropy in study["entropies"]:
        entropy["maximum"] = 16 * math.log(8192)
    assert scale(study) == ""
    study["entropies"][0]["maximum"] += 1.0  # two sizes
    assert scale(study) == ""
    assert scale(a_study(layers=4)) == "4 layers of 1,024 memories"
