"""Every command of README.md, CONTRIBUTING.md and docs/ is run at tiny sizes, or is marked as one that cannot be.

The commands of a page run one after the other, in a folder with everything tiny (tests/docs/world.py) in which the
README's have run before. What is changed in a command is listed in SUBSTITUTIONS and in `Runner`; nothing else is.
A marked command that no substitution makes local is only checked: its module, script, flags and files exist.
"""

from __future__ import annotations

import glob
import importlib
import logging
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from olmo.config import load
from olmo.exceptions import exit_status
from scripts.studies.read import read_study
from tests.chatting import chatting
from tests.docs.pages import MARKERS, ROOT, Command, blocks, commands, outside_blocks, pages
from tests.docs.world import build
from tests.running import command as python
from tests.warm import warm_python

PAGES = {page.name: page for page in pages()}
# Pattern, what takes its place, and whether a command that needed the network needs none with it.
SUBSTITUTIONS = [
    # The hub's checkpoints are tiny ones in the folders where get_model.sh puts them.
    (r"(?<!get_model\.sh )allenai/OLMo-1B@step(\d+)-tokens\d+B", r"checkpoints/pretrained_1B/\1-unsharded", True),
    # The token files of the official runs are tiny and local, so their order is rebuilt as written.
    (r"(data_order rebuild configs/official/)", r"\1", True),
    # PubMed's and C4's rows: few, short, and of a tokenizer with 128 tokens, from a local file of PubMed.
    (r"--files 60", "--input 'baseline/pubmed25n*.xml.gz'", True),
    (
        r"(scripts\.prepare_pubmed .*)",
        r"\1 --instances 32 --sequence_length 256 --tokenizer tokenizer.json --processes 1",
        False,
    ),
    # Pythia is a tiny one, which its configuration names.
    (r"(inspect_data configs/pythia/\S+) --step 160", r"\1 --step 2", True),
    (r"(scripts\.train configs/pythia/\S+) --load_path=\S+", r"\1", True),
    # Sizes of measurements, of training, and of knowledge of one's own.
    (r"--data_size 2048", "--data_size 8", False),
    (r"--first 2048", "--first 8", False),
    (r"--tasks paper", "--tasks copa --limit 4", False),
    (r"(scripts\.train configs/tiny/.*)", r"\1 --stop_at=2", False),
    (r"resuscitation\.sh 738020 0\.5 \S+", "resuscitation.sh 738020 0.5 2", False),
    (r"--paraphrase 70 --once 60", "--paraphrase 2 --once 5", False),
    (r"--paraphrases 19", "--paraphrases 10", False),
]
# In Python, what takes the place of a checkpoint of the hub, in the tiny folder.
HUB_IDS = {"EleutherAI/pythia-70m": "checkpoints/pythia-1.4b"}


def adapted(command: Command) -> tuple[str, bool]:
    """The command as it is run, and whether it is to be run."""
    text, runs = command.text, command.marker is None
    for pattern, replacement, local in SUBSTITUTIONS:
        text, count = re.subn(pattern, replacement, text)
        runs = runs or (local and count > 0)
    return text, runs


