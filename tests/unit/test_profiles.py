"""The memory of a stage: what its log says, however it is polled, stored, stopped, lost or sent again."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models import oracle
from models.aggregates import Aggregate
from models.events import EventDecoder, LabelDecoder, key_bytes
from models.partitions import partition_of
from models.records import RecordCodec
from models.windows import COUNT, DUPLICATE, LABEL, MEAN, NULL, OUTCOMES, REVERSED, SHARE, SUM
from tables.profiles import Applied, Profiles, Touched
from tables.store import Progress, Snapshot, Store
from tests.fixtures.histories import bits, packed_of
from tests.fixtures.logs import Fetched, Mortal, log, order
from tests.fixtures.pipelines import shop

SHOP = shop()
NUMERIC = [f.name for f in SHOP.columns]
PARTITIONS = 3
# Of records between stages: no predecessor, and nothing cut.
NONE_BEFORE, SOUND = np.array([-1]), np.array([False])
HOUR, DAY = 3_600_000, 86_400_000
START = 1_599_000_000_000

Open = Callable[[Path, str], Any]
Results = dict[tuple[int, int], tuple[int, list[int]]]  # by (partition, offset): outcome, feature bits


def customers(root: Path, open_store: Open = Store, pipeline: Any = SHOP) -> Profiles:
    """The first stage: folds events, and checks where they stand."""
    decoder = EventDecoder(pipeline, pipeline.stream)
    return Profiles(
        pipeline.entities[0],
        lambda values, keys, sent: decoder.decode(values, sent),
        lambda p, at_most: open_store(root / f"customer-{p}", pipeline.definition),
        PARTITIONS,
        SHOP.columns,
        partial(partition_of, count=PARTITIONS),
    )


def shops(root: Path, open_store: Open = Store) -> Profiles:
    """The second stage: folds records of the first one, and labels."""
    codec = RecordCodec(SHOP, 1)
    return Profiles(
        SHOP.entities[1],
        lambda values, keys, sent: codec.decode(values, keys),
        lambda p, at_most: open_store(root / f"shop-{p}", SHOP.definition),
        PARTITIONS,
        SHOP.columns,
        writers=2,
    )


def opened(profiles: Profiles) -> Profiles:
    for partition in range(PARTITIONS):
        profiles.start_at(partition, profiles.open(partition) or 0)
    return profiles


def home(customer: int) -> int:
    return partition_of(key_bytes(customer), PARTITIONS)


# Each example opens some twenty stores.
FEWER = settings(max_examples=max(settings().max_examples // 5, 20))


# Customers by the partition in which they belong.
AT_HOME: dict[int, list[int]] = {p: [c for c in range(100) if home(c) == p][:2] for p in range(PARTITIONS)}


def results(applied: Iterable[Applied]) -> Results:
    """What was folded, by where it stood."""
    return {
        (int(p), int(o)): (int(outcome), bits(features))
        for a in applied
        for p, o, outcome, features in zip(a.logs, a.offsets, a.outcomes, a.features, strict=True)
    }


# --- histories: what becomes of the process between polls --------------------------------------

POLL, WRITE, FLUSH, EVICT, STOP, CRASH = "poll", "write", "flush", "evict", "stop", "crash"
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just(POLL), st.tuples(*[st.integers(0, 5)] * PARTITIONS)),
        st.tuples(st.just(POLL), st.tuples(*[st.integers(0, 5)] * PARTITIONS)),
        st.tuples(st.sampled_from([WRITE, FLUSH, STOP]), st.none()),
        st.tuples(st.just(EVICT), st.integers(1, 3)),
        st.tuples(st.just(CRASH), st.integers(0, 3)),
    ),
    max_size=14,
)
TO_THE_END = (POLL, (10**6,) * PARTITIONS)


class Life:
    """A worker's stage that lives, dies and comes back, and is asked each time whether it says the same."""

    def __init__(self, make: Callable[[Open], Profiles], logs: list[list[Fetched]]) -> None:
        self._make = make
        self._logs = logs
        self._stores: dict[Path, Mortal] = {}
        self.results: Results = {}
        self.begin()

    def begin(self) -> None:
        self.profiles = opened(self._make(self._open))
        self._next = [self.profiles._positions[p] for p in range(PARTITIONS)]

    def _open(self, path: Path, definition: str) -> Mortal:
        if path not in self._stores:
            self._stores[path] = Mortal(Store(path, definition))
        return self._stores[path]

    def run(self, steps: Sequence[tuple[str, Any]]) -> Results:
        for what, how in steps:
            getattr(self, what)(how)
        return self.results

    def poll(self, lengths: Sequence[int]) -> None:
        polled = []
        for p, n in enumerate(lengths):
            polled.append((p, self._logs[p][self._next[p] : self._next[p] + n]))
            self._next[p] += len(polled[-1][1])
        again = results([self.profiles.apply(polled)])
        for at, found in again.items():
            assert self.results.setdefault(at, found) == found, f"{at} differs from what was said before"

    def write(self, _: None = None) -> None:
        for snapshot in self.profiles.snapshots():
            self.profiles.write(snapshot)

    def flush(self, _: None = None) -> None:
        self.profiles.flush()

    def evict(self, steps: int) -> None:
        self.write()
        size = self.profiles.size
        gone = sum(islice(chain(self.profiles.sweep(False), self.profiles.sweep(True)), steps))
        assert self.profiles.size == size - gone

    def stop(self, _: None = None) -> None:
        self.end()
        self.begin()

    def end(self) -> None:
        self.write()
        for partition in self.profiles.partitions:
            self.profiles.close(partition)
        assert (self.profiles.size, self.profiles.partitions) == (0, [])
        self._stores.clear()

    def crash(self, kept: int) -> None:
        for store in self._stores.values():
            store.crash(kept)
        self.begin()


