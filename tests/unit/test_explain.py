"""What is explained is what made the value: the oracle says the same of just these events."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models import oracle
from models.aggregates import KINDS, Aggregate
from models.explain import Event, Moment, UnknownFeature, View, asked, explain, look
from models.fields import Field, event_id
from models.pipeline import Entity, find
from models.windows import NEGATIVE, POSITIVE, UNKNOWN
from tests.conftest import PIPELINES
from tests.fixtures.histories import PROFILES, SPAN, Case, Entry, Truth, Worker, bits, cases, label

STATES = ("unknown", "negative", "positive")
FIELDS = {f"v{i}": Field(f"v{i}", "int") for i in range(2)}


def entity_of(case: Case, labelled: bool = True) -> Entity:
    names = tuple(
        name
        for k, a in enumerate(case.aggregates)
        for name in [f"f{k}", *(f"f{k}_{i}" for i in range(2, a.width + 1))]
    )
    values = tuple(f"v{i}" for i in range(case.columns))
    return Entity("one", ("KEY",), "log", names, values, (), tuple(case.aggregates), labelled, case.plan)


def moment(case: Case, history: list[Entry], profile: int, time: int, worker: Worker | None = None) -> Moment:
    worker = worker or Worker(case.plan)
    worker.run(history, [])
    return look(FIELDS, entity_of(case), worker.arena, worker.slot(profile), time, {})


def oracle_of(event: Event) -> oracle.Row:
    values = [None if v is None else int(v) for v in event.values.values()]
    assert isinstance(event.id, int)
    return oracle.Row(event.time, event.id, values, STATES.index(event.label or "unknown"))


def passes(row: oracle.Row, aggregate: Aggregate) -> bool:
    return aggregate.filter is None or bool(row.flags >> aggregate.filter & 1)


WITH_ROWS = cases().filter(lambda case: not case.hop)


@given(WITH_ROWS, st.integers(0, 50), st.integers(0, PROFILES - 1), st.integers(0, SPAN))
def test_the_events_that_are_explained_make_the_value(case: Case, cut: int, profile: int, back: int) -> None:
    """Folded by the oracle, they and nothing else, at any point of the log and at any time."""
    history = case.history[:cut]
    time = max((e.time for e in case.history), default=0) - back
    truth = Truth(case)
    truth.run(history)
    found = moment(case, history, profile, time)
    for k, aggregate in enumerate(case.aggregates):
        view = found.view(f"f{k}")
        until = time - aggregate.delay
        after = None if aggregate.window is None else until - aggregate.window
        assert (view.after, view.until) == (after, until)
        rows = [oracle_of(e) for e in view.events]
        known = [replace(r, flags=0) for r in truth.profiles[profile].rows if passes(r, aggregate)]
        assert rows == [r for r in known if (after is None or after < r.time) and r.time <= until]
        assert len(rows) + view.outside == len(truth.profiles[profile].rows)
        if after is not None:  # what counts for life may be of forgotten events
            alone = oracle.Profile([replace(aggregate, filter=None)], case.plan.retention, rows=rows)
            assert bits([view.value]) == bits(alone.read(time)[:1])


@given(WITH_ROWS, st.integers(0, 50), st.integers(0, PROFILES - 1))
def test_what_came_and_left_leads_from_then_to_now(case: Case, cut: int, profile: int) -> None:
    times = [max((e.time for e in part), default=0) for part in (case.history[:cut], case.history)]
    then = moment(case, case.history[:cut], profile, times[0])
    now = moment(case, case.history, profile, times[1])
    for k in range(len(case.aggregates)):
        told = explain(f"f{k}", then, now)
        changed = {(r.id, r.time): (r.before, r.now) for r in told.relabelled}
        stayed = [e for e in told.then.events if e not in told.left]
        relabelled = {
            (e.id, e.time): changed[e.id, e.time][1] if (e.id, e.time) in changed else e.label for e in stayed
        }
        relabelled |= {(e.id, e.time): e.label for e in told.came}
        assert relabelled == {(e.id, e.time): e.label for e in told.now.events}
        assert all(before != after for before, after in changed.values())


def test_every_kind_of_aggregate_has_its_bounds_and_events() -> None:
    history = [Entry(0, t, t, (t,)) for t in (10, 20, 30, 40)]
    for kind in KINDS.values():
        case = Case(1, [Aggregate(kind, 20, delay=10, number=1)], 100, history)
        told = moment(case, history, 0, 40)
        view = told.view("f0")
        assert (view.after, view.until, view.outside) == (10, 30, 2)
        assert [(e.id, e.values) for e in view.events] == [(20, {"v0": 20.0}), (30, {"v0": 30.0})]


def test_a_label_that_flips_and_an_event_that_comes_late_are_told() -> None:
    case = Case(0, [Aggregate(KINDS["share"], 20, delay=5)], 100, [])
    first = [Entry(0, 10, 1), Entry(0, 12, 2), label(0, 10, 1, NEGATIVE), Entry(0, 20, 3)]
    more = [label(0, 10, 1, POSITIVE), Entry(0, 14, 4), label(0, 14, 4, UNKNOWN), Entry(0, 36, 5)]
    worker = Worker(case.plan)
    then = moment(case, first, 0, 20, worker)
    now = moment(case, more, 0, 34, worker)  # reads (9, 29] where it read (-5, 15]
    told = explain("f0", then, now)
    assert (told.then.value, told.now.value) == (0.0, 0.25)
    assert [(r.id, r.before, r.now) for r in told.relabelled] == [(1, "negative", "positive")]
    assert [e.id for e in told.came] == [4, 3]
    assert told.left == []
    assert [e.id for e in moment(case, [], 0, 38, worker).view("f0").events] == [4, 3]


def test_ids_are_the_stream_s_and_values_in_their_own_unit() -> None:
    case = Case(1, [Aggregate(KINDS["mean"], 20, divisor=100)], 0, [])
    fields = {"v0": Field("v0", "decimal", divisor=100)}
    worker = Worker(case.plan)
    worker.run([Entry(0, 10, event_id("a"), (1250,)), Entry(0, 11, 7, (None,))], [])
    entity = entity_of(case, labelled=False)
    found = look(fields, entity, worker.arena, worker.slot(0), 11, {event_id("a"): "a"})
    assert found.view("f0").events == [
        Event("a", 10, {"v0": 12.5}, None), Event(7, 11, {"v0": None}, None),
    ]  # fmt: skip
    assert msgspec.json.encode(View(np.nan, 0, 1, [], 0)).startswith(b'{"value":null')


def test_a_profile_of_which_nothing_is_known() -> None:
    case = Case(0, [Aggregate(KINDS["count"], 20)], 0, [])
    view = moment(case, [], 0, 100).view("f0")
    assert (view.value, view.events, view.outside) == (0.0, [], 0)


def test_a_feature_that_there_is_not() -> None:
    pipeline = find("card-fraud", PIPELINES)
    customer, terminal = pipeline.entities
    assert asked(pipeline, customer, ()) == customer.features
    with pytest.raises(UnknownFeature, match="did you mean CUSTOMER_ID_NB_TX_1DAY_WINDOW"):
        asked(pipeline, customer, ("CUSTOMER_NB_TX_1DAY_WINDOW",))
    with pytest.raises(UnknownFeature, match="it is one of terminal"):
        asked(pipeline, customer, (terminal.features[0],))
    with pytest.raises(UnknownFeature, match="it has CUSTOMER_ID_NB"):
        asked(pipeline, customer, ("x",))
