"""Intervals cover, tests keep their level, and claims are judged for what is behind them."""

import numpy as np
import pytest
from scipy import stats

from jaxdecoder.ablation import statistics
from jaxdecoder.ablation.statistics import best_on_curve, detectable, estimate, holm


class TestEstimate:
    def test_is_students(self):
        x = np.array([0.3, 0.1, 0.4, 0.1, 0.5])
        found = estimate(x)
        # By hand: mean 0.28, deviation 0.17889, half width 2.776445 x 0.17889 / sqrt(5).
        assert found.mean == pytest.approx(0.28)
        assert found.low == pytest.approx(0.28 - 0.222121, abs=1e-5)
        assert found.high == pytest.approx(0.28 + 0.222121, abs=1e-5)
        assert found.p_value == pytest.approx(2 * stats.t.sf(0.28 / 0.08, 4))
        assert found.effect_size == pytest.approx(0.28 / 0.178885, rel=1e-5)
        assert found.low < found.bootstrap_low < 0.28 < found.bootstrap_high < found.high

    def test_covers_the_truth_as_often_as_it_says(self, monkeypatch):
        # The interval is Student's; these take most of the time.
        monkeypatch.setattr(statistics, "RESAMPLES", 2)
        monkeypatch.setattr(statistics, "detectable", lambda deviation, n, **told: 0.0)
        draw = np.random.default_rng(0)
        samples = draw.normal(0.7, 0.2, size=(300, 5))
        covered = [e.low <= 0.7 <= e.high for e in map(estimate, samples)]
        # 285 expected, with a deviation of 3.8.
        assert 270 <= sum(covered) <= 299

    def test_knows_values_that_are_all_alike(self):
        assert estimate([0.0, 0.0]).p_value == 1.0
        assert estimate([0.5, 0.5, 0.5]).p_value == 0.0
        assert estimate([0.5, 0.5, 0.5]).low == 0.5

    def test_knows_nothing_of_what_is_not_all_known(self):
        found = estimate([0.5, np.nan, 0.5])
        assert found.p_value == 1.0
        assert np.isnan([found.mean, found.low, found.high, found.detectable]).all()

    @pytest.mark.parametrize("values", [[], [1.0]])
    def test_refuses_what_gives_no_interval(self, values):
        with pytest.raises(ValueError, match="two values"):
            estimate(values)


class TestPower:
    def test_is_that_of_the_test(self):
        """The difference said to be seen 80% of the time is, among simulated samples."""
        difference = detectable(0.1, 5)
        draw = np.random.default_rng(1)
        samples = draw.normal(difference, 0.1, size=(4000, 5))
        seen = stats.ttest_1samp(samples, 0.0, axis=1).pvalue < 0.05
        assert seen.mean() == pytest.approx(0.8, abs=0.02)

    @pytest.mark.parametrize("n", [2, 3, 30])
    def test_is_known_for_few_seeds_and_many(self, n):
        difference = detectable(1.0, n)
        critical = stats.t.ppf(0.975, n - 1)
        draw = np.random.default_rng(3)
        samples = draw.normal(difference, 1.0, size=(20_000, n))
        statistic = samples.mean(axis=1) / (samples.std(axis=1, ddof=1) / np.sqrt(n))
        assert np.mean(np.abs(statistic) > critical) == pytest.approx(0.8, abs=0.012)

    def test_grows_with_the_seeds(self):
        assert detectable(0.1, 20) < detectable(0.1, 5) < detectable(0.1, 3)
        assert detectable(0.2, 5) == pytest.approx(2 * detectable(0.1, 5))


class TestHolm:
    def test_is_the_published_rule(self):
        # In order: 0.01 x 4, 0.02 x 3, 0.03 x 2, and never below the one before.
        assert holm([0.03, 0.01, 0.02, 0.5]) == pytest.approx([0.06, 0.04, 0.06, 0.5])
        assert holm([0.6, 0.9]) == [1.0, 1.0]
        assert holm([]) == []

    def test_keeps_the_level_over_a_whole_report(self):
        draw = np.random.default_rng(2)
        wrong = sum(min(holm(draw.uniform(size=8).tolist())) <= 0.05 for _ in range(2000))
        assert wrong / 2000 == pytest.approx(0.05, abs=0.015)


class TestBestOnCurve:
    def test_is_the_vertex_of_a_parabola(self):
        x = np.array([-3.0, -2.0, -1.0, 0.0])
        assert best_on_curve(x, (x + 1.7) ** 2) == pytest.approx(-1.7)

    def test_is_an_end_of_the_grid_where_the_lowest_point_is_one(self):
        x = np.array([1.0, 2.0, 3.0])
        assert best_on_curve(x, x) == 1.0
        assert best_on_curve(x, -x) == 3.0
