"""The package in a program of its own: what importing it changes, and that it is typed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import knowledge_entropy as ke
from tests.running import ROOT, command

PROGRAM = """
import sys
import knowledge_entropy as ke

heavy = {"torch", "transformers", "numpy", "matplotlib", "datasets", "olmo", "analysis"} & set(sys.modules)
assert not heavy, heavy

import logging, os, random, signal, warnings
import matplotlib, numpy, torch, transformers, datasets, huggingface_hub
import requests  # it and urllib3 add filters of their own warnings

def loggers():
    known = {name: logging.getLogger(name) for name in list(logging.root.manager.loggerDict)}
    others = {n: one for n, one in known.items() if n.split(".")[0] not in ("olmo", "analysis", "knowledge_entropy")}
    return {n: (one.level, list(one.handlers), list(one.filters), one.propagate) for n, one in others.items()}

def state():
    return {
        "environment": dict(os.environ),
        "backend": str(dict.get(matplotlib.rcParams, "backend")),
        "rcParams": {key: str(value) for key, value in dict.items(matplotlib.rcParams)},
        "pyplot": "matplotlib.pyplot" in sys.modules,
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "torch": (torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_float32_matmul_precision(),
                  torch.are_deterministic_algorithms_enabled(), torch.get_default_device()),
        "root": (logging.root.level, list(logging.root.handlers), list(logging.root.filters), logging.raiseExceptions),
        "verbosity": (transformers.logging.get_verbosity(), huggingface_hub.utils.logging.get_verbosity()),
        "bars": (datasets.is_progress_bar_enabled(), huggingface_hub.utils.are_progress_bars_disabled()),
        "warnings": list(warnings.filters),
        "random": (random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()),
        "numpy": numpy.geterr(),
        "signals": [signal.getsignal(number) for number in signal.valid_signals()],
        "hooks": (sys.excepthook, sys.unraisablehook, sys.stdout, sys.stderr, sys.displayhook, sys.getrecursionlimit()),
        "path": list(sys.path),
        "folder": os.getcwd(),
    }

model = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(
    vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2))
before, known = state(), loggers()
for name in ke.__all__:
    getattr(ke, name)
import analysis.figures.result
after, now = state(), loggers()
assert before == after, {key: (before[key], after[key]) for key in before if before[key] != after[key]}
assert {name: now[name] for name in known} == known, {name: now[name] for name in known if now[name] != known[name]}

ke.measure(model, [[1, 2, 3]]).plot()
last = state()
assert last == after, {key: (last[key], after[key]) for key in last if last[key] != after[key]}
print("unchanged")
"""


def test_importing_it_changes_no_global_state_and_imports_nothing() -> None:
    ended = command(["-c", PROGRAM], ROOT, new=True)
    assert ended.stdout == "unchanged\n", ended.stderr


def test_names_are_those_that_it_exports() -> None:
    assert set(ke.__all__) <= set(dir(ke))
    for name in ke.__all__:
        assert getattr(ke, name).__name__ == name and getattr(ke, name).__doc__
    with pytest.raises(AttributeError, match="has no attribute 'mesure'"):
        ke.mesure  # type: ignore[attr-defined]  # noqa: B018
    source = Path(ke.__file__).read_text("utf-8")
    typed = source.partition("TYPE_CHECKING:\n")[2].partition("# Each name")[0]
    assert {line.rpartition(" as ")[2] for line in typed.splitlines() if " as " in line} == set(ke.__all__)
    assert (Path(ke.__file__).parent / "py.typed").is_file() and sys.modules["knowledge_entropy"] is ke
