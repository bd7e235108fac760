"""The published numbers that are shown beside those of a study which repeats a published one."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf

from olmo.exceptions import did_you_mean

FILE = Path(__file__).with_name("published.yaml")


@cache
def _all() -> Mapping[str, Any]:
    return cast(Mapping[str, Any], OmegaConf.to_container(OmegaConf.load(FILE)))


def study(repeats: str | None) -> Mapping[str, Any]:
    """The numbers of one published study, none without a name. Raises ValueError, with the nearest, for others."""
    if repeats is None:
        return {}
    if repeats not in _all():
        raise ValueError(f"repeats: unknown '{repeats}'{did_you_mean(repeats, _all())}; known: {', '.join(_all())}")
    return _all()[repeats]


def number(numbers: Mapping[str, Any], setting: str, step: int | None, measure: str) -> float | None:
    """What was published of a setting and start; None where nothing was."""
    of_setting = numbers.get("settings", {}).get(setting, {})
    starts = numbers.get("starts", [])
    thousands = None if step is None else round(step / 1000)
    return of_setting[measure][starts.index(thousands)] if measure in of_setting and thousands in starts else None
