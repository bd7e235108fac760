"""One contestant of scripts/benchmarks/training.py, in a process of its own: trains on request, then waits.

    python [-I] scripts/benchmarks/contestants.py NAME FOLDER

FOLDER holds `settings.json`, the weights to start from in transformers' layout (`hf`), of OLMo also in its own (`olmo`,
`weights.pt`), and `tokens`, uint16, the rows in the order in which all contestants read them. A line on stdin with a
number trains that many steps; the answer, also written once after the first step, is a line of JSON: seconds, processor
seconds, bytes held after the imports, peak bytes, and the loss of every step so far. The end of stdin ends the process.

Peers have environments of their own, in which `olmo` may be another package, so nothing is imported before the name is
known. All contestants pause in a hook after the optimizer step, of which they know nothing.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook


def memory(field: str) -> int:
    """Bytes of this process, now (VmRSS) or at most so far (VmHWM); Linux."""
    found = re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


class Pace:
    """Lets training continue by as many steps as stdin requests."""

    def __init__(self) -> None:
        self.answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # contestants print to stderr; stdout holds answers alone
        self.imported = 0
        self.losses: list[float] = []
        self.left = 1

    def begin(self) -> None:
        """Call between the imports and the model."""
        self.imported = memory("VmRSS")
        self.started, self.processor = time.perf_counter(), time.process_time()
        register_optimizer_step_post_hook(self.after_step)

    def after_step(self, *_: Any) -> None:
        self.left -= 1
        if self.left:
            return
        answer = {
            "seconds": time.perf_counter() - self.started,
            "processor": time.process_time() - self.processor,
            "imported": self.imported,
            "peak": memory("VmHWM"),
            "losses": self.losses,
        }
        print(json.dumps(answer), file=self.answers, flush=True)
        line = sys.stdin.readline()
        if not line:
            os._exit(0)
        self.left = int(line)
        self.started, self.processor = time.perf_counter(), time.process_time()


def all_rows(folder: Path, settings: dict[str, Any]) -> Tensor:
    """(N, T) int64."""
    tokens = np.fromfile(folder / "tokens", "<u2").astype(np.int64)
    return torch.from_numpy(tokens).view(-1, settings["length"])


def batches(folder: Path, settings: dict[str, Any]) -> Iterator[Tensor]:
    """Rows of every step, (n, T) int64, without end."""
    rows = all_rows(folder, settings)
    while True:
        yield from rows.split(settings["rows"])


def plain_loop(
    folder: Path,
    settings: dict[str, Any],
    pace: Pace,
    model: torch.nn.Module,
    logits_of: Callable[[Tensor], Tensor],
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """The usual loop in torch: the mean loss of the next tokens, its gradient clipped, fused AdamW."""
    if optimizer is None:
        optimizer = torch.optim.AdamW(model.parameters(), **settings["adamw"], fused=True)
    model.train()
    for ids in batches(folder, settings):
        labels = F.pad(ids[:, 1:], (0, 1), value=-100)  # the last position predicts nothing
        with torch.autocast("cpu", torch.bfloat16, enabled=settings["bf16"]):
            loss = F.cross_entropy(logits_of(ids).flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        pace.losses.append(loss.item())
        optimizer.step()


def torch_loop(folder: Path, settings: dict[str, Any], pace: Pace) -> None:
    from transformers import AutoModelForCausalLM

    pace.begin()
    model = AutoModelForCausalLM.from_pretrained(folder / "hf")
    plain_loop(folder, settings, pace, model, lambda ids: model(ids).logits)


def transformers_trainer(folder: Path, settings: dict[str, Any], pace: Pace) -> None:
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    class Listener(TrainerCallback):
        def on_log(self, *_: Any, logs: dict[str, Any], **__: Any) -> None:
            pace.losses.append(float(logs["loss"]))

    pace.begin()
    arguments = TrainingArguments(
        output_dir=str(folder / "transformers"),
        use_cpu=True,
        max_steps=10**6,
        per_device_train_batch_size=settings["rows"],
        learning_rate=settings["adamw"]["lr"],
        lr_scheduler_type="constant",
        adam_beta1=settings["adamw"]["betas"][0],
        adam_beta2=settings["adamw"]["betas"][1],
        adam_epsilon=settings["adamw"]["eps"],
        weight_decay=settings["adamw"]["weight_decay"],
        max_grad_norm=1.0,
        bf16=settings["bf16"],
        train_sampling_strategy="sequential",
        dataloader_pin_memory=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    Trainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "hf"),
        args=arguments,
        train_dataset=[{"input_ids": row, "labels": row} for row in all_rows(folder, settings)],
        callbacks=[Listener()],
    ).train()


def ai2_olmo(folder: Path, settings: dict[str, Any], pace: Pace) -> None:
    # By name: to a type checker `olmo` is this repository's.
    configs, models, optim = (import_module(f"olmo.{name}") for name in ("config", "model", "optim"))

    pace.begin()
    optimizer = {"name": "adamw", **settings["adamw"]}
    optimizer["learning_rate"] = optimizer.pop("lr")
    config = configs.TrainConfig.load(folder / "olmo" / "config.yaml", [f"optimizer={json.dumps(optimizer)}"])
    model = models.OLMo(config.model, init_params=False)
    model.load_state_dict(torch.load(folder / "weights.pt", weights_only=True))
    plain_loop(folder, settings, pace, model, lambda ids: model(ids).logits, optim.build_optimizer(config, model))


def ours(folder: Path, settings: dict[str, Any], pace: Pace) -> None:
    from olmo.checkpoint import complete
    from olmo.config import load
    from olmo.distributed import Ranks, disable_malloc_trim
    from olmo.train import Trainer

    pace.begin()
    disable_malloc_trim()  # as scripts/train.py does
    Trainer(load(settings["config"], settings["overrides"], complete), torch.device("cpu"), Ranks()).fit()


CONTESTANTS = {
    "torch": torch_loop,
    "transformers": transformers_trainer,
    "ai2-olmo": ai2_olmo,
    "ours": ours,
}


def main() -> NoReturn:
    name, folder = sys.argv[1], Path(sys.argv[2])
    settings = json.loads((folder / "settings.json").read_text())
    CONTESTANTS[name](folder, settings, Pace())
    sys.exit(f"{name}: training ended unexpectedly")


if __name__ == "__main__":
    main()
