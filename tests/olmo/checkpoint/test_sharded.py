"""Sharded checkpoints: what is written is read again, nothing else is; damage and failures have one line."""

from __future__ import annotations

import io
import os
import pickle
import resource
import shutil
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from olmo import checkpoint
from olmo.checkpoint import manifest, sharded, writing
from olmo.config import TrainConfig
from olmo.distributed import Ranks
from olmo.model import OLMo
from olmo.train.optim import build_optimizer
from olmo.train.step import TrainStep
from tests.hostile import HOSTILE, Calls, hostile
from tests.hostile_files import bomb
from tests.reference import tiny_config
from tests.running import CPU, metrics, train, write_world


@pytest.fixture(scope="module")
def trained() -> tuple[OLMo, torch.optim.Optimizer, TrainConfig]:
    """A model after one step of its optimizer."""
    torch.manual_seed(0)
    config = TrainConfig(model=tiny_config())
    config.optimizer.name = "adamw"  # type: ignore[assignment]
    model = OLMo(config.model)
    optimizer = build_optimizer(config.optimizer, model)
    model(torch.arange(32).view(2, 16)).float().logsumexp(-1).sum().backward()
    optimizer.step()
    return model, optimizer, config


def saved(folder: Path, trained: tuple[OLMo, torch.optim.Optimizer, TrainConfig]) -> Path:
    model, optimizer, config = trained
    tensors = sharded.snapshot(model, checkpoint.optimizer_state(optimizer)["state"], Ranks())
    checkpoint.save_sharded(folder, tensors, model, config, {"global_step": 1}, None, False, Ranks())
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, trained: Any) -> Path:
    return saved(tmp_path_factory.mktemp("run") / "step1", trained)


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """A copy of it, without the manifest, which would tell of most damage."""
    shutil.copytree(written, tmp_path / "step1")
    (tmp_path / "step1/manifest.json").unlink()
    return tmp_path / "step1"


def test_what_is_written_is_read(written: Path, trained: Any) -> None:
    model, optimizer, config = trained
    state = model.state_dict()
    read = checkpoint.read_state(written)
    assert read.keys() == state.keys() and all(read[name].equal(state[name]) for name in state)
    on_disk = checkpoint.StateOnDisk(written)
    assert set(on_disk) == state.keys() and all(on_disk[name].equal(state[name]) for name in state)
    assert checkpoint.fingerprint(read) == checkpoint.fingerprint(state)
    loaded = checkpoint.load_model(written, CPU).state_dict()
    assert all(loaded[name].equal(state[name]) for name in state)
    again = OLMo(config.model)
    other = build_optimizer(config.optimizer, again)
    sharded.read_weights(written, again)
    assert all(again.state_dict()[name].equal(state[name]) for name in state)
    checkpoint.load_optimizer_state(other, checkpoint.read_optimizer_state(written, other), "here")
    ours, wanted = (checkpoint.optimizer_state(o)["state"] for o in (other, optimizer))
    assert ours.keys() == wanted.keys()
    for name, entries in wanted.items():
        assert entries.keys() == {"exp_avg", "exp_avg_sq", "step"}
        assert all(ours[name][entry].equal(value) for entry, value in entries.items())


def test_the_manifest_names_all_of_it(written: Path) -> None:
    held = manifest._read(written)["files"].keys()
    assert held == {"config.yaml", "train.pt", "model_and_optim/.metadata", "model_and_optim/__0_0.distcp"}
    assert manifest.problem(written) is None


def test_a_snapshot_is_what_was(trained: Any) -> None:
    model, optimizer, _ = trained
    tensors = sharded.snapshot(model, checkpoint.optimizer_state(optimizer)["state"], Ranks())
    live = {f"model.{name}": weight for name, weight in model.state_dict().items()}
    assert not {t.data_ptr() for t in tensors.values()} & {t.data_ptr() for t in live.values()}
    assert all(tensors[name].equal(weight) for name, weight in live.items())


def test_what_all_processes_have_is_shared_out(trained: Any) -> None:
    model, optimizer, _ = trained
    state = checkpoint.optimizer_state(optimizer)["state"]
    shares = [sharded.snapshot(model, state, Ranks(rank, 4)) for rank in range(4)]
    names = [name for share in shares for name in share]
    assert len(names) == len(set(names)) and set(names) == sharded.snapshot(model, state, Ranks()).keys()
    sizes = [sum(t.numel() for t in share.values()) for share in shares]
    assert max(sizes) < 1.1 * min(sizes)


# --- damaged and hostile ---


def index_of(folder: Path) -> Path:
    return folder / "model_and_optim" / ".metadata"


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_index_runs_nothing(folder: Path, kind: str) -> None:
    touched = folder.parent / "touched"
    index = sharded.read_index(folder)
    index.planner_data = hostile(kind, touched)
    index_of(folder).write_bytes(pickle.dumps(index))
    with pytest.raises(ValueError, match=r"\.metadata: damaged, or not an index of a checkpoint") as caught:
        checkpoint.read_state(folder)
    assert "\n" not in str(caught.value) and not touched.exists()


