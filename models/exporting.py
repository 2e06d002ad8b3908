"""From what a library trained to an ONNX graph, and the proof that the two agree.

skl2onnx and onnxmltools write the trees; what they get wrong is mended before or after, and `worst_difference`
finds what is left: nothing is believed of a converter.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import numpy as np

from models.estimators import LARGEST, Fitted, Rounded, extra
from models.scoring import TOLERANCE, Model, ModelError
from models.windows import Floats, Ints

# Old enough for every onnxruntime in use; from `ai.onnx.ml` 5 on TreeEnsembleClassifier is deprecated.
OPSETS = {"": 18, "ai.onnx.ml": 3}
IR_VERSION = 8
ZERO = np.float32(1e-35)  # what is not farther from 0 LightGBM takes for 0, in training and later
PLANTED_SPLITS = 4_000  # thresholds of the trees beside which the graph is tried, at most


def export(fitted: Fitted, name: str, width: int) -> bytes:
    """The graph. `vectors` float32 (n, width) in; `label` (n,) and `probabilities` (n, 2) out, of which the last
    column is the score. A row's score is the same bits whatever batch it is in. Raises ModelError."""
    helper = extra("onnx.helper")
    try:
        if fitted.kind == "logistic_regression":
            nodes, constants = _linear(fitted.classifier)
        else:
            nodes, constants = [_trees(fitted, width)], []
    except ModelError:  # an extra is missing
        raise
    except Exception as error:  # converters raise whatever they meet
        first = str(error).strip().splitlines()[0]
        raise ModelError(
            f"The {fitted.kind} cannot be exported ({first}); change its parameters in the model file."
        ) from None
    types = extra("onnx").TensorProto
    graph = helper.make_graph(
        nodes, name,
        [helper.make_tensor_value_info("vectors", types.FLOAT, [None, width])],
        [helper.make_tensor_value_info("label", types.INT64, [None]),
         helper.make_tensor_value_info("probabilities", types.FLOAT, [None, 2])],
        constants,
    )  # fmt: skip
    opsets = [helper.make_opsetid(domain, version) for domain, version in OPSETS.items()]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="headrace")
    extra("onnx").checker.check_model(model, full_check=True)
    proto: bytes = model.SerializeToString(deterministic=True)
    return proto


def splits(graph: bytes) -> list[tuple[int, np.float32]]:
    """Of each split of the graph's trees: its column, and the largest value that goes its lower way."""
    found: list[tuple[int, np.float32]] = []
    for node in extra("onnx").load_from_string(graph).graph.node:
        if node.op_type != "TreeEnsembleClassifier":
            continue
        given = {a.name: a for a in node.attribute}
        values = np.array(given["nodes_values"].floats, np.float32)
        modes = np.array([mode.decode() for mode in given["nodes_modes"].strings])
        lower = np.where(modes == "BRANCH_LT", np.nextafter(values, np.float32(-np.inf)), values)
        inner = np.flatnonzero(modes != "LEAF").tolist()
        found += [(given["nodes_featureids"].ints[i], lower[i]) for i in inner]
    return found


def planted(test: Rounded, found: list[tuple[int, np.float32]]) -> Rounded:
    """Pairs of test rows that stand on a split's threshold and one float32 above it."""
    finite = [(column, at) for column, at in found if np.isfinite(at)]
    chosen = [finite[i] for i in evenly(len(finite), PLANTED_SPLITS)]
    pairs: Rounded = np.repeat(test[np.arange(len(chosen)) % len(test)], 2, axis=0)
    for i, (column, at) in enumerate(chosen):
        pairs[2 * i, column] = at
        pairs[2 * i + 1, column] = np.nextafter(at, np.float32(np.inf))
    return pairs


def odd(test: Rounded) -> Rounded:
    """Test rows in which one column after another has no value, or an infinite one; and a row of no values."""
    width = test.shape[1]
    rows: Rounded = test[np.arange(3 * width + 1) % len(test)].copy()
    for i, value in enumerate((np.nan, np.inf, -np.inf)):
        rows[np.arange(width) + i * width, np.arange(width)] = value
    rows[-1] = np.nan
    return rows


def worst_difference(model: Model, fitted: Fitted, inputs: Rounded) -> float:
    """How far the graph's scores are from the trained model's on these rows. Raises ModelError above TOLERANCE."""
    scores = model.score_many(inputs.astype(np.float64))
    worst = float(np.max(np.abs(scores - fitted.score(rounded(inputs)))))
    if not worst <= TOLERANCE:
        raise disagree(f"scores differ by up to {worst:.3g}, and {TOLERANCE:g} is allowed")
    return worst


def disagree(how: str) -> ModelError:
    return ModelError(
        f"The exported graph does not compute what was trained ({how}); install another onnxruntime or, if that does "
        "not help, another skl2onnx or onnxmltools."
    )


def rounded(vectors: Floats | Rounded) -> Rounded:
    """What the graph sees. Infinite values (a division by zero) are taken for the largest finite one."""
    with np.errstate(over="ignore"):
        inputs: Rounded = vectors.astype(np.float32)
    np.clip(inputs, -LARGEST, LARGEST, out=inputs)
    return inputs


def below(thresholds: Floats) -> Rounded:
    """The largest float32 not above each threshold; infinity where no finite float32 is above it."""
    with np.errstate(over="ignore"):
        nearest = thresholds.astype(np.float32)
        lower = np.where(nearest > thresholds, np.nextafter(nearest, np.float32(-np.inf)), nearest)
    return np.where(thresholds >= LARGEST, np.float32(np.inf), lower)


