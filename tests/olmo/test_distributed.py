"""Processes and devices. What needs two processes runs once, in a torchrun of this very file; tests read its report."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from olmo.checkpoint import load_model
from olmo.config import DDPConfig, DDPGradSyncMode, DistributedStrategy, TrainConfig
from olmo.distributed import Ranks, adopt_launcher, exit_process, pick_device, process_group
from olmo.exceptions import ConfigurationError
from olmo.files.tensors import read_training_state
from olmo.train import Trainer
from olmo.train.parallel import check_strategy, distribute, gradient_sync
from olmo.train.stopping import Signals, Watch
from tests.running import BATCH, CPU, LENGTH, command, configure, metrics, slurm_variables, train, write_world

# One short text a round: the second process has nothing to inject, and still takes part in the count.
# Its three rows come one by one: the last micro-batch, whose gradients are averaged, is a whole one.
LONELY = ("--evaluators=[]", "--stop_at=4", "--console_log_interval=100", "--device_train_microbatch_size=1")
# What wraps the model in another way: no tied weights, unused parameters looked for, layers compiled and recomputed.
WRAPPED = (
    *("--model.weight_tying=false", "--ddp.find_unused_params=true", "--injection=null", "--inject_interval=null"),
    *("--compile.backend=aot_eager", "--activation_checkpointing=one_in_two", "--softmax_auxiliary_loss=true"),
    *("--evaluators=[]", "--stop_at=2", "--save_interval=2", "--early_stopping_factor=100"),
)


def one_text(folder: Path) -> list[str]:
    entries = json.loads((folder / "once.json").read_text(encoding="utf-8"))
    (folder / "one.json").write_text(json.dumps(entries[:3]), encoding="utf-8")
    return ["--injection.paraphrase=null", f"--injection.once={folder / 'one.json'}"]


# --- one process ---


def test_alone_every_collective_is_the_identity() -> None:
    ranks = Ranks()
    values = np.array([1.5, -2.0])
    assert ranks.is_first and ranks.sum(values).tolist() == [1.5, -2.0]
    assert ranks.sum_tensor(torch.tensor([3])).tolist() == [3]
    assert ranks.largest(4) == ranks.broadcast_int(4) == 4
    ranks.barrier()


def test_alone_there_is_no_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with process_group(CPU) as ranks:
        assert ranks == Ranks(0, 1) and not torch.distributed.is_initialized()


def test_alone_the_model_trains_as_it_is_whatever_the_strategy() -> None:
    model = nn.Linear(2, 2)
    for strategy in (*get_args(DistributedStrategy), None):
        assert distribute(model, TrainConfig(distributed_strategy=strategy), Ranks(), CPU) is model
    with gradient_sync(model, TrainConfig(), last_micro_batch=False):
        pass


def test_several_processes_need_a_strategy() -> None:
    for strategy, name in ((None, "null"), ("single", "single")):
        with pytest.raises(ConfigurationError, match=rf"distributed_strategy: {name} runs on one process; use ddp or"):
            check_strategy(TrainConfig(distributed_strategy=strategy), Ranks(0, 2))


def test_device_by_name() -> None:
    assert pick_device("cpu") == CPU
    with pytest.raises(ConfigurationError, match="no such device: gpu; use cpu, cuda, cuda:1 or mps"):
        pick_device("gpu")


def test_without_a_gpu_the_device_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device() == CPU
    with pytest.raises(ConfigurationError, match="cuda:0: torch sees no CUDA device here"):
        pick_device("cuda:0")
    with pytest.raises(ConfigurationError, match="mps: torch sees no GPU of Apple's here"):
        pick_device("mps")


def test_the_gpu_of_a_mac_is_for_a_process_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert pick_device() == pick_device("mps") == torch.device("mps")
    assert pick_device("cpu") == CPU
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert pick_device() == CPU
    with pytest.raises(ConfigurationError, match="mps: one process only; start one, or add --device=cpu"):
        pick_device("mps")


def test_with_gpus_each_process_takes_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert pick_device() == pick_device("cuda") == torch.device("cuda", 3)
    assert pick_device("cuda:1") == torch.device("cuda", 1)
    monkeypatch.delenv("LOCAL_RANK")
    assert pick_device() == torch.device("cuda", 0)


def test_float32_stays_float32_where_the_environment_asks_for_tf32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = """
import torch
from olmo.distributed import pick_device

