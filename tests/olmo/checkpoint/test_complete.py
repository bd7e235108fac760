"""What follows for a configuration from the folder of its model, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf

from olmo import checkpoint
from olmo.checkpoint import families
from olmo.config import ModelConfig, TrainConfig, load
from olmo.config.setting import default_of, setting_of
from olmo.exceptions import ConfigurationError, FailedOnAllRanks, exit_status
from olmo.tokenizer import load_tokenizer
from scripts import data_order, inspect_data, train
from tests.architectures import built
from tests.checkpoints import made_model, write_olmo
from tests.reference import END_OF_TEXT, tiny_tokenizer
from tests.running import CPU, SHORT, series, write_family, write_world
from tests.running import train as run
from tests.serving import Server, hub_serving

REFUSED = [field.name for field in fields(ModelConfig) if not setting_of(field).any_family]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of a tiny Llama: `family-plain.yaml` with the least that trains, its model in the folder `model`."""
    folder = write_world(tmp_path_factory.mktemp("world"))
    write_family(folder, "Llama", eos_token_id=5)
    (folder / "model/tokenizer_config.json").write_text(json.dumps({"eos_token": END_OF_TEXT}))
    return folder


def plain(world: Path, *overrides: str) -> TrainConfig:
    return load(world / "family-plain.yaml", overrides, checkpoint.complete)


def write_entries(path: Path, target: str) -> None:
    """One entry, whose probes all have this target."""
    probes = {f"{kind}_{part}": [text] for kind in ("mem", "gen", "hard_gen")
              for part, text in (("input", "The man has"), ("target", target))}  # fmt: skip
    path.write_text(json.dumps([{"train_context": "A man.", "paraphrases": [], **probes}]))


# --- what is filled in ---


