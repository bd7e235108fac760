"""The configuration: OLMo's keys and defaults, where values come from, and what a mistake is told."""

import dataclasses
import json
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from olmo.config import schema as config_module
from olmo.config.schema import (
    _UNSUPPORTED,
    WITHOUT_EFFECT,
    ActivationType,
    CompilerConfig,
    ConfigurationError,
    EvaluatorConfig,
    ModelConfig,
    TrainConfig,
    changed_keys,
    load,
    load_model_config,
)

ROOT = Path(__file__).resolve().parents[3]
MINIMAL = "optimizer: {name: adamw}\n"
PIQA = MINIMAL + "evaluators:\n  - {label: piqa, type: downstream}\n"


def write(folder: Path, text: str, name: str = "config.yaml") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def problem(folder: Path, text: str, *overrides: str) -> str:
    """What `load` says about a wrong file, without the name of the file."""
    path = write(folder, text)
    with pytest.raises(ConfigurationError) as caught:
        load(path, overrides)
    return str(caught.value).removeprefix(f"{path}: ")


# --- OLMo's keys ---


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
    names = {**vars(typing), **vars(dataclasses), **vars(config_module)}
    return eval(expression, names)


@pytest.mark.parametrize("section, key, kind, default", list(olmo_keys()), ids=lambda value: str(value)[:40])
def test_every_key_of_olmo_is_there_with_its_type_and_default(
    section: str, key: str, kind: str, default: str | None
) -> None:
    schema = getattr(config_module, section)
    ours = {f.name: f for f in dataclasses.fields(schema)}[key]
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
    """Every key is read somewhere, refused, or listed as one without effect."""
    refused = [key for key, _, _ in _UNSUPPORTED]
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


def test_tables_name_real_keys_once() -> None:
    real = set(keys_of(TrainConfig)) | {"data.instance_filter"}
    named = [*WITHOUT_EFFECT, *(key for key, _, _ in _UNSUPPORTED)]
    assert sorted(named) == sorted(set(named))
    assert not set(named) - real


# --- where a value comes from ---


def test_defaults_then_file_then_command_line(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + "seed: 1\nepoch: 2\nmodel: {d_model: 48}\n")
    config = load(path, ["--epoch=5", "--model.n_heads=4", "--data.paths=[a.npy, b.npy]", "--dry_run"])
    assert (config.seed, config.epoch, config.model.d_model, config.model.n_heads) == (1, 5, 48, 4)
    assert config.data.paths == ["a.npy", "b.npy"]
    assert config.dry_run is True
    assert config.model.n_layers == 12
    assert config.scheduler.name == "cosine_with_warmup"


def test_override_reaches_into_a_list(tmp_path: Path) -> None:
    config = load(write(tmp_path, PIQA), ["--evaluators.0.label=arc_easy"])
    assert [e.label for e in config.evaluators] == ["arc_easy"]


def test_override_of_a_missing_section_makes_it(tmp_path: Path) -> None:
    config = load(write(tmp_path, MINIMAL), ["--wandb.project=p", "--compile.fullgraph=true"])
    assert config.wandb is not None and config.wandb.project == "p"
    assert config.compile == CompilerConfig(fullgraph=True)


@pytest.mark.parametrize(
    "override, told",
    [
        ("seed=3", "expected --key.sub=value, got 'seed=3'"),
        ("--model.dmodel=3", "command line: unknown key 'model.dmodel', did you mean 'model.d_model'?"),
        ("--seed=x", "command line: seed: Value 'x'"),
        ("--model=3", "command line: model: expected keys and values"),
        ("--data.paths=[a,", "--data.paths=[a,: "),
        ("--evaluators.0.label=a", "command line: evaluators: expected a list"),
        ("--data.paths=a.npy", "command line: data.paths: expected a list; write [a.npy]"),
        ("--data.paths=a-{0..3}.npy", "command line: data.paths: expected a list; write ['a-{0..3}.npy']"),
        (
            "--data.paths=[a-{0..3}.npy]",
            "--data.paths=[a-{0..3}.npy]: while parsing a flow sequence; put what holds braces into quotes: --key=['",
        ),
        ("--evaluators=piqa", "command line: evaluators: expected a list; write [piqa]"),
        ("--max_duration", "--max_duration: has no value; write --max_duration=N"),
        ("--save_folder", "--save_folder: has no value; write --save_folder=VALUE"),
        ("--model.n_layers", "--model.n_layers: has no value; write --model.n_layers=N"),
        ("--sed", "command line: unknown key 'sed', did you mean 'seed'?"),
        ("--base=other.yaml", "--base=other.yaml: 'base' can only be named in the file"),
    ],
)
def test_wrong_override(tmp_path: Path, override: str, told: str) -> None:
    message = problem(tmp_path, MINIMAL, override)
    assert message.startswith(told)
    assert "\n" not in message


