"""Hostile and mistaken configurations: each loads, or is refused in one line of a ConfigurationError, and none shows a
secret of the environment."""

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from olmo.config import TrainConfig, load, load_model_config
from olmo.config.setting import section_of, walk
from olmo.exceptions import ConfigurationError, exit_status
from tests.olmo.config.configurations import MINIMAL, problem, write

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdefgh", "bcdefghi")
)


@pytest.mark.parametrize(
    "text, expected",
    [
        (LAUGHS, "not YAML: YAML node expansion exceeds"),
        ("data: &a {paths: *a}", "not YAML: YAML recursive aliases are not supported."),
        ("seed: !!python/object/apply:os.system [echo]", "not YAML: could not determine a constructor for the tag"),
        ("seed: 3\nseed: 4", "not YAML: while constructing a mapping"),
        ("null: 3", "not YAML: Incompatible key type 'NoneType'"),
        ("a: 1\n---\nb: 2", "not YAML: expected a single document"),
        ("run_name: ${save_folder}\nsave_folder: ${run_name}", "run_name: Recursive interpolation detected"),
        ("seed: ???", "seed: '???' is no value"),
        ("", "has no settings"),
        ("# nothing", "has no settings"),
        ("null", "has no settings"),
        ("sëed: 3", "unknown key 'sëed', did you mean 'seed'?"),
        ("seed: true", "seed: Value 'True'"),
        ("seed: [1]", "seed: Value '[1]'"),
        ("seed: 0x" + "f" * 5000, "seed: a number of 20000 bits; at most 63 are allowed"),
        ("optimizer: {learning_rate: 1e400}", "optimizer.learning_rate: inf is not a finite number"),
        ("optimizer: {betas: [.nan, 0.9]}", "optimizer.betas: nan is not a finite number"),
        ("optimizer: {betas: [a, b]}", "optimizer.betas: expected tuple of float, float, got ['a', 'b']"),
        ("optimizer: {betas: {a: 1}}", "optimizer.betas: expected tuple of float, float, got {'a': 1}"),
        ("evaluators: ${data.paths}\ndata: {paths: [a]}", "evaluators: expected a list of keys and values"),
        ("save_steps_unsharded: [5, -1]", "save_steps_unsharded: -1 must be at least 0"),
        ("save_num_checkpoints_to_keep: -7", "save_num_checkpoints_to_keep: -7 must be at least -1"),
        ('save_folder: "a\\0b"', "save_folder: 'a\\x00b' contains the control character '\\x00'"),
        ('evaluators: [{label: "a\\nb", type: downstream}]', "evaluators.'a\\nb'.label: 'a\\nb' contains the control"),
    ],
)
def test_a_hostile_file_is_one_line(tmp_path: Path, text: str, expected: str) -> None:
    message = problem(tmp_path, text)
    assert message.startswith(expected)
    assert "\n" not in message and len(message) < 600


@pytest.mark.parametrize("kind", ["folder", "fifo", "socket", "binary", "large"])
def test_what_is_no_text_file_is_refused(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c.yaml"
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)  # which nobody writes: opening it would wait for ever
    elif kind == "binary":
        path.write_bytes(bytes(range(256)))
    elif kind == "large":
        with path.open("wb") as file:
            file.truncate(2**40)
    listener = socket.socket(socket.AF_UNIX)
    if kind == "socket":
        monkeypatch.chdir(tmp_path)  # the path of a socket is short
        listener.bind("c.yaml")
    expected = {"binary": "not YAML: ", "large": "1,099,511,627,776 bytes are too many"}.get(kind, "not a file")
    with pytest.raises(ConfigurationError) as caught:
        load(path)
    listener.close()
    assert str(caught.value).startswith(f"{path}: {expected}") and "\n" not in str(caught.value)


