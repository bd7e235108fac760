"""The report's numbers: read from the files of the runs, and equal to direct computations."""

import numpy as np
import pandas
import pytest

from analysis import page as report_page
from analysis.outcomes import acquired
from analysis.runs import read_run
from analysis.study.demo import gather
from tests.run_folders import direct_k
from tests.study import LOSSES, PAPER, STEPS, make_study

pytestmark = pytest.mark.usefixtures("few_resamples")


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
    a = {key: condition["common_start"]["A"]["value"] for key, condition in saved["conditions"].items()}
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
    text = report_page.render(found, figures_of_study)
    assert "3 seed(s)" in text and "entries, instances and seeds" in text
    assert "entries and instances of one run" not in text
