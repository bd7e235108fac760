"""Checkpoints of every layout, saving and restarting, and files that try to run code."""

from __future__ import annotations

import base64
import gc
import json
import os
import pickle
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from olmo.checkpoint import fingerprint
from olmo.checkpoint import folder as saves
from olmo.checkpoint import weights as checkpoint
from olmo.config import ModelConfig, OptimizerConfig, TrainConfig, load
from olmo.files.tensors import decode_key, encode_key, read_tensors, read_training_state
from olmo.memory.rescaling import Multipliers, rescale
from olmo.model import OLMo
from olmo.train.optim import build_optimizer
from tests.reference import tiny_config, tiny_olmo2_config, to_transformers

CPU = torch.device("cpu")
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [100, 50, 25, 12, 6, 3, 1, 0]])


def made_model(seed: int = 0, **overrides: Any) -> OLMo:
    torch.manual_seed(seed)
    return OLMo(tiny_config(**overrides)).eval()


def olmo_key(name: str) -> str:
    """A key as OLMo's own code spells it: base64 of a pickled (path, whether the value is pickled)."""
    return base64.urlsafe_b64encode(pickle.dumps(((name,), False))).decode("ascii")


def write_olmo(folder: Path, model: OLMo, weights: str = "model.safetensors") -> Path:
    """A checkpoint folder as OLMo writes it: only the weights and config.yaml."""
    folder.mkdir(parents=True, exist_ok=True)
    TrainConfig(model=model.config).save(folder / "config.yaml")
    state = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    if weights.endswith(".pt"):
        torch.save(state, folder / weights)
    else:
        save_file({olmo_key(name): tensor for name, tensor in state.items()}, folder / weights)
    return folder


def same_weights(first: OLMo, second: OLMo) -> None:
    ours, theirs = first.state_dict(), second.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def trained(steps: int = 2) -> tuple[OLMo, torch.optim.Optimizer, TrainConfig]:
    chosen = OptimizerConfig("adamw", weight_decay=0.1)
    config = TrainConfig(model=tiny_config(include_bias=True), optimizer=chosen)
    torch.manual_seed(0)
    model = OLMo(config.model)
    optimizer = build_optimizer(config.optimizer, model)
    for _ in range(steps):
        step(model, optimizer)
    return model, optimizer, config


