"""`python -m analysis.entropy` from end to end, against transformers one instance at a time."""

from __future__ import annotations

import json
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers
from omegaconf import OmegaConf
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from analysis import entropy
from olmo import checkpoint
from olmo.checkpoint import fingerprint
from olmo.config import TokenizerConfig, TrainConfig
from olmo.data.order import build_order
from olmo.exceptions import ConfigurationError, exit_status
from olmo.model import OLMo
from olmo.train.optim import build_optimizer
from scripts import data_order
from tests.reference import tiny_config, tiny_tokenizer, to_transformers
from tests.running import modes_hold
from tests.serving import Server, serving

ROOT = Path(__file__).resolve().parents[2]
LENGTH, INSTANCES = 16, 100
TEXTS = [
    "The warden of the silver lake.",
    "A lake",
    "In the town of stone and water, the owl is in the tower of the old inn.",
    "Rain",
    "He is there.",
]


def made_model(seed: int) -> OLMo:
    torch.manual_seed(seed)
    return OLMo(tiny_config(max_sequence_length=LENGTH)).eval()


def write(folder: Path, model: OLMo, tokenizer: str = "gpt2") -> Path:
    config = TrainConfig(model=model.config, tokenizer=TokenizerConfig(identifier=tokenizer))
    config.optimizer.name = "adamw"  # type: ignore[assignment]
    checkpoint.save(folder, model, config, build_optimizer(config.optimizer, model), {})
    return folder


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A token file; half an instance at its end counts for nothing."""
    path = tmp_path_factory.mktemp("data") / "tokens.npy"
    ids = np.random.default_rng(0).integers(2, 128, INSTANCES * LENGTH + LENGTH // 2).astype("<u2")
    path.write_bytes(ids.tobytes())
    return path


def rows_of(tokens: Path) -> np.ndarray:
    return np.fromfile(tokens, "<u2")[: INSTANCES * LENGTH].reshape(INSTANCES, LENGTH).astype(np.int64)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One checkpoint that tests only read; each writes into an output of its own."""
    return write(tmp_path_factory.mktemp("shared") / "step90-unsharded", made_model(0))


@torch.no_grad()
def direct(theirs: Any, places: list[str], rows: Sequence[Sequence[int]]) -> Tensor:
    """Cbar (L, M) of a transformers model: each instance alone, mean over its tokens, then over instances."""
    heard: dict[str, Tensor] = {}
    total: Any = 0.0

    def listen(place: str) -> Any:
        def hook(_: Any, args: Any) -> None:
            heard[place] = args[0][0].double()

        return hook

    handles = [theirs.get_submodule(p).register_forward_pre_hook(listen(p)) for p in places]
    for row in rows:
        theirs(torch.as_tensor(row)[None])
        signed = torch.stack([heard[place] for place in places])
        total = total + signed.abs().mean(1)
    for handle in handles:
        handle.remove()
    return total / len(rows)


def olmo_places(layers: int = 2) -> list[str]:
    return [f"model.layers.{layer}.mlp.down_proj" for layer in range(layers)]


def entropies(average: Tensor) -> list[float]:
    p = average / average.sum(1, keepdim=True)
    return (-(p * p.log()).sum(1)).tolist()


def run(*argv: object) -> None:
    entropy.main([str(a) for a in argv])


def result_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "knowledge_entropy.json").read_text())


def coefficients_in(folder: Path) -> Tensor:
    return load_file(folder / "mlp_average_coefficients.safetensors")["mlp_average_coefficients"]


def check(folder: Path, average: Tensor) -> None:
    result = result_in(folder)
    np.testing.assert_allclose(result["layers"], entropies(average), rtol=0, atol=1e-6)
    assert result["knowledge_entropy"] == pytest.approx(sum(entropies(average)), abs=1e-6)
    torch.testing.assert_close(coefficients_in(folder), average.float(), rtol=1e-5, atol=1e-7)


# --- data of every kind ------------------------------------------------------------------------------------------


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


