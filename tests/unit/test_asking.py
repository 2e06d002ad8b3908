"""Labels that carry the event's id alone: nothing is lost, doubled or under a wrong key, whoever dies when.

In simulated worlds (tests/fixtures/simulation.py), whose ledger may lag, be away, and say what it does not know.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from faust.types import TP
from hypothesis import given
from hypothesis import strategies as st

from agents import route as routing
from agents.outbox import Outbox
from agents.route import Asking
from app.verify import Intake
from app.worker import Partitions
from models import dead_letters
from models.events import KEYS_UNKNOWN, Found, Known, LabelDecoder, Lack, key_bytes
from models.pipeline import parse
from models.records import writers
from models.windows import LABEL
from tests.fixtures.logs import order
from tests.fixtures.pipelines import SHOP, edited
from tests.fixtures.simulation import PARTITIONS, Broker, Died, World, settled, simulated
from tests.unit.test_exactness import _FATE, _WORK, ALL, ARRIVED, LOST, OLD, Step

TEXT = edited(SHOP, "  known: KNOWN\n", "  known: KNOWN\n  keys: ledger\n").replace(
    "lateness: 1h", "reversals: {known: GONE, keys: ledger}\nlateness: 1h"
)
ASKING = parse(TEXT)
ENTITY = ASKING.entities[1]
NAMES = ("a", "b", None)
START = 1_599_000_000_000
PREDICTED: tuple[Step, ...] = (
    *[("progress",)] * 4,
    ("read",),
)  # all that was published is, and the ledger knows it
AFTER_ALL = 2**62  # the ledger is whole up to then, so what it does not know is given up
assert ASKING.labels is not None and ASKING.reversals is not None


def event(id: int) -> Step:
    value = order(id, CUSTOMER=id % 3, SHOP=NAMES[id % 3], AT=START + id * 1000)
    return "publish", ASKING.stream.topic, id % PARTITIONS, value


def label(id: int, partition: int, **more: Any) -> Step:
    body = {"ID": id, "RETURNED": id % 2, "KNOWN": START + id} | more
    assert ASKING.labels is not None
    return "publish", ASKING.labels.topic, partition, json.dumps(body).encode()


def reversal(id: int, partition: int) -> Step:
    assert ASKING.reversals is not None
    return "publish", ASKING.reversals.topic, partition, json.dumps({"ID": id, "GONE": START + id}).encode()


# --- the judge -----------------------------------------------------------------------------------


def letters(broker: Broker) -> Counter[tuple[str, int, int]]:
    found: Counter[tuple[str, int, int]] = Counter()
    for p in range(PARTITIONS):
        for record in broker.logs[TP(ASKING.dead_letters, p)]:
            letter: Any = dead_letters.decode(record.value or b"")
            assert letter.reason == "keys-unknown"
            found[letter.topic, letter.partition, letter.offset] += 1
    return found


def findings(broker: Broker) -> list[str]:
    """What was lost, doubled, or is not what its event says."""
    found = []
    told = letters(broker)
    published = {
        json.loads(r.value or b"")["ID"]
        for p in range(PARTITIONS)
        for r in broker.logs[TP(ASKING.stream.topic, p)]
    }
    for number, entity in enumerate(ASKING.entities):
        log, topics = entity.log, writers(ASKING, number)
        records = [_At(p, r) for p in range(PARTITIONS) for r in broker.logs[TP(log, p)]]
        batch, _ = Intake(ASKING, number, PARTITIONS).take(records)
        assert batch.sources is not None and batch.offsets is not None
        there: Counter[Any] = Counter()
        for i in range(len(batch)):
            if batch.kinds[i] == LABEL:
                p, writer = divmod(int(batch.sources[i]), len(topics))
                at = topics[writer], p, int(batch.offsets[i])
                there[at] += 1
                id_ = int(batch.ids[i])
                key = id_ % 3 if entity.name == "customer" else NAMES[id_ % 3]
                if batch.times[i] != START + id_ * 1000 or batch.keys[i] != key_bytes(
                    key or 0 if key is None else key
                ):
                    found.append(f"not its event's: {at} in {log}")
        found += [f"doubled: {at} in {log}" for at, n in there.items() if n > 1]
        for said in ASKING.said:
            if not entity.labelled and said is ASKING.labels:
                continue
            for p in range(PARTITIONS):
                for r in broker.logs[TP(said.topic, p)]:
                    id_ = json.loads(r.value or b"")["ID"]
                    at = said.topic, p, r.offset
                    keyless = entity.name == "shop" and NAMES[id_ % 3] is None
                    if id_ not in published:
                        if at not in told:
                            found.append(f"neither known nor told: {at}")
                    elif not there[at] and at not in told and not keyless:
                        found.append(f"lost: {at} in {log}")
    return found


class _At:
    def __init__(self, partition: int, record: Any) -> None:
        self.partition, self.value, self.key = partition, record.value, record.key


async def outcome(world: World, steps: Sequence[Step]) -> list[str]:
    await world.run(steps)
    await world.rest([])
    world.whole(AFTER_ALL)
    await world.start(0, OLD)
    await world.rest([])
    return findings(world.broker)


def lived(root: Path, steps: Sequence[Step]) -> list[str]:
    with simulated(root, False, ASKING) as world:
        try:
            return asyncio.run(outcome(world, steps))
        except Died as died:
            return [f"died: {died.__cause__ or died}"]


@st.composite
def histories(draw: st.DrawFn) -> list[Step]:
    """Events, and of each some labels and a reversal, before and behind it, of some that never come too."""
    ids = draw(st.lists(st.integers(0, 11), min_size=4, max_size=10))
    said = st.one_of(
        st.builds(label, st.sampled_from([*ids, 19, 21]), st.integers(0, 1)),
        st.builds(
            lambda id, p: label(id, p, AT=START + id * 1000), st.sampled_from([*ids, 19]), st.integers(0, 1)
        ),
        st.builds(reversal, st.sampled_from([*ids, 22]), st.integers(0, 1)),
    )
    steps: list[Step] = [("start", 0, OLD)]
    fate = _FATE.filter(lambda step: step[0] != "hole")
    ask: Any = st.tuples(st.just("ask"), st.integers(0, 1))
    ledger: Any = st.sampled_from(
        [("read",), ("read",), ("away", "gone"), ("away", None), ("whole", AFTER_ALL), ("whole", None)]
    )
    for _ in range(draw(st.integers(1, 4))):
        steps += draw(
            st.lists(st.one_of(st.sampled_from(ids).map(event), said, said), min_size=2, max_size=8)
        )
        steps += draw(st.lists(st.one_of(_WORK, _WORK, ask, ask, ledger), min_size=2, max_size=12))
        steps += draw(st.lists(fate, min_size=1, max_size=2))
    return steps


@given(histories())
def test_every_history(steps: list[Step]) -> None:
    with TemporaryDirectory() as root:
        assert lived(Path(root), steps) == []


# --- one at a time -------------------------------------------------------------------------------

LETTER_LOST = [
    ("start", 0, OLD), event(1), event(4), *PREDICTED, ("progress",),
    label(19, 0), label(1, 0), label(4, 0), ("whole", AFTER_ALL), ("poll", 0, 100, ALL, True), ("ask", 0),
]  # fmt: skip
# then the letter's batch is lost with its worker, and that of the labels behind it arrives
AND_FOUND = [
    ("crash", 0, 0, [LOST, ARRIVED], OLD), ("whole", None), event(19), *PREDICTED,
    ("progress",),
]  # fmt: skip


def test_a_letter_arrives_before_what_is_behind_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a crash takes the letter, the label is found in the ledger by then, and dropped as seen: lost."""
    steps = [*LETTER_LOST, *AND_FOUND]
    assert lived(tmp_path / "with", steps) == []
    own = Asking.once

    async def hasty(self: Asking) -> bool:
        acknowledged = self._outbox.acknowledged

        async def at_once() -> None: ...

        self._outbox.acknowledged = at_once  # type: ignore[method-assign]
        try:
            return await own(self)
        finally:
            self._outbox.acknowledged = acknowledged  # type: ignore[method-assign]

    monkeypatch.setattr(Asking, "once", hasty)
    assert [f.partition(":")[0] for f in lived(tmp_path / "without", steps)] == ["lost"]


