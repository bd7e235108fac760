"""Training state of OLMo's own making: nested safetensors, numpy's random state, paths; and nothing that runs code."""

from __future__ import annotations

import base64
import hashlib
import os
import pickle
import random
import resource
import threading
import weakref
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from olmo.files.atomic import atomic_path
from olmo.files.digests import file_digest
from olmo.files.tensors import (
    _one_ahead,
    read_tensor,
    read_tensors,
    read_training_state,
    stream_torch_file,
    write_tensors,
)


def key(*path: Any, pickled: bool = False) -> str:
    return base64.urlsafe_b64encode(pickle.dumps((path, pickled))).decode("ascii")


def test_train_pt_of_olmos_trainer(tmp_path: Path) -> None:
    """Its generators' states and lists of paths, as OLMo 0.6.0's `trainer_state_dict` writes them."""
    state = {
        "epoch": 0,
        "global_step": 738020,
        "global_train_examples_seen_this_epoch": 1511464960,
        "global_train_tokens_seen": 3095480238080,
        "world_size": 256,
        "checkpoints": [Path("/results/step1000"), Path("/results/step2000")],
        "rng": {
            "python": random.getstate(),
            "numpy": np.random.get_state(),
            "torch": torch.random.get_rng_state(),
        },
    }
    torch.save(state, tmp_path / "train.pt")
    read = read_training_state(tmp_path, "train", "other")
    assert read["global_step"] == 738020
    assert str(read["checkpoints"][1]) == "/results/step2000"
    assert np.array_equal(read["rng"]["numpy"][1], np.random.get_state()[1])
    (tmp_path / "train.pt").rename(tmp_path / "other.pt")
    assert read_training_state(tmp_path, "train", "other")["global_step"] == 738020


def test_optim_safetensors_of_olmos_making(tmp_path: Path) -> None:
    tensors = {
        key("state", "transformer.wte.weight", "exp_avg"): torch.ones(3),
        key("state", "transformer.wte.weight", "step"): torch.tensor(7.0),
        key("param_groups", pickled=True): torch.frombuffer(bytearray(b"never unpickled"), dtype=torch.uint8),
    }
    save_file(tensors, tmp_path / "optim.safetensors")
    read = read_training_state(tmp_path, "optim")
    assert read.keys() == {"state"}
    assert read["state"]["transformer.wte.weight"]["exp_avg"].tolist() == [1, 1, 1]
    assert read["state"]["transformer.wte.weight"]["step"] == 7


class Bomb:
    def __init__(self, touched: Path):
        self.touched = touched

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.touched}'",)


@pytest.mark.parametrize("stem", ["optim", "train"])
def test_a_hostile_nested_key_is_refused(tmp_path: Path, stem: str) -> None:
    hostile = base64.urlsafe_b64encode(pickle.dumps(((Bomb(tmp_path / "touched"),), False))).decode("ascii")
    save_file({hostile: torch.ones(1)}, tmp_path / f"{stem}.safetensors")
    with pytest.raises(ValueError, match="cannot be read safely"):
        read_training_state(tmp_path, stem)
    assert not (tmp_path / "touched").exists()


def test_a_single_tensor(tmp_path: Path) -> None:
    torch.save(torch.arange(3), tmp_path / "one.pt")
    write_tensors(tmp_path / "one.safetensors", {"one": torch.arange(3)})
    for name in ("one.pt", "one.safetensors"):
        assert read_tensor(tmp_path / name).tolist() == [0, 1, 2]
    torch.save({"a": torch.ones(1)}, tmp_path / "more.pt")
    write_tensors(tmp_path / "more.safetensors", {"a": torch.ones(1), "b": torch.ones(1)})
    for name in ("more.pt", "more.safetensors"):
        with pytest.raises(ValueError, match="expected one tensor"):
            read_tensor(tmp_path / name)
    torch.save(Bomb(tmp_path / "touched"), tmp_path / "bomb.pt")
    with pytest.raises(ValueError, match=r"bomb\.pt: damaged or no file of tensors"):
        read_tensor(tmp_path / "bomb.pt")
    assert not (tmp_path / "touched").exists()


# --- a torch file, tensor by tensor ------------------------------------------------------------------------------

KINDS = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool)


