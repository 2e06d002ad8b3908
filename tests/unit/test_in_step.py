"""Catching up in step, with time as an argument: nobody runs ahead of the slowest, nobody waits for ever."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from agents.in_step import HELD, IDLE_S, LAGGING_S, InStep, Place
from models.windows import NULL
from tests.fixtures.logs import Fetched

ALIGNMENT = 10
A, B, L = ("events", 0), ("events", 1), ("labels", 0)


def clock(values: Any, sent: Any) -> Any:
    return np.array([int(v) if v.isdigit() else NULL for v in values], np.int64)


def step(*ends: tuple[Place, int]) -> InStep:
    """All partitions from offset 0, with logs of these lengths."""
    result = InStep([{"events": clock, "labels": clock}], ALIGNMENT)
    result.start({place: 0 for place, _ in ends}, dict(ends), 0.0)
    return result


def records(*times: int, at: int = 0) -> list[Any]:
    return [Fetched(at + i, b"%d" % t) for i, t in enumerate(times)]


def times(taken: dict[Place, list[Any]]) -> dict[Place, list[int]]:
    return {place: [int(r.value) for r in found] for place, found in taken.items()}


def test_what_is_ahead_of_a_partition_with_more_to_come_waits() -> None:
    both = step((A, 100), (B, 100))
    assert both.offer(*A, records(1, 50, 70), 100, 1.0) == []
    assert both.take({}, 1.0) == {}, "of B nothing is known yet"
    both.offer(*B, records(3, 45), 100, 1.0)
    assert times(both.take({}, 1.0)) == {A: [1, 50], B: [3, 45]}, "55 is as far as 45 allows"
    both.offer(*B, records(61, at=2), 100, 1.0)
    assert times(both.take({}, 1.0)) == {A: [70], B: [61]}


def test_a_partition_at_its_end_holds_nobody_back() -> None:
    both = step((A, 100), (B, 2), (L, 0))
    both.offer(*A, records(1, 500), 100, 1.0)
    both.offer(*B, records(3, 4), 2, 1.0)
    assert times(both.take({}, 1.0)) == {A: [1, 500], B: [3, 4]}


def test_a_partition_that_gives_nothing_holds_others_back_for_a_bound() -> None:
    both = step((A, 100), (B, 100))
    both.offer(*A, records(7), 100, IDLE_S)
    assert both.take({}, IDLE_S) == {}
    assert times(both.take({}, IDLE_S + 0.1)) == {A: [7]}


def test_other_workers_hold_back_too_and_other_topics_do_not() -> None:
    one = step((A, 1))
    one.offer(*A, records(7, 30), 2, 1.0)
    assert times(one.take({B: 10, ("other", 0): -5}, 1.0)) == {A: [7]}
    assert times(one.take({B: 20, A: -5}, 1.0)) == {A: [30]}


def test_topics_of_no_group_pass_and_no_alignment_lets_all_pass() -> None:
    one = step((A, 10))
    found = records(1)
    assert one.offer("terminal", 0, found, 10, 1.0) is found
    free = InStep([{"events": clock}], 0)
    free.start({A: 0}, {A: 10}, 0.0)
    assert free.offer(*A, found, 10, 1.0) is found
    assert (free.take({B: 0}, 1.0), free.lows(99.0), free.size) == ({}, {}, 0)


def test_a_partition_of_which_much_waits_is_not_polled() -> None:
    both = step((A, 10**6), (B, 10**6))
    both.offer(*A, records(*range(HELD)), 10**6, 1.0)
    assert (both.full(A), both.full(B), both.full(("terminal", 0)), both.waiting) == (
        True,
        False,
        False,
        True,
    )


def test_a_bad_record_counts_as_the_one_before_it() -> None:
    one = step((A, 9))
    one.offer(*A, [Fetched(0, b"x"), Fetched(1, b"5"), Fetched(2, None), Fetched(3, b"4")], 9, 1.0)
    assert len(one.take({}, 1.0)[A]) == 4
    one.handled(*A, 3)
    assert one.lows(LAGGING_S) == {A: 5}


def test_what_is_told_to_others_is_what_was_handled() -> None:
    one = step((A, 100))
    assert one.lows(0.0) == {A: NULL}, "it begins behind"
    one.offer(*A, records(5, 8, 90), 100, 1.0)
    assert times(one.take({B: 0}, 1.0)) == {A: [5, 8]}
    assert one.lows(1.0) == {A: 5}, "on its way"
    one.handled(*A, 1)
    assert one.lows(1.0) == {A: 90}, "none to come is before the one that waits"
    one.offer(*A, records(95, at=3), 4, 2.0)
    one.take({}, 2.0)
    assert one.lows(2.0) == {A: 90}, "at its end, but not through with it"
    one.handled(*A, 3)
    assert one.lows(2.0) == {}
    one.offer(*A, records(99, at=4), 6, 3.0)
    assert one.lows(3.0) == {}, "behind for a moment"
    assert one.lows(3.0 + LAGGING_S) == {A: 99}


@given(
    st.lists(st.lists(st.integers(0, 300), max_size=30), min_size=3, max_size=3),
    st.lists(st.tuples(st.integers(0, 2), st.integers(1, 6)), max_size=60),
)
def test_nothing_is_lost_and_nobody_is_ahead(logs: list[list[int]], polls: list[tuple[int, int]]) -> None:
    """Two workers, one with partitions 0 and 1, one with 2, that tell each other how far they are."""
    logs = [list(accumulate(log, max)) for log in logs]  # a record counts as no earlier than those before it
    places = [("events", p) for p in range(3)]
    workers = [InStep([{"events": clock}], ALIGNMENT) for _ in range(2)]
    of = [workers[0], workers[0], workers[1]]
    for worker in workers:
        worker.start(
            {p: 0 for p, w in zip(places, of, strict=True) if w is worker},
            {p: len(log) for p, log in zip(places, logs, strict=True)}, 0.0,
        )  # fmt: skip
    done, arrived, now = [0] * 3, [], 10.0
    polls += [(p, 99) for _ in range(99) for p in range(3)]
    for p, count in polls:
        found = logs[p][done[p] : done[p] + count]
        if found:
            of[p].offer(*places[p], records(*found, at=done[p]), len(logs[p]), now)
            done[p] += len(found)
        for worker, other in (workers, workers[::-1]):
            taken = worker.take(other.lows(now), now)
            order = sorted(((int(r.value), q) for q, rs in taken.items() for r in rs))
            arrived += order
            for place, rs in taken.items():
                worker.handled(*place, rs[-1].offset)
    everything = sorted((t, place) for place, log in zip(places, logs, strict=True) for t in log)
    assert sorted((at, place) for at, place in arrived) == everything
    reached = dict.fromkeys(places, -1)
    for at, place in arrived:
        reached[place] = max(reached[place], at)
        assert max(reached.values()) <= reached[place] + ALIGNMENT
