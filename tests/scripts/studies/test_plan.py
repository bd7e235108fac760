"""What a study becomes: starts, conditions, seeds, commands and what each needs."""

from pathlib import Path

import pytest

from olmo.config import load
from olmo.exceptions import ConfigurationError
from scripts.studies.plan import Stage, slug
from scripts.studies.read import read_study, with_folder
from scripts.studies.records import Records
from scripts.studies.schema import Acquisition, Combination, Entropy, Intervention, Pretraining, Scoring, Start, Study
from scripts.studies.schema import Setting as StudySetting
from scripts.studies.stages import make_plan
from tests.hub import Hub
from tests.serving import hub_serving

ROOT = Path(__file__).resolve().parents[3]


def small(**changes) -> Study:
    given = {
        "configuration": "configs/tiny/continual.yaml",
        "starts": {"early": Start(step=10), "last": Start(step=20)},
        "pretraining": Pretraining("configs/tiny/pretrain.yaml"),
        "entropy": {"text": Entropy(data="text.npy")},
        "about": "model",
        "seeds": 2,
    }
    return Study("A study", **{**given, **changes})


def by_name(study: Study, folder: Path = Path("out")):
    plan = make_plan(study, folder)
    return plan, {stage.name: stage for stage in plan.stages}


def test_a_stage_comes_after_those_that_it_needs():
    interventions = {"none": Intervention(), "q1": Intervention(0.5, 1.0)}
    entropy = {"text": Entropy(data="text.npy", interventions=["none", "q1"], coefficients=["abs", "relu"])}
    plan, _ = by_name(small(interventions=interventions, entropy=entropy, learning_seeds=2))
    seen = set()
    for stage in plan.stages:
        assert set(stage.needs) <= seen, stage.name
        seen.add(stage.name)
    outputs = [path for stage in plan.stages for path in stage.outputs]
    assert len(set(outputs)) == len(outputs), "two stages make one file"


def test_seeds_about_a_model_reach_back_to_pretraining():
    plan, stages = by_name(small(learning_seeds=2))
    assert [r.seed for r in plan.repetitions] == [6198, 7198, 6199, 7199]
    assert plan.as_json()["seeds"] == [[6198, 7198], [6199, 7199]]
    run = stages["training last, seed 1.1"]
    assert "--seed=7199" in run.command and "--load_path=out/pretraining/seed1/step20-unsharded" in run.command
    assert "--seed=6199" in stages["pretraining, seed 1"].command
    assert run.needs == ("pretraining, seed 1",)


def test_what_a_study_adds_later_repeats_nothing(tmp_path):
    def keys(study: Study) -> dict[str, str]:
        records = Records(make_plan(study, tmp_path))
        kinds = ("train", "entropy", "edit")
        return {str(records.path(s)): records.keys[s.name] for s in records.plan.stages if s.kind in kinds}

    interventions = {"none": Intervention(), "q1": Intervention(0.5, 1.0)}
    settings = {"baseline": StudySetting(), "fast": StudySetting(overrides={"optimizer.learning_rate": 0.1})}
    before = keys(small(interventions=interventions))
    after = keys(small(interventions=interventions, settings=settings, seeds=3, learning_seeds=2))
    assert len(before) == 2 + 2 + 4 + 8 and before.items() <= after.items()


def test_a_record_has_the_name_that_its_stage_has_now(tmp_path):
    one, two = Stage("a", "train", ("x",), (), identity="run"), Stage("a, b", "train", ("x",), (), identity="run")
    for stage in (one, two):
        plan = make_plan(Study("x"), tmp_path)
        plan.stages = [stage]
        records = Records(plan)
        assert records.records[stage.name].name == stage.name
        records.save(stage)
    assert [path.name for path in (tmp_path / "stages").iterdir()] == ["run.json"]


