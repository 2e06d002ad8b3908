"""What a training reports: figures over the test, of each decision, and of each input."""

from __future__ import annotations

from typing import Any

import numpy as np

from models import evaluation
from models.evaluation import Mask
from models.exporting import evenly
from models.model_files import ModelFile
from models.pipeline import Pipeline
from models.scoring import Model, Scores
from models.splits import Examples, Split
from models.windows import Floats

FIGURES = ("auc", "ap", "precision_at_top", "recall_at_rate", "brier", "calibration_error")
IMPORTANCE_ROWS = 20_000  # of the test, in which a column is shuffled to see what it tells


def days(model: ModelFile, examples: Examples, rows: Mask, scores: Floats | Scores) -> list[dict[str, float]]:
    """The precision of what is first by score on each day of these rows (models.evaluation.top_of_days)."""
    keys = examples.keys_of(model)
    return evaluation.top_of_days(
        examples.labels[rows],
        scores[rows],
        examples.times[rows],
        model.top,
        None if keys is None else keys[rows],
    )


def over(model: ModelFile, examples: Examples, rows: Mask, scores: Floats | Scores) -> dict[str, float]:
    """FIGURES over these rows. scores: of all rows."""
    labels, given = examples.labels[rows], scores[rows]
    shares = [day["precision"] for day in days(model, examples, rows, scores)]
    return {
        **evaluation.evaluate(labels, given),
        "precision_at_top": float(np.mean(shares)) if shares else 0.0,
        "recall_at_rate": evaluation.recall_at(labels, given, model.false_positive_rate),
        "brier": evaluation.brier(labels, given),
        "calibration_error": evaluation.calibration_error(evaluation.calibration(labels, given)),
    }


def decisions(
    pipeline: Pipeline, model: ModelFile, examples: Examples, split: Split, scores: Scores,
    thresholds: dict[str, float],
) -> list[dict[str, Any]]:  # fmt: skip
    """Of each decision, what happens to the events that reach its threshold or a rarer one's."""
    labels, counted = examples.labels[split.counted], scores[split.counted]
    found = []
    for name, threshold in thresholds.items():
        counts = evaluation.confusion(labels, counted, threshold)
        taken = counts["true_positives"] + counts["false_positives"]
        one: dict[str, Any] = {
            "decision": name,
            "threshold": threshold,
            "training_share": float((scores[split.early].astype(np.float64) >= threshold).mean()),
            "test_share": float((scores[split.late].astype(np.float64) >= threshold).mean()),
            **counts,
            "precision": counts["true_positives"] / taken if taken else 0.0,
            "recall": counts["true_positives"] / int(labels.sum()),
        }
        if model.amount is not None:
            amounts = examples.vectors[split.counted, pipeline.vector.index(model.amount)]
            one["cost"] = evaluation.cost(labels, counted, threshold, amounts, model.review_cost)
            one["cost_without"] = float(np.nansum(amounts[labels == 1]))
        found.append(one)
    return found


def importance(
    pipeline: Pipeline, model: ModelFile, worker: Model, examples: Examples, rows: Mask
) -> dict[str, float]:
    """Of each input, by how much the average precision falls when its values are dealt to other test rows."""
    places = np.flatnonzero(rows)
    places = places[evenly(len(places), IMPORTANCE_ROWS)]
    vectors, labels = examples.vectors[places], examples.labels[places]
    if not labels.any() or labels.all():
        return {}
    whole = evaluation.evaluate(labels, worker.score_many(vectors))["ap"]
    order = np.random.default_rng(model.seed).permutation(len(labels))
    falls = {}
    for column, name in enumerate(pipeline.vector):
        kept = vectors[:, column].copy()
        vectors[:, column] = kept[order]
        falls[name] = whole - evaluation.evaluate(labels, worker.score_many(vectors))["ap"]
        vectors[:, column] = kept
    return dict(sorted(falls.items(), key=lambda item: -item[1]))
