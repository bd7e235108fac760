"""score: the numbers of analysis.score for the saved model, and a model that is afterwards as before."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from analysis.score import main as score_command
from knowledge_entropy.scoring import score
from olmo.knowledge.entries import load_entries
from tests.knowledge_entropy.training import model
from tests.running import write_world


@pytest.fixture(scope="module")
def knowledge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of fictional knowledge, and the tokenizer in it."""
    world = write_world(tmp_path_factory.mktemp("world"))
    for setting in ("paraphrase", "once"):
        (world / f"{setting}.json").rename(world / f"fictional_knowledge_{setting}.json")
    return world


@pytest.mark.parametrize("family", ["Pythia", "OLMoE"])
def test_the_numbers_are_those_of_the_command(knowledge: Path, tmp_path: Path, family: str) -> None:
    network, tokenizer = model(family), str(knowledge / "tokenizer.json")
    network.save_pretrained(tmp_path / "saved")
    named = ["--knowledge", str(knowledge), "--tokenizer", tokenizer, "--output", str(tmp_path / "scores")]
    score_command([str(tmp_path / "saved"), *named])
    network.train()
    network.get_submodule(next(iter(dict(network.named_children())))).eval()
    modes, random = [module.training for module in network.modules()], torch.get_rng_state()
    loss = network.loss_function
    found = score(network, knowledge, tokenizer=tokenizer)
    assert found.numbers == json.loads((tmp_path / "scores/score.json").read_text())["knowledge"]
    assert [module.training for module in network.modules()] == modes and True in modes and False in modes
    assert torch.equal(random, torch.get_rng_state()) and network.loss_function is loss
    assert found.numbers["K"] == found.K and set(found.by_setting) == {"paraphrase", "once"}
    assert len(found.by_kind) == 6 and len(found.table["entry"]) == 90
    assert repr(found).startswith("Scores(K -") and repr(found).endswith(", 90 probes)")


def test_entries_are_given_in_several_ways(knowledge: Path) -> None:
    network, tokenizer = model(), str(knowledge / "tokenizer.json")
    path = knowledge / "fictional_knowledge_once.json"
    both = score(network, knowledge, tokenizer=tokenizer)
    for entries in (path, str(path), load_entries(path), {"once": path}):
        given: Any = {} if isinstance(entries, dict) else {"setting": "once"}
        found = score(network, entries, tokenizer=tokenizer, **given)
        assert found.by_setting == {"once": pytest.approx(both.by_setting["once"], abs=1e-6)}


def test_entries_may_have_probes_of_some_kinds(knowledge: Path) -> None:
    path, tokenizer = knowledge / "fictional_knowledge_once.json", knowledge / "tokenizer.json"
    first, second, *_ = load_entries(path)
    kinds = [{kind: first.probes[kind]} for kind in ("memorization", "semantic")]
    found = score(model(), [replace(first, probes=kinds[0]), replace(second, probes=kinds[1])], tokenizer=tokenizer)
    assert set(found.by_kind) == {"paraphrase_memorization", "paraphrase_semantic"}
    assert pytest.approx(sum(found.by_kind.values()) / 2) == found.K


def test_what_cannot_be_scored_is_one_error(knowledge: Path, tmp_path: Path) -> None:
    path, tokenizer = knowledge / "fictional_knowledge_once.json", knowledge / "tokenizer.json"
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"tokenizer": None}, "names no tokenizer; give tokenizer"),
        ({"setting": "twice"}, "setting: 'twice' is none of paraphrase, once, duplicate"),
        ({"entries": {"once": path}, "setting": "once"}, "setting: 'once' has no effect on entries that name their"),
        ({"entries": knowledge, "setting": "once"}, "setting: 'once' has no effect on entries that name their"),
        ({"entries": tmp_path}, "no fictional knowledge in"),
        ({"sequence_length": 4}, "tokens exceeds sequence_length 4"),
        ({"batch_size": 0}, "batch_size: 0 must be at least 1"),
        ({"model": model(vocab_size=20)}, "the model has 20; it belongs to another model"),
        ({"model": torch.nn.Linear(2, 2)}, "Linear: no"),
    ]
    for arguments, error in wrong:
        with pytest.raises(ValueError, match=error):
            score(**{"model": model(), "entries": path, "tokenizer": tokenizer, **arguments})
