"""Byte ranges over HTTP from a server on this machine, and all that can go wrong there: nothing wrong is kept."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from olmo import net
from olmo.config import DataConfig
from olmo.data import ranges as remote
from olmo.data.ranges import RemoteFiles
from olmo.data.sources import TokenFiles, open_source
from tests.remote_tokens import CONTENTS, EXPECTED, LENGTH, NAMES, asked, kept, urls, with_keys
from tests.serving import File, Server, serving


def test_instances_by_number_and_only_their_bytes(server: Server) -> None:
    source = TokenFiles(urls(server), LENGTH)
    assert len(source) == 37 and source.sizes == [len(c) for c in CONTENTS]
    assert sorted(server.heads) == sorted(NAMES) and not server.asked
    wanted = [36, 0, 7, 20, 0, 6]
    rows = source.read(np.array(wanted, dtype=np.uint32))
    assert rows.dtype == np.int64 and rows.shape == (6, LENGTH)
    np.testing.assert_array_equal(rows, EXPECTED[wanted])
    # 6 and 7 are neighbours, 0 is asked for once.
    assert sorted((a.path[-5], a.range, a.sent) for a in server.asked) == [
        ("0", "bytes=0-15", 16),
        ("2", "bytes=16-47", 32),
        ("2", "bytes=240-255", 16),
        ("3", "bytes=16-31", 16),
    ]


def test_a_second_run_asks_for_nothing(server: Server) -> None:
    TokenFiles(urls(server), LENGTH).read([3, 9])
    before = asked(server)
    source = TokenFiles(urls(server), LENGTH)
    np.testing.assert_array_equal(source.read([3, 9]), EXPECTED[[3, 9]])
    assert asked(server) == before
    np.testing.assert_array_equal(source.read([9, 3]), EXPECTED[[9, 3]])  # not what was kept: another order
    assert asked(server) == before + 2
    # A row of other length, at the same numbers: other bytes.
    assert TokenFiles(urls(server), 2 * LENGTH).read([1])[0].tolist() == EXPECTED[2:4].reshape(-1).tolist()


def test_local_and_remote_files_mixed(server: Server, tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_bytes(CONTENTS[0])
    (tmp_path / "d.npy").write_bytes(CONTENTS[3])
    paths = [str(tmp_path / "a.npy"), server.url + "/tokens/part-{1..2}.npy", str(tmp_path / "d.npy")]
    source = open_source(DataConfig(paths=paths), LENGTH)
    wanted = np.random.default_rng(0).permutation(37)
    np.testing.assert_array_equal(source.read(wanted), EXPECTED[wanted])
    np.testing.assert_array_equal(source.read([0, 36]), EXPECTED[[0, 36]])
    assert source.read([]).shape == (0, LENGTH)
    with pytest.raises(ValueError, match=r"instance 37 is beyond .*4 files, 608 bytes, the last .*d\.npy of 36 bytes"):
        source.read([37])


@pytest.fixture(scope="module")
def one_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    with serving() as server:
        server.add("", {"a": bytes(range(200)), "b": bytes(range(100, 180))})
        yield server, tmp_path_factory.mktemp("cache")


@given(data=st.data(), width=st.integers(1, 20), largest=st.integers(1, 50), keep=st.booleans())
def test_any_records(one_file: tuple[Server, Path], data: st.DataObject, width: int, largest: int, keep: bool) -> None:
    """Overlapping, touching, repeated and apart, in requests of any size."""
    server, cache = one_file
    contents = [bytes(range(200)), bytes(range(100, 180))]
    files = RemoteFiles([f"{server.url}/a", f"{server.url}/b"], cache)
    numbers = data.draw(st.lists(st.integers(0, 1), max_size=8))
    starts = [data.draw(st.integers(0, len(contents[number]) - width)) for number in numbers]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote, "LARGEST", largest)
        came = files.read(numbers, starts, width, keep)
    assert came == b"".join(contents[n][start : start + width] for n, start in zip(numbers, starts))


def test_no_more_than_the_bytes_that_are_wanted(server: Server) -> None:
    TokenFiles(urls(server), LENGTH).read(range(5, 35))  # all of one file but its rest
    assert [(a.path, a.sent) for a in server.asked] == [(NAMES[2], 30 * 2 * LENGTH)]


def test_beyond_a_file(server: Server) -> None:
    with pytest.raises(ValueError, match=rf"{urls(server)[1]}: bytes from 2 on are beyond its 4"):
        RemoteFiles(urls(server)).read([1], [2], 3)


def fault_500(server: Server) -> None:
    server.failures[NAMES[0]] = [500, 503]
    server.failures[f"HEAD {NAMES[2]}"] = [502, 429]


def fault_reset(server: Server) -> None:
    server.resets[NAMES[2]] = 3


def fault_short(server: Server) -> None:
    server.cuts[NAMES[0]] = [5, 0]


@pytest.mark.parametrize("fault", [fault_500, fault_reset, fault_short])
def test_what_passes_is_tried_again(server: Server, fault: Any) -> None:
    fault(server)
    wanted = [0, 10, 36]
    np.testing.assert_array_equal(TokenFiles(urls(server), LENGTH).read(wanted), EXPECTED[wanted])
    before = asked(server)
    np.testing.assert_array_equal(TokenFiles(urls(server), LENGTH).read(wanted), EXPECTED[wanted])
    assert asked(server) == before


def lasting_500(server: Server) -> str:
    server.failures[NAMES[2]] = [500] * net.ATTEMPTS
    return r"part-2\.npy: 500 Internal Server Error \(5 attempts\)"


def lasting_reset(server: Server) -> str:
    server.resets[NAMES[2]] = net.ATTEMPTS
    return r"part-2\.npy: .* \(5 attempts\)"


def lasting_short(server: Server) -> str:
    server.cuts[NAMES[2]] = [7] * net.ATTEMPTS
    return r"part-2\.npy: .*(broke off|bytes came) \(5 attempts\)"


def ignored_range(server: Server) -> str:
    server.behaviour = "no ranges"
    return r"part-.\.npy: the server ignores byte ranges and would send all \d+ bytes"


def other_range(server: Server) -> str:
    server.files[NAMES[2]].headers["Content-Range"] = f"bytes 16-31/{len(CONTENTS[2])}"
    return r"asked for bytes 80-95 of 484, the server sends bytes 16-31/484 \(5 attempts\)"


def no_range_stated(server: Server) -> str:
    server.files[NAMES[2]].headers["Content-Range"] = None
    return r"the server sends no range \(5 attempts\)"


def grown(server: Server) -> str:
    server.files[NAMES[2]].content += b"more"
    return r"part-2\.npy: the file has 488 bytes now, it had 484 when its size was requested"


def shrunk(server: Server) -> str:
    server.files[NAMES[2]].content = CONTENTS[2][:50]
    return r"part-2\.npy: the file has 50 bytes now, it had 484"


def replaced(server: Server) -> str:
    server.files[NAMES[2]].content = bytes(len(CONTENTS[2]))
    return r"part-2\.npy: the file has changed on the server \("


def gone(server: Server) -> str:
    del server.files[NAMES[2]]
    return r"part-2\.npy: 404 Not Found: no such file"


def forbidden(server: Server) -> str:
    server.failures[NAMES[2]] = [403]
    return r"part-2\.npy: 403 Forbidden: no such file, or no permission to read it"


def compressed(server: Server) -> str:
    server.files[NAMES[2]].headers["Content-Encoding"] = "gzip"
    return r"part-2\.npy: the server compresses it \(gzip\)"


FAULTS = [lasting_500, lasting_reset, lasting_short, ignored_range, other_range, no_range_stated, grown, shrunk]
FAULTS += [replaced, gone, forbidden, compressed]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_error_and_nothing_of_it_is_kept(server: Server, tmp_path: Path, fault: Any) -> None:
    source = TokenFiles(urls(server), LENGTH)
    wanted = [0, 10, 36]
    said = fault(server)
    with pytest.raises((OSError, ValueError), match=said) as caught:
        source.read(wanted)
    assert "\n" not in str(caught.value)
    assert not kept(tmp_path, "ranges") and not list(tmp_path.rglob("*.partial"))
    assert sum(a.sent for a in server.asked) <= 5 * 3 * 484
    # A server in order again, and a new start: what is read then is right, and kept.
    server.behaviour, server.before_get = "ranges", lambda path: None
    server.failures, server.resets, server.cuts = {}, {}, {}
    server.files[NAMES[2]] = File(CONTENTS[2])
    if fault in (grown, shrunk, replaced):  # the sizes that were kept are doubtful
        assert not kept(tmp_path, "sizes")
    np.testing.assert_array_equal(TokenFiles(urls(server), LENGTH).read(wanted), EXPECTED[wanted])
    before = asked(server)
    np.testing.assert_array_equal(TokenFiles(urls(server), LENGTH).read(wanted), EXPECTED[wanted])
    assert asked(server) == before


def test_a_body_longer_than_its_range_is_not_listened_to() -> None:
    body = iter([bytes(6)] * 10**6)
    headers = {"content-range": "bytes 10-19/100"}
    with pytest.raises(net.TransferInterrupted, match="12 or more of 10 bytes came"):
        remote.bytes_of(remote.File("u", 100, ""), 10, 20, net.Response(206, headers, body))
    assert len(list(body)) == 10**6 - 2


def test_an_ignored_range_costs_no_download(server: Server) -> None:
    """The server would send 40 MB; what comes is what was on its way when the connection closed."""
    server.add("", {"large": bytes(40_000_000)})
    source = TokenFiles([f"{server.url}/large"], LENGTH)
    server.behaviour = "no ranges"
    with pytest.raises(ValueError, match="ignores byte ranges"):
        source.read([1])
    assert len(server.asked) == 1 and server.sent("/large")[0] < 20_000_000


@pytest.mark.parametrize(
    ("headers", "status", "error", "said"),
    [
        ({"Content-Length": None}, 200, ValueError, "does not state its size"),
        ({"Content-Type": "text/html; charset=utf-8"}, 200, FileNotFoundError, "a web page is in its place"),
        ({"Content-Encoding": "br"}, 200, ValueError, "compresses it"),
        ({}, 404, FileNotFoundError, "404 Not Found"),
        ({}, 410, FileNotFoundError, "410 Gone"),
        ({}, 403, PermissionError, "403 Forbidden"),
        ({}, 400, OSError, "400 Bad Request"),
        ({}, 500, OSError, r"500 Internal Server Error \(5 attempts\)"),
    ],
)
def test_sizes_that_are_not_to_be_had(
    server: Server, tmp_path: Path, headers: dict[str, str | None], status: int, error: type[Exception], said: str
) -> None:
    server.files[NAMES[1]].headers, server.files[NAMES[1]].status = headers, status
    with pytest.raises(error, match=rf"part-1\.npy: .*{said}"):
        TokenFiles(urls(server), LENGTH)
    assert not kept(tmp_path, "*")
    server.files[NAMES[1]] = File(CONTENTS[1])
    assert TokenFiles(urls(server), LENGTH).sizes == [len(c) for c in CONTENTS]


def test_no_server_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    with_keys(monkeypatch)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", url)
    for place in (f"{url}/a.npy", "s3://bucket/a.npy"):
        with pytest.raises(OSError, match=rf"^{place}: Connection refused \(5 attempts\)$"):
            TokenFiles([place], LENGTH)


def test_the_first_error_ends_it(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others do not wait for their next attempt, nor do the remaining ranges come."""
    monkeypatch.setattr(net, "WAIT", 30.0)
    source = TokenFiles(urls(server), LENGTH)
    server.failures[NAMES[0]] = [500]
    del server.files[NAMES[3]]
    started = time.monotonic()
    with pytest.raises((FileNotFoundError, OSError), match="part-3"):
        source.read([0, 36])
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "other"])
@pytest.mark.parametrize("kind", ["ranges", "sizes"])
def test_a_damaged_cache_is_made_anew(server: Server, tmp_path: Path, kind: str, damage: str) -> None:
    TokenFiles(urls(server), LENGTH).read([1, 20])
    (path,) = kept(tmp_path, kind)
    good = path.read_bytes()
    bad = {"cut": good[:-3], "flipped": good[:40] + bytes([good[40] ^ 1]) + good[41:], "empty": b"", "other": b"x" * 99}
    path.write_bytes(bad[damage])
    before = asked(server)
    np.testing.assert_array_equal(TokenFiles(urls(server), LENGTH).read([1, 20]), EXPECTED[[1, 20]])
    assert asked(server) == before + (2 if kind == "ranges" else len(NAMES))
    assert path.read_bytes() == good


