"""`--verify` of analysis.change_parameters: on the very instances of the measurement before, and held to the law."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from analysis import verification
from analysis.edit import edit_weights
from olmo import checkpoint
from olmo.files.tensors import read_tensors, write_olmo_safetensors
from tests.analysis.editing import LENGTH, change, coefficients, measure, uneven_model, write
from tests.architectures import built
from tests.reference import by_layer, tiny_tokenizer
from tests.running import write_world

RESULT = "knowledge_entropy.json"


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "tokens.npy"
    np.random.default_rng(0).integers(2, 128, 40 * LENGTH).astype("<u2").tofile(path)
    return path


@pytest.fixture
def unmeasured(tmp_path: Path) -> Path:
    return write(tmp_path / "step90-unsharded", uneven_model())


def verified(folder: Path, capsys: pytest.CaptureFixture[str], *more: object) -> tuple[int, float, float]:
    """Instances, H before the edit, and how far from the law it is, as `--verify` prints them."""
    capsys.readouterr()
    change(folder, 0.5, 1.0, "--verify", *more)
    _, entropy, law = capsys.readouterr().out.splitlines()
    found = re.fullmatch(r"verified on (\d+) instances: H (\S+) -> \S+, difference \S+ \+- .*", entropy)
    assert found is not None
    return int(found[1]), float(found[2]), float(law.rpartition(" ")[2])


@pytest.mark.parametrize(
    ("more", "error"),
    [
        ((), 2e-6),
        (("--coefficient", "relu"), 2e-6),
        (("--precision", "bf16"), 2e-2),
        (("--measures", "knowledge,attention,next_token"), 2e-6),
    ],
)
def test_however_it_was_measured(
    unmeasured: Path, tokens: Path, more: tuple[str, ...], error: float, capsys: pytest.CaptureFixture[str]
) -> None:
    before = measure(unmeasured, tokens, *more)
    count, entropy, off = verified(unmeasured, capsys)
    assert count == 40 and abs(entropy - before) < 1e-4 and off < error
    assert verified(unmeasured, capsys, "--batch_size", 3, "--device", "cpu")[2] < error


def test_a_measurement_that_a_tolerance_ended(
    unmeasured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It names all the instances that were asked for, of which it saw the first ones."""
    data = tmp_path / "long.npy"
    np.random.default_rng(0).integers(2, 128, 100 * LENGTH).astype("<u2").tofile(data)
    measure(unmeasured, data, "--data_size", 100, "--tolerance", 1)
    count, _, off = verified(unmeasured, capsys)
    assert count == 64 and off < 2e-6


