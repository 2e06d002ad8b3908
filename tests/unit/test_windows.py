"""The kernel against the oracle, bit for bit; and what a profile costs in memory."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from models.aggregates import DECAYED, FOR_LIFE, IN_CELLS, KINDS, LISTS, OF_ROWS, Aggregate, plan
from models.windows import (
    CANCELLED,
    COUNT,
    DECAYED_COUNT,
    DISTINCT,
    DUPLICATE,
    EVENT,
    FIRST,
    FOLDED,
    HALVINGS,
    LABEL_EARLY,
    LABEL_STALE,
    LABELLED,
    LAST,
    LAST_K,
    LATE,
    MAX,
    MEAN,
    MIN,
    MOST_FREQUENT,
    NEGATIVE,
    NO_KEY,
    NULL,
    OUTCOMES,
    POSITIVE,
    QUANTILE,
    RATE,
    REVERSED,
    SHARE,
    SINCE_LAST,
    STDDEV,
    SUM,
    TAKEN_OUT,
    TOO_LATE,
    UNKNOWN,
    VARIANCE,
    Arena,
)  # fmt: skip
from tests.fixtures.histories import (
    CLOSE_GAPS,
    NOTHING,
    PROFILES,
    RESTART,
    SPAN,
    Break,
    Case,
    Entry,
    Truth,
    Worker,
    aggregates,
    bits,
    breaks,
    cases,
    label,
)  # fmt: skip

HOUR = 3_600_000
READS = st.lists(st.integers(-50, SPAN + 50), max_size=8)


# --- the kernel is the oracle ------------------------------------------------------------------


@given(cases(), breaks)
def test_features_and_outcomes_are_the_oracle_s(case: Case, stops: list[Break]) -> None:
    """However the log is cut into micro-batches, and wherever profiles are put away or all is restarted."""
    features, outcomes = Worker(case.plan).run(case.history, stops)
    expected, expected_outcomes = Truth(case).run(case.history)
    assert outcomes.tolist() == expected_outcomes.tolist()
    assert bits(features) == bits(expected)


@given(cases(), breaks, READS)
def test_reads_at_any_time_are_the_oracle_s(case: Case, stops: list[Break], reads: list[int]) -> None:
    worker, truth = Worker(case.plan), Truth(case)
    worker.run(case.history, stops)
    truth.run(case.history)
    start = min(e.time for e in case.history)
    times = np.array([start + t for t in reads for _ in range(PROFILES)], np.int64)
    slots = np.tile(worker.all_slots(), len(reads))
    read = worker.arena.read_at(slots, times)
    expected = [truth.profiles[p].read(start + t) for t in reads for p in range(PROFILES)]
    assert bits(read) == bits(np.array(expected, np.float64))
    newest = [truth.profiles[p].newest for p in range(PROFILES)]
    assert worker.arena.newest(worker.all_slots()).tolist() == [NULL if n is None else n for n in newest]


@given(cases(), breaks)
def test_equal_profiles_pack_to_equal_bytes(case: Case, stops: list[Break]) -> None:
    """The bytes are what the log says, and nothing of how it was cut: they are the oracle's."""
    worker, truth = Worker(case.plan), Truth(case)
    worker.run(case.history, stops)
    truth.run(case.history)
    packed = worker.arena.pack(worker.all_slots())
    assert packed == [truth.packed(p) for p in range(PROFILES)]
    assert worker.arena.pack(np.array([worker.arena.unpack(p) for p in packed])) == packed


def test_the_histories_hold_every_outcome() -> None:
    """Else the tests above would prove little: of two hundred histories, ten or more have each."""
    found: Counter[str] = Counter()

    @settings(max_examples=200, phases=[Phase.generate], database=None, derandomize=True)
    @given(cases())
    def look(case: Case) -> None:
        found.update({OUTCOMES[o] for o in Truth(case).run(case.history)[1]})

    look()
    assert {name: found[name] for name in OUTCOMES if found[name] < 10} == {}


# --- the rules, to be read ---------------------------------------------------------------------

COUNT_1H = [Aggregate(COUNT, HOUR)]
RISK = [Aggregate(COUNT, 10, delay=5), Aggregate(SHARE, 10, delay=5)]  # over (t - 15, t - 5]


def fold(aggregates: list[Aggregate], *history: Entry, columns: int = 0, lateness: int = 0) -> tuple[
    list[list[float]], list[str], Worker
]:  # fmt: skip
    """Features, outcomes by name, and the worker that folded."""
    case = Case(columns, aggregates, lateness, list(history))
    worker = Worker(case.plan)
    features, outcomes = worker.run(case.history, [])
    assert bits(features) == bits(Truth(case).run(case.history)[0])
    return features.tolist(), [OUTCOMES[o] for o in outcomes], worker


def test_a_window_is_open_at_its_old_end_and_closed_at_its_new_end() -> None:
    """A window of 10 with delay 5 is (t - 15, t - 5]."""
    _, _, worker = fold(RISK, Entry(0, 100, 1))
    slots = np.zeros(4, np.int64)
    read = worker.arena.read_at(slots, np.array([104, 105, 114, 115]))
    assert read[:, 0].tolist() == [0, 1, 1, 0]


