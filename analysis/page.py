"""The demo's report as one self-contained HTML page: figures, and a template that holds every word of it."""

from __future__ import annotations

import base64
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from analysis import canvas
from analysis.directions import FORGETTING, NOISE, ONE_RUN, OPPOSITE, SEEN
from analysis.figures import dynamics, entropy, outcomes
from analysis.summary_table import signed
from olmo.console import clock, fixed

COLORS = {
    **dict(zip(("early", "middle", "last"), canvas.BLUES)),
    **dict(zip(("last_q1", "last_q2"), canvas.ORANGES)),
    "last_control": canvas.GREY,
}
CLASSES = {SEEN: "seen", OPPOSITE: "opposite", NOISE: "noise", ONE_RUN: "noise"}  # of the style sheet


def draw(report: Mapping[str, Any], folder: Path) -> dict[str, Path]:
    """Draw the figures of the page, as PNG and PDF in `folder`; returns the PNG's paths by name."""
    conditions, injections = report["conditions"], report["conditions"]["last"]["injections"]
    pretrained = ("early", "middle", "last")
    marked = [conditions[key]["start"] for key in pretrained]
    rows = {
        key: {
            "name": condition["name"].replace(", ", ",\n"),
            "color": COLORS[key],
            "A": condition["common_start"]["A"],
            "loss_rise": condition["common_start"]["loss_rise"][FORGETTING],
        }
        for key, condition in conditions.items()
    }
    curves = [{"name": c["name"], "color": COLORS[key], "curve": c["curve"]} for key, c in conditions.items()]
    titles = {
        "paraphrase": "Setting paraphrase: another wording in every round",
        "once": "Setting once: every entry in one round",
    }
    drawn = {
        "overview": outcomes.overview(report["entropy"], marked, [rows[key] for key in pretrained], FORGETTING),
        "entropy": entropy.entropy_over_steps(report["entropy"], marked),
        "entropy_per_layer": entropy.layer_entropy_over_steps(report["entropy"][0]),
        "acquisition_and_forgetting": outcomes.acquisition_and_forgetting(list(rows.values()), FORGETTING),
        **{
            f"probes_{setting}": dynamics.probes_over_steps(curves, injections, f"K_{setting}", title)
            for setting, title in titles.items()
        },
    }
    return {name: canvas.save(figure, folder / name) for name, figure in drawn.items()}


def render(report: Mapping[str, Any], drawn: Mapping[str, Path]) -> str:
    """The page as HTML, style and figures included. report: from `study.gather`; drawn: from `draw`."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(clock=clock, fixed=fixed, quoted=shlex.join, signed=signed)
    images = {name: base64.b64encode(path.read_bytes()).decode("ascii") for name, path in drawn.items()}
    seed_names = [f"seed {number}" for number in range(report["seeds"])]
    template = environment.get_template("report.html.j2")
    return template.render(**report, images=images, seed_names=seed_names, forgetting=FORGETTING, classes=CLASSES)
