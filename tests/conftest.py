"""How all tests run: seeded, without deadlines (machines differ), leaving nothing behind."""

import atexit
import gc
import os
import shutil
import tempfile
from collections.abc import Generator
from pathlib import Path

# Tests run in several processes side by side and their models are tiny: threads would only wait for each other.
# Before anything imports torch, and for the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# The user's cache is neither read nor written, but for matplotlib's list of fonts, which takes seconds to make.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ.setdefault("MPLCONFIGDIR", str(Path.home() / ".cache" / "matplotlib"))
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="cache")
    atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

import pytest
from hypothesis import settings

from tests.devices import compiler, cuda, device  # noqa: F401 (fixtures)
from tests.warm import share

settings.register_profile("project", deadline=None, derandomize=True, database=None)
settings.load_profile("project")
gc.disable()  # until all is collected: what imports make is not garbage

# These take longest and are begun first: one that several processes come to at the end leaves the others idle.
LONGEST = (
    *("configs/test_studies.py", "docs/test_commands.py", "scripts/test_train_published.py"),
    *("olmo/train/test_parallel_families.py", "olmo/eval/test_downstream.py", "scripts/test_prepare_pubmed.py"),
    *("olmo/train/test_stopping.py", "olmo/memory/test_families.py", "scripts/benchmarks/test_against.py"),
    *("analysis/test_downloads.py", "olmo/checkpoint/test_remote_runs.py", "olmo/train/test_crash.py"),
)
_PLACES = {Path(__file__).resolve().parent / name: place for place, name in enumerate(LONGEST)}
assert all(path.is_file() for path in _PLACES)


def pytest_configure(config: pytest.Config) -> None:
    """Several processes of pytest have one process that forks commands."""
    if config.getoption("numprocesses", None):
        share()


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Each of several processes begins to collect elsewhere, and finds what the others have compiled by then."""
    report = yield
    if isinstance(collector, pytest.Dir) and "PYTEST_XDIST_WORKER" in os.environ:
        place = int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw")) / int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
        first = int(len(report.result) * place)
        report.result = report.result[first:] + report.result[:first]
    return report


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: (_PLACES.get(item.path, len(LONGEST)), item.path))


def pytest_collection_finish() -> None:
    """What imports have left lives as long as the process: the garbage collector need not look through it again."""
    gc.collect()
    gc.freeze()
    gc.enable()
