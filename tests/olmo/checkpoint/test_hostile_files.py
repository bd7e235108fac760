"""Files that try to run code, and damaged ones."""

from __future__ import annotations

import base64
import os
import pickle
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from olmo import checkpoint
from olmo.files import torch_files
from olmo.files.tensors import decode_key, encode_key, read_tensors, read_training_state
from olmo.files.torch_files import DTYPES
from tests.checkpoints import CPU, made_model, olmo_key, trained, write_olmo
from tests.hostile_files import NAME, SAFETENSORS, TORCH, bomb

part = st.text("abcdefghijklmnopqrstuvwxyzABCXYZ_0123456789", min_size=1, max_size=12)
names = st.lists(part, min_size=1, max_size=5).map(".".join)


@settings(max_examples=300)
@given(names)
def test_keys_decode_to_the_name_that_olmo_encoded(name: str) -> None:
    assert decode_key(olmo_key(name)) == name
    assert decode_key(encode_key(name)) == name
    path = base64.urlsafe_b64encode(pickle.dumps((tuple(name.split(".")), False))).decode()
    assert decode_key(path) == name


@settings(max_examples=500)
@given(st.lists(part, min_size=2, max_size=5).map(".".join))
def test_plain_keys_stay_as_they_are(name: str) -> None:
    assert decode_key(name) == name


def test_the_keys_of_a_saved_model_are_olmos(tmp_path: Path) -> None:
    model, optimizer, config = trained()
    checkpoint.save(tmp_path / "step2", model, config, optimizer, {})
    keys = {pickle.loads(base64.urlsafe_b64decode(key)) for key in load_file(tmp_path / "step2/model.safetensors")}
    assert keys == {((name,), False) for name in model.state_dict()}


class Bomb:
    """Runs a shell command when it is unpickled."""

    def __init__(self, touched: Path):
        self.touched = touched

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.touched}'",)


def hostile_keys(touched: Path) -> dict[str, Any]:
    return {
        "call": Bomb(touched),
        "call in a path": ((Bomb(touched), "weight"), False),
        "call as the flag": (("transformer.wte.weight",), Bomb(touched)),
        "a function": ((os.system,), False),
        "a class": ((Path,), False),
        "a pickled value": (("transformer.wte.weight",), True),
        "a number": ((3,), False),
        "no tuple": (["transformer.wte.weight"], False),
    }


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("kind", hostile_keys(Path()))
def test_a_hostile_key_is_refused_and_runs_nothing(tmp_path: Path, kind: str, protocol: int) -> None:
    touched = tmp_path / "touched"
    folder = write_olmo(tmp_path / "checkpoint", made_model())
    tensors = load_file(folder / "model.safetensors")
    pickled = pickle.dumps(hostile_keys(touched)[kind], protocol=protocol)
    tensors[base64.urlsafe_b64encode(pickled).decode("ascii")] = tensors.pop(olmo_key("transformer.wte.weight"))
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors: "):
        checkpoint.load_model(folder, CPU)
    assert not touched.exists()


def test_the_bomb_is_live(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "touched")))
    assert (tmp_path / "touched").exists()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["value", "whole", "beside"])
