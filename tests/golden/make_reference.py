"""Numbers of the public `ai2-olmo` 0.6.0, for `tests/olmo/test_golden.py`: `make golden` runs this in an environment of
its own, where `olmo` is that package and this repository's `olmo` cannot be seen.

Without arguments it writes, beside itself, two token files, a folder for every case and `schedules.json`. A case is a
tiny model, a few settings of a run, and what OLMo makes of them: logits of the first instance, and 20 steps of
OLMo's own `Trainer.fit` on one CPU process under DDP. Nothing of the trainer, its optimizers, schedulers or data loader
is replaced; the subclass below only listens.

With `--check FOLDER` it reads a checkpoint that this repository's code wrote half-way (`write_checkpoint.py`) the way
OLMo does, compares the logits that lie beside it, and lets OLMo's trainer go on from it to where its own run ended.
With `--keep FOLDER` the checkpoints that OLMo's own trainer wrote half-way stay there, for ours to go on from.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import logging
import os
import platform
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from olmo.optim import BoltOnWarmupScheduler, build_optimizer, build_scheduler
from olmo.safetensors_util import state_dict_to_safetensors_file
from olmo.torch_util import seed_all
from safetensors.torch import load_file, save_file
from torch.nn.parallel import DistributedDataParallel

import olmo
from olmo.checkpoint import load_state_dict, save_state_dict
from olmo.config import ModelConfig, TrainConfig
from olmo.data import IterableDataset, build_train_dataloader
from olmo.model import LayerNormBase, OLMo
from olmo.train import Trainer

HERE = Path(__file__).resolve().parent
# Isolated (-I), Python finds no module beside this file.
sys.path.insert(0, str(HERE))
from cases import (  # noqa: E402
    ALL_METRICS,
    CASES,
    FILES,
    LABEL_MASKS,
    LENGTH,
    MODEL,
    PADDING,
    RUN,
    STEPS,
    TOKENS_PER_STEP,
    VERSION,
    WRITTEN_AS_SAFETENSORS,
)


class Listener(Trainer):
    """OLMo's trainer; notes what each step tells and the limits that its clipping finds."""

    def should_log_optim_metrics_this_step(self) -> bool:
        """At one step also what OLMo logs of every weight to Weights & Biases; of LionW only with FSDP."""
        return self.cfg.optimizer.name == "adamw" and self.global_step == ALL_METRICS

    def train_step(self, batch: dict[str, Any], reduce_global_loss: bool = True) -> dict[str, float]:
        group = self.optim.param_groups[0]
        self.told.append(
            {"max_grad_norm": group.get("max_grad_norm"), "max_grad_norm_ratio": group.get("max_grad_norm_ratio")}
        )
        return super().train_step(batch, reduce_global_loss)

    def log_metrics_to_console(self, prefix: str, metrics: dict[str, float]) -> None:
        if prefix.startswith("[step="):
            self.told[-1].update(metrics)

    def listen(self) -> None:
        """Begin, and from now on also measure the gradient between clipping and the optimizer's step."""
        self.told: list[dict[str, Any]] = []
        clip = self.optim.clip_grads_and_collect_metrics

        def clip_and_measure(*arguments: Any, **settings: Any) -> dict[str, torch.Tensor]:
            metrics = clip(*arguments, **settings)
            squares = sum(p.grad.double().square().sum() for p in self.model.parameters())
            metrics["clipped_grad_norm"] = torch.as_tensor(squares).sqrt()
            return metrics

        self.optim.clip_grads_and_collect_metrics = clip_and_measure


def configuration(name: str) -> TrainConfig:
    case = CASES[name]
    sections = {key: {**RUN.get(key, {}), **case.get(key, {})} for key in ("data", "optimizer", "scheduler")}
    merged = {**RUN, **case, **sections, "model": {**MODEL, **case["model"]}, "run_name": name}
    config = TrainConfig.new(**merged)
    config.model.precision = config.precision  # as OLMo's training script does
    return config


