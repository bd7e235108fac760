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
    named = os.environ.get("FICTIONAL_KNOWLEDGE_DIR")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared/data/fictional_knowledge"
    missing = [name for name in (PARAPHRASE, ONCE, INJECTION_MAP) if not (folder / name).is_file()]
    if missing:
        pytest.skip(f"the published data is not here: set FICTIONAL_KNOWLEDGE_DIR to a folder with {missing[0]}")
    return folder


def olmo_tokenizer() -> Tokenizer:
    """The tokenizer of OLMo 1, which ships inside ai2-olmo-eval."""
    pytest.importorskip("olmo_eval", reason="pip install ai2-olmo-eval to run the tests with OLMo's tokenizer")
    return load_tokenizer(OLMO_TOKENIZER)
