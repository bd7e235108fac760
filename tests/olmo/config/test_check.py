"""Values that are unsupported, out of range or inconsistent."""

import re
from pathlib import Path
from typing import Any

import pytest

from olmo.config import TrainConfig, idle_settings, load
from olmo.config.check import _NEEDS
from olmo.config.setting import setting_of, spelled, walk
from tests.olmo.config import configurations
from tests.olmo.config.configurations import MINIMAL, write


def problem(folder: Path, text: str, *overrides: str) -> str:
    """What is wrong with values of a file, or of overrides (`test_load.py` tests that the place is named)."""
    return configurations.problem(folder, text, *overrides).removeprefix("command line: ")


UNSUPPORTED = [
    (key, setting_of(field).only, setting_of(field).instead)
    for key, _, field in walk(TrainConfig)
    if setting_of(field).only and not key.startswith("evaluators.")
]
BAD = {
    "model.init_device": "banana",
    "model.block_type": "llama",
    "model.alibi": "true",
    "model.save_grad_": "true",
    "optimizer.selective_updates": "true",
    "optimizer.record_update_metrics": "true",
    "data.label_mask_paths": "[a]",
    "data.pad_rows": "true",
    "data.pad_direction": "left --data.dataset_path=rows",
    "data.generate_attention_mask": "true",
    "data.generate_doc_lengths": "true",
    "fast_forward_batches": "3",
    "precision": "fp16",
    "wandb.log_artifacts": "true",
    "python_profiling": "true",
    "torch_profiling": "true",
    "module_outputs_save_steps": "[1]",
}


@pytest.mark.parametrize("key, supported, instead", UNSUPPORTED, ids=[key for key, _, _ in UNSUPPORTED])
def test_unsupported_value_is_an_error_that_names_the_key(
    tmp_path: Path, key: str, supported: tuple[Any, ...], instead: str
) -> None:
    message = problem(tmp_path, MINIMAL, f"--{key}={BAD[key]}")
    assert message.startswith(f"{key}: ")
    assert "is not supported" in message
    assert message.endswith(instead)
    assert ";" in message and message.count("is not supported") == 1
    for value in supported:
        assert load(tmp_path / "config.yaml", [f"--{key}={spelled(value)}"])


def test_unsupported_value_is_spelled_as_in_yaml(tmp_path: Path) -> None:
    assert problem(tmp_path, MINIMAL + "precision: fp16") == (
        "precision: fp16 is not supported (null or fp32 or amp_bf16 is); use fp32 or amp_bf16"
    )
    assert problem(tmp_path, MINIMAL + "model: {alibi: true}").startswith("model.alibi: true is not supported (false ")


@pytest.mark.parametrize("place", ["gs://a/b", "r2://a/b", "weka://a/b", "/a/b", "s3://", "s3:///b", "s3://a//b", "''"])
def test_a_remote_save_folder_is_on_s3(tmp_path: Path, place: str) -> None:
    assert problem(tmp_path, MINIMAL, f"--remote_save_folder={place}") == (
        f"remote_save_folder: {place.strip(chr(39))} is not s3://BUCKET/FOLDER; for another store with the S3 protocol "
        "(R2, MinIO, ...) write s3:// and set the environment variable AWS_ENDPOINT_URL"
    )
    for good in ("s3://a", "s3://a/b c/d", "s3://a/b/"):
        assert load(tmp_path / "config.yaml", [f"--remote_save_folder={good}"]).remote_save_folder == good


def test_unsupported_data_key_of_an_evaluator(tmp_path: Path) -> None:
    text = MINIMAL + "evaluators: [{label: held, data: {paths: [a], label_mask_paths: [b]}}]"
    assert problem(tmp_path, text).startswith("evaluators.held.data.label_mask_paths: only training data has masks")
    text = MINIMAL + "evaluators: [{label: held, data: {paths: [a], generate_attention_mask: true}}]"
    assert problem(tmp_path, text).startswith("evaluators.held.data.generate_attention_mask: ")
    text = MINIMAL + "data: {dataset_path: a, label_mask_paths: [b]}"
    assert problem(tmp_path, text).startswith("data.label_mask_paths: needs data.paths")
    load(write(tmp_path, MINIMAL + "evaluators: [{label: held, data: {datasets: {a: [b]}}}]"))


def test_datasets_are_for_evaluators(tmp_path: Path) -> None:
    message = problem(tmp_path, MINIMAL, "--data.datasets={a: [b]}")
    assert message == "data.datasets: is for evaluators only; name the files in data.paths"