def test_the_files_own_mistakes_are_told_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + "sed: 3\nseed: x\n")
    with pytest.raises(ConfigurationError) as caught:
        load(path, ["--model.dmodel=3"])
    assert str(caught.value).startswith(f"{path}: unknown key 'sed'") and "'model.dmodel'" in str(caught.value)
    path = write(tmp_path, MINIMAL + "seed: x\n")
    with pytest.raises(ConfigurationError, match=f"{path}: seed: Value 'x'"):
        load(path, ["--epoch=1"])
    assert load(path, ["--seed=1"]).seed == 1


def test_an_override_wins_over_an_old_spelling(tmp_path: Path) -> None:
    path = write(tmp_path, "activation_checkpointing: true\noptimizer: {name: adamw, no_decay_norm_and_bias: true}\n")
    assert load(path).optimizer.decay_embeddings is False
    config = load(path, ["--optimizer.decay_embeddings", "--activation_checkpointing=fine_grained"])
    assert config.optimizer.decay_embeddings is True and config.optimizer.decay_norm_and_bias is False
    assert config.activation_checkpointing == "fine_grained"


def test_a_value_behind_a_space(tmp_path: Path) -> None:
    assert problem(tmp_path, MINIMAL, "--save_folder", "runs/a") == (
        "--save_folder: has no value; write --save_folder=runs/a"
    )
    path = write(tmp_path, PIQA)
    with pytest.raises(ConfigurationError, match=r"write --evaluators\.0\.label=sciq"):
        load(path, ["--evaluators.0.label", "sciq"])
    assert load(path, ["--model.multi_query_attention", "--dry_run"]).model.multi_query_attention is True


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


# --- base ---


def test_base_is_relative_to_the_file_that_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, MINIMAL + "seed: 1\nepoch: 1\nmodel: {d_model: 96, n_layers: 3}\n", "parents/grand.yaml")
    write(tmp_path, "base: grand.yaml\nepoch: 2\nmodel: {n_layers: 4}\n", "parents/parent.yaml")
    write(tmp_path, "base: ../parents/parent.yaml\nmodel: {n_heads: 6}\n", "children/child.yaml")
    monkeypatch.chdir(tmp_path / "parents")
    config = load("../children/child.yaml", ["--model.n_heads=8"])
    assert (config.seed, config.epoch) == (1, 2)
    assert (config.model.d_model, config.model.n_layers, config.model.n_heads) == (96, 4, 8)


def test_a_list_of_the_child_replaces_the_list_of_the_base(tmp_path: Path) -> None:
    write(tmp_path, PIQA + "data: {paths: [a, b]}\n", "parent.yaml")
    config = load(write(tmp_path, "base: parent.yaml\nevaluators: []\ndata: {paths: [c]}\n"))
    assert config.evaluators == []
    assert config.data.paths == ["c"]


def test_resolved_configuration_stands_alone(tmp_path: Path) -> None:
    """The config.yaml of a run loads wherever the run's folder lies, without the files it was made from."""
    write(tmp_path, MINIMAL + "run_name: x\nsave_folder: runs/${run_name}\n", "parent.yaml")
    config = load(write(tmp_path, "base: parent.yaml\nrun_name: y\n"))
    assert config.base is None
    assert config.save_folder == "runs/y"
    config.save(write(tmp_path, "", "runs/y/config.yaml"))
    (tmp_path / "parent.yaml").unlink()
    assert load(tmp_path / "runs/y/config.yaml") == config


