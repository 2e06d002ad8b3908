"""`headrace explain` on real logs: what it says of a prediction is what was predicted, to the bit."""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from aiokafka import TopicPartition
from aiokafka.admin import RecordsToDelete

from app import explain, kafka, replay, session, verify
from app.explain import Explanation, NotInLog
from app.local.services import Addresses
from app.settings import Settings
from models.explain import UnknownFeature
from models.partitions import partition_of
from models.pipeline import Entity, Pipeline
from models.predictions import Prediction, decode
from models.windows import MEAN, SHARE
from tests.integration.test_stream import Run, running

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240, func_only=True)]

WITHIN_S = 40


def command(settings: Settings, pipeline: Pipeline, *options: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "app.cli", "explain", "-p", pipeline.name, "--as", pipeline.instance, *options],
        env=os.environ | session.as_variables(settings) | {"COLUMNS": "200"}, text=True,
        capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    return done


async def predictions_of(run: Run) -> list[Prediction]:
    topic = run.pipeline.predictions
    return [decode(r.value) async for r in kafka.read_between(run.addresses.kafka, topic)]


async def events_of(run: Run) -> dict[Any, dict[str, Any]]:
    """The stream's events by id."""
    stream = run.pipeline.stream
    found = [
        msgspec.json.decode(r.value) async for r in kafka.read_between(run.addresses.kafka, stream.topic)
    ]
    return {event[stream.id]: event for event in found}


def ask(run: Run, entity: str, key: Any, *features: str, **more: Any) -> Any:
    return explain.explained(run.pipeline, run.addresses.kafka, entity, str(key), features, **more)


def agrees(entity: Entity, found: Explanation) -> None:
    """A few kinds, by hand, from the events alone."""
    for told in found.features:
        one = entity.aggregates[entity.features.index(told.feature)]
        kind, value = one.kind, one.value
        for view in (told.then, told.now):
            assert all(view.after < e.time <= view.until for e in view.events)
            if kind == MEAN:
                values = [v for e in view.events if (v := e.values[entity.values[value]]) is not None]
                assert view.value == pytest.approx(np.mean(values)) if values else np.isnan(view.value)
            else:
                counted = [e for e in view.events if kind != SHARE or e.label == "positive"]
                by = len(view.events) or 1 if kind == SHARE else 1
                assert view.value == len(counted) / by


@pytest.mark.parametrize(
    ("name", "start", "end", "asked"),
    [("card-fraud", "2018-04-05", "2018-04-16", 50), ("flight-delays", "2013-02-01", "2013-02-20", 15)],
)
async def test_what_is_explained_is_what_was_predicted(
    trained: Settings, addresses: Addresses, flights: Path, cards: Path, name: str, start: str, end: str, asked: int
) -> None:  # fmt: skip
    file = flights if name == "flight-delays" else cards
    async with running(trained, addresses, name, f"{name}-explain") as run:
        tape = replay.tape(file, run.pipeline, start, end)
        await run.publish(tape)
        await run.predicted(tape.events)
        predicted, events = await predictions_of(run), await events_of(run)
        shares = [n for e in run.pipeline.entities for n in e.features if "RISK" in n or "RATE" in n]
        risky = [i for i, p in enumerate(predicted) if any(p.features[n] for n in shares)]  # they are rare
        generator = np.random.default_rng(7)
        picks = generator.choice(len(predicted), asked, replace=False).tolist()
        picks += generator.choice(risky, 5).tolist()
        cells = positive = moved = 0
        for prediction in [predicted[i] for i in picks]:
            for entity in run.pipeline.entities:
                key = events[prediction.id][entity.key]
                if key is None:
                    continue
                found = await ask(run, entity.name, key, event=str(prediction.id))
                assert (found.event.id, found.event.time) == (prediction.id, prediction.event_time)
                for told in found.features:
                    served = prediction.features[told.feature]
                    pair = np.array([[told.then.value], [np.nan if served is None else served]])
                    assert verify.same(pair[0], pair[1]).all(), (prediction, told)
                    cells += 1
                    positive += any(e.label == "positive" for e in told.then.events)
                    moved += bool(told.came or told.left)
                assert found.prediction.differing == []
                assert found.prediction.score == prediction.score
                assert set(found.prediction.features) == set(entity.features)
                agrees(entity, found)
    assert cells > asked * 10
    assert positive and moved


