"""lm_eval (lm-evaluation-harness) reads what we save: the line of docs/checkpoints.md, against our own model.

Without lm_eval, which `make interop` installs, only the loading is tested: with the calls of lm_eval 0.4.13.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from olmo import checkpoint
from olmo.checkpoint.families import load_model, new_model
from olmo.config import TokenizerConfig, TrainConfig, load, load_model_config
from olmo.model import OLMo
from olmo.tokenizer import load_tokenizer
from olmo.train.optim import build_optimizer
from scripts.convert import main as convert
from tests.architectures import built
from tests.reference import END_OF_TEXT, tiny_config, tiny_tokenizer
from tests.running import ROOT

CPU = torch.device("cpu")
ITEMS: list[dict[str, Any]] = [
    {"question": "one two three", "choices": ["four", "five six"], "answer": 0},
    {"question": "water boils at", "choices": ["one hundred degrees", "nothing"], "answer": 0},
    {"question": "a", "choices": ["b", "c d"], "answer": 1},
]
TASK: dict[str, Any] = {
    **{"task": "local_choice", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice"},
    **{"doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}"},
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


def of_olmo(folder: Path) -> tuple[Path, Path]:
    """A checkpoint of a run of OLMo, and its folder in transformers' layout."""
    torch.manual_seed(0)
    run = TrainConfig(model=tiny_config(), tokenizer=TokenizerConfig(str(tiny_tokenizer(folder / "words.json"))))
    model = OLMo(run.model)
    checkpoint.save(folder / "step3-unsharded", model, run, build_optimizer(run.optimizer, model), {})
    convert([str(folder / "step3-unsharded"), str(folder / "hf"), "--to", "hf"])
    return folder / "step3-unsharded", folder / "hf"


def of_another_family(folder: Path) -> tuple[Path, Path]:
    """A checkpoint of a run of another family, which is in transformers' layout itself."""
    llama = built("Llama")
    llama.config.eos_token_id = 0
    llama.save_pretrained(folder / "llama")
    words = {"tokenizer_file": str(tiny_tokenizer(folder / "words.json")), "eos_token": END_OF_TEXT}
    PreTrainedTokenizerFast(**words).save_pretrained(folder / "llama")
    (folder / "run.yaml").write_text(f"model:\n  transformers: {folder / 'llama'}\n  max_sequence_length: 64\n")
    run = load(folder / "run.yaml", [], checkpoint.complete)
    model = new_model(run.model, 0, CPU)
    checkpoint.save(folder / "step3-unsharded", model, run, build_optimizer(run.optimizer, model), {})
    return folder / "step3-unsharded", folder / "step3-unsharded"


FOLDERS = {"converted OLMo": of_olmo, "a run's Llama": of_another_family}


def expected(source: Path) -> list[list[float]]:
    """Log-probabilities of the choices by our own model and tokenizer."""
    model = load_model(source, CPU, load_model_config(source / "config.yaml")).eval()
    tokenizer = load_tokenizer(str(source.parent / "words.json"))

    def score(context: str, choice: str) -> float:
        ids = tokenizer.encode(f"{context} {choice}", add_special_tokens=False).ids
        first = len(tokenizer.encode(context, add_special_tokens=False).ids)
        with torch.no_grad():
            log_probabilities = model(torch.tensor([ids])).log_softmax(-1)[0]
        return sum(log_probabilities[at - 1, ids[at]].item() for at in range(first, len(ids)))

    return [[score(item["question"], choice) for choice in item["choices"]] for item in ITEMS]


@pytest.mark.parametrize("kind", FOLDERS)
def test_it_opens_with_the_calls_of_lm_eval(kind: str, tmp_path: Path) -> None:
    source, folder = FOLDERS[kind](tmp_path)
    safe = {"revision": "main", "trust_remote_code": False}
    config = AutoConfig.from_pretrained(str(folder), **safe)
    tokenizer = AutoTokenizer.from_pretrained(str(folder), use_fast=True, **safe)
    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype="auto", device_map={"": "cpu"}, **safe)
    assert model.dtype == torch.float32 and config.max_position_embeddings > 0
    assert tokenizer.eos_token_id == 0 == model.config.eos_token_id  # also the prefix of an empty context
    item, wanted = ITEMS[1], expected(source)[1]
    for choice, value in zip(item["choices"], wanted):
        context = len(tokenizer.encode(item["question"]))
        ids = tokenizer.encode(f"{item['question']} {choice}")
        with torch.no_grad():
            found = model(torch.tensor([ids])).logits.log_softmax(-1)[0]
        total = sum(found[at - 1, ids[at]].item() for at in range(context, len(ids)))
        assert total == pytest.approx(value, abs=1e-4)


@pytest.mark.interop
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed; make interop")
@pytest.mark.parametrize("kind", FOLDERS)
def test_its_log_probabilities_are_ours(kind: str, tmp_path: Path) -> None:
    source, folder = FOLDERS[kind](tmp_path)
    (tmp_path / "items.jsonl").write_text("".join(f"{json.dumps(item)}\n" for item in ITEMS))
    (tmp_path / "tasks").mkdir()
    task = {**TASK, "dataset_kwargs": {"data_files": {"test": str(tmp_path / "items.jsonl")}}}
    (tmp_path / "tasks/local.yaml").write_text(yaml.safe_dump(task))
    (documented,) = re.findall("^lm_eval .*", (ROOT / "docs/checkpoints.md").read_text(encoding="utf-8"), re.MULTILINE)
    ours = re.sub(r"pretrained=\S+ --tasks \S+", f"pretrained={folder} --tasks local_choice", documented)
    line = [sys.executable, "-m", *ours.split(), "--include_path", str(tmp_path / "tasks"), "--device", "cpu"]
    line += ["--log_samples", "--output_path", str(tmp_path / "out")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (samples,) = (tmp_path / "out").glob("*/samples_*.jsonl")
    found = {}
    for text in samples.read_text().splitlines():
        sample = json.loads(text)
        found[sample["doc"]["question"]] = [float(one[0][0]) for one in sample["resps"]]
    for item, wanted in zip(ITEMS, expected(source)):
        assert found[item["question"]] == pytest.approx(wanted, abs=1e-4)
