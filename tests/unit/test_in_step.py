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
    """These partitions from offset 0, with logs of these lengths; all others are at their ends."""
    result = InStep([{"events": clock, "labels": clock}], {"events": 2, "labels": 1}, ALIGNMENT)
    result.start({place: 0 for place, _ in ends}, dict(ends), 0.0)
    for place in {A, B, L} - {place for place, _ in ends}:
        result.hear(place, None, 0.0)
    return result


def records(*times: int, at: int = 0) -> list[Any]:
    return [Fetched(at + i, b"%d" % t) for i, t in enumerate(times)]


def times(taken: dict[Place, list[Any]]) -> dict[Place, list[int]]:
    return {place: [int(r.value) for r in found] for place, found in taken.items()}


def test_what_is_ahead_of_a_partition_with_more_to_come_waits() -> None:
    both = step((A, 100), (B, 100))
    assert both.offer(*A, records(1, 50, 70), 100, 1.0) == []
    assert both.take(1.0) == {}, "of B nothing is known yet"
    both.offer(*B, records(3, 45), 100, 1.0)
    assert times(both.take(1.0)) == {A: [1, 50], B: [3, 45]}, "55 is as far as 45 allows"
    both.offer(*B, records(61, at=2), 100, 1.0)
    assert times(both.take(1.0)) == {A: [70], B: [61]}


def test_a_partition_at_its_end_holds_nobody_back() -> None:
    both = step((A, 100), (B, 2), (L, 0))
    both.offer(*A, records(1, 500), 100, 1.0)
    both.offer(*B, records(3, 4), 2, 1.0)
    assert times(both.take(1.0)) == {A: [1, 500], B: [3, 4]}


def test_a_partition_that_gives_nothing_holds_others_back_for_a_bound() -> None:
    both = step((A, 100), (B, 100))
    both.offer(*A, records(7), 100, IDLE_S)
    assert both.take(IDLE_S) == {}
    assert times(both.take(IDLE_S + 0.1)) == {A: [7]}


def test_a_topic_that_is_not_read_holds_nobody_back() -> None:
    """Neither here nor, by what they are told, other workers."""
    both = step((A, 100), (L, 100))
    both.offer(*A, records(1, 50), 100, 1.0)
    both.offer(*L, records(3), 100, 1.0)
    assert times(both.take(1.0)) == {A: [1], L: [3]}
    assert both.lows(1.0 + LAGGING_S)[L] is not None
    both.held_back = frozenset({"labels"})
    assert times(both.take(1.0)) == {A: [50]}
    assert both.lows(1.0 + LAGGING_S)[L] is None


def test_other_workers_hold_back_too_and_other_topics_do_not() -> None:
    one = step((A, 1))
    one.offer(*A, records(7, 30), 2, 1.0)
    one.hear(B, 10, 1.0)
    one.hear(("other", 0), -5, 1.0)
    assert times(one.take(1.0)) == {A: [7]}
    one.hear(B, 20, 1.0)
    one.hear(A, -5, 1.0)  # of before it was ours
    assert times(one.take(1.0)) == {A: [30]}


def test_a_worker_that_says_nothing_more_holds_others_back_for_a_bound() -> None:
    one = step((A, 9))
    one.hear(B, 10, 1.0)
    one.offer(*A, records(7, 30), 9, 1.0 + IDLE_S)
    assert times(one.take(1.0 + IDLE_S)) == {A: [7]}
    assert times(one.take(1.1 + IDLE_S)) == {A: [30]}


def test_who_catches_up_waits_until_the_others_have_spoken() -> None:
    one = InStep([{"events": clock}], {"events": 2}, ALIGNMENT)
    one.start({A: 0}, {A: 9}, 50.0)
    one.offer(*A, records(7, 8, 17, 40), 9, 50.0)
    assert times(one.take(50.0)) == {A: [7]}, "B may be as far behind as anything may be"
    one.hear(B, 7, 50.1)
    assert times(one.take(50.1)) == {A: [8, 17]}
    one.start({A: 4}, {A: 9}, 51.2 + IDLE_S)
    one.offer(*A, records(70, 90, at=4), 9, 51.2 + IDLE_S)
    assert times(one.take(51.2 + IDLE_S)) == {A: [70]}, "it may have changed hands since"
    assert times(one.take(51.3 + 2 * IDLE_S)) == {A: [90]}


def test_who_is_at_the_end_does_not_wait_for_others_to_speak() -> None:
    one = InStep([{"events": clock}], {"events": 2}, ALIGNMENT)
    one.start({A: 2}, {A: 2}, 50.0)
    one.offer(*A, records(7, 80, at=2), 4, 50.0)
    assert times(one.take(50.0)) == {A: [7, 80]}


