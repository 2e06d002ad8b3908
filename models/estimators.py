"""The classifiers that can be trained: how each is built of its parameters, fitted, and asked for scores.

All see float32 rows with NaN where there is no value. Trees send NaN a way of its own, which they learn; the logistic
regression takes a column's mean in its place, and standardizes.
"""

from __future__ import annotations

import importlib
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from models.scoring import ModelError
from models.windows import Bytes, Floats

Rounded = npt.NDArray[np.float32]

LARGEST = np.finfo(np.float32).max


@dataclass(frozen=True)
class Kind:
    """A class of a library. defaults: where they are not the library's own. fixed: what the file may not say."""

    module: str
    name: str
    extra: str
    defaults: dict[str, Any]
    fixed: dict[str, Any]


KINDS = {
    "logistic_regression": Kind("sklearn.linear_model", "LogisticRegression", "train", {"max_iter": 1000}, {}),
    "random_forest": Kind(
        # Each tree has a seed of its own, and no thread waits for another.
        "sklearn.ensemble", "RandomForestClassifier", "train", {}, {"n_jobs": -1},
    ),
    "gradient_boosting": Kind(
        "sklearn.ensemble", "HistGradientBoostingClassifier", "train",
        # Leaves of few rows overfit rare positives; the depth is the only bound on their number.
        {"max_depth": 4, "max_leaf_nodes": None, "l2_regularization": 1.0, "early_stopping": False}, {},
    ),
    "xgboost": Kind(
        "xgboost", "XGBClassifier", "boosting",
        # Today's default is the share of positives, from which few trees do not climb for rare ones.
        {"base_score": 0.5}, {"objective": "binary:logistic", "booster": "gbtree", "n_jobs": 1},
    ),
    "lightgbm": Kind(
        "lightgbm", "LGBMClassifier", "boosting", {},
        {"objective": "binary", "boosting_type": "gbdt", "n_jobs": 1, "verbose": -1, "deterministic": True,
         "force_row_wise": True},
    ),
}  # fmt: skip
# What no model file says: it is decided here, concerns how a fit is watched, or cannot be exported.
_NOT_OURS = {
    "random_state", "n_jobs", "verbose", "verbosity", "warm_start", "objective", "booster", "boosting_type", "missing",
    "enable_categorical", "categorical_features", "feature_types", "callbacks", "eval_metric", "device",
    "early_stopping_rounds", "importance_type", "multi_strategy", "oob_score",
}  # fmt: skip


@dataclass(frozen=True)
class Fitted:
    """A classifier that was trained."""

    kind: str
    classifier: Any
    threads: int

    def score(self, inputs: Rounded) -> Floats:
        """Scores (n,) of rows (n, width), as the library computes them: the probability of label 1."""
        rows = inputs.astype(np.float64) if self.kind == "logistic_regression" else inputs
        limits = extra("threadpoolctl").threadpool_limits(self.threads, user_api="openmp")
        with (
            limits,
            np.errstate(over="ignore", invalid="ignore"),
        ):  # sums, by which a library looks for infinities
            scores: Floats = self.classifier.predict_proba(rows)[:, 1].astype(np.float64)
        return scores


def parameters(kind: str) -> list[str]:
    """What the library's class can be told in a model file."""
    known = getattr(extra(KINDS[kind].module, KINDS[kind].extra), KINDS[kind].name)().get_params()
    return sorted(set(known) - _NOT_OURS)


def fit(
    kind: str, given: dict[str, Any], seed: int, inputs: Rounded, labels: Bytes, threads: int = 1
) -> Fitted:
    """Train on rows (n, width) without infinite values, and their labels, 0 and 1.

    given: parameters by the library's names. threads: change the time, never a bit; XGBoost and LightGBM take one, a
    random forest all cores.
    Raises ModelError where the library refuses a parameter's value.
    """
    classifier = _build(kind, given, seed)
    rows = inputs.astype(np.float64) if kind == "logistic_regression" else inputs
    try:
        # OpenMP threads wait for each other by spinning: with a busy core, two took 3 to 20 times as long as one.
        with warnings.catch_warnings(), extra("threadpoolctl").threadpool_limits(threads, user_api="openmp"):
            warnings.simplefilter("ignore")  # of names of columns, and of what is on its way out of a library
            classifier.fit(rows, labels)
    except Exception as error:  # each library has its own, without a common base
        first = str(error).strip().splitlines()[0]
        raise ModelError(
            f"The {kind} cannot be trained ({first}); change its parameters in the model file."
        ) from None
    if kind == "random_forest":
        classifier.set_params(n_jobs=1)  # threads would add the trees' votes in any order
    return Fitted(kind, classifier, threads)


def _build(name: str, parameters: dict[str, Any], seed: int) -> Any:
    kind = KINDS[name]
    given = {**kind.defaults, **parameters, **kind.fixed, "random_state": seed}
    classifier = getattr(extra(kind.module, kind.extra), kind.name)(**given)
    if name != "logistic_regression":
        return classifier
    return extra("sklearn.pipeline").make_pipeline(
        extra("sklearn.impute").SimpleImputer(keep_empty_features=True),
        extra("sklearn.preprocessing").StandardScaler(),
        classifier,
    )


def extra(module: str, name: str = "train") -> Any:
    """A module of one of the extras, which workers go without."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ModelError(
            f"Training needs more than a worker has ({error}); pip install 'headrace[{name}]'."
        ) from None
