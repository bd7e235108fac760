"""Read a study file: base files, `--set KEY=VALUE`, and every key and value checked against its schema."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from olmo.config.load import with_base
from olmo.config.setting import alternatives
from olmo.exceptions import ConfigurationError, did_you_mean
from scripts.studies.schema import Study

_FILE_NAMES = {"start": "from", "end": "to"}  # of fields whose names in the file are words of Python


def read_study(path: Path, changes: Sequence[str] = ()) -> Study:
    """The study of a file. changes: `KEY=VALUE`, as --set has them; VALUE is YAML.

    Raises ConfigurationError with the file, the key and the nearest known one.
    """
    raw = typing.cast(dict[str, Any], OmegaConf.to_container(with_base(path)))
    if "title" not in raw and (found := [key for key in raw if key in ("model", "optimizer", "max_duration")]):
        raise ConfigurationError(
            f"{path}: a training configuration (it has {found[0]}), not a study; run it with python -m scripts.train"
        )
    for change in changes:
        _set(raw, change)
    return typing.cast(Study, _parse(Study, raw, str(path), ""))


def as_plain(value: Any) -> Any:
    """A study as the mappings, lists and scalars of its file."""
    if dataclasses.is_dataclass(value):
        fields = dataclasses.fields(value)
        return {_FILE_NAMES.get(f.name, f.name): as_plain(getattr(value, f.name)) for f in fields}
    if isinstance(value, dict):
        return {key: as_plain(item) for key, item in value.items()}
    return [as_plain(item) for item in value] if isinstance(value, list) else value


def with_folder(value: Any, folder: Path) -> Any:
    """A value of a study with every `{folder}` in its texts replaced."""
    if isinstance(value, str):
        return value.replace("{folder}", str(folder))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(
            value, **{f.name: with_folder(getattr(value, f.name), folder) for f in dataclasses.fields(value)}
        )
    if isinstance(value, dict):
        return {key: with_folder(item, folder) for key, item in value.items()}
    return [with_folder(item, folder) for item in value] if isinstance(value, list) else value


def _set(raw: dict[str, Any], change: str) -> None:
    """Apply one `KEY=VALUE`; names in KEY may contain points and `=`, the longest existing one is meant."""
    named = [f"{key}.{name}" for key, section in raw.items() if isinstance(section, dict) for name in section]
    begin = max((len(name) for name in named if re.match(re.escape(name) + r"[.=]", change)), default=0)
    equals = change.find("=", begin)
    key, text = change[:equals], change[equals + 1 :]
    if equals < 1:
        raise ConfigurationError(f"--set {change}: expected KEY=VALUE, such as seeds=5")
    try:
        value = typing.cast(Any, OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"])))["value"]
    except Exception as error:  # PyYAML's errors and OmegaConf's have no base class in common
        raise ConfigurationError(f"--set {change}: not YAML: {' '.join(str(error).split())[:200]}") from error
    place: Any = raw
    schema: Any = Study
    parts = key.split(".")
    while True:
        head: Any
        if isinstance(place, list):
            if not parts[0].isdigit() or int(parts[0]) >= len(place):
                raise ConfigurationError(f"--set {key}: a list of {len(place)}, which has no {parts[0]}")
            head, rest = int(parts[0]), parts[1:]
        elif isinstance(place, dict):
            # The keys of a configuration are one name, whatever points they contain; other names may contain some.
            count = (
                len(parts)
                if typing.get_args(schema) == (str, Any)
                else next((n for n in range(len(parts), 1, -1) if ".".join(parts[:n]) in place), 1)
            )
            head, rest = ".".join(parts[:count]), parts[count:]
        else:
            raise ConfigurationError(f"--set {key}: no section there")
        schema = _inner(schema, head)
        if not rest:
            place[head] = value
            return
        if isinstance(place, dict):
            place.setdefault(head, {})
            place[head] = {} if place[head] is None else place[head]
        place, parts = place[head], rest


def _inner(schema: Any, key: Any) -> Any:
    """The type of what is under a key."""
    if dataclasses.is_dataclass(schema):
        return _hints(schema).get(key, None)
    for kind in alternatives(schema) if schema is not None else ():
        arguments = typing.get_args(kind)
        if typing.get_origin(kind) in (dict, list):
            return arguments[-1]
        if dataclasses.is_dataclass(kind):
            return _hints(kind).get(key, None)
    return None


def _hints(schema: Any) -> dict[str, Any]:
    """The types of a section's keys, as a file writes them."""
    return {_FILE_NAMES.get(name, name): kind for name, kind in typing.get_type_hints(schema).items()}


def _parse(kind: Any, value: Any, where: str, key: str) -> Any:
    """A value of a file as a type of the schema."""
    if value is None and type(None) in alternatives(kind):
        return None
    for candidate in alternatives(kind):
        origin, arguments = typing.get_origin(candidate), typing.get_args(candidate)
        if candidate is Any:
            return value
        if dataclasses.is_dataclass(candidate) and (isinstance(value, dict) or value is None):
            return _section(typing.cast(type, candidate), value or {}, where, key)
        if origin is dict and (isinstance(value, dict) or value is None):
            prefix = f"{key}." if key else ""
            return {str(k): _parse(arguments[1], v, where, f"{prefix}{k}") for k, v in (value or {}).items()}
        if origin is list and isinstance(value, list):
            return [_parse(arguments[0], item, where, f"{key}[{i}]") for i, item in enumerate(value)]
        if candidate is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if isinstance(candidate, type) and type(value) is candidate:
            return value
        if candidate is str and isinstance(value, (int, float)) and not isinstance(value, bool):
            return str(value)  # an argument of a command
    raise ConfigurationError(f"{where}: {key}: expected {_in_words(kind)}, got {value!r}"[:400])


def _in_words(kind: Any) -> str:
    names = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}
    words = []
    for candidate in alternatives(kind):
        origin = typing.get_origin(candidate)
        default = "a list" if origin is list else "keys and values"
        words.append(names.get(candidate, default))
    return " or ".join(words)


def _section(schema: type, raw: dict[str, Any], where: str, key: str) -> Any:
    hints, prefix = _hints(schema), f"{key}." if key else ""
    problems = list(_unknown(raw, hints, prefix))
    fields = {_FILE_NAMES.get(f.name, f.name): f for f in dataclasses.fields(schema)}
    for name, found in fields.items():
        required = found.default is dataclasses.MISSING and found.default_factory is dataclasses.MISSING
        if required and name not in raw:
            problems.append(f"{prefix}{name}: missing")
    if problems:
        raise ConfigurationError(f"{where}: {'; '.join(problems)}")
    return schema(**{fields[name].name: _parse(hints[name], v, where, f"{prefix}{name}") for name, v in raw.items()})


def _unknown(raw: dict[str, Any], hints: dict[str, Any], prefix: str) -> Iterator[str]:
    for name in raw:
        if name not in hints:
            nearest = did_you_mean(str(name), hints, prefix)
            yield f"unknown key '{prefix}{name}'{nearest or '; known are ' + ', '.join(hints)}"
