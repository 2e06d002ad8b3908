"""Records between stages: what goes in comes out, what is foreign stays out, what was seen is dropped."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from models.events import Batch, LabelBatch, key_bytes
from models.records import (
    GAP,
    NEVER,
    NEWS,
    SEEN,
    RecordCodec,
    chain,
    fresh,
    in_step,
    keys_of,
    loosened,
    writers,
)  # fmt: skip
from models.windows import EVENT, LABEL, NEGATIVE, NULL, POSITIVE, UNKNOWN
from tests.fixtures.histories import bits
from tests.fixtures.pipelines import shop

SHOP = shop()
CODEC = RecordCodec(SHOP, 1)
INT64 = st.integers(-(2**63), 2**63 - 1)


def ints(n: int, elements: st.SearchStrategy[int] = INT64) -> st.SearchStrategy[Any]:
    return npst.arrays(np.int64, n, elements=elements)


@st.composite
def batches(draw: st.DrawFn, carried: int = 0) -> Batch:
    """Events with any bits whatever. carried: features of the entities before."""
    n = draw(st.integers(0, 4))
    return Batch(
        kinds=np.full(n, EVENT, np.int8),
        labels=np.zeros(n, np.int8),
        times=draw(ints(n)),
        ids=draw(ints(n)),
        clocks=draw(ints(n)),
        fields=draw(npst.arrays(np.int64, (n, 6), elements=INT64)),
        features=draw(npst.arrays(np.float64, (n, carried))),
        keys=[draw(st.integers(0, 9)) for _ in range(n)],
        payloads=[draw(st.binary(max_size=200)) for _ in range(n)],
    )


# --- in and out --------------------------------------------------------------------------------


@given(st.data(), batches())
def test_decoding_is_the_inverse_of_encoding(data: st.DataObject, batch: Batch) -> None:
    n = len(batch)
    features = data.draw(npst.arrays(np.float64, (n, 2)))
    partitions = data.draw(ints(n, st.integers(0, 2**31 - 1)))
    offsets = data.draw(ints(n, st.integers(0, 2**63 - 1)))
    previous = data.draw(ints(n, st.integers(-1, 2**63 - 1)))
    degraded = data.draw(npst.arrays(np.bool_, n))
    keys = [key_bytes(k) for k in batch.keys]
    values = CODEC.encode(batch, features, partitions, offsets, previous, degraded)
    out, kept, rejects = CODEC.decode(values, keys)
    assert (kept.tolist(), rejects) == (list(range(n)), [])
    for name in ("kinds", "labels", "times", "ids", "clocks", "fields"):
        assert getattr(out, name).tolist() == getattr(batch, name).tolist(), name
    assert bits(out.features) == bits(features)
    assert (out.payloads, out.keys) == (batch.payloads, keys)
    assert out.sources is not None and out.offsets is not None
    assert out.sources.tolist() == (partitions * 2).tolist()
    assert out.previous is not None and out.degraded is not None
    assert out.offsets.tolist() == offsets.tolist()
    assert (out.previous.tolist(), out.degraded.tolist()) == (previous.tolist(), degraded.tolist())
    # and what was taken out belongs to the batch, not to the bytes
    assert all(
        getattr(out, a).flags.writeable for a in ("kinds", "times", "ids", "clocks", "fields", "features")
    )


@given(st.data(), batches(carried=2))
def test_a_later_stage_carries_the_features_of_those_before(data: st.DataObject, batch: Batch) -> None:
    third = RecordCodec(shop("vector:", "  item:\n    key: ITEMS\n    features: {}\nvector:"), 2)
    assert third.carried == 4
    n = len(batch)
    own = data.draw(npst.arrays(np.float64, (n, 2)))
    zeros = np.zeros(n, np.int64)
    out, _, _ = third.decode(third.encode(batch, own, zeros, zeros, zeros, zeros > 0), [b""] * n)
    assert bits(out.features) == bits(np.hstack([batch.features, own]))


def test_labels_go_in_and_out() -> None:
    labels = LabelBatch(
        times=np.array([5, 6, 7]),
        ids=np.array([1, -2, 3]),
        states=np.array([POSITIVE, NEGATIVE, UNKNOWN], np.int8),
        clocks=np.array([8, 9, 10]),
        keys={"SHOP": ["a", "b", None]},
    )
    values = CODEC.encode_labels(
        labels, np.array([0, 3, 3]), np.array([100, 101, 102]), np.array([-1, -1, 101]), 1
    )
    out, kept, rejects = CODEC.decode(values, [b"a", b"b", None])
    assert (kept.tolist(), rejects) == ([0, 1, 2], [])
    assert out.kinds.tolist() == [LABEL] * 3
    assert out.labels.tolist() == [POSITIVE, NEGATIVE, UNKNOWN]
    assert (out.times.tolist(), out.ids.tolist(), out.clocks.tolist()) == ([5, 6, 7], [1, -2, 3], [8, 9, 10])
    assert (out.keys, out.payloads) == ([b"a", b"b", None], [b""] * 3)
    assert out.offsets is not None and out.offsets.tolist() == [100, 101, 102]
    assert out.previous is not None and out.previous.tolist() == [-1, -1, 101]
    assert out.sources is not None
    assert out.sources.tolist() == [1, 7, 7]  # partition * 2 + 1, the labels being the second of two writers


def test_records_are_taken_with_their_origin() -> None:
    labels = LabelBatch(np.arange(3), np.arange(3), np.zeros(3, np.int8), np.arange(3), {"SHOP": [None] * 3})
    batch, _, _ = CODEC.decode(
        CODEC.encode_labels(labels, np.arange(3), np.array([7, 8, 9]), np.arange(3), 1), [None] * 3
    )
    taken = batch.take(np.array([2, 0]))
    assert taken.sources is not None and taken.offsets is not None
    assert (taken.sources.tolist(), taken.offsets.tolist()) == ([5, 1], [9, 7])


def test_each_writer_s_partition_is_a_source_of_its_own() -> None:
    labels = LabelBatch(
        np.arange(50), np.arange(50), np.zeros(50, np.int8), np.arange(50), {"shop": [None] * 50}
    )
    found = []
    for writer, topic in enumerate(writers(SHOP, 1)):
        assert topic == (SHOP.entities[0].log, "shop.labels")[writer]
        values = CODEC.encode_labels(labels, np.arange(50), np.zeros(50), np.zeros(50), writer)
        batch, _, _ = CODEC.decode(values, [None] * 50)
        assert batch.sources is not None
        found += batch.sources.tolist()
    assert sorted(found) == list(range(100))


# --- what is foreign ---------------------------------------------------------------------------


def one_record(codec: RecordCodec = CODEC) -> bytes:
    labels = LabelBatch(
        np.array([5]), np.array([1]), np.array([POSITIVE], np.int8), np.array([8]), {"SHOP": ["a"]}
    )
    return codec.encode_labels(labels, np.array([0]), np.array([100]), np.array([-1]), 1)[0]


@pytest.mark.parametrize(
    "foreign",
    [b"", None, b"HRDR", b'{"ID": 1}', bytes(500), b"\xff" * 500, b"x" + one_record(), one_record()[:-1]],
    ids=["nothing", "null", "the magic alone", "an event", "zeros", "ones", "shifted", "cut short"],
)
def test_foreign_bytes_are_rejected(foreign: Any) -> None:
    batch, kept, rejects = CODEC.decode([one_record(), foreign, one_record()], [b"a", b"b", b"c"])
    assert kept.tolist() == [0, 2]
    assert [(r.index, r.reason.error) for r in rejects] == [(1, "this is no record of a stage")]
    assert (batch.keys, batch.times.tolist()) == ([b"a", b"c"], [5, 5])


@given(st.lists(st.binary(max_size=200), max_size=5))
def test_bytes_at_random_are_rejected(values: list[bytes]) -> None:
    batch, kept, rejects = CODEC.decode(values, [None] * len(values))
    assert (len(batch), kept.tolist(), [r.index for r in rejects]) == (0, [], list(range(len(values))))


@pytest.mark.parametrize(
    "changes",
    [
        ("window: 1h", "window: 2h"),
        ("WEIGHT: {", "HEIGHT: {", "WEIGHT, NIGHT", "NIGHT"),
        ("ID: int\n      AT: {type: timestamp, unit: ms}", "AT: {type: timestamp, unit: ms}\n      ID: int"),
    ],
    ids=["a window", "another field", "the same fields in another order"],
)
def test_records_of_another_definition_are_left_out_and_not_rejected(changes: tuple[str, ...]) -> None:
    """They will come again under the new one; and never are their columns read as others."""
    values = [one_record(), one_record(RecordCodec(shop(*changes), 1)), one_record()]
    batch, kept, rejects = CODEC.decode(values, [b"a", b"b", b"c"])
    assert (kept.tolist(), rejects, batch.keys) == ([0, 2], [], [b"a", b"c"])


def test_records_of_another_stage_are_left_out() -> None:
    longer = shop("vector:", "  item:\n    key: ITEMS\n    features: {}\nvector:")
    _, kept, _ = RecordCodec(longer, 2).decode([one_record(RecordCodec(longer, 1))], [b"a"])
    assert kept.tolist() == []


# --- the next stage's keys ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "keys"),
    [
        ("SHOP", [b"north", b"s\xc3\xbcd", None, b""]),
        ("CUSTOMER", [b"1", b"-2", b"3", b"4"]),
        ("ITEMS", [b"5", None, b"0", None]),
    ],
)  # fmt: skip
def test_the_next_stage_s_keys_are_read_from_the_events(key: str, keys: list[bytes | None]) -> None:
    p = shop("key: SHOP", f"key: {key}")
    n = len(keys)
    batch = Batch(
        kinds=np.zeros(n, np.int8),
        labels=np.zeros(n, np.int8),
        times=np.zeros(n, np.int64),
        ids=np.zeros(n, np.int64),
        clocks=np.zeros(n, np.int64),
        fields=np.array([[0, 0, c, 0, i, 0] for c, i in zip([1, -2, 3, 4], [5, NULL, 0, NULL], strict=True)]),
        features=np.empty((n, 0)),
        keys=[None] * n,
        payloads=[b'{"SHOP": "north"}', '{"SHOP": "süd"}'.encode(), b'{"ID": 1}', b'{"SHOP": ""}'],
    )
    assert keys_of(p, 1)(batch) == keys


# --- what was seen -----------------------------------------------------------------------------


@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(-1, 12)), max_size=12),
        max_size=4,
    )
)
def test_fresh_is_what_is_above_all_seen(batches: list[list[tuple[int, int, int]]]) -> None:
    seen = np.full((3, 4), -1, np.int64)
    highest: dict[tuple[int, int], int] = {}
    for batch in batches:
        logs, sources, offsets = np.array(batch, np.int64).reshape(-1, 3).T.copy()
        expected = []
        for log, writer, offset in batch:
            expected.append(offset > highest.get((log, writer), -1))
            highest[log, writer] = max(offset, highest.get((log, writer), -1))
        none_before = np.full(len(logs), NEVER)
        found = fresh(logs, sources, offsets, none_before, seen)
        assert found.tolist() == [NEWS if new else SEEN for new in expected]
    assert {(log, s): int(seen[log, s]) for log in range(3) for s in range(4) if seen[log, s] >= 0} == {
        at: offset for at, offset in highest.items() if offset >= 0
    }


WRITTEN = st.lists(st.integers(0, 30), max_size=30, unique=True).map(sorted)


def taken(offsets: list[int], previous: list[int], seen: Any) -> list[int]:
    """What of one source a receiver takes, in its order."""
    zeros = np.zeros(len(offsets), np.int64)
    found = fresh(zeros, zeros, np.array(offsets, np.int64), np.array(previous, np.int64), seen)
    return [o for o, what in zip(offsets, found.tolist(), strict=True) if what == NEWS]


@given(WRITTEN, st.data())
def test_what_is_sent_again_is_dropped_and_nothing_else(offsets: list[int], data: st.DataObject) -> None:
    """A writer's offsets increase; after a crash it begins again at or before the last one it sent."""
    before = [NEVER, *offsets]
    again = data.draw(st.integers(0, len(offsets)))
    sent = offsets + offsets[again:] + [99]
    previous = before[:-1] + before[again:-1] + before[-1:]
    assert taken(sent, previous, np.full((1, 1), NEVER)) == [*offsets, 99]