def test_seeds_about_a_checkpoint_share_its_pretraining():
    plan, stages = by_name(small(about="checkpoint", seeds=3))
    assert [name for name in stages if name.startswith("pretraining")] == ["pretraining, seed 0"]
    assert plan.as_json()["seeds"] == [[6198, 6199, 6200]]
    assert "--load_path=out/pretraining/seed0/step20-unsharded" in stages["training last, seed 2"].command


def test_conditions_that_share_a_seed_differ_in_nothing_but_what_they_are_named_for():
    interventions = {"none": Intervention(), "control": Intervention(overrides={"injection.rounds": 0})}
    _, stages = by_name(small(interventions=interventions))
    one, other = (stages[f"training last{name}, seed 1"].command for name in ("", ", control"))
    differing = {a.partition("=")[0] for a in set(one) ^ set(other)}
    assert differing == {"--save_folder", "--run_name", "--injection.rounds"}


def test_an_edit_is_computed_from_the_coefficients_of_its_start_and_seed():
    interventions = {"none": Intervention(), "q2": Intervention(0.5, 2.0, "random")}
    _, stages = by_name(small(interventions=interventions))
    edit, run = stages["edit last, q2, seed 1"], stages["training last, q2, seed 1"]
    assert "out/entropy/text/abs/seed1/step20-unsharded/mlp_average_coefficients.safetensors" in edit.command
    assert edit.command[-3:-1] == ("--seed", "6199") and "random" in edit.command
    assert f"--model.resuscitation={edit.outputs[0]}" in run.command and edit.name in run.needs
    assert edit.needs == ("entropy on text, abs, seed 1", "pretraining, seed 1")


def test_edits_are_computed_on_the_text_that_is_named_for_them():
    interventions = {"none": Intervention(), "q1": Intervention(0.5, 1.0)}
    entropy = {"a": Entropy(data="a.npy"), "b": Entropy(data="b.npy", edits=True)}
    for edits, used in ((True, "b"), (False, "a")):
        entropy["b"].edits = edits
        plan, stages = by_name(small(interventions=interventions, entropy=entropy, repeats="paper_1b", notes=["N"]))
        edit = stages["edit last, q1, seed 0"]
        assert edit.needs[0] == f"entropy on {used}, abs, seed 0"
        assert any(f"entropy/{used}/abs/seed0" in word for word in edit.command)
        assert plan.as_json()["repeats"] == "paper_1b" and plan.as_json()["notes"] == ["N"]


def test_temperatures_are_given_to_training_and_measured_as_it_begins():
    interventions = {
        "none": Intervention(),
        "attention": Intervention(overrides={"model.temperature_attention": 2.0}),
        "memories": Intervention(0.5, 2.0, temperature=True),
    }
    entropy = {"text": Entropy(data="text.npy", interventions=list(interventions), starts=["last"])}
    changes = {"interventions": interventions, "entropy": entropy, "seeds": 1}
    plan, stages = by_name(small(**changes, conditions=[Combination(starts=["last"])]))
    edit = stages["edit last, memories, seed 0"]
    assert f"--model.temperature_MLP={edit.outputs[0]}" in stages["training last, memories, seed 0"].command
    measured = stages["entropy on text, abs, last, memories, seed 0"].command
    assert measured[measured.index("--temperature_MLP") + 1] == str(edit.outputs[0])
    measured = stages["entropy on text, abs, last, attention, seed 0"].command
    assert measured[measured.index("--temperature_attention") + 1] == "2.0"
    assert [e["intervention"] for e in plan.entropies] == ["none", "attention", "memories"]


