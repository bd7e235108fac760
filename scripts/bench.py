"""Timings as ratios of two things run in turn on the same machine.

    python -m scripts.bench [--rounds 5]

A line gives the median ratio of the rounds and their range.
training: our Trainer (data, clipping, schedule, metrics file and all) against a plain torch loop, transformers'
Trainer, ai2-olmo and litgpt with the same model and rows, time and memory, see scripts/benchmarks/training.py.
saves: how long training stands still for an asynchronous save, and for a blocking one, see scripts/benchmarks/saves.py.
loss: logits in parts against all at once, time and memory, see scripts/benchmarks/loss.py.
entropy: a model of OLMo-1B's shape, see scripts/benchmarks/entropy.py.
probes: 1,950 in one pass against one padded evaluator at a time, see scripts/benchmarks/probes.py.
loader: batches of 128 x 1024 from memory-mapped files in a shuffled order, as a training loop gets them, against numpy
alone copying the same rows; one thread reading ahead, and two. The files are in the page cache.
remote: 2048 instances of 249 remote files of Dolma's size, from a server on this machine whose every answer takes 5 ms.
loading: an OLMo-1B of random weights (4.7 GB, in a temporary folder), loaded until every weight is in memory and run
once, each time in a process of its own, against reading the file into memory; and the most memory that process held.
pubmed: 200 MB of XML in the baseline's format to packed rows, against ElementTree.parse and the tokenizer one by one.
"""

from __future__ import annotations

import gzip
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import torch

from olmo import net
from olmo.checkpoint import load_model
from olmo.config import load, save_model_config
from olmo.data.loader import Loader
from olmo.data.order import build_order
from olmo.data.sources import TokenFiles
from olmo.distributed import disable_malloc_trim, pick_device
from olmo.exceptions import ConfigurationError, Parser, exit_status
from olmo.files.tensors import write_tensors
from olmo.model import OLMo
from scripts.benchmarks.entropy import bench_entropy
from scripts.benchmarks.loss import bench_loss
from scripts.benchmarks.probes import bench_probes
from scripts.benchmarks.processes import peak_bytes, run_in_subprocess
from scripts.benchmarks.resuscitation import bench_resuscitation
from scripts.benchmarks.saves import bench_saves
from scripts.benchmarks.training import bench_training
from scripts.prepare import OLMO_TOKENIZER as TOKENIZER
from scripts.prepare.demo_sources import package_root, rows


def in_turn(rounds: int, ours: Callable[[], float], other: Callable[[], float]) -> list[float]:
    """Ratios of rates, ours / other, one a round; which goes first alternates."""
    ratios = []
    for number in range(rounds):
        first, second = (ours, other) if number % 2 else (other, ours)
        rates = {id(f): f() for f in (first, second)}
        ratios.append(rates[id(ours)] / rates[id(other)])
    return ratios


def report(name: str, ratios: Sequence[float], rates: Sequence[float]) -> None:
    spread = f"{min(ratios):.2f} to {max(ratios):.2f} over {len(ratios)} rounds"
    print(f"{name}: {statistics.median(ratios):.2f} x ({spread}; ours {statistics.median(rates):,.0f} tokens/s)")


