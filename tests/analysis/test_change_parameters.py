"""`python -m analysis.change_parameters` against the published algorithm, and what it does to a model."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from analysis import change_parameters, entropy, verification
from olmo import checkpoint
from olmo.config import TrainConfig, save_model_config
from olmo.exceptions import ConfigurationError, exit_status
from olmo.files.tensors import read_tensors, write_tensors
from olmo.memory.rescaling import load_multipliers
from olmo.model import OLMo
from olmo.train.optim import build_optimizer
from scripts.benchmarks import resuscitation as bench_resuscitation
from scripts.benchmarks.processes import run_in_subprocess
from tests.architectures import built
from tests.reference import tiny_config, to_transformers
from tests.running import modes_hold

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
LENGTH, MEMORIES = 16, 48


def uneven_model(seed: int = 0) -> OLMo:
    """A model some of whose memories are far more active than others, as in a trained one."""
    torch.manual_seed(seed)
    model = OLMo(tiny_config(max_sequence_length=LENGTH)).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.ff_proj.weight[:MEMORIES] *= torch.logspace(-1, 1, MEMORIES)[torch.randperm(MEMORIES), None]
    return model


def write(folder: Path, model: OLMo) -> Path:
    config = TrainConfig(model=model.config)
    config.optimizer.name = "adamw"
    checkpoint.save(folder, model, config, build_optimizer(config.optimizer, model), {})
    return folder


def measure(folder: Path, tokens: Path, *more: object) -> float:
    argv = ["--checkpoint", folder, "--data", tokens, "--data_size", 40, *more]
    entropy.main([str(a) for a in argv])
    return json.loads((folder / "knowledge_entropy.json").read_text())["knowledge_entropy"]


def change(folder: Path, p: float, q: float, *more: object) -> None:
    argv = ["--checkpoint", folder, "--resuscitation_ratio", p, "--amplifying_factor", q, *more]
    change_parameters.main([str(a) for a in argv])


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


def coefficients(folder: Path) -> Tensor:
    return load_file(folder / "mlp_average_coefficients.safetensors")["mlp_average_coefficients"]


def published(state: dict[str, Tensor], average: Tensor, p: float, q: float) -> dict[str, Tensor]:
    """The published script, line by line: quantile, mask, multiply the masked rows of the first half of ff_proj."""
    edited = {name: tensor.clone() for name, tensor in state.items()}
    for layer in range(average.shape[0]):
        weight = edited[f"transformer.blocks.{layer}.ff_proj.weight"]
        up_projection = weight[: weight.shape[0] // 2]
        threshold = torch.quantile(average[layer], p)
        mask = average[layer] <= threshold
        multiplier = average[layer].mean() / average[layer] * q
        up_projection[mask] = up_projection[mask] * multiplier[mask].unsqueeze(1)
    return edited


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


# --- what is written ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("p", "q"), [(0.5, 2.0), (0.5, 1.0), (0.25, 0.5), (1.0, 3.0)])
def test_the_full_state_dict_is_the_published_one_bit_for_bit(folder: Path, p: float, q: float) -> None:
    change(folder, p, q, "--format", "full")
    found = torch.load(folder / f"resuscitation_ratio{p}_amplifying{q}.pt", weights_only=True)
    wanted = published(dict(uneven_model().state_dict()), coefficients(folder), p, q)
    same(found, wanted)
    changed = {name for name in found if not torch.equal(found[name], uneven_model().state_dict()[name])}
    assert changed == {f"transformer.blocks.{layer}.ff_proj.weight" for layer in (0, 1)}


def test_the_default_is_a_small_file_of_the_published_name(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name for path in folder.iterdir()}
    argv = ["--checkpoint", str(folder), "--resuscitation_ratio", "0.5", "--amplifying_factor", "2"]
    change_parameters.main(argv)
    name = "resuscitation_ratio0.5_amplifying2.0.safetensors"
    assert {path.name for path in folder.iterdir()} == before | {name}
    made = load_multipliers(folder / name)
    assert made.values.shape == (2, MEMORIES) and made.values.dtype == torch.float32
    assert made.about["resuscitation_ratio"] == 0.5 and made.about["amplifying_factor"] == 2.0
    assert made.about["select"] == "lowest"
    assert (folder / name).stat().st_size < 2000
    assert capsys.readouterr().out == f"{folder / name}: 48 of 96 up-projection rows multiplied\n"


@pytest.mark.parametrize("select", ["lowest", "random", "highest"])
def test_both_formats_make_the_same_model(folder: Path, select: str) -> None:
    change(folder, 0.5, 2.0, "--select", select, "--seed", 3)
    change(folder, 0.5, 2.0, "--select", select, "--seed", 3, "--format", "full")
    stem = "resuscitation_ratio0.5_amplifying2.0"
    stem += {"lowest": "", "random": "_random_seed3", "highest": "_highest"}[select]
    models = []
    for suffix in (".safetensors", ".pt"):
        assert (folder / (stem + suffix)).is_file()
        config = tiny_config(max_sequence_length=LENGTH, resuscitation=stem + suffix)
        models.append(checkpoint.load_model(folder, CPU, config=config).state_dict())
    same(*models)


def test_the_controls_multiply_as_many_rows(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for select in ("lowest", "random", "highest"):
        change(folder, 0.3, 1.0, "--select", select)
    lines = capsys.readouterr().out.splitlines()
    assert len({line.split(": ")[1] for line in lines}) == 1
    change(folder, 0.3, 1.0, "--select", "random", "--seed", 1, "--output", folder / "other.safetensors")
    first = load_multipliers(folder / "resuscitation_ratio0.3_amplifying1.0_random.safetensors").values
    assert not torch.equal(first, load_multipliers(folder / "other.safetensors").values)


def test_an_output_elsewhere_and_a_step_of_the_published_layout(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    place = Path("checkpoints/pretrained_1B/738020-unsharded")
    place.parent.mkdir(parents=True)
    folder.rename(place)
    argv = ["--step", "738020", "--resuscitation_ratio", "0.5", "--amplifying_factor", "2"]
    change_parameters.main(argv)
    assert (place / "resuscitation_ratio0.5_amplifying2.0.safetensors").is_file()
    change_parameters.main([*argv, "--output", "new/folder/edit.safetensors"])
    first = load_multipliers(place / "resuscitation_ratio0.5_amplifying2.0.safetensors")
    assert torch.equal(first.values, load_multipliers(Path("new/folder/edit.safetensors")).values)


def test_the_published_coefficients_are_read(folder: Path) -> None:
    """`mlp_average_coefficients.pt` says nothing about its checkpoint; it is trusted, where ours are not there."""
    average = coefficients(folder).sqrt()
    torch.save(average, folder / "mlp_average_coefficients.pt")
    change(folder, 0.5, 2.0)
    [made] = folder.glob("resuscitation*")
    assert load_multipliers(made).about["coefficients"].endswith(".safetensors")
    (folder / "mlp_average_coefficients.safetensors").unlink()
    torch.save(average, folder / "mlp_average_coefficients.pt")
    change(folder, 0.5, 2.0, "--format", "full")
    found = torch.load(folder / "resuscitation_ratio0.5_amplifying2.0.pt", weights_only=True)
    same(found, published(dict(uneven_model().state_dict()), average, 0.5, 2.0))


def test_coefficients_may_lie_elsewhere(folder: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere.safetensors"
    (folder / "mlp_average_coefficients.safetensors").rename(moved)
    change(folder, 0.5, 2.0, "--coefficients", moved)
    assert (folder / "resuscitation_ratio0.5_amplifying2.0.safetensors").is_file()


def test_a_dead_memory_keeps_its_row_and_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    average = coefficients(folder)
    average[1, 7] = 0.0
    torch.save(average, folder / "mlp_average_coefficients.pt")
    change(folder, 0.5, 2.0, "--coefficients", folder / "mlp_average_coefficients.pt", "--format", "full")
    shown = capsys.readouterr()
    assert "47 of 96" in shown.out or "48 of 96" in shown.out
    assert "1 dead memories (coefficient 0) keep their rows" in shown.out + shown.err
    found = torch.load(folder / "resuscitation_ratio0.5_amplifying2.0.pt", weights_only=True)
    name = "transformer.blocks.1.ff_proj.weight"
    assert torch.equal(found[name][7], uneven_model().state_dict()[name][7])
    assert all(torch.isfinite(tensor).all() for tensor in found.values())


def test_transformers_layout_of_the_same_weights(folder: Path, tmp_path: Path) -> None:
    to_transformers(uneven_model()).save_pretrained(tmp_path / "hf")
    given = folder / "mlp_average_coefficients.safetensors"
    change(tmp_path / "hf", 0.5, 2.0, "--coefficients", given)
    change(folder, 0.5, 2.0)
    name = "resuscitation_ratio0.5_amplifying2.0.safetensors"
    assert torch.equal(load_multipliers(tmp_path / "hf" / name).values, load_multipliers(folder / name).values)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").is_file(), reason="only Linux forgets a peak of memory")
def test_a_full_state_dict_takes_little_memory(tmp_path: Path) -> None:
    """At most 0.35 of the weights, which loading, editing and saving them takes at least."""
    config = tiny_config(n_layers=16, d_model=128, mlp_hidden_size=16384)
    save_model_config(tmp_path / "config.yaml", config)
    state = OLMo.empty(config).to_empty(device="cpu").state_dict()
    for tensor in state.values():
        tensor.fill_(0.5)
    torch.save(state, tmp_path / "model.pt")
    size = (tmp_path / "model.pt").stat().st_size
    torch.save(torch.rand(16, 8192) + 0.01, tmp_path / "mlp_average_coefficients.pt")
    _, peak = run_in_subprocess(bench_resuscitation._ours, tmp_path, "full")
    assert size > 200e6 and peak < 0.35 * size


# --- what it does ------------------------------------------------------------------------------------------------


def test_entropy_rises_when_the_least_active_memories_are_raised_to_the_mean(
    folder: Path, tmp_path: Path, tokens: Path
) -> None:
    before = json.loads((folder / "knowledge_entropy.json").read_text())["knowledge_entropy"]
    after = {}
    for select in ("lowest", "highest"):
        change(folder, 0.5, 1.0, "--select", select)
        name = "resuscitation_ratio0.5_amplifying1.0" + ("" if select == "lowest" else "_highest") + ".safetensors"
        config = tiny_config(max_sequence_length=LENGTH, resuscitation=name)
        edited = checkpoint.load_model(folder, CPU, config=config)
        edited.config.resuscitation = None
        after[select] = measure(write(tmp_path / select, edited), tokens)
    assert after["lowest"] > before + 0.1
    # Raising to the mean what is below it, or lowering to it what is above, both even the layer out.
    assert after["highest"] > before + 0.1
    assert after["lowest"] != after["highest"]


def test_in_the_first_layer_edited_rows_come_to_the_mean_times_the_factor(
    folder: Path, tmp_path: Path, tokens: Path
) -> None:
    """Later layers see changed inputs; the first one does not."""
    average = coefficients(folder)
    change(folder, 0.5, 2.0)
    name = "resuscitation_ratio0.5_amplifying2.0.safetensors"
    edited = checkpoint.load_model(folder, CPU, config=tiny_config(max_sequence_length=LENGTH, resuscitation=name))
    edited.config.resuscitation = None
    measure(write(tmp_path / "edited", edited), tokens)
    again = coefficients(tmp_path / "edited")
    chosen = load_multipliers(folder / name).values[0] != 1
    assert chosen.sum() == MEMORIES // 2
    torch.testing.assert_close(again[0][chosen], (2 * average[0].mean()).expand(MEMORIES // 2), rtol=1e-5, atol=0)
    torch.testing.assert_close(again[0][~chosen], average[0][~chosen], rtol=1e-6, atol=0)


# --- errors ------------------------------------------------------------------------------------------------------


def failing(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str]:
    status = exit_status(change_parameters.main, [str(a) for a in argv])
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ") and shown.err.count("\n") == 1 and not shown.out
    return status, shown.err


def test_coefficients_of_another_checkpoint_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write(tmp_path / "other", uneven_model(1))
    argv = ["--resuscitation_ratio", 0.5, "--amplifying_factor", 2]
    given = folder / "mlp_average_coefficients.safetensors"
    status, said = failing(capsys, "--checkpoint", other, *argv, "--coefficients", given)
    assert status == 1 and f"{given}: measured on another checkpoint than {other}" in said
    assert not list(other.glob("resuscitation*"))


@pytest.mark.parametrize(
    ("argv", "status", "said"),
    [
        (["--amplifying_factor", "2"], 2, "required: --resuscitation_ratio"),
        (["--resuscitation_ratio", "0.5"], 2, "required: --amplifying_factor"),
        (["--resuscitation_ratio", "0", "--amplifying_factor", "2"], 2, "ratio 0.0 is not in (0, 1]"),
        (["--resuscitation_ratio", "1.5", "--amplifying_factor", "2"], 2, "ratio 1.5 is not in (0, 1]"),
        (["--resuscitation_ratio", "half", "--amplifying_factor", "2"], 2, "invalid float value: 'half'"),
        (["--resuscitation_ratio", "0.5", "--amplifying_factor", "0"], 2, "factor 0.0 is not a positive number"),
        (["--resuscitation_ratio", "0.5", "--amplifying_factor", "nan"], 2, "factor nan is not a positive number"),
        (["--resuscitation_ratio", "0.5", "--amplifying_factor", "2", "--select", "best"], 2, "invalid choice: 'best'"),
        (["--resuscitation_ratio", "0.5", "--amplifying_factor", "2", "--format", "csv"], 2, "invalid choice: 'csv'"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_status_2(
    folder: Path, argv: list[str], status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found, shown = failing(capsys, "--checkpoint", folder, *argv)
    assert found == status and said in shown


@pytest.mark.parametrize("form", ["multipliers", "full"])
def test_a_place_that_cannot_be_written_is_one_line_that_names_it(
    folder: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--checkpoint", folder, "--resuscitation_ratio", 0.5, "--amplifying_factor", 2, "--format", form]
    folder.chmod(0o555)
    with modes_hold():
        status, said = failing(capsys, *argv)
    assert status == 1
    assert f"{folder}: cannot be written: permission denied; name another place with --output" in said


@pytest.mark.parametrize(("form", "suffix"), [("multipliers", ".safetensors"), ("full", ".pt")])
def test_a_full_disk_is_one_line_that_names_the_file(
    folder: Path, form: str, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--checkpoint", folder, "--resuscitation_ratio", 0.5, "--amplifying_factor", 2, "--format", form]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # files end here, as they do where a disk is full
    try:
        status, said = failing(capsys, *argv)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 1
    assert f"resuscitation_ratio0.5_amplifying2.0{suffix}" in said and "cannot be written" in said
    assert not [path for path in folder.iterdir() if "resuscitation" in path.name]


@pytest.mark.parametrize("form", ["multipliers", "full"])
def test_what_is_written_has_the_mode_that_the_umask_gives(folder: Path, form: str) -> None:
    before = os.umask(0o022)
    try:
        change(folder, 0.5, 2.0, "--format", form)
    finally:
        os.umask(before)
    [path] = folder.glob("resuscitation*")
    assert path.stat().st_mode & 0o777 == 0o644


def test_coefficients_that_may_not_be_read(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "mlp_average_coefficients.safetensors"
    path.chmod(0)
    argv = ["--checkpoint", folder, "--resuscitation_ratio", 0.5, "--amplifying_factor", 2]
    with modes_hold():
        assert failing(capsys, *argv) == (1, f"error: {path}: permission denied\n")


def test_an_unmeasured_checkpoint_says_what_to_do(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "mlp_average_coefficients.safetensors").unlink()
    argv = ["--checkpoint", folder, "--resuscitation_ratio", 0.5, "--amplifying_factor", 2]
    status, said = failing(capsys, *argv)
    assert status == 1 and "run python -m analysis.entropy on it first" in said


@pytest.mark.parametrize("kind", ["shape", "layers", "dict", "vector", "damaged"])
def test_coefficients_that_do_not_fit_are_named(folder: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "given.pt"
    average = coefficients(folder)
    content: Any = {
        "shape": average[:, :24].clone(),
        "layers": average[:1].clone(),
        "dict": {"a": average},
        "vector": average[0].clone(),
        "damaged": average,
    }[kind]
    torch.save(content, path)
    if kind == "damaged":
        path.write_bytes(path.read_bytes()[:100])
    argv = ["--checkpoint", folder, "--resuscitation_ratio", 0.5, "--amplifying_factor", 2, "--coefficients", path]
    status, said = failing(capsys, *argv)
    assert status == 1
    assert ("given.pt" in said) if kind in ("dict", "vector", "damaged") else ("multipliers for" in said)
    assert not list(folder.glob("resuscitation*"))


class Bomb:
    def __init__(self, touched: Path):
        self.touched = touched

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.touched}'",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("plain", [True, False])
def test_hostile_coefficients_are_refused_and_run_nothing(
    folder: Path, tmp_path: Path, plain: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    path, touched = folder / "given.pt", tmp_path / "touched"
    if plain:
        path.write_bytes(pickle.dumps(Bomb(touched)))
    else:
        torch.save([coefficients(folder), Bomb(touched)], path)
    argv = ["--checkpoint", folder, "--resuscitation_ratio", 0.5, "--amplifying_factor", 2, "--coefficients", path]
    status, said = failing(capsys, *argv)
    assert status == 1 and "given.pt: cannot be read safely" in said
    assert not touched.exists()


def test_a_safetensors_file_of_something_else_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"else": torch.ones(2, 48)}, folder / "given.safetensors")
    argv = ["--checkpoint", folder, "--resuscitation_ratio", 0.5, "--amplifying_factor", 2]
    status, said = failing(capsys, *argv, "--coefficients", folder / "given.safetensors")
    assert status == 1 and "given.safetensors: no file of average coefficients" in said


# --- beyond the published script ---------------------------------------------------------------------------------


def test_each_setting_has_a_file_of_its_own(folder: Path) -> None:
    before = set(folder.iterdir())
    for more in ("--select random", "--select random --seed 3", "--threshold global", "--layers 0,1", "--cap 1.5"):
        change(folder, 0.5, 2.0, *more.split())
    names = {path.name.removeprefix("resuscitation_ratio0.5_amplifying2.0") for path in set(folder.iterdir()) - before}
    ends = ("_random", "_random_seed3", "_global", "_layers0-1", "_cap1.5")
    assert names == {f"{end}.safetensors" for end in ends}


def test_the_file_says_how_it_was_made(folder: Path) -> None:
    change(folder, 0.5, 2.0, "--layers", "1", "--cap", 3, "--threshold", "global")
    made = load_multipliers(next(folder.glob("resuscitation*")))
    sha = hashlib.sha256(coefficients(folder).numpy().tobytes()).hexdigest()
    assert made.about == {
        "resuscitation_ratio": 0.5,
        "amplifying_factor": 2.0,
        "select": "lowest",
        "seed": 0,
        "threshold": "global",
        "layers": [1],
        "cap": 3.0,
        "checkpoint_fingerprint": checkpoint.fingerprint(uneven_model().state_dict()),
        "coefficients": str(folder / "mlp_average_coefficients.safetensors"),
        "coefficients_sha256": sha,
    }
    assert torch.equal(made.selected[1], coefficients(folder)[1] <= coefficients(folder)[1].quantile(0.5))
    assert not made.selected[0].any() and made.values.max() == 3.0


def test_temperatures_divide_the_same_coefficients(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--format temperature` of q gives the entropy that rows multiplied by u give: a coefficient divided by 1 / u."""
    change(folder, 0.5, 2.0, "--format", "temperature")
    assert capsys.readouterr().out.endswith("safetensors: 48 of 96 memories get a temperature\n")
    change(folder, 0.5, 2.0)
    name = "resuscitation_ratio0.5_amplifying2.0.safetensors"
    divisors = load_file(folder / f"temperature_MLP_{name}")["temperature_MLP"]
    torch.testing.assert_close(1 / divisors, load_multipliers(folder / name).values)
    ids = torch.arange(2, 2 + LENGTH)[None]
    models = [
        checkpoint.load_model(folder, CPU, config=tiny_config(max_sequence_length=LENGTH, **edit))
        for edit in ({"temperature_MLP": f"temperature_MLP_{name}"}, {"resuscitation": name})
    ]
    with torch.no_grad():
        torch.testing.assert_close(models[0](ids), models[1](ids), rtol=1e-4, atol=1e-5)


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


