"""The judgement of a chaos run finds what is planted; the schedule and the load are those of their seed."""

import asyncio
from collections import Counter
from dataclasses import replace

import msgspec
import numpy as np
import pytest

from app import audit, faults, replay, traffic, verify
from app.chaos import outages, together
from models.errors import HeadraceError
from models.events import EventDecoder
from models.history import History
from models.partitions import partition_of
from models.pipeline import Pipeline
from models.predictions import Origin, Prediction
from models.windows import Floats
from tests.fixtures.pipelines import shop

EVENTS = 6


def score(vectors: Floats) -> Floats:
    return np.nansum(vectors, axis=1) / 100


@pytest.fixture
def pipeline() -> Pipeline:
    return shop()


@pytest.fixture
def expected(pipeline: Pipeline) -> verify.Expected:
    """What the logs say of six events, which lie in one partition of each log."""
    vectors = np.arange(EVENTS * len(pipeline.vector), dtype=np.float64).reshape(EVENTS, -1)
    places = np.array([[[0, i], [0, 2 * i]] for i in range(EVENTS)])
    return verify.Expected(np.arange(EVENTS), vectors, places, [], 0)


def served(pipeline: Pipeline, expected: verify.Expected) -> list[audit.Served]:
    """The predictions of these events, as they should be."""
    scores = score(expected.vectors).tolist()
    return [
        audit.Served(
            0, i,
            Prediction(
                i, 0, scores[i], "", "", "", "", False, Origin(0, 2 * i),
                dict(zip(pipeline.vector, expected.vectors[i].tolist(), strict=True)),
            ),
        )
        for i in range(EVENTS)
    ]  # fmt: skip


def judged(pipeline: Pipeline, expected: verify.Expected, predictions: list[audit.Served]) -> audit.Findings:
    findings = audit.Findings()
    in_order = [replace(one, offset=i) for i, one in enumerate(predictions)]
    audit.judge(pipeline, expected, in_order, set(range(EVENTS)), score, findings)
    return findings


def test_nothing_is_found_where_nothing_is_wrong(pipeline: Pipeline, expected: verify.Expected) -> None:
    assert judged(pipeline, expected, served(pipeline, expected)).named == []


def test_a_score_is_asked_for_only_where_there_was_a_model(
    pipeline: Pipeline, expected: verify.Expected
) -> None:
    predictions = served(pipeline, expected)
    none = dict.fromkeys(("score", "decision", "model", "version"))
    bare = msgspec.structs.replace(predictions[2].prediction, **none)
    predictions[2] = replace(predictions[2], prediction=bare)
    assert judged(pipeline, expected, predictions).named == []
    lacking = msgspec.structs.replace(predictions[3].prediction, score=None)
    predictions[3] = replace(predictions[3], prediction=lacking)
    assert judged(pipeline, expected, predictions).counts == {"differing": 1}


def test_a_lost_prediction_is_found(pipeline: Pipeline, expected: verify.Expected) -> None:
    predictions = served(pipeline, expected)
    del predictions[3]
    findings = judged(pipeline, expected, predictions)
    assert findings.counts == {"lost": 1}
    assert findings.named == [{"finding": "lost", "id": 3, "logs": [[0, 3], [0, 6]], "dropped": None}]


def test_an_event_that_never_reached_the_logs_is_lost(pipeline: Pipeline, expected: verify.Expected) -> None:
    findings = audit.Findings()
    audit.judge(pipeline, expected, served(pipeline, expected), {0, 77}, score, findings)
    assert [f["id"] for f in findings.named] == [77]


def test_a_prediction_that_the_consumers_rule_drops_is_lost(
    pipeline: Pipeline, expected: verify.Expected
) -> None:
    predictions = served(pipeline, expected)
    predictions[2], predictions[3] = predictions[3], predictions[2]
    findings = judged(pipeline, expected, predictions)
    assert findings.counts == {"lost": 1}
    assert findings.named[0]["dropped"]["offset"] == 3