def bench_loader(folder: Path, rounds: int, batches: int = 1000) -> None:
    """Loader against numpy alone, tokens a second."""
    rows, length, files = 128, 1024, 4
    each = rows * batches // files
    paths = [folder / f"part-{number}.npy" for number in range(files)]
    generator = np.random.default_rng(0)
    for path in paths:
        generator.integers(0, 50280, each * length, dtype="<u2").tofile(path)
    order = build_order(each * files, 0, 0)

    def numpy_alone() -> float:
        maps = [np.memmap(path, "<u2", "r", shape=(each, length)) for path in paths]
        started = time.perf_counter()
        for number in range(batches):
            batch = np.empty((rows, length), dtype=np.int64)
            for row, instance in enumerate(order[number * rows : (number + 1) * rows].tolist()):
                batch[row] = maps[instance // each][instance % each]
        return batches * rows * length / (time.perf_counter() - started)

    def ours(workers: int) -> float:
        loader = Loader(TokenFiles(paths, length), rows, 0, vocabulary=50280, workers=workers, ahead=2 * workers)
        loader.batch(0, 0)  # shuffles, once an epoch
        started = time.perf_counter()
        for batch in loader.batches(count=batches):
            assert batch.input_ids.shape == (rows, length)
        rates.append(batches * rows * length / (time.perf_counter() - started))
        return rates[-1]

    for workers in (1, 2):
        rates: list[float] = []
        in_turn(1, partial(ours, workers), numpy_alone)  # warm up
        rates.clear()
        name = f"loader, {workers} thread{'s' if workers > 1 else ''} / numpy alone"
        report(name, in_turn(rounds, partial(ours, workers), numpy_alone), rates)


def _load(folder: Path, mapped: bool, queue: Any) -> None:
    before = peak_bytes()
    started = time.perf_counter()
    model = load_model(folder, torch.device("cpu"), mapped=mapped)
    for parameter in model.parameters():  # a value of every page, so that what is mapped has been read
        parameter.detach().flatten()[::1024].sum()
    loaded = time.perf_counter() - started
    with torch.no_grad():
        model(torch.zeros((1, 64), dtype=torch.int64))
    queue.put((loaded, time.perf_counter() - started, peak_bytes() - before))


def _read(folder: Path, queue: Any) -> None:
    started = time.perf_counter()
    np.fromfile(folder / "model.safetensors", np.uint8)
    queue.put(time.perf_counter() - started)


def bench_loading(folder: Path, rounds: int) -> None:
    """Seconds and bytes to load a 1B checkpoint and run it once, against reading its file (from the page cache)."""
    config = load(Path("configs/official/OLMo-1B.yaml")).model
    save_model_config(folder / "config.yaml", config)
    state = OLMo.empty(config).to_empty(device="cpu").state_dict()
    for tensor in state.values():
        tensor.uniform_(-0.02, 0.02)
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    write_tensors(folder / "model.safetensors", state)
    del state
    run_in_subprocess(_read, folder)  # brings the file into the page cache
    for what, mapped in (("mapped, as analysis does", True), ("copied, as training does", False)):
        times: list[tuple[float, float, float, float]] = []
        for number in range(rounds):
            works = [lambda: (run_in_subprocess(_read, folder),), lambda: run_in_subprocess(_load, folder, mapped)]  # noqa: B023 (called at once)
            results = [work() for work in (works if number % 2 else works[::-1])]
            reading, loading = results if number % 2 else results[::-1]
            times.append((*reading, *loading))
        ratios = sorted(loading / reading for reading, loading, _, _ in times)
        reading, loading, running, peak = map(statistics.median, zip(*times))
        print(
            f"loading 1B, {what}: {statistics.median(ratios):.2f} x the time of reading its file ({ratios[0]:.2f} to "
            f"{ratios[-1]:.2f}; {loading:.2f} s, {reading:.2f} s; {running:.1f} s with one forward pass); "
            f"peak memory {peak / size:.2f} x its weights ({size / 2**30:.2f} GiB)",
            flush=True,
        )


def write_baseline(folder: Path, files: int, size: int) -> int:
    """Write files of about `size` bytes of XML in the baseline's format, a fifth of it real text; returns the bytes."""
    sentences = [row["support"] for row in rows(package_root(), "sciq/none/validation") if row["support"]]
    sentences = [text.replace("&", "&amp;").replace("<", "&lt;") for text in sentences]
    rest = "<Author><LastName>Doe</LastName></Author>\n" * 90  # authors, headings and references take most of a record
    chosen, number, total = np.random.default_rng(0), 0, 0
    for file in range(files):
        parts, length = ["<?xml version='1.0' encoding='utf-8'?>\n<PubmedArticleSet>\n"], 0
        while length < size:
            text = " ".join(sentences[i] for i in chosen.integers(0, len(sentences), 3))
            parts.append(
                f'<PubmedArticle><MedlineCitation><PMID Version="1">{(number := number + 1)}</PMID><Article>'
                f"<ArticleTitle>Study {number}</ArticleTitle><Abstract><AbstractText>{text}</AbstractText></Abstract>\n"
                f"<AuthorList>{rest}</AuthorList></Article></MedlineCitation></PubmedArticle>\n"
            )
            length += len(parts[-1])
        content = "".join([*parts, "</PubmedArticleSet>"]).encode()
        (folder / f"pubmed25n{file:04}.xml.gz").write_bytes(gzip.compress(content, 1))
        total += len(content)
    return total


# Runs a command from a process so small that what the kernel reports is the command's own memory.
MEASURE = """import resource, subprocess, sys, time
started = time.perf_counter()
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"""
LOOP = """import gzip, sys
from xml.etree import ElementTree
import numpy as np
from olmo.tokenizer import load_tokenizer
tokenizer, ids = load_tokenizer(sys.argv[1]), []
for path in sys.argv[3:]:
    for article in ElementTree.parse(gzip.open(path)).iter("Article"):
        text = article.findtext("ArticleTitle") + "\\n" + article.findtext("Abstract/AbstractText")
        ids += [*tokenizer.encode(text, add_special_tokens=False).ids, 50279]
np.array(ids[: len(ids) // 1024 * 1024], np.uint16).tofile(sys.argv[2])"""


def bench_pubmed(folder: Path, rounds: int) -> None:
    """MB of XML a second and memory of prepare_pubmed, for all and for a twentieth of the text, and of a plain loop."""
    size, tokens = write_baseline(folder, 16, 200 * 10**6 // 16), folder / "tokens"
    files = sorted(map(str, folder.glob("pubmed*")))

    def measured(command: Sequence[str]) -> tuple[float, float]:
        """Seconds of a command, start and all, and MiB of its largest process."""
        command = [sys.executable, "-c", MEASURE, sys.executable, *command, *files]
        seconds, peak = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()
        return float(seconds), int(peak) / 1024

    def ours(share: int) -> tuple[float, float]:
        instances = tokens.stat().st_size // 2048 // share
        with tempfile.TemporaryDirectory(dir=folder) as output:
            return measured(f"-m scripts.prepare_pubmed --output {output} --instances {instances} --input".split())

    def loop() -> tuple[float, float]:
        return measured(["-c", LOOP, TOKENIZER, str(tokens)])

    loop()  # also brings the files into the page cache
    works = {"loop": loop, "all of the text": lambda: ours(1), "a twentieth of it": lambda: ours(20)}
    names = list(works)
    results = [{n: works[n]() for n in (names if number % 2 else names[::-1])} for number in range(min(rounds, 3))]
    for name in names[1:]:
        ratios = sorted(of_round["loop"][0] / of_round[name][0] for of_round in results)
        seconds, peak = map(statistics.median, zip(*(of_round[name] for of_round in results)))
        print(
            f"pubmed, {name}, ours / ElementTree.parse and encode one by one: {statistics.median(ratios):.2f} x "
            f"({ratios[0]:.2f} to {ratios[-1]:.2f} over {len(ratios)} rounds; ours {size / seconds / 1e6:,.1f} MB/s); "
            f"peak memory of a process {peak:,.0f} MiB, of the loop {max(r['loop'][1] for r in results):,.0f}",
            flush=True,
        )


class _Ranges(BaseHTTPRequestHandler):
    """Byte ranges of one sparse file under any name, as late as over a network; counts what it sends."""

    protocol_version = "HTTP/1.1"
    delay = 0.005  # seconds
    path_of_file: Path
    requests, body, total = 0, 0, 0
    lock = threading.Lock()

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self) -> None:
        size = self.path_of_file.stat().st_size
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        first, last = (int(wanted[1]), int(wanted[2])) if wanted else (0, size - 1)
        content = b""
        if self.command == "GET":
            with self.path_of_file.open("rb") as file:
                file.seek(first)
                content = file.read(last - first + 1)
        part = f"Content-Range: bytes {first}-{last}/{size}\r\n" if wanted else ""
        head = f"HTTP/1.1 {206 if wanted else 200} .\r\nContent-Length: {last - first + 1}\r\n{part}\r\n".encode()
        time.sleep(self.delay)
        with self.lock:
            counts = type(self)
            counts.requests, counts.body = counts.requests + 1, counts.body + len(content)
            counts.total += len(head) + len(content)
        self.wfile.write(head + content)

    do_GET = do_HEAD = answer


def _serve(file: Path, connection: Any) -> None:
    _Ranges.path_of_file = file
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Ranges)
    server.request_queue_size = 64
    threading.Thread(target=server.serve_forever, daemon=True).start()
    connection.send(server.server_address[1])
    while connection.recv():
        connection.send((_Ranges.requests, _Ranges.body, _Ranges.total))


