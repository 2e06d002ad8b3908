"""Every kind of model: the graph computes what the library trained, and a graph that does not is refused."""

import dataclasses
from typing import Any

import msgspec
import numpy as np
import onnx
import onnxmltools
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from models import estimators, exporting, training
from models.estimators import KINDS, Fitted
from models.model_files import ModelFile
from models.scoring import TOLERANCE, Model, ModelError
from models.splits import Examples
from tests.unit.test_training import DAY, SHOP, START, data

SMALL: dict[str, dict[str, Any]] = {
    "logistic_regression": {},
    "random_forest": {"n_estimators": 30},
    "gradient_boosting": {"max_iter": 30},
    "xgboost": {"n_estimators": 30, "max_depth": 4},
    "lightgbm": {"n_estimators": 30},
}
TREES = [kind for kind in SMALL if kind != "logistic_regression"]


def train(kind: str, rows: tuple[Any, Any, Any], **more: Any) -> training.Trained:
    model = ModelFile(kind=kind, parameters=SMALL[kind], test_days=4)  # type: ignore[arg-type]
    return training.train(SHOP, model, Examples(*rows, {}), **more)


@dataclasses.dataclass
class One:
    trained: training.Trained
    model: Model
    fitted: Fitted


_made: dict[str, One] = {}


def one(kind: str) -> One:
    """A model of this kind, and the same as its library holds it; made once."""
    if kind not in _made:
        trained = train(kind, data())
        vectors, labels, times = data()
        early = times < START + 14 * DAY
        fitted = estimators.fit(kind, SMALL[kind], 0, exporting.rounded(vectors[early]), labels[early])
        _made[kind] = One(trained, Model(trained.graph, trained.card, SHOP), fitted)
    return _made[kind]


def beside_thresholds(graph: bytes, vectors: Any) -> Any:
    """Rows at every threshold of the graph, and at both its neighbours."""
    rows = []
    (node,) = onnx.load_from_string(graph).graph.node
    given_ = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    inner = np.flatnonzero(np.array(given_["nodes_modes"]) != b"LEAF")
    for i in inner.tolist():
        at = np.float32(given_["nodes_values"][i])
        for value in (np.nextafter(at, np.float32(-np.inf)), at, np.nextafter(at, np.float32(np.inf))):
            row = vectors[len(rows) % len(vectors)].copy()
            row[given_["nodes_featureids"][i]] = value
            rows.append(row)
    return np.array(rows)


@pytest.mark.parametrize("kind", SMALL)
def test_the_graph_scores_as_the_trained_model(kind: str) -> None:
    made = one(kind)
    vectors, labels, _ = data()
    scores = made.model.score_many(vectors)
    assert np.abs(scores - made.fitted.score(vectors.astype(np.float32))).max() <= 2e-6
    assert roc_auc_score(labels, scores) > 0.75
    assert made.trained.card.metrics["worst_difference"] <= 2e-6


@pytest.mark.parametrize("kind", TREES)
def test_a_value_beside_a_threshold_goes_the_way_that_was_trained(kind: str) -> None:
    made = one(kind)
    rows = beside_thresholds(made.trained.graph, data()[0])
    assert len(rows) > 500
    assert np.abs(made.model.score_many(rows) - made.fitted.score(exporting.rounded(rows))).max() <= 2e-6


@pytest.mark.parametrize("kind", SMALL)
def test_missing_values_go_the_way_that_was_trained(kind: str) -> None:
    made = one(kind)
    vectors, _, _ = data(2_000, seed=1)
    vectors[::2, 0] = np.nan  # a column that was never missing in training
    vectors[::3, 2] = np.nan
    vectors[::5] = np.nan
    expected = made.fitted.score(vectors.astype(np.float32))
    assert np.abs(made.model.score_many(vectors) - expected).max() <= 2e-6
    assert not np.isnan(expected).any()