def test_a_prediction_that_is_sent_again_is_doubled_only_plainly(
    pipeline: Pipeline, expected: verify.Expected
) -> None:
    predictions = served(pipeline, expected)
    findings = judged(pipeline, expected, [*predictions[:4], predictions[2], *predictions[4:]])
    assert findings.counts == {"doubled_plain": 1}
    assert (findings.named[0]["id"], findings.named[0]["offset"]) == (2, 4)


def test_a_doubled_prediction_of_another_origin_is_found(
    pipeline: Pipeline, expected: verify.Expected
) -> None:
    predictions = served(pipeline, expected)
    again = msgspec.structs.replace(predictions[5].prediction, origin=Origin(0, 99))
    findings = judged(pipeline, expected, [*predictions, audit.Served(0, 0, again)])
    assert findings.counts == {"doubled": 1, "doubled_plain": 1, "differing": 1}


@pytest.mark.parametrize("what", ["feature", "score", "origin", "id"])
def test_a_differing_prediction_is_found(pipeline: Pipeline, expected: verify.Expected, what: str) -> None:
    predictions = served(pipeline, expected)
    right = predictions[4].prediction
    bit = float(np.nextafter(right.features["SHOP_RISK"], np.inf))
    wrong = {
        "feature": {"features": right.features | {"SHOP_RISK": bit}},
        "score": {"score": float(np.nextafter(right.score, 1e9))},
        "origin": {"origin": Origin(0, 7)},
        "id": {"id": 1234},
    }[what]
    predictions[4] = audit.Served(0, 4, msgspec.structs.replace(right, **wrong))
    findings = judged(pipeline, expected, predictions)
    assert findings.counts["differing"] == 1
    found = next(f for f in findings.named if f["finding"] == "differing")
    assert (found["partition"], found["offset"]) == (0, 4)
    if what == "feature":
        assert found["features"] == {"SHOP_RISK": {"served": bit, "folded": right.features["SHOP_RISK"]}}


def test_ten_of_a_sort_are_named_and_all_are_counted() -> None:
    findings = audit.Findings()
    for number in range(25):
        findings.add("lost", id=number)
    assert (findings.counts["lost"], len(findings.named)) == (25, audit.NAMED)


# --- the schedule ------------------------------------------------------------------------------

ALL = list(faults.KINDS)


@pytest.mark.parametrize("seed", range(50))
def test_every_kind_of_fault_comes_within_five_minutes(seed: int) -> None:
    plan = faults.plan(300, ALL, seed)
    assert {f.kind for f in plan} == set(ALL)
    assert plan == faults.plan(300, ALL, seed)
    assert len(faults.plan(600, ALL, seed)) >= 20


@pytest.mark.parametrize("seed", range(50))
def test_there_are_two_to_four_workers_at_all_times(seed: int) -> None:
    workers = faults.FEWEST
    for fault in faults.plan(1800, ALL, seed):
        workers += {"worker_added": 1, "worker_removed": -1}.get(fault.kind, 0)
        assert faults.FEWEST <= workers <= faults.MOST


def test_a_gap_is_of_the_fault_that_it_begins_with() -> None:
    quiet = [t / 10 for t in range(1000)]
    came = [t for t in quiet if not 20 < t < 32.05]
    found = outages(
        [("add", 12.0), ("kill", 20.05), ("pause", 30.0), ("wipe", 60.0)], {0: came, 1: quiet}, 100.0
    )
    assert found["kill"] == {"n": 1, "median": 11.95, "max": 11.95}
    assert found["add"]["max"] == found["pause"]["max"] == found["wipe"]["max"] == 0.0


# --- the load ----------------------------------------------------------------------------------