@pytest.mark.parametrize("told", ["ETag", "Last-Modified"])
def test_a_new_version_of_a_file_is_read_anew(server: Server, tmp_path: Path, told: str) -> None:
    """Same sizes, another entity tag, or, from a server without, date: what was kept of the old version is not given
    for the new one, nor are the two mixed."""
    if told == "Last-Modified":
        for file in server.files.values():
            file.headers["ETag"] = None
    source = TokenFiles(urls(server), LENGTH)
    source.read([0])
    server.files[NAMES[0]] = File(
        bytes(len(CONTENTS[0])), server.files[NAMES[0]].headers, "Thu, 1 Feb 2024 10:00:00 GMT"
    )
    with pytest.raises(ValueError, match="the file has changed on the server"):
        source.read([1])
    for path in kept(tmp_path, "sizes"):
        path.unlink()
    assert not TokenFiles(urls(server), LENGTH).read([0]).any()


def test_a_cache_that_cannot_be_written(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").write_text("a file")
    np.testing.assert_array_equal(TokenFiles(urls(server), LENGTH).read([4]), EXPECTED[[4]])


def test_the_cache_stays_within_its_bounds(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "CACHE_SIZE", 160)
    source = TokenFiles(urls(server), LENGTH)
    for number in range(8):
        source.read([number])
    assert 2 <= len(kept(tmp_path, "ranges")) <= 160 // (32 + 16)
    before = len(server.asked)
    source.read([7])
    assert len(server.asked) == before
    source.read([0, 1])  # more than an eighth of the cache is not kept
    source.read([0, 1])
    assert len(server.asked) == before + 2


def test_what_is_used_again_stays(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "CACHE_SIZE", 160)  # three files
    source = TokenFiles(urls(server), LENGTH)
    for number in (0, 1, 2, 0, 3):
        source.read([number])
        time.sleep(0.01)  # times of files are as coarse as that
    before = len(server.asked)
    source.read([0])
    assert len(server.asked) == before
    source.read([1])
    assert len(server.asked) == before + 1


def test_several_that_want_the_same_ask_once(server: Server) -> None:
    def one(_: int) -> np.ndarray:
        return TokenFiles(urls(server), LENGTH).read([2, 12])

    with ThreadPoolExecutor(4) as pool:
        for rows in pool.map(one, range(4)):
            np.testing.assert_array_equal(rows, EXPECTED[[2, 12]])
    assert len(server.heads) == len(NAMES) and len(server.asked) == 2
