"""The notebooks of the documentation, run as a reader does; their outputs are stored with them.

python -m tests.docs.notebooks     runs them and stores what they print and draw
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from tests.docs.pages import ROOT

NOTEBOOKS = sorted((ROOT / "docs/notebooks").glob("*.ipynb"))


def run(path: Path) -> nbformat.NotebookNode:
    """The notebook with the outputs of a new kernel in its folder, without what differs from run to run."""
    notebook = nbformat.read(path, as_version=4)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment["PYTHONWARNINGS"] = (
        "ignore:IProgress not found"  # of tqdm, without ipywidgets, with paths of this machine
    )
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(path.parent)}})
    client.execute(env=environment)
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.execution_count, cell.outputs = None, list(_joined(cell.outputs))
            for output in cell.outputs:
                if output.output_type == "execute_result":
                    output.execution_count = None
                if "metadata" in output:
                    output.metadata = {}
    notebook.metadata.language_info = {"name": "python"}
    return notebook


def _joined(outputs: list[nbformat.NotebookNode]) -> Iterator[nbformat.NotebookNode]:
    """Outputs in which what is printed in a row is one; how it is cut into messages depends on the time."""
    for name, group in itertools.groupby(outputs, lambda output: output.get("name", output.output_type)):
        first, *rest = group
        if first.output_type == "stream":
            yield nbformat.v4.new_output("stream", name=name, text="".join(one.text for one in (first, *rest)))
        else:
            yield from (first, *rest)


def texts(notebook: nbformat.NotebookNode) -> Iterator[str]:
    """What its cells print and return, as text."""
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            yield output.get("text") or output.get("data", {}).get("text/plain", "")


if __name__ == "__main__":
    for path in NOTEBOOKS:
        nbformat.write(run(path), path)
