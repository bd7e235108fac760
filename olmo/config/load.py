"""Read configurations: YAML files, the `base` files they name, overrides, old spellings and OLMo's interpolations."""

from __future__ import annotations

import functools
import glob
import os
import re
import shlex
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from ..console import conceal, log, remember_secret
from ..exceptions import ConfigurationError, did_you_mean
from ..files.paths import parse_step, provided
from .check import model_problems, run_problems
from .help import type_in_words
from .model import ModelConfig
from .schema import EvaluatorConfig, TrainConfig
from .setting import alternatives, section_of, walk

Config = TypeVar("Config")

# What OmegaConf raises for a wrong value: its own errors, and those of what it is built from.
_OF_OMEGACONF = (OmegaConfBaseException, ValueError, TypeError, AttributeError, OSError, RecursionError)
_LARGEST = 2**24  # bytes of a configuration file

# The setting of the 120 entries of Chang et al.'s data (kaistAI/factual-knowledge-acquisition,
# analysis/create_inject_indices_map.py).
_SETTINGS_OF_CHANG = {"paraphrase": "0-39", "duplicate": "40-79", "once": "80-119"}

# An environment variable whose value is not to be printed or saved, by its name or its value (a URL with a password).
_SECRET_NAME = re.compile(r"(^|_)(api_?key|key|token|secret|pass|passwd|password|pwd|credentials?|auth)(_|$)", re.I)
_SECRET_VALUE = re.compile(r"://[^/\s@]*:[^/\s@]+@")
_REQUIRED = object()


def load(
    path: str | Path, overrides: Sequence[str] = (), complete: Callable[[DictConfig], None] | None = None
) -> TrainConfig:
    """Read a run's configuration: defaults, then `base` files, then the file, then `--key.sub=value`.

    `complete` adds to what was given what follows from it (`checkpoint.complete`); its errors about files and
    folders are left as they are. Raises ConfigurationError with all problems found, each with its key.
    """
    with _in_one_line(path, *_OF_OMEGACONF):
        raw = with_base(Path(path))
        _translate(raw)
        of_file = set(_wrong_keys(raw, TrainConfig))
        _override(raw, overrides)
        _translate(raw)
        problems = list(_wrong_keys(raw, TrainConfig))
        if not of_file.intersection(problems):
            _refuse("command line", [re.sub(r"(\S+): (.*); write (.+)", _as_flag, problem) for problem in problems])
        _refuse(path, problems)
        evaluators = raw.get("evaluators") or []
        if evaluators and not (OmegaConf.is_list(evaluators) and all(map(OmegaConf.is_dict, evaluators))):
            raise ConfigurationError(f"{path}: evaluators: expected a list of keys and values")
        for position, evaluator in enumerate(evaluators):  # OmegaConf reports no position in a list
            _merged(EvaluatorConfig, evaluator, f"{path}: evaluators[{position}].")
    if complete is not None:
        with _in_one_line(path, OmegaConfBaseException):
            complete(raw)
    with _in_one_line(path, *_OF_OMEGACONF):
        keys = [override[2:].partition("=")[0].split(".") for override in overrides]
        given = {".".join(key[:length]) for key in keys for length in range(1, len(key) + 1)}
        config = _typed(TrainConfig, raw, f"{path}: ", given)
        problems = list(run_problems(config))  # of the command line, if all are about what it gave
        _refuse("command line" if {p.partition(":")[0] for p in problems} <= given else path, problems)
    return config


@contextmanager
def _in_one_line(path: str | Path, *kinds: type[Exception]) -> Iterator[None]:
    """Turn errors of these kinds, such as an interpolation that cannot be resolved, into ConfigurationErrors of one
    line that name the file; ConfigurationErrors keep their text. Secrets are replaced in both."""
    try:
        yield
    except ConfigurationError as error:
        raise ConfigurationError(conceal(str(error))) from None
    except kinds as error:
        raise ConfigurationError(conceal(f"{path}: {_in_a_line(error)}")) from error


