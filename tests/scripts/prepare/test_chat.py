"""Asking a chat model through a server on this machine: what is sent, what is tried again, what is an error at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from email.utils import formatdate
from itertools import pairwise
from pathlib import Path

import pytest

from olmo.exceptions import ConfigurationError
from scripts.prepare import chat
from scripts.prepare.chat import Endpoint, Reply
from tests.chatting import ChatServer, Trouble, chatting

HELLO = [{"role": "user", "content": "Hello, ☃!"}]
KEY = "sk-0123-secret"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ChatServer]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(chat, "WAIT", 0.0)
    with chatting() as server:
        server.answers = lambda body: "Good morning."
        yield server


def failed(server: ChatServer, **settings: str) -> str:
    """The message of the OSError that asking ends with."""
    with pytest.raises(OSError) as caught:
        Endpoint(server.url, "small", **settings).ask(HELLO)  # type: ignore[arg-type]
    return str(caught.value)


# --- what is sent ------------------------------------------------------------------------------------------------


def test_a_question_and_its_answer(server: ChatServer) -> None:
    assert Endpoint(server.url, "small").ask(HELLO) == Reply("Good morning.", "stop")
    (asked,) = server.asked
    assert asked.body == {"model": "small", "messages": HELLO}
    assert asked.headers["Content-Type"] == "application/json" and "Authorization" not in asked.headers


def test_temperature_and_seed_are_sent_where_they_are_given(server: ChatServer) -> None:
    endpoint = Endpoint(server.url, "small", temperature=0.0)
    endpoint.ask(HELLO, seed=0)
    endpoint.ask(HELLO)
    assert server.asked[0].body == {"model": "small", "messages": HELLO, "temperature": 0.0, "seed": 0}
    assert server.asked[1].body == {"model": "small", "messages": HELLO, "temperature": 0.0}


@pytest.mark.parametrize("end", ["", "/", "/chat/completions", "/chat/completions/"])
def test_the_address_may_end_in_several_ways(end: str, server: ChatServer) -> None:
    assert Endpoint(server.url + end, "small").ask(HELLO).text == "Good morning."


def test_the_key_is_sent_and_not_what_stands_in_netrc(
    server: ChatServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login someone password else\n")
    (tmp_path / ".netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    Endpoint(server.url, "small").ask(HELLO)
    assert "Authorization" not in server.asked[0].headers
    server.key = KEY
    Endpoint(server.url, "small", key=KEY).ask(HELLO)
    assert server.asked[1].headers["Authorization"] == f"Bearer {KEY}"


def test_the_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")
    assert chat.api_key() == KEY
    for empty in ("", " \n"):
        monkeypatch.setenv("OPENAI_API_KEY", empty)
        assert chat.api_key() is None
    monkeypatch.delenv("OPENAI_API_KEY")
    assert chat.api_key() is None


@pytest.mark.parametrize("key", ["sk-secret sk-other", "sk-secret\nX-Header: 1", "sk-secrét"])
def test_what_cannot_be_a_key_is_an_error_that_does_not_show_it(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(ConfigurationError, match="OPENAI_API_KEY: holds spaces") as caught:
        chat.api_key()
    assert "sk-" not in str(caught.value)


# --- what is tried again -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "trouble",
    [
        *(Trouble(status, {"error": {"message": "not now"}}) for status in (408, 409, 429, 500, 502, 503, 529)),
        Trouble(502, b"<html>Bad gateway</html>"),
        Trouble("reset"),
        Trouble("cut"),
        Trouble(200, {"error": {"message": "the model behind this relay failed", "code": 502}}),
        Trouble(200, {"choices": []}),
        Trouble(200, {"choices": [{"finish_reason": "stop"}]}),
    ],
    ids=lambda trouble: f"{trouble.kind}-{type(trouble.body).__name__}",
)
def test_what_may_pass_is_tried_again(trouble: Trouble, server: ChatServer) -> None:
    server.troubles = [trouble, trouble]
    assert Endpoint(server.url, "small").ask(HELLO).text == "Good morning."
    assert len(server.asked) == 3 and all(asked.body == server.asked[0].body for asked in server.asked)


def test_an_answer_that_takes_too_long_is_asked_for_again(server: ChatServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "TIMEOUT", (5, 0.2))
    server.gate.clear()

    def open_at_the_second() -> None:
        while len(server.asked) < 2:
            time.sleep(0.01)
        server.gate.set()

    threading.Thread(target=open_at_the_second, daemon=True).start()
    assert Endpoint(server.url, "small").ask(HELLO).text == "Good morning."
    assert len(server.asked) == 2


def test_an_answer_a_byte_at_a_time_is_not_waited_for(server: ChatServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte begins the timeout of a connection anew; the limit is of the complete answer."""
    monkeypatch.setattr(chat, "TIMEOUT", (5, 0.3))
    server.pace = 0.05
    started = time.monotonic()
    assert failed(server) == f"{server.url}/chat/completions: no complete answer within 0.3 seconds, twice"
    assert time.monotonic() - started < 5


