"""Paraphrases of fictional knowledge: what is asked of a chat model, which answers are accepted, many at a time."""

from __future__ import annotations

import hashlib
import queue
import re
import threading
from collections.abc import Sequence

from olmo.console import Progress
from olmo.knowledge.entries import Entry
from olmo.knowledge.plan import is_text
from scripts.prepare.chat import Endpoint, Message, Reply
from scripts.prepare.journal import Journal, Place, words

PROMPT = """\
Write the text below anew in other words. Keep every fact in it: every name, place, date, number and quantity. Add \
nothing. {manner}

These phrases must stand in your text exactly as they stand here:
{phrases}

Answer with the new text alone, as one paragraph in the language of the text: no introduction, no remark, no heading, \
no quotation marks around it.

The text:
{text}"""
# One for each paraphrase in turn: the same request mostly gets the same answer.
MANNERS = (
    "Change the structure of its sentences.",
    "Begin with another fact than the text does.",
    "Use shorter sentences than the text does.",
    "Join its sentences into longer ones.",
    "Tell its facts in another order.",
    "Write as an encyclopedia would.",
    "Write as a newspaper would.",
    "Write as a teacher would who explains it.",
    "Turn active sentences into passive ones, and passive into active.",
)
AGAIN = "That cannot be used: {fault}. Write the text again, with everything that was asked for."
# Remarks of a model about its text. If the training text contains the same, it is part of the text.
REMARK = re.compile(
    r"""\A\W*(?:sure|certainly|of\ course|absolutely|okay|ok)\b
    |   \A\W*(?:here|below)(?:\ is|\ are|['\u2019]s)\b
    |   \A[^\n]*:[ \t*]*\n                                 # a line of introduction
    |   paraphras|rephras|reword|let\ me\ know|\bas\ requested\b|\bnote:
    |   \*\*|```|^\#|</?\w+>""",
    re.IGNORECASE | re.MULTILINE | re.VERBOSE,
)
END = re.compile(r"[.!?\u2026\u3002\uff01\uff1f][\"'\u2019\u201d\xbb)\]]*\Z")  # of a sentence, closing quotes included


def targets(entry: Entry) -> list[str]:
    """The distinct targets of an entry's probes, as they are written."""
    return list({words(t): t for pairs in entry.probes.values() for _, t in pairs}.values())


def demanded(entry: Entry) -> list[str]:
    """The targets that a paraphrase must hold: those that the training text holds."""
    text = words(entry.train_context)
    return [target for target in targets(entry) if words(target) in text]


def spoken(reply: Reply) -> str:
    """A model's answer, without the reasoning that some servers leave in front of it."""
    return re.sub(r"\A\s*<think>.*?</think>", "", reply.text, flags=re.DOTALL).strip()


def text_of(reply: Reply) -> str:
    """The paragraph in a model's answer, without quotation marks around all of it."""
    text = " ".join(spoken(reply).split())
    quoted = re.fullmatch(r'["\u201c]([^"\u201c\u201d]*)["\u201d]', text)
    return quoted[1] if quoted else text


def remarks(text: str) -> set[str]:
    """Remarks and markup in a text."""
    return {" ".join(found.split()).casefold() for found in REMARK.findall(text)}


def fault_of(reply: Reply, entry: Entry) -> str | None:
    """What is wrong with a reply as a paraphrase of an entry; None where nothing is."""
    text = text_of(reply)
    if reply.finish == "length" or (text and END.search(entry.train_context.strip()) and not END.search(text)):
        return "the text is cut off"
    if not text:
        return "there is no text"
    if not is_text(text):
        return "it has halves of characters"
    if found := remarks(spoken(reply)) - remarks(entry.train_context):
        return f"it is not the text alone ({min(found)!r})"
    held = words(text)
    if missing := [f'"{target}"' for target in demanded(entry) if words(target) not in held]:
        return f"the text lacks {', '.join(missing)}"
    return None


def attempt_seed(seed: int | None, place: Place, attempt: int) -> int | None:
    """A seed of its own for each request, from the one of the command line: 31 bits."""
    if seed is None:
        return None
    return int.from_bytes(hashlib.sha256(repr((seed, place, attempt)).encode()).digest()[:4], "big") >> 1


def write_one(
    place: Place, entry: Entry, endpoint: Endpoint, journal: Journal, attempts: int, seed: int | None
) -> str | None:
    """Get one paraphrase into the journal. Returns None, or what was wrong with the last of several answers."""
    known = {words(text) for text in (entry.train_context, *entry.paraphrases)}
    phrases = "\n".join(f"- {target}" for target in demanded(entry)) or "- (none)"
    prompt = PROMPT.format(manner=MANNERS[place[1] % len(MANNERS)], phrases=phrases, text=entry.train_context)
    messages: list[Message] = [{"role": "user", "content": prompt}]
    fault: str | None = None
    for attempt in range(attempts):
        reply = endpoint.ask(messages, attempt_seed(seed, place, attempt))
        text = text_of(reply)
        fault = fault_of(reply, entry)
        if fault is None:
            if words(text) not in known and journal.add(place, text):
                return None
            fault = "this text is there already"
        messages = messages[:1]
        if reply.text.strip():  # some servers refuse empty messages
            messages.append({"role": "assistant", "content": reply.text})
            messages.append({"role": "user", "content": AGAIN.format(fault=fault)})
    return fault


def write_all(
    places: Sequence[Place],
    entries: Sequence[Entry],
    endpoint: Endpoint,
    journal: Journal,
    parallel: int,
    attempts: int,
    seed: int | None,
) -> dict[Place, str]:
    """Get all these paraphrases, `parallel` at a time. Returns what was wrong with those that failed.

    The first error of the endpoint ends the work and is raised.
    """
    waiting: queue.SimpleQueue[Place] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[Place, str | BaseException | None]] = queue.SimpleQueue()
    for place in places:
        waiting.put(place)

    def work() -> None:
        while not endpoint.stopped.is_set():
            try:
                place = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                done.put((place, write_one(place, entries[place[0]], endpoint, journal, attempts, seed)))
            except BaseException as error:
                done.put((place, error))
                endpoint.stopped.set()  # only now: threads that wait for the endpoint end with errors of their own

    faults: dict[Place, str] = {}
    # Daemon threads, unlike those of a pool, do not delay an interrupt; an answer can take minutes.
    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(parallel, len(places)))]
    try:
        for thread in threads:
            thread.start()
        with Progress("paraphrasing", len(places), "paraphrases") as progress:
            for _ in places:
                place, outcome = done.get()
                if isinstance(outcome, BaseException):
                    raise outcome
                if outcome is not None:
                    faults[place] = outcome
                progress.advance()
    finally:
        endpoint.stopped.set()
    return faults
