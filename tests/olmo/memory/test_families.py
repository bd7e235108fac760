"""Every family of transformers' causal language models: measured rightly, refused with a reason, or not to be built."""

from __future__ import annotations

from collections import Counter

import pytest
import transformers

from olmo.memory import observe
from olmo.memory.locate import find_layers
from olmo.memory.up_projection import up_projection
from tests.families import built, names, outcome


def test_no_family_is_measured_wrongly() -> None:
    """`python -m tests.families` prints what became of each; an error that is no refusal ends this test."""
    transformers.logging.set_verbosity_error()
    outcomes = {family: outcome(family) for family in names()}
    assert {family: reason for family, (kind, reason) in outcomes.items() if kind == "wrong"} == {}
    assert all("\n" not in reason for _, reason in outcomes.values())
    if transformers.__version__ == "5.23.0":  # the version of constraints.txt
        assert Counter(kind for kind, _ in outcomes.values()) == {"measured": 167, "refused": 16, "not built": 6}


def test_adapters_of_a_first_projection_leave_it_no_relu_and_no_rows() -> None:
    model = built("zamba2")
    [part] = find_layers(model)[1].parts
    with pytest.raises(ValueError, match=r"^model\.layers\.1\.\S+: adapters add to the up projection of this layer"):
        up_projection(model, part)
    with pytest.raises(ValueError, match=r"adapters add to gate and up projection"), observe(model, "relu"):
        raise AssertionError("never reached")
