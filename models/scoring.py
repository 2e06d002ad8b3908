"""A model as it is loaded: an ONNX graph and its card, refused unless it is what it claims to be.

Only ONNX is ever loaded, never a pickle. One intra-op thread, so that scores are the same bits on
every machine of a kind, and so that a worker keeps to its core.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from models.errors import HeadraceError
from models.pipeline import Pipeline
from models.windows import Floats

Scores = npt.NDArray[np.float32]

# Golden scores may differ by this much between processors: float32 sums of some hundred trees.
TOLERANCE = 1e-5


# Why a version is refused, for metrics.
Reason = Literal[
    "pipeline", "features", "definition", "graph", "golden", "slow", "damaged", "size", "foreign", "failed"
]


class ModelError(HeadraceError):
    """There is no model to be had: why, and what to do."""


class Refused(ModelError):
    """A version is not what it claims to be, or not what the pipeline takes."""

    def __init__(self, reason: Reason, sentence: str) -> None:
        super().__init__(sentence)
        self.reason: Reason = reason


class Card(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a model says of itself, beside its graph.

    thresholds: decision to the score from which it is taken. golden: vectors, NaN written as null,
    with the scores that the graph gave them when it was exported. metrics: of the evaluation, on events
    later than the first and not later than the second of `tested` (event times, ms).
    """

    pipeline: str
    version: str
    definition: str
    features: list[str]
    thresholds: dict[str, float]
    otherwise: str
    golden: list[list[float | None]]
    golden_scores: list[float]
    metrics: dict[str, float]
    tested: tuple[int, int] | None = None


class Decisions:
    """What a model decides by its scores."""

    def __init__(self, card: Card) -> None:
        # Rarest first: the decision is the first whose threshold a score reaches.
        ranked = sorted(card.thresholds.items(), key=lambda item: -item[1])
        self._names = [name for name, _ in ranked] + [card.otherwise]
        self._thresholds = np.array([threshold for _, threshold in ranked])

    def of(self, scores: npt.NDArray[Any]) -> list[str]:
        """The decision for each score; a score that is no number reaches no threshold."""
        short_of = (~(scores.astype(np.float64)[:, None] >= self._thresholds)).sum(axis=1)
        return [self._names[i] for i in short_of.tolist()]


class Model:
    """Scores vectors of one pipeline's definition."""

    def __init__(self, graph: bytes, card: Card, pipeline: Pipeline) -> None:
        """Load and check. graph: the ONNX file's bytes. Raises Refused."""
        self.card = card
        _matches(card, pipeline)
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        try:
            self._session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own exceptions share no public base
            first = str(error).splitlines()[0]
            raise Refused(
                "graph", f"The model {card.version} is no graph that can be loaded ({first}); train it again."
            ) from None
        self._input = self._only_input()
        self._output = self._last_output()
        self.decide = Decisions(card).of
        self._agree()

    def _only_input(self) -> str:
        """The name of the graph's input: one, of float32, as wide as the vector."""
        inputs, width = self._session.get_inputs(), len(self.card.features)
        found = [(i.type, i.shape[1:]) for i in inputs]
        if len(inputs) == 1 and found[0][0] == "tensor(float)" and found[0][1] in ([width], [None]):
            name: str = inputs[0].name
            return name
        shown = ", ".join(f"{kind} {[None, *shape]}" for kind, shape in found)
        raise Refused(
            "graph",
            f"The model {self.card.version} takes {shown or 'nothing'}, not one tensor of float32 with {width} "
            "columns; train it again.",
        )

    def _last_output(self) -> str:
        """The name of the output with the scores in its last column: of float32, as all scores are."""
        last = self._session.get_outputs()[-1]
        if last.type == "tensor(float)":
            name: str = last.name
            return name
        raise Refused(
            "graph",
            f"The model {self.card.version} gives {last.type}, not a tensor of float32; train it again.",
        )

    def _agree(self) -> None:
        """The graph still gives its golden vectors the scores that it was exported with."""
        card, width = self.card, len(self.card.features)
        if not card.golden or len(card.golden) != len(card.golden_scores):
            raise Refused(
                "golden", f"The model {card.version} has no golden vectors with a score each; train it again."
            )
        if any(len(row) != width for row in card.golden):
            raise Refused(
                "golden",
                f"The model {card.version} has golden vectors of another width than {width}; train it again.",
            )
        try:
            scores = self.score_many(np.array(card.golden, np.float64))  # null becomes NaN
        except Exception as error:  # onnxruntime's own, or no output of the shape that is taken
            first = str(error).splitlines()[0]
            raise Refused(
                "graph",
                f"The model {card.version} does not score vectors of {width} features ({first}); train it again.",
            ) from None
        worst = float(np.max(np.abs(scores - np.array(card.golden_scores))))
        if not worst <= TOLERANCE:
            raise Refused(
                "golden",
                f"The model {card.version} scores its own golden vectors {worst:.3g} away from what it was "
                f"exported with; train it again.",
            )

    def score_many(self, vectors: Floats) -> Scores:
        """Scores (n,) float32 in [0, 1] of vectors (n, width) float64."""
        with np.errstate(over="ignore"):  # what is too large for float32 is infinite, and trees take that
            inputs = vectors.astype(np.float32)
        output: Any = self._session.run([self._output], {self._input: inputs})[0]
        scores: Scores = output[:, -1]
        return scores


def scores_of(model: Model, vectors: Floats) -> Scores:
    """Scores (n,) of a model that is on trial. Raises whatever its graph does, and ValueError for another shape."""
    scores = model.score_many(vectors)
    if scores.shape != (len(vectors),):
        raise ValueError(f"it gives scores of shape {scores.shape} for {len(vectors)} events")
    return scores


def _matches(card: Card, pipeline: Pipeline) -> None:
    if card.pipeline != pipeline.name:
        raise Refused(
            "pipeline",
            f"The model {card.version} is of the pipeline {card.pipeline}, not of {pipeline.name}; put each "
            "model into its own pipeline's folder.",
        )
    if card.features != list(pipeline.vector):
        odd = [a or b for a, b in _pairs(card.features, pipeline.vector) if a != b]
        same = sorted(card.features) == sorted(pipeline.vector)
        takes = "the features in another order" if same else "other features"
        raise Refused(
            "features",
            f"The model {card.version} takes {takes} than the pipeline {pipeline.name} gives "
            f"(first difference: {odd[0]}); train it again.",
        )
    if card.definition != pipeline.definition:
        raise Refused(
            "definition",
            f"The model {card.version} was trained on definition {card.definition}, the pipeline "
            f"{pipeline.name} is at {pipeline.definition}; train it again.",
        )


def _pairs(a: list[str], b: tuple[str, ...]) -> list[tuple[str, str]]:
    longest = max(len(a), len(b))
    return list(zip(a + [""] * (longest - len(a)), [*b, *[""] * (longest - len(b))], strict=True))
