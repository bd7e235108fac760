"""Every figure, drawn from saved numbers. Nothing is computed here but positions on paper.

Drawing leaves matplotlib's global state (backend, rcParams, pyplot's figures) unchanged.
"""

from __future__ import annotations

from olmo.console import log
from olmo.exceptions import MissingPackage, needs

SCALES = {"step": "pretraining step", "share": "share of the last step", "tokens": "tokens of pretraining"}  # x axes


def can_draw() -> bool:
    """Whether matplotlib, of the extra `plot`, is installed; logs a warning where it is not, for commands whose numbers
    are of use without their figures."""
    try:
        needs("matplotlib", "plot", "no figures")
    except MissingPackage as error:
        log.warning("%s", error)
        return False
    return True
