"""Models in a real MLflow server: registered, promoted, refused, rolled back, and workers that follow."""

import asyncio
import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
from click.testing import CliRunner

from app import kafka, replay, session, verify
from app.cli import main
from app.errors import RegistryError
from app.local import services
from app.local.services import Addresses
from app.model_life import ModelLife
from app.registry import Mlflow
from app.serving import Serving
from app.settings import Settings
from models.pipeline import Pipeline, find
from models.predictions import Prediction, decode
from models.scoring import Card, Refused
from tables.model_folder import CANARY, CHAMPION, PREVIOUS, ModelFolder
from tests.fixtures.models import SHOP, card, graph, sigmoid

pytestmark = pytest.mark.integration

NAME = "flight-delays"


@pytest.fixture(scope="module")
def mlflow(world: Settings) -> Iterator[str]:
    """The address of an MLflow server that `headrace up` has started."""
    address = services.up(world, ["mlflow"]).mlflow
    assert address is not None
    try:
        yield address
    finally:
        services.down(world, ["mlflow"])


def life(address: str, folder: Path, name: str, largest: int = 2**20) -> ModelLife:
    """Of a pipeline of that name alone, so that tests do not meet."""
    pipeline = dataclasses.replace(SHOP, name=name)
    return ModelLife(pipeline, Mlflow(address, ModelFolder(folder, largest)), row_us=1e6)


def of(name: str, version: str, **changes: Any) -> Card:
    return card(**{"pipeline": name, "version": version} | changes)


# --- the registry -------------------------------------------------------------------------------


def test_a_version_carries_all_that_belongs_to_it(mlflow: str, tmp_path: Path) -> None:
    here = life(mlflow, tmp_path / "here", "carries")
    here.registry.folder.save(graph(), of("carries", "one", tested=(1, 2)), {"manifest.json": b'{"rows": 7}'})
    assert here.register("one", promote=False)
    assert here.register("one", promote=False)  # again: it is there once
    [listed] = here.registry.versions("carries")
    assert (listed.version, listed.definition, listed.archived) == ("one", SHOP.definition, False)
    assert listed.metrics == {"auc": 0.9}
    there = life(mlflow, tmp_path / "there", "carries")  # another machine
    assert there.aliases() == {CHAMPION: "one"}
    assert there.champion().card == of("carries", "one", tested=(1, 2))
    assert (tmp_path / "there" / "carries" / "one" / "model.onnx").read_bytes() == graph()
    api = here.registry._rest  # type: ignore[attr-defined]
    row = next(here.registry._rows("carries"))  # type: ignore[attr-defined]
    run = api.get("runs/get", "run", run_id=row["run_id"])
    assert {m["key"]: m["value"] for m in run["data"]["metrics"]} == {"auc": 0.9}
    assert {p["key"]: p["value"] for p in run["data"]["params"]} == {
        "definition": SHOP.definition, "features": "3", "tested_after": "1", "tested_until": "2",
        "threshold.look": "0.5", "threshold.stop": "0.9", "threshold.wait": "0.7",
    }  # fmt: skip
    assert api.download(row["source"], "manifest.json", 100) == b'{"rows": 7}'
    assert api.download(row["source"], "features.txt", 100).decode().split() == list(SHOP.vector)


def test_aliases_go_and_come_back(mlflow: str, tmp_path: Path) -> None:
    here = life(mlflow, tmp_path, "aliases")
    assert (here.aliases(), here.registry.versions("aliases")) == ({}, [])
    here.registry.folder.save(graph(), of("aliases", "one"))
    here.registry.folder.save(graph(2.0), of("aliases", "two", golden_scores=sigmoid([0, 4]).tolist()))
    assert here.register("one", promote=False)
    assert not here.register("two", promote=False)
    here.promote("two", "challenger-2")
    here.promote("two")
    assert here.aliases() == {CHAMPION: "two", PREVIOUS: "one", "challenger-2": "two"}
    assert here.withdraw("challenger-2") == "two"
    assert here.aliases() == {CHAMPION: "two", PREVIOUS: "one"}
    assert here.rollback() == "one"
    assert here.aliases()[CHAMPION] == "one"
    with pytest.raises(RegistryError, match="no version three of aliases"):
        here.promote("three")
    # What was trained before there was a server is published when it is promoted.
    here.registry.folder.save(graph(3.0), of("aliases", "three", golden_scores=sigmoid([0, 6]).tolist()))
    here.promote("three")
    assert {v.version for v in here.registry.versions("aliases")} == {"one", "two", "three"}


