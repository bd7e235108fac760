"""Evaluators of models of other families, against transformers' own logits and losses."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from torch import Tensor

from olmo.config import ModelConfig, load
from olmo.distributed import Ranks
from olmo.eval.probes import score_probes
from olmo.knowledge.entries import Probe
from olmo.memory.locate import find_layers
from olmo.model.causal_lm import CausalLM
from olmo.tokenizer import encode, load_tokenizer
from tests.architectures import ARCHITECTURES, built
from tests.reference import entropy_by_definition
from tests.running import BATCH, CPU, LENGTH, instances, metrics, order, train, write_family, write_world


def made_probes() -> list[Probe]:
    """Of many lengths, so that most are padded on the right in their batches."""
    random = np.random.default_rng(0)
    texts = (random.integers(0, 128, random.integers(2, 40)).tolist() for _ in range(12))
    return [Probe("once", "semantic", n, 0, tuple(ids), 1 + n % (len(ids) - 1)) for n, ids in enumerate(texts)]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_padding_on_the_right_changes_no_probe(name: str) -> None:
    """Rows are padded, with a token that is none to the model, and no mask says so."""
    network = built(name)
    model = CausalLM(network, ModelConfig(), [layer.module for layer in find_layers(network)])
    probes = made_probes()
    table = score_probes(model, probes, 120, CPU, Ranks())
    with torch.no_grad():
        for row, probe in enumerate(probes):
            logits = network(torch.tensor([probe.input_ids]), use_cache=False).logits[0].double()
            places = range(probe.target_start, len(probe.input_ids))
            scores = [logits.log_softmax(-1)[place - 1, probe.input_ids[place]].item() for place in places]
            assert table.sum_log_prob[row] == pytest.approx(sum(scores), rel=1e-5, abs=1e-5)
            greedy = all(logits[place - 1].argmax() == probe.input_ids[place] for place in places)
            assert table.exact_match[row] == greedy


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder with a run of Gemma 2, which caps its logits, evaluated before its first step; and its first model."""
    folder = write_world(tmp_path_factory.mktemp("world"))
    write_family(folder, "Gemma 2")
    entropy = {"label": "memories", "type": "knowledge_entropy"}
    asked = json.dumps([*load(folder / "config.yaml").evaluators, entropy], default=vars)
    train(folder / "family.yaml", folder / "run", "--eval_on_load", "--max_duration=1", f"--evaluators={asked}")
    return folder, built("Gemma 2", max_position_embeddings=LENGTH)


def test_held_out_losses_are_those_of_transformers(evaluated: tuple[Path, Any]) -> None:
    folder, network = evaluated
    found = metrics(folder / "run")[0]
    for name, count in (("heldout", 5), ("other", 3)):
        rows = torch.from_numpy(np.fromfile(folder / f"{name}{LENGTH}.npy", "<u2")[: count * LENGTH].astype(np.int64))
        with torch.no_grad():
            losses = [network(row[None], labels=row[None]).loss.item() for row in rows.view(count, LENGTH)]
        table = pyarrow.parquet.read_table(folder / "run/losses/step0.parquet")
        of_file = table.filter(pyarrow.compute.field("label") == f"walk/{name}")["loss"].to_pylist()
        assert of_file == pytest.approx(losses, rel=2e-6)
        assert found[f"eval/walk/{name}/CrossEntropyLoss"] == pytest.approx(sum(losses) / count, rel=2e-6)


def test_probes_are_scored_by_transformers_logits(evaluated: tuple[Path, Any]) -> None:
    folder, network = evaluated
    tokenizer = load_tokenizer(str(folder / "tokenizer.json"))
    entries = json.loads((folder / "paraphrase.json").read_text())
    expected = []
    for entry in entries:
        for prompt, target in zip(entry["mem_input"], entry["mem_target"]):
            start = len(encode(tokenizer, [prompt])[0])
            ids = torch.tensor(encode(tokenizer, [f"{prompt} {target}"]))
            with torch.no_grad():
                scores = network(ids).logits[0].double().log_softmax(-1)
            expected.append(scores[range(start - 1, ids.shape[1] - 1), ids[0, start:]].mean().item())
    table = pyarrow.parquet.read_table(folder / "run/probes/step0.parquet").to_pylist()
    asked = [row for row in table if (row["setting"], row["kind"]) == ("paraphrase", "memorization")]
    assert [row["mean_log_prob"] for row in asked] == pytest.approx(expected, rel=1e-5)
    shown = metrics(folder / "run")[0]["eval/paraphrase_memorization/log_probability"]
    assert shown == pytest.approx(sum(expected) / len(expected), rel=1e-5)


def test_knowledge_entropy_is_that_of_a_direct_computation(evaluated: tuple[Path, Any]) -> None:
    folder, network = evaluated
    double, heard = copy.deepcopy(network).double(), dict[int, Tensor]()
    for number, layer in enumerate(double.model.layers):

        def hook(module: torch.nn.Module, args: tuple[Tensor, ...], number: int = number) -> None:
            heard[number] = heard.get(number, torch.zeros(())) + args[0].abs().mean(1)[0]

        layer.mlp.down_proj.register_forward_pre_hook(hook)
    with torch.no_grad():
        for row in instances(folder, LENGTH)[order(11, 0)[:BATCH]]:  # the run's first batch
            double(torch.from_numpy(row)[None])
    layers = entropy_by_definition(torch.stack([heard[number] for number in sorted(heard)]))
    found = metrics(folder / "run")[0]
    assert [found[f"eval/memories/layer_{number}"] for number in range(2)] == pytest.approx(layers, abs=1e-6)
    assert found["eval/memories/knowledge_entropy"] == pytest.approx(sum(layers), abs=1e-6)
