"""study.json: read from the files of the runs, and equal to direct computations."""

import json
import shutil

import numpy as np
import pandas
import pytest

from tests.run_folders import direct_k, write_injections
from tests.study import ALIKE, LOSSES, PAPER, STEPS, make_plan

SEEDS = range(2)


def direct_published(table: pandas.DataFrame) -> float:
    """K on the paper's scale (method.md, section 4): sums over padded positions, settings weighted by their entries."""
    table = table.assign(diluted=table.sum_log_prob / table.positions)
    by_setting = [
        (part.groupby("kind").diluted.mean().mean(), part.entry.nunique()) for _, part in table.groupby("setting")
    ]
    return sum(k * entries for k, entries in by_setting) / sum(entries for _, entries in by_setting)


def runs_of(condition: dict) -> list[str]:
    return [f"runs/baseline/{condition['start']}/{condition['intervention']}/seed{seed}" for seed in SEEDS]


def tables(planted, condition: dict, step: int | str) -> list[pandas.DataFrame]:
    name = f"{step}" if isinstance(step, str) else f"step{step}"
    return [pandas.read_parquet(planted / run / "probes" / f"{name}.parquet") for run in runs_of(condition)]


def test_outcomes_equal_direct_computations_from_the_files(planted, found):
    assert [c["name"] for c in found["conditions"]] == [
        *("early", "middle", "last", "last, q1", "last, q2"),
        "last, control",
    ]
    for condition in found["conditions"]:
        before, after = (np.mean([direct_k(t) for t in tables(planted, condition, step)]) for step in (0, 150))
        outcomes = condition["outcomes"]
        assert (outcomes["K_before"]["value"], outcomes["K_after"]["value"]) == pytest.approx((before, after))
        assert outcomes["A"]["value"] == pytest.approx(100 * (after - before) / abs(before))
        assert outcomes["F"]["value"] == pytest.approx(100 * (0.41 - 0.375) / 0.41)
        assert (outcomes["P_before"]["value"], outcomes["P_after"]["value"]) == pytest.approx((0.41, 0.375))
        assert condition["step"] == STEPS[condition["start"]] and condition["model"] == "pretraining"
        for setting, of_setting in condition["by_setting"].items():
            ends = [
                t[t.setting == setting].groupby("entry").mean_log_prob.mean() for t in tables(planted, condition, 150)
            ]
            assert of_setting["K_after"]["value"] == pytest.approx(np.mean(ends))
        for kind, of_kind in condition["by_kind"].items():
            ends = [direct_k(t[t.kind == kind]) for t in tables(planted, condition, 150)]
            assert of_kind["K_after"]["value"] == pytest.approx(np.mean(ends))
    assert found["entries"] == {"paraphrase": 8, "once": 12}
    assert found["missing"] == [] and found["warnings"] == []


def test_edited_runs_are_measured_from_the_start_that_they_share(planted, found):
    by_name = {c["name"]: c for c in found["conditions"]}
    for name in ("last, q1", "last, q2"):
        condition, plain = by_name[name], by_name["last"]
        assert condition["common_start"]["K_before"]["value"] == pytest.approx(plain["outcomes"]["K_before"]["value"])
        original = np.mean([direct_k(t) for t in tables(planted, condition, "original")])
        after = np.mean([direct_k(t) for t in tables(planted, condition, 150)])
        assert condition["common_start"]["A"]["value"] == pytest.approx(100 * (after - original) / abs(original))
        # By construction the edit loses 0.4 at once: from the edited weights every run seems to have learned more.
        assert condition["outcomes"]["A"]["value"] > condition["common_start"]["A"]["value"] + 3
        rise, own = (condition[key]["loss_rise"]["general"]["value"] for key in ("common_start", "outcomes"))
        assert own < 0 < rise
    for name in ("early", "last, control"):
        assert by_name[name]["common_start"] == by_name[name]["outcomes"]