@pytest.mark.parametrize("names", [["a"], ["a", "b"], ["a", "b", "c"]])
def test_base_in_a_circle(tmp_path: Path, names: list[str]) -> None:
    for name, base in zip(names, [*names[1:], names[0]]):
        write(tmp_path, f"base: {base}.yaml\n", f"{name}.yaml")
    with pytest.raises(ConfigurationError, match=r"a\.yaml: 'base' goes round in a circle"):
        load(tmp_path / "a.yaml")


def test_two_children_may_share_a_base(tmp_path: Path) -> None:
    write(tmp_path, MINIMAL + "seed: 7\n", "parent.yaml")
    assert load(write(tmp_path, "base: parent.yaml\n", "a.yaml")).seed == 7
    assert load(write(tmp_path, "base: parent.yaml\n", "b.yaml")).seed == 7


@pytest.mark.parametrize("base, told", [("no.yaml", "no.yaml: no such"), ("3", "base: expected"), ("[a]", "base: exp")])
def test_wrong_base(tmp_path: Path, base: str, told: str) -> None:
    assert told in problem(tmp_path, f"base: {base}\n")


# --- mistakes ---


@pytest.mark.parametrize(
    "text, told",
    [
        ("sed: 3", "unknown key 'sed', did you mean 'seed'?"),
        ("model: {n_head: 3}", "unknown key 'model.n_head', did you mean 'model.n_heads'?"),
        ("fsdp: {precison: mixed}", "unknown key 'fsdp.precison', did you mean 'fsdp.precision'?"),
        ("injection: {onec: a}", "unknown key 'injection.onec', did you mean 'injection.once'?"),
        (
            "evaluators:\n  - {label: piqa, type: downstream}\n  - {lable: sciq, type: downstream}",
            "unknown key 'evaluators[1].lable', did you mean 'evaluators[1].label'?",
        ),
        (
            "evaluators:\n  - {label: x, data: {path: [a]}}",
            "unknown key 'evaluators[0].data.path', did you mean 'evaluators[0].data.paths'?",
        ),
    ],
)
def test_unknown_key_suggests_the_nearest(tmp_path: Path, text: str, told: str) -> None:
    assert problem(tmp_path, MINIMAL + text) == told


def test_unknown_keys_are_reported_together(tmp_path: Path) -> None:
    assert problem(tmp_path, MINIMAL + "sed: 3\nmodel: {n_head: 3, n_layer: 2}\n") == (
        "unknown key 'sed', did you mean 'seed'?; "
        "unknown key 'model.n_head', did you mean 'model.n_heads'?; "
        "unknown key 'model.n_layer', did you mean 'model.n_layers'?"
    )


@pytest.mark.parametrize(
    "text, key, value",
    [
        ("seed: abc", "seed", "abc"),
        ("model: {d_model: wide}", "model.d_model", "wide"),
        ("model: {d_model: 32.5}", "model.d_model", "32.5"),
        ("model: {activation_type: tanh}", "model.activation_type", "tanh"),
        ("max_duration: 1.5", "max_duration", "1.5"),
        ("save_interval: often", "save_interval", "often"),
        ("wandb: {log_interval: often}", "wandb.log_interval", "often"),
        ("evaluators: [{label: piqa, type: uphill}]", "evaluators[0].type", "uphill"),
        ("evaluators: [{label: a, type: downstream, data: {seed: x}}]", "evaluators[0].data.seed", "x"),
    ],
)
def test_wrong_type_names_key_and_value(tmp_path: Path, text: str, key: str, value: str) -> None:
    message = problem(tmp_path, MINIMAL + text)
    assert message.startswith(f"{key}: ")
    assert f"'{value}'" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "text, told",
    [
        ("optimizer: adamw", "optimizer: expected keys and values"),
        (MINIMAL + "model: [1]", "model: expected keys and values"),
        (MINIMAL + "compile: true", "compile: expected keys and values"),
        (MINIMAL + "evaluators: [piqa]", "evaluators[0]: expected keys and values"),
        (MINIMAL + "evaluators: [null]", "evaluators[0]: expected keys and values"),
        (MINIMAL + "evaluators: {label: piqa}", "evaluators: expected a list"),
        (MINIMAL + "evaluators: [{type: downstream}]", "evaluators[0].label: "),
        (MINIMAL + "save_folder: ${nowhere}", "save_folder: Interpolation key 'nowhere' not found"),
        ("- a", "expected keys and values at the top level"),
        ("a: [", "not YAML: "),
    ],
)
def test_wrong_shape(tmp_path: Path, text: str, told: str) -> None:
    assert problem(tmp_path, text).startswith(told)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"nowhere\.yaml: no such configuration file"):
        load(tmp_path / "nowhere.yaml")


