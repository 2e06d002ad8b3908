"""What a look at a system says, judged on figures made by hand."""

from dataclasses import replace

import msgspec

from app import diagnosis, doctor
from app.diagnosis import Copy, Event, Hole, Row, Stored, Tail
from app.kafka import Group, Member, Span, wanted_topics
from models.canary import Canary
from models.pipeline import Pipeline
from models.predictions import Origin, Prediction
from tables.mirror import Mirrored
from tests.fixtures.pipelines import shop

SHOP = shop()
FIRST, LAST = SHOP.entities[0], SHOP.entities[-1]


def verdicts(rows: list[Row]) -> list[tuple[str, str]]:
    return [(row.what, row.verdict) for row in rows]


def kept(pipeline: Pipeline, **changes: dict[str, str]) -> dict[str, dict[str, str]]:
    configs = {
        name: {"cleanup.policy": "delete", "retention.ms": str(keep)}
        if keep
        else {"cleanup.policy": "compact"}
        for name, keep in wanted_topics(pipeline).items()
    }
    return configs | changes


def test_topics() -> None:
    counts = dict.fromkeys(wanted_topics(SHOP), 4)
    assert verdicts(diagnosis.topics(SHOP, counts, kept(SHOP))) == [("", "ok")]
    assert verdicts(diagnosis.topics(SHOP, counts | {LAST.log: 0}, kept(SHOP))) == [(LAST.log, "wrong")]
    for out in (SHOP.predictions, SHOP.shadow):
        few = diagnosis.topics(SHOP, counts | {out: 3}, kept(SHOP))
        assert verdicts(few) == [(out, "wrong")]
    for name, config, verdict in (
        (FIRST.log, {"cleanup.policy": "delete", "retention.ms": "3600000"}, "warn"),
        (FIRST.log, {"cleanup.policy": "delete", "retention.ms": "-1"}, "ok"),
        (FIRST.log, {"cleanup.policy": "compact"}, "wrong"),
        (SHOP.control, {"cleanup.policy": "delete"}, "warn"),
    ):
        rows = diagnosis.topics(SHOP, counts, kept(SHOP) | {name: config})
        assert [row.verdict for row in rows] == [verdict], config


def test_group() -> None:
    counts = {"a": 2, "b": 2}
    one = Member("/10.0.0.1", {"a": [0], "b": [0]})
    two = Member("/10.0.0.2", {"a": [1], "b": [1]})
    assert verdicts(diagnosis.group(counts, Group("Stable", [one, two]))) == [("", "ok")]
    assert verdicts(diagnosis.group(counts, Group("Empty", []))) == [("", "warn")]
    assert verdicts(diagnosis.group(counts, Group("PreparingRebalance", [one]))) == [("", "warn")]
    lone = diagnosis.group(counts, Group("Stable", [one]))
    assert verdicts(lone) == [("a/1", "wrong"), ("b/1", "wrong")]
    parted = [Member("/x", {"a": [0, 1]}), Member("/y", {"b": [0, 1]})]
    assert verdicts(diagnosis.group(counts, Group("Stable", parted))) == [
        ("number 0", "wrong"), ("number 1", "wrong"),
    ]  # fmt: skip


def test_lag() -> None:
    spans = [Span("a", 0, 10, 20), Span("a", 1, 0, 5)]
    (row,) = diagnosis.lag(spans, {("a", 0): 12})
    assert (row.verdict, row.seen) == ("ok", "a 13")
    assert verdicts(diagnosis.lag(spans, {("a", 0): 21, ("a", 1): 5})) == [("a/0", "wrong")]
    assert verdicts(diagnosis.lag(spans, {("a", 0): 9})) == [("a/0", "wrong")]


def test_stores() -> None:
    at, spans = (FIRST.log, 0), {(FIRST.log, 0): Span(FIRST.log, 0, 10, 20)}
    for position, workers, verdict in (
        (10, 0, "ok"),
        (20, 1, "ok"),
        (21, 1, "wrong"),
        (9, 0, "wrong"),
        (9, 1, "warn"),
    ):
        rows = diagnosis.stores(SHOP, spans, {at: Stored(position)}, workers)
        assert [row.verdict for row in rows] == [verdict], (position, workers)
    gone = diagnosis.stores(SHOP, spans, {(FIRST.log, 7): Stored(1)}, 1)  # a partition that the log has not
    assert verdicts(gone) == [(f"{FIRST.name}/7", "wrong")]


def test_disk() -> None:
    assert diagnosis.disk(10**12, 10**11, {"old": 5_000_000})[0].verdict == "ok"
    assert "5 MB are of 1 older" in diagnosis.disk(10**12, 10**11, {"old": 5_000_000})[0].seen
    assert diagnosis.disk(10**12, 10**10, {})[0].verdict == "warn"
    assert diagnosis.disk(10**10, 10**9, {})[0].verdict == "warn"


def test_events_without_a_prediction() -> None:
    events = [Event(offset, 100 + offset, offset) for offset in range(10)]
    whole = Tail(frozenset(range(8)), frozenset(), 0, True)
    assert diagnosis.unpredicted(events, whole) == ([8, 9], [])
    assert diagnosis.unpredicted(events, replace(whole, ids=frozenset({108, 109}))) == ([], [])  # sent again
    # of a longer topic: what is older than the tail is not judged, and an old event may have come twice
    part = Tail(frozenset({5, 6, 7}), frozenset(), 8, False)
    assert diagnosis.unpredicted(events, part) == ([9], [8])
    assert diagnosis.unpredicted(events, Tail(frozenset(), frozenset(), 0, False)) == ([], [])