def test_one_tensor_after_the_other_reads_the_index_once_and_checks_each_part_once(
    written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The index of 1,000 tensors of 64 processes takes 10 s to read, and the parts are all of the weights."""
    index, indices, parts = sharded.read_index(written), [], []
    read, check = sharded.read_index, sharded.check_torch_file
    monkeypatch.setattr(sharded, "read_index", lambda folder: indices.append(folder) or read(folder))
    monkeypatch.setattr(sharded, "check_torch_file", lambda file: parts.append(file) or check(file))
    on_disk = checkpoint.StateOnDisk(written)
    assert len([on_disk[name] for name in on_disk]) == len(parts)
    assert len(parts) == sum(place.fqn.startswith(sharded.WEIGHTS) for place in index.storage_data)
    sharded.read_weights(written, OLMo(tiny_config()))
    assert len(indices) == 2


def test_bytes_in_place_of_a_tensor_are_not_unpickled(folder: Path) -> None:
    """torch's reader would unpickle without a thought what its index calls bytes."""
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    touched = folder.parent / "touched"
    index = sharded.read_index(folder)
    name = "model.transformer.wte.weight"
    index.state_dict_metadata[name] = BytesStorageMetadata()
    index_of(folder).write_bytes(pickle.dumps(index))
    part = folder / "model_and_optim/__0_0.distcp"
    buffer = io.BytesIO()
    torch.save(Calls(os.system, f"touch '{touched}'"), buffer)
    part.write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match=f"no tensor {name}"):
        sharded.read_weights(folder, OLMo(tiny_config()))
    assert "transformer.wte.weight" not in sharded.read_index(folder).state_dict_metadata
    with pytest.raises(ValueError):
        checkpoint.load_model(folder, CPU)
    assert not touched.exists()


def test_a_hostile_part_runs_nothing(folder: Path) -> None:
    touched = folder.parent / "touched"
    part = folder / "model_and_optim/__0_0.distcp"
    index = sharded.read_index(folder)
    info = next(iter(index.storage_data.values()))
    buffer = io.BytesIO()
    torch.save(Calls(os.system, f"touch '{touched}'"), buffer)
    for held in index.storage_data.values():
        held.offset, held.length = 0, len(buffer.getvalue())
    index_of(folder).write_bytes(pickle.dumps(index))
    part.write_bytes(buffer.getvalue())
    assert zipfile.is_zipfile(part) and info.relative_path == part.name
    with pytest.raises(ValueError, match="model_and_optim: damaged"):
        checkpoint.read_state(folder)
    assert not touched.exists()


def test_an_index_that_leads_elsewhere_is_refused(folder: Path) -> None:
    index = sharded.read_index(folder)
    for held in index.storage_data.values():
        held.relative_path = "../train.pt"
    index_of(folder).write_bytes(pickle.dumps(index))
    with pytest.raises(ValueError, match="it names files elsewhere"):
        checkpoint.read_state(folder)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


