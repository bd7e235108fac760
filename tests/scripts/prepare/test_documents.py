"""Records of PubMed files: their text, how they are cut out, and files that are damaged or hostile."""

from __future__ import annotations

import gzip
from collections import Counter
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from scripts.prepare import documents, sampling
from scripts.prepare.documents import TEXT, Record, pubmed_records
from tests.pubmed import HEAD, article, article_set, run


def records_of(content: bytes, limit: int = sampling.NO_LIMIT) -> list[Record]:
    return list(pubmed_records(BytesIO(content), 0, limit, Counter()))


def text_of(*arguments: Any, **named: Any) -> str:
    (record,) = records_of(article_set(article(1, *arguments, **named)))
    assert (record.kind == TEXT) == bool(record.text)
    return record.text


def test_structured_abstracts_keep_labels_and_order_and_drop_the_copyright_line() -> None:
    abstract = """<AbstractText Label="BACKGROUND" NlmCategory="BACKGROUND">Why.</AbstractText>
          <AbstractText Label="STUDY DESIGN:" NlmCategory="METHODS">How &amp; when.</AbstractText>
          <AbstractText Label="UNLABELLED" NlmCategory="UNASSIGNED">No label.</AbstractText>
          <AbstractText NlmCategory="RESULTS">Published without.</AbstractText>
          <AbstractText Label="EMPTY" NlmCategory="RESULTS"/>
          <AbstractText Label="CONCLUSIONS" NlmCategory="CONCLUSIONS">So.</AbstractText>
          <CopyrightInformation>Copyright 2020 Elsevier.</CopyrightInformation>"""
    other = '<OtherAbstract Type="Publisher" Language="spa"><AbstractText>Por qué.</AbstractText></OtherAbstract>'
    expected = "BACKGROUND: Why.\nSTUDY DESIGN: How & when.\nNo label.\nPublished without.\nCONCLUSIONS: So."
    assert text_of(abstract, more=f"</Article>{other}<Article>") == f"A title.\n{expected}"


def test_markup_entities_and_other_scripts_become_text() -> None:
    math = (
        '<mml:math xmlns:mml="http://www.w3.org/1998/Math/MathML"><mml:msup><mml:mi>R</mml:mi>'
        "<mml:mn>2</mml:mn></mml:msup><mml:mo>=</mml:mo><mml:mn>0.9</mml:mn></mml:math>"
    )
    abstract = (
        f"<AbstractText>In <i>E. coli</i>, CO<sub>2</sub> and 10<sup>-3</sup>\n   &lt;5 &#x3b1;&#946; {math}, "
        f"<b>bold <i>both</i></b>. 中文摘要、日本語、العربية, naïve \U0001d6fc.</AbstractText>"
    )
    expected = "In E. coli, CO2 and 10-3 <5 αβ R2=0.9, bold both. 中文摘要、日本語、العربية, naïve \U0001d6fc."
    assert text_of(abstract, title="H<sub>2</sub>O &amp; <i>you</i>") == f"H2O & you\n{expected}"
    assert text_of(abstract.replace(' xmlns:mml="http://www.w3.org/1998/Math/MathML"', "")).endswith(expected)


@pytest.mark.parametrize(
    ("title", "vernacular", "expected"),
    [
        ("[A study of rats].", "Rattenstudie.", "A study of rats."),
        ("[Is it so?].", "", "Is it so?"),
        ("[Synthesis of [3H]foo in [rats]]", "", "Synthesis of [3H]foo in [rats]"),
        ("[18F]FDG uptake [review].", "", "[18F]FDG uptake [review]."),
        ("[A] and [B]", "", "[A] and [B]"),
        ("[Not Available].", "Étude sur les <i>rats</i>.", "Étude sur les rats."),
        ("[In Process Citation]", "", ""),
        ("", "Rattenstudie.", "Rattenstudie."),
        ("", "", ""),
    ],
)
def test_titles(title: str, vernacular: str, expected: str) -> None:
    more = f"<VernacularTitle>{vernacular}</VernacularTitle>" if vernacular else ""
    assert text_of(title=title, more=more) == (f"{expected}\nIt was done." if expected else "It was done.")


