"""Write what a run injects as a file: which texts, in which round, with their tokens.

    python -m scripts.injection_plan CONFIG --output plan.json|plan.safetensors [--key.sub=value ...]

The plan is that of `injection` (entries) or of `inject_indices_map` (a published pickle, or a plan of ours), checked as
a run checks it. A run takes the file as its `inject_indices_map`. JSON is for people, with each text beside its tokens;
safetensors is smaller. `inject_interval`, `inject_start_step` and `inject_position` stay with the configuration. The
format is described in olmo/knowledge/plan_files.py.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from olmo.checkpoint import complete
from olmo.config import load
from olmo.exceptions import ConfigurationError, Parser, check_new, exit_status
from olmo.tokenizer import encode, run_tokenizer


def main(argv: Sequence[str]) -> None:
    parser = Parser(prog="python -m scripts.injection_plan", description=__doc__, allow_abbrev=False)
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("--output", type=Path, metavar="FILE", required=True, help="ends in .json or .safetensors")
    args, overrides = parser.parse_known_args(argv)
    config = load(args.config, overrides, complete)
    check_new(args.output)
    from olmo.knowledge.build import needs_tokenizer, plan_from_config  # torch, which no check so far needs
    from olmo.knowledge.plan_files import PlanFile, read_plan, write_plan

    tokenizer = run_tokenizer(config) if needs_tokenizer(config) else None
    plan = plan_from_config(config, partial(encode, tokenizer) if tokenizer else None)
    if plan is None:
        raise ConfigurationError(
            f"{args.config}: injects nothing; give injection and its rounds, or inject_indices_map"
        )
    texts = [text for round_texts in plan.rounds for text in round_texts]
    spelled = tokenizer is not None and all(text.wording is not None for text in texts)  # and checked, or encoded here
    made_by = config.tokenizer.identifier if spelled else None
    if config.inject_indices_map:
        made_by = read_plan(config.inject_indices_map).tokenizer or made_by
    write_plan(args.output, PlanFile(plan.rounds, plan.steps_passed, made_by, config.model.eos_token_id))
    tokens = sum(len(text.input_ids) for text in texts)
    print(f"{args.output}: {len(plan.rounds)} rounds, {len(texts):,} texts, {tokens:,} tokens")


if __name__ == "__main__":
    sys.exit(exit_status(main))