class Runner:
    """Runs adapted commands in the tiny folder, each once."""

    def __init__(self, world: Path, endpoint: str):
        self.world, self.endpoint, self.done = world, endpoint, set[str]()
        self.distributed = False  # whether torchrun has run: all its other commands run in this process alone
        path = f"{Path(warm_python()).parent}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        inherited = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
        # resuscitation.sh measures few instances, and trains in one process.
        sizes = {"ENTROPY_FLAGS": "--data_size 8 --batch_size 4", "PROCESSES": "1"}
        self.environment = {**inherited, "PATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **sizes}

    def run(self, command: Command) -> None:
        text, runs = adapted(command)
        if not runs:
            check(command)
        elif text not in self.done:
            self.done.add(text)
            self._run(text)

    def _run(self, text: str) -> None:
        words = shlex.split(text)
        if words[:2] == ["pip", "uninstall"]:  # it would delete packages of the tests' environment
            assert words[2:] == ["ai2-olmo", "knowledge-entropy"]
        elif words[0] == "make":  # the target exists, with all that it needs
            self._shell(f"make --dry-run {shlex.join(words[1:])}", ROOT)
        elif words[:3] == ["python", "-m", "pytest"]:
            assert all((ROOT / path).exists() for path in words[3:])
        elif words[0] == "torchrun" and not self.distributed:  # on CPUs, by gloo, and at a free port
            self.distributed = True
            done = python(words[words.index("-m") :], self.world, processes=2)
            assert done.returncode == 0, done.stderr[-3000:]
        elif words[0] in ("torchrun", "python"):
            start = words.index("-m") + 1
            self._in_process(words[start], self._expanded(text, words[start + 1 :]))
        else:
            self._shell(text, self.world)

    def _expanded(self, text: str, words: list[str]) -> list[str]:
        """As a shell passes them: patterns that are not quoted are replaced by the paths that match."""
        words = [word.replace("http://localhost:8000/v1", self.endpoint) for word in words]
        found: list[str] = []
        for word in words:
            quoted = f"'{word}'" in text or not any(c in word for c in "*?")
            found += [word] if quoted else sorted(glob.glob(word))
        return found

    def _in_process(self, module: str, arguments: list[str]) -> None:
        assert exit_status(importlib.import_module(module).main, arguments) == 0

    def _shell(self, text: str, folder: Path) -> None:
        done = subprocess.run(
            ["bash", "-c", text], cwd=folder, env=self.environment, capture_output=True, text=True, timeout=180
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]


def check(command: Command) -> None:
    """What can be checked of a command without running it."""
    words = [word for word in shlex.split(command.text) if not re.fullmatch(r"\w+=.*", word)]
    if words[0] == "pip":
        if words[-1].endswith(".whl"):  # tests/test_wheel.py knows its name
            return
        extras = re.search(r"\[(.+)\]", words[-1])
        assert extras is not None
        project = (ROOT / "pyproject.toml").read_text("utf-8")
        assert all(re.search(rf"^{name} = \[", project, re.MULTILINE) for name in extras[1].split(","))
        return
    script = next(word for word in words if word.startswith("scripts/")) if words[0] in ("bash", "sbatch") else None
    if script is not None:
        subprocess.run(["bash", "-n", str(ROOT / script)], check=True)
    if words[0] in ("sbatch", "srun", "mpirun"):
        assert words[0] == "sbatch" or words[words.index("python") :][:3] == ["python", "-m", "scripts.train"]
        configs = [word for word in words if word.endswith(".yaml")]
        assert configs and all((ROOT / config).is_file() for config in configs)
        return
    if words[:3] == ["python", "-m", "pytest"]:
        assert all((ROOT / path).exists() for path in words[3:])
        return
    module = words[2] if script is None else f"scripts.{Path(script).stem}"
    text = StringIO()
    with redirect_stdout(text), pytest.raises(SystemExit) as end:
        importlib.import_module(module).main(["--help"])
    assert not end.value.code
    for flag in (word.partition("=")[0] for word in words if word.startswith("--")):
        assert re.search(rf"{flag}\b", text.getvalue()), f"{module} has no flag {flag}"


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    """The tiny folder, in which all commands of the README have run."""
    with chatting() as server, pytest.MonkeyPatch.context() as patch:
        world = build(tmp_path_factory.mktemp("world"))
        patch.chdir(world)
        patch.setenv("XDG_CACHE_HOME", str(world / "cache"))
        patch.setattr(logging.root, "handlers", list(logging.root.handlers))  # scripts.train adds one
        runner = Runner(world, server.url)
        for command in commands(ROOT / "README.md"):
            runner.run(command)
        yield runner


@pytest.mark.parametrize("page", PAGES)
def test_commands_run(page: str, runner: Runner) -> None:
    for command in commands(PAGES[page]):
        try:
            runner.run(command)
        except (AssertionError, subprocess.CalledProcessError) as error:
            raise AssertionError(f"{command.page}:{command.line}: {command.text}\n{error}") from error


def test_results_are_where_the_readme_says(runner: Runner) -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    for name in ("results/last/knowledge_entropy.json", "results/acquisition"):
        assert name in text and (runner.world / name).exists()
    # What a run writes, docs/results.md; this one has neither TensorBoard nor held-out text.
    run = runner.world / "checkpoints/1B_baseline/OLMo-1B_bs128_lr4e4_pubmed_1ep_738k"
    files = (ROOT / "docs/results.md").read_text("utf-8").partition("| name | steps |")[0]
    for pattern in re.findall(r"^\| `([\w{}/.-]+)`", files, re.MULTILINE):
        if not pattern.startswith(("tensorboard", "losses")):
            assert list(run.glob(re.sub(r"\{\w\}", "*", pattern))), pattern


@pytest.mark.parametrize(
    "text", ["bash scripts/get_model.sh --lst", "bash scripts/none.sh", "pip install -e '.[none]'"]
)
def test_marked_commands_are_checked(text: str) -> None:
    with pytest.raises((AssertionError, subprocess.CalledProcessError)):
        check(Command("none.md", 1, text, "needs the network"))


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_where_they_are_found(page: str) -> None:
    """In fenced blocks marked `bash`; comments that look like markers are markers."""
    starts = r"^\s*(?:\$ )?(?:[A-Z_]+=\S+ )?(?:python|torchrun|bash|sbatch|make|pip)\s"
    assert not re.findall(rf"(?:^ {{4}}){starts[1:]}.*", outside_blocks(PAGES[page]), re.MULTILINE)
    for language in ("", "text", "sh", "shell", "console"):
        for line, block in blocks(PAGES[page], language):
            assert not re.search(starts, block, re.MULTILINE), f"{page}:{line}"
    for line, block in blocks(PAGES[page], "bash"):
        for comment in re.findall(r"# ((?:needs|takes) .*)", block):
            assert comment in MARKERS, f"{page}:{line}: {comment}: not a marker"


@pytest.mark.parametrize("page", PAGES)
def test_settings_are_settings(page: str, runner: Runner) -> None:
    """Every block of YAML is part of a valid configuration of a run, or in docs/studies.md a study."""
    base = runner.world / "configs/1B/1B_bs128_lr4e4_pubmed_1ep_738k.yaml"
    for line, block in blocks(PAGES[page], "yaml"):
        path = runner.world / f"{page}-{line}.yaml"
        if page == "studies.md":
            path.write_text(block, "utf-8")
            read_study(path)
            continue
        OmegaConf.save(OmegaConf.merge({"base": str(base)}, OmegaConf.create(block)), path)
        load(path)


@pytest.mark.parametrize("page", PAGES)
def test_python_runs(page: str, runner: Runner) -> None:
    """The blocks of a page one after the other, as a reader types them; checkpoints of the hub are tiny folders."""
    names: dict[str, object] = {}
    for line, block in blocks(PAGES[page], "python"):
        for identifier, folder in HUB_IDS.items():
            block = block.replace(f'"{identifier}"', f'"{folder}"')
        exec(compile("\n" * (line - 1) + block, page, "exec"), names)