DAMAGE: dict[str, Any] = {
    "half an index": (lambda folder: cut(index_of(folder)), "not an index of a checkpoint"),
    "an empty index": (lambda folder: os.truncate(index_of(folder), 0), "not an index of a checkpoint"),
    "another pickle": (lambda folder: index_of(folder).write_bytes(pickle.dumps([1])), "not an index of a checkpoint"),
    "half a part": (lambda folder: cut(folder / "model_and_optim/__0_0.distcp"), "damaged: "),
    "no part": (lambda folder: (folder / "model_and_optim/__0_0.distcp").unlink(), "No such file"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_has_one_line(folder: Path, kind: str) -> None:
    damage, expected = DAMAGE[kind]
    damage(folder)
    for read in (lambda: checkpoint.read_state(folder), lambda: sharded.read_weights(folder, OLMo(tiny_config()))):
        with pytest.raises(ValueError, match=expected) as caught:
            read()
        assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_weights_of_another_shape_are_named(written: Path) -> None:
    with pytest.raises(ValueError, match=r"step1: model\.transformer\.\S+ has shape .*, not .* and floating point"):
        sharded.read_weights(written, OLMo(tiny_config(d_model=64, n_heads=4)))
    with pytest.raises(ValueError, match=r"step1: weights and config disagree: missing transformer.blocks.2"):
        sharded.read_weights(written, OLMo(tiny_config(n_layers=3)))
    with pytest.raises(ValueError, match=r"step1: weights and config disagree: not expected transformer.blocks.1"):
        sharded.read_weights(written, OLMo(tiny_config(n_layers=1)))


def test_an_optimizer_that_keeps_something_else_says_what(written: Path, trained: Any) -> None:
    config = TrainConfig(model=tiny_config())  # lionw
    lion = build_optimizer(config.optimizer, OLMo(config.model))
    with pytest.raises(ValueError, match=r"holds exp_avg, exp_avg_sq, step of .* the optimizer keeps exp_avg; set"):
        checkpoint.load_optimizer_state(lion, checkpoint.read_optimizer_state(written, lion), "here")


# --- the thread that saves ---


def test_parts_that_lie_on_another_node_make_no_checkpoint(folder: Path) -> None:
    sharded.check_parts(folder)
    part = folder / "model_and_optim/__0_0.distcp"
    os.truncate(part, part.stat().st_size - 1)
    for lose in (lambda: None, part.unlink):
        lose()
        with pytest.raises(OSError, match=r"__0_0.distcp of another process is not .* save_folder must be one for all"):
            sharded.check_parts(folder)


def test_another_process_that_is_gone_is_no_damage(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(*_: Any, **__: Any) -> None:
        raise RuntimeError("[.../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer")

    monkeypatch.setattr(sharded.distributed_checkpoint, "load", closed)
    with pytest.raises(RuntimeError, match=r"gloo.*Connection closed by peer"):
        sharded.read_weights(written, OLMo(tiny_config()))


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory"), OSError("no such device"), ValueError("odd")])
def test_whatever_ends_a_run_of_one_process_a_save_that_has_begun_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    world, real, step = write_world(tmp_path / "world"), writing.save_sharded, TrainStep.run

    def slow(*arguments: Any) -> None:
        time.sleep(0.5)
        real(*arguments)

    def failing(train_step: TrainStep, batch: Any, number: int, *rest: Any) -> Any:
        if number == 3:
            raise error
        return step(train_step, batch, number, *rest)

    monkeypatch.setattr(writing, "save_sharded", slow)
    monkeypatch.setattr(TrainStep, "run", failing)
    with pytest.raises(type(error)):
        train(world / "plain.yaml", tmp_path / "run", "--save_interval=2")
    assert manifest.problem(tmp_path / "run" / "step2") is None and os.readlink(tmp_path / "run/latest") == "step2"
    assert f"error: {error}" in (tmp_path / "run" / "train.log").read_text()


def test_a_save_that_fails_leaves_nothing(tmp_path: Path, trained: Any) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(OSError, match=r"taken/step1: cannot be saved \(.*\); the checkpoints before it are intact"):
        saved(tmp_path / "taken" / "step1", trained)
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_a_save_names_what_the_system_answered(tmp_path: Path) -> None:
    """torch's own error, `unexpected pos 704 vs 598`, hides it where the stream is closed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    tensors = {f"model.{i}": torch.zeros(10_000) for i in range(20)}
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OSError, match=r"^File too large$"):
            sharded.write(tmp_path, tensors, Ranks())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the slow disk gets is what was there when the save began."""
    world, real, seen = write_world(tmp_path / "world"), writing.save_sharded, []

    def slow(folder: Path, *rest: Any) -> None:
        if folder.name == "step2":
            while len(metrics(tmp_path / "slow")) < 4:
                time.sleep(0.01)
            seen.append(len(metrics(tmp_path / "slow")))
        real(folder, *rest)

    train(world / "plain.yaml", tmp_path / "quick", "--save_interval=2")
    monkeypatch.setattr(writing, "save_sharded", slow)
    train(world / "plain.yaml", tmp_path / "slow", "--save_interval=2")
    assert seen == [4]  # by then; step 4, whose save waits for this one, has been done
    for step in ("step2", "step4", "step7"):
        one, other = (checkpoint.read_state(tmp_path / run / step) for run in ("quick", "slow"))
        assert all(one[name].equal(other[name]) for name in one)


# --- an index and parts that state more than there is ------------------------------------------------------------


def enlarge(folder: Path) -> None:
    """Every tensor gets 10^12 rows."""
    index = sharded.read_index(folder)
    for held in index.state_dict_metadata.values():
        held.size = torch.Size([10**12, *held.size[1:]])
    index_of(folder).write_bytes(pickle.dumps(index))


def compress(folder: Path) -> None:
    """A tensor's part is a zip archive whose pickle unpacks to 100 MB."""
    bomb(folder / "bomb", 10**8)
    content = (folder / "bomb").read_bytes()
    index = sharded.read_index(folder)
    with (folder / "model_and_optim/__0_0.distcp").open("ab") as part:
        for held in index.storage_data.values():
            held.offset, held.length = part.tell(), len(content)
        part.write(content)
    index_of(folder).write_bytes(pickle.dumps(index))


LIES: dict[str, Any] = {
    "larger than the parts": (enlarge, "its index has tensors of .* bytes, its files"),
    "a compressed part": (compress, "its records have more bytes than the file"),
    "a memo of 2^32 entries": (
        lambda folder: index_of(folder).write_bytes(b"\x80\x02Nr\xff\xff\xff\xff."),
        "not an index",
    ),
}


@pytest.mark.parametrize("kind", LIES)
def test_what_a_sharded_checkpoint_states_is_compared_with_its_files(folder: Path, kind: str) -> None:
    lie, expected = LIES[kind]
    lie(folder)
    before = time.monotonic()
    with pytest.raises(ValueError, match=expected) as caught:
        checkpoint.read_state(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value) and time.monotonic() - before < 5
