"""One checkpoint to measure: find or download it, measure it, write its two result files.

`measured` is what analysis.entropy and `knowledge_entropy.measure` have in common for every model.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.utils import disable_progress_bars
from numpy.typing import NDArray
from torch import nn

from analysis.context import check_length
from analysis.device_map import DeviceMap
from analysis.downloads import Downloads
from analysis.given import Given
from analysis.instances import Instances, digest_of
from analysis.locations import Location, check_writable, label_of, training_of
from analysis.measure import measure
from analysis.models import PRECISIONS, open_model, precision_for, state_of_files
from analysis.prefetch import is_first_of_machine, together
from analysis.result import Result
from analysis.results import find_result, is_edited, record_output
from olmo import checkpoint
from olmo.checkpoint import identity_of
from olmo.distributed import Ranks
from olmo.files.digests import file_digest
from olmo.memory.locate import describe
from olmo.model import OLMo
from olmo.model.placement import input_device, placed


@dataclass(frozen=True)
class Settings:
    """How the checkpoints of one command are measured; the fields are flags of analysis.entropy."""

    instances: Instances
    coefficient: str = "abs"
    precision: str = "fp32"  # a key of PRECISIONS, or "auto"
    device_map: DeviceMap | None = None
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

    def identity(
        self,
        checkpoint: dict[str, Any],
        rows: Sequence[NDArray[np.int64]],
        edit: Path | None = None,
        divisors: Path | None = None,
        precision: str | None = None,
    ) -> dict[str, Any]:
        """What identifies a measurement on `rows` in its result; checkpoint: what identifies the weights; precision:
        what "auto" is, where that is known."""
        asked = {} if self.precision != "auto" else {"precision_asked": "auto"}
        known = {"precision": precision} if precision is not None else {} if asked else {"precision": self.precision}
        return {
            "checkpoint": checkpoint,
            "data": {"path": str(self.instances.data), "sha256": digest_of(rows)},
            "coefficient": self.coefficient,
            **known,
            **asked,
            "tolerance": self.tolerance,
            "resuscitation": None if edit is None else file_digest(edit),
            "temperature_attention": self.temperature_attention,
            "temperature_MLP": None if divisors is None else file_digest(divisors),
        }

    def divisors_of(self, folder: Path) -> Path | None:
        """The file of divisors of a checkpoint folder's memory coefficients."""
        if self.temperature_MLP is None:
            return None
        return checkpoint.resuscitation_file(self.temperature_MLP, folder, "--temperature_MLP")


def measured(
    model: nn.Module,
    rows: Sequence[NDArray[np.int64]],
    length: int,
    settings: Settings,
    identity: Mapping[str, Any],
    device: torch.device,
    ranks: Ranks,
    description: str,
    memories: str | None = None,
    edit_files: Mapping[str, str] | None = None,
) -> Result:
    """Measure a model in evaluation mode on `rows` of at most `length` tokens, shared out among `ranks`; a collective.

    identity: of `Settings.identity`, and `longer_than_context`. memories: `describe` of the model, if it is known.
    edit_files: names of the files of edits.
    Raises ValueError as `analysis.measure.measure` does.
    """
    how = (settings.batch_size, settings.coefficient, device, ranks, settings.tolerance)
    measurement = measure(model, rows, *how, description, settings.measures, settings.compiled)
    which = settings.instances  # recorded so that the same instances can be found again
    packing = "eos" if which.is_text and which.pack else None
    sources = {"order": which.order, "tokenizer": which.tokenizer_name, "pack": packing}
    about_data = which.data.about if isinstance(which.data, Given) else {}
    data = {**identity["data"], **sources, **about_data, "instances": len(rows)}
    about = {**identity, "data": data, "edit_files": dict(edit_files or {})}
    if (places := placed(model)) is not None:
        about["device_map"] = places
    return Result.of(measurement, rows, length, memories or describe(model), about)


@dataclass(frozen=True)
class Prepared:
    """A checkpoint on the disk of this machine, and the instances to measure it on."""

    folder: Path
    rows: list[NDArray[np.int64]]
    length: int  # tokens per instance at most
    identity: dict[str, Any]  # without a fingerprint on all but the first process of a machine
    earlier: dict[str, Any] | None  # the result, if it exists already
    before: str = ""  # `state_of_files` before the weights were read