def test_the_standard_error_is_the_jackknife_over_64_groups(tmp_path: Path, shared: Path, tokens: Path) -> None:
    run("--checkpoint", shared, "--data", tokens, "--data_size", INSTANCES, "--output", tmp_path)
    theirs, rows = to_transformers(made_model(0)), rows_of(tokens)
    each = torch.stack([direct(theirs, olmo_places(), [row]) for row in rows])
    groups = torch.arange(INSTANCES) % 64
    left_out = torch.tensor([entropies(each[groups != g].mean(0)) for g in range(64)])
    spread = (left_out.sum(1) - left_out.sum(1).mean()).square().sum().item()
    result = result_in(tmp_path)
    assert result["standard_error"] == pytest.approx(math.sqrt(63 / 64 * spread), rel=1e-3)
    for layer in range(2):
        spread = (left_out[:, layer] - left_out[:, layer].mean()).square().sum().item()
        assert result["layer_standard_errors"][layer] == pytest.approx(math.sqrt(63 / 64 * spread), rel=1e-3)


def test_a_datasets_folder(tmp_path: Path, shared: Path, tokens: Path) -> None:
    rows = rows_of(tokens)[:10]
    datasets.Dataset.from_dict({"input_ids": rows.tolist()}).save_to_disk(str(tmp_path / "data"))
    run("--checkpoint", shared, "--data", tmp_path / "data", "--data_size", 10, "--output", tmp_path)
    check(tmp_path, direct(to_transformers(made_model(0)), olmo_places(), rows))


def test_padding_of_a_datasets_folder_counts_for_nothing(tmp_path: Path, shared: Path, tokens: Path) -> None:
    """By itself, and as the data of a run: its first instances in its order."""
    rows = [row[:length].tolist() for row, length in zip(rows_of(tokens), (LENGTH, 3, 7, 1, 5, 2))]
    datasets.Dataset.from_dict({"input_ids": rows}).save_to_disk(str(tmp_path / "data"))
    asked = ("--checkpoint", shared, "--data_size", 4, "--batch_size", 3, "--output")
    run(*asked, tmp_path / "folder", "--data", tmp_path / "data")
    check(tmp_path / "folder", direct(to_transformers(made_model(0)), olmo_places(), rows[:4]))
    config = tmp_path / "run.yaml"
    data = f"{{dataset_path: {tmp_path / 'data'}, pad_direction: left}}"
    config.write_text(f"seed: 5\nmodel: {{max_sequence_length: {LENGTH}}}\ndata: {data}\n")
    run(*asked, tmp_path / "run", "--data", config)
    order = np.arange(6, dtype=np.uint32)
    np.random.Generator(np.random.PCG64(5)).shuffle(order)
    check(tmp_path / "run", direct(to_transformers(made_model(0)), olmo_places(), [rows[i] for i in order[:4]]))
    # The same padded with a token, which a mask, or the run's configuration, calls padding.
    pad = next(token for token in range(128) if not any(token in row for row in rows))
    full = [row + [pad] * (LENGTH - len(row)) for row in rows]
    mask = [[1] * len(row) + [0] * (LENGTH - len(row)) for row in rows]
    datasets.Dataset.from_dict({"input_ids": full, "attention_mask": mask}).save_to_disk(str(tmp_path / "masked"))
    run(*asked, tmp_path / "of mask", "--data", tmp_path / "masked")
    assert result_in(tmp_path / "of mask")["layers"] == result_in(tmp_path / "folder")["layers"]
    datasets.Dataset.from_dict({"input_ids": full}).save_to_disk(str(tmp_path / "full"))
    data = f"{{dataset_path: {tmp_path / 'full'}, generate_attention_mask: true}}"
    config.write_text(f"seed: 5\nmodel: {{max_sequence_length: {LENGTH}, pad_token_id: {pad}}}\ndata: {data}\n")
    run(*asked, tmp_path / "of run", "--data", config)
    assert result_in(tmp_path / "of run")["layers"] == result_in(tmp_path / "run")["layers"]
    datasets.Dataset.from_dict({"input_ids": [[1], []]}).save_to_disk(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="empty: instance 1 holds no token"):
        run(*asked[:2], "--data_size", 2, "--data", tmp_path / "empty", "--output", tmp_path / "none")


