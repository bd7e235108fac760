"""The documents of text files: PubMed's XML, JSON lines with `text`, plain text.

Of a PubMed article: title and abstract, a line each; the sections of a structured abstract as `LABEL: text`. Markup
(<i>, <sub>, MathML) is reduced to its text. Brackets around a translated title are removed; a missing title is replaced
by the vernacular one. Copyright lines, abstracts in other languages, and NLM's note of a cut abstract are left out.

Records are located by their tags, and only those in the sample are parsed, each separately: several times as fast as
parsing all, and no record can refer to an entity, since none is declared in it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import IO, NamedTuple
from xml.etree import ElementTree

MB, PIECE = 10**6, 2**20
LONGEST = 2**24  # bytes of a record or line; parsing one takes up to 50 times as much memory
START, END, LAST = b"<PubmedArticle>", b"</PubmedArticle>", b"</PubmedArticleSet>"
OWN_PMID = re.compile(rb"<MedlineCitation\b[^>]*>\s*<PMID\b[^>]*>\s*(\d+)\s*</PMID>")
NO_TITLE = ("", "not available", "in process citation")
TRUNCATED = re.compile(r"\s*\(ABSTRACT TRUNCATED(?: AT \d+ WORDS)?\)$")
TEXT, NO_TEXT, DELETED = range(3)


class Record(NamedTuple):
    """An article in a file: with text, without text, or deleted (`kind`)."""

    priority: int  # 64 bits: hash(seed, PMID), or hash(seed, text) in corpora without PMIDs
    identity: int | None  # the PMID; None: a record is an article of its own
    version: int
    kind: int
    text: str = ""


def hash_of(data: bytes, seed: int) -> int:
    """64 pseudo-random bits, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8, key=seed.to_bytes(8, "little")).digest(), "little")


def parts(stream: IO[bytes]) -> Iterator[bytes]:
    """A file's bytes up to the end of each record, then the rest."""
    rest = b""
    while piece := stream.read(PIECE):
        *complete, rest = (rest + piece).split(END)
        yield from (part + END for part in complete)
        if len(rest) > LONGEST:
            raise ValueError(f"a record of more than {LONGEST // MB} MB: not PubMed's XML")
    yield rest


def cut(stream: IO[bytes]) -> Iterator[tuple[bytes, bytes]]:
    """The bytes before each record of a file, and the record; last the bytes after all, and an empty record.

    Raises ValueError for anything but a complete `PubmedArticleSet` in UTF-8, and for declared entities.
    """
    headed = False
    for part in parts(stream):
        before, start, record = part.partition(START)
        if not headed:
            head = re.match(rb".*?<PubmedArticleSet\b[^>]*>", before, re.DOTALL)
            if head is None:
                raise ValueError("no <PubmedArticleSet>: not PubMed's XML")
            if b"<!ENTITY" in head[0]:
                raise ValueError("declares entities, which PubMed's files never do; refused")
            encoding = re.search(rb"""encoding\s*=\s*["']([^"']*)""", head[0])
            if encoding and encoding[1].lower() not in (b"utf-8", b"us-ascii"):
                raise ValueError(f"encoding {encoding[1].decode('ascii', 'replace')}; PubMed's files are UTF-8")
            before, headed = before[head.end() :], True
        if part.endswith(END):
            yield before, start + record
        elif start or not before.rstrip().endswith(LAST):
            raise ValueError("truncated: the XML ends before </PubmedArticleSet>")
        else:
            yield before.rstrip().removesuffix(LAST), b""


def parse(fragment: bytes) -> ElementTree.Element:
    """A root whose children are the elements of a piece of XML; it declares the prefixes that NLM uses."""
    root = b'<r xmlns:mml="http://www.w3.org/1998/Math/MathML" xmlns:xlink="http://www.w3.org/1999/xlink">'
    return ElementTree.fromstring(root + fragment + b"</r>")


def plain(element: ElementTree.Element | None) -> str:
    """The text of an element and of its descendants, with single spaces."""
    return "" if element is None else " ".join("".join(element.itertext()).split())