def test_predictions() -> None:
    log = {0: Span(LAST.log, 0, 0, 8)}
    tail = Tail(frozenset(range(8)), frozenset(), 0, True)
    assert verdicts(diagnosis.predictions(log, {0: tail}, {0: [Event(7, 1, 1)]})) == [("", "ok")]
    beyond = replace(tail, origins=frozenset(range(9)))
    assert verdicts(diagnosis.predictions(log, {0: beyond}, {})) == [("partition 0", "wrong")]
    for lost, remedy in ((8, "remove this partition's stores"), (3, "new instance")):
        holed = replace(tail, origins=frozenset(range(8)) - {lost})
        (row,) = diagnosis.predictions(
            log, {0: holed}, {0: [Event(n, n, n) for n in range(9) if n in (lost, 7)]}
        )
        assert row.verdict == "wrong" and remedy in row.remedy


def test_a_canary() -> None:
    (decides,) = diagnosis.canary("m2", Canary(5, 1))
    assert (decides.verdict, decides.seen) == ("ok", "canary m2 decides for 5 % of the entities")
    (over,) = diagnosis.canary("m2", Canary(5, 1, "latency", "The canary m2 took long.", 2))
    assert (over.verdict, over.seen) == ("warn", "taken back: The canary m2 took long.")


def test_the_latest_prediction() -> None:
    made = Prediction(1, 1, 0.5, "pass", SHOP.name, "m1", SHOP.definition, False, Origin(0, 0))
    assert diagnosis.latest(SHOP, made, "m1") == diagnosis.latest(SHOP, None, "m1") == []
    assert verdicts(diagnosis.latest(SHOP, made, "m2")) == [("model", "warn")]
    (unscored,) = diagnosis.latest(SHOP, msgspec.structs.replace(made, version=None), "m1")
    assert unscored.seen == "the latest is without a model, the champion is m1"
    older = msgspec.structs.replace(made, definition="0")
    assert verdicts(diagnosis.latest(SHOP, older, "m1")) == [("definition", "warn")]


def test_mirror() -> None:
    good = Mirrored(1, 5, SHOP.definition, 0, {})
    spans = {"a": Span(FIRST.log, 0, 0, 6)}
    assert diagnosis.mirror(SHOP, FIRST, spans, {"a": good}) == []
    for bad in (None, replace(good, offset=6), replace(good, definition="0")):
        assert verdicts(diagnosis.mirror(SHOP, FIRST, spans, {"a": bad})) == [(FIRST.name, "wrong")]
    assert diagnosis.mirror_differs(SHOP, FIRST, [], True) == []
    assert verdicts(diagnosis.mirror_differs(SHOP, FIRST, ["a"], True)) == [(FIRST.name, "warn")]
    assert verdicts(diagnosis.mirror_differs(SHOP, FIRST, ["a"], False)) == [(FIRST.name, "wrong")]


def test_checkpoints() -> None:
    spans, at = {(FIRST.log, 0): Span(FIRST.log, 0, 0, 50)}, (FIRST.log, 0)
    for copy, reached, workers, verdict in (
        (Copy(FIRST.name, 0, 40, 900.0), 40, 1, "ok"),  # nothing has come since
        (Copy(FIRST.name, 0, 40, 900.0), 45, 1, "warn"),
        (Copy(FIRST.name, 0, 40, 900.0), 45, 0, "ok"),
        (Copy(FIRST.name, 0, 51, 1.0), 45, 1, "wrong"),
    ):
        rows = diagnosis.checkpoints(SHOP, spans, {at: reached}, [copy], 60.0, workers)
        assert [row.verdict for row in rows] == [verdict], copy


def test_holes() -> None:
    hole, at = Hole(LAST.log, 1, 4, 70, 1_000, 60_000), (LAST.log, 1)
    for stored, workers, now, verdict in (
        ({}, 1, 61_000, "wrong"),
        ({}, 1, 90_000, "ok"),  # nobody asks any more
        ({}, 0, 90_000, "wrong"),
        ({at: Stored(9, {4: 70})}, 0, 61_000, "wrong"),
        ({at: Stored(9, {4: 71})}, 1, 61_000, "ok"),  # it came
        ({at: Stored(9, {4: -73})}, 1, 61_000, "ok"),  # retention has cut it, and it is waited for no more
    ):
        rows = diagnosis.holes([hole], stored, workers, now, 15_000)
        assert [row.verdict for row in rows] == [verdict], (stored, workers, now)


def test_rows_alike_are_one_line() -> None:
    rows = [Row("stores", f"customer/{p}", "wrong", "is beyond", "as it says") for p in range(3)]
    rows += [Row(check, "", "skipped", "not looked at") for check in ("topics", "group")]
    assert doctor.shown(rows) == [
        ("wrong", "stores", "customer/0 is beyond (and 2 more alike)", "as it says"),
        ("skipped", "topics, group", "not looked at", ""),
    ]
