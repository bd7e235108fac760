"""A folder that looks like the repository after the downloads that the documentation names, with everything tiny.

It has the real code and the real configurations, in which only sizes differ, and small files of our own where the
documentation has published ones.
"""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from omegaconf import OmegaConf

from olmo import checkpoint
from olmo.config import TrainConfig, load
from olmo.model import OLMo
from olmo.train.optim import build_optimizer
from scripts.prepare.fictional_knowledge import make_entries
from tests.architectures import built
from tests.docs.pages import ROOT
from tests.reference import tiny_config, tiny_tokenizer
from tests.study import make_plan

LENGTH = 256  # tokens of an instance
VOCABULARY = 128
STEPS = {"pretrained_1B": (20000, 738020), "pretrained": (557000,)}
SIZES: dict[str, Any] = {
    "model": {"d_model": 32, "n_heads": 4, "n_layers": 2, "mlp_hidden_size": 96, "max_sequence_length": LENGTH},
    "scheduler": {"t_warmup": 1},
    "max_duration": 4,
    "inject_interval": 2,
    "eval_interval": 2,
    "save_interval": 2,
    "save_interval_unsharded": 4,
    "global_train_batch_size": 4,
    "device_train_microbatch_size": 4,
}
TOKENS = {"vocab_size": VOCABULARY, "embedding_size": VOCABULARY, "eos_token_id": 0, "pad_token_id": 1}


def build(folder: Path) -> Path:
    """Fill an empty folder."""
    for name in ("olmo", "analysis", "scripts", "knowledge_entropy"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "configs", folder / "configs")
    tiny_tokenizer(folder / "tokenizer.json")
    rng = np.random.default_rng(0)
    _official(folder, rng)
    _published(folder)
    _corpora(folder)
    _demo(folder, rng)
    _shrink(folder / "configs/1B/1B_bs128_lr4e4_pubmed_1ep_738k.yaml", {**SIZES, **_tokens(folder)})
    _family(folder)
    _articles(folder)
    return folder


def _tokens(folder: Path) -> dict[str, Any]:
    return {"tokenizer": {"identifier": str(folder / "tokenizer.json")}}


def _shrink(path: Path, sizes: dict[str, Any]) -> None:
    """Change sizes in a configuration, and leave out downstream tasks (tests/olmo/eval/test_downstream.py)."""
    config = OmegaConf.load(path)
    of_probes = [e for e in config.get("evaluators") or [] if e.get("type") != "downstream"]
    model = {**sizes["model"], **TOKENS}
    OmegaConf.save(OmegaConf.merge(config, {**sizes, "model": model, "evaluators": of_probes}), path)


def _articles(folder: Path) -> None:
    """Texts of one's own."""
    (folder / "articles").mkdir()
    for number, place in enumerate(("lake", "hill", "moor")):
        text = f"The {place} of Zeth was found by Vorn {number}. " * 60
        (folder / f"articles/{place}.txt").write_text(text, "utf-8")


def _family(folder: Path) -> None:
    """Pythia-1.4B: a folder as the hub has it, which the configuration names."""
    model, path = folder / "checkpoints/pythia-1.4b", folder / "configs/pythia/1.4b_pubmed.yaml"
    built("Pythia", max_position_embeddings=LENGTH).save_pretrained(model)
    tiny_tokenizer(model / "tokenizer.json")
    config = OmegaConf.load(path)
    sizes = {**SIZES, "model": {"max_sequence_length": LENGTH}, "load_path": str(model)}
    of_probes = [e for e in config.evaluators if e.get("type") != "downstream"]
    OmegaConf.save(OmegaConf.merge(config, {**sizes, "evaluators": of_probes}), path)


def _save(folder: Path, config: TrainConfig, seed: int) -> None:
    torch.manual_seed(seed)
    model = OLMo(config.model)
    checkpoint.save(folder, model, config, build_optimizer(config.optimizer, model), {})


