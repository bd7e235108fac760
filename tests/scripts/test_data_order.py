"""`scripts.data_order` and `get_dataorder.sh` against a server on this machine, by command line."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from olmo import net
from olmo.data.order import build_order
from olmo.exceptions import exit_status
from scripts import data_order
from tests.running import ROOT
from tests.serving import Server, serving

LENGTH, COUNTS = 4, (300, 0, 205)
COUNT = sum(COUNTS)
PLACE = "/train_data/global_indices.npy"
NOTE = "This order is rebuilt: OLMo's rule, applied to the files as they are now. Whether the run that the "

run = functools.partial(exit_status, data_order.main)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(net, "WAIT", 0.001)
    with serving() as server:
        server.add("/tokens", {f"{n}.npy": bytes(2 * (LENGTH * count + 1)) for n, count in enumerate(COUNTS)})
        yield server


def write_config(path: Path, place: str) -> Path:
    settings = {
        "seed": 6198,
        "model": {"max_sequence_length": LENGTH},
        "data": {"paths": [f"{place}/{{0..2}}.npy"], "drop_last": True},
        "global_train_batch_size": 8,
        "save_folder": "runs/none",
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(OmegaConf.create(settings), path)
    return path


@pytest.fixture
def config(server: Server, tmp_path: Path) -> Path:
    return write_config(tmp_path / "config.yaml", f"{server.url}/tokens")


def test_rebuild_from_the_sizes_alone(
    server: Server, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "order.npy"
    assert run(["rebuild", str(config), "--output", str(output)]) == 0
    assert output.read_bytes() == build_order(COUNT, 6198, 0).tobytes()
    shown = capsys.readouterr().out
    assert f"{output}: all 505 places, shuffled with seed 6198 + epoch 0; an epoch is 63 steps of 8\n{NOTE}" in shown
    assert len(server.heads) == 3 and not server.asked
    asked = ["--epoch", "2", "--world_size", "64", "--first", "7"]
    assert run(["rebuild", str(config), "--output", str(output), *asked]) == 2
    assert capsys.readouterr().err == f"error: {output}: already exists; delete it or choose another place\n"
    output.unlink()
    assert run(["rebuild", str(config), "--output", str(output), *asked]) == 0
    assert output.read_bytes() == build_order(COUNT, 6198, 2, 64)[:7].tobytes()
    assert "the first 7 of 448 places, shuffled with seed 6198 + epoch 2" in capsys.readouterr().out
    output.unlink()
    assert run(["rebuild", str(config), "--output", str(output), "--data.seed=5", "--epoch=1"]) == 0
    assert output.read_bytes() == build_order(COUNT, 6, 0).tobytes()
    assert len(server.heads) == 9 and not server.asked  # as the files are now


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("local")
    for number, count in enumerate(COUNTS):
        (folder / f"{number}.npy").write_bytes(bytes(2 * (LENGTH * count + 1)))
    config = write_config(folder / "config.yaml", str(folder))
    assert run(["rebuild", str(config), "--output", str(folder / "order.npy")]) == 0
    return folder


@settings(max_examples=20)
@given(first=st.integers(1, COUNT))
def test_a_slice_is_the_first_places_of_a_rebuilt_order(local: Path, first: int) -> None:
    config, places = str(local / "config.yaml"), ["--first", str(first)]
    order = ["--order", str(local / "order.npy")]
    for name in ("slice", "first"):
        (local / f"{name}.npy").unlink(missing_ok=True)
    assert run(["slice", config, *order, *places, "--output", str(local / "slice.npy")]) == 0
    assert run(["rebuild", config, *places, "--output", str(local / "first.npy")]) == 0
    expected = build_order(COUNT, 6198, 0)[:first].tobytes()
    assert (local / "slice.npy").read_bytes() == (local / "first.npy").read_bytes() == expected


def test_the_first_places_of_an_order(local: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Verified by their number; without it, an error that names the flag."""
    config, order = str(local / "config.yaml"), tmp_path / "first.npy"
    assert run(["rebuild", config, "--first", "90", "--output", str(order)]) == 0
    asked = ["verify", config, "--order", str(order)]
    capsys.readouterr()
    assert run([*asked, "--first", "90"]) == 0
    assert f"{order}: the first 90 places hold as many instances of the files; 3 files," in capsys.readouterr().out
    assert run(asked) == 1
    assert capsys.readouterr().err.endswith("(--world_size); of an order's beginning, give --first 90\n")
    assert run([*asked, "--first", "91"]) == 1
    assert capsys.readouterr().err == f"error: {order}: 90 places, --first asks for 91\n"
    places = np.fromfile(order, "<u4")
    places[70] = places[3]
    places.tofile(order)
    assert run([*asked, "--first", "90"]) == 1
    assert f"place 70 is instance {places[3]}, which came before" in capsys.readouterr().err


