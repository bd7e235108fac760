"""How all tests run: seeded, without deadlines (machines differ), leaving nothing behind."""

import gc
import os

# Tests run in several processes side by side and their models are tiny: threads would only wait for each other.
# Before anything imports torch, and for the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from hypothesis import settings

settings.register_profile("project", deadline=None, derandomize=True, database=None)
settings.load_profile("project")


def pytest_collection_finish() -> None:
    """What imports have left lives as long as the process: the garbage collector need not look through it again."""
    gc.collect()
    gc.freeze()
