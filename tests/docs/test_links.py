"""What the documentation names exists: pages, headings, files; and the README stays short."""

from __future__ import annotations

import re

import pytest

from tests.docs.pages import ROOT, commands, outside_blocks, pages

PAGES = {page.name: page for page in pages()}
FOLDERS = "olmo|analysis|scripts|configs|docs|tests"
README_LINES = 130


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page: str) -> None:
    path = PAGES[page]
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text("utf-8")):
        if "://" not in target:
            name, _, heading = target.partition("#")
            linked = path.parent / name if name else path
            assert linked.exists(), target
            if heading:
                titles = re.findall(r"^#+ (.+)$", linked.read_text("utf-8"), re.MULTILINE)
                anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
                assert heading in anchors, target


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page: str) -> None:
    named = re.findall(rf"`((?:{FOLDERS})/[\w./-]+)`", outside_blocks(PAGES[page]))
    assert not [name for name in named if not (ROOT / name).exists()]


@pytest.mark.parametrize("page", PAGES)
def test_names_are_in_the_files_that_are_said_to_have_them(page: str) -> None:
    text = " ".join(outside_blocks(PAGES[page]).split())
    for name, path in re.findall(rf"`(\w+)` (?:of|in) `((?:{FOLDERS})/[\w/]+\.py)`", text):
        assert re.search(rf"\b{name}\b", (ROOT / path).read_text("utf-8")), f"{path} has no {name}"


def test_every_page_is_found_from_the_readme() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    linked = {
        name for page in PAGES.values() for name in re.findall(r"\]\((?:docs/)?(\w+\.md)", page.read_text("utf-8"))
    }
    assert {page.name for page in (ROOT / "docs").glob("*.md")} <= linked
    assert "make demo" in text and "make test" in text


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= README_LINES


@pytest.mark.parametrize("page", PAGES)
def test_outputs_of_documented_commands_are_ignored_by_git(page: str) -> None:
    """A user who follows the pages has a clean `git status`, and a clean state of the code in environment.json."""
    ignored = {line.strip("/") for line in (ROOT / ".gitignore").read_text("utf-8").split() if line.endswith("/")}
    for command in commands(PAGES[page]):
        for place in re.findall(r"--(?:output|save_folder|keep)[= ](\w[^\s]*)", command.text):
            # Outside the repository, or below an ignored folder; `--keep none` keeps nothing.
            assert place.split("/")[0] in {*ignored, "none"}, f"{page}, line {command.line}: {place}"
