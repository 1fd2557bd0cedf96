"""Spearman's rank correlation against scipy."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from micota_fast.statistics.ranks import spearman


class TestSpearman:
    @settings(deadline=None)
    @given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=3, max_size=12))
    def test_is_scipys(self, pairs: list[tuple[int, int]]) -> None:
        x, y = ([float(value) for value in side] for side in zip(*pairs, strict=True))
        found = spearman(x, y)
        if len(set(x)) == 1 or len(set(y)) == 1:
            assert found is None
        else:
            assert found == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)

    def test_by_hand(self) -> None:
        # Ranks 1, 2, 3, 4 against 2, 1, 4, 3: 1 - 6 * 4 / (4 * 15).
        assert spearman([1.0, 5.0, 7.0, 100.0], [0.2, 0.1, 0.9, 0.8]) == pytest.approx(0.6)
