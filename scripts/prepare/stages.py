"""The stages of a demo: commands in processes of their own, of which finished ones are not repeated."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from olmo.console import clock
from olmo.exceptions import ConfigurationError, Terminated
from olmo.files.atomic import write_text

# The files of the published fictional knowledge, by setting.
PUBLISHED = {
    "paraphrase": "fictional_knowledge_paraphrased_paraphrase70.json",
    "once": "fictional_knowledge_paraphrased_once60.json",
}


class Stages:
    """Runs commands, and records in `folder`/demo.json which have finished, with their time and memory.

    `configs` is the folder of configs/ that the commands read.
    """

    def __init__(self, folder: Path, total: int, configs: str):
        self.file, self.total, self.number = folder / "demo.json", total, 0
        self.manifest: dict[str, Any] = {"stages": []}
        if self.file.is_file():
            try:
                self.manifest = json.loads(self.file.read_text(encoding="utf-8"))
                self.manifest["stages"] = list(self.manifest["stages"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{self.file}: damaged: {error}; remove it, and all stages run again") from error
        files = sorted(Path("configs", configs).glob("*.yaml"))
        self.configs = hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()
        self.stale = False

    def run(self, name: str, module: str, arguments: Sequence[str], output: Path) -> None:
        """Run `python -m module arguments`, unless the same command has finished and `output` is there.

        A stage also runs again when a configuration has changed or an earlier stage has run, because it may use that
        stage's output.
        """
        self.number += 1
        command = ["python", "-m", module, *arguments]
        same = {"command": command, "configs": self.configs}
        done = [s for s in self.manifest["stages"] if same.items() <= s.items() and output.exists() and not self.stale]
        head = f"[{self.number}/{self.total}] {name}"
        if done:
            print(f"{head}: done before, in {clock(done[0]['seconds'])}", flush=True)
            return
        print(f"{head}: {shlex.join(command)}", flush=True)
        self.stale = True
        # From here on no other command counts as finished with this output.
        kept = [s for s in self.manifest["stages"] if s["name"] != name and s.get("output") != str(output)]
        self.manifest["stages"] = kept
        self.save()
        started = time.monotonic()
        process = subprocess.Popen([sys.executable, *command[1:]])
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except KeyboardInterrupt as interrupt:
            if isinstance(interrupt, Terminated):  # control-C has reached the stage as well
                process.send_signal(interrupt.args[0])
            _end(process)
            raise
        code = os.waitstatus_to_exitcode(status)
        process.returncode = code
        if code:
            raise ValueError(f"stage '{name}' failed with status {code}: {shlex.join(command)}")
        seconds = time.monotonic() - started
        unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
        peak = usage.ru_maxrss * unit / 2**20
        stage = {"name": name, **same, "output": str(output), "seconds": seconds, "peak_memory_mib": peak}
        self.manifest["stages"] = [*kept, stage]
        self.save()

    def save(self) -> None:
        write_text(self.file, json.dumps(self.manifest, indent=1) + "\n")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Wait for the end of an interrupted stage, which has received the signal and may be writing a file."""
    try:
        process.wait(timeout=10)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):  # it ignores the signal, or the user does not want to wait
        process.kill()
        process.wait()


def check_published(source: Path) -> None:
    """Raise ConfigurationError where a folder lacks a file of the published fictional knowledge."""
    for name in PUBLISHED.values():
        if not (source / name).is_file():
            raise ConfigurationError(f"--published: {source / name} is missing")


def copy_published(source: Path, folder: Path, counts: Mapping[str, int]) -> None:
    """The first entries of the published data, so many of each setting, under the names that the configurations
    expect."""
    folder.mkdir(parents=True, exist_ok=True)
    for setting, name in PUBLISHED.items():
        entries = json.loads((source / name).read_text(encoding="utf-8"))[: counts[setting]]
        (folder / f"fictional_knowledge_{setting}.json").write_text(json.dumps(entries), encoding="utf-8")