def test_patterns_and_hub_ids(tmp_path, monkeypatch):
    for step in (100, 20, 3):
        (tmp_path / f"run/step{step}-unsharded").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    starts = {
        "last": Start(checkpoint="run/step100-unsharded"),
        "series": Start(checkpoint="run/*-unsharded"),
        "hub": Start(checkpoint="owner/model@step5-tokens1B", model="the hub's"),
        "watched": Start(checkpoints=["owner/model@step1-tokens0B"]),
    }
    study = small(starts=starts, pretraining=None, about="checkpoint", seeds=1)
    study.conditions = []
    plan, stages = by_name(study)
    assert [(s.name, s.step) for s in plan.starts] == [
        ("last", 100),
        ("step 3", 3),
        ("step 20", 20),
        ("hub", 5),
        ("step 1", 1),
    ]
    fetched = stages["fetch owner/model@step5-tokens1B"]
    assert fetched.command[-1] == "checkpoints/hub/owner/model/step5-tokens1B"
    assert f"--load_path={fetched.command[-1]}" in stages["training hub, seed 0"].command
    of_run = stages["entropy on text, abs, run"].command
    assert of_run[2:5] == ("run/step100-unsharded", "run/step3-unsharded", "run/step20-unsharded")
    assert {c["checkpoints"][0] for c in plan.as_json()["starts"]} >= {"owner/model@step5-tokens1B"}


def test_patterns_of_revisions(tmp_path, monkeypatch):
    """A start for each, of stages in their order; those of two models have names of their own."""
    monkeypatch.chdir(tmp_path)
    later = "stage2-ingredient1-step5-tokens1B"
    with hub_serving(tmp_path / "cache", monkeypatch, Hub) as hub:
        for revision in (later, "stage1-step10-tokens1B", "stage1-step9-tokens1B"):
            hub.add("owner/large", {"config.json": b"{}"}, revision)
        hub.add("owner/small", {"config.json": b"{}"}, "stage1-step9-tokens1B")
        starts = {"series": Start(checkpoints=["owner/large@stage*", "owner/small@stage*"])}
        study = small(starts=starts, pretraining=None, about="checkpoint", seeds=1)
        plan, stages = by_name(study)
        study.starts = {"none": Start(checkpoint="owner/large@step7*")}
        with pytest.raises(ConfigurationError, match=r"starts.none: owner/large@step7\*: none of 4 revisions matches"):
            make_plan(study, Path("out"))
    assert [(start.name, start.step) for start in plan.starts] == [
        ("owner/large step 9", 9),
        ("step 10", 10),
        (later, -1),
        ("owner/small step 9", 9),
    ]
    of_large = stages["entropy on text, abs, owner/large"]
    assert [path.parent.name for path in of_large.outputs][2] == later


def test_a_checkpoint_that_two_starts_name_is_one_of_both(tmp_path, monkeypatch):
    for step in (3, 20):
        (tmp_path / f"run/step{step}-unsharded").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    starts = {"last": Start(checkpoint="run/step20-unsharded", model="run"), "all": Start(checkpoint="run/*")}
    entropy = {"text": Entropy(starts=["all"])}
    study = small(starts=starts, pretraining=None, about="checkpoint", seeds=1, entropy=entropy)
    plan, _ = by_name(study)
    assert [s.name for s in plan.starts] == ["last", "step 3"]
    assert [e["start"] for e in plan.entropies] == ["last", "step 3"]
    for change in ({"overrides": {"x": 1}}, {"model": "other"}, {"configuration": "c.yaml"}):
        starts["all"] = Start(checkpoint="run/*", **change)
        with pytest.raises(
            ConfigurationError, match=r"starts\.all: run/step20-unsharded is already a start, starts\.last"
        ):
            make_plan(study, Path("out"))