def test_every_seed_has_its_numbers(planted, found):
    for condition in found["conditions"]:
        ends = [direct_k(t) for t in tables(planted, condition, 150)]
        assert condition["per_seed"]["K_after"] == pytest.approx(ends)
        assert condition["outcomes"]["K_after"]["value"] == pytest.approx(np.mean(ends))
        assert condition["per_seed"]["K_published_after"] == pytest.approx(
            [direct_published(t) for t in tables(planted, condition, 150)]
        )
        edited = condition["intervention"].startswith("q")
        before = [direct_k(t) for t in tables(planted, condition, "original" if edited else 0)]
        assert condition["per_seed"]["A"] == pytest.approx([100 * (b - a) / abs(a) for a, b in zip(before, ends)])
        ends = [pandas.read_parquet(planted / r / "losses" / "step150.parquet") for r in runs_of(condition)]
        rises = [100 * (t[t.label == "general"].loss.mean() / LOSSES.mean() - 1) for t in ends]
        assert condition["per_seed"]["loss_rise.general"] == pytest.approx(rises)
        assert condition["seeds"] == [[0, 0], [1, 0]]


def test_curves_are_means_over_the_seeds(planted, found):
    for condition in found["conditions"]:
        assert [point["step"] for point in condition["curve"]] == [0, 150]
        ends = [direct_k(t) for t in tables(planted, condition, 150)]
        assert condition["curve"][1]["K"] == pytest.approx(np.mean(ends))
        assert condition["injections"] == ([] if condition["intervention"] == "control" else [75, 150])


def test_entropies_are_means_over_pretrainings(planted, found):
    rows = found["entropies"]
    assert [(r["start"], r["intervention"]) for r in rows] == [
        *(("early", "none"), ("middle", "none"), ("last", "none")),
        *(("last", "q1"), ("last", "q2")),
    ]
    for row, key in zip(rows, ("early", "middle", "last", "last_q1", "last_q2")):
        files = [planted / f"entropy/text/abs/seed{s}/{key}/knowledge_entropy.json" for s in SEEDS]
        results = [json.loads(file.read_text()) for file in files]
        assert row["per_seed"] == [r["knowledge_entropy"] for r in results]
        assert row["H"]["value"] == pytest.approx(np.mean(row["per_seed"]))
        assert row["layers"] == pytest.approx(np.mean([r["layers"] for r in results], axis=0))
        assert row["H_last_layer"]["value"] == pytest.approx(row["layers"][-1])
        # Jackknife over groups of instances, the same groups of both pretrainings together.
        left_out = np.mean([np.sum(r["leave_one_group_out"], axis=1) for r in results], axis=0)
        error = np.sqrt(63 / 64 * ((left_out - left_out.mean()) ** 2).sum())
        assert row["standard_error"] == pytest.approx(error)
        # Half the difference of the two: what instances do to one of them alone, which the seeds' spread contains.
        alone = np.diff([np.sum(r["leave_one_group_out"], axis=1) for r in results], axis=0)[0] / 2
        squared = error**2 - 63 / 64 * ((alone - alone.mean()) ** 2).sum()
        half = np.hypot(1.96 * np.sqrt(squared), 12.706 * np.std(row["per_seed"], ddof=1) / np.sqrt(2))
        assert row["H"]["high"] - row["H"]["value"] == pytest.approx(half)
        assert row["step"] == STEPS[row["start"]] and row["attention"] is None