def step(model: OLMo, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(model(IDS)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
    optimizer.step()


# --- our own format ----------------------------------------------------------------------------------------------


def test_a_saved_run_comes_back_bit_for_bit(tmp_path: Path) -> None:
    model, optimizer, config = trained()
    trainer = {"step": 2, "epoch": 0, "batch": 2, "tokens": 32}
    checkpoint.save(tmp_path / "run/step2", model, config, optimizer, trainer)
    folder = tmp_path / "run/step2"
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.yaml",
        "manifest.json",
        "model.safetensors",
        "optim.pt",
        "train.pt",
    ]
    assert [path.name for path in folder.parent.iterdir()] == ["step2"]
    assert asdict(load(folder / "config.yaml")) == asdict(config)
    assert read_training_state(folder, "train") == trainer

    loaded = checkpoint.load_model(folder, CPU)
    same_weights(loaded, model)
    again = build_optimizer(config.optimizer, loaded)
    checkpoint.load_optimizer_state(again, read_training_state(folder, "optim"), "here")
    step(model, optimizer)
    step(loaded, again)
    same_weights(loaded, model)


def test_optimizer_state_is_keyed_by_name_as_olmos_is(tmp_path: Path) -> None:
    model, optimizer, config = trained()
    checkpoint.save(tmp_path / "step2", model, config, optimizer, {})
    saved = torch.load(tmp_path / "step2/optim.pt", weights_only=True)
    names = [name for name, _ in model.named_parameters()]
    assert saved["state"].keys() == set(names)
    assert sorted(name for group in saved["param_groups"] for name in group["params"]) == sorted(names)
    for name, parameter in model.named_parameters():
        assert torch.equal(saved["state"][name]["exp_avg"], optimizer.state[parameter]["exp_avg"])
        assert torch.equal(saved["state"][name]["exp_avg_sq"], optimizer.state[parameter]["exp_avg_sq"])


def test_the_runs_own_learning_rate_survives_a_loaded_optimizer() -> None:
    model, optimizer, config = trained()
    saved = checkpoint.optimizer_state(optimizer)
    config.optimizer.learning_rate, config.optimizer.weight_decay = 0.5, 0.7
    again = build_optimizer(config.optimizer, model)
    checkpoint.load_optimizer_state(again, saved, "here")
    assert [(group["lr"], group["weight_decay"]) for group in again.param_groups] == [(0.5, 0.7), (0.5, 0.0)]


def test_optimizer_state_by_number_as_olmo_saves_it_under_ddp() -> None:
    model, optimizer, config = trained()
    plain = optimizer.state_dict()
    groups = [{**g, "param_names": [f"module.{name}" for name in g["param_names"]]} for g in plain["param_groups"]]
    again = build_optimizer(config.optimizer, model)
    checkpoint.load_optimizer_state(again, {"state": plain["state"], "param_groups": groups}, "here")
    for parameter in model.parameters():
        assert torch.equal(again.state[parameter]["exp_avg"], optimizer.state[parameter]["exp_avg"])


def test_a_parameter_without_optimizer_state_is_named() -> None:
    model, optimizer, config = trained()
    saved = checkpoint.optimizer_state(optimizer)
    del saved["state"]["transformer.blocks.1.ff_out.weight"]
    said = r"^here: no optimizer state for transformer\.blocks\.1\.ff_out\.weight; set reset_optimizer_state"
    with pytest.raises(ValueError, match=said):
        checkpoint.load_optimizer_state(build_optimizer(config.optimizer, model), saved, "here")


@pytest.mark.parametrize("fails", ["the first file", "the weights", "the last file", "the rename"])
@pytest.mark.parametrize("older", [False, True])
def test_a_folder_is_whole_or_not_there(
    tmp_path: Path, fails: str, older: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer, config = trained()
    folder = tmp_path / "step2"
    if older:
        checkpoint.save(folder, made_model(1, include_bias=True), config, optimizer, {"step": 1})

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    real = torch.save
    broken = {
        "the first file": (TrainConfig, "save", fail),
        "the weights": (checkpoint, "write_tensors", fail),
        "the last file": (torch, "save", lambda o, p: fail() if Path(p.name).name == "train.pt" else real(o, p)),
        "the rename": (Path, "rename", fail),
    }[fails]
    with monkeypatch.context() as patch:
        patch.setattr(*broken)
        with pytest.raises(OSError, match="disk full"):
            checkpoint.save(folder, model, config, optimizer, {"step": 2})
    if folder.exists():  # then it is the older one, whole
        assert older
        same_weights(checkpoint.load_model(folder, CPU), made_model(1, include_bias=True))
        assert read_training_state(folder, "train") == {"step": 1}
    # What was left over is in nobody's way.
    assert saves.latest(tmp_path) in (None, folder)
    checkpoint.save(folder, model, config, optimizer, {"step": 2})
    same_weights(checkpoint.load_model(folder, CPU), model)
    assert [path.name for path in tmp_path.iterdir()] == ["step2"]


def test_latest_is_the_highest_step_that_can_restart(tmp_path: Path) -> None:
    assert saves.latest(tmp_path) is None
    assert saves.latest(tmp_path / "nowhere") is None
    for name in ("step9", "step10-unsharded", "step100", "step200.partial", ".step300.partial", "stepX", "step7"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.pt").touch()
    (tmp_path / "step500").mkdir()  # weights alone cannot restart a run
    (tmp_path / "step600").touch()
    assert saves.latest(tmp_path) == tmp_path / "step100"
    saves.remove(tmp_path / "step100")
    assert not list(tmp_path.glob("*step100*"))
    assert saves.latest(tmp_path) == tmp_path / "step10-unsharded"


def test_missing_training_state_names_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"optim\.pt: missing; set reset_optimizer_state"):
        read_training_state(tmp_path, "optim")


# --- keys of OLMo's safetensors ----------------------------------------------------------------------------------

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


# --- hostile and damaged files -----------------------------------------------------------------------------------


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
    with pytest.raises(ValueError, match=r"model\.pt: damaged or no file of tensors"):
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
    with pytest.raises(ValueError, match=rf"{name}: damaged, or cannot be read safely \(.*\); a run with load"):
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
    assert said.startswith(f"{folder / weights}: damaged or no file of tensors: ") and "\n" not in said


@pytest.mark.parametrize("content", [[torch.ones(2)], {"a": {"b": torch.ones(2)}}, {"a": 3}, torch.ones(2)], ids=repr)
def test_a_torch_file_of_something_else_is_named(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"model\.pt: expected a flat dictionary of tensors"):
        read_tensors(tmp_path / "model.pt")


# --- weights and configuration disagree --------------------------------------------------------------------------


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


# --- OLMo's own layout -------------------------------------------------------------------------------------------


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


# --- transformers' layouts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"weight_tying": False},
        {"n_kv_heads": 2},
        {"n_kv_heads": 1, "clip_qkv": 0.2},
        {"rope_theta": 500, "weight_tying": False},
    ],
    ids=repr,
)
@pytest.mark.parametrize("sharded", [False, True])
def test_a_transformers_folder_gives_transformers_logits(tmp_path: Path, shape: dict[str, Any], sharded: bool) -> None:
    model = made_model(**shape)
    theirs = to_transformers(model)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB" if sharded else "1GB")
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) is sharded
    loaded = checkpoint.load_model(tmp_path, CPU).eval()
    same_weights(loaded, model)
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS), theirs(IDS).logits, rtol=1e-5, atol=1e-5)
    assert checkpoint.is_olmo(tmp_path)
    assert loaded.config.max_sequence_length == 64
    assert loaded.config.residual_dropout == loaded.config.attention_dropout == loaded.config.embedding_dropout == 0


