"""Attempts to make `analysis.change_parameters` write a wrong file, or replace another one, without a word."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from analysis import change_parameters
from analysis import edit as edits
from olmo.exceptions import exit_status
from olmo.files.lock import Lock
from olmo.files.tensors import read_tensors, write_olmo_safetensors
from olmo.memory.rescaling import load_multipliers
from tests.analysis.editing import LENGTH, MEMORIES, change, coefficients, failing, measure, uneven_model, write
from tests.olmo.memory.test_locate import built
from tests.reference import table_of

WEIGHTS, COEFFICIENTS = "model.safetensors", "mlp_average_coefficients.safetensors"
EDIT = "resuscitation_ratio0.5_amplifying2.0.safetensors"
UP, HALF = "transformer.blocks.1.ff_proj.weight", ("--resuscitation_ratio", 0.5, "--amplifying_factor", 2)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write(tmp_path_factory.mktemp("measured") / "step90-unsharded", uneven_model())
    tokens = folder.parent / "tokens.npy"
    np.random.default_rng(0).integers(2, 128, 40 * LENGTH).astype("<u2").tofile(tokens)
    measure(folder, tokens)
    return folder


@pytest.fixture
def folder(tmp_path: Path, measured: Path) -> Iterator[Path]:
    yield Path(shutil.copytree(measured, tmp_path / "step90-unsharded"))


def set_coefficients(folder: Path, average: Tensor) -> None:
    """Replace the coefficients by others, which name no checkpoint."""
    save_file({"mlp_average_coefficients": average.contiguous()}, folder / COEFFICIENTS)


def set_weight(folder: Path, name: str, value: float, dtype: torch.dtype = torch.float32) -> None:
    state = {key: tensor.to(dtype).clone() for key, tensor in read_tensors(folder / WEIGHTS).items()}
    state[name].view(-1)[5] = value
    write_olmo_safetensors(folder / WEIGHTS, state)


@pytest.mark.parametrize("form", ["multipliers", "full", "temperature"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", [UP, "transformer.wte.weight"])
def test_weights_that_are_not_finite_are_named(
    folder: Path, name: str, value: float, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    set_weight(folder, name, value)
    status, said = failing(capsys, "--checkpoint", folder, *HALF, "--format", form)
    assert (status, said) == (1, f"error: {folder}: {name}: holds 1 numbers that are NaN or infinite\n")
    assert not list(folder.glob("*esuscitation*"))


def test_those_of_another_family_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, model = tmp_path / "gpt2", built("GPT-2")
    with torch.no_grad():
        model.transformer.wpe.weight[0, 0] = float("nan")
    model.save_pretrained(folder)
    capsys.readouterr()
    set_coefficients(folder, torch.rand(2, MEMORIES) + 0.1)
    status, said = last_line(capsys, "--checkpoint", folder, *HALF)
    assert status == 1 and said == f"error: {folder}: transformer.wpe.weight: holds 1 numbers that are NaN or infinite"


@pytest.mark.parametrize("form", ["multipliers", "full"])
def test_an_edit_that_exceeds_half_precision_is_refused(
    folder: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    set_weight(folder, UP, 6e4, torch.float16)
    average = coefficients(folder)
    average[1, 0] = 1e-3 * average[1].min()
    set_coefficients(folder, average)
    argv = ("--checkpoint", folder, *HALF, "--format", form)
    status, said = last_line(capsys, *argv)
    assert status == 1 and f"{UP}: multiplied by up to " in said and "it exceeds torch.float16; use a --cap" in said
    assert not list(folder.glob("*esuscitation*"))
    change(folder, 0.5, 2.0, "--format", form, "--cap", 1)


def last_line(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str]:
    """Of stderr, where transformers may draw a bar before it."""
    status = exit_status(change_parameters.main, [str(a) for a in argv])
    return status, capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (
            lambda average: average[:1],
            "another model than .*: multipliers for layer 0, the model has memories in layers 0, 1",
        ),
        (lambda average: average[:, :-1], "multipliers for 47 memories, the layer has 48"),
        (lambda average: average * float("nan"), "finite"),
        (lambda average: -average, "not negative|0 or above"),
        (lambda average: average * torch.tensor([[1.0], [0.0]]), "layer 1"),
        (lambda average: average[None], "expected layers x memories, not shape"),
    ],
)
def test_coefficients_that_do_not_fit(
    folder: Path, made: Callable[[Tensor], Tensor], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    set_coefficients(folder, made(coefficients(folder)))
    with pytest.raises(ValueError, match=said):
        change(folder, 0.5, 2.0)
    assert not list(folder.glob("*esuscitation*"))


def test_equal_coefficients_select_more_and_that_is_a_warning(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    set_coefficients(folder, torch.ones(2, MEMORIES))
    change(folder, 0.5, 2.0)
    shown = capsys.readouterr()
    assert f"96 of {2 * MEMORIES} up-projection rows multiplied" in shown.out
    assert shown.err == (
        f"warning: {folder / COEFFICIENTS}: states no checkpoint; it may belong to another one\n"
        "warning: 96 memories are selected, not 48, because of equal coefficients\n"
    )


@pytest.mark.parametrize("more", [("--threshold", "global"), ("--layers", 1), ("--select", "random"), ()])
@pytest.mark.parametrize("ratio", [0.02, 0.3, 0.5, 1.0])
def test_unequal_ones_do_not(folder: Path, ratio: float, more: Any, capsys: pytest.CaptureFixture[str]) -> None:
    change(folder, ratio, 2.0, *more, "--format", "temperature")
    assert not capsys.readouterr().err


@pytest.mark.parametrize("name", [EDIT, "optim.pt", "train.pt", "other.safetensors"])
def test_a_file_of_other_content_is_replaced_only_with_overwrite(
    folder: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same edit again is none; nothing is left of a refused one."""
    form = "full" if name.endswith(".pt") else "multipliers"
    if name == "other.safetensors":
        shutil.copy(folder / WEIGHTS, folder / name)
    elif name == EDIT:
        change(folder, 0.5, 2.0, "--cap", 3, "--output", folder / EDIT)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    argv = ("--checkpoint", folder, *HALF, "--format", form, "--output", folder / name)
    capsys.readouterr()
    refused = "already exists with other content; name another --output, or replace it: --overwrite"
    assert failing(capsys, *argv) == (2, f"error: {folder / name}: {refused}\n")
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    for more in (("--overwrite",), ()):
        change(folder, 0.5, 2.0, "--format", form, "--output", folder / name, *more)
    assert before.keys() == set(folder.iterdir()) and (folder / name).read_bytes() != before[folder / name]


