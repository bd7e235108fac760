"""A `python` that starts commands within a tenth of a second: a fork of a process that has imported torch and others.

`warm_python()` is the path of an executable that stands for `python -m MODULE` and `python FILE.py` where a test is
about what a process does and not about how it is started. Each command is a process of its own, with its exit status
and streams, which SIGHUP, SIGINT, SIGTERM, SIGUSR1 and SIGUSR2 reach. Whatever else is asked of it, another value of a
variable that imports read included, is left to the real python, as is everything outside Linux. tests/warm_server.py
is the other side.
"""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_SHARED = "WARM_PYTHON"  # the folder of a server that another process has started
_CLIENT = """#!{python} -IS
import json, os, signal, socket, sys

link = socket.socket(socket.AF_UNIX)
link.connect({address!r})
request = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(link, [len(request).to_bytes(4, "little")], [0, 1, 2])
link.sendall(request)
child = int.from_bytes(link.recv(4), "little")
if not child:
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, lambda number, frame: os.kill(child, number))
status = os.waitstatus_to_exitcode(int.from_bytes(link.recv(4), "little"))
if status < 0:
    if status != -signal.SIGKILL:
        signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
os._exit(status)
"""


def environment() -> dict[str, str]:
    """Of commands: what tests inherit, our code wherever they run, one thread, and neither GPUs nor other processes.

    The hub is that of a test that names it: a request to the real one may be tried again for a minute.
    """
    inherited = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
    return {
        "HF_HUB_OFFLINE": "1",
        **inherited,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


@cache
def warm_python() -> str:
    """The path of the executable; its folder has it as `python` and `python3`. It serves until this process ends, or
    that which has shared it."""
    if sys.platform != "linux":
        return sys.executable
    folder, server = (Path(os.environ[_SHARED]), None) if _SHARED in os.environ else _begin()
    while not (folder / "address").exists():
        assert server is None or server.poll() is None, "the process that forks has ended"
        assert folder.exists(), "the process that shares its server has ended"
        time.sleep(0.02)
    return str(folder / "python")


def share() -> None:
    """Let processes that this one starts use its server, which may still be importing."""
    if sys.platform == "linux":
        os.environ[_SHARED] = str(_begin()[0])


def _begin() -> tuple[Path, subprocess.Popen[bytes]]:
    """Start a server and write its clients; returns their folder, in which `address` appears once it can be asked."""
    made = tempfile.TemporaryDirectory(prefix="warm")
    folder = Path(made.name)
    for name in ("python", "python3"):
        client = folder / name
        client.write_text(_CLIENT.format(python=sys.executable, address=str(folder / "address")))
        client.chmod(0o755)
    command = [sys.executable, str(Path(__file__).with_name("warm_server.py")), str(folder / "address")]
    server = subprocess.Popen(command, env=environment(), stdin=subprocess.PIPE)

    def end() -> None:
        server.communicate()
        made.cleanup()

    atexit.register(end)
    return folder, server
