"""The plan that a configuration asks for, checked against its model and batch."""

from __future__ import annotations

from ..config.schema import TrainConfig
from ..exceptions import ConfigurationError
from .entries import SETTINGS, load_entries
from .plan import Encode, Plan, build_rounds, with_names
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