async def test_a_canary_is_noted_at_its_version(mlflow: str, tmp_path: Path) -> None:
    here = life(mlflow, tmp_path / "here", "canaries")
    for version, weight in (("one", 1.0), ("two", 2.0)):
        golden = sigmoid([0, 2 * weight]).tolist()
        here.registry.folder.save(graph(weight), of("canaries", version, golden_scores=golden))
        here.register(version, promote=False)
    there, told = life(mlflow, tmp_path / "there", "canaries"), list[str]()  # a worker's machine
    serving = Serving(there, 0.1, told.append)

    async def seen() -> tuple[dict[str, str], dict[str, float]]:
        await serving.look()
        await serving.look_at_challengers()
        return {alias: m.card.version for alias, m in serving.models.items()}, serving.shares

    here.registry.point("canaries", CANARY, "two")  # as one can in MLflow's own pages
    assert await seen() == ({CHAMPION: "one"}, {})
    here.set_canary("two", 12.5)
    assert await seen() == ({CHAMPION: "one", CANARY: "two"}, {CANARY: 12.5})
    here.set_canary(CANARY, 25)
    assert await seen() == ({CHAMPION: "one", CANARY: "two"}, {CANARY: 25})
    # a rail of this worker takes it back, and whoever asks is told
    serving.drop(CANARY, "two", RuntimeError("no such kernel"))
    assert await seen() == ({CHAMPION: "one"}, {})
    (row,) = [v for v in here.registry.versions("canaries") if v.version == "two"]
    assert row.canary is not None
    assert (row.canary.share, row.canary.rail) == (25, "failed")
    assert row.canary == here.registry.canary("canaries", "two") == there.registry.canary("canaries", "two")
    assert here.examined("two")["canary"]["reason"] == "The canary two failed to score (no such kernel)."
    assert here.registry.canary("canaries", "three") is None
    # people set it again, and it is promoted
    here.set_canary("two", 50)
    assert await seen() == ({CHAMPION: "one", CANARY: "two"}, {CANARY: 50})
    here.promote("two")
    assert await seen() == ({CHAMPION: "two"}, {})
    assert CANARY not in here.aliases()
    # a version that was deleted in MLflow has nothing to be told of: what follows is seen all the same
    here.promote("one")
    here.set_canary("two", 50)
    assert await seen() == ({CHAMPION: "one", CANARY: "two"}, {CANARY: 50})
    serving.drop(CANARY, "two", RuntimeError("no such kernel"))
    api = here.registry._rest  # type: ignore[attr-defined]
    api.delete("model-versions/delete", name="canaries", version=here.registry._number("canaries", "two"))  # type: ignore[attr-defined]
    assert await seen() == ({CHAMPION: "one"}, {})
    assert serving.away is None


def test_archived_versions_are_told(mlflow: str, tmp_path: Path) -> None:
    here = life(mlflow, tmp_path, "archived")
    for version in ("one", "two"):
        here.registry.folder.save(graph(), of("archived", version))
        here.register(version, promote=False)
    here.archive("two")
    assert {v.version: v.archived for v in here.registry.versions("archived")} == {"one": False, "two": True}
    with pytest.raises(Exception, match="two is archived"):
        here.promote("two")


Harm = Callable[[Card], Card]
HARMED: dict[str, tuple[str, Harm]] = {
    "shuffled": ("features", lambda c: msgspec.structs.replace(c, features=[*c.features[1:], c.features[0]])),
    "misscored": ("golden", lambda c: msgspec.structs.replace(c, golden_scores=[0.9, 0.1])),
    "elsewhere": ("definition", lambda c: msgspec.structs.replace(c, definition="f" * len(c.definition))),
}


