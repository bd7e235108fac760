"""The settings: OLMo's keys and defaults are all there, each is read or documented as not read, and saved ones load."""

import dataclasses
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from olmo import config as config_module
from olmo.config import (
    WITHOUT_EFFECT,
    ActivationType,
    CompilerConfig,
    EvaluatorConfig,
    TrainConfig,
    load,
    load_model_config,
)
from olmo.config.setting import setting_of, walk
from tests.olmo.config.configurations import MINIMAL, write

ROOT = Path(__file__).resolve().parents[3]


def olmo_keys() -> Iterator[tuple[str, str, str, str | None]]:
    """(section, key, type, default) of every key in the table beside this file."""
    section = ""
    for line in (Path(__file__).parent / "olmo_config_keys.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            continue
        if not line.startswith(" "):
            section = line
        elif section.endswith("Config"):
            key, rest = line.strip(" +").split(": ", 1)
            kind, _, default = rest.partition(" = ")
            yield section, key, kind, default or None


def evaluated(expression: str) -> Any:
    if choice := re.fullmatch(r"([A-Z]\w+)\.(\w+)", expression):  # OLMo's are enums, ours the values
        assert choice[2] in typing.get_args(getattr(config_module, choice[1]))
        return choice[2]
    builtin = {"List": list, "Dict": dict, "Tuple": tuple}
    names = {**vars(typing), **vars(dataclasses), **vars(config_module), **builtin}
    return eval(expression, names)


@pytest.mark.parametrize("section, key, kind, default", list(olmo_keys()), ids=lambda value: str(value)[:40])
def test_every_key_of_olmo_is_there_with_its_type_and_default(
    section: str, key: str, kind: str, default: str | None
) -> None:
    schema = getattr(config_module, section)
    ours = {f.name: f for f in dataclasses.fields(schema)}[key]
    if key == "memmap_dtype":  # null: OLMo's default, and no statement that it is the right one
        assert (ours.default, setting_of(ours).null_is) == (None, evaluated(str(default)))
        return
    assert typing.get_type_hints(schema)[key] == evaluated(kind)
    if default is None:  # the one mandatory key of OLMo
        assert ours.default == "???"
        return
    expected = evaluated(default)
    if isinstance(expected, dataclasses.Field):
        assert ours.default_factory() == expected.default_factory()  # type: ignore[misc, operator]
    else:
        assert ours.default == expected
        assert type(ours.default) is type(expected)


def test_every_enum_of_olmo_has_its_values() -> None:
    text = (Path(__file__).parent / "olmo_config_keys.txt").read_text(encoding="utf-8")
    used = " ".join(kind for _, _, kind, _ in olmo_keys())
    enums = [e for e in re.findall(r"^(\w+)\n    ([\w, ]+)$", text, re.MULTILINE) if re.search(rf"\b{e[0]}\b", used)]
    assert len(enums) == 16  # all but CheckpointType, which is the type of no key
    for name, values in enums:
        # A kind of our own, and a strategy that OLMo has had since 0.6.0.
        more = {"EvaluatorType": {"knowledge_entropy"}, "DistributedStrategy": {"single"}}.get(name, set())
        assert set(typing.get_args(getattr(config_module, name))) == {*values.split(", "), *more}, name


def keys_of(schema: type, prefix: str = "") -> Iterator[str]:
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        inner = [c for c in (hints[field.name], *typing.get_args(hints[field.name])) if dataclasses.is_dataclass(c)]
        if inner:
            yield from keys_of(inner[0], f"{prefix}{field.name}.")  # type: ignore[arg-type]
        else:
            yield prefix + field.name


def test_no_key_is_ignored() -> None:
    """Every key is read somewhere, refused, or marked as one without effect."""
    several = ("precision", "model.init_device")  # of which some values are refused
    refused = [key for key, _, field in walk(TrainConfig) if setting_of(field).only and key not in several]
    silent = [
        *WITHOUT_EFFECT,
        *refused,
        *(key for key in keys_of(TrainConfig) if key.startswith(tuple(f"{r}." for r in refused))),
        *(key for key in keys_of(TrainConfig) if key.startswith("fsdp.")),  # distributed.py answers for the whole
        *(key for key in keys_of(TrainConfig) if key.startswith("compile.")),  # handed to torch as they are
        *("base", "optimizer.no_decay_norm_and_bias"),  # gone once the file is loaded
    ]
    files = [path for part in ("olmo", "analysis", "scripts") for path in (ROOT / part).rglob("*.py")]
    source = "\n".join(path.read_text(encoding="utf-8") for path in files)
    unread = [
        key
        for key in keys_of(TrainConfig)
        if key not in silent
        and not key.startswith("evaluators.data.")
        and not re.search(rf"\.{key.rpartition('.')[2]}\b", source)
    ]
    assert not unread


def test_every_key_is_documented_at_its_field() -> None:
    for key, _, field in walk(TrainConfig):
        setting = setting_of(field)
        assert setting.help or setting.no_effect or setting.instead, key
        assert bool(setting.only) == bool(setting.instead) and not (setting.only and setting.no_effect), key
        assert "|" not in str(setting), key  # which would end a cell of the table in docs/config.md
    assert set(WITHOUT_EFFECT) <= set(keys_of(TrainConfig))


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**31),
    rate=st.floats(1e-9, 1e3),
    factor=st.none() | st.floats(0.1, 10),
    kind=st.sampled_from(typing.get_args(ActivationType)),
    name=st.none() | st.text(st.characters(categories=("L", "N", "P", "Zs")), min_size=1).filter(str.strip),
    duration=st.integers(1, 10**6) | st.sampled_from(["1ep", "2e9T"]),
    paths=st.none() | st.lists(st.sampled_from(["a.npy", "b/c.npy", "d: e"]), min_size=1),
    labels=st.lists(st.sampled_from(["piqa", "sciq"]), max_size=2, unique=True),
)
def test_a_saved_configuration_loads_as_itself(
    tmp_path_factory: pytest.TempPathFactory, seed, rate, factor, kind, name, duration, paths, labels
) -> None:
    config = TrainConfig(seed=seed, run_name=None if name is None else name.replace("$", ""), max_duration=duration)
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = rate
    config.model.init_cutoff_factor, config.model.activation_type = factor, kind
    config.data.paths = paths
    config.compile = CompilerConfig(dynamic=False)
    config.evaluators = [EvaluatorConfig(label, "downstream") for label in labels]
    path = tmp_path_factory.mktemp("saved") / "config.yaml"
    config.save(path)
    assert load(path) == config
    assert load_model_config(path) == config.model


