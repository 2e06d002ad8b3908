"""A routed pipeline is as exact: two streams and labels in one log, through crashes, zombies and hand-overs.

As tests/unit/test_exactness.py; the judge folds the logs as they are, each in one piece.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from faust.types import TP
from hypothesis import given
from hypothesis import strategies as st

from agents.route import Route
from app.verify import Intake, same
from app.worker import Worker
from models.errors import HeadraceError
from models.events import Batch, EventDecoder, LabelDecoder, key_bytes, streams_of
from models.fields import joined
from models.filters import Filters
from models.history import fold_entity
from models.partitions import partition_of
from models.pipeline import parse
from models.predictions import decode, identity
from models.records import RecordCodec, writers
from models.vectors import Vectors
from models.windows import DUPLICATE, EVENT, Floats
from models.windows import LOST as LOST_RECORD
from tests.fixtures.exactness import DAY, HOUR, compared
from tests.fixtures.logs import order
from tests.fixtures.pipelines import SHOP, edited
from tests.fixtures.simulation import PARTITIONS, Broker, Died, Producer, World, simulated
from tests.unit.test_exactness import _BAD, _FATE, _WORK, ALL, LOST, OLD, Step, arrived

LOGINS = """\
  logins:
    id: LOGIN
    time: AT
    scored: true
    fields: {LOGIN: string, AT: {type: timestamp, unit: ms}, CUSTOMER: int, DEVICE: string}
labels:
"""
ROUTED = parse(
    edited(
        edited(
            edited(SHOP, "labels:\n", LOGINS),
            "      CUSTOMER_NB: {aggregate: count, window: 1d}\n",
            "      CUSTOMER_NB: {from: orders, aggregate: count, window: 1d}\n"
            "      CUSTOMER_DEVICES: {from: logins, aggregate: distinct, of: DEVICE, window: 7d}\n"
            "      CUSTOMER_RISK: {aggregate: share, of: RETURNED, window: 2d, delay: 1d}\n",
        ),
        "key: SHOP",
        "key: [CUSTOMER, SHOP]",
    )
    .replace("vector: [", "vector: [stream, CUSTOMER_DEVICES, CUSTOMER_RISK, ")
    .replace("lateness: 1h", "reversals: {known: GONE}\nlateness: 1h")
)
START = 1_599_000_000_000
CUSTOMERS = range(4)


def home(customer: int, name: str) -> tuple[int, int]:
    """The partitions of the two logs that an order goes through."""
    pair = joined([customer, name]) or ""
    return partition_of(key_bytes(customer), PARTITIONS), partition_of(key_bytes(pair), PARTITIONS)


# From each partition of the first log to each of the second, an order: what was lost is noticed behind it.
LAST = list({home(c, name): (c, name) for c, name in product(range(10, 40), "xyz")}.values())
_PAIRS = [*product(CUSTOMERS, ("a", "b", "b|c")), *LAST]
KEYS = [
    [key_bytes(c) for c in dict.fromkeys(c for c, _ in _PAIRS)],
    [key_bytes(joined([c, name]) or "") for c, name in _PAIRS],
]


def bought(id: int, customer: int, name: str | None, hours: int, partition: int) -> Step:
    value = order(id, CUSTOMER=customer, SHOP=name, AT=START + hours * HOUR, AMOUNT=id / 4, ITEMS=hours % 3)
    return "publish", ROUTED.streams[0].topic, partition, value


def logged(id: int, customer: int, device: int, hours: int, partition: int) -> Step:
    body = {"LOGIN": str(id), "AT": START + hours * HOUR, "CUSTOMER": customer, "DEVICE": f"d{device}"}
    return "publish", ROUTED.streams[1].topic, partition, json.dumps(body).encode()


def labelled(id: int, customer: int, name: str | None, hours: int, state: int | None, partition: int) -> Step:
    at = START + hours * HOUR
    body = {"ID": id, "AT": at, "CUSTOMER": customer, "SHOP": name, "RETURNED": state, "KNOWN": at + DAY}
    return "publish", ROUTED.said[0].topic, partition, json.dumps(body).encode()


def undone(id: int, customer: int, name: str | None, hours: int, partition: int) -> Step:
    at = START + hours * HOUR
    body = {"ID": id, "AT": at, "CUSTOMER": customer, "SHOP": name, "GONE": at + HOUR}
    return "publish", ROUTED.said[1].topic, partition, json.dumps(body).encode()


# --- the judge -----------------------------------------------------------------------------------


def findings(broker: Broker) -> list[str]:
    """What was lost, doubled, or differs; nothing where all is as the logs say."""
    found: list[str] = []
    wanted = [_published(broker, n) for n in range(len(ROUTED.entities))]
    carried: Floats = np.empty((0, 0))
    for number, entity in enumerate(ROUTED.entities):
        batch, places = _taken(broker, number)
        assert batch.sources is not None and batch.offsets is not None
        there = Counter(zip(batch.sources.tolist(), batch.offsets.tolist(), strict=True))
        found += [f"lost on the way to {entity.log}: {at}" for at in sorted(wanted[number] - set(there))]
        found += [f"for nothing in {entity.log}: {at}" for at in sorted(set(there) - wanted[number])]
        found += [f"doubled on the way to {entity.log}: {at}" for at, n in there.items() if n > 1]
        features, outcomes = _folded(number, batch)
        events = (batch.kinds == EVENT) & (outcomes != DUPLICATE)
        carried = np.hstack([batch.features, features])
        if number + 1 < len(ROUTED.entities):
            sources = places[:, 0] * len(writers(ROUTED, number + 1))
            wanted[number + 1] |= set(zip(sources[events].tolist(), places[events, 1].tolist(), strict=True))
    vectors = dict(
        zip(
            map(tuple, places[events].tolist()),
            Vectors(ROUTED).of(batch.fields, carried)[events],
            strict=True,
        )
    )
    ids = dict(zip(map(tuple, places[events].tolist()), batch.ids[events].tolist(), strict=True))
    out: Counter[Any] = Counter()
    for p in range(PARTITIONS):
        for record in broker.logs[TP(ROUTED.predictions, p)]:
            prediction = decode(record.value or b"")
            at = p, prediction.origin.offset
            out[at] += 1
            served = np.array([prediction.features[n] for n in ROUTED.vector], np.float64)
            if (
                at not in vectors
                or not same(served, vectors[at]).all()
                or identity(ROUTED, prediction) != ids[at]
            ):
                found.append(f"differing: the prediction of {at}")
    found += [f"lost: the prediction of {at}" for at in vectors.keys() - out.keys()]
    return found + [f"doubled: the prediction of {at}" for at, n in out.items() if n > 1]


def _published(broker: Broker, number: int) -> set[tuple[int, int]]:
    """Source and offset of what routers must have written into a stage's log."""
    found, topics = set(), writers(ROUTED, number)
    decoders: dict[str, Any] = (
        {s.topic: EventDecoder(ROUTED, s) for s in ROUTED.streams} if number == 0 else {}
    )
    said = {x.topic: LabelDecoder(ROUTED, x) for x in ROUTED.said}
    for writer, topic in enumerate(topics):
        for p in range(PARTITIONS):
            for record in broker.logs[TP(topic, p)]:
                value = record.value or b""
                if topic in said:
                    batch, _, bad = said[topic].decode([value])
                    named = batch.keys.get(ROUTED.entities[number].name, [])
                    good = not bad and named != [] and named[0] is not None
                else:
                    good = (
                        topic in decoders
                        and not decoders[topic].decode([value], np.array([record.timestamp]))[2]
                    )
                if good:
                    found.add((p * len(topics) + writer, record.offset))
    return found


