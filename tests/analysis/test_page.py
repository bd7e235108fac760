"""The report's page: it shows the numbers of report.json, and needs nothing but itself."""

import base64
import re
import subprocess
from pathlib import Path

import pytest

from analysis import canvas
from analysis.figures import outcomes
from analysis.page import draw, render
from tests.run_folders import TASKS
from tests.study import Page


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
        common, edited = c["common_start"], c["A_against_original"] is not None
        own = [shown(e) if edited else "-" for e in (c["A"], c["loss_rise"]["general"])]
        numbers = [f"{c[name]:.3f}" for name in ("entropy", "K_before", "K_after")]
        rise = shown(common["loss_rise"]["general"])
        assert row == [c["name"], str(c["start"]), *numbers, shown(common["A"]), rise, *own]
    assert by_part[0] == ["A, %", "paraphrase", "once", "memorization", "semantic", "composition"]
    for row, c in zip(by_part[1:], conditions, strict=True):
        assert row == [
            c["name"],
            *(shown(e, 1) for part in ("A_by_setting", "A_by_kind") for e in c["common_start"][part].values()),
        ]
    assert tasks[0][1:] == [c["name"] for c in conditions]
    assert [row[0] for row in tasks[1:]] == [*TASKS, "P", "F, %"]
    for column, c in enumerate(conditions, start=1):
        accuracies, p = c["common_start"]["accuracy"].values(), c["common_start"]["downstream"]
        ends = (p["P_before"]["value"], p["P_after"]["value"])
        changes = [(a["before"], a["after"]) for a in accuracies] + [ends]
        assert [row[column] for row in tasks[1:-1]] == [f"{a - 0.25:+.3f} → {b - 0.25:+.3f}" for a, b in changes]
        assert tasks[-1][column] == shown(p["F"])
    for row, stage in zip(commands[1:], saved["stages"], strict=True):
        # Pasted into a shell, a command has the words that the stage had.
        words = subprocess.run(["bash", "-c", f"printf '%s\\n' {row[3]}"], capture_output=True, text=True, check=True)
        assert words.stdout.splitlines() == stage["command"]


def test_bars_and_verdicts_of_resuscitation_point_the_same_way(saved, monkeypatch):
    """Both from the weights that edited and unedited runs share. From their own, worse start the edited ones of
    OTHERWISE seem to forget less, though they end with a higher loss."""
    drawn = {}
    monkeypatch.setattr(outcomes, "acquisition_and_forgetting", lambda rows, label: drawn.update(bars=rows))
    monkeypatch.setattr(canvas, "save", lambda figure, stem: stem)
    draw(saved, Path("unused"))
    bars = dict(zip(saved["conditions"], drawn["bars"]))
    by_measure = {d["measured"]: d for d in saved["directions"]}
    for key, q in (("last_q1", 1), ("last_q2", 2)):
        verdict = by_measure[f"rise of held-out loss, resuscitated, q = {q}, minus as it was (points, common start)"]
        assert bars[key]["loss_rise"]["value"] - bars["last"]["loss_rise"]["value"] == pytest.approx(verdict["value"])
        k = by_measure[f"K after training, resuscitated, q = {q}, minus as it was"]["value"]
        before = abs(saved["conditions"]["last"]["K_before"])
        assert bars[key]["A"]["value"] - bars["last"]["A"]["value"] == pytest.approx(100 * k / before)
        own = saved["conditions"][key]
        assert own["loss_rise"]["general"]["value"] < 0 < own["common_start"]["loss_rise"]["general"]["value"]


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


def test_no_name_reaches_the_page_as_markup(saved, figures_of_study):
    """Every text of report.json but the verdicts, and every name of a task, a setting or a package."""
    hostile = "\"'><script>alert(1)</script><a href='javascript:x'>"

    def spoil(value, key=""):
        if isinstance(value, dict):
            names = {"versions": f"torch{hostile}", "A_by_setting": f"once{hostile}"}
            return {names.get(key, k): spoil(v, k) for k, v in value.items()}
        if isinstance(value, list):
            return [spoil(item, key) for item in value]
        return value + hostile if isinstance(value, str) and key != "verdict" else value

    text = render(spoil(saved), figures_of_study)
    assert "&lt;script&gt;alert(1)" in text
    found = Page(text)
    assert not {"script", "a"} & set(found.tags) and not any(name.startswith("on") for _, name, _ in found.attributes)


def test_the_page_says_what_it_took_and_on_what(study):
    """Of the stages of make_study: 61.2 and 3.3 seconds, 1234.5 MiB at most."""
    text = (study / "report.html").read_text()
    assert "1:04 in all, at most 1,234 MiB" in text
    for part in ("Some-Platform", "2 processor cores", "Python 3.11.1", "torch 2.6", "code abc123"):
        assert part in " ".join(text.split())
