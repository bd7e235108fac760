"""Rows of numbers as CSV."""

import csv
import io
import math

import numpy as np

from analysis.canvas import panels, save
from analysis.rows import as_csv, columns_of


def test_numbers_are_read_back_as_they_were():
    rows = [{"x": 0.1 + 0.2, "y": np.float64(1 / 3), "name": "a, b"}, {"x": None, "y": math.nan, "only": np.int64(7)}]
    text = as_csv(rows)
    assert text.splitlines()[0] == "x,y,name,only"
    first, second = csv.DictReader(io.StringIO(text))
    assert (float(first["x"]), float(first["y"]), first["name"], first["only"]) == (0.1 + 0.2, 1 / 3, "a, b", "")
    assert second == {"x": "", "y": "", "name": "", "only": "7"}


def test_an_estimate_is_three_columns():
    assert columns_of("A", {"value": 1, "low": 0, "high": None}) == {"A": 1, "A low": 0, "A high": None}
    assert columns_of("A", None) == {"A": None, "A low": None, "A high": None}


def test_a_figure_is_saved_with_its_numbers(tmp_path):
    figure, _ = panels(1, 1)
    path = save(figure, tmp_path / "figure_q0.5", [{"q": 0.5, "A": 3.25}])
    assert path.with_suffix(".csv").read_text() == "q,A\n0.5,3.25\n"
    assert {p.name for p in tmp_path.iterdir()} == {f"figure_q0.5.{kind}" for kind in ("png", "pdf", "csv")}