def test_a_stage_that_failed_leaves_out_what_it_makes(tmp_path, planted, gathered):
    folder = shutil.copytree(planted, tmp_path / "study")
    shutil.rmtree(folder / "runs/baseline/middle/none/seed1")
    shutil.rmtree(folder / "runs/baseline/last/q1")
    (folder / "entropy/text/abs/seed1/early/knowledge_entropy.json").unlink()
    plan = json.loads((folder / "plan.json").read_text())
    plan["stages"].append(
        {
            "name": "train last, q2",
            "kind": "train",
            "command": [],
            "state": "failed",
            "reason": "status 1",
            "log": "l.log",
        }
    )
    for run in plan["conditions"][4]["runs"]:
        run["stage"] = "train last, q2"  # half a run is no run
    (folder / "plan.json").write_text(json.dumps(plan))
    found = gathered(folder)
    assert [c["name"] for c in found["conditions"]] == ["early", "middle", "last", "last, control"]
    assert found["conditions"][1]["seeds"] == [[0, 0]]
    lines = found["missing"]
    assert len(lines) == 6 and "early, none" in lines[0] and "no knowledge_entropy.json" in lines[0]
    assert lines[1].startswith("condition middle, runs/baseline/middle/none/seed1: ")
    assert [line.startswith("condition last, q1, ") for line in lines[2:4]] == [True, True]
    assert lines[4].endswith("its stage train last, q2 is failed: status 1 (l.log)")
    verdicts = {d["claim"]: d for d in found["directions"]}
    for factor in (1, 2):
        lost = verdicts[f"q = {factor} ends with more knowledge"]
        assert (lost["verdict"], lost["value"]) == ("not measured", None)
    assert verdicts["The middle one ends with more than the last one"]["seeds"] == 1
    json.dumps(found, allow_nan=False)


def test_a_run_without_evaluations_is_missing_and_no_reason_for_no_report(tmp_path, planted, gathered):
    """One whose configuration has no probes, and one that diverged."""
    folder = shutil.copytree(planted, tmp_path / "study")
    none, diverged = (folder / f"runs/baseline/{start}/none/seed1/probes" for start in ("early", "middle"))
    shutil.rmtree(none)
    table = pandas.read_parquet(diverged / "step150.parquet").assign(mean_log_prob=np.nan)
    table.to_parquet(diverged / "step150.parquet")
    found = gathered(folder)
    assert [c["seeds"] for c in found["conditions"][:3]] == [[[0, 0]], [[0, 0]], [[0, 0], [1, 0]]]
    assert "0 evaluation(s) with probes" in found["missing"][0] and "early" in found["missing"][0]
    assert "no evaluation after step 0 has the same probes" in found["missing"][1]


def test_the_same_run_twice_and_damaged_files_are_one_line(tmp_path, planted, gathered):
    folder = shutil.copytree(planted, tmp_path / "study")
    runs = folder / "runs/baseline/early/none"
    shutil.rmtree(runs / "seed1")
    shutil.copytree(runs / "seed0", runs / "seed1")
    with pytest.raises(ValueError, match=r"early/none/seed1 has exactly the metrics of .*early/none/seed0: they are"):
        gathered(folder)
    shutil.rmtree(runs / "seed1")
    place = folder / "entropy/text/abs/seed0/early/knowledge_entropy.json"
    for content, reason in (("{", "knowledge_entropy.json: "), ('{"layers": 1}', "has no knowledge_entropy")):
        place.write_text(content)
        with pytest.raises(ValueError, match=reason) as caught:
            gathered(folder)
        assert "\n" not in str(caught.value)


def test_a_study_of_entropies_alone_and_one_of_a_single_condition(tmp_path, gathered):
    folder = make_plan(tmp_path / "study", {"last": PAPER["last"]}, (1.0, 1.5, 2.0))
    plan = json.loads((folder / "plan.json").read_text())
    plan["directions"] = []
    (folder / "plan.json").write_text(json.dumps(plan))
    assert [c["name"] for c in gathered(folder)["conditions"]] == ["last"]
    (folder / "plan.json").write_text(json.dumps({**plan, "conditions": []}))
    found = gathered(folder)
    assert found["conditions"] == [] and found["entries"] == {} and len(found["entropies"]) == 1


