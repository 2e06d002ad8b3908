"""Realised quality: counts are what the records say in whatever order, and figures within their bounds of the exact."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics

from models import evaluation
from models.comparison import Observed, compare
from models.evaluation import DAY_MS
from models.quality import BINS, PARTS, TOP, Realised, bin_of, middles

DAYS, DELAY = 3, 2 * DAY_MS
LAST = 10  # the day with which the window ends, with an event on day 13
END = 13 * DAY_MS + 5

_SCORES = st.one_of(
    st.floats(0, 1, width=32), st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.floats(1e-6, 1e-4).map(float)
)


def made(most: int = 10_000) -> Realised:
    return Realised(DAYS, DELAY, most)


# --- bins ---------------------------------------------------------------------------------------


@given(st.floats(0, 1, width=32), st.floats(0, 1, width=32))
def test_bins_keep_the_order_and_the_score(a: float, b: float) -> None:
    if a <= b:
        assert bin_of(a) <= bin_of(b)
    assert abs(middles()[bin_of(a)] - a) <= max(a / PARTS, 2.0**-24 * (1 + 1 / PARTS))


def test_bins_are_all_there() -> None:
    assert (len(middles()), bin_of(0.0), bin_of(1.0)) == (BINS, 0, BINS - 1)
    assert (np.diff(middles()) > 0).all()


# --- figures ------------------------------------------------------------------------------------

_ROWS = st.lists(st.tuples(_SCORES, st.booleans(), st.integers(0, DAYS - 1)), min_size=1, max_size=300)


@given(_ROWS)
def test_figures_are_within_their_bounds_of_the_exact(rows: list[tuple[float, bool, int]]) -> None:
    seen, exact = made(), Observed()
    for id_, (score, label, day) in enumerate(rows):
        time = (LAST - day) * DAY_MS + id_
        seen.scored(id_, time, {"a": score})
        seen.labelled(id_, time, int(label), id_)
        exact.add(id_, time, "a", score)
        exact.labels[id_] = int(label)
    seen.scored(-1, END, {"b": 0.5})
    found, steps = seen.of("a")
    (wanted,) = compare(exact, None, {}).versions
    assert (found.labelled, found.positives) == (wanted.labelled, wanted.positives)
    if 0 < wanted.positives < wanted.labelled:
        assert abs(found.auc - wanted.auc) <= evaluation.auc_slack(steps) + 1e-12
        low, high = ap_bounds(steps)
        assert low - 1e-12 <= wanted.ap <= high + 1e-12
        assert low - 1e-12 <= found.ap <= high + 1e-12
    else:
        assert math.isnan(found.auc)
        assert math.isnan(wanted.auc)
    assert abs(found.precision_at_top - wanted.precision_at_top) <= precision_slack(seen) + 1e-12
    if wanted.calibration_ratio > 0:
        expected = wanted.positives / wanted.calibration_ratio
        # each score by a thousandth of itself at most, or by what lies below the lowest bin
        within = expected / PARTS + 2.0**-23 * len(rows)
        # where all are below the lowest bin, nothing is expected
        got = 0.0 if math.isnan(found.calibration_ratio) else found.positives / found.calibration_ratio
        assert abs(got - expected) <= within


def ap_bounds(steps: evaluation.Curve) -> tuple[float, float]:
    """The least and the most, whatever the order of the rows of a step."""
    hits, misses = np.diff(steps.hits, prepend=0), np.diff(steps.misses, prepend=0)
    low = high = 0.0
    reached = missed = 0
    for found, false in zip(hits.tolist(), misses.tolist(), strict=True):
        for i in range(1, found + 1):
            high += (reached + found) / (reached + found + missed)
            low += (reached + i) / (reached + i + missed + false)
        reached, missed = reached + found, missed + false
    return low / reached, high / reached


def precision_slack(seen: Realised) -> float:
    """How much the step in which a day's first ones end may hide, mean over the days."""
    slacks = []
    for day in seen._window():
        steps = seen._curve(seen._sum(day, "a", {"a"}))
        rows = steps.hits + steps.misses
        chosen = min(TOP, int(rows[-1]))
        last = int(np.searchsorted(rows, chosen))
        before = int(rows[last - 1]) if last else 0
        slacks.append(0 if rows[last] == chosen else (min(chosen - before, rows[last] - chosen)) / chosen)
    return float(np.mean(slacks))


def test_of_many_scores_they_are_near() -> None:
    """What the page states, on scores as sound models give them."""
    random = np.random.default_rng(1)
    labels = (random.random(40_000) < 0.02).astype(np.int8)
    logits = random.normal(-6, 1.5, len(labels)) + 3 * labels
    scores = (1 / (1 + np.exp(-logits))).astype(np.float32)
    seen = made()
    for id_, (score, label) in enumerate(zip(scores.tolist(), labels.tolist(), strict=True)):
        time = (LAST - id_ % DAYS) * DAY_MS
        seen.scored(id_, time, {"a": score})
        seen.labelled(id_, time, label, 0)
    seen.scored(-1, END, {"b": 0.5})
    found, steps = seen.of("a")
    assert evaluation.auc_slack(steps) < 5e-4
    assert found.auc == pytest.approx(metrics.roc_auc_score(labels, scores), abs=5e-4)
    assert found.ap == pytest.approx(metrics.average_precision_score(labels, scores), abs=2e-3)
    assert found.calibration_ratio == pytest.approx(labels.sum() / scores.astype(np.float64).sum(), rel=1e-3)
    exact = evaluation.calibration_error(evaluation.calibration(labels, scores))
    assert found.calibration_error == pytest.approx(exact, abs=1e-3)


