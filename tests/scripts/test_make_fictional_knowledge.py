"""The laws of the invented entries: probes, wordings, lengths, names; and the command line."""

import functools
import json
import re
import string
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from olmo.exceptions import exit_status
from olmo.tokenizer import load_tokenizer
from scripts import make_fictional_knowledge as mfk
from scripts.prepare.fictional_templates import CATEGORIES
from tests.published import fictional_knowledge, olmo_tokenizer
from tests.reference import tiny_tokenizer

run = functools.partial(exit_status, mfk.main)
ROOT = Path(__file__).resolve().parents[2]
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
NAMES = [
    "fictional_knowledge_paraphrase.json",
    "fictional_knowledge_once.json",
]


@pytest.fixture(scope="module")
def entries() -> list[dict]:
    return mfk.make_entries(130, 9, seed=0, max_words=80)


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
    onset, vowel = "|".join(mfk.ONSETS), "|".join(mfk.VOWELS)
    coda, ending = "|".join(mfk.CODAS), "|".join(mfk.ENDINGS)
    return re.compile(f"(?:{onset})(?:{vowel})(?:{coda})(?:(?:{onset})(?:{vowel}))*(?:{ending})")


def invented_words(entry: dict) -> set[str]:
    """The invented words of an entry: those of the pattern, wherever they occur in it."""
    words = set(re.findall(r"\b[A-Z][a-z]+\b", json.dumps(entry)))
    return {word for word in words if invented_pattern().fullmatch(word.lower())}


# Templates


def test_there_are_at_least_six_categories_of_five_facts():
    assert len(CATEGORIES) >= 6
    assert len({category.name for category in CATEGORIES}) == len(CATEGORIES)
    assert all(len(category.facts) == mfk.PROBES for category in CATEGORIES)
    assert all(len(category.hops) >= mfk.PROBES for category in CATEGORIES)


@pytest.mark.parametrize("category", CATEGORIES, ids=lambda category: category.name)
def test_a_category_is_a_graph_told_edge_by_edge(category):
    def slots_in(template: str) -> set[str]:
        return {name.split(".")[0] for _, name, _, _ in string.Formatter().parse(template) if name}

    edges = {frozenset((fact.key, fact.value)) for fact in category.facts}
    assert set().union(*edges) == set(category.slots)
    for fact in category.facts:
        assert len(set(fact.statements)) == len(fact.statements) >= 4
        for statement in fact.statements:
            assert {fact.value} <= slots_in(statement) <= {fact.key, fact.value}
            assert statement.endswith(".") and ". " not in statement
        for prompt in fact.prompts:
            assert slots_in(prompt) == {fact.key}
            assert not any(prompt in statement for statement in fact.statements)
    for hop in category.hops:
        assert frozenset((hop.anchor, hop.bridge)) in edges
        assert frozenset((hop.bridge, hop.target)) in edges
        assert frozenset((hop.anchor, hop.target)) not in edges
        assert hop.anchor != hop.target and slots_in(hop.prompt) == {hop.anchor}
        # An anchor must point at one entry: an invented name does, a year or a thing does not.
        assert isinstance(category.slots[hop.anchor], str)


@pytest.mark.parametrize("category", CATEGORIES, ids=lambda category: category.name)
def test_no_slot_name_begins_with_another(category):
    """`split("{" + slot)` finds a slot only then."""
    slots = sorted(category.slots)
    assert not any(b.startswith(a) for a in slots for b in slots if a != b)


# Entries


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
    namer = mfk.Namer(mfk.random.Random(0))
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
    entries = mfk.make_entries(count, paraphrases, seed, max_words)
    assert len(entries) == count
    assert entries == mfk.make_entries(count + 3, paraphrases, seed, max_words)[:count]
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
    entries = mfk.make_entries(10, 9, seed, max_tokens=most, tokenizer=tokenizer)
    lengths = [len(tokenizer.encode(t, add_special_tokens=False).ids) for e in entries for t in texts_of(e)]
    assert len(lengths) == 100 and most / 2 < max(lengths) <= most
    assert all(contains(text, target) for e in entries for text in texts_of(e) for target in e["mem_target"])


def test_tokens_count_as_the_given_tokenizer_counts_them(tmp_path):
    tokenizer = load_tokenizer(str(tiny_tokenizer(tmp_path / "tokenizer.json")))
    entries = mfk.make_entries(20, 4, max_tokens=235, tokenizer=tokenizer)
    lengths = [len(tokenizer.encode(text).ids) for entry in entries for text in texts_of(entry)]
    assert 200 < max(lengths) <= 235
    assert max(len(tokenizer.encode(t).ids) for e in mfk.make_entries(20, 4) for t in texts_of(e)) > 235


def test_names_too_long_for_the_limit_are_drawn_again():
    """Without a second draw one of this many entries has not enough wordings that are short enough."""
    tokenizer = olmo_tokenizer()
    entries = mfk.make_entries(300, 9, seed=0, max_tokens=76, tokenizer=tokenizer)
    names = [invented_words(entry) for entry in entries]
    assert len(set().union(*names)) == sum(map(len, names)) and min(map(len, names)) >= 5