def test_a_model_changed_by_its_configuration_is_measured_from_the_unchanged_start(tmp_path, gathered):
    """An attention temperature leaves no original evaluation: the start is that of the run without it."""
    folder = make_plan(tmp_path / "study", {**ALIKE, "last_q1": (1.5, 0.3)}, (1.0, 1.5, 2.0))
    plan = json.loads((folder / "plan.json").read_text())
    plan["directions"] = []
    plan["interventions"]["q1"] = {"overrides": {"model.temperature_attention": 2.0}}
    for name in ("probes", "losses"):
        (folder / "runs/baseline/last/q1/seed0" / name / "original.parquet").unlink()
    (folder / "plan.json").write_text(json.dumps(plan))
    by_name = {c["name"]: c for c in gathered(folder)["conditions"]}
    changed, plain = by_name["last, q1"], by_name["last"]
    assert changed["common_start"]["K_before"] == plain["outcomes"]["K_before"]
    assert changed["outcomes"]["K_before"]["value"] == pytest.approx(plain["outcomes"]["K_before"]["value"] - 0.4)
    assert (
        changed["outcomes"]["loss_rise"]["general"]["value"]
        < 0
        < (changed["common_start"]["loss_rise"]["general"]["value"])
    )
    plan["conditions"] = [c for c in plan["conditions"] if c["name"] != "last"]
    (folder / "plan.json").write_text(json.dumps(plan))
    found = gathered(folder)
    assert found["warnings"] == [
        "runs/baseline/last/q1/seed0: q1 changes the model at the start, and no run without it from last was found: A "
        "and forgetting are measured from the changed model"
    ]


def test_runs_that_are_no_pair_are_warned_of(tmp_path, planted, gathered):
    folder = shutil.copytree(planted, tmp_path / "study")
    for start, entries in (("early", ["once/0", "once/1"]), ("middle", ["once/0", "once/1"]), ("last", ["once/2"])):
        write_injections(folder / f"runs/baseline/{start}/none/seed0", {75: entries})
    place = "runs/baseline/{}/none/seed0"
    assert gathered(folder)["warnings"] == [
        f"{place.format(one)} and {place.format('last')} are no pair: injected texts differ, first in round 1"
        for one in ("early", "middle")
    ]


def test_measures_of_breadth_are_means_with_errors_over_the_instances_of_all(planted, found):
    for row, key in zip(found["entropies"], ("early", "middle", "last", "last_q1", "last_q2")):
        files = [planted / f"entropy/text/abs/seed{s}/{key}/knowledge_entropy.json" for s in SEEDS]
        of_files = [json.loads(file.read_text())["breadth"]["gini"] for file in files]
        gini = row["breadth"]["gini"]
        assert gini["per_seed"] == [one["value"] for one in of_files] and gini["value"] == np.mean(gini["per_seed"])
        differences = np.mean([one["half_differences"] for one in of_files], axis=0)
        assert gini["standard_error"] == pytest.approx(np.sqrt((differences**2).mean()))


def test_older_results_have_no_breadth(tmp_path, planted, gathered):
    folder = shutil.copytree(planted, tmp_path / "study")
    path = folder / "entropy/text/abs/seed0/early/knowledge_entropy.json"
    result = json.loads(path.read_text())
    del result["breadth"]
    path.write_text(json.dumps(result))
    assert [row["breadth"] is None for row in gathered(folder)["entropies"]] == [True, False, False, False, False]


def test_what_is_unknown_or_not_a_number_is_null(tmp_path, planted, gathered):
    """A start whose step is unknown, and a change in percent of 0."""
    folder = shutil.copytree(planted, tmp_path / "study")
    plan = json.loads((folder / "plan.json").read_text())
    plan["starts"][0]["step"] = -1
    (folder / "plan.json").write_text(json.dumps(plan))
    table = folder / "runs/baseline/early/none/seed1/probes/step0.parquet"
    pandas.read_parquet(table).assign(mean_log_prob=0.0).to_parquet(table)
    found = gathered(folder)
    json.dumps(found, allow_nan=False)
    early = found["conditions"][0]
    assert early["step"] is None and found["starts"][0]["step"] is None
    assert early["per_seed"]["A"][1] is None and early["per_seed"]["K_before"][1] == 0
    assert "A" not in found["joined"]["points"][0] and "A" in found["joined"]["points"][1]