def bench_remote(folder: Path, rounds: int) -> None:
    """Seconds, requests and bytes for the first batch of 249 remote files, against one request after the other."""
    files, width, instances = 249, 2 * 2048, 2048
    with (folder / "tokens").open("wb") as file:
        file.truncate(6_080_000 * width)  # 1.5 billion instances in all files
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(folder / "tokens", theirs), daemon=True)
    process.start()
    url = f"http://127.0.0.1:{ours.recv()}"
    paths = [f"{url}/part-{number:03}.npy" for number in range(files)]

    def read(name: str, workers: int) -> tuple[float, ...]:
        net.WORKERS = workers
        os.environ["XDG_CACHE_HOME"] = str(folder / name)
        ours.send(True)
        before = ours.recv()
        started = time.perf_counter()
        source = TokenFiles(paths, 2048)
        source.read(np.random.default_rng(0).choice(len(source), instances, replace=False))
        seconds = time.perf_counter() - started
        ours.send(True)
        return (seconds, *(after - early for after, early in zip(ours.recv(), before)))

    workers, kept = net.WORKERS, os.environ.get("XDG_CACHE_HOME")
    try:
        alone = read("alone", 1)
        together = [read(f"together{number}", workers) for number in range(rounds)]
        again = read("together0", workers)
    finally:
        net.WORKERS = workers
        os.environ.pop("XDG_CACHE_HOME") if kept is None else os.environ.update(XDG_CACHE_HOME=kept)
        process.terminate()
    times = [seconds for seconds, *_ in together]
    _, requests, body, total = together[0]
    print(
        f"remote, {workers} at a time / one: {alone[0] / statistics.median(times):.1f} x ({min(times):.2f} to "
        f"{max(times):.2f} s, {alone[0]:.2f} s); {requests} requests, bodies {body / (instances * width):.3f} x the "
        f"{instances * width / 1e6:.1f} MB needed, with headers {total / (instances * width):.3f} x; a second run: "
        f"{again[1]} requests, {again[0]:.2f} s",
        flush=True,
    )