# --- the first stage ---------------------------------------------------------------------------


@st.composite
def event_logs(draw: st.DrawFn) -> list[list[Fetched]]:
    """Per partition: orders that tie, come late, come too late and come twice, and some bad input."""
    logs = []
    for partition in range(PARTITIONS):
        n = draw(st.integers(0, 15))
        bad = st.sampled_from(
            [
                b"",
                b"junk",
                order(1, AMOUNT=0.001),
                order(2, CUSTOMER=AT_HOME[(partition + 1) % PARTITIONS][0]),
            ]
        )
        good = st.builds(
            lambda customer, id, at, amount: order(id, CUSTOMER=customer, AT=START + at, AMOUNT=amount / 100),
            st.sampled_from(AT_HOME[partition]),
            st.integers(0, 12),
            st.integers(0, 40).map(lambda h: h * 6 * HOUR),
            st.integers(-500, 10_000),
        )
        one = st.integers(0, 9).flatmap(lambda k, bad=bad, good=good: bad if k == 9 else good)
        logs.append(log(draw(st.lists(one, min_size=n, max_size=n))))
    return logs


def customers_of_the_oracle(logs: list[list[Fetched]]) -> tuple[Results, dict[int, oracle.Profile]]:
    """What the logs say, record by record, and in the end."""
    decoder = EventDecoder(SHOP, SHOP.stream)
    aggregates = [Aggregate(COUNT, DAY), Aggregate(SUM, 7 * DAY, divisor=100)]
    profiles: dict[int, oracle.Profile] = defaultdict(lambda: oracle.Profile(aggregates, 7 * DAY + HOUR))
    found: Results = {}
    for partition, records in enumerate(logs):
        for record in records:
            batch, _, _ = decoder.decode([record.value or b""], np.array([record.timestamp]))
            if len(batch) and home(batch.keys[0]) == partition:
                time, id, amount = batch.times[0], batch.ids[0], batch.fields[0, NUMERIC.index("AMOUNT")]
                outcome, features = profiles[batch.keys[0]].event(int(time), int(id), [int(amount)])
                found[partition, record.offset] = outcome, bits(features)
    return found, profiles


@FEWER
@given(event_logs(), STEPS)
def test_a_stage_says_what_its_log_says_whatever_becomes_of_it(
    logs: list[list[Fetched]], steps: list[tuple[str, Any]]
) -> None:
    """Crashes are inputs: each record's features are the oracle's, the first time and every time."""
    expected, profiles = customers_of_the_oracle(logs)
    with TemporaryDirectory() as root:
        life = Life(lambda opener: customers(Path(root), opener), logs)
        assert life.run([*steps, TO_THE_END]) == expected
        life.end()
        # and what it leaves behind is what the log says, too
        for partition in range(PARTITIONS):
            store = Store(Path(root) / f"customer-{partition}", SHOP.definition)
            assert (store.progress or Progress(0)).position == len(logs[partition])
            held = {c: packed for c in range(100) if (packed := store.get(key_bytes(c))) is not None}
            assert held == {
                c: packed_of(p, SHOP.entities[0].plan) for c, p in profiles.items() if home(c) == partition
            }
            store.close()


# --- the second stage --------------------------------------------------------------------------


