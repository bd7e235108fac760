"""Knowledge entropy along a run equals what analysis.entropy measures on the checkpoint of the step."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import numpy as np
import pytest

from analysis.entropy import main as entropy
from olmo.exceptions import ConfigurationError
from tests.running import BATCH, SHORT, command, configure, series, train, write_world

ASKED = ("--eval_interval=2", "--save_interval_unsharded=2", "--stop_at=4", "--eval_on_load")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world")) / "plain.yaml"


def evaluator(**data: object) -> str:
    return f"--evaluators={json.dumps([{'label': 'memories', 'type': 'knowledge_entropy', **data}])}"


def measured(checkpoint: Path, output: Path, *data: object) -> dict:
    entropy(["--checkpoint", str(checkpoint), "--output", str(output), *map(str, data)])
    return json.loads((output / "knowledge_entropy.json").read_text())


def check(run: Path, output: Path, *data: object) -> None:
    values = series(run, "eval/memories/knowledge_entropy")
    for step in (2, 4):
        expected = measured(run / f"step{step}-unsharded", output / str(step), *data)
        assert values[step] == pytest.approx(expected["knowledge_entropy"], abs=1e-6)
        error = series(run, "eval/memories/standard_error")[step]
        assert error == pytest.approx(expected["standard_error"], rel=1e-4)
        layers = [series(run, f"eval/memories/layer_{number}")[step] for number in range(len(expected["layers"]))]
        assert layers == pytest.approx(expected["layers"], abs=1e-6)
    assert values[2] != values[4]


def test_the_first_batch_of_the_run_itself(plain: Path, tmp_path: Path) -> None:
    train(plain, tmp_path / "run", evaluator(), *ASKED)
    assert series(tmp_path / "run", "eval/memories/knowledge_entropy").keys() == {0, 2, 4}
    check(tmp_path / "run", tmp_path, "--data", plain, "--data_size", BATCH)
    few = evaluator(subset_num_batches=2, device_eval_batch_size=2)
    train(plain, tmp_path / "few", few, *ASKED)
    check(tmp_path / "few", tmp_path / "4", "--data", plain, "--data_size", 4)


def test_data_of_its_own(plain: Path, tmp_path: Path) -> None:
    """The rows of a `datasets` folder, padding left away, and all of a token file."""
    rows = [np.random.default_rng(n).integers(0, 128, n).tolist() for n in (SHORT, 5, 1, 17)]
    datasets.Dataset.from_dict({"input_ids": rows}).save_to_disk(tmp_path / "data")
    train(plain, tmp_path / "a", evaluator(data={"dataset_path": str(tmp_path / "data"), "pad_rows": True}), *ASKED)
    check(tmp_path / "a", tmp_path / "of-a", "--data", tmp_path / "data", "--data_size", 4)
    path = plain.parent / f"heldout{SHORT}.npy"
    train(plain, tmp_path / "b", evaluator(data={"paths": [str(path)]}), *ASKED)
    check(tmp_path / "b", tmp_path / "of-b", "--data", path, "--data_size", 5)


def test_training_goes_on_as_without_it(plain: Path, tmp_path: Path) -> None:
    train(plain, tmp_path / "with", evaluator(), "--eval_interval=1", "--model.residual_dropout=0.1")
    train(plain, tmp_path / "without", "--model.residual_dropout=0.1")
    assert series(tmp_path / "with") == series(tmp_path / "without")


def test_two_processes_measure_the_same(plain: Path, tmp_path: Path) -> None:
    arguments = ["-m", "scripts.train", str(plain), evaluator(), "--eval_interval=2", "--stop_at=2"]
    for processes in (1, 2):
        done = command([*arguments, f"--save_folder={tmp_path / str(processes)}"], tmp_path, processes)
        assert done.returncode == 0, done.stderr
    for name in ("knowledge_entropy", "standard_error", "layer_1"):
        one, two = (series(tmp_path / n, f"eval/memories/{name}")[2] for n in "12")
        assert one == pytest.approx(two, rel=1e-5)


def test_data_that_it_cannot_use(plain: Path, tmp_path: Path) -> None:
    told = "evaluators.memories: accepts data.paths, data.dataset_path, or neither for the run's own"
    for data in ({"datasets": {"a": ["b"]}}, {"paths": ["a"], "dataset_path": "b"}):
        with pytest.raises(ConfigurationError, match=told):
            configure(plain, tmp_path, evaluator(data=data))
