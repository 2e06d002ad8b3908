"""A model is refused unless it is what it claims to be; a crash while it is saved does no harm."""

import dataclasses
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from models.pipeline import Pipeline, parse
from models.scoring import TOLERANCE, Card, Model, ModelError
from tables import model_folder

SHOP = parse("""
name: shop
streams:
  orders:
    id: ID
    time: AT
    fields: {ID: int, AT: timestamp, BUYER: int, A: float, B: float}
entities:
  buyer: {key: BUYER, features: {BUYER_NB: {aggregate: count, window: 1d}}}
vector: [A, B, BUYER_NB]
model: {decisions: {stop: 0.01}}
""")
GOLDEN: list[list[float | None]] = [[0.0, 1.0, None], [2.0, None, 3.0]]


def graph(weight: float = 1.0, width: int = 3) -> bytes:
    """Scores are sigmoid(weight * the first column), in the last column of the last of three outputs."""
    first = helper.make_tensor("first", TensorProto.INT64, [1], [0])
    factor = helper.make_tensor("factor", TensorProto.FLOAT, [1], [weight])
    one = helper.make_tensor("one", TensorProto.FLOAT, [1], [1.0])
    nodes = [
        helper.make_node("Gather", ["rows", "first"], ["a"], axis=1),
        helper.make_node("Mul", ["a", "factor"], ["logit"]),
        helper.make_node("Sigmoid", ["logit"], ["p"]),
        helper.make_node("Sub", ["one", "p"], ["q"]),
        helper.make_node("Concat", ["q", "p"], ["both"], axis=1),
    ]
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, columns])
        for name, columns in (("logit", 1), ("q", 1), ("both", 2))
    ]
    rows = helper.make_tensor_value_info("rows", TensorProto.FLOAT, [None, width])
    body = helper.make_graph(nodes, "shop", [rows], outputs, initializer=[first, factor, one])
    proto = helper.make_model(body, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    return bytes(proto.SerializeToString())


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def card(**changes: Any) -> Card:
    whole = Card(
        pipeline="shop",
        version="0123456789ab",
        definition=SHOP.definition,
        features=list(SHOP.vector),
        thresholds={"look": 0.5, "stop": 0.9, "wait": 0.7},
        otherwise="pass",
        golden=GOLDEN,
        golden_scores=sigmoid([0.0, 2.0]).tolist(),
        metrics={"auc": 0.9},
    )
    return msgspec.structs.replace(whole, **changes)


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
        ModelError, match=rf"other features than the pipeline shop .*: {odd}\); train it again"
    ):
        Model(graph(), card(features=features), SHOP)


def test_another_definition_is_refused() -> None:
    other: Pipeline = dataclasses.replace(SHOP, definition="f" * 16)
    with pytest.raises(
        ModelError, match=rf"definition {SHOP.definition}, .* shop is at ffff.*; train it again"
    ):
        Model(graph(), card(), other)


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


# --- the folder --------------------------------------------------------------------------------


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    where = model_folder.save(tmp_path, graph(), card())
    assert where == tmp_path / "shop" / "0123456789ab"
    model = model_folder.load(tmp_path, SHOP)
    assert model.card == card()
    assert (where / "model.onnx").read_bytes() == graph()
    assert (where / "features.txt").read_text().split() == list(SHOP.vector)
    rows = np.array([[0.5, np.nan, 1.0]])
    assert model.score_many(rows) == Model(graph(), card(), SHOP).score_many(rows)


def test_the_last_saved_is_the_champion_and_rollback_is_one_line(tmp_path: Path) -> None:
    model_folder.save(tmp_path, graph(), card())
    second = card(version="second", golden_scores=sigmoid([0.0, 4.0]).tolist())
    model_folder.save(tmp_path, graph(2.0), second)
    assert model_folder.load(tmp_path, SHOP).card == second
    (tmp_path / "shop" / "champion").write_text("0123456789ab\n")
    assert model_folder.load(tmp_path, SHOP).card == card()


@pytest.mark.parametrize("write", range(5))
def test_a_crash_while_saving_leaves_the_old_champion(
    write: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_folder.save(tmp_path, graph(), card())
    left = iter(range(write))

    def crashing(real: Any) -> Any:
        def call(*arguments: Any) -> Any:
            if next(left, None) is None:
                raise KeyboardInterrupt
            return real(*arguments)

        return call

    for name in ("write_bytes", "write_text", "replace"):
        monkeypatch.setattr(Path, name, crashing(getattr(Path, name)))
    with pytest.raises(KeyboardInterrupt):
        model_folder.save(tmp_path, graph(2.0), card(version="second", golden_scores=[0.5, 0.99]))
    monkeypatch.undo()
    assert model_folder.load(tmp_path, SHOP).card.version == "0123456789ab"


@pytest.mark.parametrize("gone", ["champion", "0123456789ab/model.json", "0123456789ab/model.onnx"])
def test_a_missing_file_is_named_with_the_command_that_makes_it(gone: str, tmp_path: Path) -> None:
    model_folder.save(tmp_path, graph(), card())
    (tmp_path / "shop" / gone).unlink()
    with pytest.raises(ModelError, match=rf"{gone} cannot be read.*`headrace train --pipeline shop`"):
        model_folder.load(tmp_path, SHOP)


@pytest.mark.parametrize("text", ["", "{", '{"pipeline": "shop"}', "[]", '{"version": 3}'])
def test_a_damaged_card_is_refused(text: str, tmp_path: Path) -> None:
    where = model_folder.save(tmp_path, graph(), card())
    (where / "model.json").write_text(text)
    with pytest.raises(ModelError, match=r"model\.json is damaged .*; train again"):
        model_folder.load(tmp_path, SHOP)


def test_a_damaged_graph_is_refused(tmp_path: Path) -> None:
    where = model_folder.save(tmp_path, graph(), card())
    (where / "model.onnx").write_bytes(graph(1.5))
    with pytest.raises(ModelError, match="own golden vectors"):
        model_folder.load(tmp_path, SHOP)
    (where / "model.onnx").write_bytes(b"\x00" * 100)
    with pytest.raises(ModelError, match="no graph that can be loaded"):
        model_folder.load(tmp_path, SHOP)


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
