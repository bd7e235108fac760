"""Instances of every kind of data, measured against transformers one instance at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from tokenizers import Tokenizer

from analysis import entropy
from analysis.instances import Instances
from olmo.data.order import build_order
from olmo.exceptions import ConfigurationError, exit_status
from scripts import data_order
from tests.analysis.measuring import (
    INSTANCES,
    LENGTH,
    TEXTS,
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
from tests.reference import tiny_tokenizer, to_transformers
from tests.running import ROOT
from tests.serving import Server, serving


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
    data = f"{{dataset_path: {tmp_path / 'data'}, pad_rows: true, pad_direction: left}}"
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
    argv = ["--checkpoint", folder, "--data", data, "--data_size", 5, "--batch_size", 3, "--pack", "none"]
    run(*argv, "--output", tmp_path / "out")
    tokenizer = Tokenizer.from_file(str(tokenizer_path))
    rows = [tokenizer.encode(text, add_special_tokens=False).ids[:LENGTH] for text in TEXTS]
    assert len({len(row) for row in rows}) > 2
    check(tmp_path / "out", direct(to_transformers(model), olmo_places(), rows))
    assert result_in(tmp_path / "out")["number_of_tokens"] == sum(len(row) for row in rows)


def test_a_tokenizer_in_the_folder_or_on_the_command_line(tmp_path: Path) -> None:
    folder = write(tmp_path / "checkpoint", made_model(0), "nowhere.json")
    (tmp_path / "data.txt").write_text(TEXTS[0])
    argv = ["--checkpoint", folder, "--data", tmp_path / "data.txt", "--data_size", 1, "--pack", "none"]
    given = tiny_tokenizer(tmp_path / "given.json")
    run(*argv, "--tokenizer", given, "--output", tmp_path / "a")
    with pytest.raises((ValueError, FileNotFoundError), match=r"nowhere\.json"):
        run(*argv, "--output", tmp_path / "b")
    tiny_tokenizer(folder / "tokenizer.json")
    run(*argv, "--output", tmp_path / "c")
    assert torch.equal(coefficients_in(tmp_path / "a"), coefficients_in(tmp_path / "c"))
    assert result_in(tmp_path / "a")["standard_error"] is None  # one instance gives no error


def test_shorter_instances_on_request(tmp_path: Path, shared: Path, tokens: Path) -> None:
    argv = ["--checkpoint", shared, "--data", tokens, "--data_size", 20, "--output", tmp_path]
    run(*argv, "--sequence_length", 8)
    rows = rows_of(tokens).reshape(-1, 8)[:20]
    check(tmp_path, direct(to_transformers(made_model(0)), olmo_places(), rows))
    assert result_in(tmp_path)["sequence_length"] == 8


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
            "model": {
                "max_sequence_length": LENGTH,
                "vocab_size": 120,
                "embedding_size": 128,
                "eos_token_id": 0,
                "pad_token_id": 1,
            },
            "data": {"paths": [f"{place}part-{{0..1}}.npy"], "drop_last": True},
            "global_train_batch_size": 20,
            "save_folder": "runs/none",
        }
        Path("configs/official").mkdir(parents=True)
        OmegaConf.save(OmegaConf.create(settings), "configs/official/OLMo-1B.yaml")
        yield server


def test_a_model_of_another_family_needs_data(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    instances = Instances("configs/official/OLMo-1B.yaml", 1, of_official_run=True)
    choices = "--data FILE.txt, --data hub:allenai/c4:en:validation:text, or, closest to the paper, "
    choices += "--data hub:emozilla/dolma-v1_7-3B:train:text"
    with pytest.raises(ConfigurationError, match=f"{tmp_path} .*; give text: {choices}$"):
        instances.check_tokenizer(tmp_path)


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
        "of --data; get it with: bash scripts/get_dataorder.sh --model_size 1B; or rebuild only as much as is needed "
        "with: python -m scripts.data_order rebuild configs/official/OLMo-1B.yaml --first 20 --output "
        "data/global_indices/1B/global_indices.npy; a model with another tokenizer than OLMo's needs text: "
        "--data FILE.txt, --data hub:allenai/c4:en:validation:text, or, closest to the paper, "
        "--data hub:emozilla/dolma-v1_7-3B:train:text\n"
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


def test_the_default_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ConfigurationError, match=rf"no such data order, .* rebuild {ROOT}/configs/official/OLMo-7B.yaml "
    ):
        Instances.official("7B", 20)


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
    run(*argv, "--sequence_length", 5, "--overwrite")
    check(tmp_path / "out", direct(to_transformers(made_model(0)), olmo_places(), in_order(tokens, 6)[:, :5]))
    capsys.readouterr()
    said = failing(capsys, *argv, "--order", "order.npy", "--data_size", 60)
    assert "order.npy: 6 instances, --data_size asks for 60" in said
    np.array([3, 100, 5, 6, 7, 8], dtype="<u4").tofile("order.npy")
    said = failing(capsys, *argv, "--order", "order.npy")
    assert "order.npy: place 1 is instance 100, the data set has 100 (2 files, 3216 bytes, the last" in said
    with pytest.raises(ConfigurationError, match="--order: needs the configuration of a run"):
        run(*argv, "--data", tokens, "--order", "order.npy")


def test_a_token_file_at_a_url(dolma: Server, tokens: Path, tmp_path: Path, shared: Path) -> None:
    argv = ["--checkpoint", shared, "--data_size", 5]
    run(*argv, "--data", f"{dolma.url}/dolma/part-0.npy", "--output", tmp_path / "far")
    run(*argv, "--data", tokens, "--output", tmp_path / "near")
    far, near = result_in(tmp_path / "far"), result_in(tmp_path / "near")
    assert far["data"].pop("path") != near["data"].pop("path") and far == near
