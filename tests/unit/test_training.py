"""Training: what is exported computes what was trained, and its card holds what workers and people read."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score

from models import training
from models.pipeline import Pipeline, load, parse
from models.scoring import TOLERANCE, Card, Model, ModelError

DAY = training.DAY_MS
START = 1_600_000_000_000
PIPELINES = Path(__file__).parents[2] / "configs" / "pipelines"

TEXT = """
name: shop
streams:
  orders:
    id: ID
    time: AT
    fields: {ID: int, AT: timestamp, BUYER: int, SHOP: int, A: float, B: float, C: float}
labels: {field: BAD, known: SEEN}
entities:
  buyer:
    key: BUYER
    features:
      BUYER_NB: {aggregate: count, window: 1d, delay: 5d}
  shop:
    key: SHOP
    features:
      SHOP_RISK: {aggregate: share, of: BAD, window: 1d, delay: 2d}
      SHOP_RISK_SOON: {aggregate: share, of: BAD, window: 1d, delay: 1d}
vector: [A, B, C, SHOP_RISK]
model: {decisions: {watch: 0.2, stop: 0.05}, trees: 25, depth: 3, learning_rate: 0.3, test_days: 4}
"""
SHOP = parse(TEXT)


def with_model(pipeline: Pipeline = SHOP, **changes: Any) -> Pipeline:
    return dataclasses.replace(pipeline, model=msgspec.structs.replace(pipeline.model, **changes))


def data(n: int = 6_000, seed: int = 0) -> tuple[Any, Any, Any]:
    """Twenty days of events. B is often missing, which itself speaks for a positive; D never is."""
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(n, 4))
    vectors[:, 2] = rng.integers(0, 5, n)
    missing = rng.random(n) < 0.2
    vectors[missing, 1] = np.nan
    logit = 1.5 * vectors[:, 0] + vectors[:, 3] + 1.5 * missing - 3
    labels = (rng.random(n) < 1 / (1 + np.exp(-logit))).astype(np.int8)
    times = START + np.sort(rng.integers(0, 20 * DAY, n))
    return vectors, labels, times


def narrow(split: np.float32, above: np.float32) -> tuple[Any, Any, Any]:
    """600 events, whose A is one of two numbers: `above` for the positives. Nothing else tells anything."""
    labels = np.arange(600) % 2
    vectors = np.zeros((600, 4))
    vectors[:, 0] = np.where(labels == 1, above, split)
    return vectors, labels.astype(np.int8), START + np.arange(600) * (DAY // 30)


NARROW = with_model(decisions={"stop": 0.5}, trees=3, depth=1)


@pytest.fixture(scope="module")
def trained() -> training.Trained:
    return training.train(SHOP, *data())


@pytest.fixture(scope="module")
def model(trained: training.Trained) -> Model:
    return Model(trained.graph, trained.card, SHOP)


@pytest.fixture(scope="module")
def classifier() -> Any:
    """The trees of the same rows as `trained`, as scikit-learn holds them."""
    vectors, labels, times = data()
    _, early, _ = training._split(SHOP, labels, times)
    return training._fit(SHOP, training._rounded(vectors[early]), labels[early], 1, lambda _: None)


def attributes(graph: bytes) -> dict[str, Any]:
    (node,) = onnx.load_from_string(graph).graph.node
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def changed(graph: bytes, name: str, values: Any) -> bytes:
    """The graph with other values of one attribute."""
    proto = onnx.load_from_string(graph)
    (node,) = proto.graph.node
    (old,) = [a for a in node.attribute if a.name == name]
    old.CopyFrom(onnx.helper.make_attribute(name, values))
    return proto.SerializeToString()


# --- the split in time -------------------------------------------------------------------------


def test_the_label_delay_is_the_longest_of_a_feature_over_labels() -> None:
    assert training.label_delay(SHOP) == 2 * DAY  # not 5: that one counts events
    assert training.label_delay(load(PIPELINES / "card-fraud.yaml")) == 7 * DAY
    assert training.label_delay(load(PIPELINES / "flight-delays.yaml")) == DAY
    entities = tuple(e for e in SHOP.entities if e.name == "buyer")
    assert training.label_delay(dataclasses.replace(SHOP, entities=entities)) == 0


def test_training_ends_a_label_delay_before_the_test_to_the_millisecond() -> None:
    vectors, labels, times = data()
    before = ((times <= times.max() - 6 * DAY).sum(), (times > times.max() - 4 * DAY).sum())
    edges = times.max() - np.array([6 * DAY, 6 * DAY - 1, 4 * DAY, 4 * DAY - 1])  # in, out, out, in
    times[-5:-1] = edges
    report = training.train(SHOP, vectors, labels, times).report
    assert (report["rows"], report["test_rows"]) == (before[0] + 1, before[1] - 4 + 1)
    assert report["split"] == times.max() - 4 * DAY


def test_nothing_after_the_training_days_reaches_the_trees(trained: training.Trained) -> None:
    vectors, labels, times = data()
    gap = (times > times.max() - 6 * DAY) & (times <= times.max() - 4 * DAY)
    assert gap.sum() > 100
    labels[gap] ^= 1
    vectors[gap] += 1
    again = training.train(SHOP, vectors, labels, times)
    assert (again.graph, again.card) == (trained.graph, trained.card)
    test = times > times.max() - 4 * DAY
    labels[test] ^= 1
    other = training.train(SHOP, vectors, labels, times)
    assert other.graph == trained.graph
    assert other.card.metrics["auc"] == pytest.approx(1 - trained.card.metrics["auc"])
    assert other.card.version != trained.card.version


@pytest.mark.parametrize(
    ("keep", "label", "says"),
    [
        (lambda t: t < START, None, "no events with labels to train shop on"),
        (lambda t: t > t.max() - 6 * DAY, None, ", 0 lie before the 4 days of the test and the 2 days"),
        (lambda t: t > t.max() - 6.3 * DAY, None, r"lower model\.test_days in the pipeline file"),
        (
            lambda t: t <= t.max() - 6 * DAY,
            0,
            r"All .* training events, .* label 0, .* lower model\.test_days",
        ),
        (lambda t: t <= t.max() - 6 * DAY, 1, "All .* training events, .* have the label 1"),
        (lambda t: t > t.max() - 4 * DAY, 0, r"All .* test events, .* label 0, .* raise model\.test_days"),
    ],
)
def test_too_little_to_learn_from_is_refused_with_the_remedy(keep: Any, label: int | None, says: str) -> None:
    vectors, labels, times = data()
    rows = keep(times)
    if label is None:
        vectors, labels, times = vectors[rows], labels[rows], times[rows]
    else:
        labels[rows] = label
    with pytest.raises(ModelError, match=says):
        training.train(SHOP, vectors, labels, times)


def test_states_of_labels_are_not_taken_for_labels() -> None:
    vectors, labels, times = data()
    with pytest.raises(ValueError, match="leave events of unknown label out"):
        training.train(SHOP, vectors, labels + 1, times)
    with pytest.raises(ValueError, match="no match"):
        training.train(SHOP, vectors[:, 1:], labels, times)


# --- the same rows, the same bytes -------------------------------------------------------------


def test_training_again_or_with_more_threads_gives_the_same_bytes(trained: training.Trained) -> None:
    for threads in (1, 2, 3):
        again = training.train(SHOP, *data(), threads=threads)
        assert (again.graph, again.card) == (trained.graph, trained.card)


def test_the_version_names_graph_and_card(trained: training.Trained) -> None:
    version = trained.card.version
    assert len(version) == 12
    assert int(version, 16) >= 0
    draft = msgspec.structs.replace(trained.card, version="")
    assert training._version(trained.graph, draft) == version
    assert training._version(trained.graph + b" ", draft) != version
    assert training._version(trained.graph, msgspec.structs.replace(draft, otherwise="no")) != version


def test_the_pipeline_s_trees_depth_and_learning_rate_are_followed() -> None:
    def first_tree(rows: int = 6_000, **changes: Any) -> tuple[int, Any]:
        graph = attributes(training.train(with_model(**changes), *data(rows)).graph)
        trees = np.array(graph["class_treeids"])
        return int(trees.max()) + 1, np.array(graph["class_weights"])[trees == 0]

    count, fast = first_tree(trees=7, depth=2, learning_rate=0.4)
    more, slow = first_tree(trees=9, depth=2, learning_rate=0.1)
    assert (count, more) == (7, 9)
    assert len(fast) == len(slow) == 4
    assert fast == pytest.approx(4 * slow)
    assert first_tree(rows=16_000, trees=60, depth=2, learning_rate=0.9)[0] == 60  # none is stopped early
    _, deep = first_tree(trees=1, depth=6, learning_rate=0.1)
    assert 31 < len(deep) <= 64  # the depth is the only bound; scikit-learn's own is 31 leaves


def test_the_pipeline_s_seed_is_followed() -> None:
    # Only bins of more than 200,000 rows are drawn by chance.
    vectors, labels, _ = data(260_000)
    pipelines = [with_model(trees=1, depth=2, seed=seed) for seed in (1, 1, 2)]
    one, same, other = (training._fit(p, training._rounded(vectors), labels, 1, print) for p in pipelines)
    export = [training._export(c, SHOP)[0] for c in (one, same, other)]
    assert export[0] == export[1] != export[2]


# --- the graph computes what was trained -------------------------------------------------------


def test_the_graph_is_what_the_card_says_it_is(trained: training.Trained) -> None:
    session = ort.InferenceSession(trained.graph, providers=["CPUExecutionProvider"])
    (given_,) = session.get_inputs()
    assert (given_.name, given_.type) == ("vectors", "tensor(float)")
    assert given_.shape[1:] == [4]
    assert [o.name for o in session.get_outputs()] == ["label", "probabilities"]
    vectors, labels, _ = data()
    found, both = session.run(None, {"vectors": vectors.astype(np.float32)})
    assert (found == (both[:, 1] > 0.5)).all()
    assert both.sum(axis=1) == pytest.approx(np.ones(len(both)), abs=1e-6)
    assert roc_auc_score(labels, both[:, -1]) > 0.8  # of label 1, not of 0
    proto = onnx.load_from_string(trained.graph)
    assert {o.domain: o.version for o in proto.opset_import} == {"": 18, "ai.onnx.ml": 3}
    assert proto.ir_version == 8


def test_the_graph_scores_as_the_trained_model(
    trained: training.Trained, model: Model, classifier: Any
) -> None:
    vectors, labels, times = data()
    expected = classifier.predict_proba(vectors.astype(np.float32))[:, 1]
    scores = model.score_many(vectors)
    assert np.abs(scores - expected).max() <= 2e-6
    late = times > times.max() - 4 * DAY
    metrics = trained.card.metrics
    assert metrics["worst_difference"] >= np.abs(scores - expected)[late].max()
    assert metrics["worst_difference"] <= TOLERANCE
    assert metrics["auc"] == pytest.approx(roc_auc_score(labels[late], scores[late]))
    assert metrics["ap"] == pytest.approx(average_precision_score(labels[late], scores[late]))
    assert metrics["test_positives"] == labels[late].sum()
    assert metrics["positives"] == labels[times <= times.max() - 6 * DAY].sum()


def test_a_value_beside_a_threshold_goes_the_way_that_was_trained(model: Model, classifier: Any) -> None:
    vectors, _, _ = data()
    rows = []
    for (tree,) in classifier._predictors:
        for split in tree.nodes[tree.nodes["is_leaf"] == 0]:
            at = np.float32(split["num_threshold"])
            for value in (np.nextafter(at, np.float32(-9)), at, np.nextafter(at, np.float32(9))):
                row = vectors[len(rows) % len(vectors)].copy()
                row[split["feature_idx"]] = value
                rows.append(row)
    planted = np.array(rows)
    assert len(planted) > 300
    expected = classifier.predict_proba(planted.astype(np.float32))[:, 1]
    assert np.abs(model.score_many(planted) - expected).max() <= 2e-6


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
@settings(max_examples=25)
def test_neighbours_among_float32_stay_apart(value: float) -> None:
    """The threshold between them is no float32: rounded to the nearest it is often the upper one."""
    split = np.float32(value)
    above = np.nextafter(split, np.float32(np.inf))
    if np.isinf(above):
        return
    trained = training.train(NARROW, *narrow(split, above))
    vectors = np.zeros((2, 4))
    vectors[:, 0] = split, above
    low, high = Model(trained.graph, trained.card, NARROW).score_many(vectors)
    assert low < 0.5 < high


@example(1e300, 0.0)
@example(float(np.finfo(np.float32).max), 0.0)
@given(st.floats(allow_nan=False), st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_a_threshold_in_float32_parts_float32_as_the_exact_one(threshold: float, value: float) -> None:
    (below,) = training._below(np.array([threshold]))
    assert (np.float32(value) <= below) == (value <= threshold)
    near = np.float32(max(min(threshold, 3e38), -3e38))
    for x in (np.nextafter(near, np.float32(-np.inf)), near, np.nextafter(near, np.float32(np.inf))):
        assert (x <= below) == (float(x) <= threshold)
    assert (np.inf <= below) == (np.finfo(np.float32).max <= below)  # infinities go with the largest


def test_a_graph_with_rounded_thresholds_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "_below", lambda thresholds: thresholds.astype(np.float32))
    with pytest.raises(ModelError, match=r"does not compute what was trained .* another onnxruntime"):
        for split in np.array([1.0, np.nextafter(np.float32(1), np.float32(2))], np.float32):
            training.train(NARROW, *narrow(split, np.nextafter(split, np.float32(2))))


def test_a_graph_that_errs_on_test_rows_only_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "_planted", lambda test, splits: test[:0])
    score = Model.score_many

    def scores_wrongly(self: Model, vectors: Any) -> Any:
        scores = score(self, vectors)
        scores[-1:] += 2 * TOLERANCE * (len(scores) > 100)
        return scores

    monkeypatch.setattr(Model, "score_many", scores_wrongly)
    with pytest.raises(ModelError, match="scores differ by up to 2"):
        training.train(SHOP, *data())


def test_a_graph_that_errs_beside_thresholds_only_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its test rows are all far from them."""
    monkeypatch.setattr(
        training, "_below", lambda thresholds: np.nextafter(thresholds.astype(np.float32), -9)
    )
    with pytest.raises(ModelError, match="scores differ by up to 0"):
        training.train(NARROW, *narrow(np.float32(1), np.float32(2)))


