"""What analysis.score scores, and how: the evaluators of a run, for checkpoints of any model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from analysis.context import context_length
from analysis.locations import Location
from analysis.runs import TASKS
from olmo import checkpoint
from olmo.checkpoint import complete
from olmo.config import DataConfig, EvaluatorConfig, ModelConfig, TrainConfig, load
from olmo.config.check import run_problems
from olmo.config.load import make_model_config
from olmo.config.setting import plain
from olmo.distributed import Ranks
from olmo.eval.evaluators import Evaluators
from olmo.exceptions import ConfigurationError, did_you_mean, listed, needs
from olmo.files.adapters import base_folder
from olmo.files.digests import file_digest
from olmo.knowledge.entries import KINDS, load_entries
from olmo.tokenizer import run_tokenizer, tokenizer_file, tokenizer_of_folder

# The files of each setting in a folder of fictional knowledge: ours, and the published one of its two settings.
_FILES = {
    "paraphrase": ("fictional_knowledge_paraphrase.json", "fictional_knowledge_paraphrased_paraphrase70.json"),
    "once": ("fictional_knowledge_once.json", "fictional_knowledge_paraphrased_once60.json"),
    "duplicate": ("fictional_knowledge_duplicate.json",),
}
# What the evaluations of a run depend on, besides its model and tokenizer.
_OF_EVALUATIONS = ("evaluators", "device_eval_batch_size", "eval_subset_num_batches", "precision")


def probe_files(folder: Path) -> dict[str, Path]:
    """Setting -> its file in a folder of fictional knowledge, of the settings that it has."""
    found = {s: next((folder / n for n in names if (folder / n).is_file()), None) for s, names in _FILES.items()}
    return {setting: path for setting, path in found.items() if path is not None}


def probe_evaluators(folder: Path) -> list[EvaluatorConfig]:
    """Evaluators of the probes in the files of fictional knowledge of a folder, in the order of the paper's runs.

    Raises ConfigurationError where it has none, ValueError or OSError where a file cannot be read.
    """
    if not (files := probe_files(folder)):
        expected = ", ".join(names[0] for names in _FILES.values())
        raise ConfigurationError(f"--knowledge: no fictional knowledge in {folder} (expected any of {expected})")
    evaluators = []
    for setting, path in files.items():
        entries = load_entries(path)
        kinds = [kind for kind in KINDS if any(entry.probes.get(kind) for entry in entries)]
        if not kinds:
            raise ConfigurationError(f"--knowledge: no entry of {path} has probes")
        evaluators += [EvaluatorConfig(f"{setting}_{k}", "lm", DataConfig(dataset_path=str(path))) for k in kinds]
    return evaluators


def task_evaluators(names: Sequence[str], batches: int) -> list[EvaluatorConfig]:
    """Evaluators of tasks of olmo_eval; the name `paper` is the six tasks of P. batches: of each; -1 is all.

    Raises ConfigurationError for unknown names.
    """
    known = needs("olmo_eval", "eval", "--tasks").list_tasks()
    chosen = dict.fromkeys(task for name in names for task in (TASKS if name == "paper" else (name,)))
    for name in chosen:
        if name not in known:
            near = did_you_mean(name, [*known, "paper"])
            raise ConfigurationError(f"--tasks: olmo_eval has no task {name!r}{near or '; paper is the six of P'}")
    return [EvaluatorConfig(name, "downstream", subset_num_batches=batches) for name in chosen]


def loss_evaluators(files: Sequence[str]) -> list[EvaluatorConfig]:
    """Evaluators of held-out token files, each given as LABEL=FILE; a label that is repeated has several files."""
    paths: dict[str, list[str]] = {}
    for given in files:
        label, separator, path = given.partition("=")
        if not (label and separator and path):
            raise ConfigurationError(f"--held_out: expected LABEL=FILE, got {given!r}")
        if "://" not in path and not Path(path).is_file():
            raise ConfigurationError(f"--held_out: {path}: no such token file")
        paths.setdefault(label, []).append(path)
    return [EvaluatorConfig(label, "lm", DataConfig(paths=found)) for label, found in paths.items()]


def of_configuration(path: str) -> tuple[TrainConfig, list[str]]:
    """The part of a run's configuration that its evaluations depend on, and the labels that are left out: those of
    type knowledge_entropy, which analysis.entropy measures."""
    config = load(path)
    left_out = [e.label for e in config.evaluators if e.type == "knowledge_entropy"]
    kept = {name: getattr(config, name) for name in _OF_EVALUATIONS}
    kept["evaluators"] = [e for e in config.evaluators if e.type != "knowledge_entropy"]
    if not kept["evaluators"]:
        raise ConfigurationError(f"{path}: has no evaluators of probes, held-out losses or tasks")
    model = ModelConfig(max_sequence_length=config.model.max_sequence_length)
    return TrainConfig(**kept, model=model, tokenizer=config.tokenizer), left_out


def _content(path: str) -> str:
    """The digest of a file, or of FILE#A-B; a URL and a folder as they are."""
    file, _, part = path.partition("#")
    digest = file_digest(Path(file)) if Path(file).is_file() else file
    return f"{digest}#{part}" if part else digest


