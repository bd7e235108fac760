"""Memory coefficients, their entropy and its error, and rescaling, each against a direct computation.

The direct computation reads transformers' own modules, one instance at a time, without padding, in float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from olmo.config import ActivationType, ModelConfig
from olmo.memory import CoefficientAverages, instance_means, layer_entropy, observe
from olmo.memory import forward as memory_module
from olmo.model import OLMo
from tests.reference import entropy_by_definition, scatter_, tiny_config, tiny_olmo2_config, to_transformers

LENGTHS = (9, 4, 1, 13, 13)


def ragged(vocabulary: int = 128) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(2, vocabulary, (n,), generator=generator) for n in LENGTHS]


def pad(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=1)
    lengths = torch.tensor([len(row) for row in rows])
    return ids, (torch.arange(ids.shape[1]) < lengths[:, None]).long()


def direct_means(model: nn.Module, rows: list[Tensor], coefficients: Any) -> Tensor:
    """1/T sum_j C of every instance and layer, (B, L, M): each instance alone through the whole model.

    `coefficients(l)` gives for layer l ({name: (module, "input" or "output")}, function of what is heard there -> C).
    """
    layers = model.config.n_layers if isinstance(model, OLMo) else model.config.num_hidden_layers
    asked = [coefficients(layer) for layer in range(layers)]
    heard: dict[tuple[int, str], Tensor] = {}

    def listen(key: tuple[int, str], side: str) -> Any:
        def hook(_: Any, args: Any, output: Tensor) -> None:
            heard[key] = (args[0] if side == "input" else output).double()

        return hook

    handles = [
        module.register_forward_hook(listen((layer, name), side))
        for layer, (sources, _) in enumerate(asked)
        for name, (module, side) in sources.items()
    ]
    means = []
    for row in rows:
        with torch.no_grad():
            model(row[None])
        means.append(
            torch.stack(
                [
                    formula(*(heard[layer, name].flatten(0, -2) for name in sources)).mean(0)
                    for layer, (sources, formula) in enumerate(asked)
                ]
            )
        )
    for handle in handles:
        handle.remove()
    return torch.stack(means)


def swiglu_abs(gate: Tensor, up: Tensor) -> Tensor:
    return (F.silu(gate) * up).abs()


def swiglu_relu(gate: Tensor, up: Tensor) -> Tensor:
    return (gate.clamp(min=0) * up).clamp(min=0)


def observed(model: nn.Module, rows: list[Tensor], coefficient: str = "abs") -> Tensor:
    """The same with our own code: all instances in one padded batch."""
    ids, mask = pad(rows)
    with observe(model, coefficient) as observation:
        return torch.stack(instance_means(model, observation, ids, mask), 1)


@pytest.mark.parametrize("tokens", [1, 5, 13, 30, 1000])
@pytest.mark.parametrize("coefficient", ["abs", "relu"])
@pytest.mark.parametrize(
    "config", [tiny_config(), tiny_olmo2_config(), tiny_config(include_bias=True, activation_type="gelu")]
)
def test_any_piece_of_a_batch_at_a_time(
    monkeypatch: pytest.MonkeyPatch, config: ModelConfig, coefficient: str, tokens: int
) -> None:
    """Pieces of instances, of several instances and of the memories give what one pass of the whole model gives."""
    torch.manual_seed(0)
    model = scatter_(OLMo(config)).eval()
    ids, mask = pad(ragged())
    whole = []
    for used in (mask, None):
        with observe(model, coefficient) as observation, torch.no_grad():
            observation.mask, observation.ends_early = used, False
            model(ids)
            whole.append(observation.means)
    monkeypatch.setattr(memory_module, "PROJECTED_AT_ONCE", tokens * config.projection_size)
    monkeypatch.setattr(memory_module, "SUMMED_AT_ONCE", 3 * config.inner_size)
    monkeypatch.setattr(memory_module, "MEMORIES_AT_ONCE", 7)
    with observe(model, coefficient) as again:
        for used, expected in zip((mask, None, mask), (*whole, whole[0])):  # nothing of one pass is left in the next
            torch.testing.assert_close(instance_means(model, again, ids, used), expected)


@pytest.mark.parametrize("coefficient", ["abs", "relu"])
@pytest.mark.parametrize(
    "config", [tiny_config(), tiny_olmo2_config(), tiny_config(include_bias=True, activation_type="gelu", rope=False)]
)
def test_layers_to_compile_are_one_graph_and_give_the_same(
    monkeypatch: pytest.MonkeyPatch, config: ModelConfig, coefficient: str
) -> None:
    """As a GPU runs them, but for the code that a compiler would make of the graph."""
    torch.manual_seed(0)
    model = scatter_(OLMo(config)).eval()
    ids, mask = pad(ragged())
    as_graphs = torch.compile(memory_module._layer, fullgraph=True, backend="aot_eager")
    calls = []

    def compiled(*args: Any) -> Any:
        calls.append(args)
        return as_graphs(*args)

    monkeypatch.setattr(memory_module, "_compiled_layer", lambda: compiled)
    with observe(model, coefficient) as observation:
        for used in (mask, None):
            expected = instance_means(model, observation, ids, used)
            observation.compiled = True
            torch.testing.assert_close(instance_means(model, observation, ids, used), expected)
            observation.compiled = False
    assert len(calls) == (4 if coefficient == "abs" else 0)  # relu looks at numbers on the way, which a graph cannot


# --- coefficients of our own model -------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny_config, tiny_olmo2_config], ids=["OLMo", "OLMo 2"])
@pytest.mark.parametrize(("coefficient", "formula"), [("abs", swiglu_abs), ("relu", swiglu_relu)])
def test_coefficients_and_entropy_are_those_of_transformers(make: Any, coefficient: str, formula: Any) -> None:
    torch.manual_seed(0)
    model = scatter_(OLMo(make(n_kv_heads=2)).double().eval())
    theirs = to_transformers(model).double()

    def coefficients(layer: int) -> Any:
        mlp = theirs.model.layers[layer].mlp
        return {"gate": (mlp.gate_proj, "output"), "up": (mlp.up_proj, "output")}, formula

    wanted = direct_means(theirs, ragged(), coefficients)
    found = observed(model, ragged(), coefficient)
    assert found.dtype == torch.float32 and found.shape == (len(LENGTHS), 2, 48)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-7)

    # Mean over the tokens of an instance first, then over instances: here that is another number.
    average = wanted.mean(0)
    by_token = (wanted * torch.tensor(LENGTHS)[:, None, None]).sum(0) / sum(LENGTHS)
    assert abs(sum(entropy_by_definition(average)) - sum(entropy_by_definition(by_token))) > 1e-3
    averages = CoefficientAverages([48, 48])
    averages.add(found.flatten(1), np.arange(len(LENGTHS)))
    np.testing.assert_allclose([*averages.layers.values()], average, rtol=1e-5)
    wanted_entropy = entropy_by_definition(average)
    np.testing.assert_allclose(layer_entropy(averages.layers.values()), wanted_entropy, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("kind", "function"), [("gelu", F.gelu), ("relu", F.relu)])
@pytest.mark.parametrize("coefficient", ["abs", "relu"])
def test_coefficients_of_a_plain_mlp(kind: ActivationType, function: Any, coefficient: str) -> None:
    torch.manual_seed(0)
    model = scatter_(OLMo(tiny_config(activation_type=kind, include_bias=True)).double().eval())

    def coefficients(layer: int) -> Any:
        def formula(projected: Tensor) -> Tensor:
            signed = function(projected)
            return signed.abs() if coefficient == "abs" else signed.clamp(min=0)

        return {"up": (model.blocks[layer].ff_proj, "output")}, formula

    found = observed(model, ragged(), coefficient)
    assert found.shape == (len(LENGTHS), 2, 96)
    torch.testing.assert_close(found.double(), direct_means(model, ragged(), coefficients), rtol=1e-5, atol=1e-7)


def test_without_a_mask_every_position_counts() -> None:
    torch.manual_seed(0)
    model = OLMo(tiny_config()).eval()
    rows = [row for row in ragged() if len(row) == 13]
    with observe(model) as observation:
        plain = instance_means(model, observation, torch.stack(rows))
        masked = instance_means(model, observation, torch.stack(rows), torch.ones(2, 13))
    torch.testing.assert_close(plain, masked, rtol=1e-5, atol=1e-7)


def test_padding_is_no_token_whatever_it_holds() -> None:
    torch.manual_seed(0)
    model = OLMo(tiny_config()).eval()
    ids, mask = pad(ragged())
    other = torch.where(mask.bool(), ids, 77)
    with observe(model) as observation:
        found, again = (torch.cat(instance_means(model, observation, rows, mask), 1) for rows in (ids, other))
    assert torch.equal(found, again)


def test_bfloat16_coefficients_are_reduced_in_float32() -> None:
    torch.manual_seed(0)
    model = OLMo(tiny_config()).eval()
    wanted = observed(model, ragged())
    found = observed(model.bfloat16(), ragged())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.mean(0), wanted.mean(0), rtol=0.05, atol=0.01)


# --- hooks -------------------------------------------------------------------------------------------------------


def hooks(model: nn.Module) -> int:
    """Of any model, with the taps of our blocks."""
    taps = sum(getattr(module, "tap", None) is not None for module in model.modules())
    return taps + sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def tiny_other(name: str) -> nn.Module:
    shape = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = getattr(transformers, f"{name}Config")(**shape, intermediate_size=48)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


@pytest.mark.parametrize("coefficient", ["abs", "relu"])
@pytest.mark.parametrize("name", ["ours", "Llama", "Olmoe"])
def test_hooks_are_there_inside_the_block_only(name: str, coefficient: str) -> None:
    model = OLMo(tiny_config()).eval() if name == "ours" else tiny_other(name)
    ids, mask = pad(ragged())
    before = model(ids) if name == "ours" else model(ids).logits
    with observe(model, coefficient) as observation:
        assert hooks(model) > 0
        instance_means(model, observation, ids, mask)
    assert hooks(model) == 0
    assert torch.equal(before, model(ids) if name == "ours" else model(ids).logits)


def test_hooks_go_when_the_block_fails() -> None:
    model = OLMo(tiny_config())
    with pytest.raises(KeyError, match="failed"), observe(model, "relu"):
        raise KeyError("failed")
    assert hooks(model) == 0


def test_hooks_go_when_the_forward_pass_fails() -> None:
    model = OLMo(tiny_config())
    with pytest.raises(IndexError), observe(model) as observation:
        instance_means(model, observation, torch.tensor([[500]]))  # beyond the vocabulary
    assert hooks(model) == 0
    other = tiny_other("Llama")
    with pytest.raises(IndexError), observe(other) as observation:
        instance_means(other, observation, torch.tensor([[500]]))
    assert hooks(other) == 0


def test_hooks_go_when_they_cannot_all_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_other("Llama")

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no more hooks")

    monkeypatch.setattr(model.model.layers[1].mlp.down_proj, "register_forward_pre_hook", fail)  # type: ignore[union-attr, index]
    with pytest.raises(RuntimeError, match="no more hooks"), observe(model):
        raise AssertionError("never reached")
    assert hooks(model) == 0


def test_the_pass_ends_at_the_last_coefficient() -> None:
    model = OLMo(tiny_config())
    model.blocks[-1].ff_out.forward = model.logits = lambda *_: pytest.fail("computed for nothing")  # type: ignore
    with observe(model) as observation:
        instance_means(model, observation, torch.tensor([[1, 2, 3]]))


def test_another_coefficient_is_refused() -> None:
    with (
        pytest.raises(ValueError, match="coefficient 'square' is none of abs, relu"),
        observe(OLMo(tiny_config()), "square"),
    ):
        pass
