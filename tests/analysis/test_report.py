"""The report: its rule, its paired differences of entropy, and that the page says what the runs' files say."""

import base64
import functools
import html.parser
import json
import math
import re
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from analysis import estimates, report
from analysis.entropy import summary
from analysis.estimates import Estimate
from analysis.outcomes import acquired
from analysis.report import entropy_difference, gather, verdict
from analysis.runs import read_run
from olmo.exceptions import exit_status
from olmo.memory import CoefficientAverages
from tests.run_folders import TASKS, direct_k, probe_table, write_run

command = functools.partial(exit_status, report.main)
SEEN, OPPOSITE, NOISE = "seen", "not seen (the opposite)", "within noise at this scale"
STEPS = {"early": 90, "middle": 450, "last": 720}


# --- verdict -----------------------------------------------------------------------------------------------------

numbers = st.floats(-1e6, 1e6).filter(lambda x: abs(x) > 1e-6)


@given(st.lists(numbers, min_size=3, max_size=3).map(sorted), st.sampled_from([-1, 1]))
def test_the_verdict_follows_from_the_interval_alone(ends, expected):
    low, value, high = ends
    found = verdict(Estimate(value, low, high), expected)
    if low < 0 < high:
        assert found == NOISE
    else:
        assert found == (SEEN if math.copysign(1, low) == expected else OPPOSITE)


@given(st.lists(numbers, min_size=3, max_size=3).map(sorted), st.sampled_from([-1, 1]))
def test_the_mirrored_result_gets_the_mirrored_verdict(ends, expected):
    low, value, high = ends
    mirrored = {SEEN: OPPOSITE, OPPOSITE: SEEN, NOISE: NOISE}
    found = verdict(Estimate(value, low, high), expected)
    assert verdict(Estimate(-value, -high, -low), expected) == mirrored[found]
    assert verdict(Estimate(value, low, high), -expected) == mirrored[found]


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-1.0, 0.0), (0.0, 0.0), (math.nan, math.nan)])
def test_an_interval_that_touches_0_or_is_unknown_shows_nothing(low, high):
    assert verdict(Estimate(0.5, low, high), 1) == verdict(Estimate(0.5, low, high), -1) == NOISE


# --- entropy -----------------------------------------------------------------------------------------------------

INSTANCES, LAYERS, MEMORIES = 128, 2, 24


def coefficients(sharpness: float, seed: int, noise: float = 0.5) -> np.ndarray:
    """Mean coefficients of each instance (n, L, M), float32; the noise of an instance depends on `seed` only."""
    level = np.exp(-sharpness * np.arange(MEMORIES) / MEMORIES)
    generator = np.random.default_rng(seed)
    return (level * generator.gamma(1 / noise**2, noise**2, (INSTANCES, LAYERS, MEMORIES))).astype(np.float32)


def measured(means: np.ndarray, step: int, data: str = "abc") -> dict:
    """knowledge_entropy.json, by the program's own averages."""
    averages = CoefficientAverages(*means.shape[1:])
    averages.add(torch.from_numpy(means), np.arange(len(means)))
    return {
        **summary({"knowledge": averages}),
        "checkpoint": {"path": f"step{step}-unsharded", "step": step, "fingerprint": "f"},
        "data": {"path": "text", "sha256": data},
        "coefficient": "abs",
    }


def direct_entropy(means: np.ndarray) -> float:
    """Equation 2, from the instances: average, share, entropy, sum over layers."""
    shares = means.astype(np.float64).mean(0)
    shares = shares / shares.sum(1, keepdims=True)
    return float(-(shares * np.log(shares)).sum())


def direct_error(change, instances: np.ndarray) -> float:
    """Delete-a-group jackknife: leave out the instances of one residue mod 64 after the other."""
    left_out = np.array([change(instances[np.arange(len(instances)) % 64 != g]) for g in range(64)])
    return math.sqrt(63 / 64 * ((left_out - left_out.mean()) ** 2).sum())


def test_entropy_difference_equals_a_direct_paired_jackknife():
    one, other = coefficients(1.0, seed=0), coefficients(2.0, seed=0) * coefficients(0.0, seed=1)
    found = entropy_difference([measured(one, 90)], [measured(other, 720)])

    def change(chosen: np.ndarray) -> float:
        return direct_entropy(other[chosen]) - direct_entropy(one[chosen])

    error = direct_error(change, np.arange(INSTANCES))
    assert found.value == pytest.approx(change(np.arange(INSTANCES)), rel=1e-9)
    assert found.value - found.low == pytest.approx(1.96 * error, rel=1e-6)
    assert found.high - found.value == pytest.approx(1.96 * error, rel=1e-6)


