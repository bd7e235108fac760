"""`scripts.paraphrase` against a server on this machine: what is accepted, what is asked again, and going on."""

from __future__ import annotations

import fcntl
import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from olmo.exceptions import exit_status
from olmo.knowledge.entries import Entry, load_entries
from scripts import paraphrase
from scripts.paraphrase import demanded, fault_of, targets, text_of, words
from scripts.prepare import chat
from scripts.prepare.chat import Reply
from scripts.prepare.fictional_knowledge import make_entries
from tests.chatting import Body, ChatServer, Trouble, chatting, reworded, text_in
from tests.published import ONCE, PARAPHRASE, fictional_knowledge
from tests.running import ROOT, wait_for

KEY = "sk-0123-secret"

run = functools.partial(exit_status, paraphrase.main)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ChatServer]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(chat, "WAIT", 0.0)
    with chatting() as server:
        yield server


@pytest.fixture
def raw() -> list[dict[str, Any]]:
    """Three entries, with 1, 0 and 2 paraphrases."""
    raw = make_entries(3, 2)
    raw[0]["paraphrases"].pop()
    raw[1]["paraphrases"].clear()
    return raw


@pytest.fixture
def entries(raw: list[dict[str, Any]], tmp_path: Path) -> Path:
    path = tmp_path / "entries.json"
    path.write_text(json.dumps(raw), encoding="utf-8")
    return path


@pytest.fixture
def arguments(entries: Path, server: ChatServer, tmp_path: Path) -> list[str]:
    """A command line that has 9 paraphrases to ask for: 3, 4 and 2."""
    where = [str(entries), "--output", str(tmp_path / "out.json")]
    return [*where, "--paraphrases", "4", "--endpoint", server.url, "--model", "small"]


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "out.json.partial.jsonl"


def the_error(capsys: pytest.CaptureFixture[str]) -> str:
    stderr = capsys.readouterr().err
    assert stderr.startswith("error: ") and stderr.count("\n") == 1, stderr
    return stderr


def accepted(journal: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in journal.read_bytes().splitlines()[1:]]


def start(arguments: list[str], **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "scripts.paraphrase", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# --- what a paraphrase must be -----------------------------------------------------------------------------------

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


# --- through the command line ------------------------------------------------------------------------------------


def test_from_the_command_line(
    arguments: list[str], raw: list[dict[str, Any]], server: ChatServer, tmp_path: Path
) -> None:
    server.key = KEY
    process = start(arguments, OPENAI_API_KEY=KEY)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (0, "")
    count = sum(len({*entry["mem_target"], *entry["hard_gen_target"]}) for entry in raw)
    held = f"hold the {count} of {count} targets that their training texts hold"
    assert stdout == f"{tmp_path / 'out.json'}: 3 entries, 9 new paraphrases, which {held}\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["entries.json", "out.json"]
    made = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    for new, old in zip(made, raw, strict=True):
        assert new["paraphrases"][: len(old["paraphrases"])] == old["paraphrases"]
        texts = new.pop("paraphrases")
        assert len(set(texts)) == 4 and all(old["train_context"] in t for t in texts[len(old.pop("paraphrases")) :])
        assert new == old
    assert len(load_entries(tmp_path / "out.json")) == 3
    assert len(server.asked) == 9
    asked = Counter(text_in(request.body) for request in server.asked)
    assert [asked[entry["train_context"]] for entry in raw] == [3, 4, 2]
    for request in server.asked:
        assert set(request.body) == {"model", "messages"} and request.body["model"] == "small"
        (message,) = request.body["messages"]
        assert message["role"] == "user"
        (entry,) = (entry for entry in raw if entry["train_context"] == text_in(request.body))
        assert all(f"\n- {target}\n" in request.prompt for target in entry["mem_target"])


def test_paraphrases_of_an_entry_are_asked_for_in_several_manners(arguments: list[str], server: ChatServer) -> None:
    assert run([*arguments, "--paraphrases", "9"]) == 0
    prompts = Counter(request.prompt for request in server.asked)
    assert len(prompts) == len(server.asked) == 8 + 9 + 7


def test_entries_that_have_enough_are_left_as_they_are(
    arguments: list[str], raw: list[dict[str, Any]], server: ChatServer, tmp_path: Path
) -> None:
    assert run([*arguments, "--paraphrases", "1"]) == 0
    made = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert [len(entry["paraphrases"]) for entry in made] == [1, 1, 2]
    assert [made[0], made[2]] == [raw[0], raw[2]] and len(server.asked) == 1
    again = [str(tmp_path / "out.json"), *arguments[1:], "--paraphrases=1", f"--output={tmp_path / 'again.json'}"]
    assert run(again) == 0
    assert json.loads((tmp_path / "again.json").read_text(encoding="utf-8")) == made and len(server.asked) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"entries.json", "out.json", "again.json"}


