"""DDP and FSDP of models of other families: two processes train as a plain loop over transformers' class."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from olmo.config import ModelConfig, TrainConfig
from olmo.distributed import Ranks, exit_process, process_group
from olmo.memory.locate import find_layers
from olmo.model.causal_lm import CausalLM
from olmo.train import Trainer
from olmo.train.loss import Objective, predictions
from olmo.train.parallel import distribute, gathered_dtype, gathered_model
from tests.architectures import built
from tests.families import built as any_family
from tests.plain_loop import batches, plain_loop, write_run
from tests.running import CPU, command, configure, same, series

NO_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {"tie_word_embeddings": True},
    "Gemma 2": {},
    "GPT-2": NO_DROPOUT,
    "OLMoE": {"router_aux_loss_coef": 0.1},
}
FSDP = ("--distributed_strategy=fsdp", "--fsdp.wrapping_strategy=by_block")
DDP = ("--distributed_strategy=ddp",)
STEPS = 12  # of two epochs
SAVES = (f"--save_interval={STEPS}", f"--save_interval_unsharded={STEPS}", "--try_load_latest_save")
# The first word of a run is a key of FAMILIES, without its spaces.
RUNS: dict[str, tuple[str, ...]] = {
    "Llama ddp": (*DDP, "--activation_checkpointing=whole_layer"),
    "Llama fsdp": (*FSDP, *SAVES),
    "Gemma2 fsdp": (*FSDP, "--fsdp.sharding_strategy=SHARD_GRAD_OP", "--activation_checkpointing=one_in_two"),
    "GPT-2 ddp": DDP,
    "GPT-2 fsdp": (*FSDP, "--activation_checkpointing=whole_layer", "--compile.backend=eager"),
    "OLMoE ddp": DDP,
    "OLMoE fsdp": (
        *("--distributed_strategy=fsdp", "--fsdp.wrapping_strategy=one_in_two", "--fsdp.grad_sync_mode=micro_batch"),
        *("--fsdp.sharding_strategy=HYBRID_SHARD", "--fsdp.hybrid_sharding_num_model_replicas=2", *SAVES),
    ),
}
HALF = ("Gemma 2", "OLMoE")


def folder_of(folder: Path, family: str) -> Path:
    return folder / family.replace(" ", "")


def processes(folder: Path) -> None:
    """What each process of torchrun does."""
    with process_group(CPU) as ranks:
        for name, settings in RUNS.items():
            world = folder / name.split()[0]
            trainer = Trainer(
                configure(world / "family.yaml", folder / name, f"--stop_at={STEPS}", *settings), CPU, ranks
            )
            trainer.fit()
            trained = gathered_model(trainer.model)
            # A weight that is shared is shared in what evaluates, too.
            assert len(list(trained.parameters())) == len(list(trainer.model.parameters()))
            if ranks.is_first:
                torch.save(trained.state_dict(), folder / name / "weights.pt")
            if SAVES[0] in settings:
                resumed = Trainer(configure(world / "family.yaml", folder / name, *settings), CPU, ranks)
                assert same(gathered_model(resumed.model).state_dict(), trained.state_dict())
        train_with_unused_weights(ranks)
        report = {family: half(folder, family, ranks) for family in HALF}
        if ranks.is_first:
            (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")


def train_with_unused_weights(ranks: Ranks) -> None:
    """DeepSeek V3.2 has weights without a gradient, for which DDP would wait."""
    network = any_family("deepseek_v32")
    model = CausalLM(network, ModelConfig(), [layer.module for layer in find_layers(network)])
    module = distribute(Objective(model), TrainConfig(distributed_strategy="ddp"), ranks, CPU)
    assert all(weight.grad is None for weight in model.parameters())
    ids = torch.arange(32).view(2, 16) + ranks.rank
    for _ in range(2):
        module(ids, *predictions(ids))[0].backward()
    assert {weight.grad is None for weight in model.parameters()} == {True, False}


def half(folder: Path, family: str, ranks: Ranks) -> list[float]:
    """Losses with gathered weights in bfloat16: in training, of the model that evaluates, and of one in float32."""
    world = folder_of(folder, family)
    config = configure(world / "family.yaml", folder / "half", *FSDP, "--precision=amp_bf16")
    trainer = Trainer(config, CPU, ranks)
    trainer.model.eval()  # without dropout
    batch = torch.arange(32).view(2, 16) + ranks.rank, torch.arange(15), torch.arange(1, 16)
    with torch.autocast("cpu", torch.bfloat16):
        loss = trainer.train_step.module(*batch)[0]
        loss.backward()
        evaluated = (gathered_model(trainer.model, dtype) for dtype in (gathered_dtype(config, ranks), torch.float32))
        with torch.no_grad():
            return [loss.item(), *(Objective(model.eval())(*batch)[0].item() for model in evaluated)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("families")
    for family, settings in FAMILIES.items():
        folder_of(folder, family).mkdir()
        write_run(folder_of(folder, family), built(family, **settings))
    done = command([str(Path(__file__).resolve()), str(folder)], folder, processes=2)
    assert done.returncode == 0, done.stderr[-5000:]
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_two_processes_train_as_a_plain_loop(folder: Path, family: str) -> None:
    """Under DDP and FSDP, also where layers are recomputed and compiled."""
    network = built(family, **FAMILIES[family])
    # Each process has every other row, two at a time.
    rows = [batch[[0, 2, 4, 6, 1, 3, 5, 7]] for batch in batches(folder_of(folder, family), STEPS)]
    losses, _ = plain_loop(network, rows)
    for run in (name for name in RUNS if name.split()[0] == family.replace(" ", "")):
        found = list(series(folder / run).values())
        assert found == pytest.approx(losses, rel=1e-6)
        weights = torch.load(folder / run / "weights.pt")
        for name, weight in network.named_parameters():
            found_weight = weights[f"network.{name}"]
            if name.endswith("c_attn.bias"):  # of keys: its gradient is 0 but for rounding, which AdamW makes large
                weight, found_weight = (bias.view(3, -1)[[0, 2]] for bias in (weight, found_weight))
            torch.testing.assert_close(found_weight, weight, rtol=0, atol=1e-5, msg=f"{run}: {name}")


@pytest.mark.parametrize("run", ["Llama fsdp", "OLMoE fsdp"])
def test_what_two_processes_save_one_process_and_transformers_read(folder: Path, run: str) -> None:
    trained = torch.load(folder / run / "weights.pt")
    resumed = Trainer(configure(folder / run.split()[0] / "family.yaml", folder / run, *SAVES), CPU, Ranks())
    assert resumed.start.folder == folder / run / f"step{STEPS}" and same(resumed.model.state_dict(), trained)
    network = transformers.AutoModelForCausalLM.from_pretrained(folder / run / f"step{STEPS}-unsharded")
    assert same({f"network.{name}": tensor for name, tensor in network.state_dict().items()}, trained)


@pytest.mark.parametrize("family", HALF)
def test_evaluation_in_bfloat16_computes_what_training_computes(folder: Path, family: str) -> None:
    """Every bit of the loss; with weights in float32 it is another."""
    trained, evaluated, in_float32 = json.loads((folder / "report.json").read_text(encoding="utf-8"))[family]
    assert evaluated == trained
    assert in_float32 != trained and in_float32 == pytest.approx(trained, rel=2**-7)


if __name__ == "__main__":
    processes(Path(sys.argv[1]))
    exit_process(0)
