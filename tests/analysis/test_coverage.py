"""What `python -m tests.coverage` prints, over fewer studies: intervals contain the truth, and verdicts are right, as
often as they should."""

from collections import Counter

import numpy as np
import pytest

from analysis import estimates
from tests.coverage import MEASURES, SHAPES, VARIANCES, VERDICTS, coverage, planted

STUDIES = 100
SEEN, OPPOSITE, NOISE = VERDICTS


@pytest.fixture(autouse=True)
def _fewer_resamples(monkeypatch):
    monkeypatch.setattr(estimates, "RESAMPLES", 400)


@pytest.mark.parametrize(
    ("name", "entries", "shape", "low", "high"),
    [
        ("entries only", (20, 20), "normal", 91.5, 99),  # 20 entries need more than the percentiles of a bootstrap
        ("an entry in a run alone", (60, 130), "normal", 91.5, 98.2),  # would be counted twice
        ("mostly repetitions", (60, 130), "normal", 91.5, 99),  # a normal distribution would leave 80
        ("two levels of seeds", (60, 130), "normal", 91.5, 99),  # three pretrainings are not six
        ("comparable", (20, 130), "skewed", 90, 99),
        ("comparable", (20, 130), "heavy tails", 90, 99),
    ],
)
def test_intervals_contain_the_truth_as_often_as_they_should(name, entries, shape, low, high):
    """Over 400 studies, of 3 and 5 repetitions, whose share has a standard deviation of 1.1 % at 95 %."""
    generator, hits = np.random.default_rng(0), Counter()
    for repetitions in (3, 5):
        for count in entries:
            hits += coverage(generator, STUDIES, VARIANCES[name], repetitions, count, SHAPES[shape])
    found = {measure: 100 * hits["ours", measure] / STUDIES / 4 for measure in MEASURES}
    assert all(low <= share <= high for share in found.values()), found


@pytest.mark.parametrize("name", ["comparable", "mostly repetitions", "two levels of seeds"])
def test_planted_effects_get_their_verdicts(name):
    """Without an effect 5 % of the verdicts differ from noise, half of them the opposite; of 300 studies 9 % and 5.2 %
    leave three standard deviations. A large effect is seen nearly always, and neither is the opposite."""
    generator, studies = np.random.default_rng(0), 150
    without, small, large = Counter(), Counter(), Counter()
    for repetitions in (3, 5):
        for found, effect in ((without, 0.0), (small, 0.2), (large, 8.0)):
            for of_measure in planted(generator, studies // 2, VARIANCES[name], repetitions, effect).values():
                found += of_measure
    total = 2 * studies
    assert without.total() == small.total() == large.total() == total
    assert without[SEEN] + without[OPPOSITE] <= 0.09 * total and without[OPPOSITE] <= 0.052 * total
    assert small[OPPOSITE] <= 0.052 * total and small[NOISE] > 0
    assert large[SEEN] >= 0.97 * total and large[OPPOSITE] == 0