def _official(folder: Path, rng: np.random.Generator) -> None:
    """The official runs: checkpoints, and token files in place of Dolma's."""
    for place, steps in STEPS.items():
        for step in steps:
            config = TrainConfig(model=tiny_config(max_sequence_length=LENGTH))
            config.tokenizer.identifier = str(folder / "tokenizer.json")
            _save(folder / f"checkpoints/{place}/{step}-unsharded", config, step)
    for size in ("1B", "7B"):
        tokens = folder / f"dolma{size}.npy"
        rng.integers(2, VOCABULARY, 40 * LENGTH).astype("<u2").tofile(tokens)
        path = folder / f"configs/official/OLMo-{size}.yaml"
        config = OmegaConf.load(path)
        config.data.paths = [str(tokens)]
        config.model.update({"max_sequence_length": LENGTH, **TOKENS})
        OmegaConf.save(config, path)


def _knowledge() -> tuple[list[Any], list[Any]]:
    """Two entries of setting paraphrase with nine other wordings, ten of setting once."""
    entries = make_entries(12, paraphrases=9, seed=5, max_words=55)
    return entries[:2], entries[2:]


def _published(folder: Path) -> None:
    place = folder / "data/fictional_knowledge"
    place.mkdir(parents=True)
    paraphrase, once = _knowledge()
    (place / "fictional_knowledge_paraphrased_paraphrase70.json").write_text(json.dumps(paraphrase), "utf-8")
    (place / "fictional_knowledge_paraphrased_once60.json").write_text(json.dumps(once), "utf-8")


def _corpora(folder: Path) -> None:
    """A file of PubMed's baseline, and one of C4."""
    text = "Renal lesions were induced in rats and measured after two weeks of oral treatment. " * 4
    articles = "".join(
        f"<PubmedArticle><MedlineCitation><PMID Version='1'>{number}</PMID><Article>"
        f"<ArticleTitle>Study {number}.</ArticleTitle><Abstract><AbstractText>{text}{number}.</AbstractText></Abstract>"
        "<Language>eng</Language></Article></MedlineCitation></PubmedArticle>"
        for number in range(1, 81)
    )
    (folder / "baseline").mkdir()
    with gzip.open(folder / "baseline/pubmed25n0001.xml.gz", "wt") as file:
        file.write(f"<?xml version='1.0'?><PubmedArticleSet>{articles}</PubmedArticleSet>")
    (folder / "en").mkdir()
    with gzip.open(folder / "en/c4-train.00000-of-01024.json.gz", "wt") as file:
        file.writelines(
            json.dumps({"text": f"{number}. {text}", "url": f"http://a/{number}"}) + "\n" for number in range(80)
        )


def _demo(folder: Path, rng: np.random.Generator) -> None:
    """What `make demo` prepares: text, knowledge, the last checkpoint of its pretraining, and an empty plan."""
    text, knowledge = folder / "runs/demo/text", folder / "runs/demo/knowledge"
    text.mkdir(parents=True)
    knowledge.mkdir()
    tiny_tokenizer(text / "tokenizer.json")
    for name in ("general_train", "general_heldout", "science_heldout"):
        count = 80 if name == "general_train" else 4
        rng.integers(2, VOCABULARY, count * LENGTH).astype("<u2").tofile(text / f"{name}.npy")
    rows = rng.integers(2, VOCABULARY, (240, LENGTH)).tolist()
    datasets.Dataset.from_dict({"input_ids": rows}).save_to_disk(str(text / "science_train"))
    for setting, entries in zip(("paraphrase", "once"), _knowledge()):
        (knowledge / f"fictional_knowledge_{setting}.json").write_text(json.dumps(entries), "utf-8")
    for name in ("pretrain", "continual"):
        _shrink(folder / f"configs/tiny/{name}.yaml", {"model": {}})
    pretrain = load(folder / "configs/tiny/pretrain.yaml")
    _save(folder / "runs/demo/pretraining/seed0/step480-unsharded", pretrain, 0)
    plan = make_plan(folder / "runs/demo", {}, ()) / "plan.json"  # of no run
    plan.write_text(json.dumps({**json.loads(plan.read_text("utf-8")), "directions": []}), "utf-8")