@pytest.mark.parametrize("kind", ["list", "lines", "train_context", "plain"])
def test_text_is_ragged_and_padding_counts_for_nothing(tmp_path: Path, kind: str) -> None:
    tokenizer_path = tiny_tokenizer(tmp_path / "tokenizer.json")
    model = made_model(0)
    folder = write(tmp_path / "checkpoint", model, str(tokenizer_path))
    data = tmp_path / {"lines": "data.jsonl", "plain": "data.txt"}.get(kind, "data.json")
    if kind == "lines":
        data.write_text("".join(json.dumps({"text": text, "id": 1}) + "\n" for text in TEXTS))
    elif kind == "plain":
        data.write_text("\n\n".join(TEXTS) + "\n")
    else:
        data.write_text(json.dumps([{"text" if kind == "list" else kind: text} for text in TEXTS]))
    run("--checkpoint", folder, "--data", data, "--data_size", 5, "--batch_size", 3, "--output", tmp_path / "out")
    tokenizer = Tokenizer.from_file(str(tokenizer_path))
    rows = [tokenizer.encode(text, add_special_tokens=False).ids[:LENGTH] for text in TEXTS]
    assert len({len(row) for row in rows}) > 2
    check(tmp_path / "out", direct(to_transformers(model), olmo_places(), rows))
    assert result_in(tmp_path / "out")["number_of_tokens"] == sum(len(row) for row in rows)


def test_a_tokenizer_in_the_folder_or_on_the_command_line(tmp_path: Path) -> None:
    folder = write(tmp_path / "checkpoint", made_model(0), "nowhere.json")
    (tmp_path / "data.txt").write_text(TEXTS[0])
    argv = ["--checkpoint", folder, "--data", tmp_path / "data.txt", "--data_size", 1]
    given = tiny_tokenizer(tmp_path / "given.json")
    run(*argv, "--tokenizer", given, "--output", tmp_path / "a")
    with pytest.raises((ValueError, FileNotFoundError), match=r"nowhere\.json"):
        run(*argv, "--output", tmp_path / "b")
    tiny_tokenizer(folder / "tokenizer.json")
    run(*argv, "--output", tmp_path / "c")
    assert torch.equal(coefficients_in(tmp_path / "a"), coefficients_in(tmp_path / "c"))
    assert result_in(tmp_path / "a")["standard_error"] is None  # one instance tells no error


def test_shorter_instances_on_request(tmp_path: Path, shared: Path, tokens: Path) -> None:
    argv = ["--checkpoint", shared, "--data", tokens, "--data_size", 20, "--output", tmp_path]
    run(*argv, "--sequence_length", 8)
    rows = rows_of(tokens).reshape(-1, 8)[:20]
    check(tmp_path, direct(to_transformers(made_model(0)), olmo_places(), rows))
    assert result_in(tmp_path)["sequence_length"] == 8


