"""The first texts of a dataset on the Hugging Face hub, as a file of JSON lines that `prepare` reads."""

from __future__ import annotations

import json
from pathlib import Path

from analysis.hub_column import HubColumn, Values
from olmo.console import Progress
from olmo.exceptions import ConfigurationError
from olmo.tokenizer import encode_documents
from scripts.prepare.documents import TEXT, Record, hash_of
from scripts.prepare.sampling import Settings, batches, tokenizer_of


def write_documents(column: HubColumn, name: str, settings: Settings, needed: int, folder: Path) -> list[Path]:
    """Write the first texts of a column to a file in `folder`: until they give `needed` tokens (copies of a text count
    once), or all of them. Raises ConfigurationError for token ids."""
    if not column.is_text:
        raise ConfigurationError(f"{name}: column '{column.column}' holds token ids, not text")
    path = folder / "documents.jsonl"
    seen, tokens = set[int](), 0
    records = (Record(0, None, 1, TEXT, text) for text in Values(column, name, show=False))
    with path.open("w", encoding="utf-8") as file, Progress(f"reading {name}", needed, "tokens") as progress:
        for batch in batches(records):
            new = {hash_of(record.text.encode(), 0): record.text for record in batch if record.text.strip()}
            texts = [text for identity, text in new.items() if identity not in seen]
            seen.update(new)
            file.writelines(json.dumps({"text": record.text}) + "\n" for record in batch)
            count = sum(map(len, encode_documents(tokenizer_of(settings.tokenizer), texts, settings.eos_token_id)))
            tokens += count
            progress.advance(min(count, needed - progress.done))  # the last batch may have more
            if tokens >= needed:
                break
    return [path]
