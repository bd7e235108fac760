"""Scores of one checkpoint: computed as a run evaluates its starting point, and written as a run writes them.

The folder of the scores is that of a run with one evaluation, at the step of the checkpoint: `config.yaml`,
`metrics.jsonl`, `probes/step{N}.parquet`, `losses/step{N}.parquet`; and `score.json`, which is written last.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import disable_progress_bars

from analysis.downloads import Downloads
from analysis.locations import Location, check_writable, label_of, training_of
from analysis.models import state_of_files
from analysis.prefetch import is_first_of_machine, together
from analysis.probes import read_probes
from analysis.published import from_tables
from analysis.results import is_edited
from analysis.runs import TASKS, accuracies_of
from analysis.score_settings import Settings
from olmo.checkpoint import families, identity_of
from olmo.config import TrainConfig
from olmo.distributed import Ranks
from olmo.eval.evaluators import Evaluation, Evaluators
from olmo.exceptions import ConfigurationError
from olmo.files.atomic import write_text
from olmo.files.paths import as_json, read_json
from olmo.knowledge.entries import SETTINGS
from olmo.model.causal_lm import Model
from olmo.report.reporter import Reporter

RESULT = "score.json"
_DIFFERENCES = {
    "type": "of another type",
    "content": "from other data",
    "batch_size": "in batches of another size",
    "batches": "of another number of batches",
}


@dataclass(frozen=True)
class Prepared:
    """A checkpoint on the disk of this machine, and how it is scored."""

    folder: Path
    config: TrainConfig
    identity: dict[str, Any]  # {} on all but the first process of a machine
    earlier: dict[str, Any] | None  # the result, if it exists already
    before: str = ""  # `state_of_files` before the weights were read


@dataclass(frozen=True)
class Job:
    """A checkpoint to score; its results are written to `output`."""

    location: Location
    output: Path
    settings: Settings
    downloads: Downloads

    def __str__(self) -> str:
        return str(self.location)

    def prepare(self) -> Prepared | None:
        """Download a checkpoint of the hub and read it, so that opening it does not wait for the disk; None on all but
        the first process of a machine.

        If an earlier result has the same identity, that is all it takes: a commit of the hub is compared before any
        weights are downloaded.
        """
        if not is_first_of_machine():
            return None
        on_hub = isinstance(self.location, str)
        check_writable(self.output)
        folder = self.downloads.fetch(self.location, weights=False)
        config = self._config(folder)
        named: dict[str, Any] = {"path": str(self.location)}
        identity = {"checkpoint": named, **self.settings.identity(config, folder)}
        if on_hub:
            named["commit"] = folder.name
            if (earlier := find_result(self.output, identity, self.settings.overwrite)) is not None:
                return Prepared(folder, config, identity, earlier)
            folder = self.downloads.fetch(self.location, weights=True)
            named["commit"], config = folder.name, self._config(folder)
        before = state_of_files(folder)
        named["fingerprint"] = identity_of(folder)
        earlier = find_result(self.output, identity, self.settings.overwrite)
        named |= training_of(self.location, folder)
        return Prepared(folder, config, identity, earlier, before)

    def score(self, prepared: Prepared | None, device: torch.device, ranks: Ranks) -> dict[str, Any]:
        """Score the checkpoint and write its results, a collective; an earlier result is returned as it is.

        Returns the content of `score.json` on the first rank.
        """
        if isinstance(self.location, str):
            disable_progress_bars()  # those of the next download would overwrite our own
        earlier = None if prepared is None else prepared.earlier
        if ranks.broadcast_int(int(earlier is not None)):
            return earlier or {}

        def opened() -> tuple[Prepared, Model, Evaluators]:
            here = prepared
            if here is None:  # the first process of this machine has downloaded it
                folder = self.downloads.fetched(self.location)
                here = Prepared(folder, self._config(folder), {}, None)
            try:
                evaluators = self.settings.open(here.config, device, ranks)
                model = families.load_model(here.folder, device, here.config.model, mapped=False)
            except ConfigurationError as error:  # about this checkpoint, not the command line
                raise ValueError(f"{self}: {error}") from error
            return here, model, evaluators

        here, model, evaluators = together(ranks, opened)
        found = evaluators.run(model, self.settings.base.evaluators, f"scores of {label_of(self.location)}")
        if not ranks.is_first:
            return {}
        fingerprint = here.identity["checkpoint"]["fingerprint"]
        if state_of_files(here.folder) != here.before and identity_of(here.folder) != fingerprint:
            raise ValueError(f"{here.folder}: replaced while it was scored; nothing is kept, run the command again")
        return _save(self.output, here, found)

    def _config(self, folder: Path) -> TrainConfig:
        try:
            return self.settings.config_for(self.location, folder, self.output)
        except ConfigurationError as error:
            raise ValueError(f"{self}: {error}") from error


def _save(output: Path, prepared: Prepared, found: Evaluation) -> dict[str, Any]:
    """Write the results as a run does, and `score.json`, which has no metrics until they are complete."""
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / RESULT, as_json(prepared.identity, output / RESULT, 1))
    with closing(Reporter(prepared.config, active=True, resume_step=None)) as reporter:
        reporter.evaluation(max(prepared.identity["checkpoint"]["step"], 0), found)
        reporter.on_disk()
    result = {**prepared.identity, "metrics": found.metrics, "knowledge": _knowledge(output)}
    write_text(output / RESULT, as_json(result, output / RESULT, 1))
    return result


def _knowledge(output: Path) -> dict[str, float]:
    """K and K_published of the only table of probes in a folder, of all probes, each setting and each kind of it."""
    probes = read_probes(output)
    if not len(probes.steps):
        return {}
    published = from_tables(probes, 0)
    return probes.knowledge(0).means() | (published.means() if published is not None else {})


def find_result(folder: Path, wanted: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """The result in a folder if it has the identity `wanted` and all evaluators; None where there is none or where the
    same scores, of fewer evaluators or incomplete, may be replaced, or with `overwrite` any.

    The identity of the weights, `checkpoint.fingerprint`, may be missing as long as they are not read. Raises
    ConfigurationError where the files there are of something else: results are never replaced silently.
    """
    try:
        result = read_json(folder / RESULT)
    except (FileNotFoundError, NotADirectoryError):
        if (folder / "metrics.jsonl").exists():
            raise ConfigurationError(f"{folder}: holds a run (metrics.jsonl); name another --output") from None
        return None
    except ValueError:
        result = None
    reason = _difference(result, wanted)
    if reason is None:
        known = "fingerprint" in wanted["checkpoint"] or "commit" in result["checkpoint"]
        has_all = wanted["evaluators"].keys() <= result["evaluators"].keys()
        return result if known and has_all and "metrics" in result else None
    if overwrite:
        return None
    raise ConfigurationError(
        f"{folder / RESULT}: already exists and {reason}; name another --output, or replace it: --overwrite"
    )


def _difference(result: Any, wanted: dict[str, Any]) -> str | None:
    """In which respect a result is another one than the one that is wanted; None if in no respect."""
    if not isinstance(result, dict) or not all(isinstance(result.get(k), dict) for k in ("checkpoint", "evaluators")):
        return "is not a result of analysis.score"
    checkpoint = wanted["checkpoint"]
    for key in ("commit", "fingerprint"):
        if key in checkpoint and key in result["checkpoint"] and result["checkpoint"][key] != checkpoint[key]:
            return f"belongs to other weights, of {result['checkpoint'].get('path')}"
    labels, asked = result["evaluators"], wanted["evaluators"]
    for label in filter(labels.__contains__, asked):
        for key, words in _DIFFERENCES.items():
            if labels[label].get(key) != asked[label][key]:
                return f"has scores of {label} {words}"
    extra = [label for label in labels if label not in asked]
    missing = [label for label in asked if label not in labels]
    if extra and missing:
        return f"has scores of {extra[0]}, which are not asked for, and lacks {missing[0]}"
    different = [key for key in wanted if key not in ("checkpoint", "evaluators") and result.get(key) != wanted[key]]
    return (
        f"was scored with {different[0]} {result.get(different[0])}, not {wanted[different[0]]}" if different else None
    )


# --- in a table --------------------------------------------------------------------------------------------------


Cell = str | int | float | None


def rows(results: list[dict[str, Any]]) -> list[list[Cell]]:
    """A table of results: the heads, then a row for each; None where a result does not have the number.

    P is the mean accuracy over the six tasks of the paper (B.2); tasks beside them have columns of their own.
    """
    columns: dict[str, None] = {}
    found = []
    for result in results:
        metrics, checkpoint = result["metrics"], result["checkpoint"]
        numbers: dict[str, float] = {}
        for name in ("K", "K_published", *(f"{k}_{s}" for k in ("K", "K_published") for s in SETTINGS)):
            if name in result["knowledge"]:
                numbers[name] = result["knowledge"][name]
        accuracy = accuracies_of(metrics)
        if all(task in accuracy for task in TASKS):
            numbers["P"] = sum(accuracy.pop(task) for task in TASKS) / len(TASKS)
        numbers |= accuracy
        for name, value in metrics.items():
            label, _, last = name.removeprefix("eval/").rpartition("/")
            if last == "CrossEntropyLoss" and f"eval/{label}/log_probability" not in metrics:
                numbers[f"loss {label}"] = value
        step = checkpoint["step"]
        found.append((label_of_result(result), step if step >= 0 else None, numbers))
        columns |= dict.fromkeys(numbers)
    head: list[Cell] = ["checkpoint", "step", *columns]
    return [head, *([name, step, *map(numbers.get, columns)] for name, step, numbers in found)]


def label_of_result(result: dict[str, Any]) -> str:
    """The name of a scored checkpoint, and whether it was edited."""
    path = result["checkpoint"]["path"]
    return (Path(path).name or path) + (", edited" if is_edited(result) else "")
