"""`python -m analysis.score` from end to end, against what a run writes of its starting point, and by hand."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

from analysis import score, scores
from analysis.runs import read_run
from olmo import checkpoint
from olmo.exceptions import exit_status
from olmo.memory.rescaling import Multipliers
from olmo.tokenizer import load_tokenizer
from tests.reference import by_layer, to_transformers
from tests.running import CPU, LENGTH, SHORT, command, configure, metrics, train, write_family, write_world
from tests.serving import hub_serving

START = ("--reset_optimizer_state", "--reset_trainer_state", "--eval_on_load", "--stop_at=0")
COMMIT = "c" * 40


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints in `pre`, and its knowledge under the names of a folder of fictional knowledge."""
    folder = write_world(tmp_path_factory.mktemp("world"))
    for setting in ("paraphrase", "once"):
        shutil.copy(folder / f"{setting}.json", folder / f"fictional_knowledge_{setting}.json")
    train(folder / "plain.yaml", folder / "pre", "--max_duration=2", "--save_interval_unsharded=1")
    return folder


@pytest.fixture(scope="module")
def start(world: Path) -> Path:
    return world / "pre/step2-unsharded"


def run(*argv: object) -> int:
    return exit_status(score.main, [str(a) for a in argv])


def knowledge(world: Path) -> tuple[object, ...]:
    return "--knowledge", world, "--sequence_length", LENGTH, "--batch_size", 4


def asked(world: Path, **more: str) -> list[str]:
    """The evaluators that `knowledge` stands for, and others, as an override of a run."""
    kinds = ("memorization", "semantic", "composition")
    probes = [(s, k) for s in ("paraphrase", "once") for k in kinds]
    found = [f"{{label: {s}_{k}, data: {{dataset_path: {world}/{s}.json}}}}" for s, k in probes]
    found += [f"{{label: {label}, {rest}}}" for label, rest in more.items()]
    return ["--evaluators=[" + ", ".join(found) + "]"]


def first_evaluation(folder: Path) -> tuple[dict[str, Any], list[dict[str, list[Any]]]]:
    """Metrics and tables of the only evaluation in a folder, without its step."""
    [line] = metrics(folder)
    tables = [pyarrow.parquet.read_table(p).drop_columns("step") for p in sorted(folder.glob("*/*.parquet"))]
    assert {p.stem for p in folder.glob("*/*.parquet")} == {f"step{line.pop('step')}"}
    return line, [table.to_pydict() for table in tables]


def result_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "score.json").read_text())


def test_the_evaluators_of_a_configuration_as_a_run_evaluates_its_start(world: Path, start: Path) -> None:
    config, out = world / "config.yaml", world / "as"
    train(config, world / "zero", f"--load_path={start}", *START)
    assert run(start, "--config", config, "--output", out) == 0
    assert first_evaluation(out) == first_evaluation(world / "zero")
    assert result_in(out)["metrics"] == first_evaluation(out)[0]
    about = result_in(out)["checkpoint"]
    assert about["path"] == str(start) and about["step"] == 2 and len(about["fingerprint"]) == 64


def test_flags_as_a_run_with_these_evaluators(world: Path, start: Path) -> None:
    pytest.importorskip("olmo_eval")
    held_out, out = world / f"heldout{LENGTH}.npy", world / "flags"
    evaluators = asked(world, held=f"data: {{paths: [{held_out}]}}", copa="type: downstream, subset_num_batches: 3")
    train(world / "config.yaml", world / "zero-flags", f"--load_path={start}", *START, *evaluators)
    argv = (start, *knowledge(world), "--held_out", f"held={held_out}", "--output", out)
    assert run(*argv, "--tasks", "copa", "--limit", 10) == 0
    assert first_evaluation(out) == first_evaluation(world / "zero-flags")


