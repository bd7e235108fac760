"""Injection into runs of other families: what the model reads is what scripts.inspect_data prints; it is learned."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from olmo.distributed import Ranks
from olmo.exceptions import exit_status
from olmo.tokenizer import encode, tokenizer_file
from olmo.train import Trainer
from scripts import injection_plan, inspect_data, make_fictional_knowledge
from tests.architectures import built
from tests.published import OLMO_EOS, OLMO_TOKENIZER, olmo_tokenizer
from tests.running import CPU, configure, series, train, write_family, write_world

LENGTH, BATCH, STEPS, PAD = 192, 4, 4, 1


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`run.yaml` trains a tiny Llama with the tokenizer of OLMo, which ships inside olmo_eval, on rows of any tokens;
    `padded.yaml` on short ones. Entries of ours enter at every second step."""
    folder = tmp_path_factory.mktemp("world")
    olmo_tokenizer()  # skips the tests without the package
    sizes = {"vocab_size": 50304, "eos_token_id": OLMO_EOS, "pad_token_id": PAD, "max_position_embeddings": LENGTH}
    built("Llama", **sizes, tie_word_embeddings=True).save_pretrained(folder / "model")
    shutil.copy(tokenizer_file(OLMO_TOKENIZER), folder / "model/tokenizer.json")
    make_fictional_knowledge.main(
        ["--output", str(folder), "--paraphrase", "2", "--once", "2", "--paraphrases", "1", "--max_words", "60"]
    )
    rng = np.random.default_rng(0)
    rng.integers(0, 50280, 40 * LENGTH).astype("<u2").tofile(folder / "data.npy")
    rows = [rng.integers(2, 50280, rng.integers(9, LENGTH + 1)).tolist() for _ in range(40)]
    datasets.Dataset.from_dict({"input_ids": rows}).save_to_disk(folder / "rows")
    settings: dict[str, Any] = {
        "load_path": str(folder / "model"),
        "reset_optimizer_state": True,
        "reset_trainer_state": True,
        "model": {"max_sequence_length": LENGTH},
        "data": {"paths": [str(folder / "data.npy")]},
        "optimizer": {"name": "adamw", "learning_rate": 1e-3},
        "global_train_batch_size": BATCH,
        "device_train_microbatch_size": 2,
        "max_duration": STEPS,
        "inject_interval": 2,
        "injection": {name: str(next(folder.glob(f"*{name}*.json"))) for name in ("paraphrase", "once")},
        "save_interval": None,
        "no_pre_train_checkpoint": True,
    }
    settings["injection"]["rounds"] = 2
    OmegaConf.save(OmegaConf.create(settings), folder / "run.yaml")
    settings["data"] = {"dataset_path": str(folder / "rows"), "pad_rows": True}
    OmegaConf.save(OmegaConf.create(settings), folder / "padded.yaml")
    return folder


def seen_by_the_model(config: Path, folder: Path) -> list[list[list[int]]]:
    """The rows of each step of a run, as transformers' model was called with them."""
    trainer, seen = Trainer(configure(config, folder), CPU, Ranks()), list[list[int]]()

    def hook(module: torch.nn.Module, args: Any, named: dict[str, Any]) -> None:
        seen.extend(named["input_ids"].tolist())

    trainer.model.network.register_forward_pre_hook(hook, with_kwargs=True)
    trainer.fit()
    return [seen[start : start + BATCH] for start in range(0, len(seen), BATCH)]


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert exit_status(inspect_data.main, [*arguments, "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("name, steps", [("run", (1, 4)), ("padded", (2,))])
def test_the_model_reads_what_inspect_data_prints(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, steps: tuple[int, ...]
) -> None:
    config = world / f"{name}.yaml"
    seen = seen_by_the_model(config, tmp_path / "run")
    entries = json.loads(next(world.glob("*paraphrase*.json")).read_text())
    assert len(seen) == STEPS
    for step in steps:
        rows = seen[step - 1]
        shown = printed(capsys, str(config), "--step", str(step))
        assert [row["input_ids"] for row in shown] == rows
        assert [bool(row["injected"]) for row in shown] == [step % 2 == 0] * 3 + [False]
        if step % 2 == 0:
            for row, entry in zip(rows, entries):
                wording = [entry["train_context"], *entry["paraphrases"]][step // 2 - 1]
                text = [*encode(olmo_tokenizer(), [wording])[0], OLMO_EOS]  # the model's EOS, not the tokenizer's own
                assert row[: len(text)] == text and row[len(text)] != OLMO_EOS
    ends = [row[-1] for rows in seen for row in rows]
    assert (PAD in ends) == (name == "padded")


def test_a_plan_is_a_file_for_the_same_run(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, plan = str(world / "run.yaml"), tmp_path / "plan.json"
    assert exit_status(injection_plan.main, [config, "--output", str(plan)]) == 0
    named = [f"--inject_indices_map={plan}", "--injection=null"]
    assert printed(capsys, config, *named, "--step", "4") == printed(capsys, config, "--step", "4")
    assert exit_status(inspect_data.main, [config, *named, "--step=2", "--model.eos_token_id=0"]) == 2
    error = capsys.readouterr().err
    assert f"model.eos_token_id: {plan}: round 1, text 0 (paraphrase/0) ends with token {OLMO_EOS}" in error


def test_what_is_injected_is_learned(tmp_path: Path) -> None:
    """More than in the same run without injection."""
    world = write_world(tmp_path / "world")
    write_family(world, "Llama")
    name, found = "eval/K_paraphrase", {}
    for rounds in (3, 0):
        run = tmp_path / f"run{rounds}"
        probing = "{steps: 1}" if rounds else "null"
        train(world / "family.yaml", run, "--eval_on_load", f"--injection.rounds={rounds}", f"--probing={probing}")
        found[rounds] = series(run, name)
    assert found[3].keys() == {0, 1, 2, 3, 4, 5, 6, 7} and found[0].keys() == {0, 3, 6, 7}
    assert found[3][0] == found[0][0]
    assert found[3][7] > found[0][7] + 0.4