def test_a_single_instance_has_no_error(unmeasured: Path, tokens: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measure(unmeasured, tokens, "--data_size", 1)
    capsys.readouterr()
    change(unmeasured, 0.5, 1.0, "--verify")
    assert re.search(r"on 1 instances: .* \+- unknown \(one instance\)\n", capsys.readouterr().out)


def test_on_text_and_on_what_a_run_saw(
    unmeasured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_tokenizer(tmp_path / "tiny.json")
    (tmp_path / "text.txt").write_text("the cat and the hat\n\nof the sea\n\nan other thing in the east\n")
    measure(
        unmeasured, tmp_path / "text.txt", "--data_size", 3, "--tokenizer", tmp_path / "tiny.json", "--pack", "none"
    )
    assert verified(unmeasured, capsys)[2] < 2e-6
    world = write_world(tmp_path / "world")
    order = tmp_path / "order.npy"
    np.array([7, 3, 11, 0, 20], dtype="<u4").tofile(order)
    measure(unmeasured, world / "plain.yaml", "--data_size", 5, "--order", order, "--overwrite")
    assert verified(unmeasured, capsys, "--overwrite")[0] == 5
    np.array([7, 3, 11, 0, 21], dtype="<u4").tofile(order)
    with pytest.raises(ValueError, match=r"plain\.yaml: holds other instances than those of .*knowledge_entropy\.json"):
        change(unmeasured, 0.5, 1.0, "--verify")


@pytest.mark.parametrize("form", ["multipliers", "full"])
@pytest.mark.parametrize("family", ["OLMo", "Llama"])
def test_weights_of_half_precision(
    unmeasured: Path, tmp_path: Path, tokens: Path, family: str, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The edited weights are rounded to their type, though the measurement is not."""
    folder = unmeasured
    if family == "OLMo":
        weights = {name: tensor.bfloat16() for name, tensor in read_tensors(folder / "model.safetensors").items()}
        write_olmo_safetensors(folder / "model.safetensors", weights)
    else:
        folder = tmp_path / "llama"
        built("Llama").bfloat16().save_pretrained(folder)
    measure(folder, tokens, "--sequence_length", LENGTH)
    assert edit_weights(folder, by_layer(torch.ones(2, 48)), keep=False).dtype == torch.bfloat16
    off = verified(folder, capsys, "--format", form)[2]
    assert 1e-4 < off < 1e-2


def test_a_layer_without_a_gate_need_not_follow_the_law(
    tmp_path: Path, tokens: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = (
        r" has no gate and need not follow the law: mean coefficients of \d+ selected memories average (\S+), the law"
    )
    gated = r" mean coefficients of \d+ selected memories are 1\.0 x the mean (\S+) within \S+"
    for name, shown in (("GPT-2", plain + r" gives 1\.0 x the mean \S+"), ("Llama", gated)):
        built(name).save_pretrained(tmp_path / name)
        measure(tmp_path / name, tokens, "--sequence_length", LENGTH)
        capsys.readouterr()
        change(tmp_path / name, 0.5, 1.0, "--verify")
        found = re.search(f"^layer 0, the first one edited[,:]{shown}$", capsys.readouterr().out, re.MULTILINE)
        assert found and float(found[1]) > 0


def test_memories_that_the_law_does_not_bind(
    unmeasured: Path, tokens: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those cut to the cap, and dead ones."""
    measure(unmeasured, tokens)
    change(unmeasured, 0.5, 1.0, "--verify", "--cap", 0.5)
    said = "layer 0, the first one edited: no memory to compare with the law, all multipliers are capped"
    assert capsys.readouterr().out.splitlines()[-1] == said
    dead = unmeasured.parent / "dead"
    model = uneven_model()
    with torch.no_grad():
        model.blocks[0].ff_proj.weight[:24] = 0
    write(dead, model)
    measure(dead, tokens)
    capsys.readouterr()
    with pytest.raises(
        ValueError, match=r"all 24 selected memories are dead .*, so nothing would change; use a larger"
    ):
        change(dead, 0.5, 1.0, "--layers", 0)
    change(dead, 0.75, 1.0, "--verify")
    shown = capsys.readouterr().out.splitlines()
    assert shown[1].startswith("warning: 24 dead memories") and "coefficients of 12 selected memories" in shown[3]


def test_an_edit_that_breaks_the_law_is_not_kept(
    unmeasured: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure(unmeasured, tokens)
    before = set(unmeasured.iterdir())
    monkeypatch.setattr(verification, "open_model", lambda *_: uneven_model())  # an edit that is not there
    for form in ("multipliers", "full"):
        with pytest.raises(ValueError, match=r"layer 0 does not follow the law of algorithm 1, it is .* off; nothing"):
            change(unmeasured, 0.5, 1.0, "--verify", "--format", form)
        assert set(unmeasured.iterdir()) == before


def test_an_edit_a_little_off_the_law_breaks_it(
    unmeasured: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure(unmeasured, tokens)
    average = coefficients(unmeasured)

    def just_beyond(*_: Any) -> Any:
        model = uneven_model()
        factors = 1.0002 * average[0].mean() / average[0]
        with torch.no_grad():
            model.blocks[0].ff_proj.weight[:48] *= factors[:, None]
        return model

    monkeypatch.setattr(verification, "open_model", just_beyond)
    with pytest.raises(ValueError, match=r"it is 2\.0e-04 off"):
        change(unmeasured, 0.5, 1.0, "--verify", "--layers", 0)


def test_a_result_of_something_else_is_refused_before_anything_is_written(
    unmeasured: Path, tmp_path: Path, tokens: Path
) -> None:
    measure(unmeasured, tokens)
    given = tmp_path / "elsewhere" / "mlp_average_coefficients.safetensors"
    shutil.copytree(unmeasured, given.parent)
    identity = checkpoint.fingerprint(uneven_model().state_dict())
    average = {"mlp_average_coefficients": coefficients(unmeasured).sqrt()}
    save_file(average, given, metadata={"checkpoint_fingerprint": identity})
    before = set(unmeasured.iterdir())
    with pytest.raises(ValueError, match=rf"{given}: not the coefficients that .*{RESULT} was computed from"):
        change(unmeasured, 0.5, 1.0, "--verify", "--coefficients", given)
    for content in ("{", "{}", "[]", '{"data": null}', '{"data": {"path": "a"}, "number_of_instances": 1}'):
        (given.parent / RESULT).write_text(content)
        with pytest.raises(ValueError, match=rf"{given.parent / RESULT}: not a result of analysis\.entropy"):
            change(unmeasured, 0.5, 1.0, "--verify", "--coefficients", given)
    (given.parent / RESULT).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{given.parent / RESULT}: missing"):
        change(unmeasured, 0.5, 1.0, "--verify", "--coefficients", given)
    assert set(unmeasured.iterdir()) == before
    assert json.loads((unmeasured / RESULT).read_text())["data"]["instances"] == 40
