"""The report of a study: it shows the numbers of study.json, in any form of study, and needs nothing but itself."""

import base64
import copy
import re
import subprocess
from urllib.parse import unquote

import pytest

from analysis.study.page import TITLES, render
from tests.browser import BROWSER, lay_out
from tests.study_json import EDITS, LONG, Page, a_study

ARXIV = {"https://arxiv.org/abs/2410.01380v3", "https://arxiv.org/abs/2406.11813"}
PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + (1024).to_bytes(4, "big") + b"the rest is missing"


def shown(e, digits, sign=""):
    return f"{e['value']:{sign}.{digits}f} [{e['low']:{sign}.{digits}f}, {e['high']:{sign}.{digits}f}]"


@pytest.fixture
def folder(tmp_path):
    """With the files of one figure, in a folder whose name needs quoting."""
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "figure 4a.png").write_bytes(PNG)
    return tmp_path


def test_every_outcome_is_in_the_row_of_its_condition(tmp_path):
    study = a_study()
    main, published, edited, *parts = Page(render(study, tmp_path)).sections["outcomes"]
    assert main[0] == [
        *("condition", "K before", "K after", "A, %", "P before", "P after", "F, %"),
        *("rise of general loss, %", "rise of science loss, %"),
    ]
    for row, c in zip(main[1:], study["conditions"], strict=True):
        o = c["common_start"]
        assert row == [
            c["name"],
            *(shown(o[k], 3) for k in ("K_before", "K_after")),
            shown(o["A"], 2, "+"),
            *(shown(o[k], 4) for k in ("P_before", "P_after")),
            shown(o["F"], 2, "+"),
            *(shown(rise, 2, "+") for rise in o["loss_rise"].values()),
        ]
    for row, c in zip(published[1:], study["conditions"], strict=True):
        o = c["common_start"]
        assert row[1:] == [shown(o[f"K_published_{w}"], 4) for w in ("before", "after")] + [
            shown(o["A_published"], 2, "+")
        ]
    # Of the edited condition alone: its own start is another.
    [row] = edited[1:]
    own = study["conditions"][3]["outcomes"]
    assert row[:3] == ["last, q1", shown(own["K_before"], 3), shown(own["A"], 2, "+")]
    for name, digits, sign, found in zip(("A", "K_after", "K_before"), (2, 3, 3), ("+", "", ""), parts):
        assert found[0][1:] == ["paraphrase", "once", "memorization", "semantic", "composition"]
        for row, c in zip(found[1:], study["conditions"], strict=True):
            of_parts = [*c["by_setting"].values(), *c["by_kind"].values()]
            assert row == [c["name"], *(shown(part[name], digits, sign) for part in of_parts)]


def test_seeds_and_their_spread_have_tables_of_their_own(tmp_path):
    study = a_study(seeds=2, learning=2)
    study["conditions"][1]["seeds"].pop()  # a run is missing
    study["conditions"][1]["per_seed"] = {k: v[:-1] for k, v in study["conditions"][1]["per_seed"].items()}
    *_, accuracy, runs, spread, of_differences = Page(render(study, tmp_path)).sections["outcomes"]
    assert runs[0] == ["condition", "seed", "A, %", "K after"]
    expected = [
        [c["name"], str(study["seeds"][k][j]), f"{c['per_seed']['A'][n]:+.2f}", f"{c['per_seed']['K_after'][n]:.3f}"]
        for c in study["conditions"]
        for n, (k, j) in enumerate(c["seeds"])
    ]
    assert runs[1:] == expected and len(expected) == 6 * 4 - 1
    assert spread[0][1:] == [
        "A, %: between pretrainings",
        "K after: between pretrainings",
        "K after: between seeds of continual learning",
    ]
    assert spread[1][1:] == ["0.7310", "0.0512", "0.0200"]
    assert of_differences[0] == ["difference", "between pretrainings", "between seeds of continual learning"]
    assert [row[1:] for row in of_differences[1:]] == [["0.3450", "-"]] * 3
    assert "of guessing it is 0.2500" in render(study, tmp_path)
    assert accuracy[1][1] == "+0.060 → +0.030"


