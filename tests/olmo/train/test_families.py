"""A run of every family, from `load_path`, against a plain torch loop over transformers' own class."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import datasets
import numpy as np
import pytest
import torch

from olmo.checkpoint import complete
from olmo.config import load
from olmo.distributed import Ranks
from olmo.exceptions import ConfigurationError
from olmo.model import OLMo
from olmo.model.causal_lm import CausalLM
from olmo.train import Trainer
from olmo.train.loss import linear_cross_entropy
from olmo.train.start import StartingPoint
from tests import families
from tests.architectures import built
from tests.plain_loop import BATCH, INSTANCES, LENGTH, batches, family_run, plain_loop, shuffled, write_run
from tests.reference import tiny_olmo2_config, to_transformers
from tests.running import CPU, metrics, series, train, write_family, write_world

WITHOUT_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Pythia": {},
    "Qwen2": {"tie_word_embeddings": True},
    "Gemma 2": {"final_logit_softcapping": 3.0},  # so that it matters in a model this small
    "Gemma 3": {},
    "GPT-2": WITHOUT_DROPOUT,
    "OLMoE": {"router_aux_loss_coef": 0.5},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_twenty_steps_equal_a_plain_loop(name: str, tmp_path: Path) -> None:
    network = built(name, **FAMILIES[name])
    trainer = Trainer(family_run(tmp_path, network), CPU, Ranks())
    assert isinstance(trainer.model, CausalLM) and type(trainer.model.network) is type(network)
    trainer.fit()
    losses, added = plain_loop(network, batches(tmp_path))
    found = list(series(tmp_path / "run").values())
    print(
        name, losses[0], losses[-1], max(abs(a / b - 1) for a, b in zip(found, losses)), worst(trainer.model, network)
    )
    assert found == pytest.approx(losses, rel=1e-6) and losses[-1] < 0.9 * losses[0]
    balancing = list(series(tmp_path / "run", "train/LoadBalancingLoss").values())
    assert balancing == (pytest.approx(added, rel=1e-6) if name == "OLMoE" else [])
    assert worst(trainer.model, network) < 1e-5


def test_bfloat16_follows_a_plain_loop(tmp_path: Path) -> None:
    """The same logits in the first step, gradients that are rounded elsewhere in those after it: ours of the vocabulary
    are summed in float32."""
    network = built("Gemma 2", **FAMILIES["Gemma 2"])
    Trainer(family_run(tmp_path, network, "--precision=amp_bf16", "--stop_at=5"), CPU, Ranks()).fit()
    losses, _ = plain_loop(network, batches(tmp_path, 5), narrow=True)
    found = list(series(tmp_path / "run").values())
    assert found[0] == pytest.approx(losses[0], rel=1e-6)
    assert found == pytest.approx(losses, rel=2**-9)  # half of what bfloat16 rounds a loss to; 5e-4 was seen


@pytest.mark.parametrize("name", ["OLMoE", "GPT-2"])
def test_padded_rows_equal_a_plain_loop(name: str, tmp_path: Path) -> None:
    """Padding in front of texts, which neither attention nor the loss that balances experts sees."""
    network = built(name, **FAMILIES[name])
    rng = np.random.default_rng(1)
    rows = [rng.integers(2, 128, rng.integers(3, LENGTH + 1)).tolist() for _ in range(INSTANCES)]
    datasets.Dataset.from_dict({"input_ids": rows}).save_to_disk(tmp_path / "data")
    padded = (f"--data.dataset_path={tmp_path / 'data'}", "--data.paths=null", "--data.pad_rows=true")
    config = family_run(tmp_path, network, *padded, "--data.pad_direction=left", "--stop_at=4")
    trainer = Trainer(config, CPU, Ranks())
    trainer.fit()
    ids = torch.full((INSTANCES, LENGTH), config.model.pad_token_id)
    for row, text in zip(ids, rows):
        row[LENGTH - len(text) :] = torch.tensor(text)
    mask = torch.tensor([[place >= LENGTH - len(text) for place in range(LENGTH)] for text in rows])
    chosen = torch.from_numpy(shuffled(0)).split(BATCH)[:4]
    losses, added = plain_loop(network, [ids[part] for part in chosen], [mask[part] for part in chosen])
    assert list(series(tmp_path / "run").values()) == pytest.approx(losses, rel=1e-6)
    if name == "OLMoE":
        assert list(series(tmp_path / "run", "train/LoadBalancingLoss").values()) == pytest.approx(added, rel=1e-6)
    assert worst(trainer.model, network) < 1e-5


@pytest.mark.parametrize("end", [0, 5, None])
def test_rows_of_another_tokenizer_are_a_warning(
    end: int | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "rows"
    datasets.Dataset.from_dict({"input_ids": [[2] * LENGTH] * BATCH}).save_to_disk(folder)
    if end is not None:
        (folder / "about.json").write_text(json.dumps({"eos_token_id": end}))
    data = (f"--data.dataset_path={folder}", "--data.paths=null")
    config = family_run(tmp_path, built("Llama"), *data, "--max_duration=1", "--dry_run")
    assert config.model.eos_token_id == 0
    Trainer(config, CPU, Ranks()).fit()
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    wanted = f"{folder}: documents end with token 5 (about.json), but model.eos_token_id is 0; use rows made with the "
    assert [line.startswith(wanted) for line in told] == ([True] if end == 5 else [])


def test_olmo2_is_the_same_run_through_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours, transformers' class behind the same trainer, and the plain loop: equal up to rounding."""
    torch.manual_seed(0)
    start, found = OLMo(tiny_olmo2_config()), []
    for ours in (True, False):
        network = olmo2(start)
        config = family_run(tmp_path / str(ours), network)
        if not ours:
            model = CausalLM(network, config.model, list(network.model.layers))
            monkeypatch.setattr(StartingPoint, "_model", MagicMock(return_value=model))
        trainer = Trainer(config, CPU, Ranks())
        trainer.fit()
        assert type(trainer.model) is (OLMo if ours else CausalLM)
        found.append((list(series(tmp_path / str(ours) / "run").values()), trainer.model))
    (losses, trained), (other_losses, other) = found
    assert losses == pytest.approx(other_losses, rel=1e-6) and losses[-1] < 0.9 * losses[0]
    assert worst(other, olmo2(trained)) < 1e-5
    plain = olmo2(start)
    by_hand, _ = plain_loop(plain, batches(tmp_path / "True"))
    assert losses == pytest.approx(by_hand, rel=1e-6) and worst(other, plain) < 1e-5


