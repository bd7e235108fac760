"""Every notebook of the documentation runs without a network, and shows what its stored outputs show."""

import re
from pathlib import Path

import nbformat
import pytest

from tests.docs.notebooks import NOTEBOOKS, run, texts

NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def agree(found: str, stored: str) -> bool:
    """Whether two texts are the same but for rounding: sums of another processor change the last digits of training."""
    numbers = [[float(number) for number in NUMBER.findall(text)] for text in (found, stored)]
    return NUMBER.sub("#", found) == NUMBER.sub("#", stored) and numbers[0] == pytest.approx(
        numbers[1], rel=0.01, abs=0.002
    )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_shows_what_is_stored(path: Path) -> None:
    stored = nbformat.read(path, as_version=4)
    nbformat.validate(stored)
    assert all(cell.get("execution_count") is None and not cell.metadata for cell in stored.cells)
    found = run(path)
    for new, old in zip(texts(found), texts(stored), strict=True):
        assert agree(new, old), f"{old!r} is stored, {new!r} is shown: python -m tests.docs.notebooks stores it anew"
    for notebook in (found, stored):
        outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
        images = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
        assert len(images) == 3 and all(len(image) > 5000 for image in images)
    assert path.stat().st_size < 200_000


def test_only_rounding_may_differ() -> None:
    assert agree("H 11.691, step 80", "H 11.70, step 80") and agree("True", "True")
    assert not agree("H 11.9", "H 11.7") and not agree("True", "False") and not agree("H 1", "H 1 2")
