"""What is in a folder that is no checkpoint for this program: the format by its files, and what converts it.

Only the names of files and the keys of config.json are read.
"""

from __future__ import annotations

from pathlib import Path

OLMO_CORE = (
    "an OLMo-core checkpoint; convert it with OLMo-core's src/examples/huggingface/convert_checkpoint_to_hf.py "
    "(-i {folder} -o NEW_FOLDER) and name the new folder"
)
_EXPORTED = "name the transformers folder that it was made from"
# Files of a format, and what it is. The first that is found counts.
_FORMATS = (
    (("model_and_optim/.metadata",), OLMO_CORE),
    (
        ("global_step*", "zero_pp_rank_*", "mp_rank_*_model_states.pt", "zero_to_fp32.py"),
        "a DeepSpeed checkpoint; collect its weights with the zero_to_fp32.py that DeepSpeed saved with it, or with "
        "`python -m deepspeed.utils.zero_to_fp32`, beside the model's config.json",
    ),
    (
        ("latest_checkpointed_iteration.txt", "iter_*/mp_rank_*", "mp_rank_*/model_optim_rng.pt", "iter_*/.metadata"),
        "a Megatron-LM checkpoint; export it as a transformers folder, for instance with Megatron Bridge",
    ),
    (
        ("*.distcp", "pytorch_model_fsdp_*", "*/*.distcp"),
        "shards of torch.distributed.checkpoint (FSDP); merge them with `accelerate merge-weights`, beside the model's "
        "config.json",
    ),
    (
        ("adapter_config.json", "adapter_model.*"),
        "an adapter (PEFT), not a model; merge it into its base model with peft's merge_and_unload and save_pretrained",
    ),
    (("*.gguf",), f"a model of llama.cpp (GGUF); {_EXPORTED}"),
    (
        ("consolidated.*.pth", "params.json"),
        "a checkpoint in Meta's layout; convert it with transformers' convert_llama_weights_to_hf.py",
    ),
    (("tf_model.h5", "flax_model*.msgpack", "*.onnx"), f"weights of TensorFlow, Flax or ONNX; {_EXPORTED}"),
    (
        ("step*-unsharded", "*-unsharded", "checkpoint-*", "step[0-9]*"),
        "a folder that contains checkpoints; name one of them",
    ),
    (("config.json", "config.yaml"), "no weights here, only a configuration; download or copy them beside it"),
    (
        ("model*.safetensors", "model.pt", "pytorch_model*.bin"),
        "weights without config.json or config.yaml; copy the model's configuration beside them",
    ),
    (
        ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json"),
        "a tokenizer without a model; name the folder of the model",
    ),
)


def explain(place: Path) -> str | None:
    """What a file or folder holds that is not a checkpoint, and what to do, in words; None if it is not known."""
    if place.is_file():
        kind = "a model of llama.cpp (GGUF); " + _EXPORTED if place.suffix == ".gguf" else None
        return kind or f"a file; name the folder that contains it, {place.parent}"
    for patterns, what in _FORMATS:
        if any(True for pattern in patterns for _ in place.glob(pattern)):
            return what.replace("{folder}", str(place))
    return None


def is_olmo_core(raw: dict[str, object]) -> bool:
    """Whether config.json is the configuration of an OLMo-core run, which names its classes."""
    return any(isinstance(part, dict) and "_CLASS_" in part for part in (raw, raw.get("model")))
