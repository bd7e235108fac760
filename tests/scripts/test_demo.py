"""The demo: which stages run, what they are told, what is remembered."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from analysis import change_parameters, entropy
from analysis.runs import TASKS
from olmo.config import TrainConfig, load
from olmo.exceptions import exit_status
from scripts import demo, make_fictional_knowledge
from scripts.prepare import demo_text, stages
from scripts.prepare.stages import Stages

command = functools.partial(exit_status, demo.main)
ROOT = Path(__file__).resolve().parents[2]
CONDITIONS = {"early": 90, "middle": 450, "last": 720, "last_q1": 720, "last_q2": 720, "last_control": 720}


# --- stages: real processes that take no time --------------------------------------------------------------------


@pytest.fixture
def world(tmp_path, monkeypatch) -> Path:
    """A folder in which `python -m stage FILE [STATUS]` adds a line to FILE and ends with that status."""
    (tmp_path / "stage.py").write_text(
        "import sys\n"
        "with open(sys.argv[1], 'a') as file:\n"
        "    file.write('ran ' + ' '.join(sys.argv[2:]) + '\\n')\n"
        "sys.exit(int(sys.argv[2]) if sys.argv[2:] else 0)\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def runs_of(file: str) -> int:
    return Path(file).read_text().count("ran") if Path(file).is_file() else 0


def test_a_finished_stage_is_not_run_again(world, capfd):
    for _ in range(2):
        Stages(world, 1, "tiny").run("first", "stage", ["out"], Path("out"))
    assert runs_of("out") == 1
    lines = capfd.readouterr().out.splitlines()
    assert lines[0] == "[1/1] first: python -m stage out" and lines[1].startswith("[1/1] first: done before, in 0:")


def test_a_stage_whose_output_is_gone_is_run_again(world):
    for _ in range(2):
        Stages(world, 1, "tiny").run("first", "stage", ["log"], Path("log"))
        Path("log").rename("gone")
    assert runs_of("gone") == 1
    Stages(world, 1, "tiny").run("first", "stage", ["log"], Path("log"))
    assert runs_of("log") == 1


def test_a_stage_whose_command_changed_is_run_again(world):
    Stages(world, 1, "tiny").run("first", "stage", ["out"], Path("out"))
    for _ in range(2):
        Stages(world, 1, "tiny").run("first", "stage", ["out", "0"], Path("out"))
    assert runs_of("out") == 2
    [stage] = json.loads((world / "demo.json").read_text())["stages"]  # the older one is forgotten
    assert stage["command"] == ["python", "-m", "stage", "out", "0"]


def test_output_that_nothing_vouches_for_is_made_anew(world):
    """It may be half of what another, interrupted process wanted to write."""
    Path("out").write_text("something\n")
    Stages(world, 1, "tiny").run("first", "stage", ["out"], Path("out"))
    assert runs_of("out") == 1


@pytest.mark.parametrize("name", ["first", "first, seed 0"])
def test_what_another_command_may_have_overwritten_is_made_anew(world, name):
    """The same output under another command, which failed half way: the first command's work is gone."""
    Stages(world, 1, "tiny").run("first", "stage", ["out"], Path("out"))
    with pytest.raises(ValueError):
        Stages(world, 1, "tiny").run(name, "stage", ["out", "3"], Path("out"))
    Stages(world, 1, "tiny").run("first", "stage", ["out"], Path("out"))
    assert runs_of("out") == 3


def test_a_failed_stage_stops_with_its_name_and_status_and_is_not_remembered(world):
    stages = Stages(world, 2, "tiny")
    stages.run("first", "stage", ["one"], Path("one"))
    with pytest.raises(ValueError, match="stage 'second' failed with status 3: python -m stage two 3"):
        stages.run("second", "stage", ["two", "3"], Path("two"))
    assert [s["name"] for s in json.loads((world / "demo.json").read_text())["stages"]] == ["first"]
    with pytest.raises(ValueError, match="failed with status 3"):  # its output is there, and yet it is no success
        Stages(world, 2, "tiny").run("second", "stage", ["two", "3"], Path("two"))


