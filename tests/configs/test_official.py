"""The official configurations: they load, and say what the official runs were."""

from __future__ import annotations

from pathlib import Path

import pytest

from olmo.config import TrainConfig, load
from olmo.data.sources import expand_ranges
from olmo.model import OLMo
from olmo.train.schedule import learning_rate

OFFICIAL = Path(__file__).resolve().parents[2] / "configs" / "official"
V1_5 = "https://olmo-data.org/preprocessed/olmo-mix/v1_5/gpt-neox-20b-pii-special/"
SAMPLE = "https://olmo-data.org/preprocessed/olmo-mix/v1_5-sample/gpt-neox-20b-pii-special/"


def official(name: str) -> tuple[TrainConfig, list[str]]:
    config = load(OFFICIAL / f"{name}.yaml")
    return config, [path for pattern in config.data.paths or [] for path in expand_ranges(pattern)]


@pytest.mark.parametrize(
    "name, parameters, files, distinct",
    [
        ("OLMo-1B", 1_176_764_416, 249, 249),
        ("OLMo-7B", 6_888_095_744, 443, 443),
        ("OLMo-2-0425-1B", 1_484_916_736, 1122, 1117),
    ],
)
def test_sizes(name: str, parameters: int, files: int, distinct: int) -> None:
    config, paths = official(name)
    assert sum(p.numel() for p in OLMo.empty(config.model).parameters()) == parameters
    assert (len(paths), len(set(paths))) == (files, distinct)
    assert all(path.endswith(".npy") and "{" not in path for path in paths)


def test_order_of_the_files_of_olmo_1b() -> None:
    _, paths = official("OLMo-1B")
    assert paths[:5] == [
        V1_5 + f"part-{part}.npy" for part in ("000-00000", "000-00001", "001-00000", "002-00000", "003-00000")
    ]
    parts = [path.removeprefix(V1_5) for path in paths]
    assert parts == sorted(parts)
    twice = {int(part[5:8]) for part in parts if part.endswith("-00001.npy")}
    assert len(twice) == 249 - 188 and {0, 4, 5, 6, 8, 185} <= twice and not {1, 7, 186, 187} & twice


def test_order_of_the_files_of_olmo_7b() -> None:
    _, paths = official("OLMo-7B")
    parts = [path.removeprefix(SAMPLE) for path in paths]
    assert parts == sorted(parts)
    counts = [sum(part.startswith(f"part-{number:03d}-") for part in parts) for number in range(188)]
    assert [number for number, count in enumerate(counts) if count == 4] == [46, 150]
    assert set(counts) == {2, 3, 4} and counts[6] == counts[187] == 3 and counts[0] == 2


def test_tokens_and_rates() -> None:
    """Batches of 4 M tokens (OLMo 2 1B: 2 M), and the learning rate at the peak and at the end."""
    for name, tokens, peak in (
        ("OLMo-1B", 2048 * 2048, 4e-4),
        ("OLMo-7B", 2048 * 2048, 3e-4),
        ("OLMo-2-0425-1B", 512 * 4096, 4e-4),
    ):
        config, _ = official(name)
        assert config.global_train_batch_size * config.model.max_sequence_length == tokens
        warm, end = int(config.scheduler.t_warmup), int(config.scheduler.t_max or 10**6)
        assert learning_rate(config, warm, end) == pytest.approx(peak)
        assert learning_rate(config, end, end) == pytest.approx(peak / 10)
