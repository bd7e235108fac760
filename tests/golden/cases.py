"""The cases of `make_reference.py`: what differs between them, and what all have in common."""

from __future__ import annotations

from typing import Any

VERSION = "0.6.0"
STEPS = 20
ALL_METRICS = 3  # the step of which all metrics are kept
LENGTH = 24
BATCH = 8
TOKENS_PER_STEP = BATCH * LENGTH
# Instances, and tokens too few for one more: 67 instances make 8 batches an epoch, so 20 steps see three orders.
FILES = {"tokens-0.npy": (40, 7), "tokens-1.npy": (27, 0)}
PADDING = 48  # where a case asks for an attention mask
LABEL_MASKS = {name: name.replace("tokens", "labels") for name in FILES}

MODEL: dict[str, Any] = {
    "d_model": 32,
    "n_heads": 4,
    "n_layers": 2,
    "attention_dropout": 0.0,
    "residual_dropout": 0.0,
    "embedding_dropout": 0.0,
    "max_sequence_length": LENGTH,
    "vocab_size": 97,
    "embedding_size": 128,
    "eos_token_id": 0,
    "pad_token_id": 1,
    "init_device": "cpu",
}

RUN: dict[str, Any] = {
    "seed": 6198,
    "data": {"paths": list(FILES), "drop_last": True},
    "max_duration": STEPS,
    "stop_at": STEPS,  # OLMo itself goes on for ten steps beyond max_duration
    "global_train_batch_size": BATCH,
    "device_train_batch_size": BATCH,
    "device_train_microbatch_size": 4,  # gradients of two micro-batches are added
    "device_train_grad_accum": 2,
    "precision": "fp32",
    "distributed_strategy": "ddp",
    "ddp": {},
    "fsdp": None,
    "save_folder": "run",
    "save_interval": None,
    "eval_interval": 1000,
}

# What differs from MODEL and RUN. Sizes are as small as they can be while every setting still shows in the numbers.
CASES: dict[str, dict[str, Any]] = {
    "olmo_1b": {
        "model": {
            "mlp_hidden_size": 32,
            "activation_type": "swiglu",
            "rope": True,
            "include_bias": False,
            "layer_norm_with_affine": False,
            "attention_layer_norm_with_affine": False,
            "weight_tying": True,
            "init_fn": "mitchell",
        },
        "optimizer": {"name": "adamw", "learning_rate": 4e-3, "weight_decay": 0.1, "betas": [0.9, 0.95]},
        "scheduler": {"name": "cosine_with_warmup", "t_warmup": 5, "alpha_f": 0.1},
        "max_grad_norm": 0.5,
        "max_duration": 25,  # the schedule is cut off
    },
    "olmo_2": {
        "model": {
            "n_kv_heads": 2,
            "mlp_hidden_size": 32,
            "activation_type": "swiglu",
            "rope": True,
            "rope_theta": 500000,
            "include_bias": False,
            "layer_norm_type": "rms",
            "layer_norm_eps": 1e-6,
            "attention_layer_norm": True,
            "norm_after": True,
            "weight_tying": False,
            "init_fn": "normal",
            "init_std": 0.1,
            "init_cutoff_factor": 3.0,
        },
        "optimizer": {
            "name": "adamw",
            "learning_rate": 3e-3,
            "weight_decay": 0.1,
            "betas": [0.9, 0.95],
            "eps": 1e-8,
            "decay_norm_and_bias": True,
        },
        "scheduler": {
            "name": "cosine_with_warmup",
            "units": "tokens",
            "t_warmup": 5 * TOKENS_PER_STEP,
            "warmup_min_lr": 0.0,
            "grad_clip_warmup_steps": 8 * TOKENS_PER_STEP,
            "grad_clip_warmup_factor": 3.0,
        },
        "max_grad_norm": 0.2,
        "max_duration": f"{STEPS * TOKENS_PER_STEP}T",
        "softmax_auxiliary_loss": True,
        "auxiliary_loss_multiplier": 1e-4,
    },
    "lion": {
        "model": {
            "multi_query_attention": True,
            "clip_qkv": 1.0,
            "mlp_hidden_size": 16,
            "activation_type": "gelu",
            "rope": False,
            "include_bias": True,
            "embedding_layer_norm": True,
            "scale_logits": True,
            "weight_tying": True,
            "init_fn": "normal",
            "init_std": 0.2,
        },
        "optimizer": {
            "name": "lionw",
            "learning_rate": 2e-3,
            "weight_decay": 0.1,
            "betas": [0.9, 0.95],
            "decay_embeddings": True,
        },
        "scheduler": {"name": "linear_with_warmup", "t_warmup": 4, "alpha_f": 0.2},
        "max_grad_norm_ratio": 1.05,
        "max_duration": "3ep",
    },
    "envelope": {
        "model": {
            "pad_token_id": PADDING,
            "n_kv_heads": 2,
            "mlp_hidden_size": 16,
            "activation_type": "relu",
            "rope": True,
            "rope_full_precision": False,
            "include_bias": False,
            "bias_for_layer_norm": True,
            "layer_norm_type": "low_precision",
            "attention_layer_norm": True,
            "weight_tying": True,
            "init_fn": "full_megatron",
            "init_std": 0.1,
            "scale_emb_init": True,
        },
        "data": {"seed": 7, "label_mask_paths": list(LABEL_MASKS.values()), "generate_attention_mask": True},
        "softmax_auxiliary_loss": True,
        "optimizer": {
            "name": "adamw",
            "learning_rate": 5e-3,
            "weight_decay": 0.05,
            "betas": [0.9, 0.99],
            "eps": 1e-6,
            "decay_embeddings": True,
        },
        "scheduler": {"name": "cosine_linear_envelope", "t_warmup": 4, "t_max": 16, "alpha_f": 0.05},
    },
}
WRITTEN_AS_SAFETENSORS = ("olmo_2", "envelope")  # the others as model.pt
