"""The laws of the invented entries: probes, wordings, lengths, names."""

import functools
import json
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from olmo.tokenizer import load_tokenizer
from scripts.prepare import fictional_knowledge as fk
from tests.published import fictional_knowledge, olmo_tokenizer
from tests.reference import tiny_tokenizer

FIELDS = {
    "train_context",
    "paraphrases",
    "mem_input",
    "mem_target",
    "gen_input",
    "gen_target",
    "hard_gen_input",
    "hard_gen_target",
}


@pytest.fixture(scope="module")
def entries() -> list[dict]:
    return fk.make_entries(130, 9, seed=0, max_words=80)


def texts_of(entry: dict) -> list[str]:
    return [entry["train_context"], *entry["paraphrases"]]


def sentences_of(text: str) -> list[str]:
    return text.rstrip(".").split(". ")


def contains(text: str, phrase: str) -> bool:
    """Whether the phrase occurs as whole words."""
    return re.search(rf"\b{re.escape(phrase)}\b", text) is not None


@functools.cache
def invented_pattern() -> re.Pattern:
    """Every word that any seed can invent, in lower case."""
    onset, vowel = "|".join(fk.ONSETS), "|".join(fk.VOWELS)
    coda, ending = "|".join(fk.CODAS), "|".join(fk.ENDINGS)
    return re.compile(f"(?:{onset})(?:{vowel})(?:{coda})(?:(?:{onset})(?:{vowel}))*(?:{ending})")


def invented_words(entry: dict) -> set[str]:
    """The invented words of an entry: those of the pattern, wherever they occur in it."""
    words = set(re.findall(r"\b[A-Z][a-z]+\b", json.dumps(entry)))
    return {word for word in words if invented_pattern().fullmatch(word.lower())}


def test_an_entry_has_the_published_fields(entries):
    for entry in entries:
        assert set(entry) == FIELDS
        assert isinstance(entry["train_context"], str) and len(entry["paraphrases"]) == 9
        for field in FIELDS - {"train_context", "paraphrases"}:
            assert len(entry[field]) == 5 and all(isinstance(x, str) and x for x in entry[field])
        for field in ("mem", "gen", "hard_gen"):
            inputs, targets = entry[f"{field}_input"], entry[f"{field}_target"]
            assert len(set(inputs)) == 5
            assert all(x == x.strip() and x for x in (*inputs, *targets))


def test_a_memorization_probe_is_a_sentence_prefix_of_the_training_text(entries):
    for entry in entries:
        text = entry["train_context"]
        for prompt, target in zip(entry["mem_input"], entry["mem_target"], strict=True):
            assert any(s.startswith(f"{prompt} {target}") for s in sentences_of(text))
            assert any(contains(prompt, word) for word in invented_words(entry))


def test_a_semantic_probe_asks_the_same_fact_in_words_of_no_text(entries):
    for entry in entries:
        assert entry["gen_target"] == entry["mem_target"]
        for prompt in entry["gen_input"]:
            assert not any(prompt in text for text in texts_of(entry))


def test_a_compositional_probe_needs_two_sentences(entries):
    for entry in entries:
        sentences = [s for text in texts_of(entry) for s in sentences_of(text)]
        names = invented_words(entry)
        for prompt, target in zip(entry["hard_gen_input"], entry["hard_gen_target"], strict=True):
            anchors = {name for name in names if contains(prompt, name)}
            assert anchors
            assert not any(prompt in sentence for sentence in sentences)
            for sentence in sentences:
                named = any(contains(sentence, anchor) for anchor in anchors)
                assert not (named and contains(sentence, target))


def test_every_text_holds_every_target(entries):
    for entry in entries:
        for text in texts_of(entry):
            for target in (*entry["mem_target"], *entry["hard_gen_target"]):
                assert contains(text, target)


def test_all_texts_of_an_entry_differ(entries):
    for entry in entries:
        assert len(set(texts_of(entry))) == 10


def test_no_sentence_is_in_more_than_half_of_the_texts_of_an_entry(entries):
    for entry in entries:
        counts = Counter(s for text in texts_of(entry) for s in sentences_of(text))
        assert max(counts.values()) <= 5


def test_sentences_are_well_formed(entries):
    for entry in entries:
        for text in texts_of(entry):
            assert len(sentences_of(text)) == 5 and "  " not in text
            assert all(s[0].isupper() for s in sentences_of(text))
            assert not set(text) & set("{}")


