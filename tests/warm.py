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
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
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
    """The path of the executable; its folder has it as `python` and `python3`. It serves until this process ends."""
    if sys.platform != "linux":
        return sys.executable
    folder = tempfile.TemporaryDirectory(prefix="warm")
    address = f"{folder.name}/address"
    for name in ("python", "python3"):
        client = Path(folder.name) / name
        client.write_text(_CLIENT.format(python=sys.executable, address=address))
        client.chmod(0o755)
    server = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("warm_server.py")), address],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdout is not None and server.stdout.readline() == "ready\n"

    def end() -> None:
        server.communicate()
        folder.cleanup()

    atexit.register(end)
    return f"{folder.name}/python"