def test_more_ranks_than_instances(local: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["rebuild", str(local / "config.yaml"), "--output", str(tmp_path / "none.npy"), "--world_size", "506"]
    assert run(asked) == 2
    assert capsys.readouterr().err.startswith("error: --world_size 506: more ranks than instances (3 files")
    assert not list(tmp_path.iterdir())


def test_a_slice_of_a_remote_order(
    server: Server, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    built = build_order(COUNT, 6198, 0)
    url = server.add("/train_data", {"global_indices.npy": built.tobytes()}) + "global_indices.npy"
    argv = ["slice", str(config), "--order", url, "--first", "48", "--output", str(tmp_path / "slice.npy")]
    assert run(argv) == 0
    assert (tmp_path / "slice.npy").read_bytes() == built[:48].tobytes()
    assert server.sent(PLACE) == [192]
    assert capsys.readouterr().out == f"{tmp_path / 'slice.npy'}: the first 48 of 505 places of {url}\n"
    assert run(["verify", str(config), "--order", url]) == 0
    assert f"{url}: 505 places hold every instance of the files once; 3 files" in capsys.readouterr().out


def test_verify_names_what_is_wrong(
    server: Server, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a user met: a file is shorter than when the order was made."""
    build_order(COUNT + 100, 6198, 0).tofile(tmp_path / "order.npy")
    for mode in (["verify"], ["slice", "--first", "505", "--output", str(tmp_path / "slice.npy")]):
        assert run([*mode, str(config), "--order", str(tmp_path / "order.npy")]) == 1
        shown = capsys.readouterr()
        assert shown.err.count("\n") == 1 and "is instance" in shown.err and "the data set has 505" in shown.err
        assert f"the last {server.url}/tokens/2.npy of 1642 bytes" in shown.err
        if mode == ["verify"]:
            assert f"{server.url}/tokens/0.npy: 2402 bytes, instances 0 to 299\n" in shown.out
            assert f"{server.url}/tokens/1.npy: 2 bytes\n" in shown.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "config.yaml", "order.npy"]


@pytest.mark.parametrize(
    ("argv", "status", "said"),
    [
        ([], 2, "the following arguments are required"),
        (["arrange", "{config}"], 2, "invalid choice: 'arrange'"),
        (["rebuild", "{config}"], 2, "required: --output"),
        (["slice", "{config}", "--output", "out"], 2, "required: --first, --order"),
        (["verify", "{config}"], 2, "required: --order"),
        (["rebuild", "{config}", "--output", "out", "--first", "0"], 2, "--first must be at least 1"),
        (["rebuild", "{config}", "--output", "out", "--epoch", "-1"], 2, "--epoch must be at least 0"),
        (["rebuild", "{config}", "--output", "out", "--first", "506"], 2, "--first 506: the order has 505 places"),
        (["rebuild", "{config}", "--output", "out", "--order", "o"], 2, "expected --key.sub=value, got"),
        (["rebuild", "{config}", "--output", "out", "--data.paths=null"], 2, "data.paths: empty"),
        (["rebuild", "nowhere.yaml", "--output", "out"], 2, "nowhere.yaml"),
        (["slice", "{config}", "--order", "o.npy", "--first", "1", "--output", "out"], 1, "o.npy: no such data order"),
        (["rebuild", "{config}", "--output", "out", "--data.paths=['{url}/tokens/9.npy']"], 1, "9.npy: 404 Not Found"),
    ],
)
def test_a_mistake_is_one_line(
    server: Server,
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    argv: list[str],
    status: int,
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run([a.format(config=config, url=server.url) for a in argv]) == status
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ") and shown.err.count("\n") == 1 and said in shown.err and not shown.out
    assert not (tmp_path / "out").exists()


# --- get_dataorder.sh --------------------------------------------------------------------------------------------


@pytest.fixture
def root(server: Server, tmp_path: Path) -> Path:
    """The repository at another place, with official configurations that name the server of this test."""
    root = tmp_path / "root"
    root.mkdir()
    for name in ("scripts", "olmo"):
        (root / name).symlink_to(ROOT / name)
    write_config(root / "configs" / "official" / "OLMo-1B.yaml", f"{server.url}/tokens")
    OmegaConf.save({"1B": {"order": server.url + PLACE}}, root / "configs" / "official" / "checkpoints.yaml")
    return root


def get(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    inherited = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = ["bash", str(root / "scripts" / "get_dataorder.sh"), *arguments]
    return subprocess.run(command, env={**inherited, "PATH": path}, capture_output=True, text=True, cwd=root.parent)


TARGET = "data/global_indices/1B/global_indices.npy"


def test_the_published_order_is_fetched(server: Server, root: Path) -> None:
    published = np.random.default_rng(0).permutation(COUNT).astype("<u4")[:-1].tobytes()  # cut to a multiple of 8
    server.add("/train_data", {"global_indices.npy": published})
    done = get(root)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{TARGET}: as published at {server.url}{PLACE}\n"
    assert (root / TARGET).read_bytes() == published
    places = len(published) // 4
    assert f"already exists, {places:,} places; check it with: " in get(root).stdout
    assert len(server.sent(PLACE)) == 1 and [p.name for p in (root / TARGET).parent.iterdir()] == ["global_indices.npy"]


@pytest.mark.parametrize("why", ["it no longer exists", "it has 400 places for the 5,505 instances of the files"])
def test_an_order_that_is_gone_is_rebuilt_and_that_is_said(server: Server, root: Path, why: str) -> None:
    count = COUNT
    if "400" in why:
        server.add("/train_data", {"global_indices.npy": bytes(1600)})
        server.add("/tokens", {"2.npy": bytes(2 * LENGTH * 5205)})
        count = 5505
    done = get(root)
    assert done.returncode == 0
    first, second, third = done.stdout.splitlines()
    assert first == f"{server.url}{PLACE}: {why}; the order is rebuilt from configs/official/OLMo-1B.yaml"
    assert second.startswith(f"{TARGET}: all {count:,} places, shuffled with seed 6198 + epoch 0") and NOTE in third
    assert (root / TARGET).read_bytes() == build_order(count, 6198, 0).tobytes()


def test_a_server_that_fails_is_no_lost_file(server: Server, root: Path) -> None:
    server.failures[f"HEAD {PLACE}"] = [500]
    done = get(root)
    assert done.returncode == 1 and not (root / "data").exists()
    assert done.stderr == (
        f"error: {server.url}{PLACE}: 500 Internal Server Error; try again later, or rebuild it with --rebuild\n"
    )
    assert get(root, "--rebuild").returncode == 0
    assert (root / TARGET).read_bytes() == build_order(COUNT, 6198, 0).tobytes()
