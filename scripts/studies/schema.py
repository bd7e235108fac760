"""What a study file may contain. docs/studies.md has an example; each field is described here.

`{folder}` in a text is replaced by the study's output folder.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Overrides = dict[str, Any]  # key of a training configuration, such as optimizer.learning_rate -> value


@dataclass
class Preparation:
    """A command that makes data before anything else runs."""

    command: list[str]  # module and arguments: [scripts.prepare_demo_text, --output, "{folder}/text"]
    output: str  # exists once the command has finished; outside of {folder} all studies share it, and it is made once


@dataclass
class Pretraining:
    """The study's own pretraining, once for each of its seeds."""

    configuration: str
    overrides: Overrides = field(default_factory=dict)


@dataclass
class Start:
    """A checkpoint from which training starts, or whose entropy is measured; `steps` and patterns are several."""

    step: int | None = None  # of the study's own pretraining
    steps: list[int] = field(default_factory=list)
    checkpoint: str | None = None  # folder, pattern of folders, or hub id with @revision
    checkpoints: list[str] = field(default_factory=list)
    model: str = ""  # its name in figures with several models
    configuration: str | None = None  # of training from it, where models differ
    overrides: Overrides = field(default_factory=dict)


@dataclass
class Intervention:
    """What is changed at a start before training: an edit of the feed-forward parameters, and keys of the run."""

    ratio: float | None = None  # of the memories that are edited (paper, section 5: p)
    factor: float | None = None  # amplifying factor (q)
    selection: str = "lowest"  # lowest, random or highest
    temperature: bool = False  # the edit is a temperature, which reaches 1 at the end of the run
    overrides: Overrides = field(default_factory=dict)


@dataclass
class Setting:
    """A way to train: keys of the configuration, or another configuration."""

    configuration: str | None = None
    overrides: Overrides = field(default_factory=dict)


@dataclass
class Combination:
    """Conditions: all combinations of these; an empty list is all of the study."""

    starts: list[str] = field(default_factory=list)
    interventions: list[str] = field(default_factory=list)
    settings: list[str] = field(default_factory=list)


@dataclass
class Entropy:
    """A data set on which entropies are measured, with the flags of analysis.entropy."""

    data: str | None = None  # default: the first instances of Dolma in the official order
    data_size: int = 2048
    batch_size: int = 4
    coefficients: list[str] = field(default_factory=lambda: ["abs"])
    measures: list[str] = field(default_factory=lambda: ["knowledge"])
    starts: list[str] = field(default_factory=list)  # default: all
    interventions: list[str] = field(default_factory=lambda: ["none"])  # at starts that train so, first coefficient
    flags: Overrides = field(default_factory=dict)  # others, such as sequence_length: 256
    edits: bool = False  # its average coefficients are those that edits are computed from


@dataclass
class Scoring:
    """Probes, held-out losses and tasks of the starts without training (analysis.score)."""

    starts: list[str] = field(default_factory=list)
    flags: Overrides = field(default_factory=dict)


@dataclass
class Acquisition:
    """How effectivity and retainability are measured, as the flags of analysis.acquisition."""

    window: int | None = None  # steps from an injection to its maximum; default: probing.steps, or else 50
    outlier_factor: float | None = None  # default: 1.5; 0 keeps all
    fit_range: str | None = None  # steps after the maximum that are fitted, `A-B` or `A-`; default: all


@dataclass
class Direction:
    """A difference between two conditions (of entropy: between two starts), and where the paper found it."""

    claim: str
    measure: str
    start: str  # written `from`
    end: str  # written `to`
    expected: str  # above or below 0


@dataclass
class Resources:
    """What a stage uses on this machine. On a cluster, `cluster` applies instead."""

    gpus: int | None = None  # of a stage; default: 1 if the machine has any
    jobs: int | None = None  # stages at a time, as --jobs; default: one a core, or a GPU
    processes: int | None = None  # of a training run, under torchrun; default: one a GPU, or 1


@dataclass
class Study:
    """A study file."""

    title: str
    configuration: str | None = None  # of continual learning; none: nothing is trained
    description: str = ""
    notes: list[str] = field(default_factory=list)  # paragraphs of the report
    repeats: str | None = None  # a published study, of analysis/study/published.yaml: its numbers are shown beside
    about: str = "checkpoint"  # what verdicts are about: this checkpoint, or this kind of model
    seed: int = 6198  # of the first repetition
    seeds: int = 1  # repetitions: of continual learning, or with `about: model` from pretraining on
    learning_seeds: int = 1  # with `about: model`: seeds of continual learning of each pretraining
    overrides: Overrides = field(default_factory=dict)  # of every training run
    prepare: dict[str, Preparation] = field(default_factory=dict)
    pretraining: Pretraining | None = None
    starts: dict[str, Start] = field(default_factory=dict)
    interventions: dict[str, Intervention] = field(default_factory=lambda: {"none": Intervention()})
    settings: dict[str, Setting] = field(default_factory=lambda: {"baseline": Setting()})
    conditions: list[Combination] = field(default_factory=list)  # default: all combinations
    entropy: dict[str, Entropy] = field(default_factory=dict)
    score: Scoring | None = None
    acquisition: Acquisition = field(default_factory=Acquisition)
    directions: list[Direction] = field(default_factory=list)
    figures: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    resources: Resources = field(default_factory=Resources)
    cluster: Cluster | None = None


@dataclass
class Cluster:
    """How a stage is submitted to SLURM (scripts/studies/slurm.py)."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    hours: float = 24.0  # limit of one job; a training run saves before it and continues in the next
    warning: int = 300  # seconds before the limit in which a training run finishes its step or evaluation and saves
    nodes: int = 1  # of a training run; other stages have one node and one process
    processes: int | None = None  # of a training run on each node; default: one a GPU, or 1
    gpus: int = 0  # of a training run on each node; entropies and scores have one of them
    cpus: int | None = None  # of each process
    memory: float | None = None  # GB of each node
