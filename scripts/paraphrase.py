"""Write more paraphrases of fictional knowledge with a chat model, and keep those that still state every fact.

    python -m scripts.paraphrase once.json --output once9.json --endpoint http://localhost:8000/v1 --model NAME

The endpoint is any server with OpenAI's chat completions; if it needs a key, set OPENAI_API_KEY. An entry's existing
paraphrases are kept and counted. A new one must be complete, consist of the text alone, differ from all texts of its
entry, and contain every probe target that the training text contains, word for word except for capitals and
punctuation. (In the published data the training texts contain all targets of memorization and semantic probes, and four
in five of the compositional ones.) Otherwise the model is asked again, with what is wrong, up to `--attempts` times.

Accepted texts are appended to OUTPUT.partial.jsonl at once. After an interruption the same command requests only the
missing ones; the output is written when all exist.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from olmo.exceptions import Parser, check_new, exit_status
from olmo.knowledge.entries import load_entries
from scripts.prepare.chat import Endpoint, api_key
from scripts.prepare.fictional_knowledge import write_entries
from scripts.prepare.journal import Journal
from scripts.prepare.paraphrase import AGAIN, MANNERS, PROMPT, demanded, targets, write_all


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """The command line, checked."""
    parser = Parser(prog="paraphrase", description=__doc__)
    add = parser.add_argument
    add("entries", type=Path, metavar="ENTRIES.json")
    add("--output", type=Path, required=True, metavar="OUT.json")
    add("--paraphrases", type=int, default=9, metavar="N", help="of each entry, with those that it has (default: 9)")
    add("--endpoint", required=True, metavar="URL", help="as http://localhost:8000/v1 or https://api.openai.com/v1")
    add("--model", required=True, metavar="NAME", help="what the endpoint calls the model")
    add("--temperature", type=float, metavar="T", help="of the model's sampling (default: the endpoint's)")
    add("--seed", type=int, metavar="S", help="of the model's sampling, for endpoints that know seeds")
    add("--parallel", type=int, default=4, metavar="N", help="requests at a time (default: 4)")
    add(
        "--attempts",
        type=int,
        default=5,
        metavar="N",
        help="answers requested for one paraphrase before it is given up (default: 5)",
    )
    args = parser.parse_args(argv)
    if not re.match(r"https?://[^/?#]+", args.endpoint):
        parser.error(f"--endpoint {args.endpoint}: no address as http://localhost:8000/v1")
    for flag, least in (("paraphrases", 1), ("parallel", 1), ("attempts", 1), ("seed", 0), ("temperature", 0)):
        value = getattr(args, flag)
        if value is not None and not least <= value < math.inf:
            parser.error(f"--{flag} must be {'positive' if least else '0 or more'}, got {value}")
    check_new(args.output)
    return args


def main(argv: Sequence[str]) -> None:
    args = parse_args(argv)
    entries = load_entries(args.entries)
    content = args.entries.read_bytes()
    endpoint = Endpoint(
        args.endpoint, args.model, temperature=args.temperature, key=api_key(), connections=args.parallel
    )
    made_from = {
        "input": hashlib.sha256(content).hexdigest(),
        "model": args.model,
        "temperature": args.temperature,
        "seed": args.seed,
        "prompt": hashlib.sha256(repr((PROMPT, MANNERS, AGAIN)).encode()).hexdigest(),
    }
    places = [(i, k) for i, entry in enumerate(entries) for k in range(len(entry.paraphrases), args.paraphrases)]
    with Journal(args.output.with_name(f"{args.output.name}.partial.jsonl"), made_from) as journal:
        missing = [place for place in places if place not in journal.texts]
        if len(missing) < len(places):
            print(f"{len(places) - len(missing)} of {len(places)} paraphrases are in {journal.path}", flush=True)
        faults = write_all(missing, entries, endpoint, journal, args.parallel, args.attempts, args.seed)
        for i in sorted({i for i, _ in faults}):
            own = [fault for (entry, _), fault in sorted(faults.items()) if entry == i]
            tried = f"{len(own)} missing after {args.attempts} answers for each"
            print(f"error: entry {i}: {tried}; of the last one: {own[-1]}", file=sys.stderr)
        if faults:
            kept = f"the others are in {journal.path}, and " if journal.texts else ""
            raise ValueError(
                f"{len(faults)} of {len(places)} paraphrases could not be had; {kept}the same command asks again for "
                "those that are missing"
            )
        raw = json.loads(content)
        for i, k in places:
            raw[i]["paraphrases"].append(journal.texts[i, k])
        write_entries({args.output: raw})
    journal.path.unlink(missing_ok=True)
    demands = sum(len(demanded(entry)) for entry in entries)
    print(
        f"{args.output}: {len(entries)} entries, {len(places)} new paraphrases, which hold the {demands} of "
        f"{sum(len(targets(entry)) for entry in entries)} targets that their training texts hold"
    )


if __name__ == "__main__":
    sys.exit(exit_status(main))