def test_pairing_takes_out_what_instances_do_to_both_checkpoints():
    """The same noise in both: the error of the difference is far below those of the two entropies."""
    one, other = measured(coefficients(1.0, seed=0), 90), measured(coefficients(1.2, seed=0), 720)
    found = entropy_difference([one], [other])
    unpaired = 1.96 * math.hypot(one["standard_error"], other["standard_error"])
    assert found.high - found.value < 0.2 * unpaired
    assert found.high < 0  # the second is sharper


def test_the_interval_of_an_entropy_difference_holds_the_truth_as_often_as_it_says():
    """200 draws of instances; the truth is the difference of the entropies of the levels without noise."""
    truth = LAYERS * (math.log(MEMORIES) - direct_entropy(np.ones((1, 1, MEMORIES))))
    for sharpness, sign in ((2.0, 1), (1.0, -1)):
        level = np.exp(-sharpness * np.arange(MEMORIES) / MEMORIES)
        truth += sign * direct_entropy(np.tile(level, (1, LAYERS, 1)))
    covered = 0
    for seed in range(200):
        one, other = coefficients(1.0, 2 * seed), coefficients(2.0, 2 * seed) * coefficients(0.0, 2 * seed + 1, 0.2)
        found = entropy_difference([measured(one, 90)], [measured(other, 720)])
        covered += found.low <= truth <= found.high
    assert 0.88 <= covered / 200 <= 0.99


def test_seeds_measured_on_the_same_instances_do_not_average_their_error_out():
    """Three times the same checkpoint is no more than once."""
    one, other = measured(coefficients(1.0, seed=0), 90), measured(coefficients(1.0, seed=1), 720)
    once, thrice = entropy_difference([one], [other]), entropy_difference([one] * 3, [other] * 3)
    assert thrice.as_json() == pytest.approx(once.as_json(), rel=1e-9)


def test_the_spread_between_seeds_widens_the_interval():
    pairs = [(measured(coefficients(1.0, 0), 90), measured(coefficients(s, 0), 720)) for s in (1.5, 2.0, 3.0)]
    found = entropy_difference(*zip(*pairs))
    differences = np.array([b["knowledge_entropy"] - a["knowledge_entropy"] for a, b in pairs])
    assert found.value == pytest.approx(differences.mean())
    spread = 4.303 * differences.std(ddof=1) / math.sqrt(3)  # Student, two degrees of freedom
    assert spread < found.high - found.value < 1.1 * spread


@pytest.mark.parametrize(
    "changed",
    [{"data": {"path": "text", "sha256": "xyz"}}, {"number_of_instances": 64}, {"coefficient": "relu"}],
    ids=lambda changed: next(iter(changed)),
)
def test_entropies_of_different_data_are_not_compared(changed):
    one = measured(coefficients(1.0, seed=0), 90)
    with pytest.raises(ValueError, match=r"measured with different (data|numbers of instances|coefficients)"):
        entropy_difference([one], [{**one, **changed}])


# --- a study, by hand --------------------------------------------------------------------------------------------

LEVELS = {"paraphrase": np.random.default_rng(0).normal(-6, 1, 8), "once": np.random.default_rng(1).normal(-7, 1, 12)}
LOSSES = np.random.default_rng(2).normal(5, 0.5, 40)
# Per condition: gain of log-probability, rise of the held-out loss; as the paper has it.
PAPER = {
    "early": (1.8, 0.1),
    "middle": (2.0, 0.2),
    "last": (1.5, 0.3),
    "last_q1": (1.7, 0.2),
    "last_q2": (1.9, 0.1),
    "last_control": (0.1, 0.3),
}
OTHERWISE = {
    "early": (1.2, 0.4),
    "middle": (1.0, 0.35),
    "last": (1.5, 0.3),
    "last_q1": (1.2, 0.4),
    "last_q2": (1.1, 0.5),
    "last_control": (1.7, 0.3),
}
ALIKE = dict.fromkeys(PAPER, (1.5, 0.3))


