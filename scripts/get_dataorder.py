"""Download the order in which an official run saw its data, or rebuild it where the published file no longer exists.

    bash scripts/get_dataorder.sh [--model_size 7B] [--rebuild]

The file is data/global_indices/{1B,7B}/global_indices.npy, 4 bytes per instance: some 6 GB. The same command continues
an interrupted download. A published file that no longer exists, or is too short for the run's files, is replaced by one
rebuilt from configs/official: shuffled as OLMo does, from the sizes of the token files alone.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from omegaconf import OmegaConf

from olmo.config import load
from olmo.data.order import DTYPE, most_off
from olmo.exceptions import Parser, check_new, exit_status
from olmo.net import describe_failure, http_session
from scripts.prepare.download import describe, fetch
from scripts.prepare.order import open_files, rebuild

OFFICIAL = Path("configs/official")  # of the working directory, which get_dataorder.sh sets, as for all targets


def published(url: str, config: Path, output: Path) -> str | None:
    """Download a published order to `output`. Returns why it is not available, with nothing written, or None.

    Raises OSError where the server does not respond or the connection breaks.
    """
    folder, _, name = url.rpartition("/")
    with http_session() as session:
        look = partial(describe, session, f"{folder}/")
        try:
            remote = look(name)
        except OSError as error:
            raise OSError(f"{url}: {describe_failure(error)}; try again later, or rebuild it with --rebuild") from error
        if remote is None:
            return "it no longer exists"
        try:
            instances = len(open_files(load(config)))
        except OSError as error:
            print(f"the length that the order should have is unknown: {error}", flush=True)
        else:
            if remote.size is not None and not 0 <= instances - remote.size / DTYPE.itemsize <= most_off(instances):
                return f"it has {remote.size // DTYPE.itemsize:,} places for the {instances:,} instances of the files"
        output.parent.mkdir(parents=True, exist_ok=True)
        path, remote = fetch(session, look, name, output.parent)
        if remote.modified is not None:
            os.utime(path, (time.time(), remote.modified))
        path.replace(output)
    return None


def main(argv: Sequence[str]) -> None:
    parser = Parser(prog="get_dataorder.sh", description=__doc__)
    parser.add_argument("--model_size", choices=("1B", "7B"), default="1B")
    parser.add_argument("--rebuild", action="store_true", help="do not look for the published file")
    parser.add_argument("--output", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    config = OFFICIAL / f"OLMo-{args.model_size}.yaml"
    output = args.output or Path(f"data/global_indices/{args.model_size}/global_indices.npy")
    if output.is_file():
        check = f"python -m scripts.data_order verify {config} --order {shlex.quote(str(output))}"
        places = f"{output.stat().st_size // DTYPE.itemsize:,} places"
        print(f"{output}: already exists, {places}; check it with: {check}; or remove it to download it again")
        return
    check_new(output)
    if not args.rebuild:
        url = OmegaConf.load(OFFICIAL / "checkpoints.yaml")[args.model_size].order
        why = published(url, config, output)
        if why is None:
            print(f"{output}: as published at {url}")
            return
        print(f"{url}: {why}; the order is rebuilt from {config}", flush=True)
    rebuild(load(config), output)


if __name__ == "__main__":
    sys.exit(exit_status(main))
