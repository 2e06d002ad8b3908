"""How good scores are, against labels that became known later: pure numbers, no library of models.

Equal scores are one step of every curve, as in scikit-learn: no order of rows changes a figure, but for
what is taken first of a day, where of equal scores the earlier row goes first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from models.windows import Bytes, Floats, Ints

Mask = npt.NDArray[np.bool_]

DAY_MS = 86_400_000
CALIBRATION_BINS = 10
HISTOGRAM_BINS = 40
CURVE_POINTS = 200  # of a curve in a report, at most: more cannot be told apart on a screen


@dataclass(frozen=True)
class Curve:
    """At each different score, the highest first: how many positives and negatives reach it."""

    scores: Floats
    hits: Ints
    misses: Ints

    @property
    def complete(self) -> bool:
        """Whether there are rows of both labels; without them no rate means anything."""
        return bool(len(self.scores) and self.hits[-1] and self.misses[-1])

    @property
    def rows(self) -> int:
        return int(self.hits[-1] + self.misses[-1]) if len(self.scores) else 0

    @property
    def positives(self) -> int:
        return int(self.hits[-1]) if len(self.scores) else 0


def curve(labels: Bytes, scores: npt.NDArray[Any]) -> Curve:
    """labels: (n,) 0 or 1; scores: (n,)."""
    order = np.argsort(-scores, kind="stable")
    ranked, hits = scores[order], np.cumsum(labels[order], dtype=np.int64)
    ends = np.flatnonzero(np.diff(ranked, append=-np.inf))  # the last row of each run of equal scores
    return Curve(ranked[ends].astype(np.float64), hits[ends], ends + 1 - hits[ends])


def counted(scores: Floats, negatives: Ints, positives: Ints) -> Curve:
    """Of counts (m,) at different scores (m,), which rise."""
    there = np.flatnonzero(negatives + positives)[::-1]
    return Curve(scores[there], np.cumsum(positives[there]), np.cumsum(negatives[there]))


def evaluate(labels: Bytes, scores: npt.NDArray[Any]) -> dict[str, float]:
    """Area under the ROC curve and average precision; NaN where only one class is there.

    labels: (n,) 0 or 1; scores: (n,).

    >>> evaluate(np.array([0, 1, 1], np.int8), np.array([0.1, 0.4, 0.4]))
    {'auc': 1.0, 'ap': 1.0}
    """
    return areas(curve(labels, scores))


def areas(steps: Curve) -> dict[str, float]:
    """Likewise of a curve."""
    if not steps.complete:
        return {"auc": float("nan"), "ap": float("nan")}
    hits, misses = steps.hits, steps.misses
    before, gained = np.diff(hits, prepend=0), np.diff(misses, prepend=0)
    area = (gained * (2 * hits - before)).sum() / 2  # trapezes
    return {
        "auc": float(area / (hits[-1] * misses[-1])),
        "ap": float((before * hits / (hits + misses)).sum() / hits[-1]),
    }


def auc_slack(steps: Curve) -> float:
    """How far the area may be from that of the rows' own scores, where a step holds rows of several."""
    if not steps.complete:
        return float("nan")
    gained, missed = np.diff(steps.hits, prepend=0), np.diff(steps.misses, prepend=0)
    return float((gained * missed).sum() / 2 / (steps.hits[-1] * steps.misses[-1]))


def precision_at(steps: Curve, top: int) -> float:
    """The share of positives among the `top` first by score; of equal scores any are as good as others, on average.

    >>> precision_at(curve(np.array([1, 1, 0], np.int8), np.array([0.9, 0.4, 0.4])), 2)
    0.75
    """
    rows = steps.hits + steps.misses
    chosen = min(top, steps.rows)
    last = int(np.searchsorted(rows, chosen))
    hits, taken = (int(steps.hits[last - 1]), int(rows[last - 1])) if last else (0, 0)
    share = (int(steps.hits[last]) - hits) / (int(rows[last]) - taken)
    return (hits + (chosen - taken) * share) / chosen


def recall_at(labels: Bytes, scores: npt.NDArray[Any], rate: float) -> float:
    """The most positives, as a share, that a threshold finds with at most this share of false alarms.

    >>> recall_at(np.array([1, 0, 1, 0], np.int8), np.array([0.9, 0.8, 0.7, 0.1]), 0.4)
    0.5
    """
    steps = curve(labels, scores)
    if not steps.complete:
        return float("nan")
    within = steps.misses <= rate * steps.misses[-1]
    return float(steps.hits[within].max(initial=0) / steps.hits[-1])


def brier(labels: Bytes, scores: npt.NDArray[Any]) -> float:
    """The mean squared distance of scores from labels: 0 is best, and a constant p(1 - p) is no skill."""
    return float(np.mean((scores.astype(np.float64) - labels) ** 2))


def calibration(labels: Bytes, scores: npt.NDArray[Any]) -> list[dict[str, float]]:
    """Rows in order of score, in CALIBRATION_BINS bins of one size; equal scores stay together.

    Of each: its `rows`, their mean `score` and the share of `positive` ones.
    """
    return calibration_of(curve(labels, scores))


def calibration_of(steps: Curve) -> list[dict[str, float]]:
    """Likewise of a curve."""
    positives = np.diff(steps.hits, prepend=0)[::-1]  # the lowest score first
    rows = positives + np.diff(steps.misses, prepend=0)[::-1]
    cuts = np.linspace(0, steps.rows, CALIBRATION_BINS + 1).astype(np.int64)[:-1]
    starts = np.unique(np.searchsorted(np.cumsum(rows), cuts, side="right"))
    counts, hits = np.add.reduceat(rows, starts), np.add.reduceat(positives, starts)
    sums = np.add.reduceat(steps.scores[::-1] * rows, starts)
    return [
        {"rows": n, "score": float(total / n), "positive": float(found / n)}
        for n, total, found in zip(counts.tolist(), sums, hits, strict=True)
    ]


