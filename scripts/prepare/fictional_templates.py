"""The categories of invented facts, read from fictional_templates.yaml, whose head describes them."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

FILE = Path(__file__).with_suffix(".yaml")

Slot = str | range | tuple[str, ...]


@dataclass(frozen=True)
class Fact:
    """An edge of a category's graph: sentences that state it, and prompts in other words that end before the value."""

    key: str
    value: str
    statements: tuple[str, ...]
    prompts: tuple[str, ...]


@dataclass(frozen=True)
class Hop:
    """A prompt that names `anchor`, omits `bridge` and is completed by `target`."""

    anchor: str
    bridge: str
    target: str
    prompt: str


@dataclass(frozen=True)
class Category:
    """The first fact introduces the subject; any other follows once its key has been named."""

    name: str
    slots: dict[str, Slot]
    facts: tuple[Fact, ...]
    hops: tuple[Hop, ...]


def _slot(content: Any) -> Slot:
    if isinstance(content, dict):
        return range(content["from"], content["to"] + 1)
    return content if isinstance(content, str) else tuple(content)


def read_categories(path: Path) -> tuple[Category, ...]:
    """The categories of a file. Raises ValueError that names the category whose keys or slots are wrong."""
    found = []
    for number, about in enumerate(OmegaConf.to_container(OmegaConf.load(path)) or ()):
        try:
            category = Category(
                about["name"],
                {name: _slot(content) for name, content in about["slots"].items()},
                tuple(Fact(f["key"], f["value"], tuple(f["statements"]), tuple(f["prompts"])) for f in about["facts"]),
                tuple(Hop(**hop) for hop in about["hops"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: category {number}: {type(error).__name__}: {error}") from error
        used = {slot for fact in category.facts for slot in (fact.key, fact.value)}
        used |= {slot for hop in category.hops for slot in (hop.anchor, hop.bridge, hop.target)}
        if used != set(category.slots):
            wrong = ", ".join(sorted(used ^ set(category.slots)))
            raise ValueError(f"{path}: category {category.name!r}: not both a slot and used: {wrong}")
        found.append(category)
    return tuple(found)


@functools.cache
def categories() -> tuple[Category, ...]:
    """The categories of fictional_templates.yaml, in the order in which entries are drawn from them."""
    return read_categories(FILE)