def test_a_hostile_model_pt_is_refused_and_runs_nothing(tmp_path: Path, place: str, zipped: bool) -> None:
    touched = tmp_path / "touched"
    folder = write_olmo(tmp_path / "checkpoint", made_model(), "model.pt")
    state: Any = dict(made_model().state_dict())
    state = {"value": {**state, "transformer.wte.weight": Bomb(touched)}, "whole": Bomb(touched)}.get(place, state)
    if place == "beside":
        state["extra"] = Bomb(touched)
    torch.save(state, folder / "model.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"model\.pt: damaged or not a file of tensors"):
        checkpoint.load_model(folder, CPU)
    assert not touched.exists()


def test_a_plain_pickle_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    folder = write_olmo(tmp_path / "checkpoint", made_model(), "model.pt")
    (folder / "model.pt").write_bytes(pickle.dumps(Bomb(tmp_path / "touched")))
    with pytest.raises(ValueError, match=r"model\.pt: "):
        checkpoint.load_model(folder, CPU)
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("name", ["optim.pt", "train.pt"])
def test_a_hostile_training_state_is_refused_and_runs_nothing(tmp_path: Path, name: str) -> None:
    torch.save({"step": 1, "extra": Bomb(tmp_path / "touched")}, tmp_path / name)
    with pytest.raises(
        ValueError, match=rf"{name}: damaged, or cannot be read safely \(.*\); to start without it, set load_path"
    ):
        read_training_state(tmp_path, Path(name).stem)
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("weights", ["model.safetensors", "model.pt"])
@pytest.mark.parametrize("kept", [0, 1, 100, 5000, -1])
def test_a_truncated_file_is_named(tmp_path: Path, weights: str, kept: int) -> None:
    folder = write_olmo(tmp_path / "checkpoint", made_model(), weights)
    whole = (folder / weights).read_bytes()
    (folder / weights).write_bytes(whole[:kept])
    with pytest.raises(ValueError) as caught:
        checkpoint.load_model(folder, CPU)
    said = str(caught.value)
    assert said.startswith(f"{folder / weights}: damaged or not a file of tensors: ") and "\n" not in said


@pytest.mark.parametrize("content", [[torch.ones(2)], {"a": {"b": torch.ones(2)}}, {"a": 3}, torch.ones(2)], ids=repr)
def test_a_torch_file_of_something_else_is_named(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"model\.pt: expected a flat dictionary of tensors"):
        read_tensors(tmp_path / "model.pt")


def test_two_keys_of_one_tensor_are_refused(tmp_path: Path) -> None:
    folder = write_olmo(tmp_path / "checkpoint", made_model())
    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.wte.weight"] = torch.zeros(128, 32)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match="two keys name the same tensor"):
        checkpoint.load_model(folder, CPU)


def test_nobody_is_told_to_unpickle(tmp_path: Path) -> None:
    folder = write_olmo(tmp_path / "checkpoint", made_model(), "model.pt")
    for content in (b"x", pickle.dumps(made_model())):
        (folder / "model.pt").write_bytes(content)
        with pytest.raises(ValueError, match="not a torch file") as caught:
            checkpoint.load_model(folder, CPU)
        assert "weights_only" not in str(caught.value) and "\x1b" not in str(caught.value)


# --- files that state more than they have ------------------------------------------------------------------------

KINDS = [("model.pt", kind) for kind in TORCH] + [("model.safetensors", kind) for kind in SAFETENSORS]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "kind"), KINDS, ids=[kind for _, kind in KINDS])
def test_a_hostile_file_is_one_line_that_names_it_at_once(tmp_path: Path, name: str, kind: str) -> None:
    path, write = tmp_path / name, (TORCH if name == "model.pt" else SAFETENSORS)[kind]
    if "3 GB" in kind or "stated as" in kind:  # `python -m tests.hostile_files` has the large ones
        bomb(path, 10**8, lie="stated as" in kind)
    else:
        write(path)
    before = time.monotonic()
    for mapped in (True, False):
        with pytest.raises(ValueError) as caught:
            read_tensors(path, mapped)
        assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
    assert time.monotonic() - before < 10 and os.listdir(tmp_path) == [name]
    tensor_kinds = (
        "sparse",
        "meta",
        "nested",
        "complex",
        "quantized",
        "float8",
        "stride 0",
        "10^12 elements",
    )
    if name == "model.pt" and any(word in kind for word in tensor_kinds):
        # torch makes no nested tensors of a file since 2.15: it refuses the type before the tensor has a name.
        refused = "refused to make torch._utils._rebuild_nested_tensor" if kind == "a nested tensor" else NAME
        reason = str(caught.value).removeprefix(f"{path}: damaged or not a file of tensors: ")
        assert reason.startswith((f"{NAME}: ", refused)), "names the tensor"


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("mapped", [False, True])
def test_a_torch_file_is_read_as_torch_reads_it(tmp_path: Path, mapped: bool, legacy: bool) -> None:
    """All types of numbers; views, tied and empty tensors; parameters."""
    path = tmp_path / "model.pt"
    state = {str(dtype): torch.arange(6).to(dtype).reshape(2, 3) for dtype in DTYPES}
    state |= {"transposed": torch.randn(4, 5).t(), "scalar": torch.tensor(3.0), "empty": torch.zeros(0, 7)}
    state |= {"tied": state["transposed"], "part": torch.randn(3, 8)[:, 2:5], "unsigned": torch.randn(2)}
    module = torch.nn.Linear(3, 2)
    state |= {"parameter": module.weight, **module.state_dict()}
    torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    expected = torch.load(path, weights_only=True)
    read = read_tensors(path, mapped)
    assert read.keys() == expected.keys()
    for name, tensor in expected.items():
        assert read[name].equal(tensor) and read[name].dtype == tensor.dtype and read[name].stride() == tensor.stride()
    assert read["tied"].data_ptr() == read["transposed"].data_ptr() == read["transposed"].untyped_storage().data_ptr()


def test_a_file_that_is_cut_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.pt"
    torch.save({"a": torch.zeros(10**5)}, path)
    real = torch_files.unpickle

    def cut(*arguments: Any) -> Any:
        result = real(*arguments)
        os.truncate(path, 4000)
        return result

    monkeypatch.setattr(torch_files, "unpickle", cut)
    with pytest.raises(ValueError, match=r"model\.pt: damaged or not a file of tensors: [^\n]*$"):
        read_tensors(path, mapped=False)


def test_the_pickle_of_40_000_tensors_is_read(tmp_path: Path) -> None:
    """Those of a mixture of experts have names of 50 characters: 5.3 MB."""
    names = {"names": " " * 5_300_000}
    torch.save(names, tmp_path / "train.pt")
    assert read_training_state(tmp_path, "train") == names
