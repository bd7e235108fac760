"""plan.json: what a study is made of, and where the files of its runs are. scripts.study writes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis import shapes
from analysis.choices import FLAGS
from olmo.exceptions import did_you_mean
from olmo.files.paths import read_json

PLAN = "plan.json"
ABOUT = ("model", "checkpoint")  # the levels that a verdict may be about

_SHAPE: dict[str, Any] = {
    "title": str,
    "description": str,
    "?notes": [str],
    "about": str,
    "repeats": (str, None),
    "?acquisition": {"*": (str, int, float, None)},
    "seeds": [[int]],
    "starts": [{"name": str, "step": (int, None), "model": str, "checkpoints": [str]}],
    "interventions": {"*": dict},
    "settings": {"*": dict},
    "conditions": [
        {
            "name": str,
            "start": str,
            "intervention": str,
            "setting": str,
            "runs": [{"folder": str, "pretraining": int, "learning": int, "?stage": (str, None)}],
        }
    ],
    "entropies": [
        {
            "data": str,
            "coefficient": str,
            "start": str,
            "intervention": str,
            "pretraining": int,
            "folder": str,
            "?stage": (str, None),
        }
    ],
    "?scores": [{"start": str, "pretraining": int, "folder": str, "?stage": (str, None)}],
    "directions": [{"claim": str, "measure": str, "from": str, "to": str, "expected": str}],
    "figures": [str],
    "tables": [str],
    "stages": [
        {
            "name": str,
            "kind": str,
            "command": [str],
            "state": str,
            "?seconds": (float, None),
            "?peak_memory_mib": (float, None),
            "?log": (str, None),
            "?reason": (str, None),
        }
    ],
    "environment": {"*": (str, int, float, dict, list, None)},
}


@dataclass(frozen=True)
class Plan:
    """The content of a plan.json and the folder to which its paths are relative."""

    folder: Path
    content: Mapping[str, Any]

    def place(self, path: str) -> Path:
        return self.folder / path

    @property
    def starts(self) -> dict[str, dict[str, Any]]:
        """By name; `step` is None where it is unknown."""
        steps = {start["name"]: start["step"] for start in self.content["starts"]}
        known = {name: step if step is not None and step >= 0 else None for name, step in steps.items()}
        return {start["name"]: {**start, "step": known[start["name"]]} for start in self.content["starts"]}

    def acquisition(self) -> dict[str, Any]:
        """Settings of effectivity and retainability (`dynamics.options`). Raises ValueError for one that is none."""
        found = {}
        for name, value in self.content.get("acquisition", {}).items():
            if value is not None:
                try:
                    found[name] = FLAGS[name](str(value))
                except (KeyError, ValueError) as error:
                    raise ValueError(
                        f"acquisition.{name}: {value!r} is no such setting of analysis.acquisition"
                    ) from error
        return found

    def unfinished(self, member: Mapping[str, Any]) -> str | None:
        """Why a run or an entropy is not complete, from the state of the stage that it names; None if it is complete or
        names no stage."""
        found = [stage for stage in self.content["stages"] if stage["name"] == member.get("stage")]
        if not found or found[0]["state"] == "finished":
            return None
        reason, log = found[0].get("reason"), found[0].get("log")
        details = "".join([f": {reason}" if reason else "", f" ({log})" if log else ""])
        return f"its stage {found[0]['name']} is {found[0]['state']}{details}"


def read_plan(folder: Path) -> Plan:
    """The plan of a study's output folder.

    Raises FileNotFoundError where there is none, ValueError where it is damaged, of another version, or names a start,
    an intervention or a setting that it does not have, or two conditions of one name.
    """
    path = folder / PLAN
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; run the study first: python -m scripts.study FILE --output {folder}")
    content = read_json(path)
    shapes.check(path, content, _SHAPE)
    if content["about"] not in ABOUT:
        raise ValueError(f"{path}: about: expected {' or '.join(ABOUT)}, not {content['about']!r}")
    plan = Plan(folder, content)
    known = {"start": plan.starts, "intervention": content["interventions"], "setting": content["settings"]}
    for section, keys in (("conditions", tuple(known)), ("entropies", ("start", "intervention"))):
        for number, row in enumerate(content[section]):
            for key in keys:
                if row[key] not in known[key]:
                    meant = did_you_mean(row[key], known[key])
                    raise ValueError(f"{path}: {section}[{number}]: unknown {key} '{row[key]}'{meant}")
    for section, names in (("starts", content["starts"]), ("conditions", content["conditions"])):
        of_section = [row["name"] for row in names]
        if twice := [name for name in of_section if of_section.count(name) > 1]:
            raise ValueError(f"{path}: {section}: two of the name '{twice[0]}'")
    for direction in content["directions"]:
        if direction["expected"] not in ("above", "below"):
            raise ValueError(
                f"{path}: directions: '{direction['claim']}': expected is 'above' or 'below', not "
                f"{direction['expected']!r}"
            )
    return plan
