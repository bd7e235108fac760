"""Measurements of edited models, of any family."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from analysis import change_parameters, entropy, verification
from olmo import checkpoint
from olmo.exceptions import ConfigurationError, exit_status
from tests.analysis.editing import LENGTH, change, measure, measure_to, uneven_model, write
from tests.olmo.memory.test_locate import built
from tests.reference import tiny_config
from tests.running import CPU


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "tokens.npy"
    np.random.default_rng(0).integers(2, 128, 40 * LENGTH).astype("<u2").tofile(path)
    return path


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, tokens: Path) -> Path:
    folder = write(tmp_path_factory.mktemp("measured") / "step90-unsharded", uneven_model())
    measure(folder, tokens)
    return folder


@pytest.fixture
def folder(tmp_path: Path, measured: Path) -> Iterator[Path]:
    """A measured checkpoint of the test's own."""
    yield Path(shutil.copytree(measured, tmp_path / "step90-unsharded"))


def test_verify_measures_again_and_checks_the_law(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = json.loads((folder / "knowledge_entropy.json").read_text())["knowledge_entropy"]
    for form in ("multipliers", "full"):
        for layer in (0, 1):
            capsys.readouterr()
            change(folder, 0.5, 1.0, "--layers", layer, "--format", form, "--verify")
            _, entropy_line, law = capsys.readouterr().out.splitlines()
            found = re.fullmatch(
                r"verified on 40 instances: H (\S+) -> (\S+), difference \+(\S+) \+- \S+", entropy_line
            )
            assert found and abs(float(found[1]) - before) < 1e-4 and float(found[3]) > 0.05
            said = re.fullmatch(rf"layer {layer}, .* of 24 selected memories are 1.0 x the mean \S+ within (\S+)", law)
            assert said and float(said[1]) < 2e-6
    monkeypatch.setattr(verification, "open_model", lambda *_: uneven_model())  # an edit that is not there
    with pytest.raises(ValueError, match="layer 1 does not follow the law of algorithm 1"):
        change(folder, 0.5, 1.0, "--layers", 1, "--verify")


def test_verify_wants_the_same_instances(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--checkpoint", folder, "--resuscitation_ratio", 0.5, "--amplifying_factor", 2, "--verify"]
    result_file = folder / "knowledge_entropy.json"
    result = json.loads(result_file.read_text())
    other = tmp_path / "other.npy"
    np.random.default_rng(1).integers(2, 128, 40 * LENGTH).astype("<u2").tofile(other)
    result_file.write_text(json.dumps({**result, "data": {**result["data"], "path": str(other)}}))
    assert exit_status(change_parameters.main, [str(a) for a in argv]) == 1
    assert f"{other}: holds other instances than those of {result_file}" in capsys.readouterr().err
    result_file.unlink()
    assert exit_status(change_parameters.main, [str(a) for a in argv]) == 1
    assert f"{result_file}: missing" in capsys.readouterr().err


def test_the_command_measures_an_edited_model(
    folder: Path, tmp_path: Path, tokens: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`analysis.entropy --resuscitation` of either format gives what a folder of edited weights gives."""
    change(folder, 0.5, 2.0)
    change(folder, 0.5, 2.0, "--format", "full")
    name = "resuscitation_ratio0.5_amplifying2.0"
    edited = checkpoint.load_model(
        folder, CPU, config=tiny_config(max_sequence_length=LENGTH, resuscitation=f"{name}.safetensors")
    )
    edited.config.resuscitation = None
    wanted = measure(write(tmp_path / "edited", edited), tokens)
    own = (folder / "knowledge_entropy.json").read_bytes()
    for suffix in (".safetensors", ".pt"):
        output = tmp_path / suffix
        measure(folder, tokens, "--resuscitation", folder / (name + suffix), "--output", output)
        assert f"{folder}, edited by {folder / (name + suffix)}: H = " in capsys.readouterr().out
        result = json.loads((output / "knowledge_entropy.json").read_text())
        assert result["knowledge_entropy"] == wanted
        assert result["resuscitation"] == hashlib.sha256((folder / (name + suffix)).read_bytes()).hexdigest()
    assert (folder / "knowledge_entropy.json").read_bytes() == own
    # Coefficients of the edited model are not those of the checkpoint.
    with pytest.raises(ValueError, match="measured on another checkpoint"):
        change(folder, 0.5, 2.0, "--coefficients", tmp_path / ".pt/mlp_average_coefficients.safetensors")
    with pytest.raises(ConfigurationError, match="--resuscitation: needs --output"):
        measure(folder, tokens, "--resuscitation", folder / f"{name}.pt")


def test_another_checkpoints_multipliers_are_refused_unless_forced(folder: Path, tmp_path: Path, tokens: Path) -> None:
    change(folder, 0.5, 2.0)
    name = "resuscitation_ratio0.5_amplifying2.0.safetensors"
    other = write(tmp_path / "other", uneven_model(1))
    argv = ["--resuscitation", folder / name, "--output", tmp_path / "result"]
    with pytest.raises(
        ValueError,
        match=r"made for a different checkpoint than .*; set resuscitation_force \(--\w+\) to apply it anyway",
    ):
        measure(other, tokens, *argv)
    forced = measure_to(other, tokens, tmp_path / "result", *argv[:2], "--resuscitation_force")
    assert forced != measure_to(other, tokens, tmp_path / "plain")
    config = tiny_config(max_sequence_length=LENGTH, resuscitation=str(folder / name))
    with pytest.raises(ValueError, match="; set resuscitation_force "):
        checkpoint.load_model(other, CPU, config=config)
    config.resuscitation_force = True
    checkpoint.load_model(other, CPU, config=config)


@pytest.mark.parametrize("name", ["Llama", "Phi-3", "GPT-2", "Pythia", "OLMoE"])
def test_a_model_of_another_family(name: str, tmp_path: Path, tokens: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "model"
    built(name).save_pretrained(folder)
    size = ("--sequence_length", LENGTH)
    measure(folder, tokens, *size)
    written = (folder / "knowledge_entropy.json").stat().st_mtime_ns
    measure(folder, tokens, *size)
    assert (folder / "knowledge_entropy.json").stat().st_mtime_ns == written  # what it wrote is no part of the model
    capsys.readouterr()
    change(folder, 0.5, 2.0, "--verify")
    change(folder, 0.5, 2.0, "--format", "full")
    law = capsys.readouterr().out.splitlines()[2]
    error = float(law.rpartition(" ")[2])
    assert error < 2e-6 if name in ("Llama", "Phi-3", "OLMoE") else error > 1e-3  # gelu(u x) is no u gelu(x)
    edits = [folder / f"resuscitation_ratio0.5_amplifying2.0{suffix}" for suffix in (".safetensors", ".pt")]
    found = [measure_to(folder, tokens, tmp_path / edit.suffix, "--resuscitation", edit, *size) for edit in edits]
    before = json.loads((folder / "knowledge_entropy.json").read_text())["knowledge_entropy"]
    assert found[0] == found[1] != before


def test_another_model_of_another_family_is_recognised(
    tmp_path: Path, tokens: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By all of its files, whichever differs."""
    one, other = tmp_path / "one", tmp_path / "other"
    model = built("Llama")
    model.save_pretrained(one, max_shard_size="20KB")
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    model.save_pretrained(other, max_shard_size="20KB")
    differ = [path.name for path in one.glob("*") if path.read_bytes() != (other / path.name).read_bytes()]
    assert len(list(one.glob("model-*.safetensors"))) > 3 and len(differ) == 1
    size = ("--sequence_length", LENGTH)
    measure(one, tokens, *size)
    change(one, 0.5, 2.0)
    edit = one / "resuscitation_ratio0.5_amplifying2.0.safetensors"
    with pytest.raises(ValueError, match=f"{edit}: made for a different checkpoint than {other}"):
        measure_to(other, tokens, tmp_path / "out", *size, "--resuscitation", edit)
    assert not (tmp_path / "out").exists()
    forced = measure_to(other, tokens, tmp_path / "out", *size, "--resuscitation", edit, "--resuscitation_force")
    assert forced == measure_to(
        one, tokens, tmp_path / "out of one", *size, "--resuscitation", edit
    )  # the last norm is of no use


def test_experts_whose_coefficients_do_not_scale_are_refused(tmp_path: Path, tokens: Path) -> None:
    folder = tmp_path / "model"
    built("GPT-OSS").save_pretrained(folder)
    measure(folder, tokens, "--sequence_length", LENGTH)
    with pytest.raises(ValueError, match="cannot tell the up projection of these experts from their gate"):
        change(folder, 0.5, 2.0)
    assert not list(folder.glob("resuscitation*"))


def test_a_measurement_of_edits_that_makes_no_sense(
    folder: Path, tmp_path: Path, tokens: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(folder, 0.5, 2.0)
    change(folder, 0.5, 2.0, "--format", "full")
    other = write(tmp_path / "other", uneven_model(1))
    edit = folder / "resuscitation_ratio0.5_amplifying2.0.safetensors"
    full = edit.with_suffix(".pt")
    output = tmp_path / "out"
    for more, said in (
        ([folder, "--resuscitation_force"], "--resuscitation_force: needs --resuscitation"),
        ([folder, other, "--resuscitation", full, "--output", output], f"{full} holds the weights of one checkpoint"),
        ([folder, "--resuscitation", edit, "--output", folder], f"{folder} holds the checkpoint's own results"),
        (
            [folder, other, "--resuscitation", edit, "--resuscitation_force", "--output", tmp_path],
            f"{folder} holds the checkpoint's own results",
        ),
    ):
        argv = ["--data", tokens, "--data_size", 40, "--checkpoint", *more]
        capsys.readouterr()
        assert exit_status(entropy.main, [str(a) for a in argv]) == 2
        assert said in capsys.readouterr().err
    assert not output.exists()
    built("Llama").save_pretrained(tmp_path / "llama")
    argv = [
        "--data",
        tokens,
        "--data_size",
        40,
        "--output",
        output,
        "--resuscitation",
        full,
        "--sequence_length",
        LENGTH,
    ]
    capsys.readouterr()
    assert exit_status(entropy.main, [str(a) for a in ("--checkpoint", tmp_path / "llama", *argv)]) == 1
    assert f"error: {full}: no state dict of the model in {tmp_path / 'llama'}\n" in capsys.readouterr().err
    assert exit_status(entropy.main, [str(a) for a in ("--checkpoint", folder, *argv[:-3], "none.pt")]) == 1
    assert f"error: --resuscitation: none.pt is not a file, here or in {folder}; analysis." in capsys.readouterr().err
    # Of several, an edit is of one, and the others are named; forced, it is of all.
    argv = ["--data", tokens, "--data_size", 40, "--output", output, "--resuscitation", edit]
    argv += ["--checkpoint", folder, other]
    assert exit_status(entropy.main, [str(a) for a in argv]) == 1
    assert f"{edit}: made for a different checkpoint than {other}" in capsys.readouterr().err
    assert exit_status(entropy.main, [str(a) for a in (*argv, "--resuscitation_force")]) == 0
    results = [json.loads((output / f.name / "knowledge_entropy.json").read_text()) for f in (folder, other)]
    assert results[0]["knowledge_entropy"] != results[1]["knowledge_entropy"]


def test_an_edit_by_its_name_in_each_checkpoints_folder(folder: Path, tmp_path: Path, tokens: Path) -> None:
    other = write(tmp_path / "step91-unsharded", uneven_model(1))
    measure(other, tokens)
    argv = ["--data", tokens, "--data_size", 40, "--output", tmp_path / "out", "--checkpoint", folder, other]
    for each in (folder, other):
        change(each, 0.5, 2.0, "--format", "full")
    name = "resuscitation_ratio0.5_amplifying2.0.pt"
    entropy.main([str(a) for a in (*argv, "--resuscitation", name)])
    for each in (folder, other):
        result = json.loads((tmp_path / "out" / each.name / "knowledge_entropy.json").read_text())
        assert result["knowledge_entropy"] == measure_to(
            each, tokens, tmp_path / f"x{each.name}", "--resuscitation", each / name
        )
        assert result["resuscitation"] == hashlib.sha256((each / name).read_bytes()).hexdigest()