print(torch.get_float32_matmul_precision())
torch.cuda.is_available = lambda: True
for name in (None, "cuda:0"):
    torch.set_float32_matmul_precision("high")
    print(pick_device(name), torch.get_float32_matmul_precision())
"""
    monkeypatch.setenv("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "1")
    done = command(["-c", program], tmp_path)
    assert done.stdout.split() == ["high", "cuda:0", "highest", "cuda:0", "highest"], done.stderr


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only glibc is told to keep blocks")
def test_freed_blocks_are_kept(tmp_path: Path) -> None:
    """Memory that was freed is still there, without page faults, when it is asked for again."""
    program = """
import resource, torch
from olmo.distributed import disable_malloc_trim

def faults():
    torch.ones(2**24)  # 64 MiB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

returned = faults()
disable_malloc_trim()
print(returned, [faults() for _ in range(4)][-1])  # the first ones find the freed blocks in pieces
"""
    done = command(["-c", program], tmp_path)
    assert done.returncode == 0, done.stderr
    returned, kept = map(int, done.stdout.split())
    if returned < 100:
        pytest.skip("this C library keeps large blocks of its own accord")
    assert kept < returned / 5


# --- processes that a launcher started ---

OPEN_MPI = {
    **{"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "3"},
    **{"OMPI_COMM_WORLD_LOCAL_SIZE": "4", "PMIX_NAMESPACE": "617283585"},
}
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
TWO_NODES = {
    **{"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8"},
    **{"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_STEP_NODELIST": "a-b[007,010-12],c"},
}
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")


def adopted(variables: dict[str, str]) -> tuple[list[str | None], dict[str, str]]:
    """The values of NAMES, and the environment of a process in which a launcher has set these variables."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "environ", dict(variables))
        adopt_launcher()
        return [os.environ.get(name) for name in NAMES], os.environ


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        (slurm_variables(1, 2), ["1", "2", "1", "2", "127.0.0.1"]),
        (TWO_NODES, ["5", "8", "1", "4", "a-b007"]),
        ({**TWO_NODES, "SLURM_STEP_NODELIST": "x1,y[2-3]"}, ["5", "8", "1", "4", "x1"]),
        ({**TWO_NODES, "SLURM_STEP_NODELIST": "r[1-2]n[05-06]d,z"}, ["5", "8", "1", "4", "r1n05d"]),
        ({**TWO_NODES, "MASTER_ADDR": "10.0.0.1", "WORLD_SIZE": "8"}, ["5", "8", "1", "4", "10.0.0.1"]),
        (OPEN_MPI, ["3", "4", "3", "4", "127.0.0.1"]),
        # mpirun starts processes of other machines by an srun of its own, of one task a machine.
        ({**TWO_NODES, "SLURM_STEP_NUM_TASKS": "2", **OPEN_MPI}, ["3", "4", "3", "4", "127.0.0.1"]),
        (MPICH, ["1", "2", "1", "2", "127.0.0.1"]),
        # srun --mpi=pmi2, the default of many clusters.
        ({**TWO_NODES, "PMI_RANK": "5", "PMI_SIZE": "8"}, ["5", "8", "1", "4", "a-b007"]),
        # One task of srun; a batch script that was submitted from within one; torchrun inside srun.
        (slurm_variables(0, 1), [None] * 5),
        ({**slurm_variables(0, 1), "SLURM_NTASKS": "4"}, [None] * 5),
        ({**TWO_NODES, "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, ["0", "2", "0", None, None]),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1"}, [None] * 5),
        ({}, [None] * 5),
    ],
)
def test_rank_and_world_size_are_those_of_the_launcher(variables: dict[str, str], expected: list[str | None]) -> None:
    assert adopted(variables)[0] == expected