def tape(pipeline: Pipeline, first_id: int, first_time: int, count: int) -> replay.Tape:
    """One event a minute, of ten customers; each has its label 5 minutes later."""
    ids, times = first_id + np.arange(count), first_time + 60_000 * np.arange(count)
    events = [
        {"ID": i, "AT": t, "CUSTOMER": i % 10, "SHOP": "north", "AMOUNT": 1.0}
        for i, t in zip(ids.tolist(), times.tolist(), strict=True)
    ]
    labels = [e | {"RETURNED": 0, "KNOWN": e["AT"] + 300_000} for e in events]
    order = np.argsort(np.concatenate([times + 300_000, times]), kind="stable")
    keys = [str(e["ID"]).encode() for e in events] + [str(e["CUSTOMER"]).encode() for e in events]
    values = [msgspec.json.encode(e) for e in labels + events]
    rows = np.tile(np.arange(count), 2)
    history = History(times, ids, np.empty((count, 0), np.int64), {}, None, np.zeros(count, np.int64))
    picks = order.tolist()
    return replay.Tape(
        history, rows[order], order < count, [keys[i] for i in picks], [values[i] for i in picks]
    )


def test_the_load_has_everything_and_tells_what_of_it_is_good(pipeline: Pipeline) -> None:
    start = 1_600_000_000_000
    base = tape(pipeline, 10_000, start, 8000)
    spare = tape(pipeline, 0, start - 10**10, 400)
    load = traffic.mix(base, spare, pipeline, 4, 100.0, 5)
    again = traffic.mix(base, spare, pipeline, 4, 100.0, 5)
    assert (load.tape.keys, load.tape.values) == (again.tape.keys, again.tape.values)
    assert set(load.kinds) == {
        "event", "doubled", "doubled much later", "late", "too late", "malformed", "label", "label flipped",
        "label early", "label twice",
    }  # fmt: skip
    # What a worker would take of the stream, each once, is what must be predicted.
    good, bad = set(), Counter()
    decoder = EventDecoder(pipeline, pipeline.stream)
    for key, value, is_label in zip(load.tape.keys, load.tape.values, load.tape.is_label, strict=True):
        if is_label:
            continue
        batch, kept, _ = decoder.decode([value], np.array([start + 10**10]))
        home = len(kept) and partition_of(str(batch.keys[0]).encode(), 4) == partition_of(key or b"", 4)
        if home:
            good.add(int(batch.ids[0]))
        else:
            bad[pipeline.stream.topic, value] += 1
    assert good == load.valid
    assert bad == Counter({k: n for k, n in load.malformed.items() if k[0] == pipeline.stream.topic})
    assert len(load.valid) == 8000 + load.kinds["too late"]


def test_an_event_that_comes_twice_is_known_still(pipeline: Pipeline) -> None:
    """Its second coming is within half of what the first entity remembers, and behind the first."""
    start = 1_600_000_000_000
    base = tape(pipeline, 0, start, 40_000)  # a month of events, at a thousand a second
    load = traffic.mix(base, tape(pipeline, 10**6, start - 10**10, 400), pipeline, 4, 1000.0, 6)
    newest, first_seen, apart = 0, dict[bytes, int](), []
    for value, is_label in zip(load.tape.values, load.tape.is_label, strict=True):
        if is_label or (topic_value := (pipeline.stream.topic, value)) in load.malformed:
            continue
        if value in first_seen:
            apart.append(newest - first_seen[value])
            continue
        first_seen[topic_value[1]] = msgspec.json.decode(value)["AT"]
        newest = max(newest, first_seen[value])
    assert len(apart) == load.kinds["doubled"] + load.kinds["doubled much later"]
    assert max(apart) < pipeline.entities[0].retention


async def test_what_fails_beside_other_work_is_told_as_it_is() -> None:
    ended: list[str] = []

    async def fails() -> None:
        raise HeadraceError("The broker is away.")

    async def waits() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append("waits")

    with pytest.raises(HeadraceError, match=r"^The broker is away\.$"):
        await together(waits(), fails())
    assert ended == ["waits"]
