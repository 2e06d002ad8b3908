"""Exact through every crash: whole workers, from the logs to the predictions, with all that befalls them as input.

Each test is a history in a simulated world (tests.fixtures.simulation). At its end everything is delivered, and
what is out must be what the logs say (tests.fixtures.exactness): each prediction once, of the same bits, and
the same bytes in every profile as a worker has that never stopped, and one that began with nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.events import key_bytes
from models.partitions import partition_of
from tests.fixtures import bugs
from tests.fixtures.bugs import Without
from tests.fixtures.exactness import DAY, HOUR, compared, findings, truth_of
from tests.fixtures.logs import order
from tests.fixtures.simulation import (
    ARRIVED,
    LABELS,
    LATE,
    LOST,
    PARTITIONS,
    SLOTS,
    STREAM,
    Died,
    World,
    simulated,
)

START = 1_599_000_000_000
Step = tuple[Any, ...]


def home(key: int | str) -> int:
    return partition_of(key_bytes(key), PARTITIONS)


# Of each partition two, and one more of each that only the last events are of.
CUSTOMERS = [[c for c in range(100) if home(c) == p] for p in range(PARTITIONS)]
SHOPS = [[s for s in (f"s{i}" for i in range(100)) if home(s) == p] for p in range(PARTITIONS)]
KEYS = [
    [key_bytes(c) for those in CUSTOMERS for c in those[:3]],
    [key_bytes(s) for those in SHOPS for s in those[:3]],
]
OLD, NEW = 0, 1  # machines
ELSEWHERE = 9
ALL = -1  # of the bits that say which


def event(id: int, customer: int, shop_name: str | None, hours: int, more: int = 0) -> Step:
    """An order is published. It has some items and an amount of its own."""
    value = order(
        id, CUSTOMER=customer, SHOP=shop_name, AT=START + hours * HOUR, ITEMS=more or None, AMOUNT=id / 4
    )
    return "publish", STREAM, home(customer), value


def label(id: int, shop_name: str | None, hours: int, state: str, partition: int) -> Step:
    name = "null" if shop_name is None else f'"{shop_name}"'
    at = START + hours * HOUR
    text = f'{{"ID": {id}, "AT": {at}, "SHOP": {name}, "RETURNED": {state}, "KNOWN": {at + DAY}}}'
    return "publish", LABELS, partition, text.encode()


def closing() -> list[tuple[str, int, bytes]]:
    """From each partition to each, an event."""
    return [
        event(1000 + p * PARTITIONS + t, CUSTOMERS[p][2], SHOPS[t][2], 300)[1:]
        for p in range(PARTITIONS)
        for t in range(PARTITIONS)
    ]


async def outcome(world: World, steps: Sequence[Step]) -> list[str]:
    """What is wrong at the end of a history."""
    await world.run(steps)
    await world.rest(closing())
    expected = truth_of(world.broker).profiles
    found = findings(world.broker)
    found += compared("in the last owner's store", world.stored(KEYS), expected)
    found += compared("of a worker that never stopped", world.unstopped(), expected)
    out = [len(log) for log in world.predictions]
    await world.again_from_nothing(ELSEWHERE)
    if [len(log) for log in world.predictions] != out:
        found.append("doubled: what was predicted is predicted again from nothing")
    found += compared("of a worker that began with nothing", world.stored(KEYS), expected)
    return found


def lived(root: Path, steps: Sequence[Step], rocksdb: bool = False) -> list[str]:
    """The same in a world of its own. A worker that ends by itself is a finding, too."""
    with simulated(root, rocksdb) as world:
        return end_of(world, steps)


def end_of(world: World, steps: Sequence[Step]) -> list[str]:
    try:
        return asyncio.run(outcome(world, steps))
    except Died as died:
        return [f"died: {died.__cause__ or died}"]


def lived_without(root: Path, safeguard: Without, steps: Sequence[Step]) -> list[str]:
    """Likewise with a safeguard of tests.fixtures.bugs taken away."""
    with simulated(root, rocksdb=False) as world, pytest.MonkeyPatch.context() as patch:
        safeguard(patch)
        return end_of(world, steps)


# --- any history -------------------------------------------------------------------------------

_EVENTS = st.tuples(
    st.integers(0, PARTITIONS - 1),
    st.integers(0, 1),
    st.sampled_from([*(s for those in SHOPS for s in those[:2]), None]),
    st.integers(0, 60).map(lambda h: h * 4),
    st.integers(0, 5),
)
_SLOT = st.integers(0, SLOTS - 1)
_WHICH = st.sampled_from([ALL, ALL, ALL]) | st.integers(0, 2 ** (3 * PARTITIONS) - 1)
_MACHINE = st.sampled_from([OLD, OLD, NEW])
_FATES = st.lists(st.sampled_from([LOST, ARRIVED, LATE]), min_size=1, max_size=4)
_BAD = [b"", b"junk", order(1, AMOUNT=0.001), order(2, CUSTOMER=CUSTOMERS[0][0])]


def _step(name: str, *how: st.SearchStrategy[Any]) -> st.SearchStrategy[Step]:
    return st.tuples(st.just(name), *how)


# What a worker does in the course of things, and what befalls it.
_POLL = _step(
    "poll", _SLOT, st.sampled_from([100, 100, 1, 3]), _WHICH, st.sampled_from([True, True, True, False])
)
_WORK = st.one_of(
    _POLL, _POLL, _POLL, _step("arrive", _SLOT, _WHICH), _step("arrive", _SLOT, _WHICH),
    _step("acknowledge", _SLOT), _step("acknowledge", _SLOT), _step("flush", _SLOT), _step("progress"),
    _step("handle", _SLOT), _step("commit", _SLOT),
    st.one_of(_step("durable", _SLOT), _step("evict", _SLOT), _step("late", st.integers(0, 3)), _step("control")),
)  # fmt: skip
_FATE = st.one_of(
    _step("crash", _SLOT, st.integers(0, 3), _FATES, st.none() | _MACHINE),
    _step("crash", _SLOT, st.integers(0, 3), _FATES, st.none() | _MACHINE),
    _step("zombie", _SLOT, st.none() | _MACHINE), _step("zombie", _SLOT, st.none() | _MACHINE),
    _step("start", _SLOT, _MACHINE), _step("stop", _SLOT), _step("move"),
    _step("ambush"), _step("hole", st.integers(0, PARTITIONS - 1)),
)  # fmt: skip


@st.composite
def histories(draw: st.DrawFn) -> list[Step]:
    """Events come in order, late, twice; labels flip and come early; workers do all that they may, and die."""
    specs = draw(st.lists(_EVENTS, min_size=6, max_size=16))
    events = [
        event(id, CUSTOMERS[p][c], name, hours, items) for id, (p, c, name, hours, items) in enumerate(specs)
    ]
    labels = [
        label(id, name, hours, state, id % PARTITIONS)
        for id, (_, _, name, hours, _) in enumerate(specs)
        for state in ("1", "0", "null")
    ]
    bad = st.tuples(st.just("publish"), st.sampled_from([STREAM, LABELS]), st.just(1), st.sampled_from(_BAD))
    some = st.sampled_from(events)
    publish = st.lists(st.one_of(some, some, some, st.sampled_from(labels), bad), min_size=1, max_size=8)
    steps: list[Step] = [("start", 0, OLD)]
    for _ in range(draw(st.integers(1, 4))):
        steps += [
            *draw(publish),
            *draw(st.lists(_WORK, min_size=1, max_size=10)),
            *draw(st.lists(_FATE, min_size=1, max_size=2)),
        ]
    return steps


@given(histories())
def test_every_history_in_memory(steps: list[Step]) -> None:
    with TemporaryDirectory() as root:
        assert lived(Path(root), steps) == []


@settings(max_examples=max(settings().max_examples // 4, 20))
@given(histories())
def test_every_history_on_disk(steps: list[Step]) -> None:
    with TemporaryDirectory() as root:
        assert lived(Path(root), steps, rocksdb=True) == []


# --- what each safeguard is for: without it, this is found --------------------------------------

# Eight orders of both customers' partitions to both shops', one of no shop, and one much too late.
ORDERS = [
    *(event(i, CUSTOMERS[i % 2][0], SHOPS[i // 2 % 2][0], i, i % 4) for i in range(8)),
    event(8, CUSTOMERS[0][1], None, 9),
    event(9, CUSTOMERS[1][1], SHOPS[0][1], 200, 2),
    event(10, CUSTOMERS[1][0], SHOPS[0][1], 8, 2),
]
MORE = [event(20 + i, CUSTOMERS[i % 2][0], SHOPS[i // 2 % 2][1], 10 + i, 1) for i in range(8)]


def arrived(slot: int) -> list[Step]:
    """All that a worker has in flight has arrived and is acknowledged, several batches to a partition."""
    return [("arrive", slot, ALL), ("acknowledge", slot)] * 6


def folded(slot: int) -> list[Step]:
    """It has folded all that is in its logs; predictions of it are in flight."""
    return [("poll", slot, 100, ALL, True), *arrived(slot), ("poll", slot, 100, ALL, True)]


def fails_without(safeguard: Without, root: Path, steps: Sequence[Step], found: str) -> None:
    """With it nothing is found, in memory and on disk; without it this."""
    assert lived(root / "memory", steps) == []
    assert lived(root / "disk", steps, rocksdb=True) == []
    without = lived_without(root / "without", safeguard, steps)
    assert any(finding.startswith(found) for finding in without), without


def test_without_one_write_for_profiles_and_position_folded_events_are_lost(tmp_path: Path) -> None:
    steps = [("start", 0, OLD), *ORDERS, ("progress",), ("crash", 0, 0, [LOST], OLD)]
    fails_without(bugs.one_write_for_profiles_and_position, tmp_path, steps, "differing: profile")


def test_without_seen_what_is_sent_again_is_predicted_again(tmp_path: Path) -> None:
    steps = [("start", 0, OLD), *ORDERS, *folded(0), ("crash", 0, 0, [ARRIVED], OLD)]
    fails_without(bugs.seen, tmp_path, steps, "predicted for nothing")


def test_without_seen_stored_with_the_position_a_restart_forgets_it(tmp_path: Path) -> None:
    """One worker crashes and sends again what the other has folded, stored, and opened again."""
    steps = [
        ("start", 0, OLD), ("start", 1, NEW), *ORDERS,
        *folded(0), *folded(1), *folded(0), ("crash", 0, 0, [ARRIVED], OLD),
    ]  # fmt: skip
    fails_without(bugs.seen_with_the_position, tmp_path, steps, "predicted for nothing")


def test_without_previous_a_hole_passes_in_silence(tmp_path: Path) -> None:
    steps = [("start", 0, OLD), ("hole", 0), *ORDERS, ("progress",)]
    fails_without(bugs.previous, tmp_path, steps, "lost on the way: event")


def test_without_acknowledgement_before_the_flush_what_was_in_flight_is_lost(tmp_path: Path) -> None:
    steps = [
        ("start", 0, OLD), *ORDERS, *folded(0), ("flush", 0), ("crash", 0, 9, [LOST], OLD)
    ]  # fmt: skip
    fails_without(bugs.acknowledgement_before_the_flush, tmp_path, steps, "lost: the prediction")


def test_without_acknowledgement_before_the_routers_position_a_label_is_lost(tmp_path: Path) -> None:
    steps = [
        ("start", 0, OLD), *ORDERS, ("progress",), label(0, SHOPS[0][0], 0, "1", 0),
        ("poll", 0, 100, ALL, True), ("commit", 0), ("crash", 0, 9, [LOST], OLD),
    ]  # fmt: skip
    fails_without(bugs.acknowledgement_before_the_routers_position, tmp_path, steps, "lost on the way: label")


def test_without_the_tail_what_is_out_is_predicted_again(tmp_path: Path) -> None:
    steps = [("start", 0, OLD), *ORDERS, *[("progress",)] * 2, ("crash", 0, 0, [LOST], OLD)]
    fails_without(bugs.the_tail, tmp_path, steps, "doubled: 2 predictions")


def test_without_the_fence_a_zombie_predicts_what_its_successor_did(tmp_path: Path) -> None:
    steps = [("start", 0, OLD), *ORDERS, *folded(0), ("zombie", 0, OLD), ("progress",)]
    fails_without(bugs.the_fence, tmp_path, steps, "doubled: 2 predictions")


def test_without_the_fence_before_the_tail_a_zombie_comes_between(tmp_path: Path) -> None:
    steps = [("start", 0, OLD), *ORDERS, *folded(0), ("ambush",), ("zombie", 0, OLD), ("progress",)]
    fails_without(bugs.the_fence_before_the_tail, tmp_path, steps, "doubled: 2 predictions")


def test_without_the_epoch_of_polls_a_position_leaps(tmp_path: Path) -> None:
    """The partition is opened again from further back, while something is polled from where it was."""
    steps = [
        ("start", 0, OLD), ("hole", 0), *ORDERS, *[("progress",)] * 2, *MORE, ("poll", 0, 100, ALL, False),
        ("control",), ("handle", 0),
    ]  # fmt: skip
    fails_without(bugs.the_epoch_of_polls, tmp_path, steps, "differing: profile")
