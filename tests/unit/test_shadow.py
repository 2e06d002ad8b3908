"""Challengers in the shadow: each prediction has one record at most, and nothing of theirs reaches the champion."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from faust.types import TP
from hypothesis import given, settings

from agents import shadow as module
from agents.outbox import Outbox
from agents.shadow import Shadow
from app import verify
from app.worker import Partitions
from models import shadows
from models.pipeline import find
from models.predictions import Origin, decode
from models.shadows import Predicted, Scored, ShadowEncoder
from tests.conftest import PIPELINES
from tests.fixtures import simulation
from tests.fixtures.simulation import PARTITIONS, SHOP, World, simulated
from tests.unit.test_exactness import (
    OLD,
    ORDERS,
    Step,
    end_of,
    folded,
    histories,
)

WIDTH = len(SHOP.vector)


class Other(simulation.Score):
    """Another pure function of the vector."""

    card = SimpleNamespace(pipeline="shop", version="2")

    def score_many(self, vectors: Any) -> Any:
        return np.float32(1) - super().score_many(vectors)


Model: Any = simulation.Score


def predicted(n: int = 2, stream: int = 0) -> Predicted:
    scores = np.array([0.25, np.nan][:n], np.float32)
    return Predicted(
        [7, -8][:n], np.full(n, stream), np.arange(n) + 1000, np.arange(n * WIDTH).reshape(n, WIDTH) / 4,
        np.arange(n), np.arange(n) + 2**40, Model(), scores,
    )  # fmt: skip


# --- records ------------------------------------------------------------------------------------


def test_a_record_says_who_gave_which_score() -> None:
    theirs = {"challenger-x": ("2", np.array([0.5, 0.75], np.float32))}
    first, second = ShadowEncoder(SHOP).encode(predicted(), predicted().scores, theirs)
    assert json.loads(first) == {
        "id": 7, "event_time": 1000, "origin": {"partition": 0, "offset": 2**40}, "definition": SHOP.definition,
        "champion": {"version": "1", "score": 0.25}, "challengers": {"challenger-x": {"version": "2", "score": 0.5}},
    }  # fmt: skip
    read = shadows.decode(second)
    assert (read.id, read.event_time, read.stream, read.origin) == (-8, 1001, None, Origin(1, 2**40 + 1))
    assert read.champion == Scored("1", None)  # JSON has no word for what is no number
    assert read.challengers == {"challenger-x": Scored("2", 0.75)}


def test_a_record_names_its_stream_where_there_are_several() -> None:
    routed = find("flight-network", PIPELINES)
    theirs = {"challenger-x": ("2", np.zeros(1, np.float32))}
    events = predicted(1, stream=1)
    (value,) = ShadowEncoder(routed).encode(events, events.scores, theirs)
    assert shadows.decode(value).stream == routed.streams[1].name


# --- the agent ----------------------------------------------------------------------------------


class Sent:
    """A producer that keeps what it gets, unless it is to fail."""

    def __init__(self) -> None:
        self.values: list[bytes] = []
        self.fails = False

    def create_batch(self, topic: str, partition: int) -> Any:
        return simulation.Batch()

    async def send_batch(self, batch: Any, topic: str, partition: int) -> None:
        if self.fails:
            raise OSError("refused")
        self.values += [value for _, value in batch.records]


class Bench:
    """A shadow with a champion, one challenger that scores, and one that can be made to fail."""

    def __init__(self) -> None:
        self.sent, self.predictions = Sent(), Sent()
        self.models: dict[str, Any] = {"champion": simulation.Score(), "challenger-x": Other()}
        self.dropped: list[tuple[str, str, str]] = []
        self.outbox = self._outbox(self.predictions)
        self.watched: list[tuple[Any, ...]] = []
        self.shadow = Shadow(
            SHOP, self.models, self.outbox, lambda: self._outbox(self.sent), self._drop,
            lambda *told: self.watched.append(told),
        )  # fmt: skip

    def _outbox(self, producer: Any) -> Outbox:
        return Outbox(producer, lambda: 0, lambda error: None)

    def _drop(self, alias: str, version: str, error: Exception) -> None:
        del self.models[alias]
        self.dropped.append((alias, version, str(error)))

    @property
    def records(self) -> list[shadows.Shadow]:
        return [shadows.decode(value) for value in self.sent.values]


async def test_without_challengers_nothing_is_kept_or_sent() -> None:
    bench = Bench()
    del bench.models["challenger-x"]
    bench.shadow.take(predicted())
    assert not bench.shadow._queue
    await bench.shadow.once()
    assert (bench.sent.values, bench.shadow.sent, bench.shadow.missed) == ([], 0, 0)


async def test_scores_are_those_of_the_same_vectors() -> None:
    bench = Bench()
    bench.shadow.take(predicted())
    await bench.shadow.once()
    expected = Other().score_many(predicted().vectors).astype(np.float64).tolist()
    assert sorted(r.challengers["challenger-x"].score or 0 for r in bench.records) == sorted(expected)
    assert (bench.shadow.sent, bench.shadow.missed) == (2, 0)


@pytest.mark.parametrize("harm", ["raises", "shape"])
async def test_a_challenger_that_fails_is_dropped_and_the_others_go_on(harm: str) -> None:
    bench = Bench()

    class Bad(Other):
        card = SimpleNamespace(pipeline="shop", version="3")

        def score_many(self, vectors: Any) -> Any:
            if harm == "raises":
                raise RuntimeError("no such kernel")
            return np.zeros(1, np.float32)

    bench.models["challenger-bad"] = Bad()
    bench.shadow.take(predicted())
    bench.shadow.take(predicted())
    await bench.shadow.once()
    ((alias, version, why),) = bench.dropped
    assert (alias, version) == ("challenger-bad", "3")
    assert {"raises": "no such kernel", "shape": "shape (1,) for 2 events"}[harm] in why
    assert [list(r.challengers) for r in bench.records] == [["challenger-x"]] * 4


async def test_who_is_the_last_to_fail_leaves_no_records() -> None:
    bench = Bench()
    bench.models["challenger-x"].score_many = lambda vectors: 1 / 0
    bench.shadow.take(predicted())
    await bench.shadow.once()
    assert (bench.records, bench.shadow.sent, len(bench.dropped)) == ([], 0, 1)


async def test_what_there_is_no_room_for_is_missed_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_WAITING", 3)
    bench = Bench()
    bench.shadow.take(predicted())
    bench.shadow.take(predicted())
    await bench.shadow.once()
    assert (bench.shadow.sent, bench.shadow.missed) == (2, 2)
    bench.shadow.take(predicted())
    await bench.shadow.once()
    assert (bench.shadow.sent, bench.shadow.missed) == (4, 2)


async def test_what_kafka_refuses_is_missed_and_what_comes_later_is_not() -> None:
    bench = Bench()
    bench.sent.fails = True
    bench.shadow.take(predicted())
    await bench.shadow.once()
    assert (bench.shadow.sent, bench.shadow.missed) == (0, 2)
    bench.sent.fails = False
    bench.shadow.take(predicted())
    await bench.shadow.once()
    assert (bench.shadow.sent, bench.shadow.missed, len(bench.records)) == (2, 2, 2)


async def test_who_is_cancelled_while_they_score_leaves_the_events_to_the_next_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench, reached = Bench(), asyncio.Event()

    async def hang(*_: Any) -> Any:
        reached.set()
        await asyncio.Event().wait()

    with monkeypatch.context() as patch:
        patch.setattr(asyncio, "to_thread", hang)
        bench.shadow.take(predicted())
        running = asyncio.create_task(bench.shadow.run())
        await reached.wait()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    await bench.shadow.once()
    assert (len(bench.records), bench.shadow._waiting) == (2, 0)


# --- whole workers, and what befalls them -------------------------------------------------------


def shadowed(world: World) -> list[str]:
    """What is wrong with the shadow at the end of a history, but for records that are missing."""
    made = {}
    for p, log in enumerate(world.predictions):
        made |= {(p, m.origin.offset): m for m in (decode(r.value or b"") for r in log)}
    records = [
        (p, shadows.decode(r.value or b""))
        for p in range(PARTITIONS)
        for r in world.broker.logs[TP(SHOP.shadow, p)]
    ]
    counts = Counter((p, r.origin.offset) for p, r in records)
    found = [f"doubled: {n} shadows of {at}" for at, n in counts.items() if n > 1]
    for p, record in records:
        prediction = made.get((p, record.origin.offset))
        if prediction is None:
            found.append(f"a shadow of nothing: {record}")
            continue
        score = float(Other().score_many(verify.vectors(SHOP, [prediction]))[0])
        if (record.id, record.origin, record.champion, record.challengers) != (
            prediction.id, prediction.origin, Scored(prediction.version, prediction.score),
            {"challenger-x": Scored("2", score)},
        ):  # fmt: skip
            found.append(f"differing: {record} of {prediction}")
    return found


def lived(root: Path, steps: list[Step], patch: pytest.MonkeyPatch) -> tuple[list[str], int, int]:
    """What is wrong at the end of a history, and how many predictions and shadows there are."""
    patch.setitem(simulation.SERVING.models, "challenger-x", Other())
    with simulated(root, rocksdb=False) as world:
        found = end_of(world, steps) + shadowed(world)
        shadow_logs = [world.broker.logs[TP(SHOP.shadow, p)] for p in range(PARTITIONS)]
        return found, sum(map(len, world.predictions)), sum(map(len, shadow_logs))


@settings(max_examples=max(settings().max_examples // 2, 20))
@given(histories())
def test_in_every_history_a_prediction_has_one_shadow_at_most(steps: list[Step]) -> None:
    with TemporaryDirectory() as root, pytest.MonkeyPatch.context() as patch:
        assert lived(Path(root), steps, patch)[0] == []


def test_while_nobody_dies_each_prediction_has_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, predictions, shadows_ = lived(tmp_path, [("start", 0, OLD), *ORDERS], monkeypatch)
    assert (found, predictions == shadows_ >= len(ORDERS) - 1) == ([], True)


def test_a_crash_before_the_predictions_arrived_doubles_no_shadow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They wait for the acknowledgement; without that they are out before, and come again."""
    steps = [("start", 0, OLD), *ORDERS, *folded(0), ("crash", 0, 0, [simulation.LOST], OLD)]
    found, predictions, shadows_ = lived(tmp_path / "with", steps, monkeypatch)
    assert (found, predictions == shadows_) == ([], True)

    async def at_once(outbox: Outbox) -> None: ...

    real = Shadow.once

    async def hasty(self: Shadow) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self._outbox, "acknowledged", lambda: at_once(self._outbox))
            await real(self)

    monkeypatch.setattr(Shadow, "once", hasty)
    found, *_ = lived(tmp_path / "without", steps, monkeypatch)
    assert any(finding.startswith("doubled: 2 shadows") for finding in found), found


def test_a_crash_behind_the_predictions_leaves_some_without_a_shadow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = [("start", 0, OLD), *ORDERS, *folded(0), ("crash", 0, 0, [simulation.ARRIVED], OLD)]
    found, predictions, shadows_ = lived(tmp_path, steps, monkeypatch)
    assert (found, 0 < shadows_ < predictions) == ([], True)


def test_a_challenger_alone_does_not_let_the_last_log_be_read() -> None:
    serving: Any = SimpleNamespace(models={"challenger-x": Other()})
    settings_ = SimpleNamespace(without_model="wait")
    worker: Any = SimpleNamespace(pipeline=SHOP, in_step=None, serving=serving, settings=settings_, routes={})
    partitions = Partitions(worker, "")
    assert partitions.held_back == {SHOP.entities[-1].log}
    serving.models["champion"] = simulation.Score()
    assert partitions.held_back == frozenset()
