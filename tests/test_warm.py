"""The process that forks commands for tests: it must not leave them to the real python unnoticed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.warm import environment, warm_python


@pytest.mark.skipif(sys.platform != "linux", reason="commands are forked on Linux only")
def test_commands_are_forked_whatever_torch_has_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "imported.py").write_text("import sys; print('torch._dynamo' in sys.modules)")
    warm = warm_python()  # before the variable is set, as the server of a run of all tests is started
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # set by imports of other tests as well
    for python, forked in ((warm, "True\n"), (sys.executable, "False\n")):
        command = [python, str(tmp_path / "imported.py")]
        assert subprocess.run(command, env=environment(), capture_output=True, text=True).stdout == forked