def test_articles_without_abstract_are_no_documents() -> None:
    assert text_of(None) == text_of("") == text_of("<AbstractText/>") == text_of("   \n") == ""
    assert text_of("Cut. (ABSTRACT TRUNCATED AT 250 WORDS)") == "A title.\nCut."


def test_records_without_pmid_are_counted_and_do_not_take_another_s() -> None:
    counts: Counter[str] = Counter()
    content = article_set(article(None, "Nobody's."), article(7, "Mine."))
    records = list(pubmed_records(BytesIO(content), 0, sampling.NO_LIMIT, counts))
    assert [(record.identity, record.text) for record in records] == [(7, "A title.\nMine.")]
    assert counts == {"records": 2, "without_pmid": 1}


@pytest.mark.parametrize("piece", [1, 7, 100, 2**20])
def test_records_are_cut_out_however_the_bytes_come(monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    book = "<PubmedBookArticle><BookDocument><PMID>5</PMID></BookDocument></PubmedBookArticle>"
    content = article_set(article(1), "<!-- between -->", book, article(2), deleted=(3, 4))
    monkeypatch.setattr(documents, "PIECE", piece)
    found = [(record.identity, record.kind) for record in records_of(content)]
    assert found == [(1, TEXT), (2, TEXT), (3, documents.DELETED), (4, documents.DELETED)]


def test_only_what_lies_below_the_limit_comes_and_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    content = article_set(*map(article, range(1, 200)), deleted=tuple(range(200, 300)))
    everything, limit = records_of(content), 2**62
    parsed: list[bytes] = []
    monkeypatch.setattr(documents, "parse", lambda part, parse=documents.parse: parsed.append(part) or parse(part))
    few = records_of(content, limit)
    assert few == [record for record in everything if record.priority <= limit]
    assert 0 < len(few) < 120 and len(parsed) < 80


LAUGHS = '<!DOCTYPE PubmedArticleSet [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;">]>\n'
OUTSIDE = '<!DOCTYPE PubmedArticleSet [<!ENTITY x SYSTEM "file:///etc/passwd">]>\n'
ONE = gzip.compress(article_set(article(1)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (ONE[:-20], "truncated: the gzip stream breaks off"),
        (ONE[:-6] + b"\0\0\0\0\0\0", "CRC check failed"),
        (ONE[:12] + b"\xff" * 30, "Error -3 while decompressing"),
        (gzip.compress(article_set(article(1))[:-30]), "truncated: the XML ends before"),
        (article_set(article(1))[:-300], "truncated: the XML ends before"),
        (article_set("&b;", head=LAUGHS), "declares entities"),
        (article_set(article(1, "&x;"), head=OUTSIDE), "declares entities"),
        (article_set(article(1, "&b;")), "undefined entity"),
        (article_set(article(1, "<i>a</AbstractText>")), "mismatched tag"),
        (article_set("<Other/>"), "<Other> among the articles"),
        (article_set(article(1), head='<?xml version="1.0" encoding="latin-1"?>'), "encoding latin-1"),
        (b"", "no <PubmedArticleSet>"),
        (b"<html>404</html>", "no <PubmedArticleSet>"),
        (HEAD.encode() + b"<PubmedArticleSet>" + b"a" * (2**22 + 9), "a record of more than"),
        (
            gzip.compress(article_set(*map(article, [1] * 400))),
            "unpacks to more than 2 times its size, as no text does",
        ),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_a_damaged_or_hostile_file_is_one_line_and_leaves_nothing(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    content: bytes,
    message: str,
) -> None:
    monkeypatch.setattr(documents, "LONGEST", 2**22)
    if "unpacks" in message:
        monkeypatch.setattr(sampling, "LONGEST", 1000)
        monkeypatch.setattr(sampling, "LARGEST_RATIO", 2)
    path = tmp_path / "pubmed25n0001.xml.gz"
    path.write_bytes(content)
    assert run("--output", tmp_path / "out", "--input", path) == 1
    stderr = capsys.readouterr().err
    assert stderr.startswith(f"error: {path}: ") and message in stderr and stderr.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