@pytest.mark.parametrize("version", HARMED)
async def test_what_is_not_fit_is_refused_wherever_it_is_promoted(
    version: str, mlflow: str, tmp_path: Path
) -> None:
    name, (reason, harm) = f"refuses-{version}", HARMED[version]
    here, told = life(mlflow, tmp_path / "here", name), list[str]()
    here.registry.folder.save(graph(), of(name, "good"))
    here.registry.folder.save(graph(), harm(of(name, version)))
    here.register("good", promote=False)
    here.registry.publish(name, version)
    serving = Serving(life(mlflow, tmp_path / "worker", name), 0.1, told.append)
    await serving.look()
    with pytest.raises(Refused) as refused:
        here.promote(version)
    assert refused.value.reason == reason
    here.registry.point(name, CHAMPION, version)  # as one can in MLflow's own pages
    await serving.look()
    assert serving.models[CHAMPION].card.version == "good"
    assert (serving.refused[CHAMPION].version, serving.refusals) == (version, {reason: 1})
    assert here.examined(version)["reason"] == reason
    # A worker that starts now scores with the last one that passed on its machine.
    again = Serving(life(mlflow, tmp_path / "worker", name), 0.1, told.append)
    await again.look()
    assert again.models[CHAMPION].card.version == "good"


def test_files_that_are_not_those_registered_are_refused(
    world: Settings, mlflow: str, tmp_path: Path
) -> None:
    here = life(mlflow, tmp_path / "here", "tampered")
    here.registry.folder.save(graph(), of("tampered", "one"))
    here.register("one", promote=False)
    kept = world.data_root.resolve() / "mlflow" / "data" / "artifacts"
    [stored] = [f for f in kept.rglob("model.onnx") if "tampered" in (f.parent / "model.json").read_text()]
    stored.write_bytes(graph(1.0)[:-7])
    with pytest.raises(Refused, match=r"one is damaged .*not those that were registered"):
        life(mlflow, tmp_path / "there", "tampered").champion()
    assert not (tmp_path / "there").exists()
    stored.write_bytes(b"\0" * (2**20 + 1))
    with pytest.raises(Refused, match=r"model\.onnx of the model one is larger than 1 MiB"):
        life(mlflow, tmp_path / "there", "tampered").champion()
    assert here.champion().card.version == "one"  # from its own folder, whose files are good


def test_a_version_of_another_tool_is_refused(mlflow: str, tmp_path: Path) -> None:
    here = life(mlflow, tmp_path, "foreign")
    api = here.registry._rest  # type: ignore[attr-defined]
    api.post("registered-models/create", name="foreign")
    experiment = api.post("experiments/create", name="foreign")["experiment_id"]
    run = api.post("runs/create", "run", experiment_id=experiment)["info"]
    api.post("model-versions/create", name="foreign", source=run["artifact_uri"], run_id=run["run_id"])
    api.post("registered-models/alias", name="foreign", alias=CHAMPION, version="1")
    with pytest.raises(Refused, match="version #1 of foreign was not registered by Headrace"):
        here.champion()


# --- workers ------------------------------------------------------------------------------------


class Fleet:
    """Workers of one instance, each with a folder of models of its own, as on machines of their own."""

    def __init__(
        self, settings: Settings, pipeline: Pipeline, address: str, folder: Path, count: int
    ) -> None:
        self.pipeline = pipeline
        self.workers = [
            session.Process(
                settings.model_copy(update={"models_root": folder / str(n)}), pipeline, "worker", n,
                HEADRACE_MLFLOW=address, HEADRACE_MODEL_EVERY_S="1",
            )
            for n in range(1, count + 1)
        ]  # fmt: skip

    def __enter__(self) -> "Fleet":
        for worker in self.workers:
            worker.start()
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers:
            worker.stop()

    async def until(self, reached: Callable[[dict[str, float]], bool], within: float = 60.0) -> float:
        """Wait until this is true of the metrics of each. The seconds that it took."""
        began = time.monotonic()
        async with asyncio.timeout(within):
            for worker in self.workers:
                while not reached(await worker.metrics()):
                    worker.check()
                    await asyncio.sleep(0.05)
        return time.monotonic() - began

    async def scored_by(self, version: str) -> float:
        return await self.until(lambda m: any(k.startswith("headrace_model{") and version in k for k in m))


