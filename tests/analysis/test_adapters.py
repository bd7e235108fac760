"""Folders of adapters (PEFT) as checkpoints: measured and scored on their base model, as the merged model is."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file

from analysis import change_parameters, score
from olmo.exceptions import exit_status
from tests.analysis.measuring import LENGTH, coefficients_in, failing, result_in, run
from tests.architectures import built
from tests.hub import Hub
from tests.reference import tiny_tokenizer
from tests.serving import hub_serving

CONFIG = {"r": 3, "target_modules": ["up_proj", "down_proj", "q_proj"], "init_lora_weights": False}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder in which `../base` is not a folder that happens to be beside the project."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model with a tokenizer, an adapter that names it as seen from its own folder, and both merged."""
    folder = tmp_path_factory.mktemp("adapters")
    model = built("Llama", tie_word_embeddings=False)
    model.save_pretrained(folder / "base")
    tiny_tokenizer(folder / "base/tokenizer.json")
    torch.manual_seed(1)
    adapted = get_peft_model(model, LoraConfig(**CONFIG))
    adapted.peft_config["default"].base_model_name_or_path = "../base"
    adapted.save_pretrained(str(folder / "adapter"))
    adapted.merge_and_unload().save_pretrained(folder / "merged")
    shutil.copy(folder / "base/tokenizer.json", folder / "merged")
    return folder


def copied(made: Path, tmp_path: Path) -> Path:
    for name in ("base", "adapter"):
        shutil.copytree(made / name, tmp_path / name)
    return tmp_path / "adapter"


def flags(tokens: Path, output: Path) -> tuple[object, ...]:
    return "--data", tokens, "--data_size", 10, "--output", output


def test_an_adapter_is_measured_on_its_base_model(made: Path, tokens: Path, tmp_path: Path) -> None:
    for name in ("adapter", "merged", "base"):
        run("--checkpoint", made / name, *flags(tokens, tmp_path / name))
    found, merged, base = (coefficients_in(tmp_path / name) for name in ("adapter", "merged", "base"))
    torch.testing.assert_close(found, merged, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(found, base, rtol=1e-2)
    result = result_in(tmp_path / "adapter")
    assert result["checkpoint"]["path"] == str(made / "adapter")
    assert result["memories"] == result_in(tmp_path / "base")["memories"]


def test_text_has_the_tokenizer_of_the_base_model(made: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("The warden of the silver lake.\n\nIn the town of stone and water.\n")
    more = ("--data", tmp_path / "texts.txt", "--data_size", 2, "--pack", "none", "--sequence_length", LENGTH)
    for name in ("adapter", "base"):
        run("--checkpoint", made / name, *more, "--output", tmp_path / name)
    assert result_in(tmp_path / "adapter")["data"]["sha256"] == result_in(tmp_path / "base")["data"]["sha256"]


def test_identity_is_that_of_adapter_and_base(made: Path, tokens: Path, tmp_path: Path) -> None:
    """Each of the three files changes it, so that no earlier result is taken for the new one."""
    adapter, found = copied(made, tmp_path), []

    def measure() -> None:
        output = tmp_path / str(len(found))
        run("--checkpoint", adapter, *flags(tokens, output))
        found.append(result_in(output)["checkpoint"]["fingerprint"])

    measure()
    raw = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**raw, "lora_alpha": 99}))
    measure()
    for path in (adapter / "adapter_model.safetensors", tmp_path / "base/model.safetensors"):
        save_file({name: tensor * 1.01 for name, tensor in load_file(path).items()}, path, {"format": "pt"})
        measure()
    assert len({*found}) == 4


def test_an_adapter_is_scored_as_the_merged_model(made: Path, tokens: Path, tmp_path: Path) -> None:
    for name in ("adapter", "merged", "base"):
        argv = [made / name, "--held_out", f"held={tokens}", "--sequence_length", LENGTH, "--output", tmp_path / name]
        assert exit_status(score.main, [str(a) for a in argv]) == 0
    found, merged, base = (
        json.loads((tmp_path / name / "score.json").read_text())["metrics"]["eval/held/CrossEntropyLoss"]
        for name in ("adapter", "merged", "base")
    )
    assert found == pytest.approx(merged, rel=1e-5) != pytest.approx(base, rel=1e-3)


def test_an_adapter_and_its_base_model_on_the_hub(
    made: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def files(name: str) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (made / name).iterdir() if path.suffix != ".md"}

    raw = json.loads((made / "adapter/adapter_config.json").read_text())
    named = json.dumps({**raw, "base_model_name_or_path": "owner/base", "revision": "v1"}).encode()
    with hub_serving(tmp_path / "cache", monkeypatch, Hub) as hub:
        hub.add("owner/base", files("base"), "v1")
        hub.add("owner/adapter", files("adapter") | {"adapter_config.json": named})
        run("--checkpoint", "owner/adapter", *flags(tokens, tmp_path / "hub"))
        run("--checkpoint", made / "adapter", *flags(tokens, tmp_path / "here"))
    assert torch.equal(coefficients_in(tmp_path / "hub"), coefficients_in(tmp_path / "here"))


# --- what cannot be measured -------------------------------------------------------------------------------------


def refused(adapter: Path, tokens: Path, capsys: pytest.CaptureFixture[str]) -> str:
    return failing(capsys, "--checkpoint", adapter, *flags(tokens, adapter.parent / "out"))


def test_weights_that_can_hold_code_are_not_read(
    made: Path, tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = copied(made, tmp_path)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    assert "adapter_model.bin, which can hold code, is not read" in refused(adapter, tokens, capsys)


def test_tensors_that_are_missing(made: Path, tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """PEFT only warns of them."""
    adapter = copied(made, tmp_path)
    tensors = load_file(adapter / "adapter_model.safetensors")
    del tensors[min(tensors)]
    save_file(tensors, adapter / "adapter_model.safetensors")
    assert "adapter_model.safetensors: lacks 1 tensors of the adapter: base_model" in refused(adapter, tokens, capsys)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (None, "an adapter (PEFT), not a model; merge it into its base model with peft's merge_and_unload"),
        ("/nowhere/base", "adapter_config.json: base_model_name_or_path: /nowhere/base: no such folder"),
    ],
)
def test_a_base_model_that_is_not_there(
    name: str | None, said: str, made: Path, tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = copied(made, tmp_path)
    raw = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**raw, "base_model_name_or_path": name}))
    assert said in refused(adapter, tokens, capsys)


def test_virtual_tokens(made: Path, tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = get_peft_model(built("Llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    model.peft_config["default"].base_model_name_or_path = str(made / "base")
    model.save_pretrained(str(tmp_path / "adapter"))
    assert "PROMPT_TUNING adds virtual tokens" in refused(tmp_path / "adapter", tokens, capsys)


def test_without_peft(
    made: Path, tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = copied(made, tmp_path)
    monkeypatch.setitem(sys.modules, "peft", None)
    assert "pip install 'knowledge-entropy[peft]'" in refused(adapter, tokens, capsys)


def test_an_edit_of_an_adapter_is_refused(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--checkpoint", made / "adapter", "--resuscitation_ratio", 0.5, "--amplifying_factor", 2]
    assert exit_status(change_parameters.main, [str(a) for a in argv]) == 2
    assert capsys.readouterr().err == (
        f"error: {made / 'adapter'}: an adapter, which has no up projection to edit; merge it first: peft's "
        "merge_and_unload, then save_pretrained into a new folder\n"
    )
