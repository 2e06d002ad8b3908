"""What `headrace checkpoints` does: look at the checkpoints of an instance, prove them, restore them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.settings import Settings
from models.errors import HeadraceError
from models.pipeline import Pipeline
from tables import homes
from tables.checkpoints import CheckpointError, Checkpoints, Manifest, Place
from tables.store import StoreError

Tell = Callable[[str], None]  # of what is damaged, a sentence


def of(settings: Settings, pipeline: Pipeline) -> Checkpoints | None:
    """Where the settings put an instance's checkpoints; None where they are off. Raises CheckpointError."""
    url = settings.checkpoints_url
    return Checkpoints(url, pipeline.instance, pipeline.definition) if url else None


def listed(settings: Settings, pipeline: Pipeline, now_ms: int, tell: Tell) -> list[dict[str, Any]]:
    """All checkpoints, the newest of a partition first."""
    return [
        {
            "entity": m.entity, "partition": m.partition, "position": m.position,
            "age_s": round((now_ms - m.created_at) / 1000), "files": len(m.files), "mb": round(m.size / 1e6, 1),
        }
        for place in _places(settings, pipeline)
        for m in _readable(place, tell)
    ]  # fmt: skip


def verify(settings: Settings, pipeline: Pipeline, tell: Tell) -> dict[str, int]:
    """Read every file of every checkpoint once. `damaged` counts what was told."""
    counts = {"checkpoints": 0, "files": 0, "bytes": 0, "damaged": 0}

    def damaged(sentence: str) -> None:
        counts["damaged"] += 1
        tell(sentence)

    for place in _places(settings, pipeline):
        manifests = list(_readable(place, damaged))
        counts["checkpoints"] += len(manifests)
        for file in {file for manifest in manifests for file in manifest.files}:
            counts["files"] += 1
            counts["bytes"] += file.size
            try:
                place.verify(file)
            except CheckpointError as error:
                damaged(str(error))
    return counts


@dataclass(frozen=True)
class Restored:
    """What became of a partition. restored: bytes, 0 where the store here was as new."""

    entity: str
    partition: int
    position: int
    restored: int
    seconds: float


def restore(settings: Settings, pipeline: Pipeline, partition: int | None, tell: Tell) -> Iterator[Restored]:
    """Put the newest good checkpoint of each partition, or of one, where the next worker here finds it.

    A store here that is not behind it stays as it is. Raises HeadraceError where a partition's are all damaged.
    """
    places = [p for p in _places(settings, pipeline) if partition in (None, p.partition)]
    if not places:
        raise HeadraceError(
            f"There is no checkpoint of partition {partition}; see `headrace checkpoints list`."
        )
    for place in places:
        folder = homes.folder_of(settings.data_root, pipeline, place.entity, place.partition)
        yield _restore(place, folder, pipeline.definition, tell)


def _restore(place: Place, folder: Path, definition: str, tell: Tell) -> Restored:
    here = homes.newest_position(folder, definition)
    for manifest in _readable(place, tell):
        if here is not None and here >= manifest.position:
            return Restored(place.entity, place.partition, here, 0, 0.0)
        started = time.perf_counter()
        try:
            homes.restore(folder, definition, place, manifest)
        except (CheckpointError, StoreError) as error:
            tell(f"{error} The next older one is taken.")
            continue
        seconds = time.perf_counter() - started
        return Restored(place.entity, place.partition, manifest.position, manifest.size, seconds)
    raise HeadraceError(
        f"No checkpoint of {place.entity} partition {place.partition} in {place.root} can be used."
    )


def _places(settings: Settings, pipeline: Pipeline) -> list[Place]:
    checkpoints = of(settings, pipeline)
    if checkpoints is None:
        raise HeadraceError("Checkpoints are switched off; set HEADRACE_CHECKPOINTS to where they are.")
    places = checkpoints.places()
    if not places:
        raise HeadraceError(
            f"There are no checkpoints of {pipeline.instance} with definition {pipeline.definition} in "
            f"{checkpoints.url}; a worker takes them, or set HEADRACE_CHECKPOINTS to where they are."
        )
    return places


def _readable(place: Place, tell: Tell) -> Iterator[Manifest]:
    for name in place.names():
        try:
            yield place.read(name)
        except CheckpointError as error:
            tell(str(error))