def test_what_was_ours_is_where_we_left_it() -> None:
    one = step((A, 9), (B, 9))
    one.offer(*A, records(12, 20), 9, 1.0)
    one.offer(*B, records(3, 20), 9, 1.0)
    assert times(one.take(1.0)) == {A: [12, 20], B: [3, 20]}
    one.handled(*A, 1)
    one.start({A: 2}, {A: 9}, 2.0)
    one.offer(*A, records(21, at=2), 9, 2.0)
    assert one.take(2.0) == {}, "B is at 3: that was not handled"
    one.hear(B, 11, 2.1)
    assert times(one.take(2.1)) == {A: [21]}


def test_of_many_records_the_times_of_some_are_read_where_that_is_near_enough() -> None:
    read: list[int] = []

    def counting(values: Any, sent: Any) -> Any:
        read.append(len(values))
        return clock(values, sent)

    one = InStep([{"events": counting}], {"events": 2}, 1000)
    one.start({A: 0}, {A: 999}, 0.0)
    one.offer(*A, records(*range(100)), 999, 0.0)
    assert read == [8], "of each 16th, and of the last"
    one.hear(B, -960, 0.0)
    assert times(one.take(0.0)) == {A: list(range(33))}, "33 to 47 are known to be 48 at most"
    one.handled(*A, 32)
    assert one.lows(5.0) == {A: 32}, "and 32 at least"
    one.offer(*A, records(*range(100, 5000, 100), at=100), 999, 0.0)
    assert read == [8, 4, 49], "too far apart"


def test_only_what_matters_is_told() -> None:
    one = InStep([{"events": clock}], {"events": 2}, 320)
    lows = {A: 100, B: None}
    assert [one.differ(told, lows) for told in ({A: 100}, {A: 90}, {A: 89}, {A: None}, {})] == [
        False, False, True, True, True,
    ]  # fmt: skip
    assert one.differ({A: 100, B: 5}, lows)


def test_topics_of_no_group_pass_and_no_alignment_lets_all_pass() -> None:
    one = step((A, 10))
    found = records(1)
    assert one.offer("terminal", 0, found, 10, 1.0) is found
    free = InStep([{"events": clock}], {"events": 2}, 0)
    free.start({A: 0}, {A: 10}, 0.0)
    assert free.offer(*A, found, 10, 1.0) is found
    assert (free.take(1.0), free.lows(99.0), free.shared) == ({}, {}, False)


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
    assert len(one.take(1.0)[A]) == 4
    one.handled(*A, 3)
    assert one.lows(LAGGING_S) == {A: 5}


def test_what_is_told_to_others_is_what_was_handled() -> None:
    one = step((A, 100))
    assert one.lows(0.0) == {A: NULL}, "it begins behind"
    one.offer(*A, records(5, 8, 90), 100, 1.0)
    one.hear(B, 0, 1.0)
    assert times(one.take(1.0)) == {A: [5, 8]}
    assert one.lows(1.0) == {A: 5}, "on its way"
    one.handled(*A, 1)
    assert one.lows(1.0) == {A: 90}, "none to come is before the one that waits"
    one.offer(*A, records(95, at=3), 4, 2.0)
    one.hear(B, None, 2.0)
    one.take(2.0)
    assert one.lows(2.0) == {A: 90}, "at its end, but not through with it"
    one.handled(*A, 3)
    assert one.lows(2.0) == {A: None}
    one.offer(*A, records(99, at=4), 6, 3.0)
    assert one.lows(3.0) == {A: None}, "behind for a moment"
    assert one.lows(3.0 + LAGGING_S) == {A: 99}


@given(
    st.lists(st.lists(st.integers(0, 300), max_size=30), min_size=3, max_size=3),
    st.lists(st.tuples(st.integers(0, 2), st.integers(1, 6)), max_size=60),
)
def test_nothing_is_lost_and_nobody_is_ahead(logs: list[list[int]], polls: list[tuple[int, int]]) -> None:
    """Two workers, one with partitions 0 and 1, one with 2, that tell each other how far they are."""
    logs = [list(accumulate(log, max)) for log in logs]  # a record counts as no earlier than those before it
    places = [("events", p) for p in range(3)]
    workers = [InStep([{"events": clock}], {"events": 3}, ALIGNMENT) for _ in range(2)]
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
            for place, low in other.lows(now).items():
                worker.hear(place, low, now)
            taken = worker.take(now)
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
