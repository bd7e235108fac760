"""The settings: OLMo's keys and defaults are all there, each is read or documented as not read, and saved ones load."""

import ast
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
    ActivationType,
    CompilerConfig,
    EvaluatorConfig,
    TrainConfig,
    load,
    load_model_config,
)
from olmo.config.setting import section_of, setting_of, walk
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


def read_attributes(paths: list[Path]) -> set[str]:
    """The names of all attributes that code reads."""
    trees = (ast.parse(path.read_text(encoding="utf-8")) for path in paths)
    nodes = (node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute))
    return {node.attr for node in nodes if isinstance(node.ctx, ast.Load)}


def test_every_key_acts_or_is_refused_or_is_warned_of() -> None:
    """Each is in exactly one class: read by something beside the checks, refused, without effect, or translated."""
    config = ROOT / "olmo" / "config"
    files = [path for part in ("olmo", "analysis", "scripts") for path in (ROOT / part).rglob("*.py")]
    read = read_attributes([path for path in files if path.parent != config or path.name in ("model.py", "schema.py")])
    translated = {"base", "optimizer.no_decay_norm_and_bias", "probe_dataset"}  # gone once the file is loaded
    handed_over = ("compile.",)  # to torch, as they are
    wrong = {}
    for key, annotation, field in walk(TrainConfig):
        setting, partly = setting_of(field), key in ("precision", "model.init_device")  # of which some values act
        if section_of(annotation) or key.startswith("evaluators.data."):
            continue
        classes = [
            bool(setting.only) and not partly,
            bool(setting.no_effect),
            key in translated,
            not setting.only or partly if not setting.no_effect and key not in translated else False,
        ]
        acts = key.rpartition(".")[2] in read or key.startswith(handed_over)
        if sum(classes) != 1 or (classes[-1] and not acts):
            wrong[key] = classes
    assert not wrong


def test_the_page_of_differences_lists_the_keys_that_are_refused() -> None:
    """And no others; test_every_key_of_olmo_is_there proves that all are known."""
    text = (ROOT / "docs" / "differences.md").read_text(encoding="utf-8").partition("\n## Keys\n")[2]
    listed = text.partition("instead: ")[2].partition(". A key")[0]
    refused = {key for key, _, f in walk(TrainConfig) if setting_of(f).only and not key.startswith("evaluators.")}
    assert set(re.findall(r"`([\w.]+)`", listed)) - {"amp_fp16"} == refused


def test_every_key_is_documented_at_its_field() -> None:
    for key, _, field in walk(TrainConfig):
        setting = setting_of(field)
        assert setting.help or setting.no_effect or setting.instead, key
        assert bool(setting.only) == bool(setting.instead) and not (setting.only and setting.no_effect), key
        assert "|" not in str(setting), key  # which would end a cell of the table in docs/config.md


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