def test_missing_values_go_the_way_that_was_trained(model: Model, classifier: Any) -> None:
    vectors, _, _ = data(2_000, seed=1)
    vectors[::2, 0] = np.nan  # a column that was never missing in training
    vectors[::3, 2] = np.nan
    vectors[::5] = np.nan
    expected = classifier.predict_proba(vectors.astype(np.float32))[:, 1]
    assert np.abs(model.score_many(vectors) - expected).max() <= 2e-6
    with_b, _, _ = data(2_000, seed=2)
    with_b[:, 1] = 0.0
    without_b = with_b.copy()
    without_b[:, 1] = np.nan
    assert (model.score_many(without_b) > model.score_many(with_b)).mean() > 0.9


def test_a_column_that_is_missing_or_one_value_is_split_on_being_missing() -> None:
    vectors, labels, times = narrow(np.float32(1), np.float32(1))
    vectors[labels == 0, 0] = np.nan
    trained = training.train(NARROW, vectors, labels, times)
    rows = np.zeros((4, 4))
    rows[:, 0] = np.nan, -1e30, 1, np.inf
    scores = Model(trained.graph, trained.card, NARROW).score_many(rows)
    assert scores[0] < 0.5 < scores[1] == scores[2] == scores[3]


def test_infinite_values_are_taken_for_the_largest_finite_one() -> None:
    vectors, labels, times = narrow(np.float32(1), np.float32(1))
    vectors[labels == 1, 0] = np.tile([np.inf, 1e300], 150)
    vectors[:50:2, 0] = -np.inf
    vectors[:, 1] = np.where(labels == 1, -np.inf, np.inf)  # no finite value between them
    trained = training.train(NARROW, vectors, labels, times)
    assert len(trained.card.golden) > 1
    card = msgspec.json.decode(msgspec.json.encode(trained.card), type=Card)  # JSON has no infinity
    rows = np.zeros((4, 4))
    rows[:, 0] = -np.inf, 1, 3e38, np.inf
    rows[:, 1] = np.inf, np.inf, -np.inf, -np.inf
    scores = Model(trained.graph, card, NARROW).score_many(rows)
    assert scores[0] == scores[1] < 0.5 < scores[2] == scores[3]


