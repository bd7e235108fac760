"""configs/resuscitation: each differs from its parent by the lines that matter, names the file that analysis.
change_parameters writes, and trains from just the weights that it says."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from analysis import change_parameters
from olmo import checkpoint
from olmo.config import load
from olmo.files.tensors import read_tensors
from olmo.memory.rescaling import rescale
from scripts import train
from tests.analysis.editing import LENGTH, MEMORIES, measure, uneven_model, write
from tests.reference import by_layer
from tests.running import metrics

ROOT = Path(__file__).resolve().parents[2]
[PARENT] = (ROOT / "configs/1B").glob("*.yaml")
FOLDER = Path("checkpoints/pretrained_1B/738020-unsharded")
# The flags of change_parameters beside p = 0.5 and q = 2, and the key that names what it writes.
CONTROLS = {
    "resuscitation": ("resuscitation", []),
    "random": ("resuscitation", ["--select", "random"]),
    "highest": ("resuscitation", ["--select", "highest"]),
    "mlp_temperature": ("temperature_MLP", ["--format", "temperature"]),
    "attention_temperature": ("temperature_attention", None),
}


def of(control: str) -> Path:
    return ROOT / f"configs/resuscitation/{PARENT.stem}_{control}.yaml"


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def test_these_are_all() -> None:
    assert set((ROOT / "configs/resuscitation").iterdir()) == set(map(of, CONTROLS))


@pytest.mark.parametrize("control", CONTROLS)
def test_it_differs_from_its_parent_by_the_line_that_matters(control: str) -> None:
    parent, own = flat(asdict(load(PARENT))), flat(asdict(load(of(control))))
    changed = {key for key in own if own[key] != parent[key]}
    assert changed - {"base"} == {"run_name", "save_folder", f"model.{CONTROLS[control][0]}"}
    assert own["run_name"] == f"{parent['run_name']}_{control}" and own["save_folder"].endswith(own["run_name"])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a measured checkpoint where OLMo-1B's would lie, and tokens."""
    place = tmp_path_factory.mktemp("place")
    tokens = place / "tokens.npy"
    np.random.default_rng(0).integers(2, 128, 40 * LENGTH).astype("<u2").tofile(tokens)
    write(place / FOLDER, uneven_model())
    measure(place / FOLDER, tokens)
    return place


def started(config: Path) -> tuple[dict[str, Tensor], float]:
    """The weights that a run of this configuration starts from, and its first loss.

    With a small model, data and a learning rate of 0; what else the configuration says stands.
    """
    small = [f"{k}={getattr(uneven_model().config, k)}" for k in ("d_model", "n_heads", "n_layers", "mlp_hidden_size")]
    small += [f"max_sequence_length={LENGTH}", "vocab_size=128", "embedding_size=128", "eos_token_id=0"]
    arguments = [*(f"--model.{each}" for each in small), "--data.dataset_path=null", "--data.paths=[tokens.npy]"]
    arguments += ["--global_train_batch_size=2", "--stop_at=1", "--injection=null", "--evaluators=[]"]
    arguments += ["--precision=fp32", "--optimizer.learning_rate=0", "--save_interval_unsharded=1"]
    train.main([str(config), *arguments, "--save_overwrite"])
    run = Path(load(config).save_folder)
    return checkpoint.read_state(run / "step1-unsharded"), metrics(run)[-1]["train/CrossEntropyLoss"]


@pytest.mark.parametrize("control", CONTROLS)
def test_it_trains_from_the_weights_that_it_says(
    place: Path, control: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    key, flags = CONTROLS[control]
    if flags is not None:
        argv = ["--step", "738020", "--resuscitation_ratio", "0.5", "--amplifying_factor", "2"]
        change_parameters.main([*argv, *flags])
    (_, before), (found, loss) = started(PARENT), started(of(control))
    wanted = checkpoint.read_state(FOLDER)
    if key == "resuscitation":
        file = read_tensors(FOLDER / str(load(of(control)).model.resuscitation))
        assert file["selected"].sum(1).tolist() == [MEMORIES // 2] * 2
        wanted = rescale(wanted, by_layer(file["multipliers"]))
    assert wanted.keys() == found.keys() and all(torch.equal(wanted[name], found[name]) for name in wanted)
    assert abs(loss - before) > 1e-5  # temperatures too change what the same weights and tokens give
