"""Train OLMo-compatible language models, inject knowledge into them, and look at their memories."""

import os
from collections.abc import Callable
from importlib import import_module
from typing import Any

from .files import neighbour  # noqa: F401 (raises where ai2-olmo has overwritten files of this package)

# OpenMP threads that wait for each other spin. On a machine with other work, a spinning thread keeps the one it waits
# for from running, and training falls to a tenth of its speed; a short spin costs nothing on an idle machine.
# The OpenMP runtime reads this once, when torch loads it, therefore it is set here.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def on_use(package: str, **modules: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package that imports its modules when they are first used: commands print their
    help and check their arguments without torch. modules: the names that the package has of each, separated by spaces.
    """
    where = {name: module for module, names in modules.items() for name in names.split()}

    def get(name: str) -> Any:
        if name in modules:
            return import_module(f"{package}.{name}")
        if name not in where:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{where[name]}"), name)

    return get, lambda: sorted({*modules, *where})
