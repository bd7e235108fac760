"""environment.json: a record of every start."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from olmo.config import TrainConfig, load
from olmo.report import environment
from olmo.report.environment import seed_effects
from olmo.report.reporter import Reporter
from tests.running import ROOT


def test_every_start_of_a_run_stays_on_record(config: TrainConfig) -> None:
    for step, seed in ((None, 1), (5, 2), (7, 3)):
        Reporter(replace(config, seed=seed, allow_changed_settings=True), active=True, resume_step=step).close()
    path = Path(config.save_folder) / "environment.json"
    last = json.loads(path.read_text())
    starts = [*last.pop("earlier"), last]
    assert [(start["resumed_from"], start["seed"]) for start in starts] == [(None, 1), (5, 2), (7, 3)]
    assert len({frozenset(start) for start in starts}) == 1  # the same keys
    Reporter(config, active=True, resume_step=None).close()  # a run that replaces it
    assert json.loads(path.read_text())["earlier"] == []


def test_the_commit_is_that_of_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment in the folder of another project has that project's repository above it."""

    def git(*arguments: str) -> str:
        named = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        command = ["git", "-C", str(tmp_path), *named, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    for folder in ("code", "environment"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "environment.py").touch()
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "code" / "environment.py"))
    assert environment.git_state() == "unknown"
    git("init", "--quiet")
    git("add", "code")
    git("commit", "--quiet", "--message", "code")
    commit = git("rev-parse", "HEAD")
    found = environment.git_state()
    assert len(found) >= 7 and commit.startswith(found)
    (tmp_path / "code" / "environment.py").write_text("changed", "utf-8")
    assert environment.git_state() == f"{found}+changes"
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "environment" / "environment.py"))
    assert environment.git_state() == "unknown"


def test_what_the_seed_varies_is_on_record(config: TrainConfig) -> None:
    """In the configuration of the paper nothing: loaded weights, the order of the files, no dropout."""
    paper = load(ROOT / "configs/1B/1B_bs128_lr4e4_pubmed_1ep_738k.yaml")
    shuffled = replace(paper, data_shuffling=True)
    assert seed_effects(paper) == []
    assert seed_effects(shuffled) == ["order of the data"]
    assert seed_effects(replace(shuffled, data=replace(paper.data, seed=0))) == []
    assert seed_effects(replace(paper, load_path=None)) == ["initial weights"]
    assert seed_effects(replace(paper, model=replace(paper.model, embedding_dropout=0.1))) == ["dropout"]
    Reporter(config, active=True, resume_step=None).close()
    record = json.loads((Path(config.save_folder) / "environment.json").read_text())
    assert record["seed_varies"] == seed_effects(config) != []


def test_the_command_is_on_record_without_its_secrets(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUB_TOKEN", "hf_0123456789abcdef")
    urls = ("--data.paths=[https://me:pass-word@data.org/a.npy?X-Sig=abcdef]", "--run_name=hf_0123456789abcdef")
    monkeypatch.setattr("sys.orig_argv", ["python", "-m", "scripts.train", "a.yaml", *urls])
    Reporter(config, active=True, resume_step=None).close()
    command = json.loads((Path(config.save_folder) / "environment.json").read_text())["command"]
    assert command.startswith("python -m scripts.train a.yaml ") and "data.org/a.npy" in command
    assert not any(secret in command for secret in ("pass-word", "hf_0123456789abcdef", "abcdef"))


def test_a_record_of_an_older_version_is_kept_where_it_is_whole(config: TrainConfig) -> None:
    Path(config.save_folder).mkdir()
    path = Path(config.save_folder) / "environment.json"
    for record, kept in (('{"python": "3.10.1"}', [{"python": "3.10.1"}]), ('{"python": "3.1', [])):
        path.write_text(record)
        Reporter(config, active=True, resume_step=5).close()
        assert json.loads(path.read_text())["earlier"] == kept