@pytest.mark.parametrize("kind", SMALL)
def test_infinite_values_are_taken_for_the_largest_finite_one(kind: str) -> None:
    made = one(kind)
    rows = np.repeat(data()[0][:4], 3, axis=0)
    rows[:, 0] = np.tile([np.inf, 1e300, np.finfo(np.float32).max], 4)
    rows[::2, 2] = -np.inf
    rows[6:, 0] *= -1
    expected = made.fitted.score(exporting.rounded(rows))
    assert np.abs(made.model.score_many(rows) - expected).max() <= 2e-6


@pytest.mark.parametrize("kind", SMALL)
@given(sizes=st.lists(st.integers(0, 70), max_size=12))
@settings(max_examples=20)
def test_a_score_does_not_depend_on_its_batch(kind: str, sizes: list[int]) -> None:
    """Else a prediction could not be computed again later."""
    model = one(kind).model
    vectors, _, _ = data(1_000, seed=3)
    cuts = np.minimum(np.cumsum([0, *sizes]), 1_000).tolist()
    parts = [model.score_many(vectors[a:b]) for a, b in zip(cuts, [*cuts[1:], 1_000], strict=True)]
    assert np.concatenate(parts).tobytes() == model.score_many(vectors).tobytes()


@pytest.mark.parametrize("kind", SMALL)
def test_the_same_rows_give_the_same_bytes_whatever_the_threads(kind: str) -> None:
    made = one(kind).trained
    for threads in (1, 2):
        again = train(kind, data(), threads=threads)
        assert again.graph == made.graph
        assert again.card == made.card
        assert msgspec.json.encode(again.report) == msgspec.json.encode(made.report)


@pytest.mark.parametrize("kind", SMALL)
def test_the_graph_is_what_the_worker_s_runtime_reads(kind: str) -> None:
    graph = one(kind).trained.graph
    proto = onnx.load_from_string(graph)
    assert {o.domain: o.version for o in proto.opset_import} == {"": 18, "ai.onnx.ml": 3}
    assert proto.ir_version == 8
    assert kind == "logistic_regression" or [n.op_type for n in proto.graph.node] == [
        "TreeEnsembleClassifier"
    ]
    session = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])
    (given_,) = session.get_inputs()
    assert (given_.name, given_.type, given_.shape[1:]) == ("vectors", "tensor(float)", [4])
    assert [(o.name, o.type) for o in session.get_outputs()] == [
        ("label", "tensor(int64)"), ("probabilities", "tensor(float)"),
    ]  # fmt: skip
    label, both = session.run(None, {"vectors": data()[0].astype(np.float32)})
    assert (label == (both[:, 1] > 0.5)).all()
    assert both.sum(axis=1) == pytest.approx(np.ones(len(both)), abs=1e-6)


# --- what converters get wrong ------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["random_forest", "gradient_boosting", "lightgbm"])
def test_a_graph_with_rounded_thresholds_is_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "below", lambda thresholds: thresholds.astype(np.float32))
    vectors, labels, times = data()
    # Neighbours among float32, between which a library puts its thresholds.
    steps = np.arange(len(labels)) % 40
    vectors[:, 0] = np.float32(1) + np.where(labels == 1, steps, steps // 2 * 2 + 1) * np.spacing(
        np.float32(1)
    )
    with pytest.raises(ModelError, match=r"does not compute what was trained .* another onnxruntime"):
        train(kind, (vectors, labels, times))
    monkeypatch.undo()
    train(kind, (vectors, labels, times))


def test_a_forest_without_its_ways_for_missing_values_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "_missing_ways", lambda trees, forest: None)
    with pytest.raises(ModelError, match="does not compute what was trained"):
        train("random_forest", data())


