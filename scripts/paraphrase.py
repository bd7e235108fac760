"""Write more paraphrases of fictional knowledge with a chat model, and keep those that still tell every fact.

    python -m scripts.paraphrase once.json --output once9.json --endpoint http://localhost:8000/v1 --model NAME

The endpoint is any server that speaks OpenAI's chat completions; a key, where it wants one, comes from OPENAI_API_KEY.
Paraphrases that an entry has already are kept and counted. A new one must be whole, say nothing but the text, differ
from all texts of its entry, and hold every target of its probes that the training text holds: word for word, but for
capitals and punctuation. (In the published data the training texts hold all targets of memorization and semantic
probes, and four in five of the compositional ones.) Otherwise the model hears what is wrong, up to `--attempts` times.

What is accepted goes at once to OUTPUT's neighbour `.partial.jsonl`. Interrupted, the same command asks only for the
rest; when all is there, the output gets its name.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import math
import queue
import re
import sys
import threading
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from olmo.console import Progress
from olmo.exceptions import ConfigurationError, Parser, check_new, exit_status
from olmo.knowledge.entries import Entry, load_entries
from scripts.prepare.chat import Endpoint, Message, Reply, api_key
from scripts.prepare.fictional_knowledge import write_entries

PROMPT = """\
Write the text below anew in other words. Keep every fact in it: every name, place, date, number and quantity. Add \
nothing. {manner}

These phrases must stand in your text exactly as they stand here:
{phrases}

Answer with the new text alone, as one paragraph in the language of the text: no introduction, no remark, no heading, \
no quotation marks around it.

