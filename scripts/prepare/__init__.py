"""What the commands that prepare data share. No module here is a command."""

import argparse
import re

OLMO_TOKENIZER = "tokenizers/allenai_eleuther-ai-gpt-neox-20b-pii-special.json"  # of OLMo-1B and 7B, inside olmo_eval


def numbers(text: str) -> range:
    """`7` or `3-7`, both ends included, as a range."""
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    if match is None or int(match[2] or match[1]) < int(match[1]):
        raise argparse.ArgumentTypeError(f"expected N or A-B, got {text!r}")
    return range(int(match[1]), int(match[2] or match[1]) + 1)
