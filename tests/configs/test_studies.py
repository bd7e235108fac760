"""Every study of configs/studies, by the same file with tiny checkpoints and data in their place, to its
report by its command line: in this process, and a part of one in processes of its own."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from analysis import estimates
from olmo.exceptions import exit_status
from scripts import study
from scripts.studies.read import read_study
from tests import studies
from tests.analysis.drawing import coarse_figures
from tests.warm import warm_python

ROOT = Path(__file__).resolve().parents[2]
# Fewer conditions than the file has; `python -m tests.studies` runs all of them.
FEWER = {
    "paper_1b": [
        "conditions.0.settings=[baseline, batch_2048]",
        "conditions.0.starts=[118k, 369k, 738k]",
        "conditions.1.starts=[554k, 738k]",
        "entropy.Dolma.starts=[118k, 369k, 554k, 738k]",
        "entropy.Dolma.interventions=[none, q = 0.5, random rows, T = 2]",
        "conditions.2.starts=[554k]",
        "conditions.2.interventions=[q = 1]",
        "conditions.3.interventions=[q = 0.5, q = 1, p = 10 %, random rows, MLP temperature, T = 2, no injection]",
    ],
    "demo": ["seeds=1"],
    "paper_7b": ["conditions=[{starts: [118k, 738k, step 89000, step 557000]}]"],
    "paper_c4": ["conditions=[{starts: [118k, 738k]}]"],
    "pythia_1.4b": ["conditions=[{starts: [118k, 738k, step 23000, step 143000]}]"],
    "chang_7b": ["conditions=[{starts: [7B early, 7B middle, 7B late, 1B middle]}]"],
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stand-ins")
    studies.write_stand_ins(folder)
    return folder


@pytest.fixture
def in_this_process() -> Iterator[None]:
    with studies.in_this_process() as patch, coarse_figures():
        patch.setattr(estimates, "RESAMPLES", 50)
        # The commands' own figures are no part of the report.
        patch.setattr("analysis.figures.acquisition.save_acquisition", lambda result, folder: None)
        patch.setattr("analysis.figures.entropy.save_series", lambda series, folder, *more: None)
        yield


def run(name: str, world: Path, output: Path, *more: str) -> dict[str, Any]:
    """Run a study by its command line; returns its study.json."""
    given = [*studies.changes(name, world), *more]
    command = [f"configs/studies/{name}.yaml", "--output", str(output), "--jobs", "1"]
    assert exit_status(study.main, [*command, *(part for change in given for part in ("--set", change))]) == 0
    found: dict[str, Any] = json.loads((output / "study.json").read_text("utf-8"))
    return found


def test_every_study_has_stand_ins() -> None:
    ours = {path.stem for path in studies.STUDIES.glob("*.yaml")}
    assert ours == set(studies.NAMES)


@pytest.mark.parametrize("name", sorted(set(studies.NAMES) - {"demo_published", "contrast"}))  # those extend the demo
def test_a_study_comes_to_its_report(name: str, world: Path, tmp_path: Path, in_this_process: None) -> None:
    run(name, world, tmp_path / name, *FEWER.get(name, []))
    found = studies.check(name, tmp_path / name)
    if name == "paper_1b":
        table = next(table for table in found["tables"] if table["name"] == "table_1")
        column = table["head"].index("F, % of the paper")
        assert [row[column] for row in table["rows"]] == [10.5, 12.9, 19.5, 2.2, 3.5, 44.9]


def test_stages_of_a_study_are_processes(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "executable", warm_python())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    output = tmp_path / "smollm2"
    command = ["configs/studies/smollm2.yaml", "--output", str(output), "--only", "entropy"]
    given = [part for change in studies.changes("smollm2", world) for part in ("--set", change)]
    for stages in (1, 0):
        assert exit_status(study.main, [*command, *given]) == 0
        assert f"\n{stages} stages to run" in capsys.readouterr().out
    found = json.loads((output / "study.json").read_text("utf-8"))
    assert [entropy["start"] for entropy in found["entropies"]] == ["SmolLM2"]


def test_checkpoints_of_studies_are_published_ones() -> None:
    official = OmegaConf.to_container(OmegaConf.load(ROOT / "configs/official/checkpoints.yaml"))
    assert isinstance(official, dict)
    seen = 0
    for path in [*studies.STUDIES.glob("*.yaml")]:
        for start in read_study(path).starts.values():
            for place in filter(None, [start.checkpoint, *start.checkpoints]):
                if match := re.fullmatch(r"allenai/OLMo-(\dB)@step(\d+)-tokens(\d+)B", place):
                    of, step = official[match[1]], int(match[2])
                    assert step in [step for steps in of["runs"].values() for step in steps], place
                    assert step not in of["not_on_hub"], place
                    assert int(match[3]) == round(step * of["tokens_a_step"] / 1e9), place
                    seen += 1
    assert seen > 30
