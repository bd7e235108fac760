"""`scripts.paraphrase` against a server on this machine: what is accepted, what is asked again, and errors."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from olmo.knowledge.entries import load_entries
from scripts.prepare import chat
from scripts.prepare.fictional_knowledge import make_entries
from tests.chatting import Body, ChatServer, Trouble, reworded, text_in
from tests.paraphrasing import accepted, run, start, the_error

KEY = "sk-0123-secret"


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
    assert f"{tmp_path / 'out.json'}: already exists" in the_error(capsys)
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