VALUES: list[Any] = [
    *(None, True, -1, 0, 3, 2**64, 10**30, -1.5, 1e30, float("nan"), float("inf"), "", "3", "false", "1ep", "nanT"),
    *("${seed}", "${nowhere}", "${data}", "${path.glob:*}", "???", "a\tb", "\u202e", "{", "x" * 500, b"\xff"),
    *([], [None], [[1]], [1, "a"], {}, {"a": {}}, {1: 2}, {"label": "piqa"}, [{"label": "piqa", "type": "downstream"}]),
]
KEYS = [(key, section_of(annotation)) for key, annotation, _ in walk(TrainConfig)]


@settings(max_examples=25)
@given(st.lists(st.tuples(st.sampled_from(KEYS), st.sampled_from(VALUES)), min_size=1, max_size=3))
def test_any_value_of_any_key_is_accepted_or_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[tuple[str, type | None], Any]]
) -> None:
    raw: dict[str, Any] = {"optimizer": {"name": "adamw"}}
    for (key, _), value in changes:
        *sections, last = key.split(".")
        inner: Any = raw
        for section in sections:
            if section == "evaluators":
                inner = inner.setdefault(section, [{"label": "piqa", "type": "downstream"}])
                inner = inner[0] if isinstance(inner, list) and inner and isinstance(inner[0], dict) else {}
            else:
                inner = inner.setdefault(section, {})
            inner = inner if isinstance(inner, dict) else {}
        inner[last] = value
    path = write(tmp_path_factory.mktemp("any"), yaml.safe_dump(raw, allow_unicode=True))
    try:
        config = load(path)
    except ConfigurationError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error)
        return
    config.save(path)
    assert load(path) == config


# --- secrets of the environment ---


def test_a_secret_is_neither_saved_nor_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("olmo.console._SECRETS", {})
    monkeypatch.setenv("MY_TOKEN", "hf_verysecret")
    monkeypatch.setenv("MIRROR", "https://user:passw0rd@host.org/data")
    monkeypatch.setenv("JOB", "4711")
    text = (
        "run_name: run${oc.env:JOB}\nload_path: ${oc.env:MIRROR}/step5\nremote_save_folder: s3://a/${oc.env:MY_TOKEN}\n"
    )
    config = load(write(tmp_path, MINIMAL + text))
    assert config.load_path == "https://user:passw0rd@host.org/data/step5"
    saved = tmp_path / "saved.yaml"
    config.save(saved)
    kept = saved.read_text("utf-8")
    assert "verysecret" not in kept and "passw0rd" not in kept
    assert "load_path: ${oc.env:MIRROR}/step5" in kept and "run_name: run4711" in kept
    assert load(saved) == config

    for line in ("seed: ${oc.env:MY_TOKEN}", "precision: ${oc.env:MY_TOKEN}"):
        message = problem(tmp_path, MINIMAL + line)
        assert "verysecret" not in message and "${oc.env:MY_TOKEN}" in message

    def fails(_: Any) -> None:
        raise ValueError(f"cannot open {config.load_path}")

    assert exit_status(fails, []) == 1
    assert capsys.readouterr().err == "error: cannot open ${oc.env:MIRROR}/step5\n"
    monkeypatch.delenv("MY_TOKEN")
    with pytest.raises(ConfigurationError, match="Environment variable 'MY_TOKEN' not found"):
        load(saved)


def test_a_dollar_that_is_none_of_an_interpolation_survives_saving(tmp_path: Path) -> None:
    config = load(write(tmp_path, MINIMAL + "run_name: 'a\\${b}'\nsave_folder: 'c\\\\\\${d}$e'\n"))
    assert (config.run_name, config.save_folder) == ("a${b}", "c\\${d}$e")
    config.save(tmp_path / "saved.yaml")
    assert load(tmp_path / "saved.yaml") == config


def test_a_model_section_that_cannot_be_resolved_is_one_line(tmp_path: Path) -> None:
    path = write(tmp_path, "model: {d_model: '${nowhere}'}")
    with pytest.raises(ConfigurationError, match=r"^\S+: model\.d_model: Interpolation key 'nowhere' not found$"):
        load_model_config(path)