@pytest.mark.parametrize(("size", "place"), [([], "pretrained_1B"), (["--model_size", "7B"], "pretrained")])
def test_a_step_of_the_published_layout(
    tmp_path: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch, size: list[str], place: str
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write(Path(f"checkpoints/{place}/738020-unsharded"), made_model(0))
    run("--step", 738020, *size, "--data", tokens, "--data_size", 3)
    check(folder, direct(to_transformers(made_model(0)), olmo_places(), rows_of(tokens)[:3]))
    assert result_in(folder)["checkpoint"]["step"] == 738020


# --- the data of a run -------------------------------------------------------------------------------------------


@pytest.fixture
def dolma(tmp_path: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server with the tokens in two files, and an official configuration, 128 ids for 50304, that names them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    content = tokens.read_bytes()
    half = INSTANCES // 2 * LENGTH * 2
    with serving() as server:
        place = server.add("/dolma", {"part-0.npy": content[:half], "part-1.npy": content[half:]})
        settings = {
            "seed": 6198,
            "model": {"max_sequence_length": LENGTH, "vocab_size": 120, "embedding_size": 128},
            "data": {"paths": [f"{place}part-{{0..1}}.npy"], "drop_last": True},
            "global_train_batch_size": 20,
            "save_folder": "runs/none",
        }
        Path("configs/official").mkdir(parents=True)
        OmegaConf.save(OmegaConf.create(settings), "configs/official/OLMo-1B.yaml")
        yield server


def in_order(tokens: Path, count: int) -> np.ndarray:
    numbers = np.arange(INSTANCES)
    np.random.Generator(np.random.PCG64(6198)).shuffle(numbers)
    return rows_of(tokens)[numbers[:count]]


def test_the_first_batch_of_the_official_run_by_default(
    dolma: Server, tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The README's command, after the order has been rebuilt; a second time without any network."""
    folder = write(Path("checkpoints/pretrained_1B/738020-unsharded"), made_model(0))
    argv = ["analysis.entropy", "--step", 738020, "--data_size", 20, "--batch_size", 4]
    assert exit_status(entropy.main, [str(a) for a in argv[1:]]) == 2
    assert capsys.readouterr().err == (
        "error: data/global_indices/1B/global_indices.npy: no such data order, whose first instances are the default "
        "of --data; get it with: bash scripts/get_dataorder.sh --model_size 1B, or rebuild only as much as is needed "
        "with: python -m scripts.data_order rebuild configs/official/OLMo-1B.yaml --first 20 --output "
        "data/global_indices/1B/global_indices.npy\n"
    )
    data_order.main(
        ["rebuild", "configs/official/OLMo-1B.yaml", "--output", "data/global_indices/1B/global_indices.npy"]
    )
    done = command(*argv, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    average = direct(to_transformers(made_model(0)), olmo_places(), in_order(tokens, 20))
    check(folder, average)
    assert len(dolma.heads) == 2 and sum(asked.sent for asked in dolma.asked) == 20 * LENGTH * 2
    first = result_in(folder)
    assert first["data"]["path"] == "configs/official/OLMo-1B.yaml"
    (folder / "knowledge_entropy.json").unlink()
    before = len(dolma.asked)
    assert command(*argv, cwd=tmp_path).returncode == 0
    assert result_in(folder)["knowledge_entropy"] == first["knowledge_entropy"]
    assert len(dolma.heads) == 2 and len(dolma.asked) == before


def test_a_configuration_as_data(
    dolma: Server, tokens: Path, tmp_path: Path, shared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = "configs/official/OLMo-1B.yaml"
    argv = ["--checkpoint", shared, "--data", config, "--data_size", 6, "--output", tmp_path / "out"]
    run(*argv)  # its order is worked out
    expected = result_in(tmp_path / "out")
    build_order(INSTANCES, 6198, 0)[:6].tofile("order.npy")
    served = dolma.add("", {"order.npy": Path("order.npy").read_bytes()}) + "order.npy"
    for place in ("order.npy", served):
        run(*argv, "--order", place)
        assert result_in(tmp_path / "out") == expected
    run(*argv, "--sequence_length", 5)
    check(tmp_path / "out", direct(to_transformers(made_model(0)), olmo_places(), in_order(tokens, 6)[:, :5]))
    capsys.readouterr()
    said = failing(capsys, *argv, "--order", "order.npy", "--data_size", 60)
    assert "order.npy: 6 instances, --data_size asks for 60" in said
    np.array([3, 100, 5, 6, 7, 8], dtype="<u4").tofile("order.npy")
    said = failing(capsys, *argv, "--order", "order.npy")
    assert "order.npy: place 1 is instance 100, the data set has 100 (2 files, 3216 bytes, the last" in said
    with pytest.raises(ConfigurationError, match="--order: goes with the configuration of a run"):
        run(*argv, "--data", tokens, "--order", "order.npy")


def test_a_token_file_at_a_url(dolma: Server, tokens: Path, tmp_path: Path, shared: Path) -> None:
    argv = ["--checkpoint", shared, "--data_size", 5]
    run(*argv, "--data", f"{dolma.url}/dolma/part-0.npy", "--output", tmp_path / "far")
    run(*argv, "--data", tokens, "--output", tmp_path / "near")
    far, near = result_in(tmp_path / "far"), result_in(tmp_path / "near")
    assert far["data"].pop("path") != near["data"].pop("path") and far == near


# --- variants ----------------------------------------------------------------------------------------------------


def test_relu_coefficients(tmp_path: Path, shared: Path, tokens: Path) -> None:
    run("--checkpoint", shared, "--data", tokens, "--data_size", 9, "--coefficient", "relu", "--output", tmp_path)
    theirs = to_transformers(made_model(0))
    # relu(gate) * up with negatives set to 0, by the modules' own outputs
    heard: dict[str, Tensor] = {}
    for number, layer in enumerate(theirs.model.layers):
        for name in ("gate_proj", "up_proj"):

            def hook(_: Any, __: Any, output: Tensor, key: str = f"{number}.{name}") -> None:
                heard[key] = output[0].double()

            getattr(layer.mlp, name).register_forward_hook(hook)
    total: Any = 0.0
    for row in rows_of(tokens)[:9]:
        with torch.no_grad():
            theirs(torch.as_tensor(row)[None])
        one = [(heard[f"{n}.gate_proj"].clamp(min=0) * heard[f"{n}.up_proj"]).clamp(min=0).mean(0) for n in (0, 1)]
        total = total + torch.stack(one)
    check(tmp_path, total / 9)
    assert result_in(tmp_path)["coefficient"] == "relu"


def test_bfloat16(tmp_path: Path, shared: Path, tokens: Path) -> None:
    argv = ["--checkpoint", shared, "--data", tokens, "--data_size", 20]
    run(*argv, "--output", tmp_path / "fp32")
    run(*argv, "--precision", "bf16", "--output", tmp_path / "bf16")
    first, second = result_in(tmp_path / "fp32"), result_in(tmp_path / "bf16")
    assert second["precision"] == "bf16"
    assert first["knowledge_entropy"] != second["knowledge_entropy"]
    assert first["knowledge_entropy"] == pytest.approx(second["knowledge_entropy"], abs=0.01)


def test_another_family_of_transformers(tmp_path: Path, tokens: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    shape = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = transformers.GPTNeoXConfig(**shape, intermediate_size=80, max_position_embeddings=LENGTH)
    model = transformers.GPTNeoXForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "pythia")
    run("--checkpoint", tmp_path / "pythia", "--data", tokens, "--data_size", 10, "--batch_size", 4)
    places = [f"gpt_neox.layers.{layer}.mlp.dense_4h_to_h" for layer in range(3)]
    check(tmp_path / "pythia", direct(model, places, rows_of(tokens)[:10]))
    result = result_in(tmp_path / "pythia")
    assert result["sequence_length"] == LENGTH
    found = "GPTNeoXForCausalLM, 3 layers; each has in gpt_neox.layers.*.mlp.dense_4h_to_h: 80 memories (plain)"
    assert result["memories"] == found
    assert f"{tmp_path / 'pythia'}: {found}\n" in capsys.readouterr().err


def test_gpt2_calls_its_context_by_another_name(tmp_path: Path, tokens: Path) -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=128, n_embd=32, n_layer=3, n_head=4, n_positions=LENGTH)
    model = transformers.GPT2LMHeadModel(config).eval()
    model.save_pretrained(tmp_path / "gpt2")
    run("--checkpoint", tmp_path / "gpt2", "--data", tokens, "--data_size", 10, "--batch_size", 4)
    places = [f"transformer.h.{layer}.mlp.c_proj" for layer in range(3)]
    check(tmp_path / "gpt2", direct(model, places, rows_of(tokens)[:10]))
    assert result_in(tmp_path / "gpt2")["sequence_length"] == LENGTH


@pytest.mark.parametrize(
    ("named", "length"),
    [
        ({"n_ctx": 512}, 512),
        ({"max_seq_len": 1024}, 1024),
        ({"seq_length": 64}, 64),
        ({"max_position_embeddings": None, "n_positions": 256}, 256),
        ({"max_position_embeddings": 131072}, 2048),
        ({}, 2048),
    ],
)
def test_the_context_of_another_family(tmp_path: Path, named: dict[str, Any], length: int) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "another", **named}))
    assert entropy._context(tmp_path) == length


def test_text_for_another_family_is_padded_without_harm(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.GPTNeoXConfig(**shape, intermediate_size=80, max_position_embeddings=64)
    model = transformers.GPTNeoXForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "pythia")
    tokenizer = Tokenizer.from_file(str(tiny_tokenizer(tmp_path / "pythia/tokenizer.json")))
    (tmp_path / "data.txt").write_text("\n\n".join(TEXTS))
    run("--checkpoint", tmp_path / "pythia", "--data", tmp_path / "data.txt", "--data_size", 5, "--batch_size", 5)
    rows = [tokenizer.encode(text, add_special_tokens=False).ids for text in TEXTS]
    places = [f"gpt_neox.layers.{layer}.mlp.dense_4h_to_h" for layer in range(2)]
    check(tmp_path / "pythia", direct(model, places, rows))


def test_a_transformers_olmo_measures_like_ours(tmp_path: Path, shared: Path, tokens: Path) -> None:
    to_transformers(made_model(0)).save_pretrained(tmp_path / "hf")
    run("--checkpoint", tmp_path / "hf", "--data", tokens, "--data_size", 10)
    run("--checkpoint", shared, "--data", tokens, "--data_size", 10, "--output", tmp_path / "ours")
    assert result_in(tmp_path / "hf")["layers"] == result_in(tmp_path / "ours")["layers"]
    prints = {result_in(tmp_path / name)["checkpoint"]["fingerprint"] for name in ("hf", "ours")}
    assert len(prints) == 1 and None not in prints


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_the_batch_size_changes_nothing(tmp_path: Path, shared: Path, tokens: Path, batch_size: int) -> None:
    argv = ["--checkpoint", shared, "--data", tokens, "--data_size", 30, "--batch_size", batch_size]
    run(*argv, "--output", tmp_path)
    check(tmp_path, direct(to_transformers(made_model(0)), olmo_places(), rows_of(tokens)[:30]))


# --- several checkpoints -----------------------------------------------------------------------------------------


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
    real = entropy.measure
    monkeypatch.setattr(entropy, "measure", lambda *a, **k: measured.append(1) or real(*a, **k))
    first = result_in(folder)
    run(*argv)
    assert not measured and result_in(folder) == first
    run(*argv, "--batch_size", 2)  # as many instances a pass as the machine likes
    assert not measured

    other = tokens.with_name("other.npy")
    np.random.default_rng(9).integers(0, 128, 6 * LENGTH).astype("<u2").tofile(other)
    for changed in (
        ["--data_size", 7],
        ["--coefficient", "relu"],
        ["--precision", "bf16"],
        ["--sequence_length", 8],
        ["--data", other],
        ["--tolerance", 1.0],
    ):
        before = len(measured)
        run(*argv, *changed)
        assert len(measured) == before + 1, changed
    run(*argv)
    before = len(measured)
    write(folder, made_model(1))  # other weights under the same name; the results went with the old ones
    run(*argv)
    assert len(measured) == before + 1
    assert result_in(folder)["checkpoint"]["fingerprint"] != first["checkpoint"]["fingerprint"]


def test_a_result_without_its_coefficients_is_measured_again(tmp_path: Path, tokens: Path) -> None:
    folder = write(tmp_path / "step90", made_model(0))
    argv = ["--checkpoint", folder, "--data", tokens, "--data_size", 6]
    run(*argv)
    (folder / "mlp_average_coefficients.safetensors").unlink()
    run(*argv)
    assert (folder / "mlp_average_coefficients.safetensors").is_file()


# --- tolerance ---------------------------------------------------------------------------------------------------


def test_a_tolerance_stops_as_soon_as_it_is_reached(tmp_path: Path, shared: Path, tokens: Path) -> None:
    argv = ["--checkpoint", shared, "--data", tokens, "--data_size", INSTANCES, "--batch_size", 4]
    run(*argv, "--tolerance", 10, "--output", tmp_path / "early")
    early = result_in(tmp_path / "early")
    assert early["number_of_instances"] == 64 and early["number_of_tokens"] == 64 * LENGTH
    assert early["standard_error"] < 10
    check(tmp_path / "early", direct(to_transformers(made_model(0)), olmo_places(), rows_of(tokens)[:64]))
    run(*argv, "--tolerance", 1e-9, "--output", tmp_path / "never")
    assert result_in(tmp_path / "never")["number_of_instances"] == INSTANCES


# --- processes ---------------------------------------------------------------------------------------------------


def command(*argv: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", *map(str, argv)], env=environment, cwd=cwd, capture_output=True, text=True
    )


def test_two_processes_measure_what_one_does(tmp_path: Path, shared: Path, tokens: Path) -> None:
    """An odd number of instances, and a tolerance that both must agree about."""
    launch = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    argv = ["analysis.entropy", "--checkpoint", shared, "--data", tokens, "--batch_size", 4, "--device", "cpu"]
    argv += ["--data_size", 99, "--tolerance", 10]
    done = command(*launch, *argv, "--output", tmp_path / "two")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("H = ") == 1
    run(*argv[1:], "--output", tmp_path / "one")
    one, two = result_in(tmp_path / "one"), result_in(tmp_path / "two")
    assert one["number_of_instances"] == two["number_of_instances"] == 64
    assert two["knowledge_entropy"] == pytest.approx(one["knowledge_entropy"], abs=1e-6)
    assert two["standard_error"] == pytest.approx(one["standard_error"], rel=1e-3)
    torch.testing.assert_close(coefficients_in(tmp_path / "two"), coefficients_in(tmp_path / "one"))


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("family", ["ours", "OLMoE"])
def test_ranks_share_odd_numbers_of_instances_out(shared: Path, tokens: Path, family: str, world_size: int) -> None:
    """Ranks one after another, without tolerance: their sums are those of one process."""
    if family == "ours":
        model = entropy.open_model(shared, torch.device("cpu"), torch.float32)
    else:
        torch.manual_seed(0)
        shape = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = transformers.OlmoeConfig(**shape, intermediate_size=48, num_experts=4, num_experts_per_tok=2)
        model = transformers.OlmoeForCausalLM(config).eval()
    rows = [row[: 5 + number % 7] for number, row in enumerate(rows_of(tokens)[:17])]

    class Alone(entropy.Ranks):
        def sum(self, values: np.ndarray) -> np.ndarray:
            return values

    def measured(ranks: entropy.Ranks) -> entropy.GroupedMeans:
        return entropy.measure(model, rows, 2, "abs", torch.device("cpu"), ranks)["knowledge"]

    parts = [measured(Alone(rank, world_size)) for rank in range(world_size)]
    whole = measured(entropy.Ranks())
    assert sum(part.instances for part in parts) == 17
    np.testing.assert_array_equal(sum(part.counts for part in parts), whole.counts)
    np.testing.assert_allclose(sum(part.sums for part in parts), whole.sums, rtol=1e-5, atol=1e-8)


# --- errors ------------------------------------------------------------------------------------------------------


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
        (["--checkpoint", "{shared}"], "--data is missing"),
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
    data = [] if said == "--data is missing" else ["--data", str(tokens)]
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
            "tokens.bin: no text in UTF-8; --data is a token file named .npy, a datasets folder",
        ),
        (["--data", "short.txt", "--tokenizer", "tokenizer.json"], "short.txt: 1 texts, --data_size asks for 2048"),
        (["--data", "large.npy", "--data_size", "2"], "token 60000 in the data, the model knows 128"),
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