def _taken(broker: Broker, number: int) -> tuple[Batch, Any]:
    """A stage's log without what was sent again, and the partition and offset of each record."""
    log = ROUTED.entities[number].log
    records = [(p, r) for p in range(PARTITIONS) for r in broker.logs[TP(log, p)]]
    stamped = [_Stamped(p, r) for p, r in records]
    batch, kept = Intake(ROUTED, number, PARTITIONS).take(stamped)
    places = np.array([(p, r.offset) for p, r in records], np.int64).reshape(-1, 2)
    return batch, places[kept]


class _Stamped:
    def __init__(self, partition: int, record: Any) -> None:
        self.partition, self.value, self.key = partition, record.value, record.key


def _folded(number: int, batch: Batch) -> tuple[Floats, Any]:
    entity, names = ROUTED.entities[number], [f.name for f in ROUTED.columns]
    codes: dict[Any, int] = {None: -1}
    slots = np.array([codes.setdefault(k, len(codes) - 1) for k in batch.keys], np.int64)
    values = np.ascontiguousarray(
        batch.fields[:, np.array([names.index(v) for v in entity.values], np.int64)]
    )
    flags = Filters(entity, ROUTED.columns).of(batch.fields)
    return fold_entity(entity, slots, batch.kinds, batch.times, batch.ids, values, batch.labels, flags)


# --- histories -----------------------------------------------------------------------------------


