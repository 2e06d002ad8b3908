"""Workers that begin without a model: they send features alone, then scores, while they are killed."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
from click.testing import CliRunner

from app import kafka, replay, session, verify
from app.cli import main
from app.client import Predictions
from app.local.services import Addresses
from app.model_life import ModelLife
from app.settings import OFF, Settings
from models.pipeline import Pipeline, find
from models.predictions import decode
from tables.model_folder import CHAMPION, ModelFolder

pytestmark = pytest.mark.integration

NAME = "card-fraud"


async def until(worker: session.Process, reached: Callable[[dict[str, float]], bool]) -> None:
    async with asyncio.timeout(90):
        while not reached(await worker.metrics()):
            worker.check()
            await asyncio.sleep(0.05)


async def killed(worker: session.Process) -> None:
    """kill -9 of it, and a start."""
    assert worker.stop(signal.SIGKILL) == -signal.SIGKILL
    worker.start()
    await worker.ready()


@pytest.mark.timeout(300)
async def test_features_go_out_alone_until_there_is_a_model(
    trained: Settings, addresses: Addresses, cards: Path, tmp_path: Path
) -> None:
    pipeline = find(NAME, trained.pipelines, "cards-features-alone")
    settings = trained.model_copy(
        update={"models_root": tmp_path / "models", "mlflow": OFF, "without_model": "features"}
    )
    await session.fresh(settings, pipeline, addresses)
    tape = replay.tape(cards, pipeline, "2018-04-10", "2018-04-14")
    workers = [session.Process(settings, pipeline, "worker", n, HEADRACE_MODEL_EVERY_S="0.5") for n in (1, 2)]
    try:
        for worker in workers:
            worker.start()
        await asyncio.gather(*(worker.ready() for worker in workers))
        assert "Predictions carry features and no score: No model" in await ready_page(workers[0])
        publishing = asyncio.create_task(replay.publish(tape, pipeline, addresses.kafka, 500))
        # 1. killed while there is none
        await until(workers[0], lambda m: m["headrace_unscored_total"] > 500)
        await killed(workers[0])
        await until(workers[0], lambda m: m["headrace_unscored_total"] > 500)
        # 2. there is one
        shutil.copytree(trained.models_root / NAME, settings.models_root / NAME)
        version = ModelFolder(settings.models_root).aliases(NAME)[CHAMPION]
        for worker in workers:
            await until(worker, lambda m: any(k.startswith("headrace_model{") for k in m))
        assert await ready_page(workers[0]) == "ready\n"
        # 3. killed while it scores
        await killed(workers[1])
        await until(
            workers[1], lambda m: m["headrace_predictions_total"] > 100 and not m["headrace_unscored_total"]
        )
        assert not publishing.done(), "all of it is to happen under load"
        await publishing
        await all_out(pipeline, addresses.kafka, tape.events, workers)
    finally:
        for worker in workers:
            worker.stop()
    verdict, _ = await verify.check(pipeline, addresses.kafka)
    assert verdict.events == verdict.predictions == tape.events
    assert (verdict.lost, verdict.doubled, verdict.differing) == (0, 0, 0)
    records = [r async for r in kafka.read_between(addresses.kafka, pipeline.predictions)]
    out = [(r.partition, decode(r.value)) for r in records]
    # features first, then scores, of the bits of an offline scoring
    for partition in range(settings.partitions):
        kinds = [scored for scored, _ in groupby(p.version for of, p in out if of == partition)]
        assert kinds == [None, version]
    scored = [p for _, p in out if p.version is not None]
    model = ModelLife(pipeline, ModelFolder(settings.models_root), row_us=1e6).champion()
    given = model.score_many(verify.vectors(pipeline, scored)).astype(np.float64).tolist()
    assert [p.score for p in scored] == given
    bare = [p for _, p in out if p.version is None]
    assert {(p.score, p.decision, p.model) for p in bare} == {(None, None, None)}
    await consumers_cope(settings, pipeline, addresses, tape.events, bare[-1], len(scored))


async def ready_page(worker: session.Process) -> str:
    async with aiohttp.ClientSession() as http, http.get(f"{worker.url}/readyz") as response:
        assert response.status == 200
        return await response.text()


async def all_out(pipeline: Pipeline, address: str, count: int, workers: list[session.Process]) -> None:
    async with asyncio.timeout(90):
        while len([r async for r in kafka.read_between(address, pipeline.predictions)]) < count:
            for worker in workers:
                worker.check()
            await asyncio.sleep(0.3)


async def consumers_cope(
    settings: Settings, pipeline: Pipeline, addresses: Addresses, events: int, bare: Any, scored: int
) -> None:
    """The client, compare, explain and the doctor, of predictions of which some have no score."""
    async with asyncio.timeout(60), Predictions(addresses.kafka, pipeline.predictions) as predictions:
        given = [await anext(predictions) for _ in range(events)]
    assert (predictions.dropped, predictions.foreign) == (0, 0)
    assert sum(p.score is not None for p in given) == scored

    def run(*words: str) -> Any:
        environment = {"HEADRACE_MODELS_ROOT": str(settings.models_root), "HEADRACE_MLFLOW": OFF}
        return CliRunner(env=environment).invoke(
            main, [*words, "-p", NAME, "--as", pipeline.instance, "--json"]
        )

    compared = await asyncio.to_thread(run, "models", "compare")
    assert [v["events"] for v in json.loads(compared.stdout)["versions"]] == [scored]
    key = await key_of(pipeline, addresses.kafka, bare.id)
    explained = await asyncio.to_thread(
        run, "explain", "--entity", "customer", "--key", key, "--event", str(bare.id)
    )
    found = json.loads(explained.stdout)["prediction"]
    assert (found["score"], found["version"], found["differing"]) == (None, None, [])
    doctor = await asyncio.to_thread(run, "doctor")
    assert not [row for row in json.loads(doctor.stdout)["rows"] if row["verdict"] == "wrong"]


async def key_of(pipeline: Pipeline, address: str, event: Any) -> str:
    stream = pipeline.stream
    async for record in kafka.read_between(address, stream.topic):
        if json.loads(record.value)[stream.id] == event:
            return bytes(record.key).decode()
    raise AssertionError(f"there is no event {event}")