async def served(pipeline: Pipeline, address: str) -> list[tuple[int, Prediction]]:
    """All predictions with their partitions."""
    return [(r.partition, decode(r.value)) async for r in kafka.read_between(address, pipeline.predictions)]


async def all_served(pipeline: Pipeline, address: str, count: int, check: session.Process) -> None:
    """Wait until the topic has so many predictions."""
    async with asyncio.timeout(120):
        while len(await served(pipeline, address)) < count:
            check.check()
            await asyncio.sleep(0.3)


def versions_of(trained: Settings, mlflow: str, pipeline: Pipeline) -> tuple[ModelLife, str, str]:
    """The trained model and another one, both registered; the trained one is the champion."""
    ours = ModelLife(pipeline, Mlflow(mlflow, ModelFolder(trained.models_root)))
    folder = ours.registry.folder
    first = folder.aliases(NAME)[CHAMPION]
    model, old = folder.read(NAME, first)
    new = msgspec.structs.replace(
        old, version="challenged", thresholds={k: v * 0.9 for k, v in old.thresholds.items()}
    )
    folder.save(model, new)
    ours.registry.publish(NAME, first)
    ours.registry.publish(NAME, new.version)
    ours.registry.point(NAME, CHAMPION, first)
    return ours, first, new.version


class Load:
    """Flights of one day after the other, until there is `enough`; how many were sent."""

    def __init__(self, flights: Path, pipeline: Pipeline, address: str) -> None:
        self._flights, self._pipeline, self._address = flights, pipeline, address
        self.enough, self.sent = False, 0

    async def publish(self) -> None:
        day = date(2013, 3, 1)
        while not self.enough:
            following = day + timedelta(days=1)
            tape = replay.tape(self._flights, self._pipeline, str(day), str(following))
            await replay.publish(tape, self._pipeline, self._address, 400)
            self.sent, day = self.sent + tape.events, following


@pytest.mark.timeout(300)
async def test_two_workers_under_load_follow_the_champion(
    trained: Settings, addresses: Addresses, mlflow: str, flights: Path, tmp_path: Path
) -> None:
    pipeline = find(NAME, trained.pipelines, "flights-registry")
    await session.fresh(trained, pipeline, addresses)
    ours, first, second = versions_of(trained, mlflow, pipeline)
    load = Load(flights, pipeline, addresses.kafka)
    with Fleet(trained, pipeline, mlflow, tmp_path, 2) as fleet:
        await asyncio.gather(*(worker.ready() for worker in fleet.workers))
        publishing = asyncio.create_task(load.publish())
        await fleet.until(lambda m: m["headrace_predictions_total"] > 500)
        # 1. promote: what is predicted from 5 s later on carries the new version
        ours.promote(second)
        promoted = time.time()
        took = await fleet.scored_by(second)
        print(f"\nboth workers scored with the promoted version after {took:.2f} s")
        await fleet.until(lambda m: m["headrace_predictions_total"] > 3000)
        # 2. three that are not fit, by an alias set past the gate: named, and the old one scores on
        graph_, good = ours.registry.folder.read(NAME, second)
        for version, (reason, harm) in HARMED.items():
            bad = harm(msgspec.structs.replace(good, version=version))
            if version == "misscored":
                bad = msgspec.structs.replace(good, version=version, golden_scores=[0.5] * len(good.golden))
            ours.registry.folder.save(graph_, bad)
            ours.registry.publish(NAME, version)
            ours.registry.point(NAME, CHAMPION, version)
            named = f"headrace_model_refused_version{{{reason},{version}}}"
            await fleet.until(lambda m, named=named: named in m)  # type: ignore[misc]
            await fleet.scored_by(second)
            shown = await asyncio.to_thread(
                CliRunner(env={"HEADRACE_MLFLOW": mlflow}).invoke,
                main, ["models", "show", version, "-p", NAME, "--json"],
            )  # fmt: skip
            assert (shown.exit_code, json.loads(shown.stdout)["reason"]) == (1, reason)
            assert all(f"{second} scores on" in w.log.read_text() for w in fleet.workers)
        ours.registry.point(NAME, CHAMPION, second)
        await fleet.until(lambda m: not any("refused_version" in k for k in m))
        # 3. rollback
        rolled_back = time.time()
        assert ours.rollback() == first
        await fleet.scored_by(first)
        # 4. MLflow away: one goes on, one starts from what it keeps, and scores
        services.down(trained, ["mlflow"])
        await fleet.until(lambda m: m["headrace_registry_up"] == 0)
        assert fleet.workers[1].stop() == 0
        fleet.workers[1].start()
        await fleet.workers[1].ready()
        await fleet.scored_by(first)
        load.enough = True
        assert not publishing.done(), "all of it is to happen under load"
        await publishing
        await all_served(pipeline, addresses.kafka, load.sent, fleet.workers[0])
        assert (await fleet.workers[1].metrics())["headrace_predictions_total"] > 0
        # 5. MLflow back
        services.up(trained, ["mlflow"])
        await fleet.until(lambda m: m["headrace_registry_up"] == 1)
    verdict, _ = await verify.check(pipeline, addresses.kafka)
    assert verdict.events == verdict.predictions == load.sent
    assert (verdict.lost, verdict.doubled, verdict.differing) == (0, 0, 0)
    predictions = await served(pipeline, addresses.kafka)
    assert {p.model for _, p in predictions} == {NAME}
    for partition in range(trained.partitions):
        assert _changes([p.version for of, p in predictions if of == partition]) == [first, second, first]
    between = [
        decode(r.value).version
        async for r in kafka.read_between(addresses.kafka, pipeline.predictions)
        if promoted + 5 < r.timestamp / 1000 < rolled_back
    ]
    assert set(between) == {second}