def test_a_stage_that_is_killed_has_failed(world):
    (world / "killed.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    with pytest.raises(ValueError, match="stage 'x' failed with status -9"):
        Stages(world, 1, "tiny").run("x", "killed", [], world)


@pytest.mark.parametrize("end", [os.killpg, os.kill])
def test_an_interrupted_demo_ends_after_its_stage(world, end):
    """Ctrl-C reaches all processes of a terminal's foreground, SIGTERM only the demo. The stage ends its work."""
    sent, status, said = (signal.SIGINT, 130, "interrupted") if end is os.killpg else (signal.SIGTERM, 143, "SIGTERM")
    (world / "slow.py").write_text(
        "import signal, time\n"
        "signal.signal(signal.SIGTERM, signal.default_int_handler)\n"
        "try:\n    open('began', 'w').close()\n    time.sleep(60)\n"
        "except KeyboardInterrupt:\n    time.sleep(0.5)\n    open('ended', 'w').close()\n"
    )
    (world / "main.py").write_text(
        "import sys\nfrom pathlib import Path\n"
        "from olmo.exceptions import exit_status\nfrom scripts.prepare.stages import Stages\n"
        "sys.exit(exit_status(lambda argv: Stages(Path('.'), 1, 'tiny').run('slow', 'slow', [], Path('.'))))\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{world}"}
    with open("stderr", "w") as stderr:
        run = subprocess.Popen([sys.executable, "main.py"], env=environment, start_new_session=True, stderr=stderr)
    until = time.monotonic() + 60
    while not Path("began").exists() and time.monotonic() < until:
        time.sleep(0.05)
    end(run.pid, sent)
    assert run.wait(timeout=60) == status
    assert Path("ended").exists()
    assert Path("stderr").read_text().endswith(f"{said}\n")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"stages": 3}'])
def test_a_damaged_manifest_is_named(world, content):
    (world / "demo.json").write_text(content)
    with pytest.raises(ValueError, match=r"demo\.json: damaged: .*; remove it, and all stages run again"):
        Stages(world, 1, "tiny")


def test_time_and_memory_of_a_stage_are_its_own(world):
    """Not the largest of all children so far, and not this program's: a process counts what its parent held when it
    began, so this program must stay small, without torch."""
    (world / "large.py").write_text(
        "import time\nx = bytearray(300 * 2**20)\nx[::4096] = b'1' * len(x[::4096])\ntime.sleep(0.2)\n"
    )
    (world / "main.py").write_text(
        "from pathlib import Path\nfrom scripts.prepare.stages import Stages\nstages = Stages(Path('.'), 2, 'tiny')\n"
        "stages.run('large', 'large', [], Path('.'))\nstages.run('small', 'stage', ['out'], Path('out'))\n"
    )
    path = {"PYTHONPATH": f"{ROOT}{os.pathsep}{world}"}
    subprocess.run([sys.executable, "main.py"], check=True, env={**os.environ, **path})
    large, small = json.loads((world / "demo.json").read_text())["stages"]
    assert large["seconds"] >= 0.2
    assert 300 < large["peak_memory_mib"] < 400 and small["peak_memory_mib"] < 100


