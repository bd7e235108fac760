"""Results are recorded in a place of the tests; tokens and a checkpoint that tests only read."""

from tests.analysis.conftest import _records, shared, tokens

__all__ = ["_records", "shared", "tokens"]