@st.composite
def record_logs(draw: st.DrawFn) -> tuple[list[list[Fetched]], list[list[Fetched]]]:
    """What two upstream partitions and the router wrote, with and without what they sent again after crashes.

    A writer that crashed begins again at or before the last record that it had sent to each partition.
    """
    codec = RecordCodec(SHOP, 1)
    decoder, labels = EventDecoder(SHOP, SHOP.stream), LabelDecoder(SHOP, SHOP.said[0])
    names = [f"s{i}" for i in range(5)]
    writers: list[list[tuple[int, bytes, bytes]]] = []  # of each: (target, key, value) in its order
    for upstream in range(3):
        n = draw(st.integers(0, 12))
        times = draw(st.lists(st.integers(0, 60), min_size=n, max_size=n))
        own: list[tuple[int, bytes, bytes]] = []
        sent = np.full(PARTITIONS, -1)
        for offset, hours in enumerate(times):
            id, name = draw(st.integers(0, 10)), draw(st.sampled_from(names))
            at, target = START + hours * HOUR, partition_of(name.encode(), PARTITIONS)
            before = np.array([sent[target]])
            sent[target] = offset
            if upstream < 2:
                raw = [order(id, SHOP=name, AT=at, ITEMS=draw(st.none() | st.integers(0, 9)))]
                events, _, _ = decoder.decode(raw, np.array([at]))
                features = np.array([[float(offset), hours / 7]])
                (value,) = codec.encode(
                    events, features, np.array([upstream]), np.array([offset]), before, SOUND
                )
            else:
                state = draw(st.sampled_from([b"0", b"1", b"1", b"null"]))
                raw = [b'{"ID": %d, "AT": %d, "SHOP": "%s", "RETURNED": %s, "KNOWN": %d}'
                       % (id, at, name.encode(), state, at + DAY)]  # fmt: skip
                found, _, _ = labels.decode(raw)
                if draw(st.integers(0, 3)) == 0:
                    found = replace(found, states=np.full(1, REVERSED, np.int8))
                (value,) = codec.encode_labels(found, np.array([0]), np.array([offset]), before, 1)
            key = name.encode()
            own.append((target, key, value))
        writers.append(own)
    # the order of arrival: the writers' records interleaved, each at times beginning anew
    clean: list[list[Fetched]] = [[] for _ in range(PARTITIONS)]
    resent: list[list[Fetched]] = [[] for _ in range(PARTITIONS)]
    done, reached = [0] * 3, [0] * 3
    while any(d < len(w) for d, w in zip(done, writers, strict=True)):
        w = draw(st.sampled_from([w for w in range(3) if done[w] < len(writers[w])]))
        target, key, value = writers[w][done[w]]
        if done[w] == reached[w]:
            clean[target].append(Fetched(len(clean[target]), value, key))
            reached[w] += 1
        resent[target].append(Fetched(len(resent[target]), value, key))
        done[w] += 1
        if draw(st.integers(0, 5)) == 0:
            done[w] = draw(st.integers(0, done[w] - 1))
            if reached[w] < len(writers[w]) or draw(st.booleans()):
                continue
            done[w] = reached[w]
    return clean, resent


def shops_of_the_oracle(logs: list[list[Fetched]]) -> dict[tuple[int, bytes], tuple[int, list[int]]]:
    """What the logs say, by the record itself, for each is in them once."""
    codec = RecordCodec(SHOP, 1)
    aggregates = [Aggregate(MEAN, HOUR), Aggregate(SHARE, 2 * DAY, delay=DAY)]
    profiles: dict[bytes | None, oracle.Profile] = defaultdict(
        lambda: oracle.Profile(aggregates, 3 * DAY + HOUR)
    )
    found = {}
    for partition, records in enumerate(logs):
        for record in records:
            assert record.value is not None
            batch, _, _ = codec.decode([record.value], [record.key])
            time, id, items = (
                int(batch.times[0]),
                int(batch.ids[0]),
                int(batch.fields[0, NUMERIC.index("ITEMS")]),
            )
            profile, features = profiles[record.key], [math.nan, math.nan]
            if batch.kinds[0] == LABEL:
                outcome = profile.label(time, id, int(batch.labels[0]))
            else:
                outcome, features = profile.event(time, id, [None if items == NULL else items])
            found[partition, record.value] = outcome, bits(features)
    return found


@FEWER
@given(record_logs(), STEPS)
def test_what_is_sent_again_is_folded_once(
    logs: tuple[list[list[Fetched]], list[list[Fetched]]], steps: list[tuple[str, Any]]
) -> None:
    """Upstream crashes and own crashes: each record is folded once, to what the clean log says."""
    clean, resent = logs
    with TemporaryDirectory() as root:
        life = Life(lambda opener: shops(Path(root), opener), resent)
        said = life.run([*steps, TO_THE_END])
        assert len(said) == sum(map(len, clean))
        assert {(p, resent[p][o].value): found for (p, o), found in said.items()} == shops_of_the_oracle(
            clean
        )
        if not any(what in (CRASH, STOP) for what, _ in steps):
            assert life.profiles.counts["seen"] == sum(map(len, resent)) - sum(map(len, clean))
        life.end()


def test_what_was_seen_is_dropped_and_counted_even_after_a_restart(tmp_path: Path) -> None:
    codec, decoder = RecordCodec(SHOP, 1), EventDecoder(SHOP, SHOP.stream)
    events, _, _ = decoder.decode([order(i, SHOP="north") for i in range(3)], np.full(3, START * 2))
    values = codec.encode(
        events, np.zeros((3, 2)), np.array([2, 2, 1]), np.array([10, 11, 0]), NONE_BEFORE, SOUND
    )
    p = partition_of(b"north", PARTITIONS)
    records = log([values[0], values[1], values[0], values[1], values[2]], [b"north"] * 5)
    profiles = opened(shops(tmp_path))
    assert profiles.apply([(p, records[:4])]).offsets.tolist() == [0, 1]
    assert profiles.counts["seen"] == 2
    (snapshot,) = profiles.snapshots()
    assert (snapshot.progress.position, snapshot.progress.seen) == (
        4,
        {4: 11},
    )  # source 4: partition 2 of the stage before
    profiles.write(snapshot)
    profiles.close(p)
    profiles.start_at(p, profiles.open(p) or 0)
    again = [Fetched(4 + i, r.value, r.key) for i, r in enumerate(records)]
    assert profiles.apply([(p, again)]).offsets.tolist() == [8]
    assert profiles.counts["seen"] == 6


