"""A setting: a field of a configuration that carries its meaning, its limits and what it decides.

    d_model: int = setting(768, "width of the residual stream", at_least=1)
    alibi: bool = setting(False, only=(False,), instead="use rope or learned positions")

Checks, saved files, `--help-config` and docs/config.md are all made from this metadata.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..console import conceal


@dataclass(frozen=True)
class Setting:
    """The metadata of one key.

    Attributes:
        help: What the key means.
        at_least, more_than, at_most: The range of its numbers.
        only: The supported values, if not all; any other is an error.
        instead: What to do instead of giving an unsupported value.
        null_is: The value that null stands for, if that is always the same.
        no_effect: Why the key changes neither numbers nor memory; for keys that OLMo's configurations have. A run whose
            configuration changes it logs a warning (`check.idle_settings`).
        unknown_to_olmo: ai2-olmo 0.6.0, or the published trainer (a fork of 0.4), refuses the key. It is left out of a
            saved configuration if it has its default.
        any_family: The key of a model applies to every family; others describe a model of ours.
        defines_run: Whether the key decides what a run learns; None for the answer of its section.
    """

    help: str = ""
    at_least: float = -math.inf
    more_than: float = -math.inf
    at_most: float = math.inf
    only: tuple[Any, ...] = ()
    instead: str = ""
    null_is: Any = None
    no_effect: str = ""
    unknown_to_olmo: bool = False
    any_family: bool = False
    defines_run: bool | None = None

    @property
    def range(self) -> str:
        """The range in words; empty if any number is allowed."""
        limits = {"at least": self.at_least, "more than": self.more_than, "at most": self.at_most}
        return " and ".join(f"{name} {limit}" for name, limit in limits.items() if math.isfinite(limit))

    def out_of_range(self, value: Any) -> str | None:
        """What is wrong with a number or text, or with one of a list; None if nothing is."""
        if isinstance(value, (list, tuple)):
            return next(filter(None, map(self.out_of_range, value)), None)
        if isinstance(value, str) and (found := re.search(r"[\x00-\x1f\x7f]", value)):
            return f"{value!r} contains the control character {found[0]!r}"
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return None
        if isinstance(value, float) and not math.isfinite(value):
            return f"{value} is not a finite number"
        if isinstance(value, int) and value.bit_length() > 63:
            return f"a number of {value.bit_length()} bits; at most 63 are allowed"
        allowed = self.at_least <= value <= self.at_most and self.more_than < value
        return None if allowed else f"{value} must be {self.range}"

    def unsupported(self, value: Any) -> str | None:
        """Why a value is not supported and what to do instead; None if it is supported."""
        if not self.only or value in self.only:
            return None
        return f"{spelled(value)} is not supported ({' or '.join(map(spelled, self.only))} is); {self.instead}"

    def __str__(self) -> str:
        supported = f"only {' or '.join(map(spelled, self.only))}" if self.only else ""
        supported += f"; {self.instead}" if self.only and not self.help else ""
        families = "applies to every family" if self.any_family else ""
        parts = (self.help, self.range, supported, self.no_effect and f"no effect: {self.no_effect}", families)
        return "; ".join(part for part in parts if part)


def setting(default: Any, help: str = "", **details: Any) -> Any:
    """A dataclass field with a Setting as its metadata; a class or function as default makes the value."""
    given = {"default_factory" if callable(default) else "default": default}
    return dataclasses.field(**given, metadata={"setting": Setting(help, **details)})


def setting_of(field: dataclasses.Field[Any]) -> Setting:
    return typing.cast(Setting, field.metadata["setting"])


def default_of(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def alternatives(annotation: Any) -> tuple[Any, ...]:
    """The types that an annotation allows: (X,) of X, (X, Y) of X | Y."""
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if is_union else (annotation,)


def section_of(annotation: Any) -> type | None:
    """The dataclass that an annotation holds: X, X | None or list[X]."""
    for candidate in (annotation, *typing.get_args(annotation)):
        if dataclasses.is_dataclass(candidate):
            return typing.cast(type, candidate)
    return None


def walk(schema: type, prefix: str = "") -> Iterator[tuple[str, Any, dataclasses.Field[Any]]]:
    """Every key of a schema in order, with its type and its field; a section comes before its own keys."""
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        key, annotation = prefix + field.name, hints[field.name]
        yield key, annotation, field
        section = section_of(annotation)
        if section is not None:
            yield from walk(section, f"{key}.")


def spelled(value: Any) -> str:
    """A value as YAML spells it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"[{', '.join(map(spelled, value))}]" if isinstance(value, (list, tuple)) else str(value)


def plain(value: Any) -> Any:
    """A configuration as the mappings, lists and scalars of its YAML, without defaults of keys unknown to OLMo.

    A secret from the environment is replaced by its `${oc.env:NAME}`; any other `${` is escaped.
    """
    if isinstance(value, str):
        return conceal(re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", value))
    if dataclasses.is_dataclass(value):
        fields = dataclasses.fields(value)
        if getattr(value, "transformers", None) is not None:  # a model that is not ours
            fields = tuple(field for field in fields if setting_of(field).any_family)
        items = ((field, getattr(value, field.name)) for field in fields)
        return {f.name: plain(item) for f, item in items if not (setting_of(f).unknown_to_olmo and item == f.default)}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return {key: plain(item) for key, item in value.items()} if isinstance(value, dict) else value


def changed_keys(before: Any, now: Any, prefix: str = "", defines_run: bool = False) -> list[str]:
    """The keys that define a run and differ; a list, or a section that only one of the two has, is one key."""
    changed = []
    for field in dataclasses.fields(before):
        key, setting = prefix + field.name, setting_of(field)
        values = (getattr(config, field.name) for config in (before, now))
        old, new = (setting.null_is if value is None else value for value in values)
        defines = defines_run if setting.defines_run is None else setting.defines_run
        if dataclasses.is_dataclass(old) and dataclasses.is_dataclass(new):
            changed += changed_keys(old, new, f"{key}.", defines)
        elif defines and old != new and not setting.no_effect:
            changed.append(key)
    return changed