def test_a_label_waits_for_the_one_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the first one is dropped as seen when it is found at last."""
    steps = [
        ("start", 0, OLD), event(1), *PREDICTED, label(4, 0), label(1, 0),
        ("progress",), ("progress",), event(4), *PREDICTED, ("progress",),
    ]  # fmt: skip
    assert lived(tmp_path / "with", steps) == []
    monkeypatch.setattr(
        routing, "takewhile", lambda may, waiting: sorted(filter(may, waiting), key=lambda w: w.record.offset)
    )
    assert lived(tmp_path / "without", steps) != []


def test_events_go_on_while_the_ledger_is_away(tmp_path: Path) -> None:
    async def live(world: World) -> None:
        await world.run([("start", 0, OLD), ("away", "no route"), label(1, 0), label(2, 1), reversal(4, 0)])
        await world.run([step for i in range(9) for step in (event(i), ("progress",))])
        await world.run([("progress",)] * 4)
        process = world._alive[0]
        assert sum(map(len, world.predictions)) == 9
        assert ASKING.labels is not None and ASKING.reversals is not None
        assert process.worker.routes[ASKING.labels.topic].waiting == 2
        assert (
            process.worker.partitions.committable[TP(ASKING.labels.topic, 0)] == 0
        )  # no further than what was sent
        assert letters(world.broker) == Counter()
        await world.run([("away", None), ("read",), ("progress",), ("progress",)])
        assert [process.worker.routes[t].waiting for t in (ASKING.labels.topic, ASKING.reversals.topic)] == [
            0,
            0,
        ]
        assert process.worker.partitions.committable[TP(ASKING.labels.topic, 0)] == 1
        await world.rest([])
        assert findings(world.broker) == []

    with simulated(tmp_path, False, ASKING) as world:
        asyncio.run(live(world))


def test_a_label_that_says_all_is_not_asked_for(tmp_path: Path) -> None:
    async def live(world: World) -> None:
        whole = label(1, 0, AT=START + 1000, CUSTOMER=1, SHOP="b")
        await world.run(
            [("start", 0, OLD), ("away", "no route"), event(1), ("progress",), whole, ("progress",)]
        )
        assert world.ledger.asked == 0
        assert sum(len(world.broker.logs[TP(ENTITY.log, p)]) for p in range(PARTITIONS)) == 2
        await world.rest([])

    with simulated(tmp_path, False, ASKING) as world:
        asyncio.run(live(world))


def test_what_stands_before_labels_that_wait_goes(tmp_path: Path) -> None:
    """And is not asked for again."""

    async def live(world: World) -> None:
        steps = [
            event(1),
            event(4),
            *PREDICTED,
            label(1, 0),
            label(20, 0),
            label(4, 0),
        ]
        await world.run([("start", 0, OLD), *steps, ("progress",), ("progress",)])
        route = world._alive[0].worker.routes[ASKING.said[0].topic]
        assert isinstance(route, Asking)
        assert (route.routed, route.waiting, route.positions[0]) == (1, 2, 1)
        assert [w.known is not None for w in route._queues[0]] == [False, True]
        await world.run([("whole", AFTER_ALL), ("progress",), ("progress",)])
        assert (route.routed, route.waiting, route.unknown) == (2, 0, 1)
        await world.rest([])
        assert findings(world.broker) == []

    with simulated(tmp_path, False, ASKING) as world:
        asyncio.run(live(world))


def test_a_topic_of_which_too_many_wait_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "MOST_WAITING", 2)

    async def live(world: World) -> None:
        await world.run([("start", 0, OLD), label(1, 0), label(2, 1), ("progress",)])
        partitions: Partitions = world._alive[0].worker.partitions
        assert partitions.held_back == {ASKING.said[0].topic}
        await world.run([event(1), event(2), *PREDICTED, ("progress",)])
        assert partitions.held_back == frozenset()
        await world.rest([])

    with simulated(tmp_path, False, ASKING) as world:
        asyncio.run(live(world))


# --- the decoder ---------------------------------------------------------------------------------


def test_a_decoder_says_what_is_lacking() -> None:
    decoder = LabelDecoder(ASKING, ASKING.said[0])
    said = {"ID": 7, "RETURNED": 1, "KNOWN": 5}
    values = [
        json.dumps(said | more).encode()
        for more in (
            {}, {"AT": 99}, {"AT": 99, "SHOP": None}, {"AT": 99, "SHOP": "a"}, {"SHOP": "a"}, {"RETURNED": 3},
            {"AT": -5},
        )
    ]  # fmt: skip
    values.append(b"{")
    assert decoder.lacks(values) == [Lack(7, None), Lack(7, 99), None, None, Lack(7, None), None, None, None]
    _, kept, _ = decoder.decode(values)
    assert kept.tolist() == [0, 1, 2, 3, 4]
    known = Known(99, {"customer": "1", "shop": "a"})
    batch, kept, rejects = decoder.decode(values, [known, None, None, None, known, None, None, None])
    assert (batch.times.tolist(), batch.keys["shop"]) == ([99, 99, 99, 99], ["a", None, "a", "a"])
    assert (kept.tolist(), [r.index for r in rejects if r.reason == KEYS_UNKNOWN]) == ([0, 2, 3, 4], [1])
    assert {r.reason.code for r in rejects} == {"keys-unknown", "wrong-label", "wrong-time", "not-json"}


def test_an_event_is_picked_by_the_time_that_is_said_and_must_have_all_keys() -> None:
    decoder = LabelDecoder(ASKING, ASKING.said[0])
    events = [Known(3, {"customer": "1"}), Known(2, {"shop": "b"}), Known(1, {"shop": None})]
    assert decoder.pick(Lack(7, None), events) == events[1]
    assert decoder.pick(Lack(7, 1), events) == events[2]
    assert decoder.pick(Lack(7, 3), events) is None
    assert decoder.pick(Lack(7, None), []) is None


# --- the loop ------------------------------------------------------------------------------------


async def test_it_asks_again_with_growing_pauses_and_at_once_when_there_is_news(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(routing, "PAUSES_S", (0.001, 0.004))
    ledger: Any = type("Nobody", (), {"failing": None, "asked": 0})()

    async def find(ids: Sequence[int]) -> Any:
        ledger.asked += 1
        return None

    ledger.find = find
    nowhere: Any = None
    taken = routing.Said(ASKING, ASKING.said[0])
    counts = dict.fromkeys([taken._topic, *taken.logs], PARTITIONS)
    outbox = Outbox(nowhere, lambda: 0, lambda error: None)
    route = Asking(taken._topic, taken, outbox, lambda *_: None, counts, ledger, 0, lambda: 0, lambda: False)
    route.start_at({0: 0, 1: 0})
    task = asyncio.create_task(route.run())
    await settled()
    assert ledger.asked == 0
    record: Any = type("R", (), {"offset": 0, "timestamp": 0, "value": label(1, 0)[3]})
    route.handle([(0, [record])])
    async with asyncio.timeout(10):
        while ledger.asked < 4:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.001)
    monkeypatch.setattr(routing, "PAUSES_S", (1000.0, 1000.0))
    await asyncio.sleep(0.01)
    before = ledger.asked
    route.handle([(1, [record])])  # into an empty queue
    await settled()
    assert ledger.asked > before
    assert (route.waiting, route.positions) == (2, {0: 0, 1: 0})
    task.cancel()


async def test_nothing_is_given_up_for_the_time_in_which_events_wait_for_a_model() -> None:
    """The ledger is whole all the while, for nothing is predicted."""
    now, idle, given_up = 0, True, list[Any]()
    ledger: Any = type("Whole", (), {"failing": None})()

    async def find(ids: Sequence[int]) -> Found:
        return Found({}, now)

    async def room() -> None: ...

    ledger.find = find
    taken = routing.Said(ASKING, ASKING.said[0])
    counts = dict.fromkeys([taken._topic, *taken.logs], PARTITIONS)
    outbox: Any = type("Outbox", (), {"room": staticmethod(room), "acknowledged": staticmethod(room)})
    route = Asking(
        taken._topic, taken, outbox, lambda *what: given_up.append(what), counts, ledger, 300, lambda: now,
        lambda: idle,
    )  # fmt: skip
    route.start_at({0: 0, 1: 0})
    record: Any = type("R", (), {"offset": 0, "timestamp": 0, "value": label(1, 0)[3]})
    route.handle([(0, [record])])
    now = 1000
    assert not await route.once()
    idle, now = False, 1299  # there is a model
    assert not await route.once()
    now = 1300
    assert await route.once()
    assert len(given_up) == 1
