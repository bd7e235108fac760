"""Files as PubMed's baseline has them, made up, and the sample that they must give."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from olmo.data.sources import TokenDataset
from olmo.exceptions import exit_status
from olmo.tokenizer import load_tokenizer
from scripts import prepare_pubmed
from scripts.prepare import OLMO_TOKENIZER
from scripts.prepare.documents import hash_of

EOS = prepare_pubmed.OLMO_EOS
TOKENIZER = load_tokenizer(OLMO_TOKENIZER)
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


def read(folder: Path, length: int) -> np.ndarray:
    source = TokenDataset(folder, length)
    return source.read(range(len(source)))


def stream_of(texts: list[str], eos: int = EOS) -> list[int]:
    return [i for text in texts for i in (*TOKENIZER.encode(text, add_special_tokens=False).ids, eos)]