# --- records in any order -----------------------------------------------------------------------

Record = tuple[Any, ...]


@st.composite
def records(draw: st.DrawFn) -> list[Record]:
    """Scores of one to three versions, perhaps in two records, and labels that may change."""
    found: list[Record] = []
    for id_ in range(draw(st.integers(1, 12))):
        time = draw(st.integers(LAST - DAYS - 1, LAST + 2)) * DAY_MS + id_
        scores = draw(st.dictionaries(st.sampled_from("abc"), _SCORES, min_size=1))
        first = dict(list(scores.items())[:1])
        found += [("scored", id_, time, first), ("scored", id_, time, scores)]
        for stamp in range(draw(st.integers(0, 3))):
            found.append(("labelled", id_, time, draw(st.sampled_from([0, 1, None])), stamp))
    return found


def after(given_: Sequence[Record]) -> Realised:
    seen = made()
    for name, *how in given_:
        getattr(seen, name)(*how)
    seen.scored(-1, END, {"z": 0.5})
    return seen


@given(records(), st.randoms())
def test_no_order_of_records_changes_a_count(given_: list[Record], random: Any) -> None:
    shuffled = given_ + random.sample(given_, len(given_) // 2)  # some come twice, as after a restart
    random.shuffle(shuffled)
    one, other = after(given_), after(shuffled)
    assert tallies(one) == tallies(other) == by_hand(given_)
    assert one._events.keys() == other._events.keys()


def tallies(seen: Realised) -> dict[Any, int]:
    return {
        (day, company, company[place], label, bin_): int(counts[place, label, bin_])
        for day, companies in seen._counts.items()
        for company, counts in companies.items()
        for place, label, bin_ in np.argwhere(counts).tolist()
    }


def by_hand(given_: list[Record]) -> dict[Any, int]:
    scores: dict[int, dict[str, float]] = {}
    labels: dict[int, tuple[int, int | None]] = {}
    days = {}
    for name, id_, time, *rest in given_:
        days[id_] = time // DAY_MS
        if name == "scored":
            scores.setdefault(id_, {}).update(rest[0])
        else:
            labels[id_] = max(labels.get(id_, (-1, None)), (rest[1], rest[0]), key=lambda pair: pair[0])
    found: dict[Any, int] = {}
    for id_, its in scores.items():
        label = labels.get(id_, (-1, None))[1]
        if label is None or days[id_] <= LAST - DAYS:
            continue
        for version, score in its.items():
            at = (days[id_], tuple(sorted(its)), version, label, bin_of(score))
            found[at] = found.get(at, 0) + 1
    return found


# --- the window and the memory ------------------------------------------------------------------


def test_the_window_is_whole_days_that_end_a_delay_ago() -> None:
    seen = made()
    for day in range(1, 14):
        seen.scored(day, day * DAY_MS, {"a": 0.5})
        seen.labelled(day, day * DAY_MS, 1, 0)
    assert seen.until == LAST
    assert seen.of("a")[0].labelled == DAYS  # of days 8 to 10
    assert seen.kept == 13 - (LAST - DAYS)  # those that are to come, too
    seen.scored(99, END + DAY_MS, {"a": 0.5})
    assert (seen.until, seen.of("a")[0].labelled, min(seen._counts)) == (LAST + 1, DAYS, 9)
    seen.labelled(3, 3 * DAY_MS, 0, 9)  # too late to count
    assert 3 not in seen._events


def test_two_versions_are_judged_on_the_events_of_both() -> None:
    seen = made()
    for id_ in range(40):
        time, label = LAST * DAY_MS, id_ % 2
        seen.scored(id_, time, {"a": 0.9 if label else 0.1})
        if id_ < 20:
            seen.scored(id_, time, {"b": 0.1 if label else 0.9, "c": 0.5})
        seen.labelled(id_, time, label, 0)
    seen.scored(-1, END, {"a": 0.5})
    assert seen.versions() == ["a", "b", "c"]
    assert (seen.of("a")[0].labelled, seen.of("a", ["b"])[0].labelled, seen.of("b", ["a"])[0].labelled) == (
        40,
        20,
        20,
    )
    assert (seen.of("a", ["b"])[0].auc, seen.of("b", ["a"])[0].auc) == (1.0, 0.0)


def test_beyond_its_bound_the_oldest_events_are_let_go_and_stay_counted() -> None:
    seen = made(most=10)
    for id_ in range(15):
        seen.scored(id_, LAST * DAY_MS, {"a": 0.5})
        if id_ % 2:
            seen.labelled(id_, LAST * DAY_MS, 1, 0)
    assert (seen.kept, seen.let_go) == (10, 3)  # of 0 to 4 the labels of 1 and 3 were known
    seen.scored(-1, END, {"a": 0.5})
    assert seen.of("a")[0].labelled == 7


def test_without_labels_nothing_is_known() -> None:
    seen = made()
    seen.scored(1, LAST * DAY_MS, {"a": 0.5})
    seen.scored(-1, END, {"a": 0.5})
    assert seen.versions() == []
    found = seen.of("a")[0]
    assert (found.labelled, math.isnan(found.auc), math.isnan(found.calibration_ratio)) == (0, True, True)
