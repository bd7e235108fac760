"""`measure` against analysis.entropy, to the last bit, and against coefficients that a hook of the test has heard."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import nn
from transformers import PreTrainedTokenizerFast

import knowledge_entropy as ke
from analysis import job
from analysis.results import COEFFICIENTS_FILE, RESULT
from tests.analysis.measuring import LENGTH, TEXTS, direct, entropies, made_model, result_in, rows_of, run, write
from tests.architectures import built
from tests.reference import tiny_tokenizer

COUNT = 20


@pytest.fixture(scope="module")
def pythia() -> nn.Module:
    return built("Pythia", max_position_embeddings=LENGTH)


@pytest.fixture(scope="module")
def rows(tokens: Path) -> np.ndarray:
    return rows_of(tokens)[:COUNT]


def made(name: str, folder: Path) -> nn.Module:
    """A tiny model, also saved to a folder."""
    if name == "OLMo":
        model: Any = made_model(0)
        write(folder, model)
        return model
    model = built(name, max_position_embeddings=LENGTH)
    model.save_pretrained(folder)
    return model


def held(path: Path) -> tuple[dict[str, str], dict[str, bytes]]:
    """What a file of tensors holds; safetensors writes the keys of its header in any order."""
    with safe_open(path, "np") as file:
        return file.metadata(), {name: file.get_tensor(name).tobytes() for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("name", ["OLMo", "Pythia", "OLMoE"])
def test_a_path_and_a_module_give_what_the_command_gives_to_the_last_bit(
    name: str, tokens: Path, tmp_path: Path
) -> None:
    model = made(name, tmp_path / "model")
    more = ["--measures", "knowledge,attention,next_token", "--coefficient", "abs", "--sequence_length", LENGTH]
    run("--checkpoint", tmp_path / "model", "--data", tokens, "--data_size", COUNT, *more, "--output", tmp_path / "out")
    settings: dict[str, Any] = {"data_size": COUNT, "measures": ("knowledge", "attention", "next_token")}
    settings["sequence_length"] = LENGTH

    of_path = ke.measure(tmp_path / "model", tokens, **settings)
    of_path.save(tmp_path / "saved")
    assert (tmp_path / "saved" / RESULT).read_bytes() == (tmp_path / "out" / RESULT).read_bytes()
    saved, theirs = (held(tmp_path / place / COEFFICIENTS_FILE) for place in ("saved", "out"))
    assert saved == theirs
    assert not (tmp_path / "model" / RESULT).exists()

    of_module, wanted = ke.measure(model, tokens, **settings).to_dict(), result_in(tmp_path / "out")
    about = of_module.pop("checkpoint"), wanted.pop("checkpoint")
    assert json.dumps(of_module) == json.dumps(wanted)
    assert about[0]["step"] == -1 and about[0]["path"].startswith(type(model).__name__)
    assert (about[0]["fingerprint"] == about[1]["fingerprint"]) == (name == "OLMo")


def test_command_and_function_measure_by_the_same_call(
    tokens: Path, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def called(*args: Any, **kwargs: Any) -> Any:
        raise ValueError("the one measurement")

    monkeypatch.setattr("analysis.job.measured", called)
    monkeypatch.setattr("analysis.module.measured", called)
    asked = ["--checkpoint", shared, "--data", tokens, "--data_size", 4, "--output", tmp_path]
    for call in (
        lambda: run(*asked),
        lambda: ke.measure(shared, tokens, data_size=4),
        lambda: ke.measure(made_model(0), tokens, data_size=4),
    ):
        with pytest.raises(ValueError, match="the one measurement"):
            call()
    assert job.measured is called


def test_the_entropy_is_that_of_coefficients_heard_one_instance_at_a_time(pythia: nn.Module, rows: np.ndarray) -> None:
    ragged = [row[: 3 + n % 13] for n, row in enumerate(rows)]
    average = direct(pythia, [f"gpt_neox.layers.{layer}.mlp.dense_4h_to_h" for layer in range(2)], ragged)
    result = ke.measure(pythia, ragged)
    np.testing.assert_allclose(result.layers, entropies(average), rtol=0, atol=1e-6)
    assert result.entropy == pytest.approx(sum(entropies(average)), abs=1e-6)
    np.testing.assert_allclose(result.coefficients[1], average[1], rtol=1e-5)
    assert result.maximum == pytest.approx(2 * np.log(48))


# --- data --------------------------------------------------------------------------------------------------------


def padded(rows: np.ndarray) -> datasets.Dataset:
    """The rows with padding on the left, as tokenizers make it."""
    ids = [[1, 1, *row] for row in rows.tolist()]
    return datasets.Dataset.from_dict({"attention_mask": [[0, 0] + [1] * LENGTH] * len(ids), "input_ids": ids})


ROWS: dict[str, Callable[[np.ndarray], Any]] = {
    "lists": lambda rows: rows.tolist(),
    "a generator of tensors": lambda rows: (torch.from_numpy(row) for row in rows),
    "an array": lambda rows: rows.astype(np.uint16),
    "a tensor": torch.from_numpy,
    "a dataset": lambda rows: datasets.Dataset.from_dict({"input_ids": rows.tolist(), "text": ["x"] * len(rows)}),
    "a padded dataset of tensors": lambda rows: padded(rows).with_format("torch"),
    "a stream": lambda rows: padded(rows).to_iterable_dataset(),
}


@pytest.mark.parametrize("kind", ROWS)
def test_token_ids_of_every_kind(kind: str, pythia: nn.Module, rows: np.ndarray, tokens: Path) -> None:
    wanted = ke.measure(pythia, tokens, data_size=COUNT)
    found = ke.measure(pythia, ROWS[kind](rows))
    assert found.entropy == wanted.entropy and wanted.compare(found).standard_error == 0
    assert found.to_dict()["data"]["sha256"] == wanted.to_dict()["data"]["sha256"]
    fewer = ke.measure(pythia, ROWS[kind](rows), data_size=4, sequence_length=8).to_dict()
    assert (fewer["number_of_instances"], fewer["number_of_tokens"], fewer["sequence_length"]) == (4, 32, 8)


def streamed(texts: list[str]) -> datasets.IterableDataset:
    def rows() -> Iterator[dict[str, str]]:
        yield from ({"text": text} for text in texts)

    return datasets.IterableDataset.from_generator(rows)


@pytest.mark.parametrize("pack", ["eos", "none"])
def test_texts_of_every_kind(pack: str, tmp_path: Path) -> None:
    model: Any = built("Pythia")
    (tmp_path / "texts.json").write_text(json.dumps([{"text": text} for text in TEXTS]))
    small = Tokenizer.from_file(str(tiny_tokenizer(tmp_path / "tokenizer.json")))
    fast = PreTrainedTokenizerFast(tokenizer_object=cut(small), eos_token=small.id_to_token(0))
    run_with: dict[str, Any] = {"pack": pack, "sequence_length": 8}
    wanted = ke.measure(model, tmp_path / "texts.json", tokenizer=tmp_path / "tokenizer.json", **run_with)
    ids = [[*encoding.ids, *[0] * (pack == "eos")] for encoding in small.encode_batch(TEXTS)]
    stream = np.array([token for one in ids for token in one])
    rows = [stream[at : at + 8] for at in range(0, len(stream) - 7, 8)] if pack == "eos" else [one[:8] for one in ids]
    assert wanted.entropy == ke.measure(model, rows).entropy and len(rows) > 4
    for texts in (TEXTS, iter(TEXTS), datasets.Dataset.from_dict({"text": TEXTS}), streamed(TEXTS)):
        found = ke.measure(model, texts, tokenizer=fast, **run_with)
        assert found.entropy == wanted.entropy
        assert found.to_dict()["data"]["pack"] == ("eos" if pack == "eos" else None)
    for tokenizer in (small, str(tmp_path)):
        assert ke.measure(model, TEXTS, tokenizer=tokenizer, **run_with).entropy == wanted.entropy
    if pack == "none":
        return
    # The tokenizer and the end of documents of the folder that the model was loaded from.
    for part in (fast, model.config):
        part.save_pretrained(tmp_path / "model")
    model.config.eos_token_id, model.name_or_path = 5, str(tmp_path / "model")
    assert ke.measure(model, TEXTS, **run_with).entropy == wanted.entropy


def cut(tokenizer: Tokenizer) -> Tokenizer:
    """A call of transformers leaves its tokenizer set to cut and pad."""
    found = Tokenizer.from_str(tokenizer.to_str())
    found.enable_truncation(2)
    found.enable_padding(length=2)
    return found


@pytest.mark.parametrize("module", [nn.Linear(2, 2), nn.Sequential(nn.Embedding(9, 2), nn.Linear(2, 2))])
def test_a_module_without_memories_is_refused(module: nn.Module, rows: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"^(Linear: no embeddings|Sequential: no list of layers)"):
        ke.measure(module, rows % 8)