@dataclass(frozen=True)
class Job:
    """A checkpoint to measure; its results are written to `output`, or nowhere (None)."""

    location: Location
    output: Path | None
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
        return self.read() if is_first_of_machine() else None

    def read(self) -> Prepared:
        """What `prepare` does, in any process."""
        on_hub = isinstance(self.location, str)
        if on_hub and self.downloads.folder is not None and self.output is not None:
            check_writable(self.output)
        folder = self.downloads.fetch(self.location, weights=False)
        self.settings.instances.check_tokenizer(folder)
        exceeded = check_length(folder, self.settings.instances.asked_length, self.settings.allow_longer)
        rows = self.settings.instances.read(folder)
        length = self.settings.instances.length_for(folder)
        asked = f"{len(rows)} of {length} tokens from {self.settings.instances.data}"
        identity, before = self._identity(folder, rows), ""
        earlier = self._earlier(identity, asked)  # an error before the weights are downloaded and read
        if earlier is None or not on_hub:
            if on_hub:
                folder = self.downloads.fetch(self.location, weights=True)
            identity = self._identity(folder, rows, with_weights=True)
            before = state_of_files(folder)
            identity["checkpoint"]["fingerprint"] = identity_of(folder)
            earlier = self._earlier(identity, asked)
            identity["checkpoint"] |= training_of(self.location, folder)
        identity["longer_than_context"] = exceeded
        return Prepared(folder, rows, length, identity, earlier, before)

    def _earlier(self, identity: dict[str, Any], asked: str) -> dict[str, Any] | None:
        if self.output is None:
            return None
        if "precision" in identity:  # then it does not matter by which word it was asked for
            identity = {key: value for key, value in identity.items() if key != "precision_asked"}
        return find_result(self.output, identity, asked, self.settings.measures, self.settings.overwrite)

    def measure(self, prepared: Prepared | None, device: torch.device, ranks: Ranks) -> dict[str, Any]:
        """Measure the checkpoint and write its results, a collective; an earlier result is returned as it is.

        Returns the content of `knowledge_entropy.json` on the first rank.
        """
        if isinstance(self.location, str):
            disable_progress_bars()  # those of the next download would overwrite our own
        earlier = None if prepared is None else prepared.earlier
        if ranks.broadcast_int(int(earlier is not None)):
            return earlier or {}
        result, folder = self.result(prepared, device, ranks)
        if not ranks.is_first:
            return {}
        assert self.output is not None
        result.save(self.output)
        content = result.to_dict()
        if not is_edited(content) and self.output.resolve() != folder.resolve():
            record_output(folder, self.output)
        return content

    def result(self, prepared: Prepared | None, device: torch.device, ranks: Ranks) -> tuple[Result, Path]:
        """Measure the checkpoint, a collective; returns its result, complete on the first rank, and its folder."""
        settings = self.settings

        def opened() -> tuple[Prepared, nn.Module, str]:
            if ranks.is_first and self.output is not None:
                check_writable(self.output)
            here = prepared
            if here is None:  # the first process of this machine has downloaded it
                folder = self.downloads.fetched(self.location)
                rows, length = settings.instances.read(folder), settings.instances.length_for(folder)
                here = Prepared(folder, rows, length, self._identity(folder, rows, with_weights=True), None)
            edit = (settings.edit_of(here.folder), settings.resuscitation_force)
            divisors = settings.divisors_of(here.folder)
            temperatures = (settings.temperature_attention, None if divisors is None else str(divisors))
            dtype = PRECISIONS[here.identity["precision"]]
            model = open_model(here.folder, device, dtype, *edit, *temperatures, settings.device_map)
            memories = describe(model)
            if ranks.is_first and self.output is not None and not isinstance(model, OLMo):
                print(f"{self}: {memories}", file=sys.stderr)  # other families' memories are found by structure
            if settings.device_map is not None and self.output is not None:
                counts = Counter((placed(model) or {}).values())
                shown = ", ".join(f"{n} on {place}" for place, n in counts.items())
                print(f"{self}: device map: {shown}", file=sys.stderr)
            return here, model, memories

        here, model, memories = together(ranks, opened)
        device = device if settings.device_map is None else input_device(model)
        edits = {"resuscitation": settings.edit_of, "temperature_MLP": settings.divisors_of}
        edit_files = {key: file.name for key, of in edits.items() if (file := of(here.folder)) is not None}
        about = (device, ranks, f"entropy of {label_of(self.location)}", memories, edit_files)
        result = measured(model, here.rows, here.length, settings, here.identity, *about)
        if ranks.is_first:
            fingerprint = here.identity["checkpoint"]["fingerprint"]
            if state_of_files(here.folder) != here.before and identity_of(here.folder) != fingerprint:
                raise ValueError(
                    f"{here.folder}: replaced while it was measured; nothing is kept, run the command again"
                )
        return result, here.folder

    def _identity(self, folder: Path, rows: Sequence[NDArray[np.int64]], with_weights: bool = False) -> dict[str, Any]:
        """What an earlier result must have in common with the one asked for. A fingerprint of the weights is added
        later; those of the hub are identified by their commit, which names their folder. with_weights: whether they
        are there, so that it has their type."""
        settings, named = self.settings, {"path": str(self.location)}
        where = named if isinstance(self.location, Path) else {**named, "commit": folder.name}
        edits = settings.edit_of(folder), settings.divisors_of(folder)
        return settings.identity(
            where, rows, *edits, precision_for(folder, settings.precision) if with_weights else None
        )