# What a model may do wrong -> what it is told.
BAD: dict[str, tuple[Callable[[Body], Any], str]] = {
    "a target is missing": (lambda body: reworded(body).replace(first_target(body), "something"), "the text lacks"),
    "cut off": (lambda body: (reworded(body), "length"), "the text is cut off"),
    "introduced": (lambda body: f"Here is a paraphrase:\n\n{reworded(body)}", "it is not the text alone"),
    "the training text": (lambda body: text_in(body), "this text is there already"),
    "an old paraphrase": (lambda body: old_paraphrase(body), "this text is there already"),
}


def entry_of(body: Body) -> dict[str, Any]:
    return next(entry for entry in make_entries(3, 2) if entry["train_context"] == text_in(body))


def first_target(body: Body) -> str:
    return entry_of(body)["mem_target"][0]


def old_paraphrase(body: Body) -> str:
    return entry_of(body)["paraphrases"][0].upper()


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_answer_is_asked_again_with_what_was_wrong(
    kind: str, arguments: list[str], raw: list[dict[str, Any]], server: ChatServer, entries: Path, tmp_path: Path
) -> None:
    entries.write_text(json.dumps(raw[2:]), encoding="utf-8")
    answer, fault = BAD[kind]
    server.answers = lambda body: answer(body) if len(server.asked) == 1 else reworded(body)
    assert run([*arguments, "--paraphrases=3", "--parallel=1"]) == 0
    first, second = server.asked
    assert second.body["messages"][0] == first.body["messages"][0]
    said = answer(first.body)
    told, complaint = second.body["messages"][1:]
    assert told == {"role": "assistant", "content": said[0] if isinstance(said, tuple) else said}
    assert complaint["role"] == "user" and fault in complaint["content"]
    if kind == "a target is missing":
        assert f'"{first_target(first.body)}"' in complaint["content"]
    (made,) = load_entries(tmp_path / "out.json")
    assert made.paraphrases[:2] == tuple(raw[2]["paraphrases"])
    assert made.paraphrases[2] == reworded(second.body)


def test_a_third_answer_is_asked_for_with_the_second_alone(arguments: list[str], server: ChatServer) -> None:
    server.answers = lambda body: f"Sure {len(server.asked)}." if len(server.asked) < 3 else reworded(body)
    assert run([*arguments, "--paraphrases=1"]) == 0
    first, second, third = (request.body["messages"] for request in server.asked)
    assert first == second[:1] == third[:1] and len(second) == len(third) == 3
    assert (second[1]["content"], third[1]["content"]) == ("Sure 1.", "Sure 2.")


def test_an_empty_answer_is_asked_again_as_at_first(arguments: list[str], server: ChatServer) -> None:
    server.answers = lambda body: (None, "stop") if len(server.asked) == 1 else reworded(body)
    assert run([*arguments, "--paraphrases=1", "--parallel=1"]) == 0
    first, second = server.asked
    assert first.body == second.body


def test_two_equal_answers_for_one_entry_are_not_both_accepted(
    arguments: list[str], server: ChatServer, tmp_path: Path
) -> None:
    """Four at a time come with the same text; whoever is second is told so."""
    server.seconds = 0.05
    server.answers = lambda body: f"Well then. {text_in(body)}" if len(body["messages"]) == 1 else reworded(body)
    assert run([*arguments, "--parallel=4"]) == 0
    for entry in load_entries(tmp_path / "out.json"):
        assert len(set(entry.paraphrases)) == 4
        assert sum(text.startswith("Well then.") for text in entry.paraphrases) == 1