@given(WRITTEN, st.data())
def test_a_missing_record_holds_up_its_source_until_it_is_sent_again(
    offsets: list[int], data: st.DataObject
) -> None:
    """Whatever a broker lost of what a writer sent: all is taken, once, when the writer sends it again."""
    before = [NEVER, *offsets]
    kept = [i for i in range(len(offsets)) if not data.draw(st.booleans())]
    seen = np.full((1, 1), NEVER)
    first = taken([offsets[i] for i in kept], [before[i] for i in kept], seen)
    assert first == offsets[: len(first)], "nothing is taken behind a gap"
    assert (len(first) < len(kept)) == (kept != list(range(len(kept))))
    assert first + taken(offsets, before[:-1], seen) == offsets


def test_a_gap_is_told_apart() -> None:
    seen, zeros = np.full((1, 1), NEVER), np.zeros(4, np.int64)
    found = fresh(zeros, zeros, np.array([3, 9, 3, 12]), np.array([NEVER, 7, NEVER, 9]), seen)
    assert (found.tolist(), seen.tolist()) == ([NEWS, GAP, SEEN, GAP], [[3]])


@given(st.integers(NEVER, 50), st.integers(0, 100), st.integers(NEVER, 99))
def test_behind_a_cut_log_the_next_of_a_source_is_taken_as_it_is(
    highest: int, offset: int, before: int
) -> None:
    seen = loosened(np.array([[highest]]))
    assert loosened(seen).tolist() == seen.tolist()
    zero = np.zeros(1, np.int64)
    what = fresh(zero, zero, np.array([offset]), np.array([before]), seen)[0]
    assert what == (NEWS if offset > highest else SEEN)
    if what == NEWS:  # and from there on nothing may be missing
        assert fresh(zero, zero, np.array([offset + 2]), np.array([offset + 1]), seen)[0] == GAP