def test_what_the_mirror_reads_from_the_store_takes_no_slot_of_others(tmp_path: Path) -> None:
    """Evicted ones are read into slots beyond those that were ever in use."""
    profiles = customers(tmp_path)
    mine = [c for c in range(1000) if home(c) == 0][:300]
    profiles.open(0)
    profiles.start_at(0, 0)
    profiles.apply(
        [(0, log([order(i, CUSTOMER=c) for i, c in enumerate(mine)], [key_bytes(c) for c in mine]))]
    )
    for snapshot in profiles.snapshots():
        profiles.write(snapshot)
    profiles.close(0)
    profiles = customers(tmp_path)  # a new owner, with room for few
    profiles.start_at(0, profiles.open(0) or 0)
    assert profiles.owe(0, b"", 300) is not None
    assert len(touched(profiles, 300).keys) == 300
    (more,) = log([order(999, CUSTOMER=mine[7])], [key_bytes(mine[7])])
    applied = profiles.apply([(0, [Fetched(300, more.value, more.key)])])
    assert applied.features[0, 0] == 2


def test_a_missing_record_is_noticed_held_up_and_mended(tmp_path: Path) -> None:
    """Its successors are left out, also after a restart, and come again behind it."""
    codec, decoder = RecordCodec(SHOP, 1), EventDecoder(SHOP, SHOP.stream)
    events, _, _ = decoder.decode([order(i, SHOP="north") for i in range(4)], np.full(4, START * 2))
    values = codec.encode(
        events, np.zeros((4, 2)), np.full(4, 2), np.arange(4), np.array([-1, 0, 1, 2]), np.zeros(4, np.bool_)
    )
    p = partition_of(b"north", PARTITIONS)
    broken = log([values[0], values[2], values[3]], [b"north"] * 3)
    profiles = opened(shops(tmp_path))
    assert profiles.apply([(p, broken)]).offsets.tolist() == [0]
    assert (profiles.gaps, profiles.counts["gap"]) == ({(p, 4): 0}, 2)
    for snapshot in profiles.snapshots():
        profiles.write(snapshot)
    profiles.close(p)
    profiles.start_at(p, profiles.open(p) or 0)
    again = [Fetched(3 + i, v, b"north") for i, v in enumerate(values)]
    assert profiles.apply([(p, again)]).offsets.tolist() == [4, 5, 6]
    assert (profiles.gaps, profiles.counts["seen"]) == ({}, 1)


def test_what_a_cut_log_lacks_marks_values_until_the_longest_window_has_passed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    profiles = customers(tmp_path)
    reach = int(SHOP.entities[0].plan.bounds.max())
    customer = AT_HOME[0][0]
    assert profiles.open(0) is None
    profiles.start_at(0, 100, cut=True)
    times = [START, START + reach - 1, START + reach, START + reach - 2]
    records = [
        Fetched(100 + i, order(i, AT=at, CUSTOMER=customer), key_bytes(customer), 2 * START)
        for i, at in enumerate(times)
    ]
    marks = profiles.apply([(0, records[:1])]).degraded.tolist()
    assert "customer.log partition 0 has lost what happened before 2020-09-01" in caplog.text.replace(
        SHOP.entities[0].log, "customer.log"
    )
    assert touched(profiles, 9).degraded.tolist() == [True]
    for snapshot in profiles.snapshots():
        profiles.write(snapshot)
    profiles.close(0)
    profiles.start_at(0, profiles.open(0) or 0)
    marks += profiles.apply([(0, records[1:])]).degraded.tolist()
    assert marks == [True, True, False, True]
    assert touched(profiles, 9).degraded.tolist() == [False]


def test_a_second_loss_ends_no_mark_of_the_first(tmp_path: Path) -> None:
    """The first event behind it may be late: what was lost before is missing for as long as it was."""
    codec, decoder = RecordCodec(SHOP, 1), EventDecoder(SHOP, SHOP.stream)
    reach = int(SHOP.entities[1].plan.bounds.max())
    times = [START, START - HOUR, START + reach - 1, START + reach]
    events, _, _ = decoder.decode(
        [order(i, AT=at, SHOP="north") for i, at in enumerate(times)], np.full(4, START * 2)
    )
    records = codec.encode(
        events, np.zeros((4, 2)), np.ones(4), np.arange(4), np.arange(-1, 3), np.zeros(4, np.bool_)
    )
    p = partition_of(b"north", PARTITIONS)
    values = [codec.encode_lost(1, 0, 5), records[0], codec.encode_lost(1, 1, 5), *records[1:]]
    profiles = opened(shops(tmp_path))
    keys = [None, b"north", None, b"north", b"north", b"north"]
    applied = [profiles.apply([(p, [record])]) for record in log(values, keys)]
    assert [a.degraded.tolist() for a, key in zip(applied, keys, strict=True) if key] == [
        [True], [True], [True], [False]
    ]  # fmt: skip


def test_values_of_a_degraded_stage_before_are_degraded(tmp_path: Path) -> None:
    codec, decoder = RecordCodec(SHOP, 1), EventDecoder(SHOP, SHOP.stream)
    events, _, _ = decoder.decode([order(i, SHOP="north") for i in range(2)], np.full(2, START * 2))
    marks, zeros = np.array([True, False]), np.zeros(2, np.int64)
    values = codec.encode(events, np.zeros((2, 2)), zeros, np.arange(2), np.arange(-1, 1), marks)
    p = partition_of(b"north", PARTITIONS)
    applied = opened(shops(tmp_path)).apply([(p, log(values, [b"north"] * 2))])
    assert applied.degraded.tolist() == [True, False]


