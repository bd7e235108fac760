"""Pack PubMed's abstracts, or other text, into the rows of tokens that continual learning reads.

    python -m scripts.prepare_pubmed --output data/pubmed --files 60       # downloads 60 files of the yearly baseline
    python -m scripts.prepare_pubmed --output data/pubmed --input 'baseline/pubmed25n*.xml.gz'
    python -m scripts.prepare_pubmed --output data/c4 --corpus c4 --input 'en/c4-train.*.json.gz'

DIR becomes a `datasets` folder, column `input_ids`: exactly `instances` rows of `sequence_length` ids, documents one
after the other, each ended by the EOS id, no padding, the last one cut. `about.json` in it says what went in.

A document is a title and an abstract (see prepare/documents.py). Articles without abstract, about a third, are left
out: a title alone teaches little. Of an article's copies counts the highest version, and of one version the copy in
the file of the last name, unless that file or a later one lists it as deleted.

The sample is drawn by hash(seed, PMID), see prepare/sampling.py: uniform, shuffled, the same whatever the order of
files and processes. A quarter more than is needed is collected; where that does not suffice, because later files
replaced too much of it, all is read again with twice the margin. `DIR/../pubmed_baseline` keeps what was downloaded.
"""

from __future__ import annotations

import argparse
import glob
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from olmo.exceptions import ConfigurationError, Parser, exit_status
from olmo.tokenizer import packaged_tokenizer
from scripts.prepare.documents import MB, hash_of
from scripts.prepare.sampling import NO_LIMIT, Settings, collect, resolve, tokenizer_of

BASELINE = "https://ftp.ncbi.nlm.nih.gov/pubmed/baseline/"
TOKENIZER = "tokenizers/allenai_eleuther-ai-gpt-neox-20b-pii-special.json"  # of OLMo-1B and 7B
OLMO_EOS = 50279  # in all their configurations, although this tokenizer calls it |||IP_ADDRESS|||
MARGIN = 1.25


def fill(tokens: NDArray[Any], documents: Iterable[NDArray[Any]]) -> int:
    """Put documents (n,) into `tokens` (size,) one after the other until it is full; returns how many ids they gave."""
    place = 0
    for document in documents:
        piece = document[: len(tokens) - place]
        tokens[place : place + len(piece)] = piece
        place += len(piece)
        if place == len(tokens):
            break
    return place


def save_rows(rows: NDArray[np.int32], folder: Path, name: str) -> None:
    """Save rows (n, length), int32, as a `datasets` folder of this name in `folder`, column `input_ids`."""
    import datasets
    import pyarrow

    schema = pyarrow.schema([("input_ids", pyarrow.list_(pyarrow.int32()))])
    stream = str(folder / "rows.arrow")
    with pyarrow.ipc.new_stream(stream, schema) as writer:
        for first in range(0, len(rows), 1000):
            batch = rows[first : first + 1000]
            offsets = np.arange(0, batch.size + 1, rows.shape[1], dtype=np.int32)
            lists = pyarrow.ListArray.from_arrays(offsets, batch.ravel())
            writer.write_batch(pyarrow.record_batch([lists], schema=schema))
    datasets.disable_progress_bars()
    datasets.Dataset.from_file(stream).save_to_disk(str(folder / name))


