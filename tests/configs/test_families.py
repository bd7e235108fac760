"""The configurations of real models of several families: they load for a folder like the hub's, and state the study."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf
from transformers import GPTNeoXConfig, LlamaConfig, Olmo2Config

from olmo.checkpoint import complete
from olmo.config import TrainConfig, load
from tests.reference import tiny_tokenizer

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SIZES = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
PUBMED_1B = load(CONFIGS / "1B/1B_bs128_lr4e4_pubmed_1ep_738k.yaml")
# The keys of a study that the paper's configuration of OLMo-1B shares with another model's.
SHARED = ("max_duration", "inject_interval", "injection", "evaluators", "eval_on_load", "optimizer", "scheduler")


def loaded(name: str, folder: Path, *overrides: str) -> TrainConfig:
    return load(CONFIGS / name, [f"--load_path={folder}", *overrides], complete)


@pytest.fixture
def pythia(tmp_path: Path) -> Path:
    """Its vocabulary, EOS and context, in a folder without weights."""
    GPTNeoXConfig(**SIZES, vocab_size=50304, eos_token_id=0, max_position_embeddings=2048).save_pretrained(tmp_path)
    tiny_tokenizer(tmp_path / "tokenizer.json")
    return tmp_path


def test_pythia_repeats_the_papers_study(pythia: Path) -> None:
    config = loaded("pythia/1.4b_pubmed.yaml", pythia)
    for key in SHARED:
        assert getattr(config, key) == getattr(PUBMED_1B, key), key
    assert config.global_train_batch_size * config.model.max_sequence_length == 128 * 1024
    assert (config.model.vocab_size, config.model.embedding_size, config.model.eos_token_id) == (50304, 50304, 0)
    assert config.model.transformers == config.tokenizer.identifier == str(pythia)
    assert config.save_folder == f"checkpoints/pythia/{config.run_name}" and config.precision == "amp_bf16"
    assert (config.reset_optimizer_state, config.reset_trainer_state) == (True, True)


def test_olmo_2_has_our_model_its_own_context_and_as_many_tokens_a_step(tmp_path: Path) -> None:
    """The model of its pretraining, of a config.json with the numbers of the hub's."""
    published = {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 16, "intermediate_size": 8192}
    ends = {"eos_token_id": 100257, "pad_token_id": 100277, "bos_token_id": None}
    described = Olmo2Config(**published, **ends, vocab_size=100352, max_position_embeddings=4096, rms_norm_eps=1e-6)
    described.rope_parameters = {"rope_type": "default", "rope_theta": 500000}
    described.save_pretrained(tmp_path)
    config = loaded("olmo2/1b_pubmed.yaml", tmp_path)
    official = load(CONFIGS / "official/OLMo-2-0425-1B.yaml")
    assert config.model.transformers is None
    of_training = {"flash_attention", "init_device", "init_fn", "init_std", "init_cutoff_factor"}
    sizes = {"mlp_ratio", "mlp_hidden_size", "n_kv_heads"}  # given in another way
    for key in {*vars(official.model), "inner_size", "effective_n_kv_heads"} - of_training - sizes:
        assert getattr(config.model, key) == getattr(official.model, key), key
    for key in SHARED:
        assert getattr(config, key) == getattr(PUBMED_1B, key), key
    assert config.global_train_batch_size * config.model.max_sequence_length == 128 * 1024
    assert config.load_path == config.tokenizer.identifier == str(tmp_path)
    assert OmegaConf.load(CONFIGS / "olmo2/1b_pubmed.yaml").load_path == "allenai/OLMo-2-0425-1B"


def test_the_laptops_configuration_is_complete_with_the_models_folder(tmp_path: Path) -> None:
    LlamaConfig(**SIZES, vocab_size=49152, eos_token_id=0, pad_token_id=2).save_pretrained(tmp_path)
    tiny_tokenizer(tmp_path / "tokenizer.json")
    config = loaded("smollm2/135m_laptop.yaml", tmp_path)
    assert (config.model.vocab_size, config.model.eos_token_id, config.model.pad_token_id) == (49152, 0, 2)
    assert config.injection is not None and config.inject_interval is not None
    assert config.injection.rounds * config.inject_interval == config.max_duration == config.eval_interval
    assert config.tokenizer.identifier == str(tmp_path)