def load_model_config(path: str | Path) -> ModelConfig:
    """Read the `model` section of a checkpoint's config.yaml; the rest may be of any trainer."""
    if not Path(path).is_file():
        raise ConfigurationError(f"{Path(path).parent}: neither config.yaml nor config.json")
    section = read_yaml(Path(path)).get("model")
    if not isinstance(section, DictConfig):
        raise ConfigurationError(f"{path}: no section 'model'")
    try:
        resolved = OmegaConf.to_container(section, resolve=True)  # here, as interpolations may refer to other sections
    except _OF_OMEGACONF as error:
        key = getattr(error, "full_key", None) or "model"
        raise ConfigurationError(f"{path}: {key}: {_in_a_line(error)}") from error
    return make_model_config(typing.cast(dict[str, Any], resolved), str(path))


def make_model_config(section: DictConfig | dict[str, Any], where: str) -> ModelConfig:
    """Check the keys of a `model` section; ConfigurationErrors name `where`."""
    _refuse(where, _wrong_keys(OmegaConf.create(section), ModelConfig, "model."))
    config = _typed(ModelConfig, section, f"{where}: model.")
    _refuse(where, model_problems(config))
    return config


def _as_flag(problem: re.Match[str]) -> str:
    """A problem whose remedy is a value, with the flag of a shell that gives this value."""
    key, wrong, value = problem.groups()
    return f"{key}: {wrong}; write {shlex.quote(f'--{key}={value}')}"


def _refuse(where: str | Path, problems: Iterable[str]) -> None:
    if found := "; ".join(problems):
        raise ConfigurationError(f"{where}: {found}")


def _typed(schema: type[Config], raw: Any, where: str, overridden: Collection[str] = ()) -> Config:
    """The values of `raw` in a dataclass."""
    merged = _merged(schema, raw, where, overridden)
    with _naming(schema, raw, where, overridden):
        return typing.cast(Config, OmegaConf.to_object(merged))


def _merged(schema: type, raw: Any, where: str, overridden: Collection[str] = ()) -> Any:
    """The values of `raw`, of the types of a schema; interpolations remain."""
    with _naming(schema, raw, where, overridden):
        return OmegaConf.merge(_structured(schema), raw)  # a copy: the sources of a merge are left as they are


@functools.cache
def _structured(schema: type) -> Any:
    """The defaults of a schema; making them takes longer than reading a file."""
    return OmegaConf.structured(schema)


@contextmanager
def _naming(schema: type, raw: Any, where: str, overridden: Collection[str]) -> Iterator[None]:
    """Turn OmegaConf's errors into ConfigurationErrors with the key and `where` it was given, or the command line."""
    try:
        yield
    except _OF_OMEGACONF as error:
        key, problem = getattr(error, "full_key", None), _in_a_line(error)
        if not key and (found := _wrong_value(schema, raw)):
            key, problem = found
        given = any(name == key or name.startswith(f"{key}.") for name in overridden)
        place = "command line: " if given else where
        raise ConfigurationError(f"{place}{key}: {problem}" if key else f"{place.rstrip('.: ')}: {problem}") from error


def _wrong_value(schema: type, raw: Any) -> tuple[str, str] | None:
    """The first key whose value does not fit its type, and why, for errors of OmegaConf that name no key."""
    hints = typing.get_type_hints(schema)
    for key in raw if OmegaConf.is_dict(raw) else ():
        try:
            value = OmegaConf.merge(_structured(schema), {key: raw[key]})[key]
            if OmegaConf.is_config(value):
                OmegaConf.to_object(value)
        except _OF_OMEGACONF:
            section = section_of(hints[key])
            if section and (inner := _wrong_value(section, raw[key])):
                return f"{key}.{inner[0]}", inner[1]
            given = typing.cast(dict[Any, Any], OmegaConf.to_container(raw, resolve=False))[key]
            return key, f"expected {type_in_words(hints[key])}, got {given}"[:300]
    return None


def _in_a_line(error: BaseException) -> str:
    """The text of an error; of OmegaConf's the first line, as the key follows there."""
    text = str(error)
    first = text.partition("\n")[0] if isinstance(error, OmegaConfBaseException) else text
    return " ".join(first.split())[:300] or type(error).__name__


