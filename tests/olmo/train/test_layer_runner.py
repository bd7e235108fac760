"""Recomputed activations and compiled layers: the same losses and gradients, and less memory."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from olmo.config import ActivationCheckpointingStrategy as Strategy
from olmo.config import CompilerConfig, ModelConfig, TrainConfig
from olmo.exceptions import ConfigurationError
from olmo.memory.locate import find_layers
from olmo.model import OLMo
from olmo.model.causal_lm import CausalLM
from olmo.train.layer_runner import layer_runner, recomputes
from olmo.train.loss import Objective, predictions
from olmo.train.parallel import leaves_unused
from tests.architectures import built
from tests.reference import tiny_config, tiny_olmo2_config
from tests.running import CPU, series, train, write_world


def losses_and_gradients(
    model: ModelConfig, precision: str = "fp32", masked: bool = False, **settings: Any
) -> tuple[list[float], dict[str, Tensor]]:
    torch.manual_seed(0)
    network = OLMo(model)
    objective = Objective(network, 1e-3, layer_runner(TrainConfig(model=model, **settings), network))
    ids = torch.randint(128, (3, 16))
    seen = torch.ones_like(ids, dtype=torch.bool)
    seen[0, :5] = False
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "amp_bf16"):
        total, *parts = objective(ids, *predictions(ids), seen if masked else None)
    total.backward()
    gradients = {name: p.grad for name, p in objective.model.named_parameters()}
    return [part.item() for part in parts], gradients  # type: ignore[return-value]


def kept_bytes(strategy: Strategy | None) -> int:
    """Bytes of distinct storages that a forward pass keeps for the way back, without parameters: what autograd saves,
    and what Python holds, as `checkpoint` does the inputs of what it will compute again."""
    torch.manual_seed(0)
    config = tiny_config(n_layers=12)
    model = OLMo(config)
    gc.freeze()  # what is there is no longer listed
    kept: dict[int, Tensor] = {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.randint(128, (2, 64))
    run = layer_runner(TrainConfig(model=config, activation_checkpointing=strategy), model)
    objective = Objective(model, None, run)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        held = objective(ids, *predictions(ids))
    assert held[0].requires_grad
    for found in gc.get_objects():
        if type(found) is Tensor:
            pack(found)
    gc.unfreeze()
    return sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in weights)


def test_which_layers_of_a_strategy_are_recomputed() -> None:
    """As OLMo 0.6.0 chooses them (`should_checkpoint_block`)."""
    chosen = {s: [n for n in range(9) if recomputes(s, n)] for s in (None, *get_args(Strategy))}
    assert chosen == {
        None: [],
        "fine_grained": [],
        "whole_layer": list(range(9)),
        "one_in_two": [0, 2, 4, 6, 8],
        "one_in_three": [0, 3, 6],
        "one_in_four": [0, 4, 8],
        "one_in_eight": [0, 8],
        "two_in_three": [1, 2, 4, 5, 7, 8],
        "three_in_four": [1, 2, 3, 5, 6, 7],
    }


@pytest.mark.parametrize("strategy", get_args(Strategy))
@pytest.mark.parametrize("make", [tiny_config, tiny_olmo2_config])
def test_recomputing_changes_no_bit(make: Callable[..., ModelConfig], strategy: Strategy) -> None:
    """With dropout, whose masks must be those of the way forward, and in both precisions."""
    drops = dict.fromkeys(("attention_dropout", "residual_dropout", "embedding_dropout"), 0.2)
    model = make(n_layers=3, include_bias=True, **drops)
    for settings in ({}, {"precision": "amp_bf16"}, {"masked": True}):
        expected, gradients = losses_and_gradients(model, **settings)  # type: ignore[arg-type]
        found, found_gradients = losses_and_gradients(model, activation_checkpointing=strategy, **settings)  # type: ignore[arg-type]
        assert found == expected
        assert all(torch.equal(found_gradients[name], gradient) for name, gradient in gradients.items())


@pytest.mark.parametrize("kind", ["attention_dropout", "residual_dropout"])
def test_each_kind_of_dropout_in_a_layer_is_repeated(kind: str) -> None:
    model = tiny_config(**{kind: 0.2})
    expected, gradients = losses_and_gradients(model)
    found, found_gradients = losses_and_gradients(model, activation_checkpointing="whole_layer")
    assert found == expected
    assert all(torch.equal(found_gradients[name], gradient) for name, gradient in gradients.items())


def test_recomputing_keeps_less() -> None:
    kept = {s: kept_bytes(s) for s in (None, *get_args(Strategy))}
    more_and_more = ["one_in_eight", "one_in_four", "one_in_three", "one_in_two", "two_in_three", "three_in_four"]
    sizes = [kept[None], *(kept[name] for name in (*more_and_more, "whole_layer"))]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(sizes)
    assert kept["whole_layer"] < kept[None] / 5
    assert kept["fine_grained"] < 0.75 * kept[None]


@pytest.mark.parametrize("strategy", [None, "whole_layer", "fine_grained"])
@pytest.mark.parametrize("precision", ["fp32", "amp_bf16"])
def test_compiled_layers(strategy: Strategy | None, precision: str) -> None:
    """One graph for all layers, without a break, forward and back; the weights keep their names."""
    model = tiny_config(n_layers=3)
    expected, gradients = losses_and_gradients(model, precision)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = CompilerConfig(backend="aot_eager", fullgraph=True)
    found, found_gradients = losses_and_gradients(model, precision, compile=compiled, activation_checkpointing=strategy)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    near = 1e-6 if precision == "fp32" else 2**-7  # what a graph rounds elsewhere: bfloat16 has 8 significant bits
    assert found == pytest.approx(expected, rel=near)
    assert found_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        atol = 3 * near * gradient.abs().max().item()
        torch.testing.assert_close(found_gradients[name], gradient, rtol=0, atol=atol, msg=name)


# --- models of other families ---


def family_objective(name: str, config: TrainConfig, **overrides: Any) -> Objective:
    network = built(name, **overrides)
    model = CausalLM(network, config.model, [layer.module for layer in find_layers(network)])
    objective = Objective(model, 1e-3, layer_runner(config, model))
    return objective.train()


def family_gradients(objective: Objective) -> tuple[float, dict[str, Tensor]]:
    """Of rows with padding, with the same random numbers for dropout."""
    torch.manual_seed(1)
    ids = torch.randint(2, 128, (3, 16))
    seen = torch.ones_like(ids, dtype=torch.bool)
    seen[0, :5] = False
    loss = objective(ids, *predictions(ids), seen)[0]
    loss.backward()
    return loss.item(), {name: p.grad for name, p in objective.model.named_parameters()}  # type: ignore[misc]


@pytest.mark.parametrize("name", ["Llama", "Gemma 2", "GPT-2", "Phi-3.5-MoE"])
def test_recomputing_and_compiling_other_families_changes_no_bit(name: str) -> None:
    """GPT-2 has dropout, and Phi-3.5-MoE adds noise to what its router reads."""
    expected, gradients = family_gradients(family_objective(name, TrainConfig()))
    settings: list[dict[str, Any]] = [
        {"activation_checkpointing": strategy} for strategy in ("whole_layer", "two_in_three")
    ]
    if name == "GPT-2":
        torch._dynamo.reset()
        settings.append({"activation_checkpointing": "one_in_two", "compile": CompilerConfig(backend="eager")})
    for chosen in settings:
        found, found_gradients = family_gradients(family_objective(name, TrainConfig(**chosen)))
        assert found == expected, chosen
        for key, gradient in gradients.items():
            assert torch.equal(found_gradients[key], gradient), (chosen, key)


def test_layers_of_other_families_share_a_graph_in_training_alone() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    config = TrainConfig(compile=CompilerConfig(backend="eager", fullgraph=True))
    objective = family_objective("Llama", config, num_hidden_layers=12)  # more than torch compiles anew
    family_gradients(objective.eval())
    objective.zero_grad()
    assert not leaves_unused(objective.train())  # as DDP asks, of rows of another length
    assert objective.model.training and all(weight.grad is None for weight in objective.parameters())
    assert not torch._dynamo.utils.counters["stats"]
    family_gradients(objective.train())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_layers_of_other_families_are_recomputed_in_training_alone() -> None:
    runs: list[int] = []
    objective = family_objective("Llama", TrainConfig(activation_checkpointing="one_in_two"))
    for number, layer in enumerate(objective.model.blocks):
        layer.mlp.register_forward_pre_hook(lambda *_, number=number: runs.append(number))  # type: ignore[union-attr, operator]
    family_gradients(objective.eval())
    assert runs == [0, 1]
    family_gradients(objective.train())
    assert runs == [0, 1, 0, 1, 0]


# --- what cannot be ---


def test_a_backend_that_torch_does_not_have_is_named() -> None:
    for settings in ({"backend": "nope"}, {"mode": "nope"}):
        with pytest.raises(ConfigurationError, match=r"compile: .*nope"):
            layer_runner(TrainConfig(compile=CompilerConfig(**settings)), OLMo(tiny_config()))  # type: ignore[arg-type]


def test_neither_asked_for_the_blocks_run_by_themselves() -> None:
    assert layer_runner(TrainConfig(), OLMo(tiny_config())) is None


def test_dropout_is_not_drawn_anew_on_mps() -> None:
    """Where torch would (pytorch issue 127676), recomputed activations are refused."""
    mps, dropping = torch.device("mps"), tiny_config(residual_dropout=0.1)
    for model, device, refused in ((dropping, mps, True), (dropping, CPU, False), (tiny_config(), mps, False)):
        config = TrainConfig(model=model, activation_checkpointing="whole_layer")
        with pytest.raises(ConfigurationError, match=r"on MPS .* wrong gradients") if refused else nullcontext():
            assert layer_runner(config, OLMo(model), device) is not None
    assert layer_runner(TrainConfig(model=dropping), OLMo(dropping), mps) is None


def test_a_run_with_both_is_the_plain_run(tmp_path: Path) -> None:
    """Also the names in its checkpoint."""
    plain = write_world(tmp_path / "world") / "plain.yaml"
    expected = train(plain, tmp_path / "plain", "--stop_at=3")
    found = train(
        plain, tmp_path / "a", "--stop_at=3", "--compile.backend=eager", "--activation_checkpointing=one_in_two"
    )
    assert series(tmp_path / "a") == pytest.approx(series(tmp_path / "plain"), rel=1e-6)
    assert found.model.state_dict().keys() == expected.model.state_dict().keys()
    recomputed = train(plain, tmp_path / "b", "--stop_at=3", "--activation_checkpointing=fine_grained")
    assert series(tmp_path / "b") == series(tmp_path / "plain")
    for name, weight in expected.model.state_dict().items():
        assert torch.equal(recomputed.model.state_dict()[name], weight)