def test_a_count_falls_to_zero_with_no_new_event() -> None:
    _, _, worker = fold(COUNT_1H, Entry(0, 1000, 1))
    read = worker.arena.read_at(np.zeros(2, np.int64), np.array([1000 + HOUR - 1, 1000 + HOUR]))
    assert read[:, 0].tolist() == [1, 0]


def test_of_equal_times_those_later_in_the_log_are_not_seen() -> None:
    features, outcomes, _ = fold(COUNT_1H, Entry(0, 5, 1), Entry(0, 5, 2), Entry(0, 5, 3))
    assert features == [[1], [2], [3]]
    assert outcomes == ["folded"] * 3  # a tie is not late


def test_a_late_event_sees_what_was_at_its_time_and_repairs_the_profile() -> None:
    features, outcomes, _ = fold(COUNT_1H, Entry(0, 10, 1), Entry(0, 30, 2), Entry(0, 20, 3), Entry(0, 30, 4))
    assert outcomes == ["folded", "folded", "late", "folded"]
    assert features == [[1], [2], [2], [4]]


def test_an_event_past_retention_is_scored_but_not_folded() -> None:
    features, outcomes, _ = fold(
        [Aggregate(COUNT, 10)], Entry(0, 100, 1), Entry(0, 85, 2), Entry(0, 86, 3), lateness=5
    )
    assert outcomes == ["folded", "too_late", "late"]
    assert features == [[1], [0], [1]]


def test_an_id_counts_once_within_retention_whatever_its_time() -> None:
    features, outcomes, _ = fold([Aggregate(COUNT, 10)], *[Entry(0, t, 7) for t in (100, 100, 95, 109, 110)])
    assert outcomes == ["folded", "duplicate", "duplicate", "duplicate", "duplicate"]
    assert [math.isnan(f[0]) for f in features] == [False, True, True, True, True]


def test_an_id_that_was_forgotten_is_new() -> None:
    _, outcomes, _ = fold([Aggregate(COUNT, 10)], Entry(0, 100, 7), Entry(0, 110, 8), Entry(0, 111, 7))
    assert outcomes == ["folded", "folded", "folded"]


def test_a_label_flips_and_becomes_unknown_again() -> None:
    states = [POSITIVE, NEGATIVE, POSITIVE, UNKNOWN]
    history = [Entry(0, 100, 1)]
    for n, state in enumerate(states):
        history += [label(0, 100, 1, state), Entry(0, 106, 10 + n)]
    features, outcomes, _ = fold(RISK, *history)
    assert [share for _, share in features[2::2]] == [1, 0, 1, 0]
    assert outcomes[1::2] == ["labelled"] * 4


def test_of_events_of_one_time_the_label_finds_its_own() -> None:
    ties = [Entry(0, 100, id) for id in (1, 2, 3)]
    for id in (1, 2, 3):
        _, outcomes, worker = fold(RISK, *ties, label(0, 100, id, POSITIVE))
        assert outcomes[-1] == "labelled"
        rows = np.frombuffer(worker.arena.pack(worker.all_slots()[:1])[0], "<i8")[3:].reshape(3, 2)
        assert {int(row[1]): int(row[0] % 4) for row in rows} == {1: 0, 2: 0, 3: 0} | {id: POSITIVE}


def test_a_label_waits_for_its_event_even_across_a_restart() -> None:
    worker = Worker(plan(RISK, [], 0))
    _, outcomes = worker.fold([label(0, 100, 1, NEGATIVE), label(0, 100, 1, POSITIVE), Entry(0, 99, 2)])
    assert [OUTCOMES[o] for o in outcomes] == ["label_early", "label_early", "folded"]
    worker.restart()
    worker.fold([Entry(0, 100, 1)])
    assert worker.arena.read_at(worker.all_slots()[:1], np.array([106])).tolist() == [[2, 0.5]]


def test_a_label_of_another_time_is_not_the_event_s() -> None:
    features, outcomes, _ = fold(RISK, Entry(0, 100, 1), label(0, 101, 1, POSITIVE), Entry(0, 106, 2))
    assert outcomes[1] == "label_early"
    assert features[2] == [1, 0]


def test_a_label_past_retention_is_stale() -> None:
    _, outcomes, worker = fold(RISK, Entry(0, 100, 1), label(0, 85, 9, POSITIVE), label(0, 86, 9, POSITIVE))
    assert outcomes[1:] == ["label_stale", "label_early"]
    # and one that waits is forgotten with the rows of its time
    worker.fold([Entry(0, 101, 2)])
    assert len(worker.arena.pack(worker.all_slots()[:1])[0]) == 8 * (3 + 2 * 2)


def test_profiles_of_one_batch_do_not_mix_and_what_has_no_key_is_in_none() -> None:
    features, outcomes, _ = fold(
        COUNT_1H, Entry(0, 1, 1), Entry(1, 2, 2), Entry(-1, 3, 3), Entry(0, 4, 2), Entry(1, 5, 1)
    )
    assert outcomes == ["folded", "folded", "no_key", "folded", "folded"]
    assert [f[0] for f in features[:2] + features[3:]] == [1, 1, 2, 2]
    assert math.isnan(features[2][0])