@pytest.mark.parametrize("filled", [0, 1])
def test_a_column_without_values_is_ignored_and_named(filled: int) -> None:
    vectors, labels, times = data(8_000)
    vectors[:, 3] = np.nan
    vectors[:filled, 3] = 1.0
    said: list[str] = []
    trained = training.train(SHOP, vectors, labels, times, said.append)
    assert [line for line in said if "SHOP_RISK" in line] == [
        "SHOP_RISK has hardly a value in the training events; the model ignores it."
    ]
    model = Model(trained.graph, trained.card, SHOP)
    scores = model.score_many(vectors)
    vectors[:, 3] = 5.0
    assert (model.score_many(vectors) == scores).all()


@given(st.lists(st.integers(0, 70), max_size=12))
@settings(max_examples=50)
def test_a_score_does_not_depend_on_its_batch(model: Model, sizes: list[int]) -> None:
    """Else a prediction could not be computed again later."""
    vectors, _, _ = data(1_000, seed=3)
    cuts = np.minimum(np.cumsum([0, *sizes]), 1_000).tolist()
    parts = [model.score_many(vectors[a:b]) for a, b in zip(cuts, [*cuts[1:], 1_000], strict=True)]
    assert np.concatenate(parts).tobytes() == model.score_many(vectors).tobytes()


