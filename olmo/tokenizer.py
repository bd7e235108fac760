"""The tokenizer of a run: a `tokenizer.json` on disk, one of OLMo's by its name, or a hub id.

OLMo's are read from `olmo_eval`, of the extra `eval`, or without it from the hub.

Text is encoded without special tokens; at the end of a document the caller appends the model's EOS id.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from .config.schema import TokenizerConfig, TrainConfig
from .exceptions import ConfigurationError
from .files.adapters import base_folder
from .files.paths import check_not_lfs, is_url, read_json

# The files that OLMo's configurations name, and whose tokenizer.json on the hub they are.
OLMO_TOKENIZERS = {
    "allenai_eleuther-ai-gpt-neox-20b-pii-special.json": "allenai/eleuther-ai-gpt-neox-20b-pii-special",
    "allenai_gpt-neox-olmo-dolma-v1_5.json": "allenai/gpt-neox-olmo-dolma-v1_5",
}


def packaged_tokenizer(identifier: str) -> Path | None:
    """The file of that name inside `olmo_eval/tokenizers`; None without the package or the file.

    OLMo's configurations name these files as `tokenizers/NAME.json` or `olmo/tokenizers/NAME.json`.
    """
    package = importlib.util.find_spec("olmo_eval")
    if package is None or not package.submodule_search_locations:
        return None
    path = Path(package.submodule_search_locations[0]) / "tokenizers" / Path(identifier).name
    return path if path.is_file() else None


def tokenizer_of_folder(folder: Path) -> str | None:
    """The identifier of the tokenizer of a transformers folder or a checkpoint folder: its tokenizer.json, or the one
    that its config.yaml names; of an adapter that has neither, its base model's. None where there is none."""
    if (folder / "tokenizer.json").is_file():
        return str(folder / "tokenizer.json")
    folder = base_folder(folder)
    if (folder / "tokenizer.json").is_file():
        return str(folder / "tokenizer.json")
    named = _of_run(folder, "tokenizer.identifier")
    return str(named) if named else None


def document_end(folder: Path) -> int | None:
    """The id of the token that ends a document, for the model or tokenizer in a folder; None where nothing names one.

    That is, the first of: what config.yaml states for the run; the `eos_token` of the tokenizer's own settings, if the
    folder's tokenizer.json has it; `eos_token_id` of config.json or generation_config.json (of a list, the first).
    Raises ValueError or OSError that names an unreadable file.
    """
    stated = _of_run(folder, "model.eos_token_id")
    if isinstance(stated, int):
        return stated
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        token = _settings(folder / name).get("eos_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and (folder / "tokenizer.json").is_file():
            found = load_tokenizer(str(folder / "tokenizer.json")).token_to_id(token)
            if found is not None:
                return found
    if (base := base_folder(folder)) != folder:
        return document_end(base)
    for name in ("config.json", "generation_config.json"):
        raw = _settings(folder / name)
        of_text = raw.get("text_config")  # of a model that also reads images
        ids = raw.get("eos_token_id", of_text.get("eos_token_id") if isinstance(of_text, dict) else None)
        first = ids[0] if isinstance(ids, list) and ids else ids
        if isinstance(first, int):
            return first
    return None


def _of_run(folder: Path, key: str) -> Any:
    """The value of a key in a folder's config.yaml; None where either does not exist."""
    if not (folder / "config.yaml").is_file():
        return None
    from omegaconf import OmegaConf

    return OmegaConf.select(OmegaConf.load(folder / "config.yaml"), key)


def _settings(path: Path) -> dict[str, Any]:
    """The keys of a JSON file; none where it does not exist. Raises ValueError where it holds something else."""
    raw = read_json(path) if path.is_file() else {}
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: expected keys and values")
    return raw


def tokenizer_file(identifier: str) -> str:
    """The path of an existing file, that of a folder's tokenizer, that of `owner/name@revision` or of one of OLMo's on
    the hub, or the identifier itself if it is another hub id.

    Raises FileNotFoundError for a missing .json file and for a folder without a tokenizer; ValueError for what the hub
    does not provide.
    """
    if Path(identifier).is_file():
        return identifier
    if Path(identifier).is_dir():
        found = tokenizer_of_folder(Path(identifier))
        if found is None or Path(found).is_dir():
            slow = [n for n in ("tokenizer.model", "vocab.json", "vocab.txt") if Path(identifier, n).is_file()]
            hint = "; make one of its %s: transformers' AutoTokenizer.from_pretrained, then save_pretrained"
            raise FileNotFoundError(
                f"{identifier}: no tokenizer.json in this folder, and no config.yaml that names a tokenizer"
                + (hint % slow[0] if slow else "")
            )
        return tokenizer_file(found)
    if is_url(identifier):
        raise ConfigurationError(
            f"{identifier}: URLs are not read here; download the file first, and give its path (tokenizer.identifier)"
        )
    packaged = packaged_tokenizer(identifier)
    if packaged is not None:
        return str(packaged)
    if (of_olmo := OLMO_TOKENIZERS.get(Path(identifier).name)) is not None:
        remedy = f"{identifier}: pip install 'knowledge-entropy[eval]' has it; not read from {of_olmo} on the hub"
        return _of_hub(of_olmo, None, remedy)
    name, _, revision = identifier.partition("@")
    if identifier.endswith(".json") or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):
        raise FileNotFoundError(f"{identifier}: no such tokenizer file or folder (tokenizer.identifier)")
    if not revision:
        return identifier
    return _of_hub(name, revision, f"{identifier}: cannot load this tokenizer")


