"""Tables 1 and 2: the numbers of the study, the published ones beside where it repeats a published study."""

import re

import pytest

from analysis.study.tables import check_names, tables
from tests.analysis.study.rows import rich

SPEC_A = {"118k": 25.2, "369k": 24.8, "554k": 21.4, "738k": 18.8}  # arXiv 2410.01380, table 1 (a)
SPEC_RATE = {"118k": 58.9, "369k": 60.7, "554k": 60.6, "738k": 59.9}  # table 2 (d), P


def as_dicts(table: dict) -> list[dict]:
    return [dict(zip(table["head"], row, strict=True)) for row in table["rows"]]


def of_1b(study: dict, **changes) -> dict:
    """One model, the setting c4 under another name."""
    kept = [c for c in study["conditions"] if c["model"] == "1B"]
    return {**study, "conditions": kept, "starts": study["starts"][:4], **changes}


def test_a_table_has_the_outcomes_of_every_setting_and_start():
    study = rich()
    [one, two] = tables(study, ["table_1", "table_2"])
    assert one["head"] == ["setting", "model", "start", "A, %", "F, %"] and one["note"] == ""
    plain = [c for c in study["conditions"] if c["intervention"] == "none"]
    assert len(one["rows"]) == len(two["rows"]) == len(plain)
    by_place = {(c["setting"], c["start"]): c["common_start"] for c in plain}
    for row in as_dicts(one):
        outcomes = by_place[row["setting"], row["start"]]
        assert (row["A, %"], row["F, %"]) == (outcomes["A"], outcomes["F"])
    for row in as_dicts(two):
        outcomes = by_place[row["setting"], row["start"]]
        assert row["K"] == outcomes["K_after"] and row["P, %"]["value"] == 100 * outcomes["P_after"]["value"]
    assert [row["setting"] for row in as_dicts(one)] == ["baseline"] * 6 + ["c4"] * 6


def test_the_published_numbers_are_beside_those_of_the_same_setting_and_start():
    study = of_1b(rich(), repeats="paper_1b")
    names = {"c4": "rate_1e-4"}
    conditions = [{**c, "setting": names.get(c["setting"], c["setting"])} for c in study["conditions"]]
    for c in conditions:
        c["common_start"] = {**c["common_start"], "K_published_after": {"value": -0.3, "low": None, "high": None}}
    study |= {"conditions": conditions, "settings": {"baseline": {}, "rate_1e-4": {}}}
    one, two = tables(study, ["table_1", "table_2"])
    published = {(r["setting"], r["start"]): r["A, % of the paper"] for r in as_dicts(one)}
    assert {start: published["baseline", start] for start in SPEC_A} == SPEC_A
    rows = {r["start"]: r for r in as_dicts(two) if r["setting"] == "rate_1e-4"}
    assert {start: row["P, % of the paper"] for start, row in rows.items()} == SPEC_RATE
    assert rows["554k"]["K of the paper"] == -0.284 and rows["554k"]["K as published"]["value"] == -0.3
    assert "2410.01380" in two["note"] and "diluted" in two["note"]


def test_a_start_or_setting_that_was_not_published_has_no_number_beside():
    study = of_1b(rich(), repeats="paper_1b")
    published = {(r["setting"], r["start"]): r["A, % of the paper"] for r in as_dicts(tables(study, ["table_1"])[0])}
    assert {value for (setting, _), value in published.items() if setting == "c4"} == {None}


def test_changes_that_were_published_of_a_text_are_in_the_note():
    [table] = tables(of_1b(rich(), repeats="paper_c4"), ["table_1"])
    assert "A of the paper changes by -6.4 points on PubMed, -3.4 points on C4 from the first" in table["note"]


def test_without_accuracies_the_rise_of_the_held_out_loss_is_beside_a():
    study = of_1b(rich())
    for c in study["conditions"]:
        c["common_start"] = {**c["common_start"], "F": None}
    [table] = tables(study, ["table_1"])
    assert table["head"] == ["setting", "start", "A, %", "rise of held-out general loss, %"]


def test_unknown_names_are_errors_with_the_nearest():
    with pytest.raises(ValueError, match=re.escape("unknown table 'table_3', did you mean 'table_")):
        check_names(["table_3"])
    with pytest.raises(ValueError, match=re.escape("repeats: unknown 'paper_1B', did you mean 'paper_1b'?")):
        tables({**rich(), "repeats": "paper_1B"}, ["table_1"])
