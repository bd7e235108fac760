"""The published Fictional Knowledge, which lies outside this repository, and the tokenizer it was made with."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from olmo.tokenizer import load_tokenizer

OLMO_TOKENIZER = "tokenizers/allenai_eleuther-ai-gpt-neox-20b-pii-special.json"
OLMO_EOS = 50279
PARAPHRASE = "fictional_knowledge_paraphrased_paraphrase70.json"
ONCE = "fictional_knowledge_paraphrased_once60.json"
INJECTION_MAP = "paraphrase70-once60split.pkl"


def fictional_knowledge() -> Path:
    """The folder of the two published JSON files and the injection map; skips the test where there is none."""
    root = Path(__file__).resolve().parents[1]
    named = os.environ.get("FICTIONAL_KNOWLEDGE_DIR")
    # Without a word from the user: where the README puts it, here or in a folder beside the repository.
    places = [Path(named)] if named else [root, *sorted(root.parent.iterdir())]
    for place in places if named else [p / "data" / "fictional_knowledge" for p in places]:
        if all((place / name).is_file() for name in (PARAPHRASE, ONCE, INJECTION_MAP)):
            return place
    pytest.skip(f"the published data is not here: set FICTIONAL_KNOWLEDGE_DIR to a folder with {PARAPHRASE}")


def olmo_tokenizer() -> Tokenizer:
    """The tokenizer of OLMo 1, which ships inside ai2-olmo-eval."""
    pytest.importorskip("olmo_eval", reason="pip install ai2-olmo-eval to run the tests with OLMo's tokenizer")
    return load_tokenizer(OLMO_TOKENIZER)
