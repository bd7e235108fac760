"""Commands print their help, and refuse wrong arguments, without importing what takes seconds."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import olmo
from tests.test_house import ROOT, is_command, modules

SLOW = ("torch", "transformers", "datasets", "pandas", "pyarrow", "matplotlib", "huggingface_hub", "olmo_eval", "boto3")
# Without flags: processes that other commands start, and what prints pages of the documentation.
NO_FLAGS = (
    "scripts.benchmarks.contestants",
    "scripts.gpu.box",
    "scripts.documentation.__main__",
    "olmo.config.__main__",
)
# Arguments that are refused, and what the line on stderr names.
WRONG = [
    (["scripts.train", "configs/tiny/pretrain.yaml", "--optimizer.learning_rate=abc"], "optimizer.learning_rate"),
    (["scripts.train", "missing.yaml"], "missing.yaml"),
    (["scripts.inspect_data", "configs/tiny/pretrain.yaml", "--step=1", "--optimizer.lr=1"], "optimizer.lr"),
    (["analysis.entropy", "--checkpoint", "missing", "--output", "results"], "missing"),
    (["analysis.entropy", "--checkpoint", "olmo", "--data_sise", "4"], "--data_sise"),
    (["analysis.change_parameters", "--step", "1", "--resuscitation_ratio", "x", "--amplifying_factor", "2"], "ratio"),
    (["analysis.score", "missing", "--tasks", "paper"], "missing"),
    (["analysis.entropy_series", "results", "--x", "time"], "--x"),
    (["analysis.report", "run", "--chekc"], "--chekc"),
    (["analysis.acquisition", "run", "--window", "0"], "--window"),
    (["scripts.convert", "missing", "new", "--to", "hf"], "missing"),
    (["scripts.study", "missing.yaml"], "missing.yaml"),
    (["scripts.bench", "--only", "nothing"], "nothing"),
]
PROGRAM = """
import contextlib, importlib, io, json, sys
from olmo.exceptions import exit_status
slow, helped, wrong = json.loads(sys.argv[1])
found = []
for name, *arguments in [*([name, "--help"] for name in helped), *wrong]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = exit_status(importlib.import_module(name).main, arguments)
        except SystemExit as end:  # of argparse, after the help
            status = end.code
    imported = [module for module in slow if module in sys.modules]
    found.append([name, status, out.getvalue(), err.getvalue(), imported])
print(json.dumps(found))
"""


def test_help_and_refusals_import_nothing_slow() -> None:
    commands = [module for module in modules() if is_command(module) and module not in NO_FLAGS]
    assert len(commands) >= 20
    asked = json.dumps([SLOW, commands, [arguments for arguments, _ in WRONG]])
    done = subprocess.run([sys.executable, "-c", PROGRAM, asked], cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    for name, status, out, _, imported in found[: len(commands)]:
        assert status == 0 and len(out.splitlines()) > 3, name
        assert not imported, f"{name} --help imports {', '.join(imported)}"
    for (arguments, named), (_, status, _, err, imported) in zip(WRONG, found[len(commands) :], strict=True):
        assert status in (1, 2) and named in err and len(err.splitlines()) == 1, (arguments, err)
        assert not imported, f"{' '.join(arguments)} imports {', '.join(imported)}"


def test_packages_have_the_names_that_they_import_on_use() -> None:
    assert olmo.__file__ is not None
    for package in ("checkpoint", "distributed", "memory", "model", "train"):
        module = importlib.import_module(f"olmo.{package}")
        files = {path.stem for path in Path(olmo.__file__).with_name(package).glob("*.py")}
        names = set(dir(module)) - files
        assert names and all(getattr(module, name) is not None for name in names)
        # A function with the name of a file would be replaced by that module once it is imported.
        assert not any(callable(getattr(module, name)) for name in set(dir(module)) & files)


def test_save_is_found_before_the_method_that_nnsight_adds_to_every_object() -> None:
    assert "save" in vars(importlib.import_module("olmo.checkpoint"))
