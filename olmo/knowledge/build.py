"""Build the plan of a configuration, checked against its model and batch."""

from __future__ import annotations

from ..config.schema import TrainConfig
from ..console import log
from ..exceptions import ConfigurationError, listed
from .entries import SETTINGS, load_entries
from .plan import Plan
from .plan_files import PlanFile, read_plan
from .rounds import Encode, build_rounds, with_names


def _files_of_probes(config: TrainConfig) -> dict[str, str]:
    """Setting -> the file of entries whose probes are evaluated."""
    files: dict[str, str] = {}
    for evaluator in config.evaluators:
        setting = evaluator.label.partition("_")[0]
        if evaluator.type == "lm" and evaluator.data.dataset_path and setting in SETTINGS:
            files.setdefault(setting, evaluator.data.dataset_path)
    return files


def needs_tokenizer(config: TrainConfig) -> bool:
    """Whether the plan of a configuration has entries to tokenize: to inject them, or to name the texts of a map."""
    return bool(config.injection or (config.inject_indices_map and _files_of_probes(config)))


def plan_from_config(config: TrainConfig, encode: Encode | None) -> Plan | None:
    """The plan of `inject_indices_map` or `injection`, checked against model and batch; None without either.

    encode: None if the run has no tokenizer; see `needs_tokenizer`. Raises ConfigurationError or ValueError, before any
    training, for what cannot be injected.
    """
    steps_passed, eos = None, config.model.eos_token_id
    interval, start = config.inject_interval, config.inject_start_step
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
        rounds = build_rounds(settings, chosen.rounds, encode, eos, chosen.once_rounds)
        if not chosen.repeat and interval is not None:
            start, steps_passed = start or interval, tuple(interval * number for number in range(len(rounds)))
            interval = None
    else:
        return None
    boundary = eos if config.inject_position == "document" else None
    plan = Plan(rounds, interval, start, steps_passed, boundary)
    plan.check(config.global_train_batch_size, config.model.max_sequence_length)
    if again := plan.repeated():
        log.warning("injection: %s", listed(again))
    rows = config.model.rows
    largest = max(token for texts in plan.rounds for text in texts for token in text.input_ids)
    if largest >= rows:
        raise ConfigurationError(
            f"model.embedding_size: token {largest} is to be injected, but the model has {rows}; "
            "tokenizer.identifier, model.eos_token_id or inject_indices_map belong to another model"
        )
    return plan


def _check_steps(config: TrainConfig, stored: PlanFile) -> None:
    """Raise ConfigurationError unless file and configuration together define the step of every round."""
    path = config.inject_indices_map
    if stored.steps_passed is None:
        if config.inject_interval is None:
            raise ConfigurationError(f"inject_interval: missing; give the number of steps between the rounds of {path}")
        return
    if config.inject_interval is not None:
        raise ConfigurationError(f"inject_interval: {path} has the steps of its rounds; leave inject_interval out")
    if config.load_path and not config.reset_trainer_state and config.inject_start_step is None:
        raise ConfigurationError(
            f"inject_start_step: missing; {path} counts steps from the start of a run, and this run continues from "
            f"{config.load_path}; give the first step after it"
        )


def _check_tokens(config: TrainConfig, stored: PlanFile, encode: Encode | None) -> None:
    """Raise ConfigurationError for a text without the model's EOS, or whose tokens are not those of its wording."""
    eos = config.model.eos_token_id
    for number, texts in enumerate(stored.rounds, start=1):
        spelled = [(place, text.wording) for place, text in enumerate(texts) if text.wording is not None]
        ids = encode([wording for _, wording in spelled]) if encode is not None else []
        made_of = {place: (*made, eos) for (place, _), made in zip(spelled, ids)}
        for place, text in enumerate(texts):
            where = f"{config.inject_indices_map}: round {number}, text {place} ({text.entry})"
            if text.input_ids[-1] != eos:
                raise ConfigurationError(
                    f"model.eos_token_id: {where} ends with token {text.input_ids[-1]}, the model's EOS is {eos}"
                )
            if made_of.get(place, text.input_ids) != text.input_ids:
                made = f" ({stored.tokenizer} made them)" if stored.tokenizer else ""
                raise ConfigurationError(
                    f"tokenizer.identifier: {where}: {config.tokenizer.identifier} makes other tokens of 'text' than "
                    f"'input_ids'{made}; only 'input_ids' are injected: write the plan again or leave 'text' out"
                )
