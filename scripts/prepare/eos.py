"""The token that ends a document, of any tokenizer."""

from __future__ import annotations

from pathlib import Path

from olmo.checkpoint import hub
from olmo.exceptions import ConfigurationError
from olmo.tokenizer import OLMO_TOKENIZERS, document_end, load_tokenizer, tokenizer_file

OLMO_EOS = 50279  # in all their configurations, although this tokenizer calls it |||IP_ADDRESS|||


def eos_of(identifier: str, remedy: str = "name it as eos_token in its tokenizer_config.json") -> int:
    """The id that ends a document: what the folder of the tokenizer names, on disk or on the hub (see
    `olmo.tokenizer.document_end`); of a tokenizer.json alone, `<|endoftext|>` or `</s>`.

    Raises ConfigurationError, with the `remedy`, where neither is found, OSError or ValueError for an unreadable
    tokenizer.
    """
    if Path(identifier).name in OLMO_TOKENIZERS:
        return OLMO_EOS
    file, folder = Path(tokenizer_file(identifier)), Path(identifier)
    if file.is_file() and not folder.is_dir():
        folder = file.parent if file.name == "tokenizer.json" else file
    elif hub.is_hub_id(identifier):
        folder = hub.download(identifier, weights=False)
    found = document_end(folder)
    if found is None:
        vocabulary = load_tokenizer(identifier).get_vocab()
        found = next((vocabulary[token] for token in ("<|endoftext|>", "</s>") if token in vocabulary), None)
    if found is None:
        raise ConfigurationError(f"{identifier}: no token that ends a document; {remedy}")
    return found