def test_absent_values_are_in_no_sum_and_no_mean() -> None:
    aggregates = [Aggregate(SUM, HOUR, value=0, divisor=100), Aggregate(MEAN, HOUR, value=0, divisor=100),
                  Aggregate(MEAN, HOUR, value=1), Aggregate(COUNT, HOUR)]  # fmt: skip
    features, _, worker = fold(
        aggregates,
        Entry(0, 1, 1, (None, None)),
        Entry(0, 2, 2, (150, None)),
        Entry(0, 3, 3, (50, 7)),
        columns=2,
    )
    assert features[2] == [2.0, 1.0, 7.0, 3.0]
    assert features[1][:2] == [1.5, 1.5] and math.isnan(features[1][2])
    assert features[0][0] == 0.0 and math.isnan(features[0][1])
    # a profile of which nothing is known has counts and sums of nothing, and no mean
    nobody = worker.arena.read_at(np.array([worker.arena.new()]), np.array([5]))[0]
    assert bits(nobody) == bits([0.0, math.nan, math.nan, 0.0])


def test_a_value_of_zero_is_not_absent() -> None:
    history = [Entry(0, 1, 1, (0,)), Entry(0, 2, 2, (None,)), Entry(0, 3, 3, (0,))]
    features, _, worker = fold([Aggregate(MEAN, HOUR)], *history, columns=1)
    assert features == [[0.0]] * 3
    worker.restart()
    assert worker.fold([Entry(0, 4, 4, (3,))])[0].tolist() == [[1.0]]


def test_sums_above_the_integers_of_float64_are_rounded_once() -> None:
    """The sum is exact in int64; its one rounding is the same in kernel and oracle."""
    aggregates = [Aggregate(SUM, HOUR, divisor=100), Aggregate(MEAN, HOUR, divisor=100)]
    history = [Entry(0, i, i, (2**46 - 1 - i,)) for i in range(1000)]
    features, _, _ = fold(aggregates, *history, columns=1)
    total = sum(2**46 - 1 - i for i in range(1000))
    assert total > 2**53
    assert features[-1] == [float(total) / 100, float(total) / 100_000]


def test_running_sums_may_pass_the_bounds_of_int64() -> None:
    """A profile that lives for long sums more than int64 holds; a window is a difference, and exact."""
    large = [Entry(0, 10 * i, i, (2**62,)) for i in range(8)]
    small = [Entry(0, 100 + i, 100 + i, (1,)) for i in range(3)]
    with np.errstate(over="ignore"):
        features, _, _ = fold([Aggregate(SUM, 3)], *large, *small, columns=1)
    assert [f[0] for f in features] == [2.0**62] * 8 + [1, 2, 3]


def test_a_plan_without_aggregates_still_finds_duplicates() -> None:
    features, outcomes, _ = fold([], Entry(0, 5, 1), Entry(0, 5, 1), Entry(0, 5, 2), Entry(0, 4, 3))
    assert features == [[]] * 4
    assert outcomes == ["folded", "duplicate", "folded", "too_late"]


# --- reversals ---------------------------------------------------------------------------------


def reversal(time: int, id: int) -> Entry:
    return label(0, time, id, REVERSED)


def test_a_reversal_takes_its_row_out_again() -> None:
    """Of equal times its own, from the middle of the profile, and its value from the sums behind it."""
    events = [Entry(0, 100, 1, (1,)), Entry(0, 105, 2, (2,)), Entry(0, 105, 3, (4,)), Entry(0, 109, 4, (8,))]
    features, outcomes, worker = fold(
        [Aggregate(SUM, 10), Aggregate(LAST, 10, delay=4)], *events, reversal(105, 2), Entry(0, 109, 5, (16,)),
        columns=1,
    )  # fmt: skip
    assert outcomes[-2:] == ["reversed", "folded"]
    assert features[-3::2] == [[15, 4], [29, 4]]
    assert worker.arena.rows(0).ids.tolist() == [1, 3, 4, 5]
    assert worker.arena.read_at(np.zeros(1, np.int64), np.array([109])).tolist() == [[29, 4]]


def test_what_was_reversed_is_over() -> None:
    """Its event is a duplicate, and labels and reversals of it change nothing, while its row would be there."""
    after = [
        Entry(0, 100, 7),
        Entry(0, 95, 7),
        label(0, 100, 7, POSITIVE),
        reversal(100, 7),
        Entry(0, 109, 8),
    ]
    features, outcomes, worker = fold([Aggregate(COUNT, 10)], Entry(0, 100, 7), reversal(100, 7), *after)
    assert outcomes == [
        "folded",
        "reversed",
        "duplicate",
        "duplicate",
        "label_stale",
        "label_stale",
        "folded",
    ]
    assert features[-1] == [1]
    worker.restart()
    _, then = worker.fold([Entry(0, 109, 7), Entry(0, 110, 9), Entry(0, 110, 7), reversal(100, 7)])
    assert [OUTCOMES[o] for o in then] == ["duplicate", "folded", "folded", "label_stale"]


