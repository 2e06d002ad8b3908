"""Figures of an evaluation, against scikit-learn's and against the rules in plain Python."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import (
    average_precision_score,
    brier_score_loss,
    confusion_matrix,
    roc_auc_score,
    roc_curve,
)

from models import evaluation
from models.evaluation import DAY_MS as DAY

# Few different scores, so that there are ties.
ROWS = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 20)), max_size=60)
# (day, entity or -1, label, score)
PAYMENTS = st.lists(
    st.tuples(st.integers(0, 4), st.integers(-1, 6), st.integers(0, 1), st.integers(0, 9)), max_size=60
)


def arrays(rows: list[tuple[int, int]]) -> tuple[Any, Any]:
    return np.array([a for a, _ in rows], np.int8), np.array([b / 20 for _, b in rows], np.float32)


@given(ROWS)
def test_area_precision_and_recall_are_scikit_learn_s(rows: list[tuple[int, int]]) -> None:
    labels, scores = arrays(rows)
    found = evaluation.evaluate(labels, scores)
    if len(set(labels.tolist())) < 2:
        assert np.isnan([found["auc"], found["ap"], evaluation.recall_at(labels, scores, 0.1)]).all()
        return
    assert found["auc"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert found["ap"] == pytest.approx(average_precision_score(labels, scores), abs=1e-12)
    alarms, hits, _ = roc_curve(labels, scores, drop_intermediate=False)
    for rate in (0.001, 0.1, 0.5, 0.99):
        assert evaluation.recall_at(labels, scores, rate) == pytest.approx(hits[alarms <= rate].max())


@given(ROWS.filter(len))
def test_brier_and_confusion_are_scikit_learn_s(rows: list[tuple[int, int]]) -> None:
    labels, scores = arrays(rows)
    assert evaluation.brier(labels, scores) == pytest.approx(
        brier_score_loss(labels, scores.astype(np.float64), pos_label=1), abs=1e-12
    )
    threshold = float(scores[0])
    counts = evaluation.confusion(labels, scores, threshold)
    expected = confusion_matrix(labels, scores.astype(np.float64) >= threshold, labels=[0, 1])
    assert expected.ravel().tolist() == [
        counts[k] for k in ("true_negatives", "false_positives", "false_negatives", "true_positives")
    ]


@given(ROWS.filter(len))
def test_bins_of_calibration_hold_every_row_once_and_part_no_equal_scores(
    rows: list[tuple[int, int]],
) -> None:
    labels, scores = arrays(rows)
    bins = evaluation.calibration(labels, scores)
    assert sum(b["rows"] for b in bins) == len(rows)
    assert sum(b["rows"] * b["positive"] for b in bins) == pytest.approx(labels.sum())
    assert sum(b["rows"] * b["score"] for b in bins) == pytest.approx(scores.sum(dtype=np.float64))
    means = [b["score"] for b in bins]
    assert means == sorted(set(means))
    order = np.random.default_rng(0).permutation(len(rows))
    for one, other in zip(bins, evaluation.calibration(labels[order], scores[order]), strict=True):
        assert one == pytest.approx(other)


def test_the_error_of_calibration_is_that_of_its_bins() -> None:
    scores = np.repeat([0.1, 0.6], 50)
    labels = np.array(([1] * 5 + [0] * 45) + ([1] * 40 + [0] * 10), np.int8)
    assert evaluation.calibration_error(evaluation.calibration(labels, scores)) == pytest.approx(0.1)


def first_of_days(rows: list[tuple[int, int, int, int]], top: int, by_entity: bool) -> list[float]:
    """The rule in plain Python."""
    shares, known = [], set()
    numbered = [(day, entity if by_entity else i, *rest) for i, (day, entity, *rest) in enumerate(rows)]
    for day in sorted({r[0] for r in numbered if r[1] >= 0}):
        today = [r for r in numbered if r[0] == day and r[1] >= 0 and r[1] not in known]
        ranked: list[int] = []
        for _, entity, _, _ in sorted(today, key=lambda r: -r[3]):
            if entity not in ranked:
                ranked.append(entity)
        hits = {e for e in ranked[:top] if any(label for _, other, label, _ in today if other == e)}
        shares.append(len(hits) / len(ranked[:top]) if ranked else 0.0)
        known |= hits
    return shares


@given(PAYMENTS, st.integers(1, 5))
def test_the_first_of_each_day_are_as_the_rule_says(rows: list[tuple[int, int, int, int]], top: int) -> None:
    day, entity, label, score = (np.array([r[i] for r in rows], np.int64) for i in range(4))
    times = day * DAY + np.arange(len(rows)) % DAY
    for keys in (entity, None):
        found = evaluation.top_of_days(label.astype(np.int8), score / 9, times, top, keys)
        assert [one["precision"] for one in found] == pytest.approx(
            first_of_days(rows, top, keys is not None)
        )


@given(PAYMENTS, st.integers(0, 3), st.integers(0, 2))
def test_known_by_a_day_is_what_was_positive_and_told_before_it(
    rows: list[tuple[int, int, int, int]], since: int, delay: int
) -> None:
    times = [day * DAY + 1000 * i for i, (day, *_) in enumerate(rows)]
    expected = [
        entity >= 0
        and any(
            label and other == entity and since * DAY <= at < day * DAY - delay * DAY
            for at, (_, other, label, _) in zip(times, rows, strict=True)
        )
        for day, entity, _, _ in rows
    ]
    label, entity = (np.array([r[i] for r in rows], np.int64) for i in (2, 1))
    found = evaluation.already_known(
        label.astype(np.int8), np.array(times, np.int64), entity, since * DAY, delay * DAY
    )
    assert found.tolist() == expected


def test_what_is_missed_costs_its_amount_and_a_review_its_price() -> None:
    labels, scores = np.array([1, 1, 0, 0, 1], np.int8), np.array([0.9, 0.1, 0.8, 0.2, 0.3])
    amounts = np.array([10.0, 20.0, 30.0, 40.0, np.nan])
    assert evaluation.cost(labels, scores, 0.5, amounts, 3.0) == 20.0 + 2 * 3.0
    assert evaluation.cost(labels, scores, 2.0, amounts, 3.0) == 30.0


@given(ROWS.filter(lambda rows: len({label for label, _ in rows}) == 2))
def test_plots_begin_and_end_where_their_curves_do(rows: list[tuple[int, int]]) -> None:
    labels, scores = arrays(rows)
    plots = evaluation.plots(labels, scores)
    assert plots["roc"][0] == [0.0, 0.0]
    assert plots["roc"][-1] == [1.0, 1.0]
    assert plots["precision_recall"][-1] == [1.0, pytest.approx(labels.mean(), abs=1e-6)]
    assert sum(plots["histogram"]["positive"]) == labels.sum()
    assert sum(plots["histogram"]["negative"]) == (1 - labels).sum()


def test_a_plot_of_many_rows_has_few_points() -> None:
    rng = np.random.default_rng(0)
    labels = (rng.random(50_000) < 0.02).astype(np.int8)
    plots = evaluation.plots(labels, rng.random(50_000))
    assert 100 < len(plots["roc"]) <= evaluation.CURVE_POINTS + 1
    assert 100 < len(plots["precision_recall"]) <= evaluation.CURVE_POINTS + 1