def test_categories_and_wordings_are_varied(entries):
    """Entries are not one template with the names replaced."""
    shapes = set()
    for entry in entries:
        skeleton = re.sub(r"\d+", "_", entry["train_context"])
        for word in {*invented_words(entry), *entry["mem_target"]}:
            skeleton = skeleton.replace(word, "_")
        shapes.add(skeleton)
    assert len(shapes) > 0.9 * len(entries)


def test_targets_mix_names_numbers_and_ordinary_words(entries):
    targets = [target for entry in entries for target in entry["mem_target"]]
    assert all(len(target.split()) <= 4 for target in targets)
    kinds = ["number" if target.isdigit() else "word" if target.islower() else "name" for target in targets]
    assert all(kinds.count(kind) >= len(targets) / 20 for kind in ("number", "word", "name"))


def test_no_name_is_shared_between_entries(entries):
    seen: set[str] = set()
    for entry in entries:
        names = invented_words(entry)
        assert len(names) >= 5 and not names & seen
        seen |= names


def test_no_seed_can_invent_a_name_of_the_published_data():
    files = sorted(fictional_knowledge().glob("*.json"))
    published = {word for file in files for word in re.findall(r"[^\W\d_]+", file.read_text(encoding="utf-8").lower())}
    assert not [word for word in published if invented_pattern().fullmatch(word)]


def test_the_namer_never_runs_out_and_never_repeats():
    namer = fk.Namer(fk.random.Random(0))
    words = [namer.word() for _ in range(20_000)]
    assert len(set(words)) == len(words)
    assert all(invented_pattern().fullmatch(word.lower()) for word in words)


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    count=st.integers(0, 12),
    paraphrases=st.integers(0, 12),
    max_words=st.integers(54, 90),
)
def test_laws_for_every_seed_and_size(seed, count, paraphrases, max_words):
    entries = fk.make_entries(count, paraphrases, seed, max_words)
    assert len(entries) == count
    assert entries == fk.make_entries(count + 3, paraphrases, seed, max_words)[:count]
    for entry in entries:
        texts = texts_of(entry)
        assert len(set(texts)) == 1 + paraphrases
        assert max(len(text.split()) for text in texts) <= max_words
        for prompt, target in zip(entry["mem_input"], entry["mem_target"], strict=True):
            assert f"{prompt} {target}" in entry["train_context"]
            assert all(contains(text, target) for text in texts)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32), most=st.integers(76, 90))
def test_no_text_has_more_tokens_than_allowed(seed, most):
    tokenizer = olmo_tokenizer()
    entries = fk.make_entries(10, 9, seed, max_tokens=most, tokenizer=tokenizer)
    lengths = [len(tokenizer.encode(t, add_special_tokens=False).ids) for e in entries for t in texts_of(e)]
    assert len(lengths) == 100 and most / 2 < max(lengths) <= most
    assert all(contains(text, target) for e in entries for text in texts_of(e) for target in e["mem_target"])


def test_tokens_count_as_the_given_tokenizer_counts_them(tmp_path):
    tokenizer = load_tokenizer(str(tiny_tokenizer(tmp_path / "tokenizer.json")))
    entries = fk.make_entries(20, 4, max_tokens=235, tokenizer=tokenizer)
    lengths = [len(tokenizer.encode(text).ids) for entry in entries for text in texts_of(entry)]
    assert 200 < max(lengths) <= 235
    assert max(len(tokenizer.encode(t).ids) for e in fk.make_entries(20, 4) for t in texts_of(e)) > 235


def test_names_too_long_for_the_limit_are_drawn_again():
    """Without a second draw one of this many entries has not enough wordings that are short enough."""
    tokenizer = olmo_tokenizer()
    entries = fk.make_entries(300, 9, seed=0, max_tokens=76, tokenizer=tokenizer)
    names = [invented_words(entry) for entry in entries]
    assert len(set().union(*names)) == sum(map(len, names)) and min(map(len, names)) >= 5


def test_a_limit_that_changes_nothing_changes_nothing():
    assert fk.make_entries(20, max_tokens=500, tokenizer=olmo_tokenizer()) == fk.make_entries(20)


def test_seeds_differ():
    one, other = fk.make_entries(10, seed=1), fk.make_entries(10, seed=2)
    names = [set().union(*map(invented_words, entries)) for entries in (one, other)]
    assert one != other and len(names[0] & names[1]) < len(names[0]) / 5


def test_a_length_that_cannot_be_met_is_an_error():
    with pytest.raises(ValueError, match="of at most 20 words"):
        fk.make_entries(1, max_words=20)
    with pytest.raises(ValueError, match="needs 100001 wordings"):
        fk.make_entries(1, paraphrases=100_000)