BAD = {
    "model.block_type": "llama",
    "model.alibi": "true",
    "model.save_grad_": "true",
    "optimizer.selective_updates": "true",
    "optimizer.record_update_metrics": "true",
    "data.datasets": "{a: [b]}",
    "data.label_mask_paths": "[a]",
    "data.pad_direction": "left",
    "data.generate_attention_mask": "true",
    "data.generate_doc_lengths": "true",
    "fast_forward_batches": "3",
    "precision": "fp16",
    "wandb.log_artifacts": "true",
    "python_profiling": "true",
    "torch_profiling": "true",
    "module_outputs_save_steps": "[1]",
}


@pytest.mark.parametrize("key, accepted, instead", _UNSUPPORTED, ids=[key for key, _, _ in _UNSUPPORTED])
def test_unsupported_value_is_an_error_that_names_the_key(
    tmp_path: Path, key: str, accepted: tuple[Any, ...], instead: str
) -> None:
    message = problem(tmp_path, MINIMAL, f"--{key}={BAD[key]}")
    assert message.startswith(f"{key}: ")
    assert "is not supported" in message
    assert message.endswith(instead)
    assert ";" in message and message.count("is not supported") == 1
    for value in accepted:  # and what we say is supported loads
        spelled = config_module._spelled(value)
        assert load(tmp_path / "config.yaml", [f"--{key}={spelled}"])


def test_unsupported_value_is_spelled_as_in_yaml(tmp_path: Path) -> None:
    assert problem(tmp_path, MINIMAL + "precision: fp16") == (
        "precision: fp16 is not supported (null or fp32 or amp_bf16 is); use fp32 or amp_bf16"
    )
    assert problem(tmp_path, MINIMAL + "model: {alibi: true}").startswith("model.alibi: true is not supported (false ")


@pytest.mark.parametrize("place", ["gs://a/b", "r2://a/b", "weka://a/b", "/a/b", "s3://", "s3:///b", "s3://a//b", "''"])
def test_a_remote_save_folder_is_on_s3(tmp_path: Path, place: str) -> None:
    assert problem(tmp_path, MINIMAL, f"--remote_save_folder={place}") == (
        f"remote_save_folder: {place.strip(chr(39))} is not s3://BUCKET/FOLDER; other stores that speak S3 (R2, MinIO, "
        "...) are reached as s3:// with their address in the environment variable AWS_ENDPOINT_URL"
    )
    for good in ("s3://a", "s3://a/b c/d", "s3://a/b/"):
        assert load(tmp_path / "config.yaml", [f"--remote_save_folder={good}"]).remote_save_folder == good


def test_unsupported_data_key_of_an_evaluator(tmp_path: Path) -> None:
    text = MINIMAL + "evaluators: [{label: held, data: {paths: [a], label_mask_paths: [b]}}]"
    assert problem(tmp_path, text).startswith("evaluators.held.data.label_mask_paths: only training data has masks")
    text = MINIMAL + "evaluators: [{label: held, data: {paths: [a], generate_attention_mask: true}}]"
    assert problem(tmp_path, text).startswith("evaluators.held.data.generate_attention_mask: ")
    text = MINIMAL + "data: {dataset_path: a, label_mask_paths: [b]}"
    assert problem(tmp_path, text).startswith("data.label_mask_paths: goes with data.paths")
    load(write(tmp_path, MINIMAL + "evaluators: [{label: held, data: {datasets: {a: [b]}}}]"))