def test_a_chain_runs_by_origin_and_target() -> None:
    sent = np.full((2, 3), NEVER)
    origins, targets = np.array([0, 0, 1, 0, 1]), np.array([2, 2, 2, 1, 2])
    assert chain(origins, targets, np.array([5, 8, 6, 9, 7]), sent).tolist() == [NEVER, 5, NEVER, NEVER, 6]
    assert sent.tolist() == [[NEVER, 9, 8], [NEVER, NEVER, 7]]


# --- partitions in step ------------------------------------------------------------------------


@st.composite
def polls(draw: st.DrawFn) -> list[tuple[int, int]]:
    """(partition, clock) as polled: partitions in any order, each in one run."""
    owners = draw(st.permutations(range(4)))
    return [(p, clock) for p in owners for clock in draw(st.lists(st.integers(0, 9), max_size=8))]


@given(polls())
def test_in_step_is_the_order_in_which_records_happened(polled: list[tuple[int, int]]) -> None:
    partitions, clocks = np.array(polled, np.int64).reshape(-1, 2).T.copy()
    reached = []  # a record counts as no earlier than those before it in its partition
    for _, run in groupby(polled, key=lambda r: r[0]):
        latest = -1
        for _, clock in run:
            latest = max(latest, clock)
            reached.append(latest)
    order = in_step(partitions, clocks)
    if order is None:
        assert reached == sorted(reached)
        return
    assert reached != sorted(reached)
    assert order.tolist() == sorted(range(len(polled)), key=lambda i: (reached[i], i))
    for partition in range(4):
        own = [i for i in order.tolist() if polled[i][0] == partition]
        assert own == sorted(own), "a partition keeps its own order"


def test_clocks_are_not_changed_by_the_look() -> None:
    clocks = np.array([5, 1, 9, 0])
    order = in_step(np.array([0, 0, 1, 1]), clocks)
    assert clocks.tolist() == [5, 1, 9, 0]
    assert order is None  # 5, 5, 9, 9
    order = in_step(np.array([1, 1, 0, 0]), np.array([5, 9, 1, 6]))
    assert order is not None and order.tolist() == [2, 0, 3, 1]