async def test_what_changed_is_told_and_what_is_missing_has_its_remedy(
    trained: Settings, addresses: Addresses, cards: Path
) -> None:
    async with running(trained, addresses, "card-fraud", "cards-explained") as run:
        tape = replay.tape(cards, run.pipeline, "2018-04-05", "2018-04-16")
        await run.publish(tape)
        await run.predicted(tape.events)
        last = max(
            await predictions_of(run), key=lambda p: (p.features["TERMINAL_ID_NB_TX_7DAY_WINDOW"], p.id)
        )
        events = await events_of(run)
        key = events[last.id]["TERMINAL_ID"]
        before = await ask(run, "terminal", key, "TERMINAL_ID_RISK_7DAY_WINDOW", event=str(last.id))
        flipped = await _flip(run, key, before, events)
        assert run.worker.stop() == 0

    # a label that flips is told, and moves nothing of what was predicted
    (told,) = flipped.features
    assert told.then == before.features[0].then
    change = told.relabelled[0]
    assert change.before != change.now
    assert flipped.prediction.differing == []

    # the same without a worker, as a command
    options = ["--entity", "terminal", "--key", str(key), "--feature", told.feature, "--event", str(last.id)]
    done = command(run.settings, run.pipeline, *options, "--json")
    assert (done.returncode, done.stdout.count("\n")) == (0, 1), done.stderr
    assert json.loads(done.stdout) == json.loads(msgspec.json.encode(flipped))
    shown = command(run.settings, run.pipeline, *options, "--all").stdout
    assert "are the same bits" in shown
    assert all(str(e.id) in shown for e in told.then.events)
    assert f"now {change.now}" in shown

    # by default the key's newest event; at a time, what was known by then
    newest = await ask(run, "terminal", key)
    assert newest.event.time == max(e["TX_DATETIME"] for e in events.values() if e["TERMINAL_ID"] == key)
    at = await ask(run, "terminal", key, at=before.then)
    assert at.event is None and at.prediction is None
    assert at.features[1].then.value == last.features[at.features[1].feature]
    assert all(t.then.value == 0 for t in (await ask(run, "terminal", key, at=1)).features)

    await _misses(run, key, last)
    await _cut(run, key, before)


async def _flip(run: Run, key: int, before: Explanation, events: dict[Any, dict[str, Any]]) -> Explanation:
    """Send the other label of an event in the window, and wait until it is told."""
    (told,) = before.features
    event = next(e for e in told.now.events if e in told.then.events)
    labels = run.pipeline.labels
    assert labels is not None
    other = {labels.field: 0 if event.label == "positive" else 1, labels.known: before.now}
    async with asyncio.timeout(WITHIN_S):
        producer = kafka.producer(run.addresses.kafka)
        await producer.start()
        value = msgspec.json.encode(events[event.id] | other)
        await producer.send_and_wait(labels.topic, value, key=str(event.id).encode())
        await producer.stop()
        while True:
            found: Explanation = await ask(run, "terminal", key, told.feature, event=str(before.event.id))  # type: ignore[union-attr]
            if found.features[0].now.value != told.now.value:
                return found
            await asyncio.sleep(0.2)


async def _misses(run: Run, key: int, last: Prediction) -> None:
    """What there is not is told, with what was perhaps meant."""
    with pytest.raises(NotInLog, match=r"no event of terminal 123456789.*did you mean|is it a TERMINAL_ID"):
        await ask(run, "terminal", 123456789)
    with pytest.raises(NotInLog, match=rf"The log of {key} has no event 99999999; its last are \d+"):
        await ask(run, "terminal", key, event="99999999")
    with pytest.raises(UnknownFeature, match="did you mean TERMINAL_ID_RISK_7DAY_WINDOW"):
        await ask(run, "terminal", key, "TERMINAL_RISK_7DAY_WINDOW")
    for options, sentence in (
        (["--entity", "terminl", "--key", "1"], "has no entity 'terminl'; it has customer, terminal"),
        (["--entity", "terminal", "--key", "1", "--at", "noon"], "'noon' is no day or time"),
        (["--entity", "terminal", "--key", "1", "--at", "1", "--event", "1"], "either --event or --at"),
    ):
        done = command(run.settings, run.pipeline, *options)
        assert done.returncode != 0
        assert sentence in done.stderr
    away = run.settings.model_copy(update={"kafka": f"127.0.0.1:{session.free_port()}"})
    done = command(away, run.pipeline, "--entity", "terminal", "--key", "1")
    assert done.returncode == 1
    assert "No Kafka answers at" in done.stderr


async def _cut(run: Run, key: int, before: Explanation) -> None:
    """A log that has lost its beginning says since when it reaches, and what may lack events."""
    log = run.pipeline.entity("terminal").log
    partition = partition_of(str(key).encode(), 4)
    assert before.event is not None
    async with kafka.admin(run.addresses.kafka) as admin:
        await admin.delete_records(
            {TopicPartition(log, partition): RecordsToDelete(before.event.offset - 10)}
        )
    found = await ask(run, "terminal", key, event=str(before.event.id))
    assert before.then - 86_400_000 < found.log_begins <= before.then
    assert found.incomplete == list(run.pipeline.entity("terminal").features)
    assert found.prediction.differing
    with pytest.raises(NotInLog, match=r"reaches back to 2018-04-\d\d .* only"):
        await ask(run, "terminal", key, at=before.then - 5 * 86_400_000)
    with pytest.raises(NotInLog, match=r"no event 1 since 2018-04-\d\d .*, from when on the log reaches"):
        await ask(run, "terminal", key, event="1")
