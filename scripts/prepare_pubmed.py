"""Pack PubMed's abstracts, or other text, into the rows of tokens that continual learning reads.

    python -m scripts.prepare_pubmed --output data/pubmed --files 60       # downloads 60 files of the yearly baseline
    python -m scripts.prepare_pubmed --output data/pubmed --input 'baseline/pubmed25n*.xml.gz'
    python -m scripts.prepare_pubmed --output data/c4 --corpus c4 --input 'en/c4-train.*.json.gz'
    python -m scripts.prepare_pubmed --output data/c4 --corpus hub:allenai/c4:en:train:text

DIR becomes a `datasets` folder, column `input_ids`: exactly `instances` rows of `sequence_length` ids, documents in
sequence, each ended by the EOS id, without padding, the last one cut. Its `about.json` describes the input.

A document is a title and an abstract (prepare/documents.py). Articles without an abstract, about a third, are left out:
a title alone teaches little. Of several copies of an article the highest version counts, and of one version the copy in
the file with the last name, unless that file or a later one lists it as deleted.

The sample is drawn by hash(seed, PMID), see prepare/sampling.py: uniform, shuffled, independent of the order of files
and processes. Downloads are kept in `DIR/../pubmed_baseline`. Of a dataset on the hub, the sample is as many of its
first texts as are needed, in the order of hash(seed, text).
"""

from __future__ import annotations

import argparse
import glob
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from analysis.choices import FORM, PREFIX
from analysis.hub_data import find
from olmo.exceptions import ConfigurationError, Parser, exit_status
from olmo.tokenizer import OLMO_TOKENIZERS
from scripts.prepare import OLMO_TOKENIZER
from scripts.prepare.baseline import BASELINE, download
from scripts.prepare.documents import MB
from scripts.prepare.eos import OLMO_EOS, eos_of
from scripts.prepare.hub_corpus import write_documents
from scripts.prepare.packing import describe, prepare
from scripts.prepare.sampling import Settings, tokenizer_of


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


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line, checked."""
    parser = Parser("prepare_pubmed", description=__doc__)
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="DIR", help="the folder to write")
    add("--input", nargs="+", metavar="FILES", help="files or quoted patterns (default: download the baseline)")
    add("--instances", type=int, default=204_800, help="rows (default: 204800)")
    add("--sequence_length", type=int, default=1024, help="ids of a row (default: 1024)")
    add(
        "--tokenizer",
        default=OLMO_TOKENIZER,
        metavar="ID",
        help="file, folder of a model, name in olmo_eval, or hub id (default: OLMo)",
    )
    add("--eos_token_id", type=int, help="ends each document (default: what the model's folder names; 50279 for OLMo)")
    add("--seed", type=int, default=0, help="of the sample (default: 0)")
    add(
        "--corpus",
        default="pubmed",
        metavar="{pubmed,c4,text,hub:NAME}",
        help=f"what the input is (default: pubmed), or {FORM}, which is streamed from the Hugging Face hub",
    )
    add("--processes", type=int, help="(default: one for each core)")
    add("--files", type=int, metavar="N", help="download only N files, chosen by the seed (default: all, some 50 GB)")
    add("--year", metavar="YY", help="download pubmedYYnNNNN (default: the newest)")
    add("--url", help=f"download from there (default: {BASELINE})")
    args = parser.parse_args(argv)
    for flag in ("instances", "sequence_length", "processes", "files"):
        if (value := getattr(args, flag)) is not None and value < 1:
            parser.error(f"--{flag} must be at least 1")
    if not 0 <= args.seed < 2**64 or not 0 <= (args.eos_token_id or 0) < 2**31:
        parser.error("--seed must be in 0..2**64-1, --eos_token_id in 0..2**31-1")
    on_hub = args.corpus.startswith(PREFIX)
    if not on_hub and args.corpus not in ("pubmed", "c4", "text"):
        parser.error(f"--corpus {args.corpus} is none of pubmed, c4, text and {FORM}")
    if on_hub:
        for flag in ("input", "files", "year", "url", "processes"):
            if getattr(args, flag) is not None:
                parser.error(f"--{flag}: not with --corpus hub:..., whose first texts this process reads from the hub")
    elif args.corpus != "pubmed" and not args.input:
        parser.error(f"--corpus {args.corpus} needs --input; without it, name a dataset on the hub: --corpus {FORM}")
    if args.input and (args.files or args.year or args.url):
        parser.error("--files, --year and --url are for downloading, not for --input")
    if args.output.is_file() or (args.output.is_dir() and any(args.output.iterdir())):
        parser.error(f"{args.output} exists; remove it or choose another --output")
    return args


def main(argv: Sequence[str]) -> None:
    args = arguments(argv)
    eos = args.eos_token_id
    if eos is None:
        eos = eos_of(args.tokenizer, "give its id with --eos_token_id")
    of_olmo = Path(args.tokenizer).name in OLMO_TOKENIZERS
    largest = max(OLMO_EOS if of_olmo else 0, *tokenizer_of(args.tokenizer).get_vocab().values())
    if eos > largest:
        raise ConfigurationError(f"--eos_token_id {eos}: the largest id of {args.tokenizer} is {largest}")
    settings = Settings(args.corpus, args.seed, args.tokenizer, eos, "<u2" if largest < 2**16 else "<u4")
    processes = args.processes or os.cpu_count() or 1
    source: Sequence[Path] | Callable[[Path], Sequence[Path]]
    if args.corpus.startswith(PREFIX):
        column = find(args.corpus)
        settings, processes = replace(settings, corpus=str(column)), 1
        source = partial(write_documents, column, args.corpus, settings, args.instances * args.sequence_length)
    elif args.input:
        source = expand(args.input)
    else:
        url = (args.url or BASELINE).rstrip("/") + "/"
        source = download(url, args.year, args.files, args.seed, args.output.parent / "pubmed_baseline")
    started = time.monotonic()
    about = prepare(source, args.output, settings, args.instances, args.sequence_length, processes)
    read, seconds = about["read"], time.monotonic() - started
    print(
        f"{args.output}: {args.instances} rows of {args.sequence_length} ids; {describe(about['sample'])}; "
        f"documents end with token {eos}"
    )
    without = f", {read.get('without_pmid', 0)} of them without PMID" if args.corpus == "pubmed" else ""
    print(
        f"read {read['files']} files, {read['records']} records{without}, "
        f"{read['bytes'] / MB:,.0f} MB in {seconds:.0f} s, {read['bytes'] / MB / seconds:,.1f} MB/s"
    )


if __name__ == "__main__":
    sys.exit(exit_status(main))
