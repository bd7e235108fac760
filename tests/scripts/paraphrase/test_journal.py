"""`scripts.paraphrase` continues where it was killed, interrupted or given up, and with nothing else."""

from __future__ import annotations

import json
import resource
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from olmo.files.lock import Lock
from olmo.knowledge.entries import load_entries
from scripts.prepare.fictional_knowledge import make_entries
from scripts.prepare.journal import Journal
from tests.chatting import ChatServer, chatting, reworded, text_in
from tests.paraphrasing import accepted, run, start, the_error
from tests.running import wait_for


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


def test_on_a_full_disk_no_half_of_a_line_stays(tmp_path: Path) -> None:
    """The system writes what fits; a line behind half of one would make the file unreadable."""
    path, limits = tmp_path / "out.json.partial.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    with Journal(path, {"seed": 1}) as journal:
        assert journal.add((0, 0), "The first text.")
        before = path.read_bytes()
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, limits[1]))
        try:
            for place in (1, 2):
                with pytest.raises(OSError) as caught:
                    journal.add((0, place), f"Text {place}.")
                assert caught.value.filename == str(path) and caught.value.strerror
                assert path.read_bytes() == before
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with Journal(path, {"seed": 1}) as journal:
        assert journal.texts == {(0, 0): "The first text."}


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
    assert f"{journal}: damaged; remove it to start over" in the_error(capsys)


def test_two_at_a_time_do_not_write_one_journal(
    begun: list[str], journal: Path, server: ChatServer, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    with Lock(journal.with_name(f".{journal.name}.lock")):
        assert run(begun) == 2
    assert f"{journal}: another process is writing it" in the_error(capsys) and server.asked == []