def evenly(n: int, most: int) -> Ints:
    """At most so many of range(n), evenly spread, the first and the last among them."""
    return np.unique(np.linspace(0, max(n - 1, 0), min(n, most)).astype(np.int64))


def _linear(steps: Any) -> tuple[list[Any], list[Any]]:
    """The regression in float64, written here: the converter's goes through float32 products whose last bits depend
    on the size of the batch, and so do those of a float64 sigmoid, but not of a softmax over (0, z)."""
    node, numbers = extra("onnx.helper").make_node, extra("onnx.numpy_helper").from_array
    types = extra("onnx").TensorProto
    fill, scaler, regression = (step for _, step in steps.steps)
    weights = np.zeros((len(scaler.mean_), 2))
    weights[:, 1] = regression.coef_[0]
    constants = {
        "lowest": np.float32(-LARGEST), "highest": np.float32(LARGEST), "fill": fill.statistics_,
        "mean": scaler.mean_, "scale": scaler.scale_, "weights": weights,
        "intercept": np.array([0.0, regression.intercept_[0]]),
    }  # fmt: skip
    nodes = [
        node("IsNaN", ["vectors"], ["absent"]),
        node("Clip", ["vectors", "lowest", "highest"], ["finite"]),
        node("Cast", ["finite"], ["wide"], to=types.DOUBLE),
        node("Where", ["absent", "fill", "wide"], ["filled"]),
        node("Sub", ["filled", "mean"], ["centred"]),
        node("Div", ["centred", "scale"], ["scaled"]),
        node("MatMul", ["scaled", "weights"], ["products"]),
        node("Add", ["products", "intercept"], ["logits"]),
        node("Softmax", ["logits"], ["both"], axis=1),
        node("Cast", ["both"], ["probabilities"], to=types.FLOAT),
        node("ArgMax", ["both"], ["label"], axis=1, keepdims=0),
    ]
    return nodes, [numbers(np.asarray(value), name) for name, value in constants.items()]


def _trees(fitted: Fitted, width: int) -> Any:
    """One TreeEnsembleClassifier: the converter's, without the nodes that some write around it."""
    nodes = _converted(fitted.kind, _lowered(fitted), width).graph.node
    (trees,) = (node for node in nodes if node.op_type == "TreeEnsembleClassifier")
    trees.input[:], trees.output[:], trees.name = ["vectors"], ["label", "probabilities"], "trees"
    if fitted.kind == "random_forest":
        _missing_ways(trees, fitted.classifier)
    return trees


def _converted(kind: str, classifier: Any, width: int) -> Any:
    if kind in ("random_forest", "gradient_boosting"):
        floats = extra("skl2onnx.common.data_types").FloatTensorType([None, width])
        return extra("skl2onnx").to_onnx(
            classifier, initial_types=[("vectors", floats)], options={"zipmap": False}, target_opset=OPSETS
        )
    floats = extra("onnxmltools.convert.common.data_types", "boosting").FloatTensorType([None, width])
    convert = getattr(extra("onnxmltools", "boosting"), f"convert_{kind}")
    return convert(
        classifier, initial_types=[("vectors", floats)], target_opset=15
    )  # the newest that it knows


def _lowered(fitted: Fitted) -> Any:
    """A copy whose thresholds are float32, each the largest that sends every float32 value its trained way.

    Converters take the nearest one, so that values between the two would go the other way. XGBoost's are float32.
    """
    if fitted.kind == "xgboost":
        return fitted.classifier
    classifier = copy.deepcopy(fitted.classifier)
    if fitted.kind == "gradient_boosting":
        for (tree,) in classifier._predictors:
            tree.nodes["num_threshold"] = below(tree.nodes["num_threshold"])
    elif fitted.kind == "random_forest":
        for tree in classifier.estimators_:
            tree.tree_.threshold[:] = below(tree.tree_.threshold)
    else:
        text = re.sub(r"^tree_sizes=.*\n", "", classifier.booster_.model_to_string(), flags=re.MULTILINE)
        text = re.sub(r"(?<=^threshold=).*$", _lowered_line, text, flags=re.MULTILINE)
        classifier._Booster = extra("lightgbm", "boosting").Booster(model_str=text)
    return classifier


def _lowered_line(match: re.Match[str]) -> str:
    thresholds = np.array(match[0].split(), np.float64)
    lowered = below(thresholds)
    lowered[(thresholds >= -ZERO) & (thresholds < 0)] = np.nextafter(-ZERO, np.float32(-np.inf))
    lowered[(thresholds >= 0) & (thresholds < ZERO)] = ZERO
    lowered = lowered.astype(np.float64)
    return " ".join(map(repr, np.clip(lowered, -1e300, 1e300).tolist()))  # for LightGBM reads no infinity


def _missing_ways(trees: Any, forest: Any) -> None:
    """skl2onnx leaves out where a forest sends NaN."""
    given = {a.name: a for a in trees.attribute}
    ways = [tree.tree_.missing_go_to_left for tree in forest.estimators_]
    nodes = zip(
        given["nodes_treeids"].ints, given["nodes_nodeids"].ints, given["nodes_modes"].strings, strict=True
    )
    flags = [int(mode != b"LEAF" and ways[tree][node]) for tree, node, mode in nodes]
    if old := given.get("nodes_missing_value_tracks_true"):
        trees.attribute.remove(old)
    trees.attribute.append(extra("onnx.helper").make_attribute("nodes_missing_value_tracks_true", flags))
