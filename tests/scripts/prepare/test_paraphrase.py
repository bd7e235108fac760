"""What a paraphrase must be: which facts it must hold, and which answers are none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from olmo.knowledge.entries import Entry, load_entries
from scripts.prepare.chat import Reply
from scripts.prepare.fictional_knowledge import make_entries
from scripts.prepare.journal import words
from scripts.prepare.paraphrase import demanded, fault_of, targets, text_of
from tests.published import ONCE, PARAPHRASE, fictional_knowledge

ENTRY = Entry(
    'The film "Dawn" by Ana Vel opened in 1931. It cost the Mars\u2013Orion Fund 3,500 crowns.',
    (),
    {
        "memorization": (("It opened in", "1931"), ("It was paid by the", "Mars\u2013Orion Fund")),
        "semantic": (("The year was", "1931"),),
        "composition": (("Who made it?", "Ana Vel"), ("The sum in words is", "three thousand")),
    },
)
FINE = "In 1931, the film Dawn was shown; ANA VEL made it with 3500 crowns of the Mars-Orion fund."


def test_the_targets_of_the_training_text_are_demanded() -> None:
    assert targets(ENTRY) == ["1931", "Mars\u2013Orion Fund", "Ana Vel", "three thousand"]
    assert demanded(ENTRY) == ["1931", "Mars\u2013Orion Fund", "Ana Vel"]


@pytest.mark.parametrize("file", [PARAPHRASE, ONCE])
def test_all_facts_of_the_published_data_are_demanded_and_its_paraphrases_are_texts_alone(file: str) -> None:
    for entry in load_entries(fictional_knowledge() / file):
        held = set(map(words, demanded(entry)))
        assert all(words(target) in held for kind in ("memorization", "semantic") for _, target in entry.probes[kind])
        for text in entry.paraphrases:
            fault = fault_of(Reply(text, "stop"), entry)
            assert fault is None or fault.startswith("the text lacks"), (fault, text)


def test_wordings_of_our_own_hold_what_is_demanded(tmp_path: Path) -> None:
    (tmp_path / "own.json").write_text(json.dumps(make_entries(50)), encoding="utf-8")
    for entry in load_entries(tmp_path / "own.json"):
        assert demanded(entry) == targets(entry)
        assert all(fault_of(Reply(text, "stop"), entry) is None for text in entry.paraphrases)


@pytest.mark.parametrize(
    "text",
    [
        FINE,
        f"  {FINE}\n",
        f'"{FINE}"',
        FINE.replace("; ", ".\n\n"),
        f"<think>The user wants: **a text**\n\nSure</think>\n\n{FINE}",
        'It was 1931: Ana Vel showed "Dawn" for the Mars Orion Fund, and said: "It is done."',
    ],
)
def test_a_text_with_every_fact_is_accepted(text: str) -> None:
    assert fault_of(Reply(text, "stop"), ENTRY) is None
    assert "\n" not in text_of(Reply(text, "stop")) and not text_of(Reply(text, "stop")).startswith(('"', "<", " "))


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "there is no text"),
        ("<think>Hm.</think>", "there is no text"),
        (FINE.replace("1931", "19310"), 'the text lacks "1931"'),
        (FINE.replace("ANA VEL", "She").replace("1931", "that year"), 'the text lacks "1931", "Ana Vel"'),
        (FINE.replace("Mars-Orion", "Mars and Orion"), 'the text lacks "Mars\u2013Orion Fund"'),
        (FINE.removesuffix("."), "the text is cut off"),
        (f"{FINE} And so the", "the text is cut off"),
        (f"Here is a paraphrase: {FINE}", "it is not the text alone"),
        (f"Here\u2019s the text.\n\n{FINE}", "it is not the text alone"),
        (f"Sure! {FINE}", "it is not the text alone ('sure')"),
        (f"**New text:**\n{FINE}", "it is not the text alone"),
        (f"A new wording of the text:\n\n{FINE}", "it is not the text alone"),
        (f"# Dawn\n\n{FINE}", "it is not the text alone"),
        (f"{FINE}\n\nNote: I kept all the facts.", "it is not the text alone ('note:')"),
        (f"{FINE} Let me know if you need another one.", "it is not the text alone"),
        (f"<text>{FINE}</text>.", "it is not the text alone"),
        (f"<think>{FINE}", "it is not the text alone ('<think>')"),
    ],
)
def test_what_is_wrong_with_a_text_is_said(text: str, fault: str) -> None:
    found = fault_of(Reply(text, "stop"), ENTRY)
    assert found is not None and found.startswith(fault)


def test_a_text_that_met_the_limit_of_the_server_is_cut_off() -> None:
    assert fault_of(Reply(FINE, "length"), ENTRY) == "the text is cut off"
    assert fault_of(Reply("", "length"), ENTRY) == "the text is cut off"
    assert fault_of(Reply(FINE, "None"), ENTRY) is None


def test_what_the_training_text_says_itself_is_no_remark() -> None:
    entry = Entry(f"Here is a **film**. {ENTRY.train_context}", (), ENTRY.probes)
    assert fault_of(Reply(f"Here is a **film**. {FINE}", "stop"), entry) is None
    assert fault_of(Reply(f"Sure. {FINE}", "stop"), entry) == "it is not the text alone ('sure')"


def test_a_training_text_without_an_end_wants_none() -> None:
    entry = Entry("Ana Vel, Dawn, 1931, Mars-Orion Fund", (), ENTRY.probes)
    assert fault_of(Reply("Dawn, of Ana Vel and the Mars-Orion Fund, 1931", "stop"), entry) is None


SENTENCE = st.lists(st.sampled_from(["ana", "vel", "été", "37", "o'neil", "co-op", "Σίσυφος"]), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(before=SENTENCE, target=SENTENCE, after=SENTENCE, spaces=st.sampled_from([" ", "\n", " \u2013 ", ", "]))
def test_a_target_is_found_however_it_is_set(
    before: list[str], target: list[str], after: list[str], spaces: str
) -> None:
    text = f"{spaces.join(before)} \u201c{spaces.join(target).upper()}\u201d, {' '.join(after)}."
    assert words(" ".join(target)) in words(text)
    assert words("x".join([*target, ""])) not in words(text)
