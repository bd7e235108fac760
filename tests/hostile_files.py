"""Hostile files of tensors: `python -m tests.hostile_files FOLDER` writes all and reads each as a command would.

Every file must end in one line that names it, within LIMIT processor seconds and LIMIT_MB of memory, and run nothing.
"""

from __future__ import annotations

import base64
import io
import json
import os
import pickle
import resource
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.hostile import Calls

NAME = "transformer.wte.weight"
LIMIT, LIMIT_MB = 10.0, 600  # of a process that reads one file, imports (3 s, 230 MB) included
TERA = 10**12


class Opcodes:
    """A pickle, written by hand."""

    def __init__(self, *opcodes: bytes):
        self.bytes = b"\x80\x02" + b"".join(opcodes) + b"."


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def zipped(path: Path, pickled: bytes, records: dict[str, bytes], deflated: str = "", lie: bool = False) -> None:
    """A torch file of a pickle and records; the entry `deflated` is compressed, and its size is a `lie`."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {"data.pkl": pickled, "byteorder": b"little", **records, "version": b"3\n"}.items():
            kind = zipfile.ZIP_DEFLATED if name == deflated else zipfile.ZIP_STORED
            archive.writestr(f"archive/{name}", content, kind)
    if lie:  # in the directory at the end of the file
        content = path.read_bytes()
        place = content.rindex(b"PK\1\2", 0, content.rindex(f"archive/{deflated}".encode()))
        path.write_bytes(content[: place + 24] + struct.pack("<I", 100) + content[place + 28 :])


def saved(make: Callable[[], Any]) -> Callable[[Path], None]:
    """A file of one tensor, or what pickles as one."""
    return lambda path: torch.save({NAME: make()}, path)


def views(size: int, stride: int, offset: int = 0, stored: int = 1) -> Callable[[Path], None]:
    """A tensor whose view of its storage is as stated."""
    rebuild = torch._utils._rebuild_tensor_v2
    return saved(lambda: Calls(rebuild, torch.zeros(stored).storage(), offset, (size,), (stride,), False, {}))


def changed(old: bytes, new: bytes, legacy: bool = False) -> Callable[[Path], None]:
    """A file of 1000 numbers with its pickle changed."""

    def write(path: Path) -> None:
        torch.save({NAME: torch.zeros(1000)}, path, _use_new_zipfile_serialization=not legacy)
        content = path.read_bytes()
        assert old in content
        if legacy:
            path.write_bytes(content.replace(old, new))
        else:
            with zipfile.ZipFile(path) as archive:
                inner = archive.read(f"{path.stem}/data.pkl").replace(old, new)
            zipped(path, inner, {"data/0": bytes(4000)})

    return write


def recompressed(entry: str, lie: bool = False) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        buffer = io.BytesIO()
        torch.save({NAME: torch.zeros(1000)}, buffer)
        with zipfile.ZipFile(buffer) as archive:
            inner = archive.read("archive/data.pkl")
        zipped(path, inner, {"data/0": bytes(4000)}, entry, lie)

    return write


@cache
def packed_zeros(size: int) -> tuple[bytes, int]:
    """Zeros as a zip archive packs them, and their CRC-32."""
    deflate = zlib.compressobj(1, zlib.DEFLATED, -15)
    piece, crc, packed = bytes(10**6), 0, b""
    for _ in range(size // len(piece)):
        packed, crc = packed + deflate.compress(piece), zlib.crc32(piece, crc)
    return packed + deflate.flush(), crc


def bomb(path: Path, size: int = 3 * 10**9, lie: bool = False) -> None:
    """A pickle of `size` bytes, compressed two hundredfold."""
    packed, crc = packed_zeros(size)
    zipped(path, packed, {})
    content, stated = path.read_bytes(), struct.pack("<III", crc, len(packed), 100 if lie else size)
    local, central = content.index(b"PK\3\4"), content.index(b"PK\1\2")
    content = bytearray(content)
    content[local + 8 : local + 10] = content[central + 10 : central + 12] = b"\x08\0"
    content[local + 14 : local + 26] = content[central + 16 : central + 28] = stated
    path.write_bytes(content)


def legacy_storages(path: Path) -> None:
    """Two terabytes of numbers, stated by a file of the format before torch 1.6."""
    changed(b"M\xe8\x03", b"\x8a\x06" + struct.pack("<q", TERA)[:6], legacy=True)(path)


def one_record_many_times(path: Path) -> None:
    """A directory of two thousand names for the same megabyte."""
    count, size = 2000, 2**20
    with zipfile.ZipFile(path, "w") as archive:
        state = {f"t{i}": torch.zeros(1) for i in range(count)}
        buffer = io.BytesIO()
        torch.save(state, buffer)
        with zipfile.ZipFile(buffer) as inner:
            pickled = inner.read("archive/data.pkl").replace(b"K\x01t", b"J" + struct.pack("<i", size // 4) + b"t")
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/data/0", bytes(size))
        first = archive.filelist[-1]
        for number in range(1, count):
            again = zipfile.ZipInfo(f"archive/data/{number}")
            again.header_offset, again.file_size, again.compress_size = first.header_offset, size, size
            again.CRC = first.CRC
            archive.filelist.append(again)


def tuples(levels: int = 60) -> bytes:
    """A key that holds itself twice, at every level: its hash takes 2^levels steps."""
    return Opcodes(b"}", b"N\x85q\0", *[b"h\0\x86q\0" for _ in range(levels)], b"Ns").bytes


class Marked(torch.Tensor):
    """A subclass of tensors."""


def quantized() -> torch.Tensor:
    return torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8)


def distributed() -> Calls:
    from torch.distributed.tensor import DTensor

    return Calls(torch._tensor._rebuild_from_type_v2, torch._utils._rebuild_tensor_v2, DTensor, (), {})


TORCH: dict[str, Callable[[Path], None]] = {
    "a compressed pickle of 3 GB": bomb,
    "the same, stated as 100 bytes": lambda path: bomb(path, lie=True),
    "compressed numbers": recompressed("data/0"),
    "a compressed pickle, its size a lie": recompressed("data.pkl", lie=True),
    "stride 0, 10^12 elements": views(TERA, 0),
    "10^12 elements": views(TERA, 1),
    "beyond its storage by its offset": views(2, 1, offset=3, stored=4),
    "a negative stride": views(2, -1, offset=3, stored=4),
    "a negative offset": views(2, 1, offset=-8, stored=4),
    "a negative size": views(-2, 1, stored=4),
    "more numbers than their file": changed(b"M\xe8\x03tq", b"J\xff\xff\xff\x7ftq"),
    "no record": lambda path: zipped(path, zipfile_pickle(), {}),
    "legacy, 4 TB stated": legacy_storages,
    "legacy, a pickle alone": lambda path: path.write_bytes(pickle.dumps({NAME: 1})),
    "one record many times": one_record_many_times,
    "a memo of 2^32 entries": lambda path: zipped(path, Opcodes(b"Nr\xff\xff\xff\xff").bytes, {}),
    "a string of 2^60 bytes": lambda path: zipped(path, Opcodes(b"\x8d" + struct.pack("<Q", 2**60)).bytes, {}),
    "a hash of 2^60 steps": lambda path: zipped(path, tuples(), {}),
    "lists of lists": lambda path: zipped(path, Opcodes(b"]" * 10**5).bytes, {}),
    "a bytearray of 10^12": saved(lambda: Calls(bytearray, TERA)),
    "an array of 10^12": saved(lambda: Calls(np.ndarray, (TERA,))),
    "a tensor class of 10^12": saved(lambda: Calls(torch.Tensor, TERA)),
    "changes a function": lambda path: zipped(
        path, Opcodes(b"ctorch._utils\n_rebuild_parameter\n}", text("x"), b"Nsb").bytes, {}
    ),
    "a sparse tensor": saved(lambda: torch.eye(3).to_sparse()),
    "a sparse tensor of 10^24": saved(
        lambda: torch.sparse_coo_tensor(torch.zeros(2, 1), torch.ones(1), (2**30, 2**30))
    ),
    "a compressed sparse tensor": saved(lambda: torch.eye(3).to_sparse_csr()),
    "a meta tensor": saved(lambda: torch.empty(3, device="meta")),
    "a nested tensor": saved(lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])),
    "complex numbers": saved(lambda: torch.zeros(3, dtype=torch.complex64)),
    "quantized numbers": saved(quantized),
    "float8 numbers": saved(lambda: torch.zeros(3).to(torch.float8_e4m3fn)),
    "unsigned numbers": saved(lambda: torch.zeros(3, dtype=torch.uint16)),
    "a subclass": saved(lambda: torch.zeros(3).as_subclass(Marked)),
    "a distributed tensor": saved(distributed),
    "a storage for a tensor": saved(lambda: torch.zeros(3).untyped_storage()),
    "a TorchScript archive": lambda path: zipped(path, zipfile_pickle(), {"data/0": bytes(4000), "constants.pkl": b""}),
    "a zip of something else": lambda path: zipfile.ZipFile(path, "w").writestr("../../etc/x", b"x"),
    "zeros": lambda path: path.write_bytes(bytes(10**6)),
    "a web page": lambda path: path.write_bytes(b"<!DOCTYPE html><html></html>"),
}


def zipfile_pickle() -> bytes:
    buffer = io.BytesIO()
    torch.save({NAME: torch.zeros(1000)}, buffer)
    with zipfile.ZipFile(buffer) as archive:
        return archive.read("archive/data.pkl")


# --- safetensors -------------------------------------------------------------------------------------------------


def header(about: Any, content: bytes = bytes(16), length: int | None = None) -> Callable[[Path], None]:
    """A safetensors file with this header, JSON or bytes."""
    raw = about if isinstance(about, bytes) else json.dumps(about).encode()

    def write(path: Path) -> None:
        path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + content)

    return write


def entry(shape: Any = (4,), offsets: Any = (0, 16), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def key_of(pickled: bytes) -> str:
    return base64.urlsafe_b64encode(pickled).decode()


TWICE = json.dumps(entry()).encode()
SAFETENSORS: dict[str, Callable[[Path], None]] = {
    "a header of 2^63 bytes": header({}, length=2**63),
    "a header of 10^12 bytes": header({}, length=TERA),
    "a header beyond the file": header({}, length=1000),
    "no header": lambda path: path.write_bytes(b""),
    "half a length": lambda path: path.write_bytes(b"\1\0\0"),
    "a header that is no JSON": header(b"{nonsense"),
    "a list for a header": header([1, 2]),
    "JSON nested a million times": header(b'{"a":' * 10**6),
    "overlapping tensors": header({"a.x": entry(), "b.x": entry((2,), (8, 16))}),
    "a hole": header({"a.x": entry((2,), (8, 16))}),
    "ends before it begins": header({"a.x": entry((4,), (16, 0))}),
    "negative offsets": header({"a.x": entry((4,), (-16, 0))}),
    "a negative shape": header({"a.x": entry((-4,), (0, 16))}),
    "a shape of 10^30": header({"a.x": entry((10**30,), (0, 16))}),
    "a shape whose product overflows": header({"a.x": entry((2**33, 2**31), (0, 0))}),
    "more elements than bytes": header({"a.x": entry((TERA,), (0, 16))}),
    "an unknown type": header({"a.x": entry(dtype="F33")}),
    "a type that is no string": header({"a.x": entry(dtype=3)}),
    "complex numbers": header({"a.x": entry((2,), dtype="C64")}),
    "float8 numbers": header({"a.x": entry((16,), dtype="F8_E4M3")}),
    "one name twice": header(b'{"a.x":' + TWICE + b',"a.x":' + TWICE.replace(b"0, 16", b"16, 32") + b"}", bytes(32)),
    "metadata of numbers": header({"__metadata__": {"a": 1}, "a.x": entry()}),
    "bytes after the tensors": header({"a.x": entry()}, bytes(1000)),
    "a file that is cut": header({"a.x": entry()}, bytes(8)),
    # A key that is no pickle is a plain name; a tensor of no model, here.
    "a key with a memo of 2^32 entries": header(
        {key_of(Opcodes(b"Nr\xff\xff\xff\xff").bytes): entry(dtype="C64", shape=(2,))}
    ),
    "a key whose hash takes 2^60 steps": header({key_of(tuples()): entry(dtype="C64", shape=(2,))}),
    "a key of a megabyte": header({"a" * 10**6: entry()}),
    "a key that calls": header({key_of(pickle.dumps(Calls(os.system, "touch touched"))): entry()}),
    "a key with escapes": header({"a.\x1b[2J\n\x1b]0;x\x07": entry(dtype="C64", shape=(2,))}),
}


def write_all(folder: Path) -> list[Path]:
    """Every hostile file, in a folder of its own, named as a checkpoint names it."""
    paths = []
    for kinds, name in ((TORCH, "model.pt"), (SAFETENSORS, "model.safetensors")):
        for number, (kind, write) in enumerate(kinds.items()):
            place = folder / f"{name.partition('.')[2]}-{number:02d}"
            place.mkdir(parents=True, exist_ok=True)
            write(place / name)
            (place / "kind.txt").write_text(kind)
            paths.append(place / name)
    return paths


READ = "import sys; from pathlib import Path; from olmo.exceptions import exit_status; " + (
    "from olmo.files.tensors import read_tensors; "
    "sys.exit(exit_status(lambda argv: print(read_tensors(Path(argv[0]), argv[1] == 'mapped').keys())))"
)


def processor_seconds() -> float:
    """Of all processes that have ended, on a busy machine as on an idle one."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    failed = 0
    for path in write_all(Path(sys.argv[1])):
        for way in ("mapped", "read"):
            before = processor_seconds()
            try:
                result = subprocess.run(
                    [sys.executable, "-c", READ, str(path), way], capture_output=True, text=True, timeout=120
                )
                status, line = result.returncode, result.stderr.strip()
            except subprocess.TimeoutExpired:
                status, line = -1, "hangs"
            seconds = processor_seconds() - before
            fine = status == 1 and line.startswith(f"error: {path}: ") and "\n" not in line and seconds < LIMIT
            failed += not fine
            kind = (path.parent / "kind.txt").read_text()
            print(f"{'ok  ' if fine else 'FAIL'} {seconds:5.1f} s  {kind} ({way}): {line[-200:]!r}", flush=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024
    print(f"{failed} failed; the largest process had {peak} MB")
    sys.exit(failed > 0 or peak > LIMIT_MB)


if __name__ == "__main__":
    main()