def test_k_and_k_published_by_their_formulas(world: Path, start: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Over the metrics that are those of a run: 3 entries of each setting."""
    out = world / "k"
    assert run(start, *knowledge(world), "--output", out) == 0
    found, [line] = result_in(out)["knowledge"], metrics(out)
    kinds = ("memorization", "semantic", "composition")
    for setting in ("paraphrase", "once"):
        losses = [line[f"eval/{setting}_{kind}/CrossEntropyLoss"] for kind in kinds]
        assert found[f"K_published_{setting}"] == pytest.approx(-sum(losses) / 3, rel=1e-12)
        assert found[f"K_{setting}"] == pytest.approx(line[f"eval/K_{setting}"], rel=1e-12)
    ks = ["K", "K_published", "K_paraphrase", "K_once", "K_published_paraphrase", "K_published_once"]
    head, line_of_start = capsys.readouterr().out.splitlines()
    assert head.split() == ["checkpoint", "step", *ks]
    assert line_of_start.split()[2:] == [f"{found[name]:.4f}" for name in ks]
    both = (found["K_published_paraphrase"] + found["K_published_once"]) / 2
    assert found["K_published"] == pytest.approx(both, rel=1e-12)
    assert found["K"] == pytest.approx(line["eval/K"], rel=1e-12)


def test_a_probe_by_hand(world: Path, start: Path) -> None:
    """The published model class of transformers, one probe, without padding."""
    out = world / "hand"
    assert run(start, *knowledge(world), "--output", out) == 0
    table = pyarrow.parquet.read_table(out / "probes/step2.parquet").to_pylist()
    [row] = [r for r in table if (r["setting"], r["entry"], r["kind"], r["index"]) == ("once", 1, "semantic", 3)]
    entry = json.loads((world / "once.json").read_text())[1]
    tokenizer = load_tokenizer(str(world / "tokenizer.json"))
    given, target = entry["gen_input"][3], entry["gen_target"][3]
    prompt, whole = tokenizer.encode(given).ids, tokenizer.encode(f"{given} {target}").ids
    model = to_transformers(checkpoint.load_model(start, CPU))
    with torch.no_grad():
        log_probs = model(torch.tensor([whole])).logits[0, :-1].log_softmax(-1)
    of_target = [log_probs[t - 1, whole[t]].item() for t in range(len(prompt), len(whole))]
    assert len(of_target) == row["tokens"]
    assert row["mean_log_prob"] == pytest.approx(sum(of_target) / len(of_target), rel=1e-5)


def test_edits_and_temperatures_as_a_run_that_starts_with_them(world: Path, start: Path, tmp_path: Path) -> None:
    edit = tmp_path / "edit.safetensors"
    factors = by_layer(1.0 + 2.0 * (torch.arange(96) % 2).view(2, 48))
    marked = {number: values != 1 for number, values in factors.items()}
    Multipliers(factors, marked, {"checkpoint_fingerprint": checkpoint.identity_of(start)}).save(edit)
    argv, flags = (start, *knowledge(world)), (f"--load_path={start}", *START, *asked(world))
    train(world / "config.yaml", tmp_path / "edited", *flags, f"--model.resuscitation={edit}")
    assert run(*argv, "--resuscitation", edit, "--output", tmp_path / "scores") == 0
    # The run evaluates the original weights too.
    ours, theirs = metrics(tmp_path / "scores")[0], metrics(tmp_path / "edited")[1]
    assert {**ours, "step": 0} == theirs
    train(world / "config.yaml", tmp_path / "hot", *flags, "--model.temperature_attention=2.0")
    assert run(*argv, "--temperature_attention", 2, "--output", tmp_path / "warm") == 0
    assert first_evaluation(tmp_path / "warm") == first_evaluation(tmp_path / "hot")
    divisors = tmp_path / "divisors.safetensors"
    save_file({"temperature_MLP": 1.0 + torch.arange(96).view(2, 48) / 96}, divisors)
    train(world / "config.yaml", tmp_path / "flat", *flags, f"--model.temperature_MLP={divisors}")
    assert run(*argv, "--temperature_MLP", divisors, "--output", tmp_path / "wide") == 0
    assert first_evaluation(tmp_path / "wide") == first_evaluation(tmp_path / "flat")
    assert len({metrics(tmp_path / name)[0]["eval/K"] for name in ("scores", "warm", "wide")}) == 3


def test_another_family_as_its_run(world: Path, tmp_path: Path) -> None:
    config = write_family(write_world(tmp_path), "Pythia")
    train(config, tmp_path / "run", "--eval_on_load", "--stop_at=0", "--precision=amp_bf16")
    argv = (tmp_path / "model", "--output", tmp_path / "out", "--config")
    amp = tmp_path / "amp.yaml"
    amp.write_text(f"base: {config}\nprecision: amp_bf16\n")
    assert run(*argv, amp) == 0
    assert first_evaluation(tmp_path / "out") == first_evaluation(tmp_path / "run")
    assert run(tmp_path / "model", "--config", config, "--temperature_attention", 2, "--output", tmp_path / "t") == 1


def test_several_with_one_that_fails(
    world: Path, start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = tmp_path / "run"
    shutil.copytree(start, folders / "step2-unsharded")
    shutil.copytree(start, folders / "step10-unsharded")
    (folders / "step10-unsharded/model.safetensors").write_bytes(b"damaged")
    shutil.copytree(world / "pre/step1-unsharded", folders / "step30-unsharded")
    built: list[int] = []
    real = scores.Evaluators.run
    monkeypatch.setattr(scores.Evaluators, "run", lambda *a, **k: built.append(id(a[0])) or real(*a, **k))
    argv = (folders / "step*", "--held_out", f"x={world}/heldout{SHORT}.npy", "--output", tmp_path / "out")
    assert run(*argv) == 1
    shown = capsys.readouterr()
    assert "step10-unsharded" in shown.err and "error: 1 of 3 could not be" in shown.err
    head, *lines = shown.out.splitlines()
    assert head.split() == ["checkpoint", "step", "loss", "x"]
    assert [line.split()[:2] for line in lines] == [["step2-unsharded", "2"], ["step30-unsharded", "30"]]
    with (tmp_path / "out/scores.csv").open() as file:
        table = list(csv.DictReader(file))
    losses = [metrics(tmp_path / f"out/step{n}-unsharded")[0]["eval/x/CrossEntropyLoss"] for n in (2, 30)]
    assert [row["loss x"] for row in table] == [str(x) for x in losses] and lines[1].split()[2] == f"{losses[1]:.4f}"
    assert len(built) == 2 and len(set(built)) == 1  # the evaluators of the first serve the second

    shutil.copy(start / "model.safetensors", folders / "step10-unsharded")
    assert run(*argv) == 0 and len(built) == 3
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()[1:]] == [
        [f"step{n}-unsharded", str(n)] for n in (2, 10, 30)
    ]


def test_checkpoints_of_two_contexts_are_scored_as_each_alone(world: Path, start: Path, tmp_path: Path) -> None:
    """The evaluators of one do not serve the other."""
    longer = tmp_path / "step9"
    shutil.copytree(start, longer)
    about = OmegaConf.load(longer / "config.yaml")
    about.model.max_sequence_length = LENGTH
    OmegaConf.save(about, longer / "config.yaml")
    argv = ("--held_out", f"x={world}/heldout{LENGTH}.npy", "--output")
    assert run(start, longer, *argv, tmp_path / "both") == 0
    for folder, instances in ((start, 5 * LENGTH // SHORT), (longer, 5)):
        assert run(folder, *argv, tmp_path / "alone" / folder.name) == 0
        evaluations = [first_evaluation(tmp_path / name / folder.name) for name in ("both", "alone")]
        assert evaluations[0] == evaluations[1] and len(evaluations[0][1][0]["loss"]) == instances


def test_a_checkpoint_replaced_while_it_is_scored_gives_no_result(
    world: Path, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, weights = tmp_path / "step2", "model.safetensors"
    shutil.copytree(start, folder)
    real = scores.Evaluators.run

    def replacing(*args: Any, **named: Any) -> Any:
        shutil.copy(world / "pre/step1-unsharded" / weights, folder)
        return real(*args, **named)

    monkeypatch.setattr(scores.Evaluators, "run", replacing)
    argv = (folder, "--held_out", f"x={world}/heldout{SHORT}.npy", "--output", tmp_path / "out")
    assert f"{folder}: replaced while it was scored; nothing is kept" in refused(capsys, 1, *argv)
    assert not (tmp_path / "out").exists()


def refused(capsys: pytest.CaptureFixture[str], status: int, *argv: object) -> str:
    capsys.readouterr()
    assert run(*argv) == status
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ") and shown.err.count("\n") == 1 and not shown.out
    return shown.err


def test_scores_of_something_else_are_only_replaced_on_request(
    world: Path, start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    argv = (start, *knowledge(world), "--output", out)
    assert run(*argv) == 0
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    remedy = "; name another --output, or replace it: --overwrite\n"

    def kept(*changed: object, status: int = 2) -> str:
        line = refused(capsys, status, *changed, "--output", out)
        assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before and line.endswith(remedy)
        return line

    assert "has scores of paraphrase_memorization in batches of another size" in kept(start, *knowledge(world)[:-1], 5)
    assert "precision fp32, not amp_bf16" in kept(*argv, "--precision", "amp_bf16")
    assert f"belongs to other weights, of {start}" in kept(world / "pre/step1-unsharded", *knowledge(world))
    other = tmp_path / "other"
    other.mkdir()
    (other / "fictional_knowledge_once.json").write_text(json.dumps(json.loads((world / "once.json").read_text())[:2]))
    assert "has scores of once_memorization from other data" in kept(start, "--knowledge", other, *knowledge(world)[2:])
    held = ("--held_out", f"held={world}/heldout{LENGTH}.npy")
    lacking = kept(start, *held, *knowledge(world)[2:])
    assert "has scores of paraphrase_memorization, which are not asked for, and lacks held" in lacking
    line = refused(capsys, 2, start, *knowledge(world), "--output", world / "pre", "--overwrite")
    assert "holds a run (metrics.jsonl); name another --output" in line  # or its checkpoints would be deleted

    # The same scores and more of them, and the same after a command that was killed.
    assert run(*argv, *held) == 0 and "eval/held/CrossEntropyLoss" in result_in(out)["metrics"]
    found = result_in(out)
    (out / "score.json").write_text(json.dumps({k: v for k, v in found.items() if k != "metrics"}))
    assert run(*argv) == 0 and result_in(out)["metrics"].keys() < found["metrics"].keys()
    assert run(*argv, "--precision", "amp_bf16", "--overwrite") == 0 and result_in(out)["precision"] == "amp_bf16"


def test_beside_the_checkpoint(start: Path, world: Path, tmp_path: Path) -> None:
    folder = tmp_path / start.name
    shutil.copytree(start, folder)
    assert run(folder, *knowledge(world)) == 0
    assert result_in(folder / "scores")["checkpoint"]["fingerprint"] == checkpoint.identity_of(start)


@pytest.mark.parametrize(
    ("argv", "status", "expected"),
    [
        ([], 2, "nothing to score: give --knowledge, --tasks, --held_out, or --config"),
        (["--knowledge", "none"], 2, "--knowledge: no fictional knowledge in none (expected any of fictional_"),
        (["--knowledge", "empty"], 2, "--knowledge: no entry of empty/fictional_knowledge_once.json has probes"),
        (["--tasks", "piqqa"], 2, "--tasks: olmo_eval has no task 'piqqa', did you mean 'piqa'?"),
        (["--held_out", "x.npy"], 2, "--held_out: expected LABEL=FILE, got 'x.npy'"),
        (["--held_out", "x=x.npy"], 2, "--held_out: x.npy: no such token file"),
        (["--tasks", "copa", "--limit", "0"], 2, "--limit must be at least 1"),
        (["--held_out", "x=x.npy", "--limit", "3"], 2, "--limit: needs --tasks"),
        (["--config", "c.yaml", "--limit", "3"], 2, "--limit: --config decides it; give one of the two"),
        (["--knowledge", ".", "--resuscitation", "e"], 2, "--resuscitation: needs --output"),
        (
            ["--knowledge", ".", "--temperature_attention", "0"],
            2,
            "--temperature_attention 0 must be above 0 and finite",
        ),
        (["--knowledge", ".", "--sequence_length", "8"], 1, "a probe of "),
        (["--knowledge", ".", "--tokenizer", "none.json"], 1, "none.json: no such tokenizer file or folder"),
    ],
)
def test_mistakes_in_one_line(
    world: Path,
    start: Path,
    tmp_path: Path,
    argv: Sequence[str],
    status: int,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("olmo_eval")
    monkeypatch.chdir(world)
    (world / "empty").mkdir(exist_ok=True)
    entry = {**json.loads((world / "once.json").read_text())[0]}
    entry |= {f"{kind}_{part}": [] for kind in ("mem", "gen", "hard_gen") for part in ("input", "target")}
    (world / "empty/fictional_knowledge_once.json").write_text(json.dumps([entry]))
    output = [] if "--resuscitation" in argv else ["--output", tmp_path / "out"]
    assert expected in refused(capsys, status, start, *argv, *output)
    assert not (tmp_path / "out").exists()


def test_a_revision_of_the_hub(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published = tmp_path / "published"
    to_transformers(checkpoint.load_model(world / "pre/step2-unsharded", CPU)).save_pretrained(published)
    shutil.copy(world / "tokenizer.json", published)
    with hub_serving(tmp_path / "hub", monkeypatch) as server:
        files = {path.name: path.read_bytes() for path in published.iterdir()}
        server.add_hub_model("owner/name", "step7-tokens7B", files, COMMIT)
        argv = ("owner/name@step7-tokens7B", *knowledge(world), "--output", tmp_path / "out", "--keep", "none")
        assert run(*argv) == 0 and not (tmp_path / "out/.download").exists()
        about = result_in(tmp_path / "out")["checkpoint"]
        assert (about["step"], about["commit"], about["tokens"]) == (7, COMMIT, 7 * 10**9)
        server.asked.clear()
        assert run(*argv) == 0
        assert not [asked for asked in server.asked if asked.path.endswith(".safetensors")]


def test_several_processes_share_the_work(world: Path, start: Path, tmp_path: Path) -> None:
    argv = (start, *knowledge(world), "--held_out", f"held={world}/heldout{LENGTH}.npy", "--device", "cpu", "--output")
    assert run(*argv, tmp_path / "one") == 0
    done = command(["-m", "analysis.score", *map(str, argv), str(tmp_path / "two")], tmp_path, processes=2)
    assert done.returncode == 0, done.stderr
    one, two = (result_in(tmp_path / name)["metrics"] for name in ("one", "two"))
    assert one.keys() == two.keys() and one == pytest.approx(two, rel=1e-6)


def test_a_run_is_compared_with_the_scores_of_its_start(
    world: Path, start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As with an evaluation of its own before the first step."""
    flags = (f"--load_path={start}", *START[:2], "--max_duration=1", "--eval_interval=1", "--injection=null")
    train(world / "config.yaml", tmp_path / "with", *flags, "--eval_on_load")
    train(world / "config.yaml", tmp_path / "without", *flags)
    assert run(start, "--config", world / "config.yaml", "--output", tmp_path / "scores") == 0
    one, other = read_run(tmp_path / "with"), read_run(tmp_path / "without", tmp_path / "scores")
    assert one.before.means() == other.before.means() and one.after.means() == other.after.means()
    assert (one.first_step, one.step, one.curve) == (other.first_step, other.step, other.curve)
    assert [[(s, v.tolist()) for s, v in pair] for pair in one.losses.values()] == [
        [(s, v.tolist()) for s, v in pair] for pair in other.losses.values()
    ]
    with pytest.raises(ValueError, match="was evaluated at step 0, before training; leave out --before"):
        read_run(tmp_path / "with", tmp_path / "scores")
    about = result_in(tmp_path / "scores")
    of_another = {**about, "checkpoint": {**about["checkpoint"], "path": str(world / "pre/step1-unsharded")}}
    (tmp_path / "scores/score.json").write_text(json.dumps(of_another))
    with pytest.raises(ValueError, match=r"step1-unsharded, but the run .* started from .*step2-unsharded"):
        read_run(tmp_path / "without", tmp_path / "scores")
    (tmp_path / "scores/score.json").write_text(json.dumps(about))
    with pytest.raises(FileNotFoundError, match="no scores here"):
        read_run(tmp_path / "without", tmp_path)
    edited = configure(world / "config.yaml", tmp_path / "without", *flags, "--model.resuscitation=edit.safetensors")
    edited.save(tmp_path / "without/config.yaml")
    with pytest.raises(ValueError, match=r"scored without resuscitation, but the run .* started with it"):
        read_run(tmp_path / "without", tmp_path / "scores")
