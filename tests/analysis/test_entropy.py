"""`python -m analysis.entropy` from end to end, against transformers one instance at a time."""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from analysis import entropy, job
from olmo.checkpoint import fingerprint
from olmo.exceptions import exit_status
from olmo.model import OLMo
from tests.analysis.measuring import (
    LENGTH,
    check,
    coefficients_in,
    command,
    direct,
    failing,
    made_model,
    olmo_places,
    result_in,
    rows_of,
    run,
    write,
)
from tests.reference import tiny_config, tiny_tokenizer, to_transformers
from tests.running import modes_hold


def test_a_token_file_and_what_is_written(tmp_path: Path, tokens: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = made_model(0)
    folder = write(tmp_path / "step90-unsharded", model)
    run("--checkpoint", folder, "--data", tokens, "--data_size", 70, "--batch_size", 8)
    average = direct(to_transformers(model), olmo_places(), rows_of(tokens)[:70])
    check(folder, average)

    result = result_in(folder)
    assert set(result) >= {
        "knowledge_entropy",
        "layers",
        "standard_error",
        "entropy_avg_act_abs",
        "number_of_instances",
        "number_of_tokens",
        "coefficient",
        "precision",
        "data",
        "checkpoint",
    }
    assert result["entropy_avg_act_abs"] == result["layers"]
    assert result["number_of_instances"] == 70 and result["number_of_tokens"] == 70 * LENGTH
    assert result["coefficient"] == "abs" and result["precision"] == "fp32"
    assert result["maximum"] == pytest.approx(2 * math.log(48))
    assert 0 < result["standard_error"] < 0.1
    assert result["checkpoint"] == {
        "path": str(folder),
        "step": 90,
        "fingerprint": fingerprint(model.state_dict()),
        "tokens": None,
    }
    assert result["data"]["path"] == str(tokens)
    assert coefficients_in(folder).dtype == torch.float32
    assert not list(folder.glob("*.partial"))
    shown = capsys.readouterr().out
    assert shown.startswith(f"{folder}: H = {result['knowledge_entropy']:.4f}, standard error ") and "70" in shown


@pytest.mark.parametrize(("size", "place"), [([], "pretrained_1B"), (["--model_size", "7B"], "pretrained")])
def test_a_step_of_the_published_layout(
    tmp_path: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch, size: list[str], place: str
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write(Path(f"checkpoints/{place}/738020-unsharded"), made_model(0))
    run("--step", 738020, *size, "--data", tokens, "--data_size", 3)
    check(folder, direct(to_transformers(made_model(0)), olmo_places(), rows_of(tokens)[:3]))
    assert result_in(folder)["checkpoint"]["step"] == 738020


def test_a_glob_measures_every_step_in_order(tmp_path: Path, tokens: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (9, 10, 100):
        write(tmp_path / f"run/step{step}-unsharded", made_model(step))
    (tmp_path / "run/step11.txt").touch()
    argv = ["--checkpoint", tmp_path / "run/step*", "--data", tokens, "--data_size", 6]
    run(*argv, "--output", tmp_path / "out")
    lines = [line for line in capsys.readouterr().out.splitlines() if ": H = " in line]
    assert [Path(line.split(":")[0]).name for line in lines] == [f"step{s}-unsharded" for s in (9, 10, 100)]
    for step in (9, 10, 100):
        average = direct(to_transformers(made_model(step)), olmo_places(), rows_of(tokens)[:6])
        check(tmp_path / f"out/step{step}-unsharded", average)
    run(*argv)  # beside the checkpoints
    for step in (9, 10, 100):
        beside, apart = (result_in(tmp_path / f"{where}/step{step}-unsharded") for where in ("run", "out"))
        assert beside == apart


def test_results_of_folders_of_one_name_do_not_overwrite_each_other(tmp_path: Path, tokens: Path) -> None:
    folders = [write(tmp_path / f"{run}/step9", made_model(seed)) for seed, run in enumerate(("a", "b"))]
    argv = ["--checkpoint", *map(str, folders), "--data", str(tokens), "--data_size", "3"]
    assert exit_status(entropy.main, [*argv, "--output", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()
    assert exit_status(entropy.main, argv) == 0


def test_what_is_measured_already_is_not_measured_again(
    tmp_path: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "step90", made_model(0))
    argv = ["--checkpoint", folder, "--data", tokens, "--data_size", 6]
    run(*argv)
    measured = []
    real = job.measure
    monkeypatch.setattr(job, "measure", lambda *a, **k: measured.append(1) or real(*a, **k))
    first = result_in(folder)
    run(*argv)
    assert not measured and result_in(folder) == first
    run(*argv, "--batch_size", 2)  # as many instances a pass as the machine likes
    assert not measured

    run(*argv[:4], "--data_size", 6, "--checkpoint", folder.resolve().parent / "." / folder.name)
    write(folder, made_model(1))  # other weights under the same name; the results went with the old ones
    run(*argv)
    assert len(measured) == 1 and result_in(folder)["checkpoint"]["fingerprint"] != first["checkpoint"]["fingerprint"]


def test_a_result_of_something_else_is_only_replaced_on_request(
    tmp_path: Path, tokens: Path, shared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, other = tmp_path / "out", write(tmp_path / "other", made_model(1))
    argv = ["--checkpoint", shared, "--data", tokens, "--data_size", 6, "--output", out, "--measures"]
    run(*argv, "knowledge,next_token")
    result, coefficients = out / "knowledge_entropy.json", out / "mlp_average_coefficients.safetensors"
    before = {file: file.read_bytes() for file in (result, coefficients)}

    def refused(said: str, *changed: object, place: Path = result) -> None:
        content = {file: file.read_bytes() for file in out.iterdir()}
        capsys.readouterr()
        assert exit_status(entropy.main, [str(a) for a in (*argv, "knowledge,next_token", *changed)]) == 2
        shown = capsys.readouterr()
        assert shown.err.startswith(f"error: {place}: already exists and {said}") and not shown.out
        assert shown.err.endswith("; name another --output, or replace it: --overwrite\n")
        assert {file: file.read_bytes() for file in out.iterdir()} == content

    had = f"belongs to other instances, 6 of 16 tokens from {tokens}, not "
    refused(f"{had}5 of 16 tokens from {tokens};", "--data_size", 5)
    refused(f"{had}6 of 8 tokens from {tokens};", "--sequence_length", 8)
    refused("was measured with coefficient abs, not relu;", "--coefficient", "relu")
    refused("was measured with precision fp32, not bf16;", "--precision", "bf16")
    refused("was measured with tolerance None, not 1.0;", "--tolerance", 1.0)
    refused("has next_token entropy too, which --measures does not name;", "--measures", "knowledge,attention")
    refused(f"belongs to other weights, of {shared};", "--checkpoint", other)
    result.write_text('{"entropy_avg_act_abs": [3.5, 3.6]}')  # the published script's
    refused("is not a result of analysis.entropy;")
    result.write_bytes(before[result][:100])
    refused("is not a result of analysis.entropy;")
    result.unlink()
    run(*argv, "knowledge")  # its coefficients are those of this measurement, interrupted
    assert result_in(out)["data"] == json.loads(before[result])["data"]
    run(*argv, "knowledge,next_token")  # the same instances, and another measure
    assert result_in(out)["knowledge_entropy"] == json.loads(before[result])["knowledge_entropy"]
    result.unlink()
    save_file({"mlp_average_coefficients": coefficients_in(out)}, coefficients)
    refused("has no result beside it, so its instances are unknown;", place=coefficients)
    run(*argv, "knowledge", "--overwrite")
    assert {path.name for path in out.iterdir()} == {path.name for path in before}


def test_a_checkpoint_replaced_while_it_is_measured_gives_no_result(
    tmp_path: Path, tokens: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, weights = write(tmp_path / "step90", made_model(0)), "model.safetensors"
    other = write(tmp_path / "other", made_model(1)) / weights
    real, change = job.measure, [lambda: os.utime(folder / weights)]

    def measure(*args: Any, **named: Any) -> Any:
        change[0]()
        return real(*args, **named)

    monkeypatch.setattr(job, "measure", measure)
    argv = ["--checkpoint", folder, "--data", tokens, "--data_size", 6]
    run(*argv)  # touched, but the same weights
    (folder / "knowledge_entropy.json").unlink()
    capsys.readouterr()
    change[0] = lambda: shutil.copyfile(other, folder / weights)
    assert f"{folder}: replaced while it was measured; nothing is kept" in failing(capsys, *argv)
    assert not (folder / "knowledge_entropy.json").exists()
    change[0] = lambda: shutil.rmtree(folder)  # as a run prunes its checkpoints
    assert f"{folder}" in failing(capsys, *argv, "--overwrite")
    assert not folder.exists()


@pytest.mark.parametrize(
    ("place", "measured", "said"),
    [
        ("blocks.1.ff_proj", "knowledge", "layer 1: the knowledge average is NaN or infinite"),
        ("wte", "knowledge", "layer 0: the knowledge average is NaN or infinite"),
        ("ff_out", "knowledge,next_token", "the next_token average is NaN or infinite"),
    ],
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_no_numbers_give_no_result(
    place: str, measured: str, said: str, value: float, tmp_path: Path, tokens: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = OLMo(tiny_config(max_sequence_length=LENGTH, weight_tying=False))
    with torch.no_grad():
        model.state_dict()[f"transformer.{place}.weight"].fill_(value)
    folder = write(tmp_path / "step90", model)
    argv = ["--checkpoint", folder, "--data", tokens, "--data_size", 6, "--measures", measured, "--output"]
    assert f"entropy of step90: {said}" in failing(capsys, *argv, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_result_without_its_coefficients_is_measured_again(tmp_path: Path, tokens: Path) -> None:
    folder = write(tmp_path / "step90", made_model(0))
    argv = ["--checkpoint", folder, "--data", tokens, "--data_size", 6]
    run(*argv)
    (folder / "mlp_average_coefficients.safetensors").unlink()
    run(*argv)
    assert (folder / "mlp_average_coefficients.safetensors").is_file()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "one of the arguments --step --checkpoint is required"),
        (["--step", "5", "--checkpoint", "{shared}"], "not allowed with argument"),
        (["--step", "five"], "invalid step value"),
        (["--step", "5"], "checkpoints/pretrained_1B/5-unsharded: no such checkpoint"),
        (["--step", "5", "--model_size", "13B"], "invalid choice: '13B'"),
        (["--checkpoint", "{tmp}/nothing*"], "no folder matches"),
        (["--checkpoint", "{shared}", "--coefficient", "square"], "invalid choice: 'square'"),
        (["--checkpoint", "{shared}", "--precision", "fp8"], "invalid choice: 'fp8'"),
        (["--checkpoint", "{shared}", "--data_size", "0"], "--data_size must be at least 1"),
        (["--checkpoint", "{shared}", "--batch_size", "-1"], "--batch_size must be at least 1"),
        (["--checkpoint", "{shared}", "--sequence_length", "0"], "--sequence_length must be at least 1"),
        (["--checkpoint", "{shared}", "--tolerance", "-1"], "--tolerance -1 must be above 0"),
        (["--checkpoint", "{shared}", "--tolerance", "0"], "--tolerance 0 must be above 0"),
        (["--checkpoint", "{shared}", "--tolerance", "nan"], "--tolerance nan must be above 0"),
        (["--checkpoint", "{shared}", "--device", "nonsense"], "no such device: nonsense"),
        (["--checkpoint", "{shared}", "--unheard_of"], "unrecognized arguments: --unheard_of"),
        (["--checkpoint", "{shared}"], "no such data order, whose first instances are the default of --data"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_status_2(
    argv: list[str],
    said: str,
    shared: Path,
    tokens: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    data = [] if "default of --data" in said else ["--data", str(tokens)]
    assert exit_status(entropy.main, [*data, *(a.format(shared=shared, tmp=tmp_path) for a in argv)]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ") and shown.err.count("\n") == 1 and said in shown.err and not shown.out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--data", "nowhere.npy"], "nowhere.npy: no such token file"),
        (["--data", "nowhere.txt"], "nowhere.txt: no such data"),
        (["--data", "{tokens}", "--data_size", "101"], "100 instances, --data_size asks for 101"),
        (["--data", "bad.json", "--tokenizer", "tokenizer.json"], "bad.json: expected objects with 'text'"),
        (
            ["--data", "tokens.bin"],
            "tokens.bin: not UTF-8 text; --data is a token file named .npy, a datasets folder",
        ),
        (
            ["--data", "short.txt", "--tokenizer", "tokenizer.json", "--pack", "none"],
            "short.txt: 1 text, --data_size asks for 2048; texts are",
        ),
        (["--data", "large.npy", "--data_size", "2"], "token 60000 in the data, the model's vocabulary has 128"),
    ],
)
def test_a_failure_is_one_line_and_status_1(
    argv: list[str],
    said: str,
    shared: Path,
    tokens: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.json").write_text('[{"title": "x"}]')
    Path("short.txt").write_text("one text")
    tiny_tokenizer("tokenizer.json")
    np.full(2 * LENGTH, 60000, "<u2").tofile("large.npy")
    np.full(2 * LENGTH, 60000, "<u2").tofile("tokens.bin")
    full = ["--checkpoint", str(shared), "--output", "out", *(a.format(tokens=tokens) for a in argv)]
    assert exit_status(entropy.main, full) == 1
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ") and shown.err.count("\n") == 1 and said in shown.err and not shown.out
    assert not Path("out").exists()


def test_a_place_that_cannot_be_written_is_reported_before_the_measurement(
    tmp_path: Path, tokens: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "step90", made_model(0))
    argv = ["--checkpoint", folder, "--data", tokens, "--data_size", 3]
    (tmp_path / "file").touch()
    folder.chmod(0o555)
    real = job.measure
    monkeypatch.setattr(job, "measure", lambda *a, **k: pytest.fail("it was measured"))
    with modes_hold():
        said = failing(capsys, *argv)
        assert f"{folder}: cannot be written: permission denied; name another place with --output" in said
        assert "new/deeper: cannot be written: permission denied" in failing(
            capsys, *argv, "--output", folder / "new/deeper"
        )
    assert "file/out: cannot be written" in failing(capsys, *argv, "--output", tmp_path / "file/out")
    monkeypatch.setattr(job, "measure", real)
    with modes_hold():
        run(*argv, "--output", tmp_path / "elsewhere")
    folder.chmod(0o755)
    run(*argv)
    folder.chmod(0o555)
    monkeypatch.setattr(job, "measure", lambda *a, **k: pytest.fail("it was measured"))
    with modes_hold():
        run(*argv)  # what is there already is only read


def test_results_have_the_modes_that_the_umask_gives(tmp_path: Path, shared: Path, tokens: Path) -> None:
    before = os.umask(0o022)
    try:
        run("--checkpoint", shared, "--data", tokens, "--data_size", 3, "--output", tmp_path / "out")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o644}


def test_the_examples_of_the_help_are_complete(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        entropy.main(["--help"])
    shown = [line.strip() for line in capsys.readouterr().out.replace("\\\n", "").splitlines()]
    prefix = "python -m analysis.entropy "
    examples = [line.removeprefix(prefix) for line in shown if line.startswith(prefix)]
    assert len(examples) >= 2
    for example in examples:
        args = entropy._parse(shlex.split(example))
        assert (
            args.data or args.step in ([738020], ["all"]) or args.checkpoint[0].startswith("allenai/OLMo-1B@")
        )  # whose data has a default


def test_the_command_itself_ends_with_status_and_one_line(tmp_path: Path, shared: Path) -> None:
    done = command("analysis.entropy", "--checkpoint", shared, "--data", tmp_path / "nowhere.npy", new=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.splitlines() == [f"error: {tmp_path / 'nowhere.npy'}: no such token file"]