def without_brackets(title: str) -> str:
    """A title without the brackets that enclose all of it: NLM's sign of a translation."""
    enclosed = re.fullmatch(r"\[(.*)\](\.?)", title)
    if enclosed is None:
        return title
    depths = itertools.accumulate((c == "[") - (c == "]") for c in enclosed[1])
    if min(depths, default=0) < 0:  # two pairs, as in [A] and [B]
        return title
    return enclosed[1] if enclosed[1].endswith((".", "?", "!")) else enclosed[1] + enclosed[2]


def article_text(article: ElementTree.Element) -> str:
    """Title and abstract of a `PubmedArticle`; empty where it has no abstract."""
    sections = []
    for part in article.iterfind("MedlineCitation/Article/Abstract/AbstractText"):
        label, text = " ".join(part.get("Label", "").split()).rstrip(":"), TRUNCATED.sub("", plain(part))
        if text:
            sections.append(text if label.upper() in ("", "UNLABELLED") else f"{label}: {text}")
    titles = (plain(article.find(f"MedlineCitation/Article/{tag}")) for tag in ("ArticleTitle", "VernacularTitle"))
    title = next((t for t in map(without_brackets, titles) if t.rstrip(".").lower() not in NO_TITLE), "")
    return "\n".join([title] * bool(title) + sections) if sections else ""


def identified(pmid: ElementTree.Element | None) -> tuple[int, int] | None:
    """PMID and version, or None without a PMID."""
    number = plain(pmid)
    return (int(number), int(pmid.get("Version", "1"))) if pmid is not None and number.isdecimal() else None


def pubmed_records(stream: IO[bytes], seed: int, limit: int, counts: Counter[str]) -> Iterator[Record]:
    """The records of a PubMed file whose priority is at most `limit`; counts all records, and those without PMID.

    Raises ValueError or ElementTree.ParseError for a file that is damaged or in another format.
    """
    for before, record in cut(stream):
        for other in parse(before) if before.strip() else ():
            if other.tag == "DeleteCitation":
                for pmid, version in filter(None, map(identified, other.iter("PMID"))):
                    if (priority := hash_of(b"%d" % pmid, seed)) <= limit:
                        yield Record(priority, pmid, version, DELETED)
            elif other.tag != "PubmedBookArticle":
                raise ValueError(f"<{other.tag}> among the articles: not PubMed's XML")
        if record:
            counts["records"] += 1
            found = OWN_PMID.search(record)
            if found and hash_of(b"%d" % int(found[1]), seed) > limit:
                continue
            article = parse(record)[0]
            if (who := identified(article.find("MedlineCitation/PMID"))) is None:
                counts["without_pmid"] += 1
                continue
            text = article_text(article)
            yield Record(hash_of(b"%d" % who[0], seed), *who, TEXT if text else NO_TEXT, text)


def text_records(stream: IO[bytes], seed: int, limit: int, as_json: bool, counts: Counter[str]) -> Iterator[Record]:
    """The same of a file of JSON objects with `text`, one a line, or of one that is a document as it is."""
    if as_json:
        lines = iter(lambda: stream.readline(LONGEST + 1), b"")
    else:  # of any length; in pieces, after each of which a packed file is checked
        lines = iter([b"".join(iter(lambda: stream.read(PIECE), b""))])
    for number, line in enumerate(lines, 1):
        if as_json and len(line) > LONGEST:
            raise ValueError(f"line {number} has more than {LONGEST // MB} MB")
        if as_json and not line.strip():
            continue
        try:
            text = json.loads(line)["text"] if as_json else line.decode("utf-8")
            priority = hash_of(text.encode("utf-8"), seed)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            what = f"line {number} is not a JSON object with a string 'text'" if as_json else "not UTF-8 text"
            raise ValueError(what) from error
        counts["records"] += 1
        if priority <= limit:
            yield Record(priority, None, 1, TEXT if text.strip() else NO_TEXT, text)