def test_entropies_have_a_table_a_kind_and_their_layers(tmp_path):
    study = a_study()
    tables = Page(render(study, tmp_path)).sections["entropy"]
    assert len(tables) == 4  # two kinds
    for number, e in enumerate(study["entropies"]):
        of_kind, layers = tables[2 * (number // 4) : 2 * (number // 4) + 2]
        name = e["start"] + (f", {e['intervention']}" if e["intervention"] != "none" else "")
        seeds = ", ".join(f"{h:.4f}" for h in e["per_seed"])
        row = [name, str(e["step"]), shown(e["H"], 4), "0.0123", shown(e["attention"], 4), "0.4560 ± 0.0021", seeds]
        assert of_kind[1 + number % 4] == row
        assert layers[1 + number % 4] == [name, *(f"{h:.4f}" for h in e["layers"])]
    deep = Page(render(a_study(layers=32), tmp_path)).sections["entropy"][1]
    assert deep[0] == ["layer", "early", "middle", "last", "last, q1"] and len(deep) == 33


def test_directions_have_verdicts_and_the_differences_of_seeds(tmp_path):
    study = a_study()
    [found] = Page(render(study, tmp_path)).sections["findings"]
    (first, second, third) = found[1:]
    assert first[0].split("\n")[1] == "A: last minus early (points), expected below 0"
    assert second[0].split("\n")[1] == "rise of general loss: last minus early, expected below 0"
    assert [row[1] for row in (first, second)] == [shown(d, 2, "+") for d in study["directions"][:2]]
    assert third[1] == "-0.012 [-0.032, +0.008]"  # two digits of the half-width
    for row, d in zip(found[1:], study["directions"], strict=True):
        assert row[2].split()[: len(d["verdict"].split())] == d["verdict"].split()
    assert "by seed: -2.34, -2.33, -2.32" in " ".join(first[2].split())


def test_one_run_gives_no_verdict_and_is_named_as_what_it_is(tmp_path):
    text = " ".join(render(a_study(seeds=1), tmp_path).split())
    assert text.count('<span class="none">one run; not a verdict</span>') == 3
    assert "the interval is over the entries and instances of one run" in text and "by seed:" not in text
    assert "<b>seen</b>" not in text
    assert "the interval is over the entries and instances of one run" not in render(a_study(), tmp_path)


def test_tables_and_correlations_are_those_of_study_json(tmp_path):
    study = a_study()
    constant = {"value": None, "low": None, "high": None}
    study["joined"]["correlations"].append({**study["joined"]["correlations"][0], "pearson": constant})
    page = Page(render(study, tmp_path))
    [table] = page.sections["tables"]
    assert table == [
        ["measure", "here", "published", "note"],
        ["A %", "25.20 [24.80, 25.60]", "25.20", "-"],
        ["F %", "10.50 [8.50, 12.50]", "10.50", "a text"],
    ]
    points, correlations, effects = page.sections["joined"]
    assert [row[0] for row in points[1:]] == [c["name"] for c in study["conditions"]]
    assert points[1][1:] == ["13.1000", "+23.50"]
    assert len(correlations) == 2  # one of them is constant
    assert correlations[1] == ["H with A", "starts", "6", "3", "+0.61 [+0.31, +0.91]", "+0.50 [+0.10, +0.90]", "+0.94"]
    assert effects == [
        ["start, setting", "intervention", "H", "A, %", "rise of general loss, %"],
        ["last, setting a", "q1", "-0.0254 [-0.0294, -0.0214]", "+1.25 [+0.75, +1.75]", "-1.50 [-1.75, -1.25]"],
    ]
    assert "Six points share a trend." in render(study, tmp_path)


def test_figures_are_inside_with_links_to_their_files(folder):
    study = a_study()
    files = [f"figures/figure 4a.{suffix}" for suffix in ("png", "pdf", "csv")]
    study["figures"] = [
        {"name": "figure_4a", "title": "A and F by start", "caption": "With intervals.", "files": files},
        {"name": "figure_2", "title": "H", "caption": "Both sizes.", "files": [], "missing": "no entropy of 7B"},
    ]
    text = render(study, folder)
    page = Page(text)
    [image] = page.images
    assert base64.b64decode(image["src"].removeprefix("data:image/png;base64,")) == PNG
    assert image["width"] == "640"
    assert image["alt"] == "A and F by start: With intervals."
    assert [unquote(href) for href in page.links if "figures/" in href] == files
    assert "Not drawn: no entropy of 7B" in text


def test_a_failed_stage_is_named_first_with_its_log(tmp_path):
    study = a_study(failed=True)
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "entropy 0.log").write_text("error: load_path")
    report = {**study["stages"][0], "name": "the report", "kind": "report", "state": "running", "command": ["x"]}
    study["stages"].append(report)  # this page is written before that stage has finished
    text = render(study, tmp_path)
    top = text[: text.index('id="findings"')]
    assert "exit status 1: error: load_path: /no/such/folder does not exist" in top
    assert 'href="stages/entropy%200.log"' in top and "H of early, seed 0</b>: failed" in top
    assert "<b>Not run</b>: H of early, seed 2</p>" in top and "the report" not in top
    assert text.count("stages/") == 2  # other logs do not exist
    assert "last, q1, seed 2: runs/baseline/last/q1/seed2 has no run" in top
    assert "problems" not in Page(render(a_study(), tmp_path)).sections
    several = render({**study, "missing": [f"entropy {n}" for n in range(33)], "warnings": ["a warning"]}, tmp_path)
    assert "a warning" in several and "entropy 28<" in several and "entropy 29<" not in several
    assert "and 4 more, in study.json" in several


def test_commands_can_be_pasted_into_a_shell(tmp_path):
    study = a_study()
    found = Page(render(study, tmp_path)).pre
    assert len(found) == len(study["stages"])
    words = subprocess.run(["bash", "-c", f"printf '%s\\n' {found[0]}"], capture_output=True, text=True, check=True)
    assert words.stdout.splitlines() == ["python", "-m", "scripts.train", *LONG]
    text = " ".join(render(study, tmp_path).split())
    assert "6:07 in all stages together, at most 1,234 MiB in one" in text and "1:01, 1,234 MiB" in text


def test_no_secret_of_a_command_is_shown(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret_of_mine")
    study = a_study()
    study["stages"][0]["command"] += ["--token=hf_secret_of_mine", "--url=https://me:pass@host/x"]
    text = render(study, tmp_path)
    assert "hf_secret_of_mine" not in text and "pass@" not in text and "$HF_TOKEN" in text


def test_a_study_of_entropy_alone(tmp_path):
    study = {**a_study(), "conditions": [], "directions": [], "tables": [], "joined": None}
    study |= {"notes": [], "effects": [], "scores": {"head": [], "rows": []}}
    page = Page(render(study, tmp_path))
    assert list(page.sections) == [
        *("conclusions", "design", "entropy", "definitions", "commands", "environment"),
    ]


@pytest.mark.parametrize("forms", [{}, {"failed": True, "settings": 2}, {"seeds": 1}, {"about": "checkpoint"}], ids=str)
def test_contents_link_to_every_section_and_nothing_is_fetched(forms, tmp_path):
    text = render(a_study(**forms), tmp_path)
    page = Page(text)
    ids = [value for _, name, value in page.attributes if name == "id"]
    inside = [href[1:] for href in page.links if href.startswith("#")]
    assert len(set(ids)) == len(ids) and inside == list(page.sections) == [i for i in TITLES if i in ids]
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    fetched = ("src", "srcset", "action", "data", "poster", "background", "style")
    assert all(value.startswith("data:") for _, name, value in page.attributes if name in fetched)
    assert not re.search(r"url\(|@import", text)
    assert {href for href in page.links if ":" in href} == ARXIV


def test_no_name_reaches_the_page_as_markup(tmp_path):
    hostile = "\"'><script>alert(1)</script><a href='javascript:x'>"

    def spoil(value, key=""):
        if isinstance(value, dict):
            named = key in ("interventions", "settings", "per_seed", "by_setting", "loss_rise", "breadth", "versions")
            return {f"{k}{hostile}" if named else k: spoil(v, k) for k, v in value.items()}
        if isinstance(value, list):
            return [spoil(item, key) for item in value]
        return value + hostile if isinstance(value, str) and key not in ("state", "about") else value

    text = render(spoil(a_study(failed=True)), tmp_path)
    assert text.count("&lt;script&gt;alert(1)") > 100
    page = Page(text)
    assert "script" not in page.tags and not any(name.startswith("on") for _, name, _ in page.attributes)
    assert {href for href in page.links if ":" in href} == ARXIV


@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
def test_nothing_is_cut_or_covered_at_1280_and_390_pixels(tmp_path):
    study = a_study(failed=True, settings=5, learning=2, layers=32)
    long = "a_name_without_any_space_" * 12
    study["title"] += long
    study["conditions"][2]["name"] = long
    study["stages"][1]["reason"] = long
    study["missing"] = [f"{long}{long}"]
    study["directions"][0] |= {"claim": long, "per_seed": [1.25] * 40}
    study["settings"][long] = {"overrides": {"data.paths": [long]}}
    study["environment"]["platform"] = long
    study["tables"][0]["rows"][0][3] = long
    page = broken = render(study, tmp_path)
    for rule, other in (
        ("overflow-wrap:anywhere", ""),
        (".scroll{overflow-x:auto", ".scroll{"),
        ("h3{", "h3{position:relative;top:-9em;"),
    ):
        assert rule in broken
        broken = broken.replace(rule, other)
    *sound, wide, narrow = lay_out([page, broken], (1280, 390), tmp_path)
    for found in sound:
        assert found["scroll"] <= found["width"]
        assert (found["cut"], found["spilled"], found["covered"]) == ([], [], 0)
    for found in (wide, narrow):  # the measure finds what it is for
        assert found["scroll"] > found["width"]
        assert found["cut"] and found["spilled"] and found["covered"]


def test_the_study_is_not_changed(tmp_path):
    study = a_study(failed=True)
    before = copy.deepcopy(study)
    render(study, tmp_path)
    assert study == before and set(EDITS) == set(study["interventions"])
