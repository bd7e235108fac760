"""`python -m analysis.change_parameters`: its command line and its errors."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from analysis import change_parameters
from olmo.exceptions import exit_status
from tests.analysis.editing import LENGTH, change, failing, measure, uneven_model, write
from tests.olmo.memory.test_locate import built
from tests.running import ROOT, modes_hold
from tests.running import command as process


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


@pytest.mark.parametrize(
    ("argv", "status", "said"),
    [
        (["--amplifying_factor", "2"], 2, "required: --resuscitation_ratio"),
        (["--resuscitation_ratio", "0.5"], 2, "required: --amplifying_factor"),
        (["--resuscitation_ratio", "0", "--amplifying_factor", "2"], 2, "ratio 0.0 is not in (0, 1]"),
        (["--resuscitation_ratio", "1.5", "--amplifying_factor", "2"], 2, "ratio 1.5 is not in (0, 1]"),
        (["--resuscitation_ratio", "half", "--amplifying_factor", "2"], 2, "invalid float value: 'half'"),
        (["--resuscitation_ratio", "0.5", "--amplifying_factor", "0"], 2, "factor 0.0 is not a positive number"),
        (["--resuscitation_ratio", "0.5", "--amplifying_factor", "nan"], 2, "factor nan is not a positive number"),
        (["--resuscitation_ratio", "0.5", "--amplifying_factor", "2", "--select", "best"], 2, "invalid choice: 'best'"),
        (["--resuscitation_ratio", "0.5", "--amplifying_factor", "2", "--format", "csv"], 2, "invalid choice: 'csv'"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_status_2(
    folder: Path, argv: list[str], status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found, shown = failing(capsys, "--checkpoint", folder, *argv)
    assert found == status and said in shown


@pytest.mark.parametrize("form", ["multipliers", "full"])
def test_a_place_that_cannot_be_written_is_one_line_that_names_it(
    folder: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--checkpoint", folder, "--resuscitation_ratio", 0.5, "--amplifying_factor", 2, "--format", form]
    folder.chmod(0o555)
    with modes_hold():
        status, said = failing(capsys, *argv)
    assert status == 1
    assert f"{folder}: cannot be written: permission denied; name another place with --output" in said


@pytest.mark.parametrize(("form", "suffix"), [("multipliers", ".safetensors"), ("full", ".pt")])
def test_a_full_disk_is_one_line_that_names_the_file(
    folder: Path, form: str, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--checkpoint", folder, "--resuscitation_ratio", 0.5, "--amplifying_factor", 2, "--format", form]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # files end here, as they do where a disk is full
    try:
        status, said = failing(capsys, *argv)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 1
    assert f"resuscitation_ratio0.5_amplifying2.0{suffix}" in said and "cannot be written" in said
    assert not [path for path in folder.iterdir() if "resuscitation" in path.name]


@pytest.mark.parametrize("form", ["multipliers", "full"])
def test_what_is_written_has_the_mode_that_the_umask_gives(folder: Path, form: str) -> None:
    before = os.umask(0o022)
    try:
        change(folder, 0.5, 2.0, "--format", form)
    finally:
        os.umask(before)
    [path] = folder.glob("resuscitation*")
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--layers", "0,two"], "expected layers such as 0,3,8-11"),
        (["--layers", "3-1"], "expected layers such as 0,3,8-11"),
        (["--layers", "2"], "layers 2: the model has memories in layers 0, 1"),
        (["--cap", "0"], "cap 0.0 is not a positive number"),
        (["--verify", "--format", "temperature"], "--verify: needs an edit of weights"),
        (["--verify", "--batch_size", "0"], "--batch_size must be at least 1"),
    ],
)
def test_options_that_make_no_sense(
    folder: Path, more: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--checkpoint", folder, "--resuscitation_ratio", 0.5, "--amplifying_factor", 2, *more]
    status, shown = failing(capsys, *argv)
    assert status == 2 and said in shown


def test_flags_without_effect(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--checkpoint", folder, "--resuscitation_ratio", 0.5, "--amplifying_factor", 2]
    for flag, value in (("--batch_size", 2), ("--device", "cpu")):
        assert failing(capsys, *argv, flag, value) == (2, f"error: {flag}: needs --verify\n")
    assert not list(folder.glob("resuscitation*"))
    change(folder, 0.5, 2.0, "--select", "random", "--seed", 0)
    assert not capsys.readouterr().err
    change(folder, 0.5, 2.0, "--select", "highest", "--seed", 0)
    assert capsys.readouterr().err == "warning: --seed has no effect with --select highest\n"


def test_one_checkpoint_at_a_time(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(folder, tmp_path / "step91-unsharded")
    argv = ["--resuscitation_ratio", 0.5, "--amplifying_factor", 2]
    pattern = tmp_path / "step9*"
    assert failing(capsys, "--checkpoint", pattern, *argv) == (
        2,
        f"error: --checkpoint {pattern}: 2 checkpoints match; name one\n",
    )
    change(tmp_path / "*0-unsharded", 0.5, 2.0)
    assert len(list(tmp_path.rglob("resuscitation*"))) == 1


def test_coefficients_are_no_url(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--checkpoint", folder, "--resuscitation_ratio", 0.5, "--amplifying_factor", 2]
    status, error = failing(capsys, *argv, "--coefficients", "https://h/c.safetensors")
    assert status == 2 and "--coefficients: https://h/c.safetensors: URLs are not read here; download the" in error


@pytest.mark.parametrize("more", [[], ["--coefficients", "c.safetensors"]])
def test_nothing_is_written_into_the_hubs_cache(more: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--checkpoint", "owner/name", "--resuscitation_ratio", 0.5, "--amplifying_factor", 2, *more]
    said = "error: --output: needed with a hub id, whose folder is the download cache\n"
    assert failing(capsys, *argv) == (2, said)


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt", "mlp_average_coefficients.safetensors"])
def test_an_edit_never_replaces_what_it_is_made_from(
    folder: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    form = "full" if name.endswith(".pt") else "multipliers"
    before = {path: path.read_bytes() for path in folder.iterdir()}
    argv = ["--checkpoint", folder, "--resuscitation_ratio", 0.5, "--amplifying_factor", 2, "--format", form]
    output = folder / ".." / folder.name / name
    said = f"error: --output {output}: names what the edit is made from; choose another name\n"
    assert failing(capsys, *argv, "--output", output) == (2, said)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_an_output_that_is_a_folder(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "new.safetensors").mkdir()
    argv = ["--checkpoint", folder, "--resuscitation_ratio", 0.5, "--amplifying_factor", 2]
    said = f"error: --output {tmp_path / 'new.safetensors'}: is a folder; name a file\n"
    assert failing(capsys, *argv, "--output", tmp_path / "new.safetensors") == (2, said)
    assert not list(tmp_path.glob(".*"))


def test_temperatures_are_for_models_that_the_trainer_knows(
    tmp_path: Path, tokens: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    built("Llama").save_pretrained(tmp_path / "llama")
    measure(tmp_path / "llama", tokens, "--sequence_length", LENGTH)
    capsys.readouterr()
    argv = ["--checkpoint", tmp_path / "llama", "--resuscitation_ratio", 0.5, "--amplifying_factor", 2]
    assert exit_status(change_parameters.main, [str(a) for a in (*argv, "--format", "temperature")]) == 2
    assert "error: --format temperature: works in the trainer, for OLMo models" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*temperature*"))


def test_the_command_itself_ends_with_status_and_one_line(folder: Path) -> None:
    sizes = ("--resuscitation_ratio", "2", "--amplifying_factor", "2")
    done = process(["-m", "analysis.change_parameters", "--checkpoint", str(folder), *sizes], ROOT)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines() == ["error: resuscitation ratio 2.0 is not in (0, 1]"]


def test_a_file_of_the_wrong_kind_is_refused_before_it_is_written(tmp_path, capsys):
    folder = tmp_path / "model"
    folder.mkdir()
    for form, name in (("full", "x.safetensors"), ("multipliers", "x.pt")):
        argv = ["--checkpoint", str(folder), "--resuscitation_ratio", "0.5", "--amplifying_factor", "1"]
        assert exit_status(change_parameters.main, [*argv, "--format", form, "--output", str(tmp_path / name)]) == 2
        assert f"--format {form} is written as" in capsys.readouterr().err
        assert not (tmp_path / name).exists()