def calibration_ratio(steps: Curve) -> float:
    """Positives that came, for each that the scores expect: 1 is best. NaN where they expect none."""
    rows = np.diff(steps.hits + steps.misses, prepend=0)
    expected = float((steps.scores * rows).sum())
    return steps.positives / expected if expected > 0 else float("nan")


def calibration_error(bins: list[dict[str, float]]) -> float:
    """How far mean score and share of positives are apart, over the bins, weighted by their rows."""
    rows = sum(b["rows"] for b in bins)
    return float(sum(b["rows"] * abs(b["score"] - b["positive"]) for b in bins) / rows)


def confusion(labels: Bytes, scores: npt.NDArray[Any], threshold: float) -> dict[str, int]:
    """Counts of rows at or above the threshold, and below it, by label."""
    taken = scores.astype(np.float64) >= threshold
    positive = labels == 1
    return {
        "true_positives": int((taken & positive).sum()),
        "false_positives": int((taken & ~positive).sum()),
        "false_negatives": int((~taken & positive).sum()),
        "true_negatives": int((~taken & ~positive).sum()),
    }


def cost(
    labels: Bytes, scores: npt.NDArray[Any], threshold: float, amounts: Floats, review_cost: float
) -> float:
    """What is lost: the amounts of positives below the threshold, and a review of each row that reaches it.

    An amount that is absent (NaN) counts as nothing.
    """
    taken = scores.astype(np.float64) >= threshold
    return float(np.nansum(amounts[~taken & (labels == 1)]) + review_cost * taken.sum())


def top_of_days(
    labels: Bytes, scores: npt.NDArray[Any], times: Ints, top: int, keys: Ints | None = None
) -> list[dict[str, float]]:
    """Of each day (UTC): the share of positive ones among the `top` first by score, and how many came.

    Without keys of events. With keys of entities, by the highest score of the day, positive with any positive event
    of the day; one that was among the first and positive is known from then on, and left out of later days.
    keys: (n,) codes from 0, -1 for events without one, which are left out.
    """
    given = keys if keys is not None else np.arange(len(labels))
    rows = np.flatnonzero(given >= 0)
    if not len(rows):
        return []
    known = np.zeros(int(given.max()) + 1, np.bool_)
    days = times // DAY_MS
    found = []
    for day in np.unique(days[rows]).tolist():
        at = rows[(days[rows] == day) & ~known[given[rows]]]
        ranked = given[at[np.argsort(-scores[at], kind="stable")]]
        _, first = np.unique(ranked, return_index=True)
        chosen = ranked[np.sort(first)[:top]]
        hit = np.isin(chosen, given[at[labels[at] == 1]])
        known[chosen[hit]] = True
        share = float(hit.mean()) if len(chosen) else 0.0
        found.append({"day": day * DAY_MS, "precision": share, "rows": len(at)})
    return found


def already_known(labels: Bytes, times: Ints, keys: Ints, since: int, delay: int) -> Mask:
    """Events of entities of which a positive event was known at the beginning of the event's day (UTC).

    Known is what happened from `since` on and `delay` ms or more before that day. keys: as in top_of_days.
    """
    first = np.full(int(keys.max(initial=-1)) + 2, np.iinfo(np.int64).max)  # the last place is for key -1
    tells = (labels == 1) & (times >= since) & (keys >= 0)
    np.minimum.at(first, keys[tells], times[tells])
    return first[keys] < times // DAY_MS * DAY_MS - delay


def plots(labels: Bytes, scores: npt.NDArray[Any]) -> dict[str, Any]:
    """What a report draws: `roc` and `precision_recall` as points, `calibration`, and `histogram` by label."""
    steps = curve(labels, scores)
    found = np.append(0, steps.hits) / max(1, steps.hits[-1])
    alarms = np.append(0, steps.misses) / max(1, steps.misses[-1])
    precision = steps.hits / (steps.hits + steps.misses)
    clipped = np.clip(scores.astype(np.float64), 0, 1)
    edges = np.linspace(0, 1, HISTOGRAM_BINS + 1)
    return {
        "roc": _points(alarms, found),
        "precision_recall": _points(found[1:], precision),
        "calibration": calibration(labels, scores),
        "histogram": {
            name: np.histogram(clipped[labels == label], edges)[0].tolist()
            for label, name in ((0, "negative"), (1, "positive"))
        },
    }


def _points(x: Floats, y: Floats) -> list[list[float]]:
    """At most CURVE_POINTS points of a curve, spread over its length, the ends among them."""
    length = np.cumsum(np.hypot(np.diff(x, prepend=x[0]), np.diff(y, prepend=y[0])))
    wanted = np.linspace(0, length[-1], min(CURVE_POINTS, len(x)))
    chosen = np.unique(np.append(np.searchsorted(length, wanted), len(x) - 1))
    chosen = np.minimum(chosen, len(x) - 1)
    return [[round(float(a), 6), round(float(b), 6)] for a, b in zip(x[chosen], y[chosen], strict=True)]


def spread(folds: Sequence[Mapping[str, Any]], figures: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """The mean of each figure over the folds, and its standard deviation."""
    values = {name: np.array([fold[name] for fold in folds], np.float64) for name in figures}
    return {name: {"mean": float(v.mean()), "deviation": float(v.std())} for name, v in values.items()}
