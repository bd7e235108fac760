"""`python -m scripts.prepare_pubmed`: baseline XML in all its varieties to rows that a run reads; what goes wrong."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from tokenizers import Tokenizer, models

from olmo.data.sources import TokenDataset
from olmo.exceptions import exit_status
from olmo.tokenizer import load_tokenizer
from scripts import prepare_pubmed
from scripts.prepare import documents, sampling
from scripts.prepare.documents import NO_TEXT, TEXT, Record, hash_of, pubmed_records, text_records
from scripts.prepare_demo_text import train_tokenizer
from tests.reference import tiny_config
from tests.running import ROOT, command
from tests.serving import Server

EOS = prepare_pubmed.OLMO_EOS
TOKENIZER = load_tokenizer(prepare_pubmed.TOKENIZER)
HEAD = """<?xml version="1.0" encoding="utf-8"?>
<!DOCTYPE PubmedArticleSet SYSTEM "http://dtd.nlm.nih.gov/ncbi/pubmed/out/pubmed_250101.dtd">
"""
WORDS = str.split("renal cortical lesions were induced in male rats and measured after two weeks of oral treatment")


def article(
    pmid: int | None, abstract: str | None = "It was done.", title: str = "A title.", version: int = 1, more: str = ""
) -> str:
    """A record as the baseline has it, with a citing article's PMID and a reference's further down."""
    if abstract is not None and "<" not in abstract.partition("</")[0]:
        abstract = f"<AbstractText>{abstract}</AbstractText>"
    body = f"<Abstract>\n          {abstract}\n        </Abstract>" if abstract is not None else ""
    own = f'<PMID Version="{version}">{pmid}</PMID>' if pmid is not None else ""
    return f"""  <PubmedArticle>
    <MedlineCitation Status="MEDLINE" Owner="NLM" IndexingMethod="Manual">
      {own}
      <DateRevised><Year>2019</Year><Month>02</Month><Day>09</Day></DateRevised>
      <Article PubModel="Print">
        <Journal><Title>Biochemical medicine</Title></Journal>
        <ArticleTitle>{title}</ArticleTitle>
        <Pagination><MedlinePgn>117-26</MedlinePgn></Pagination>
        {body}
        <AuthorList CompleteYN="Y"><Author ValidYN="Y"><LastName>Makar</LastName></Author></AuthorList>
        <Language>eng</Language>{more}
      </Article>
      <CommentsCorrectionsList>
        <CommentsCorrections RefType="Cites"><PMID Version="1">999</PMID></CommentsCorrections>
      </CommentsCorrectionsList>
    </MedlineCitation>
    <PubmedData><ArticleIdList><ArticleId IdType="pubmed">999</ArticleId></ArticleIdList></PubmedData>
  </PubmedArticle>
