"""Rounds of entries, and the published map rebuilt token for token."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from olmo.exceptions import ConfigurationError
from olmo.knowledge.entries import Entry, load_entries
from olmo.knowledge.plan import Rounds, Text
from olmo.knowledge.plan_files import read_plan
from olmo.knowledge.rounds import build_rounds, with_names
from olmo.tokenizer import encode
from tests.published import INJECTION_MAP, OLMO_EOS, ONCE, PARAPHRASE, fictional_knowledge, olmo_tokenizer

EOS = 0


def entry(name: str, paraphrases: int = 9) -> Entry:
    return Entry(f"{name}0", tuple(f"{name}{i}" for i in range(1, paraphrases + 1)), {})


def spell(texts: list[str]) -> list[list[int]]:
    """A stand-in for a tokenizer: a token a character."""
    return [[ord(c) for c in text] for text in texts]


def read(rounds: Rounds) -> list[list[str]]:
    """The texts of every round, without their EOS."""
    for texts in rounds:
        assert all(text.input_ids[-1] == EOS and EOS not in text.input_ids[:-1] for text in texts)
        assert all(text.wording == "".join(map(chr, text.input_ids[:-1])) for text in texts)
    return [["".join(map(chr, text.input_ids[:-1])) for text in texts] for texts in rounds]


# --- rounds of entries ----------------------------------------------------------------------------------------------


def test_the_plan_of_the_published_entries_is_the_published_map_token_for_token() -> None:
    folder, tokenizer = fictional_knowledge(), olmo_tokenizer()
    entries = {"paraphrase": load_entries(folder / PARAPHRASE), "once": load_entries(folder / ONCE)}
    rounds = build_rounds(entries, 10, lambda texts: encode(tokenizer, texts), OLMO_EOS)
    published = read_plan(folder / INJECTION_MAP).rounds
    assert [[text.input_ids for text in texts] for texts in rounds] == [[t.input_ids for t in ts] for ts in published]
    assert with_names(published, entries, lambda texts: encode(tokenizer, texts), OLMO_EOS) == rounds
    for number, texts in enumerate(rounds, start=1):
        once = [f"once/{i}" for i in range(6 * (number - 1), 6 * number)]
        assert [text.entry for text in texts] == [f"paraphrase/{i}" for i in range(70)] + once


def test_paraphrase_takes_another_wording_in_each_round() -> None:
    built = build_rounds({"paraphrase": [entry("a"), entry("b")]}, 10, spell, EOS)
    assert read(built) == [[f"a{r}", f"b{r}"] for r in range(10)]


def test_duplicate_takes_the_same_wording_in_each_round() -> None:
    built = build_rounds({"duplicate": [entry("a"), entry("b", paraphrases=0)]}, 3, spell, EOS)
    assert read(built) == [["a0", "b0"]] * 3


@given(rounds=st.integers(1, 12), each=st.integers(1, 7))
def test_once_deals_every_entry_to_one_round_in_order(rounds: int, each: int) -> None:
    entries = [entry(f"{number}.") for number in range(rounds * each)]
    built = build_rounds({"once": entries}, rounds, spell, EOS)
    assert read(built) == [[f"{n}.0" for n in range(each * (r - 1), each * r)] for r in range(1, rounds + 1)]


def test_once_enters_in_the_first_rounds_alone() -> None:
    files = {"once": [entry("o"), entry("O")], "duplicate": [entry("d")]}
    assert read(build_rounds(files, 3, spell, EOS, once_rounds=1)) == [["d0", "o0", "O0"], ["d0"], ["d0"]]
    assert read(build_rounds(files, 3, spell, EOS, once_rounds=2)) == [["d0", "o0"], ["d0", "O0"], ["d0"]]
    with pytest.raises(ConfigurationError, match=r"injection\.once_rounds: 3 is more than injection\.rounds, 2"):
        build_rounds(files, 2, spell, EOS, once_rounds=3)
    with pytest.raises(ConfigurationError, match=r"injection\.once_rounds: 2 once entries do not divide into 3 rounds"):
        build_rounds(files, 4, spell, EOS, once_rounds=3)


def test_settings_stand_in_one_order_whatever_the_order_of_the_mapping() -> None:
    files = {"once": [entry("o"), entry("O")], "duplicate": [entry("d")], "paraphrase": [entry("p")]}
    built = build_rounds(files, 2, spell, EOS)
    assert read(built) == [["p0", "d0", "o0"], ["p1", "d0", "O0"]]
    assert [text.entry for text in built[1]] == ["paraphrase/0", "duplicate/0", "once/1"]


@settings(max_examples=60)
@given(rounds=st.integers(1, 6), paraphrase=st.integers(0, 4), duplicate=st.integers(0, 4), once_each=st.integers(0, 3))
def test_the_union_of_the_rounds_of_any_mix_of_settings(
    rounds: int, paraphrase: int, duplicate: int, once_each: int
) -> None:
    sizes = {"paraphrase": paraphrase, "duplicate": duplicate, "once": once_each * rounds}
    files = {name: [entry(f"{name}{n}.", paraphrases=rounds - 1) for n in range(size)] for name, size in sizes.items()}
    built = build_rounds(files, rounds, spell, EOS)
    # Every wording of every paraphrase entry once, every duplicate in every round, every once entry in one round.
    expected = Counter(f"paraphrase{n}.{wording}" for n in range(paraphrase) for wording in range(rounds))
    expected += Counter({f"duplicate{n}.0": rounds for n in range(duplicate)})
    expected += Counter(f"once{n}.0" for n in range(once_each * rounds))
    assert Counter(text for texts in read(built) for text in texts) == expected
    for texts in built:
        # No entry twice in a round; settings in one order, entries in the order of their files.
        places = [(list(sizes).index(setting), int(number)) for setting, number in (t.entry.split("/") for t in texts)]
        assert places == sorted(set(places))
        assert len(texts) == paraphrase + duplicate + once_each


def test_texts_of_a_map_are_known_by_their_tokens() -> None:
    entries = {"paraphrase": [entry("p"), entry("q")], "once": [entry("o"), entry("p")]}
    tokens = {name: (*map(ord, name), EOS) for name in ("o0", "q3", "p0", "x0")}
    published = ((Text("map/0", tokens["o0"]), Text("map/1", tokens["x0"])), (Text("map/0", tokens["q3"]),))
    (first, unknown), (second,) = with_names(published, entries, spell, EOS)
    assert (first, unknown, second) == (
        Text("once/0", tokens["o0"]), Text("map/1", tokens["x0"]), Text("paraphrase/1", tokens["q3"])
    )  # fmt: skip
    assert (first.wording, unknown.wording, second.wording) == ("o0", None, "q3")
    # A text of two entries belongs to the first; a name that is none of a map stays; without EOS it is another text.
    others = ((Text("map/0", tokens["p0"]), Text("mine", tokens["p0"]), Text("map/2", tokens["p0"][:-1])),)
    named = with_names(others, entries, spell, EOS)
    assert [text.entry for text in named[0]] == ["paraphrase/0", "mine", "map/2"]


def test_errors_of_a_plan_say_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="paraphrase entry 1 has 2 paraphrases, 4 rounds need 3"):
        build_rounds({"paraphrase": [entry("a"), entry("b", paraphrases=2)]}, 4, spell, EOS)
    with pytest.raises(ValueError, match="7 once entries do not divide into 2 rounds"):
        build_rounds({"once": [entry("a")] * 7}, 2, spell, EOS)
    with pytest.raises(ValueError, match=r"injection\.rounds: 0 must be at least 1"):
        build_rounds({}, 0, spell, EOS)
