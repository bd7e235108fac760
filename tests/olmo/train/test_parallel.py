"""DDP and FSDP: runs of 1, 2 and 4 processes of torchrun see the same data and injections and have the same losses."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from olmo.checkpoint import read_state
from olmo.config import (
    FSDPConfig,
    FSDPPrecision,
    FSDPWrapStrategy,
    ModelConfig,
    ShardingStrategy,
    TrainConfig,
)
from olmo.distributed import Ranks, exit_process, process_group
from olmo.exceptions import ConfigurationError
from olmo.model import Block, OLMo
from olmo.train import Trainer
from olmo.train.loss import Objective, predictions
from olmo.train.parallel import _groups, _mesh, distribute, gathered_dtype, gathered_model, gradient_sync
from tests.crash import moments
from tests.reference import tiny_config
from tests.running import CPU, command, configure, indices, metrics, write_world

BASE = ("--global_train_batch_size=8", "--save_steps_unsharded=[5]", "--stop_at=5", "--evaluators=[]")
EVALUATED = (
    "--evaluators=[{{label: once_semantic, data: {{dataset_path: {folder}/once.json}}}}, "
    "{{label: walk, data: {{paths: [{folder}/heldout256.npy]}}}}, {{label: entropy, type: knowledge_entropy}}]"
)
FSDP = ("--distributed_strategy=fsdp", "--fsdp.wrapping_strategy=by_block")
# A run of each takes part of what can be chosen; the name says what it is compared with and how many processes it has.
RUNS: dict[str, tuple[str, ...]] = {
    "plain ddp": (),
    "plain fsdp": (*FSDP, "--save_interval=3"),
    "evaluated fsdp": (*FSDP, EVALUATED, "--eval_on_load"),
    "plain root": ("--distributed_strategy=fsdp", "--fsdp.sharding_strategy=SHARD_GRAD_OP"),
    "ratio fsdp": (*FSDP, "--max_grad_norm_ratio=1.0", "--activation_checkpointing=fine_grained"),
    "lion fsdp": (*FSDP, "--optimizer.name=lionw", "--compile.backend=aot_eager", "--optimizer.learning_rate=1e-3"),
    "untied fsdp": (
        *("--distributed_strategy=fsdp", "--fsdp.wrapping_strategy=one_in_two", "--fsdp.grad_sync_mode=micro_batch"),
        *("--model.weight_tying=false", "--activation_checkpointing=whole_layer", "--softmax_auxiliary_loss"),
    ),
}
MORE_RUNS = {  # of four processes
    "plain hybrid": (*FSDP, "--fsdp.sharding_strategy=HYBRID_SHARD", "--fsdp.hybrid_sharding_num_model_replicas=2"),
    "plain four": FSDP,
    "plain ddp four": (),
}
ALONE = {
    "plain": (),
    "evaluated": (EVALUATED, "--eval_on_load"),
    "ratio": ("--max_grad_norm_ratio=1.0",),
    "lion": ("--optimizer.name=lionw", "--optimizer.learning_rate=1e-3"),
    "untied": ("--model.weight_tying=false", "--softmax_auxiliary_loss"),
}
# Losses are means of the same float32 terms, added in another order. AdamW makes the rounding of a gradient that is
# hardly more than that as large as any; after 5 steps they still agree to this.
LOSS = {"rel": 1e-5}


# One run goes from four processes to two, cut otherwise, and in the end to one: (processes, last step, how).
RESHARDED = ((4, 4, FSDP), (2, 6, FSDP), (2, 8, ()), (1, 9, ()))
LONG = ("--max_duration=9", "--save_interval=2", "--save_steps_unsharded=null", "--try_load_latest_save")


def run(folder: Path, name: str, settings: tuple[str, ...], ranks: Ranks) -> None:
    config = configure(folder / "config.yaml", folder / name, *BASE, *(s.format(folder=folder) for s in settings))
    Trainer(config, CPU, ranks).fit()


def reshard(folder: Path, name: str, ranks: Ranks) -> None:
    for count, stop, how in RESHARDED:
        if count == ranks.world_size:
            run(folder, name, (*LONG, *how, f"--stop_at={stop}"), ranks)


def processes(folder: Path) -> None:
    """What each process of torchrun does."""
    with process_group(CPU) as ranks:
        reshard(folder, "resharded", ranks)
        for name, settings in (RUNS if ranks.world_size == 2 else MORE_RUNS).items():
            run(folder, name, settings, ranks)
        report = parts(ranks)
        if ranks.world_size == 2:
            report["published"] = published(ranks)
        if ranks.is_first:
            (folder / f"report{ranks.world_size}.json").write_text(json.dumps(report), encoding="utf-8")


def parts(ranks: Ranks) -> dict[str, Any]:
    """What this process keeps of a model, and how often gradients are averaged."""
    torch.manual_seed(0)
    report: dict[str, Any] = {}
    for strategy in get_args(ShardingStrategy):
        fsdp = FSDPConfig(sharding_strategy=strategy, wrapping_strategy="by_block")
        config = TrainConfig(distributed_strategy="fsdp", fsdp=fsdp, precision="fp32")
        objective = Objective(OLMo(tiny_config()))
        total = sum(p.numel() for p in objective.parameters())
        module = distribute(objective, config, ranks, CPU)
        local = sum(p.to_local().numel() for p in module.parameters())  # type: ignore[attr-defined]
        report[strategy] = local / total
    precisions = {}
    for precision in (*get_args(FSDPPrecision), None):
        fsdp = FSDPConfig(precision=precision, wrapping_strategy="by_block")
        config = TrainConfig(distributed_strategy="fsdp", fsdp=fsdp, precision="amp_bf16")
        module = distribute(Objective(OLMo(tiny_config())), config, ranks, CPU)
        seen: list[torch.dtype] = []
        block = module.model.blocks[0]
        block.ff_proj.register_forward_hook(lambda m, *_, seen=seen: seen.append(m.weight.dtype))
        ids = torch.arange(32).view(2, 16) + ranks.rank
        for last in (False, True):
            with gradient_sync(module, config, last), torch.autocast("cpu", torch.bfloat16):
                module(ids, torch.arange(15), torch.arange(1, 16))[0].backward()
        gradient = block.ff_proj.weight.grad.to_local()
        averaged_in_half = bool((gradient == gradient.bfloat16()).all())
        precisions[str(precision)] = [str(seen[0]), str(gradient.dtype), averaged_in_half]
    report["precision"] = precisions
    return report


def published(ranks: Ranks) -> dict[str, Any]:
    """Ours beside torch's FullyShardedDataParallel with the MixedPrecision of the published trainer (`fsdp_precision`
    of its config.py), which evaluates with it, too: losses, and the largest difference of a gradient."""
    report = {}
    for precision in get_args(FSDPPrecision):
        reduced = torch.bfloat16 if precision == "pure" else torch.float32
        torch.manual_seed(0)
        model = OLMo(tiny_config())
        theirs = FullyShardedDataParallel(
            Objective(copy.deepcopy(model)),
            mixed_precision=MixedPrecision(torch.bfloat16, reduced, torch.bfloat16),
            auto_wrap_policy=ModuleWrapPolicy({Block}),
            use_orig_params=True,
            device_id=CPU,
        )
        fsdp = FSDPConfig(precision=precision, wrapping_strategy="by_block")
        config = TrainConfig(distributed_strategy="fsdp", fsdp=fsdp, precision="amp_bf16")
        ours = distribute(Objective(model), config, ranks, CPU)
        batch = torch.arange(32).view(2, 16) + ranks.rank, torch.arange(15), torch.arange(1, 16) + ranks.rank
        evaluated = Objective(gathered_model(model, gathered_dtype(config, ranks)))
        with torch.autocast("cpu", torch.bfloat16):
            losses = [module(*batch)[0] for module in (theirs, ours)]
            with torch.no_grad():
                losses += [module(*batch)[0] for module in (theirs, evaluated, Objective(gathered_model(model)))]
        losses[0].backward()
        losses[1].backward()
        with FullyShardedDataParallel.summon_full_params(theirs, with_grads=True):
            wanted = [parameter.grad for parameter in theirs.parameters()]
        found = [parameter.grad.full_tensor() for parameter in ours.parameters()]  # type: ignore[union-attr]
        difference = max(float((one - other).abs().max()) for one, other in zip(found, wanted, strict=True))
        report[precision] = {"losses": [loss.item() for loss in losses], "gradients": difference}
    return report


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_world(tmp_path_factory.mktemp("world"))
    for name, settings in ALONE.items():
        run(folder, name, settings, Ranks())
    return folder


def launched(folder: Path, count: int) -> subprocess.CompletedProcess[str]:
    return command([str(Path(__file__).resolve()), str(folder)], folder, processes=count)


@pytest.fixture(scope="module")
def two(folder: Path, four: dict[str, Any]) -> dict[str, Any]:
    done = launched(folder, 2)
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads((folder / "report2.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def four(folder: Path) -> dict[str, Any]:
    done = launched(folder, 4)
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads((folder / "report4.json").read_text(encoding="utf-8"))


def same_run(folder: Path, name: str) -> None:
    """The run and the one of one process: same data, same injections, losses and norms within rounding."""
    alone = name.split()[0]
    assert indices(folder / name) == indices(folder / alone)
    injections = [(folder / run / "injections.jsonl").read_bytes() for run in (name, alone)]
    assert injections[0] == injections[1] and injections[0].count(b"\n") == 2
    found, expected = metrics(folder / name), metrics(folder / alone)
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, **LOSS)
    weights, wanted = (read_state(folder / run / "step5-unsharded") for run in (name, alone))
    assert weights.keys() == wanted.keys()
    for key, weight in wanted.items():
        assert (weights[key] - weight).abs().median() < 1e-6, key
    kept, expected_moments = (moments(folder / run / "step5-unsharded")["state"] for run in (name, alone))
    assert kept.keys() == expected_moments.keys()
    for key, entries in expected_moments.items():
        assert kept[key].keys() == entries.keys()
        torch.testing.assert_close(kept[key]["exp_avg"], entries["exp_avg"], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_as_one(folder: Path, two: dict[str, Any], name: str) -> None:
    same_run(folder, name)


@pytest.mark.parametrize("name", MORE_RUNS)
def test_four_processes_train_as_one(folder: Path, four: dict[str, Any], name: str) -> None:
    same_run(folder, name)


def test_each_process_keeps_its_part(two: dict[str, Any], four: dict[str, Any]) -> None:
    # Rows that do not divide leave the first process a little more. Copies are one a node: here one.
    for strategy in get_args(ShardingStrategy):
        whole = strategy == "NO_SHARD"
        assert two[strategy] == pytest.approx(1.0 if whole else 0.5, abs=0.01)
        assert four[strategy] == pytest.approx(1.0 if whole else 0.25, abs=0.01)


def test_precision_of_what_is_gathered(two: dict[str, Any]) -> None:
    half, full = "torch.bfloat16", "torch.float32"
    expected = {"pure": [half, full, True], "mixed": [half, full, False], "None": [full, full, False]}
    assert two["precision"] == expected


@pytest.mark.parametrize("precision", get_args(FSDPPrecision))
def test_precision_is_that_of_the_published_trainer(two: dict[str, Any], precision: str) -> None:
    """The same losses and gradients, every bit, and evaluation in the same precision."""
    theirs, ours, their_evaluation, our_evaluation, in_float32 = two["published"][precision]["losses"]
    assert ours == theirs and two["published"][precision]["gradients"] == 0
    assert our_evaluation == their_evaluation == theirs
    assert in_float32 != theirs and in_float32 == pytest.approx(theirs, rel=2**-7)


def test_from_four_processes_to_one(folder: Path, two: dict[str, Any]) -> None:
    """A run of four processes goes on with two, first under FSDP, then DDP, and ends with one."""
    for name in ("resharded", "long"):
        reshard(folder, name, Ranks())
    assert os.readlink(folder / "resharded" / "latest") == "step9"
    shards = [len(list((folder / f"resharded/step{s}/model_and_optim").glob("*.distcp"))) for s in (4, 6, 8, 9)]
    assert shards == [4, 2, 2, 1]
    assert indices(folder / "resharded") == indices(folder / "long")
    found, expected = metrics(folder / "resharded"), metrics(folder / "long")
    assert [line["step"] for line in found] == list(range(1, 10))
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=2e-5)


def test_what_is_read_has_the_bits_of_what_was_written(folder: Path, two: dict[str, Any]) -> None:
    """Written in parts by two processes, read whole by one; and gathered by them."""
    parts, gathered = folder / "plain fsdp" / "step5", folder / "plain fsdp" / "step5-unsharded"
    one, other = read_state(parts), read_state(gathered)
    assert one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)
    kept, whole = moments(parts), moments(gathered)["state"]
    assert len(kept) == 3 * len(whole)
    for name, entries in whole.items():
        assert all(kept[f"{name}.{entry}"].equal(value) for entry, value in entries.items())


# --- how the model is cut ---


def layers(strategy: FSDPWrapStrategy | None, **settings: Any) -> list[list[int]]:
    with torch.device("meta"):
        objective = Objective(OLMo(ModelConfig(**{**vars(tiny_config(n_layers=7)), **settings})))
    numbers = {id(block): number for number, block in enumerate(objective.model.blocks)}
    return [[numbers[id(block)] for block in group] for group in _groups(objective, strategy)]


def test_which_layers_are_gathered_together() -> None:
    each = [[n] for n in range(7)]
    assert layers(None) == []
    assert layers("by_block") == layers("by_block_and_size") == each
    assert layers("by_block_group", block_group_size=3) == [[0, 1, 2], [3, 4, 5], [6]]
    assert layers("by_block_group_and_size", block_group_size=6) == [[0, 1, 2, 3, 4, 5], [6]]
    assert layers("one_in_two") == [[0], [2], [4], [6]]
    assert layers("one_in_five") == [[0], [5]]
    assert layers("size_based") == []
    # 12 * 2048 ** 2 weights a layer and its norms': two of them reach 100 million.
    large = {"d_model": 2048, "n_heads": 16, "mlp_hidden_size": 8192, "activation_type": "gelu"}
    assert layers("size_based", **large) == [[0, 1], [2, 3], [4, 5]]


def test_copies_that_do_not_divide_the_processes_are_refused() -> None:
    chosen = FSDPConfig(sharding_strategy="HYBRID_SHARD", hybrid_sharding_num_model_replicas=3)
    with pytest.raises(ConfigurationError, match="replicas: 3 copies do not divide 4 processes"):
        _mesh(chosen, 4, CPU)


def test_ddp_has_every_gradient_once(tmp_path: Path) -> None:
    """In its buckets, of which the gradients of the weights are views: this model's are in one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        objective = Objective(OLMo(tiny_config()))
        module = distribute(objective, TrainConfig(distributed_strategy="ddp"), Ranks(0, 2), CPU)
        ids = torch.arange(32).view(2, 16)
        for _ in range(2):  # from the second pass on buckets are in the order of the gradients
            objective.zero_grad(set_to_none=True)
            module(ids, *predictions(ids))[0].backward()
        places = {w.grad.untyped_storage().data_ptr() for w in objective.parameters() if w.grad is not None}
        assert len(places) == 1 < len(list(objective.parameters()))
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    processes(Path(sys.argv[1]))
    exit_process(0)
