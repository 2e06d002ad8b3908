"""What a change of the champion costs under load: workers, a registry in MLflow, new versions one after the other."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from app import session, verify
from app.bench import WARM_UP_S, Load, open_load, run, spread
from app.local import services
from app.model_life import ModelLife
from app.registry import Mlflow
from app.settings import SQLITE, Settings
from models.errors import HeadraceError
from models.predictions import Prediction
from models.windows import Floats
from tables.model_folder import CHAMPION, ModelFolder

AROUND_S = 1.0  # before the first and behind the last prediction that changes: fetch, load, warm-up and swap
LEAST_S = 4.0  # from one promotion to the next: a look at the alias, the change, and what is around it


def swap(
    settings: Settings, name: str, rate: float, seconds: float, swaps: int, workers: int
) -> dict[str, Any]:
    """An open load, and new versions promoted at even intervals: waits around the changes, and at other times.

    Each version is registered in MLflow, and fetched, checked, loaded and warmed by each worker. A wait is from when
    an event was due until its prediction was read.
    """
    if seconds < swaps * LEAST_S:
        raise HeadraceError(
            f"{swaps} swaps in {seconds:g} s would run into each other; let it take {swaps * LEAST_S:g} or more."
        )
    with _own_mlflow(settings) as address:
        registered = settings.model_copy(update={"model_every_s": min(settings.model_every_s, LEAST_S / 2)})
        return run(
            registered, name, int(rate * (seconds + WARM_UP_S)),
            lambda load: _swap(load, rate, seconds / (swaps + 1), swaps, workers, address),
        )  # fmt: skip


def good(result: dict[str, Any], within: float) -> bool:
    """Whether nothing is lost, doubled or different, and the p99 around swaps within so many times the other."""
    wrong = sum(result[figure] for figure in ("missing", "lost", "doubled", "differing", "changed_back"))
    return not wrong and bool(result["p99_ratio"] <= within)


@contextlib.contextmanager
def _own_mlflow(settings: Settings) -> Iterator[str]:
    """A server that neither holds the user's versions nor keeps any."""
    own = settings.model_copy(
        update={"data_root": settings.data_root / "bench", "mlflow": None, "mlflow_store": SQLITE}
    )
    services.down(own, ["mlflow"], remove_data=True)
    try:
        address = services.up(own, ["mlflow"]).mlflow
        assert address is not None
        yield address
    finally:
        services.down(own, ["mlflow"], remove_data=True)


@dataclass
class _Changes:
    """Which version each prediction was by, as they were read.

    first, last: by version, when its first and its last one were read, s since the epoch. back: how often a
    partition went back to a version that it had left.
    """

    first: dict[str | None, float] = field(default_factory=dict)
    last: dict[str | None, float] = field(default_factory=dict)
    back: int = 0
    _of: dict[int, list[str | None]] = field(default_factory=dict)

    def see(self, prediction: Prediction) -> None:
        version, now = prediction.version, time.time()
        self.first.setdefault(version, now)
        self.last[version] = now
        seen = self._of.setdefault(prediction.origin.partition, [])
        if not seen or seen[-1] != version:
            self.back += version in seen
            seen.append(version)


async def _swap(
    load: Load, rate: float, every_s: float, swaps: int, count: int, address: str
) -> dict[str, Any]:
    settings, pipeline = load.settings, load.pipeline
    life = ModelLife(pipeline, Mlflow(address, ModelFolder(settings.models_root)))
    load.report(f"registering {swaps + 1} versions in MLflow")
    versions = await asyncio.to_thread(_registered, life, swaps)
    await session.fresh(settings, pipeline, load.addresses)
    fetched = settings.data_root / "bench" / "fetched"  # by workers, as on machines of their own
    shutil.rmtree(fetched, ignore_errors=True)
    workers = [
        session.Process(
            settings.model_copy(update={"mlflow": address, "models_root": fetched / str(n)}), pipeline, "worker", n
        )
        for n in range(1, count + 1)
    ]  # fmt: skip
    changes = _Changes()
    reader = session.Predictions(load.addresses.kafka, pipeline, changes.see)
    try:
        for worker in workers:
            worker.start()
        await asyncio.gather(*(worker.ready() for worker in workers))
        promoting = asyncio.create_task(_promoted(life, versions, every_s, load.report))
        due, waited = await open_load(load, rate, reader, workers)
        pointed = await promoting
    finally:
        for worker in workers:
            worker.stop()
    verdict, _ = await verify.check(pipeline, load.addresses.kafka)
    began = reader.arrived[0] - waited[0] / 1000 - due[0]  # when the first was due
    near, took = _around(changes, versions, pointed, due + began)
    counted = due >= WARM_UP_S
    ordinary, around = waited[counted & ~near], waited[counted & near]
    if not len(around) or not len(ordinary):
        raise HeadraceError("No prediction came around a swap; take more --seconds or a higher --rate.")
    figures = spread(ordinary, "ordinary_") | spread(around, "swap_")
    return {
        "bench": "swap",
        "pipeline": pipeline.name,
        "rate": rate,
        "workers": count,
        "events": int(counted.sum()),
        "swaps": len(took),
        "events_around": len(around),
        **figures,
        "p99_ratio": round(figures["swap_p99_ms"] / figures["ordinary_p99_ms"], 2),
        "all_changed_median_s": round(float(np.median(took)), 2),
        "all_changed_most_s": round(max(took), 2),
        "missing": load.tape.events - len(reader.ids),
        "lost": verdict.lost,
        "doubled": verdict.doubled,
        "differing": verdict.differing,
        "changed_back": changes.back,
    }


def _registered(life: ModelLife, swaps: int) -> list[str]:
    """Versions in MLflow, of the bench's own model: the first is the champion. Each has its own files."""
    folder, name = life.registry.folder, life.pipeline.name
    graph, card = folder.read(name, folder.aliases(name)[CHAMPION])
    versions = [card.version, *(f"swap-{n}" for n in range(1, swaps + 1))]
    for n, version in enumerate(versions):
        lower = {decision: threshold * (1 - n / 1000) for decision, threshold in card.thresholds.items()}
        folder.save(graph, msgspec.structs.replace(card, version=version, thresholds=lower))
        life.registry.publish(name, version)
    life.registry.point(name, CHAMPION, versions[0])
    return versions


async def _promoted(
    life: ModelLife, versions: list[str], every_s: float, report: Callable[[str], None]
) -> list[float]:
    """Let the alias name one after the other. When it did, s since the epoch.

    As `promote` does behind its gate, which would take time of the processor that others may not.
    """
    pointed = [0.0]
    await asyncio.sleep(WARM_UP_S)
    for version in versions[1:]:
        await asyncio.sleep(every_s)
        pointed.append(time.time())
        await asyncio.to_thread(life.registry.point, life.pipeline.name, CHAMPION, version)
        report(f"{version} is promoted")
    return pointed


def _around(
    changes: _Changes, versions: list[str], pointed: list[float], due: Floats
) -> tuple[npt.NDArray[np.bool_], list[float]]:
    """Which events, due at these times, are around a change; and of each change, s from the promotion to its end.

    versions: in the order of promotion. A change begins with the first prediction by the new version, and ends with
    the last by an older one.
    """
    near, took = np.zeros(len(due), np.bool_), []
    for n, version in enumerate(versions):
        if n == 0 or version not in changes.first:
            continue
        first = changes.first[version]
        last = max(first, *(changes.last.get(older, 0.0) for older in versions[:n]))
        near |= (due >= first - AROUND_S) & (due <= last + AROUND_S)
        took.append(last - pointed[n])
    return near, took