def test_what_was_seen_but_not_written_is_folded_again(tmp_path: Path) -> None:
    """Let go without a flush, and taken again by the same process."""
    codec, decoder = RecordCodec(SHOP, 1), EventDecoder(SHOP, SHOP.stream)
    events, _, _ = decoder.decode([order(1, SHOP="north")], np.array([START * 2]))
    (value,) = codec.encode(events, np.zeros((1, 2)), np.array([2]), np.array([10]), NONE_BEFORE, SOUND)
    p, profiles = partition_of(b"north", PARTITIONS), opened(shops(tmp_path))
    for _ in range(2):
        assert profiles.apply([(p, [Fetched(0, value, b"north")])]).offsets.tolist() == [0]
        profiles.close(p)
        profiles.start_at(p, profiles.open(p) or 0)


# --- what is accepted --------------------------------------------------------------------------


def orders(customer: int, *ids: int, first: int = 0) -> list[Fetched]:
    return [Fetched(first + i, order(id, CUSTOMER=customer)) for i, id in enumerate(ids)]


def test_records_before_the_position_are_dropped(tmp_path: Path) -> None:
    customer, profiles = AT_HOME[1][0], opened(customers(tmp_path))
    profiles.start_at(1, 2)
    assert profiles.apply([(1, orders(customer, 1, 2))]).offsets.tolist() == []
    assert list(profiles.snapshots()) == []  # not even a position has moved
    assert profiles.apply([(1, orders(customer, 1, 2, 3, 4))]).offsets.tolist() == [2, 3]
    assert profiles.apply([(1, orders(customer, 1, 2, 3, 4, 5))]).offsets.tolist() == [4]
    assert profiles.apply([(1, [])]).offsets.tolist() == []
    assert profiles.counts["folded"] == 3
    assert [s.progress.position for s in profiles.snapshots()] == [5]


def test_records_of_a_partition_that_is_not_ours_are_dropped(tmp_path: Path) -> None:
    profiles = customers(tmp_path)
    applied = profiles.apply([(1, orders(AT_HOME[1][0], 1, 2))])
    assert (len(applied.batch), applied.rejects, profiles.size) == (0, [], 0)
    opened(profiles)
    profiles.close(1)
    assert len(profiles.apply([(1, orders(AT_HOME[1][0], 1, 2)), (0, orders(AT_HOME[0][0], 1))]).batch) == 1


def test_bad_input_is_handed_on_with_its_place(tmp_path: Path) -> None:
    profiles = opened(customers(tmp_path))
    polled = [
        (2, [Fetched(0, b"junk"), *orders(AT_HOME[2][0], 1, first=1)]),
        (
            0,
            [
                *orders(AT_HOME[0][0], 1),
                Fetched(1, None),
                *orders(AT_HOME[0][0], 2, first=2),
                Fetched(3, b"{}"),
            ],
        ),
    ]
    applied = profiles.apply(polled)
    assert [(p, r.offset, reason.error[:14]) for p, r, reason in applied.rejects] == [
        (2, 0, "JSON is malfor"), (0, 1, "the record is "), (0, 3, "Object missing"),
    ]  # fmt: skip
    assert sorted(zip(applied.logs.tolist(), applied.offsets.tolist(), strict=True)) == [
        (0, 0),
        (0, 2),
        (2, 1),
    ]
    assert profiles.counts == dict.fromkeys((*OUTCOMES, "seen", "gap", "rejected"), 0) | {
        "folded": 3,
        "rejected": 3,
    }
    assert {s.partition: s.progress.position for s in profiles.snapshots()} == {0: 4, 2: 2}


def test_a_poll_of_bad_input_alone_moves_the_position(tmp_path: Path) -> None:
    profiles = opened(customers(tmp_path))
    profiles.apply([(1, [Fetched(0, b"junk")])])
    assert [(s.partition, s.progress.position, s.profiles) for s in profiles.snapshots()] == [(1, 1, [])]


def test_a_misplaced_key_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    profiles = opened(customers(tmp_path))
    mine, other = AT_HOME[0][0], AT_HOME[1][0]
    profiles.apply([(0, orders(mine, 1)), (1, orders(other, 1))])
    list(profiles.snapshots())
    # keyed by something else: one whose profile is known, one whose is not, and between them a good one
    stranger = AT_HOME[2][1]
    wrong = [
        Fetched(1, b"junk"), *orders(other, 2, first=2), *orders(mine, 2, first=3), *orders(stranger, 2, first=4),
    ]  # fmt: skip
    applied = profiles.apply([(0, wrong)])
    assert [(p, r.offset, reason.error) for p, r, reason in applied.rejects[1:]] == [
        (0, 2, f"CUSTOMER {other} belongs in partition 1, not 0; publish it with the record key {other}"),
        (
            0,
            4,
            f"CUSTOMER {stranger} belongs in partition 2, not 0; publish it with the record key {stranger}",
        ),
    ]
    assert [r for _, r, _ in applied.rejects] == [wrong[0], wrong[1], wrong[3]]
    assert (applied.offsets.tolist(), applied.features[:, 0].tolist()) == ([3], [2.0])
    assert profiles.counts["rejected"] == 3
    (snapshot,) = profiles.snapshots()
    assert (snapshot.progress.position, [k for k, _ in snapshot.profiles]) == (5, [key_bytes(mine)])
    assert profiles.size == 2


