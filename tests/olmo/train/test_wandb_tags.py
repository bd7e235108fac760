"""Runs that somebody cancels with a tag on Weights & Biases, of which wandb's own client asks a server of our own.

As a program, this file runs all cases as forks (importing takes longer than training), and prints how they ended.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import time
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from olmo.exceptions import exit_status
from olmo.train import stopping as interruption
from olmo.train.stopping import Tags
from scripts.train import main as train_command
from tests.olmo.train.test_restart import in_a_fork
from tests.running import ROOT, checkpoints, command, series, write_world
from tests.tracking import ENTITY, PROJECT, Tracker, tracking

pytest.importorskip("wandb", reason="pip install wandb to run its test")

SETTINGS = (
    *(f"--wandb.entity={ENTITY}", f"--wandb.project={PROJECT}", "--canceled_check_interval=2"),
    *("--extra_steps_after_cancel=3", "--save_interval=1000", "--max_duration=100000"),
)


def run(world: Path, server: Tracker, name: str, processes: int, answer: str, *settings: str) -> dict[str, Any]:
    """Train with a server that answers so, and tags the run once it has been asked twice."""
    server.answer, server.asked, server.tags = answer, 0, ["watching", "cancelled-not"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    ranks = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE=str(processes), RANK=str(rank))
            mode = "offline" if answer == "offline" else "online"
            os.environ.update({**server.environment(world), "WANDB_MODE": mode, "LOCAL_RANK": "0"})
            said = os.open(world / f"{name}{rank}.log", os.O_CREAT | os.O_WRONLY)
            os.dup2(said, 1)
            os.dup2(said, 2)
            interruption._PAUSE, interruption._REQUEST_TIMEOUT = 0.0, 60  # type: ignore[assignment]
            arguments = [str(world / "plain.yaml"), f"--save_folder={world / name}", *SETTINGS, *settings]
            os._exit(exit_status(train_command, arguments))
        ranks.append(child)
    started = time.monotonic()
    while answer == "tags" and server.asked < 2 and time.monotonic() - started < 60:
        time.sleep(0.01)
    server.tags = ["watching", "Canceled"]
    status = [os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in ranks]
    log = (world / f"{name}0.log").read_text()
    end = [line for line in log.splitlines() if line.startswith(("error: ", "interrupted: "))]
    return {"status": status, "end": end, "seconds": time.monotonic() - started, "asked": server.asked}


def questions(server: Tracker, home: Path) -> dict[str, Any]:
    """What single questions find: whether the run is cancelled, and what was warned of, the second time none."""
    os.environ.update(server.environment(home))
    interruption._REQUEST_TIMEOUT = 1
    told: list[str] = []
    logging.getLogger("olmo").addFilter(lambda record: told.append(record.getMessage()) or False)  # type: ignore[func-returns-value]
    found = {}
    cases: list[tuple[str, str | int, list[str]]] = [
        *((tag, "tags", ["a", tag]) for tag in ("cancel", "canceled", "cancelled", "CANCEL", "cancels")),
        *(("none", "tags", []), ("no run", "nothing", []), ("late", "late", ["cancel"]), ("403", 403, ["cancel"])),
        ("gone", "tags", ["cancel"]),
    ]
    for name, server.answer, server.tags in cases:
        if name == "gone":
            os.environ["WANDB_BASE_URL"] = "http://127.0.0.1:9"
        tags = Tags(SimpleNamespace(path=f"{ENTITY}/{PROJECT}/abc", offline=False, disabled=False))
        told.clear()
        seconds = []
        for _ in range(1 if name == "late" else 2):
            tags._next, started = 0.0, time.monotonic()
            tags.request()
            seconds.append(time.monotonic() - started)
            assert tags._request is not None
            tags._request.join()
        found[name] = [tags.cancel, [line[:65] for line in told], max(seconds)]
    return found


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def report(world: Path) -> dict[str, Any]:
    done = command([str(ROOT / "tests/olmo/train/test_wandb_tags.py"), str(world)], world)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_tag_ends_all_processes_saved(report: dict[str, Any], world: Path) -> None:
    found = report["tagged"]
    assert found["status"] == [75, 75] and found["asked"] >= 2
    (saved,) = checkpoints(world / "tagged")
    step = int(saved.removeprefix("step"))
    end = (
        f"interrupted: a tag on Weights & Biases at step {step} (remove it to resume); saved {world / 'tagged' / saved}"
    )
    assert found["end"] == [end + "; add --try_load_latest_save to resume"]
    assert max(series(world / "tagged")) == step + 3


def test_a_server_that_does_not_answer_holds_nothing_up(report: dict[str, Any], world: Path) -> None:
    found = report["late"]
    assert found["status"] == [0] and found["asked"] == 1 and found["seconds"] < 30  # it would be asked for 60
    assert max(series(world / "late")) == 60


def test_offline_nothing_is_asked(report: dict[str, Any], world: Path) -> None:
    assert report["offline"]["status"] == [0] and report["offline"]["asked"] == 0
    assert max(series(world / "offline")) == 20


WARNING = "wandb: cannot read whether the run was tagged to be cancelled ("


@pytest.mark.parametrize(
    ("case", "cancel", "warns"),
    [
        *((tag, True, False) for tag in ("cancel", "canceled", "cancelled", "CANCEL")),
        *((name, False, False) for name in ("cancels", "none")),
        *((name, False, True) for name in ("no run", "late", "403", "gone")),
    ],
)
def test_what_a_question_finds(report: dict[str, Any], case: str, cancel: bool, warns: bool) -> None:
    found, told, seconds = report["questions"][case]
    assert found is cancel and len(told) == warns and all(line.startswith(WARNING) for line in told)
    assert seconds < 0.5  # that training waits


def test_a_run_without_wandb_is_not_asked_about() -> None:
    tags = Tags()
    tags.request()
    assert tags._request is None and not tags.cancel


if __name__ == "__main__":
    for module in ("torch._dynamo", "pandas"):  # every fork would anew
        import_module(module)
    place = Path(sys.argv[1])
    with tracking() as server:
        found = {
            "tagged": run(place, server, "tagged", 2, "tags"),
            "late": run(place, server, "late", 1, "late", "--stop_at=60"),
            "offline": run(place, server, "offline", 1, "offline", "--stop_at=20"),
        }

    def ask() -> None:
        with tracking() as own:
            (place / "questions.json").write_text(json.dumps(questions(own, place)))

    assert in_a_fork(ask) == 0
    found["questions"] = json.loads((place / "questions.json").read_text())
    print(json.dumps(found))