def test_the_command_measures_an_edited_model(folder: Path, tmp_path: Path, tokens: Path) -> None:
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
        ValueError, match=r"made for another checkpoint than .*; resuscitation_force applies it all the same"
    ):
        measure(other, tokens, *argv)
    forced = measure_to(other, tokens, tmp_path / "result", *argv[:2], "--resuscitation_force")
    assert forced != measure_to(other, tokens, tmp_path / "plain")
    config = tiny_config(max_sequence_length=LENGTH, resuscitation=str(folder / name))
    with pytest.raises(ValueError, match="; resuscitation_force applies it all the same"):
        checkpoint.load_model(other, CPU, config=config)
    config.resuscitation_force = True
    checkpoint.load_model(other, CPU, config=config)


def measure_to(folder: Path, tokens: Path, output: Path, *more: object) -> float:
    argv = ["--checkpoint", folder, "--data", tokens, "--data_size", 40, "--output", output, *more]
    entropy.main([str(a) for a in argv])
    return json.loads((output / "knowledge_entropy.json").read_text())["knowledge_entropy"]


@pytest.mark.parametrize("name", ["Llama", "Phi-3", "GPT-2", "Pythia"])
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
    assert error < 2e-6 if name in ("Llama", "Phi-3") else error > 1e-3  # gelu(u x) is no u gelu(x)
    edits = [folder / f"resuscitation_ratio0.5_amplifying2.0{suffix}" for suffix in (".safetensors", ".pt")]
    found = [measure_to(folder, tokens, tmp_path / edit.suffix, "--resuscitation", edit, *size) for edit in edits]
    before = json.loads((folder / "knowledge_entropy.json").read_text())["knowledge_entropy"]
    assert found[0] == found[1] != before


