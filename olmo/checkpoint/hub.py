"""Checkpoints by name: a folder, or `owner/name[@revision]` on the Hugging Face hub, and the revisions there."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatch
from functools import cache as cached_call
from pathlib import Path

from ..exceptions import did_you_mean
from ..files.adapters import base_name, is_adapter
from ..files.paths import is_hub_id
from .folder import model_files
from .formats import explain


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
            patterns = _wanted(HfApi().list_repo_files(name, revision=revision or None))
        return _snapshot(hub_id, cache, patterns)
    except Exception as error:  # the hub's client lets the errors of its HTTP library through
        folder = downloaded(hub_id, cache, weights)
        if folder is not None:
            return folder
        raise FileNotFoundError(
            f"{hub_id}: no such folder, and the hub does not provide it: {reason_of(error, hub_id)}"
        ) from error


def _wanted(files: Sequence[str]) -> list[str]:
    """Patterns of the files of a model, of all that a revision has."""
    weights = "*.safetensors" if any(file.endswith(".safetensors") for file in files) else "*.bin"
    return ["*.json", weights, "*.model", "*.txt", "*.jinja"]  # tokenizers have the last three


def reason_of(error: Exception, hub_id: str) -> str:
    """Why the hub did not answer as expected about `owner/name[@revision]`, and what to do, in one line."""
    from huggingface_hub.utils import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    name, _, revision = hub_id.partition("@")
    if isinstance(error, GatedRepoError):
        return f"{name} is gated; accept its conditions on its page there, then log in: hf auth login"
    if isinstance(error, RepositoryNotFoundError):
        return f"there is no {name}, or it is private; check the name, or log in: hf auth login"
    if isinstance(error, RevisionNotFoundError):
        try:
            near = did_you_mean(revision, refs(name))
        except FileNotFoundError:
            near = ""
        return f"{name} has no revision {revision}{near}"
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    remedy = "where the hub is out of reach, copy the model's files here and name their folder"
    return f"{text.removeprefix('Got: ')}; {remedy}"


def refs(name: str) -> dict[str, str]:
    """The commits of all branches and tags of `owner/name` on the hub, by name. Raises FileNotFoundError."""
    from huggingface_hub import HfApi

    try:
        found = HfApi().list_repo_refs(name)
    except Exception as error:  # as in `download`
        raise FileNotFoundError(f"{name}: the hub does not list its revisions: {reason_of(error, name)}") from error
    return {ref.name: ref.target_commit for ref in [*found.tags, *found.branches]}


@cached_call
def known_refs(name: str, endpoint: str) -> tuple[str, ...]:
    """The names of `refs`, asked for once; none where the hub is unreachable."""
    try:
        return tuple(refs(name))
    except FileNotFoundError:
        return ()


def downloaded_refs(name: str) -> list[str]:
    """Revisions of `owner/name` whose complete download is in the hub's cache."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}" / "refs"
    found = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return [ref for ref in found if downloaded(f"{name}@{ref}") is not None]


def size_of(hub_id: str) -> int | None:
    """The bytes that `download` of a revision transfers where nothing of it is here; None where that is unknown."""
    from huggingface_hub import HfApi

    name, _, revision = hub_id.partition("@")
    try:
        tree = HfApi().list_repo_tree(name, recursive=True, revision=revision or None)
        sizes = {entry.path: entry.size for entry in tree if hasattr(entry, "size")}
    except Exception:  # as in `download`, which reports it
        return None
    patterns = _wanted(list(sizes))
    return sum(size for path, size in sizes.items() if any(fnmatch(path, pattern) for pattern in patterns))


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