def make_study(folder: Path, effects: dict, sharpness: tuple, seeds: int = 1, noise: float = 0.05) -> Path:
    """What scripts.demo leaves behind, with these effects and entropies that fall with `sharpness`."""
    names = ("early", "middle", "last", "last, q = 1", "last, q = 2", "last, no injection")
    conditions = {}
    for number, (key, (gain, rise)) in enumerate(effects.items()):
        conditions[key] = {"name": names[number], "start": STEPS[key.partition("_")[0]], "runs": []}
        for seed in range(seeds):
            generator = np.random.default_rng([number, seed])
            after = {s: x + gain + 0.1 * seed + generator.normal(0, noise, len(x)) for s, x in LEVELS.items()}
            losses = {
                0: {"general": LOSSES + (1.0 if "q" in key else 0.0), "science": LOSSES},
                150: {"general": LOSSES + rise + generator.normal(0, noise, len(LOSSES)), "science": LOSSES - 0.5},
            }
            run = f"seed{seed}/continual/{key}"
            conditions[key]["runs"].append(run)
            write_run(
                folder / run,
                {0: probe_table(LEVELS, 2, 0.5, seed), 150: probe_table(after, 2, 0.5, seed)},
                losses,
                {0: dict(zip(TASKS, np.linspace(0.26, 0.56, 6))), 150: dict(zip(TASKS, np.linspace(0.25, 0.5, 6)))},
                probe_table(LEVELS, 2, 0.5, seed) if "q" in key else None,
                () if key == "last_control" else (75, 150),
            )
    for seed in range(seeds):
        for step, sharp in zip(STEPS.values(), sharpness):
            place = folder / f"seed{seed}" / "pretrain" / f"step{step}-unsharded"
            place.mkdir(parents=True)
            result = measured(coefficients(sharp + 0.1 * seed, 0) * coefficients(0.0, step, noise), step)
            (place / "knowledge_entropy.json").write_text(json.dumps(result))
    stages = [
        {
            "name": "pretraining",
            "command": ["python", "-m", "x", "--a=<b>"],
            "seconds": 61.2,
            "peak_memory_mib": 1234.5,
        },
        {"name": "entropy", "command": ["python", "-m", "y"], "seconds": 3.3, "peak_memory_mib": 99.0},
    ]
    manifest = {
        "stages": stages,
        "pretraining": [f"seed{seed}/pretrain" for seed in range(seeds)],
        "conditions": conditions,
        "setting": "demo",
        "published": False,
        "seeds": seeds,
        "environment": {
            "python": "3.11.1",
            "platform": "Some-Platform",
            "processor_count": 2,
            "versions": {"torch": "2.6"},
            "git": "abc123",
        },
    }
    (folder / "demo.json").write_text(json.dumps(manifest))
    return folder


class Page(html.parser.HTMLParser):
    """What a page holds: images, tables as rows of text, attributes, classes of the verdicts."""

    def __init__(self, text: str):
        super().__init__()
        self.images: list[dict] = []
        self.tables: list[list[list[str]]] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.tags: list[str] = []
        self._cell = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag == "img":
            self.images.append(dict(attrs))
        elif tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self._cell = True
        elif tag == "br" and self._cell:
            self.tables[-1][-1][-1] += "\n"

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self._cell = False

    def handle_data(self, data):
        if self._cell:
            self.tables[-1][-1][-1] += data


@pytest.fixture(autouse=True, scope="module")
def _fewer_resamples():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimates, "RESAMPLES", 300)
        yield


