"""Upload a model's folder to the Hugging Face hub, in one commit: the repository has all of it or nothing.

An interrupted upload is continued by repeating it: the hub keeps files of weights that it has received completely.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from olmo.exceptions import ConfigurationError
from olmo.files.digests import file_digest
from olmo.files.paths import read_json
from olmo.net import describe_failure

_EDIT = "resuscitation.json"
_OF_THE_HUB = {".gitattributes"}  # files that a new repository has


@contextmanager
def _failing(repository: str) -> Iterator[None]:
    """Turn the errors of the hub's client into an OSError of one line."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        yield
    except ConfigurationError:
        raise
    except Exception as error:  # the client raises the errors of its HTTP library, and wraps them in a RuntimeError
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        reason = (getattr(cause, "server_message", None) or "").split("\n")[0]
        text = f"{describe_failure(cause)}{reason and f': {reason}'}"
        # Its own checks, of metadata or HF_HUB_OFFLINE for instance.
        if isinstance(cause, (ValueError, OfflineModeIsEnabled)) and not hasattr(cause, "response"):
            text = " ".join(str(cause).split())
        raise OSError(f"--push {repository}: {text}; the same command continues the upload") from error


def check_login(repository: str) -> None:
    """Raise ConfigurationError without a token that the hub accepts, OSError if it does not respond."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    how = "log in with `hf auth login`, or set HF_TOKEN, with a token that may write"
    with _failing(repository):
        try:
            HfApi().whoami()
        except LocalTokenNotFoundError:
            raise ConfigurationError(f"--push {repository}: no token of the Hugging Face hub here; {how}") from None
        except HfHubHTTPError as error:
            if error.response.status_code != 401:
                raise
            raise ConfigurationError(f"--push {repository}: the hub does not accept the token; {how}") from None


def upload(folder: Path, repository: str, revision: str | None, private: bool, overwrite: bool) -> str:
    """Make `repository` on the hub, or the branch `revision` of it, equal to `folder`; returns the commit's URL.

    A missing repository is created, private if asked for; so is a missing branch. Raises ConfigurationError where the
    branch has files of its own that are missing in the folder or differ, unless `overwrite`; OSError where the hub
    refuses something or does not respond.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    api, files = HfApi(), published_files(folder)
    with _failing(repository):
        try:
            main = api.model_info(repository, files_metadata=True)
            if private and not main.private:
                raise ConfigurationError(f"--push {repository}: exists and is public; --private only makes new ones so")
        except RepositoryNotFoundError:
            api.create_repo(repository, private=private or None)  # None: as the owner's settings have it
            main = api.model_info(repository, files_metadata=True)
        branch = main
        if revision is not None:
            try:
                branch = api.model_info(repository, revision=revision, files_metadata=True)
            except RevisionNotFoundError:
                api.create_branch(repository, branch=revision)
        there = _digests(branch)
        wanted = {name: _digest(content, there.get(name, ("sha256", ""))[0]) for name, content in files.items()}
        others = sorted(there.keys() - files.keys() - _OF_THE_HUB)
        changed = sorted(name for name in files.keys() & there.keys() if there[name] != wanted[name])
        of_its_own = revision is None or branch.sha != main.sha  # a new branch has what main has
        if (others or changed) and of_its_own and not overwrite:
            raise ConfigurationError(
                f"--push {repository}: has another {(changed or others)[0]} already; name another branch with "
                "--revision, or replace its files: --overwrite"
            )
        url = f"{api.endpoint}/{repository}/tree/{revision or 'main'}"
        if there.items() >= wanted.items() and not others:
            return f"{url} has these files already"
        operations: list[Any] = [CommitOperationAdd(name, content) for name, content in files.items()]
        operations += [CommitOperationDelete(name) for name in others]
        message = f"Upload of {folder.name}"
        api.create_commit(repository, operations, commit_message=message, revision=revision, parent_commit=branch.sha)
    return url


def published_files(folder: Path) -> dict[str, Path | bytes]:
    """What is uploaded of a folder: its files, by name; of the record of an edit, without the folders of this
    machine."""
    files: dict[str, Path | bytes] = {
        path.name: path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(".")
    }
    if _EDIT in files:
        record = read_json(folder / _EDIT)
        record.update({key: Path(str(record[key])).name for key in ("checkpoint", "resuscitation") if key in record})
        settings = record.get("settings")
        if isinstance(settings, dict) and "coefficients" in settings:
            settings["coefficients"] = Path(str(settings["coefficients"])).name
        files[_EDIT] = (json.dumps(record, indent=2) + "\n").encode()
    return files


def _digests(info: Any) -> dict[str, tuple[str, str]]:
    """Algorithm and hash of each file of a revision, by name."""
    return {
        file.rfilename: ("sha256", file.lfs.sha256) if file.lfs else ("git", file.blob_id)
        for file in info.siblings or []
    }


def _digest(content: Path | bytes, algorithm: str) -> tuple[str, str]:
    if isinstance(content, Path):
        return algorithm, file_digest(content, algorithm)
    text = content if algorithm == "sha256" else b"blob %d\0" % len(content) + content
    return algorithm, hashlib.new("sha256" if algorithm == "sha256" else "sha1", text).hexdigest()
