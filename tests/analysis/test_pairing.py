"""Runs that are compared as a pair but do not share their injected texts or order of data are named."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from analysis.acquisition import main
from analysis.pairing import unpaired
from analysis.runs import Run
from tests.run_folders import AFTER, BEFORE, probe_table, run_in_memory, write_injections, write_run

ROUNDS = {3: ["once/0", "once/1"], 6: ["once/2", "once/3"]}
ORDER = np.random.default_rng(0).permutation(48).reshape(12, 4)


def recorded(folder: Path, rounds: dict = ROUNDS, order: np.ndarray = ORDER, ranks: int = 1, seed: int = 1) -> Run:
    """A run that recorded its injections, and the batches of each of its ranks."""
    (folder / "data-indices").mkdir(parents=True)
    if rounds:
        write_injections(folder, rounds)
    for rank in range(ranks):
        lines = ["\t".join(map(str, [step, *row[rank::ranks]])) + "\n" for step, row in enumerate(order, start=1)]
        (folder / "data-indices" / f"rank{rank}.tsv").write_text("".join(lines))
    return run_in_memory(BEFORE, AFTER, name=folder.name, folder=folder, seed=(seed, None))


@pytest.fixture
def one(tmp_path) -> Run:
    return recorded(tmp_path / "one")


@pytest.mark.parametrize(
    "shared",
    [
        {},
        {"ranks": 2},
        {"rounds": {}},  # a control without injection
        {"rounds": {30: ROUNDS[3]}},  # other steps, as with another batch size, and fewer of them as yet
        {"order": ORDER.reshape(6, 8)},  # batches twice as large
        {"order": ORDER.reshape(8, 6)},
        {"order": ORDER[:5]},  # in progress
        {"order": np.concatenate([ORDER, ORDER])},  # epochs
    ],
    ids=repr,
)
def test_runs_that_share_texts_and_order_are_a_pair(one, tmp_path, shared):
    other = recorded(tmp_path / "other", **shared)
    assert unpaired([one], [other]) == unpaired([other], [one]) == []
    assert unpaired([one], [one]) == []


@pytest.mark.parametrize(
    ("differs", "reason"),
    [
        ({"rounds": {3: ROUNDS[3], 6: ["once/2", "once/4"]}}, "injected texts differ, first in round 2"),
        ({"rounds": {3: ROUNDS[3][::-1], 6: ROUNDS[6]}}, "injected texts differ, first in round 1"),
        ({"order": ORDER[[0, 1, 2, 4, 3, *range(5, 12)]]}, "the order of data differs, first at step 4"),
        ({"order": ORDER[[0, 1, 2, 4, 3, *range(5, 12)]].reshape(6, 8)}, "the order of data differs, first at step 3"),
        ({"seed": 2}, "their seeds differ, and so does the order of data"),
    ],
)
def test_what_a_pair_does_not_share_is_named(one, tmp_path, differs, reason):
    other = recorded(tmp_path / "other", **differs)
    again = dataclasses.replace(other, name="again")
    assert unpaired([one], [other]) == [f"one and other are no pair: {reason}"]
    assert unpaired([one, one], [other, again]) == [f"one and other (and 1 more) are no pair: {reason}"]


def test_runs_on_different_data_are_no_pair(one, tmp_path):
    """Equal numbers of instances are then other instances."""
    settings = [json.dumps({"data": {"paths": [name]}}) for name in ("pubmed.npy", "c4.npy")]
    first, second = (dataclasses.replace(one, settings=text, folder=tmp_path / text[-9:-3]) for text in settings)
    assert unpaired([first], [second]) == ["one and one are no pair: their data.paths differ"]
    assert unpaired([first], [dataclasses.replace(first, folder=tmp_path)]) == []


def test_a_last_line_that_is_being_written_is_left_out(one, tmp_path):
    other = recorded(tmp_path / "other", ranks=2)
    path = other.folder / "data-indices" / "rank1.tsv"
    path.write_text(path.read_text()[:-3])
    assert unpaired([one], [other]) == []
    path.write_text("1\tx\n")
    with pytest.raises(ValueError, match=r"rank1\.tsv: line 1 is not a step and numbers of instances"):
        unpaired([one], [other])


def test_the_command_names_them(tmp_path, capsys):
    tables = {0: probe_table(BEFORE), 20: probe_table(AFTER)}
    folders = [
        write_run(tmp_path / name, {**tables, 20: probe_table(AFTER, spread=s)}) for name, s in zip("ab", (0, 1))
    ]
    for folder, texts in zip(folders, (["once/0"], ["once/1"])):
        write_injections(folder, {10: texts})
    main([*map(str, folders)])
    assert "note: a and b are no pair: injected texts differ, first in round 1\n" in capsys.readouterr().out