def test_the_folder_decides_vocabulary_eos_padding_and_tokenizer(world: Path, tmp_path: Path) -> None:
    model, name = world / "model", str(world / "model")
    expected = {"transformers": name, "vocab_size": 128, "embedding_size": 128, "eos_token_id": 0, "pad_token_id": 1}
    of_load_path = plain(world)
    assert of_load_path.model == ModelConfig(max_sequence_length=SHORT, **expected)  # type: ignore[arg-type]
    assert of_load_path.tokenizer.identifier == name
    assert plain(world, f"--model.transformers={name}") == of_load_path
    new = plain(world, f"--model.transformers={name}", "--load_path=null")
    assert new.load_path is None and new.model == of_load_path.model and new.tokenizer == of_load_path.tokenizer
    (tmp_path / "child.yaml").write_text(f"base: {world / 'family-plain.yaml'}\nmodel: {{max_sequence_length: 8}}")
    assert load(tmp_path / "child.yaml", (), checkpoint.complete).model.max_sequence_length == 8
    chosen = plain(world, "--model.eos_token_id=7", "--model.pad_token_id=9", "--tokenizer.identifier=gpt2").model
    assert (chosen.eos_token_id, chosen.pad_token_id) == (7, 9)
    shutil.copytree(model, tmp_path / "model")
    raw = json.loads((model / "config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps({**raw, "pad_token_id": None}))
    (tmp_path / "model/tokenizer_config.json").unlink()
    other = plain(world, f"--load_path={tmp_path / 'model'}").model
    assert (other.eos_token_id, other.pad_token_id) == (5, 5)


def test_keys_of_our_models_are_refused_even_with_their_defaults(world: Path) -> None:
    assert {"d_model", "init_fn", "init_device", "precision", "temperature_MLP", "block_group_size"} < set(REFUSED)
    for field in fields(ModelConfig):
        if field.name in REFUSED:
            section = {"max_sequence_length": SHORT, field.name: default_of(field)}
            with pytest.raises(ConfigurationError, match=rf"^model\.{field.name}: does not apply to a llama model"):
                checkpoint.complete(OmegaConf.create({"model": section, "load_path": str(world / "model")}))
    with pytest.raises(ConfigurationError, match=r"leave out d_model, n_heads \(model\.transformers: "):
        plain(world, f"--model.transformers={world / 'model'}", "--model.n_heads=2", "--model.d_model=8")


def test_a_saved_configuration_repeats_and_resumes_its_run(
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Also after the folder of the first weights has been deleted; paths are relative to the working directory."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(world / "model", "model")
    capfd.readouterr()
    arguments = [str(world / "family-plain.yaml"), "--load_path=model", "--save_folder=run", "--save_interval=2"]
    assert exit_status(train.main, [*arguments, "--stop_at=4", "--device=cpu"]) == 0
    assert capfd.readouterr() == ("", "")  # no progress bars, nor log lines of transformers'
    assert "model: llama, a vocabulary of 128 tokens, EOS 0, padding 1; tokenizer: model" in caplog.messages
    assert "seed 11 varies: order of the data" in caplog.messages  # nothing is dropped, whatever ours would drop
    saved = load("run/config.yaml", (), checkpoint.complete)
    assert saved.model.transformers == saved.load_path == saved.tokenizer.identifier == "model"
    run(Path("run/config.yaml"), Path("again"), "--stop_at=7")
    shutil.rmtree("model")
    with pytest.raises(FileNotFoundError, match=r"^model: no such checkpoint folder"):
        load("run/config.yaml", (), checkpoint.complete)
    assert load("run/config.yaml", ["--try_load_latest_save"], checkpoint.complete).model == saved.model
    write_entries(tmp_path / "entries.json", "seen")  # for which the checkpoint's tokenizer is read
    knowledge = ["--injection.once=entries.json", "--injection.rounds=1", "--inject_interval=100"]
    run(
        Path("run/config.yaml"),
        Path("run"),
        "--try_load_latest_save",
        "--stop_at=7",
        "--allow_changed_settings",
        *knowledge,
    )
    assert series(Path("run")) == series(Path("again"))


def test_olmo_folders_describe_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where the section `model` describes no model of ours; else it is left as it is."""
    folder = write_olmo(tmp_path / "olmo", made_model(include_bias=True))
    tiny_tokenizer(folder / "tokenizer.json")
    raw = OmegaConf.create({"model": {"max_sequence_length": 16}, "load_path": str(folder)})
    checkpoint.complete(raw)
    found = OmegaConf.merge(OmegaConf.structured(ModelConfig), raw.model)
    assert OmegaConf.to_object(found) == ModelConfig(**{**asdict(made_model(include_bias=True).config), **found})  # type: ignore
    assert found.include_bias and found.d_model == 32 and found.max_sequence_length == 16
    assert raw.tokenizer.identifier == str(folder)
    for load_path in (str(folder), str(tmp_path / "nowhere")):
        settings = {"model": {"d_model": 64, "n_heads": 8}, "load_path": load_path}
        raw = OmegaConf.create(settings)
        checkpoint.complete(raw)
        assert raw == settings


# --- the hub ---


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """The hub's client is real but for the address and the cache."""
    with hub_serving(tmp_path / "hub", monkeypatch) as server:
        yield server


def test_a_revision_of_the_hub_needs_its_json_files_alone(
    world: Path, hub: Server, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub import constants

    name, files = "owner/name@step3", {path.name: path.read_bytes() for path in (world / "model").iterdir()}
    hub.add_hub_model("owner/name", "step3", files)
    config = plain(world, f"--load_path={name}")
    assert config.model.transformers == config.tokenizer.identifier == name and config.model.vocab_size == 128
    assert not [asked.path for asked in hub.asked if "safetensors" in asked.path]
    assert capfd.readouterr() == ("", "")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert plain(world, f"--load_path={name}") == config
    assert plain(world, f"--model.transformers={name}", "--load_path=null").model == config.model
    assert load_tokenizer(name).get_vocab_size() == 128
    with pytest.raises(ValueError, match=r"^owner/name@step4: cannot load this tokenizer: "):
        load_tokenizer("owner/name@step4")


def test_a_model_of_ours_needs_no_hub(
    world: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    overrides = ["--load_path=allenai/OLMo-1B@step738020-tokens3095B"]
    assert load(world / "plain.yaml", overrides, checkpoint.complete) == load(world / "plain.yaml", overrides)
    assert caplog.messages == []


# --- bad input ---


def changed(**values: Any) -> Callable[[Path], None]:
    """A folder whose config.json has other values; None deletes a key."""

    def change(folder: Path) -> None:
        raw = {**json.loads((folder / "config.json").read_text()), **values}
        kept = {key: value for key, value in raw.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(kept))

    return change


def without(*names: str, **contents: str) -> Callable[[Path], None]:
    """A folder without some files, and with others (`a_json` is a.json)."""

    def change(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()
        for name, content in contents.items():
            (folder / ".".join(name.rsplit("_", 1))).write_text(content)

    return change


def nameless(folder: Path) -> None:
    changed(eos_token_id=None)(folder)
    without("tokenizer_config.json", "generation_config.json")(folder)


def a_run(folder: Path) -> None:
    """The folder of a run, and what it saved."""
    without("config.json", config_yaml="model: {transformers: some/model, max_sequence_length: 16}")(folder)
    (folder / "step6-unsharded").mkdir()


CODE = {"AutoConfig": "configuration_own.Own", "AutoModelForCausalLM": "modeling_own.Own"}
ADAPTER = "an adapter (PEFT), not a model; merge it into its base model"
MODEL = ("config.json", "model.safetensors")


@pytest.mark.parametrize(
    "change, status, told",
    [
        (without("model.safetensors"), 1, "{folder}: no weights here, only a configuration"),
        (without("config.json"), 1, "{folder}: weights without config.json or config.yaml; copy"),
        (without(*MODEL, "tokenizer.json", "tokenizer_config.json"), 1, "{folder}: no config.json or config.yaml here"),
        (without(*MODEL, adapter_config_json="{}"), 1, "{folder}: " + ADAPTER),
        (without(adapter_config_json="{}"), 1, "{folder}: " + ADAPTER),
        (without(*MODEL, model_gguf="GGUF"), 1, "{folder}: a model of llama.cpp (GGUF)"),
        (without(config_json='{"model_type": "ll'), 1, "{folder}/config.json: not JSON: "),
        (without(config_json="[]"), 1, "{folder}/config.json: expected keys and values"),
        (changed(model_type=None), 1, "{folder}/config.json: has no model_type"),
        (changed(model_type="own", auto_map=CODE), 1, "config.json requires code of its own (auto_map)"),
        (changed(model_type="own"), 1, "has model type `own` but Transformers does not recognize"),
        (changed(model_type="t5"), 1, "{folder}: transformers has no causal language model of the type t5"),
        (changed(model_type="distilbert"), 1, "no causal language model of the type distilbert"),
        (changed(hidden_size="many"), 1, "Field 'hidden_size' expected int, got str (value: 'many')"),
        (
            changed(hidden_size=64),
            1,
            "{folder}: lm_head.weight has shape (128, 32), its config.json asks for (128, 64)",
        ),
        (without(config_json=json.dumps({"model_type": "mpt", "max_seq_len": 16})), 2, "was made for 16 tokens"),
        (nameless, 2, "model.eos_token_id: missing; neither the tokenizer nor the config.json of {folder} names"),
        (changed(eos_token_id=400), 0, ""),  # the tokenizer's counts
        (changed(auto_map=CODE), 0, ""),  # a family that transformers has
        (without(tokenizer_config_json=json.dumps({"eos_token": END_OF_TEXT, "auto_map": CODE})), 0, ""),
        (without("tokenizer.json"), 0, ""),  # nothing is encoded
        (a_run, 1, "{folder}: a folder that contains checkpoints; name one of them (load_path)"),
    ],
)
def test_folders_that_are_no_models_are_one_line(
    world: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    change: Callable[[Path], None],
    status: int,
    told: str,
) -> None:
    folder = tmp_path / "given"
    shutil.copytree(world / "model", folder)
    change(folder)
    arguments = [str(world / "family-plain.yaml"), f"--load_path={folder}", f"--save_folder={tmp_path / 'run'}"]
    capfd.readouterr()
    assert exit_status(train.main, [*arguments, "--dry_run", "--device=cpu"]) == status
    error = capfd.readouterr().err
    assert told.format(folder=folder) in error and error.count("\n") == (status > 0)


INJECTS = ("--injection.once={world}/once.json", "--injection.rounds=1", "--inject_interval=2")


@pytest.mark.parametrize(
    "overrides, status, told",
    [
        (["--model.max_sequence_length=257"], 2, "max_sequence_length: 257, but {folder} was made for 256 tokens; use"),
        (["--model.max_sequence_length=null"], 2, "model.max_sequence_length: missing; it is the number of tokens"),
        (["--model.vocab_size=100"], 2, "model.vocab_size: 100, but {folder} has 128 rows; leave it out"),
        (["--model.eos_token_id=128"], 2, "model.eos_token_id: 128 is none of the tokens 0 to 127"),
        (["--model.transformers=other"], 2, "model.transformers: other, but load_path is {folder}, which decides"),
        (["--load_path={world}/nowhere"], 1, "{world}/nowhere: no such checkpoint folder (load_path)"),
        (["--data.paths=[{world}/foreign.npy]"], 1, "holds token 200, the model's vocabulary has 128"),
        (["--evaluators=[{{label: held, data: {{paths: [{world}/foreign.npy]}}}}]", "--eval_on_load"], 1,
         "evaluators.held: instance 0 holds token 200, the model's vocabulary has 128"),
        (["--evaluators=[{{label: h, type: knowledge_entropy, data: {{paths: [{world}/foreign.npy]}}}}]"], 1,
         "evaluators.h: instance 0 holds token 200, the model's vocabulary has 128"),
        (["--load_path={world}/small", *INJECTS], 2,
         "tokenizer.identifier: {world}/small has 128 tokens, model.embedding_size is 64"),
        (["--load_path={world}/slow", *INJECTS], 1,
         "make one of its tokenizer.model: transformers' AutoTokenizer.from_pretrained"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_the_model_are_one_line(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], status: int, told: str
) -> None:
    if not (world / "slow").exists():
        np.full(64 * SHORT, 200, "<u2").tofile(world / "foreign.npy")
        for name, change in (
            ("small", changed(vocab_size=64)),
            ("slow", without("tokenizer.json", "tokenizer_config.json", tokenizer_model="")),
        ):
            change(Path(shutil.copytree(world / "model", world / name)))
    places = {"folder": world / "model", "world": world}
    given = [override.format(**places) for override in overrides]
    arguments = [str(world / "family-plain.yaml"), f"--save_folder={tmp_path / 'run'}", "--max_duration=2"]
    assert exit_status(train.main, [*arguments, "--device=cpu", *given]) == status
    error = capsys.readouterr().err
    assert error.startswith("error: ") and told.format(**places) in error and error.count("\n") == 1


def test_a_balancing_loss_that_fails_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of DeepSeek-V4 does in transformers 5.23; found at the start of a run, not in its first step."""
    from transformers.models.olmoe import modeling_olmoe

    monkeypatch.setattr(modeling_olmoe, "load_balancing_loss_func", lambda *_, **__: ()[0])
    built("OLMoE").save_pretrained(tmp_path)
    config = ModelConfig(transformers=str(tmp_path), max_sequence_length=SHORT)
    with pytest.raises(ValueError, match="transformers cannot run this model: tuple index out of range"):
        families.load_model(tmp_path, CPU, config)


def test_one_of_several_processes_reports_a_folder(world: Path, tmp_path: Path) -> None:
    for load_path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FailedOnAllRanks, match=str(tmp_path)):
            train.main([str(world / "family-plain.yaml"), f"--load_path={load_path}"])


def test_a_probe_beyond_the_vocabulary_is_one_line(world: Path, tmp_path: Path) -> None:
    """An added token, which a text may have: that the model has no row for it is no reason to refuse its tokenizer."""
    folder = Path(shutil.copytree(world / "model", tmp_path / "model"))
    tokenizer = load_tokenizer(str(folder))
    tokenizer.add_tokens(["Zorb"])
    tokenizer.save(str(folder / "tokenizer.json"))
    write_entries(tmp_path / "entries.json", "Zorb")
    probes = "--evaluators=[{label: once_semantic, data: {dataset_path: " + f"{tmp_path}/entries.json" + "}}]"
    with pytest.raises(ConfigurationError, match=r"^evaluators.once_semantic: a probe has token 128, the model's voc"):
        run(world / "family-plain.yaml", tmp_path / "run", f"--load_path={folder}", probes)


def test_commands_without_a_model_complete_their_configuration(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(world / "family-plain.yaml")
    assert exit_status(inspect_data.main, [config, "--step=1", "--model.d_model=8"]) == 2
    assert exit_status(data_order.main, ["rebuild", config, f"--output={tmp_path / 'o'}", "--model.d_model=8"]) == 2
    assert capsys.readouterr().err.count("model.d_model: does not apply to a llama model") == 2
