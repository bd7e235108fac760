"""Training state of OLMo's own making: nested safetensors, numpy's random state, paths; and nothing that runs code."""

from __future__ import annotations

import base64
import hashlib
import os
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from olmo.files.atomic import atomic_path
from olmo.files.digests import file_digest
from olmo.files.tensors import (
    read_tensor,
    read_training_state,
    write_olmo_safetensors,
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
    write_olmo_safetensors(tmp_path / "one.safetensors", {"one": torch.arange(3)})
    for name in ("one.pt", "one.safetensors"):
        assert read_tensor(tmp_path / name).tolist() == [0, 1, 2]
    torch.save({"a": torch.ones(1)}, tmp_path / "more.pt")
    write_olmo_safetensors(tmp_path / "more.safetensors", {"a": torch.ones(1), "b": torch.ones(1)})
    for name in ("more.pt", "more.safetensors"):
        with pytest.raises(ValueError, match="expected one tensor"):
            read_tensor(tmp_path / name)
    torch.save(Bomb(tmp_path / "touched"), tmp_path / "bomb.pt")
    with pytest.raises(ValueError, match=r"bomb\.pt: damaged or not a file of tensors"):
        read_tensor(tmp_path / "bomb.pt")
    assert not (tmp_path / "touched").exists()


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
