"""Write fictional knowledge of our own in the published format: facts that no model can know yet.

    python -m scripts.make_fictional_knowledge --output data/own --paraphrase 70 --once 60

writes `fictional_knowledge_paraphrase.json` and `fictional_knowledge_once.json`. Published texts average 560 tokens,
too long for a small context; these are short (`--max_words`, and `--max_tokens` of a `--tokenizer`). See
scripts/prepare/fictional_knowledge.py for what an entry holds, and fictional_templates.yaml for the sentences.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from olmo.exceptions import ConfigurationError, Parser, exit_status
from olmo.tokenizer import encode, load_tokenizer
from scripts.prepare import OLMO_TOKENIZER
from scripts.prepare.fictional_knowledge import count_words, make_entries, write_entries


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """The command line, checked."""
    parser = Parser(
        prog="make_fictional_knowledge",
        description="Write invented facts, paraphrases and probes in the published format.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the two JSON files")
    parser.add_argument("--paraphrase", type=int, default=70, help="entries of setting paraphrase")
    parser.add_argument("--once", type=int, default=60, help="entries of setting once")
    parser.add_argument("--paraphrases", type=int, default=9, help="other wordings of each entry")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same files")
    parser.add_argument("--overwrite", action="store_true", help="replace entries of other settings, or published ones")
    parser.add_argument("--max_words", type=int, default=80, help="longest text allowed")
    parser.add_argument("--max_tokens", type=int, help="longest text allowed, in tokens of --tokenizer")
    parser.add_argument(
        "--tokenizer", metavar="ID", help="file, model's folder, name in olmo_eval, or hub id; without it OLMo's"
    )
    args = parser.parse_args(argv)
    for flag in ("paraphrase", "once", "paraphrases", "seed"):
        if getattr(args, flag) < 0:
            parser.error(f"--{flag} must not be negative, got {getattr(args, flag)}")
    for flag in ("max_words", "max_tokens"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            parser.error(f"--{flag} must be positive, got {getattr(args, flag)}")
    if args.tokenizer is not None and args.max_tokens is None:
        parser.error("--tokenizer counts the tokens of a text; give --max_tokens as well")
    if args.paraphrase + args.once == 0:
        parser.error("--paraphrase 0 and --once 0 leave nothing to write")
    return args


def main(argv: Sequence[str]) -> None:
    args = parse_args(argv)
    tokenizer = load_tokenizer(args.tokenizer or OLMO_TOKENIZER) if args.max_tokens is not None else None
    try:
        entries = make_entries(
            args.paraphrase + args.once, args.paraphrases, args.seed, args.max_words, args.max_tokens, tokenizer
        )
    except ValueError as error:
        limit = "--max_words" if args.max_tokens is None else "--max_tokens or --max_words"
        raise ConfigurationError(f"make_fictional_knowledge: {error}; raise {limit}, or lower --paraphrases") from error
    write_entries(
        {
            args.output / "fictional_knowledge_paraphrase.json": entries[: args.paraphrase],
            args.output / "fictional_knowledge_once.json": entries[args.paraphrase :],
        },
        args.overwrite,
    )
    texts = [text for entry in entries for text in (entry["train_context"], *entry["paraphrases"])]
    lengths = [f"{spread(count_words(texts))} words"]
    if tokenizer is not None:
        lengths.append(f"{spread([len(ids) for ids in encode(tokenizer, texts)])} tokens")
    print(
        f"wrote {args.paraphrase} paraphrase and {args.once} once entries to {args.output}: "
        f"{len(texts)} texts of {', '.join(lengths)}"
    )


def spread(lengths: list[int]) -> str:
    return f"{min(lengths)} to {max(lengths)} (mean {sum(lengths) / len(lengths):.1f})"


if __name__ == "__main__":
    sys.exit(exit_status(main))
