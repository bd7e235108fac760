"""The complete study, small: text, pretraining, entropy, injection, resuscitation, acquisition, report.

    python -m scripts.demo [--output runs/demo] [--seeds 1] [--contrast] [--published DIR]

Runs the project's commands in turn, as a user would, and writes `report.html` and `report.json`. A stage that has
finished is not repeated; remove the output folder to start over. `--contrast` runs the second
setting (configs/tiny/contrast_pretrain.yaml). `--published DIR` injects the published fictional knowledge in
DIR instead of our own: its texts are longer, so contexts of 1024 tokens are used, with 14 paraphrase and 20 once
entries.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from olmo.console import clock
from olmo.exceptions import ConfigurationError, Parser, exit_status
from olmo.report.environment import environment
from scripts.prepare.stages import Stages, check_published, copy_published

EARLY, MIDDLE, LAST = 90, 450, 720  # of the eleven steps that configs/tiny/pretrain.yaml saves
LEARNED = 150  # steps of configs/tiny/continual.yaml
KNOWLEDGE = {"paraphrase": 26, "once": 60}  # 32 texts a round: two a row, of the 256 tokens that a row has
PUBLISHED = {"paraphrase": 14, "once": 20}


def seed_stages(stages: Stages, folder: Path, seed: int, args: argparse.Namespace, length: int) -> None:
    """Everything that depends on the seed: pretraining, entropy, resuscitation, continual learning."""
    base = folder if seed == 0 else folder / f"seed{seed}"
    tag = "" if args.seeds == 1 else f", seed {seed}"
    text, knowledge, pretrain = folder / "text", folder / "knowledge", base / "pretrain"
    last = pretrain / f"step{LAST}-unsharded"
    prefix = "contrast_" if args.contrast else ""
    common = [
        f"--seed={6198 + seed}",
        "--save_overwrite",
        f"--model.max_sequence_length={length}",
        f"--tokenizer.identifier={text}/tokenizer.json",
    ]
    stages.run(
        f"pretraining{tag}",
        "scripts.train",
        [
            f"configs/tiny/{prefix}pretrain.yaml",
            f"--save_folder={pretrain}",
            *common,
            f"--data.paths=[{text}/general_train.npy]",
            f"--evaluators.0.data.paths=[{text}/general_heldout.npy]",
            f"--global_train_batch_size={16 * 256 // length}",
        ],
        last,
    )
    stages.manifest.setdefault("pretraining", []).append(str(pretrain.relative_to(folder)))
    data = ["--data", f"{text}/general_train.npy", "--data_size", str(512 * 256 // length), "--batch_size", "16"]
    data.append("--overwrite")  # of a setting that has changed
    stages.run(
        f"knowledge entropy of every checkpoint{tag}",
        "analysis.entropy",
        ["--checkpoint", f"{pretrain}/step*-unsharded", *data],
        last / "knowledge_entropy.json",
    )
    edited = {}
    for factor in (1.0, 2.0):
        edited[factor] = last / f"resuscitation_ratio0.5_amplifying{factor}.safetensors"
        stages.run(
            f"resuscitation, q = {factor:g}{tag}",
            "analysis.change_parameters",
            ["--checkpoint", str(last), "--resuscitation_ratio=0.5", f"--amplifying_factor={factor:g}", "--overwrite"],
            edited[factor],
        )

    def learn(key: str, name: str, start: int, *extra: str) -> None:
        run = base / "continual" / key
        paths = [
            f"--save_folder={run}",
            f"--load_path={pretrain}/step{start}-unsharded",
            f"--data.dataset_path={text}/science_train",
            f"--injection.paraphrase={knowledge}/fictional_knowledge_paraphrase.json",
            f"--injection.once={knowledge}/fictional_knowledge_once.json",
            f"--evaluators.6.data.paths=[{text}/general_heldout.npy]",
            f"--evaluators.7.data.paths=[{text}/science_heldout.npy]",
        ]
        stages.run(
            f"continual learning: {name}{tag}",
            "scripts.train",
            [f"configs/tiny/{prefix}continual.yaml", *common, *paths, *extra],
            run / "probes" / f"step{LEARNED}.parquet",
        )
        conditions = stages.manifest.setdefault("conditions", {})
        condition = conditions.setdefault(key, {"name": name, "start": start, "runs": []})
        condition["runs"].append(str(run.relative_to(folder)))

    learn("early", "early", EARLY)
    learn("middle", "middle", MIDDLE)
    learn("last", "last", LAST)
    learn("last_q1", "last, q = 1", LAST, f"--model.resuscitation={edited[1.0]}")
    learn("last_q2", "last, q = 2", LAST, f"--model.resuscitation={edited[2.0]}")
    learn("last_control", "last, no injection", LAST, "--injection.rounds=0")


def main(argv: Sequence[str]) -> None:
    parser = Parser(prog="python -m scripts.demo", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, help="default: runs/demo, runs/contrast or runs/published")
    parser.add_argument("--seeds", type=int, default=1, help="repeat everything with so many seeds")
    parser.add_argument("--contrast", action="store_true", help="the setting in which entropy rises")
    parser.add_argument("--published", type=Path, help="folder with the published fictional knowledge")
    args = parser.parse_args(argv)
    if args.contrast and args.published:
        raise ConfigurationError("--contrast and --published: choose one of them")
    if args.seeds < 1:
        raise ConfigurationError("--seeds must be at least 1")
    if args.published:
        check_published(args.published)
    setting = "contrast" if args.contrast else "demo"
    folder = args.output or Path("runs/published" if args.published else f"runs/{setting}")
    folder.mkdir(parents=True, exist_ok=True)
    length = 1024 if args.published else 256
    stages = Stages(folder, (2 if args.published else 3) + args.seeds * 10, "tiny")
    for key in ("pretraining", "conditions"):
        stages.manifest.pop(key, None)  # listed again as the stages are visited

    text, knowledge = folder / "text", folder / "knowledge"
    prepare = ["--output", str(text), "--vocab_size", "4096", "--sequence_length", str(length)]
    stages.run("text and tokenizer", "scripts.prepare_demo_text", prepare, text / "sources.json")
    if args.published:
        copy_published(args.published, knowledge, PUBLISHED)
    else:
        counts = (x for k, n in KNOWLEDGE.items() for x in (f"--{k}", str(n)))
        make = ["--overwrite", "--output", str(knowledge), *counts]
        stages.run("fictional knowledge", "scripts.make_fictional_knowledge", make, knowledge)
    for seed in range(args.seeds):
        seed_stages(stages, folder, seed, args, length)
    stages.manifest.update(
        setting=setting,
        published=bool(args.published),
        seeds=args.seeds,
        environment=environment(),
    )
    stages.save()
    # The report is cheap and must describe the present files, so it is made every time.
    (folder / "report.html").unlink(missing_ok=True)
    stages.run("report", "analysis.report", [str(folder)], folder / "report.html")
    total = sum(stage["seconds"] for stage in stages.manifest["stages"])
    print(f"done: {folder}/report.html ({clock(total)} in all stages)")


if __name__ == "__main__":
    sys.exit(exit_status(main))
