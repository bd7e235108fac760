"""The instances that a measurement sees: rows of token ids, from token files, datasets, texts or a run's own order."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from olmo.config import DataConfig, load
from olmo.data.masks import open_masks
from olmo.data.order import OrderFile, check_places, instances_at
from olmo.data.sources import TokenDataset, TokenFiles, open_source
from olmo.exceptions import ConfigurationError
from olmo.tokenizer import encode, load_tokenizer

CONFIGURATIONS = (".yaml", ".yml")


def read_instances(args: argparse.Namespace, folder: Path, length: int) -> list[NDArray[np.int64]]:
    """The first `--data_size` instances, each a row of at most `length` token ids (ragged where the data is text)."""
    count = args.data_size
    path = Path(args.data)
    if path.suffix in CONFIGURATIONS:
        return _first_of_run(args, length)
    if path.suffix == ".npy" or path.is_dir():
        source = TokenDataset(path, length) if path.is_dir() else TokenFiles([args.data], length)
        return open_masks(DataConfig(), 0, source).rows(source, _first(len(source), count, path), str(path))
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such data (--data)")
    texts = _texts(path)[:count]
    ids = encode(load_tokenizer(args.tokenizer or _tokenizer_of(folder)), texts)
    rows_of_text = [np.array(row[:length], dtype=np.int64) for row in ids if row]
    if len(rows_of_text) < count:
        raise ValueError(f"{path}: {len(rows_of_text)} texts, --data_size asks for {count}")
    return rows_of_text


def digest_of(rows: Sequence[NDArray[np.int64]]) -> str:
    """SHA-256 of instances, by which results say what they were measured on."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(row.astype("<u4").tobytes())
    return digest.hexdigest()


def _first_of_run(args: argparse.Namespace, length: int) -> list[NDArray[np.int64]]:
    """The first instances that the run of a configuration sees, each cut to `length` tokens."""
    config, count = load(args.data), args.data_size
    if not (config.data.paths or config.data.dataset_path):
        raise ConfigurationError(f"{args.data}: it names no data, neither data.paths nor data.dataset_path")
    source = open_source(config.data, config.model.max_sequence_length)
    if args.order is not None:
        if not isinstance(source, TokenFiles):
            raise ConfigurationError(f"--order: {args.data} names a dataset folder; an order is of token files")
        order = OrderFile(args.order)
        places = order.read(0, len(_first(len(order), count, args.order)))
        check_places(order, 0, places, source)
    else:
        wanted, epoch = _first(len(source), count, args.data), config.epoch or 0
        places = instances_at(wanted, len(source), config.data_seed, epoch, config.data_shuffling)
    masks = open_masks(config.data, config.model.pad_token_id, source)
    return [row[:length] for row in masks.rows(source, places, args.data)]


def _first(available: int, count: int, path: Path | str) -> NDArray[np.int64]:
    if available < count:
        raise ValueError(f"{path}: {available} instances, --data_size asks for {count}")
    return np.arange(count)


def _texts(path: Path) -> list[str]:
    """JSON list or lines of objects with `text` (or `train_context`), or plain text, a document a paragraph."""
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: no text in UTF-8; --data is a token file named .npy, a datasets folder, JSON with 'text', "
            "or plain text"
        ) from error
    if path.suffix not in (".json", ".jsonl"):
        return [text.strip() for text in content.split("\n\n") if text.strip()]
    pieces = [content] if path.suffix == ".json" else content.splitlines()
    texts: list[str] = []
    for number, piece in enumerate(pieces, start=1):
        where = f"{path}: " if path.suffix == ".json" else f"{path}: line {number}: "
        try:
            found = json.loads(piece) if piece.strip() else []
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}no JSON: {error}") from error
        for item in found if isinstance(found, list) else [found]:
            named = [item[key] for key in ("text", "train_context") if isinstance(item, dict) and key in item]
            if not named or not isinstance(named[0], str):
                raise ValueError(f"{where}expected objects with 'text'")
            texts.append(named[0])
    return texts


def _tokenizer_of(folder: Path) -> str:
    """The tokenizer that a checkpoint names, or that lies in its folder."""
    if (folder / "tokenizer.json").is_file():
        return str(folder / "tokenizer.json")
    if (folder / "config.yaml").is_file():
        from omegaconf import OmegaConf

        named = OmegaConf.select(OmegaConf.load(folder / "config.yaml"), "tokenizer.identifier")
        if named:
            return str(named)
    raise ConfigurationError(f"{folder}: names no tokenizer; give --tokenizer")
