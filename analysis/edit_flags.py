"""Flags that change a checkpoint as a run that begins with it does: an edit of memories, and temperatures."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sized
from pathlib import Path

from olmo.exceptions import ConfigurationError


def add_edit_flags(parser: argparse.ArgumentParser, verb: str) -> None:
    """Add --resuscitation, --resuscitation_force, --temperature_attention and --temperature_MLP. verb: what the command
    does with an edited checkpoint."""
    inside = "a path, or a name inside the checkpoint's folder"
    parser.add_argument(
        "--resuscitation", metavar="FILE", help=f"{verb} the edit that analysis.change_parameters wrote: {inside}"
    )
    parser.add_argument("--resuscitation_force", action="store_true", help="accept an edit made for another checkpoint")
    parser.add_argument(
        "--temperature_attention",
        type=float,
        metavar="T",
        help="divide the attention scores by T, as a run with model.temperature_attention does at its first step",
    )
    parser.add_argument(
        "--temperature_MLP",
        metavar="FILE",
        help="divide the memory coefficients by those that change_parameters --format temperature wrote, as a run with "
        f"model.temperature_MLP does at its first step: {inside}",
    )


def check_edit_flags(args: argparse.Namespace) -> None:
    """Raise ConfigurationError where these flags do not fit together. A temperature of 1 is warned of and dropped."""
    temperature = args.temperature_attention
    if temperature is not None and not 0 < temperature < math.inf:
        raise ConfigurationError(f"--temperature_attention {temperature:g} must be above 0 and finite")
    if temperature == 1.0:
        print("warning: --temperature_attention 1 has no effect", file=sys.stderr)
        args.temperature_attention = None
    if args.resuscitation is None and args.resuscitation_force:
        raise ConfigurationError("--resuscitation_force: needs --resuscitation")


def check_one_checkpoint(args: argparse.Namespace, locations: Sized) -> None:
    """Raise ConfigurationError where several checkpoints are to be edited by the weights of one."""
    edit = Path(args.resuscitation or "")
    if len(locations) > 1 and edit.suffix == ".pt" and edit.is_file():
        raise ConfigurationError(f"--resuscitation: {args.resuscitation} holds the weights of one checkpoint; name one")
