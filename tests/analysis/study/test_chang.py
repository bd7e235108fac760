"""Chang et al.'s figures of a study, from run folders to files: three settings, two seeds a condition."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from analysis import estimates
from analysis.rows import as_csv
from analysis.study.figures import registry
from analysis.study.figures.choice import Lacking
from analysis.study.gather import gather
from analysis.study.plan_file import read_plan
from tests.run_folders import KINDS, probe_table, write_injections, write_run
from tests.study import PAPER, make_plan

ROUNDS = (3, 8, 13)
SETTINGS = ("paraphrase", "once", "duplicate")
GAIN = {"paraphrase": 1.0, "once": 0.5, "duplicate": 2.0}
SETTINGS_OF_FIT = {"window": 4, "outlier_factor": 0.0, "fit_range": "1-6"}
NAMES = ("chang_probes", "chang_effectivity", "chang_retainability", "chang_retainability_tokens")


def write(folder: Path, slope: float, seed: int) -> None:
    """Every injection adds a gain at once, of which a share 1 - slope * log10 t is left t steps later; all once texts
    enter in the first round. Evaluated at every step."""
    shutil.rmtree(folder)
    level = {s: np.full(3, -6.0 - 0.1 * seed) for s in SETTINGS}
    tables = {}
    for step in range(21):
        rises = {
            s: sum(GAIN[s] * (1 - slope * np.log10(max(step - r, 1))) for r in rounds_of(s) if step >= r)
            for s in SETTINGS
        }
        tables[step] = probe_table({s: level[s] + rises[s] for s in SETTINGS}, per_kind=2)
    write_run(folder, tables, injections=ROUNDS)
    write_injections(folder, {r: [f"{s}/{n}" for s in SETTINGS for n in range(3) if r in rounds_of(s)] for r in ROUNDS})
    (folder / "config.yaml").write_text(
        "{load_path: x/step90, reset_trainer_state: true, global_train_batch_size: 4, model: {max_sequence_length: 8}, "
        f"probing: {{steps: 5, interval: 1}}, seed: {seed}}}\n"
    )


def rounds_of(setting: str) -> tuple[int, ...]:
    return ROUNDS[:1] if setting == "once" else ROUNDS


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("chang") / "study"
    make_plan(folder, {key: PAPER[key] for key in ("early", "last")}, (1.0, 1.5, 2.0), seeds=2)
    plan = json.loads((folder / "plan.json").read_text())
    for condition in plan["conditions"]:
        for run in condition["runs"]:
            write(folder / run["folder"], {"early": 0.2, "last": 0.4}[condition["start"]], run["pretraining"])
    (folder / "plan.json").write_text(json.dumps({**plan, "directions": [], "acquisition": SETTINGS_OF_FIT}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimates, "RESAMPLES", 200)
        patch.setattr(estimates, "BAND_RESAMPLES", 20)
        return gather(read_plan(folder))


def test_all_three_settings_reach_the_files(found, tmp_path, monkeypatch):
    tables = {}

    def save(figure: Figure, stem: Path, rows: list[dict]) -> None:  # to render them takes most of the time
        tables[stem.name] = list(csv.DictReader(io.StringIO(as_csv(rows))))

    monkeypatch.setattr(registry, "save", save)
    drawn = registry.draw_all(found, NAMES, tmp_path)
    assert [row["files"] for row in drawn] == [[f"figures/{n}{s}" for s in (".png", ".pdf", ".csv")] for n in NAMES]
    for name in NAMES:
        kinds = {(row["run"], row["setting"], row["kind"]) for row in tables[name]}
        assert kinds == {(run, s, kind) for run in ("early", "last") for s in SETTINGS for kind in KINDS}, name
    for row in tables["chang_effectivity"]:
        injection = int(row["injection"])
        assert injection <= len(rounds_of(row["setting"]))
        if injection == 1:  # the maximum is at once: later injections also add what had been forgotten before
            assert float(row["mean"]) == pytest.approx(GAIN[row["setting"]])
    once = [r for r in tables["chang_retainability"] if r["setting"] == "once"]
    assert {round(float(row["a"]), 6) for row in once if row["run"] == "early"} == {0.2}
    assert {round(float(row["a"]), 6) for row in once if row["run"] == "last"} == {0.4}
    assert float(once[0]["mean"]) == pytest.approx(1) and {row["R^2"][:4] for row in once} <= {"1.0", "0.99"}
    tokens = [int(r["tokens"]) for r in tables["chang_retainability_tokens"]]
    assert tokens == [32 * int(r["steps"]) for r in tables["chang_retainability"]]
    change = [r for r in tables["chang_probes"] if (r["run"], r["setting"], r["kind"]) == ("last", "once", "semantic")]
    assert [r["step"] for r in change if r["is injection"] == "True"] == [str(step) for step in ROUNDS]
    assert float(change[3]["change"]) == pytest.approx(0.5)


def test_effectivity_and_retainability_are_measured_as_the_study_sets(found):
    for condition in found["conditions"]:
        of = condition["dynamics"]
        assert (of["window"], of["outlier_factor"], of["fit_range"]) == (4, 0.0, [1, 6.0])


def test_k_and_a_of_all_three_settings(found):
    for condition in found["conditions"]:
        assert list(condition["by_setting"]) == list(SETTINGS)
        for part in condition["by_setting"].values():
            assert part["A"]["value"] > 0 and part["A_published"]["value"] > 0


def test_without_probes_around_injections_what_is_missing_is_named(found):
    without = {**found, "conditions": [{**c, "dynamics": None} for c in found["conditions"]]}
    for name in NAMES[1:]:
        with pytest.raises(Lacking, match="probes scored around injections"):
            registry.FIGURES[name].draw(without)
    no_size = {**found, "conditions": [{**c, "tokens_per_step": None} for c in found["conditions"]]}
    with pytest.raises(Lacking, match=r"batch size and length in their config\.yaml"):
        registry.FIGURES["chang_retainability_tokens"].draw(no_size)
