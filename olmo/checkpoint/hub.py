"""Checkpoints by name: a folder, or `owner/name[@revision]` on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from ..files.adapters import base_name, is_adapter
from ..files.paths import is_hub_id
from .formats import explain
from .weights import model_files


def fetch_base(folder: Path, weights: bool = True) -> Path:
    """The folder, after its base model is downloaded if it holds an adapter of a model of the hub. Raises as `download`
    does, and as `base_name`."""
    if is_adapter(folder) and is_hub_id(name := base_name(folder)):
        download(name, weights=weights)
    return folder


def resolve(checkpoint: str, key: str = "") -> Path:
    """The folder of a checkpoint: a path, or `owner/name[@revision]` downloaded from the Hugging Face hub. `key` is the
    configuration's name for it, for errors."""
    if Path(checkpoint).is_dir():
        return Path(checkpoint)
    if "://" in checkpoint:
        raise FileNotFoundError(f"{checkpoint}: a checkpoint is a folder here or on the hub; fetch it first")
    if Path(checkpoint).is_file():
        raise FileNotFoundError(f"{checkpoint}: {explain(Path(checkpoint))}{key and f' ({key})'}")
    if not is_hub_id(checkpoint):
        raise FileNotFoundError(f"{checkpoint}: no such checkpoint folder{key and f' ({key})'}")
    return download(checkpoint)


def download(hub_id: str, cache: Path | None = None, weights: bool = True) -> Path:
    """The folder of `owner/name[@revision]`, named by its commit, in `cache` or else in the hub's own.

    Without `weights` it holds the JSON files: configuration and tokenizer. If the hub is unreachable, an earlier
    complete download is used. Raises FileNotFoundError if there is none.
    """
    from huggingface_hub import HfApi

    name, _, revision = hub_id.partition("@")
    patterns = ["*.json"]
    try:
        if weights:
            files = HfApi().list_repo_files(name, revision=revision or None)
            patterns.append("*.safetensors" if any(f.endswith(".safetensors") for f in files) else "*.bin")
            patterns += ["*.model", "*.txt", "*.jinja"]  # tokenizers have these too
        return _snapshot(hub_id, cache, patterns)
    except Exception as error:  # the hub's client lets the errors of its HTTP library through
        folder = downloaded(hub_id, cache, weights)
        if folder is not None:
            return folder
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FileNotFoundError(
            f"{hub_id}: no such folder, and the hub does not provide it: {reason.removeprefix('Got: ')}; where the hub "
            "is out of reach, copy the model's files here and name their folder"
        ) from error


def downloaded(hub_id: str, cache: Path | None = None, weights: bool = True) -> Path | None:
    """The folder of a complete earlier `download` in `cache` or the hub's own; None if there is none."""
    # Newer clients check that a snapshot has all files of the patterns, older ones do not.
    for weight_files in ("*.safetensors", "*.bin"):
        try:
            folder = _snapshot(hub_id, cache, ["*.json", *([weight_files] if weights else [])], local_files_only=True)
            if not weights or all(path.is_file() for path in model_files(folder)):
                return folder
        except (OSError, ValueError):  # not there, a part of it missing, or an index that is none
            continue
    return None


def _snapshot(hub_id: str, cache: Path | None, patterns: list[str], local_files_only: bool = False) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    name, _, revision = hub_id.partition("@")
    place = {"cache_dir": cache, "local_files_only": local_files_only}
    quiet = patterns == ["*.json"] and not are_progress_bars_disabled()  # a few small files
    try:
        if quiet:
            disable_progress_bars()
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=patterns, **place))
    finally:
        if quiet:
            enable_progress_bars()
