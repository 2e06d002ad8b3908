"""A canary under load on real workers, bad ones that each guard rail takes back, and what labels make of both."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from app import kafka, replay, session
from app.cli import main
from app.local.services import Addresses
from app.quality import OF_VERSION
from app.settings import OFF, Settings
from models.canary import chosen
from models.pipeline import Pipeline, find
from models.predictions import Prediction, decode
from models.scoring import Card
from tables.model_folder import CANARY, CHAMPION, ModelFolder
from tests.fixtures.models import bad, graph
from tests.integration.test_shadow import life_of, scores_of, shadows_of, two

pytestmark = pytest.mark.integration

NAME = "card-fraud"
SHARE = 20.0
__all__ = ["two"]


@contextlib.asynccontextmanager
async def workers(
    settings: Settings, pipeline: Pipeline, addresses: Addresses, count: int, **environment: str
) -> AsyncIterator[list[session.Process]]:
    await session.fresh(settings, pipeline, addresses)
    found = [
        session.Process(settings, pipeline, "worker", n, HEADRACE_MODEL_EVERY_S="1", **environment)
        for n in range(count)
    ]
    try:
        for worker in found:
            worker.start()
        for worker in found:
            await worker.ready()
        yield found
    finally:
        for worker in found:
            worker.stop()


async def until(
    process: session.Process, reached: Callable[[dict[str, float]], bool], within: float = 120
) -> None:
    async with asyncio.timeout(within):
        while not reached(await process.metrics()):
            process.check()
            await asyncio.sleep(0.1)


async def predicted(pipeline: Pipeline, address: str, count: int) -> list[Prediction]:
    """All predictions, when so many are there."""
    async with asyncio.timeout(120):
        while True:
            spans = await kafka.offsets_of(
                address, await kafka.partitions_of(address, [pipeline.predictions])
            )
            if sum(span.end - span.first for span in spans) >= count:
                break
            await asyncio.sleep(0.2)
    await asyncio.sleep(1)  # doubles would come now
    return [decode(r.value) async for r in kafka.read_between(address, pipeline.predictions)]


def keys_of(tape: replay.Tape) -> dict[Any, bytes]:
    """The customer of each event."""
    rows = zip(tape.history.ids[tape.rows].tolist(), tape.keys, tape.is_label.tolist(), strict=True)
    return {id_: key or b"" for id_, key, label in rows if not label}


def headrace(settings: Settings, *words: str) -> Any:
    environment = {"HEADRACE_MODELS_ROOT": str(settings.models_root), "HEADRACE_MLFLOW": OFF}
    return CliRunner(env=environment).invoke(main, [*words, "-p", NAME])


@pytest.mark.timeout(400)
async def test_each_entity_is_on_the_side_that_the_hash_says(
    two: Settings, addresses: Addresses, cards: Path
) -> None:
    pipeline, life = find(NAME, two.pipelines, "cards-canary"), life_of(two)
    champion = life.aliases()[CHAMPION]
    (challenger,) = (v.version for v in life.registry.versions(NAME) if v.version != champion)
    on = f"headrace_canary{{{challenger}}}"
    before = replay.tape(cards, pipeline, "2018-04-20", "2018-04-21")
    during = replay.tape(cards, pipeline, "2018-04-21", "2018-04-24")
    after = replay.tape(cards, pipeline, "2018-04-24", "2018-04-25")
    async with workers(two, pipeline, addresses, 2) as (first, second):
        await replay.publish(before, pipeline, addresses.kafka, 2000)
        await predicted(pipeline, addresses.kafka, before.events)
        # 1. within 5 s all workers follow, without a restart
        answer = headrace(two, "models", "canary", challenger, "--share", f"{SHARE:g}")
        assert answer.exit_code == 0, answer.stderr
        for worker in (first, second):
            await until(worker, lambda m: m.get(on) == SHARE, within=5)
        # 2. under load one of them is killed and comes back
        load = asyncio.create_task(replay.publish(during, pipeline, addresses.kafka, 1500))
        await asyncio.sleep(3)
        second.stop(signal.SIGKILL)
        second.start()
        await second.ready()
        await load
        await predicted(pipeline, addresses.kafka, before.events + during.events)
        # 3. and it is withdrawn
        assert headrace(two, "models", "withdraw", CANARY).exit_code == 0
        for worker in (first, second):
            await until(worker, lambda m: on not in m, within=5)
        await replay.publish(after, pipeline, addresses.kafka, 2000)
        total = before.events + during.events + after.events
        made = await predicted(pipeline, addresses.kafka, total)
        assert [line for line in first.log.read_text().splitlines() if "taken back" in line] == []
    # none lost or doubled
    assert len(made) == len({p.id for p in made}) == total
    assert {p.id for p in made} == keys_of(before).keys() | keys_of(during).keys() | keys_of(after).keys()
    # each by whom the hash says, with the bits of an offline scoring
    customers = keys_of(during)
    ids = list(customers)
    canary_s = chosen([customers[i] for i in ids], challenger, SHARE)
    wanted = dict(zip(ids, np.where(canary_s, challenger, champion).tolist(), strict=True))
    assert {p.id: p.version for p in made if p.id in wanted} == wanted
    assert {p.version for p in made if p.id not in wanted} == {champion}
    assert 0.15 < canary_s.mean() < 0.25
    for version in (champion, challenger):
        its = [p for p in made if p.version == version]
        assert [p.score for p in its] == scores_of(two, version, its)
    # what did not decide is in the shadow, so that both are known of each event but those that the kill met there
    shadows = dict(await shadows_of(pipeline, addresses.kafka))
    theirs = {s.id: s for s in shadows.values()}
    assert len(theirs) == len(shadows) > 0.8 * len(ids)
    of_both = [p for p in made if p.id in theirs]
    for version, score in (
        (champion, lambda s: s.champion), (challenger, lambda s: s.challengers[CANARY]),
    ):  # fmt: skip
        said = [score(theirs[p.id]) for p in of_both]
        assert {s.version for s in said} == {version}
        assert [s.score for s in said] == scores_of(two, version, of_both)


# --- bad ones ------------------------------------------------------------------------------------


def planted(settings: Settings, pipeline: Pipeline, how: str) -> str:
    """A version that passes the gate and is no good. Its name."""
    width = len(pipeline.vector)
    golden: list[list[float | None]] = [[0.0] * width, [1.0] + [0.0] * (width - 1)]
    made = graph(1.0, width) if how == "scores" else bad(how, width)
    sigmoid = [0.5, 1 / (1 + float(np.exp(-1.0)))]
    card = Card(
        pipeline=NAME, version=how, definition=pipeline.definition, features=list(pipeline.vector),
        thresholds={"review": 0.98, "block": 0.995}, otherwise="pass", golden=golden,
        golden_scores=[0.0, 7.13 % 1] if how == "random" else sigmoid, metrics={},
    )  # fmt: skip
    ModelFolder(settings.models_root).save(made, card)
    return how


@pytest.mark.timeout(400)
async def test_a_bad_canary_is_taken_back_and_the_reason_is_told(
    two: Settings, addresses: Addresses, cards: Path
) -> None:
    pipeline = find(NAME, two.pipelines, "cards-rails")
    rails = {"fails": "failed", "slow": "latency", "scores": "scores"}
    sent = 0
    async with workers(two, pipeline, addresses, 2, HEADRACE_CANARY_ROW_US="30") as both:
        for day, (how, rail) in enumerate(rails.items(), 20):
            version = planted(two, pipeline, how)
            assert headrace(two, "models", "canary", version, "--share", "30").exit_code == 0
            for worker in both:
                await until(worker, lambda m, v=version: m.get(f"headrace_canary{{{v}}}") == 30, within=5)
            tape = replay.tape(cards, pipeline, f"2018-04-{day}", f"2018-04-{day + 1}")
            await replay.publish(tape, pipeline, addresses.kafka, 1000)
            sent += tape.events
            for worker in both:  # the one that has seen it, and the one that follows
                gone = f"headrace_canary_taken_back{{{rail},{version}}}"
                await until(
                    worker, lambda m, g=gone, v=version: m.get(g) == 1 and f"headrace_canary{{{v}}}" not in m
                )
            shown = json.loads(headrace(two, "models", "show", version, "--json").stdout)["canary"]
            assert (shown["rail"], shown["share"]) == (rail, 30)
            assert shown["reason"].startswith(f"The canary {version} ")
            assert f"{version} was taken back: {shown['reason']}\n" in headrace(two, "models", "list").stdout
            for worker in both:  # each may have seen a breach of its own
                told = [
                    line for line in worker.log.read_text().splitlines() if f"The canary {version} " in line
                ]
                assert any("taken back" in line for line in told)
            assert any(shown["reason"] in worker.log.read_text() for worker in both)
        made = await predicted(pipeline, addresses.kafka, sent)
    assert len(made) == len({p.id for p in made}) == sent
    assert "fails" not in {p.version for p in made}  # the champion has decided for it
    assert headrace(two, "models", "withdraw", CANARY).exit_code == 0


@pytest.mark.timeout(500)
async def test_what_labels_say_is_what_compare_says_and_takes_a_canary_back(
    two: Settings, addresses: Addresses, cards: Path
) -> None:
    pipeline, life = find(NAME, two.pipelines, "cards-quality"), life_of(two)
    champion = life.aliases()[CHAMPION]
    version = planted(two, pipeline, "random")
    async with workers(two, pipeline, addresses, 2) as (worker, _):
        quality = session.Process(
            two, pipeline, "quality", HEADRACE_MODEL_EVERY_S="1", HEADRACE_CANARY_POSITIVES="1000000"
        )
        quality.start()
        try:
            life.set_canary(version, SHARE)
            await until(worker, lambda m: f"headrace_canary{{{version}}}" in m, within=5)
            # 1. eleven days: labels come seven days behind
            tape = replay.tape(cards, pipeline, "2018-04-20", "2018-05-01")
            await replay.publish(tape, pipeline, addresses.kafka, 4000)
            await predicted(pipeline, addresses.kafka, tape.events)
            await until(worker, lambda m: f"headrace_canary{{{version}}}" in m)
            found = await settled(quality)
            days = {"--from": found["from"], "--to": found["to"]}
            # 2. the same figures
            words = [w for pair in days.items() for w in pair]
            compare = ("models", "compare", "--as", pipeline.instance, *words, "--json")
            answer = await asyncio.to_thread(headrace, two, *compare)
            assert answer.exit_code == 0, answer.stderr
            wanted = {f["version"]: f for f in json.loads(answer.stdout)["versions"]}
            assert wanted.keys() == {champion, version}
            for name, figures in wanted.items():
                same(name, figures, found["metrics"])
            # 3. whoever starts anew says the same
            quality.stop(signal.SIGKILL)
            quality.start()
            again = await settled(quality)
            assert figures_of(again["metrics"]) == figures_of(found["metrics"])
            assert version in life.aliases().values()
            assert life.canary(life.aliases()).reason is None  # type: ignore[union-attr]
            # 4. with fewer labels to ask for it takes the canary back, and workers follow
            quality.stop()
            quality = session.Process(
                two, pipeline, "quality", 2, HEADRACE_MODEL_EVERY_S="1", HEADRACE_CANARY_POSITIVES="30"
            )
            quality.start()
            gone = f"headrace_canary_taken_back{{quality,{version}}}"
            await until(worker, lambda m: m.get(gone) == 1 and f"headrace_canary{{{version}}}" not in m)
            canary = life.registry.canary(NAME, version)
            assert canary is not None
            assert canary.reason in quality.log.read_text()
            assert f"which the champion has {wanted[champion]['ap']:.1f}"[:-1] in str(canary.reason)
        finally:
            quality.stop()
    life.withdraw(CANARY)


async def settled(quality: session.Process) -> dict[str, Any]:
    """Its metrics when all is read, and the days that they are of."""
    await quality.ready()
    seen: dict[str, float] = {}
    async with asyncio.timeout(60):
        while True:
            found = await quality.metrics()
            now = figures_of(found)
            if now and now == seen and await quality.is_ready():
                break
            seen = now
            await asyncio.sleep(1)
    end = found["headrace_quality_until_seconds"]
    day = [time.strftime("%Y-%m-%d", time.gmtime(t)) for t in (end - 7 * 86400, end)]
    return {"metrics": found, "from": day[0], "to": day[1]}


def figures_of(found: dict[str, float]) -> dict[str, float]:
    return {k: v for k, v in found.items() if k.startswith("headrace_quality_") and "{" in k}


def same(version: str, wanted: dict[str, Any], found: dict[str, float]) -> None:
    """Within the bounds that the page states."""
    got = {name: found[f"headrace_quality_{name}{{{version}}}"] for name in OF_VERSION}
    assert (got["labelled"], got["positives"]) == (wanted["labelled"], wanted["positives"])
    assert got["positives"] > 20
    slack = found[f"headrace_quality_auc_slack{{{version}}}"]
    assert slack < 1e-3
    assert abs(got["auc"] - wanted["auc"]) <= slack + 1e-9
    assert got["ap"] == pytest.approx(wanted["ap"], abs=5e-3)
    assert got["precision_at_top"] == pytest.approx(wanted["precision_at_top"], abs=0.01)
    assert got["calibration_ratio"] == pytest.approx(wanted["calibration_ratio"], rel=1e-3)
    assert got["calibration_error"] == pytest.approx(wanted["calibration_error"], abs=1e-3)