def build_model(config: TrainConfig) -> OLMo:
    """OLMo's own initialisation; norms and biases are then moved from 1 and 0, where they would not matter."""
    seed_all(config.seed)
    model = OLMo(config.model)
    generator = torch.Generator().manual_seed(5)
    norms = {id(p) for m in model.modules() if isinstance(m, LayerNormBase) for p in m.parameters()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if id(parameter) in norms or name.endswith("bias"):
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def write_tokens(folder: Path) -> None:
    """A walk through the vocabulary that mostly goes up: something to learn within a few steps. PADDING stands anywhere
    in a row but at its front, where OLMo would let it see what comes. Three quarters of the tokens count."""
    generator, labels = np.random.default_rng(3), np.random.default_rng(4)
    for name, (instances, rest) in FILES.items():
        steps = generator.integers(-2, 5, instances * LENGTH + rest)
        tokens = (steps.cumsum() % 97).astype("<u2")
        assert (tokens[::LENGTH] != PADDING).all() and (tokens == PADDING).any()
        tokens.tofile(folder / name)
        (labels.random(len(steps)) < 0.75).tofile(folder / LABEL_MASKS[name])


def first_instance() -> torch.Tensor:
    return torch.from_numpy(np.fromfile(HERE / next(iter(FILES)), "<u2")[:LENGTH].astype(np.int64))[None]


def make_trainer(config: TrainConfig, model: OLMo, indices: io.StringIO | None = None) -> Listener:
    wrapped = DistributedDataParallel(model)
    return Listener(
        cfg=config,
        epoch=config.epoch,
        model=model,
        dist_model=wrapped,
        optim=build_optimizer(config, wrapped),
        scheduler=build_scheduler(config),
        train_loader=build_train_dataloader(config),
        device=torch.device("cpu"),
        evaluators=[],
        indices_file=indices,
    )


def make_case(name: str, folder: Path, keep: Path | None) -> None:
    """Everything of a case, written to `folder`. The working directory holds the token files."""
    config = configuration(name)
    model = build_model(config)
    config.save(folder / "config.yaml")
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    if name in WRITTEN_AS_SAFETENSORS:
        state_dict_to_safetensors_file(state, folder / "model.safetensors")
    else:
        save_state_dict(folder, "model.pt", state, save_overwrite=True)
    with torch.no_grad():
        logits = model.eval()(first_instance()).logits[0, LENGTH // 2 :]  # half of it: the folder is to stay small
        np.save(folder / "logits.npy", logits.numpy())

    config.save_interval_unsharded = STEPS // 2
    indices = io.StringIO()
    trainer = make_trainer(config, model, indices)
    trainer.listen()
    trainer.fit()
    if keep is not None:
        shutil.copytree(Path(config.save_folder) / f"step{STEPS // 2}-unsharded", keep / name, dirs_exist_ok=True)
    lines = indices.getvalue().splitlines()
    assert trainer.global_step == len(trainer.told) == len(lines) == STEPS
    save_file({key: tensor.clone() for key, tensor in model.state_dict().items()}, folder / "final.safetensors")
    series = {
        "loss": "train/CrossEntropyLoss",
        "z_loss": "train/ZLoss",
        "gradient_norm": "optim/total_grad_norm",
        "clipped_gradient_norm": "optim/clipped_grad_norm",
        "learning_rate": "optim/learning_rate_group0",
        "max_grad_norm": "max_grad_norm",
        "max_grad_norm_ratio": "max_grad_norm_ratio",
    }
    reference: dict[str, Any] = {}
    for ours, theirs in series.items():
        values = [told.get(theirs) for told in trainer.told]
        if "loss" in ours or "norm" in ours:
            values = [value and shortened(value, 9) for value in values]
        if values != [None] * STEPS:
            reference[ours] = values
    reference["instances"] = [[int(i) for i in line.split("\t")[1:]] for line in lines]
    reference["optimizer"] = optimizer_norms(trainer)
    told = trainer.told[ALL_METRICS - 1].items()
    # The prefix of the names is DDP's; the last is this file's.
    metrics = {key.replace("/module.", "/"): value for key, value in told if key.startswith(("optim/", "train/"))}
    reference["metrics"] = {k: shortened(v, 9) for k, v in metrics.items() if not k.endswith("clipped_grad_norm")}
    write_json(folder / "steps.json", reference)


def optimizer_norms(trainer: Trainer) -> dict[str, dict[str, float]]:
    """Parameter -> entry of the optimizer's state -> its 2-norm. Of tensors this would be another 400 kB."""
    norms = {}
    for group in trainer.optim.param_groups:
        for name, parameter in zip(group["param_names"], group["params"]):
            state = {k: v.double().norm().item() for k, v in trainer.optim.state[parameter].items()}
            # The prefix of the name is DDP's.
            norms[name.removeprefix("module.")] = {key: shortened(norm, 9) for key, norm in state.items()}
    return norms


def shortened(value: float, digits: int) -> float:
    """A float32 has nine decimal digits. Of a float64, 14 do not depend on how a machine rounds its cosine."""
    return float(f"{value:.{digits}g}")


def schedules() -> list[dict[str, Any]]:
    """Learning rates and clipping limits of all schedulers in both units at steps 0 to 40, with and without the
    optional settings, and with the warm-up that is bolted on where a run restarts without optimizer state."""
    table = []
    names = (
        "cosine_with_warmup",
        "linear_with_warmup",
        "inverse_sqrt_with_warmup",
        "max_scheduler",
        "constant",
        "cosine_linear_envelope",
        "constant_with_warmup",
    )
    for name in names:
        for units, scale in (("steps", 1), ("tokens", TOKENS_PER_STEP)):
            plain = {"name": name, "units": units, "t_warmup": 10 * scale}
            clipping = {"grad_clip_warmup_steps": 7 * scale, "grad_clip_warmup_factor": 3.0}
            full = {**plain, **clipping, "t_max": 30.0 * scale, "alpha_f": 0.01, "warmup_min_lr": 1e-5}
            for settings, restarted_at in ((plain, None), (full, None), (full, 16 * scale)):
                config = TrainConfig.new(optimizer={"learning_rate": 3e-4}, scheduler=settings, max_grad_norm=0.7)
                scheduler = build_scheduler(config)
                if restarted_at is not None:
                    end = restarted_at + int(config.scheduler.t_warmup)
                    scheduler = BoltOnWarmupScheduler.wrap(scheduler, restarted_at, end)
                current, total = [step * scale for step in range(41)], 36 * scale
                rates = [shortened(scheduler.get_lr(config.optimizer.learning_rate, c, total), 14) for c in current]
                limits = [scheduler.get_max_grad_norm(config.max_grad_norm, c, total) for c in current]
                row = {"scheduler": settings, "restarted_at": restarted_at, "step": scale, "total": total}
                table.append({**row, "learning_rate": rates, "clip_limit": limits})
    return table


def orders() -> list[dict[str, Any]]:
    """Data orders of OLMo's `IterableDataset`, by length and hash of the little-endian uint32 numbers."""
    table = []
    for instances in (1, 5, 8, 67, 1000, 100_003):
        for seed, epoch in ((0, 0), (6198, 0), (6198, 1), (11, 7)):
            for world_size in (1, 2, 3, 8):
                for drop_last, shuffle in ((True, True), (False, True), (True, False), (False, False)):
                    settings = {"seed": seed, "epoch": epoch, "world_size": world_size, "drop_last": drop_last}
                    dataset = IterableDataset(
                        range(instances), world_size, shuffle=shuffle, rank=0, fs_local_rank=0, **settings
                    )
                    order = dataset.get_global_indices().astype("<u4")
                    digest = hashlib.sha256(order.tobytes()).hexdigest()
                    row = {"instances": instances, **settings, "shuffle": shuffle}
                    table.append({**row, "length": len(order), "sha256": digest})
    return table


def write_json(path: Path, content: dict[str, Any] | list[dict[str, Any]]) -> None:
    """One line for each item of the outermost list or dictionary: a change of one number is a change of one line."""
    if isinstance(content, dict):
        lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in content.items()]
        text = "{\n" + ",\n".join(lines) + "\n}\n"
    else:
        text = "[\n" + ",\n".join(map(json.dumps, content)) + "\n]\n"
    path.write_text(text, encoding="utf-8")


def provenance() -> dict[str, str]:
    """What the numbers were made with. The digest is of the package's Python files, names and contents."""
    root = Path(olmo.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes())
    return {
        "ai2-olmo": metadata.version("ai2-olmo"),
        "ai2-olmo sources, sha256": digest.hexdigest(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "date": date.today().isoformat(),
    }


@contextmanager
def alone() -> Iterator[None]:
    """A process group of one, as OLMo trains under torchrun with one process."""
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


def make(keep: Path | None) -> None:
    write_tokens(HERE)
    write_json(HERE / "schedules.json", schedules())
    write_json(HERE / "orders.json", orders())
    for name in CASES:
        folder = HERE / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        with tempfile.TemporaryDirectory() as work:
            for file in (*FILES, *LABEL_MASKS.values()):
                shutil.copy(HERE / file, work)
            os.chdir(work)  # so that the saved configuration names the token files alone
            with alone():
                make_case(name, folder, keep)
            os.chdir(HERE)
        print(f"{name}: written")
    write_json(HERE / "provenance.json", provenance())


def check(folder: Path) -> bool:
    """Whether OLMo reads a checkpoint folder of this repository's code and computes the logits that lie beside it."""
    try:
        config = TrainConfig.load(folder / "config.yaml", validate_paths=False)
        model = OLMo(ModelConfig.load(folder / "config.yaml", key="model", validate_paths=False))
        model.load_state_dict(load_state_dict(folder, "model.pt", map_location="cpu"))
    except Exception as error:  # whatever OLMo raises is the answer
        print(f"{folder}: OLMo {VERSION} cannot read it: {type(error).__name__}: {error}")
        return False
    tokens, expected = np.load(folder / "check-tokens.npy"), np.load(folder / "check-logits.npy")
    with torch.no_grad():
        logits = model.eval()(torch.from_numpy(tokens)).logits.numpy()
    difference, scale = float(np.abs(logits - expected).max()), float(np.abs(expected).max())
    print(f"{folder}: logits differ by at most {difference:.1e} of {scale:.3g}")
    return difference <= 1e-5 * max(scale, 1.0) and go_on(folder, config)


def go_on(folder: Path, config: TrainConfig) -> bool:
    """Whether OLMo's trainer, started from our checkpoint, ends with the weights of its own unbroken run."""
    with tempfile.TemporaryDirectory() as work, alone():
        config.save_folder, config.stop_at = work, STEPS
        config.save_interval_unsharded = config.save_interval = None
        trainer = make_trainer(config, OLMo(config.model))
        trainer.restore_unsharded_checkpoint(folder)
        trainer.listen()
        trainer.fit()
    assert len(trainer.told) == STEPS - STEPS // 2
    final = load_file(HERE / folder.parent.name / "final.safetensors")
    apart = torch.cat([(t - final[name]).abs().flatten() for name, t in trainer.model.state_dict().items()])
    typical, most = float(apart.quantile(0.999)), float(apart.max())
    print(f"{folder}: OLMo went on from it; weights at the end differ by {typical:.1e} (99.9 %), at most {most:.1e}")
    return typical <= 1e-6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", nargs="+", type=Path, metavar="FOLDER", help="checkpoints to read instead")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where OLMo's own checkpoints go")
    arguments = parser.parse_args()
    if metadata.version("ai2-olmo") != VERSION or Path(olmo.__file__).resolve().is_relative_to(
        HERE.parents[1] / "olmo"
    ):
        print(f"this needs ai2-olmo {VERSION} and must not see the repository's own olmo; say make golden")
        return 2
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*CUDA is not available.*")  # OLMo asks for autocast on "cuda" alone
    if not torch.cuda.is_available():  # OLMo saves the state of a generator that is not there
        torch.cuda.get_rng_state = torch.get_rng_state
    warnings.filterwarnings("ignore", message=r"register_new_resolver\(\) is deprecated")
    if arguments.check:
        readable = [check(folder) for folder in arguments.check]
        return 0 if all(readable) else 1
    make(arguments.keep and arguments.keep.resolve())
    return 0


if __name__ == "__main__":
    sys.exit(main())