def test_misplaced_and_keyless_records_may_come_first(tmp_path: Path) -> None:
    """Before any profile is in memory."""
    profiles = opened(customers(tmp_path))
    assert len(profiles.apply([(0, orders(AT_HOME[1][0], 1))]).rejects) == 1
    optional = shop("CUSTOMER: int", "CUSTOMER: {type: int, optional: true}")
    keyless = opened(customers(tmp_path / "keyless", pipeline=optional))
    applied = keyless.apply([(0, [Fetched(0, order(1, CUSTOMER=None))])])
    assert [OUTCOMES[o] for o in applied.outcomes] == ["no_key"]
    assert np.isnan(applied.features).all()
    assert keyless.counts["no_key"] == 1


def test_partitions_are_taken_in_step(tmp_path: Path) -> None:
    profiles = opened(customers(tmp_path))
    ahead = [Fetched(i, order(i, CUSTOMER=AT_HOME[0][0], AT=START + 10 * i)) for i in (0, 1, 2)]
    behind = [Fetched(i, order(i, CUSTOMER=AT_HOME[1][0], AT=START + 10 * i + 5)) for i in (0, 1, 2)]
    applied = profiles.apply([(0, ahead), (1, behind)])
    assert applied.batch.times.tolist() == [START + t for t in (0, 5, 10, 15, 20, 25)]
    assert applied.logs.tolist() == [0, 1] * 3
    assert applied.offsets.tolist() == [0, 0, 1, 1, 2, 2]
    assert applied.features[:, 0].tolist() == [1, 1, 2, 2, 3, 3]
    assert [p.decode()[:8] for p in applied.batch.payloads[:3]] == ['{"ID": 0', '{"ID": 0', '{"ID": 1']


# --- what others take --------------------------------------------------------------------------


def test_a_snapshot_is_of_its_moment_and_of_what_changed(tmp_path: Path) -> None:
    profiles = opened(customers(tmp_path))
    one, two = AT_HOME[0]
    profiles.apply([(0, orders(one, 1)), (1, orders(AT_HOME[1][0], 1))])
    first = list(profiles.snapshots())
    before = [(s.progress.position, s.progress.seen, list(s.profiles)) for s in first]
    assert list(profiles.snapshots()) == []
    profiles.apply([(0, orders(two, 5, first=1))])
    (second,) = profiles.snapshots()
    assert (second.partition, second.progress.position, [k for k, _ in second.profiles]) == (
        0,
        2,
        [key_bytes(two)],
    )
    assert [(s.progress.position, s.progress.seen, list(s.profiles)) for s in first] == before
    assert [s.partition for s in first] == [0, 1]


def test_nothing_is_written_of_a_partition_that_was_let_go(tmp_path: Path) -> None:
    profiles = opened(customers(tmp_path))
    profiles.apply([(0, orders(AT_HOME[0][0], 1))])
    (snapshot,) = profiles.snapshots()
    profiles.close(0)
    profiles.write(snapshot)
    assert profiles.open(0) is None
    profiles.flush()


def test_letting_go_forgets_that_partition_and_no_other(tmp_path: Path) -> None:
    profiles = opened(customers(tmp_path))
    profiles.apply([(p, orders(AT_HOME[p][0], 1)) for p in range(PARTITIONS)])
    profiles.close(1)
    profiles.close(1)  # once more does no harm
    assert (profiles.partitions, profiles.size) == ([0, 2], 2)
    assert [s.partition for s in profiles.snapshots()] == [0, 2]
    assert touched(profiles, 10).keys == [key_bytes(AT_HOME[p][0]) for p in (0, 2)]
    # what it held was never written, so it begins again; its slot serves another profile meanwhile
    profiles.apply([(0, orders(AT_HOME[0][1], 1, first=1))])
    profiles.start_at(1, profiles.open(1) or 0)
    assert profiles.apply([(1, orders(AT_HOME[1][0], 1))]).features[:, 0].tolist() == [1]
    assert profiles.size == 4


def test_memory_is_used_again(tmp_path: Path) -> None:
    profiles = opened(customers(tmp_path))
    everyone = [c for c in range(2000) if home(c) == 0]
    before = 0
    for _ in range(3):
        profiles.apply([(0, [Fetched(i, order(i, CUSTOMER=c)) for i, c in enumerate(everyone)])])
        assert profiles.size == len(everyone)
        before = before or profiles.nbytes
        assert profiles.nbytes == before
        profiles.close(0)
        profiles.start_at(0, profiles.open(0) or 0)


def test_touched_profiles_are_read_as_of_their_newest_event(tmp_path: Path) -> None:
    profiles = opened(customers(tmp_path))
    one, two = AT_HOME[0]
    assert touched(profiles, 10).keys == []
    profiles.apply([(0, [
        Fetched(0, order(1, CUSTOMER=one, AT=START, AMOUNT=1.5)),
        Fetched(1, order(2, CUSTOMER=two, AT=START, AMOUNT=0.25)),
        Fetched(2, order(3, CUSTOMER=one, AT=START + 2 * DAY, AMOUNT=2.0)),
        Fetched(3, order(4, CUSTOMER=one, AT=START + DAY, AMOUNT=4.0)),  # late: not the newest
    ])])  # fmt: skip
    given = touched(profiles, 10)
    assert given.keys == [key_bytes(one), key_bytes(two)]
    assert given.features.tolist() == [[1.0, 7.5], [1.0, 0.25]]
    assert given.times.tolist() == [START + 2 * DAY, START]
    assert given.offsets.tolist() == [3, 1]
    assert touched(profiles, 10).keys == []
    profiles.apply([(0, orders(two, 9, first=4))])
    assert touched(profiles, 10).keys == [key_bytes(two)]


