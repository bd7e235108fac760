"""The card that `scripts.convert --to hf` writes: what was recorded, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from analysis.change_parameters import main as change_parameters
from analysis.entropy import main as entropy
from olmo import checkpoint
from olmo.checkpoint.sharded import snapshot
from olmo.config import DataConfig, InjectionConfig, TrainConfig
from olmo.distributed import Ranks
from olmo.exceptions import exit_status
from olmo.model import OLMo
from olmo.train.optim import build_optimizer
from scripts.convert import main
from scripts.prepare.conversion import convert, was_written
from scripts.prepare.model_card import Origin, hub_name
from tests.architectures import built
from tests.hub import Hub
from tests.reference import tiny_config, tiny_tokenizer
from tests.running import ROOT
from tests.serving import hub_serving


def run_of(folder: Path, **changed: Any) -> Path:
    """A checkpoint after step 25 of a run that injects a round every 8 steps."""
    torch.manual_seed(0)
    tiny_tokenizer(folder / "tokenizer.json")
    settings: dict[str, Any] = {
        **{"run_name": "a <run> | of mine", "model": tiny_config(), "max_duration": 80, "seed": 7},
        **{"load_path": "/home/someone/step480-unsharded", "reset_optimizer_state": True},
        **{"data": DataConfig(dataset_path="data/pubmed"), "inject_interval": 8},
        "injection": InjectionConfig(paraphrase="/home/someone/paraphrase.json", once="data/once.json"),
    }
    run = TrainConfig(**{**settings, **changed})
    run.tokenizer.identifier = str(folder / "tokenizer.json")
    model = OLMo(run.model)
    state = {"global_step": 25, "global_train_tokens_seen": 25 * 512}
    checkpoint.save(folder / "step25-unsharded", model, run, build_optimizer(run.optimizer, model), state)
    return folder / "step25-unsharded"


def test_a_restart_checkpoint_is_known_by_its_weights(tmp_path: Path) -> None:
    run = TrainConfig(model=tiny_config())
    for number in (0, 1):
        torch.manual_seed(number)
        model = OLMo(run.model)
        place, tensors = tmp_path / f"{number}/step1", snapshot(model, {}, Ranks())
        checkpoint.save_sharded(place, tensors, model, run, {"global_step": 1}, None, False, Ranks())
    first, other = (Origin(tmp_path / f"{number}/step1", tmp_path / f"{number}/step1") for number in (0, 1))
    convert(first, tmp_path / "hf", "hf")
    assert was_written(first, tmp_path / "hf") and not was_written(other, tmp_path / "hf")


def converted(source: Path, target: Path, *flags: str) -> tuple[dict[str, Any], str]:
    """Metadata and text of the card of a new folder."""
    assert exit_status(main, [str(source), str(target), "--to", "hf", *flags]) == 0
    card = ModelCard.load(target / "README.md")
    return card.data.to_dict(), card.text


def rows(text: str, head: str) -> dict[str, str]:
    section = text.partition(f"## {head}\n")[2].partition("\n## ")[0] if head else text.partition("\n## ")[0]
    cells = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")]
    return {cell[0]: cell[1] for cell in cells if len(cell) == 2}


def test_a_run_is_described_by_its_records(tmp_path: Path) -> None:
    source = run_of(tmp_path)
    data, text = converted(source, tmp_path / "hf")
    assert data == {
        **{"library_name": "transformers", "pipeline_tag": "text-generation"},
        "tags": ["knowledge-entropy", "fictional-knowledge", "olmo"],
    }
    assert "# a &lt;run> \\| of mine\n" in text and "/home" not in text and str(tmp_path) not in text
    assert "\n\nA language model trained with injected fictional knowledge. Written by" in text
    about, training, injection = (rows(text, head) for head in ("", "Training run", "Injected knowledge"))
    assert (about["model"], about["step"], about["tokens"]) == ("OlmoForCausalLM", "25", "12,800")
    assert about["fingerprint of the weights it was converted from"] == checkpoint.identity_of(source)
    assert training["started from"] == "step480-unsharded" and training["states continued"] == "trainer"
    assert (training["training data"], training["duration"], training["seed"]) == ("data/pubmed", "80", "7")
    assert injection["entries, paraphrase"] == "paraphrase.json" and injection["entries, once"] == "data/once.json"
    assert (injection["rounds"], injection["step of the first round"]) == ("10", "8")
    assert injection["rounds injected up to step 25"] == "3"  # at 8, 16 and 24
    assert "Resuscitation" not in text and "Knowledge entropy" not in text
    assert "AutoTokenizer.from_pretrained" in text


def test_without_records_nothing_is_stated(tmp_path: Path) -> None:
    source = run_of(tmp_path, injection=InjectionConfig(paraphrase="a.json", rounds=0), load_path=None)
    _, text = converted(source, tmp_path / "control")
    assert "Injected" not in text and rows(text, "Training run")["started from"] == "new weights"
    (source / "config.yaml").write_text(
        yaml.safe_dump({"model": yaml.safe_load((source / "config.yaml").open())["model"]})
    )
    (source / "train.pt").unlink()
    (tmp_path / "weights").mkdir()
    for name in ("config.yaml", "model.safetensors"):
        (source / name).rename(tmp_path / "weights" / name)
    data, text = converted(tmp_path / "weights", tmp_path / "hf")
    assert data["tags"] == ["knowledge-entropy", "olmo"] and not data.keys() & {"license", "base_model", "datasets"}
    assert "Training" not in text and not rows(text, "").keys() & {"step", "tokens", "tokenizer"}
    assert "AutoTokenizer" not in text


def test_an_edit_and_entropies_of_these_weights_are_stated(tmp_path: Path) -> None:
    source = run_of(tmp_path)
    (tmp_path / "ids.jsonl").write_text('{"text": "one two three four"}\n' * 40)
    measure = ["--checkpoint", str(source), "--data", str(tmp_path / "ids.jsonl"), "--sequence_length", "8"]
    measure += ["--data_size", "4"]
    entropy(measure)
    flags = ["--resuscitation_ratio", "0.5", "--amplifying_factor", "2"]
    change_parameters(["--checkpoint", str(source), *flags])
    edit = "resuscitation_ratio0.5_amplifying2.0.safetensors"
    entropy([*measure, "--resuscitation", edit, "--output", str(tmp_path / "edited")])
    data, text = converted(source, tmp_path / "hf", "--resuscitation", edit)
    assert data["tags"][:2] == ["knowledge-entropy", "resuscitation"]
    about = rows(text, "Resuscitation")
    assert (about["file"], about["amplifying_factor"], about["select"]) == (edit, "2.0", "lowest")
    record = json.loads((tmp_path / "hf/resuscitation.json").read_text())
    assert about["sha256"] == record["sha256"]
    result = json.loads((source / "knowledge_entropy.json").read_text())
    line = (
        f"| before the edit | {result['knowledge_entropy']:.4f} | {result['standard_error']:.4f} | 4 | 8 | ids.jsonl |"
    )
    assert line in text
    _, text = converted(source, tmp_path / "plain")
    assert line.replace("before the edit", "these") in text
    of_edit = (tmp_path / "edited/knowledge_entropy.json").read_text()
    (source / "knowledge_entropy.json").write_text(of_edit)
    assert "Knowledge entropy" not in converted(source, tmp_path / "unedited")[1]
    line = f"| these | {json.loads(of_edit)['knowledge_entropy']:.4f} |"
    assert line in converted(source, tmp_path / "again", "--resuscitation", edit)[1]
    result["checkpoint"]["fingerprint"] = "0" * 64  # of other weights
    (source / "knowledge_entropy.json").write_text(json.dumps(result))
    assert "Knowledge entropy" not in converted(source, tmp_path / "other")[1]


def test_a_model_of_the_hub_is_the_base_and_gives_its_license(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = built("Llama")
    model.save_pretrained(tmp_path / "model")
    files = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    files["README.md"] = b"---\nlicense: mit\n---\nof the original"
    torch.save({name: tensor * 2 for name, tensor in model.state_dict().items()}, tmp_path / "edit.pt")
    with hub_serving(tmp_path / "cache", monkeypatch, Hub) as hub:
        commit = hub.add("owner/tiny", files, "step12-tokens3B")
        source = "owner/tiny@step12-tokens3B"
        edit = ["--resuscitation", str(tmp_path / "edit.pt"), "--resuscitation_force"]
        data, text = converted(source, tmp_path / "hf", *edit)  # type: ignore[arg-type]
        assert hub_name("owner/tiny@step12-tokens3B") == hub_name("owner/tiny@step12-tokens3B") == "owner/tiny"
        assert hub_name("checkpoints/tiny") is None, "a folder of another working directory is no model of the hub"
    assert (data["license"], data["base_model"]) == ("mit", "owner/tiny")
    about = rows(text, "")
    assert (about["converted from"], about["commit"], about["step"]) == (source, commit, "12")
    assert about["tokens"] == "3,000,000,000" and "of the original" not in text


def test_metadata_that_is_none_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = run_of(tmp_path)
    (source / "README.md").write_text("---\n[1, 2\n---\n")
    assert exit_status(main, [str(source), str(tmp_path / "hf"), "--to", "hf"]) == 1
    assert f"error: {source / 'README.md'}: its metadata is not YAML" in capsys.readouterr().err


def test_the_citation_is_that_of_the_repository(tmp_path: Path) -> None:
    _, text = converted(run_of(tmp_path), tmp_path / "hf")
    paper = yaml.safe_load((ROOT / "CITATION.cff").read_text())["references"][0]
    names = " and ".join(f"{author['given-names']} {author['family-names']}" for author in paper["authors"])
    flat = " ".join(text.split())
    assert all(str(part) in flat for part in (paper["title"], paper["url"], paper["year"], names))
