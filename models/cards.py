"""What a trained model says of itself on its card: thresholds, golden vectors, version."""

from __future__ import annotations

import hashlib

import msgspec
import numpy as np

from models.estimators import Rounded
from models.exporting import evenly
from models.scoring import Card, Model, ModelError, Scores

# Golden vectors: over the score range, on each side of each decision, with gaps, beside tree thresholds.
GOLDEN_SPREAD, GOLDEN_SIDE, GOLDEN_GAPS, GOLDEN_PAIRS = 24, 4, 8, 8


def thresholds_for(scores: Scores, decisions: dict[str, float]) -> dict[str, float]:
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


def golden_rows(test: Rounded, scores: Scores, thresholds: list[float], planted: Rounded) -> Rounded:
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
    rows = np.unique(np.concatenate([spread, *beside, gaps[evenly(len(gaps), GOLDEN_GAPS)]]))
    pairs = evenly(len(planted) // 2, GOLDEN_PAIRS)
    return np.concatenate([test[rows], planted[np.sort(np.concatenate([2 * pairs, 2 * pairs + 1]))]])


def finished(
    draft: Model, graph: bytes, thresholds: dict[str, float], golden: Rounded, metrics: dict[str, float]
) -> Card:
    """The card of a model that was loaded under a draft of it."""
    scores = draft.score_many(golden.astype(np.float64)).astype(np.float64)
    card = msgspec.structs.replace(
        draft.card,
        version="",
        thresholds=thresholds,
        golden=[[None if np.isnan(v) else v for v in row] for row in golden.astype(np.float64).tolist()],
        golden_scores=scores.tolist(),
        metrics=metrics,
    )
    return msgspec.structs.replace(card, version=version_of(graph, card))


def version_of(graph: bytes, card: Card) -> str:
    """Twelve hex digits over the graph and all of the card, whose version is empty."""
    content = msgspec.json.encode(card, order="deterministic")
    return hashlib.sha256(graph + content).hexdigest()[:12]
