"""The kind of a result: what it must have in common with another one to be compared with it, or joined in one line.

`kind_of` is the one definition. Tables, figures and paired differences of several results use it.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from analysis.choices import EDITS
from olmo.files.revisions import is_later_stage
from olmo.memory.locate import numbered

_INSTANCES, _LENGTH, _PACKING, _DATA, _EDIT = "numbers of instances", "sequence lengths", "packings", "data", "edits"
_RUN, _STAGE = "runs", "stages"


def kind_of(result: dict[str, Any]) -> dict[str, str]:
    """The settings on which the entropy of a checkpoint depends, each with its value in words: the content of a
    `knowledge_entropy.json` in, names in the plural out, as errors and legends use them.

    Results that ended at the same tolerance are of one kind, whatever number of instances each needed.
    """
    data = result["data"]
    tolerance, instances = result.get("tolerance"), f"{result['number_of_instances']} instances"
    if tolerance is not None:
        instances = f"tolerance {tolerance:g}, at most {data.get('instances')} instances"
    return {
        "models": _model(result),
        "coefficients": str(result.get("coefficient")),
        "precisions": str(result.get("precision")),
        _LENGTH: f"{result.get('sequence_length')} tokens",
        _INSTANCES: instances,
        _PACKING: "packed texts" if data.get("pack") else "texts or rows as they are",
        _EDIT: _edit(result),
        _DATA: data["sha256"],
    }


def _edit(result: dict[str, Any]) -> str:
    """What changed the checkpoint before it was measured, in words; results of earlier versions name no files."""
    words = []
    for key, word in EDITS.items():
        if (value := result.get(key)) is not None:
            name = Path(result.get("edit_files", {}).get(key, "")).stem
            words.append(f"{word} {value:g}" if isinstance(value, float) else f"{word} {name}" if name else "edited")
    return ", ".join(words) or "as saved"


def positions(results: Sequence[dict[str, Any]]) -> list[int]:
    """For each result the steps of the whole training up to it, -1 where unknown. Where what was before their stage is
    unknown of results of one stage: the steps within it."""
    checkpoints = [result["checkpoint"] for result in results]
    one_stage = len({one.get("stage") for one in checkpoints if one["step"] >= 0}) == 1
    found = []
    for one in checkpoints:
        known = one_stage or "steps_before" in one or not is_later_stage(one.get("stage", ""))
        found.append(one.get("steps_before", 0) + one["step"] if known and one["step"] >= 0 else -1)
    return found


def _model(result: dict[str, Any]) -> str:
    """Its layers and their memories, in words."""
    if "layer_sizes" not in result:  # all are alike
        layers = len(result["layers"])
        return f"{layers} layers of {math.exp(result['maximum'] / max(layers, 1)):.0f} memories"
    of_size: dict[int, list[int]] = {}
    for number, size in zip(result["layer_numbers"], result["layer_sizes"]):
        of_size.setdefault(size, []).append(number)
    return ", ".join(f"{size} memories in {numbered(numbers)}" for size, numbers in of_size.items())


def difference(one: dict[str, Any], other: dict[str, Any]) -> str | None:
    """Why two results were not measured on the same instances in the same way, such as `different coefficients (abs,
    relu)`; None if they were. The edit of a checkpoint changes what is measured, not how."""
    kinds = [kind_of(one), kind_of(other)]
    if one["number_of_instances"] != other["number_of_instances"]:  # they may have a tolerance in common
        for kind, result in zip(kinds, (one, other)):
            kind[_INSTANCES] = f"{result['number_of_instances']} instances"
    differing = [name for name in _differing(kinds, [one, other]) if name != _EDIT]
    data = _data_names([one, other])
    shown = (f"different {name} ({', '.join(_words(kind, name, data) for kind in kinds)})" for name in differing)
    return "; ".join(shown) or None


def labels(results: Sequence[dict[str, Any]]) -> list[str]:
    """For each result the name of its kind, made of what differs among them: "" for all if they are of one kind.

    Results of one kind with the same step, or of two models of the hub, are of several runs; their folders, or names on
    the hub, are in the label. Stages of a training, and ingredients of a stage, are in it too: they are lines of their
    own.
    """
    kinds = [kind_of(result) for result in results]
    for kind, stage, run in zip(kinds, _stages(results), runs(results)):
        kind[_STAGE] = stage
        if run is not None:
            kind[_RUN] = run
    differing, data = _differing(kinds, results), _data_names(results)
    return [", ".join(filter(None, (_words(kind, name, data) for name in differing))) for kind in kinds]


def _stages(results: Sequence[dict[str, Any]]) -> list[str]:
    """For each result its stage, "" without one; a name without it is of the first one where others of its run have
    some."""
    staged = {_run_of(r["checkpoint"]["path"]) for r in results if "stage" in r["checkpoint"]}
    found = []
    for checkpoint in (result["checkpoint"] for result in results):
        first = "stage1" if checkpoint["step"] >= 0 and _run_of(checkpoint["path"]) in staged else ""
        found.append(checkpoint.get("stage", first))
    return found


def runs(results: Sequence[dict[str, Any]]) -> list[str | None]:
    """For each result its run, a folder or a name on the hub; None for all where no two of a kind have one step, and no
    two are of different models of the hub."""
    steps = [result["checkpoint"]["step"] for result in results]
    places = Counter((*kind_of(r).values(), stage, step) for r, stage, step in zip(results, _stages(results), steps))
    paths = [result["checkpoint"]["path"] for result in results]
    several = any(count > 1 and place[-1] >= 0 for place, count in places.items())
    several |= len({_run_of(path) for path, result in zip(paths, results) if "commit" in result["checkpoint"]}) > 1
    return [_run_of(path) if several else None for path in paths]


def _differing(kinds: Sequence[dict[str, str]], results: Sequence[dict[str, Any]]) -> list[str]:
    """Names of the settings in which kinds differ; without the data where other instances of one file follow from
    another length, number or packing."""
    names = [name for name in kinds[0] if len({kind[name] for kind in kinds}) > 1]
    rest = [name for name in names if name != _DATA]
    explained = {_LENGTH, _INSTANCES, _PACKING} & set(rest) and len({r["data"]["path"] for r in results}) == 1
    by_rest, by_all = ({tuple(kind[name] for name in chosen) for kind in kinds} for chosen in (rest, names))
    return rest if explained and len(by_rest) == len(by_all) else names


def _words(kind: dict[str, str], name: str, data: dict[str, str]) -> str:
    return data[kind[name]] if name == _DATA else kind[name]


def _data_names(results: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Names of data by their digests: the file's name, with its folder or else the digest where two have one name."""
    paths: dict[str, Path] = {}
    for result in results:
        named = re.sub(r"(@[0-9a-f]{7})[0-9a-f]{33}\b", r"\1", result["data"]["path"])  # by a commit of the hub
        paths.setdefault(result["data"]["sha256"], Path(named))
    for names in ({d: path.name for d, path in paths.items()}, {d: "/".join(p.parts[-2:]) for d, p in paths.items()}):
        if len(set(names.values())) == len(names):
            return names
    return {digest: f"{path.name} {digest[:8]}" for digest, path in paths.items()}


def _run_of(path: str) -> str:
    """The folder of a checkpoint's folder, or the name of its model on the hub."""
    name, revision, _ = path.partition("@")
    return name if revision else str(Path(path).parent)
