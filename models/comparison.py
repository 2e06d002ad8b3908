"""What came of versions that scored the same events: figures of each, and how two of them agree."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import msgspec
import numpy as np

from models.evaluation import DAY_MS, curve
from models.quality import Judged, judged
from models.windows import Floats, Ints

QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99)

Decide = Callable[[Floats], list[str]]


@dataclass
class Observed:
    """What is known of events, by their 64-bit ids: times in ms, scores by version, labels 0 or 1 where known."""

    times: dict[int, int] = field(default_factory=dict)
    scores: dict[str, dict[int, float]] = field(default_factory=dict)
    labels: dict[int, int] = field(default_factory=dict)

    def add(self, id_: int, time: int, version: str, score: float | None) -> None:
        """A score that is no number tells nothing, and is left out."""
        if score is not None:
            self.times[id_] = time
            self.scores.setdefault(version, {})[id_] = score

    def common(self, versions: Sequence[str]) -> list[int]:
        """The events that all of these have scored, in order of time."""
        first, *others = (self.scores.get(v, {}) for v in versions)
        shared = first.keys() & set.intersection(*map(set, others)) if others else first.keys()
        return sorted(shared, key=lambda id_: (self.times[id_], id_))


class Figures(Judged, kw_only=True):
    """Of a version over `events`; all but the quantiles over those that are labelled."""

    version: str
    events: int
    quantiles: dict[str, float]


class Pair(msgspec.Struct):
    """Two versions on the events that both have scored. decisions_differ: the share of them; None where the thresholds
    of one are not known. rank_correlation: Spearman's; NaN where one gives but one score."""

    versions: tuple[str, str]
    events: int
    decisions_differ: float | None
    rank_correlation: float


class Comparison(msgspec.Struct):
    versions: list[Figures]
    pairs: list[Pair]


def compare(observed: Observed, two: tuple[str, str] | None, decide: Mapping[str, Decide]) -> Comparison:
    """Two versions on the events of both, or all versions, each on its own events, and all pairs.

    decide: by version, of those whose thresholds are known.
    """
    versions = two or tuple(observed.scores)
    events = {v: observed.common(two or (v,)) for v in versions}
    pairs = [(pair, observed.common(pair)) for pair in combinations(versions, 2)]
    return Comparison(
        [_figures(observed, version, ids) for version, ids in events.items()],
        [_pair(observed, pair, ids, decide) for pair, ids in pairs if ids],
    )


def _figures(observed: Observed, version: str, ids: list[int]) -> Figures:
    scores = _scores(observed, version, ids)
    known = np.array([id_ in observed.labels for id_ in ids], np.bool_)
    labels = np.array([observed.labels[id_] for id_ in ids if id_ in observed.labels], np.int8)
    days, own = np.array([observed.times[id_] for id_ in ids], np.int64)[known] // DAY_MS, scores[known]
    by_day = [curve(labels[days == day], own[days == day]) for day in np.unique(days)]
    found = judged(curve(labels, own), by_day)
    return Figures(
        **msgspec.structs.asdict(found), version=version, events=len(ids),
        quantiles={f"{q:g}": float(np.quantile(scores, q)) for q in QUANTILES} if ids else {},
    )  # fmt: skip


def _pair(observed: Observed, pair: tuple[str, str], ids: list[int], decide: Mapping[str, Decide]) -> Pair:
    a, b = (_scores(observed, version, ids) for version in pair)
    differ = None
    if decide.keys() >= set(pair):
        decided = zip(decide[pair[0]](a), decide[pair[1]](b), strict=True)
        differ = sum(x != y for x, y in decided) / len(ids)
    return Pair(pair, len(ids), differ, rank_correlation(a, b))


def _scores(observed: Observed, version: str, ids: list[int]) -> Floats:
    given = observed.scores[version]
    return np.array([given[id_] for id_ in ids], np.float64)


def rank_correlation(a: Floats, b: Floats) -> float:
    """Spearman's, equal values at the mean of their ranks.

    >>> round(rank_correlation(np.array([0.1, 0.2, 0.3]), np.array([0.5, 0.6, 0.9])), 9)
    1.0
    """
    ranks = np.stack([_ranks(a), _ranks(b)])
    ranks -= ranks.mean(axis=1, keepdims=True)
    spread = np.sqrt((ranks**2).sum(axis=1)).prod()
    return float((ranks[0] * ranks[1]).sum() / spread) if spread else float("nan")


def _ranks(values: Floats) -> Floats:
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends: Ints = np.cumsum(counts)
    means: Any = ends - (counts - 1) / 2
    ranks: Floats = means[places]
    return ranks