def test_the_eps_of_a_transformers_folder_is_olmos(tmp_path: Path) -> None:
    """The weights are made so small that another eps would change the logits."""
    model = made_model()
    with torch.no_grad():
        model.transformer["wte"].weight.mul_(1e-2)
    theirs = to_transformers(model)
    theirs.save_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(
            checkpoint.load_model(tmp_path, CPU).eval()(IDS), theirs(IDS).logits, rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention_bias", True),
        ("hidden_act", "gelu"),
        ("rope_parameters", {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}),
        ("rope_scaling", {"type": "dynamic", "factor": 2.0}),
    ],
)
def test_what_a_transformers_folder_asks_for_and_we_lack_is_named(tmp_path: Path, key: str, value: Any) -> None:
    to_transformers(made_model()).save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**raw, key: value}))
    with pytest.raises(ValueError, match=key):
        checkpoint.load_model(tmp_path, CPU)


def test_a_transformers_folder_with_a_tensor_missing_or_left_over_is_named(tmp_path: Path) -> None:
    to_transformers(made_model()).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.gate_proj.weight"
    save_file({**state, "model.layers.1.mlp.gate_proj.bias": torch.ones(48)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.gate_proj\.bias"):
        checkpoint.load_model(tmp_path, CPU)
    del state[name]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"the weights lack {name}"):
        checkpoint.load_model(tmp_path, CPU)


def write_hf_olmo(folder: Path, model: OLMo, **overrides: Any) -> Path:
    """The layout of allenai/OLMo-1B: OLMo's keys prefixed `model.`, OLMo's settings in config.json."""
    folder.mkdir(exist_ok=True)
    raw = {key: getattr(value, "value", value) for key, value in asdict(model.config).items()}
    raw = {key: value for key, value in raw.items() if key not in ("resuscitation", "save_grad_")}
    raw |= {"model_type": "hf_olmo", "architectures": ["OLMoForCausalLM"], "use_cache": True, "flash_attention": True}
    (folder / "config.json").write_text(json.dumps({**raw, "transformers_version": "4.36.2", **overrides}))
    state = {f"model.{name}": t.detach().contiguous() for name, t in model.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("make", [tiny_config, tiny_olmo2_config])
@pytest.mark.parametrize("tied", [True, False])
def test_the_first_transformers_layout_loads(tmp_path: Path, make: Any, tied: bool) -> None:
    torch.manual_seed(0)
    model = OLMo(make(weight_tying=tied)).eval()
    folder = write_hf_olmo(tmp_path / "OLMo-1B", model)
    assert checkpoint.is_olmo(folder)
    loaded = checkpoint.load_model(folder, CPU).eval()
    same_weights(loaded, model)
    assert torch.equal(loaded(IDS), model(IDS))


@pytest.mark.parametrize("model_type", ["hf_olmo", "olmo"])
def test_its_revisions_call_it_by_two_names_and_have_files_of_two_kinds(tmp_path: Path, model_type: str) -> None:
    model = made_model()
    folder = write_hf_olmo(tmp_path / "OLMo-1B", model, model_type=model_type)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert checkpoint.is_olmo(folder)
    same_weights(checkpoint.load_model(folder, CPU), model)


@pytest.mark.parametrize(
    ("key", "value"),
    [("alibi", True), ("block_type", "llama"), ("save_grad_", True)],
)
def test_what_the_first_transformers_layout_asks_for_and_we_lack_is_named(tmp_path: Path, key: str, value: Any) -> None:
    folder = write_hf_olmo(tmp_path / "OLMo-1B", made_model(), **{key: value})
    with pytest.raises(ValueError, match=key):
        checkpoint.load_model(folder, CPU)


def test_another_family_is_no_olmo(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt_neox"}))
    assert not checkpoint.is_olmo(tmp_path)
    with pytest.raises(ValueError, match="a gpt_neox model; only OLMo and OLMo 2 can be trained"):
        checkpoint.read_config(tmp_path)


def test_a_config_json_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not JSON"):
        checkpoint.read_config(tmp_path)


# --- resuscitation on the way ------------------------------------------------------------------------------------


def with_resuscitation(config: ModelConfig, name: Path | str) -> ModelConfig:
    return ModelConfig(**{**asdict(config), "resuscitation": str(name)})


@pytest.fixture
def multipliers() -> Tensor:
    values = torch.ones(2, 48)
    values[0, 3], values[1, 40] = 2.0, 0.25
    return values


@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize("weights", ["model.safetensors", "model.pt"])
def test_a_multiplier_file_is_applied(tmp_path: Path, multipliers: Tensor, beside: bool, weights: str) -> None:
    model = made_model()
    folder = write_olmo(tmp_path / "checkpoint", model, weights)
    file = (folder if beside else tmp_path) / "edit.safetensors"
    Multipliers(multipliers, multipliers != 1, {"checkpoint_fingerprint": fingerprint(model.state_dict())}).save(file)
    named = "edit.safetensors" if beside else file
    loaded = checkpoint.load_model(folder, CPU, config=with_resuscitation(model.config, named))
    for name, tensor in rescale(model.state_dict(), multipliers).items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_a_full_state_dict_may_have_the_names_that_wrapping_left(tmp_path: Path, multipliers: Tensor) -> None:
    model = made_model()
    folder = write_olmo(tmp_path / "checkpoint", model)
    wanted = rescale(model.state_dict(), multipliers)
    torch.save({f"_fsdp_wrapped_module.{name}": tensor for name, tensor in wanted.items()}, folder / "edit.pt")
    loaded = checkpoint.load_model(folder, CPU, config=with_resuscitation(model.config, "edit.pt"))
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in loaded.state_dict().items())


def test_a_multiplier_file_fits_the_same_weights_in_another_layout(tmp_path: Path, multipliers: Tensor) -> None:
    model = made_model(weight_tying=False)
    to_transformers(model).save_pretrained(tmp_path / "hf")
    file = tmp_path / "edit.safetensors"
    Multipliers(multipliers, multipliers != 1, {"checkpoint_fingerprint": fingerprint(model.state_dict())}).save(file)
    loaded = checkpoint.load_model(tmp_path / "hf", CPU, config=with_resuscitation(model.config, file))
    edited = rescale(model.state_dict(), multipliers)
    assert all(torch.equal(tensor, edited[name]) for name, tensor in loaded.state_dict().items())


@pytest.mark.parametrize("about", [{}, {"checkpoint_fingerprint": None}, {"checkpoint_fingerprint": "other"}])
def test_a_multiplier_file_of_another_checkpoint_is_refused(
    tmp_path: Path, multipliers: Tensor, about: dict[str, Any]
) -> None:
    model = made_model()
    folder = write_olmo(tmp_path / "checkpoint", model)
    if about.get("checkpoint_fingerprint") == "other":
        about = {"checkpoint_fingerprint": fingerprint(made_model(1).state_dict())}
    Multipliers(multipliers, multipliers != 1, about).save(tmp_path / "edit.safetensors")
    with pytest.raises(ValueError, match=r"edit\.safetensors: made for another checkpoint than .*checkpoint"):
        checkpoint.load_model(folder, CPU, config=with_resuscitation(model.config, tmp_path / "edit.safetensors"))


def test_a_full_state_dict_replaces_the_weights(tmp_path: Path) -> None:
    model, other = made_model(0), made_model(1)
    folder = write_olmo(tmp_path / "checkpoint", model)
    torch.save(other.state_dict(), folder / "edited.pt")
    same_weights(
        checkpoint.load_model(folder, CPU, config=with_resuscitation(model.config, "edited.pt")), OLMo.eval(other)
    )


def test_a_resuscitation_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    model = made_model()
    folder = write_olmo(tmp_path / "checkpoint", model)
    with pytest.raises(FileNotFoundError, match=r"model\.resuscitation: nowhere\.pt is no file"):
        checkpoint.load_model(folder, CPU, config=with_resuscitation(model.config, "nowhere.pt"))


# --- where checkpoints lie ---------------------------------------------------------------------------------------


def test_a_folder_resolves_to_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert checkpoint.resolve(str(tmp_path)) == tmp_path
    monkeypatch.chdir(tmp_path)
    (tmp_path / "allenai/OLMo-1B").mkdir(parents=True)
    assert checkpoint.resolve("allenai/OLMo-1B") == Path("allenai/OLMo-1B")
    with pytest.raises(FileNotFoundError, match="allenai/OLMo-7B: no such checkpoint folder"):
        checkpoint.resolve("allenai/OLMo-7B")  # its folder is there, so it is no hub id


@pytest.mark.parametrize("name", ["nowhere", "/nowhere/at/all", "a/b/c", "runs/x/step5-unsharded"])
def test_a_path_that_is_no_hub_id_is_not_looked_up(name: str) -> None:
    with pytest.raises(FileNotFoundError, match="no such checkpoint folder"):
        checkpoint.resolve(name)


@pytest.mark.parametrize("name", ["owner/name", "owner/name@step738020-tokens3095B"])
def test_a_hub_id_offline_is_one_clear_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as caught:
        checkpoint.resolve(name)
    said = str(caught.value)
    assert said.startswith(f"{name}: no such folder, ") and "\n" not in said


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


# --- optimizer states that do not fit ----------------------------------------------------------------------------


def spoiled(change: str, saved: dict[str, Any]) -> Any:
    name = "transformer.blocks.1.ff_out.weight"
    state = saved["state"][name]
    if change == "shape":
        state["exp_avg"] = state["exp_avg"].flatten()[:-1]
    elif change == "transposed":
        state["exp_avg_sq"] = state["exp_avg_sq"].T.contiguous()
    elif change == "type":
        state["exp_avg"] = state["exp_avg"].long()
    elif change == "step":
        del state["step"]
    elif change == "another optimizer":
        del state["exp_avg_sq"], state["step"]
    elif change == "no tensors":
        state["exp_avg"] = 3.0
    elif change == "numbers":
        saved["state"][name] = 3
    elif change == "groups":
        saved["param_groups"] = [{}]
    elif change == "a list":
        return [saved]
    return saved


@pytest.mark.parametrize(
    "change, told",
    [
        (
            "shape",
            r"exp_avg of transformer\.blocks\.1\.ff_out\.weight has shape \(1535,\) and torch.float32, not \(32, 48\)",
        ),
        ("transposed", r"exp_avg_sq of .* has shape \(48, 32\)"),
        ("type", r"exp_avg of .* and torch\.int64, not \(32, 48\) and floating point"),
        ("step", r"holds exp_avg, exp_avg_sq of .*, the optimizer keeps exp_avg, exp_avg_sq, step"),
        ("another optimizer", r"holds exp_avg of .*, the optimizer keeps"),
        ("no tensors", r"holds exp_avg, exp_avg_sq, step of "),
        ("numbers", "holds no optimizer state"),
        ("groups", "holds no optimizer state"),
        ("a list", "holds no optimizer state"),
    ],
)
def test_an_optimizer_state_that_does_not_fit_is_named(change: str, told: str) -> None:
    """Fused AdamW would read and write beyond moments of the wrong shape."""
    model, optimizer, config = trained()
    saved = spoiled(change, checkpoint.optimizer_state(optimizer))
    with pytest.raises(ValueError, match=f"^here: {told}.*; set reset_optimizer_state$"):
        checkpoint.load_optimizer_state(build_optimizer(config.optimizer, model), saved, "here")


def test_the_state_of_adamw_is_not_lions() -> None:
    model, optimizer, _ = trained()
    lion = build_optimizer(OptimizerConfig("lionw"), model)
    with pytest.raises(ValueError, match="the optimizer keeps exp_avg; set reset_optimizer_state"):
        checkpoint.load_optimizer_state(lion, checkpoint.optimizer_state(optimizer), "here")


def test_an_optimizer_state_of_wrapped_and_grouped_blocks() -> None:
    model, optimizer, config = trained()
    saved = checkpoint.optimizer_state(optimizer)
    for name in list(saved["state"]):
        renamed = name.replace("transformer.blocks.0.", "transformer.block_groups.0.0.")
        renamed = renamed.replace("transformer.blocks.1.", "transformer.block_groups.0.1.")
        saved["state"]["_fsdp_wrapped_module." + renamed] = saved["state"].pop(name)
    again = build_optimizer(config.optimizer, model)
    checkpoint.load_optimizer_state(again, {"state": saved["state"]}, "here")
    for parameter in model.parameters():
        assert torch.equal(again.state[parameter]["exp_avg"], optimizer.state[parameter]["exp_avg"])


# --- more files of others ----------------------------------------------------------------------------------------


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
    with pytest.raises(ValueError, match=r"index\.json: no index of weights"):
        checkpoint.read_state(tmp_path)


def test_the_saved_frequencies_of_old_transformers_are_passed_over(tmp_path: Path) -> None:
    model = made_model()
    to_transformers(model).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(state, tmp_path / "model.safetensors")
    same_weights(checkpoint.load_model(tmp_path, CPU), model)


@pytest.mark.parametrize(
    "weight, told",
    [
        (torch.ones(128, 32, dtype=torch.int8), r"transformer\.wte\.weight holds torch\.int8 numbers"),
        (torch.ones(128, 32, dtype=torch.complex64), r"holds torch\.complex64 numbers"),
        (torch.ones(128, 32).to_sparse(), "weights are dense and floating-point"),
    ],
    ids=["int8", "complex", "sparse"],
)
def test_weights_that_are_no_dense_floats_are_named(tmp_path: Path, weight: Tensor, told: str) -> None:
    folder = write_olmo(tmp_path / "checkpoint", made_model(), "model.pt")
    state = dict(made_model().state_dict())
    state["transformer.wte.weight"] = weight
    torch.save(state, folder / "model.pt")
    with pytest.raises(ValueError, match=told):
        checkpoint.load_model(folder, CPU)


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
        with pytest.raises(ValueError, match="it is no torch file, or holds more than tensors") as caught:
            checkpoint.load_model(folder, CPU)
        assert "weights_only" not in str(caught.value) and "\x1b" not in str(caught.value)


HF = {
    "model_type": "olmo",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "vocab_size": 128,
}


def test_what_a_config_json_tells_is_kept(tmp_path: Path) -> None:
    told = {"eos_token_id": [7, 8], "pad_token_id": 9, "attention_dropout": 0.25, "rope_theta": 500000.0}
    (tmp_path / "config.json").write_text(json.dumps({**HF, **told}))
    config = checkpoint.read_config(tmp_path)
    assert (config.eos_token_id, config.pad_token_id, config.attention_dropout, config.rope_theta) == (
        7,
        9,
        0.25,
        500000,
    )


@pytest.mark.parametrize(
    "changed, told",
    [
        ({"hidden_size": None}, "model.d_model"),
        ({"hidden_size": "thirty-two"}, "model.d_model"),
        ({"num_attention_heads": 0}, "model.n_heads: 0 must be at least 1"),
        ({"intermediate_size": None}, "no intermediate_size"),
        ({"intermediate_size": "48"}, "model."),
        ({"rope_theta": 1.9}, "model.rope_theta"),
        ({"rope_parameters": "x"}, "rope_parameters: expected keys and values"),
        ({"clip_qkv": -1}, "model.clip_qkv: -1.0 must be more than 0"),
        ({"attention_dropout": "x"}, "model.attention_dropout"),
        ({"olmo_config": 3}, "olmo_config: expected keys and values"),
    ],
    ids=str,
)
def test_a_config_json_that_makes_no_model_is_named(tmp_path: Path, changed: dict[str, Any], told: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**HF, **changed}))
    if told == "model.":  # a number as text is still a number
        assert checkpoint.read_config(tmp_path).projection_size in (48, 96)
        return
    with pytest.raises(ValueError) as caught:
        checkpoint.read_config(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: {told}") and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["[]", '"x"', "3"])
def test_a_config_json_of_something_else_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json: expected keys and values"):
        checkpoint.read_config(tmp_path)


@pytest.mark.parametrize(
    "key, value", [("clip_qkv", 3.0), ("scale_logits", True), ("rope_theta", 500), ("layer_norm_eps", 1e-6)]
)
def test_a_run_may_not_change_what_the_weights_mean(tmp_path: Path, key: str, value: Any) -> None:
    folder = write_olmo(tmp_path / "checkpoint", made_model())
    with pytest.raises(ValueError, match=f"model.{key}: {value}, but the checkpoint"):
        checkpoint.load_model(folder, CPU, config=tiny_config(**{key: value}))


def test_interpolations_of_a_checkpoints_config_lead_out_of_its_model(tmp_path: Path) -> None:
    folder = write_olmo(tmp_path / "checkpoint", made_model())
    text = (folder / "config.yaml").read_text().replace("n_layers: 2", "n_layers: ${layers}")
    (folder / "config.yaml").write_text("layers: 2\n" + text)
    same_weights(checkpoint.load_model(folder, CPU), made_model())


# --- identity ----------------------------------------------------------------------------------------------------


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
