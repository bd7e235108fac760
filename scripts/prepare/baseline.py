"""The files of PubMed's yearly baseline, fetched and compared with their published MD5."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import requests

from olmo.net import TIMEOUT, TransferInterrupted, bounded, describe_failure, http_session
from scripts.prepare.documents import hash_of
from scripts.prepare.download import Remote, describe, fetch

MOST_OF_PAGE, PATIENCE = 2**24, 600.0  # bytes, and seconds, of a page that lists files
BASELINE = "https://ftp.ncbi.nlm.nih.gov/pubmed/baseline/"


def download(url: str, year: str | None, count: int | None, seed: int, folder: Path) -> list[Path]:
    """Download the files of a year's baseline, or `count` of them chosen by the seed, that `folder` lacks.

    Each is compared with its published MD5, which is kept with it. Raises OSError where the server does not respond or
    lacks a file that it lists, ValueError where it lists too few files or one is damaged.
    """
    with http_session() as session:

        def page(address: str) -> str:
            response, content = bounded(
                address, lambda: session.get(address, timeout=TIMEOUT, stream=True), MOST_OF_PAGE, PATIENCE
            )
            response.raise_for_status()
            return content.decode("utf-8", "replace")

        def look(name: str) -> Remote | None:
            stated = re.search(r"\b[0-9a-f]{32}\b", page(f"{url}{name}.md5").lower())
            if stated is None:
                raise ValueError(f"{url}{name}.md5: states no MD5")
            remote = describe(session, url, name)
            return remote and replace(remote, digest=("md5", stated[0]))

        try:
            listed = set(re.findall(r'href="(pubmed(\d\d)n\d+\.xml\.gz)"', page(url)))
        except (requests.RequestException, TransferInterrupted) as error:
            raise OSError(f"{url}: {describe_failure(error)}; local files can be named with --input") from error
        year = year or max((of_year for _, of_year in listed), default="YY")
        names = sorted((name for name, of_year in listed if of_year == year), key=lambda n: hash_of(n.encode(), seed))
        if len(names) < (count or 1):
            raise ValueError(f"{url}: lists {len(names)} files pubmed{year}nNNNN.xml.gz")
        names = sorted(names[:count])
        folder.mkdir(parents=True, exist_ok=True)
        missing = [n for n in names if not ((folder / n).is_file() and (folder / f"{n}.md5").is_file())]
        print(f"{folder}: {len(missing)} of {len(names)} files to fetch", flush=True)
        for name in missing:
            partial, remote = fetch(session, look, name, folder)
            assert remote.digest is not None
            (folder / f"{name}.md5").write_text(f"MD5({name})= {remote.digest[1]}\n")
            partial.replace(folder / name)
    return [folder / name for name in names]
