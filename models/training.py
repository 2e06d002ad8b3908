"""Training: vectors with labels become boosted trees, an ONNX graph and the card that a worker checks.

A pure function of its arguments: the same rows in the same order give the same bytes, whatever the
number of threads. scikit-learn fits and skl2onnx exports; the graph is scored by the same
`models.scoring.Model` that workers use before anything is believed of it.

Every vector is rounded to float32 before the fit, because that is what the graph sees.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from models.aggregates import OF_LABELS
from models.pipeline import Pipeline
from models.scoring import TOLERANCE, Card, Model, ModelError, Scores
from models.windows import Bytes, Floats, Ints

Rounded = npt.NDArray[np.float32]

DAY_MS = 86_400_000
MIN_TRAINING_ROWS = 100  # a leaf holds at least 20 rows: below this there is hardly a split to make
L2 = 1.0  # shrinks the leaves of few rows, which else overfit rare positives
# A column with a value in fewer of its rows than this is left out: scikit-learn finds its bins on a
# sample of 200,000 rows, and fails on a column in which the sample has no value.
MIN_FILLED = 1 / 5000
# Old enough for every onnxruntime in use; from `ai.onnx.ml` 5 on TreeEnsembleClassifier is deprecated.
OPSETS = {"": 18, "ai.onnx.ml": 3}
IR_VERSION = 8
PLANTED_SPLITS = 4_000  # thresholds of the trees beside which the graph is tried, at most
# Golden vectors: over the score range, on each side of each decision, with gaps, beside tree thresholds.
GOLDEN_SPREAD, GOLDEN_SIDE, GOLDEN_GAPS, GOLDEN_PAIRS = 24, 4, 8, 8

_LARGEST = np.finfo(np.float32).max


@dataclass(frozen=True)
class Trained:
    """report: the card's metrics, `split` (ms: test events are later), and for each decision d the shares
    of events that reach it, `training_share.d` and `test_share.d`."""

    graph: bytes
    card: Card
    report: dict[str, float]


def train(
    pipeline: Pipeline, vectors: Floats, labels: Bytes, times: Ints,
    progress: Callable[[str], None] | None = None, *, threads: int = 1,
) -> Trained:  # fmt: skip
    """Fit, export, check and evaluate the model of a pipeline.

    vectors: (n, width) float64, NaN where there is no value; labels: (n,) 0 or 1, known events only;
    times: (n,) event times, ms, in any order. threads: change the time, never a bit; more threads than
    idle cores cost far more than they give. Raises ModelError.
    """
    say = progress or (lambda _: None)
    if vectors.shape != (len(times), len(pipeline.vector)) or len(labels) != len(times):
        raise ValueError(f"vectors {vectors.shape}, labels {labels.shape}, times {times.shape}: no match")
    if not np.isin(labels, (0, 1)).all():
        raise ValueError("labels are 0 and 1; leave events of unknown label out")
    # 1. split: the test is the last days, and training ends where labels were known by then
    split, early, late = _split(pipeline, labels, times)
    inputs = _rounded(vectors)
    say(
        f"Training on {early.sum():,} events until {_date(split - label_delay(pipeline))} "
        f"({labels[early].sum():,} positive), testing on the {late.sum():,} after {_date(split)}."
    )
    # 2. fit
    classifier = _fit(pipeline, inputs[early], labels[early], threads, say)
    # 3. export, and score everything with it as a worker does
    graph, splits = _export(classifier, pipeline)
    test = inputs[late]
    model = _as_worker(graph, pipeline, test[:1], classifier)
    scores = model.score_many(vectors)
    # 4. compare the graph with what was trained, on the test and where one bit sends a row the other way
    planted = _planted(test, splits)
    beside = model.score_many(planted.astype(np.float64))
    tried = np.concatenate([test, planted])
    worst = _worst(np.concatenate([scores[late], beside]), classifier, tried, threads)
    if not worst <= TOLERANCE:
        raise _disagree(f"scores differ by up to {worst:.3g}, and {TOLERANCE:g} is allowed")
    say(f"The exported graph agrees with the trained model within {worst:.2g}.")
    # 5. decide, evaluate, and write the card
    thresholds = _thresholds(scores[early], pipeline.model.decisions)
    metrics = {
        **evaluate(labels[late], scores[late]),
        "rows": float(early.sum()),
        "positives": float(labels[early].sum()),
        "test_rows": float(late.sum()),
        "test_positives": float(labels[late].sum()),
        "worst_difference": worst,
    }
    telling = np.repeat(np.abs(beside[::2] - beside[1::2]) > 10 * TOLERANCE, 2)
    golden = _golden(test, scores[late], list(thresholds.values()), planted[telling])
    card = msgspec.structs.replace(
        model.card,
        version="",
        thresholds=thresholds,
        golden=[[None if np.isnan(v) else v for v in row] for row in golden.astype(np.float64).tolist()],
        golden_scores=model.score_many(golden.astype(np.float64)).astype(np.float64).tolist(),
        metrics=metrics,
    )
    card = msgspec.structs.replace(card, version=_version(graph, card))
    Model(graph, card, pipeline)  # refuses here what a worker would refuse
    shares = {
        f"{rows}_share.{name}": float((scores[mask].astype(np.float64) >= threshold).mean())
        for rows, mask in (("training", early), ("test", late))
        for name, threshold in thresholds.items()
    }
    return Trained(graph, card, {**metrics, "split": float(split), **shares})


def evaluate(labels: Bytes, scores: npt.NDArray[Any]) -> dict[str, float]:
    """Area under the ROC curve and average precision; NaN where only one class is there.

    labels: (n,) 0 or 1; scores: (n,). Equal scores are one step of either curve, as in scikit-learn.

    >>> evaluate(np.array([0, 1, 1], np.int8), np.array([0.1, 0.4, 0.4]))
    {'auc': 1.0, 'ap': 1.0}
    """
    order = np.argsort(-scores, kind="stable")
    ranked, hits = scores[order], np.cumsum(labels[order], dtype=np.int64)
    ends = np.flatnonzero(np.diff(ranked, append=-np.inf))  # the last row of each run of equal scores
    hits, misses = hits[ends], ends + 1 - hits[ends]
    if not len(ends) or not hits[-1] or not misses[-1]:
        return {"auc": float("nan"), "ap": float("nan")}
    before, gained = np.diff(hits, prepend=0), np.diff(misses, prepend=0)
    area = (gained * (2 * hits - before)).sum() / 2  # trapezes
    return {
        "auc": float(area / (hits[-1] * misses[-1])),
        "ap": float((before * hits / (ends + 1)).sum() / hits[-1]),
    }


def label_delay(pipeline: Pipeline) -> int:
    """By when labels are known, ms after the event: the longest delay of a feature over labels, else 0."""
    delays = [a.delay for entity in pipeline.entities for a in entity.aggregates if a.kind in OF_LABELS]
    return max(delays, default=0)


def _split(
    pipeline: Pipeline, labels: Bytes, times: Ints
) -> tuple[int, npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """The time of the split, and masks of the rows to train on and to test on."""
    days, delay = pipeline.model.test_days, label_delay(pipeline)
    if not len(times):
        raise ModelError(
            f"There are no events with labels to train {pipeline.name} on; send its labels, or train on an "
            "older stretch of events."
        )
    split = int(times.max()) - days * DAY_MS
    early, late = times <= split - delay, times > split
    if early.sum() < MIN_TRAINING_ROWS:
        raise ModelError(
            f"Of {len(times):,} events with labels, from {_date(int(times.min()))} to "
            f"{_date(int(times.max()))}, {early.sum():,} lie before the {days} days of the test and the "
            f"{delay / DAY_MS:g} days in which labels become known, and training takes at least "
            f"{MIN_TRAINING_ROWS}; take in more days, or lower model.test_days in the pipeline file."
        )
    for mask, which, change in ((early, "training", "lower"), (late, "test", "raise")):
        if len(found := np.unique(labels[mask])) == 1:
            raise ModelError(
                f"All {mask.sum():,} {which} events, from {_date(int(times[mask].min()))} to "
                f"{_date(int(times[mask].max()))}, have the label {found[0]}, and a model takes both; take "
                f"in more days, or {change} model.test_days in the pipeline file."
            )
    return split, early, late


def _rounded(vectors: Floats) -> Rounded:
    """What the graph sees. Infinite values (a division by zero) are taken for the largest finite one."""
    with np.errstate(over="ignore"):
        inputs: Rounded = vectors.astype(np.float32)
    np.clip(inputs, -_LARGEST, _LARGEST, out=inputs)
    return inputs


def _fit(pipeline: Pipeline, inputs: Rounded, labels: Bytes, threads: int, say: Callable[[str], None]) -> Any:
    spec = pipeline.model
    rare = (~np.isnan(inputs)).mean(axis=0) < MIN_FILLED
    for column in np.flatnonzero(rare).tolist():
        say(f"{pipeline.vector[column]} has hardly a value in the training events; the model ignores it.")
    inputs[:, rare] = 0.0  # a constant is never split on
    classifier = _extra("sklearn.ensemble").HistGradientBoostingClassifier(
        max_iter=spec.trees,
        max_depth=spec.depth,
        max_leaf_nodes=None,
        learning_rate=spec.learning_rate,
        l2_regularization=L2,
        early_stopping=False,
        random_state=spec.seed,
    )
    # OpenMP threads wait for each other by spinning: with a busy core, two took 3 to 20 times as long as one.
    with _extra("threadpoolctl").threadpool_limits(threads, user_api="openmp"):
        classifier.fit(inputs, labels)
    return classifier


def _export(classifier: Any, pipeline: Pipeline) -> tuple[bytes, list[tuple[int, np.float32]]]:
    """The graph, and (column, threshold) of each of its splits.

    `vectors` float32 (n, width) in; `label` and `probabilities` (n, 2) out, of which the last column is
    the score. The thresholds are float32 in the graph, and skl2onnx takes the nearest one, so that values
    between the two would go the other way: therefore each is lowered in the trees first, to the largest
    float32 that sends every float32 value its trained way.
    """
    skl2onnx = _extra("skl2onnx")
    floats = _extra("skl2onnx.common.data_types").FloatTensorType([None, len(pipeline.vector)])
    classifier, splits = copy.deepcopy(classifier), []  # the check compares with what was trained
    for (tree,) in classifier._predictors:
        nodes = tree.nodes
        nodes["num_threshold"] = _below(nodes["num_threshold"])
        inner = nodes[~nodes["is_leaf"].astype(bool)]
        thresholds = inner["num_threshold"].astype(np.float32)
        splits += list(zip(inner["feature_idx"].tolist(), thresholds, strict=True))
    model = skl2onnx.to_onnx(
        classifier, initial_types=[("vectors", floats)], options={"zipmap": False}, target_opset=OPSETS
    )
    for opset in model.opset_import:  # skl2onnx writes the oldest that would do
        opset.version = OPSETS[opset.domain]
    model.ir_version = IR_VERSION
    model.graph.name = pipeline.name
    _extra("onnx").checker.check_model(model, full_check=True)
    return model.SerializeToString(deterministic=True), splits


def _below(thresholds: Floats) -> Rounded:
    """The largest float32 not above each threshold; infinity where no finite float32 is above it."""
    with np.errstate(over="ignore"):
        nearest = thresholds.astype(np.float32)
        below = np.where(nearest > thresholds, np.nextafter(nearest, np.float32(-np.inf)), nearest)
    return np.where(thresholds >= _LARGEST, np.float32(np.inf), below)


def _as_worker(graph: bytes, pipeline: Pipeline, first: Rounded, classifier: Any) -> Model:
    """The graph as a worker would load it, under a card that is not finished."""
    card = Card(
        pipeline=pipeline.name,
        version="draft",
        definition=pipeline.definition,
        features=list(pipeline.vector),
        thresholds={},
        otherwise=pipeline.model.otherwise,
        golden=first.astype(np.float64).tolist(),
        golden_scores=classifier.predict_proba(first)[:, 1].tolist(),
        metrics={},
    )
    try:
        return Model(graph, card, pipeline)
    except ModelError as error:
        raise _disagree(str(error)) from None


def _disagree(how: str) -> ModelError:
    return ModelError(
        f"The exported graph does not compute what was trained ({how}); install another onnxruntime."
    )


def _worst(scores: Scores, classifier: Any, inputs: Rounded, threads: int) -> float:
    """How far the graph's scores are from the trained model's."""
    with _extra("threadpoolctl").threadpool_limits(threads, user_api="openmp"):
        trained = classifier.predict_proba(inputs)[:, 1]
    return float(np.max(np.abs(scores - trained)))


def _planted(test: Rounded, splits: list[tuple[int, np.float32]]) -> Rounded:
    """Pairs of test rows that stand on a split's threshold and one float32 above it."""
    finite = [(column, at) for column, at in splits if np.isfinite(at)]
    chosen = [finite[i] for i in _evenly(len(finite), PLANTED_SPLITS)]
    pairs = np.repeat(test[np.arange(len(chosen)) % len(test)], 2, axis=0)
    for i, (column, at) in enumerate(chosen):
        pairs[2 * i, column] = at
        pairs[2 * i + 1, column] = np.nextafter(at, np.float32(np.inf))
    return pairs


