"""Numbers for figures, and what a figure drew of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure


@contextmanager
def coarse_figures() -> Iterator[None]:
    """Figures are saved with few pixels, and their PDF, which is drawn as the PNG is, is left out but for its name."""
    draw = Figure.savefig

    def coarse(figure: Figure, file: Path, dpi: int = 0) -> None:
        if ".pdf" in file.name:
            file.write_bytes(b"%PDF")
        else:
            draw(figure, file, dpi=20)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", coarse)
        yield


def entropy_result(step: int, layers: list[float], errors: list[float | None]) -> dict:
    known = [e for e in errors if e is not None]
    return {
        "checkpoint": {"step": step},
        "knowledge_entropy": sum(layers),
        "standard_error": sum(known) if known else None,
        "layers": layers,
        "layer_standard_errors": errors,
    }


SERIES = [
    entropy_result(90, [6.0, 6.5], [0.01, 0.02]),
    entropy_result(450, [5.8, 6.6], [0.03, 0.04]),
    entropy_result(720, [5.5, 6.4], [None, None]),  # measured on one instance
]


def estimate(value: float, low: float, high: float) -> dict[str, float]:
    return {"value": value, "low": low, "high": high}


ROWS = [
    {"name": "early", "color": "#9ecae1", "A": estimate(20, 18, 23), "loss_rise": estimate(-1, -2, 0.5)},
    {"name": "last", "color": "#08306b", "A": estimate(-5, -6, -1), "loss_rise": estimate(3, 2.5, 3.25)},
]


CURVES = [
    {"name": "early", "color": "#9ecae1", "curve": [{"step": 0, "K": -6.0, "K_once": -7.0}, {"step": 15, "K": -5.0}]},
    {"name": "last,\nq = 1", "color": "#08306b", "curve": [{"step": 0, "K": -6.5}, {"step": 30, "K": -4.0}]},
]


def bars_with_errors(container) -> list[tuple]:
    """(low, data line) of an errorbar container: points, and the ends of every bar."""
    line, _, (segments,) = container
    ends = [segment[:, 1].tolist() for segment in segments.get_segments()]
    return list(zip(line.get_xdata(), line.get_ydata(), ends))


def check_entropy(axes, results: list[dict], number: int = 0) -> None:
    points = bars_with_errors(axes.containers[number])
    assert [p[0] for p in points] == [r["checkpoint"]["step"] for r in results]
    assert [p[1] for p in points] == [r["knowledge_entropy"] for r in results]
    for (_, height, ends), r in zip(points, results):
        error = 2 * (r["standard_error"] or 0)
        assert ends == pytest.approx([height - error, height + error])


def legend_of(figure) -> list[str]:
    [legend] = figure.legends
    return [text.get_text() for text in legend.get_texts()]


def check_bars(axes, estimates: list[dict], colors: list[str]) -> None:
    [container] = [c for c in axes.containers if hasattr(c, "errorbar") and c.errorbar is not None]
    assert [bar.get_height() for bar in container] == [e["value"] for e in estimates]
    assert [to_hex(bar.get_facecolor()) for bar in container] == colors
    _, _, (segments,) = container.errorbar
    for segment, e in zip(segments.get_segments(), estimates, strict=True):
        assert segment[:, 1].tolist() == pytest.approx([e["low"], e["high"]])


def dynamics(settings: tuple[str, ...], times: tuple[int, ...] = (1, 2, 40), decay: bool = True) -> dict:
    """As in acquisition.json: one kind is not measured."""
    fit = {
        "a": estimate(0.25, 0.2, 0.3),
        "line": [[1, 0.9], [40, 0.5]],
        "standard_error": 0.01,
        "r_squared": 0.95,
        "x_intercept": estimate(2100.0, 1000.0, 9000.0),
    }
    group = {
        "retainability": {
            "at": list(times),
            "mean": [0.9, 0.8, 0.5][: len(times)],
            "low": [0.8, None, 0.4][: len(times)],
            "high": [0.95, None, 0.6][: len(times)],
            "values": [10, 5, 1][: len(times)],
        },
        "decay": fit if decay else None,
        "effectivity_by_injection": {
            **{name: [1.0, 0.5] for name in ("mean", "low", "high")},
            **{"at": [1, 2], "values": [10, 5]},
        },
    }
    names = [f"{s}{kind}" for s in settings for kind in ("", "_memorization", "_composition")]
    return {"groups": dict.fromkeys(["all", *names], group)}


def run_summary(name: str, injections: list[int], labels: tuple[str, ...] = ("general", "science"), **more) -> dict:
    return {
        "run": name,
        "start": None,
        "A": estimate(10, 8, 12),
        "downstream": None,
        "loss_rise": {label: estimate(3, 2, 4) for label in labels},
        "curve": [
            {"step": 0, "K": -6.0, "K_once": -7.0, "K_once_semantic": -7.5, "K_once_composition": -7.0},
            {"step": 15, "K": -5.0, "K_once": -6.0, "K_once_semantic": -6.5},
        ],
        "injections": injections,
        "dynamics": None,
        **more,
    }


def marks(axes) -> list[float]:
    return [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == ":"]
