"""`scripts/get_model.sh` against an old checkpoint site: what arrives, what does not exist, which steps are known."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from analysis.locations import FOLDERS
from olmo import checkpoint
from olmo.config import TrainConfig
from scripts import get_model
from tests.fetching import CONFIG, FOLDER, HUB_ID, MODEL, WEIGHTS, files, finish, run, start, the_error, tiny_model
from tests.running import wait_for
from tests.serving import Server


def test_a_folder_of_the_site_lands_where_the_analysis_looks_and_loads(
    root: Path, tmp_path: Path, server: Server
) -> None:
    model = tiny_model()
    TrainConfig(model=model.config).save(tmp_path / "config.yaml")
    torch.save(model.state_dict(), tmp_path / "model.pt")
    names = ("config.yaml", "model.pt")
    url = server.add(FOLDER, {name: (tmp_path / name).read_bytes() for name in names})
    server.add(FOLDER, {"train.pt": b"training", "optim.pt": b"moments"})
    status, stdout, stderr = finish(start(root, server, url))
    assert (status, stderr) == (0, "")
    folder = root / FOLDERS["1B"] / "738020-unsharded"
    assert f"{FOLDERS['1B']}/738020-unsharded: 3 of 3 files" in stdout
    assert files(folder) == {*names, "train.pt"}
    loaded = checkpoint.load_model(folder, torch.device("cpu")).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())


def test_the_environment_of_the_repository_comes_first(root: Path, server: Server) -> None:
    python = root / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "$PWD:$@"\n')
    python.chmod(0o755)
    assert finish(start(root, server, "a b", "--list"))[1] == f"{root}:-m scripts.get_model a b --list\n"


def test_killed_in_the_middle_it_continues(root: Path, tmp_path: Path, server: Server, url: str) -> None:
    server.stall = {MODEL: 5 * 2**19}  # in the third of four pieces
    output = tmp_path / "output"
    process = start(root, server, url, f"--output={output}")
    wait_for(lambda: any(p.stat().st_size == 5 * 2**19 for p in output.glob(".model.pt.*.partial")), process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert {name[0] for name in files(output)} == {"."}, "an incomplete checkpoint has no files under their names"
    server.stall = {}
    server.asked.clear()
    status, _, stderr = finish(start(root, server, url, f"--output={output}"))
    assert (status, stderr) == (0, "")
    assert files(output) == {"config.yaml", "model.pt"}
    assert (output / "model.pt").read_bytes() == WEIGHTS
    assert server.sent(MODEL) == [len(WEIGHTS) - 5 * 2**19]
    assert server.sent(f"{FOLDER}/config.yaml") == [], "what had come whole does not come again"


def test_safetensors_are_preferred(tmp_path: Path, server: Server, url: str) -> None:
    server.add(FOLDER, {"model.safetensors": b"tensors"})
    assert run([url, f"--output={tmp_path}"]) == 0
    assert files(tmp_path) == {"config.yaml", "model.safetensors"}


@pytest.mark.parametrize("name", ["optim.pt", "optim.safetensors"])
def test_the_optimizers_state_comes_on_demand(
    name: str, tmp_path: Path, server: Server, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([url, f"--output={tmp_path}", "--with_optimizer"]) == 1
    assert "no optimizer state" in the_error(capsys) and not files(tmp_path)
    server.add(FOLDER, {name: b"moments"})
    assert run([url, f"--output={tmp_path}", "--with_optimizer"]) == 0
    assert files(tmp_path) == {"config.yaml", "model.pt", name}


@pytest.mark.parametrize(
    ("folder", "named"),
    [
        (FOLDER, f"try the hub: bash scripts/get_model.sh {HUB_ID}"),
        ("/ai2-llm/olmo-medium/p067ktg9/step557000-unsharded", "allenai/OLMo-7B@step557000-tokens2464B"),
        ("/ai2-llm/olmo-small/w1r5xfzt/step1000-unsharded", "nearest known one is allenai/OLMo-1B@step20000-tokens84B"),
        ("/elsewhere/step738020-unsharded", "scripts/get_model.sh --list"),
    ],
)
@pytest.mark.parametrize("has", ["nothing", "config alone", "a page for everything", "no server"])
def test_what_the_site_has_not_is_on_the_hub(
    folder: str, named: str, has: str, tmp_path: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"{server.url}{folder}"
    if has == "config alone":
        server.add(folder, {"config.yaml": CONFIG})
    if has == "a page for everything":
        server.add(folder, {"config.yaml": b"<p>", "model.pt": b"<p>"}, **{"Content-Type": "text/html; charset=utf-8"})
    if has == "no server":
        url = f"http://127.0.0.1:9{folder}"  # the port that discards everything, hardly open anywhere
    assert run([url, f"--output={tmp_path / 'output'}"]) == 1
    error = the_error(capsys)
    assert error.startswith(f"error: {url}/: ") and named in error
    assert ("Connection refused" if has == "no server" else "404") in error
    assert not files(tmp_path)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["738020"],
        ["ftp://olmo-checkpoints.org/ai2-llm/olmo-small/g4g72enr/step738020-unsharded/"],
        ["https://example.org/olmo/step5-unsharded/"],
        ["https://olmo-checkpoints.org/ai2-llm/olmo-small/g4g72enr/"],
        ["allenai/OLMo-1B"],
        ["allenai/OLMo-1B@main"],
        ["allenai/OLMo-1B-0724-hf@step1000-tokens2B"],  # another model: its step 1000 is not ours
        [HUB_ID, "--outptu=x"],
    ],
)
def test_a_wrong_command_line_is_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 2
    the_error(capsys)


def test_the_list_has_one_line_a_step(root: Path, server: Server) -> None:
    status, stdout, stderr = finish(start(root, server, "--list"))
    assert (status, stderr) == (0, "")
    header = [line for line in stdout.splitlines() if line.startswith("#")]
    assert "computed" in " ".join(header)
    rows = [line.split() for line in stdout.splitlines() if not line.startswith("#")]
    assert {len(row) for row in rows} == {4}
    assert [sum(row[0] == name for row in rows) for name in ("1B", "7B")] == [351, 527]
    site = "https://olmo-checkpoints.org/ai2-llm/olmo-small"
    assert ["1B", "738020", f"{site}/g4g72enr/step738020-unsharded/", HUB_ID] in rows
    for name, step, url, hub_id in rows:
        for address in {url, hub_id} - {"-"}:
            model, found = get_model.locate(address)
            assert model is get_model.known_models()[name] and found == int(step)


# Revisions of the hub, as public programs name them; some are near the middle between two numbers of tokens.
@pytest.mark.parametrize(
    ("model", "revisions"),
    [
        ("1B", ["step20000-tokens84B", "step332000-tokens1393B", "step404000-tokens1694B", "step738020-tokens3095B"]),
        ("7B", ["step1000-tokens4B", "step72000-tokens319B", "step452000-tokens2000B", "step557000-tokens2464B"]),
    ],
)
def test_revisions_are_those_of_the_hub(model: str, revisions: list[str]) -> None:
    known = get_model.known_models()[model]
    steps = [int(revision.partition("-")[0].removeprefix("step")) for revision in revisions]
    assert [known.hub_id(step) for step in steps] == [f"allenai/OLMo-{model}@{revision}" for revision in revisions]


def test_the_list_can_be_cut_short(root: Path, server: Server) -> None:
    process = start(root, server, "--list")
    assert process.stdout and process.stdout.readline().startswith("#")
    process.stdout.close()
    assert process.stderr and process.stderr.read() == ""
    assert process.wait() == 0


def test_checkpoints_go_where_the_analysis_looks() -> None:
    assert {name: Path(model.folder) for name, model in get_model.known_models().items()} == FOLDERS