def _of_hub(name: str, revision: str | None, problem: str) -> str:
    """The path of the tokenizer.json of `owner/name`, downloaded once. Raises ValueError that begins with `problem`."""
    from huggingface_hub import hf_hub_download

    try:
        with _quiet_hub():
            return hf_hub_download(name, "tokenizer.json", revision=revision)
    except Exception as error:  # the hub's client lets the errors of its HTTP library through
        raise ValueError(f"{problem}: {error}") from error


def tokenizer_of_run(config: TrainConfig) -> str:
    """The identifier of a run's tokenizer. If it is that of the run's model, and a run that resumes no longer finds it
    there, that of the newest checkpoint, which has a copy."""
    identifier, latest = config.tokenizer.identifier, Path(config.save_folder) / "latest"
    missing = identifier == config.model.transformers and not Path(identifier).exists()
    if missing and config.try_load_latest_save and (latest / "tokenizer.json").is_file():
        return str(latest)
    return identifier


def load_tokenizer(identifier: str) -> Tokenizer:
    """Read a tokenizer, without the truncation and padding that its file may have from its last use in transformers.
    Raises FileNotFoundError or ValueError with its identifier."""
    where = tokenizer_file(identifier)
    try:
        if Path(where).is_file():
            check_not_lfs(Path(where))
            return uncut(Tokenizer.from_file(where))
        with _quiet_hub():
            return uncut(Tokenizer.from_pretrained(where))
    except Exception as error:  # the library raises bare Exception for files and for the network
        raise ValueError(f"{identifier}: cannot load this tokenizer: {error}") from error


def uncut(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer, set to encode all of a text and nothing else."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """Silence the log lines of the hub's client, one per attempt; its error has the same text once."""
    from huggingface_hub.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def run_tokenizer(config: TrainConfig) -> Tokenizer:
    """The tokenizer of a run. Raises ConfigurationError if it has more tokens than the model has embeddings."""
    identifier, model = config.tokenizer.identifier, config.model
    tokenizer = load_tokenizer(tokenizer_of_run(config))
    # Tokens that were added, such as those of images, may have no row: a text that has one is an error of its own.
    known = tokenizer.get_vocab(with_added_tokens=model.transformers is None)
    needed, rows = max(known.values(), default=-1) + 1, model.rows
    if needed > rows:
        raise ConfigurationError(
            f"tokenizer.identifier: {identifier} has {needed} tokens, model.embedding_size is {rows}; "
            "use the tokenizer that the model was trained with, or increase embedding_size of a new model"
        )
    if tokenizer.id_to_token(model.eos_token_id) is None:
        raise ConfigurationError(f"model.eos_token_id: {identifier} has no token {model.eos_token_id}")
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, without special tokens."""
    return [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]


def encode_documents(tokenizer: Tokenizer, texts: list[str], eos: int) -> list[list[int]]:
    """Token ids of each text with EOS at its end: as documents are packed."""
    return [[*ids, eos] for ids in encode(tokenizer, texts)]


def truncate(ids: list[int], length: int, config: TokenizerConfig) -> list[int]:
    """The first `length` tokens, or the last ones with `truncate_direction: left`; all if there are fewer."""
    if len(ids) <= length:
        return ids
    return ids[len(ids) - length :] if config.truncate_direction == "left" else ids[:length]