def test_two_at_once_on_one_output(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second is refused; the first deletes what a killed one left."""
    with Lock(folder / f".{EDIT}.lock"):
        said = f"error: {folder / EDIT}: another process is writing it\n"
        assert failing(capsys, "--checkpoint", folder, *HALF) == (1, said)
    (folder / f".{Path(EDIT).stem}.99-1.partial.safetensors").touch()
    change(folder, 0.5, 2.0)
    assert not list(folder.glob(".*")) and table_of(load_multipliers(folder / EDIT).values).shape == (2, MEMORIES)


def test_weights_that_are_replaced_while_they_are_read(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_coefficients(folder, coefficients(folder))  # they do not name their checkpoint
    read = edits.checkpoint.StateOnDisk.__getitem__

    def replacing(self: Any, name: str) -> Tensor:
        tensor = read(self, name)
        if name == UP:
            write(folder, uneven_model(1))
        return tensor

    monkeypatch.setattr(edits.checkpoint.StateOnDisk, "__getitem__", replacing)
    status, said = last_line(capsys, "--checkpoint", folder, *HALF)
    assert (status, said) == (1, f"error: {folder}: its weights were replaced while they were read; nothing is written")
    assert not list(folder.glob("*esuscitation*"))


@pytest.mark.parametrize("layers", ["0-99999999999", "-1", "0,,1", "1-", "\u0661"])
def test_layers_that_are_none(folder: Path, layers: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, said = failing(capsys, "--checkpoint", folder, *HALF, f"--layers={layers}")
    assert status == 2 and "expected layers such as 0,3,8-11" in said
