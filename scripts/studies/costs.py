"""What a stage costs, from its command alone: floating-point operations, and bytes that it leaves on the disk.

Operations are 6 a weight and token of training and 2 of an evaluation or a measurement (one forward pass). Data that
do not exist yet count with stated sizes. Nothing here needs torch: a stage counts as its own memory what the program
that starts it holds, so that program stays small.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from olmo.config import EvaluatorConfig, ModelConfig, TrainConfig, load, load_model_config
from olmo.exceptions import FAILURES
from olmo.files.paths import is_hub_id, read_json
from olmo.knowledge.entries import KINDS
from scripts.studies.plan import Plan, Stage

OFFICIAL = Path("configs/official")
# Samples (a document with each choice) of the tasks of P, of 60 tokens; other tasks count as 4,000 samples.
_SAMPLES = {"piqa": 3676, "hellaswag": 40168, "winogrande": 2534, "openbook_qa": 2000, "sciq": 4000, "arc_easy": 2281}
_TOKENS_OF_SAMPLE = 60
_UNKNOWN_PROBES = 9_000  # tokens of the probes of a kind, if their file does not exist: 60 entries, 5 probes of 30
_UNKNOWN_INSTANCES = 256  # of a held-out file that does not exist
_CHARACTERS = 4  # a token
_BYTES_OF_PROBE = 40  # a row of a table
_SEED_KEYS = ("save_folder", "seed", "run_name", "load_path", "try_load_latest_save", "model.resuscitation")


@dataclass(frozen=True)
class Cost:
    """operations and written bytes of a stage; None where `unknown`, a text, is why."""

    operations: float | None = 0.0
    written: float | None = 0.0
    unknown: str = ""
    width: int | None = None  # of the model


@dataclass(frozen=True)
class Size:
    """A model: its weights, the width of its residual stream, and its context, if these are known."""

    weights: int
    width: int | None = None
    context: int = 2048


class Costs:
    """The costs of the stages of a plan."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self._own = {str(stage.run): stage for stage in plan.stages if stage.kind == "train" and stage.run is not None}

    def of(self, stage: Stage) -> Cost:
        """The cost of a stage. What cannot be known, such as a model of the hub that is not on this disk, is None."""
        try:
            return self._of(stage)
        except FAILURES as error:  # data or a configuration that an earlier stage makes
            return Cost(None, None, " ".join(str(error).split()))

    def _of(self, stage: Stage) -> Cost:
        if stage.kind == "train":
            return self._training(stage.command)
        if stage.kind in ("entropy", "score"):
            return self._passes(stage.command)
        if stage.kind == "fetch":
            return Cost(written=4.0 * self.size(stage.command[1]).weights)
        if stage.kind == "prepare":
            return Cost(None, None, "not run yet")
        return Cost()

    def size(self, location: str) -> Size:
        """The model of a checkpoint: of a folder, of the hub's cache, of configs/official, or of a planned run."""
        stage = self._own.get(str(Path(location).parent))
        if stage is not None and not Path(location).is_dir():
            return _size_of(_configuration(stage.command).model)
        if Path(location).is_dir():
            return _size_in(Path(location))
        hub_id = next((s.command[1] for s in self.plan.stages if s.kind == "fetch" and location in s.command), location)
        if is_hub_id(hub_id):
            name, _, revision = hub_id.partition("@")
            if (cached := _cached(name, revision)) is not None:
                return _size_in(cached)
            official = OFFICIAL / f"{name.rpartition('/')[2].removesuffix('-hf')}.yaml"
            if official.is_file():
                return _size_of(load_model_config(official))
        raise ValueError(f"{location}: its size is not known before it is downloaded")

    def _training(self, command: Sequence[str]) -> Cost:
        config = _configuration(command)
        start = next((c.partition("=")[2] for c in command if c.startswith("--load_path=")), config.load_path)
        size = _size_of(config.model) if start is None else self.size(start)
        steps = _steps(config)
        length, batch = config.model.max_sequence_length, config.global_train_batch_size
        evaluated, tables = 0.0, 0.0
        for evaluator in config.evaluators:
            interval = evaluator.eval_interval or config.eval_interval
            times = math.ceil(steps / interval) + config.eval_on_load
            is_probe = evaluator.type == "lm" and bool(evaluator.data.dataset_path)
            if is_probe and config.probing is not None and config.inject_interval:
                rounds = min(steps // config.inject_interval, config.injection.rounds if config.injection else 10)
                times += rounds * (1 + config.probing.steps // config.probing.interval)
            tokens = _tokens_of(evaluator, config)
            evaluated += times * tokens
            tables += times * _BYTES_OF_PROBE * tokens / 30 if is_probe else 0.0
        saved = _saved(config, steps, new=start is None)
        operations = size.weights * (6.0 * steps * batch * length + 2.0 * evaluated)
        return Cost(operations, size.weights * saved + tables, width=size.width)

    def _passes(self, command: Sequence[str]) -> Cost:
        """Of analysis.entropy and analysis.score."""
        flags = _flags(command[1:])
        places = flags.get("checkpoint") or flags[""]
        sizes = [self.size(place) for place in places]
        length = int(flags.get("sequence_length", [0])[0]) or sizes[0].context
        tokens = 0.0
        if command[0] == "analysis.entropy":
            tokens = float(flags.get("data_size", ["2048"])[0]) * length
        else:
            if "config" in flags:
                config = _loaded(flags["config"][0], ())
            else:
                config = TrainConfig(device_eval_batch_size=int(flags.get("batch_size", ["16"])[0]))
                batches = math.ceil(int(flags.get("limit", [0])[0]) / config.device_eval_batch_size) or None
                names = [n for text in flags.get("tasks", []) for n in text.split(",")]
                names = [n for name in names for n in (_SAMPLES if name == "paper" else [name])]
                config.evaluators = [EvaluatorConfig(n, "downstream", subset_num_batches=batches) for n in names]
                config.model.max_sequence_length = length
                tokens += 6 * _UNKNOWN_PROBES * ("knowledge" in flags)
                tokens += sum(_tokens_in([f.partition("=")[2]], length) for f in flags.get("held_out", []))
            tokens += sum(_tokens_of(evaluator, config) for evaluator in config.evaluators)
        operations = sum(2.0 * size.weights * tokens for size in sizes)
        downloads = [4.0 * size.weights for size, place in zip(sizes, places) if is_hub_id(place)]
        if flags.get("keep") == ["none"]:  # one is used while the next is downloaded
            downloads = sorted(downloads)[-2:]
        return Cost(operations, sum(downloads), width=sizes[0].width)


# --- models ------------------------------------------------------------------------------------------------------


def _size_of(model: ModelConfig) -> Size:
    """Of the matrices of a model of ours; its norms and biases are few."""
    d, inner, rows = model.d_model, model.inner_size, model.rows
    attention = d * (2 * d + 2 * model.effective_n_kv_heads * (d // model.n_heads))
    vocabulary = rows * d * (1 if model.weight_tying else 2)
    blocks = model.n_layers * (attention + d * (model.projection_size + inner))
    return Size(vocabulary + blocks, d, model.max_sequence_length)


@cache
def _size_in(folder: Path) -> Size:
    """Of a checkpoint folder: by config.yaml, the headers of its safetensors files, or its config.json."""
    if not (folder / "config.json").is_file() and (folder / "config.yaml").is_file():
        return _size_of(load_model_config(folder / "config.yaml"))
    raw = read_json(folder / "config.json")
    raw = raw.get("text_config") or raw
    width, layers, rows = (raw.get(key) for key in ("hidden_size", "num_hidden_layers", "vocab_size"))
    context = min(raw.get("max_position_embeddings") or 2048, 2048)
    files = [path for path in sorted(folder.glob("*.safetensors")) if path.resolve().is_file()]
    if files:
        return Size(sum(map(_weights_in, files)), width, context)
    if not (isinstance(width, int) and isinstance(layers, int) and isinstance(rows, int)):
        raise ValueError(f"{folder}: its config.json does not have the size of the model")
    inner = raw.get("intermediate_size") or 4 * width
    return Size(rows * width + layers * (4 * width**2 + 3 * width * inner), width, context)


def _weights_in(file: Path) -> int:
    """The numbers in a safetensors file, by its header."""
    with file.open("rb") as opened:
        header = json.loads(opened.read(min(int.from_bytes(opened.read(8), "little"), 2**27)))
    return sum(math.prod(about["shape"]) for name, about in header.items() if name != "__metadata__")


def _cached(name: str, revision: str) -> Path | None:
    """The folder of a model in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json", revision=revision or None)
    return Path(found).parent if isinstance(found, str) else None


# --- runs --------------------------------------------------------------------------------------------------------


def _configuration(command: Sequence[str]) -> TrainConfig:
    """The configuration of a training command, without what differs from seed to seed."""
    return _loaded(command[1], tuple(c for c in command[2:] if c[2:].partition("=")[0] not in _SEED_KEYS))


@cache
def _loaded(configuration: str, overrides: tuple[str, ...]) -> TrainConfig:
    return load(configuration, overrides)


def _steps(config: TrainConfig) -> int:
    duration = str(config.max_duration)
    batch, length = config.global_train_batch_size, config.model.max_sequence_length
    if duration.endswith("T"):
        steps = math.ceil(float(duration[:-1]) / (batch * length))
    elif duration.endswith("ep"):
        steps = math.floor(float(duration[:-2]) * (_instances(config) // batch))
    else:
        steps = int(float(duration))
    return steps if config.stop_at is None else min(steps, config.stop_at)


def _instances(config: TrainConfig) -> int:
    """Instances of the training data. Raises OSError where they do not exist."""
    data, length = config.data, config.model.max_sequence_length
    if data.dataset_path:
        import pyarrow

        files = sorted(Path(data.dataset_path).glob("*.arrow"))
        if not files:
            raise FileNotFoundError(f"{data.dataset_path}: does not exist yet")
        tables = (pyarrow.ipc.open_stream(pyarrow.memory_map(str(file))) for file in files)
        return sum(batch.num_rows for table in tables for batch in table)
    width = np.dtype(data.memmap_dtype or "uint16").itemsize
    return sum(Path(path).stat().st_size // width // length for path in data.paths or [])


def _tokens_of(evaluator: EvaluatorConfig, config: TrainConfig) -> float:
    """Tokens of one evaluation, padding not counted."""
    batches = evaluator.subset_num_batches
    batches = config.eval_subset_num_batches if batches is None else batches
    most = math.inf if batches < 0 else batches * (evaluator.device_eval_batch_size or config.device_eval_batch_size)
    data, length = evaluator.data, config.model.max_sequence_length
    if evaluator.type == "downstream":
        return float(min(_SAMPLES.get(evaluator.label, 4000), most) * _TOKENS_OF_SAMPLE)
    if evaluator.type == "lm" and data.dataset_path:
        return _tokens_of_probes(data.dataset_path, evaluator.label.partition("_")[2])
    paths = [*(data.paths or []), *(path for paths in (data.datasets or {}).values() for path in paths)]
    return min(_tokens_in(paths, length), most * length)


def _tokens_in(paths: Sequence[str], length: int) -> float:
    unknown = _UNKNOWN_INSTANCES * length
    return float(sum(Path(p).stat().st_size / 2 if Path(p).is_file() else unknown for p in paths))


@cache
def _tokens_of_probes(path: str, kind: str) -> float:
    file = Path(path.partition("#")[0])
    if not file.is_file():
        return float(_UNKNOWN_PROBES)
    prefix = KINDS.get(kind.removesuffix("_full"))
    keys = ("train_context",) if prefix is None else (f"{prefix}_input", f"{prefix}_target")
    texts = [text for entry in json.loads(file.read_text("utf-8")) for key in keys for text in _listed(entry.get(key))]
    return sum(map(len, texts)) / _CHARACTERS


def _listed(value: object) -> list[str]:
    return [value] if isinstance(value, str) else list(value) if isinstance(value, list) else []


def _saved(config: TrainConfig, steps: int, new: bool) -> float:
    """Bytes a weight of the checkpoints that a run leaves: 4, and 8 more with the moments of its optimizer, which it
    does not have before its first step."""
    first = new and not config.no_pre_train_checkpoint

    def bytes_of(interval: int | None, others: set[int], most: int, optimizer: bool = True) -> float:
        at = {*others, *(range(0, steps + 1, interval) if interval else ()), *([steps] if interval else ())}
        at -= set() if first else {0}
        kept = sorted(at)[-max(most, 1) :] if most >= 0 else at
        return sum(12.0 if optimizer and step else 4.0 for step in kept)

    others = {step for step in config.save_steps_unsharded or () if step <= steps}
    others |= {steps} if config.force_save_unsharded else set()
    keep, optimizer = config.save_num_unsharded_checkpoints_to_keep, config.save_unsharded_optimizer
    unsharded = bytes_of(config.save_interval_unsharded, others, keep, optimizer)
    sharded = bytes_of(config.save_interval, set(), config.save_num_checkpoints_to_keep)
    return unsharded + sharded + (12.0 if config.save_interval_ephemeral is not None else 0.0)


def _flags(arguments: Sequence[str]) -> Mapping[str, list[str]]:
    """Flag -> its values; "" -> the arguments before the first flag."""
    found: dict[str, list[str]] = {"": []}
    name = ""
    for argument in arguments:
        if argument.startswith("--"):
            name = argument[2:]
            found[name] = []
        else:
            found[name].append(argument)
    return found