def test_a_limit_that_changes_nothing_changes_nothing():
    assert mfk.make_entries(20, max_tokens=500, tokenizer=olmo_tokenizer()) == mfk.make_entries(20)


def test_seeds_differ():
    one, other = mfk.make_entries(10, seed=1), mfk.make_entries(10, seed=2)
    names = [set().union(*map(invented_words, entries)) for entries in (one, other)]
    assert one != other and len(names[0] & names[1]) < len(names[0]) / 5


def test_a_length_that_cannot_be_met_is_an_error():
    with pytest.raises(ValueError, match="of at most 20 words"):
        mfk.make_entries(1, max_words=20)
    with pytest.raises(ValueError, match="needs 100001 wordings"):
        mfk.make_entries(1, paraphrases=100_000)


# Command line


def read(folder: Path) -> list[list[dict]]:
    return [json.loads((folder / name).read_text(encoding="utf-8")) for name in NAMES]


def test_command_writes_two_lists_and_says_so(tmp_path, capsys):
    argv = ["--paraphrase", "4", "--once", "3", "--paraphrases", "2", "--seed", "5"]
    assert run(["--output", str(tmp_path / "new"), *argv, "--max_words", "60"]) == 0
    paraphrase, once = read(tmp_path / "new")
    assert (len(paraphrase), len(once)) == (4, 3)
    assert paraphrase + once == mfk.make_entries(7, 2, seed=5, max_words=60)
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert "4 paraphrase and 3 once entries" in printed and "21 texts" in printed
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == sorted(NAMES)


def test_defaults_are_the_published_sizes(entries, tmp_path):
    assert run(["--output", str(tmp_path)]) == 0
    paraphrase, once = read(tmp_path)
    assert (len(paraphrase), len(once)) == (70, 60)
    assert paraphrase + once == entries


def test_command_counts_tokens_with_a_tokenizer(tmp_path, capsys):
    tokenizer = tiny_tokenizer(tmp_path / "tokenizer.json")
    argv = ["--output", str(tmp_path / "new"), "--paraphrase", "2", "--once", "2", "--max_tokens", "260"]
    assert run([*argv, "--tokenizer", str(tokenizer)]) == 0
    lengths = [
        len(load_tokenizer(str(tokenizer)).encode(t).ids)
        for es in read(tmp_path / "new")
        for e in es
        for t in texts_of(e)
    ]
    mean = sum(lengths) / len(lengths)
    assert f", {min(lengths)} to {max(lengths)} (mean {mean:.1f}) tokens\n" in capsys.readouterr().out
    assert max(lengths) <= 260


def test_same_seed_same_bytes_and_one_setting_may_be_empty(tmp_path):
    for folder in ("a", "b"):
        argv = ["--output", str(tmp_path / folder), "--paraphrase", "0", "--once", "2"]
        assert run(argv) == 0
    for name in NAMES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert read(tmp_path / "a")[0] == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--paraphrase", "0", "--once", "0"], "nothing to write"),
        (["--paraphrase", "-1"], "--paraphrase must not be negative"),
        (["--once", "-1"], "--once must not be negative"),
        (["--paraphrases", "-1"], "--paraphrases must not be negative"),
        (["--seed", "-1"], "--seed must not be negative"),
        (["--max_words", "0"], "--max_words must be positive"),
        (["--max_words", "10"], "of at most 10 words"),
        (["--tokenizer", "t.json"], "give --max_tokens as well"),
        (["--max_tokens", "0"], "--max_tokens must be positive"),
        (["--max_tokens", "40"], "of at most 80 words and 40 tokens"),
        (["--paraphrases", "100000"], "needs 100001 wordings"),
        (["--once", "many"], "invalid int value"),
        (["--colour", "red"], "unrecognized arguments"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_status_2(argv, message, tmp_path, capsys):
    status = run(["--output", str(tmp_path / "out"), *argv])
    error = capsys.readouterr().err
    assert status == 2 and message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_output_is_required(capsys):
    assert run([]) == 2
    assert "--output" in capsys.readouterr().err


def test_an_unwritable_output_is_one_line_and_status_1(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert run(["--output", str(tmp_path / "file"), "--once", "1"]) == 1
    error = capsys.readouterr().err
    assert str(tmp_path / "file") in error and error.count("\n") == 1


def test_a_failure_leaves_the_old_files_and_no_others(tmp_path, monkeypatch, capsys):
    argv = ["--output", str(tmp_path), "--paraphrase", "1", "--once", "1"]
    assert run(argv) == 0
    before = read(tmp_path)
    write_text = Path.write_text

    def full_disk(path, *args, **kwargs):
        if NAMES[1] in path.name:
            raise OSError(28, "No space left on device", str(path))
        return write_text(path, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", full_disk)
    assert run([*argv, "--seed", "1"]) == 1
    assert "No space left on device" in capsys.readouterr().err
    monkeypatch.undo()
    assert read(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(NAMES)


def test_runs_as_a_module(tmp_path):
    command = [sys.executable, "-m", "scripts.make_fictional_knowledge", "--output", str(tmp_path)]
    command += ["--paraphrase", "1", "--once", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stderr == ""