async def outcome(world: World, steps: Sequence[Step]) -> list[str]:
    await world.run(steps)
    assert len(LAST) == PARTITIONS**2
    await world.rest([bought(1000 + i, c, name, 300, 0)[1:] for i, (c, name) in enumerate(LAST)])
    found = findings(world.broker)
    unstopped = world.unstopped()
    found += compared("in the last owner's store", world.stored(KEYS), unstopped)
    out = [len(log) for log in world.predictions]
    await world.again_from_nothing(9)
    if [len(log) for log in world.predictions] != out:
        found.append("doubled: what was predicted is predicted again from nothing")
    return found + compared("of a worker that began with nothing", world.stored(KEYS), unstopped)


def lived(root: Path, steps: Sequence[Step]) -> list[str]:
    with simulated(root, False, ROUTED) as world:
        try:
            return asyncio.run(outcome(world, steps))
        except Died as died:
            return [f"died: {died.__cause__ or died}"]


_SHOPS = st.sampled_from(["a", "b|c", None])
_EVENT = st.tuples(
    st.booleans(),
    st.integers(0, 9),
    st.sampled_from(CUSTOMERS),
    _SHOPS,
    st.integers(0, 60),
    st.integers(0, 1),
)


@st.composite
def histories(draw: st.DrawFn) -> list[Step]:
    """Orders and logins under any record key, with ids of each other; labels; twice, late and early."""
    specs = draw(st.lists(_EVENT, min_size=6, max_size=14))
    events = [
        logged(id, c, id % 3, hours, p) if login else bought(id, c, name, hours, p)
        for login, id, c, name, hours, p in specs
    ]
    labels = [
        labelled(id, c, name, hours, state, p)
        for login, id, c, name, hours, p in specs
        for state in (1, 0, None)
        if not login
    ]
    labels += [undone(id, c, name, hours, p) for login, id, c, name, hours, p in specs if not login]
    bad = st.tuples(st.just("publish"), st.sampled_from(ROUTED.inputs), st.just(1), st.sampled_from(_BAD[:3]))
    some = st.sampled_from(events)
    publish = st.lists(
        st.one_of(some, some, some, st.sampled_from(labels or events), bad), min_size=1, max_size=8
    )
    hole = st.tuples(st.just("hole"), st.integers(0, PARTITIONS - 1), st.just(ROUTED.entities[1].log))
    fate = _FATE.filter(lambda step: step[0] != "hole")
    steps: list[Step] = [("start", 0, OLD)]
    for _ in range(draw(st.integers(1, 4))):
        steps += [
            *draw(publish),
            *draw(st.lists(_WORK, min_size=1, max_size=10)),
            *draw(st.lists(st.one_of(fate, fate, fate, hole), min_size=1, max_size=2)),
        ]
    return steps


@given(histories())
def test_every_history(steps: list[Step]) -> None:
    with TemporaryDirectory() as root:
        assert lived(Path(root), steps) == []


EVENTS = [
    step
    for i in range(8)
    for step in (bought(i, i % 4, "ab"[i % 2], i, i % 2), logged(i, i % 4, i, i, (i + 1) % 2))
]


def _done_when_read(route: Route, committed: Callable[[int, int], None]) -> Callable[[Any], None]:
    handle = route.handle

    def hasty(polled: Any) -> None:
        handle(polled)
        for partition, position in route.positions.items():
            committed(partition, position)

    return hasty


