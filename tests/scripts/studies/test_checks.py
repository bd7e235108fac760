"""What a study would find out only after hours is an error before its first stage."""

from pathlib import Path

import pytest

from olmo.exceptions import ConfigurationError
from scripts.studies.checks import check_runs
from scripts.studies.run import check_folder
from scripts.studies.schema import Preparation, Pretraining, Start
from scripts.studies.stages import make_plan
from tests.scripts.studies.test_plan import small

SAVES = {"max_duration": 20, "save_steps_unsharded": [10, 20]}


def plan_of(folder=Path("out"), saves=SAVES, **changes):
    return make_plan(small(pretraining=Pretraining("configs/tiny/pretrain.yaml", saves), **changes), folder)


@pytest.mark.parametrize(
    "saves",
    [
        SAVES,
        {"max_duration": 20, "save_steps_unsharded": None, "save_interval_unsharded": 10},
        {"max_duration": 20, "save_steps_unsharded": [10], "force_save_unsharded": True},
        {"max_duration": 20, "save_steps_unsharded": [10], "save_interval_unsharded": 15},
        {"max_duration": "1ep", "save_steps_unsharded": [10], "force_save_unsharded": True},
    ],
)
def test_starts_that_pretraining_saves(saves):
    check_runs(plan_of(saves=saves))


@pytest.mark.parametrize(
    ("saves", "start", "why"),
    [
        ({}, "early", "max_duration is 480, save_steps_unsharded [30, 60,"),
        ({**SAVES, "max_duration": 15}, "last", "max_duration is 15"),
        ({**SAVES, "save_steps_unsharded": [20]}, "early", "save_steps_unsharded [20]"),
        ({**SAVES, "save_steps_unsharded": None, "save_interval_unsharded": 20}, "early", "save_steps_unsharded None"),
        ({**SAVES, "save_steps_unsharded": [10]}, "last", "save_steps_unsharded [10]"),
        ({**SAVES, "stop_at": 10, "save_steps_unsharded": [10, 20]}, "last", "max_duration is 20"),
    ],
)
def test_a_start_that_pretraining_does_not_save_is_refused(saves, start, why):
    with pytest.raises(ConfigurationError) as error:
        check_runs(plan_of(saves=saves))
    assert str(error.value).startswith(
        f"starts.{start}: pretraining does not save step {10 if start == 'early' else 20}"
    )
    assert why in str(error.value) and "pretraining.overrides" in str(error.value)


def test_a_configuration_that_does_not_load_is_refused():
    with pytest.raises(ConfigurationError) as error:
        check_runs(plan_of(overrides={"optimizer.learning_rat": 1}))
    assert str(error.value) == (
        "training early, seed 0: overrides of configs/tiny/continual.yaml: unknown key 'optimizer.learning_rat', did "
        "you mean 'optimizer.learning_rate'?"
    )
    with pytest.raises(ConfigurationError, match=r"^pretraining, seed 0: overrides of .*: unknown key 'modle', did"):
        check_runs(plan_of(saves={**SAVES, "modle.d_model": 1}))


def test_a_folder_of_something_else_is_no_output(tmp_path):
    folder = tmp_path / "out"
    plan = plan_of(folder, prepare={"text": Preparation(["make"], f"{folder}/text/all.npy")})
    check_folder(plan)  # does not exist
    (folder / "text").mkdir(parents=True)
    (folder / "stages").mkdir()
    check_folder(plan)  # what the study itself would make
    (folder / "thesis.tex").write_text("mine")
    with pytest.raises(ConfigurationError, match=r"^--output .*out: not the output of a study \(it contains thesis"):
        check_folder(plan)
    (folder / "plan.json").write_text("{}")
    check_folder(plan)
    with pytest.raises(ConfigurationError, match=r"thesis\.tex: not a folder"):
        check_folder(plan_of(folder / "thesis.tex"))


def test_starts_of_other_checkpoints_need_no_save(tmp_path):
    starts = {"a": Start(checkpoint=str(tmp_path))}
    check_runs(make_plan(small(about="checkpoint", pretraining=None, starts=starts), Path("out")))
