"""A model is refused unless it is what it claims to be; a crash while it is saved does no harm."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto

from models.pipeline import Pipeline
from models.scoring import TOLERANCE, Model, ModelError, Refused
from tests.fixtures.models import GOLDEN, SHOP, card, graph, sigmoid

# --- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("features", "odd"),
    [
        (["A", "C", "BUYER_NB"], "C"),
        (["B", "A", "BUYER_NB"], "B"),
        (["A", "B"], "BUYER_NB"),
        (["A", "B", "BUYER_NB", "D"], "D"),
    ],
)
def test_other_features_are_refused_and_the_first_is_named(features: list[str], odd: str) -> None:
    with pytest.raises(
        ModelError,
        match=rf"(other features|the features in another order) than the pipeline shop .*: {odd}\); train it again",
    ):
        Model(graph(), card(features=features), SHOP)


def test_another_definition_is_refused() -> None:
    other: Pipeline = dataclasses.replace(SHOP, definition="f" * 16)
    with pytest.raises(
        ModelError, match=rf"definition {SHOP.definition}, .* shop is at ffff.*; train it again"
    ):
        Model(graph(), card(), other)


@pytest.mark.parametrize(
    ("changes", "takes"),
    [
        ({"width": 2}, r"tensor\(float\) \[None, 2\]"),
        ({"kind": TensorProto.DOUBLE}, r"tensor\(double\) \[None, 3\]"),
        ({"more": [("other", 3)]}, r"tensor\(float\) \[None, 3\], tensor\(float\) \[None, 3\]"),
    ],
)
def test_a_graph_with_another_input_is_refused(changes: dict[str, Any], takes: str) -> None:
    with pytest.raises(Refused, match=f"takes {takes}, not one tensor of float32 with 3 columns") as refused:
        Model(graph(**changes), card(), SHOP)
    assert refused.value.reason == "graph"


def test_a_graph_that_gives_no_float32_is_refused() -> None:
    with pytest.raises(Refused, match=r"gives tensor\(double\), not a tensor of float32") as refused:
        Model(graph(gives=TensorProto.DOUBLE), card(), SHOP)
    assert refused.value.reason == "graph"


@pytest.mark.parametrize("damaged", [b"", b"no graph", graph()[:-40]])
def test_a_graph_that_cannot_be_loaded_is_refused(damaged: bytes) -> None:
    with pytest.raises(ModelError, match="0123456789ab is no graph that can be loaded"):
        Model(damaged, card(), SHOP)


def test_a_graph_that_scores_its_golden_vectors_otherwise_is_refused() -> None:
    for weight in (1.01, -1.0, float("nan")):
        with pytest.raises(ModelError, match=r"scores its own golden vectors .* train it again"):
            Model(graph(weight), card(), SHOP)
    low, high = sigmoid([0.0, 2.0]).tolist()
    with pytest.raises(ModelError, match="golden vectors 2e-05 away"):
        Model(graph(), card(golden_scores=[low, high + 2 * TOLERANCE]), SHOP)
    Model(graph(), card(golden_scores=[low, high + TOLERANCE / 2]), SHOP)  # another processor's last bits


# --- scores and decisions ----------------------------------------------------------------------


def test_a_score_is_the_last_column_of_the_last_output() -> None:
    model = Model(graph(), card(), SHOP)
    vectors = np.array([[-2.0, 0, 0], [0, np.nan, 1e9], [3, 1, np.nan]])
    scores = model.score_many(vectors)
    assert scores.dtype == np.float32
    assert scores.shape == (3,)
    assert scores == pytest.approx(sigmoid([-2, 0, 3]), abs=1e-6)
    assert model.score_many(vectors[:0]).shape == (0,)


def test_the_decision_is_the_rarest_whose_threshold_is_reached() -> None:
    model = Model(graph(), card(), SHOP)
    scores = np.array([0.0, 0.49, 0.5, 0.69, 0.7, 0.89, 0.95, 1.0], np.float32)
    assert model.decide(scores) == ["pass", "pass", "look", "look", "look", "wait", "stop", "stop"]
    # 0.7 in float32 is 0.699999988, below the threshold; compared in float32 it would wait.
    assert model.decide(np.array([np.nextafter(np.float32(0.7), np.float32(1))])) == ["wait"]
    assert model.decide(np.zeros(0, np.float32)) == []


@given(
    st.dictionaries(st.sampled_from("abcde"), st.sampled_from([0.1, 0.25, 0.5, 0.75, 0.9]), min_size=1),
    st.lists(st.sampled_from([0.0, 0.1, 0.25, 0.3, 0.5, 0.6, 0.75, 0.9, 1.0]), max_size=20),
)
def test_decisions_are_those_of_the_plain_rule(thresholds: dict[str, float], scores: list[float]) -> None:
    model = Model(graph(), card(thresholds=thresholds), SHOP)
    values = np.array(scores, np.float32)

    def rule(score: float) -> str:
        reached = [name for name, threshold in thresholds.items() if score >= threshold]
        # Of equal thresholds the first that the card names, which is the rarest.
        return max(reached, key=lambda name: thresholds[name]) if reached else "pass"

    assert model.decide(values) == [rule(score) for score in values.astype(np.float64).tolist()]


# --- cards that do not fit their graph ---------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"golden": [], "golden_scores": []}, "has no golden vectors with a score each"),
        ({"golden_scores": [0.5]}, "has no golden vectors with a score each"),
        ({"golden": [[1.0], [2.0]]}, "golden vectors of another width"),
        ({"golden": [GOLDEN[0], GOLDEN[1][:1]]}, "golden vectors of another width"),
        ({"pipeline": "another"}, "is of the pipeline another"),
    ],
)
def test_a_card_that_does_not_fit_is_refused_in_a_sentence(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ModelError, match=sentence):
        Model(graph(), card(**changes), SHOP)


def test_a_score_that_is_no_number_takes_no_decision() -> None:
    model = Model(graph(), card(), SHOP)
    assert model.decide(np.array([np.nan], np.float32)) == [model.card.otherwise]
