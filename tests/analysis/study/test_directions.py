"""Directions of a plan: each is the difference that it names, over the seeds that both conditions have."""

import json
import re
import shutil

import numpy as np
import pandas
import pytest

from tests.run_folders import direct_k
from tests.study import LOSSES


def ends(planted, condition: str, seed: int) -> tuple[float, float]:
    """K after training and the held-out loss."""
    start, _, intervention = condition.partition(", ")
    run = planted / "runs/baseline" / start / (intervention or "none") / f"seed{seed}"
    losses = pandas.read_parquet(run / "losses/step150.parquet")
    return direct_k(pandas.read_parquet(run / "probes/step150.parquet")), losses[losses.label == "general"].loss.mean()


def first_k(planted, seed: int) -> float:
    return direct_k(pandas.read_parquet(planted / f"runs/baseline/early/none/seed{seed}/probes/step0.parquet"))


def test_every_direction_is_the_difference_that_it_names(planted, found):
    for direction in found["directions"]:
        differences = []
        for seed in range(2):
            if direction["measure"] == "H":
                files = [planted / f"entropy/text/abs/seed{seed}/{direction[e]}" for e in ("from", "to")]
                one, other = (json.loads((f / "knowledge_entropy.json").read_text()) for f in files)
                differences.append(other["knowledge_entropy"] - one["knowledge_entropy"])
                continue
            one, other = (ends(planted, direction[end], seed) for end in ("from", "to"))
            scale = {"A": 100 / abs(first_k(planted, seed)), "K_after": 1, "loss_rise.general": 100 / LOSSES.mean()}
            place = int(direction["measure"].startswith("loss"))
            differences.append((other[place] - one[place]) * scale[direction["measure"]])
        assert direction["per_seed"] == pytest.approx(differences)
        assert direction["value"] == pytest.approx(np.mean(differences), rel=1e-3)
        assert direction["seeds"] == 2
    units = {"H": "nats", "A": "points", "K_after": "", "loss_rise.general": "points"}
    assert all(d["unit"] == units[d["measure"]] for d in found["directions"])


@pytest.fixture
def directed(tmp_path, planted, gathered):
    """Directions found with others than the plan's."""

    def of(*directions: tuple[str, str, str]) -> list[dict]:
        folder = tmp_path / "study"
        if not folder.exists():
            shutil.copytree(planted, folder)
        plan = json.loads((planted / "plan.json").read_text())
        plan["directions"] = [
            {"claim": "C", "measure": measure, "from": one, "to": other, "expected": "above"}
            for measure, one, other in directions
        ]
        (folder / "plan.json").write_text(json.dumps(plan))
        return gathered(folder)["directions"]

    return of


def test_parts_layers_and_accuracies_are_measures(directed, found):
    names = ("early", "last")
    a, k, last, f, loss, p, scaled, none, gone = directed(
        ("A.once", *names),
        ("K_after.semantic", *names),
        ("H_last_layer", "early", "last, q1"),
        ("F", *names),
        ("loss_rise.science", *names),
        ("P_after", *names),
        ("A_published.once", *names),
        ("attention", *names),
        ("loss_rise.absent", *names),
    )
    one, other = ({c["name"]: c for c in found["conditions"]}[name] for name in names)
    assert a["value"] == pytest.approx(
        other["by_setting"]["once"]["A"]["value"] - one["by_setting"]["once"]["A"]["value"], rel=1e-3
    )
    assert k["value"] == pytest.approx(
        other["by_kind"]["semantic"]["K_after"]["value"] - one["by_kind"]["semantic"]["K_after"]["value"]
    )
    assert scaled["value"] == pytest.approx(
        other["by_setting"]["once"]["A_published"]["value"] - one["by_setting"]["once"]["A_published"]["value"],
        rel=1e-3,
    )
    assert scaled["unit"] == "points" and scaled["value"] != a["value"]
    layers = {(r["start"], r["intervention"]): r["layers"][-1] for r in found["entropies"]}
    assert last["value"] == pytest.approx(layers["last", "q1"] - layers["early", "none"])
    assert (
        f["value"] == pytest.approx(0)
        and p["value"] == pytest.approx(0)
        and loss["value"] == pytest.approx(0, abs=1e-9)
    )
    for lacking in (none, gone):
        assert (lacking["verdict"], lacking["value"], lacking["per_seed"]) == ("not measured", None, [])


@pytest.mark.parametrize(
    ("direction", "expected"),
    [
        (("K_aftr", "early", "last"), "unknown measure 'K_aftr', did you mean 'K_after'?; known: H, "),
        (("A", "erly", "last"), "direction 'C': from: the study has no condition 'erly', did you mean 'early'?"),
        (("A", "last", "last, q3"), "to: the study has no condition 'last, q3', did you mean 'last, q"),
        (("H", "last", "last, control"), "to: the study has no entropy 'last, control'"),
    ],
)
def test_unknown_names_are_errors_with_the_nearest(directed, direction, expected):
    with pytest.raises(ValueError, match=re.escape(expected)):
        directed(direction)
