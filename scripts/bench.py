"""Timings as ratios of things run in turn on the same machine: the median ratio of the rounds, and their range.

    python -m scripts.bench [--only loss,saves] [--rounds 5]
    python -m scripts.bench --against DIR [--only entropy,training] [--rounds 3]

training: our Trainer against a plain torch loop, transformers' Trainer and ai2-olmo: time and memory.
family: the same of a Llama, in both precisions, without ai2-olmo.
saves: how long training is interrupted by an asynchronous save, and by a blocking one.
loss: logits in parts against all at once: time and memory.
entropy: a model of OLMo-1B's shape against transformers: time and memory.
probes: 1,950 in one packed pass against one padded evaluator at a time.
loader: batches from memory-mapped files against numpy alone copying the same rows.

The modules of scripts/benchmarks/ describe each. With --against, commands of this checkout and of the checkout DIR run
in turn on the same inputs (entropy, training, loader, probes): times, peak memory, and whether the numbers agree.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from olmo.distributed import disable_malloc_trim
from olmo.exceptions import ConfigurationError, Parser, exit_status

# Name -> module of scripts/benchmarks, whose function bench_NAME it is; imported when it is run.
BENCHMARKS = {
    "training": "training",
    "family": "training",
    "saves": "saves",
    "loss": "loss",
    "entropy": "entropy",
    "probes": "probes",
    "loader": "loader",
}


def main(argv: Sequence[str]) -> None:
    parser = Parser(prog="python -m scripts.bench", description=__doc__)
    parser.add_argument("--only", metavar="NAMES", help="separated by commas (default: all)")
    parser.add_argument("--rounds", type=int, help="repetitions of each comparison (default: 5; 3 with --against)")
    parser.add_argument("--against", type=Path, metavar="DIR", help="another checkout of this project")
    args = parser.parse_args(argv)
    known: Iterable[str] = BENCHMARKS
    if args.against:
        from scripts.benchmarks.against import WORKS, compare

        known = WORKS
    names = args.only.split(",") if args.only else list(known)
    if unknown := sorted(set(names) - set(known)):
        raise ConfigurationError(f"--only {','.join(unknown)}: choose from {', '.join(known)}")
    rounds = (3 if args.against else 5) if args.rounds is None else args.rounds
    if rounds < 1:
        raise ConfigurationError("--rounds must be at least 1")
    import torch  # which no check so far needs

    from olmo.distributed import pick_device

    disable_malloc_trim()
    device = pick_device()
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"torch {torch.__version__} on {device.type}, {where}", flush=True)
    if args.against:
        compare(args.against, names, rounds)
        return
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            module = importlib.import_module(f"scripts.benchmarks.{BENCHMARKS[name]}")
            getattr(module, f"bench_{name}")(Path(folder), rounds)


if __name__ == "__main__":
    sys.exit(exit_status(main))