def test_another_model_of_another_family_is_told_apart(
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
    with pytest.raises(ValueError, match=f"{edit}: made for another checkpoint than {other}"):
        measure_to(other, tokens, tmp_path / "out", *size, "--resuscitation", edit)
    assert not (tmp_path / "out").exists()
    forced = measure_to(other, tokens, tmp_path / "out", *size, "--resuscitation", edit, "--resuscitation_force")
    assert forced == measure_to(
        one, tokens, tmp_path / "out", *size, "--resuscitation", edit
    )  # the last norm is of no use


def test_a_mixture_of_experts_is_refused(tmp_path: Path, tokens: Path) -> None:
    folder = tmp_path / "model"
    built("OLMoE").save_pretrained(folder)
    measure(folder, tokens, "--sequence_length", LENGTH)
    with pytest.raises(ValueError, match="the memories of a mixture of experts cannot be rescaled"):
        change(folder, 0.5, 2.0)
    assert not list(folder.glob("resuscitation*"))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--layers", "0,two"], "expected layers such as 0,3,8-11"),
        (["--layers", "3-1"], "expected layers such as 0,3,8-11"),
        (["--layers", "2"], "layers 2: the model has 0 to 1"),
        (["--cap", "0"], "cap 0.0 is not a positive number"),
        (["--verify", "--format", "temperature"], "--verify: goes with an edit of weights"),
        (["--verify", "--batch_size", "0"], "--batch_size must be at least 1"),
    ],
)
def test_options_that_make_no_sense(
    folder: Path, more: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--checkpoint", folder, "--resuscitation_ratio", 0.5, "--amplifying_factor", 2, *more]
    status, shown = failing(capsys, *argv)
    assert status == 2 and said in shown


def test_flags_without_effect(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--checkpoint", folder, "--resuscitation_ratio", 0.5, "--amplifying_factor", 2]
    for flag, value in (("--batch_size", 2), ("--device", "cpu")):
        assert failing(capsys, *argv, flag, value) == (2, f"error: {flag}: goes with --verify\n")
    assert not list(folder.glob("resuscitation*"))
    change(folder, 0.5, 2.0, "--select", "random", "--seed", 0)
    assert not capsys.readouterr().err
    change(folder, 0.5, 2.0, "--select", "highest", "--seed", 0)
    assert capsys.readouterr().err == "warning: --seed has no effect with --select highest\n"


def test_several_layers_in_any_order_are_one_edit(folder: Path) -> None:
    change(folder, 0.5, 2.0, "--layers", "1,0-1,0")
    [path] = folder.glob("resuscitation*")
    assert path.name == "resuscitation_ratio0.5_amplifying2.0_layers0-1.safetensors"
    assert load_multipliers(path).about["layers"] == [0, 1]


def test_one_checkpoint_at_a_time(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(folder, tmp_path / "step91-unsharded")
    argv = ["--resuscitation_ratio", 0.5, "--amplifying_factor", 2]
    pattern = tmp_path / "step9*"
    assert failing(capsys, "--checkpoint", pattern, *argv) == (
        2,
        f"error: --checkpoint {pattern}: 2 folders match; name one\n",
    )
    change(tmp_path / "*0-unsharded", 0.5, 2.0)
    assert len(list(tmp_path.rglob("resuscitation*"))) == 1


@pytest.mark.parametrize("more", [[], ["--output", "x.safetensors"], ["--coefficients", "c.safetensors"]])
def test_nothing_is_written_into_the_hubs_cache(more: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--checkpoint", "owner/name", "--resuscitation_ratio", 0.5, "--amplifying_factor", 2, *more]
    said = "error: --output and --coefficients: needed with a hub id, whose folder is the download cache\n"
    assert failing(capsys, *argv) == (2, said)


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt", "mlp_average_coefficients.safetensors"])
def test_an_edit_never_replaces_what_it_is_made_from(
    folder: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    form = "full" if name.endswith(".pt") else "multipliers"
    before = {path: path.read_bytes() for path in folder.iterdir()}
    argv = ["--checkpoint", folder, "--resuscitation_ratio", 0.5, "--amplifying_factor", 2, "--format", form]
    output = folder / ".." / folder.name / name
    said = f"error: --output {output}: names what the edit is made from; choose another name\n"
    assert failing(capsys, *argv, "--output", output) == (2, said)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_an_output_that_is_a_folder(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "new.safetensors").mkdir()
    argv = ["--checkpoint", folder, "--resuscitation_ratio", 0.5, "--amplifying_factor", 2]
    said = f"error: --output {tmp_path / 'new.safetensors'}: is a folder; name a file\n"
    assert failing(capsys, *argv, "--output", tmp_path / "new.safetensors") == (2, said)
    assert not list(tmp_path.glob(".*"))


def test_temperatures_are_for_models_that_the_trainer_knows(
    tmp_path: Path, tokens: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    built("Llama").save_pretrained(tmp_path / "llama")
    measure(tmp_path / "llama", tokens, "--sequence_length", LENGTH)
    capsys.readouterr()
    argv = ["--checkpoint", tmp_path / "llama", "--resuscitation_ratio", 0.5, "--amplifying_factor", 2]
    assert exit_status(change_parameters.main, [str(a) for a in (*argv, "--format", "temperature")]) == 2
    assert "error: --format temperature: is for the trainer, which knows OLMo models" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*temperature*"))


def test_a_full_state_dict_of_half_precision_is_the_published_one(folder: Path) -> None:
    weights = {name: tensor.bfloat16() for name, tensor in read_tensors(folder / "model.safetensors").items()}
    write_tensors(folder / "model.safetensors", weights)
    torch.save(coefficients(folder), folder / "mlp_average_coefficients.pt")
    (folder / "mlp_average_coefficients.safetensors").unlink()
    change(folder, 0.5, 2.0, "--format", "full")
    average = torch.load(folder / "mlp_average_coefficients.pt")
    wanted = dict(weights)
    for layer, row in enumerate(
        average
    ):  # `up[mask] *= u[mask]` of the published script: a product in float32, rounded
        weight = wanted[f"transformer.blocks.{layer}.ff_proj.weight"] = weights[
            f"transformer.blocks.{layer}.ff_proj.weight"
        ].clone()
        mask, u = row <= torch.quantile(row, 0.5), row.mean() / row * 2
        weight[:MEMORIES][mask] = (weight[:MEMORIES][mask].float() * u[mask, None]).bfloat16()
    same(torch.load(folder / "resuscitation_ratio0.5_amplifying2.0.pt", weights_only=True), wanted)


def test_the_full_state_dict_of_a_transformers_folder_has_olmos_names(folder: Path, tmp_path: Path) -> None:
    to_transformers(uneven_model()).save_pretrained(tmp_path / "hf")
    change(
        tmp_path / "hf", 0.5, 2.0, "--format", "full", "--coefficients", folder / "mlp_average_coefficients.safetensors"
    )
    change(folder, 0.5, 2.0, "--format", "full")
    name = "resuscitation_ratio0.5_amplifying2.0.pt"
    same(torch.load(tmp_path / "hf" / name, weights_only=True), torch.load(folder / name, weights_only=True))


@pytest.mark.parametrize("form", ["multipliers", "full", "temperature"])
def test_another_checkpoints_coefficients_leave_nothing(folder: Path, tmp_path: Path, form: str) -> None:
    other = write(tmp_path / "other", uneven_model(1))
    before = set(other.iterdir())
    with pytest.raises(ValueError, match=f"measured on another checkpoint than {other}"):
        given = folder / "mlp_average_coefficients.safetensors"
        change(other, 0.5, 2.0, "--coefficients", given, "--format", form)
    assert set(other.iterdir()) == before


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
        ([folder, "--resuscitation_force"], "--resuscitation_force: goes with --resuscitation"),
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
    assert f"error: --resuscitation: none.pt is no file, here or in {folder}\n" in capsys.readouterr().err
    # Of several, an edit is of one, and the others are named; forced, it is of all.
    argv = ["--data", tokens, "--data_size", 40, "--output", output, "--resuscitation", edit]
    argv += ["--checkpoint", folder, other]
    assert exit_status(entropy.main, [str(a) for a in argv]) == 1
    assert f"{edit}: made for another checkpoint than {other}" in capsys.readouterr().err
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
        assert result["knowledge_entropy"] == measure_to(each, tokens, tmp_path / "x", "--resuscitation", each / name)
        assert result["resuscitation"] == hashlib.sha256((each / name).read_bytes()).hexdigest()


def test_the_command_itself_ends_with_status_and_one_line(folder: Path) -> None:
    command = [sys.executable, "-m", "analysis.change_parameters", "--checkpoint", str(folder)]
    command += ["--resuscitation_ratio", "2", "--amplifying_factor", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines() == ["error: resuscitation ratio 2.0 is not in (0, 1]"]


def test_a_file_of_the_wrong_kind_is_refused_before_it_is_written(tmp_path, capsys):
    folder = tmp_path / "model"
    folder.mkdir()
    for form, name in (("full", "x.safetensors"), ("multipliers", "x.pt")):
        argv = ["--checkpoint", str(folder), "--resuscitation_ratio", "0.5", "--amplifying_factor", "1"]
        assert exit_status(change_parameters.main, [*argv, "--format", form, "--output", str(tmp_path / name)]) == 2
        assert f"--format {form} is written as" in capsys.readouterr().err
        assert not (tmp_path / name).exists()
