"""The plan of the house: which module may import which, how long files are, what a reader of the method has to read.

The imports are read from the syntax trees of all modules, those inside functions and under TYPE_CHECKING included.
docs/architecture.md describes the same plan in words.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("olmo", "analysis", "knowledge_entropy", "scripts")

# The rooms of olmo/, in order: a module imports from its own room and from rooms above it.
ROOMS = (
    "console",
    "exceptions",
    "files",
    "config",
    "net",
    "distributed",
    "tokenizer",
    "model",
    "memory",
    "data",
    "knowledge",
    "eval",
    "checkpoint",
    "report",
    "train",
)
# What each package may import.
ALLOWED = {
    "olmo": {"olmo"},
    "analysis": {"olmo", "analysis"},
    "knowledge_entropy": {"olmo", "analysis", "knowledge_entropy"},
    "scripts": {"olmo", "analysis", "knowledge_entropy", "scripts"},
}
# Modules of the method that know little: what of ours each may import, a module or a package with all that is in it.
PURE = {
    "olmo.model.olmo": ("olmo.config", "olmo.model.initialization"),
    "olmo.knowledge.injection": ("olmo.data.loader", "olmo.knowledge.plan"),  # of the loader its Batch
}
FILE_LINES = 450
SOURCE_LINES = 38_000
READING_PATH_LINES = 2_200
TOP_LEVEL_ENTRIES = 16


@cache
def modules() -> dict[str, Path]:
    """Dotted name -> file, of the four packages; a package's own name is its __init__.py."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(modules()[module].read_text("utf-8"))


def imports(module: str) -> Iterator[tuple[str, int]]:
    """The modules of ours that a module imports, each with the level of its import: 0 is absolute."""
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name in modules():
                    yield alias.name, 0
        elif isinstance(node, ast.ImportFrom):
            here = module.split(".")
            if modules()[module].name != "__init__.py":
                here = here[:-1]
            base = here[: len(here) - node.level + 1] if node.level else []
            target = ".".join([*base, *(node.module or "").split(".")]).rstrip(".")
            for alias in node.names:
                submodule = f"{target}.{alias.name}"
                if submodule in modules():
                    yield submodule, node.level
                elif target in modules():
                    yield target, node.level


@cache
def graph() -> dict[str, set[str]]:
    """Module -> modules that it imports, itself left out."""
    return {module: {target for target, _ in imports(module)} - {module} for module in modules()}


def room(module: str) -> str:
    """The room of a module of olmo: its folder or its file at the top."""
    return module.split(".")[1] if "." in module else ""


def is_command(module: str) -> bool:
    return any(
        isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'" for node in tree(module).body
    )


def lines(path: Path) -> int:
    return len(path.read_text("utf-8").splitlines())


def reading_path() -> list[Path]:
    """The files that docs/architecture.md lists between its markers of the reading path."""
    text = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    section = re.search(r"^## The reading path\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert section, "docs/architecture.md has no section 'The reading path'"
    return [ROOT / name for name in re.findall(r"^\| `([^`]+\.py)` \|", section[1], re.MULTILINE)]


def test_no_module_imports_itself_through_others() -> None:
    try:
        TopologicalSorter(graph()).prepare()
    except CycleError as error:
        pytest.fail("imports in a circle: " + " <- ".join(error.args[1]))


def test_olmo_has_the_rooms_of_the_plan_and_no_other() -> None:
    assert {room(module) for module in modules() if module.startswith("olmo.")} == set(ROOMS)
    entries = sorted(path.name for path in (ROOT / "olmo").iterdir() if path.name != "__pycache__")
    assert len(entries) <= TOP_LEVEL_ENTRIES, entries


def test_rooms_import_only_what_is_above_them() -> None:
    wrong = [
        f"{module} imports {target}"
        for module, targets in graph().items()
        for target in sorted(targets)
        if module.startswith("olmo.") and target.startswith("olmo.")
        if ROOMS.index(room(target)) > ROOMS.index(room(module))
    ]
    assert not wrong, "\n".join(wrong)


def test_packages_import_only_what_they_may() -> None:
    wrong = [
        f"{module} imports {target}"
        for module, targets in graph().items()
        for target in sorted(targets)
        if target.split(".")[0] not in ALLOWED[module.split(".")[0]]
    ]
    assert not wrong, "\n".join(wrong)


def test_imports_inside_olmo_are_relative_and_name_the_module() -> None:
    # Except olmo itself, whose `on_use` packages import.
    packages = {module for module, path in modules().items() if path.name == "__init__.py"} - {"olmo"}
    wrong = [
        f"{module} imports {target}" + (" by its absolute name" if level == 0 else ", a package")
        for module in modules()
        for target, level in imports(module)
        if module.split(".")[0] == "olmo" and (level == 0 or target in packages)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("module", PURE)
def test_pure_functions_know_little(module: str) -> None:
    wrong = {target for target in graph()[module] if not f"{target}.".startswith(tuple(f"{p}." for p in PURE[module]))}
    assert not wrong


def test_no_module_imports_a_command() -> None:
    commands = {module for module in modules() if is_command(module)}
    wrong = [f"{module} imports {target}" for module in modules() for target in graph()[module] & commands]
    assert not wrong, "\n".join(sorted(wrong))


def test_no_file_is_longer_than_a_reader_keeps_in_mind() -> None:
    files = [*modules().values(), *(ROOT / "tests").rglob("*.py")]
    long = {str(path.relative_to(ROOT)): lines(path) for path in files if lines(path) > FILE_LINES}
    assert not long


def test_the_source_has_a_limit() -> None:
    assert sum(map(lines, modules().values())) <= SOURCE_LINES


def test_the_method_is_short_to_read() -> None:
    paths = reading_path()
    assert len(paths) == len(set(paths)) >= 13
    assert [path for path in paths if not path.is_file()] == []
    assert sum(map(lines, paths)) <= READING_PATH_LINES, {path.name: lines(path) for path in paths}
