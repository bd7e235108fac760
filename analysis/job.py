"""One checkpoint to measure: find or download it, measure it, write its two result files."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.utils import disable_progress_bars
from numpy.typing import NDArray
from torch import nn

from analysis.context import check_length
from analysis.downloads import Downloads
from analysis.instances import Instances, digest_of
from analysis.locations import Location, check_writable, label_of, step_of, tokens_of
from analysis.measure import measure
from analysis.models import PRECISIONS, open_model, state_of_files
from analysis.prefetch import is_first_of_machine, together
from analysis.results import find_result, is_edited, record_output, save_result
from olmo import checkpoint
from olmo.checkpoint import identity_of
from olmo.distributed import Ranks
from olmo.files.digests import file_digest
from olmo.memory.locate import describe
from olmo.model import OLMo


@dataclass(frozen=True)
class Settings:
    """How the checkpoints of one command are measured; the fields are flags of analysis.entropy."""

    instances: Instances
    coefficient: str = "abs"
    precision: str = "fp32"
    measures: tuple[str, ...] = ("knowledge",)
    tolerance: float | None = None
    batch_size: int = 4
    resuscitation: str | None = None  # a path, or a name inside the checkpoint's folder
    resuscitation_force: bool = False
    temperature_attention: float | None = None  # as model.temperature_attention of a run, at its first step
    temperature_MLP: str | None = None  # a path, or a name inside the checkpoint's folder
    compiled: bool = False
    allow_longer: bool = False  # whether instances may be longer than the model's context
    overwrite: bool = False  # whether a result of another measurement may be replaced

    def edit_of(self, folder: Path) -> Path | None:
        """The resuscitation file of a checkpoint folder."""
        if self.resuscitation is None:
            return None
        return checkpoint.resuscitation_file(self.resuscitation, folder, "--resuscitation")

    def divisors_of(self, folder: Path) -> Path | None:
        """The file of divisors of a checkpoint folder's memory coefficients."""
        if self.temperature_MLP is None:
            return None
        return checkpoint.resuscitation_file(self.temperature_MLP, folder, "--temperature_MLP")


@dataclass(frozen=True)
class Prepared:
    """A checkpoint on the disk of this machine, and the instances to measure it on."""

    folder: Path
    rows: list[NDArray[np.int64]]
    length: int  # tokens per instance at most
    identity: dict[str, Any]  # {} on all but the first process of a machine
    earlier: dict[str, Any] | None  # the result, if it exists already
    before: str = ""  # `state_of_files` before the weights were read


@dataclass(frozen=True)
class Job:
    """A checkpoint to measure; its results are written to `output`."""

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
        if on_hub and self.downloads.folder is not None:
            check_writable(self.output)
        folder = self.downloads.fetch(self.location, weights=False)
        self.settings.instances.check_tokenizer(folder)
        exceeded = check_length(folder, self.settings.instances.length, self.settings.allow_longer)
        rows = self.settings.instances.read(folder)
        length = self.settings.instances.length_for(folder)
        asked = f"{len(rows)} of {length} tokens from {self.settings.instances.data}"
        which = (asked, self.settings.measures, self.settings.overwrite)
        identity, before = self._identity(folder, rows), ""
        earlier = find_result(self.output, identity, *which)  # an error before the weights are downloaded and read
        if earlier is None or not on_hub:
            if on_hub:
                folder = self.downloads.fetch(self.location, weights=True)
                identity = self._identity(folder, rows)
            before = state_of_files(folder)
            identity["checkpoint"]["fingerprint"] = identity_of(folder)
            earlier = find_result(self.output, identity, *which)
            identity["checkpoint"]["tokens"] = tokens_of(self.location, folder)
        identity["longer_than_context"] = exceeded
        return Prepared(folder, rows, length, identity, earlier, before)

    def measure(self, prepared: Prepared | None, device: torch.device, ranks: Ranks) -> dict[str, Any]:
        """Measure the checkpoint and write its results, a collective; an earlier result is returned as it is.

        Returns the content of `knowledge_entropy.json` on the first rank.
        """
        if isinstance(self.location, str):
            disable_progress_bars()  # those of the next download would overwrite our own
        earlier = None if prepared is None else prepared.earlier
        if ranks.broadcast_int(int(earlier is not None)):
            return earlier or {}
        settings = self.settings

        def opened() -> tuple[Prepared, nn.Module, str]:
            if ranks.is_first:
                check_writable(self.output)
            here = prepared
            if here is None:  # the first process of this machine has downloaded it
                folder = self.downloads.fetched(self.location)
                rows, length = settings.instances.read(folder), settings.instances.length_for(folder)
                here = Prepared(folder, rows, length, {}, None)
            edit = (settings.edit_of(here.folder), settings.resuscitation_force)
            divisors = settings.divisors_of(here.folder)
            temperatures = (settings.temperature_attention, None if divisors is None else str(divisors))
            model = open_model(here.folder, device, PRECISIONS[settings.precision], *edit, *temperatures)
            return here, model, describe(model)

        here, model, memories = together(ranks, opened)
        if ranks.is_first and not isinstance(model, OLMo):  # other families' memories are found by structure
            print(f"{self}: {memories}", file=sys.stderr)
        how = (settings.batch_size, settings.coefficient, device, ranks, settings.tolerance)
        description = f"entropy of {label_of(self.location)}"
        measurement = measure(model, here.rows, *how, description, settings.measures, settings.compiled)
        if not ranks.is_first:
            return {}
        fingerprint = here.identity["checkpoint"]["fingerprint"]
        if state_of_files(here.folder) != here.before and identity_of(here.folder) != fingerprint:
            raise ValueError(f"{here.folder}: replaced while it was measured; nothing is kept, run the command again")
        numbers = measurement.to_dict()
        lengths = [len(row) for row in here.rows[: numbers["number_of_instances"]]]
        result = {
            **numbers,
            "number_of_tokens": sum(lengths),
            "mean_length": sum(lengths) / len(lengths),
            "shortest_length": min(lengths),
            "sequence_length": here.length,
            "memories": memories,
            **here.identity,
        }
        # What is needed to find the same instances again.
        which = settings.instances
        packing = "eos" if which.is_text and which.pack else None
        sources = {"order": which.order, "tokenizer": which.tokenizer, "pack": packing}
        result["data"] = {**result["data"], **sources, "instances": len(here.rows)}
        edits = {"resuscitation": settings.edit_of, "temperature_MLP": settings.divisors_of}
        result["edit_files"] = {key: file.name for key, of in edits.items() if (file := of(here.folder)) is not None}
        save_result(self.output, measurement, result)
        if not is_edited(result) and self.output.resolve() != here.folder.resolve():
            record_output(here.folder, self.output)
        return result

    def _identity(self, folder: Path, rows: Sequence[NDArray[np.int64]]) -> dict[str, Any]:
        """What an earlier result must have in common with the one asked for. A fingerprint of the weights is added
        later; those of the hub are identified by their commit, which names their folder."""
        settings, edit, divisors = self.settings, self.settings.edit_of(folder), self.settings.divisors_of(folder)
        named = {"path": str(self.location), "step": step_of(self.location)}
        return {
            "checkpoint": named if isinstance(self.location, Path) else {**named, "commit": folder.name},
            "data": {"path": settings.instances.data, "sha256": digest_of(rows)},
            "coefficient": settings.coefficient,
            "precision": settings.precision,
            "tolerance": settings.tolerance,
            "resuscitation": None if edit is None else file_digest(edit),
            "temperature_attention": settings.temperature_attention,
            "temperature_MLP": None if divisors is None else file_digest(divisors),
        }
