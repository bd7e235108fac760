"""Requests to a chat model on any server with OpenAI's protocol: POST {endpoint}/chat/completions.

    endpoint = Endpoint("http://localhost:8000/v1", "a-model")
    endpoint.ask([{"role": "user", "content": "Hello!"}]).text

Only what all such servers accept is sent: the model, the messages and, if given, temperature and seed. Servers differ
in the name of the token limit, so none is sent; an answer cut off by the server's own limit has `finish` "length".
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

import requests

from olmo.exceptions import ConfigurationError
from olmo.net import TransferInterrupted, bounded, describe_failure, retry

ATTEMPTS = 7  # in a row without an answer
WAIT = 1.0  # seconds before the second attempt, about twice as long before each further one
SILENCE = 60.0  # seconds between two warnings
PATIENCE = 600.0  # seconds; if a server names a longer wait, the request fails
TIMEOUT = (10, 600)  # seconds to connect, and for the complete answer
MOST = 2**20  # bytes of an answer
KEY = "OPENAI_API_KEY"  # the environment variable

Message = dict[str, str]  # role, content


@dataclass(frozen=True)
class Reply:
    """What a model wrote, and why it ended: `length` if it was cut off."""

    text: str
    finish: str


def api_key() -> str | None:
    """The key from the environment. ConfigurationError, which does not show it, where it cannot be one."""
    key = os.environ.get(KEY, "").strip()
    if not re.fullmatch(r"[!-~]*", key):
        raise ConfigurationError(f"{KEY}: holds spaces, line breaks or letters beyond ASCII, as no key does")
    return key or None


def named_pause(header: str | None) -> float | None:
    """Seconds to wait by a Retry-After header, which holds seconds or a date; None where it is absent or invalid."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(header).timestamp() - time.time()
        except ValueError:
            return None
    return min(max(seconds, 0.0), 1e9) if math.isfinite(seconds) else None


class Endpoint:
    """A model behind a server. Many threads may ask at the same time."""

    def __init__(
        self, url: str, model: str, *, temperature: float | None = None, key: str | None = None, connections: int = 1
    ):
        self.url = url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        self.settings: dict[str, Any] = {"model": model}
        if temperature is not None:
            self.settings["temperature"] = temperature
        self.stopped = threading.Event()  # when set, no request is repeated
        self._warned, self._lock = -math.inf, threading.Lock()
        self._key = key
        self._session = requests.Session()
        self._session.auth = self._sign
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, requests.adapters.HTTPAdapter(pool_maxsize=connections))

    def _sign(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        """Without this, the session would send passwords from ~/.netrc in place of the key."""
        if self._key is not None:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request

    def ask(self, messages: Sequence[Message], seed: int | None = None) -> Reply:
        """The model's answer to a conversation. Raises OSError without one, after several attempts with a warning on
        stderr where the failure may pass; after two, if both exceed the time for an answer."""
        settings = self.settings if seed is None else {**self.settings, "seed": seed}
        body = {**settings, "messages": list(messages)}
        late = 0

        def attempt() -> Reply:
            nonlocal late
            began = time.monotonic()
            try:
                return self._ask_once(body)
            except TransferInterrupted as error:
                late += time.monotonic() - began >= TIMEOUT[1]
                if late == 2:
                    raise OSError(f"{self.url}: {error}, twice") from error
                raise

        return retry(attempt, self.url, attempts=ATTEMPTS, wait=WAIT, stopped=self.stopped, on_failure=self._warn)

    def _warn(self, error: TransferInterrupted, pause: float) -> None:
        """Print a failure to stderr, once a minute for all threads together: every request may fail in the same way."""
        with self._lock:
            if time.monotonic() < self._warned + SILENCE:
                return
            self._warned = time.monotonic()
        # If the server names its pauses, the total time is unknown.
        named = error.pause is not None
        wait = f"in {pause:.0f} seconds" if named else f"for about {WAIT * (2 ** (ATTEMPTS - 1) - 1):.0f} seconds"
        line = f"{self.url}: {error}; trying again {wait}, {ATTEMPTS - 1} times at most\n"
        sys.stderr.write(f"\r\x1b[K{line}" if sys.stderr.isatty() else line)  # over the progress line
        sys.stderr.flush()

    def _ask_once(self, body: dict[str, Any]) -> Reply:
        try:
            # A redirected POST would become a GET, and the key would be sent along.
            response, content = bounded(
                self.url,
                lambda: self._session.post(self.url, json=body, timeout=TIMEOUT, allow_redirects=False, stream=True),
                MOST,
                TIMEOUT[1],
            )
        except requests.RequestException as error:
            raise TransferInterrupted(describe_failure(error)) from error
        try:
            answer = json.loads(content)
        except (ValueError, RecursionError):
            answer = None
        if response.status_code != 200:
            raise self._failure(response, answer)
        if not isinstance(answer, dict):
            raise OSError(f"{self.url}: answers with {response.headers.get('Content-Type')}, not as a chat model does")
        try:
            choice = answer["choices"][0]
            text, finish = choice["message"].get("content"), choice.get("finish_reason")
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            # Relays report a failure behind them in this way.
            raise TransferInterrupted(f"an answer without a message{self._description(answer)}") from error
        return Reply(text if isinstance(text, str) else "", str(finish))

    def _description(self, answer: Any) -> str:
        """The server's description of a failure, without the key; servers put it in different places."""
        said = answer
        for place in ("error", "message", "detail"):
            if isinstance(said, dict) and place in said:
                said = said[place]
        if not isinstance(said, str):
            return ""
        if self._key:  # before it is cut, so that no part of the key is left at the end
            said = said.replace(self._key, "(the key)")
        return ": " + " ".join(said.split())[:300]

    def _failure(self, response: requests.Response, answer: Any) -> OSError:
        """What a status other than 200 means: TransferInterrupted where it may pass."""
        status = response.status_code
        said = f"{status} {response.reason or ''}".rstrip() + self._description(answer)
        error = answer.get("error") if isinstance(answer, dict) else None
        spent = isinstance(error, dict) and error.get("code") == "insufficient_quota"
        if (status in (408, 409, 425, 429) or status >= 500) and not spent:
            pause = named_pause(response.headers.get("Retry-After"))
            if pause is not None and pause > PATIENCE:
                return OSError(f"{self.url}: {said}, try again in {pause:.0f} seconds")
            return TransferInterrupted(said, pause=pause)
        hint = {
            401: f"; {KEY} must hold a key of this server",
            403: f"; {KEY} must hold a key that may use this model",
            404: f"; it has no model {self.settings['model']!r}, or --endpoint is not the address of its API "
            "(as http://localhost:8000/v1)",
        }.get(status, "")
        if 300 <= status < 400:
            hint = f"; it is now at {response.headers.get('Location')}"
        return OSError(f"{self.url}: {said}{hint}")