IDLE = {  # key -> a value, and what else is set
    "model.alibi_bias_max": "4",
    "model.flash_attention": "true",
    "model.precision": "amp_bf16 --precision=fp32",
    "optimizer.metrics_log_interval": "7",
    "data.persistent_workers": "true",
    "data.timeout": "7",
    "wandb.rank_zero_only": "false",
    "fsdp.use_orig_params": "false",
    "load_path_sharded_checkpointer": "local",
    "sharded_checkpointer": "olmo_core",
    "new_style_checkpoints": "true",
    "device_train_batch_size": "7",
    "device_train_grad_accum": "7",
    "gen1_gc_interval": "7",
    "hf_datasets_cache_dir": "cache",
    "base_step": "7",
    "reset_optimizer_state": "true",
    "reset_trainer_state": "true",
    "model.temperature_decay": "false",
    "model.rope_theta": "500000",
    "model.rope_full_precision": "false",
    "model.init_std": "0.1 --model.init_fn=mitchell",
    "model.scale_emb_init": "true",
    "optimizer.eps": "1e-8 --optimizer.name=lionw",
    "scheduler.t_max": "7 --scheduler.name=constant_with_warmup",
    "scheduler.alpha_f": "0.5 --scheduler.name=constant",
    "scheduler.t_warmup": "7 --scheduler.name=constant",
    "scheduler.grad_clip_warmup_steps": "7",
    "scheduler.grad_clip_warmup_factor": "7",
    "max_grad_norm": "1 --max_grad_norm_ratio=2",
    "auxiliary_loss_multiplier": "0.1",
    "data.memmap_dtype": "uint32",
    "data.pad_rows": "true",
    "data.pad_direction": "left --data.dataset_path=rows",
    "data.seed": "7 --data_shuffling=false",
    "data.prefetch_factor": "7",
    "eval_on_load": "true",
    "eval_interval": "7",
    "eval_subset_num_batches": "7",
    "device_eval_batch_size": "7",
    "canceled_check_interval": "7",
    "extra_steps_after_cancel": "7",
    "save_num_checkpoints_to_keep": "7 --save_interval=null",
    "save_num_unsharded_checkpoints_to_keep": "7",
    "save_unsharded_optimizer": "false",
    "inject_interval": "7",
    "inject_start_step": "7",
    "inject_position": "document",
    "fsdp": "{precision: mixed} --distributed_strategy=ddp",
    "fsdp.precision": "mixed",
    "ddp": "{find_unused_params: true}",
    "fsdp.hybrid_sharding_num_model_replicas": "2",
}


@pytest.mark.parametrize("key", IDLE)
def test_a_key_set_without_effect_is_named(tmp_path: Path, key: str) -> None:
    value, *others = IDLE[key].split(" --")
    config = load(write(tmp_path, MINIMAL), [f"--{key}={value}", *(f"--{other}" for other in others)])
    found = list(idle_settings(config))
    assert [line for line in found if line.startswith(f"{key} has no effect")], found


def test_every_key_that_may_have_no_effect_is_tried() -> None:
    marked = {k for k, _, field in walk(TrainConfig) if setting_of(field).no_effect and not k.startswith("evaluators.")}
    assert {*marked, *_NEEDS} == IDLE.keys()
    assert not marked & _NEEDS.keys()


def test_keys_that_have_what_they_need_are_not_named(tmp_path: Path) -> None:
    text = (
        "load_path: a\nreset_optimizer_state: true\ndata: {paths: [a], memmap_dtype: uint32, num_workers: 2, "
        "prefetch_factor: 4}\nmodel: {precision: amp_bf16}\nprecision: amp_bf16\nfsdp: {precision: mixed}\n"
        "inject_indices_map: a\ninject_position: document\nmax_grad_norm: 1.0\n"
    )
    assert list(idle_settings(load(write(tmp_path, MINIMAL + text)))) == []


@pytest.mark.parametrize("key", ["eos_token_id", "pad_token_id"])
def test_special_tokens_are_of_the_vocabulary(tmp_path: Path, key: str) -> None:
    size = "model: {vocab_size: 100, embedding_size: 128, eos_token_id: 99, pad_token_id: 99"
    load(write(tmp_path, f"{MINIMAL}{size}}}"))
    for token in (100, 127, 128, 50256):
        message = problem(tmp_path, f"{MINIMAL}{size}}}", f"--model.{key}={token}")
        assert message.startswith(f"model.{key}: {token} is none of the tokens 0 to 99 of model.vocab_size; set it to")


def test_a_dry_run_that_is_to_unshard_is_an_error(tmp_path: Path) -> None:
    message = problem(tmp_path, MINIMAL, "--dry_run", "--force_save_unsharded")
    assert message.startswith(
        "force_save_unsharded: a dry run saves nothing; to unshard load_path, use scripts.convert"
    )