@pytest.fixture(scope="module")
def study(tmp_path_factory, _fewer_resamples) -> Path:
    """A finished study in the paper's direction, with its report."""
    folder = make_study(tmp_path_factory.mktemp("study") / "demo", PAPER, (1.0, 1.5, 2.0))
    assert command([str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def figures_of_study(study) -> dict[str, Path]:
    """Drawn once, for pages on which other things are looked at."""
    return {path.stem: path for path in (study / "figures").glob("*.png")}


@pytest.fixture(scope="module")
def page(study) -> Page:
    return Page((study / "report.html").read_text())


@pytest.fixture(scope="module")
def saved(study) -> dict:
    return json.loads((study / "report.json").read_text())


def test_the_report_equals_direct_computations_from_the_files(study, saved):
    for key, condition in saved["conditions"].items():
        run = study / "seed0" / "continual" / key
        before, after = (direct_k(pandas.read_parquet(run / "probes" / f"step{s}.parquet")) for s in (0, 150))
        assert (condition["K_before"], condition["K_after"]) == pytest.approx((before, after))
        assert condition["A"]["value"] == pytest.approx(100 * (after - before) / abs(before))
        assert (condition["A_against_original"] is None) == (key not in ("last_q1", "last_q2"))
        assert condition["downstream"]["F"]["value"] == pytest.approx(100 * (0.41 - 0.375) / 0.41)
        assert condition["start"] == STEPS[key.partition("_")[0]]
        [entropy] = [r for r in saved["entropy"][0] if r["checkpoint"]["step"] == condition["start"]]
        assert condition["entropy"] == entropy["knowledge_entropy"]
    assert saved["entries"] == {"paraphrase": 8, "once": 12}
    a = {key: condition["A"]["value"] for key, condition in saved["conditions"].items()}
    rise = {key: condition["loss_rise"]["general"]["value"] for key, condition in saved["conditions"].items()}
    # Resuscitated ones start from a worse loss: ends are compared, in percent of the start of those that are not.
    ends = {key: pandas.read_parquet(study / "seed0" / "continual" / key / "losses" / "step150.parquet") for key in a}
    end = {key: 100 * t[t.label == "general"].loss.mean() / LOSSES.mean() for key, t in ends.items()}
    h = [r["knowledge_entropy"] for r in saved["entropy"][0]]
    k = {key: condition["K_after"] for key, condition in saved["conditions"].items()}
    assert [d["value"] for d in saved["directions"]] == pytest.approx(
        [
            h[2] - h[0],
            a["last"] - a["early"],
            a["last"] - a["middle"],
            rise["last"] - rise["early"],
            rise["last"] - rise["middle"],
            k["middle"] - k["early"],
            k["middle"] - k["last"],
            k["last_q1"] - k["last"],
            end["last_q1"] - end["last"],
            k["last_q2"] - k["last"],
            end["last_q2"] - end["last"],
            a["last"] - a["last_control"],
        ]
    )


@pytest.mark.parametrize(
    ("effects", "sharpness", "noise", "expected"),
    [
        (PAPER, (1.0, 1.5, 2.0), 0.05, SEEN),
        (OTHERWISE, (2.0, 1.5, 1.0), 0.05, OPPOSITE),
        (ALIKE, (1.0, 1.0, 1.0), 0.3, NOISE),
    ],
    ids=["as the paper", "the opposite", "no effect"],
)
def test_other_data_give_other_verdicts(
    tmp_path, capsys, monkeypatch, figures_of_study, effects, sharpness, noise, expected
):
    """No verdict is written down anywhere: every one of them follows the data."""
    monkeypatch.setattr(report, "draw", lambda found, folder: figures_of_study)
    folder = make_study(tmp_path / "demo", effects, sharpness, noise=noise)
    assert command([str(folder)]) == 0
    directions = json.loads((folder / "report.json").read_text())["directions"]
    verdicts = [d["verdict"] for d in directions]
    # Of a dozen true nulls one in twenty is expected to leave its interval: with these seeds, at most one does.
    assert verdicts.count(expected) >= len(directions) - (expected == NOISE)
    shown = Page((folder / "report.html").read_text()).tables[0]
    assert [row[-1] for row in shown[1:]] == verdicts
    printed = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[0] for line in printed[:-1]] == verdicts


def test_the_numbers_shown_are_those_of_report_json(page, saved):
    def shown(e: dict, digits: int = 2) -> str:
        return f"{e['value']:+.{digits}f} [{e['low']:+.{digits}f}, {e['high']:+.{digits}f}]"

    directions, entropy, main, by_part, tasks, commands = page.tables
    assert len(directions) == len(saved["directions"]) + 1
    for row, d in zip(directions[1:], saved["directions"]):
        assert row[0] == f"{d['claim']}\n{d['measured']}, expected {d['expected']}"
        assert row[1:] == [shown(d, 3 if abs(d["value"]) < 1 else 2), d["verdict"]]
    for row, r in zip(entropy[1:], saved["entropy"][0], strict=True):
        assert row[:3] == [str(r["checkpoint"]["step"]), f"{r['knowledge_entropy']:.4f}", f"{r['standard_error']:.4f}"]
        assert row[3] == ", ".join(f"{h:.3f}" for h in r["layers"])
    conditions = list(saved["conditions"].values())
    for row, c in zip(main[1:], conditions, strict=True):
        original = "" if c["A_against_original"] is None else shown(c["A_against_original"])
        numbers = [f"{c[name]:.3f}" for name in ("entropy", "K_before", "K_after")]
        rise = shown(c["loss_rise"]["general"])
        assert row == [c["name"], str(c["start"]), *numbers, shown(c["A"]), original, rise]
    assert by_part[0] == ["A, %", "paraphrase", "once", "memorization", "semantic", "composition"]
    for row, c in zip(by_part[1:], conditions, strict=True):
        assert row == [c["name"], *(shown(e, 1) for e in (*c["A_by_setting"].values(), *c["A_by_kind"].values()))]
    assert tasks[0][1:] == [c["name"] for c in conditions]
    assert [row[0] for row in tasks[1:]] == [*TASKS, "P", "F, %"]
    for column, c in enumerate(conditions, start=1):
        accuracies, p = c["accuracy"].values(), c["downstream"]
        ends = (p["P_before"]["value"], p["P_after"]["value"])
        changes = [(a["before"], a["after"]) for a in accuracies] + [ends]
        assert [row[column] for row in tasks[1:-1]] == [f"{a - 0.25:+.3f} → {b - 0.25:+.3f}" for a, b in changes]
        assert tasks[-1][column] == shown(p["F"])
    assert [row[3] for row in commands[1:]] == [" ".join(s["command"]) for s in saved["stages"]]


def test_the_page_needs_nothing_but_itself(study, page):
    """Images are inside, nothing is fetched from anywhere, no script runs."""
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(page.tags)
    fetched = [
        a for a in page.attributes if a[1] in ("src", "srcset", "href", "action", "data", "poster", "background")
    ]
    assert fetched and all(value.startswith("data:") for _, _, value in fetched)
    assert not re.search(r"url\(|@import", (study / "report.html").read_text())
    embedded = {base64.b64decode(image["src"].removeprefix("data:image/png;base64,")) for image in page.images}
    drawn = {path.stem: path.read_bytes() for path in (study / "figures").glob("*.png")}
    del drawn["overview"]  # the README's
    assert embedded == set(drawn.values()) and len(drawn) == 5
    assert all(data.startswith(b"\x89PNG") for data in embedded)


def test_every_figure_says_in_words_what_it_shows(study, page):
    texts = [image["alt"] for image in page.images]
    assert len(set(texts)) == len(texts) == 5 and all(len(text) > 20 for text in texts)
    assert {p.stem for p in (study / "figures").glob("*.pdf")} == {p.stem for p in (study / "figures").glob("*.png")}


def test_what_comes_from_outside_is_escaped(study):
    text = (study / "report.html").read_text()
    assert "--a=&lt;b&gt;" in text and "--a=<b>" not in text


def test_the_page_says_what_it_took_and_on_what(study):
    """Of the stages of make_study: 61.2 and 3.3 seconds, 1234.5 MiB at most."""
    text = (study / "report.html").read_text()
    assert "1:04 in all, at most 1,234 MiB" in text
    for part in ("Some-Platform", "2 processor cores", "Python 3.11.1", "torch 2.6", "code abc123"):
        assert part in " ".join(text.split())


def test_report_json_is_json_and_nothing_is_left_half_written(study, saved):
    json.loads((study / "report.json").read_text(), parse_constant=pytest.fail)
    assert not list(study.glob("*.partial")) + list(study.glob(".*.partial"))
    assert saved["stages"] == json.loads((study / "demo.json").read_text())["stages"]


def test_several_seeds_are_averaged_and_widen_the_intervals(tmp_path, saved, figures_of_study):
    folder = make_study(tmp_path / "demo", PAPER, (1.0, 1.5, 2.0), seeds=3)
    found = gather(folder)
    last = found["conditions"]["last"]
    runs = [read_run(folder / f"seed{seed}" / "continual" / "last") for seed in range(3)]
    assert last["K_after"] == pytest.approx(np.mean([r.after.entries().mean() for r in runs]))
    assert last["A_per_seed"] == pytest.approx([acquired([r]).value for r in runs])
    assert min(last["A_per_seed"]) < last["A"]["value"] < max(last["A_per_seed"])
    one = saved["conditions"]["last"]["A"]
    assert last["A"]["high"] - last["A"]["low"] > 1.5 * (one["high"] - one["low"])
    assert last["curve"][-1]["K"] == pytest.approx(np.mean([r.curve[-1][1]["K"] for r in runs]))
    assert len(found["entropy"]) == 3
    text = report.render(found, figures_of_study)
    assert "3 seed(s)" in text and "entries, instances and seeds" in text
    assert "entries and instances of one run" not in text


def test_a_study_that_has_not_finished_is_one_line(tmp_path, capsys):
    absent = tmp_path / "absent"
    assert command([str(absent)]) == 1
    assert capsys.readouterr().err == f"error: {absent}/demo.json: missing; run make demo first\n"
    folder = make_study(tmp_path / "demo", PAPER, (1.0, 1.5, 2.0))
    manifest = json.loads((folder / "demo.json").read_text())
    del manifest["conditions"]["last_control"]
    for unfinished in (manifest, {"stages": manifest["stages"]}):
        (folder / "demo.json").write_text(json.dumps(unfinished))
        assert command([str(folder)]) == 1
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "has not finished" in said
    assert command([]) == 2
