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

from models import cards, exporting, splits, training
from models.errors import HeadraceError
from models.estimators import Fitted
from models.evaluation import DAY_MS as DAY
from models.figures import FIGURES
from models.model_files import ModelFile
from models.pipeline import Pipeline, load, parse
from models.scoring import TOLERANCE, Card, Model, ModelError
from models.splits import Examples

START = 18_518 * DAY
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
model: {decisions: {watch: 0.2, stop: 0.05}}
"""
SHOP = parse(TEXT)
TREES = {"max_iter": 25, "max_depth": 3, "learning_rate": 0.3}
MODEL = ModelFile(parameters=TREES, test_days=4)


def train(
    rows: tuple[Any, Any, Any], model: ModelFile = MODEL, pipeline: Pipeline = SHOP, **more: Any
) -> Any:
    keys = more.pop("keys", {})
    return training.train(pipeline, model, Examples(*rows, keys), **more)


def trees(**parameters: Any) -> ModelFile:
    return ModelFile(parameters=TREES | parameters, test_days=4)


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


NARROW = dataclasses.replace(SHOP, model=msgspec.structs.replace(SHOP.model, decisions={"stop": 0.5}))
STUMPS = trees(max_iter=3, max_depth=1)


@pytest.fixture(scope="module")
def trained() -> training.Trained:
    trained: training.Trained = train(data())
    return trained


@pytest.fixture(scope="module")
def model(trained: training.Trained) -> Model:
    return Model(trained.graph, trained.card, SHOP)


@pytest.fixture(scope="module")
def fitted() -> Fitted:
    """The trees of the same rows as `trained`, as scikit-learn holds them."""
    vectors, labels, times = data()
    early = splits.split_at(SHOP, MODEL, Examples(vectors, labels, times, {})).early
    return training._fit(SHOP, MODEL, exporting.rounded(vectors[early]), labels[early], 1, lambda _: None)


@pytest.fixture(scope="module")
def classifier(fitted: Fitted) -> Any:
    return fitted.classifier


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
    assert splits.label_delay(SHOP) == 2 * DAY  # not 5: that one counts events
    assert splits.label_delay(load(PIPELINES / "card-fraud.yaml")) == 7 * DAY
    assert splits.label_delay(load(PIPELINES / "flight-delays.yaml")) == DAY
    entities = tuple(e for e in SHOP.entities if e.name == "buyer")
    assert splits.label_delay(dataclasses.replace(SHOP, entities=entities)) == 0


def test_training_ends_a_label_delay_before_the_test_to_the_millisecond() -> None:
    vectors, labels, times = data()
    before = ((times < START + 14 * DAY).sum(), (times >= START + 16 * DAY).sum())
    edges = START + np.array([14 * DAY - 1, 14 * DAY, 16 * DAY - 1, 16 * DAY])  # in, out, out, in
    times[-5:-1] = edges
    report = train((vectors, labels, times)).report
    assert (report["rows"], report["test_rows"]) == (before[0] + 1, before[1] - 4 + 1)
    assert report["split"] == START + 16 * DAY


def test_nothing_after_the_training_days_reaches_the_trees(trained: training.Trained) -> None:
    vectors, labels, times = data()
    gap = (times >= START + 14 * DAY) & (times < START + 16 * DAY)
    assert gap.sum() > 100
    labels[gap] ^= 1
    vectors[gap] += 1
    again = train((vectors, labels, times))
    assert (again.graph, again.card) == (trained.graph, trained.card)
    test = times >= START + 16 * DAY
    labels[test] ^= 1
    other = train((vectors, labels, times))
    assert other.graph == trained.graph
    assert other.card.metrics["auc"] == pytest.approx(1 - trained.card.metrics["auc"])
    assert other.card.version != trained.card.version


@pytest.mark.parametrize(
    ("keep", "label", "says"),
    [
        (lambda t: t < START, None, "no events with labels to train shop on"),
        (lambda t: t >= START + 14 * DAY, None, ", 0 lie before the 4 days of the test and the 2 days"),
        (lambda t: t > START + 13.7 * DAY, None, "lower test_days in the model file"),
        (
            lambda t: t < START + 14 * DAY,
            0,
            r"All .* training events, .* label 0, .* lower test_days",
        ),
        (lambda t: t < START + 14 * DAY, 1, "All .* training events, .* have the label 1"),
        (lambda t: t >= START + 16 * DAY, 0, r"All .* test events, .* label 0, .* raise test_days"),
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
        train((vectors, labels, times))


def test_states_of_labels_are_not_taken_for_labels() -> None:
    vectors, labels, times = data()
    with pytest.raises(ValueError, match="leave events of unknown label out"):
        train((vectors, labels + 1, times))
    with pytest.raises(ValueError, match="no match"):
        train((vectors[:, 1:], labels, times))


# --- the same rows, the same bytes -------------------------------------------------------------


def test_training_again_or_with_more_threads_gives_the_same_bytes(trained: training.Trained) -> None:
    for threads in (1, 2, 3):
        again = train(data(), threads=threads)
        assert (again.graph, again.card) == (trained.graph, trained.card)


def test_the_version_names_graph_and_card(trained: training.Trained) -> None:
    version = trained.card.version
    assert len(version) == 12
    assert int(version, 16) >= 0
    draft = msgspec.structs.replace(trained.card, version="")
    assert cards.version_of(trained.graph, draft) == version
    assert cards.version_of(trained.graph + b" ", draft) != version
    assert cards.version_of(trained.graph, msgspec.structs.replace(draft, otherwise="no")) != version


def test_the_parameters_are_followed() -> None:
    def first_tree(rows: int = 6_000, **parameters: Any) -> tuple[int, Any]:
        graph = attributes(train(data(rows), trees(**parameters)).graph)
        ids = np.array(graph["class_treeids"])
        return int(ids.max()) + 1, np.array(graph["class_weights"])[ids == 0]

    count, fast = first_tree(max_iter=7, max_depth=2, learning_rate=0.4)
    more, slow = first_tree(max_iter=9, max_depth=2, learning_rate=0.1)
    assert (count, more) == (7, 9)
    assert len(fast) == len(slow) == 4
    assert fast == pytest.approx(4 * slow)
    assert (
        first_tree(rows=16_000, max_iter=60, max_depth=2, learning_rate=0.9)[0] == 60
    )  # none is stopped early
    _, deep = first_tree(max_iter=1, max_depth=6, learning_rate=0.1)
    assert 31 < len(deep) <= 64  # the depth is the only bound; scikit-learn's own is 31 leaves


def test_the_seed_is_followed() -> None:
    # Only bins of more than 200,000 rows are drawn by chance.
    vectors, labels, _ = data(260_000)
    models = [ModelFile(parameters={"max_iter": 1, "max_depth": 2}, seed=seed) for seed in (1, 1, 2)]
    fitted = [training._fit(SHOP, m, exporting.rounded(vectors), labels, 1, print) for m in models]
    export = [exporting.export(one, "shop", 4) for one in fitted]
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
    late = times >= START + 16 * DAY
    metrics = trained.card.metrics
    assert metrics["worst_difference"] >= np.abs(scores - expected)[late].max()
    assert metrics["worst_difference"] <= TOLERANCE
    assert metrics["auc"] == pytest.approx(roc_auc_score(labels[late], scores[late]))
    assert metrics["ap"] == pytest.approx(average_precision_score(labels[late], scores[late]))
    assert metrics["test_positives"] == labels[late].sum()
    assert metrics["positives"] == labels[times < START + 14 * DAY].sum()


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
    trained = train(narrow(split, above), STUMPS, NARROW)
    vectors = np.zeros((2, 4))
    vectors[:, 0] = split, above
    low, high = Model(trained.graph, trained.card, NARROW).score_many(vectors)
    assert low < 0.5 < high


@example(1e300, 0.0)
@example(float(np.finfo(np.float32).max), 0.0)
@given(st.floats(allow_nan=False), st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_a_threshold_in_float32_parts_float32_as_the_exact_one(threshold: float, value: float) -> None:
    (below,) = exporting.below(np.array([threshold]))
    assert (np.float32(value) <= below) == (value <= threshold)
    near = np.float32(max(min(threshold, 3e38), -3e38))
    for x in (np.nextafter(near, np.float32(-np.inf)), near, np.nextafter(near, np.float32(np.inf))):
        assert (x <= below) == (float(x) <= threshold)
    assert (np.inf <= below) == (np.finfo(np.float32).max <= below)  # infinities go with the largest


def test_a_graph_with_rounded_thresholds_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "below", lambda thresholds: thresholds.astype(np.float32))
    with pytest.raises(ModelError, match=r"does not compute what was trained .* another onnxruntime"):
        for split in np.array([1.0, np.nextafter(np.float32(1), np.float32(2))], np.float32):
            train(narrow(split, np.nextafter(split, np.float32(2))), STUMPS, NARROW)


def test_a_graph_that_errs_on_test_rows_only_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "planted", lambda test, found: test[:0])
    score = Model.score_many

    def scores_wrongly(self: Model, vectors: Any) -> Any:
        scores = score(self, vectors)
        scores[-1:] += 2 * TOLERANCE * (len(scores) > 100)
        return scores

    monkeypatch.setattr(Model, "score_many", scores_wrongly)
    with pytest.raises(ModelError, match="scores differ by up to 2"):
        train(data())


def test_a_graph_that_errs_beside_thresholds_only_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its test rows are all far from them."""
    monkeypatch.setattr(
        exporting, "below", lambda thresholds: np.nextafter(thresholds.astype(np.float32), -9)
    )
    with pytest.raises(ModelError, match="scores differ by up to 0"):
        train(narrow(np.float32(1), np.float32(2)), STUMPS, NARROW)


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
    trained = train((vectors, labels, times), STUMPS, NARROW)
    rows = np.zeros((4, 4))
    rows[:, 0] = np.nan, -1e30, 1, np.inf
    scores = Model(trained.graph, trained.card, NARROW).score_many(rows)
    assert scores[0] < 0.5 < scores[1] == scores[2] == scores[3]


