"""Fictional knowledge in a Trainer of transformers: its data, in its order, with the texts of a plan.

The texts of a round are spread over the rows of a *global* batch, so a row is right only at its
step. A Trainer, though, decides by itself which rows a step has: it shuffles, accumulates, shares out, skips, drops.
`InjectedDataset` therefore numbers rows by their place in the run, and its callback gives the Trainer the order, and
compares what the model receives with what the step has, before the optimizer's step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset, RandomSampler, Sampler, SequentialSampler
from transformers import TrainerCallback

from knowledge_entropy.injecting import IGNORED, KnowledgePlan, as_tensors
from olmo.checkpoint import complete
from olmo.config import load
from olmo.data.loader import Loader, run_loader
from olmo.data.masks import Masked
from olmo.distributed import current_ranks
from olmo.knowledge.build import needs_tokenizer, plan_from_config
from olmo.knowledge.injection import inject
from olmo.knowledge.plan import Plan
from olmo.tokenizer import encode, run_tokenizer

SEED = 6198  # of a run's data order, if its configuration has none
_MOVED = ("input_ids", "labels", "attention_mask")


class InjectedDataset(Dataset):
    """Rows of token ids for a Trainer, in the order of a run of ours, with the texts of a plan.

    Give the Trainer its callback, too: `Trainer(..., train_dataset=data, callbacks=[data.callback])`. Without it,
    reading batches raises a RuntimeError.

    An item is a dictionary of tensors (T,): `input_ids` and `labels`, int64, labels -100 where a token does not count,
    and `attention_mask` where the data has one. Item k of n is row k % B of step k // B + 1, B the global batch size;
    items from n on are those of the next epochs, which are shuffled anew.

    Args:
        data: a map-style dataset, such as datasets.Dataset, whose rows have `input_ids`, all of one length, and
            optionally `labels` and `attention_mask`.
        plan: None injects nothing, the control.
        global_batch_size: rows of an optimizer step on all processes.
        seed: of the order, as data.seed of a run.
        shuffle: as data_shuffling of a run.

    Raises:
        ValueError: for data of another form, and for texts that exceed a row.
    """

    def __init__(
        self, data: Any, plan: KnowledgePlan | None, global_batch_size: int, *, seed: int = SEED, shuffle: bool = True
    ):
        rows: Any = _Rows(data)
        loader = Loader(rows, global_batch_size, seed, shuffle=shuffle, masks=rows)
        self._begin(loader, None if plan is None else plan.plan, rows.sequence_length)

    @classmethod
    def from_config(cls, path: str, overrides: Sequence[str] = ()) -> InjectedDataset:
        """The rows that `python -m scripts.inspect_data PATH OVERRIDES` prints, of a run that begins with step 1.

        Args:
            path: of the configuration of a run.
            overrides: as on the command line: `--key.sub=value`.

        Raises:
            ValueError: (ConfigurationError) for a configuration that cannot be read, or continues another run.
        """
        config = load(path, overrides, complete)
        if config.load_path and not config.reset_trainer_state:
            raise ValueError(f"{path}: continues the steps of load_path; a Trainer begins with 1: reset_trainer_state")
        tokenizer = run_tokenizer(config) if needs_tokenizer(config) else None

        def ids(texts: list[str]) -> list[list[int]]:
            assert tokenizer is not None
            return encode(tokenizer, texts)

        made = cls.__new__(cls)
        plan = plan_from_config(config, ids if tokenizer else None)
        made._begin(run_loader(config), plan, config.model.max_sequence_length, config.epoch or 0)
        return made

    def _begin(self, loader: Loader, plan: Plan | None, length: int, epoch: int = 0) -> None:
        self._loader, self._plan, self._epoch = loader, plan, epoch
        self.global_batch_size, self.steps_per_epoch = loader.global_batch_size, loader.batches_per_epoch
        if plan is not None:
            plan.check(self.global_batch_size, length)
        self.callback = InjectionCheck(self)

    def __len__(self) -> int:
        """Rows of an epoch; rows at its end that fill no global batch are left out."""
        return self.steps_per_epoch * self.global_batch_size

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        if place < 0:
            raise IndexError(f"InjectedDataset: item {place}")
        step, row = divmod(place, self.global_batch_size)
        return self._rows(step + 1, [row])[0]

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (self[place] for place in range(len(self)))

    def __getitems__(self, places: Sequence[int]) -> list[dict[str, Tensor]]:
        """The items of a batch; DataLoaders call it."""
        if not all(isinstance(place, _Place) for place in places):
            raise RuntimeError(
                "InjectedDataset: give the Trainer its callback, callbacks=[dataset.callback], which makes every row "
                "enter its step; in a loop of your own, take dataset.batch(step)"
            )
        by_step: dict[int, list[int]] = {}
        for place in places:
            by_step.setdefault(place // self.global_batch_size + 1, []).append(place % self.global_batch_size)
        return [row for step, rows in by_step.items() for row in self._rows(step, rows)]

    def batch(self, step: int) -> dict[str, Tensor]:
        """The global batch of an optimizer step (from 1), tensors (B, T)."""
        return self._tensors(step, range(self.global_batch_size))

    def is_due(self, step: int) -> bool:
        """Whether texts are injected at a step."""
        return self._plan is not None and self._plan.round_of(step) is not None

    def _rows(self, step: int, rows: Sequence[int]) -> list[dict[str, Tensor]]:
        tensors = self._tensors(step, rows)
        return [{name: part[number] for name, part in tensors.items()} for number in range(len(rows))]

    def _tensors(self, step: int, rows: Sequence[int]) -> dict[str, Tensor]:
        epoch, number = divmod(step - 1, self.steps_per_epoch)
        batch = self._loader.part(self._epoch + epoch, number, np.array(rows))
        return as_tensors(inject(batch, step, self._plan, self.global_batch_size)[0])


class _Rows:
    """The rows of a map-style dataset, as a loader reads a source and applies masks."""

    def __init__(self, data: Any):
        if not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
            raise ValueError(f"data: {type(data).__name__}; expected a dataset with a length, such as datasets.Dataset")
        if not len(data):
            raise ValueError("data: no rows")
        self._data, first = data, data[0]
        if not isinstance(first, Mapping) or "input_ids" not in first:
            raise ValueError("data: its rows have no input_ids; tokenize the texts first")
        self.sequence_length = len(first["input_ids"])
        for name in first.keys() - set(_MOVED):
            if isinstance(first[name], (list, tuple, np.ndarray, Tensor)) and len(first[name]) == self.sequence_length:
                raise ValueError(f"data: column {name!r} has a value for each token and would not move; remove it")
        self._columns = [name for name in _MOVED if name in first]
        if hasattr(data, "with_format") and hasattr(data, "select_columns"):  # reads arrays, not lists, and no others
            self._data = data.select_columns(self._columns).with_format("numpy")

    def __len__(self) -> int:
        return len(self._data)

    def _column(self, name: str, instances: NDArray[np.integer]) -> NDArray[np.int64]:
        found = np.empty((len(instances), self.sequence_length), dtype=np.int64)
        for place, number in zip(found, instances.tolist()):
            value = np.asarray(self._data[number][name])
            if value.shape != place.shape or value.dtype.kind not in "iub":
                raise ValueError(
                    f"data: row {number}: {name} has shape {value.shape} of {value.dtype}; expected "
                    f"{self.sequence_length} whole numbers, as row 0: pack or pad rows to one length"
                )
            place[:] = value
        return found

    def read(self, instances: NDArray[np.integer]) -> NDArray[np.int64]:
        """Token ids (n, T)."""
        return self._column("input_ids", instances)

    def apply(self, tokens: NDArray[np.int64], instances: NDArray[np.integer]) -> Masked:
        """The rows with their own masks."""
        labels = self._column("labels", instances) if "labels" in self._columns else None
        counts = None if labels is None else labels != IGNORED
        wrong = np.zeros(0, dtype=bool) if labels is None else ((labels != tokens) & (labels != IGNORED)).any(1)
        if wrong.any():
            raise ValueError(
                f"data: row {instances[int(wrong.argmax())]}: a label is neither its token's id nor -100; models of "
                "transformers shift labels, data does not"
            )
        mask = self._column("attention_mask", instances) > 0 if "attention_mask" in self._columns else None
        labels_of, attention = (None if part is None else torch.from_numpy(part) for part in (counts, mask))
        return Masked(torch.from_numpy(tokens), labels_of, attention)


class _Place(int):
    """The number of an item that `_PlacesInRun` has given: it is read for its step."""


class _PlacesInRun(Sampler[int]):
    """The items of an epoch in order. `begins` is its first; the callback sets it before each epoch."""

    def __init__(self, count: int):
        self.count, self.begins = count, 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        return map(_Place, range(self.begins, self.begins + self.count))


class InjectionCheck(TrainerCallback):
    """Gives a Trainer the order of an InjectedDataset, and raises ValueError where a step would train on other rows.

    Compared are all rows of the first step of each epoch and each call of `train`, and of each step with texts: what
    the model receives on all processes, before the optimizer's step.
    """

    def __init__(self, dataset: InjectedDataset):
        self.dataset, self._places = dataset, _PlacesInRun(len(dataset))
        self._hook: Any = None
        self._is_first = True
        self._received: list[dict[str, Tensor]] | None = None  # of this step; None: it is not compared

    def on_train_begin(self, args: Any, state: Any, control: Any, **of_trainer: Any) -> None:
        loader, size = of_trainer.get("train_dataloader"), self.dataset.global_batch_size
        if loader is None or loader.dataset is not self.dataset:
            raise ValueError("InjectedDataset: the Trainer trains on other data; give it as train_dataset, unchanged")
        owner = loader.batch_sampler
        while hasattr(owner, "batch_sampler"):  # accelerate's shares out the batches of another
            owner = owner.batch_sampler
        if not isinstance(getattr(owner, "sampler", None), (RandomSampler, SequentialSampler, _PlacesInRun)):
            raise ValueError(
                f"InjectedDataset: {type(getattr(owner, 'sampler', owner)).__name__} orders the Trainer's rows; leave "
                "train_sampling_strategy and group_by_length at their defaults, as the data has its own order"
            )
        owner.sampler = self._places
        shared = loader.batch_sampler if hasattr(loader.batch_sampler, "split_batches") else loader
        processes = getattr(shared, "num_processes", current_ranks().world_size)
        together = owner.batch_size * (1 if getattr(shared, "split_batches", False) else processes)
        if (found := together * args.gradient_accumulation_steps) != size:
            raise ValueError(
                f"InjectedDataset: global_batch_size is {size}, but a step of the Trainer has {found} rows: {together} "
                f"of all processes (per_device_train_batch_size {args.per_device_train_batch_size}) x "
                f"gradient_accumulation_steps {args.gradient_accumulation_steps}"
            )
        if args.ignore_data_skip and state.global_step % self.dataset.steps_per_epoch:
            raise ValueError(
                "InjectedDataset: ignore_data_skip begins this epoch's rows again at a later step; unset it"
            )
        if self._hook is not None:  # an earlier call of train has failed
            self._hook.remove()
        # For the whole of training: torch.compile does not notice hooks that come later.
        receive = torch.compiler.disable(self._receive)
        self._hook = of_trainer["model"].register_forward_pre_hook(receive, with_kwargs=True)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **of_trainer: Any) -> None:
        self._places.begins = state.global_step // self.dataset.steps_per_epoch * len(self.dataset)
        self._is_first = True

    def on_step_begin(self, args: Any, state: Any, control: Any, **of_trainer: Any) -> None:
        compared = self._is_first or self.dataset.is_due(state.global_step + 1)
        self._received, self._is_first = [] if compared else None, False

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **of_trainer: Any) -> None:
        if self._received is not None:
            received, self._received = self._received, None
            _compare(self.dataset.batch(state.global_step + 1), received, state.global_step + 1)

    def on_train_end(self, args: Any, state: Any, control: Any, **of_trainer: Any) -> None:
        self._hook.remove()
        self._hook = None

    def _receive(self, model: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        if self._received is not None and model.training:
            parts = {"input_ids": args[0], **given} if args else given
            self._received.append({n: part.detach().cpu() for n in _MOVED if (part := parts.get(n)) is not None})


def _compare(batch: dict[str, Tensor], received: list[dict[str, Tensor]], step: int) -> None:
    """Raise ValueError, on all processes, unless these together have received the rows of a step. A collective."""
    ranks, has_mask = current_ranks(), "attention_mask" in batch
    names = [name for name in _MOVED if all(name in parts for parts in received)]
    batch = {"attention_mask": torch.ones_like(batch["input_ids"]), **batch}
    number_of: dict[bytes, int] = {}
    wanted = np.array([number_of.setdefault(key, len(number_of)) for key in _keys(batch, names)])
    known = set(_keys(batch, ["input_ids"]))
    seen = np.zeros(len(number_of) + 2)  # of each different row; then of others with known tokens, and of all others
    for parts in received:
        for key, tokens in zip(_keys(parts, names), _keys(parts, ["input_ids"])):
            seen[number_of.get(key, len(number_of) + (tokens not in known))] += 1
    seen = ranks.sum(seen)
    lost = np.bincount(wanted) - seen[:-2]
    if seen[-2] or (has_mask and "attention_mask" not in names and received):
        raise ValueError(
            f"InjectedDataset: at step {step} the model receives other labels or another attention mask than the data "
            "has; data_collator=transformers.default_data_collator leaves them as they are"
        )
    if lost.any() or seen[-1]:
        raise ValueError(
            f"InjectedDataset: step {step} would train on other rows: of its {len(wanted)}, "
            f"{int(lost.clip(0).sum())} are missing, {int((-lost).clip(0).sum())} are repeated, and "
            f"{int(seen[-1])} are not its own; what orders, shares out or changes the Trainer's rows must not"
        )


def _keys(parts: Mapping[str, Tensor], names: Sequence[str]) -> list[bytes]:
    """Each row of these tensors (n, T) as bytes."""
    columns = [parts[name].long().numpy() for name in names]
    return [b"".join(column[row].tobytes() for column in columns) for row in range(len(columns[0]))] if columns else []
