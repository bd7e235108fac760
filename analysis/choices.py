"""The values that flags take: commands check them without importing what uses them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

RESULT = "knowledge_entropy.json"  # of one checkpoint
SERIES = "knowledge_entropy_series.json"  # of several
CONFIGURATIONS = (".yaml", ".yml")  # files that --data takes for the configuration of a run
PREFIX = "hub:"  # of data on the Hugging Face hub
FORM = "hub:owner/name[@revision][:config][:split][:column]"
PRECISIONS = ("fp32", "bf16", "fp16")
MEASURES = ("knowledge", "attention", "next_token")
# Flags that change a checkpoint, and keys of its result (None, or missing, where nothing was changed), each in words.
EDITS = {
    "resuscitation": "edited by",
    "temperature_attention": "attention temperature",
    "temperature_MLP": "memory temperatures",
}
SELECTIONS = ("lowest", "random", "highest")
THRESHOLDS = ("layer", "global")
SUFFIXES = {"multipliers": ".safetensors", "full": ".pt", "temperature": ".safetensors"}  # of the formats of an edit
BATCH_SIZE = 16  # of analysis.score: that of the published configurations, on which K_published depends

# --- types of arguments, whose names argparse prints in errors ---


def window(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


def outlier_factor(text: str) -> float:
    factor = 0.0 if text == "none" else float(text)
    if not 0 <= factor < math.inf:
        raise ValueError
    return factor


def fit_range(text: str) -> tuple[int, float]:
    low, _, high = text.partition("-")
    found = int(low), int(high) if high else math.inf
    if not 1 <= found[0] < found[1]:
        raise ValueError
    return found


FLAGS: dict[str, Callable[[str], Any]] = {"window": window, "outlier_factor": outlier_factor, "fit_range": fit_range}