def test_an_event_whose_reversal_came_before_is_scored_and_not_folded() -> None:
    """By the other events of its time: a count of its own window can be 0."""
    waiting = [reversal(100, 7), Entry(0, 99, 1), reversal(104, 8)]
    worker = Worker(plan([Aggregate(COUNT, 3)], [], 10))
    _, outcomes = worker.fold(waiting)
    assert [OUTCOMES[o] for o in outcomes] == ["label_early", "folded", "label_early"]
    worker.restart()
    came = [Entry(0, 104, 7), Entry(0, 104, 8), Entry(0, 104, 8), Entry(0, 101, 9), Entry(0, 100, 7)]
    features, outcomes = worker.fold(came)
    # 7 at another time than its reversal's is an event like any other, and then it is known
    assert [OUTCOMES[o] for o in outcomes] == ["folded", "cancelled", "duplicate", "late", "duplicate"]
    assert features[[0, 1, 3], 0].tolist() == [1, 1, 2]
    features, outcomes, _ = fold([Aggregate(COUNT, 3)], reversal(100, 7), Entry(0, 100, 7))
    assert (OUTCOMES[CANCELLED], [0]) == (outcomes[-1], features[-1])


@pytest.mark.parametrize("waits", [UNKNOWN, POSITIVE, REVERSED])
def test_of_what_waits_for_an_event_its_reversal_wins(waits: int) -> None:
    one, other = label(0, 100, 7, waits), reversal(100, 7)
    first = "label_stale" if waits == REVERSED else "label_early"
    assert fold(RISK, one, other, Entry(0, 100, 7))[1] == ["label_early", first, "cancelled"]
    assert fold(RISK, other, one, Entry(0, 100, 7))[1] == ["label_early", "label_stale", "cancelled"]


def test_the_profile_is_the_same_whether_a_reversal_comes_before_or_behind_its_event() -> None:
    """And so are the newest time, which stays, what it has made forgotten, and what was labelled."""
    before = [
        Entry(0, 90, 1, (1,)),
        Entry(0, 99, 2, (2,)),
        label(0, 99, 2, POSITIVE),
        label(0, 90, 9, POSITIVE),
    ]
    one = [Entry(0, 101, 7, (4,)), label(0, 101, 7, POSITIVE), reversal(101, 7)]
    behind = [Entry(0, 100, 3, (8,)), label(0, 91, 9, NEGATIVE)]
    aggregates = [Aggregate(SUM, None), Aggregate(SHARE, 5, delay=5)]
    packed, outcomes = set(), []
    for order in ((0, 1, 2), (0, 2, 1), (2, 0, 1), (1, 2, 0), (1, 0, 2), (2, 1, 0)):
        _, became, worker = fold(aggregates, *before, *(one[i] for i in order), *behind, columns=1)
        packed.update(worker.arena.pack(np.zeros(1, np.int64)))
        outcomes.append(became[-2:])
    assert len(packed) == 1
    assert outcomes == [["late", "label_stale"]] * 6


def test_a_reversal_of_what_is_forgotten_changes_nothing() -> None:
    features, outcomes, _ = fold(
        [Aggregate(COUNT, 10), Aggregate(COUNT, None)],
        Entry(0, 100, 7), Entry(0, 110, 8), reversal(100, 7), reversal(99, 5), Entry(0, 110, 9),
    )  # fmt: skip
    assert outcomes[2:] == ["label_stale", "label_stale", "folded"]
    assert features[-1] == [2, 3]


def test_a_cell_gives_nothing_back() -> None:
    """It has no ids: not even 0, with which its row is filled."""
    case = Case(0, [Aggregate(COUNT, 40)], 0, [Entry(0, 41, 0), reversal(40, 0), reversal(80, 1)], hop=4)
    worker = Worker(case.plan)
    _, outcomes = worker.run(case.history, [])
    assert (
        outcomes.tolist() == Truth(case).run(case.history)[1].tolist() == [FOLDED, LABEL_STALE, LABEL_STALE]
    )
    assert worker.fold([Entry(0, 42, 0)])[0].tolist() == [[2]]


def test_a_profile_without_rows_keeps_what_counts_for_life() -> None:
    """Its only row was taken out, and the others are forgotten."""
    worker = Worker(plan([Aggregate(SUM, None), Aggregate(COUNT, 10)], [True], 0))
    worker.fold([Entry(0, 100, 1, (3,)), Entry(0, 200, 2, (4,)), reversal(200, 2)])
    for then in (lambda: None, worker.arena.close_gaps, worker.restart):
        then()
        slot = np.array([worker.slot(0)])
        assert worker.arena.read_at(slot, np.array([200])).tolist() == [[3, 0]]
        assert worker.arena.newest(slot).tolist() == [200]
        assert len(worker.arena.rows(int(slot[0])).ids) == 0
    assert worker.fold([Entry(0, 200, 3, (5,))])[0].tolist() == [[8, 1]]