# --- the card ----------------------------------------------------------------------------------


def test_a_decision_is_taken_for_its_share_of_the_training_events(
    trained: training.Trained, model: Model
) -> None:
    vectors, _, times = data()
    scores = model.score_many(vectors)
    early, late = times <= times.max() - 6 * DAY, times > times.max() - 4 * DAY
    assert list(trained.card.thresholds) == ["stop", "watch"]
    for name, share in {"stop": 0.05, "watch": 0.2}.items():
        taken = np.isin(model.decide(scores), ["stop", name])
        assert taken[early].mean() == pytest.approx(share, abs=0.003)
        assert trained.report[f"training_share.{name}"] == taken[early].mean()
        assert trained.report[f"test_share.{name}"] == taken[late].mean()
        assert trained.card.thresholds[name] not in scores
    assert trained.card.otherwise == SHOP.model.otherwise == model.decide(np.zeros(1, np.float32))[0]


@given(st.lists(st.integers(-40, 40), min_size=1, max_size=300), st.floats(0.01, 0.99))
def test_a_threshold_takes_the_nearest_share_that_scores_allow(steps: list[int], share: float) -> None:
    one = np.float32(0.25)
    scores = one + np.array(steps, np.float32) * np.spacing(one)  # neighbours among float32, with ties
    wanted = max(1.0, share * len(scores))
    possible = [int((scores >= s).sum()) for s in np.unique(scores)]
    try:
        threshold = training._thresholds(scores, {"act": share})["act"]
    except ModelError as error:
        assert min(max(n / wanted, wanted / n) for n in possible) > 2
        assert "model.decisions.act" in str(error)
        return
    reached = int((scores.astype(np.float64) >= threshold).sum())
    assert max(reached / wanted, wanted / reached) == min(max(n / wanted, wanted / n) for n in possible) <= 2
    assert threshold not in scores.astype(np.float64) or threshold == scores.min()