def test_infinite_values_are_taken_for_the_largest_finite_one() -> None:
    vectors, labels, times = narrow(np.float32(1), np.float32(1))
    vectors[labels == 1, 0] = np.tile([np.inf, 1e300], 150)
    vectors[:50:2, 0] = -np.inf
    vectors[:, 1] = np.where(labels == 1, -np.inf, np.inf)  # no finite value between them
    trained = train((vectors, labels, times), STUMPS, NARROW)
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
    trained = train((vectors, labels, times), progress=said.append)
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
    early, late = times < START + 14 * DAY, times >= START + 16 * DAY
    assert list(trained.card.thresholds) == ["stop", "watch"]
    for told, (name, share) in zip(
        trained.report["decisions"], {"stop": 0.05, "watch": 0.2}.items(), strict=True
    ):
        assert told["decision"] == name
        taken = np.isin(model.decide(scores), ["stop", name])
        assert taken[early].mean() == pytest.approx(share, abs=0.003)
        assert told["training_share"] == taken[early].mean()
        assert told["test_share"] == taken[late].mean()
        assert trained.card.thresholds[name] not in scores
    assert trained.card.otherwise == SHOP.model.otherwise == model.decide(np.zeros(1, np.float32))[0]


@given(st.lists(st.integers(-40, 40), min_size=1, max_size=300), st.floats(0.01, 0.99))
def test_a_threshold_takes_the_nearest_share_that_scores_allow(steps: list[int], share: float) -> None:
    one = np.float32(0.25)
    scores = one + np.array(steps, np.float32) * np.spacing(one)  # neighbours among float32, with ties
    wanted = max(1.0, share * len(scores))
    possible = [int((scores >= s).sum()) for s in np.unique(scores)]
    try:
        threshold = cards.thresholds_for(scores, {"act": share})["act"]
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
    threshold = cards.thresholds_for(scores, {"act": 0.5})["act"]
    assert float(scores[0]) < threshold < float(scores[1])
    assert np.float32(threshold) in scores  # so a comparison in float32 would count all or miss half


