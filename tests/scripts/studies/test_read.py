"""Study files: every key is checked, and `--set` changes any of them."""

from pathlib import Path

import pytest

from olmo.exceptions import ConfigurationError
from scripts.studies.read import as_plain, read_study, with_folder
from scripts.studies.schema import Study

FILE = """
title: A study
seed: 1
starts:
  early: {step: 10}
  1.4b: {checkpoint: some/folder}
settings:
  baseline: {}
  q = 2: {}
overrides: {optimizer.learning_rate: 1.0e-3}
directions:
  - {claim: It falls, measure: H, from: early, to: last, expected: below}
"""


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "study.yaml"
    path.write_text(FILE)
    return path


def test_values_and_defaults(file):
    study = read_study(file)
    assert (study.title, study.seed, study.seeds, study.about) == ("A study", 1, 1, "checkpoint")
    assert study.starts["early"].step == 10 and study.starts["1.4b"].checkpoint == "some/folder"
    [direction] = study.directions
    assert (direction.start, direction.end) == ("early", "last")
    assert list(study.interventions) == ["none"] and list(study.settings) == ["baseline", "q = 2"]


def test_a_saved_study_is_the_study(file, tmp_path):
    from omegaconf import OmegaConf

    study = read_study(file, ["seeds=3", "prepare.x={command: [a, 1], output: b}"])
    saved = tmp_path / "saved.yaml"
    saved.write_text(OmegaConf.to_yaml(OmegaConf.create(as_plain(study))))
    assert read_study(saved) == study
    assert study.prepare["x"].command == ["a", "1"]  # an argument is text


def test_base_files_are_merged(file, tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text("base: study.yaml\ntitle: Another\nstarts: {late: {step: 20}}\n")
    study = read_study(other)
    assert study.title == "Another" and list(study.starts) == ["early", "1.4b", "late"]


@pytest.mark.parametrize(
    ("change", "look"),
    [
        ("seeds=5", lambda s: s.seeds == 5),
        ("starts.early.step=7", lambda s: s.starts["early"].step == 7),
        ("starts.1.4b.model=large", lambda s: s.starts["1.4b"].model == "large"),
        ("starts.1.4b={checkpoint: x}", lambda s: s.starts["1.4b"].checkpoint == "x"),
        ("starts.new.step=3", lambda s: s.starts["new"].step == 3),
        ("overrides.model.n_layers=2", lambda s: s.overrides["model.n_layers"] == 2),
        ("overrides.optimizer.learning_rate=null", lambda s: s.overrides["optimizer.learning_rate"] is None),
        ("pretraining.configuration=a.yaml", lambda s: s.pretraining.configuration == "a.yaml"),
        ("pretraining={configuration: a.yaml, overrides: {x: 1}}", lambda s: s.pretraining.overrides == {"x": 1}),
        ("directions.0.expected=above", lambda s: s.directions[0].expected == "above"),
        ("directions=[]", lambda s: s.directions == []),
        ("resources.gpus=2", lambda s: s.resources.gpus == 2),
        ("settings.q = 2.overrides.max_duration=4", lambda s: s.settings["q = 2"].overrides == {"max_duration": 4}),
        ("settings.q = 2={overrides: {x: 1}}", lambda s: s.settings["q = 2"].overrides == {"x": 1}),
        ("settings.fast.overrides.max_duration=4", lambda s: s.settings["fast"].overrides == {"max_duration": 4}),
    ],
)
def test_set_changes_a_key(file, change, look):
    assert look(read_study(file, [change]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("sedes=5", "unknown key 'sedes', did you mean 'seeds'"),
        ("starts.early.stepp=5", "unknown key 'starts.early.stepp', did you mean 'starts.early.step'"),
        ("directions.0.form=x", "unknown key 'directions[0].form', did you mean 'directions[0].from'"),
        ("seeds=three", "seeds: expected a whole number, got 'three'"),
        ("seeds=true", "seeds: expected a whole number, got True"),
        ("starts.early.step=[1]", "starts.early.step: expected a whole number or null, got [1]"),
        ("starts=[a]", "starts: expected keys and values, got ['a']"),
        ("figures=figure_2", "figures: expected a list, got 'figure_2'"),
        ("directions.0={claim: x}", "directions[0].measure: missing"),
        ("directions.5.claim=x", "a list of 1, which has no 5"),
        ("title.x=1", "no section there"),
        ("seeds", "expected KEY=VALUE"),
        ("starts={a", "not YAML"),
        ("pretraining.overrides.x=1", "pretraining.configuration: missing"),
    ],
)
def test_a_mistake_is_named_with_its_key(file, change, message):
    with pytest.raises(ConfigurationError) as error:
        read_study(file, [change])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_training_configuration_is_no_study():
    with pytest.raises(ConfigurationError, match=r"pretrain.yaml: a training configuration .*python -m scripts.train$"):
        read_study(Path("configs/tiny/pretrain.yaml"))


def test_the_output_folder_replaces_its_name_everywhere():
    study = Study("x", overrides={"a": ["{folder}/b"]}, configuration="{folder}/c.yaml")
    found = with_folder(study, Path("runs/x"))
    assert found.overrides == {"a": ["runs/x/b"]} and found.configuration == "runs/x/c.yaml"
