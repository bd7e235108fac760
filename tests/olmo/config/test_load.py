"""Where values come from: files, bases, overrides, old spellings, interpolations; and the errors of each."""

from pathlib import Path

import pytest

from olmo.config import CompilerConfig, load
from olmo.exceptions import ConfigurationError
from tests.olmo.config.configurations import MINIMAL, PIQA, problem, write


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
    "override, expected",
    [
        ("seed=3", "expected --key.sub=value, got 'seed=3'; write --seed=3"),
        ("-seed=3", "expected --key.sub=value, got '-seed=3'; write --seed=3"),
        ("--=3", "expected --key.sub=value, got '--=3'"),
        ("--foo", "command line: unknown key 'foo'; list all keys: python -m scripts.train --help-config"),
        ("--a.b=c", "command line: unknown key 'a'; list all keys: python -m scripts.train --help-config"),
        ("--learning_rate=3", "command line: unknown key 'learning_rate', did you mean 'optimizer.learning_rate'?"),
        ("--seed.x=3", "command line: seed: "),
        ("--max_duration=abc", "command line: max_duration: 'abc' is neither steps, epochs ('1ep') nor tokens"),
        ("--model.d_model=0", "command line: model.d_model: 0 must be at least 1"),
        ("--probing.steps=3", "command line: probing: probes injections, and nothing is injected"),
        ("--model.dmodel=3", "command line: unknown key 'model.dmodel', did you mean 'model.d_model'?"),
        ("--seed=x", "command line: seed: Value 'x'"),
        ("--seed.x=3", "command line: seed: Value '{'x': 3}'"),
        ("--seed=${oc.env:NO_SUCH_VARIABLE}", "command line: seed: Environment variable 'NO_SUCH_VARIABLE' not found"),
        ("--model=3", "command line: model: expected keys and values"),
        ("--data.paths=[a,", "--data.paths=[a,: "),
        ("--evaluators.0.label=a", "command line: evaluators: expected a list"),
        ("--data.paths=a.npy", "command line: data.paths: expected a list; write '--data.paths=[a.npy]'"),
        ("--data.paths=a.npy,b.npy", "command line: data.paths: expected a list; write '--data.paths=[a.npy,b.npy]'"),
        ("--save_steps_unsharded=3,5", "command line: save_steps_unsharded: expected a list; write '--save_steps_unsh"),
        ("--data.paths=a-{0..3}.npy", "command line: data.paths: expected a list; write '--data.paths=["),
        (
            "--data.paths=[a-{0..3}.npy]",
            "--data.paths=[a-{0..3}.npy]: while parsing a flow sequence; quote braces for YAML and the shell: '--data.",
        ),
        (
            "--evaluators=piqa",
            "command line: evaluators: expected a list; write '--evaluators=[{label: piqa, type: ...}]'",
        ),
        ("--max_duration", "--max_duration: has no value; write --max_duration=N"),
        ("--save_folder", "--save_folder: has no value; write --save_folder=VALUE"),
        ("--model.n_layers", "--model.n_layers: has no value; write --model.n_layers=N"),
        ("--sed", "command line: unknown key 'sed', did you mean 'seed'?"),
        ("--base=other.yaml", "--base=other.yaml: 'base' can only be set in the file"),
    ],
)
def test_wrong_override(tmp_path: Path, override: str, expected: str) -> None:
    message = problem(tmp_path, MINIMAL, override)
    assert message.startswith(expected)
    assert "\n" not in message


def test_an_override_that_is_repeated_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path, MINIMAL)
    assert load(path, ["--seed=1", "--epoch=0", "--seed=1", "--epoch=0"]).seed == 1 and not caplog.messages
    assert load(path, ["--seed=1", "--seed=2"]).seed == 2
    assert caplog.messages == ["--seed: given more than once; the last value is used"]


def test_problems_of_both_places_name_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + "time_limit: 0\n")
    with pytest.raises(ConfigurationError, match=f"^{path}: time_limit"):
        load(path, ["--max_duration=abc"])


def test_errors_name_the_file_or_the_command_line(tmp_path: Path) -> None:
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


@pytest.mark.parametrize("names", [["a"], ["a", "b"], ["a", "b", "c"]])
def test_base_in_a_circle(tmp_path: Path, names: list[str]) -> None:
    for name, base in zip(names, [*names[1:], names[0]]):
        write(tmp_path, f"base: {base}.yaml\n", f"{name}.yaml")
    with pytest.raises(ConfigurationError, match=r"a\.yaml: 'base' refers to itself"):
        load(tmp_path / "a.yaml")


