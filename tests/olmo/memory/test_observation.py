"""Memory coefficients, their entropy and its error, and rescaling, each against a direct computation.

The direct computation reads transformers' own modules, one instance at a time, without padding, in float64.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor, nn

from olmo.config import ActivationType, ModelConfig
from olmo.distributed import Ranks
from olmo.memory import CoefficientAverages, instance_means, jackknife_error, layer_entropy, observe
from olmo.memory import observation as memory_module
from olmo.model import OLMo
from tests.reference import scatter_, tiny_config, tiny_olmo2_config, to_transformers

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
        return instance_means(model, observation, ids, mask)


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


def entropy_by_definition(average: Tensor) -> list[float]:
    """Method section 1, term by term."""
    result = []
    for layer in average.double().tolist():
        total = sum(layer)
        result.append(-sum(c / total * math.log(c / total) for c in layer if c > 0))
    return result


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
    averages = CoefficientAverages(2, 48)
    averages.add(found, np.arange(len(LENGTHS)))
    np.testing.assert_allclose(averages.average, average, rtol=1e-5)
    np.testing.assert_allclose(layer_entropy(averages.average), entropy_by_definition(average), rtol=0, atol=1e-6)


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
        assert torch.equal(
            instance_means(model, observation, ids, mask), instance_means(model, observation, other, mask)
        )


def test_bfloat16_coefficients_are_reduced_in_float32() -> None:
    torch.manual_seed(0)
    model = OLMo(tiny_config()).eval()
    wanted = observed(model, ragged())
    found = observed(model.bfloat16(), ragged())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.mean(0), wanted.mean(0), rtol=0.05, atol=0.01)


# --- hooks -------------------------------------------------------------------------------------------------------


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


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


def test_hooks_go_when_they_cannot_all_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    model = OLMo(tiny_config())

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no more hooks")

    monkeypatch.setattr(model.blocks[1].ff_out, "register_forward_pre_hook", fail)
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


# --- entropy -----------------------------------------------------------------------------------------------------

averages_of_a_layer = hnp.arrays(
    np.float64,
    st.tuples(st.integers(1, 3), st.integers(1, 40)),
    elements=st.one_of(st.just(0.0), st.floats(1e-12, 1e6)),
).filter(lambda a: (a.sum(-1) > 0).all())


@given(averages_of_a_layer)
def test_entropy_lies_between_0_and_log_m(average: np.ndarray) -> None:
    entropy = layer_entropy(average)
    assert (entropy >= -1e-12).all() and (entropy <= math.log(average.shape[1]) + 1e-12).all()
    np.testing.assert_allclose(entropy, entropy_by_definition(torch.from_numpy(average)), rtol=0, atol=1e-9)
    np.testing.assert_allclose(layer_entropy(average * 7.0), entropy, rtol=0, atol=1e-9)


def test_entropy_of_known_cases() -> None:
    known = np.array([[1.0, 1, 1, 1], [5, 0, 0, 0], [1, 1, 0, 0], [3, 1, 0, 0]])
    quarter = 0.75 * math.log(4 / 3) + 0.25 * math.log(4)
    np.testing.assert_allclose(layer_entropy(known), [math.log(4), 0, math.log(2), quarter], rtol=1e-12, atol=1e-15)
    assert layer_entropy(np.ones((16, 8192))).sum() == pytest.approx(16 * 13 * math.log(2), rel=1e-12)


@pytest.mark.parametrize("bad", [[0.0, 0.0], [1.0, -0.1], [1.0, math.nan], [1.0, math.inf]])
def test_coefficients_that_make_no_distribution_are_refused(bad: list[float]) -> None:
    with pytest.raises(ValueError, match="must be finite, not negative and not all 0 in a layer"):
        layer_entropy(np.array([[1.0, 2.0], bad]))


# --- standard errors ---------------------------------------------------------------------------------------------


def test_averages_and_left_out_groups_by_definition() -> None:
    random = np.random.default_rng(0)
    means = random.gamma(1.0, size=(150, 2, 6)).astype(np.float32)
    averages = CoefficientAverages(2, 6)
    for start in range(0, 150, 7):  # batches that straddle groups
        numbers = np.arange(start, min(start + 7, 150))
        averages.add(torch.from_numpy(means[numbers]), numbers)
    assert averages.instances == 150
    np.testing.assert_allclose(averages.average, means.astype(np.float64).mean(0), rtol=1e-12)
    left_out = averages.leave_one_out()
    assert left_out.shape == (64, 2)
    for group in range(64):
        kept = means[np.arange(150) % 64 != group].astype(np.float64).mean(0)
        np.testing.assert_allclose(left_out[group], entropy_by_definition(torch.from_numpy(kept)), rtol=1e-9)


def test_several_instances_of_a_group_in_one_batch_all_count() -> None:
    averages = CoefficientAverages(1, 2)
    averages.add(torch.tensor([[[1.0, 2.0]], [[3.0, 6.0]], [[5.0, 1.0]]]), np.array([0, 64, 128]))
    assert averages.average.tolist() == [[3.0, 3.0]] and averages.instances == 3


def test_the_jackknife_of_a_mean_is_the_formula() -> None:
    values = np.random.default_rng(0).normal(size=(40, 3))
    left_out = (values.sum(0) - values) / 39
    np.testing.assert_allclose(jackknife_error(left_out), values.std(0, ddof=1) / math.sqrt(40), rtol=1e-12)


def test_few_instances_give_few_groups_and_one_gives_no_error() -> None:
    averages = CoefficientAverages(2, 3)
    averages.add(torch.rand(1, 2, 3) + 0.1, np.array([5]))
    assert averages.leave_one_out().shape == (0, 2)
    assert np.isnan(jackknife_error(averages.leave_one_out())).all()
    averages.add(torch.rand(2, 2, 3) + 0.1, np.array([6, 7]))
    assert averages.leave_one_out().shape == (3, 2)
    assert (jackknife_error(averages.leave_one_out()) > 0).all()


def test_the_interval_of_two_errors_covers_the_truth_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    base = random.gamma(1.0, size=(2, 12)) + 0.2
    noise = 0.5
    # E[exp(noise * z)] is the same for every memory, so the true average is proportional to `base`.
    truth = sum(entropy_by_definition(torch.from_numpy(base)))
    covered = 0
    for _ in range(200):
        sample = base * np.exp(noise * random.normal(size=(256, 2, 12)))
        averages = CoefficientAverages(2, 12)
        averages.add(torch.from_numpy(sample), np.arange(256))
        error = float(jackknife_error(averages.leave_one_out().sum(1)))
        covered += abs(layer_entropy(averages.average).sum() - truth) < 1.96 * error
    assert 180 <= covered <= 198


def test_ranks_add_up() -> None:
    class Doubled(Ranks):
        """Another rank that has seen exactly the same."""

        def sum(self, values: np.ndarray) -> np.ndarray:
            return 2 * values

    averages = CoefficientAverages(1, 3)
    averages.add(torch.tensor([[[1.0, 2.0, 3.0]]]), np.array([0]))
    averages.reduce(Doubled(0, 2))
    assert averages.instances == 2 and averages.average.tolist() == [[1.0, 2.0, 3.0]]