def test_what_changes_no_value_touches_nothing(tmp_path: Path) -> None:
    """A reversal that waits, and a second one, which is ignored: no value is to be had of the profile yet."""
    raw = b'{"ID": 1, "AT": %d, "SHOP": "s1", "RETURNED": 1, "KNOWN": %d}' % (START, START + DAY)
    found, _, _ = LabelDecoder(SHOP, SHOP.said[0]).decode([raw])
    found = replace(found, states=np.full(1, REVERSED, np.int8))
    profiles, codec = opened(shops(tmp_path)), RecordCodec(SHOP, 1)
    values = [codec.encode_labels(found, *np.array([[0], [n], [n - 1]]), 1)[0] for n in range(2)]
    log = partition_of(b"s1", PARTITIONS)
    profiles.apply([(log, [Fetched(n, value, b"s1") for n, value in enumerate(values)])])
    assert (profiles.counts["label_early"], profiles.counts["label_stale"]) == (1, 1)
    assert touched(profiles, 10).keys == []


def test_touched_gives_no_more_than_asked_and_all_in_the_end(tmp_path: Path) -> None:
    profiles = opened(customers(tmp_path))
    some = [c for c in range(100) if home(c) == 0][:7]
    profiles.apply([(0, [Fetched(i, order(i, CUSTOMER=c)) for i, c in enumerate(some)])])
    given_out = [touched(profiles, 3).keys for _ in range(4)]
    assert [len(keys) for keys in given_out] == [3, 3, 1, 0]
    assert sorted(key for keys in given_out for key in keys) == sorted(key_bytes(c) for c in some)


def touched(profiles: Profiles, most: int) -> Touched:
    """The first of what is given out."""
    return next(profiles.touched(most), profiles.nothing)


def evicted(profiles: Profiles) -> int:
    return sum(profiles.sweep(False)) + sum(profiles.sweep(True))


def test_what_is_evicted_is_read_back_and_the_mirror_still_gets_it(tmp_path: Path) -> None:
    profiles, stay = opened(customers(tmp_path)), opened(customers(tmp_path / "stay"))
    one, two = AT_HOME[0]
    polled = [(0, [*orders(one, 1, 2), *orders(two, 3, first=2)])]
    profiles.apply(polled)
    stay.apply(polled)
    assert evicted(profiles) == 0  # nothing is stored yet
    for snapshot in profiles.snapshots():
        profiles.write(snapshot)
    first = touched(profiles, 1)
    assert evicted(profiles) == 2
    assert (profiles.size, profiles.evicted, profiles.unmirrored) == (0, 2, 1)
    profiles.touch(first)  # it was evicted while it was on its way
    again, expected = touched(profiles, 10), touched(stay, 10)
    assert touched(profiles, 10).keys == []
    order_of = [again.keys.index(key) for key in expected.keys]
    assert bits(again.features[order_of]) == bits(expected.features)
    assert again.times[order_of].tolist() == expected.times.tolist()
    assert again.offsets[order_of].tolist() == expected.offsets.tolist()
    profiles.touch(again)
    applied = profiles.apply([(0, orders(one, 4, first=3))])  # one comes back, and is given out once
    assert bits(applied.features) == bits(stay.apply([(0, orders(one, 4, first=3))]).features)
    assert profiles.loaded == 1
    assert sorted(touched(profiles, 10).keys + touched(profiles, 10).keys) == [key_bytes(one), key_bytes(two)]
    profiles.touch(again)
    profiles.close(0)
    assert (touched(profiles, 10).keys, profiles.unmirrored) == ([], 0)


def test_what_was_in_use_lately_stays(tmp_path: Path) -> None:
    profiles = opened(customers(tmp_path))
    one, two = AT_HOME[0]

    def store_all() -> None:
        for snapshot in profiles.snapshots():
            profiles.write(snapshot)
        touched(profiles, 10)

    profiles.apply([(0, [*orders(one, 1), *orders(two, 2, first=1)])])
    store_all()
    assert sum(profiles.sweep(False)) == 0  # both were new; now neither is
    profiles.apply([(0, orders(two, 3, first=2))])
    store_all()
    assert sum(profiles.sweep(False)) == 1
    assert profiles.apply([(0, orders(two, 4, first=3))]).features[0, 0] == 3
    assert (profiles.size, profiles.loaded) == (1, 0)


def test_memory_is_counted_as_it_is_taken_and_given_back(tmp_path: Path) -> None:
    profiles = opened(customers(tmp_path))
    empty = profiles.used
    some = [c for c in range(3000) if home(c) == 0]
    profiles.apply([(0, [Fetched(i, order(i, CUSTOMER=c)) for i, c in enumerate(some)])])
    assert profiles.nbytes >= profiles.used > empty + len(some) * 200
    profiles.close(0)
    # what grew with them is kept for others: the table, the arrays by slot, the dictionary
    assert profiles.used < empty + len(some) * 400
    assert profiles._key_bytes == 0