@pytest.mark.parametrize(
    "text, expected",
    [
        ("model: {d_model: 64, n_heads: 5}", "model.d_model: 64 is not a multiple of model.n_heads: 5"),
        ("model: {d_model: 36, n_heads: 12, rope: true}", "model.rope: needs an even head dimension"),
        ("model: {n_heads: 12, n_kv_heads: 5}", "model.n_kv_heads: 5 does not divide model.n_heads: 12"),
        ("model: {n_heads: 0}", "model.n_heads: 0 must be at least 1"),
        ("model: {n_kv_heads: 0}", "model.n_kv_heads: 0 must be at least 1"),
        ("model: {mlp_hidden_size: 97}", "model.mlp_hidden_size: 97 is odd"),
        ("model: {vocab_size: 60000, embedding_size: 128}", "model.embedding_size: 128 is less than vocab_size: 60000"),
        ("evaluators: [{label: a}]", "evaluators.a: needs exactly one of"),
        ("evaluators: [{label: a, data: {paths: [b], dataset_path: c}}]", "evaluators.a: needs exactly one of"),
        ("data: {paths: [a], dataset_path: b}", "data: give either data.paths or data.dataset_path"),
        ("global_train_batch_size: 0", "global_train_batch_size: 0 must be at least 1"),
        ("eval_subset_num_batches: 0", "eval_subset_num_batches and subset_num_batches: 0 batches"),
        ("save_interval: 0", "save_interval: 0 must be at least 1"),
        ("console_log_interval: 0", "console_log_interval: 0 must be at least 1"),
        ("injection: {once: a, rounds: -1}\ninject_interval: 1", "injection.rounds: -1 must be at least 0"),
        ("eval_interval: 0", "eval_interval: 0 must be at least 1"),
        ("inject_interval: 0", "inject_interval: 0 must be at least 1"),
        ("injection: {once: a}", "inject_interval: missing"),
        (
            "injection: {duplicate: a, once_rounds: 1}\ninject_interval: 1",
            "injection.once_rounds: has no effect without",
        ),
        ("injection: {rounds: 3}\ninject_interval: 1", "injection: has no entries; give paraphrase, duplicate or"),
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
def test_values_that_do_not_go_together(tmp_path: Path, text: str, expected: str) -> None:
    if text.startswith("{"):
        text = "\n".join(re.sub(r"^\{|\}$", "", text).split(", "))
    message = problem(tmp_path, MINIMAL + text)
    assert message.startswith(expected)
    assert message.count(";") <= 1  # this problem alone


@pytest.mark.parametrize("betas", ["[0.9]", "[0.9, 0.95, 0.99]"])
def test_betas_are_two(tmp_path: Path, betas: str) -> None:
    message = problem(tmp_path, MINIMAL, f"--optimizer.betas={betas}")
    assert message == f"optimizer.betas: expected tuple of float, float, got {betas}"
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


def test_a_map_beside_an_injection_of_no_rounds(tmp_path: Path) -> None:
    """So a configuration whose evaluators name the files of `injection` can be run with a map."""
    text = "{inject_indices_map: a, injection: {once: b, rounds: 0}, inject_interval: 5}"
    assert load(write(tmp_path, MINIMAL + text.strip("{}").replace(", inj", "\ninj"))).inject_indices_map == "a"


def test_forced_resuscitation_without_one_is_an_error(tmp_path: Path) -> None:
    assert problem(tmp_path, MINIMAL, "--model.resuscitation_force") == (
        "model.resuscitation_force: has no effect without model.resuscitation; leave it out"
    )
    resuscitated = ("--model.resuscitation_force", "--model.resuscitation=a", "--load_path=b")
    assert load(write(tmp_path, MINIMAL), resuscitated)


@pytest.mark.parametrize(
    "override, expected",
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
        ("model.layer_norm_eps=.nan", "model.layer_norm_eps: nan is not a finite number"),
        ("model.init_std=-1", "model.init_std: -1.0 must be more than 0"),
        (
            "model.init_device=banana",
            "model.init_device: banana is not supported (null or cpu or",
        ),
        ("max_duration=infT", "max_duration: infT must be more than 0"),
    ],
)
def test_numbers_out_of_range_are_named(tmp_path: Path, override: str, expected: str) -> None:
    assert problem(tmp_path, MINIMAL, f"--{override}").startswith(expected)


@pytest.mark.parametrize(
    "override, expected",
    [
        (
            "activation_checkpointing=fine_grained",
            "activation_checkpointing: fine_grained is for OLMo's own blocks; use",
        ),
        (
            "fsdp.wrapping_strategy=by_block_group",
            "fsdp.wrapping_strategy: by_block_group needs model.block_group_size,",
        ),
    ],
)
def test_settings_that_need_blocks_of_ours(tmp_path: Path, override: str, expected: str) -> None:
    """Other strategies run on every family."""
    assert problem(tmp_path, MINIMAL, "--model.transformers=a", f"--{override}").startswith(expected)
    for other in ("activation_checkpointing=whole_layer", "fsdp.wrapping_strategy=by_block"):
        assert load(tmp_path / "config.yaml", ["--model.transformers=a", f"--{other}"])
