"""The texts that scripts.paraphrase has accepted so far, kept on disk so that an interrupted command can continue."""

from __future__ import annotations

import errno
import json
import os
import re
import threading
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from olmo.exceptions import ConfigurationError
from olmo.files.lock import Lock, Locked

Place = tuple[int, int]  # an entry, and the place of a text among its paraphrases; both count from 0


def words(text: str) -> str:
    """The words of a text between single spaces, and around them, without capitals and punctuation."""
    return " ".join(["", *re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", text).casefold()), ""])


class Journal:
    """Accepted texts, each written to a file at once as one line; `texts` holds those of a file that is opened again.

    The first line says what they were made from; ConfigurationError where that is something else now, or where another
    process writes the file. A last line that was cut off is dropped.
    """

    def __init__(self, path: Path, made_from: Mapping[str, Any]):
        self.path, self.texts = path, dict[Place, str]()
        self._mutex = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lock = Lock(path.with_name(f".{path.name}.lock"))
        except Locked:
            raise ConfigurationError(f"{path}: another process is writing it") from None
        self._file = path.open("a+b", buffering=0)
        try:
            self._read(made_from)
        except BaseException:
            self._file.close()
            self._lock.release()
            raise

    def _read(self, made_from: Mapping[str, Any]) -> None:
        self._file.seek(0)
        lines = self._file.read().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):
            self._file.truncate(sum(map(len, lines[:-1])))
            lines.pop()
        if not lines:
            self._write(made_from)
            return
        try:
            before, *accepted = map(json.loads, lines)
            self.texts = {(line["entry"], line["paraphrase"]): line["text"] for line in accepted}
            changed = [name for name in made_from if before[name] != made_from[name]]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path}: damaged; remove it to start over") from error
        if changed:
            raise ConfigurationError(
                f"{self.path}: begun with another {' and another '.join(changed)}; repeat that command, or remove the "
                "file to start over"
            )

    def _write(self, line: Mapping[str, Any]) -> None:
        """Append a line, all of it or nothing; OSError with the file's name if the disk is full."""
        content, end = json.dumps(line, ensure_ascii=False).encode() + b"\n", self._file.seek(0, os.SEEK_END)
        try:
            if self._file.write(content) < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._file.truncate(end)
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def add(self, place: Place, text: str) -> bool:
        """Keep a text. False if its entry has the same one already, or the journal is closed."""
        with self._mutex:
            if self._file.closed or any(
                words(text) == words(other) for (entry, _), other in self.texts.items() if entry == place[0]
            ):
                return False
            self._write({"entry": place[0], "paraphrase": place[1], "text": text})
            self.texts[place] = text
            return True

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._mutex:
            self._file.close()
            if not self.texts:
                self.path.unlink(missing_ok=True)
        self._lock.release()