def test_it_gives_up_after_several_attempts(server: ChatServer) -> None:
    server.troubles = [Trouble(429, {"error": {"message": "Rate limit\nreached"}})] * 99
    assert failed(server) == (
        f"{server.url}/chat/completions: 429 Too Many Requests: Rate limit reached ({chat.ATTEMPTS} attempts)"
    )
    assert len(server.asked) == chat.ATTEMPTS


def test_nobody_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "WAIT", 0.0)
    with pytest.raises(OSError, match=r"http://127.0.0.1:1/v1/chat/completions: Connection refused \(7 attempts\)"):
        Endpoint("http://127.0.0.1:1/v1", "small").ask(HELLO)


def test_trouble_is_told_at_once_and_once(
    server: ChatServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the first pause, which would be silence; not of every attempt, nor of every request."""
    url = f"{server.url}/chat/completions"
    heard: list[str] = []
    monkeypatch.setattr(chat, "WAIT", 1.0)
    endpoint = Endpoint(server.url, "small")
    monkeypatch.setattr(endpoint.stopped, "wait", lambda pause: heard.append(capsys.readouterr().err))
    server.troubles = [Trouble(503, {"error": "busy"})] * 3
    assert endpoint.ask(HELLO).text == "Good morning."
    line = f"{url}: 503 Service Unavailable: busy; trying again for about 63 seconds, 6 times at most\n"
    assert heard == [line, "", ""]
    server.troubles = [Trouble(503)]
    endpoint.ask(HELLO)
    assert heard.pop() == ""
    monkeypatch.setattr(chat, "SILENCE", 0.0)  # as if a minute had passed
    server.troubles = [Trouble(429, {}, {"Retry-After": "60"})] * 2
    endpoint.ask(HELLO)
    assert heard[-2:] == [f"{url}: 429 Too Many Requests; trying again in 60 seconds, 6 times at most\n", ""]
    endpoint.ask(HELLO)
    assert not capsys.readouterr().err


def test_it_waits_longer_each_time(server: ChatServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "WAIT", 0.05)
    server.troubles = [Trouble(503)] * 3
    Endpoint(server.url, "small").ask(HELLO)
    times = [asked.time for asked in server.asked]
    for attempt, (before, after) in enumerate(pairwise(times)):
        assert 0.025 * 2**attempt <= after - before < 0.075 * 2**attempt + 0.5


@pytest.mark.parametrize("kind", ["seconds", "date"])
def test_it_waits_as_long_as_the_server_asks(kind: str, server: ChatServer) -> None:
    named = "0.6" if kind == "seconds" else formatdate(time.time() + 2, usegmt=True)
    server.troubles = [Trouble(429, {}, {"Retry-After": named})]
    assert Endpoint(server.url, "small").ask(HELLO).text == "Good morning."
    first, second = (asked.time for asked in server.asked)
    assert 0.6 <= second - first < 4  # a date has whole seconds


def test_a_wait_that_is_too_long_is_an_error_at_once(server: ChatServer) -> None:
    server.troubles = [Trouble(429, {"error": {"message": "Daily limit"}}, {"Retry-After": "7200"})]
    assert "429 Too Many Requests: Daily limit, try again in 7200 seconds" in failed(server)
    assert len(server.asked) == 1


@pytest.mark.parametrize("header", [None, "soon", "", "nan", "inf"])
def test_no_pause_is_read_where_none_is_named(header: str | None) -> None:
    assert chat.named_pause(header) is None


def test_a_pause_is_never_negative() -> None:
    assert chat.named_pause("-3") == chat.named_pause("Wed, 31 Jan 2024 10:00:00 GMT") == 0.0
    assert chat.named_pause("12") == 12.0
    assert chat.named_pause("1e300") == 1e9


def test_stopped_it_does_not_wait(server: ChatServer) -> None:
    server.troubles = [Trouble(429, {}, {"Retry-After": "60"})]
    endpoint = Endpoint(server.url, "small")
    endpoint.stopped.set()
    started = time.monotonic()
    with pytest.raises(OSError, match=r"\(1 attempts\)"):
        endpoint.ask(HELLO)
    assert time.monotonic() - started < 5


# --- what is an error at once ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        (Trouble(400, {"error": {"message": "'seed' is not known"}}), "400 Bad Request: 'seed' is not known"),
        (Trouble(401, {"error": {"message": "Bad key"}}), "401 Unauthorized: Bad key; OPENAI_API_KEY must hold"),
        (Trouble(403, {"error": "not yours"}), "403 Forbidden: not yours; OPENAI_API_KEY must hold"),
        (Trouble(404, {"object": "error", "message": "The model `small` does not exist."}), "`small` does not exist."),
        (Trouble(404, {"detail": "Not Found"}), "404 Not Found: Not Found; it has no model 'small', or --endpoint"),
        (Trouble(404, b"<html>"), "404 Not Found; it has no model 'small', or --endpoint"),
        (Trouble(422, {"detail": [{"loc": ["body"]}]}), "422 Unprocessable"),
        (Trouble(429, {"error": {"message": "No credit", "code": "insufficient_quota"}}), "Requests: No credit"),
        (Trouble(301, {}, {"Location": "https://elsewhere/"}), "Moved Permanently; it is now at https://elsewhere/"),
        (Trouble(200, b"<html>Welcome</html>"), "answers with text/html, not as a chat model does"),
        (Trouble(200, ["a", "list"]), "answers with application/json, not as a chat model does"),
        (Trouble(200, b"[" * 100_000), "answers with text/html, not as a chat model does"),
        (Trouble(200, b"a" * (2**20 + 1)), "an answer of more than 1,048,576 bytes"),
    ],
    ids=lambda value: str(value.kind) if isinstance(value, Trouble) else None,
)
def test_what_will_not_pass_is_one_line_at_once(trouble: Trouble, message: str, server: ChatServer) -> None:
    server.troubles = [trouble]
    error = failed(server)
    assert error.startswith(f"{server.url}/chat/completions: ") and message in error and "\n" not in error
    assert len(server.asked) == 1


def test_no_error_shows_the_key(server: ChatServer) -> None:
    server.key = "another"  # this server repeats the wrong one
    error = failed(server, key=KEY)
    assert "Incorrect API key provided: Bearer (the key); OPENAI_API_KEY" in error and KEY not in error


def test_an_answer_without_text_is_empty(server: ChatServer) -> None:
    server.answers = lambda body: (None, "length")
    assert Endpoint(server.url, "small").ask(HELLO) == Reply("", "length")
    server.answers = lambda body: ("Well.", None)
    assert Endpoint(server.url, "small").ask(HELLO).text == "Well."


@pytest.mark.parametrize("before", range(280, 300))
def test_nor_a_part_of_it(before: int, server: ChatServer) -> None:
    """Where the server's words are cut."""
    server.troubles = [Trouble(401, {"error": before * "." + KEY + "..."})]
    assert KEY[:4] not in failed(server, key=KEY)
