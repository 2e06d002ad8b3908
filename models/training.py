"""Training: vectors with labels become a model, an ONNX graph, the card that a worker checks, and a report.

A pure function of its arguments: the same rows in the same order give the same bytes, whatever the
number of threads. A library fits (models.estimators), what came of it is exported (models.exporting), and the
graph is scored by the same `models.scoring.Model` that workers use before anything is believed of it.

Every vector is rounded to float32 before the fit, because that is what the graph sees.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from models import cards, evaluation, exporting, figures
from models.estimators import Fitted, Rounded, fit
from models.histograms import Histograms, histograms_of
from models.model_files import ModelFile
from models.pipeline import Pipeline
from models.scoring import TOLERANCE, Card, Model, ModelError
from models.splits import Examples, date, label_delay, split_at
from models.windows import Bytes

# A column with a value in fewer of its rows than this is left out: scikit-learn finds its bins on a
# sample of 200,000 rows, and fails on a column in which the sample has no value.
MIN_FILLED = 1 / 5000

_Say = Callable[[str], None]


@dataclass(frozen=True)
class Trained:
    """report: figures by name, among them the card's metrics and `split` (ms: when the test begins), and under
    `decisions`, `days`, `folds`, `plots` and `importance` what has parts; good for JSON. histograms: of the events
    trained on."""

    graph: bytes
    card: Card
    report: dict[str, Any]
    histograms: Histograms


def train(
    pipeline: Pipeline, model: ModelFile, examples: Examples, progress: _Say | None = None, *,
    folds: int = 1, threads: int = 1,
) -> Trained:  # fmt: skip
    """Fit, export, check and evaluate a model of a pipeline.

    folds: how often it is fitted and tested, each time on days a test earlier; the model is of the newest.
    threads: change the time, never a bit; more threads than idle cores cost far more than they give. Raises
    ModelError.
    """
    say = progress or (lambda _: None)
    _fits_together(pipeline, model, examples)
    labels = examples.labels
    # 1. split: the test is the last days, and training ends where labels were known by then
    split = split_at(pipeline, model, examples)
    early, late = split.early, split.late
    inputs = exporting.rounded(examples.vectors)
    say(
        f"Training on {early.sum():,} events before {date(split.at - label_delay(pipeline))} "
        f"({labels[early].sum():,} positive), testing on the {late.sum():,} from {date(split.at)} on."
    )
    # 2. fit
    fitted = _fit(pipeline, model, inputs[early], labels[early], threads, say)
    # 3. export, and score with it as a worker does
    graph = exporting.export(fitted, pipeline.name, len(pipeline.vector))
    test = inputs[late]
    worker = _as_worker(graph, pipeline, test[:1], fitted)
    scores = np.full(len(labels), np.nan, np.float32)  # of the rows of neither no one asks
    scores[early | late] = worker.score_many(examples.vectors[early | late])
    # 4. compare the graph with what was trained: on the test, where one bit sends a row the other way, without values
    planted = exporting.planted(test, exporting.splits(graph))
    tried = np.concatenate([test, planted, exporting.odd(test)])
    worst = exporting.worst_difference(worker, fitted, tried)
    say(f"The exported graph agrees with the trained model within {worst:.2g}.")
    # 5. decide, evaluate, and write the card
    thresholds = cards.thresholds_for(scores[early], pipeline.model.decisions)
    newest = figures.over(model, examples, split.counted, scores)
    metrics = {
        **newest,
        "rows": float(early.sum()),
        "positives": float(labels[early].sum()),
        "test_rows": float(split.counted.sum()),
        "test_positives": float(labels[split.counted].sum()),
        "worst_difference": worst,
    }
    golden = cards.golden_rows(test, scores[late], list(thresholds.values()), _telling(worker, planted))
    card = cards.finished(worker, graph, thresholds, golden, metrics)
    Model(graph, card, pipeline)  # refuses here what a worker would refuse
    # 6. the same on earlier days, and the report
    tested = [{"split": split.at, **newest}]
    tested += [_fold(pipeline, model, examples, inputs, fold, threads, say) for fold in range(1, folds)]
    report = {
        "pipeline": pipeline.name,
        "version": card.version,
        "definition": card.definition,
        "model": msgspec.to_builtins(model),
        **metrics,
        "split": split.at,
        "label_delay": label_delay(pipeline),
        "decisions": figures.decisions(pipeline, model, examples, split, scores, thresholds),
        "days": figures.days(model, examples, split.counted, scores),
        "folds": tested,
        "over_folds": evaluation.spread(tested, figures.FIGURES),
        "plots": evaluation.plots(labels[split.counted], scores[split.counted]),
        "importance": figures.importance(pipeline, model, worker, examples, split.counted),
    }
    return Trained(
        graph, card, report, histograms_of(pipeline.vector, examples.vectors[early], scores[early])
    )


def _telling(worker: Model, planted: Rounded) -> Rounded:
    """Of pairs of rows about a threshold, those whose two scores differ."""
    scores = worker.score_many(planted.astype(np.float64))
    telling: Rounded = planted[np.repeat(np.abs(scores[::2] - scores[1::2]) > 10 * TOLERANCE, 2)]
    return telling


def _fits_together(pipeline: Pipeline, model: ModelFile, examples: Examples) -> None:
    n = len(examples.times)
    if examples.vectors.shape != (n, len(pipeline.vector)) or len(examples.labels) != n:
        raise ValueError(
            f"vectors {examples.vectors.shape}, labels {examples.labels.shape}, times {n}: no match"
        )
    if not np.isin(examples.labels, (0, 1)).all():
        raise ValueError("labels are 0 and 1; leave events of unknown label out")
    if model.entity is not None and pipeline.entity(model.entity).name not in examples.keys:
        raise ModelError(
            f"The features do not tell the {model.entity} of an event; run `headrace features compute` again."
        )
    if model.amount is not None and model.amount not in pipeline.vector:
        raise ModelError(
            f"The amount {model.amount!r} of the model file is no input of the pipeline {pipeline.name}; take one of "
            f"{', '.join(pipeline.vector)}."
        )


def _fit(
    pipeline: Pipeline, model: ModelFile, inputs: Rounded, labels: Bytes, threads: int, say: _Say
) -> Fitted:
    rare = (~np.isnan(inputs)).mean(axis=0) < MIN_FILLED
    for column in np.flatnonzero(rare).tolist():
        say(f"{pipeline.vector[column]} has hardly a value in the training events; the model ignores it.")
    inputs[:, rare] = 0.0  # nothing is learnt from a constant
    return fit(model.kind, model.parameters, model.seed, inputs, labels, threads)


def _fold(
    pipeline: Pipeline, model: ModelFile, examples: Examples, inputs: Rounded, fold: int, threads: int, say: _Say
) -> dict[str, Any]:  # fmt: skip
    """Figures of an earlier fold, by the library's own scores."""
    split = split_at(pipeline, model, examples, fold)
    fitted = _fit(pipeline, model, inputs[split.early], examples.labels[split.early], threads, lambda _: None)
    scores = np.zeros(len(inputs))
    scores[split.counted] = fitted.score(inputs[split.counted])
    found = figures.over(model, examples, split.counted, scores)
    say(
        f"Tested from {date(split.at)} on (fold {fold + 1}): AUC {found['auc']:.3f}, average precision "
        f"{found['ap']:.3f}."
    )
    return {"split": split.at, **found}


def _as_worker(graph: bytes, pipeline: Pipeline, first: Rounded, fitted: Fitted) -> Model:
    """The graph as a worker would load it, under a card that is not finished."""
    card = Card(
        pipeline=pipeline.name,
        version="draft",
        definition=pipeline.definition,
        features=list(pipeline.vector),
        thresholds={},
        otherwise=pipeline.model.otherwise,
        golden=first.astype(np.float64).tolist(),
        golden_scores=fitted.score(first).tolist(),
        metrics={},
    )
    try:
        return Model(graph, card, pipeline)
    except ModelError as error:
        raise exporting.disagree(str(error)) from None
