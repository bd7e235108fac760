"""Weights of OLMo's layout: read, loaded and edited on the way; what does not fit is named."""

from __future__ import annotations

import gc
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from olmo import checkpoint
from olmo.checkpoint import fingerprint
from olmo.config import ModelConfig
from olmo.files.tensors import encode_key, write_olmo_safetensors
from olmo.memory.rescaling import Multipliers, rescale
from olmo.model import OLMo
from tests.checkpoints import CPU, IDS, made_model, olmo_key, same_weights, write_olmo
from tests.reference import by_layer, tiny_config, to_transformers


def broken(change: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    name = "transformer.blocks.1.ff_proj.weight"
    if change == "missing":
        del state[name]
    elif change == "foreign":
        state["transformer.blocks.2.ff_proj.weight"] = state[name]
    elif change == "shape":
        state[name] = state[name][:, :-1]
    return state


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("missing", "missing transformer.blocks.1.ff_proj.weight, not expected none"),
        ("foreign", "missing none, not expected transformer.blocks.2.ff_proj.weight"),
        ("shape", "transformer.blocks.1.ff_proj.weight has shape (96, 31), the config asks for (96, 32)"),
    ],
)
def test_tensors_that_do_not_fit_are_one_clear_error(tmp_path: Path, change: str, said: str) -> None:
    model = made_model()
    folder = write_olmo(tmp_path / "checkpoint", model, "model.pt")
    torch.save(broken(change, dict(model.state_dict())), folder / "model.pt")
    with pytest.raises(ValueError) as caught:
        checkpoint.load_model(folder, CPU)
    text = str(caught.value)
    assert text.startswith(f"{folder}: ") and said in text and "\n" not in text


def test_many_missing_tensors_are_still_one_line(tmp_path: Path) -> None:
    folder = write_olmo(tmp_path / "checkpoint", made_model(), "model.pt")
    torch.save({}, folder / "model.pt")
    with pytest.raises(ValueError) as caught:
        checkpoint.load_model(folder, CPU)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < len(str(folder)) + 250


def test_a_folder_without_weights_is_named(tmp_path: Path) -> None:
    folder = write_olmo(tmp_path / "checkpoint", made_model())
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="checkpoint: no weights here"):
        checkpoint.load_model(folder, CPU)


@pytest.mark.parametrize("weights", ["model.safetensors", "model.pt"])
@pytest.mark.parametrize("shape", [{}, {"weight_tying": False}, {"n_kv_heads": 2, "clip_qkv": 0.1}], ids=repr)
def test_an_olmo_folder_loads(tmp_path: Path, weights: str, shape: dict[str, Any]) -> None:
    model = made_model(**shape)
    folder = write_olmo(tmp_path / "checkpoint", model, weights)
    loaded = checkpoint.load_model(folder, CPU)
    assert loaded.config == model.config
    same_weights(loaded, model)
    assert torch.equal(loaded(IDS), model(IDS))


def test_plain_safetensors_keys_load(tmp_path: Path) -> None:
    model = made_model()
    folder = write_olmo(tmp_path / "checkpoint", model)
    save_file({name: t.contiguous() for name, t in model.state_dict().items()}, folder / "model.safetensors")
    same_weights(checkpoint.load_model(folder, CPU), model)


def test_a_run_may_use_another_context_and_precision(tmp_path: Path) -> None:
    model = made_model()
    folder = write_olmo(tmp_path / "checkpoint", model)
    other = tiny_config(max_sequence_length=8, residual_dropout=0.1)
    loaded = checkpoint.load_model(folder, CPU, torch.bfloat16, other)
    assert loaded.config is other
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name].bfloat16())


def with_resuscitation(config: ModelConfig, name: Path | str) -> ModelConfig:
    return ModelConfig(**{**asdict(config), "resuscitation": str(name)})


@pytest.fixture
def multipliers() -> dict[int, Tensor]:
    values = torch.ones(2, 48)
    values[0, 3], values[1, 40] = 2.0, 0.25
    return by_layer(values)