def test_divisor_of_the_loss_leaves_what_balances_experts(tmp_path: Path) -> None:
    """The mean over the predictions of each micro-batch in place of the sum by all tokens; both add the same."""
    network = built("OLMoE", **FAMILIES["OLMoE"])
    config = family_run(tmp_path, network, "--loss_divisor=predictions", "--stop_at=1")
    Trainer(config, CPU, Ranks()).fit()
    losses, added = plain_loop(network, batches(tmp_path, 1))
    assert series(tmp_path / "run")[1] == pytest.approx(losses[0] * LENGTH / (LENGTH - 1), rel=1e-6)
    assert series(tmp_path / "run", "train/LoadBalancingLoss")[1] == pytest.approx(added[0], rel=1e-6)


def without_head(model: CausalLM) -> None:
    """In place of `refusal`: a network whose logits are none that we compute."""
    model.head = None


def test_logits_in_a_way_of_its_own_train_and_evaluate_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_world(tmp_path / "world")
    write_family(folder, "Gemma 2")
    probes = {"label": "once_semantic", "data": {"dataset_path": str(folder / "once.json")}}
    heldout = {"label": "walk", "data": {"paths": [str(folder / "other256.npy")]}}
    entropy = {"label": "memories", "type": "knowledge_entropy"}
    asked = ("--eval_on_load", f"--evaluators={json.dumps([probes, heldout, entropy])}", "--softmax_auxiliary_loss")
    train(folder / "family.yaml", tmp_path / "head", "--stop_at=2", *asked)
    assert "way of its own" not in caplog.text
    monkeypatch.setattr("olmo.checkpoint.families.refusal", without_head)
    trainer = train(folder / "family.yaml", tmp_path / "logits", "--stop_at=2", *asked)
    assert trainer.model.vocabulary is None
    # 2 rows of 256 tokens, 128 logits of 4 bytes each.
    assert "Gemma2ForCausalLM computes logits in a way of its own" in caplog.text and "0.000262 GB" in caplog.text
    for line, other in zip(metrics(tmp_path / "head"), metrics(tmp_path / "logits"), strict=True):
        assert line.keys() == other.keys() and other == pytest.approx(line, rel=1e-5)
    monkeypatch.setattr("olmo.train.start.loss_function", lambda *_: linear_cross_entropy)  # as on a GPU
    with pytest.raises(ConfigurationError, match=r"^fused_loss: Gemma2ForCausalLM computes logits in a way of its own"):
        train(folder / "family.yaml", tmp_path / "fused", "--fused_loss")


@pytest.mark.parametrize(
    "flags", [["--data.generate_attention_mask"], ["--data.pad_rows", "--data.pad_direction=left"]]
)
def test_a_model_that_ignores_masks_is_not_given_any(flags: list[str], tmp_path: Path) -> None:
    config = family_run(tmp_path, families.built("recurrent_gemma"), *flags, "--max_duration=1")
    with pytest.raises(ValueError, match=r"data: rows with padding .* RecurrentGemmaForCausalLM, which ignores"):
        Trainer(config, CPU, Ranks())


def test_an_encoder_is_refused_at_the_start(tmp_path: Path) -> None:
    config = family_run(tmp_path, families.built("bert"), "--model.eos_token_id=1")
    with pytest.raises(ValueError, match="model: BertLMHeadModel cannot be trained: its logits depend on later tokens"):
        Trainer(config, CPU, Ranks())


def test_quantized_weights_are_refused(tmp_path: Path) -> None:
    network = built("Llama")
    network.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    path = write_run(tmp_path, built("Llama"))
    (tmp_path / "model/config.json").write_text(json.dumps(network.config.to_dict(), default=str))
    with pytest.raises(
        ConfigurationError, match=r"model: its weights are quantized \(gptq\) and cannot be trained; use"
    ):
        load(path, [], complete)


def test_experts_that_nothing_balances_are_on_record(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Trainer(family_run(tmp_path, built("DeepSeek-V3"), "--dry_run"), CPU, Ranks()).fit()
    assert caplog.text.count("DeepseekV3ForCausalLM has no loss that balances its experts; they train without one") == 1


def olmo2(model: OLMo) -> Any:
    """The same model in transformers' class, which trains the embedding of every token, as OLMo does."""
    network: Any = to_transformers(model)
    network.model.embed_tokens.padding_idx = None
    return network


def worst(model: CausalLM, network: torch.nn.Module) -> float:
    """The largest difference between their weights."""
    ours, theirs = model.network.state_dict(), network.state_dict()
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)