def main(argv: Sequence[str]) -> None:
    parser = Parser(prog="python -m scripts.bench", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="repetitions of each comparison")
    args = parser.parse_args(argv)
    if args.rounds < 1:
        raise ConfigurationError("--rounds must be at least 1")
    disable_malloc_trim()
    device = pick_device()
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"torch {torch.__version__} on {device.type}, {where}", flush=True)
    bench_training(2 * args.rounds)
    bench_saves(args.rounds)
    bench_loss(args.rounds)
    with tempfile.TemporaryDirectory() as folder:
        bench_entropy(Path(folder), args.rounds)
    with tempfile.TemporaryDirectory() as folder:
        bench_probes(Path(folder), args.rounds)
    with tempfile.TemporaryDirectory() as folder:
        bench_loader(Path(folder), args.rounds)
    with tempfile.TemporaryDirectory() as folder:
        bench_remote(Path(folder), args.rounds)
    with tempfile.TemporaryDirectory() as folder:
        bench_loading(Path(folder), args.rounds)
    with tempfile.TemporaryDirectory() as folder:
        bench_resuscitation(Path(folder), args.rounds)
    with tempfile.TemporaryDirectory() as folder:
        bench_pubmed(Path(folder), args.rounds)


if __name__ == "__main__":
    sys.exit(exit_status(main))
