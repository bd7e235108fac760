"""docs/commands.md is what the commands themselves have as their help, and their examples use flags that exist."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest

from scripts.documentation.commands import ROOT, markdown, modules, parser_of, section, shell_scripts
from tests.docs.pages import blocks

PAGE = ROOT / "docs/commands.md"


def test_the_page_is_current() -> None:
    assert PAGE.read_text("utf-8") == markdown(), "python -m scripts.documentation > docs/commands.md"


def test_every_command_is_found() -> None:
    """Whatever pages, scripts and the Makefile start with -m, of those that have options."""
    texts = [path.read_text("utf-8") for folder in ("docs", "scripts") for path in (ROOT / folder).glob("*.[ms][dh]")]
    texts += [(ROOT / name).read_text("utf-8") for name in ("README.md", "Makefile")]
    started = {name for text in texts for name in re.findall(r"-m ((?:analysis|scripts)\.\w+(?:\.\w+)*)", text)}
    assert started <= set(modules()) and len(started) > 12
    assert [path.name for path in shell_scripts()] == ["resuscitation.sh", "train.slurm"]


def test_examples_use_flags_that_exist() -> None:
    known = {name: {flag for parser in _parsers(parser_of(name)[0]) for flag in _flags(parser)} for name in modules()}
    for line, block in blocks(PAGE, "bash"):
        for command in re.split(r"\n(?! )", block):
            named = re.search(r"-m ([\w.]+)(.*)|scripts/(\w+)\.sh(.*)", command, re.DOTALL)
            name = named and (named[1] or f"scripts.{named[3]}")
            if named and name in known and name != "scripts.train":  # whose flags are keys of the configuration
                used = set(re.findall(r"(?<!\w)--[a-z]\w*(?!\w*\.)", named[2] or named[4] or ""))
                assert used <= known[name], f"{PAGE.name}:{line}: {used - known[name]}"


def _parsers(parser: argparse.ArgumentParser | None) -> list[argparse.ArgumentParser]:
    """A parser and those of its subcommands."""
    actions = [] if parser is None else parser._actions
    modes = [action for action in actions if isinstance(action, argparse._SubParsersAction)]
    return [*([parser] if parser else []), *(one for action in modes for one in action.choices.values())]


def _flags(parser: argparse.ArgumentParser) -> list[str]:
    return [flag for action in parser._actions for flag in action.option_strings]


PROGRAM = '''"""Count words.

    python -m tool FILE --first 3

Reads *one* file of `a*b`:
long: a name
"""
'''


def test_a_section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prose without what Markdown would interpret, examples as blocks, arguments with what they take and default to."""
    (tmp_path / "tool.py").write_text(
        PROGRAM + "import argparse\n"
        "def main(argv):\n"
        "    parser = argparse.ArgumentParser(description=__doc__)\n"
        "    parser.add_argument('files', nargs='+', help='each <file>')\n"
        "    both = parser.add_mutually_exclusive_group(required=True)\n"
        "    both.add_argument('--first', type=int, default=0, metavar='K', help='with --last, of %(dest)s')\n"
        "    both.add_argument('-l', '--last', action='store_true')\n"
        "    parser.add_argument('--kind', choices=['a', 'b'], required=True)\n"
        "    parser.add_argument('--size', default=3, help='words (default: 3)')\n"
        "    parser.parse_args(argv)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert section("tool") == (
        "## tool\n\nCount words.\n\n```bash\npython -m tool FILE --first 3\n```\n\n"
        "Reads \\*one\\* file of `a*b`:\nlong: a name\n\n"
        "Arguments:\n\n"
        "* `files [files ...]`: each \\<file>\n"
        "* `--first K`: with `--last`, of first; default: `0`\n"
        "* `-l, --last`\n"
        "* `--kind {a,b}`: required\n"
        "* `--size SIZE`: words (default: 3)\n\n"
        "Exactly one of `--first`, `--last` is given.\n"
    )
