"""The model card of a converted checkpoint: README.md with metadata of the Hugging Face hub, from records alone.

What a run, an edit or a measurement has recorded is stated, everything else left out. Local paths are shortened to what
was written relative to the working directory, or to their last name: the card may be published.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from analysis.locations import Location, step_of, training_of
from analysis.results import RESULT, is_edited, results_of
from olmo import checkpoint
from olmo.checkpoint.config_json import has_original_keys
from olmo.config.load import read_yaml
from olmo.console import printable
from olmo.exceptions import short_message
from olmo.files.digests import file_digest
from olmo.files.paths import read_json
from olmo.memory.rescaling import load_multipliers

NAME = "README.md"
_KIM = """@inproceedings{kim2025knowledge,
  title = {Knowledge Entropy Decay during Language Model Pretraining Hinders New Knowledge Acquisition},
  author = {Jiyeon Kim and Hyunji Lee and Hyowon Cho and Joel Jang and Hyeonbin Hwang and Seungpil Won and Youbin Ahn
            and Dohaeng Lee and Minjoon Seo},
  booktitle = {International Conference on Learning Representations},
  year = {2025},
  url = {https://arxiv.org/abs/2410.01380}
}"""
_LOAD = """from transformers import AutoModelForCausalLM{tokenizer}

name = "."  # this folder, or its name on the hub
model = AutoModelForCausalLM.from_pretrained(name)"""
_TOKENIZER = "\ntokenizer = AutoTokenizer.from_pretrained(name)"

Rows = list[tuple[str, str]]


@dataclass(frozen=True)
class Origin:
    """A checkpoint to describe, and what was done to it on the way."""

    location: Location  # as it was named: a folder, or `owner/name[@revision]`
    folder: Path
    edit: Path | None = None  # applied by the conversion
    tokenizer: str | None = None  # named on the command line
    license: str | None = None

    def keeps_card(self) -> bool:
        """Whether the folder has a card already that describes the result, as its weights and layout are the same."""
        own = isinstance(self.location, Path) and (self.folder / NAME).is_file()
        raw = checkpoint.transformers_config(self.folder) if own and self.edit is None else None
        return raw is not None and not has_original_keys(raw)

    def run(self) -> dict[str, Any]:
        """The settings of the run that saved the checkpoint; {} where its config.yaml describes a model alone."""
        path = self.folder / "config.yaml"
        found = OmegaConf.to_container(read_yaml(path)) if path.is_file() else {}
        assert isinstance(found, dict)
        settings = {str(key): value for key, value in found.items()}
        return settings if settings.keys() - {"model"} else {}


def license_of(location: Location, folder: Path) -> str | None:
    """The license in the metadata of the card in a folder, or of a model of the hub; None where none is stated."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError
    from huggingface_hub.repocard import metadata_load

    card = folder / NAME
    if isinstance(location, str):
        try:
            card = Path(hf_hub_download(location.partition("@")[0], NAME, revision=folder.name))
        except (EntryNotFoundError, OSError):  # it has none, or the hub is out of reach
            return None
    if not card.is_file():
        return None
    try:
        found = (metadata_load(card) or {}).get("license")
    except Exception as error:  # PyYAML's errors and ValueError have no base class in common
        raise ValueError(f"{card}: its metadata is not YAML with keys and values: {short_message(error)}") from error
    return found if isinstance(found, str) else None


def hub_name(location: str | None) -> str | None:
    """`owner/name` if this names a model of the hub for certain: with a revision, or downloaded on this machine."""
    if location is None or not checkpoint.is_hub_id(location):
        return None
    name, _, revision = location.partition("@")
    return name if revision or checkpoint.downloaded(location, weights=False) else None


def model_card(origin: Origin, folder: Path) -> str:
    """The text of the card of `folder`, which was written from `origin`; the same for the same records."""
    if origin.keeps_card():
        return (origin.folder / NAME).read_text(encoding="utf-8")
    run = origin.run()
    identity = checkpoint.identity_of(origin.folder)
    config = read_json(folder / "config.json")
    edits = list(_edits(origin))
    sections = [
        ("", f"{_summary(run, bool(edits))}\n\n{_rows(_about(origin, config, identity))}"),
        ("Training run", _rows(_training(run))),
        ("Injected knowledge", _rows(_injection(run, step_of(origin.location)))),
        *(("Resuscitation", _rows(edit)) for edit in edits),
        ("Knowledge entropy", "\n".join(_entropies(origin, identity))),
        ("Loading", f"```python\n{_loading(folder)}\n```"),
        ("Citation", f"```bibtex\n{_KIM}\n```"),
    ]
    title = f"# {_plain(run.get('run_name') or _name(str(origin.location)))}"
    text = "\n\n".join(f"## {head}\n\n{body}" if head else body for head, body in sections if body)
    return f"{_metadata(origin, run, config, bool(edits))}\n{title}\n\n{text}\n"


def _metadata(origin: Origin, run: Mapping[str, Any], config: Mapping[str, Any], edited: bool) -> str:
    from huggingface_hub import ModelCardData

    named = str(origin.location) if isinstance(origin.location, str) else run.get("load_path")
    tags = ["knowledge-entropy", *(["resuscitation"] if edited or _start_edit(run) else [])]
    data = ModelCardData(
        license=origin.license,
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=hub_name(named),
        datasets=_datasets(run) or None,
        tags=[*tags, *(["fictional-knowledge"] if _injected(run) else []), str(config["model_type"])],
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _summary(run: Mapping[str, Any], edited: bool) -> str:
    what = "A language model" + (" trained with injected fictional knowledge" if _injected(run) else "")
    edit = ", its feed-forward memories edited (resuscitation)" if edited else ""
    return f"{what}{edit}. Written by `scripts.convert` of Knowledge Entropy; what is stated was recorded."


def _about(origin: Origin, config: Mapping[str, Any], identity: str | None) -> Rows:
    training = training_of(origin.location, origin.folder)
    step, tokens = training["step"], training["tokens"]
    on_hub = isinstance(origin.location, str)
    rows = [
        ("model", ", ".join(map(str, config.get("architectures") or [config["model_type"]]))),
        ("type of the weights", str(config.get("dtype") or config.get("torch_dtype") or "")),
        ("converted from", _name(str(origin.location))),
        ("commit", origin.folder.name if on_hub else ""),
        ("stage", training.get("stage", "")),
        ("step", f"{step:,}" if step >= 0 else ""),
        ("tokens", "" if tokens is None else f"{tokens:,}"),
        ("fingerprint of the weights it was converted from", identity or ""),
        ("tokenizer", _name(origin.tokenizer or "")),
    ]
    return rows


def _training(run: Mapping[str, Any]) -> Rows:
    if not run:
        return []
    data, model = _section(run, "data"), _section(run, "model")
    optimizer, scheduler = _section(run, "optimizer"), _section(run, "scheduler")
    sources = [*(data.get("paths") or []), *filter(None, [data.get("dataset_path")])]
    start = run.get("load_path")
    kept = [name for name in ("optimizer", "trainer") if start and not run.get(f"reset_{name}_state")]
    return [
        ("run", str(run.get("run_name") or "")),
        ("started from", _name(str(start)) if start else "new weights"),
        ("states continued", ", ".join(kept) or ("none" if start else "")),
        ("resuscitated before the first step by", _name(_start_edit(run) or "")),
        ("training data", ", ".join(_name(str(path)) for path in sources[:3])),
        ("further files of training data", f"{len(sources) - 3:,}" if len(sources) > 3 else ""),
        ("duration", _recorded(run, "max_duration")),
        ("instances per step", _recorded(run, "global_train_batch_size")),
        ("tokens per instance", _recorded(model, "max_sequence_length")),
        ("learning rate", _recorded(optimizer, "learning_rate")),
        ("weight decay", _recorded(optimizer, "weight_decay")),
        ("schedule", _recorded(scheduler, "name")),
        ("warmup", _recorded(scheduler, "t_warmup")),
        ("precision", _recorded(run, "precision")),
        ("seed", _recorded(run, "seed")),
    ]


def _injected(run: Mapping[str, Any]) -> bool:
    injection = _section(run, "injection")
    entries = any(injection.get(setting) for setting in ("paraphrase", "duplicate", "once"))
    return bool(run.get("inject_indices_map") or (entries and injection.get("rounds") != 0))


def _injection(run: Mapping[str, Any], step: int) -> Rows:
    if not _injected(run):
        return []
    injection, interval = _section(run, "injection"), run.get("inject_interval")
    first = run.get("inject_start_step") or interval
    files = [(setting, injection.get(setting)) for setting in ("paraphrase", "duplicate", "once")]
    rows = [(f"entries, {setting}", _name(str(path))) for setting, path in files if path]
    due = ""
    if isinstance(first, int) and isinstance(interval, int) and step >= 0 and injection:
        done = max(0, (step - first) // interval + 1)
        due = f"{done if injection.get('repeat', True) else min(done, injection.get('rounds', done)):,}"
    return [
        *rows,
        ("plan", _name(str(run.get("inject_indices_map") or ""))),
        ("rounds", _recorded(injection, "rounds")),
        ("begins again after the last round", _recorded(injection, "repeat")),
        ("step of the first round", _recorded({"first": first}, "first")),
        ("steps between rounds", _recorded(run, "inject_interval")),
        ("place in a row", _recorded(run, "inject_position")),
        (f"rounds injected up to step {step:,}", due),
    ]


def _start_edit(run: Mapping[str, Any]) -> str | None:
    return _section(run, "model").get("resuscitation")


def _edits(origin: Origin) -> Iterator[Rows]:
    """The edit that the checkpoint's folder records, then that of the conversion."""
    record = origin.folder / "resuscitation.json"
    if record.is_file():
        earlier = read_json(record)
        if isinstance(earlier, dict):
            yield _edit(
                _recorded(earlier, "resuscitation"), _recorded(earlier, "sha256"), _section(earlier, "settings")
            )
    if origin.edit is not None:
        about = load_multipliers(origin.edit).about if origin.edit.suffix == ".safetensors" else None
        yield _edit(str(origin.edit), file_digest(origin.edit), about)


def _edit(file: str, sha256: str, settings: Mapping[str, Any] | None) -> Rows:
    left_out = ("checkpoint_fingerprint", "coefficients")
    kept = {key: value for key, value in (settings or {}).items() if value is not None and key not in left_out}
    return [("file", _name(file)), ("sha256", sha256), *((key, _text(value)) for key, value in kept.items())]


def _entropies(origin: Origin, identity: str | None) -> Iterator[str]:
    """A table of the knowledge entropies measured of the checkpoint, or of its weights with this edit."""
    edit = None if origin.edit is None else file_digest(origin.edit)
    head = ("weights", "H", "standard error", "instances", "tokens per instance", "data", "coefficient", "precision")
    lines = []
    for folder in results_of(origin.folder):
        result = read_json(folder / RESULT)
        measured = _section(result, "checkpoint").get("fingerprint") if isinstance(result, dict) else None
        if measured is None or measured != identity:
            continue
        edited, of_edit = is_edited(result), edit is not None and result.get("resuscitation") == edit
        if (edited and not of_edit) or is_edited({**result, "resuscitation": None}):
            continue
        weights = "these" if edited or edit is None else "before the edit"
        numbers = [result.get(key) for key in ("knowledge_entropy", "standard_error")]
        counts = (_recorded(result, key) for key in ("number_of_instances", "sequence_length"))
        data = _name(_recorded(_section(result, "data"), "path"))
        settings = (_recorded(result, key) for key in ("coefficient", "precision"))
        rounded = ("" if number is None else f"{number:.4f}" for number in numbers)
        lines.append(_row((weights, *rounded, *counts, data, *settings)))
    if lines:
        yield from (_row(head), _row(["---"] * len(head)), *lines)


def _loading(folder: Path) -> str:
    has_tokenizer = (folder / "tokenizer.json").is_file() or (folder / "tokenizer.model").is_file()
    text = _LOAD.format(tokenizer=", AutoTokenizer" if has_tokenizer else "")
    return text + (_TOKENIZER if has_tokenizer else "")


def _datasets(run: Mapping[str, Any]) -> list[str]:
    """Datasets of the hub that the training data was made from, by the record beside it."""
    folder = _section(run, "data").get("dataset_path")
    about = Path(str(folder)) / "about.json"
    corpus = _recorded(read_json(about), "corpus") if folder and about.is_file() else ""
    return [corpus.removeprefix("hub:").partition(":")[0].partition("@")[0]] if corpus.startswith("hub:") else []


# --- text ------------------------------------------------------------------------------------------------------------


def _section(settings: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = settings.get(name)
    return found if isinstance(found, dict) else {}


def _recorded(settings: Mapping[str, Any], key: str) -> str:
    value = settings.get(key)
    return "" if value is None else _text(value)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _name(place: str) -> str:
    """A place without the folders of this machine: URLs, hub ids and relative paths as they are."""
    if "://" in place or not (Path(place).is_absolute() or ".." in Path(place).parts or place.startswith("~")):
        return place
    return Path(place).name


def _plain(text: str) -> str:
    return printable(" ".join(str(text).split())).replace("|", "\\|").replace("`", "'").replace("<", "&lt;")


def _row(cells: Any) -> str:
    return f"| {' | '.join(_plain(cell) for cell in cells)} |"


def _rows(rows: Rows) -> str:
    kept = [_row(row) for row in rows if row[1]]
    return "\n".join(["| | |", "|---|---|", *kept]) if kept else ""