@pytest.mark.parametrize("key", sorted(WITHOUT_EFFECT))
def test_keys_without_effect_load(tmp_path: Path, key: str) -> None:
    values = {
        "model.init_device": "meta",
        "model.precision": "amp_bf16",
        "hf_datasets_cache_dir": "cache",
        "sharded_checkpointer": "olmo_core",
        "load_path_sharded_checkpointer": "local",
        "probe_dataset": "probes.json",
        "model.alibi_bias_max": "4",
    }
    boolean = ("_effect", "attention", "workers", "memory", "loss", "checkpoints", "only", "decay")
    value = values.get(key, "true" if key.endswith(boolean) and key != "data.num_workers" else "7")
    load(write(tmp_path, MINIMAL), [f"--{key}={value}"])


@pytest.mark.parametrize(
    "text, told",
    [
        ("model: {d_model: 64, n_heads: 5}", "model.d_model: 64 does not divide into model.n_heads: 5"),
        ("model: {d_model: 36, n_heads: 12, rope: true}", "model.rope: needs an even head dimension"),
        ("model: {n_heads: 12, n_kv_heads: 5}", "model.n_kv_heads: 5 does not divide model.n_heads: 12"),
        ("model: {n_heads: 0}", "model.n_heads: 0 must be at least 1"),
        ("model: {n_kv_heads: 0}", "model.n_kv_heads: 0 must be at least 1"),
        ("model: {mlp_hidden_size: 97}", "model.mlp_hidden_size: 97 is odd"),
        ("model: {vocab_size: 200, embedding_size: 128}", "model.embedding_size: 128 is less than vocab_size: 200"),
        ("evaluators: [{label: a}]", "evaluators.a: needs exactly one of"),
        ("evaluators: [{label: a, data: {paths: [b], dataset_path: c}}]", "evaluators.a: needs exactly one of"),
        ("data: {paths: [a], dataset_path: b}", "data: give either data.paths or data.dataset_path"),
        ("global_train_batch_size: 0", "global_train_batch_size: 0 must be at least 1"),
        ("eval_subset_num_batches: 0", "eval_subset_num_batches and subset_num_batches: 0 batches"),
        ("save_interval: 0", "save_interval: 0 must be at least 1"),
        ("console_log_interval: 0", "console_log_interval: 0 must be at least 1"),
        ("injection: {once: a, rounds: -1}\ninject_interval: 1", "injection.rounds: -1 is negative"),
        ("eval_interval: 0", "eval_interval: 0 must be at least 1"),
        ("inject_interval: 0", "inject_interval: 0 must be at least 1"),
        ("injection: {once: a}", "inject_interval: missing"),
        ("injection: {rounds: 3}\ninject_interval: 1", "injection: names no entries; give paraphrase, duplicate or"),
        ("inject_start_step: 0", "inject_start_step: 0 must be at least 1"),
        ("inject_position: middle", "inject_position: Invalid value 'middle', expected one of"),
        ("{inject_indices_map: a, injection: {once: b}, inject_interval: 5}", "inject_indices_map and injection: give"),
        ("max_duration: 0", "max_duration: 0 must be more than 0"),
        ("max_duration: -3", "max_duration: -3 must be more than 0"),
        ("max_duration: 0ep", "max_duration: 0ep must be more than 0"),
        ("max_duration: -2e9T", "max_duration: -2e9T must be more than 0"),
        ("max_duration: nanT", "max_duration: nanT must be more than 0"),
        ("max_duration: infep", "max_duration: infep must be more than 0"),
        ("max_duration: 3epochs", "max_duration: '3epochs' is neither steps, epochs ('1ep') nor tokens ('2e9T')"),
    ],
)
def test_values_that_do_not_go_together(tmp_path: Path, text: str, told: str) -> None:
    if text.startswith("{"):
        text = "\n".join(re.sub(r"^\{|\}$", "", text).split(", "))
    message = problem(tmp_path, MINIMAL + text)
    assert message.startswith(told)
    assert message.count(";") <= 1  # this problem alone


@pytest.mark.parametrize("betas", ["[0.9]", "[0.9, 0.95, 0.99]"])
def test_betas_are_two(tmp_path: Path, betas: str) -> None:
    assert "length" in (message := problem(tmp_path, MINIMAL, f"--optimizer.betas={betas}")) or "two" in message
    assert load(tmp_path / "config.yaml", ["--optimizer.betas=[0.8, 0.9]"]).optimizer.betas == (0.8, 0.9)


