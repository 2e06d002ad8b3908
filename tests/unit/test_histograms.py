"""Histograms of what was trained on."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from models.histograms import PARTS, histogram, histograms_of
from models.windows import Floats

NUMBERS = st.lists(st.floats(-5, 5) | st.sampled_from([np.nan, np.inf, -np.inf, 0.0, 1.0]), max_size=200)


@given(NUMBERS)
def test_each_value_counts_once_in_its_part(numbers: list[float]) -> None:
    values: Floats = np.array(numbers, np.float64)
    found = histogram(values)
    assert sum(found.counts) + found.missing == len(values)
    edges = [-np.inf, *found.edges, np.inf]
    for i, count in enumerate(found.counts):
        low, high = edges[i], edges[i + 1]
        here = (values > low) & (values <= high)
        if i == 0:
            here |= values == -np.inf
        assert count == here.sum()
    assert found.edges == sorted(set(found.edges)) and len(found.edges) <= PARTS


def test_parts_have_about_as_many_values_each() -> None:
    found = histogram(np.random.default_rng(1).normal(size=10_000))
    assert found.counts == [500] * PARTS + [0]


def test_what_is_one_value_has_one_edge() -> None:
    assert histogram(np.zeros(7)).counts == [7, 0]
    assert histogram(np.full(3, np.nan)).counts == [0]


def test_each_feature_has_one_and_so_has_the_score() -> None:
    found = histograms_of(
        ["a", "b"], np.array([[1.0, np.nan], [2.0, 5.0]]), np.array([0.5, 0.25], np.float32)
    )
    assert found.features["b"].missing == 1
    assert found.features["a"].edges == [1, 2] and found.score.edges == [0.25, 0.5]