def test_a_wrong_way_for_values_that_never_were_missing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the rows that are made to be odd show it."""
    vectors, labels, times = data()
    vectors[:, 1] = np.nan_to_num(vectors[:, 1])
    train("random_forest", (vectors, labels, times))
    monkeypatch.setattr(exporting, "_missing_ways", lambda trees, forest: None)
    with pytest.raises(ModelError, match="does not compute what was trained"):
        train("random_forest", (vectors, labels, times))


@pytest.mark.parametrize(
    ("kind", "converter"), [("xgboost", "convert_xgboost"), ("lightgbm", "convert_lightgbm")]
)
def test_a_converter_that_errs_is_found_out(
    kind: str, converter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert = getattr(onnxmltools, converter)

    def errs(*given_: Any, **more: Any) -> Any:
        model = convert(*given_, **more)
        for node in model.graph.node:
            for attribute in node.attribute:
                if attribute.name == "class_weights":
                    attribute.floats[0] += 0.01
        return model

    monkeypatch.setattr(onnxmltools, converter, errs)
    with pytest.raises(ModelError, match="does not compute what was trained"):
        train(kind, data())


def test_what_lightgbm_takes_for_zero_goes_with_zero() -> None:
    """It puts thresholds at 1e-35 on either side of it."""
    vectors, labels, times = data()
    vectors[:, 0] = np.round(vectors[:, 0]) + 0.0
    trained = train("lightgbm", (vectors, labels, times))
    near = {float(at) for column, at in exporting.splits(trained.graph) if column == 0 and abs(at) < 1e-30}
    tiny = np.float32(1e-35)
    assert near == {float(np.nextafter(-tiny, np.float32(-1))), float(tiny)}
    rows = np.repeat(vectors[:1], 6, axis=0)
    rows[:, 0] = -1e-34, -tiny, -1e-40, 0, tiny, 1e-34
    scores = Model(trained.graph, trained.card, SHOP).score_many(rows)
    assert scores[0] != scores[1] == scores[2] == scores[3] == scores[4] != scores[5]


def test_a_converter_that_fails_is_told_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*given_: Any, **more: Any) -> Any:
        raise RuntimeError("no such operator\nat all")

    monkeypatch.setattr(onnxmltools, "convert_xgboost", fails)
    with pytest.raises(ModelError, match=r"The xgboost cannot be exported \(no such operator\); change"):
        train("xgboost", data())


def test_xgboost_begins_at_a_half_unless_told_otherwise() -> None:
    vectors, labels, _ = data()
    inputs = exporting.rounded(vectors)
    default = estimators.fit("xgboost", SMALL["xgboost"], 0, inputs, labels)
    half = estimators.fit("xgboost", SMALL["xgboost"] | {"base_score": 0.5}, 0, inputs, labels)
    other = estimators.fit("xgboost", SMALL["xgboost"] | {"base_score": 0.1}, 0, inputs, labels)
    assert (default.score(inputs) == half.score(inputs)).all()
    assert (default.score(inputs) != other.score(inputs)).any()
    model = exporting.export(other, "shop", 4)
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    scores = session.run(None, {"vectors": inputs})[1][:, 1]
    assert np.abs(scores - other.score(inputs)).max() <= TOLERANCE


def test_a_regression_takes_the_mean_for_what_is_missing_and_large_numbers_as_they_are() -> None:
    vectors, labels, times = data()
    vectors[:, 2] = 1.6e9 + 1e5 * vectors[:, 2]  # in float32 the mean would be off by 64
    trained = train("logistic_regression", (vectors, labels, times))
    assert trained.card.metrics["worst_difference"] < 1e-6
    early = exporting.rounded(vectors[times < START + 14 * DAY]).astype(np.float64)
    rows = np.repeat(vectors[:1], 2, axis=0)
    rows[0, 1], rows[1, 1] = np.nan, np.nanmean(early[:, 1])
    absent, mean = Model(trained.graph, trained.card, SHOP).score_many(rows)
    assert absent == pytest.approx(mean, abs=1e-7)


def test_parameters_that_a_library_refuses_are_told() -> None:
    with pytest.raises(
        ModelError, match=r"The random_forest cannot be trained \(.*n_estimators.*\); change its"
    ):
        vectors, labels, _ = data()
        estimators.fit("random_forest", {"n_estimators": -3}, 0, exporting.rounded(vectors), labels)
    assert set(SMALL) == set(KINDS)
