"""Models of our features against the scores that the Fraud Detection Handbook publishes, by its own rules.

Where the data is absent this is skipped, as tests/integration/test_handbook.py is, which says where it is looked for.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from app import history
from models import training
from models.model_files import ModelFile, find
from models.pipeline import Pipeline, parse
from models.splits import Examples
from tests.conftest import MODEL_FILES, PIPELINES
from tests.integration.test_handbook import REFERENCE

pytestmark = [
    pytest.mark.skipif(
        not (REFERENCE / "handbook_transactions.parquet").exists(),
        reason=f"the Handbook's data is not at {REFERENCE}; name its folder in HEADRACE_REFERENCE_DATA",
    ),
    pytest.mark.timeout(400),
]

AREA, CARDS = 0.005, 0.01  # how far from the published AUC and average precision, and card precision, is near
RULES = ModelFile(test_days=7, train_days=7, top=100, entity="customer", skip_known=True)


@pytest.fixture(scope="module")
def handbook(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Pipeline, Examples]]:
    """The pipeline with the Handbook's 15 inputs, and all payments before 2018-08-15 with our features."""
    text = (PIPELINES / "card-fraud.yaml").read_text().replace("  - TX_AMOUNT_BY_AVG_30DAY\n", "")
    pipeline = parse(text)
    assert len(pipeline.vector) == 15
    features: Path = tmp_path_factory.mktemp("handbook") / "features.parquet"
    history.compute(REFERENCE / "handbook_transactions.parquet", features, pipeline)
    yield pipeline, history.read_training(features, pipeline, history.instant("2018-08-15"))


@pytest.mark.parametrize(
    ("kind", "parameters", "auc", "ap", "cards"),
    [
        ("logistic_regression", {}, 0.871, 0.606, 0.291),
        ("random_forest", {}, 0.867, 0.658, 0.287),
        ("xgboost", {"tree_method": "exact"}, 0.862, 0.639, 0.273),
    ],
)
def test_the_published_baselines(
    handbook: tuple[Pipeline, Examples],
    kind: Any,
    parameters: dict[str, Any],
    auc: float,
    ap: float,
    cards: float,
) -> None:
    model = msgspec.structs.replace(RULES, kind=kind, parameters=parameters)
    report = training.train(handbook[0], model, handbook[1]).report
    print(f"\n{kind}: {report['auc']:.4f} {report['ap']:.4f} {report['precision_at_top']:.4f}")
    assert (report["rows"], report["test_rows"]) == (67_240, 58_264)
    assert report["auc"] == pytest.approx(auc, abs=AREA)
    assert report["ap"] == pytest.approx(ap, abs=AREA)
    assert report["precision_at_top"] == pytest.approx(cards, abs=CARDS)


def test_the_shipped_model_for_cards_over_four_folds(handbook: tuple[Pipeline, Examples]) -> None:
    report = training.train(handbook[0], find("cards", MODEL_FILES), handbook[1], folds=4).report
    over = {name: round(report["over_folds"][name]["mean"], 4) for name in ("auc", "ap", "precision_at_top")}
    print(f"\ncards: {over}, average precision {[round(fold['ap'], 4) for fold in report['folds']]}")
    tests = ("2018-08-08", "2018-08-01", "2018-07-25", "2018-07-18")
    assert [fold["split"] for fold in report["folds"]] == [history.instant(day) for day in tests]
    assert report["over_folds"]["ap"]["mean"] >= 0.69
    assert report["over_folds"]["auc"]["mean"] >= 0.87