def write_edit(file: Path, multipliers: dict[int, Tensor], about: dict[str, Any]) -> None:
    selected = {number: values != 1 for number, values in multipliers.items()}
    Multipliers(multipliers, selected, about).save(file)


@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize("weights", ["model.safetensors", "model.pt"])
def test_a_multiplier_file_is_applied(
    tmp_path: Path, multipliers: dict[int, Tensor], beside: bool, weights: str
) -> None:
    model = made_model()
    folder = write_olmo(tmp_path / "checkpoint", model, weights)
    file = (folder if beside else tmp_path) / "edit.safetensors"
    write_edit(file, multipliers, {"checkpoint_fingerprint": fingerprint(model.state_dict())})
    named = "edit.safetensors" if beside else file
    loaded = checkpoint.load_model(folder, CPU, config=with_resuscitation(model.config, named))
    for name, tensor in rescale(model.state_dict(), multipliers).items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_a_full_state_dict_may_have_the_names_that_wrapping_left(
    tmp_path: Path, multipliers: dict[int, Tensor]
) -> None:
    model = made_model()
    folder = write_olmo(tmp_path / "checkpoint", model)
    wanted = rescale(model.state_dict(), multipliers)
    torch.save({f"_fsdp_wrapped_module.{name}": tensor for name, tensor in wanted.items()}, folder / "edit.pt")
    loaded = checkpoint.load_model(folder, CPU, config=with_resuscitation(model.config, "edit.pt"))
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in loaded.state_dict().items())


def test_a_multiplier_file_fits_the_same_weights_in_another_layout(
    tmp_path: Path, multipliers: dict[int, Tensor]
) -> None:
    model = made_model(weight_tying=False)
    to_transformers(model).save_pretrained(tmp_path / "hf")
    file = tmp_path / "edit.safetensors"
    write_edit(file, multipliers, {"checkpoint_fingerprint": fingerprint(model.state_dict())})
    loaded = checkpoint.load_model(tmp_path / "hf", CPU, config=with_resuscitation(model.config, file))
    edited = rescale(model.state_dict(), multipliers)
    assert all(torch.equal(tensor, edited[name]) for name, tensor in loaded.state_dict().items())


@pytest.mark.parametrize("about", [{}, {"checkpoint_fingerprint": None}, {"checkpoint_fingerprint": "other"}])
def test_a_multiplier_file_of_another_checkpoint_is_refused(
    tmp_path: Path, multipliers: dict[int, Tensor], about: dict[str, Any]
) -> None:
    model = made_model()
    folder = write_olmo(tmp_path / "checkpoint", model)
    if about.get("checkpoint_fingerprint") == "other":
        about = {"checkpoint_fingerprint": fingerprint(made_model(1).state_dict())}
    write_edit(tmp_path / "edit.safetensors", multipliers, about)
    with pytest.raises(ValueError, match=r"edit\.safetensors: made for a different checkpoint than .*checkpoint"):
        checkpoint.load_model(folder, CPU, config=with_resuscitation(model.config, tmp_path / "edit.safetensors"))


