"""Injection: the plan that a configuration asks for, and one pure function (batch, step) -> batch.

Method section 3. The texts of a round are dealt out over the rows of the *global* batch; a rank only needs to know
which global rows it holds, so any number of ranks and any micro-batch size inject the same.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..config.schema import TrainConfig
from ..data.loader import Batch
from ..exceptions import ConfigurationError
from .entries import SETTINGS, load_entries
from .plan import Encode, Plan, Text, build_rounds, with_names
from .plan_files import PlanFile, read_plan


def _files_of_probes(config: TrainConfig) -> dict[str, str]:
    """Setting -> the file of entries that evaluators ask about, where there are any."""
    files: dict[str, str] = {}
    for evaluator in config.evaluators:
        setting = evaluator.label.partition("_")[0]
        if evaluator.type == "lm" and evaluator.data.dataset_path and setting in SETTINGS:
            files.setdefault(setting, evaluator.data.dataset_path)
    return files


def needs_tokenizer(config: TrainConfig) -> bool:
    """Whether the plan of a configuration has entries to tokenize: to inject them, or to know a map's texts by them."""
    return bool(config.injection or (config.inject_indices_map and _files_of_probes(config)))


def plan_from_config(config: TrainConfig, encode: Encode | None) -> Plan | None:
    """The plan of `inject_indices_map` or `injection`, checked against model and batch; None without either.

    encode: None where the run has no tokenizer; see `needs_tokenizer`.
    """
    steps_passed, eos, interval = None, config.model.eos_token_id, config.inject_interval
    if config.inject_indices_map:
        stored = read_plan(config.inject_indices_map)
        rounds, steps_passed = stored.rounds, stored.steps_passed
        _check_steps(config, stored)
        _check_tokens(config, stored, encode)
        if encode is not None:
            entries = {setting: load_entries(path) for setting, path in _files_of_probes(config).items()}
            rounds = with_names(rounds, entries, encode, eos)
    elif config.injection and config.injection.rounds:
        chosen = config.injection
        files = {"paraphrase": chosen.paraphrase, "duplicate": chosen.duplicate, "once": chosen.once}
        settings = {setting: load_entries(path) for setting, path in files.items() if path}
        assert encode is not None
        rounds = build_rounds(settings, chosen.rounds, encode, eos)
    else:
        return None
    boundary = eos if config.inject_position == "document" else None
    plan = Plan(rounds, interval, config.inject_start_step, steps_passed, boundary)
    plan.check(config.global_train_batch_size, config.model.max_sequence_length)
    rows = config.model.embedding_size or config.model.vocab_size
    largest = max(token for texts in plan.rounds for text in texts for token in text.input_ids)
    if largest >= rows:
        raise ConfigurationError(
            f"model.embedding_size: token {largest} is to be injected, the model knows {rows}; "
            "tokenizer.identifier, model.eos_token_id or inject_indices_map belong to another model"
        )
    return plan


def _check_steps(config: TrainConfig, stored: PlanFile) -> None:
    """Raise ConfigurationError where file and configuration do not say between them when a round comes."""
    path = config.inject_indices_map
    if stored.steps_passed is None:
        if config.inject_interval is None:
            raise ConfigurationError(
                f"inject_interval: missing; it says every how many steps a round of {path} is injected"
            )
        return
    if config.inject_interval is not None:
        raise ConfigurationError(f"inject_interval: {path} itself says when its rounds are injected; leave it out")
    if config.load_path and not config.reset_trainer_state and config.inject_start_step is None:
        raise ConfigurationError(
            f"inject_start_step: missing; {path} counts the steps since a run began, and this one goes on from "
            f"{config.load_path}; give the first step after it"
        )


def _check_tokens(config: TrainConfig, stored: PlanFile, encode: Encode | None) -> None:
    """Raise ConfigurationError where a text of a file does not end as the model's texts do, or spells other tokens."""
    eos = config.model.eos_token_id
    for number, texts in enumerate(stored.rounds, start=1):
        spelled = [(place, text.wording) for place, text in enumerate(texts) if text.wording is not None]
        ids = encode([wording for _, wording in spelled]) if encode is not None else []
        made_of = {place: (*made, eos) for (place, _), made in zip(spelled, ids)}
        for place, text in enumerate(texts):
            where = f"{config.inject_indices_map}: round {number}, text {place} ({text.entry})"
            if text.input_ids[-1] != eos:
                raise ConfigurationError(
                    f"model.eos_token_id: {where} ends with token {text.input_ids[-1]}, the model's texts with {eos}"
                )
            if made_of.get(place, text.input_ids) != text.input_ids:
                made = f" ({stored.tokenizer} made them)" if stored.tokenizer else ""
                raise ConfigurationError(
                    f"tokenizer.identifier: {where}: {config.tokenizer.identifier} makes other tokens of 'text' than "
                    f"'input_ids'{made}; only 'input_ids' are injected, write the plan anew or leave 'text' out"
                )


def _entrance(row: Tensor, counts: Tensor | None, length: int, boundary: int | None) -> int:
    """The place in a row (T,) where `length` tokens of knowledge enter.

    It is 0 without `boundary`, else behind the first boundary token, or 0 where that leaves them no room. A token that
    does not count (`counts`, the row's label mask), as padding does not, ends no document. The mask is None where all
    tokens of a rank's rows count, so the place depends on the row alone, whichever other rows a rank holds.
    """
    if boundary is None:
        return 0
    ends = row == boundary if counts is None else (row == boundary) & counts
    place = int(ends.int().argmax()) + 1
    return place if ends.any() and place + length <= len(row) else 0


def inject(batch: Batch, step: int, plan: Plan | None, global_batch_size: int) -> tuple[Batch, list[tuple[int, Text]]]:
    """Let the texts of this step's round enter their rows: row = concat(row[:b], texts, row[b:])[:T].

    step: 1-based number of the optimizer step that uses the batch, which is never changed in place.
    b is 0, the front of the row, or with the plan's `boundary` behind the row's first document, where all texts of the
    row have room there; the end of the row makes room, never a text.
    Every token of a text counts in the loss and is attended to, whatever the masks say of the row; they move along.
    Returns the batch and the (global row, text) pairs that entered.
    """
    injection_round = plan.round_of(step) if plan is not None else None
    if plan is None or injection_round is None:
        return batch, []
    parts = (batch.input_ids, batch.label_mask, batch.attention_mask)
    input_ids, label_mask, attention_mask = (None if part is None else part.clone() for part in parts)
    assert input_ids is not None
    entered: list[tuple[int, Text]] = []
    length = input_ids.shape[1]
    for position, row in enumerate(batch.rows.tolist()):
        for_row = plan.texts_of_row(injection_round, row, global_batch_size)
        if for_row:
            texts = torch.tensor([token for text in for_row for token in text.input_ids], dtype=torch.int64)
            counts = None if label_mask is None else label_mask[position]
            place = _entrance(input_ids[position], counts, len(texts), plan.boundary)
            ones = torch.ones_like(texts, dtype=torch.bool)
            for part, new in ((input_ids, texts), (label_mask, ones), (attention_mask, ones)):
                if part is not None:
                    part[position] = torch.cat((part[position, :place], new, part[position, place:]))[:length]
            entered.extend((row, text) for text in for_row)
    return replace(batch, input_ids=input_ids, label_mask=label_mask, attention_mask=attention_mask), entered