The text:
{text}"""
# One for each paraphrase in turn: a model that is asked the same thing answers much the same.
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
# What a model says about its text. Where the training text says the same, it is part of the text.
REMARK = re.compile(
    r"""\A\W*(?:sure|certainly|of\ course|absolutely|okay|ok)\b
    |   \A\W*(?:here|below)(?:\ is|\ are|['\u2019]s)\b
    |   \A[^\n]*:[ \t*]*\n                                 # a line of introduction
    |   paraphras|rephras|reword|let\ me\ know|\bas\ requested\b|\bnote:
    |   \*\*|```|^\#|</?\w+>""",
    re.IGNORECASE | re.MULTILINE | re.VERBOSE,
)
END = re.compile(r"[.!?\u2026\u3002\uff01\uff1f][\"'\u2019\u201d\xbb)\]]*\Z")  # of a sentence, closing quotes included

Place = tuple[int, int]  # an entry, and the place of a text among its paraphrases; both count from 0


# --- what a paraphrase must be -----------------------------------------------------------------------------------


def words(text: str) -> str:
    """The words of a text between single spaces, and around them, without capitals and punctuation."""
    return " ".join(["", *re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", text).casefold()), ""])


def targets(entry: Entry) -> list[str]:
    """The distinct targets of an entry's probes, as they are written."""
    return list({words(t): t for pairs in entry.probes.values() for _, t in pairs}.values())


def demanded(entry: Entry) -> list[str]:
    """The targets that a paraphrase must hold: those that the training text holds."""
    text = words(entry.train_context)
    return [target for target in targets(entry) if words(target) in text]


def spoken(reply: Reply) -> str:
    """What a model says, without the thoughts that some servers leave in front of it."""
    return re.sub(r"\A\s*<think>.*?</think>", "", reply.text, flags=re.DOTALL).strip()


def text_of(reply: Reply) -> str:
    """The paragraph in a model's answer, without quotation marks around the whole."""
    text = " ".join(spoken(reply).split())
    quoted = re.fullmatch(r'["\u201c]([^"\u201c\u201d]*)["\u201d]', text)
    return quoted[1] if quoted else text


def remarks(text: str) -> set[str]:
    """Where a text speaks of itself, or is marked up."""
    return {" ".join(found.split()).casefold() for found in REMARK.findall(text)}


def fault_of(reply: Reply, entry: Entry) -> str | None:
    """What is wrong with a reply as a paraphrase of an entry; None where nothing is."""
    text = text_of(reply)
    if reply.finish == "length" or (text and END.search(entry.train_context.strip()) and not END.search(text)):
        return "the text is cut off"
    if not text:
        return "there is no text"
    if said := remarks(spoken(reply)) - remarks(entry.train_context):
        return f"it is not the text alone ({min(said)!r})"
    held = words(text)
    if missing := [f'"{target}"' for target in demanded(entry) if words(target) not in held]:
        return f"the text lacks {', '.join(missing)}"
    return None


# --- what has been accepted --------------------------------------------------------------------------------------


class Journal:
    """Accepted texts, each a line of a file as soon as it is there; they are in `texts` when the file is opened again.

    The first line says what they were made from; ConfigurationError where that is something else now, or where another
    process writes the file. A last line that was cut off is dropped.
    """

    def __init__(self, path: Path, made_from: Mapping[str, Any]):
        self.path, self.texts = path, dict[Place, str]()
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b", buffering=0)
        try:
            self._read(made_from)
        except BaseException:
            self._file.close()
            raise

    def _read(self, made_from: Mapping[str, Any]) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigurationError(f"{self.path}: another process is writing it") from None
        except OSError:  # a file system without locks
            pass
        self._file.seek(0)
        lines = self._file.read().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):
            self._file.truncate(sum(map(len, lines[:-1])))
            lines.pop()
        if not lines:
            self._write(made_from)
            return
        try:
            before, *accepted = map(json.loads, lines)
            self.texts = {(line["entry"], line["paraphrase"]): line["text"] for line in accepted}
            changed = [name for name in made_from if before[name] != made_from[name]]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path}: damaged; remove it to begin anew") from error
        if changed:
            raise ConfigurationError(
                f"{self.path}: begun with another {' and another '.join(changed)}; repeat that command, or remove the "
                "file to begin anew"
            )

    def _write(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")

    def add(self, place: Place, text: str) -> bool:
        """Keep a text; False where its entry has the same one already, or nobody is waiting for it any more."""
        with self._lock:
            if self._file.closed or any(
                words(text) == words(other) for (entry, _), other in self.texts.items() if entry == place[0]
            ):
                return False
            self._write({"entry": place[0], "paraphrase": place[1], "text": text})
            self.texts[place] = text
            return True

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._file.close()
            if not self.texts:
                self.path.unlink(missing_ok=True)


# --- many at a time ----------------------------------------------------------------------------------------------


def attempt_seed(seed: int | None, place: Place, attempt: int) -> int | None:
    """A seed of its own for each request, from the one of the command line: 31 bits."""
    if seed is None:
        return None
    return int.from_bytes(hashlib.sha256(repr((seed, place, attempt)).encode()).digest()[:4], "big") >> 1


def write_one(
    place: Place, entry: Entry, endpoint: Endpoint, journal: Journal, attempts: int, seed: int | None
) -> str | None:
    """Have one paraphrase written into the journal; or say what was wrong with the last of several answers."""
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
    """Have all these paraphrases written, `parallel` at a time; what was wrong with those that could not be.

    The first error of the endpoint ends it.
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
                endpoint.stopped.set()  # and only now: those who wait for the endpoint end with errors of their own

    faults: dict[Place, str] = {}
    # Daemons, unlike the threads of a pool, are not waited for when the user interrupts; an answer can take minutes.
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


# --- the command -------------------------------------------------------------------------------------------------


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """The command line, checked."""
    parser = Parser(prog="paraphrase", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("entries", type=Path, metavar="ENTRIES.json")
    add("--output", type=Path, required=True, metavar="OUT.json")
    add("--paraphrases", type=int, default=9, metavar="N", help="of each entry, with those that it has (default: 9)")
    add("--endpoint", required=True, metavar="URL", help="as http://localhost:8000/v1 or https://api.openai.com/v1")
    add("--model", required=True, metavar="NAME", help="what the endpoint calls the model")
    add("--temperature", type=float, metavar="T", help="of the model's sampling (default: the endpoint's)")
    add("--seed", type=int, metavar="S", help="of the model's sampling, for endpoints that know seeds")
    add("--parallel", type=int, default=4, metavar="N", help="requests at a time (default: 4)")
    add(
        "--attempts",
        type=int,
        default=5,
        metavar="N",
        help="answers to hear for one paraphrase before it is given up (default: 5)",
    )
    args = parser.parse_args(argv)
    if not re.match(r"https?://[^/?#]+", args.endpoint):
        parser.error(f"--endpoint {args.endpoint}: no address as http://localhost:8000/v1")
    for flag, least in (("paraphrases", 1), ("parallel", 1), ("attempts", 1), ("seed", 0), ("temperature", 0)):
        value = getattr(args, flag)
        if value is not None and not least <= value < math.inf:
            parser.error(f"--{flag} must be {'positive' if least else '0 or more'}, got {value}")
    check_new(args.output)
    return args


def main(argv: Sequence[str]) -> None:
    args = parse_args(argv)
    entries = load_entries(args.entries)
    content = args.entries.read_bytes()
    endpoint = Endpoint(
        args.endpoint, args.model, temperature=args.temperature, key=api_key(), connections=args.parallel
    )
    made_from = {
        "input": hashlib.sha256(content).hexdigest(),
        "model": args.model,
        "temperature": args.temperature,
        "seed": args.seed,
        "prompt": hashlib.sha256(repr((PROMPT, MANNERS, AGAIN)).encode()).hexdigest(),
    }
    places = [(i, k) for i, entry in enumerate(entries) for k in range(len(entry.paraphrases), args.paraphrases)]
    with Journal(args.output.with_name(f"{args.output.name}.partial.jsonl"), made_from) as journal:
        missing = [place for place in places if place not in journal.texts]
        if len(missing) < len(places):
            print(f"{len(places) - len(missing)} of {len(places)} paraphrases are in {journal.path}", flush=True)
        faults = write_all(missing, entries, endpoint, journal, args.parallel, args.attempts, args.seed)
        for i in sorted({i for i, _ in faults}):
            own = [fault for (entry, _), fault in sorted(faults.items()) if entry == i]
            tried = f"{len(own)} missing after {args.attempts} answers for each"
            print(f"error: entry {i}: {tried}; of the last one: {own[-1]}", file=sys.stderr)
        if faults:
            kept = f"the others are in {journal.path}, and " if journal.texts else ""
            raise ValueError(
                f"{len(faults)} of {len(places)} paraphrases could not be had; {kept}the same command asks again for "
                "those that are missing"
            )
        raw = json.loads(content)
        for i, k in places:
            raw[i]["paraphrases"].append(journal.texts[i, k])
        write_entries({args.output: raw})
    journal.path.unlink(missing_ok=True)
    demands = sum(len(demanded(entry)) for entry in entries)
    print(
        f"{args.output}: {len(entries)} entries, {len(places)} new paraphrases, which hold the {demands} of "
        f"{sum(len(targets(entry)) for entry in entries)} targets that their training texts hold"
    )


if __name__ == "__main__":
    sys.exit(exit_status(main))
