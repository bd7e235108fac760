"""Hooks of MkDocs (mkdocs.yml): the pages are those of a reader of the repository, with its links.

README.md is the first page. What a page links to outside of docs/, such as a configuration or a source file, becomes a
page of the site. Notebooks are shown with the outputs that are stored in them, and the entries of docs/api.md become
the signatures and docstrings that they name.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_LINK = re.compile(r"\[([^\]]*)\]\((?!\w+:|#)([^)\s#]+)")  # text and target; not of other servers, nor of the page
_ENTRY = re.compile(r"^\* \[`(\w+)`\]\(\.\./([\w/]+)\.py\): .*$", re.MULTILINE)
_LANGUAGES = {".py": "python", ".yaml": "yaml", ".sh": "bash", ".slurm": "bash", ".cff": "yaml", ".toml": "toml"}


def page_of(path: str) -> str:
    """The page, or file, of the site that shows a path of the repository."""
    if path in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        return "index.md" if path == "README.md" else path.lower()
    if path.startswith("docs/"):
        return re.sub(r"\.ipynb$", ".md", path.removeprefix("docs/"))
    return f"source/{path}" if path.endswith(".md") else f"source/{path}.md"


def linked(text: str, path: str) -> Iterator[str]:
    """The paths of the repository that a text at `path` links to."""
    for _, name in _LINK.findall(text):
        yield _resolved(name, path)


def with_links(text: str, path: str) -> str:
    """The text of `path`, a page of the repository, with links to pages of the site. A link that is named as the file
    of a page gets the title of the page."""
    here = posixpath.dirname(page_of(path))

    def moved(match: re.Match[str]) -> str:
        name, target = match[1], _resolved(match[2], path)
        if posixpath.basename(name) == posixpath.basename(target) and (ROOT / target).exists():
            title = re.search("^# (.+)$", shown(target), re.MULTILINE)
            name = title[1] if title else name
        return f"[{name}]({posixpath.relpath(page_of(target), here or '.')}"

    return _LINK.sub(moved, text)


def _resolved(name: str, path: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(path), name))


def shown(path: str) -> str:
    """The Markdown that shows a path of the repository: a page as it is, a notebook, a file, or a folder's files."""
    file = ROOT / path
    if file.suffix == ".md":
        return with_directives(file.read_text("utf-8"))
    if file.suffix == ".ipynb":
        return "\n\n".join(_cells(json.loads(file.read_text("utf-8"))))
    files = sorted(file.glob("*.*")) if file.is_dir() else [file]
    blocks = [f"# {path}"]
    for one in files:
        title = [f"## {one.name}"] if file.is_dir() else []
        blocks += [*title, f"````{_LANGUAGES.get(one.suffix, 'text')}\n{one.read_text('utf-8').rstrip()}\n````"]
    return "\n\n".join(blocks) + "\n"


def _cells(notebook: dict[str, Any]) -> Iterator[str]:
    """The cells of a notebook with their outputs, each as Markdown."""
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        yield source if cell["cell_type"] == "markdown" else f"````python\n{source}\n````"
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if "image/png" in data:
                image = "".join(data["image/png"]).replace("\n", "")
                yield f"![output of the cell](data:image/png;base64,{image})"
            else:
                text = "".join(output.get("text") or data["text/plain"])
                yield f"````text\n{text.rstrip()}\n````"


def pages() -> list[str]:
    """The paths of the repository that are pages of the site."""
    found = ["README.md", *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").glob("*.md")))]
    for path in found:  # grows
        if path.endswith(".md"):
            known = {page_of(other) for other in found}
            for target in linked(shown(path), path):
                named = page_of(target)
                if named not in known and named.endswith(".md") and (ROOT / target).exists():  # else MkDocs warns
                    found.append(target)
                    known.add(named)
    return found


def with_directives(text: str) -> str:
    """docs/api.md with directives of mkdocstrings: in the repository, an entry is a link to the file of its source."""
    return _ENTRY.sub(lambda entry: f"::: {entry[2].replace('/', '.')}.{entry[1]}\n", text)


def on_files(files: Any, config: Any) -> Any:
    """Replace the files of docs/ that are pages, and add the others."""
    from mkdocs.structure.files import File

    for path in pages():
        text = with_links(shown(path), path)
        if existing := files.get_file_from_path(page_of(path)):
            files.remove(existing)
        page = File.generated(config, page_of(path), content=text)
        if config.repo_url and not text.startswith("<!-- Generated"):
            page.edit_uri = posixpath.relpath(path, "docs")
        files.append(page)
    files.append(File.generated(config, "site.css", abs_src_path=str(Path(__file__).with_name("site.css"))))
    return files
