"""PubMed's baseline from a server on this machine: continued, verified, chosen by the seed; what goes wrong."""

from __future__ import annotations

import gzip
import hashlib
import re
from pathlib import Path

import numpy as np
import pytest

from scripts.prepare import baseline as pubmed_baseline
from tests.pubmed import FILES, article, expected_texts, read, run, stream_of, write_files
from tests.running import command
from tests.serving import Server


@pytest.fixture(scope="module")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_files(tmp_path_factory.mktemp("baseline"), FILES)


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
    assert server.sent(first) == [2**20 + 5000, large.stat().st_size - 2**20 - 5000]
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
        found = pubmed_baseline.download(url, "24", 2, seed, tmp_path / str(seed))
        chosen[seed] = tuple(path.name for path in found)
        assert all(re.fullmatch(r"pubmed24n000[123]\.xml\.gz", name) for name in chosen[seed])
    assert {len(set(names)) for names in chosen.values()} == {2} and len(set(chosen.values())) > 1


def test_a_listing_without_end_is_not_read(
    tmp_path: Path, server: Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pubmed_baseline, "MOST_OF_PAGE", 2**14)
    server.add("/endless", {"": b"<a>" * 2**14}, **{"Content-Type": "text/html"})
    url = f"{server.url}/endless/"
    assert run("--output", tmp_path / "out", "--url", url) == 1
    expected = f"error: {url}: an answer of more than 16,384 bytes\n"
    assert capsys.readouterr().err == expected and not list(tmp_path.iterdir())


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
    assert f"{url}pubmed25n0002.xml.gz: the download does not have the md5 hash" in failure()
    server.files[f"{second}.md5"].content = b"soon"
    assert f"{url}pubmed25n0002.xml.gz.md5: states no MD5" in failure()
    missing = server.files.pop(f"{second}.md5")
    assert "pubmed25n0002.xml.gz: 404 Not Found (5 attempts); the same command continues" in failure()
    server.files[f"{second}.md5"] = missing
    missing.content = stated
    assert run("--output", tmp_path / "out", "--url", url, "--instances", 3) == 0
    assert len(server.sent("/baseline/pubmed25n0001.xml.gz")) == 1  # once whole, it stayed
