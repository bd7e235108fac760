"""Convert a checkpoint between OLMo's layout and transformers'; weights keep their type and every bit.

    python -m scripts.convert SRC DST --to hf      # OlmoForCausalLM or Olmo2ForCausalLM, with its tokenizer
    python -m scripts.convert SRC DST --to olmo    # config.yaml and model.safetensors

SRC is a folder of any layout that olmo.checkpoint reads, or a hub id `owner/name[@revision]`. `--resuscitation FILE`
applies what `python -m analysis.change_parameters` wrote, so that other programs see the edited model.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from omegaconf import OmegaConf

from olmo import checkpoint
from olmo.checkpoint.transformers_layout import to_transformers_config, to_transformers_state
from olmo.config import ModelConfig, save_model_config
from olmo.exceptions import ConfigurationError, Parser, exit_status
from olmo.files.tensors import write_olmo_safetensors, write_safetensors
from olmo.memory.temperature import Temperatures
from olmo.model import OLMo
from olmo.tokenizer import load_tokenizer

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def write_tokenizer(source: Path, target: Path, identifier: str | None, model: ModelConfig) -> str | None:
    """Copy the tokenizer's files, or write those of `identifier`; returns its origin, None without one.

    An unreadable tokenizer is an error only if `identifier` is given; one named by a config.yaml may be missing here.
    """
    if identifier is None and (source / "tokenizer.json").is_file():
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, target / name)
        return str(source / "tokenizer.json")
    asked = identifier is not None
    if identifier is None and (source / "config.yaml").is_file():
        identifier = OmegaConf.select(OmegaConf.load(source / "config.yaml"), "tokenizer.identifier")
    if identifier is None:
        return None
    try:
        tokenizer = load_tokenizer(identifier)
    except (OSError, ValueError):
        if asked:
            raise
        return None
    from transformers import PreTrainedTokenizerFast  # takes a second

    if tokenizer.get_vocab_size() > (model.embedding_size or model.vocab_size):
        raise ConfigurationError(
            f"{identifier}: {tokenizer.get_vocab_size()} tokens, the model has {model.embedding_size} rows"
        )
    special = {"eos_token": model.eos_token_id, "pad_token": model.pad_token_id}
    known = {name: token for name, number in special.items() if (token := tokenizer.id_to_token(number)) is not None}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **known).save_pretrained(target)
    return identifier


def convert(
    source: Path, target: Path, to: str, resuscitation: str | None, identifier: str | None, force: bool = False
) -> str:
    """Write the checkpoint `source` as the folder `target`, completely or not at all; returns a line that describes it.

    Raises ConfigurationError where the layout cannot hold the model, ValueError for weights that do not fit.
    """
    target = target.resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigurationError(f"{target}: already exists; name a new folder")
    if not checkpoint.is_olmo(source):
        raise ConfigurationError(
            f"{source}: not an OLMo model; to write edited weights of another family, use analysis.change_parameters "
            "--format full"
        )
    config = replace(checkpoint.read_config(source), resuscitation=None)
    state = checkpoint.read_state(source)
    if resuscitation is not None:
        state = checkpoint.resuscitated(state, resuscitation, source, key="--resuscitation", force=force)
    checkpoint.check_fit(OLMo.empty(config), state, str(source))
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        if to == "hf":
            described = to_transformers_config(config, state["transformer.wte.weight"].dtype)
            (partial / "config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
            weights = to_transformers_state(state, config)
            write_safetensors(partial / "model.safetensors", weights, {"format": "pt"})
        else:
            divisors = Temperatures.from_config(config, source).memories
            if divisors is not None:
                config = replace(config, temperature_MLP="temperature_MLP.safetensors")
                write_olmo_safetensors(partial / "temperature_MLP.safetensors", {"temperature_MLP": divisors})
            save_model_config(partial / "config.yaml", config)
            write_olmo_safetensors(partial / "model.safetensors", state)
        tokenizer = write_tokenizer(source, partial, identifier, config)
        if target.is_dir():
            target.rmdir()
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    numbers = sum(tensor.numel() for tensor in state.values())
    return f"{target}: {numbers:,} weights, tokenizer {tokenizer or 'unknown; name it with --tokenizer'}"


def main(argv: Sequence[str]) -> None:
    parser = Parser(prog="python -m scripts.convert", description=__doc__)
    parser.add_argument("source", metavar="SRC", help="checkpoint folder or hub id")
    parser.add_argument("target", metavar="DST", type=Path, help="new folder")
    parser.add_argument("--to", choices=("olmo", "hf"), required=True)
    parser.add_argument("--resuscitation", metavar="FILE", help="multipliers (.safetensors) or full state dict (.pt)")
    parser.add_argument("--resuscitation_force", action="store_true", help="also multipliers of another checkpoint")
    parser.add_argument("--tokenizer", metavar="IDENTIFIER", help="default: the one SRC holds or its config.yaml names")
    args = parser.parse_args(argv)
    if args.resuscitation_force and args.resuscitation is None:
        raise ConfigurationError("--resuscitation_force: needs --resuscitation")
    source = checkpoint.resolve(args.source)
    print(convert(source, args.target, args.to, args.resuscitation, args.tokenizer, args.resuscitation_force))


if __name__ == "__main__":
    sys.exit(exit_status(main))
