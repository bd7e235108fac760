"""Rows of tokens packed from a sample of documents, as the `datasets` folder that continual learning reads.

A quarter more tokens than needed are collected. If that does not suffice, because later files replaced too many of the
documents, all files are read again with twice the margin.
"""

from __future__ import annotations

import glob
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from olmo.exceptions import ConfigurationError
from olmo.files.lock import Lock, Locked
from scripts.prepare.sampling import NO_LIMIT, Settings, collect, resolve

MARGIN = 1.25


def save_rows(rows: NDArray[Any], folder: Path) -> None:
    """Save rows (n, length) of ids as a `datasets` folder, column `input_ids`, int32."""
    import datasets
    import pyarrow

    schema = pyarrow.schema([("input_ids", pyarrow.list_(pyarrow.int32()))])
    stream = folder.with_name(f"{folder.name}.arrow")
    with pyarrow.ipc.new_stream(str(stream), schema) as writer:
        for first in range(0, len(rows), 1000):
            batch = rows[first : first + 1000].astype(np.int32)
            offsets = np.arange(0, batch.size + 1, rows.shape[1], dtype=np.int32)
            lists = pyarrow.ListArray.from_arrays(offsets, batch.ravel())
            writer.write_batch(pyarrow.record_batch([lists], schema=schema))
    datasets.disable_progress_bars()
    datasets.Dataset.from_file(str(stream)).save_to_disk(str(folder))
    stream.unlink()


@contextmanager
def _work_folder(output: Path) -> Iterator[str]:
    """A folder beside `output` for this process alone, deleted afterwards; those of killed processes are, too."""
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = Lock(output.with_name(f".{output.name}.lock"))
    except Locked:
        raise ConfigurationError(f"{output}: another process is writing it") from None
    with lock:
        for left in output.parent.glob(f".{glob.escape(output.name)}.*.partial"):
            shutil.rmtree(left)
        try:
            with tempfile.TemporaryDirectory(".partial", f".{output.name}.", output.parent) as name:
                yield name
        except OSError as error:  # of a file that is open already; the system does not name it
            if error.filename is None and error.errno:
                raise OSError(error.errno, error.strerror, str(output)) from error
            raise


def prepare(
    source: Sequence[Path] | Callable[[Path], Sequence[Path]],
    output: Path,
    settings: Settings,
    instances: int,
    length: int,
    processes: int,
) -> dict[str, Any]:
    """Write `output`, completely or not at all; returns the content of its about.json. source: files, or what writes
    them into a temporary folder.

    Raises ValueError where the files hold too few tokens or one of them is damaged, OSError where one is unreadable or
    the disk is full, ConfigurationError where another process writes `output`.
    """
    needed, margin = instances * length, MARGIN
    with _work_folder(output) as name:
        paths = source(Path(name)) if callable(source) else source
        while True:
            folder = Path(name, str(margin))
            folder.mkdir()
            events, limit, read = collect(paths, settings, folder, processes, needed * margin)
            documents, counts = resolve(events)
            tokens = np.cumsum(documents["tokens"], dtype=np.int64)
            enough = int(np.searchsorted(tokens, needed))
            if enough < len(documents):
                break
            if limit == NO_LIMIT:
                have = int(tokens[-1]) if len(tokens) else 0
                raise ValueError(
                    f"{f'{settings.corpus} holds' if callable(source) else f'{len(paths)} files hold'} {have} tokens "
                    f"in {describe(counts)}; {instances} instances of {length} are {needed}, and --instances "
                    f"{have // length} is the most there is"
                )
            shutil.rmtree(folder)
            margin *= 2
            print(
                "later files replaced too many documents; reading all files again with a larger margin",
                file=sys.stderr,
                flush=True,
            )
        # What was read beyond the sample depends on the number of processes.
        _, counts = resolve(events[events["priority"] <= documents["priority"][enough]])
        spills = {
            pid: np.memmap(folder / f"{pid}.tokens", settings.dtype, "r") for pid in np.unique(documents["process"])
        }
        size = np.dtype(settings.dtype).itemsize
        with (folder / "rows").open("wb") as file:  # through a mapped file, a full disk would end the process
            for event in documents[: enough + 1][["process", "start", "tokens"]]:
                pid, start, count = event.item()
                file.write(spills[pid][start // size :][:count].astype("<i4").tobytes())
            file.truncate(4 * needed)
        save_rows(np.memmap(folder / "rows", "<i4", "r", shape=(instances, length)), folder / "dataset")
        about = {
            **{"corpus": settings.corpus, "seed": settings.seed, "tokenizer": settings.tokenizer},
            **{"eos_token_id": settings.eos_token_id, "instances": instances, "sequence_length": length},
            **{"sample": counts, "read": read},
        }
        (folder / "dataset" / "about.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        (folder / "dataset").rename(output)
    return about


def describe(counts: dict[str, int]) -> str:
    """The counts of records, in words."""
    return (
        f"{counts['documents']} documents (of {counts['records']} records {counts['without_text']} without text, "
        f"{counts['replaced_or_deleted']} replaced or deleted, {counts['same_text']} with the text of another)"
    )