def test_what_could_not_be_used_is_given_out_again(tmp_path: Path) -> None:
    profiles = opened(customers(tmp_path))
    one, two = AT_HOME[0]
    profiles.apply([(0, orders(one, 1)), (1, orders(AT_HOME[1][0], 1))])
    given = touched(profiles, 10)
    profiles.touch(given)
    assert touched(profiles, 10).keys == given.keys
    # but not of a partition that was let go meanwhile, though its slot may be another's by now
    profiles.close(1)
    profiles.touch(given)
    assert touched(profiles, 10).keys == [key_bytes(one)]
    profiles.apply([(0, orders(two, 1, first=1))])
    touched(profiles, 10)
    profiles.touch(given)
    assert touched(profiles, 10).keys == [key_bytes(one)]


def test_a_profile_of_labels_alone_is_stored_and_not_given_out(tmp_path: Path) -> None:
    codec, profiles = RecordCodec(SHOP, 1), opened(shops(tmp_path))
    labels, _, _ = LabelDecoder(SHOP, SHOP.said[0]).decode(
        [b'{"ID": 1, "AT": 5, "SHOP": "x", "RETURNED": 1, "KNOWN": 9}']
    )
    (value,) = codec.encode_labels(labels, np.array([0]), np.array([0]), NONE_BEFORE, 1)
    p = partition_of(b"x", PARTITIONS)
    profiles.apply([(p, [Fetched(0, value, b"x")])])
    assert touched(profiles, 10).keys == []
    (snapshot,) = profiles.snapshots()
    assert [k for k, _ in snapshot.profiles] == [b"x"]
    profiles.write(snapshot)
    profiles.close(p)
    profiles.start_at(p, profiles.open(p) or 0)
    events, _, _ = EventDecoder(SHOP, SHOP.stream).decode([order(1, SHOP="x", AT=5)], np.array([START]))
    (value,) = codec.encode(events, np.zeros((1, 2)), np.array([0]), np.array([0]), NONE_BEFORE, SOUND)
    profiles.apply([(p, [Fetched(1, value, b"x")])])
    assert profiles.counts["label_early"] == profiles.counts["folded"] == 1
    packed = np.frombuffer(next(profiles.snapshots()).profiles[0][1], "<i8")
    assert packed[3] % 4 == 2  # the row has the label that waited for it


def test_a_label_touches_what_it_changes(tmp_path: Path) -> None:
    codec, profiles, p = RecordCodec(SHOP, 1), opened(shops(tmp_path)), partition_of(b"x", PARTITIONS)
    events, _, _ = EventDecoder(SHOP, SHOP.stream).decode([order(1, SHOP="x", AT=START)], np.array([START]))
    (event,) = codec.encode(events, np.zeros((1, 2)), np.array([0]), np.array([0]), NONE_BEFORE, SOUND)
    profiles.apply([(p, [Fetched(0, event, b"x")])])
    assert touched(profiles, 10).keys == [b"x"]
    for n, (id, given_out) in enumerate([(2, []), (1, [b"x"])]):  # one waits for its event, one has it
        label = b'{"ID": %d, "AT": %d, "SHOP": "x", "RETURNED": 1, "KNOWN": %d}' % (id, START, START)
        labels, _, _ = LabelDecoder(SHOP, SHOP.said[0]).decode([label])
        (value,) = codec.encode_labels(labels, np.array([0]), np.array([n]), NONE_BEFORE, 1)
        profiles.apply([(p, [Fetched(n + 1, value, b"x")])])
        assert touched(profiles, 10).keys == given_out
        assert [len(s.profiles) for s in profiles.snapshots()] == [1]


def test_warming_changes_nothing(tmp_path: Path) -> None:
    profiles = opened(customers(tmp_path))
    profiles.warm()
    assert (profiles.size, list(profiles.snapshots()), touched(profiles, 10).keys) == (0, [], [])
    assert set(profiles.counts.values()) == {0}


def test_duplicates_are_told_from_news(tmp_path: Path) -> None:
    profiles = opened(customers(tmp_path))
    applied = profiles.apply([(0, orders(AT_HOME[0][0], 1, 1, 2))])
    assert (applied.outcomes == DUPLICATE).tolist() == [False, True, False]
    assert np.isnan(applied.features[1]).all()


def test_a_mortal_store_loses_what_was_not_flushed(tmp_path: Path) -> None:
    """Else the crashes above would be none."""
    for kept, position in [(0, 1), (1, 2), (2, 3)]:
        store = Mortal(Store(tmp_path / str(kept), "d1"))
        store.write(Snapshot(0, Progress(1), [(b"a", b"1")]))
        store.flush()
        store.write(Snapshot(0, Progress(2), [(b"a", b"2")]))
        store.write(Snapshot(0, Progress(3), [(b"a", b"3")]))
        assert ((store.progress or Progress(0)).position, store.get(b"a")) == (3, b"3")
        store.crash(kept)
        for _ in range(2):  # for the next owner here, and from disk
            assert ((store.progress or Progress(0)).position, store.get(b"a")) == (position, b"%d" % position)
            store.close()
            store = Mortal(Store(tmp_path / str(kept), "d1"))