@pytest.mark.parametrize("duration", ["100", "1ep", "0.5ep", "2e9T", "1000T"])
def test_durations(tmp_path: Path, duration: str) -> None:
    assert str(load(write(tmp_path, MINIMAL + f"max_duration: {duration}")).max_duration) == duration


def test_all_problems_are_reported_together(tmp_path: Path) -> None:
    text = (
        "model: {d_model: 64, n_heads: 5, alibi: true}\nprecision: fp16\ntime_limit: 0\nmax_duration: soon\n"
        "data: {generate_doc_lengths: true}\ninject_interval: 0\n"
    )
    message = problem(tmp_path, text)
    for key in (
        "model.d_model",
        "model.alibi",
        "precision",
        "time_limit",
        "max_duration",
        "data.generate_doc_lengths",
        "inject_interval",
    ):
        assert re.search(rf"(^|; ){re.escape(key)}: ", message), key


def test_when_a_map_is_injected_may_stand_in_the_map_itself(tmp_path: Path) -> None:
    config = load(write(tmp_path, MINIMAL + "inject_indices_map: a\ninject_start_step: 5\ninject_position: document"))
    assert (config.inject_interval, config.inject_start_step, config.inject_position) == (None, 5, "document")
    config.save(tmp_path / "saved.yaml")
    assert load(tmp_path / "saved.yaml") == config


@pytest.mark.parametrize(
    "key, wrong, right",
    [
        ("time_limit", "0.0 must be more than 0", "0.5"),
        ("collective_timeout", "0.0 must be more than 0", "0.5"),
        ("canceled_check_interval", "0 must be at least 1", "1"),
        ("extra_steps_after_cancel", "-1 must be at least 0", "0"),
        ("save_interval_ephemeral", "0 must be at least 1", "1"),
        ("early_stopping_factor", "0.9 must be at least 1", "1.0"),
    ],
)
def test_keys_about_the_end_of_a_run(tmp_path: Path, key: str, wrong: str, right: str) -> None:
    assert problem(tmp_path, MINIMAL, f"--{key}={wrong.split()[0]}").endswith(f"{key}: {wrong}")
    config = load(write(tmp_path, MINIMAL), [f"--{key}={right}"])
    assert getattr(config, key) == float(right)
    config.save(tmp_path / "saved.yaml")
    assert load(tmp_path / "saved.yaml") == config


# --- old spellings ---


@pytest.mark.parametrize("old, decays", [("true", False), ("false", True), ("null", False)])
def test_no_decay_norm_and_bias(tmp_path: Path, old: str, decays: bool) -> None:
    config = load(write(tmp_path, f"optimizer: {{name: adamw, no_decay_norm_and_bias: {old}}}"))
    assert config.optimizer.decay_norm_and_bias is decays
    assert config.optimizer.decay_embeddings is decays
    assert config.optimizer.no_decay_norm_and_bias is None


def test_activation_checkpointing_was_once_a_boolean(tmp_path: Path) -> None:
    assert load(write(tmp_path, MINIMAL + "activation_checkpointing: false")).activation_checkpointing is None
    chosen = load(write(tmp_path, MINIMAL + "activation_checkpointing: true")).activation_checkpointing
    assert chosen == "whole_layer"


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


# --- the model section of a checkpoint ---


def test_model_config_is_read_from_any_trainers_file(tmp_path: Path) -> None:
    text = (
        "my_trainer: {anything: [1, {a: b}]}\nsave_folder: ${path.choose:/a,/b}\nprecision: fp64\n"
        "model: {d_model: 64, n_heads: 4, activation_type: gelu, init_fn: mitchell, layer_norm_type: rms}\n"
    )
    expected = ModelConfig(
        d_model=64,
        n_heads=4,
        activation_type="gelu",
        init_fn="mitchell",
        layer_norm_type="rms",
    )
    assert load_model_config(write(tmp_path, text)) == expected


@pytest.mark.parametrize(
    "text, told",
    [
        ("seed: 3", "no section 'model'"),
        ("model: 3", "no section 'model'"),
        ("model: {n_head: 3}", "unknown key 'model.n_head', did you mean 'model.n_heads'?"),
        ("model: {d_model: x}", "model.d_model: Value 'x'"),
        ("model: {alibi: true, n_heads: 5}", "model.alibi: true is not supported (false is); use rope or learned "),
    ],
)
def test_wrong_model_section(tmp_path: Path, text: str, told: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigurationError) as caught:
        load_model_config(path)
    assert str(caught.value).removeprefix(f"{path}: ").startswith(told)


