"""The published configuration with the published knowledge, on a small model for a few steps: two processes (gloo),
injections, windows, all evaluators, and what acquisition makes of the run's folder."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from tokenizers import Tokenizer

from analysis.outcomes import as_json, k_and_a
from analysis.runs import TASKS, read_run
from olmo.checkpoint import load_model
from olmo.config import TrainConfig, load
from olmo.distributed import exit_process
from olmo.exceptions import exit_status
from olmo.knowledge.entries import KINDS
from scripts.train import main
from tests.published import ONCE, PARAPHRASE, fictional_knowledge, first_documents, olmo_tokenizer
from tests.reference import to_transformers
from tests.running import CPU, ROOT, command, metrics

CONFIG = ROOT / "configs/1B/1B_bs128_lr4e4_pubmed_1ep_738k.yaml"
LAST = 2
EVALUATIONS = (0, 1, 2)  # all of them just before or at an injection; the first and the last ask everything
ENTRIES = {"paraphrase": 70, "once": 60}
PARAGRAPHS = 3  # of each setting
COLUMNS = {
    *("step", "setting", "entry", "kind", "index", "tokens", "positions", "sum_log_prob", "mean_log_prob"),
    *("first_token_log_prob", "first_token_rank", "exact_match"),
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """The run's configuration; the run is done."""
    pytest.importorskip("olmo_eval", reason="pip install ai2-olmo-eval to run the downstream tasks")
    published, folder = fictional_knowledge(), tmp_path_factory.mktemp("published")
    files = {"paraphrase": published / PARAPHRASE, "once": published / ONCE}
    # All is asked; of each setting ten entries are injected, which fit a batch of twelve rows.
    for path in files.values():
        (folder / path.name).write_text(json.dumps(json.loads(path.read_text(encoding="utf-8"))[:10]))
    np.random.default_rng(0).integers(0, 50280, LAST * 12 * 1024, dtype="<u2").tofile(folder / "tokens.npy")
    settings: dict[str, Any] = {
        "base": str(CONFIG),
        "model": {"d_model": 16, "n_heads": 2, "n_layers": 1, "mlp_ratio": 4},
        "load_path": None,
        "data": {"dataset_path": None, "paths": [str(folder / "tokens.npy")]},
        "injection": {setting: str(folder / path.name) for setting, path in files.items()},
        "inject_interval": 1,
        "probing": {"steps": 1},
        "global_train_batch_size": 12,
        "device_train_microbatch_size": 2,
        "max_duration": LAST,
        "precision": "fp32",
        "save_folder": str(folder / "run"),
        "save_interval_unsharded": LAST,
    }
    OmegaConf.save(OmegaConf.create(settings), folder / "config.yaml")
    overrides = []
    for place, evaluator in enumerate(load(CONFIG).evaluators):
        key = f"--evaluators.{place}"
        if evaluator.type == "downstream":
            overrides.append(f"{key}.subset_num_batches=1")
        else:
            overrides.append(f"{key}.data.dataset_path={files[evaluator.label.partition('_')[0]]}")
            if evaluator.label.endswith("_paragraph"):  # they have many more tokens than all probes
                overrides += [f"{key}.subset_num_batches=1", f"{key}.device_eval_batch_size={PARAGRAPHS}"]
    done = command([__file__, str(folder / "config.yaml"), *overrides], ROOT, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    return load(folder / "config.yaml", overrides)


def evaluations(config: TrainConfig) -> dict[int, dict[str, float]]:
    """Step -> metrics of its evaluation; an AssertionError where a step has two."""
    lines = [line for line in metrics(Path(config.save_folder)) if "eval/K" in line]
    assert [line["step"] for line in lines] == list(EVALUATIONS)
    return {line["step"]: line for line in lines}


def test_every_evaluator_of_the_published_configuration_appears(config: TrainConfig) -> None:
    found = evaluations(config)
    for evaluator in config.evaluators:
        for step, line in found.items():
            name = f"eval/{evaluator.label}/CrossEntropyLoss"
            if evaluator.type == "downstream":
                told = [n for n in line if n.startswith(f"eval/downstream/{evaluator.label}_") and "chance" not in n]
                assert len(told) == (step in (0, LAST)), (evaluator.label, step)
                assert all(0 <= line[n] <= 1 for n in told)
            else:
                assert 0 < line[name] < 20, (evaluator.label, step)
    for setting in ENTRIES:
        # A new model knows nothing: a target costs about ln 50304 a token, its diluted loss far less.
        assert -found[0][f"eval/K_{setting}"] == pytest.approx(np.log(50304), rel=0.05)
        assert found[0][f"eval/{setting}_semantic/CrossEntropyLoss"] < 3


@pytest.mark.parametrize("step", EVALUATIONS)
def test_tables_of_probes_are_complete(config: TrainConfig, step: int) -> None:
    table = pyarrow.parquet.read_table(Path(config.save_folder) / "probes" / f"step{step}.parquet")
    assert set(table.column_names) == COLUMNS and all(column.null_count == 0 for column in table.columns)
    rows = table.to_pylist()
    assert {row["step"] for row in rows} == {step}
    places = [(row["setting"], row["kind"], row["entry"], row["index"]) for row in rows]
    wanted = {(s, kind, entry, i) for s, n in ENTRIES.items() for kind in KINDS for entry in range(n) for i in range(5)}
    wanted |= {(setting, "paragraph", entry, 0) for setting in ENTRIES for entry in range(PARAGRAPHS)}
    assert len(places) == len(wanted) == 1950 + 2 * PARAGRAPHS and set(places) == wanted
    for row in rows:
        assert row["tokens"] >= 1 and row["sum_log_prob"] < 0 and 0 <= row["first_token_rank"] < 50304
        assert row["mean_log_prob"] == pytest.approx(row["sum_log_prob"] / row["tokens"])


@torch.no_grad()
def test_probes_are_those_of_transformers(config: TrainConfig) -> None:
    """The run's last weights, in transformers: each probe alone."""
    folder, tokenizer = Path(config.save_folder), olmo_tokenizer()
    theirs = to_transformers(load_model(folder / f"step{LAST}-unsharded", CPU))
    table = pyarrow.parquet.read_table(folder / f"probes/step{LAST}.parquet").to_pylist()
    texts = texts_of(config, "once", "composition", tokenizer)
    rows = [row for row in table if (row["setting"], row["kind"]) == ("once", "composition")]
    assert len(rows) == len(texts) == 300
    for row, (ids, start) in list(zip(rows, texts))[::7]:  # of every place in an entry
        log_probs = theirs(torch.tensor([ids])).logits[0, start - 1 : -1].log_softmax(-1)
        of_targets = log_probs.gather(1, torch.tensor(ids[start:])[:, None])[:, 0]
        assert row["tokens"] == len(of_targets)
        assert row["mean_log_prob"] == pytest.approx(of_targets.mean().item(), abs=1e-5)
        assert row["first_token_log_prob"] == pytest.approx(of_targets[0].item(), abs=1e-5)
        assert row["exact_match"] == (log_probs.argmax(1).tolist() == ids[start:])


def texts_of(config: TrainConfig, setting: str, kind: str, tokenizer: Tokenizer) -> list[tuple[list[int], int]]:
    """(tokens, how many of them are the prompt) of the probes of one label in file order."""
    path = next(e.data.dataset_path for e in config.evaluators if e.label == f"{setting}_{kind}")
    found = []
    for entry in json.loads(Path(str(path)).read_text(encoding="utf-8")):
        for prompt, target in zip(entry[f"{KINDS[kind]}_input"], entry[f"{KINDS[kind]}_target"]):
            ids = tokenizer.encode(f"{prompt} {target}", add_special_tokens=False).ids
            found.append((ids, len(tokenizer.encode(prompt, add_special_tokens=False).ids)))
    return found


def published_losses(theirs: torch.nn.Module, texts: list[tuple[list[int], int]], batch_size: int) -> list[float]:
    """As the published evaluator has them: padded batches in file order, the target's cross-entropy divided by all
    predictions of a row. The vocabulary is scored at targets only: elsewhere its masked loss is 0."""
    losses = []
    for first in range(0, len(texts), batch_size):
        batch = texts[first : first + batch_size]
        length = max(len(ids) for ids, _ in batch)
        padded = torch.tensor([ids + [1] * (length - len(ids)) for ids, _ in batch])
        hidden = theirs.model(padded).last_hidden_state[:, :-1]
        for states, (ids, start) in zip(hidden, batch):
            logits, targets = theirs.lm_head(states[start - 1 : len(ids) - 1]), torch.tensor(ids[start:])
            losses.append(F.cross_entropy(logits, targets, reduction="sum").item() / (length - 1))
    return losses


@torch.no_grad()
def test_k_published_is_the_formula_over_logged_losses_and_a_direct_loop(config: TrainConfig) -> None:
    """All 1,950 published probes, of the run's last weights in transformers."""
    folder, tokenizer = Path(config.save_folder), olmo_tokenizer()
    theirs = to_transformers(load_model(folder / f"step{LAST}-unsharded", CPU))
    run, logged = read_run(folder), evaluations(config)
    found = as_json(k_and_a([run]))
    by_hand = {}
    for setting in ENTRIES:
        for kind in KINDS:
            losses = published_losses(theirs, texts_of(config, setting, kind, tokenizer), 16)
            by_hand[f"{setting}_{kind}"] = sum(losses) / len(losses)
            assert logged[LAST][f"eval/{setting}_{kind}/CrossEntropyLoss"] == pytest.approx(
                by_hand[f"{setting}_{kind}"], abs=1e-6
            )

    def formula(losses: dict[str, float]) -> float:
        means = {s: sum(losses[f"{s}_{kind}"] for kind in KINDS) / 3 for s in ENTRIES}
        return -(70 * means["paraphrase"] + 60 * means["once"]) / 130

    k = [formula({label: logged[step][f"eval/{label}/CrossEntropyLoss"] for label in by_hand}) for step in (0, LAST)]
    assert found["K_published_before"]["value"] == pytest.approx(k[0], rel=1e-12)
    assert found["K_published_after"]["value"] == pytest.approx(k[1], rel=1e-12)
    assert found["K_published_after"]["value"] == pytest.approx(formula(by_hand), abs=1e-6)
    assert found["A_published"]["value"] == pytest.approx(100 * (k[1] - k[0]) / abs(k[0]), rel=1e-9)
    assert found["A_published"]["low"] < found["A_published"]["high"]
    # About 0.084 of the padded positions are targets, so a new model's ln 50304 a token is diluted.
    assert 0.07 < found["K_published_before"]["value"] / found["K_before"]["value"] < 0.1


def test_acquisition_prints_its_table(config: TrainConfig) -> None:
    done = command(["-m", "analysis.acquisition", config.save_folder], ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    heading, line, *notes = done.stdout.splitlines()
    assert all(note.startswith("note: run: ") for note in notes)
    row = dict(zip(*(re.split(" {2,}", text) for text in (heading, line)), strict=True))
    assert (row["run"], row["start"], row["step"]) == ("run", "0", str(LAST))
    found = evaluations(config)
    k = found[0]["eval/K"], found[LAST]["eval/K"]
    assert [float(row["K before"]), float(row["K after"])] == pytest.approx(k, abs=1e-4)
    assert float(row["A %"].split()[0]) == pytest.approx(100 * (k[1] - k[0]) / abs(k[0]), abs=0.01)
    told = {f"{task}_{metric}" for task in TASKS for metric in ("acc", "len_norm")}
    accuracies = [
        [v for n, v in found[step].items() if n.startswith("eval/downstream/") and n.split("/")[2] in told]
        for step in (0, LAST)
    ]
    assert [len(of_step) for of_step in accuracies] == [len(TASKS)] * 2
    p = [sum(of_step) / len(of_step) for of_step in accuracies]
    assert [float(row["P before"]), float(row["P after"])] == pytest.approx(p, abs=1e-4)
    assert float(row["F %"].split()[0]) == pytest.approx(-100 * (p[1] - p[0]) / p[0], abs=0.01)
    assert row.keys() >= {"effectivity"}, "the run's windows"


if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patch:
        first_documents(patch, 64)  # of each task, one batch of which is evaluated
        exit_process(exit_status(main))