def test_decisions_that_scores_cannot_tell_apart_are_refused() -> None:
    vectors, labels, times = data()
    with pytest.raises(ModelError, match=r"'stop' is for 5.00% .* is 100.00%; give the model better"):
        train((np.zeros_like(vectors), labels, times))


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
    test = model.score_many(vectors[times >= START + 16 * DAY]).astype(np.float64)
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
    golden = cards.golden_rows(rows, rows[:, 0] / 4_000, [0.5], rows[:0])
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
    train(narrow(np.float32(1), np.float32(2)), STUMPS, NARROW, progress=said.append)
    assert said[0] == (
        "Training on 420 events before 2020-09-27 (210 positive), testing on the 120 from 2020-09-29 on."
    )
    assert said[-1].startswith("The exported graph agrees with the trained model within ")


# --- folds, entities and money ------------------------------------------------------------------


def test_folds_go_back_by_the_length_of_the_test_and_know_no_later_label(trained: training.Trained) -> None:
    vectors, labels, times = data()
    report = train((vectors, labels, times), folds=3).report
    assert [fold["split"] for fold in report["folds"]] == [START + day * DAY for day in (16, 12, 8)]
    assert report["folds"][0] == {k: report[k] for k in ("split", *FIGURES)}
    assert report["over_folds"]["ap"]["mean"] == pytest.approx(np.mean([f["ap"] for f in report["folds"]]))
    assert report["over_folds"]["ap"]["deviation"] == pytest.approx(
        np.std([f["ap"] for f in report["folds"]])
    )
    labels[(times >= START + 6 * DAY) & (times < START + 8 * DAY)] ^= 1  # not known by the third test
    labels[times >= START + 12 * DAY] ^= 1
    assert train((vectors, labels, times), folds=3).report["folds"][2] == report["folds"][2]
    labels[times < START + DAY] ^= 1
    assert train((vectors, labels, times), folds=3).report["folds"][2] != report["folds"][2]
    with pytest.raises(ModelError, match="take fewer folds"):
        train((vectors, labels, times), folds=5)