def _thresholds(scores: Scores, decisions: dict[str, float]) -> dict[str, float]:
    """Decision to threshold, rarest first, so that its share of these scores is the nearest there is, by
    their ratio; refused where that is off by more than a factor of two.

    A threshold lies half-way to the next lower score: a last bit that another processor computes
    otherwise moves no event over it.
    """
    values, counts = np.unique(scores.astype(np.float64), return_counts=True)
    values, reached = values[::-1], np.cumsum(counts[::-1])
    thresholds = {}
    for name, share in sorted(decisions.items(), key=lambda item: item[1]):
        wanted = max(1.0, share * len(scores))
        off = np.maximum(reached / wanted, wanted / reached)
        i = int(np.argmin(off))
        if off[i] > 2:
            raise ModelError(
                f"The decision {name!r} is for {share:.2%} of the events, and the nearest that the model's "
                f"scores can tell apart is {reached[i] / len(scores):.2%}; give the model better features, "
                f"more events or more trees, or change model.decisions.{name}."
            )
        thresholds[name] = float(values[i : i + 2].mean())
    return thresholds


def _golden(test: Rounded, scores: Scores, thresholds: list[float], planted: Rounded) -> Rounded:
    """Vectors whose scores prove that a graph still computes what was exported. See GOLDEN_*.

    planted: pairs about a threshold of a tree, whose scores differ.
    """
    ranked = np.argsort(scores, kind="stable")
    distinct = ranked[np.flatnonzero(np.diff(scores[ranked], prepend=-np.inf))]  # a row for each score
    levels = scores[distinct]
    spread = distinct[np.searchsorted(levels, np.linspace(levels[0], levels[-1], GOLDEN_SPREAD))]
    beside = [
        distinct[max(0, at - GOLDEN_SIDE) : at + GOLDEN_SIDE]
        for at in np.searchsorted(levels, np.array(thresholds, np.float64)).tolist()
    ]
    gaps = ranked[np.isnan(test[ranked]).any(axis=1)]
    rows = np.unique(np.concatenate([spread, *beside, gaps[_evenly(len(gaps), GOLDEN_GAPS)]]))
    pairs = _evenly(len(planted) // 2, GOLDEN_PAIRS)
    return np.concatenate([test[rows], planted[np.sort(np.concatenate([2 * pairs, 2 * pairs + 1]))]])


def _evenly(n: int, most: int) -> Ints:
    """At most so many of range(n), evenly spread, the first and the last among them."""
    return np.unique(np.linspace(0, max(n - 1, 0), min(n, most)).astype(np.int64))


def _version(graph: bytes, card: Card) -> str:
    content = msgspec.json.encode(card, order="deterministic")
    return hashlib.sha256(graph + content).hexdigest()[:12]


def _date(time: int) -> str:
    return str(np.datetime64(time, "ms").astype("datetime64[D]"))


def _extra(module: str) -> Any:
    """A module of the `train` extra, which workers go without."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ModelError(
            f"Training needs more than a worker has ({error}); pip install 'headrace[train]'."
        ) from None
