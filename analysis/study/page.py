"""The report of a study as one self-contained HTML page: a template that holds its words, tables, figures, commands."""

from __future__ import annotations

import base64
import os
import shlex
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from analysis.study import conclusions, sections
from analysis.study.directions import NOISE, ONE_RUN, OPPOSITE, SEEN
from analysis.study.figures.registry import draw_all
from analysis.study.gather import gather
from analysis.study.plan_file import read_plan
from olmo.console import clock, printable
from olmo.files.atomic import write_text
from olmo.files.paths import as_json

CLASSES = {SEEN: "seen", OPPOSITE: "opposite", NOISE: "noise"}  # of the style sheet; any other verdict is "none"
DENSITY = 0.625  # pixels of the page for one of a figure, which is saved at 160 a printed inch
# id -> title of every section; a page has those that have content, in this order
TITLES = {
    "problems": "What is missing",
    "findings": "What the paper found, and what was seen here",
    "conclusions": "What may be concluded",
    "design": "The study",
    "entropy": "Knowledge entropy",
    "scores": "Scores of starts, without training",
    "outcomes": "Acquisition and forgetting",
    "tables": "The paper's tables",
    "joined": "Entropy joined with outcomes",
    "figures": "Figures",
    "notes": "Notes",
    "definitions": "Definitions",
    "commands": "Commands",
    "environment": "Environment",
}


def make(folder: Path) -> dict[str, Any]:
    """Write study.json, figures, and report.html of the study whose plan.json is in `folder`; returns study.json.

    Raises FileNotFoundError without plan.json, ValueError for damaged files and unknown figures (`gather`, `draw_all`).
    """
    plan = read_plan(folder)
    study = gather(plan)
    study["figures"] = draw_all(study, plan.content["figures"], folder)
    write_text(folder / "study.json", as_json(study, folder / "study.json", 1))
    write_text(folder / "report.html", render(study, folder))
    return study


def lines(study: Mapping[str, Any]) -> list[str]:
    """What a command prints of a study: a line for each direction, and for what is missing."""
    found = []
    for d in sections.directions(study):
        difference = d["difference"] if isinstance(d["difference"], str) else " ".join(d["difference"])
        found.append(f"{d['verdict']}: {d['claim']}; {d['measured']}: {difference}")
    return [*found, *(f"missing: {line}" for line in study["missing"])]


def render(study: Mapping[str, Any], folder: Path) -> str:
    """The page as HTML, style and images included. study: study.json. folder: what paths of figures and logs are
    relative to; the page links to them and is to be written there."""
    stages = [_stage(stage, folder) for stage in study["stages"]]
    unfinished = [stage for stage in stages if stage["state"] != "finished" and stage["kind"] != "report"]
    stopped = [stage for stage in unfinished if stage["state"] != "waiting"]
    waiting = [stage["name"] for stage in unfinished if stage["state"] == "waiting"]
    content: dict[str, Any] = {
        "problems": [*unfinished, *study["missing"], *study["warnings"]],
        "findings": sections.directions(study),
        "conclusions": (conclusions.may(study), conclusions.may_not(study)),
        "design": sections.design(study),
        "entropy": sections.entropies(study),
        "scores": sections.scores(study),
        "outcomes": sections.outcomes(study),
        "tables": sections.tables(study),
        "joined": sections.joined(study),
        "figures": [_with_image(figure, folder) for figure in study["figures"]],
        "notes": study["notes"],
        "definitions": True,
        "commands": stages,
        "environment": _environment(study["environment"]),
    }
    return _template().render(
        study=study,
        content=content,
        titles={key: title for key, title in TITLES.items() if content[key]},
        stopped=stopped,
        waiting=waiting,
        repeated=conclusions.repeated(study),
        compared=any(d["verdict"] in CLASSES for d in study["directions"]),
        single=any(d["verdict"] == ONE_RUN for d in study["directions"]),
        classes=CLASSES,
    )


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parents[1] / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(clock=clock, command=_command, link=quote)
    return environment.get_template("report.html.j2")


def _command(words: Sequence[str]) -> list[str]:
    """The words of a command quoted for a shell, without secrets."""
    return [printable(shlex.quote(word)) for word in words]


def _stage(stage: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A stage with null for what is unknown, and its log only where that exists."""
    found = {**dict.fromkeys(("seconds", "peak_memory_mib", "reason")), **stage}
    log = stage.get("log")
    return {**found, "log": log if log and (folder / log).is_file() else None}


def _with_image(figure: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A figure of study.json with its PNG as base64 (None where it was not drawn), the width at which to show it, and
    (kind, path) of its files."""
    image, width = None, 0
    for path in figure["files"]:
        if path.endswith(".png"):
            content = (folder / path).read_bytes()
            image = base64.b64encode(content).decode("ascii")
            width = round(DENSITY * int.from_bytes(content[16:20], "big"))  # of PNG's first chunk
    links = [(os.path.splitext(path)[1].removeprefix(".").upper(), path) for path in figure["files"]]
    return {**figure, "image": image, "width": width, "links": links}


def _environment(environment: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Rows (name, value), without the name of the host."""
    found = []
    for key, value in environment.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{name} {version}" for name, version in value.items())
        if value not in (None, "", []) and key != "host":
            found.append((key.replace("_", " "), printable(str(value))))
    return found