def failing(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The one line of a failure while running."""
    assert exit_status(entropy.main, [str(a) for a in argv]) == 1
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ") and shown.err.count("\n") == 1 and not shown.out
    return shown.err


def test_a_place_that_cannot_be_written_is_told_before_the_measurement(
    tmp_path: Path, tokens: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "step90", made_model(0))
    argv = ["--checkpoint", folder, "--data", tokens, "--data_size", 3]
    (tmp_path / "file").touch()
    folder.chmod(0o555)
    real = entropy.measure
    monkeypatch.setattr(entropy, "measure", lambda *a, **k: pytest.fail("it was measured"))
    with modes_hold():
        said = failing(capsys, *argv)
        assert f"{folder}: cannot be written: permission denied; name another place with --output" in said
        assert "new/deeper: cannot be written: permission denied" in failing(
            capsys, *argv, "--output", folder / "new/deeper"
        )
    assert "file/out: cannot be written" in failing(capsys, *argv, "--output", tmp_path / "file/out")
    monkeypatch.setattr(entropy, "measure", real)
    with modes_hold():
        run(*argv, "--output", tmp_path / "elsewhere")
    folder.chmod(0o755)
    run(*argv)
    folder.chmod(0o555)
    monkeypatch.setattr(entropy, "measure", lambda *a, **k: pytest.fail("it was measured"))
    with modes_hold():
        run(*argv)  # what is there already is only read


def test_weights_that_may_not_be_read_are_named_with_the_reason(
    tmp_path: Path, tokens: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = write(tmp_path / "ours", made_model(0))
    shape = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**shape)).save_pretrained(tmp_path / "theirs")
    for folder in (ours, tmp_path / "theirs"):
        capsys.readouterr()  # transformers tells of its saving
        (folder / "model.safetensors").chmod(0)
        argv = ["--checkpoint", folder, "--data", tokens, "--data_size", 3, "--sequence_length", LENGTH]
        with modes_hold():
            assert f"{folder}/model.safetensors: permission denied" in failing(capsys, *argv)


def test_truncated_weights_of_another_family_are_one_line(
    tmp_path: Path, tokens: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.GPTNeoXConfig(**shape, max_position_embeddings=LENGTH)
    transformers.GPTNeoXForCausalLM(config).save_pretrained(tmp_path / "pythia")
    weights = tmp_path / "pythia/model.safetensors"
    whole = weights.read_bytes()
    capsys.readouterr()  # transformers tells of its saving
    for kept in (0, 100, len(whole) - 4):
        weights.write_bytes(whole[:kept])
        said = failing(capsys, "--checkpoint", tmp_path / "pythia", "--data", tokens, "--data_size", 3)
        assert f"{tmp_path / 'pythia'}: transformers cannot load this model: " in said


def test_results_have_the_modes_that_the_umask_gives(tmp_path: Path, shared: Path, tokens: Path) -> None:
    before = os.umask(0o022)
    try:
        run("--checkpoint", shared, "--data", tokens, "--data_size", 3, "--output", tmp_path / "out")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o644}


def test_the_examples_of_the_help_are_whole(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        entropy.main(["--help"])
    shown = [line.strip() for line in capsys.readouterr().out.splitlines()]
    prefix = "python -m analysis.entropy "
    examples = [line.removeprefix(prefix) for line in shown if line.startswith(prefix)]
    assert len(examples) >= 2
    for example in examples:
        args = entropy._parse(shlex.split(example))
        assert (
            args.data or args.step in ([738020], ["all"]) or args.checkpoint[0].startswith("allenai/OLMo-1B@")
        )  # whose data has a default


def test_the_command_itself_ends_with_status_and_one_line(tmp_path: Path, shared: Path) -> None:
    done = command("analysis.entropy", "--checkpoint", shared, "--data", tmp_path / "nowhere.npy")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.splitlines() == [f"error: {tmp_path / 'nowhere.npy'}: no such token file"]
