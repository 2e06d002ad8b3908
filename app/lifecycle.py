"""From a file of features to a model that workers load."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from app import history, train_report
from models import training
from models.model_files import ModelFile
from models.pipeline import Pipeline
from models.scoring import Model, ModelError
from tables import model_folder


def ensure(pipeline: Pipeline, file: Path, folder: Path, progress: Callable[[str], None]) -> None:
    """Train on a file of events, unless the folder has a model of this definition."""
    try:
        model_folder.load(folder, pipeline)
    except ModelError:
        features = file.with_suffix(".features.parquet")
        history.compute(file, features, pipeline)
        train(pipeline, features, folder, progress)


def train(
    pipeline: Pipeline,
    features: Path,
    folder: Path,
    progress: Callable[[str], None],
    before: str | None = None,
    *,
    model: ModelFile | None = None,
    folds: int = 1,
) -> dict[str, Any]:
    """Train on what `headrace features compute` wrote, and make the result the champion. Its report.

    before: a day; events from it on are left for what comes after. model: the boosted trees of
    `gradient_boosting.yaml` by default. folds: see models.training.train. The report lies beside the graph too, as
    `report.json` and `report.html`.
    """
    started = time.perf_counter()
    data = history.read_training(features, pipeline, history.instant(before) if before else None)
    progress(f"{len(data.labels):,} rows of {features}")
    trained = training.train(pipeline, model or ModelFile(), data, progress, folds=folds)
    Model(trained.graph, trained.card, pipeline)  # what a worker would refuse is not saved
    path = model_folder.save(folder, trained.graph, trained.card)
    (path / "report.json").write_bytes(msgspec.json.format(msgspec.json.encode(trained.report)))
    (path / "report.html").write_text(train_report.page(trained.report), encoding="utf-8")
    return {
        **trained.report,
        "path": str(path),
        "seconds": round(time.perf_counter() - started, 1),
    }
