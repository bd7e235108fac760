"""Plans from configurations: every source, every setting, and the checks against model and batch."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from olmo.config import EvaluatorConfig, InjectionConfig, TrainConfig
from olmo.exceptions import ConfigurationError
from olmo.knowledge.build import needs_tokenizer, plan_from_config
from olmo.knowledge.plan import Plan, Text
from olmo.knowledge.plan_files import PlanFile, write_plan
from tests.reference import tiny_config

EOS = 0


def spell(texts: list[str]) -> list[list[int]]:
    """A stand-in for a tokenizer: a token a character."""
    return [[ord(c) for c in text] for text in texts]


def config(**overrides: Any) -> TrainConfig:
    return TrainConfig(**{"model": tiny_config(), "global_train_batch_size": 2, "inject_interval": 3, **overrides})


def entries_of(path: Path, *contexts: str) -> str:
    """A file of entries, each with one paraphrase: its first letter and 1."""
    kinds = {f"{prefix}_{side}": ["x"] for prefix in ("mem", "gen", "hard_gen") for side in ("input", "target")}
    path.write_text(json.dumps([{"train_context": c, "paraphrases": [c[0] + "1"], **kinds} for c in contexts]))
    return str(path)


def spelled(text: str) -> tuple[int, ...]:
    return (*map(ord, text), EOS)


def pickled(path: Path, content: dict[Any, list[list[int]]]) -> str:
    """A published map."""
    path.write_bytes(pickle.dumps({key: [torch.tensor(ids) for ids in texts] for key, texts in content.items()}))
    return str(path)


def tokens_of(plan: Plan | None) -> list[list[tuple[int, ...]]]:
    assert plan is not None
    return [[text.input_ids for text in texts] for texts in plan.rounds]


def test_a_configuration_without_injection_has_no_plan() -> None:
    assert plan_from_config(config(), None) is None
    assert plan_from_config(config(injection=InjectionConfig(once="nowhere", rounds=0)), spell) is None


def test_a_configuration_names_files_of_entries(tmp_path: Path) -> None:
    files = {"paraphrase": entries_of(tmp_path / "p.json", "p0"), "once": entries_of(tmp_path / "o.json", "o0", "O0")}
    plan = plan_from_config(config(injection=InjectionConfig(**files, rounds=2)), spell)
    assert plan is not None and plan.interval == 3
    assert tokens_of(plan) == [[spelled("p0"), spelled("o0")], [spelled("p1"), spelled("O0")]]


def test_rounds_that_do_not_repeat_enter_once(tmp_path: Path) -> None:
    file = entries_of(tmp_path / "d.json", "d0")
    chosen = InjectionConfig(duplicate=file, rounds=2, repeat=False)
    for start, steps in ((None, {3: 1, 6: 2}), (5, {5: 1, 8: 2})):
        plan = plan_from_config(config(injection=chosen, inject_start_step=start), spell)
        assert plan is not None
        assert {step: plan.round_of(step) for step in range(1, 30) if plan.round_of(step)} == steps


def test_a_configuration_names_a_published_map_and_is_checked_at_once(tmp_path: Path) -> None:
    path = tmp_path / "map.pkl"
    full = [*range(1, 64), EOS]
    named = pickled(path, {1: [[5, EOS]], 2: [[6, 7, EOS], full]})
    plan = plan_from_config(config(inject_indices_map=named), None)
    assert plan is not None and plan.first_steps == (3, 6)
    assert tokens_of(plan) == [[(5, EOS)], [(6, 7, EOS), tuple(full)]]
    pickled(path, {1: [[1, *full]]})
    with pytest.raises(ValueError, match=r"round 1, row 0: 65 tokens \(map/0\) exceed the sequence length 64"):
        plan_from_config(config(inject_indices_map=named), None)
    pickled(path, {1: [[6, EOS]], 2: [[6, EOS], [5, 6]]})
    with pytest.raises(ConfigurationError) as caught:
        plan_from_config(config(inject_indices_map=named), None)
    assert str(caught.value) == (
        f"model.eos_token_id: {path}: round 2, text 1 (map/1) ends with token 6, the model's EOS is 0"
    )
    pickled(path, {1: []})
    with pytest.raises(ValueError, match="injection round 1 holds no text"):
        plan_from_config(config(inject_indices_map=named), None)
    pickled(path, {1: [[128, EOS]]})
    with pytest.raises(ConfigurationError, match="token 128 is to be injected, but the model has 128"):
        plan_from_config(config(inject_indices_map=named), None)


@pytest.mark.parametrize("written", ["plan.json", "plan.safetensors", "map.pkl"])
def test_the_knobs_go_with_every_source(tmp_path: Path, written: str) -> None:
    knobs = {"inject_start_step": 7, "inject_position": "document"}
    if written == "map.pkl":
        named = pickled(tmp_path / written, {1: [[5, EOS]], 2: [[6, EOS]]})
    else:
        write_plan(tmp_path / written, PlanFile(((Text("a", (5, EOS)),), (Text("b", (6, EOS)),)), None, None, EOS))
        named = str(tmp_path / written)
    plan = plan_from_config(config(inject_indices_map=named, **knobs), None)
    assert plan is not None and tokens_of(plan) == [[(5, EOS)], [(6, EOS)]]
    assert (plan.first_steps, plan.boundary) == ((7, 10), EOS)
    entries = InjectionConfig(once=entries_of(tmp_path / "o.json", "o0", "O0"), rounds=2)
    built = plan_from_config(config(injection=entries, **knobs), spell)
    assert built is not None and (built.first_steps, built.boundary) == ((7, 10), EOS)
    with pytest.raises(ConfigurationError, match=r"inject_interval: missing; .* steps between the rounds of"):
        plan_from_config(config(inject_indices_map=named, inject_interval=None), None)


@pytest.mark.parametrize("written", ["plan.json", "map.pkl"])
def test_a_file_with_steps_of_its_own(tmp_path: Path, written: str) -> None:
    named = str(tmp_path / written)
    if written == "map.pkl":
        pickled(tmp_path / written, {"0": [[5, EOS]], "100": [[6, EOS]]})
    else:
        rounds = ((Text("a", (5, EOS)),), (Text("b", (6, EOS)),))
        write_plan(tmp_path / written, PlanFile(rounds, (0, 100), None, EOS))
    alone = {"inject_indices_map": named, "inject_interval": None}
    plan = plan_from_config(config(**alone), None)
    assert plan is not None and plan.first_steps == (1, 101) and plan.round_of(201) is None
    with pytest.raises(ConfigurationError, match=r"inject_interval: .* has the steps of its rounds; leave"):
        plan_from_config(config(inject_indices_map=named), None)
    # Goes on with the numbers of another run's steps: which of them is this run's first?
    goes_on = {**alone, "load_path": "run/step5000"}
    with pytest.raises(
        ConfigurationError, match=r"inject_start_step: missing; .* continues from run/step5000; give the f"
    ):
        plan_from_config(config(**goes_on), None)
    started = plan_from_config(config(**goes_on, inject_start_step=5001), None)
    assert started is not None and started.first_steps == (5001, 5101)
    again = plan_from_config(config(**goes_on, reset_trainer_state=True), None)
    assert again is not None and again.first_steps == (1, 101)


def test_a_text_that_is_injected_twice_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    chosen = InjectionConfig(once=entries_of(tmp_path / "o.json", "o0", "x0", "o0"), rounds=1)
    plan_from_config(config(injection=chosen), spell)
    assert caplog.messages == ["injection: round 1: once/2 is the text of once/0"]


def test_a_file_of_another_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    write_plan(path, PlanFile(((Text("once/0", (5, 9)),),), None, None, 9))
    with pytest.raises(
        ConfigurationError, match=r"model\.eos_token_id: .* \(once/0\) ends with token 9, the model's EOS"
    ):
        plan_from_config(config(inject_indices_map=str(path)), None)


def test_a_text_that_spells_other_tokens_is_refused_where_there_is_a_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    texts = (Text("a", spelled("p0"), "p0"), Text("b", spelled("q0"), "q1"), Text("c", spelled("r0")))
    write_plan(path, PlanFile((texts,), None, "gpt9", EOS))
    with pytest.raises(ConfigurationError) as caught:
        plan_from_config(config(inject_indices_map=str(path)), spell)
    assert str(caught.value) == (
        f"tokenizer.identifier: {path}: round 1, text 1 (b): gpt2 makes other tokens of 'text' than 'input_ids' "
        "(gpt9 made them); only 'input_ids' are injected: write the plan again or leave 'text' out"
    )
    assert tokens_of(plan_from_config(config(inject_indices_map=str(path)), None)) == [[t.input_ids for t in texts]]


def test_evaluators_name_the_texts_of_a_published_map(tmp_path: Path) -> None:
    named = pickled(tmp_path / "map.pkl", {1: [list(spelled(text)) for text in ("o0", "p1", "x0")]})
    evaluators = []
    for setting, contexts in (("paraphrase", ["q0", "p0"]), ("once", ["o0"])):
        file = entries_of(tmp_path / f"{setting}.json", *contexts)
        evaluators.append(EvaluatorConfig(f"{setting}_memorization"))
        evaluators[-1].data.dataset_path = file
    asked = config(inject_indices_map=named, evaluators=evaluators)
    plan = plan_from_config(asked, spell)
    assert plan is not None
    assert [text.entry for text in plan.rounds[0]] == ["once/0", "paraphrase/1", "map/2"]
    unnamed = plan_from_config(config(inject_indices_map=named), spell)
    assert unnamed is not None and [text.entry for text in unnamed.rounds[0]] == ["map/0", "map/1", "map/2"]
    assert needs_tokenizer(asked) and not needs_tokenizer(config(inject_indices_map=named))
    assert needs_tokenizer(config(injection=InjectionConfig())) and not needs_tokenizer(config(evaluators=evaluators))