def test_a_checkpoint_of_the_hub_that_is_only_measured_is_not_kept(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    study = Study("x", starts={"a": Start(checkpoint="owner/model@step1")}, entropy={"text": Entropy()})
    _, stages = by_name(study)
    assert list(stages) == ["entropy on text, abs", "report"]
    assert stages["entropy on text, abs"].command[-3:] == ("--overwrite", "--keep", "none")


WITH_C = {"none": Intervention(), "c": Intervention(overrides={"x": 1})}


def test_starts_are_scored_together(tmp_path):
    (tmp_path / "step7").mkdir()
    starts = {"early": Start(step=10), "last": Start(step=20), "other": Start(checkpoint=str(tmp_path / "step7"))}
    scoring = Scoring(flags={"knowledge": "facts", "tasks": "paper"})
    plan, stages = by_name(small(starts=starts, score=scoring, conditions=[Combination(["early", "last"])]))
    scored = stages["score pretraining, seed 1"]
    assert scored.command[:3] == ("analysis.score", *(f"out/pretraining/seed1/step{n}-unsharded" for n in (10, 20)))
    assert scored.command[3:7] == ("--knowledge", "facts", "--tasks", "paper")
    assert scored.needs == ("pretraining, seed 1",)
    noted = [(found["start"], found["pretraining"], found["folder"]) for found in plan.as_json()["scores"]]
    assert noted == [
        ("early", 0, "score/seed0/pretraining/step10-unsharded"),
        ("last", 0, "score/seed0/pretraining/step20-unsharded"),
        ("other", 0, f"score/seed0/{slug(str(tmp_path))}"),
        ("early", 1, "score/seed1/pretraining/step10-unsharded"),
        ("last", 1, "score/seed1/pretraining/step20-unsharded"),
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"about": "models"}, "about: 'models' is neither"),
        ({"seeds": 0}, "seeds: must be at least 1"),
        ({"about": "checkpoint", "learning_seeds": 2}, "learning_seeds: has no effect"),
        ({"pretraining": None}, "about: model: needs `pretraining`"),
        ({"starts": {"a": Start(checkpoint="o/m@step1")}}, "starts.a: about: model: seeds reach back"),
        ({"starts": {"a": Start()}}, "starts.a: give one of step, steps"),
        ({"starts": {"a": Start(step=1, checkpoint="b")}}, "starts.a: give one of step, steps"),
        ({"starts": {"a": Start(checkpoint="nowhere/*")}}, "starts.a: nowhere/*: no folder matches"),
        ({"starts": {"a": Start(checkpoint="/no/where")}}, "starts.a: /no/where: no such checkpoint folder"),
        ({"starts": {"a": Start(step=1), "b": Start(step=1)}}, "step1-unsharded is already a start, starts.a"),
        ({"overrides": {"seed": 1}}, "overrides.seed: leave it out; `seed` of the study is the first one"),
        ({"starts": {"a": Start(step=1, overrides={"load_path": "b"})}}, "starts.a.overrides.load_path: leave it out"),
        ({"settings": {"a": StudySetting(overrides={"save_folder": "b"})}}, "settings.a.overrides.save_folder: leave"),
        ({"interventions": {"none": Intervention(0.5, 1.0)}}, "interventions.none: changes nothing"),
        ({"entropy": {"a b": Entropy(data="t"), "a_b": Entropy(data="t")}}, "two records of stages are named"),
        ({"starts": {"a b": Start(step=1), "a_b": Start(step=2)}}, "two folders of runs are named"),
        ({"starts": {"a": Start(step=1), "a, c": Start(step=2)}, "interventions": WITH_C}, "two conditions are named"),
        ({"interventions": {"q": Intervention(ratio=0.5)}}, "interventions.q: needs ratio and factor"),
        ({"interventions": {"q": Intervention(selection="random")}}, "selection and temperature have no effect"),
        ({"interventions": {"q": Intervention(0.5, 1.0)}, "entropy": {}}, "needs the entropy of start 'early'"),
        ({"configuration": None, "settings": {"a": StudySetting(), "b": StudySetting("c.yaml")}}, "settings.a: needs"),
        ({"entropy": {"t": Entropy(flags={"data_size": 8})}}, "entropy: flags.data_size: the study decides it"),
        ({"score": Scoring(flags={"output": "x"})}, "score: flags.output: the study decides it"),
        ({"entropy": {"t": Entropy(starts=["lats"])}}, "entropy.t.starts: no 'lats', did you mean 'last'?"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(changes, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError) as error:
        make_plan(small(**changes), Path("out"))
    assert message in str(error.value)


def test_seeds_that_vary_nothing_are_refused():
    same = {"about": "checkpoint", "seeds": 2}
    same_order = {"data_shuffling": False}
    assert make_plan(small(**same), Path("out")).repetitions  # other orders of the data
    with pytest.raises(
        ConfigurationError, match=r"^seeds: another seed changes nothing in the runs of 'early' \(confi"
    ):
        make_plan(small(**same, overrides=same_order), Path("out"))
    with pytest.raises(
        ConfigurationError, match=r"^learning_seeds: .*; give overrides: \{data_shuffling: true\}, or 1"
    ):
        make_plan(small(learning_seeds=2, overrides=same_order), Path("out"))
    assert make_plan(small(overrides=same_order), Path("out")).repetitions  # seeds of pretraining


def test_a_start_may_have_a_configuration_and_overrides_of_its_own():
    starts = {"early": Start(step=10), "last": Start(step=20, configuration="other.yaml", overrides={"x": 2, "y": 2})}
    settings = {"a": StudySetting(), "b": StudySetting("b.yaml", {"y": 3})}
    _, stages = by_name(small(starts=starts, settings=settings, overrides={"x": 1}))
    commands = {name: stages[f"training {name}, seed 0"].command for name in ("early, a", "last, a", "last, b")}
    assert [c[1] for c in commands.values()] == ["configs/tiny/continual.yaml", "other.yaml", "b.yaml"]
    assert [c[-2:] for c in commands.values()][1:] == [("--x=2", "--y=2"), ("--x=2", "--y=3")]
    assert commands["early, a"][-1] == "--x=1"


def test_effectivities_are_measured_as_the_study_sets():
    plan, stages = by_name(small(acquisition=Acquisition(window=7, outlier_factor=0.0)))
    command = stages["acquisition"].command
    assert command[-6:] == ("--window", "7", "--outlier_factor", "0.0", "--output", "out/acquisition/baseline")
    assert plan.as_json()["acquisition"] == {"window": 7, "outlier_factor": 0.0, "fit_range": None}


def test_an_intervention_is_measured_at_the_starts_that_train_with_it():
    interventions = {"none": Intervention(), "q1": Intervention(0.5, 1.0)}
    entropy = {"text": Entropy(data="text.npy", interventions=["none", "q1"])}
    changes = {"interventions": interventions, "entropy": entropy, "seeds": 1}
    for conditions, expected in (
        ([Combination(["last"])], ["last"]),
        ([Combination(interventions=["none"])], ["early", "last"]),
    ):
        plan, stages = by_name(small(**changes, conditions=conditions))
        assert [e["start"] for e in plan.entropies if e["intervention"] == "q1"] == expected
        assert [name for name in stages if name.startswith("edit")] == [f"edit {s}, q1, seed 0" for s in expected]


def test_the_training_commands_of_the_demo_are_configurations_that_load(monkeypatch):
    monkeypatch.chdir(ROOT)
    study = with_folder(read_study(Path("configs/studies/demo.yaml")), Path("out"))
    plan = make_plan(study, Path("out"))
    for stage in plan.stages:
        if stage.kind == "train" and "seed 0" in stage.name:
            config = load(stage.command[1], stage.command[2:])
            assert config.save_folder == str(stage.run)
            if "pretraining" in stage.name:
                assert {int(path.name[4:-10]) for path in stage.outputs} <= set(config.save_steps_unsharded)
            else:
                evaluated = [e.data.paths or e.data.dataset_path for e in config.evaluators if e.type == "lm"]
                assert all("out/" in str(path) for path in evaluated)
                assert config.injection.rounds * config.inject_interval in (0, config.max_duration)