def test_a_fold_is_what_training_on_less_would_have_been() -> None:
    vectors, labels, times = data()
    third = train((vectors, labels, times), folds=3).report["folds"][2]
    before = times < START + 12 * DAY
    alone = train((vectors[before], labels[before], times[before])).report["folds"][0]
    assert third == pytest.approx(alone, abs=1e-6)  # one by the library's scores, the other by the graph's


def test_training_days_bound_what_is_trained_on() -> None:
    vectors, labels, times = data()
    model = msgspec.structs.replace(MODEL, train_days=3)
    report = train((vectors, labels, times), model).report
    assert report["rows"] == ((times >= START + 11 * DAY) & (times < START + 14 * DAY)).sum()


def test_known_entities_are_left_out_of_the_evaluation_only() -> None:
    rows = data()
    shops = np.random.default_rng(1).integers(-1, 400, len(rows[0]))
    model = msgspec.structs.replace(MODEL, entity="shop", top=5)
    whole = train(rows, model, keys={"shop": shops})
    part = train(rows, msgspec.structs.replace(model, skip_known=True), keys={"shop": shops})
    assert part.graph == whole.graph
    assert part.card.thresholds == whole.card.thresholds
    vectors, labels, _ = rows
    counted = splits.split_at(
        SHOP, msgspec.structs.replace(model, skip_known=True), Examples(*rows, {"shop": shops})
    )
    assert part.report["test_rows"] == counted.counted.sum() < whole.report["test_rows"]
    scores = Model(part.graph, part.card, SHOP).score_many(vectors)[counted.counted]
    assert part.card.metrics["ap"] == pytest.approx(average_precision_score(labels[counted.counted], scores))
    with pytest.raises(ModelError, match="`headrace features compute` again"):
        train(rows, model)
    with pytest.raises(HeadraceError, match="no entity 'till'; it has buyer, shop"):
        train(rows, msgspec.structs.replace(model, entity="till"))


def test_a_decision_costs_what_it_misses_and_what_it_looks_at() -> None:
    vectors, labels, times = data()
    vectors[:, 2] = np.where(np.arange(len(labels)) % 5, 10.0, np.nan)
    trained = train((vectors, labels, times), msgspec.structs.replace(MODEL, amount="C", review_cost=0.5))
    scores, late = Model(trained.graph, trained.card, SHOP).score_many(vectors), times >= START + 16 * DAY
    told = {one["decision"]: one for one in trained.report["decisions"]}
    missed = late & (labels == 1) & (scores < told["watch"]["threshold"])
    looked = (late & (scores >= told["watch"]["threshold"])).sum()
    assert told["watch"]["cost"] == pytest.approx(np.nansum(vectors[missed, 2]) + 0.5 * looked)
    assert told["watch"]["cost_without"] == pytest.approx(np.nansum(vectors[late & (labels == 1), 2]))
    with pytest.raises(
        ModelError, match=r"amount 'AMOUNT' .* no input of the pipeline shop; take one of A, B"
    ):
        train((vectors, labels, times), msgspec.structs.replace(MODEL, amount="AMOUNT"))


def test_the_importance_is_highest_of_what_the_labels_were_made_of(trained: training.Trained) -> None:
    falls = trained.report["importance"]
    assert list(falls)[:2] == ["A", "SHOP_RISK"]
    assert abs(falls["C"]) < 0.02


# --- the extra ---------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["sklearn.ensemble", "threadpoolctl", "onnx", "skl2onnx"])
def test_without_the_extra_one_sentence(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModelError, match=r"Training needs .* pip install 'headrace\[train\]'"):
        train(data())


def test_evaluation_needs_nothing_of_the_extra() -> None:
    code = (
        "import sys; from models import evaluation; import numpy as np;"
        "evaluation.evaluate(np.array([0, 1], np.int8), np.array([0.1, 0.2]));"
        "sys.exit(bool({'sklearn', 'onnx', 'skl2onnx', 'threadpoolctl'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=PIPELINES.parents[1])