def test_of_a_threshold_s_neighbours_in_float32_neither_is_counted_wrongly() -> None:
    one = np.float32(0.25)
    scores = np.array([one, np.nextafter(one, np.float32(1))] * 4)
    threshold = training._thresholds(scores, {"act": 0.5})["act"]
    assert float(scores[0]) < threshold < float(scores[1])
    assert np.float32(threshold) in scores  # so a comparison in float32 would count all or miss half


def test_decisions_that_scores_cannot_tell_apart_are_refused() -> None:
    vectors, labels, times = data()
    with pytest.raises(ModelError, match=r"'stop' is for 5.00% .* is 100.00%; give the model better"):
        training.train(SHOP, np.zeros_like(vectors), labels, times)


def test_golden_vectors_are_of_every_kind(trained: training.Trained, model: Model) -> None:
    card = trained.card
    golden, scores = np.array(card.golden, np.float64), np.array(card.golden_scores)
    assert 48 <= len(golden) <= 72
    assert (model.score_many(golden).astype(np.float64) == scores).all()
    assert (
        golden.astype(np.float32).astype(np.float64)[~np.isnan(golden)] == golden[~np.isnan(golden)]
    ).all()
    assert len({tuple(map(str, row)) for row in golden.tolist()}) == len(golden)
    vectors, _, times = data()
    test = model.score_many(vectors[times > times.max() - 4 * DAY]).astype(np.float64)
    assert {test.min(), test.max()} <= set(scores)
    assert np.diff(np.sort(scores)).max() < 0.15 * (test.max() - test.min())
    for threshold in card.thresholds.values():
        assert {test[test >= threshold].min(), test[test < threshold].max()} <= set(scores)
    lower, upper = golden[-16::2], golden[-15::2]  # pairs, a bit apart, on the two sides of a split
    differs = (lower != upper) & ~np.isnan(lower)
    assert (differs.sum(axis=1) == 1).all()
    assert (np.nextafter(lower[differs].astype(np.float32), np.float32(np.inf)) == upper[differs]).all()
    assert (np.abs(scores[-16::2] - scores[-15::2]) > 10 * TOLERANCE).all()


