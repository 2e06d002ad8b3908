"""From a file of features to a model that workers load."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec

from app import history, train_report
from app.model_life import ModelLife
from models import training
from models.model_files import ModelFile
from models.pipeline import Pipeline
from models.scoring import Model, ModelError
from models.windows import Ints
from tables.model_folder import ModelFolder


def ensure(pipeline: Pipeline, file: Path, folder: Path, progress: Callable[[str], None]) -> None:
    """Train on a file of events, unless the folder has a model of this definition."""
    life = ModelLife(pipeline, ModelFolder(folder))
    try:
        life.champion()
    except ModelError:
        features = file.with_suffix(".features.parquet")
        history.compute(file, features, pipeline)
        train(life, features, progress)


def train(
    life: ModelLife,
    features: Path,
    progress: Callable[[str], None],
    before: str | None = None,
    promote: bool = False,
    *,
    model: ModelFile | None = None,
    folds: int = 1,
) -> dict[str, Any]:
    """Train on what `headrace features compute` wrote, and register the result. Its report.

    before: a day; events from it on are left for what comes after. It becomes the champion where
    `promote` says so, or where there is none that workers take. model: the boosted trees of
    `gradient_boosting.yaml` by default. folds: see models.training.train. The report, histograms and a manifest
    of what it was trained on are files of the version.
    """
    started, pipeline = time.perf_counter(), life.pipeline
    data = history.read_training(features, pipeline, history.instant(before) if before else None)
    progress(f"{len(data.labels):,} rows of {features}")
    trained = training.train(pipeline, model or ModelFile(), data, progress, folds=folds)
    Model(trained.graph, trained.card, pipeline)  # what a worker would refuse is not saved
    files = {
        "report.json": _json(trained.report),
        "report.html": train_report.page(trained.report).encode(),
        "histograms.json": _json(trained.histograms),
        "manifest.json": _json(_manifest(pipeline, model or ModelFile(), features, data.times)),
    }
    tested = (int(trained.report["split"]), int(data.times.max()))
    card = msgspec.structs.replace(trained.card, tested=tested)
    path = life.registry.folder.save(trained.graph, card, files)
    return {
        **trained.report,
        "champion": life.register(trained.card.version, promote),
        "path": str(path),
        "seconds": round(time.perf_counter() - started, 1),
    }


def _manifest(pipeline: Pipeline, model: ModelFile, features: Path, times: Ints) -> dict[str, Any]:
    """What a version was trained on and by, so that it can be made again."""
    with features.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "headrace": metadata.version("headrace"),
        "pipeline": pipeline.name,
        "definition": pipeline.definition,
        "model": msgspec.to_builtins(model),
        "features": {"file": features.name, "sha256": digest},
        "events": {"rows": len(times), "first_ms": int(times.min()), "last_ms": int(times.max())},
    }


def _json(data: Any) -> bytes:
    return msgspec.json.format(msgspec.json.encode(data))
