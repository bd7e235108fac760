"""The process behind tests/warm.py: it has imported what takes seconds, and forks for each command that a client sends.

A forked process runs `-m MODULE ARGUMENTS` or `FILE.py ARGUMENTS` as `python` does, with the client's folder,
environment and streams. None of our own modules is imported before the fork. The server ends when its standard input is
closed.
"""

from __future__ import annotations

import gc
import importlib
import io
import json
import os
import runpy
import select
import signal
import socket
import sys
from contextlib import suppress

MODULES = (  # not pyarrow and what imports it, which starts a thread; not huggingface_hub, which reads variables
    *("boto3", "fsspec", "matplotlib", "omegaconf", "requests", "tokenizers"),
    *("safetensors.torch", "torch", "torch._dynamo", "torch.nn.parallel", "torch.distributed.checkpoint"),
    *("torch.distributed.checkpoint.state_dict", "torch.distributed.fsdp", "torch.distributed.launcher.api"),
)
# What is read when modules are imported: with another value of these, a command needs a process of its own.
READ_EARLY = ("CUDA", "LANG", "LC_", "MALLOC_", "MKL_", "MPL", "OMP_", "PYTHON", "TORCHINDUCTOR", "TORCH_ALLOW")
# Of these, what `begin` applies or what is read later. Python itself may set LC_CTYPE, and torch inductor's folder.
NOT_READ = ("LC_CTYPE", "PYTHON_EXEC", "PYTHONDONTWRITEBYTECODE", "PYTHONPATH", "PYTHONUNBUFFERED")
NOT_READ += ("TORCHINDUCTOR_CACHE_DIR",)


def read_early(environment: dict[str, str]) -> dict[str, str]:
    return {k: v for k, v in environment.items() if k.startswith(READ_EARLY) and k not in NOT_READ}


AT_START = read_early(dict(os.environ))  # imports set some


def receive(link: socket.socket) -> tuple[list[str], str, dict[str, str], list[int]] | None:
    """Arguments, folder, environment and streams; None if the command cannot be run in a fork."""
    head, streams, _, _ = socket.recv_fds(link, 4, 3)
    size, body = int.from_bytes(head, "little"), b""
    while len(body) < size and (piece := link.recv(size - len(body))):
        body += piece
    # Incomplete if the client was killed.
    arguments, folder, environment = json.loads(body) if size and len(body) == size else ([""], "", {})
    if arguments[:1] == ["-u"]:
        arguments = arguments[1:]
    if not arguments[0].endswith((".py", "-m")) or read_early(environment) != AT_START:
        for stream in streams:
            os.close(stream)
        return None
    return arguments, folder, environment, streams


def serve(path: str) -> list[str]:
    """Fork for each command; returns its arguments in the forked process."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{path}.new")
    listener.listen(64)
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake)
    children: dict[int, socket.socket] = {}
    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads cannot fork safely"
    gc.collect()
    gc.freeze()
    os.rename(f"{path}.new", path)
    while True:
        ready, _, _ = select.select([0, woken, listener, *children.values()], [], [])
        if 0 in ready:
            for child in children:
                os.kill(child, signal.SIGKILL)
            os._exit(0)
        if woken in ready:
            os.read(woken, 4096)
            for child in [
                child for child in children if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            ]:
                _, status = os.waitpid(child, 0)
                with children.pop(child) as link, suppress(OSError):  # the client is gone
                    link.sendall(status.to_bytes(4, "little"))
        for child, link in children.items():
            if link in ready and link.fileno() >= 0:  # the client was killed, so its command is
                os.kill(child, signal.SIGKILL)
        if listener not in ready:
            continue
        link, _ = listener.accept()
        request = receive(link)
        if request is None:
            with link, suppress(OSError):  # the client is gone
                link.sendall(bytes(4))
            continue
        arguments, folder, environment, streams = request
        child = os.fork()
        if child == 0:
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGCHLD, signal.SIGPIPE):
                signal.signal(number, signal.SIG_DFL if number == signal.SIGCHLD else signal.SIG_IGN)
            for other in (listener, link, *children.values()):
                other.close()
            os.close(woken)
            os.close(wake)
            begin(folder, environment, streams)
            return arguments
        for stream in streams:
            os.close(stream)
        link.sendall(child.to_bytes(4, "little"))
        children[child] = link


def begin(folder: str, environment: dict[str, str], streams: list[int]) -> None:
    """Take over the client's folder, environment and streams."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    unbuffered = bool(environment.get("PYTHONUNBUFFERED"))
    binary = open(1, "wb", 0 if unbuffered else -1, closefd=False)  # noqa: SIM115
    sys.stdout = io.TextIOWrapper(binary, line_buffering=os.isatty(1), write_through=unbuffered)
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    os.chdir(folder)
    before, now = (path.split(os.pathsep) for path in (os.environ["PYTHONPATH"], environment.get("PYTHONPATH", "")))
    os.environ.clear()
    os.environ.update(environment)
    sys.path[1 : 1 + len(before)] = filter(None, now)
    importlib.invalidate_caches()


if __name__ == "__main__":
    sys.modules["triton"] = None  # type: ignore[assignment]  # for GPUs only, and prints leaks at exit
    for name in MODULES:
        importlib.import_module(name)
    del sys.modules["triton"]
    arguments = serve(sys.argv[1])
    sys.orig_argv = [sys.executable, *arguments]
    if arguments[0] == "-m":
        sys.path[0], sys.argv = os.getcwd(), arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.path[0], sys.argv = os.path.dirname(os.path.abspath(arguments[0])), arguments
        runpy.run_path(arguments[0], run_name="__main__")
