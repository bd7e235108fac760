"""Files of average coefficients that cannot be used."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from analysis import change_parameters
from analysis.resuscitation import resuscitate
from olmo.exceptions import exit_status
from olmo.memory.rescaling import load_multipliers
from tests.analysis.editing import LENGTH, change, coefficients, failing, measure, measure_to, uneven_model, write
from tests.reference import by_layer, table_of
from tests.running import modes_hold


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "tokens.npy"
    np.random.default_rng(0).integers(2, 128, 40 * LENGTH).astype("<u2").tofile(path)
    return path


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, tokens: Path) -> Path:
    folder = write(tmp_path_factory.mktemp("measured") / "step90-unsharded", uneven_model())
    measure(folder, tokens)
    return folder


@pytest.fixture
def folder(tmp_path: Path, measured: Path) -> Iterator[Path]:
    """A measured checkpoint of the test's own."""
    yield Path(shutil.copytree(measured, tmp_path / "step90-unsharded"))


def test_coefficients_are_found_where_output_put_them(
    tmp_path: Path, tokens: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path / "step90-unsharded", uneven_model())
    results, name = tmp_path / "results", "resuscitation_ratio0.5_amplifying2.0.safetensors"
    argv = ["--checkpoint", folder, "--resuscitation_ratio", 0.5, "--amplifying_factor", 2.0]
    status, said = failing(capsys, *argv)
    assert status == 1 and "name that of another folder with --coefficients, or measure it first: python -m" in said
    measure_to(folder, tokens, results / "one")
    capsys.readouterr()
    change(folder, 0.5, 2.0)
    found = results / "one/mlp_average_coefficients.safetensors"
    assert capsys.readouterr().out.startswith(f"coefficients: {found}\n")
    expected = table_of(resuscitate(by_layer(load_file(found)["mlp_average_coefficients"]), 0.5, 2.0).multipliers)
    assert torch.equal(table_of(load_multipliers(folder / name).values), expected)
    measure_to(folder, tokens, results / "two", "--coefficient", "relu")
    capsys.readouterr()
    assert failing(capsys, *argv) == (
        2,
        f"error: {folder}: measured several times, in {results / 'one'}, {results / 'two'}; name one with "
        "--coefficients\n",
    )
    change(folder, 0.5, 2.0, "--coefficients", results / "one", "--output", tmp_path / "by folder.safetensors")
    assert torch.equal(table_of(load_multipliers(tmp_path / "by folder.safetensors").values), expected)
    shutil.rmtree(results / "two")
    change(folder, 0.5, 2.0, "--output", tmp_path / "again.safetensors")
    assert capsys.readouterr().out.count(f"coefficients: {found}\n") == 1
    status, said = failing(capsys, *argv, "--coefficients", tmp_path)
    assert status == 2 and "no mlp_average_coefficients.safetensors in this folder" in said


def test_coefficients_of_another_checkpoint_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write(tmp_path / "other", uneven_model(1))
    argv = ["--resuscitation_ratio", 0.5, "--amplifying_factor", 2]
    given = folder / "mlp_average_coefficients.safetensors"
    status, said = failing(capsys, "--checkpoint", other, *argv, "--coefficients", given)
    assert status == 1 and f"{given}: measured on another checkpoint than {other}" in said
    assert not list(other.glob("resuscitation*"))


def test_coefficients_that_may_not_be_read(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "mlp_average_coefficients.safetensors"
    path.chmod(0)
    argv = ["--checkpoint", folder, "--resuscitation_ratio", 0.5, "--amplifying_factor", 2]
    with modes_hold():
        assert failing(capsys, *argv) == (1, f"error: {path}: permission denied\n")


def test_an_unmeasured_checkpoint_says_what_to_do(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "mlp_average_coefficients.safetensors").unlink()
    argv = ["--checkpoint", folder, "--resuscitation_ratio", 0.5, "--amplifying_factor", 2]
    status, said = failing(capsys, *argv)
    assert status == 1 and "measure it first: python -m analysis.entropy --checkpoint " in said


@pytest.mark.parametrize("kind", ["shape", "layers", "dict", "vector", "damaged"])
def test_coefficients_that_do_not_fit_are_named(folder: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "given.pt"
    average = coefficients(folder)
    content: Any = {
        "shape": average[:, :24].clone(),
        "layers": average[:1].clone(),
        "dict": {"a": average},
        "vector": average[0].clone(),
        "damaged": average,
    }[kind]
    torch.save(content, path)
    if kind == "damaged":
        path.write_bytes(path.read_bytes()[:100])
    argv = ["--checkpoint", folder, "--resuscitation_ratio", 0.5, "--amplifying_factor", 2, "--coefficients", path]
    status = exit_status(change_parameters.main, [str(a) for a in argv])
    *warnings, said = capsys.readouterr().err.splitlines()  # a warning that the file states no checkpoint
    assert status == 1 and said.startswith("error: ") and len(warnings) == (kind in ("shape", "layers"))
    assert ("given.pt" in said) if kind in ("dict", "vector", "damaged") else ("multipliers for" in said)
    assert not list(folder.glob("resuscitation*"))


class Bomb:
    def __init__(self, touched: Path):
        self.touched = touched

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.touched}'",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("plain", [True, False])
def test_hostile_coefficients_are_refused_and_run_nothing(
    folder: Path, tmp_path: Path, plain: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    path, touched = folder / "given.pt", tmp_path / "touched"
    if plain:
        path.write_bytes(pickle.dumps(Bomb(touched)))
    else:
        torch.save([coefficients(folder), Bomb(touched)], path)
    argv = ["--checkpoint", folder, "--resuscitation_ratio", 0.5, "--amplifying_factor", 2, "--coefficients", path]
    status, said = failing(capsys, *argv)
    assert status == 1 and "given.pt: damaged or not a file of tensors" in said
    assert not touched.exists()


def test_a_safetensors_file_of_something_else_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"else": torch.ones(2, 48)}, folder / "given.safetensors")
    argv = ["--checkpoint", folder, "--resuscitation_ratio", 0.5, "--amplifying_factor", 2]
    status, said = failing(capsys, *argv, "--coefficients", folder / "given.safetensors")
    assert status == 1 and "given.safetensors: not a file of average coefficients" in said
