"""What runs on MPS, as far as can be told without one: by a device that has no float64 either (tests/foreign.py).

Nothing here shows what Apple's kernels give.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchgen
from torch.utils import backend_registration

from analysis.choices import MEASURES
from analysis.measure import measure
from olmo.distributed import Ranks
from olmo.model import OLMo
from olmo.train import Trainer
from tests import foreign
from tests.reference import tiny_olmo2_config
from tests.running import CPU, command, configure, metrics, train, write_world

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"), reason="this torch makes no devices"
)
SETTINGS = ("--softmax_auxiliary_loss=true", "--model.temperature_attention=2", "--data.generate_attention_mask=true")
PRECISIONS = ("fp32", "amp_bf16")


def entropies(device: torch.device) -> dict[str, list[float]]:
    """All three entropies of rows of unequal length, by grouped queries."""
    torch.manual_seed(0)
    model = OLMo(tiny_olmo2_config(n_kv_heads=2)).eval().to(device)
    random = np.random.default_rng(0)
    rows = [random.integers(0, 128, length) for length in (64, 64, 40, 3, 64, 10, 7)]
    found = measure(model, rows, 4, "abs", device, Ranks(), measures=MEASURES)
    others = {name: found.others[name].average for name in MEASURES[1:]}
    return {"knowledge": found.layers.tolist()} | {n: np.atleast_1d(values).tolist() for n, values in others.items()}


def runs(folder: Path, device: torch.device) -> list[list[dict[str, Any]]]:
    """What runs tell that go on from a checkpoint, in float32 and in bfloat16."""
    config = write_world(folder / "world") / "config.yaml"
    train(config, folder / "start", *SETTINGS, "--evaluators=[]", "--stop_at=2", "--save_interval_unsharded=2")
    settings = (*SETTINGS, f"--load_path={folder / 'start' / 'step2-unsharded'}", "--eval_on_load=true", "--stop_at=4")
    for precision in PRECISIONS:
        Trainer(configure(config, folder / precision, f"--precision={precision}", *settings), device, Ranks()).fit()
    return [metrics(folder / precision) for precision in PRECISIONS]


def refused(work: Callable[[], object]) -> str:
    try:
        work()
    except (RuntimeError, TypeError) as error:
        return str(error)
    return "nothing"


def main(folder: Path) -> None:
    with foreign.device() as device:
        there = torch.zeros(2, device=device)
        report = {
            "refused": [refused(there.double), refused(lambda: there + torch.zeros(2))],
            "runs": runs(folder, device),
            "entropies": entropies(device),
            "operations": sorted(foreign.OPERATIONS),
        }
    (folder / "found.json").write_text(json.dumps(report), encoding="utf-8")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `main` writes, in a process of its own."""
    folder = tmp_path_factory.mktemp("mps")
    done = command([str(Path(__file__).resolve()), str(folder)], folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "found.json").read_text(encoding="utf-8"))


def test_the_device_refuses_what_mps_does(found: dict[str, Any]) -> None:
    assert found["refused"] == [
        "the device has no float64",
        "add.Tensor: expected all tensors to be on the same device",
    ]


def test_runs_tell_what_they_tell_on_a_cpu(found: dict[str, Any], tmp_path: Path) -> None:
    """Losses, z-losses, gradient norms, probes and held-out losses."""
    for mine, wanted, near in zip(found["runs"], runs(tmp_path, CPU), (1e-4, 0.1)):
        assert [line.keys() for line in mine] == [line.keys() for line in wanted]
        for line, expected in zip(mine, wanted):
            # Without autocast, which the device has in name alone, other numbers round.
            assert line == pytest.approx(expected, rel=near, abs=near)


def test_entropies_are_those_of_a_cpu(found: dict[str, Any]) -> None:
    for name, values in entropies(CPU).items():
        assert found["entropies"][name] == pytest.approx(values, rel=1e-6), name


def test_every_operation_has_a_kernel_for_mps(found: dict[str, Any]) -> None:
    """By torch's own list of kernels; one that is composed of others needs none."""
    table = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native" / "native_functions.yaml"
    entries = dict(re.findall(r"^- func: ([\w.]+)\((.*?)(?=^- func|\Z)", table.read_text(), re.MULTILINE | re.DOTALL))

    def runs_on_mps(name: str) -> bool:
        delegate = re.search(r"structured_delegate: (\S+)", entries[name])
        entry = entries[delegate[1]] if delegate else entries[name]
        return (
            "dispatch:" not in entry or re.search(r"^    .*\b(MPS|Composite\w+)\b.*:", entry, re.MULTILINE) is not None
        )

    assert len(found["operations"]) > 80 and not runs_on_mps("_cudnn_rnn")
    assert [name for name in found["operations"] if not runs_on_mps(name)] == []


if __name__ == "__main__":
    main(Path(sys.argv[1]))