def read_yaml(path: Path) -> DictConfig:
    """The keys and values of a YAML file. Raises ConfigurationError where it has none."""
    if not path.is_file():
        raise ConfigurationError(f"{path}: {'not a file' if path.exists() else 'no such configuration file'}")
    if path.stat().st_size > _LARGEST:
        raise ConfigurationError(f"{path}: {path.stat().st_size:,} bytes are too many for a configuration")
    try:
        raw = OmegaConf.load(path)
    except Exception as error:  # PyYAML's errors and OmegaConf's have no base class in common
        raise ConfigurationError(f"{path}: not YAML: {_in_a_line(error)}") from error
    if not isinstance(raw, DictConfig):
        raise ConfigurationError(f"{path}: expected keys and values at the top level")
    if not raw:
        raise ConfigurationError(f"{path}: has no settings")
    return raw


def with_base(path: Path, seen: tuple[Path, ...] = ()) -> DictConfig:
    """The keys and values of a YAML file, over those of the file that its key `base` names; interpolations remain.

    Raises ConfigurationError where a file cannot be read, or `base` refers to itself.
    """
    path = path.resolve() if seen else provided(path)
    if path in seen:
        raise ConfigurationError(f"{path}: 'base' refers to itself, directly or through other files")
    raw = read_yaml(path)
    base = raw.pop("base", None)  # removed: the saved configuration is complete without its base
    if not base:
        return raw
    if not isinstance(base, str):
        raise ConfigurationError(f"{path}: base: expected the name of one file")
    parent = with_base((path.parent / base).resolve(), (*seen, path.resolve()))
    return typing.cast(DictConfig, OmegaConf.merge(parent, raw))


def _translate(raw: DictConfig) -> None:
    """Replace old spellings, which OLMo accepts as well."""
    optimizer, fsdp = raw.get("optimizer"), raw.get("fsdp")
    if OmegaConf.is_dict(optimizer) and optimizer.get("no_decay_norm_and_bias") is not None:
        decays = not optimizer.pop("no_decay_norm_and_bias")
        optimizer["decay_norm_and_bias"] = optimizer["decay_embeddings"] = decays
    if OmegaConf.is_dict(optimizer) and optimizer.get("name") == "decoupled_lionw":
        optimizer["name"] = "lionw"
        optimizer.pop("eps", None)
    if OmegaConf.is_dict(fsdp) and fsdp.get("sharding_strategy") == "HYBRID_SHARD_ZERO2":
        fsdp["sharding_strategy"] = "_HYBRID_SHARD_ZERO2"
    if (file := raw.get("probe_dataset")) is not None and not OmegaConf.is_config(file):
        if raw.get("evaluators") is None:
            raw["evaluators"] = []
        if OmegaConf.is_list(raw["evaluators"]):
            del raw["probe_dataset"]
            for setting, entries in _SETTINGS_OF_CHANG.items():
                for kind in ("memorization", "semantic", "composition", "paragraph"):
                    data = {"dataset_path": f"{file}#{entries}"}
                    raw["evaluators"].append({"label": f"{setting}_{kind}", "data": data})
    if isinstance(raw.get("activation_checkpointing"), bool):
        raw["activation_checkpointing"] = "whole_layer" if raw["activation_checkpointing"] else None


def _wrong_keys(raw: Any, schema: type, prefix: str = "") -> Iterator[str]:
    """Unknown keys, and sections and lists that are something else."""
    types = typing.get_type_hints(schema)
    for key in raw:
        if key not in types:
            meant = _in_a_section(str(key), prefix) or did_you_mean(str(key), types, prefix)
            yield f"unknown key '{prefix}{key}'{meant or '; list all keys: python -m scripts.train --help-config'}"
            continue
        section, value = section_of(types[key]), raw._get_node(key)
        if OmegaConf.is_missing(raw, key):
            yield f"{prefix}{key}: '???' is no value"
            continue
        if value is None or value._is_none() or value._is_interpolation():
            continue
        is_list = any(typing.get_origin(kind) is list for kind in alternatives(types[key]))
        if is_list and not OmegaConf.is_list(value):
            plain = r"[\w./-]+" if section else r"[\w./,-]+"  # several with commas, as other programs have them
            item = str(value) if re.fullmatch(plain, str(value)) else f"'{value}'"
            item = f"{{label: {item}, type: ...}}" if section else item
            yield f"{prefix}{key}: expected a list" + ("" if OmegaConf.is_dict(value) else f"; write [{item}]")
            continue
        if section is None:
            continue
        items = {f"{key}[{i}]": item for i, item in enumerate(value)} if is_list else {key: value}
        for place, item in items.items():
            if OmegaConf.is_dict(item):
                yield from _wrong_keys(item, section, f"{prefix}{place}.")
            else:
                yield f"{prefix}{place}: expected keys and values"


