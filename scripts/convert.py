"""Convert a checkpoint between OLMo's layout and transformers'; weights keep their type and every bit.

    python -m scripts.convert SRC DST --to hf      # OlmoForCausalLM or Olmo2ForCausalLM, with its tokenizer
    python -m scripts.convert SRC DST --to olmo    # config.yaml and model.safetensors
    python -m scripts.convert SRC DST --to hf --resuscitation FILE
    python -m scripts.convert SRC DST --to hf --push OWNER/NAME     # and upload it to the Hugging Face hub

SRC is a folder of any layout that olmo.checkpoint reads, or a hub id `owner/name[@revision]`. `--resuscitation FILE`
applies what `python -m analysis.change_parameters` wrote, so that other programs read the edited model, and records it
in resuscitation.json. With it, SRC can be a transformers folder of any family, whose other files are kept. A restart
checkpoint (`step{N}`) of another family becomes the transformers folder that `step{N}-unsharded` is.

With --to hf, DST has a model card, README.md: what the run, the edit and measurements of SRC have recorded. `--push`
uploads DST in one commit; the same command continues an interrupted upload, and uploads a DST that it wrote before.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from olmo import checkpoint
from olmo.exceptions import ConfigurationError, Parser, exit_status
from scripts.prepare.upload import check_login, upload


def main(argv: Sequence[str]) -> None:
    parser = Parser(prog="python -m scripts.convert", description=__doc__)
    parser.add_argument("source", metavar="SRC", help="checkpoint folder or hub id")
    parser.add_argument("target", metavar="DST", type=Path, help="new folder")
    parser.add_argument("--to", choices=("olmo", "hf"), required=True)
    parser.add_argument("--resuscitation", metavar="FILE", help="multipliers (.safetensors) or full state dict (.pt)")
    parser.add_argument("--resuscitation_force", action="store_true", help="also multipliers of another checkpoint")
    parser.add_argument("--tokenizer", metavar="IDENTIFIER", help="default: the one SRC holds or its config.yaml names")
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload DST to this repository of the hub (--to hf)")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to upload to, created if needed; default: main")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--overwrite", action="store_true", help="replace other files that the repository has")
    args = parser.parse_args(argv)
    if args.resuscitation_force and args.resuscitation is None:
        raise ConfigurationError("--resuscitation_force: needs --resuscitation")
    for flag in ("revision", "private", "overwrite"):
        if getattr(args, flag) and args.push is None:
            raise ConfigurationError(f"--{flag}: needs --push")
    if args.push is not None:
        if args.to != "hf":
            raise ConfigurationError("--push: needs --to hf, the layout of models on the hub")
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", args.push):
            raise ConfigurationError(f"--push {args.push}: not a repository of the hub, owner/name")
        check_login(args.push)
    source = checkpoint.resolve(args.source)
    edit = args.resuscitation
    if edit is not None:
        edit = checkpoint.resuscitation_file(edit, source, "--resuscitation")
    from scripts.prepare.conversion import convert, was_written  # torch, which no check so far needs
    from scripts.prepare.model_card import Origin, license_of

    location = source if Path(args.source).is_dir() else args.source
    origin = Origin(location, source, edit, args.tokenizer, license_of(location, source))
    if args.push is None or not was_written(origin, args.target):
        print(convert(origin, args.target, args.to, args.resuscitation_force, copy=args.push is not None), flush=True)
    if args.push is not None:
        print(upload(args.target, args.push, args.revision, args.private, args.overwrite))


if __name__ == "__main__":
    sys.exit(exit_status(main))
