"""Damage of every kind to a folder of files is recognised and named."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from olmo.checkpoint import manifest
from olmo.files.digests import crc32


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a").write_bytes(bytes(range(256)) * 40_000)  # more than is read at once
    (tmp_path / "b").write_bytes(b"")
    manifest.write(tmp_path)
    return tmp_path


def test_sizes_and_checksums_are_written(folder: Path) -> None:
    content = (folder / "a").read_bytes()
    assert json.loads((folder / "manifest.json").read_text()) == {
        "ephemeral": False,
        "files": {
            "a": {"size": len(content), "crc32": f"{zlib.crc32(content):08x}"},
            "b": {"size": 0, "crc32": "00000000"},
        },
    }


def test_a_folder_that_is_as_it_was_written_has_no_problem(folder: Path) -> None:
    assert manifest.problem(folder) is None
    (folder / "knowledge_entropy.json").write_text("{}")  # written beside it later
    assert manifest.problem(folder) is None


def test_a_folder_without_manifest_cannot_be_checked(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    (folder / "a").unlink()
    assert manifest.problem(folder) is None and not manifest.is_ephemeral(folder)


@given(place=st.integers(0, 102_399), bit=st.integers(0, 7))
def test_a_single_bit_is_noticed(place: int, bit: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.getbasetemp() / "bits"
    if not folder.exists():
        folder.mkdir()
        (folder / "a").write_bytes(bytes(range(256)) * 400)
        manifest.write(folder)
    with (folder / "a").open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        for value in (byte ^ (1 << bit), byte):
            file.seek(place)
            file.write(bytes([value]))
            file.flush()
            assert (manifest.problem(folder) is None) == (value == byte)


def test_what_is_missing_or_cut_is_named(folder: Path) -> None:
    (folder / "b").unlink()
    assert manifest.problem(folder) == f"{folder / 'b'}: missing"
    assert manifest.problem(folder, only=["a"]) is None
    with (folder / "a").open("r+b") as file:
        file.truncate(100)
    assert manifest.problem(folder) == f"{folder / 'a'}: has 100 bytes, and was written with 10240000"


def test_a_changed_byte_is_named(folder: Path) -> None:
    with (folder / "a").open("r+b") as file:
        file.write(b"x")
    was, now = (
        json.loads((folder / "manifest.json").read_text())["files"]["a"]["crc32"],
        crc32(folder / "a"),
    )
    expected = f"{folder / 'a'}: its checksum is {now}, and was {was} when it was written"
    assert manifest.problem(folder) == expected


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"files": []}', '{"files": {"a": 1}}', '{"files": {"a": {}}}'])
def test_a_manifest_that_is_none_is_named(folder: Path, text: str) -> None:
    (folder / "manifest.json").write_text(text)
    problem = manifest.problem(folder)
    assert problem is not None and problem.startswith(f"{folder / 'manifest.json'}: not a checkpoint manifest")
    assert not manifest.is_ephemeral(folder)


def test_an_ephemeral_folder_is_marked(folder: Path) -> None:
    assert not manifest.is_ephemeral(folder)
    (folder / "manifest.json").unlink()
    manifest.write(folder, ephemeral=True)
    assert manifest.is_ephemeral(folder) and manifest.problem(folder) is None