def _in_a_section(key: str, prefix: str) -> str:
    """The end of an error about a key at the top that some sections of a run have: where it belongs."""
    found = [name for name, _, _ in walk(TrainConfig) if name.rpartition(".")[2] == key and not prefix]
    return f", did you mean '{found[0]}'?" if len(found) == 1 else ""


def _override(raw: DictConfig, overrides: Sequence[str]) -> None:
    known = {key: annotation for key, annotation, _ in walk(TrainConfig)}
    seen: dict[str, str] = {}
    for override, following in zip(overrides, (*overrides[1:], "--")):
        key, _, value = override[2:].partition("=")
        if not override.startswith("--") or not key:
            meant = f"; write --{override.lstrip('-')}" if re.match(r"-?[\w.]+=", override) else ""
            raise ConfigurationError(f"expected --key.sub=value, got {override!r}{meant}")
        if seen.get(key, value) != value:
            log.warning("--%s: given more than once; the last value is used", key)
        seen[key] = value
        if override.startswith("--base="):
            raise ConfigurationError(f"{override}: 'base' can only be set in the file")
        types = alternatives(known.get(re.sub(r"\.\d+", "", override[2:]), bool))
        if "=" not in override and bool not in types:
            value = ("N" if int in types else "VALUE") if following.startswith("--") else following
            raise ConfigurationError(f"{override}: has no value; write {shlex.quote(f'{override}={value}')}")
        try:
            raw.merge_with_dotlist([override[2:] if "=" in override else f"{override[2:]}=true"])
        except Exception as error:  # PyYAML's errors and OmegaConf's have no base class in common
            key, _, value = override.partition("=")
            quoted = ", ".join(f'"{item.strip()}"' for item in value.strip("[]").split(","))
            hint = f"; quote braces for YAML and the shell: {shlex.quote(f'{key}=[{quoted}]')}" if ".." in value else ""
            raise ConfigurationError(f"{override}: {str(error).splitlines()[0]}{hint}") from error


def _choose(*paths: str) -> str:
    for path in paths:
        if "://" in path or Path(path).exists():
            return path
    raise FileNotFoundError(f"path.choose: none of {', '.join(paths)} exists")


def _glob(*patterns: str) -> list[str]:
    found = {pattern: sorted(glob.glob(pattern)) for pattern in patterns}
    for pattern, matches in found.items():
        if not matches:
            raise FileNotFoundError(f"path.glob: nothing matches {pattern}")
    return [path for pattern in patterns for path in found[pattern]]


def _last_checkpoint(folder: str) -> str:
    steps = {found[0]: path for path in Path(folder).glob("step*") if (found := parse_step(path.name))}
    if not steps:
        raise FileNotFoundError(f"path.last_checkpoint: no checkpoint in {folder}")
    return str(steps[max(steps)])


def _environment(name: str, default: Any = _REQUIRED) -> str | None:
    """OmegaConf's `oc.env`, which also remembers what is a secret."""
    value = os.environ.get(name)
    if value is None:
        if default is _REQUIRED:
            raise InterpolationResolutionError(f"Environment variable '{name}' not found")
        return None if default is None else str(default)
    if _SECRET_NAME.search(name) or _SECRET_VALUE.search(value):
        remember_secret(value, f"${{oc.env:{name}}}")
    return value


# The interpolations of OLMo's configurations: ${path.choose:A,B}, ${path.glob:PATTERN}, ${path.last_checkpoint:FOLDER}.
OmegaConf.register_resolver("oc.env", _environment, replace=True)
OmegaConf.register_resolver("path.choose", _choose, replace=True)
OmegaConf.register_resolver("path.glob", _glob, replace=True)
OmegaConf.register_resolver("path.last_checkpoint", _last_checkpoint, replace=True)
