"""Keys that define a run."""

import json
from pathlib import Path

from olmo.config import (
    changed_keys,
    load,
)
from tests.olmo.config.configurations import MINIMAL, write


def test_keys_that_define_a_run_and_differ(tmp_path: Path) -> None:
    """All that it is, and nothing of how it is run; a list or a section that is not in both counts as one."""
    before = load(write(tmp_path, MINIMAL))
    changes = {"seed": 1, "data.paths": ["x"], "injection": {"once": "e"}, "inject_interval": 3, "model.init_std": 0.5}
    changes["max_duration"] = 3
    neither = {"data.num_workers": 2, "model.init_device": "meta", "console_log_interval": 5}
    overrides = [f"--{key}={json.dumps(value)}" for key, value in {**changes, **neither}.items()]
    now = load(write(tmp_path, MINIMAL), overrides)
    assert set(changed_keys(before, now)) == set(changed_keys(now, before)) == changes.keys()
    assert changed_keys(before, load(write(tmp_path, MINIMAL))) == []
    # A null that stands for one value, as in configurations that earlier versions saved.
    assert (
        changed_keys(before, load(tmp_path / "config.yaml", ["--data.memmap_dtype=uint16", "--precision=fp32"])) == []
    )
    assert changed_keys(before, load(tmp_path / "config.yaml", ["--data.memmap_dtype=uint32"])) == ["data.memmap_dtype"]
