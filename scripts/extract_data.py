"""Write the tokens of steps A to B of a run as one token file, to continue a checkpoint with its next data.

    python -m scripts.extract_data CONFIG --steps A-B --output FILE [--key.sub=value ...]

Rows are in the order in which the run sees them, before injection: a run over the file with the same batch size and
`data_shuffling: false` repeats those steps. Numbers are little-endian, of `data.memmap_dtype`, without a header. With a
FILE that ends in .jsonl, the text of each row is written instead, for models that have other tokens.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from olmo.checkpoint import complete
from olmo.config import load
from olmo.config.schema import DEFAULT_DTYPE
from olmo.console import Progress
from olmo.exceptions import ConfigurationError, Parser, check_new, exit_status
from olmo.files.atomic import atomic_path
from olmo.tokenizer import run_tokenizer
from scripts.prepare import numbers


def main(argv: Sequence[str]) -> None:
    parser = Parser(prog="python -m scripts.extract_data", description=__doc__, allow_abbrev=False)
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("--steps", type=numbers, metavar="A-B", required=True, help="from 1, both included")
    parser.add_argument("--output", type=Path, metavar="FILE", required=True)
    args, overrides = parser.parse_known_args(argv)
    config = load(args.config, overrides, complete)
    check_new(args.output)
    import numpy as np  # and torch below, which no check so far needs

    from scripts.prepare.batches import batches_of_run

    tokenizer = run_tokenizer(config) if args.output.suffix == ".jsonl" else None
    # A run over the file derives both from the tokens again.
    config.data.generate_attention_mask, config.data.instance_filter = False, None
    dtype = np.dtype(config.data.memmap_dtype or DEFAULT_DTYPE).newbyteorder("<")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix=".order-", dir=args.output.parent) as folder,
        atomic_path(args.output) as partial,
        partial.open("wb") as file,
        Progress("extracting", len(args.steps), "steps") as progress,
    ):
        # Writing the order to a file is worth it from the second step on.
        batch_of = batches_of_run(config, args.steps, Path(folder) if len(args.steps) > 1 else None)
        for step in args.steps:
            batch = batch_of(step)
            if batch.label_mask is not None:
                raise ConfigurationError(f"step {step}: a token file has neither label masks nor short rows")
            tokens = batch.input_ids.numpy()
            if tokens.max() > np.iinfo(dtype).max:
                raise ConfigurationError(f"data.memmap_dtype: token {tokens.max()} does not fit {dtype.name}")
            if tokenizer is None:
                tokens.astype(dtype).tofile(file)
            else:
                texts = tokenizer.decode_batch(tokens.tolist(), skip_special_tokens=True)
                file.writelines(f"{json.dumps({'text': text})}\n".encode() for text in texts)
            progress.advance()
    rows = len(args.steps) * config.global_train_batch_size
    kind = dtype.name if tokenizer is None else "as text"
    print(f"{args.output}: {rows:,} instances of {config.model.max_sequence_length} tokens, {kind}")


if __name__ == "__main__":
    sys.exit(exit_status(main))