def prepare(
    paths: Sequence[Path], output: Path, settings: Settings, instances: int, length: int, processes: int
) -> dict[str, Any]:
    """Write `output`, whole or not at all; returns what its about.json says.

    Raises ValueError where the files hold too few tokens or one of them is damaged, OSError where one is unreadable.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    needed, margin = instances * length, MARGIN
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as name:
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
                    f"{len(paths)} files hold {have} tokens in {told(counts)}; {instances} instances of {length} are "
                    f"{needed}, and --instances {have // length} is the most there is"
                )
            shutil.rmtree(folder)
            margin *= 2
            print("too much was replaced later; reading all files again, and keeping more", file=sys.stderr, flush=True)
        # What was read beyond the sample depends on how many processes there were.
        _, counts = resolve(events[events["priority"] <= documents["priority"][enough]])
        spills = {
            pid: np.memmap(folder / f"{pid}.tokens", settings.dtype, "r") for pid in np.unique(documents["process"])
        }
        rows = np.memmap(folder / "rows", np.int32, "w+", shape=(instances, length))
        places = (event.item() for event in documents[["process", "start", "tokens"]])
        size = np.dtype(settings.dtype).itemsize
        fill(rows.reshape(-1), (spills[pid][start // size :][:count] for pid, start, count in places))
        save_rows(rows, folder, "dataset")
        about = {
            **{"corpus": settings.corpus, "seed": settings.seed, "tokenizer": settings.tokenizer},
            **{"eos_token_id": settings.eos_token_id, "instances": instances, "sequence_length": length},
            **{"sample": counts, "read": read},
        }
        (folder / "dataset" / "about.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        (folder / "dataset").rename(output)
    return about


def told(counts: dict[str, int]) -> str:
    """What became of records, in words."""
    return (
        f"{counts['documents']} documents (of {counts['records']} records {counts['without_text']} without text, "
        f"{counts['replaced_or_deleted']} replaced or deleted, {counts['same_text']} with the text of another)"
    )


def download(url: str, year: str | None, count: int | None, seed: int, folder: Path) -> list[Path]:
    """Fetch the files of a year's baseline, or `count` of them chosen by the seed, that `folder` does not hold yet.

    Each is compared with its published MD5, which stays beside it. Raises OSError where the server cannot be asked or
    has not what it lists, ValueError where it lists too few files or one came damaged.
    """
    import requests

    from olmo.net import TIMEOUT, describe_failure, http_session
    from scripts.download import Remote, describe, fetch

    with http_session() as session:

        def page(address: str) -> str:
            response = session.get(address, timeout=TIMEOUT)
            response.raise_for_status()
            return response.text

        def look(name: str) -> Remote | None:
            stated = re.search(r"\b[0-9a-f]{32}\b", page(f"{url}{name}.md5").lower())
            if stated is None:
                raise ValueError(f"{url}{name}.md5: states no MD5")
            remote = describe(session, url, name)
            return remote and replace(remote, digest=("md5", stated[0]))

        try:
            listed = set(re.findall(r'href="(pubmed(\d\d)n\d+\.xml\.gz)"', page(url)))
        except requests.RequestException as error:
            raise OSError(f"{url}: {describe_failure(error)}; files that you have can be named with --input") from error
        year = year or max((of_year for _, of_year in listed), default="YY")
        names = sorted((name for name, of_year in listed if of_year == year), key=lambda n: hash_of(n.encode(), seed))
        if len(names) < (count or 1):
            raise ValueError(f"{url}: lists {len(names)} files pubmed{year}nNNNN.xml.gz")
        names = sorted(names[:count])
        folder.mkdir(parents=True, exist_ok=True)
        missing = [n for n in names if not ((folder / n).is_file() and (folder / f"{n}.md5").is_file())]
        print(f"{folder}: {len(missing)} of {len(names)} files to fetch", flush=True)
        for name in missing:
            partial, remote = fetch(session, look, name, folder)
            assert remote.digest is not None
            (folder / f"{name}.md5").write_text(f"MD5({name})= {remote.digest[1]}\n")
            partial.replace(folder / name)
    return [folder / name for name in names]


def expand(patterns: Sequence[str]) -> list[Path]:
    """The files that paths and patterns name, each once, in the order of their names; FileNotFoundError for none."""
    paths: set[Path] = set()
    for pattern in patterns:
        found = [path for path in map(Path, [pattern, *glob.glob(pattern)]) if path.is_file()]
        if not found:
            hint = f"a folder; name its files: '{pattern}/*'" if Path(pattern).is_dir() else "no such file"
            raise FileNotFoundError(f"--input {pattern}: {hint}")
        paths.update(found)
    return sorted(paths, key=lambda path: (path.name, path))


def eos_of(identifier: str) -> int:
    """The id that ends a document; ConfigurationError where the tokenizer does not tell."""
    if packaged_tokenizer(identifier):
        return OLMO_EOS
    vocabulary = tokenizer_of(identifier).get_vocab()
    found = [vocabulary[token] for token in ("<|endoftext|>", "</s>") if token in vocabulary]
    if not found:
        raise ConfigurationError(f"{identifier}: which id ends a document? Say it with --eos_token_id")
    return found[0]


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line, checked."""
    parser = Parser("prepare_pubmed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="DIR", help="the folder to write")
    add("--input", nargs="+", metavar="FILES", help="files or quoted patterns (default: download the baseline)")
    add("--instances", type=int, default=204_800, help="rows (default: 204800)")
    add("--sequence_length", type=int, default=1024, help="ids of a row (default: 1024)")
    add("--tokenizer", default=TOKENIZER, metavar="ID", help="file, name in olmo_eval, or hub id (default: OLMo's)")
    add("--eos_token_id", type=int, help="ends each document (default: 50279 for OLMo's, else the tokenizer's)")
    add("--seed", type=int, default=0, help="of the sample (default: 0)")
    add("--corpus", choices=("pubmed", "c4", "text"), default="pubmed", help="what the input is (default: pubmed)")
    add("--processes", type=int, default=os.cpu_count() or 1, help="(default: one for each core)")
    add("--files", type=int, metavar="N", help="download only N files, chosen by the seed (default: all, some 50 GB)")
    add("--year", metavar="YY", help="download pubmedYYnNNNN (default: the newest)")
    add("--url", help=f"download from there (default: {BASELINE})")
    args = parser.parse_args(argv)
    for flag in ("instances", "sequence_length", "processes", "files"):
        if (value := getattr(args, flag)) is not None and value < 1:
            parser.error(f"--{flag} must be at least 1")
    if not 0 <= args.seed < 2**64 or not 0 <= (args.eos_token_id or 0) < 2**31:
        parser.error("--seed must lie in 0..2**64-1, --eos_token_id in 0..2**31-1")
    if args.corpus != "pubmed" and not args.input:
        parser.error(f"--corpus {args.corpus} needs --input; only PubMed can be downloaded")
    if args.input and (args.files or args.year or args.url):
        parser.error("--files, --year and --url are for downloading, not for --input")
    if args.output.is_file() or (args.output.is_dir() and any(args.output.iterdir())):
        parser.error(f"{args.output} exists; remove it or choose another --output")
    return args


def main(argv: Sequence[str]) -> None:
    args = arguments(argv)
    eos = eos_of(args.tokenizer) if args.eos_token_id is None else args.eos_token_id
    largest = max(
        OLMO_EOS if packaged_tokenizer(args.tokenizer) else 0, *tokenizer_of(args.tokenizer).get_vocab().values()
    )
    if eos > largest:
        raise ConfigurationError(f"--eos_token_id {eos}: the largest id of {args.tokenizer} is {largest}")
    settings = Settings(args.corpus, args.seed, args.tokenizer, eos, "<u2" if largest < 2**16 else "<u4")
    if args.input:
        paths = expand(args.input)
    else:
        url = (args.url or BASELINE).rstrip("/") + "/"
        paths = download(url, args.year, args.files, args.seed, args.output.parent / "pubmed_baseline")
    started = time.monotonic()
    about = prepare(paths, args.output, settings, args.instances, args.sequence_length, args.processes)
    read, seconds = about["read"], time.monotonic() - started
    print(f"{args.output}: {args.instances} rows of {args.sequence_length} ids; {told(about['sample'])}")
    without = f", {read.get('without_pmid', 0)} of them without PMID" if args.corpus == "pubmed" else ""
    print(
        f"read {read['files']} files, {read['records']} records{without}, "
        f"{read['bytes'] / MB:,.0f} MB in {seconds:.0f} s, {read['bytes'] / MB / seconds:,.1f} MB/s"
    )


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as after Ctrl-C, processes and temporary files go
    sys.exit(exit_status(main))