def test_resolved_configuration_stands_alone(tmp_path: Path) -> None:
    """The config.yaml of a run loads wherever the run's folder lies, without the files it was made from."""
    write(tmp_path, MINIMAL + "run_name: x\nsave_folder: runs/${run_name}\n", "parent.yaml")
    config = load(write(tmp_path, "base: parent.yaml\nrun_name: y\n"))
    assert config.base is None
    assert config.save_folder == "runs/y"
    config.save(write(tmp_path, "", "runs/y/config.yaml"))
    (tmp_path / "parent.yaml").unlink()
    assert load(tmp_path / "runs/y/config.yaml") == config


def test_saved_keys_at_their_defaults_are_those_that_olmo_knows(tmp_path: Path) -> None:
    """ai2-olmo 0.6.0 refuses keys it does not know; the table marks those that it does with no plus sign."""
    lines = (Path(__file__).parent / "olmo_config_keys.txt").read_text(encoding="utf-8").splitlines()
    known = {line.strip().split(":")[0] for line in lines if line.startswith("    ") and ":" in line}
    known -= {
        "resuscitation",
        "resuscitation_force",
        "save_grad_",
        "temperature_attention",
        "temperature_MLP",
        "temperature_decay",
    }
    load(write(tmp_path, MINIMAL + "evaluators: [{label: piqa, type: downstream}]")).save(tmp_path / "saved.yaml")
    saved = (tmp_path / "saved.yaml").read_text(encoding="utf-8")
    assert set(re.findall(r"^[ -]*(\w+):", saved, re.MULTILINE)) <= known
    # The published trainer is older: these keys of OLMo 0.6.0 it does not know.
    assert not re.search("norm_after|rope_theta|emb_init|embedding_layer_norm|generate_doc|try_load|dynamic", saved)


def test_data_seed() -> None:
    config = TrainConfig(seed=5)
    assert config.data_seed == 5
    config.data.seed = 0
    assert config.data_seed == 0


@pytest.mark.parametrize(
    ("section", "schema"),
    [
        ("compile", config_module.CompilerConfig),
        ("ddp", config_module.DDPConfig),
        ("fsdp", config_module.FSDPConfig),
        ("wandb", config_module.WandbConfig),
    ],
)
def test_an_empty_section_has_all_defaults(tmp_path: Path, section: str, schema: type) -> None:
    assert getattr(load(write(tmp_path, MINIMAL + f"{section}: {{}}\n")), section) == schema()
    assert getattr(load(write(tmp_path, MINIMAL + f"{section}: null\n")), section) is None