"""


def article_set(*articles: str, deleted: tuple[int, ...] = (), head: str = HEAD) -> bytes:
    gone = "".join(f'    <PMID Version="1">{pmid}</PMID>\n' for pmid in deleted)
    gone = f"  <DeleteCitation>\n{gone}  </DeleteCitation>\n" if deleted else ""
    return f"{head}<PubmedArticleSet>\n{''.join(articles)}{gone}</PubmedArticleSet>\n".encode()


def records_of(content: bytes, limit: int = sampling.NO_LIMIT) -> list[Record]:
    return list(pubmed_records(BytesIO(content), 0, limit, Counter()))


def text_of(*arguments: Any, **named: Any) -> str:
    (record,) = records_of(article_set(article(1, *arguments, **named)))
    assert (record.kind == TEXT) == bool(record.text)
    return record.text


# --- the text of a record ----------------------------------------------------------------------------------------


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


# --- damaged and hostile files -----------------------------------------------------------------------------------

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
    path = tmp_path / "pubmed25n0001.xml.gz"
    path.write_bytes(content)
    assert run("--output", tmp_path / "out", "--input", path) == 1
    stderr = capsys.readouterr().err
    assert stderr.startswith(f"error: {path}: ") and message in stderr and stderr.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


# --- whole runs --------------------------------------------------------------------------------------------------


def run(*arguments: object) -> int:
    few = () if "--processes" in arguments else ("--processes", "1")
    return exit_status(prepare_pubmed.main, [str(a) for a in (*arguments, *few)])


def words(number: int, count: int = 60) -> str:
    generator = np.random.default_rng(number)
    return f"Study {number}: " + " ".join(generator.choice(WORDS, count)) + "."


@dataclass
class Contents:
    """What a baseline file says: (PMID, version, abstract), and which PMIDs are deleted (of version 1)."""

    articles: list[tuple[int, int, str | None]]
    deleted: list[int]

    def write(self, path: Path) -> None:
        articles = [article(pmid, text, version=version) for pmid, version, text in self.articles]
        path.write_bytes(gzip.compress(article_set(*articles, deleted=tuple(self.deleted)), 1))


def write_files(folder: Path, files: list[Contents]) -> list[Path]:
    folder.mkdir(exist_ok=True)
    paths = [folder / f"pubmed25n{number:04}.xml.gz" for number in range(1, len(files) + 1)]
    for path, contents in zip(paths, files):
        contents.write(path)
    return paths


def expected_texts(files: list[Contents], seed: int) -> list[str]:
    """The sample of everything, from files that are replayed one after the other."""
    articles: dict[tuple[int, int], str | None] = {}
    for contents in files:
        articles |= {(pmid, version): text for pmid, version, text in contents.articles}
        for pmid in contents.deleted:
            articles.pop((pmid, 1), None)
    newest = {pmid: text for (pmid, _), text in sorted(articles.items(), key=lambda item: item[0])}
    ordered = sorted(newest, key=lambda pmid: hash_of(str(pmid).encode(), seed))
    return list(dict.fromkeys(f"A title.\n{newest[pmid]}" for pmid in ordered if newest[pmid]))


def corpus_of(count: int = 3, each: int = 120) -> list[Contents]:
    """Files with articles of their own, newer copies and versions of others', texts of others', and deletions."""
    files = []
    for number in range(count):
        own = [(pmid, 1, None if pmid % 10 == 0 else words(pmid)) for pmid in range(number + 1, count * each, count)]
        again = [(pmid, 1, words(1000 * number + pmid)) for pmid in range(1, 20 * number)]
        versions = [(pmid, 3 - number, words(5000 + pmid)) for pmid in range(30, 36)]
        same = [(9000 + pmid, 1, words(pmid)) for pmid in range(40, 60)] if number == 1 else []
        files.append(Contents(own + again + versions + same, list(range(60 + number, 75))))
    return files


FILES = corpus_of()
RECORDS = sum(len(contents.articles) for contents in FILES)


@pytest.fixture(scope="module")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_files(tmp_path_factory.mktemp("baseline"), FILES)


def read(folder: Path, length: int) -> np.ndarray:
    source = TokenDataset(folder, length)
    return source.read(range(len(source)))


def stream_of(texts: list[str], eos: int = EOS) -> list[int]:
    return [i for text in texts for i in (*TOKENIZER.encode(text, add_special_tokens=False).ids, eos)]


@pytest.mark.parametrize(("seed", "instances"), [(0, 30), (1, 200)])
def test_the_command_gives_the_sample_whatever_the_processes(
    tmp_path: Path, baseline: list[Path], seed: int, instances: int
) -> None:
    outputs = {}
    for processes, files in ((1, baseline), (3, baseline[::-1])):
        output = tmp_path / f"data/pubmed{processes}"
        options = (
            f"--output {output} --instances {instances} --sequence_length 64 --seed {seed} --processes {processes}"
        )
        done = command(["-m", "scripts.prepare_pubmed", *options.split(), "--input", *map(str, files)], tmp_path)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        outputs[processes] = {path.name: path.read_bytes() for path in output.iterdir()}
        assert f"read 3 files, {RECORDS} records, 0 of them without PMID" in done.stdout and "MB/s" in done.stdout
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["pubmed1", "pubmed3"]
    assert outputs[1]["data-00000-of-00001.arrow"] == outputs[3]["data-00000-of-00001.arrow"]
    assert outputs[1]["about.json"] == outputs[3]["about.json"]

    stream = stream_of(expected_texts(FILES, seed))[: instances * 64]
    assert read(tmp_path / "data/pubmed1", 64).reshape(-1).tolist() == stream
    about = json.loads(outputs[1]["about.json"])
    inputs = [(path.name, path.stat().st_size, hashlib.md5(path.read_bytes()).hexdigest()) for path in baseline]
    assert about["read"].pop("inputs") == [{"file": n, "bytes": b, "md5": m} for n, b, m in inputs]
    sizes = [len(gzip.decompress(path.read_bytes())) for path in baseline]
    assert about["read"] == {"files": 3, "records": RECORDS, "bytes": sum(sizes)}
    sample = about.pop("sample")
    assert sample["documents"] == stream.count(EOS) + (stream[-1] != EOS)
    gone = ("replaced_or_deleted", "without_text", "same_text")
    assert sample["records"] == sample["documents"] + sum(sample[key] for key in gone)
    assert (about["seed"], about["eos_token_id"], about["tokenizer"]) == (seed, EOS, prepare_pubmed.TOKENIZER)


ARTICLES = st.tuples(st.integers(1, 12), st.integers(1, 2), st.sampled_from([None, *map(words, range(8))]))
SETS = st.builds(Contents, st.lists(ARTICLES, max_size=12), st.lists(st.integers(1, 12), max_size=2))


def settings(**changes: Any) -> sampling.Settings:
    values = {"corpus": "pubmed", "seed": 0, "tokenizer": prepare_pubmed.TOKENIZER, "eos_token_id": EOS, "dtype": "<u2"}
    return sampling.Settings(**{**values, **changes})


@given(st.lists(SETS, min_size=1, max_size=4), st.integers(0, 3), st.integers(1, 400))
def test_what_lies_up_to_the_limit_is_exactly_the_start_of_the_sample(
    files: list[Contents], seed: int, wanted: int
) -> None:
    expected = expected_texts(files, seed)
    with tempfile.TemporaryDirectory() as name:
        paths = write_files(Path(name, "in"), files)
        events, limit, _ = sampling.collect(paths, settings(seed=seed), Path(name), 1, wanted)
        found, counts = sampling.resolve(events)
        tokens = np.fromfile(Path(name, f"{os.getpid()}.tokens"), "<u2")
    texts = [TOKENIZER.decode(tokens[start // 2 :][: n - 1]) for start, n in found[["start", "tokens"]].tolist()]
    assert texts == expected[: len(texts)]
    assert limit < sampling.NO_LIMIT or texts == expected
    assert counts["documents"] == len(texts)


def test_all_is_read_again_when_what_was_kept_is_replaced_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = Contents([(pmid, 1, words(pmid)) for pmid in range(1, 200)], [])
    # Two files are under way at a time: with two between, the limit has fallen when the deletions come.
    between = [Contents([(pmid, 1, words(pmid))], []) for pmid in (901, 902)]
    files = [many, *between, Contents([], list(range(1, 160)))]
    paths = write_files(tmp_path / "in", files)
    calls: list[float] = []
    collect = prepare_pubmed.collect
    monkeypatch.setattr(prepare_pubmed, "collect", lambda *a: calls.append(a[-1]) or collect(*a))
    prepare_pubmed.prepare(paths, tmp_path / "out", settings(), 20, 64, 1)
    assert calls == [1600 * 2**i for i in range(len(calls))] and len(calls) > 1
    stream = stream_of(expected_texts(files, 0))
    assert read(tmp_path / "out", 64).reshape(-1).tolist() == stream[: 20 * 64]


@given(st.lists(st.lists(st.integers(0, 9), max_size=7), max_size=12), st.integers(0, 40))
def test_packing_loses_and_invents_nothing(documents: list[list[int]], size: int) -> None:
    stream = [i for document in documents for i in document]
    tokens = np.full(size, -1, np.int32)
    assert prepare_pubmed.fill(tokens, (np.array(d, np.uint16) for d in documents)) == min(size, len(stream))
    assert tokens.tolist() == (stream + [-1] * size)[:size]


def test_a_run_of_the_trainer_reads_the_folder(tmp_path: Path, baseline: list[Path]) -> None:
    tokenizer = tmp_path / "small.json"
    train_tokenizer((words(i) for i in range(50)), 300).save(str(tokenizer))
    options = ("--instances", 12, "--sequence_length", 32, "--tokenizer", tokenizer)
    assert run("--output", tmp_path / "data", "--input", *baseline, *options) == 0
    rows = read(tmp_path / "data", 32)
    assert rows.shape == (12, 32) and (rows == 0).any() and rows.max() < 300  # <|endoftext|> is 0 there
    config = {
        "run_name": "pubmed",
        "model": dict(OmegaConf.structured(tiny_config(max_sequence_length=32, vocab_size=300, embedding_size=320))),
        "tokenizer": {"identifier": str(tokenizer)},
        "data": {"dataset_path": str(tmp_path / "data")},
        "max_duration": 3,
        "global_train_batch_size": 4,
        "device_train_microbatch_size": 4,
        "precision": "fp32",
        "save_folder": str(tmp_path / "run"),
        "no_pre_train_checkpoint": True,
    }
    OmegaConf.save(OmegaConf.create(config), tmp_path / "config.yaml")
    done = command(["-m", "scripts.train", str(tmp_path / "config.yaml")], tmp_path)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").open()][-1] == 3


def test_more_than_there_is_names_how_many_there_are(
    tmp_path: Path, baseline: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    have = len(stream_of(expected_texts(FILES, 0)))
    arguments = ("--output", tmp_path / "out", "--sequence_length", 64, "--input", *baseline, "--instances")
    assert run(*arguments, have // 64 + 1) == 1
    stderr = capsys.readouterr().err
    assert f"3 files hold {have} tokens" in stderr and f"--instances {have // 64} is the most" in stderr
    assert list(tmp_path.iterdir()) == []
    assert run(*arguments, have // 64) == 0


def test_no_document_at_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (path,) = write_files(tmp_path, [Contents([(1, 1, None)], [])])
    assert run("--output", tmp_path / "out", "--input", path) == 1
    assert "hold 0 tokens in 0 documents (of 1 records 1 without text" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "taken"], "taken exists; remove it or choose another --output"),
        (["--output", "o", "--instances", "0"], "--instances must be at least 1"),
        (["--output", "o", "--seed", "-1"], "--seed must lie in"),
        (["--output", "o", "--corpus", "c4"], "--corpus c4 needs --input"),
        (["--output", "o", "--input", "a", "--files", "3"], "are for downloading"),
        (["--output", "o", "--input", "a", "--tokenizer", "no.json"], "no.json: no such tokenizer file"),
        (["--output", "o", "--input", "a", "--tokenizer", "bare.json"], "Say it with --eos_token_id"),
        (["--output", "o", "--input", "no*.gz"], "--input no*.gz: no such file"),
    ],
)
def test_wrong_command_lines(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("taken").mkdir()
    Path("taken/file").touch()
    Path("a").write_bytes(ONE)
    Tokenizer(models.WordLevel({"a": 0}, "a")).save("bare.json")
    assert run(*arguments) == (1 if "no such" in message else 2)
    stderr = capsys.readouterr().err
    assert stderr.startswith("error: ") and message in stderr and stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "bare.json", "taken"]


def test_an_md5_beside_a_file_is_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (path,) = write_files(tmp_path, FILES[:1])
    stated = path.with_name(path.name + ".md5")
    options = ("--output", tmp_path / "out", "--input", path, "--instances", 2)
    stated.write_text(f"MD5({path.name})= {'0' * 32}\n")
    assert run(*options) == 1
    assert f"{path}: has not the MD5 that {stated.name} states" in capsys.readouterr().err
    stated.write_text(f"MD5({path.name})= {hashlib.md5(path.read_bytes()).hexdigest().upper()}\n")
    assert run(*options) == 0


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_an_end_from_outside_leaves_neither_files_nor_processes(
    tmp_path: Path, number: signal.Signals, status: int
) -> None:
    lines = gzip.compress(json.dumps({"text": words(1, 10**5)}).encode() + b"\n") * 500  # minutes of work
    for name in "ab":
        (tmp_path / f"{name}.json.gz").write_bytes(lines)
    arguments = "-m scripts.prepare_pubmed --output out --corpus c4 --processes 2 --input a.json.gz b.json.gz"
    process = subprocess.Popen(
        [sys.executable, *arguments.split(" ")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    for _ in range(2000):
        if len(list(tmp_path.glob(".out.*/*/*.tokens"))) == 2:
            break
        time.sleep(0.01)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=20)  # returns when nobody holds its end of the pipe
    assert (process.returncode, stderr) == (status, "interrupted\n" if number == signal.SIGINT else "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json.gz", "b.json.gz"]


# --- other corpora -----------------------------------------------------------------------------------------------


def test_c4_and_plain_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [*(f"{words(i)}\n  kept as it is " for i in range(50)), "", " \n"]
    lines = [json.dumps({"text": text, "url": "u"}, ensure_ascii=i % 2 == 0) for i, text in enumerate(texts)]
    (tmp_path / "c4-train.00000.json.gz").write_bytes(gzip.compress("\n".join(lines[:30]).encode()))
    (tmp_path / "c4-train.00001.json.gz").write_bytes(gzip.compress("\n".join([*lines[20:], ""]).encode()))
    ordered = sorted((text for text in texts if text.strip()), key=lambda text: hash_of(text.encode(), 5))
    options = ("--instances", 50, "--sequence_length", 64, "--seed", 5)
    assert run("--output", tmp_path / "c4", "--corpus", "c4", "--input", tmp_path / "c4*.gz", *options) == 0
    stream = stream_of(ordered)[: 50 * 64]
    assert read(tmp_path / "c4", 64).reshape(-1).tolist() == stream
    sample = json.loads((tmp_path / "c4/about.json").read_text())["sample"]
    assert 0 < sample["same_text"] <= 10 and sample["replaced_or_deleted"] == 0

    for i, text in enumerate(texts[:40]):
        (tmp_path / f"{i}.txt").write_text(text, encoding="utf-8")
    (tmp_path / "more.jsonl").write_text("\n".join(lines[40:]))
    files = (tmp_path / "*.txt", tmp_path / "more.jsonl")
    assert run("--output", tmp_path / "text", "--corpus", "text", "--input", *files, *options) == 0
    assert read(tmp_path / "text", 64).reshape(-1).tolist() == stream
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "line", [b"[1]", b'{"text": 3}', b'{"url": "u"}', b"{", b'"text"', b'{"text": "\\ud800"}', b'{"text": "\xff"}']
)
def test_a_bad_line_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], line: bytes) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'{"text": "fine"}\n\n' + line)
    assert run("--output", tmp_path / "out", "--corpus", "c4", "--input", path) == 1
    assert f"{path}: line 3 is no JSON object with a string 'text'" in capsys.readouterr().err
    assert next(text_records(BytesIO(b" "), 0, 2**64, False, Counter())).kind == NO_TEXT
    path = path.rename(tmp_path / "a.txt")
    path.write_bytes(b"\xff")
    assert run("--output", tmp_path / "out", "--corpus", "text", "--input", path) == 1
    assert f"{path}: not text in UTF-8" in capsys.readouterr().err


# --- download ----------------------------------------------------------------------------------------------------


def publish(server: Server, paths: list[Path], year: int = 25) -> str:
    """Serve files as NLM does: a page that lists them, and beside each its MD5."""
    files = {path.name.replace("25n", f"{year}n"): path.read_bytes() for path in paths}
    md5s = {f"{n}.md5": f"MD5({n})= {hashlib.md5(c).hexdigest()}\n".encode() for n, c in files.items()}
    known = server.files.get("/baseline/")
    page = known.content if known else b'<a href="/pubmed/">Parent Directory</a> <a href="README.txt">README.txt</a>\n'
    for name in (*files, *md5s):
        page += f'<a href="{name}">{name}</a>  2025-01-10 14:06   19M\n'.encode()
    server.add("/baseline", {**files, **md5s}, **{"ETag": None})
    server.add("/baseline", {"": page}, **{"Content-Type": "text/html"})
    return f"{server.url}/baseline/"


def test_download_continues_verifies_and_takes_the_newest_year(
    tmp_path: Path, baseline: list[Path], server: Server
) -> None:
    publish(server, baseline, 24)
    noise = np.random.default_rng(0).bytes(2**21).hex()  # several pieces, compressed too
    large = tmp_path / baseline[0].name
    added = article(77777, None, more=f"<Noise>{noise}</Noise>").encode() + b"</PubmedArticleSet>"
    large.write_bytes(gzip.compress(gzip.decompress(baseline[0].read_bytes()).replace(b"</PubmedArticleSet>", added)))
    url = publish(server, [large, *baseline[1:]])
    first = "/baseline/pubmed25n0001.xml.gz"
    server.cuts[first] = [2**20 + 5000]
    options = f"--output {tmp_path}/data/pubmed --instances 30 --sequence_length 64 --processes 1 --url {url}".split()
    done = command(["-m", "scripts.prepare_pubmed", *options], tmp_path)
    assert done.returncode == 0, done.stderr
    names = [path.name for path in baseline]
    kept = tmp_path / "data/pubmed_baseline"
    assert sorted(path.name for path in kept.iterdir()) == sorted([*names, *(f"{name}.md5" for name in names)])
    assert server.sent(first) == [2**20 + 5000, large.stat().st_size - 2**20]
    stream = stream_of(expected_texts(FILES, 0))[: 30 * 64]
    assert read(tmp_path / "data/pubmed", 64).reshape(-1).tolist() == stream

    server.asked.clear()  # again: nothing but the list is asked for
    assert run("--output", tmp_path / "data/again", "--instances", 3, "--sequence_length", 64, "--url", url) == 0
    assert [asked.path for asked in server.asked] == ["/baseline/"]


def test_some_files_of_a_year_chosen_by_the_seed(tmp_path: Path, baseline: list[Path], server: Server) -> None:
    publish(server, baseline, 24)
    url = publish(server, baseline)
    chosen = {}
    for seed in range(4):
        found = prepare_pubmed.download(url, "24", 2, seed, tmp_path / str(seed))
        chosen[seed] = tuple(path.name for path in found)
        assert all(re.fullmatch(r"pubmed24n000[123]\.xml\.gz", name) for name in chosen[seed])
    assert {len(set(names)) for names in chosen.values()} == {2} and len(set(chosen.values())) > 1


def test_what_goes_wrong_with_a_download(
    tmp_path: Path, baseline: list[Path], server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    def failure(*more: object) -> str:
        assert run("--output", tmp_path / "out", "--url", url, "--instances", 3, *more) == 1
        stderr = capsys.readouterr().err
        assert stderr.startswith("error: ") and stderr.count("\n") == 1
        assert not (tmp_path / "out").exists()
        return stderr

    url = f"{server.url}/nothing/"
    assert f"{url}: 404 Not Found" in failure()
    url = publish(server, [])
    assert "lists 0 files pubmedYYnNNNN.xml.gz" in failure()
    url = publish(server, baseline[:2])
    assert "lists 0 files pubmed19n" in failure("--year", "19")
    assert "lists 2 files pubmed25n" in failure("--files", 3)
    second = "/baseline/pubmed25n0002.xml.gz"
    stated = server.files[f"{second}.md5"].content
    server.files[f"{second}.md5"].content = stated[:-33] + b"0" * 32
    assert f"{url}pubmed25n0002.xml.gz: what came has not the md5 hash" in failure()
    server.files[f"{second}.md5"].content = b"soon"
    assert f"{url}pubmed25n0002.xml.gz.md5: states no MD5" in failure()
    missing = server.files.pop(f"{second}.md5")
    assert "pubmed25n0002.xml.gz: 404 Not Found; the same command continues" in failure()
    server.files[f"{second}.md5"] = missing
    missing.content = stated
    assert run("--output", tmp_path / "out", "--url", url, "--instances", 3) == 0
    assert len(server.sent("/baseline/pubmed25n0001.xml.gz")) == 1  # once whole, it stayed