def _changes(versions: list[str]) -> list[str]:
    """
    >>> _changes(["a", "a", "b", "a"])
    ['a', 'b', 'a']
    """
    return [v for v, before in zip(versions, [None, *versions[:-1]], strict=True) if v != before]


@pytest.mark.timeout(240)
async def test_a_worker_that_has_no_model_folds_and_waits(
    trained: Settings, addresses: Addresses, mlflow: str, cards: Path, tmp_path: Path
) -> None:
    name = "card-fraud"
    pipeline = find(name, trained.pipelines, "cards-no-model")
    await session.fresh(trained, pipeline, addresses)
    tape = replay.tape(cards, pipeline, "2018-04-10", "2018-04-12")
    with Fleet(trained, pipeline, mlflow, tmp_path, 1) as fleet:
        [worker] = fleet.workers
        async with asyncio.timeout(60), aiohttp.ClientSession() as http:
            while "Nothing is scored" not in await _unready(http, worker):
                worker.check()
                await asyncio.sleep(0.1)
            assert "`headrace train --pipeline card-fraud`" in await _unready(http, worker)
        await replay.publish(tape, pipeline, addresses.kafka, 4000)
        folded = "headrace_records_total{customer,folded}"
        await fleet.until(lambda m: m[folded] == tape.events)
        metrics = await worker.metrics()
        assert metrics["headrace_predictions_total"] == 0
        assert sum(v for k, v in metrics.items() if k.startswith("headrace_records_total{terminal")) == 0
        ours = ModelLife(pipeline, Mlflow(mlflow, ModelFolder(trained.models_root)))
        version = ours.registry.folder.aliases(name)[CHAMPION]
        assert ours.register(version, promote=False)
        await worker.ready()
        await all_served(pipeline, addresses.kafka, tape.events, worker)
    verdict, _ = await verify.check(pipeline, addresses.kafka)
    assert verdict.events == verdict.predictions == tape.events
    assert (verdict.lost, verdict.doubled, verdict.differing) == (0, 0, 0)


async def _unready(http: aiohttp.ClientSession, worker: session.Process) -> str:
    """What the worker says of itself."""
    try:
        async with http.get(f"{worker.url}/readyz") as response:
            return await response.text()
    except aiohttp.ClientError:
        return ""