def test_golden_vectors_have_gaps_however_rare() -> None:
    rows = np.arange(4_000, dtype=np.float32).reshape(2_000, 2)
    rows[[90, 1_700], 1] = np.nan
    golden = training._golden(rows, rows[:, 0] / 4_000, [0.5], rows[:0])
    assert {180.0, 3_400.0} <= set(golden[:, 0].tolist())


def test_golden_vectors_tell_a_threshold_moved_by_one_bit(trained: training.Trained) -> None:
    values = np.array(attributes(trained.graph)["nodes_values"], np.float32)
    roots = np.array(attributes(trained.graph)["nodes_nodeids"]) == 0
    for towards in (-np.inf, np.inf):
        moved = np.where(roots, np.nextafter(values, np.float32(towards)), values)
        with pytest.raises(ModelError, match="own golden vectors"):
            Model(changed(trained.graph, "nodes_values", moved.tolist()), trained.card, SHOP)


def test_golden_vectors_tell_missing_values_and_leaves(trained: training.Trained) -> None:
    old = attributes(trained.graph)
    missing = [1 - way for way in old["nodes_missing_value_tracks_true"]]
    weights = [w * 1.01 for w in old["class_weights"]]
    for name, values in (("nodes_missing_value_tracks_true", missing), ("class_weights", weights)):
        with pytest.raises(ModelError, match="own golden vectors"):
            Model(changed(trained.graph, name, values), trained.card, SHOP)


def test_the_card_survives_json(trained: training.Trained) -> None:
    card = msgspec.json.decode(msgspec.json.encode(trained.card), type=Card)
    assert card == trained.card
    assert (card.pipeline, card.definition, card.features) == ("shop", SHOP.definition, list(SHOP.vector))
    Model(trained.graph, card, SHOP)


def test_progress_says_what_is_trained_on() -> None:
    said: list[str] = []
    training.train(NARROW, *narrow(np.float32(1), np.float32(2)), progress=said.append)
    assert said[0] == (
        "Training on 420 events until 2020-09-27 (210 positive), testing on the 120 after 2020-09-29."
    )
    assert said[-1].startswith("The exported graph agrees with the trained model within ")


# --- evaluation --------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(-5, 20)), max_size=60))
def test_evaluate_is_scikit_learn_s(rows: list[tuple[int, int]]) -> None:
    labels = np.array([label for label, _ in rows], np.int8)
    scores = np.array([score / 20 for _, score in rows], np.float32)
    found = training.evaluate(labels, scores)
    if len(set(labels.tolist())) < 2:
        assert np.isnan([found["auc"], found["ap"]]).all()
    else:
        assert found["auc"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
        assert found["ap"] == pytest.approx(average_precision_score(labels, scores), abs=1e-12)


# --- the extra ---------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["sklearn.ensemble", "threadpoolctl", "onnx", "skl2onnx"])
def test_without_the_extra_one_sentence(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModelError, match=r"Training needs .* pip install 'headrace\[train\]'"):
        training.train(SHOP, *data())


def test_evaluation_needs_nothing_of_the_extra() -> None:
    code = (
        "import sys; from models import training; import numpy as np;"
        "training.evaluate(np.array([0, 1], np.int8), np.array([0.1, 0.2]));"
        "sys.exit(bool({'sklearn', 'onnx', 'skl2onnx', 'threadpoolctl'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=PIPELINES.parents[1])