def test_the_router_s_position_waits_for_what_it_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A router that counts as done what it has only read loses events in a crash; this one does not."""
    steps = [
        ("start", 0, OLD), *EVENTS, ("poll", 0, 100, ALL, True), ("flush", 0), ("commit", 0),
        ("crash", 0, 9, [LOST], OLD),
    ]  # fmt: skip
    assert lived(tmp_path / "with", steps) == []
    wire = Worker.wire

    def hasty(self: Worker) -> None:
        wire(self)
        for topic, route in self.routes.items():
            route.handle = _done_when_read(route, partial(self.partitions.committed, topic))  # type: ignore[method-assign]

    monkeypatch.setattr(Worker, "wire", hasty)
    assert any(f.startswith("lost on the way") for f in lived(tmp_path / "without", steps))


def test_a_reversal_counts_in_every_entity_through_a_crash(tmp_path: Path) -> None:
    """Of five orders of a customer two are taken out, one of them before it came; each is predicted all the same."""
    steps = [
        ("start", 0, OLD), undone(3, 1, "a", 3, 1), *(bought(i, 1, "a", i, i % 2) for i in range(3)), ("progress",),
        undone(1, 1, "a", 1, 0), ("progress",), ("crash", 0, 0, [LOST], OLD), bought(3, 1, "a", 3, 1),
        ("progress",), bought(1, 1, "a", 1, 1), ("progress",), bought(4, 1, "a", 4, 0),
    ]  # fmt: skip
    with simulated(tmp_path, False, ROUTED) as world:
        assert asyncio.run(outcome(world, steps)) == []
        served = {}
        for record in (r for p in range(PARTITIONS) for r in world.predictions[p]):
            prediction = decode(record.value or b"")
            served[prediction.id] = [prediction.features[n] for n in ("CUSTOMER_NB", "CUSTOMER_SPENT")]
    assert served[2] == [3, 0.75]
    assert served[3] == [2, 0.5]  # not itself, nor 1, which was taken out
    assert served[4] == [3, 1.5]


def test_what_a_router_sends_again_is_dropped(tmp_path: Path) -> None:
    steps = [
        ("start", 0, OLD), *EVENTS, ("poll", 0, 100, ALL, True), *arrived(0), ("poll", 0, 100, ALL, True),
        *arrived(0), ("crash", 0, 0, [LOST], OLD), *EVENTS, ("progress",),
    ]  # fmt: skip
    assert lived(tmp_path, steps) == []
    with simulated(tmp_path / "seen", False, ROUTED) as world:
        asyncio.run(outcome(world, steps))
        batch, _ = _taken(world.broker, 0)
        records = sum(len(world.broker.logs[TP(ROUTED.entities[0].log, p)]) for p in range(PARTITIONS))
        assert records > len(batch)  # some came twice
        assert set(streams_of(ROUTED, batch).tolist()) == {0, 1}


# --- what retention has cut, and topics that were made anew --------------------------------------

THROUGH = [("progress",)] * 3  # router and both stages
MUCH_LATER = 24 * 60  # hours; no window reaches so far back
GONE = [logged(50, 1, 1, 1, 0), labelled(0, 0, "a", 0, 1, 0)]
CUT = {
    "a stream": TP(ROUTED.streams[1].topic, 0),
    "labels": TP(ROUTED.said[0].topic, 0),
    "the first log": TP(ROUTED.entities[0].log, home(1, "a")[0]),
    "nothing": None,
}


def _bought_by_all(id: int, hours: int) -> list[Step]:
    return [bought(id + i, c, name, hours, i % 2) for i, (c, name) in enumerate(LAST)]


def _lost(world: World, number: int) -> bool:
    """Whether each partition of a stage's log has been told."""
    codec, log = RecordCodec(ROUTED, number), ROUTED.entities[number].log
    logs = [[r.value or b"" for r in world.broker.logs[TP(log, p)]] for p in range(PARTITIONS)]
    told = [bool((codec.decode(v, [None] * len(v))[0].kinds == LOST_RECORD).any()) for v in logs]
    assert len({*told}) == 1
    return told[0]


