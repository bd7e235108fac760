"""The wheel: what it holds, that it works in any folder, and beside ai2-olmo, which has a package of the same name."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
import yaml

import knowledge_entropy
from olmo.files import paths
from tests.wheel_files import PACKAGES, ROOT, expected, held

BUILD = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
README = ROOT / "docs" / "install.md"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, since setuptools writes beside its sources, by this environment's setuptools."""
    copy, output = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("dist")
    for name in (*PACKAGES, "configs", "scripts"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "docs").mkdir()
    for name in ("LICENSE", "MANIFEST.in", "docs/install.md", "pyproject.toml", "setup.py"):
        shutil.copyfile(ROOT / name, copy / name)
    built = subprocess.run([sys.executable, "-c", BUILD, str(output)], cwd=copy, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-3000:]
    (path,) = output.glob("*.whl")
    return path


@pytest.fixture
def installed(wheel: Path, tmp_path: Path) -> Path:
    """The wheel's files in a folder, as pip unpacks them."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    return tmp_path / "site"


def run(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python with these packages, in a folder that is not the repository; with -S, without those of an environment."""
    elsewhere = site.parent / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=120
    )


def test_a_wheel_has_three_packages_and_the_configurations(wheel: Path) -> None:
    assert held(wheel) == expected()
    assert {"olmo/py.typed", "analysis/py.typed", "knowledge_entropy/py.typed"} < held(wheel)
    assert {name.split("/")[0] for name in held(wheel)} == set(PACKAGES)


def test_its_metadata_agree_with_the_files_of_the_repository(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        metadata = message_from_bytes(archive.read(name))
    version = knowledge_entropy.__version__
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    released = re.findall(r"^## \[([\d.]+)\] - (.+)$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert metadata["Version"] == version == citation["version"] == released[0][0]
    assert str(citation["date-released"]) == released[0][1]
    assert wheel.name in README.read_text("utf-8")
    assert metadata["License-Expression"] == citation["license"]
    # What a package index shows: it follows no relative links, and refuses longer labels of links.
    assert not re.findall(r"\]\((?!https://)", README.read_text("utf-8"))
    assert all(len(url.partition(",")[0]) <= 32 for url in metadata.get_all("Project-URL"))
    extras = README.read_text("utf-8").partition("## Extras")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \|", extras, re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == set(metadata.get_all("Provides-Extra"))


def test_configurations_of_the_package_are_found_in_any_folder(installed: Path) -> None:
    program = (
        "import importlib.util, json; from olmo.config import load; "
        "run = load('configs/resuscitation/1B_bs128_lr4e4_pubmed_1ep_738k_resuscitation.yaml'); "
        "print(json.dumps([run.run_name, run.max_duration, load.__code__.co_filename]))"
    )
    ended = run(installed, "-c", program)
    assert ended.returncode == 0, ended.stderr
    name, duration, source = json.loads(ended.stdout)
    assert name == "OLMo-1B_bs128_lr4e4_pubmed_1ep_738k_resuscitation" and duration > 0
    assert Path(source).is_relative_to(installed)
    assert ended.stderr.count("not in this folder; the one that is installed is used") == 1


def test_a_configuration_of_the_folder_is_preferred(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = Path("configs/official/OLMo-1B.yaml")
    assert paths.provided(name) == ROOT / name  # of the checkout that is imported
    assert paths.provided(Path("configs/official/none.yaml")) == Path("configs/official/none.yaml")
    assert paths.provided(Path("official/OLMo-1B.yaml")) == Path("official/OLMo-1B.yaml")
    name.parent.mkdir(parents=True)
    name.touch()
    assert paths.provided(name) == name


def one_line(ended: subprocess.CompletedProcess[str]) -> str:
    """What a command printed: one line."""
    assert ended.returncode and not ended.stdout
    (line,) = ended.stderr.splitlines()
    return line


REMEDY = (
    "; run: pip uninstall ai2-olmo knowledge-entropy; then install knowledge-entropy again, and ai2-olmo in another "
    "environment"
)


@pytest.mark.parametrize("last", ["ours", "theirs"])
def test_files_of_ai2_olmo_among_ours_are_one_line(installed: Path, last: str) -> None:
    """As pip leaves them where both are installed: the files of both, of those with the same name the last one's."""
    olmo = installed / "olmo"
    (olmo / "config.py").write_text("class ModelConfig: ...\n", "utf-8")
    if last == "theirs":
        (olmo / "__init__.py").write_text("from .config import *\n", "utf-8")
        (olmo / "exceptions.py").write_text("class OLMoConfigurationError(Exception): ...\n", "utf-8")
    line = one_line(run(installed, "-S", "-m", "analysis.entropy", "--help"))
    assert str(olmo) in line and REMEDY in line
    for program in ("import knowledge_entropy as ke; ke.measure", "from olmo.config import ModelConfig"):
        ended = run(installed, "-S", "-c", program)
        assert ended.returncode and ended.stderr.splitlines()[-1].startswith(f"ImportError: {olmo}: has files of both")


@pytest.mark.parametrize("state", ["damaged", "another project"])
def test_a_package_olmo_that_is_not_ours_is_one_line(installed: Path, state: str) -> None:
    """What uninstalling ai2-olmo leaves of ours, and ai2-olmo's package before an editable install of ours."""
    olmo = installed / "olmo"
    if state == "another project":
        shutil.rmtree(olmo)
        olmo.mkdir()
        (olmo / "__init__.py").write_text("raise AssertionError('imported')\n", "utf-8")
    else:
        (olmo / "__init__.py").unlink()
        (olmo / "exceptions.py").unlink()
    line = one_line(run(installed, "-S", "-m", "analysis.score", "--help"))
    assert str(olmo) in line and "not knowledge-entropy's package olmo" in line and REMEDY in line


def test_hf_olmo_gets_the_remedy() -> None:
    with pytest.raises(ImportError, match="allenai/OLMo-1B-hf"):
        from olmo.exceptions import OLMoConfigurationError  # noqa: F401
    with pytest.raises(ImportError, match="cannot import name 'None_'"):
        from olmo.exceptions import None_  # noqa: F401