def test_the_manifest_is_written_whole_or_not_at_all(world, monkeypatch):
    """A full disk leaves the old one as it was: the new one is written beside it and takes its name when whole."""
    stages = Stages(world, 1, "tiny")
    stages.run("first", "stage", ["out"], Path("out"))
    before = (world / "demo.json").read_text()
    written = []

    def disk_full(self, text, encoding):
        written.append(self.name)
        with self.open("w") as file:
            file.write(text[: len(text) // 2])
        if len(written) == fails_at:
            raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", disk_full)
    fails_at = 1
    with pytest.raises(OSError, match="No space left"):
        stages.run("second", "stage", ["out2"], Path("out2"))
    assert (world / "demo.json").read_text() == before
    stages.save()
    assert "demo.json" not in written


# --- the command lines -------------------------------------------------------------------------------------------


class Recorded(list):
    """Stages asked for: (name, module, arguments, output)."""

    def module(self, name: str) -> list[tuple]:
        return [stage for stage in self if stage[1] == name]


def record(patch: pytest.MonkeyPatch) -> Recorded:
    """Let the demo ask for stages, and run none."""
    found = Recorded()

    def note(stages, name, module, arguments, output):
        stages.number += 1
        found.append((name, module, list(arguments), output))
        found.total, found.number = stages.total, stages.number

    patch.setattr(Stages, "run", note)
    return found


def write_published(folder: Path) -> Path:
    folder.mkdir()
    for number, name in enumerate(stages.PUBLISHED.values()):
        (folder / name).write_text(json.dumps([{"file": number, "entry": i} for i in range(30)]))
    return folder


@pytest.fixture
def recorded(monkeypatch) -> Recorded:
    monkeypatch.chdir(ROOT)
    return record(monkeypatch)


@pytest.fixture
def published(tmp_path) -> Path:
    return write_published(tmp_path / "published")


VARIANTS = [[], ["--contrast", "--seeds", "2"], ["--published", "PUBLISHED"]]


@pytest.fixture(scope="module", params=VARIANTS, ids=" ".join)
def variant(request, tmp_path_factory) -> tuple[Recorded, list[str], Path]:
    """(stages asked for, flags, output folder) of one way to call the demo."""
    place = tmp_path_factory.mktemp("variant")
    flags = [str(write_published(place / "published")) if f == "PUBLISHED" else f for f in request.param]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        found = record(patch)
        assert command([*flags, "--output", str(place / "out")]) == 0
    return found, flags, place / "out"


@functools.cache
def configuration(arguments: tuple[str, ...]) -> TrainConfig:
    return load(ROOT / arguments[0], arguments[1:])


def test_every_stage_is_counted(variant):
    recorded, flags, _ = variant
    assert recorded.number == recorded.total == len(recorded)
    seeds = 2 if "--seeds" in flags else 1
    assert len(recorded.module("scripts.train")) == seeds * 7
    names = [stage[0] for stage in recorded]
    assert len(set(names)) == len(names), "a stage is remembered by its name"
    outputs = [stage[3] for stage in recorded]
    assert len(set(outputs)) == len(outputs)


def test_every_training_configuration_loads_and_hangs_together(variant):
    """Paths lead to what earlier stages make; labels and files agree; steps are ones that are saved."""
    recorded, flags, output = variant
    seen = set()
    for name, _, arguments, result in recorded.module("scripts.train"):
        config = configuration(tuple(arguments))
        length = config.model.max_sequence_length
        assert length == (1024 if "--published" in flags else 256)
        assert config.model.n_layers == (4 if "--contrast" in flags else 2)
        assert Path(config.save_folder).is_relative_to(output) and result.is_relative_to(config.save_folder)
        assert config.tokenizer.identifier == f"{output}/text/tokenizer.json"
        seen.add((config.save_folder, config.seed))
        if name.startswith("pretraining"):
            assert {demo.EARLY, demo.MIDDLE, demo.LAST} <= set(config.save_steps_unsharded)
            assert config.max_duration == demo.LAST
            assert config.data.paths == [f"{output}/text/general_train.npy"]
            assert config.evaluators[0].data.paths == [f"{output}/text/general_heldout.npy"]
            assert config.global_train_batch_size * length == 16 * 256  # as many tokens whatever the context
            assert result == Path(config.save_folder) / f"step{demo.LAST}-unsharded"
            saved, seed = Path(config.save_folder), config.seed
            continue
        key = Path(config.save_folder).name
        assert config.load_path == f"{saved}/step{CONDITIONS[key]}-unsharded" and config.seed == seed
        assert config.reset_optimizer_state and config.reset_trainer_state and config.eval_on_load
        assert config.max_duration == demo.LEARNED and result.name == f"step{demo.LEARNED}.parquet"
        assert config.data.dataset_path == f"{output}/text/science_train" and config.data.paths is None
        files = {s: f"{output}/knowledge/fictional_knowledge_{s}.json" for s in ("paraphrase", "once")}
        assert (config.injection.paraphrase, config.injection.once) == (files["paraphrase"], files["once"])
        assert (config.injection.rounds == 0) == (key == "last_control")
        if config.injection.rounds:
            assert config.inject_interval * config.injection.rounds == config.max_duration
        factor = {"last_q1": "1.0", "last_q2": "2.0"}.get(key)
        edited = f"{saved}/step720-unsharded/resuscitation_ratio0.5_amplifying{factor}.safetensors"
        assert config.model.resuscitation == (edited if factor else None)
        for evaluator in config.evaluators:
            setting = evaluator.label.partition("_")[0]
            if evaluator.type == "downstream":
                assert config.max_duration % evaluator.eval_interval == 0
            elif setting in files:
                assert evaluator.data.dataset_path == files[setting]
            else:
                assert evaluator.data.paths == [f"{output}/text/{evaluator.label}_heldout.npy"]
        assert {e.label for e in config.evaluators} >= {*TASKS, "general", "science"}
    assert len(seen) == len(recorded.module("scripts.train")), "two runs in one folder"


def test_every_other_command_line_is_understood(variant):
    """By the parsers of the commands themselves, with the meaning that later stages count on."""
    recorded, flags, output = variant
    for _, _, arguments, result in recorded.module("analysis.entropy"):
        args = entropy._parse(arguments)
        [pattern] = args.checkpoint
        assert result.match(f"{pattern}/knowledge_entropy.json")
        assert args.data == f"{output}/text/general_train.npy"
        assert args.data_size * (1024 if "--published" in flags else 256) == 512 * 256
    for _, _, arguments, result in recorded.module("analysis.change_parameters"):
        args = change_parameters._parse(arguments)
        name = f"resuscitation_ratio{args.resuscitation_ratio}_amplifying{args.amplifying_factor}.safetensors"
        assert result == Path(args.checkpoint) / name
    for _, _, arguments, result in recorded.module("scripts.make_fictional_knowledge"):
        args = make_fictional_knowledge.parse_args(arguments)
        assert (args.paraphrase, args.once, args.output) == (26, 60, output / "knowledge") and result == args.output
    [(_, _, arguments, result)] = recorded.module("scripts.prepare_demo_text")
    assert arguments[:2] == ["--output", str(output / "text")] and result == output / "text" / demo_text.SUMMARY
    assert bool(recorded.module("scripts.make_fictional_knowledge")) == ("--published" not in flags)
    assert recorded[-1][1:] == ("analysis.report", [str(output)], output / "report.html")


def test_every_stage_comes_after_those_whose_output_it_names(variant):
    """A path in a command lies where an earlier stage, or the copy of published data, has put it."""
    recorded, _, output = variant
    made = {output / "knowledge"}
    for _, _, arguments, result in recorded[:-1]:
        named = {Path(p) for a in arguments for p in a.partition("=")[2].strip("[]").split(",") if str(output) in p}
        own = {Path(a.partition("=")[2]) for a in arguments if a.startswith("--save_folder=")}
        for path in named - own:
            assert any(path.is_relative_to(m) or m.is_relative_to(path.parent) for m in made), path
        made |= {result.parent if result.suffix else result, *own}


def test_the_manifest_tells_what_the_report_needs(variant):
    recorded, flags, output = variant
    manifest = json.loads((output / "demo.json").read_text())
    seeds = 2 if "--seeds" in flags else 1
    assert (manifest["seeds"], manifest["published"]) == (seeds, "--published" in flags)
    assert manifest["setting"] == ("contrast" if "--contrast" in flags else "demo")
    assert {key: c["start"] for key, c in manifest["conditions"].items()} == CONDITIONS
    trained = {configuration(tuple(a)).save_folder for _, _, a, _ in recorded.module("scripts.train")}
    told = {*manifest["pretraining"], *(run for c in manifest["conditions"].values() for run in c["runs"])}
    assert {str(output / run) for run in told} == trained
    assert manifest["environment"]["python"]


def test_a_second_visit_does_not_list_runs_twice(recorded, tmp_path):
    output = tmp_path / "out"
    for _ in range(2):
        assert command(["--output", str(output), "--seeds", "2"]) == 0
    assert command(["--output", str(output)]) == 0
    manifest = json.loads((output / "demo.json").read_text())
    assert len(manifest["pretraining"]) == 1
    assert all(len(c["runs"]) == 1 for c in manifest["conditions"].values())


@pytest.mark.parametrize("value", ["0", "-1", "two"])
def test_seeds_must_be_a_positive_number(recorded, tmp_path, capsys, value):
    assert command(["--seeds", value, "--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "--seeds" in said
    assert not recorded and not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [0, 1])
def test_published_data_that_are_missing_are_noticed_at_once(recorded, tmp_path, published, capsys, number):
    name = list(stages.PUBLISHED.values())[number]
    (published / name).unlink()
    assert command(["--published", str(published), "--output", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == f"error: --published: {published / name} is missing\n"
    assert not recorded and not (tmp_path / "out").exists()


def test_published_data_are_cut_to_what_fits_and_named_as_expected(published, tmp_path):
    stages.copy_published(published, tmp_path / "knowledge", demo.PUBLISHED)
    for number, (setting, count) in enumerate(demo.PUBLISHED.items()):
        entries = json.loads((tmp_path / "knowledge" / f"fictional_knowledge_{setting}.json").read_text())
        assert entries == [{"file": number, "entry": i} for i in range(count)]


def test_each_kind_of_demo_has_its_own_folder(recorded, published, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for flags in ([], ["--contrast"], ["--published", str(published)]):
        assert command(flags) == 0
    assert {p.parent.name for p in tmp_path.glob("runs/*/demo.json")} == {"demo", "contrast", "published"}


def test_after_a_failed_stage_no_other_runs(tmp_path, monkeypatch, capsys):
    """Exit status 1, one line of this command's own."""
    tried = []

    def failing(arguments):
        tried.append(arguments[2])
        status = "7" if arguments[2] == "scripts.train" else "0"
        return popen([sys.executable, "-c", f"raise SystemExit({status})"])

    popen = stages.subprocess.Popen
    monkeypatch.setattr(stages, "subprocess", types.SimpleNamespace(Popen=failing))
    monkeypatch.chdir(ROOT)
    assert command(["--output", str(tmp_path / "out")]) == 1
    assert tried == ["scripts.prepare_demo_text", "scripts.make_fictional_knowledge", "scripts.train"]
    said = capsys.readouterr().err
    assert said.startswith("error: stage 'pretraining' failed with status 7") and said.count("\n") == 1
    manifest = json.loads((tmp_path / "out" / "demo.json").read_text())
    assert [s["name"] for s in manifest["stages"]] == ["text and tokenizer", "fictional knowledge"]
