"""Show what the batch of any step of a run holds, after injection, without loading a model.

    python -m scripts.inspect_data CONFIG --step N [--rows A-B] [--decode] [--json] [--key.sub=value ...]

Rows are those of the global batch, from 0; A-B includes both. `index` is the instance's number in the data. As JSON,
one line a row: `step`, `row`, `index`, `input_ids`, `injected` (the entries whose texts entered the row), and where
there are any, `label_mask` and `attention_mask` (0 where a token does not count, or later ones do not see it).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from functools import partial

from olmo.checkpoint import complete
from olmo.config import load
from olmo.exceptions import ConfigurationError, Parser, exit_status
from olmo.tokenizer import encode, run_tokenizer
from scripts.prepare import numbers


def main(argv: Sequence[str]) -> None:
    parser = Parser(prog="python -m scripts.inspect_data", description=__doc__, allow_abbrev=False)
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("--step", type=int, required=True, help="from 1")
    parser.add_argument("--rows", type=numbers, metavar="A-B", help="default: all")
    parser.add_argument("--decode", action="store_true", help="text instead of token ids")
    parser.add_argument("--json", action="store_true", help="one line a row")
    args, overrides = parser.parse_known_args(argv)
    config = load(args.config, overrides, complete)
    import numpy as np  # and torch below, which no check so far needs

    from olmo.knowledge.build import needs_tokenizer, plan_from_config
    from olmo.knowledge.injection import inject
    from scripts.prepare.batches import batches_of_run

    tokenizer = run_tokenizer(config) if args.decode or needs_tokenizer(config) else None
    plan = plan_from_config(config, partial(encode, tokenizer) if tokenizer else None)
    batch = batches_of_run(config, range(args.step, args.step + 1))(args.step)
    size = config.global_train_batch_size
    batch, entered = inject(batch, args.step, plan, size)
    wanted = range(size) if args.rows is None else args.rows
    if wanted[-1] >= size:
        raise ConfigurationError(f"--rows: row {wanted[-1]}, the global batch has {size}")
    injected: dict[int, list[str]] = {}
    for row, text in entered:
        injected.setdefault(row, []).append(text.entry)
    instances = np.asarray(batch.instances)
    try:
        for row in wanted:
            ids, entries = batch.input_ids[row].tolist(), injected.get(row, [])
            shown = tokenizer.decode(ids, skip_special_tokens=False) if tokenizer and args.decode else None
            if args.json:
                line = {
                    "step": args.step,
                    "row": row,
                    "index": int(instances[row]),
                    "input_ids": ids,
                    "injected": entries,
                }
                for name, mask in (("label_mask", batch.label_mask), ("attention_mask", batch.attention_mask)):
                    if mask is not None:
                        line[name] = mask[row].int().tolist()
                print(json.dumps(line if shown is None else {**line, "text": shown}))
            else:
                note = f", injected {', '.join(entries)}" if entries else ""
                if batch.label_mask is not None:
                    note += f", {int(batch.label_mask[row].sum())} of {len(ids)} tokens count"
                print(f"--- step {args.step}, row {row}, instance {instances[row]}{note}")
                print(" ".join(map(str, ids)) if shown is None else shown)
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough; nor shall the interpreter's last flush complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(exit_status(main))
