"""`analysis.entropy` of a checkpoint under the temperatures with which a run would begin."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file

from tests.analysis.measuring import check, direct, made_model, olmo_places, result_in, rows_of, run, write
from tests.analysis.series_folders import run as run_status
from tests.architectures import built
from tests.reference import to_transformers

TWELVE = 12


def theirs_with(attention: float = 1.0, divisors: torch.Tensor | None = None):
    """transformers' model of `made_model(0)` whose weights do what the temperatures do: scores are linear in q_proj,
    coefficients in up_proj."""
    theirs = to_transformers(made_model(0))
    with torch.no_grad():
        for number, layer in enumerate(theirs.model.layers):
            layer.self_attn.q_proj.weight /= attention
            if divisors is not None:
                layer.mlp.up_proj.weight /= divisors[number, :, None]
    return theirs


@torch.no_grad()
def direct_attention(theirs, rows: np.ndarray) -> float:
    """Attention entropy from the attention matrices themselves: a mean, summed over layers."""
    theirs.set_attn_implementation("eager")
    found = theirs(torch.as_tensor(rows), output_attentions=True).attentions
    each = [-torch.special.xlogy(a.double(), a.double()).sum(-1).mean() for a in found]
    return float(sum(each))


def test_the_entropy_under_temperatures_is_that_of_weights_that_do_the_same(
    shared: Path, tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(1)
    divisors = torch.rand(2, 48) + 0.5
    save_file({"temperature_MLP": divisors}, tmp_path / "divisors.safetensors")
    argv = ["--checkpoint", shared, "--data", tokens, "--data_size", TWELVE, "--measures", "knowledge,attention"]
    rows = rows_of(tokens)[:TWELVE]
    own = direct(theirs_with(), olmo_places(), rows)
    for name, flags, theirs, words in (
        ("own", [], theirs_with(), ""),
        ("warm", ["--temperature_attention", 2.5], theirs_with(2.5), ", attention temperature 2.5"),
        (
            "both",
            ["--temperature_attention", 0.4, "--temperature_MLP", tmp_path / "divisors.safetensors"],
            theirs_with(0.4, divisors),
            f", attention temperature 0.4, memory temperatures {tmp_path / 'divisors.safetensors'}",
        ),
    ):
        for _ in range(2):  # the second finds the first's result
            run(*argv, *flags, "--output", tmp_path / name)
            assert capsys.readouterr().out.startswith(f"{shared}{words}: H = ")
        average = direct(theirs, olmo_places(), rows)
        check(tmp_path / name, average)
        assert name == "own" or not torch.allclose(average, own, rtol=1e-3)
        result = result_in(tmp_path / name)
        assert result["attention_entropy"] == pytest.approx(direct_attention(theirs, rows), abs=1e-5)
    assert result["temperature_attention"] == 0.4 and len(result["temperature_MLP"]) == 64
    assert result["edit_files"] == {"temperature_MLP": "divisors.safetensors"}
    metadata_of = [load_metadata(tmp_path / name) for name in ("own", "warm", "both")]
    assert len(set(metadata_of)) == 3 and metadata_of[1] == f"{metadata_of[0]} attention temperature 2.5"
    with pytest.raises(Exception, match=r"was measured with temperature_attention 2\.5, not None"):
        run(*argv, "--output", tmp_path / "warm")


def load_metadata(folder: Path) -> str:
    with safe_open(folder / "mlp_average_coefficients.safetensors", "pt") as file:
        return file.metadata()["checkpoint_fingerprint"]


def test_a_temperature_of_a_checkpoint_saved_within_a_run_is_replaced(tmp_path: Path, tokens: Path) -> None:
    """As a run that starts from it does."""
    folder = write(tmp_path / "step5", made_model(0))
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["model"]["temperature_attention"] = 3.0
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    argv = ["--checkpoint", folder, "--data", tokens, "--data_size", TWELVE]
    run(*argv, "--output", tmp_path / "own")
    check(tmp_path / "own", direct(theirs_with(3.0), olmo_places(), rows_of(tokens)[:TWELVE]))
    run(*argv, "--temperature_attention", 2.5, "--output", tmp_path / "other")
    check(tmp_path / "other", direct(theirs_with(2.5), olmo_places(), rows_of(tokens)[:TWELVE]))


@pytest.mark.parametrize(
    ("flags", "status", "said"),
    [
        (["--temperature_attention", "0"], 2, "--temperature_attention 0 must be above 0 and finite"),
        (["--temperature_attention", "inf"], 2, "--temperature_attention inf must be above 0 and finite"),
        (["--temperature_attention", "2"], 2, "--temperature_attention: needs --output; the folder of the checkpoint"),
        (["--temperature_MLP", "x"], 2, "--temperature_MLP: needs --output; the folder of the checkpoint"),
        (["--temperature_MLP", "x", "--output", "out"], 1, "--temperature_MLP: x is not a file, here or in "),
    ],
)
def test_bad_temperatures_are_one_line(
    flags: list[str], status: int, said: str, shared: Path, tokens: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_status("--checkpoint", shared, "--data", tokens, "--data_size", 4, *flags) == status
    shown = capsys.readouterr().err
    assert shown.startswith("error: ") and said in shown and shown.count("\n") == 1


def test_a_temperature_of_1_has_no_effect_and_other_families_have_none(
    shared: Path, tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--data", tokens, "--data_size", TWELVE, "--temperature_attention"]
    run("--checkpoint", shared, *argv, 1, "--output", tmp_path / "one")
    assert capsys.readouterr().err.count("warning: --temperature_attention 1 has no effect") == 1
    assert result_in(tmp_path / "one")["temperature_attention"] is None
    built("Llama").save_pretrained(tmp_path / "llama")
    flags = [2, "--sequence_length", 8, "--output", tmp_path / "out"]
    assert run_status("--checkpoint", tmp_path / "llama", *argv, *flags) == 2
    assert "--temperature_attention: only OLMo models have temperatures; " in capsys.readouterr().err