@given(st.data())
def test_a_history_with_reversals_is_the_history_without_their_events(data: st.DataObject) -> None:
    """While nothing is forgotten: rows, values at any time, and all features behind the last of them."""
    columns, filters = 2, 1
    chosen = data.draw(aggregates(columns, filters, 0))
    times = data.draw(st.lists(st.integers(0, SPAN), min_size=1, max_size=24))
    events = [Entry(0, t, id, (id, -t), flags=id % 2) for id, t in enumerate(times)]
    gone = data.draw(st.sets(st.sampled_from(range(len(events)))))
    labels = [
        label(0, times[id], id, POSITIVE) for id in data.draw(st.sets(st.sampled_from(range(len(events)))))
    ]
    records = [*events, *labels, *(reversal(times[id], id) for id in gone)]
    history = data.draw(st.permutations(records))
    asked = np.arange(-20, SPAN + 20)
    found = []
    for some in (history, [e for e in history if e.id not in gone]):
        worker = Worker(plan(chosen, [True] * columns, 10 * SPAN, filters))
        worker.run(some, data.draw(breaks))
        slots = np.zeros(len(asked), np.int64) + worker.slot(0)
        found.append((bits(worker.arena.read_at(slots, asked)), worker.arena.rows(worker.slot(0))))
    assert found[0][0] == found[1][0]
    for ours, theirs in zip(found[0][1], found[1][1], strict=True):
        assert ours.tolist() == theirs.tolist()


def test_what_was_reversed_is_remembered_for_as_long_as_a_row() -> None:
    """A profile whose events are all reversed, before they come or behind, takes the memory of its retention."""
    worker = Worker(plan([Aggregate(COUNT, 100)], [], 0))
    lives = [(Entry(0, i, i), reversal(i, i))[:: 1 if i % 2 else -1] for i in range(20_000)]
    worker.fold([e for pair in lives[:400] for e in pair])
    before, packed = worker.arena.nbytes, worker.arena.pack(np.zeros(1, np.int64))[0]
    worker.fold([e for pair in lives[400:] for e in pair])
    assert worker.arena.nbytes == before
    assert len(worker.arena.pack(np.zeros(1, np.int64))[0]) == len(packed) == 8 * (3 + 2 * 100)


# --- every aggregate ---------------------------------------------------------------------------


@pytest.mark.parametrize("hop", [0, 4])
def test_every_aggregate_on_dense_histories(hop: int) -> None:
    """All kinds at once, each with several windows, delays and filters, on histories where much happens."""
    found: dict[int, set[int]] = defaultdict(set)
    became: Counter[int] = Counter()
    for seed in range(6):
        case = dense(seed, hop)
        worker, truth = Worker(case.plan), Truth(case)
        features, outcomes = worker.run(
            case.history, [(37, RESTART), (50, CLOSE_GAPS), (20, 0), (61, RESTART)]
        )
        expected, expected_outcomes = truth.run(case.history)
        assert outcomes.tolist() == expected_outcomes.tolist()
        assert bits(features) == bits(expected)
        assert worker.arena.pack(worker.all_slots()) == [truth.packed(p) for p in range(PROFILES)]
        became.update(outcomes.tolist())
        for place, a in enumerate(one for one in case.aggregates for _ in range(one.width)):
            found[a.kind].update(bits(features[:, place]))
    few = {name: len(found[kind]) for name, kind in KINDS.items() if kind in found and len(found[kind]) < 10}
    assert few == {}, "else this would prove little"
    assert found.keys() == (IN_CELLS if hop else set(KINDS.values()))
    assert hop or min(became[outcome] for outcome in (LABELLED, TAKEN_OUT, CANCELLED)) >= 10