@pytest.mark.parametrize("cut", CUT.values(), ids=CUT)
def test_what_is_cut_before_it_was_read_is_told_in_every_log_behind(cut: TP | None, tmp_path: Path) -> None:
    """Values are marked as degraded wherever what is gone may be missing, and as long as a window reaches it."""

    async def live(world: World) -> None:
        await world.run([("start", 0, OLD), *EVENTS, *THROUGH, ("crash", 0, 9, [LOST], None), *GONE])
        if cut == CUT["the first log"]:  # what it has lost has come that far
            await world.run(
                [("start", 0, OLD), ("poll", 0, 9, ALL, True), *arrived(0), ("crash", 0, 9, [LOST], None)]
            )
        if cut is not None:
            world.broker.first[cut] = len(world.broker.logs[cut])
        await world.run(
            [("start", 0, 9 if cut == CUT["the first log"] else OLD), *_bought_by_all(100, 9), *THROUGH]
        )
        # told once: what a router says again, the stages have seen
        await world.run([*_bought_by_all(200, MUCH_LATER), *THROUGH, ("crash", 0, 9, [LOST], OLD)])
        await world.run([*_bought_by_all(300, MUCH_LATER + 1), *THROUGH])

    with simulated(tmp_path, False, ROUTED) as world:
        asyncio.run(live(world))
        served = [decode(r.value or b"") for p in range(PARTITIONS) for r in world.predictions[p]]
        told = [_lost(world, number) for number in range(2)]
    assert told == ([False, cut is not None] if cut == CUT["the first log"] else [cut is not None] * 2)
    marked = [{p.degraded for p in served if isinstance(p.id, int) and p.id // 100 == n} for n in range(4)]
    assert marked == [{False}, {cut is not None}, {False}, {False}]


ANEW = {
    "a stream": (ROUTED.streams[0].topic, "If that topic was made anew"),
    "the scored log": (ROUTED.entities[-1].log, "it is of another log"),
}


@pytest.mark.parametrize(("topic", "says"), ANEW.values(), ids=ANEW)
def test_a_topic_that_was_made_anew_stops_the_worker(topic: str, says: str, tmp_path: Path) -> None:
    """What it holds would be dropped as seen, or as predicted."""

    async def live(world: World) -> None:
        await world.run([("start", 0, OLD), *EVENTS, *THROUGH, ("crash", 0, 9, [LOST], None)])
        for p in range(PARTITIONS):
            world.broker.logs[TP(topic, p)].clear()
            world.broker.committed.pop(TP(topic, p), None)
        await world.run([("start", 0, OLD)])

    with simulated(tmp_path, False, ROUTED) as world, pytest.raises(Died, match=says):
        asyncio.run(live(world))


def test_the_highest_offset_of_any_partition_tells_that_a_topic_was_made_anew(tmp_path: Path) -> None:
    """Another partition, which has heard of a lower one, does not hide it."""
    customers = [next(c for c in range(99) if home(c, "a")[0] == p) for p in range(PARTITIONS)]

    async def live(world: World) -> None:
        # each partition of the first log has heard of the same partition, the last one of the least
        steps = [bought(i, c, "a", i, 0) for i, c in enumerate(reversed(customers))]
        await world.run([("start", 0, OLD), *steps, *THROUGH, ("crash", 0, 9, [LOST], None)])
        world.broker.logs[TP(ROUTED.streams[0].topic, 0)].pop()
        await world.run([("start", 0, OLD)])

    for _ in range(2):
        customers.reverse()
        with (
            simulated(tmp_path / str(customers[0]), False, ROUTED) as world,
            pytest.raises(Died, match="has had offset 1 "),
        ):
            asyncio.run(live(world))


def test_what_an_older_owner_predicts_until_the_claim_stops_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was stopped, wakes, and goes on for a moment, behind the new owner's look at where logs end."""
    claim, log = Producer.claim, ROUTED.entities[-1].log

    async def late(self: Producer, topic: str, partitions: Sequence[int]) -> None:
        for p in partitions if topic == ROUTED.predictions else ():
            made = json.loads(world.broker.logs[TP(topic, p)][-1].value or b"{}")
            last = world.broker.logs[TP(log, p)][-1]
            world.publish(log, p, last.value or b"")
            made["origin"]["offset"] = len(world.broker.logs[TP(log, p)]) - 1
            world.publish(topic, p, json.dumps(made).encode())
        await claim(self, topic, partitions)

    async def live() -> None:
        more = [bought(100 + i, c, name, 9, 0) for i, (c, name) in enumerate(LAST)]
        await world.run([("start", 0, OLD), *EVENTS, *more, *THROUGH, ("crash", 0, 9, [LOST], None)])
        monkeypatch.setattr(Producer, "claim", late)
        await world.run([("start", 0, OLD), *THROUGH])

    with simulated(tmp_path, False, ROUTED) as world:
        asyncio.run(live())


def test_a_loss_that_is_told_hides_no_record_that_a_broker_has_lost(tmp_path: Path) -> None:
    """It stands behind what is missing; taken as it is, what comes again would be dropped as seen."""
    (customer, name), pair = LAST[0], home(*LAST[0])
    stream = TP(ROUTED.streams[1].topic, 0)

    async def live(world: World) -> None:
        await world.run([("start", 0, OLD), *EVENTS, *THROUGH, ("hole", pair[1], ROUTED.entities[1].log)])
        for id in (500, 501):  # the first is lost, and the second is left out
            await world.run([bought(id, customer, name, 9, 0), *THROUGH])
        await world.run([("crash", 0, 9, [LOST], None), *GONE])
        world.broker.first[stream] = len(world.broker.logs[stream])
        await world.run([("start", 0, OLD), *THROUGH])
        await world.run([("control",), *THROUGH, ("control",), *THROUGH])

    with simulated(tmp_path, False, ROUTED) as world:
        asyncio.run(live(world))
        assert _lost(world, 1)
        served = {decode(r.value or b"").id for p in range(PARTITIONS) for r in world.predictions[p]}
    assert {500, 501} <= served


def test_partitions_that_a_topic_gains_stop_the_worker(tmp_path: Path) -> None:
    with simulated(tmp_path, False, ROUTED) as world:
        asyncio.run(world.run([("start", 0, OLD)]))
        route = next(process for process in world.slots if process).worker.routes[ROUTED.streams[0].topic]
        with pytest.raises(HeadraceError, match="more partitions than the 2"):
            route.start_at({PARTITIONS: 0})