def test_troubles_of_the_server_cost_nothing_but_time(arguments: list[str], server: ChatServer, tmp_path: Path) -> None:
    server.troubles = [
        Trouble(429, {}, {"Retry-After": "0"}),
        Trouble(500),
        Trouble("reset"),
        Trouble("cut"),
        Trouble(503, b"<html>"),
    ]
    assert run(arguments) == 0
    assert [len(entry.paraphrases) for entry in load_entries(tmp_path / "out.json")] == [4, 4, 4]
    assert len(server.asked) == 9 + 5


def test_what_cannot_be_had_is_one_line_an_entry_and_the_rest_is_kept(
    arguments: list[str],
    raw: list[dict[str, Any]],
    server: ChatServer,
    journal: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    hopeless = raw[1]["train_context"]
    target = raw[1]["mem_target"][2]

    def answer(body: Body) -> str:
        return reworded(body).replace(target, "") if text_in(body) == hopeless else reworded(body)

    server.answers = answer
    assert run([*arguments, "--attempts=3"]) == 1
    stderr = capsys.readouterr().err.splitlines()
    assert stderr == [
        f'error: entry 1: 4 missing after 3 answers for each; of the last one: the text lacks "{target}"',
        f"error: 4 of 9 paraphrases could not be had; the others are in {journal}, and the same command asks again for "
        "those that are missing",
    ]
    assert not (tmp_path / "out.json").exists() and len(accepted(journal)) == 5
    assert len(server.asked) == 5 + 4 * 3
    server.answers = reworded
    server.asked.clear()
    assert run([*arguments, "--attempts=3"]) == 0
    assert {text_in(request.body) for request in server.asked} == {hopeless} and len(server.asked) == 4
    assert f"5 of 9 paraphrases are in {journal}\n" in capsys.readouterr().out
    assert [len(entry.paraphrases) for entry in load_entries(tmp_path / "out.json")] == [4, 4, 4]
    assert not journal.exists()


def test_where_nothing_can_be_had_nothing_is_left(
    arguments: list[str], server: ChatServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.answers = lambda body: "No."
    assert run([*arguments, "--attempts=1"]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: 9 of 9 paraphrases could not be had; the same command asks again for those that are missing"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["entries.json"]


@pytest.mark.parametrize("parallel", [1, 3])
def test_so_many_are_asked_for_at_a_time(parallel: int, arguments: list[str], server: ChatServer) -> None:
    server.seconds = 0.05
    assert run([*arguments, f"--parallel={parallel}"]) == 0
    assert server.most_at_once == parallel


def test_seeds_differ_and_do_not_depend_on_the_order(arguments: list[str], server: ChatServer, tmp_path: Path) -> None:
    """A server that goes by the seed gives the same file, however many are asked at a time."""
    server.answers = lambda body: f"In account {body['seed']}, {text_in(body)}"
    outputs = []
    for number, (seed, parallel) in enumerate([(5, 1), (5, 4), (6, 1)]):
        output = tmp_path / f"{number}.json"
        server.asked.clear()
        assert run([*arguments, f"--output={output}", f"--seed={seed}", f"--parallel={parallel}"]) == 0
        seeds = [request.body["seed"] for request in server.asked]
        assert len(set(seeds)) == 9 and all(0 <= seed < 2**31 for seed in seeds)
        outputs.append(output.read_bytes())
    assert outputs[0] == outputs[1] != outputs[2]


def test_a_further_answer_has_a_further_seed(arguments: list[str], server: ChatServer) -> None:
    server.answers = lambda body: "" if len(server.asked) == 1 else reworded(body)
    assert run([*arguments, "--paraphrases=1", "--seed=0", "--temperature=0.7"]) == 0
    first, second = (request.body for request in server.asked)
    assert first["seed"] != second["seed"] and first["temperature"] == second["temperature"] == 0.7


# --- going on ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("torn", [False, True], ids=["whole lines", "half a line"])
def test_killed_half_way_it_asks_only_for_the_rest(
    torn: bool, arguments: list[str], server: ChatServer, journal: Path, tmp_path: Path
) -> None:
    server.gate.clear()
    server.open_for = 5
    process = start([*arguments, "--parallel=1"])
    wait_for(lambda: len(server.asked) == 6, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = accepted(journal)
    assert len(before) == 5 and not (tmp_path / "out.json").exists()
    if torn:
        journal.write_bytes(journal.read_bytes()[:-7])
        before.pop()
    server.gate.set()
    server.asked.clear()
    process = start(arguments)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (0, "")
    assert f"{len(before)} of 9 paraphrases are in {journal}\n" in stdout
    assert len(server.asked) == 9 - len(before)
    made = load_entries(tmp_path / "out.json")
    assert [len(entry.paraphrases) for entry in made] == [4, 4, 4] and not journal.exists()
    assert all(made[line["entry"]].paraphrases[line["paraphrase"]] == line["text"] for line in before)


def test_interrupted_from_the_keyboard_it_ends_at_once(arguments: list[str], server: ChatServer, journal: Path) -> None:
    server.gate.clear()
    server.open_for = 3
    process = start([*arguments, "--parallel=2"])
    wait_for(lambda: len(server.asked) == 5, process)
    process.send_signal(signal.SIGINT)
    started = time.monotonic()
    _, stderr = process.communicate(timeout=20)
    assert (process.returncode, stderr) == (130, "interrupted\n") and time.monotonic() - started < 10
    assert len(accepted(journal)) == 3


@pytest.fixture
def begun(arguments: list[str], server: ChatServer, journal: Path) -> list[str]:
    """The command line of a run that stopped with 6 of its 9 paraphrases: the first entry got none."""
    server.answers = lambda body: "" if text_in(body) == text_in(server.asked[0].body) else reworded(body)
    assert run([*arguments, "--parallel=1", "--attempts=1"]) == 1
    assert len(accepted(journal)) == 6
    server.asked.clear()
    return arguments


def test_more_can_be_asked_for_before_it_is_complete(begun: list[str], server: ChatServer, tmp_path: Path) -> None:
    server.answers = reworded
    assert run([*begun, "--paraphrases=5"]) == 0
    assert [len(entry.paraphrases) for entry in load_entries(tmp_path / "out.json")] == [5, 5, 5]
    assert len(server.asked) == 12 - 6


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (["--model=large"], "another model"),
        (["--temperature=1"], "another temperature"),
        (["--seed=1"], "another seed"),
        (["--model=large", "--seed=1"], "another model and another seed"),
        (None, "another input"),
    ],
)
def test_it_does_not_go_on_with_something_else(
    other: list[str] | None,
    named: str,
    begun: list[str],
    entries: Path,
    server: ChatServer,
    journal: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    capsys.readouterr()
    before = journal.read_bytes()
    if other is None:
        entries.write_text(json.dumps(make_entries(3, 2, seed=1)), encoding="utf-8")
    assert run([*begun, *(other or [])]) == 2
    assert f"{journal}: begun with {named}; repeat that command, or remove the file" in the_error(capsys)
    assert journal.read_bytes() == before and server.asked == []


def test_another_address_and_other_attempts_go_on(begun: list[str], server: ChatServer, tmp_path: Path) -> None:
    server.answers = reworded
    with chatting() as other:
        assert run([*begun, f"--endpoint={other.url}", "--attempts=2", "--parallel=2"]) == 0
        assert len(other.asked) == 3 and server.asked == []


def test_what_follows_half_a_line_is_read_again(
    begun: list[str], raw: list[dict[str, Any]], server: ChatServer, journal: Path
) -> None:
    journal.write_bytes(journal.read_bytes()[:-7])
    server.answers = lambda body: "" if text_in(body) == raw[0]["train_context"] else reworded(body)
    assert run([*begun, "--attempts=1"]) == 1
    assert len(accepted(journal)) == 6
    server.answers = reworded
    server.asked.clear()
    assert run(begun) == 0
    assert len(server.asked) == 3


@pytest.mark.parametrize("damage", [b"no JSON\n", b'{"entry": 0}\n', b"[]\n"])
def test_a_damaged_journal_is_one_line(
    damage: bytes, begun: list[str], journal: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    journal.write_bytes(journal.read_bytes() + damage)
    assert run(begun) == 1
    assert f"{journal}: damaged; remove it to begin anew" in the_error(capsys)


def test_two_at_a_time_do_not_write_one_journal(
    begun: list[str], journal: Path, server: ChatServer, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    with journal.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert run(begun) == 2
    assert f"{journal}: another process is writing it" in the_error(capsys) and server.asked == []


# --- errors ------------------------------------------------------------------------------------------------------


def test_a_wrong_key_is_one_line_at_once_and_leaves_nothing(
    arguments: list[str],
    server: ChatServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server.key = "another"
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert run(arguments) == 1
    error = the_error(capsys)
    assert "401 Unauthorized" in error and KEY not in error
    assert [path.name for path in tmp_path.iterdir()] == ["entries.json"]


def test_a_server_that_is_not_there_is_told_of_before_it_is_given_up(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By one line, however many ask at the same time."""
    monkeypatch.setattr(chat, "WAIT", 0.001)
    assert run([*arguments, "--endpoint=http://127.0.0.1:1/v1", "--parallel=3"]) == 1
    trouble, error = capsys.readouterr().err.splitlines()
    url = "http://127.0.0.1:1/v1/chat/completions: Connection refused"
    assert trouble == f"{url}; trying again for about 0 seconds, 6 times at most"
    assert error == f"error: {url} (7 attempts)"


def test_an_error_half_way_ends_it_and_keeps_what_came(
    arguments: list[str], server: ChatServer, journal: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(body: Body) -> str:
        server.troubles = [Trouble(404, {"error": {"message": "the model has gone"}})] * (len(server.asked) >= 4)
        return reworded(body)

    server.answers = answer
    assert run([*arguments, "--parallel=1"]) == 1
    assert "404 Not Found: the model has gone" in the_error(capsys)
    assert len(accepted(journal)) == 4 and len(server.asked) == 5


def test_an_output_that_exists_is_not_replaced(
    arguments: list[str], server: ChatServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out.json").write_text("mine")
    assert run(arguments) == 2
    assert f"{tmp_path / 'out.json'}: exists" in the_error(capsys)
    assert (tmp_path / "out.json").read_text() == "mine" and server.asked == []


@pytest.mark.parametrize(
    ("wrong", "status", "message"),
    [
        (["--paraphrases=0"], 2, "--paraphrases must be positive, got 0"),
        (["--parallel=0"], 2, "--parallel must be positive, got 0"),
        (["--attempts=0"], 2, "--attempts must be positive, got 0"),
        (["--seed=-1"], 2, "--seed must be 0 or more, got -1"),
        (["--temperature=-0.1"], 2, "--temperature must be 0 or more, got -0.1"),
        (["--temperature=nan"], 2, "--temperature must be 0 or more, got nan"),
        (["--endpoint=localhost:8000"], 2, "--endpoint localhost:8000: no address as http://localhost:8000/v1"),
        (["--paraphrases=many"], 2, "invalid int value"),
        (["--colour=red"], 2, "unrecognized arguments"),
    ],
)
def test_a_wrong_command_line_is_one_line(
    wrong: list[str],
    status: int,
    message: str,
    arguments: list[str],
    server: ChatServer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run([*arguments, *wrong]) == status
    assert message in the_error(capsys) and server.asked == []
    assert [path.name for path in tmp_path.iterdir()] == ["entries.json"]


@pytest.mark.parametrize("missing", ["--output", "--endpoint", "--model"])
def test_what_must_be_given(missing: str, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    place = arguments.index(missing)
    assert run(arguments[:place] + arguments[place + 2 :]) == 2
    assert missing in the_error(capsys)


@pytest.mark.parametrize(
    ("content", "message"), [("[]", "expected a list of entries"), ('[{"train_context": 1}]', "entry 0")]
)
def test_entries_that_are_none_are_one_line(
    content: str, message: str, arguments: list[str], entries: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entries.write_text(content)
    assert run(arguments) == 1
    assert message in the_error(capsys)
