"""What works without the packages of the extras, and what an error names where one of them is needed."""

from __future__ import annotations

import ast
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from analysis import acquisition, entropy_series, report
from analysis.result import Result
from analysis.score_settings import Settings
from olmo.checkpoint import s3
from olmo.config import EvaluatorConfig, TrainConfig
from olmo.data import ranges
from olmo.exceptions import MissingPackage, exit_status
from tests.analysis.series_folders import SERIES, names, run, run_of_three, tokens_file
from tests.run_folders import AFTER, BEFORE, probe_table, write_run
from tests.test_house import is_command, modules, tree

EXTRAS = {"accelerate", "boto3", "botocore", "cached_path", "liger_kernel", "matplotlib", "olmo_eval", "peft"}
EXTRAS |= {"bitsandbytes", "gguf", "submitit", "tensorboard", "torchmetrics", "wandb"}


@pytest.fixture
def core(monkeypatch: pytest.MonkeyPatch) -> None:
    """The core alone: an import of another package raises ModuleNotFoundError."""
    for name in EXTRAS | {module for module in sys.modules if module.partition(".")[0] in EXTRAS}:
        monkeypatch.setitem(sys.modules, name, None)


@cache
def imported_first(module: str) -> set[str]:
    """What a module imports by absolute names when it is itself imported, with the names that it takes from there."""
    found: set[str] = set()
    for node in tree(module).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_only_modules_that_draw_import_a_package_of_an_extra_at_once() -> None:
    """And no command imports one of these modules before its arguments are read."""
    drawing: set[str] = set()
    for module in modules():
        packages = {name.partition(".")[0] for name in imported_first(module)} & EXTRAS
        assert packages <= {"matplotlib"}, module
        drawing |= {module} if packages else set()
    assert drawing
    while more := {module for module in modules() if imported_first(module) & drawing} - drawing:
        drawing |= more
    assert not [module for module in drawing if is_command(module) or not module.startswith("analysis.")]


def test_entropies_of_a_series_are_measured_without_them(
    core: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, tokens = run_of_three(tmp_path / "run"), tokens_file(tmp_path)
    assert run("--checkpoint", folder / "step*", "--data", tokens, "--data_size", 4, "--output", tmp_path / "out") == 0
    assert names(tmp_path / "out") >= {SERIES} and not list((tmp_path / "out").glob("*.png"))
    left_out = ["no figures: matplotlib is not installed: pip install 'knowledge-entropy[plot]'"]
    assert caplog.messages == left_out
    caplog.clear()
    assert exit_status(entropy_series.main, [str(tmp_path / "out"), "--output", str(tmp_path / "again")]) == 0
    assert names(tmp_path / "again") == {SERIES} and caplog.messages == left_out
    with pytest.raises(MissingPackage, match=r"plot\(\): matplotlib .*'knowledge-entropy\[plot\]'"):
        Result.load(tmp_path / "out/step9-unsharded").plot()


def test_acquisition_is_measured_without_them(core: None, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_run(tmp_path / "run", {0: probe_table(BEFORE), 20: probe_table(AFTER)})
    assert exit_status(acquisition.main, [str(folder), "--output", str(tmp_path / "out")]) == 0
    assert names(tmp_path / "out") == {"acquisition.json", "acquisition.csv"}
    assert [message[:10] for message in caplog.messages] == ["no figures"]


@pytest.mark.parametrize(
    ("main", "argv", "line"),
    [
        (report.main, ["x", "--check"], "the report of a study: matplotlib is not installed: {}[plot]'"),
        (lambda _: ranges.RemoteFiles(["s3://b/a.npy"]), [], "s3://b/a.npy: boto3 is not installed: {}[s3]'"),
        (
            lambda _: Settings(TrainConfig(evaluators=[EvaluatorConfig("piqa", "downstream")])),
            [],
            "evaluators.piqa: olmo_eval (of ai2-olmo-eval) is not installed: {}[eval]'",
        ),
        (lambda _: s3.RemoteFolder("s3://b/run/"), [], "s3://b/run: boto3 is not installed: {}[s3]'"),
    ],
)
def test_what_needs_one_ends_at_once(
    core: None, main: Any, argv: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_status(main, argv) == 1
    assert capsys.readouterr().err == f"error: {line.format('pip install ' + chr(39) + 'knowledge-entropy')}\n"