def test_model_problems_are_reported_together(tmp_path: Path) -> None:
    path = write(tmp_path, "model: {alibi: true, n_heads: 5, n_kv_heads: 2}")
    with pytest.raises(ConfigurationError, match=r"model\.alibi: .*; model\.d_model: .*; model\.n_kv_heads: "):
        load_model_config(path)


# --- what follows from other keys ---


@given(
    d_model=st.integers(1, 64),
    ratio=st.integers(1, 8),
    size=st.none() | st.integers(2, 100),
    kind=st.sampled_from(typing.get_args(ActivationType)),
)
def test_inner_size(d_model: int, ratio: int, size: int | None, kind: ActivationType) -> None:
    config = ModelConfig(d_model=d_model, mlp_ratio=ratio, mlp_hidden_size=size, activation_type=kind)
    rows = size or ratio * d_model
    assert config.projection_size == rows
    assert config.inner_size == (rows // 2 if kind == "swiglu" else rows)


@pytest.mark.parametrize("given, multi, heads", [(None, None, 12), (None, True, 1), (None, False, 12), (3, None, 3)])
def test_key_value_heads(given: int | None, multi: bool | None, heads: int) -> None:
    assert ModelConfig(n_kv_heads=given, multi_query_attention=multi).effective_n_kv_heads == heads


def test_data_seed() -> None:
    config = TrainConfig(seed=5)
    assert config.data_seed == 5
    config.data.seed = 0
    assert config.data_seed == 0


# --- OLMo's interpolations and old spellings ---


def test_interpolations_of_olmos_configurations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("step5", "step40-unsharded", "step300"):
        (tmp_path / "run" / name).mkdir(parents=True)
    for name in ("b", "a"):
        (tmp_path / f"part-{name}.npy").touch()
    monkeypatch.setenv("SCRATCH", str(tmp_path))
    text = f"""
run_name: tiny
save_folder: ${{path.choose:${{oc.env:NO_SUCH_VARIABLE,no_exist}}/checkpoints,{tmp_path}/run}}/${{run_name}}
load_path: ${{path.last_checkpoint:${{oc.env:SCRATCH}}/run}}
data: {{paths: "${{path.glob:{tmp_path}/part-*.npy}}"}}
eval_interval: ${{save_interval}}
remote_save_folder: null
"""
    config = load(write(tmp_path, MINIMAL + text))
    assert config.save_folder == f"{tmp_path}/run/tiny"
    assert config.load_path == str(tmp_path / "run/step300")
    assert config.data.paths == [str(tmp_path / f"part-{name}.npy") for name in ("a", "b")]
    assert config.eval_interval == 1000
    chosen = load(write(tmp_path, MINIMAL + "load_path: ${path.choose:no_exist,s3://bucket/step5}"))
    assert chosen.load_path == "s3://bucket/step5"


@pytest.mark.parametrize(
    "interpolation, told",
    [
        ("path.choose:no_exist,nor_this", "path.choose: none of no_exist, nor_this exists"),
        ("path.glob:no_exist*", "path.glob: nothing matches no_exist*"),
        ("path.last_checkpoint:no_exist", "path.last_checkpoint: no checkpoint in no_exist"),
        ("oc.env:NO_SUCH_VARIABLE", "NO_SUCH_VARIABLE"),
        ("path.chose:a", "path.chose"),
    ],
)
def test_an_interpolation_that_finds_nothing_is_named(tmp_path: Path, interpolation: str, told: str) -> None:
    message = problem(tmp_path, MINIMAL + f"load_path: ${{{interpolation}}}")
    assert told in message and "\n" not in message


def test_decoupled_lionw_is_an_old_name(tmp_path: Path) -> None:
    config = load(write(tmp_path, "optimizer: {name: decoupled_lionw, learning_rate: 0.1, eps: 1e-3}"))
    assert (config.optimizer.name, config.optimizer.learning_rate, config.optimizer.eps) == ("lionw", 0.1, 1e-5)


def test_a_map_beside_an_injection_of_no_rounds(tmp_path: Path) -> None:
    """So a configuration whose evaluators name the files of `injection` can be run with a map."""
    text = "{inject_indices_map: a, injection: {once: b, rounds: 0}, inject_interval: 5}"
    assert load(write(tmp_path, MINIMAL + text.strip("{}").replace(", inj", "\ninj"))).inject_indices_map == "a"


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


def test_forced_resuscitation_without_one_is_an_error(tmp_path: Path) -> None:
    assert problem(tmp_path, MINIMAL, "--model.resuscitation_force") == (
        "model.resuscitation_force: goes with model.resuscitation, the file that it applies; leave it out"
    )
    assert load(write(tmp_path, MINIMAL), ["--model.resuscitation_force", "--model.resuscitation=a"])


def test_keys_that_define_a_run_and_differ(tmp_path: Path) -> None:
    """All that it is, and nothing of how it is run; a list or a section that is not in both counts as one."""
    before = load(write(tmp_path, MINIMAL))
    changes = {"seed": 1, "data.paths": ["x"], "injection": {"once": "e"}, "inject_interval": 3, "model.init_std": 0.5}
    changes["max_duration"] = 3
    neither = {"data.num_workers": 2, "model.init_device": "meta", "console_log_interval": 5}
    overrides = [f"--{key}={json.dumps(value)}" for key, value in {**changes, **neither}.items()]
    now = load(write(tmp_path, MINIMAL), overrides)
    assert set(changed_keys(before, now)) == set(changed_keys(now, before)) == changes.keys()
    assert changed_keys(before, load(write(tmp_path, MINIMAL))) == []


@pytest.mark.parametrize(
    "override, told",
    [
        ("max_grad_norm=-1", "max_grad_norm: -1.0 must be more than 0"),
        ("max_grad_norm_ratio=0", "max_grad_norm_ratio: 0.0 must be more than 0"),
        ("optimizer.learning_rate=-0.01", "optimizer.learning_rate: -0.01 must be at least 0"),
        ("optimizer.betas=[1.5,2]", "optimizer.betas: expected two numbers from 0 to 1, got [1.5, 2.0]"),
        ("scheduler.warmup_min_lr=1", "scheduler.warmup_min_lr: 1.0 must be less than optimizer.learning_rate: 0.0001"),
        ("scheduler.t_warmup=-5", "scheduler.t_warmup: -5 must be at least 0"),
        ("scheduler.t_max=-1", "scheduler.t_max: -1 must be at least 1"),
        ("epoch=-1", "epoch: -1 must be at least 0"),
        ("data.instance_filter={repetition_max_count: 0}", "data.instance_filter.repetition_max_count: 0 must be"),
        ("data.instance_filter={repetition_min_period: 0}", "data.instance_filter.repetition_min_period: 0 must be"),
        ("model.attention_dropout=2", "model.attention_dropout: 2.0 must be at least 0 and at most 1"),
        ("model.rope_theta=0", "model.rope_theta: 0 must be at least 1"),
        ("model.layer_norm_eps=.nan", "model.layer_norm_eps: nan must be more than 0"),
        ("model.init_std=-1", "model.init_std: -1.0 must be more than 0"),
        ("model.init_device=banana", "model.init_device: banana is none of cpu, cuda, mps, meta"),
        ("max_duration=infT", "max_duration: infT must be more than 0"),
    ],
)
def test_numbers_out_of_range_are_named(tmp_path: Path, override: str, told: str) -> None:
    assert problem(tmp_path, MINIMAL, f"--{override}").startswith(told)


@pytest.mark.parametrize("spelling", ["HYBRID_SHARD_ZERO2", "_HYBRID_SHARD_ZERO2"])
def test_both_spellings_of_the_hybrid_strategy(tmp_path: Path, spelling: str) -> None:
    """OLMo reads the name of its enum's member and its value; it saves the name, we save the value."""
    config = load(write(tmp_path, MINIMAL), [f"--fsdp.sharding_strategy={spelling}"])
    assert "sharding_strategy: _HYBRID_SHARD_ZERO2\n" in config.as_yaml()
