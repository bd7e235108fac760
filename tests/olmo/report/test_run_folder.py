"""The files of a run: lines, tables, and what a restart drops."""

from __future__ import annotations

from pathlib import Path

from olmo.config import TrainConfig
from olmo.report.reporter import Reporter
from tests.reporting import metrics, run_to


def test_a_resumed_run_reads_like_an_unbroken_one(config: TrainConfig, tmp_path: Path) -> None:
    folder = Path(config.save_folder)
    run_to(config, [1, 2, 3, 4])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "train/Cross')  # killed while writing
    with (folder / "injections.jsonl").open("a") as file:
        file.write('{"step": 5, "rou')
    run_to(config, [3, 4, 5], resume_step=2)
    resumed = [(folder / name).read_text() for name in ("metrics.jsonl", "injections.jsonl")]
    tables = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.parquet"))

    config.save_folder = str(tmp_path / "unbroken")
    run_to(config, [1, 2, 3, 4, 5])
    unbroken = Path(config.save_folder)
    assert resumed == [(unbroken / name).read_text() for name in ("metrics.jsonl", "injections.jsonl")]
    assert tables == sorted(str(path.relative_to(unbroken)) for path in unbroken.rglob("*.parquet"))


def test_an_injection_is_one_line(config: TrainConfig) -> None:
    run_to(config, [7])
    assert (Path(config.save_folder) / "injections.jsonl").read_text() == (
        '{"step": 7, "round": 1, "tokens": 3, "texts": [{"entry": "once/7", "row": 0, "tokens": 2}, '
        '{"entry": "map/1", "row": 5, "tokens": 1}]}\n'
    )


def test_a_torn_line_of_a_kept_step_is_dropped(config: TrainConfig) -> None:
    run_to(config, [1])
    path = Path(config.save_folder) / "metrics.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"step": 2}')
    run_to(config, [], resume_step=2)
    assert path.read_text() == whole


def test_what_lies_beyond_the_restart_is_gone_before_anything_new_is_written(config: TrainConfig) -> None:
    run_to(config, [1, 2, 30])
    Reporter(config, active=True, resume_step=2).close()
    folder = Path(config.save_folder)
    assert {line["step"] for line in metrics(folder)} == {1, 2}
    assert sorted(path.name for path in (folder / "probes").iterdir()) == ["step1.parquet", "step2.parquet"]
    assert sorted(path.name for path in (folder / "losses").iterdir()) == ["step1.parquet", "step2.parquet"]


def test_a_new_run_starts_from_nothing(config: TrainConfig) -> None:
    run_to(config, [1, 2])
    run_to(config, [7])
    folder = Path(config.save_folder)
    assert {line["step"] for line in metrics(folder)} == {7}
    assert (folder / "injections.jsonl").read_text().startswith('{"step": 7, ')
    assert [path.name for path in (folder / "probes").iterdir()] == ["step7.parquet"]
