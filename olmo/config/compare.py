"""Which keys that define a run differ between two configurations."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from .schema import TrainConfig
from .setting import setting_of


def changed_keys(before: TrainConfig, now: TrainConfig) -> list[str]:
    """The keys that decide what a run learns and differ; a list, or a section that only one of them has, is one key."""
    return list(_changed(before, now))


def _changed(before: Any, now: Any, prefix: str = "", defines: bool = False) -> Iterator[str]:
    for field in dataclasses.fields(before):
        key, setting = prefix + field.name, setting_of(field)
        decides = defines if setting.defines_run is None else setting.defines_run
        old, new = getattr(before, field.name), getattr(now, field.name)
        if dataclasses.is_dataclass(old) and dataclasses.is_dataclass(new):
            yield from _changed(old, new, f"{key}.", decides)
        elif decides and old != new and not setting.no_effect:
            yield key
