"""How a number was spread in training: what drift is measured against later."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from models.windows import Floats

PARTS = 20  # of about as many values each, where values differ enough


class Histogram(msgspec.Struct, frozen=True):
    """counts[i] values are above edges[i - 1] and at most edges[i]; the last ones are above all edges. missing: NaN.

    Infinite values count in the first or the last.
    """

    edges: list[float]
    counts: list[int]
    missing: int


class Histograms(msgspec.Struct, frozen=True):
    """features: by name."""

    features: dict[str, Histogram]
    score: Histogram


def histograms_of(names: Sequence[str], vectors: Floats, scores: npt.NDArray[np.float32]) -> Histograms:
    """vectors: (n, width) of the features with these names; scores: (n,)."""
    features = {name: histogram(vectors[:, i]) for i, name in enumerate(names)}
    return Histograms(features, histogram(scores.astype(np.float64)))


def histogram(values: Floats) -> Histogram:
    """Of values (n,), by edges that each are one of them.

    >>> histogram(np.array([1.0, 1.0, 2.0, np.nan]))
    Histogram(edges=[1.0, 2.0], counts=[2, 1, 0], missing=1)
    """
    there = values[~np.isnan(values)]
    finite = np.sort(there[np.isfinite(there)])
    places = np.ceil(np.arange(1, PARTS + 1) * len(finite) / PARTS).astype(np.int64) - 1
    edges = np.unique(finite[places]) if len(finite) else finite
    counts = np.bincount(np.searchsorted(edges, there), minlength=len(edges) + 1)
    return Histogram(edges.tolist(), counts.tolist(), len(values) - len(there))