@given(
    st.dictionaries(
        st.text("abc._0", min_size=1),
        st.tuples(st.lists(st.integers(0, 40), max_size=3), st.sampled_from(KINDS)),
        max_size=6,
    )
)
def test_a_streamed_file_is_what_torch_saves(
    tmp_path_factory: pytest.TempPathFactory, shapes: dict[str, tuple[list[int], torch.dtype]]
) -> None:
    folder = tmp_path_factory.mktemp("streamed")
    torch.manual_seed(0)
    wanted = {name: (100 * torch.randn(shape)).to(kind) for name, (shape, kind) in shapes.items()}
    stream_torch_file(folder / "streamed.pt", wanted, wanted.__getitem__)
    torch.save(wanted, folder / "streamed.saved.pt")
    assert {path.name for path in folder.iterdir()} == {"streamed.pt", "streamed.saved.pt"}
    assert zipfile.ZipFile(folder / "streamed.pt").testzip() is None
    for mapped in (True, False):
        found = torch.load(folder / "streamed.pt", weights_only=True, mmap=mapped)
        assert list(found) == list(wanted)
        for name, tensor in found.items():
            assert tensor.dtype == wanted[name].dtype and torch.equal(tensor, wanted[name])
            assert tensor.numel() == 0 or tensor.data_ptr() % 64 == 0
    assert list(read_tensors(folder / "streamed.pt")) == list(wanted)


def test_one_tensor_is_read_while_one_is_used() -> None:
    begun = {name: threading.Event() for name in "abc"}

    def read(name: str) -> Tensor:
        begun[name].set()
        return torch.zeros(1)

    coming = _one_ahead(read, "abc")
    next(coming)
    assert begun["b"].wait(60) and not begun["c"].is_set()
    coming.close()  # type: ignore[attr-defined]


def test_a_streamed_file_keeps_no_tensor(tmp_path: Path) -> None:
    """Two are in memory at most: the one that is written, and the next."""
    alive, most = 0, 0

    def gone() -> None:
        nonlocal alive
        alive -= 1

    def read(name: str) -> Tensor:
        nonlocal alive, most
        tensor = torch.full((1000,), float(name))
        alive += 1
        most = max(most, alive)
        weakref.finalize(tensor, gone)
        return tensor

    stream_torch_file(tmp_path / "streamed.pt", {name: torch.empty(1000, device="meta") for name in "0123456789"}, read)
    assert most <= 2
    assert [float(t[7]) for t in torch.load(tmp_path / "streamed.pt").values()] == list(range(10))


def test_a_streamed_file_of_many_tensors_whatever_its_name(tmp_path: Path) -> None:
    """More than ten: torch once wrote their records in the order of their numbers' letters, 10 before 2."""
    wanted = {f"t{number}": torch.full((number + 1,), float(number)) for number in range(23)}
    for name in ("one.pt", ".another.17.partial.pt"):
        stream_torch_file(tmp_path / name, wanted, wanted.__getitem__)
    found = torch.load(tmp_path / "one.pt", weights_only=True)
    assert list(found) == list(wanted) and all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert (tmp_path / "one.pt").read_bytes() == (tmp_path / ".another.17.partial.pt").read_bytes()


def test_records_may_come_in_any_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = {f"t{number}": torch.full((number + 1,), float(number)) for number in range(12)}
    listed = zipfile.ZipFile.infolist
    monkeypatch.setattr(zipfile.ZipFile, "infolist", lambda file: sorted(listed(file), key=lambda r: r.filename))
    stream_torch_file(tmp_path / "streamed.pt", wanted, wanted.__getitem__)
    found = torch.load(tmp_path / "streamed.pt", weights_only=True)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_full_disk_leaves_no_frame(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        with pytest.raises(OSError):
            stream_torch_file(tmp_path / "streamed.pt", {"a": torch.zeros(10_000)}, lambda _: torch.zeros(10_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "streamed.pt.frame").exists()


# --- whole or not at all -----------------------------------------------------------------------------------------


def test_a_file_gets_its_name_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    with atomic_path(path) as partial:
        assert partial.suffix == ".txt" and partial.name.startswith(".")
        assert str(os.getpid()) in partial.name  # another process writes to a name of its own
        partial.write_text("first")
        assert not path.exists()
    assert path.read_text() == "first"
    with pytest.raises(ValueError, match="no"), atomic_path(path) as partial:
        partial.write_text("half")
        raise ValueError("no")
    with pytest.raises(OSError, match="elsewhere"), atomic_path(path) as partial:
        partial.write_text("half")
        raise OSError("elsewhere")
    assert path.read_text() == "first" and os.listdir(tmp_path) == ["file.txt"]


def test_an_error_of_a_partial_file_names_the_whole_one(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.mkdir()
    with (
        pytest.raises(OSError, match=r"^\S*/file\.txt: cannot be written: is a directory$"),
        atomic_path(path) as partial,
    ):
        partial.write_text("text")
    said = r"^\S*/none/f: cannot be written: no such file or directory$"
    with pytest.raises(OSError, match=said), atomic_path(tmp_path / "none" / "f") as partial:
        partial.write_text("text")
    assert os.listdir(tmp_path) == ["file.txt"]


def test_the_digest_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(range(256)) * 100)
    assert file_digest(tmp_path / "file") == hashlib.sha256(bytes(range(256)) * 100).hexdigest()
    with pytest.raises(FileNotFoundError, match="none: no such file"):
        file_digest(tmp_path / "none")
