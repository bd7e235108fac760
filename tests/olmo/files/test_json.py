"""JSON that is written: numbers of other programs' JSON, or an error that names the one that is none."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from olmo.files.paths import as_json

CONTENT = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats() | st.text(max_size=2),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=6,
)


def numbers(content: Any) -> list[float]:
    if isinstance(content, float):
        return [content]
    inner = content.values() if isinstance(content, dict) else content if isinstance(content, list) else []
    return [number for item in inner for number in numbers(item)]


@settings(max_examples=40)
@given(CONTENT)
def test_json_holds_finite_numbers_or_is_an_error_that_names_the_file(content: Any) -> None:
    path = Path("a/b.json")
    if all(map(math.isfinite, numbers(content))):
        assert json.loads(as_json(content, path), parse_constant=pytest.fail) == content
    else:
        with pytest.raises(
            ValueError, match=r"^a/b\.json: not written: [abc\d.]* is -?(nan|inf), not a finite number$"
        ):
            as_json(content, path)


def test_the_key_of_the_number_is_named() -> None:
    with pytest.raises(ValueError, match=r"r\.json: not written: runs\.1\.A\.low is nan, not a finite number"):
        as_json({"runs": [{"A": None}, {"A": {"value": 1.0, "low": math.nan}}]}, Path("r.json"))