def test_two_children_may_share_a_base(tmp_path: Path) -> None:
    write(tmp_path, MINIMAL + "seed: 7\n", "parent.yaml")
    assert load(write(tmp_path, "base: parent.yaml\n", "a.yaml")).seed == 7
    assert load(write(tmp_path, "base: parent.yaml\n", "b.yaml")).seed == 7


@pytest.mark.parametrize("base, expected", [("no.yaml", "no.yaml: no"), ("3", "base: expected"), ("[a]", "base: exp")])
def test_wrong_base(tmp_path: Path, base: str, expected: str) -> None:
    assert expected in problem(tmp_path, f"base: {base}\n")


@pytest.mark.parametrize(
    "text, expected",
    [
        ("sed: 3", "unknown key 'sed', did you mean 'seed'?"),
        ("model: {n_head: 3}", "unknown key 'model.n_head', did you mean 'model.n_heads'?"),
        ("zzz: 3", "unknown key 'zzz'; list all keys: python -m scripts.train --help-config"),
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
def test_unknown_key_suggests_the_nearest(tmp_path: Path, text: str, expected: str) -> None:
    assert problem(tmp_path, MINIMAL + text) == expected


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
    "text, expected",
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
def test_wrong_shape(tmp_path: Path, text: str, expected: str) -> None:
    assert problem(tmp_path, text).startswith(expected)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"nowhere\.yaml: no such configuration file"):
        load(tmp_path / "nowhere.yaml")


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
    "interpolation, expected",
    [
        ("path.choose:no_exist,nor_this", "path.choose: none of no_exist, nor_this exists"),
        ("path.glob:no_exist*", "path.glob: nothing matches no_exist*"),
        ("path.last_checkpoint:no_exist", "path.last_checkpoint: no checkpoint in no_exist"),
        ("oc.env:NO_SUCH_VARIABLE", "NO_SUCH_VARIABLE"),
        ("path.chose:a", "path.chose"),
    ],
)
def test_an_interpolation_that_finds_nothing_is_named(tmp_path: Path, interpolation: str, expected: str) -> None:
    message = problem(tmp_path, MINIMAL + f"load_path: ${{{interpolation}}}")
    assert expected in message and "\n" not in message


def test_decoupled_lionw_is_an_old_name(tmp_path: Path) -> None:
    config = load(write(tmp_path, "optimizer: {name: decoupled_lionw, learning_rate: 0.1, eps: 1e-3}"))
    assert (config.optimizer.name, config.optimizer.learning_rate, config.optimizer.eps) == ("lionw", 0.1, 1e-5)


@pytest.mark.parametrize("spelling", ["HYBRID_SHARD_ZERO2", "_HYBRID_SHARD_ZERO2"])
def test_both_spellings_of_the_hybrid_strategy(tmp_path: Path, spelling: str) -> None:
    """OLMo reads the name of its enum's member and its value; it saves the name, we save the value."""
    config = load(write(tmp_path, MINIMAL), [f"--fsdp.sharding_strategy={spelling}"])
    assert "sharding_strategy: _HYBRID_SHARD_ZERO2\n" in config.as_yaml()


def test_probe_dataset_is_the_evaluators_of_chang_et_al(tmp_path: Path) -> None:
    """One file of 120 entries: 0 to 39 are paraphrased, 40 to 79 repeated, 80 to 119 injected once."""
    config = load(write(tmp_path, PIQA + "probe_dataset: knowledge.json\n"))
    asked = {e.label: e.data.dataset_path for e in config.evaluators if e.type == "lm"}
    kinds = ("memorization", "semantic", "composition", "paragraph")
    parts = {"paraphrase": "0-39", "duplicate": "40-79", "once": "80-119"}
    assert asked == {f"{s}_{kind}": f"knowledge.json#{part}" for s, part in parts.items() for kind in kinds}
    assert config.evaluators[0].label == "piqa" and config.probe_dataset is None
    config.save(tmp_path / "saved.yaml")
    assert load(tmp_path / "saved.yaml") == config
    assert load(write(tmp_path, MINIMAL), ["--probe_dataset=knowledge.json"]).evaluators == config.evaluators[1:]
    assert load(write(tmp_path, MINIMAL + "probe_dataset: 3")).evaluators[0].data.dataset_path == "3#0-39"
    assert problem(tmp_path, MINIMAL + "probe_dataset: [a]").startswith("probe_dataset: ")