def dense(seed: int, hop: int) -> Case:
    """250 events of three profiles in 80 ms: late, tied, doubled, labelled, flipped, reversed, cancelled."""
    rng = np.random.default_rng(seed)
    aggregates = []
    for kind in KINDS.values():
        if hop and kind not in IN_CELLS:
            continue
        for chosen in (None, 0, 1):
            number = (
                int(rng.integers(1, 4)) if kind in LISTS | DECAYED | {RATE} else int(rng.integers(1, 10**6))
            )
            window = number * HALVINGS if kind in DECAYED else int(rng.integers(4, SPAN))
            window_or_life = None if kind in FOR_LIFE and rng.random() < 0.3 else window
            delay, value, divisor = (
                int(rng.choice([0, 3])),
                int(rng.integers(2)),
                1 if kind in OF_ROWS else 100,
            )
            aggregates.append(Aggregate(kind, window_or_life, delay, value, divisor, number, chosen))
    history = []
    states = [UNKNOWN, NEGATIVE, POSITIVE, POSITIVE, REVERSED]
    for n in range(250):
        time = max(0, n // 3 + int(rng.integers(-6, 1)))
        values = tuple(None if rng.random() < 0.2 else int(rng.integers(-9, 9)) for _ in range(2))
        event = Entry(
            int(rng.integers(PROFILES)), time, int(rng.integers(200)), values, flags=int(rng.integers(4))
        )
        history.append(event)
        if not hop:
            known = history[int(rng.integers(len(history)))]
            history.append(label(known.profile, known.time, known.id, int(rng.choice(states))))
        if not hop and rng.random() < 0.1:
            early = label(event.profile, event.time, event.id, int(rng.choice(states)))
            history.insert(int(rng.integers(max(0, len(history) - 9), len(history) - 1)), early)
    return Case(2, aggregates, 5, history, filters=2, hop=hop)


@given(st.lists(st.integers(-(2**46), 2**46) | st.integers(-3, 3), min_size=1, max_size=40))
def test_a_variance_is_exact_until_its_last_rounding(values: list[int]) -> None:
    """Against fractions of whole numbers, and so for values whose squares no float64 holds."""
    history = [Entry(0, i, i, (v,)) for i, v in enumerate(values)]
    features, _, _ = fold([Aggregate(VARIANCE, HOUR)], *history, columns=1)
    n = len(values)
    exact = Fraction(sum(v * v for v in values), n) - Fraction(sum(values), n) ** 2
    assert features[-1][0] == pytest.approx(float(exact), rel=1e-15)


def test_the_aggregates_of_a_small_history() -> None:
    """To be read: four payments of 1, 3, 3 and 5 at 0, 1, 2 and 4 s."""
    payments = [Entry(0, 1000 * t, t, (v,)) for t, v in ((0, 100), (1, 300), (2, 300), (4, 500))]

    def last(kind: int, number: int = 0, window: int | None = 10_000) -> list[float]:
        return fold([Aggregate(kind, window, divisor=100, number=number)], *payments, columns=1)[0][-1]

    assert last(VARIANCE) == [2.0]
    assert last(STDDEV) == [math.sqrt(2.0)]
    assert (last(FIRST), last(LAST), last(MIN), last(MAX)) == ([1.0], [5.0], [1.0], [5.0])
    assert last(LAST_K, 3) == [5.0, 3.0, 3.0]
    assert (last(DISTINCT), last(QUANTILE, 500_000), last(QUANTILE, 760_000)) == ([3.0], [3.0], [5.0])
    assert last(MOST_FREQUENT, 2) == [3.0, 1.0], "3 comes twice, and of the others 1 is the smallest"
    assert last(SUM, window=None) == [12.0]

    def rows(kind: int, number: int = 0, window: int = 10_000) -> float:
        return fold([Aggregate(kind, window, number=number)], *payments, columns=1)[0][-1][0]

    assert rows(SINCE_LAST) == 2.0, "the event itself is not before itself"
    assert rows(RATE, 1000) == 0.4
    assert rows(DECAYED_COUNT, 1000, 24_000) == 1 + 2**-2 + 2**-3 + 2**-4


def test_what_counts_for_life_outlives_its_rows() -> None:
    aggregates = [Aggregate(COUNT, None), Aggregate(SUM, None), Aggregate(COUNT, 10)]
    history = [Entry(0, 100 * i, i, (i,)) for i in range(9)]
    features, _, worker = fold(aggregates, *history, columns=1)
    assert features[-1] == [9, 36, 1]
    worker.restart()
    assert worker.fold([Entry(0, 1000, 99, (4,))])[0].tolist() == [[10, 40, 1]]


def test_a_cell_is_one_row_however_much_is_in_it() -> None:
    case = Case(1, [Aggregate(COUNT, 4000), Aggregate(SUM, 4000)], 0, [], hop=1000)
    worker = Worker(case.plan)
    features, _ = worker.fold([Entry(0, i, 7, (1,)) for i in range(10_000)])
    assert features[-1].tolist() == [4000, 4000], "from 6,000 to 9,999"
    assert len(worker.arena.pack(np.zeros(1, np.int64))[0]) < 300


# --- long profiles -----------------------------------------------------------------------------


def test_a_long_profile_knows_its_ids() -> None:
    """Through growth of its index, forgotten rows, a move of the arena, and a restart."""
    aggregates, n = [Aggregate(COUNT, 2000)], 3000
    case = Case(0, aggregates, 0, [])
    worker = Worker(case.plan)
    ids = np.random.default_rng(5).permutation(np.arange(-n // 2, n // 2)).tolist()
    history = [Entry(0, t, ids[t]) for t in range(n)]
    assert set(worker.fold(history)[1].tolist()) == {FOLDED}
    again = [Entry(0, n - 1, i) for i in ids[n - 2000 + 1 :]]
    for then in (lambda: None, worker.arena.close_gaps, worker.restart):
        then()
        assert set(worker.fold(again)[1].tolist()) == {DUPLICATE}
    # ids that were forgotten are new, and so is one that looks like a free place
    fresh = [Entry(0, n - 1, i) for i in (*ids[: n - 2000], NULL)]
    assert set(worker.fold(fresh)[1].tolist()) == {FOLDED}
    assert set(worker.fold(fresh)[1].tolist()) == {DUPLICATE}


def test_a_profile_that_was_long_and_is_again_knows_its_ids() -> None:
    worker = Worker(plan([Aggregate(COUNT, 1000)], [], 0))
    worker.fold([Entry(0, i, i) for i in range(400)])
    short = [Entry(0, 2000 + i, 1000 + i) for i in range(200)]  # the others are forgotten
    worker.fold(short)
    worker.fold([Entry(0, 2200 + i, 2000 + i) for i in range(200)])
    assert set(worker.fold([replace(e, time=2400) for e in short])[1].tolist()) == {DUPLICATE}


def test_a_profile_that_was_long_and_is_short_knows_its_ids() -> None:
    """Also those that came while it was long, through a restart and a move of the arena."""
    worker = Worker(plan([Aggregate(COUNT, 1000)], [], 0))
    ids = np.random.default_rng(3).integers(-(2**62), 2**62, 401).tolist()
    worker.fold([Entry(0, t, ids[t]) for t in range(400)])
    worker.fold([Entry(0, 1250, ids[400])])  # rows up to 250 are forgotten
    again = [Entry(0, 1250, i) for i in ids[251:]]
    for then in (lambda: None, worker.arena.close_gaps, worker.restart):
        then()
        assert set(worker.fold(again)[1].tolist()) == {DUPLICATE}
    assert set(worker.fold([Entry(0, 1250, i) for i in ids[:251]])[1].tolist()) == {FOLDED}


@pytest.mark.parametrize("seed", range(3))
def test_a_long_profile_with_reversals_is_the_oracle_s(seed: int) -> None:
    """Around the length from which it has an index, and well beyond, while rows come late and are forgotten."""
    rng = np.random.default_rng(seed)
    chosen = [
        Aggregate(SUM, 500),
        Aggregate(SHARE, 200, delay=9),
        Aggregate(LAST, 90, delay=2),
        Aggregate(SUM, None),
    ]
    history: list[Entry] = []
    for n in range(900):
        event = Entry(0, n + int(rng.integers(-20, 1)), n, (int(rng.integers(-9, 9)),))
        known = history[int(rng.integers(max(0, len(history) - 600), len(history)))] if history else event
        other = label(0, known.time, known.id, int(rng.choice([NEGATIVE, POSITIVE, REVERSED, REVERSED])))
        draw = rng.random()
        # few reversals, then as many as events, so that it is long, short and long again
        if draw < (0.9 if 350 < n < 600 else 0.2):
            history += [event, other]
        elif draw < 0.95:
            history += (
                [event, replace(known, kind=EVENT)]
                if known.kind == EVENT
                else [reversal(event.time, n), event]
            )
        else:
            history += [event]
    case = Case(1, chosen, 30, history)
    worker, truth = Worker(case.plan), Truth(case)
    features, outcomes = worker.run(
        history,
        [(311, NOTHING), (290, CLOSE_GAPS), (7, NOTHING), (240, RESTART), (150, CLOSE_GAPS), (1, RESTART)],
    )
    expected, expected_outcomes = truth.run(history)
    assert outcomes.tolist() == expected_outcomes.tolist()
    assert bits(features) == bits(expected)
    assert worker.arena.pack(worker.all_slots()[:1]) == [truth.packed(0)]
    became = Counter(outcomes.tolist())
    assert min(became[o] for o in (TAKEN_OUT, CANCELLED, LATE, DUPLICATE, LABEL_STALE)) >= 10, became


# --- memory ------------------------------------------------------------------------------------


def test_an_arena_grows_and_loses_nothing() -> None:
    """Rows, waiting labels and the table of profiles, each far beyond their first size."""
    labels = [label(0, 1000 + i, i, POSITIVE) for i in range(40)]
    events = [Entry(0, 1000 + i, i) for i in range(300)]
    others = [Entry(p, 1, p) for p in range(1, 200)]
    aggregates = [Aggregate(COUNT, 1000), Aggregate(SHARE, 1000, delay=1)]
    features, _, worker = fold(aggregates, *labels, *events, *others)
    assert features[len(labels) + 299] == [300, 40 / 299]
    assert all(f == [1, 0] for f in features[-199:])
    assert len(worker.slots) == 200


def test_unpacking_grows_the_arena_too() -> None:
    history = [label(0, 5000 + i, i, POSITIVE) for i in range(7)] + [Entry(0, i, i) for i in range(22)]
    _, _, worker = fold(RISK, *history, reversal(0, 0), reversal(9, 9), lateness=10_000)
    (packed,) = worker.arena.pack(np.zeros(1, np.int64))
    for rows in (1, 4, 16, 32, 40, 64):  # too small for the rows; for the waiting labels; for neither
        arena = Arena(worker.plan, rows)
        slots = np.array([arena.unpack(packed) for _ in range(3)])
        assert arena.pack(slots) == [packed] * 3
        arena.fold(*_one_event(slots[1]))
        assert arena.pack(slots[[0, 2]]) == [packed] * 2


def _one_event(slot: int) -> tuple[np.ndarray, ...]:
    return (
        np.array([slot]), np.zeros(1, np.int8), np.array([7]), np.array([777]),
        np.zeros((1, 0), np.int64), np.zeros(1, np.int8), np.zeros(1, np.int64),
    )  # fmt: skip


def test_what_is_freed_is_used_again() -> None:
    """Loading and putting away a thousand times takes the memory of once."""
    history = [label(0, 100 + i, 50 + i, POSITIVE) for i in range(6)] + [Entry(0, i, i) for i in range(30)]
    _, _, worker = fold(RISK, *history, lateness=1000)
    before = worker.arena.nbytes
    for _ in range(1000):
        worker.put_away(0)
        worker.slot(0)
    assert worker.arena.nbytes == before
    assert worker.slots == {0: 0}


def test_what_was_outgrown_is_used_again() -> None:
    """Sixty profiles of 20 rows, then of 20 waiting labels, in chunks of 32: those of 4, 8 and 16 are shared."""
    for entries in ([Entry(0, i, i) for i in range(20)], [label(0, i, i, POSITIVE) for i in range(20)]):
        worker = Worker(plan([Aggregate(COUNT, 1000)], [], 0))
        for profile in range(60):
            worker.fold([replace(e, profile=profile) for e in entries])
        assert worker.arena.nbytes == Arena(worker.plan, 2048).nbytes


def test_what_did_not_fit_is_used_again() -> None:
    """20 rows find a chunk of 32, 9 waiting labels none of 16: the arena grows once, and wastes nothing."""
    history = [label(0, 5000 + i, i, POSITIVE) for i in range(9)] + [Entry(0, i, i) for i in range(20)]
    _, _, worker = fold(RISK, *history, lateness=10_000)
    arena = Arena(worker.plan, 32)
    arena.unpack(worker.arena.pack(np.zeros(1, np.int64))[0])
    assert arena.nbytes == Arena(worker.plan, 64).nbytes


def test_memory_follows_what_is_in_use() -> None:
    """Many small profiles, some of them freed, then few large ones: chunks of one size become the other's."""
    worker = Worker(plan([Aggregate(COUNT, 10**6)], [], 0))
    arena, n = worker.arena, 30_000
    worker.fold([Entry(p, p, p) for p in range(n)])
    full, kept = arena.nbytes, np.arange(0, n, 10)
    before = arena.pack(kept)
    assert arena.used <= full <= arena.used * 1.2
    arena.free(np.setdiff1d(np.arange(n), kept))
    assert arena.nbytes < full  # given back, but for the table
    assert arena.pack(kept) == before
    large = [Entry(n + i % 300, i, i) for i in range(300 * 250)]
    worker.fold(large)
    assert arena.nbytes <= full * 1.2
    assert arena.pack(kept) == before


def test_a_freed_slot_comes_back_empty() -> None:
    _, _, worker = fold(RISK, label(0, 100, 9, POSITIVE), Entry(0, 90, 1), Entry(0, 91, 2))
    arena = worker.arena
    arena.free(np.array([0]))
    slot = np.array([arena.new()])
    assert slot.tolist() == [0]
    assert arena.newest(slot).tolist() == [NULL]
    assert arena.pack(slot) == arena.pack(np.array([Arena(worker.plan).new()]))
    assert arena.read_at(slot, np.array([96])).tolist() == [[0, 0]]


def test_forgotten_rows_make_room() -> None:
    """A profile that lives for ever takes the memory of its retention."""
    aggregates = [Aggregate(COUNT, 100)]
    worker = Worker(plan(aggregates, [], 0))
    worker.fold([Entry(0, i, i) for i in range(400)])
    before = worker.arena.nbytes
    features, _ = worker.fold([Entry(0, i, i) for i in range(400, 20_000)])
    assert worker.arena.nbytes == before
    assert set(features[:, 0].tolist()) == {100}


def test_nothing_packs_to_nothing() -> None:
    worker = Worker(plan(COUNT_1H, [], 0))
    assert worker.arena.pack(np.zeros(0, np.int64)) == []
    features, outcomes = worker.fold([])
    assert features.shape == (0, 1) and outcomes.shape == (0,)


@pytest.mark.parametrize(
    ("aggregates", "lateness", "retention"),
    [
        ([Aggregate(COUNT, 10), Aggregate(SHARE, 5, delay=20)], 7, 32),
        ([Aggregate(COUNT, 10)], 0, 10),
        ([], 7, 7),
        ([], 0, 1),
    ],
)
def test_retention_is_the_longest_reach_and_the_lateness(
    aggregates: list[Aggregate], lateness: int, retention: int
) -> None:
    assert plan(aggregates, [], lateness).retention == retention


def test_outcomes_have_the_codes_of_their_names() -> None:
    codes = (
        FOLDED, LATE, TOO_LATE, DUPLICATE, NO_KEY, LABELLED, LABEL_EARLY, LABEL_STALE, TAKEN_OUT, CANCELLED,
    )  # fmt: skip
    assert [OUTCOMES[c] for c in codes] == [
        "folded", "late", "too_late", "duplicate", "no_key", "labelled", "label_early", "label_stale", "reversed",
        "cancelled",
    ]  # fmt: skip
