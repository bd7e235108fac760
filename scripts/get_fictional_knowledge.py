"""Download the published fictional knowledge: the entries of both settings, and the map of their injections.

    bash scripts/get_fictional_knowledge.sh [--from https://mirror/folder/ | --from FOLDER]

The files are written to data/fictional_knowledge, where configs/1B and configs/resuscitation expect them. They receive
their names together, once all are complete, have the SHA-256 of those in the paper's repository, and can be read. The
same command continues an interrupted download; existing files are kept. Some 5 MB.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from olmo.exceptions import Parser, exit_status
from olmo.files.digests import file_digest
from olmo.knowledge.entries import load_entries
from olmo.net import describe_failure, http_session
from scripts.prepare.download import describe, fetch

# A commit, not a branch: what its files hold cannot change.
SOURCE = (
    "https://raw.githubusercontent.com/kaistAI/Knowledge-Entropy/0668197fda1c2a032b9daeadd5ec2ac585d20b8e/"
    "fictional_knowledge/"
)
# Name -> SHA-256.
PUBLISHED = {
    "fictional_knowledge_paraphrased_paraphrase70.json": (
        "f3e86b06403204f4a2ad1ee3f7596925e53cd662db51cb14d3b6f31386041861"
    ),
    "fictional_knowledge_paraphrased_once60.json": "ce002dacf47a4c8dd199fe8d140e59def3950352f09538e45eede4483ae36b38",
    "paraphrase70-once60split.pkl": "815f7fbc4d9f647c00365b85a058359acb04e0f22931d7ed8a2317d2956c2b60",
}
LICENSES = (
    "kaist-ai/fictional-knowledge, CC-BY-4.0; its further paraphrases are kaistAI/Knowledge-Entropy's, Apache-2.0"
)


def is_here(path: Path) -> bool:
    """Whether the published file exists already. FileExistsError where another file has its name."""
    if not path.exists():
        return False
    if not path.is_file() or file_digest(path, "sha256") != PUBLISHED[path.name]:
        raise FileExistsError(f"{path}: not the published file; remove it, or choose another folder with --output")
    return True


def check(path: Path, name: str, source: str) -> None:
    """Delete a downloaded file that is not the published one, and raise ValueError."""
    if (digest := file_digest(path, "sha256")) != PUBLISHED[name]:
        path.unlink()
        raise ValueError(
            f"{source}{name}: not the published file (SHA-256 {digest[:12]}..., not {PUBLISHED[name][:12]}...); "
            "try again, or name another place with --from"
        )


def describe_file(path: Path, name: str) -> str:
    """The content of a file, in words. Raises ValueError where it cannot be read."""
    if name.endswith(".json"):
        return f"{len(load_entries(path))} entries"
    from olmo.knowledge.plan_files import read_plan  # torch, which no download needs

    rounds = read_plan(path).rounds
    return f"{len(rounds)} rounds, {sum(map(len, rounds))} texts"


def open_source(source: str, names: Sequence[str], folder: Path, stack: ExitStack) -> Callable[[str], Path]:
    """A function that fetches a file of the source into `folder` under a hidden name; `folder` is made if all exist."""
    if "://" not in source:
        for name in names:
            if not Path(source, name).is_file():
                raise FileNotFoundError(f"{source}{name}: no such file (--from)")
        folder.mkdir(parents=True, exist_ok=True)
        hidden = stack.enter_context(TemporaryDirectory(prefix=".", dir=folder))
        return lambda name: Path(shutil.copyfile(Path(source, name), Path(hidden, name)))
    session = stack.enter_context(http_session())
    look = partial(describe, session, source)
    for name in names:
        try:
            there = look(name)
        except OSError as error:
            raise OSError(
                f"{source}{name}: {describe_failure(error)}; try again, or name a copy with --from"
            ) from error
        if there is None:
            raise FileNotFoundError(f"{source}{name}: does not exist (404); name a copy with --from")
    folder.mkdir(parents=True, exist_ok=True)
    return lambda name: fetch(session, look, name, folder)[0]


def get(source: str, folder: Path) -> None:
    """Download the published files. Raises OSError where they are not available, ValueError for damaged ones."""
    missing = [name for name in PUBLISHED if not is_here(folder / name)]
    with ExitStack() as stack:
        brought: dict[str, Path] = {}
        if missing:
            fetch_file = open_source(source, missing, folder, stack)
            for name in missing:
                brought[name] = fetch_file(name)
                check(brought[name], name, source)
        holds = {name: describe_file(brought.get(name, folder / name), name) for name in PUBLISHED}
        for name, path in brought.items():
            path.replace(folder / name)
    for name, what in holds.items():
        print(f"{folder / name}: {what}{'' if name in missing else ', already exists'}")
    print(f"({LICENSES})")


def main(argv: Sequence[str]) -> None:
    parser = Parser(prog="get_fictional_knowledge.sh", description=__doc__)
    parser.add_argument("--from", dest="source", default=SOURCE, metavar="URL_OR_DIR", help="a folder with copies")
    parser.add_argument("--output", type=Path, default=Path("data/fictional_knowledge"), metavar="DIR")
    arguments = parser.parse_args(argv)
    if "://" in arguments.source and not re.match(r"https?://[^/]", arguments.source):
        parser.error(f"--from {arguments.source}: neither https://... nor a folder")
    get(arguments.source.rstrip("/") + "/", arguments.output)


if __name__ == "__main__":
    sys.exit(exit_status(main))