def _identity_of(evaluator: EvaluatorConfig, config: TrainConfig) -> dict[str, Any]:
    data, batches = evaluator.data, evaluator.subset_num_batches
    named = [*(data.paths or []), *(p for paths in (data.datasets or {}).values() for p in paths)]
    named += [data.dataset_path] if data.dataset_path else []
    if evaluator.type == "downstream":
        needs("olmo_eval", "eval", f"evaluators.{evaluator.label}")
        content = f"ai2-olmo-eval {metadata.version('ai2-olmo-eval')}"
    else:
        content = hashlib.sha256(" ".join([str(data.memmap_dtype), *map(_content, named)]).encode()).hexdigest()
    return {
        "type": evaluator.type,
        "files": named,
        "content": content,
        "batch_size": evaluator.device_eval_batch_size or config.device_eval_batch_size,
        "batches": config.eval_subset_num_batches if batches is None else batches,
    }


@dataclass(frozen=True)
class Settings:
    """How the checkpoints of one command are scored."""

    base: TrainConfig  # evaluators, batch sizes and precision
    length: int | None = None  # tokens of a held-out instance, and at most of a probe; None: the model's context
    tokenizer: str | None = None  # None: the checkpoint's own
    resuscitation: str | None = None  # a path, or a name inside the checkpoint's folder
    resuscitation_force: bool = False
    temperature_attention: float | None = None  # as model.temperature_attention of a run, at its first step
    temperature_MLP: str | None = None  # a path, or a name inside the checkpoint's folder
    overwrite: bool = False
    evaluators: Mapping[str, dict[str, Any]] = field(init=False)  # label -> what decides its results
    _kept: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        identities = {e.label: _identity_of(e, self.base) for e in self.base.evaluators}
        object.__setattr__(self, "evaluators", identities)

    def config_for(self, location: Location, folder: Path, output: Path) -> TrainConfig:
        """The configuration of a run that evaluates a checkpoint, in `folder`, and writes to `output`."""
        length = self.length
        if length is None and not checkpoint.is_olmo(folder):
            length = context_length(folder)
        shape = {"max_sequence_length": length} if length else {}
        raw = OmegaConf.create({"load_path": str(base_folder(folder)), "model": shape})
        complete(raw)
        model = make_model_config(raw.model, str(folder))
        if length is not None:
            model = replace(model, max_sequence_length=length)
        if self.temperature_attention is not None:
            model = replace(model, temperature_attention=self.temperature_attention)
        if (divisors := self.file_of("temperature_MLP", folder)) is not None:
            model = replace(model, temperature_MLP=str(divisors))
        if model.transformers is not None and (model.temperature_attention or model.temperature_MLP):
            raise ConfigurationError(f"{folder}: only OLMo models have temperatures; leave out --temperature_...")
        if (edit := self.file_of("resuscitation", folder)) is not None:
            model = replace(model, resuscitation=str(edit), resuscitation_force=self.resuscitation_force)
        identifier = self.tokenizer or tokenizer_of_folder(folder)
        if identifier is None and self.encodes:
            raise ConfigurationError(f"{folder}: names no tokenizer; give --tokenizer")
        config = replace(self.base, model=model, load_path=str(location), save_folder=str(output))
        if identifier is not None:
            config = replace(config, tokenizer=replace(self.base.tokenizer, identifier=identifier))
        if problems := list(run_problems(config)):
            raise ConfigurationError(listed(problems))
        return config

    @property
    def encodes(self) -> bool:
        """Whether text is encoded."""
        return any(e.type == "downstream" or e.data.dataset_path for e in self.base.evaluators)

    def file_of(self, name: str, folder: Path) -> Path | None:
        """The file of `resuscitation` or `temperature_MLP` for a checkpoint folder."""
        given = getattr(self, name)
        return None if given is None else checkpoint.resuscitation_file(given, folder, f"--{name}")

    def identity(self, config: TrainConfig, folder: Path) -> dict[str, Any]:
        """What decides the results, besides the checkpoint's weights."""
        files = {name: self.file_of(name, folder) for name in ("resuscitation", "temperature_MLP")}
        return {
            "sequence_length": config.model.max_sequence_length,
            "batch_size": config.device_eval_batch_size,
            "precision": config.precision or "fp32",
            "tokenizer": _content(tokenizer_file(config.tokenizer.identifier)) if self.encodes else None,
            **{name: None if path is None else file_digest(path) for name, path in files.items()},
            "temperature_attention": self.temperature_attention,
            "evaluators": dict(self.evaluators),
        }

    def open(self, config: TrainConfig, device: torch.device, ranks: Ranks) -> Evaluators:
        """The evaluators of a configuration. They are kept for the next checkpoint, which usually has the same."""
        # Neither edits nor temperatures, whose files may be the checkpoint's own, matter to them.
        model = replace(config.model, resuscitation=None, transformers=None, temperature_MLP=None)
        key = (plain(model), _content(tokenizer_file(config.tokenizer.identifier)) if self.encodes else None)
        if self._kept.get("key") != key:
            self._kept.clear()
            tokenizer = run_tokenizer(config) if self.encodes else None
            self._kept.update(key=key, evaluators=Evaluators(config, tokenizer, device, ranks))
        found: Evaluators = self._kept["evaluators"]
        return found
