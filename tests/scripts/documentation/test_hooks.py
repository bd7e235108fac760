"""The site has every page of docs/, each once in its navigation, and links between pages of the site."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

import knowledge_entropy
from scripts.documentation.hooks import ROOT, linked, page_of, pages, shown, with_links


class Loader(yaml.SafeLoader):
    """Reads mkdocs.yml, whose tags only MkDocs knows."""


Loader.add_multi_constructor("!", lambda loader, suffix, node: None)
CONFIG = yaml.load((ROOT / "mkdocs.yml").read_text("utf-8"), Loader)


def entries(navigation: Any) -> Iterator[str]:
    for item in navigation:
        (value,) = item.values()
        yield from [value] if isinstance(value, str) else entries(value)


def test_the_navigation_has_every_page_once() -> None:
    listed = list(entries(CONFIG["nav"]))
    of_site = {page_of(path) for path in pages()}
    assert len(listed) == len(set(listed))
    assert set(listed) == {name for name in of_site if not name.startswith("source/")}
    assert {path.name for path in (ROOT / "docs").glob("*.md")} < set(listed)


def test_what_the_pages_link_to_is_a_page_or_a_figure() -> None:
    of_site = {page_of(path) for path in pages()}
    for path in pages():
        if path.endswith(".md"):
            for target in linked(with_links(shown(path), path), page_of(path)):
                assert target in of_site or (ROOT / "docs" / target).is_file(), f"{path}: {target}"


def test_nothing_is_loaded_from_other_servers() -> None:
    assert CONFIG["theme"]["font"] is False
    assert all("://" not in name for name in CONFIG["extra_css"]) and "extra_javascript" not in CONFIG


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        ("README.md", "[a](docs/log.md#x)", "[a](log.md#x)"),
        ("README.md", "![a](docs/figures/demo.png)", "![a](figures/demo.png)"),
        (
            "docs/data.md",
            "[it](../README.md), [c](../configs/tiny/a.yaml)",
            "[it](index.md), [c](source/configs/tiny/a.yaml.md)",
        ),
        (
            "README.md",
            "[docs/log.md](docs/log.md), [data.md](docs/log.md)",
            "[What was tried](log.md), [data.md](log.md)",
        ),
        ("docs/data.md", "[notebooks/quickstart.ipynb](notebooks/quickstart.ipynb)", None),
        ("tests/golden/README.md", "[a](../../docs/log.md)", "[a](../../../log.md)"),
        ("docs/log.md", "[a](https://a.b/c.md), [b](#here)", "[a](https://a.b/c.md), [b](#here)"),
    ],
)
def test_links(path: str, text: str, expected: str | None) -> None:
    found = with_links(text, path)
    if expected is None:  # the title of the notebook
        assert re.fullmatch(r"\[[A-Z][^\]]+ [^\]]+\]\(notebooks/quickstart.md\)", found)
    else:
        assert found == expected


def test_files_folders_and_notebooks_are_shown() -> None:
    schema = (ROOT / "scripts/studies/schema.py").read_text("utf-8")
    assert shown("scripts/studies/schema.py") == f"# scripts/studies/schema.py\n\n````python\n{schema.rstrip()}\n````\n"
    official = shown("configs/official")
    assert official.count("\n````yaml\n") == len(list((ROOT / "configs/official").iterdir())) >= 3
    notebook = shown("docs/notebooks/quickstart.ipynb")
    assert notebook.startswith("# ") and notebook.count("data:image/png;base64,") == 3
    assert "````python\n" in notebook and "````text\n" in notebook


def test_the_api_has_every_public_name() -> None:
    """Each entry names a definition with a docstring; the page of the site has a directive of mkdocstrings for it."""
    text = (ROOT / "docs/api.md").read_text("utf-8")
    named = re.findall(r"^\* \[`(\w+)`\]\(\.\./(.+)\.py\): .+$", text, re.MULTILINE)
    assert set(knowledge_entropy.__all__) <= {name for name, _ in named}
    for name, module in named:
        tree = ast.parse((ROOT / f"{module}.py").read_text("utf-8"))
        (found,) = [node for node in tree.body if getattr(node, "name", "") == name]
        assert isinstance(found, (ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(found)
        if isinstance(found, ast.FunctionDef) and module.startswith("knowledge_entropy"):
            arguments = [argument.arg for argument in (*found.args.args, *found.args.kwonlyargs)]
            described = (ast.get_docstring(found) or "").partition("Args:\n")[2].partition("\n\n")[0]
            assert re.findall(r"^    (\w+): ", described, re.MULTILINE) == arguments, name
        assert f"\n::: {module.replace('/', '.')}.{name}\n" in shown("docs/api.md")
