"""A Trainer of transformers on a tiny model, and what its model receives; as a program, what two processes do."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from tests.architectures import built
from tests.running import BATCH, LENGTH

SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 3,
    "gradient_accumulation_steps": BATCH // 3,
    "max_steps": 7,  # of 4 in an epoch
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}


def model(name: str = "Pythia", **overrides: Any) -> PreTrainedModel:
    return built(name, max_position_embeddings=LENGTH, **overrides)


def trainer(
    folder: Path, data: Any, callbacks: list[TrainerCallback], kind: type[Trainer] = Trainer, **more: Any
) -> Trainer:
    """A Trainer; `more`: its own arguments, and those of TrainingArguments."""
    own = {name: more.pop(name) for name in ("data_collator", "processing_class") if name in more}
    trained = more.pop("model", None) or model()
    arguments = TrainingArguments(str(folder), **{**SETTINGS, **more})
    return kind(trained, arguments, train_dataset=data, callbacks=callbacks, **own)


class Received(TrainerCallback):
    """What the model receives: step -> rows in the order of the micro-batches, each {name: list of numbers}."""

    def __init__(self) -> None:
        self.rows: dict[int, list[dict[str, list[int]]]] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **of_trainer: Any) -> None:
        def hear(module: torch.nn.Module, args: Any, given: dict[str, Any]) -> None:
            if module.training:
                parts = {n: given[n].tolist() for n in ("input_ids", "labels", "attention_mask") if n in given}
                rows = [dict(zip(parts, row)) for row in zip(*parts.values())]
                self.rows.setdefault(state.global_step + 1, []).extend(rows)

        self.handle = model.register_forward_pre_hook(hear, with_kwargs=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **of_trainer: Any) -> None:
        self.handle.remove()


def main(config: str, folder: str) -> None:
    """In each of two processes: train with injection, in several ways of sharing out, and measure while training.

    Writes what each process has seen and measured as rank{R}.json.
    """
    from knowledge_entropy.injected_dataset import InjectedDataset
    from knowledge_entropy.trainer import KnowledgeEntropyCallback, ProbesCallback

    data, knowledge = InjectedDataset.from_config(config), Path(config).with_name("paraphrase.json")
    rows = [data[place]["input_ids"].tolist()[:40] for place in range(5)]
    ways: dict[str, dict[str, Any]] = {
        "plain": {"gradient_accumulation_steps": 1},
        "accumulated": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3},
        "split": {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 1, "split_batches": True},
        "dispatched": {"gradient_accumulation_steps": 1, "dispatch_batches": True},
    }
    found: dict[str, Any] = {}
    for name, way in ways.items():
        sharing = {key: way.pop(key) for key in ("split_batches", "dispatch_batches") if key in way}
        heard = Received()
        entropy = KnowledgeEntropyCallback(rows, 5, batch_size=1)
        probes = ProbesCallback(knowledge, 5, tokenizer=knowledge.with_name("tokenizer.json"))
        callbacks = [data.callback, heard, *([entropy, probes] if name == "plain" else [])]
        run = trainer(Path(folder), data, callbacks, accelerator_config=sharing or None, max_steps=5, **way)
        run.train()
        found[name] = {str(step): [row["input_ids"] for row in rows] for step, rows in heard.rows.items()}
        if name == "plain":
            found["H"] = {step: result.entropy for step, result in entropy.results.items()}
            found["K"] = {step: scores.K for step, scores in probes.scores.items()}
            found["logged"] = [line[entropy.name] for line in run.state.log_history if entropy.name in line]
    wrong = trainer(Path(folder), data, [data.callback])
    try:
        wrong.train()
    except ValueError as error:
        found["wrong"] = str(error)
    Path(folder, f"rank{wrong.args.process_index}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