def test_the_port_is_the_same_for_all_processes_of_a_job_step_and_another_for_the_next() -> None:
    first, again, next_step, chosen = (
        int(adopted({**TWO_NODES, **changed})[1]["MASTER_PORT"])
        for changed in ({}, {"SLURM_PROCID": "0"}, {"SLURM_STEP_ID": "1"}, {"MASTER_PORT": "29599"})
    )
    assert first == again != next_step and chosen == 29599 and 15000 <= first < 30000


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({k: v for k, v in TWO_NODES.items() if k != "SLURM_LOCALID"}, "srun started 8 .* SLURM_LOCALID is not set"),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, r"mpirun started 4 processes, but MASTER_ADDR .* is not set"),
    ],
)
def test_a_process_that_cannot_find_the_others_does_not_run_alone(variables: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        adopted(variables)


def test_a_process_that_srun_did_not_start_warns_that_it_is_alone(caplog: pytest.LogCaptureFixture) -> None:
    """A batch script, or a shell of salloc; many ask for tasks to have the processors of one process."""
    assert adopted({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"})[0] == [None] * 5
    assert "2 tasks" in caplog.text and "it runs alone; for one process per task, write srun" in caplog.text
    caplog.clear()
    assert adopted({**slurm_variables(0, 1), "SLURM_NTASKS": "4"})[0] == [None] * 5 and not caplog.text


def test_a_process_that_sees_only_its_own_gpu_uses_that(monkeypatch: pytest.MonkeyPatch) -> None:
    """srun --gpus-per-task=1 hides the others."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert pick_device() == torch.device("cuda", 0)


# --- two processes ---


def count_and_average(state, bucket):  # without annotations: DDP compares them, and ours are strings
    state.append(1)
    return allreduce_hook(None, bucket)


def together(ranks: Ranks) -> dict[str, Any]:
    """What two processes find out about sums and gradients."""
    report: dict[str, Any] = {"backend": torch.distributed.get_backend(), "world_size": ranks.world_size}
    mine = np.array([[1.0, 2.0]]) if ranks.is_first else np.array([[10.0, 1e-12]])
    report["sum"] = ranks.sum(mine.T).tolist()  # transposed: not contiguous
    report["sum_tensor"] = ranks.sum_tensor(torch.tensor([ranks.rank + 1, 5])).tolist()
    report["largest"] = [ranks.largest(7 - ranks.rank), ranks.largest(ranks.rank)]
    report["first"] = ranks.run_on_first(lambda: ranks.rank)
    try:
        ranks.run_on_first(lambda: 1 // 0)
    except (ZeroDivisionError, ConfigurationError) as error:
        report["first fails"] = type(error).__name__
    if not ranks.is_first:
        assert report["first"] is None and report["first fails"] == "ConfigurationError"
    report["from_first"] = [ranks.broadcast_int(5 + ranks.rank), ranks.broadcast_int(ranks.is_first)]
    report["shared"] = ranks.share_from_first(lambda: time.sleep(0.5) or [f"of {ranks.rank}"], heartbeat=0.1)
    try:
        ranks.share_from_first(lambda: 1 // 0, heartbeat=0.1)
    except (ZeroDivisionError, ConfigurationError) as error:
        report["sharing fails"] = type(error).__name__
    if not ranks.is_first:
        assert report["shared"] == ["of 0"] and report["sharing fails"] == "ConfigurationError"
    signals = Signals()
    signals.received = None if ranks.is_first else signal.SIGTERM
    watch = Watch(TrainConfig(), ranks, signals)
    asked = watch.asked(3)
    report["signal to the second"] = [watch.signalled(), asked and asked.reason]
    ranks.barrier()
    for mode in get_args(DDPGradSyncMode):
        torch.manual_seed(ranks.rank)  # DDP spreads the first process's weights
        config = TrainConfig(distributed_strategy="ddp", ddp=DDPConfig(mode))
        model = nn.Linear(2, 1, bias=False)
        model.model = None  # as an objective whose model is none of another family
        module = distribute(model, config, ranks, CPU)
        averaged: list[int] = []
        assert isinstance(module, DistributedDataParallel)
        module.register_comm_hook(averaged, count_and_average)
        for number, value in enumerate((1.0, 10.0, 100.0)):
            with gradient_sync(module, config, last_micro_batch=number == 2):
                module(torch.full((1, 2), value * (1 + ranks.rank))).sum().backward()
        assert model.weight.grad is not None
        report[mode] = [len(averaged), model.weight.grad.tolist(), model.weight.tolist()]
    torch.manual_seed(0)
    report["first_weights"] = nn.Linear(2, 1, bias=False).weight.tolist()
    return report


def two_processes(folder: Path) -> None:
    """What each of two processes of torchrun does; the first writes `report.json`."""
    with process_group(CPU) as ranks:
        report = together(ranks)
        if ranks.is_first:
            (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")
        Trainer(configure(folder / "config.yaml", folder / "two", *LONELY, *one_text(folder)), CPU, ranks).fit()
        Trainer(configure(folder / "config.yaml", folder / "wrapped", *WRAPPED), CPU, ranks).fit()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def done(folder: Path) -> subprocess.CompletedProcess[str]:
    return command([str(Path(__file__).resolve()), str(folder)], folder, processes=2)


@pytest.fixture(scope="module")
def report(folder: Path, done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert (folder / "report.json").is_file(), done.stderr[-3000:]
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def test_two_processes_on_cpus_speak_gloo(report: dict[str, Any]) -> None:
    assert (report["backend"], report["world_size"]) == ("gloo", 2)


def test_sums_over_two_processes(report: dict[str, Any]) -> None:
    assert report["sum"] == [[11.0], [2.0 + 1e-12]]  # float64
    assert report["sum_tensor"] == [3, 10]


def test_numbers_that_all_processes_agree_on(report: dict[str, Any]) -> None:
    assert report["largest"] == [7, 1] and report["from_first"] == [5, 1]
    assert (
        report["first"] == 0 and report["first fails"] == "ZeroDivisionError"
    )  # the other process has checked its own


def test_what_the_first_process_finds_is_shared(report: dict[str, Any]) -> None:
    assert report["shared"] == ["of 0"] and report["sharing fails"] == "ZeroDivisionError"


def test_a_signal_to_the_second_process_is_heard_by_the_first(report: dict[str, Any]) -> None:
    """Also in the steps after the time limit, where one that went on alone would wait for ever."""
    assert report["signal to the second"] == [True, "SIGTERM at step 3"]


@pytest.mark.parametrize(("mode", "times"), [("batch", 1), ("micro_batch", 3)])
def test_gradients_are_averaged_once_a_batch_or_once_a_micro_batch(
    report: dict[str, Any], mode: str, times: int
) -> None:
    seen, gradient, weights = report[mode]
    assert seen == times
    assert gradient == [[166.5, 166.5]]  # the mean of 111 and 222 either way
    assert weights == report["first_weights"]


@pytest.mark.parametrize(("processes", "shut_down"), [("1", True), ("2", False)])
def test_leaving_skips_the_shutdown_of_one_of_several(
    monkeypatch: pytest.MonkeyPatch, processes: str, shut_down: bool
) -> None:
    def ended(status: int) -> None:
        raise KeyboardInterrupt(status)

    monkeypatch.setenv("WORLD_SIZE", processes)
    monkeypatch.setattr("olmo.distributed.launcher.os._exit", ended)
    with pytest.raises(SystemExit if shut_down else KeyboardInterrupt) as caught:
        exit_process(3)
    assert caught.value.args == (3,)


def test_a_round_that_only_one_process_injects(
    folder: Path, done: subprocess.CompletedProcess[str], report: dict[str, Any]
) -> None:
    assert done.returncode == 0, done.stderr[-3000:]
    train(folder / "config.yaml", folder / "one", *LONELY, *one_text(folder))
    one, two = metrics(folder / "one"), metrics(folder / "two")
    assert [line["injection/texts"] for line in two] == [1, 1] and [line["step"] for line in two] == [2, 4]
    for alone, together in zip(one, two, strict=True):
        # Means of the same float32 terms over three rows and three rows, or over six.
        assert together == pytest.approx(alone, rel=1e-5)


def test_losses_in_parts_and_compiled_layers_on_two_processes(
    folder: Path, done: subprocess.CompletedProcess[str]
) -> None:
    """As on one, where layers run as they are."""
    assert done.returncode == 0, done.stderr[-3000:]
    plain = ("--compile=null", "--activation_checkpointing=null")
    trainer = train(folder / "config.yaml", folder / "unwrapped", *WRAPPED, *plain)
    for alone, together in zip(metrics(folder / "unwrapped"), metrics(folder / "wrapped"), strict=True):
        assert together == pytest.approx(alone, rel=1e-5)
    told = json.loads((folder / "wrapped" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    each = told["throughput/device/tokens_per_second"] / told["throughput/device/batches_per_second"]
    assert each == pytest.approx(BATCH * LENGTH / 2)  # of one of two devices
    # Of every step the mean is taken, although the steps that log have taken it before.
    lowest = min(line["train/CrossEntropyLoss"] for line in metrics(folder / "unwrapped"))
    kept = read_training_state(folder / "wrapped" / "step2", "train")["lowest_loss"]
    assert kept == pytest.approx(lowest, rel=1e-5)
    saved = load_model(folder / "wrapped" / "step2", CPU).state_dict()
    for name, weight in trainer.model.state_dict().items():
        # Where a gradient is hardly more than its rounding, AdamW makes that rounding as large as any gradient.
        assert (saved[name] - weight).abs().median() < 1e-6, name


if __name__ == "__main__":
    two_processes(Path(sys.argv[1]))
    exit_process(0)
