"""Models that DDP and FSDP wrap, in a group of one process: measured by passes through the whole, or refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

from analysis.measure import measure
from olmo.distributed import Ranks
from olmo.memory.locate import describe
from olmo.memory.rescaling import rescale_model
from tests.architectures import built, observed, ragged
from tests.olmo.memory.test_unwrap import refusal, stack_of


@pytest.fixture(scope="module", autouse=True)
def _group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    place = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sharded(model: Any) -> Any:
    mesh = init_device_mesh("cpu", (1,))
    for layer in stack_of(model):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def flattened(model: Any, use_orig_params: bool) -> Any:
    policy = ModuleWrapPolicy({type(stack_of(model)[0])})
    device = torch.device("cpu")
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=use_orig_params, device_id=device)


FLATTENED = [partial(flattened, use_orig_params=True), partial(flattened, use_orig_params=False)]


@pytest.mark.parametrize(
    ("name", "wrap"),
    [
        *((name, wrap) for name in ("Llama", "Pythia") for wrap in (DistributedDataParallel, sharded, *FLATTENED)),
        ("OLMoE", DistributedDataParallel),
        ("OLMoE", sharded),
    ],
)
def test_what_is_sharded_is_measured_as_if_bare(name: str, wrap: Callable[[Any], Any]) -> None:
    bare, wrapped = built(name), wrap(built(name))
    assert describe(wrapped) == describe(bare)
    for _ in range(2):  # a pass that ended early would leave FSDP in disorder
        assert torch.equal(observed(wrapped, "abs", 3), observed(bare, "abs", 3))


def test_all_processes_measure_all_instances_of_a_sharded_model() -> None:
    """Each pass gathers weights from all, so none may have fewer passes."""
    rows = [row.numpy() for row in ragged()]
    how = (2, "abs", torch.device("cpu"))
    one = measure(built("Llama"), rows, *how, Ranks())
    two = measure(sharded(built("Llama")), rows, *how, Ranks(1, 2))  # one of two processes, alone
    assert two.to_dict() == one.to_dict()


def test_what_needs_the_weights_is_refused() -> None:
    assert refusal(sharded(built("Llama")), "relu") == (
        "model.layers.0.mlp.down_proj: FSDP has sharded this layer, so its gate cannot be told from its up projection; "
        "measure a saved checkpoint instead"
    )
    found = refusal(sharded(built("Qwen2-MoE")))
    assert found.startswith("Qwen2MoeForCausalLM: model.layers.0: cannot place the shared expert")
    assert found.endswith("; FSDP has sharded its weights: measure a saved checkpoint instead")
    with pytest.raises(ValueError, match="LlamaForCausalLM: FSDP has sharded its weights; edit the model before"):
        rescale_model(sharded(built("Llama")), {layer: torch.ones(48) for layer in range(2)})


@pytest.mark.parametrize("name", ["OLMoE", "DeepSeek-V3"])
@pytest.mark.parametrize("wrap", FLATTENED)
def test_experts_that_are_flattened_are_refused(name: str, wrap: Callable[[Any], Any]) -> None:
    """Of DeepSeek's layers the shared experts would be found, and measured alone."""
    assert "FullyShardedDataParallel has flattened it; shard the model with fully_shard" in refusal(wrap(built(name)))