def test_a_full_state_dict_replaces_the_weights(tmp_path: Path) -> None:
    model, other = made_model(0), made_model(1)
    folder = write_olmo(tmp_path / "checkpoint", model)
    torch.save(other.state_dict(), folder / "edited.pt")
    config = with_resuscitation(model.config, "edited.pt")
    with pytest.raises(
        ValueError, match=r"edited\.pt: made for a different checkpoint than .*checkpoint \(transf.* diff"
    ):
        checkpoint.load_model(folder, CPU, config=config)
    forced = replace(config, resuscitation_force=True)
    same_weights(checkpoint.load_model(folder, CPU, config=forced), OLMo.eval(other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_full_state_dict_may_differ_in_nothing_but_up_projections(
    tmp_path: Path, multipliers: dict[int, Tensor], dtype: torch.dtype
) -> None:
    """Also where the checkpoint was rounded; the second half of ff_proj is the gate."""
    model = made_model()
    rounded = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    folder = write_olmo(tmp_path / "checkpoint", model)
    write_olmo_safetensors(folder / "model.safetensors", rounded)
    edited = rescale(model.state_dict(), multipliers)
    config = with_resuscitation(model.config, "edited.pt")
    for name in ("none", "transformer.blocks.1.ff_proj.weight", "transformer.wte.weight"):
        changed = {key: tensor.clone() for key, tensor in edited.items()}
        if name != "none":
            changed[name][-1, -1] += 1
        torch.save(changed, folder / "edited.pt")
        if name == "none":
            checkpoint.load_model(folder, CPU, config=config)
        else:
            with pytest.raises(ValueError, match=rf"\({name} differs\)"):
                checkpoint.load_model(folder, CPU, config=config)


def test_a_resuscitation_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    model = made_model()
    folder = write_olmo(tmp_path / "checkpoint", model)
    with pytest.raises(FileNotFoundError, match=r"model\.resuscitation: nowhere\.pt is not a file"):
        checkpoint.load_model(folder, CPU, config=with_resuscitation(model.config, "nowhere.pt"))


def test_a_folder_that_moved_still_loads(tmp_path: Path) -> None:
    model = made_model()
    folder = write_olmo(tmp_path / "a", model)
    shutil.move(folder, tmp_path / "b")
    same_weights(checkpoint.load_model(tmp_path / "b", CPU), model)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="asks Linux what is mapped")
@pytest.mark.parametrize("weights", ["model.safetensors", "model.pt"])
def test_weights_stay_in_the_file_until_they_are_wanted_elsewhere(tmp_path: Path, weights: str) -> None:
    folder = write_olmo(tmp_path / "checkpoint", made_model(), weights)
    before = (folder / weights).read_bytes()
    mapped, owned = (checkpoint.load_model(folder, CPU, mapped=wanted) for wanted in (True, False))
    same_weights(mapped, owned)
    assert str(folder / weights) in Path("/proc/self/maps").read_text(encoding="utf-8")
    with torch.no_grad():  # what is changed in memory is not changed in the file
        for parameter in (*mapped.parameters(), *owned.parameters()):
            parameter.zero_()
    del mapped
    gc.collect()
    assert str(folder / weights) not in Path("/proc/self/maps").read_text(encoding="utf-8")
    assert (folder / weights).read_bytes() == before


def test_groups_of_blocks_and_wrappers_leave_no_trace_in_names(tmp_path: Path) -> None:
    """As ai2-olmo saves a model of block_group_size 2, and one that FSDP has wrapped."""
    model = made_model(n_layers=4)
    grouped = {}
    for name, tensor in model.state_dict().items():
        parts = name.split(".")
        if parts[1] == "blocks":
            layer = int(parts[2])
            name = ".".join(["transformer", "block_groups", str(layer // 2), str(layer % 2), *parts[3:]])
        grouped[name.replace("transformer.", "transformer._fsdp_wrapped_module.", 1)] = tensor
    folder = write_olmo(tmp_path / "checkpoint", model)
    save_file({olmo_key(name): tensor for name, tensor in grouped.items()}, folder / "model.safetensors")
    same_weights(checkpoint.load_model(folder, CPU), model)


def test_a_torch_file_of_the_old_kind_loads(tmp_path: Path) -> None:
    model = made_model()
    folder = write_olmo(tmp_path / "checkpoint", model, "model.pt")
    torch.save(dict(model.state_dict()), folder / "model.pt", _use_new_zipfile_serialization=False)
    same_weights(checkpoint.load_model(folder, CPU), model)


def test_an_index_says_which_files_count(tmp_path: Path) -> None:
    theirs = to_transformers(made_model())
    theirs.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    state = checkpoint.read_state(tmp_path)
    left_over = {"model.embed_tokens.weight": torch.zeros(128, 32)}
    save_file(left_over, tmp_path / "model-00099-of-00099.safetensors")
    again = checkpoint.read_state(tmp_path)
    assert all(torch.equal(state[name], again[name]) for name in state)
    same_weights(checkpoint.load_model(tmp_path, CPU), made_model())
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ValueError, match=r"index\.json: not an index of weights"):
        checkpoint.read_state(tmp_path)


def test_interpolations_of_a_checkpoints_config_lead_out_of_its_model(tmp_path: Path) -> None:
    folder = write_olmo(tmp_path / "checkpoint", made_model())
    text = (folder / "config.yaml").read_text().replace("n_layers: 2", "n_layers: ${layers}")
    (folder / "config.yaml").write_text("layers: 2\n" + text)
    same_weights(checkpoint.load_model(folder, CPU), made_model())


def test_a_checkpoint_has_one_fingerprint_in_every_layout(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = OLMo(tiny_config(weight_tying=False))
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    for name in ("pt", "plain", "encoded"):
        (tmp_path / name).mkdir()
    torch.save(dict(reversed(state.items())), tmp_path / "pt/model.pt")
    save_file(state, tmp_path / "plain/model.safetensors")
    save_file({encode_key(name): tensor for name, tensor in state.items()}, tmp_path / "encoded/model.safetensors")
    to_transformers(model).save_pretrained(tmp_path / "transformers")
    prints = {path.name: fingerprint(checkpoint.read_state(path)) for path in tmp_path.iterdir()}
    assert set(prints) == {"pt", "plain", "encoded", "transformers"}
    assert set(prints.values()) == {fingerprint(state)}


def test_other_weights_names_or_shapes_have_another_fingerprint() -> None:
    state = {"a": torch.arange(300.0), "b": torch.ones(2, 3)}
    others = [
        {**state, "a": state["a"] + 1e-3},
        {**state, "a": state["a"].index_fill(0, torch.tensor(299), 0)},
        {**state, "a": state["a"].index_fill(0, torch.tensor(150), 0)},  # far from both ends
        {**state, "a": state["a"][[1, 0, *range(2, 300)]]},  # the same sum
        {**state, "a": state["a"][[*range(298), 299, 298]]},
        {**state, "b": torch.ones(3, 2)},
        {"a": state["a"], "c": state["b"]},
        {"a": state["a"]},
    ]
    prints = {fingerprint(s) for s in (state, *others)}
    assert len(prints) == 1 + len(others) and all(len(p) == 64 for p in prints)
    assert fingerprint({"b": state["b"], "a": state["a"].clone()}) == fingerprint(state)


@pytest.mark.parametrize("weights", ["model.safetensors", "model.pt"])
def test_a_state_on_disk_is_the_state_and_keeps_nothing(tmp_path: Path, weights: str) -> None:
    model = made_model()
    folder = write_olmo(tmp_path / "checkpoint", model, weights)
    on_disk, wanted = checkpoint.StateOnDisk(folder), model.state_dict()
    assert len(on_disk) == len(wanted) and set(on_disk) == set(wanted)
    for name in on_disk:
        first, second = on_disk[name], on_disk[name]
        assert torch.equal(first, wanted[name]) and on_disk.like[name].shape == wanted[name].shape
        assert first.data_ptr() != second.data_ptr()
        first.zero_()
        assert torch.equal(on_disk[name], wanted[name])
    assert fingerprint(on_disk) == fingerprint(wanted)


def test_a_longer_context_than_the_checkpoints_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_olmo(tmp_path / "checkpoint", made_model(max_sequence_length=16))
    for length, warned in ((16, 0), (8, 0), (32, 1)):
        caplog.clear()
        checkpoint.load_model(folder, CPU, config=tiny_config(max_sequence_length=length))
        assert len(caplog.records) == warned
    assert caplog.messages[0].startswith(f"model.max_sequence_length: 32, the checkpoint {folder} was made for 16 ")
