"""Commands that errors advise: each is pasted into bash, and does there what the error states.

bash finds stubs of the programs, which record their arguments; these are then given to the command itself.
"""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from analysis import locations, results
from analysis.instances import Instances
from analysis.study.plan_file import read_plan
from olmo.config import load
from scripts import get_dataorder, get_model
from tests.test_house import modules

ROOT = Path(__file__).resolve().parents[1]
COMMAND = r"(?:python -m|bash scripts/|(?<=with: )make )"
STUB = f"#!{sys.executable}\nimport json, sys\nopen('called', 'w').write(json.dumps(sys.argv))\n"
CONFIG = "max_duration: 3\n"


def existing_order(patch: pytest.MonkeyPatch) -> None:
    Path("an order").write_bytes(b"1234")
    get_dataorder.main(["--output", "an order"])


def raising(call: Callable[..., Any], *arguments: Any) -> Callable[[pytest.MonkeyPatch], Any]:
    return lambda _: call(*arguments)


# What ends in an error, or prints or returns a line, with commands that help.
ADVICE: dict[str, Callable[[pytest.MonkeyPatch], Any]] = {
    "an unknown key": raising(load, "run.yaml", ["--zzz=1"]),
    "no coefficients": raising(results.find_coefficients, Path("a folder's")),
    "no data order": raising(Instances.official, "7B", 3),
    "no checkpoints": raising(locations.checkpoint_locations, ["all"], "1B", []),
    "no report": raising(read_plan, Path("nowhere")),
    "an unknown checkpoint": lambda _: get_model.instead("https://elsewhere/step7/"),
    "a checkpoint of the hub": lambda _: get_model.instead("https://x/ai2-llm/olmo-small/x/step738020-unsharded/"),
    "an existing order": existing_order,
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the configurations and shell scripts of the project, and stubs of what they start."""
    monkeypatch.chdir(tmp_path)
    for path in (*ROOT.glob("configs/**/*.yaml"), *ROOT.glob("scripts/*.sh")):
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    Path("run.yaml").write_text(CONFIG)
    for name in ("bin/python", "bin/make", ".venv/bin/python"):
        stub = tmp_path / name
        stub.parent.mkdir(parents=True, exist_ok=True)
        stub.write_text(STUB)
        stub.chmod(0o755)
    return tmp_path


def advice(name: str, patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    try:
        with patch.context() as context:
            found = ADVICE[name](context)
    except (ValueError, OSError) as error:
        return str(error)
    return found or capsys.readouterr().out


def pasted(line: str, place: Path) -> list[str]:
    """The arguments, with its name, of the program that bash starts for a line."""
    (place / "called").unlink(missing_ok=True)
    environment = {**os.environ, "PATH": f"{place / 'bin'}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", line], cwd=place, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), line
    called = json.loads((place / "called").read_text())
    return [Path(called[0]).name, *called[1:]]


@pytest.mark.parametrize("name", ADVICE)
def test_a_command_in_an_error_is_one_that_works(
    name: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = re.findall(rf"{COMMAND}.*?(?:;|$)", advice(name, monkeypatch, capsys).strip())
    assert lines
    for line in lines:
        program, *arguments = pasted(line, place)
        if program == "make":
            assert f"\n{arguments[0]}:" in (ROOT / "Makefile").read_text()
        elif "--help-config" in arguments:
            importlib.import_module(arguments[1]).main(arguments[2:])
            assert "max_duration" in capsys.readouterr().out
        else:  # --help is printed only if all before it is understood
            with pytest.raises(SystemExit) as end:
                importlib.import_module(arguments[1]).main([*arguments[2:], "--help"])
            assert end.value.code == 0


def test_a_path_in_a_command_is_one_word(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    for name, path in (("no coefficients", "a folder's"), ("an existing order", "an order")):
        [line] = re.findall(rf"{COMMAND}[^;]*", advice(name, monkeypatch, capsys))
        assert pasted(line, place)[-1] == path


@pytest.mark.parametrize(
    ("flag", "key", "value"),
    [
        ("--data.paths=[a {00..11}.npy, b.npy]", "paths", ["a {00..11}.npy", "b.npy"]),
        ("--data.paths=part-{000..004}.npy", "paths", ["part-{000..004}.npy"]),
        ("--data.paths=$HOME.npy", "paths", ["$HOME.npy"]),
    ],
)
def test_a_flag_in_an_error_gives_the_value_that_was_meant(flag: str, key: str, value: Any, place: Path) -> None:
    with pytest.raises(ValueError) as raised:
        load("run.yaml", [flag])
    given = re.search(r"'?--data.*$", str(raised.value).rpartition("; ")[2])
    assert given is not None
    _, _, fixed = pasted(f"python run {given[0]}", place)
    assert getattr(load("run.yaml", [fixed]).data, key) == value


def test_a_missing_value_is_a_word_of_the_shell(place: Path) -> None:
    with pytest.raises(ValueError) as raised:
        load("run.yaml", ["--run_name", "a $name; it's"])
    _, fixed = pasted("python " + str(raised.value).rpartition("write ")[2], place)
    assert load("run.yaml", [fixed]).run_name == "a $name; it's"


def texts(path: Path) -> Iterator[str]:
    """The strings of a module that are neither docstrings nor the lines of a description, whole or as parts."""
    tree = ast.parse(path.read_text("utf-8"))
    alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in alone:
            yield node.value


def test_every_command_in_the_source_is_among_these(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    known = " ".join(advice(name, monkeypatch, capsys) for name in ADVICE)
    for module, path in modules().items():
        if module.startswith("scripts.benchmarks") or module == "olmo.config.help":  # not of errors
            continue
        for text in texts(path):
            usage = text.startswith("python -m ") and " " not in text.removeprefix("python -m ")  # prog of a parser
            if re.search(COMMAND + r"\S", text) and not usage:
                part = text.strip().splitlines()[0]
                assert part in known, f"{path}: advises {part!r}; add it to ADVICE"


def test_quoted_words_survive_bash(place: Path) -> None:
    """The stub itself: what bash makes of a line is what the program receives."""
    words = ["a b", "c'd", "{0..3}", "$HOME", "*"]
    assert pasted(f"python {shlex.join(words)}", place)[1:] == words
