"""What a look at a system says: judgements over what its parts hold, without asking any of them.

Each function takes what was seen of one thing and returns rows: what is not as it should be, or one row
that says that it is. What is compared was read in an order that makes it comparable (`app.doctor`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from app import verify
from app.kafka import Group, Place, Span, wanted_topics
from models.canary import Canary
from models.pipeline import Entity, Pipeline
from models.predictions import Prediction
from models.windows import NULL, Arena
from tables.mirror import Mirrored

LEAST_FREE = 2**30  # bytes, and
LEAST_FREE_SHARE = 0.05  # of the disk: below either RocksDB may soon find no room to compact
STALE_PERIODS = 10  # of checkpoints, without one of a store that moved
NAMED = 3  # of many alike

Verdict = Literal["ok", "warn", "wrong", "skipped"]


@dataclass(frozen=True)
class Row:
    """What was looked at, what of it, and what was seen; a remedy unless all is well."""

    check: str
    what: str
    verdict: Verdict
    seen: str
    remedy: str = ""


@dataclass(frozen=True)
class Stored:
    """The newest store of a partition here. seen: as in tables.store.Progress; profiles: those asked for."""

    position: int
    seen: Mapping[int, int] = field(default_factory=dict)
    profiles: Mapping[bytes, bytes | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Event:
    """An event of the last log that must have a prediction, unless it came before. time: ms."""

    offset: int
    id: int
    time: int


@dataclass(frozen=True)
class Tail:
    """The last predictions of a partition. Without `whole` there are older ones, or there were."""

    origins: frozenset[int]
    ids: frozenset[int]
    since: int  # an event after this time, ms, that was predicted at all is among them
    whole: bool


@dataclass(frozen=True)
class Hole:
    """A worker's word that nothing came behind offset `highest` of a source. since, at: first and last said, ms."""

    log: str
    partition: int
    source: int
    highest: int
    since: int
    at: int


def ok(check: str, seen: str) -> list[Row]:
    return [Row(check, "", "ok", seen)]


def call(pipeline: Pipeline) -> str:
    """The options that name a pipeline and its instance."""
    alias = "" if pipeline.instance == pipeline.name else f" --as {pipeline.instance}"
    return f"--pipeline {pipeline.name}{alias}"


def topics(
    pipeline: Pipeline, counts: Mapping[str, int], configs: Mapping[str, Mapping[str, str]]
) -> list[Row]:
    """All there, with partitions that fit and records kept for as long as they are needed."""
    rows = []
    for name, keep in wanted_topics(pipeline).items():
        if not counts[name]:
            create = f"headrace topics create {call(pipeline)}"
            rows.append(Row("topics", name, "wrong", "does not exist", f"run `{create}`"))
        else:
            rows += _kept(name, keep, configs.get(name, {}))
    last = pipeline.entities[-1].log
    for out in (pipeline.predictions, pipeline.shadow):
        if counts[last] and counts[out] and counts[last] != counts[out]:
            rows.append(Row(
                "topics", out, "wrong", f"has {counts[out]} partitions, and {last} has {counts[last]}",
                "make them equal in a new instance (--as): no worker runs on these",
            ))  # fmt: skip
    most = max(counts.values())
    return rows or ok("topics", f"{len(counts)} topics, {most} partitions, kept for long enough")


def _kept(topic: str, keep: int | None, config: Mapping[str, str]) -> list[Row]:
    policy, retention = config.get("cleanup.policy", ""), int(config.get("retention.ms", -1))
    if keep is None and "compact" not in policy:
        remedy = "set its cleanup.policy to compact, or it grows without end"
        return [Row("topics", topic, "warn", f"has cleanup.policy={policy}", remedy)]
    if keep is not None and "compact" in policy:
        remedy = "set its cleanup.policy to delete, and run a new instance (--as): records may be lost"
        return [Row("topics", topic, "wrong", f"has cleanup.policy={policy}", remedy)]
    if keep is not None and 0 <= retention < keep:
        seen = f"keeps records for {retention / 3_600_000:,.0f} h"
        return [Row("topics", topic, "warn", seen, f"set its retention.ms to {keep}")]
    return []


def group(counts: Mapping[str, int], found: Group) -> list[Row]:
    """counts: partitions of the topics that workers read. Each is to be with one worker, by number."""
    if not found.members:
        return [Row("group", "", "warn", "no worker runs", "start one with `headrace worker`")]
    hosts = ", ".join(sorted({m.host.lstrip("/") for m in found.members}))
    if found.state != "Stable":
        remedy = "ask again in some seconds; if it lasts, see the workers' logs"
        return [
            Row("group", "", "warn", f"{len(found.members)} workers, and partitions change hands", remedy)
        ]
    owners: dict[Place, list[int]] = defaultdict(list)
    for number, member in enumerate(found.members):
        for topic, partitions in member.holds.items():
            for p in partitions:
                owners[topic, p].append(number)
    rows = [
        Row(
            "group", f"{topic}/{p}", "wrong", f"is with {len(owners[topic, p])} workers",
            "restart the workers, all of one version",
        )
        for topic, count in counts.items() for p in range(count) if len(owners[topic, p]) != 1
    ]  # fmt: skip
    holders = {
        p: {o for topic in counts for o in owners.get((topic, p), ())}
        for p in range(max(counts.values(), default=0))
    }
    parted = [
        Row(
            "group", f"number {p}", "wrong", f"its partitions are with {len(held)} workers",
            "restart the workers, all of one version",
        )
        for p, held in holders.items() if len(held) > 1
    ]  # fmt: skip
    return (
        rows
        or parted
        or ok("group", f"{len(found.members)} workers from {hosts} hold {sum(counts.values())} partitions")
    )


def lag(spans: Iterable[Span], committed: Mapping[Place, int]) -> list[Row]:
    """What workers have committed, against what there is. spans: of the topics that they read."""
    rows, behind = [], dict[str, int]()
    for span in spans:
        at = committed.get((span.topic, span.partition))
        behind[span.topic] = behind.get(span.topic, 0) + span.end - max(at or 0, span.first)
        if at is not None and at > span.end:
            rows.append(_beyond("lag", f"{span.topic}/{span.partition}", f"{at} is committed", span))
        elif at is not None and at < span.first:
            rows.append(Row(
                "lag", f"{span.topic}/{span.partition}", "wrong",
                f"{at} is committed, and the log begins at {span.first}",
                "retention has cut what was not read: start workers, and see guarantees.md for what is degraded",
            ))  # fmt: skip
    return rows or ok("lag", ", ".join(f"{topic} {n:,}" for topic, n in behind.items()))


def _beyond(check: str, what: str, seen: str, span: Span) -> Row:
    return Row(
        check, what, "wrong", f"{seen}, and {span.topic}/{span.partition} ends at {span.end}",
        "the topic was made anew: remove this instance's stores and checkpoints, or run a new one (--as)",
    )  # fmt: skip


def stores(
    pipeline: Pipeline, spans: Mapping[Place, Span], found: Mapping[Place, Stored], workers: int
) -> list[Row]:
    """The stores of this data root against their logs; with workers, one left behind may be another's now."""
    rows = []
    entities = {e.log: e.name for e in pipeline.entities}
    for (log, p), store in found.items():
        span, what = spans.get((log, p), Span(log, p, 0, 0)), f"{entities[log]}/{p}"
        if store.position > span.end:
            rows.append(_beyond("stores", what, f"is at offset {store.position}", span))
        elif store.position < span.first:
            rows.append(Row(
                "stores", what, "warn" if workers else "wrong",
                f"is at offset {store.position}, and the log begins at {span.first}",
                "if no worker elsewhere is ahead, a start restores a checkpoint, or folds what is left: degraded",
            ))  # fmt: skip
    return rows or ok("stores", f"{len(found)} here, each within its log")


def disk(total: int, free: int, old: Mapping[str, int]) -> list[Row]:
    """Room for stores, bytes; old: bytes of what other definitions left."""
    left = ""
    if old:
        left = (
            f"; {sum(old.values()) / 1e6:,.0f} MB are of {len(old)} older definitions ({_some(sorted(old))})"
        )
    seen = f"{free / 1e9:,.1f} GB of the data root's disk are free{left}"
    if free < LEAST_FREE or free < total * LEAST_FREE_SHARE:
        return [Row("disk", "", "warn", seen, "make room: a worker stops when its disk is full")]
    return ok("disk", seen)


def unpredicted(events: Iterable[Event], tail: Tail) -> tuple[list[int], list[int]]:
    """Offsets of events without a prediction, and of those that may have an older one than the tail's.

    A record that was sent again, or an event that came twice, has the prediction of the first.
    """
    lowest = 0 if tail.whole else min(tail.origins, default=None)
    missing: list[int] = []
    perhaps: list[int] = []
    for event in events:
        if lowest is None or event.offset < lowest or event.offset in tail.origins or event.id in tail.ids:
            continue
        (missing if tail.whole or event.time > tail.since else perhaps).append(event.offset)
    return missing, perhaps


def predictions(
    log: Mapping[int, Span], tails: Mapping[int, Tail], events: Mapping[int, Sequence[Event]]
) -> list[Row]:
    """By partition: the last log, the last predictions, and the flushed events that must be among them."""
    rows = []
    for p, tail in tails.items():
        what, highest = f"partition {p}", max(tail.origins, default=-1)
        if p in log and highest >= log[p].end:
            rows.append(_beyond("predictions", what, f"the last is of offset {highest}", log[p]))
        missing, perhaps = unpredicted(events.get(p, ()), tail)
        if missing:
            again = (
                "stop the workers and remove this partition's stores and checkpoints: a start predicts them"
            )
            never = "a worker sends nothing below its last prediction: fold the log in a new instance (--as)"
            seen = f"flushed events have none, of offsets {_some(missing)}; the last is of {highest}"
            rows.append(Row("predictions", what, "wrong", seen, again if min(missing) > highest else never))
        if perhaps:
            seen = f"events have none among the latest, of offsets {_some(perhaps)}"
            remedy = "older events that came twice have no second one: see whether these did"
            rows.append(Row("predictions", what, "warn", seen, remedy))
    checked = sum(map(len, events.values()))
    return rows or ok("predictions", f"{checked:,} of the last events that were flushed are predicted")


def canary(version: str, found: Canary) -> list[Row]:
    """What the version that has the canary's alias decides, or why it does not any more."""
    if found.reason is None:
        return ok("model", f"canary {version} decides for {found.share:g} % of the entities")
    remedy = "train a better one, or set it again; `headrace models withdraw canary` ends this warning"
    return [Row("model", "canary", "warn", f"taken back: {found.reason}", remedy)]


def latest(pipeline: Pipeline, prediction: Prediction | None, champion: str | None) -> list[Row]:
    """Whether the latest prediction was made as one would be made now."""
    if prediction is None:
        return []
    remedy = "restart the workers, and wait for the next event"
    rows = []
    if prediction.definition != pipeline.definition:
        seen = (
            f"the latest is of definition {prediction.definition}, the pipeline is at {pipeline.definition}"
        )
        rows.append(Row("predictions", "definition", "warn", seen, remedy))
    if champion is not None and prediction.version != champion:
        by = "without a model" if prediction.version is None else f"by model {prediction.version}"
        seen = f"the latest is {by}, the champion is {champion}"
        rows.append(Row("predictions", "model", "warn", seen, remedy))
    return rows


def mirror(
    pipeline: Pipeline, entity: Entity, spans: Mapping[str, Span], found: Mapping[str, Mirrored | None]
) -> list[Row]:
    """Mirrored profiles of an entity against its log. spans: by id; found: by id, None where unreadable."""
    old = [i for i, m in found.items() if m is not None and m.definition != pipeline.definition]
    damaged = [i for i, m in found.items() if m is None]
    beyond = [
        i for i, m in found.items() if m is not None and i in spans and i not in old and m.offset >= spans[i].end
    ]  # fmt: skip
    sentences = {
        "are of another definition": old,
        "cannot be read": damaged,
        "are of offsets beyond the log's end": beyond,
    }
    return [_mirrored(pipeline, entity, ids, what) for what, ids in sentences.items() if ids]


def mirror_differs(pipeline: Pipeline, entity: Entity, ids: list[str], busy: bool) -> list[Row]:
    """Profiles whose values are not those of the store, although the store is ahead.

    busy: a worker has much to mirror, or had just now, and does so when it finds the time.
    """
    if not ids:
        return []
    if busy:
        remedy = "the mirror gathers under load: ask again when the log has been quiet for a minute"
        return [
            Row("mirror", entity.name, "warn", f"{len(ids)} are behind their stores ({_some(ids)})", remedy)
        ]
    return [_mirrored(pipeline, entity, ids, "differ from their stores")]


def _mirrored(pipeline: Pipeline, entity: Entity, ids: list[str], what: str) -> Row:
    return Row(
        "mirror", entity.name, "wrong", f"{len(ids)} of the sample {what} ({_some(sorted(ids))})",
        f"`headrace mirror rebuild {call(pipeline)} --empty` while its workers run has them written anew",
    )  # fmt: skip


def differs(entity: Entity, mirrored: Mirrored, packed: bytes | None) -> bool:
    """Whether the mirror holds other values than a stored profile."""
    if packed is None:
        return True
    arena = Arena(entity.plan)
    slots = np.array([arena.unpack(packed)])
    newest = arena.newest(slots)
    if newest[0] == NULL:  # a label that came before any event has made no values yet
        return False
    held = np.array([[mirrored.features[name] for name in entity.features]], np.float64)
    return mirrored.time != newest[0] or not verify.same(held, arena.read_at(slots, newest)).all()


@dataclass(frozen=True)
class Copy:
    """The newest checkpoint of a partition. age: seconds."""

    entity: str
    partition: int
    position: int
    age: float


def checkpoints(
    pipeline: Pipeline, spans: Mapping[Place, Span], reached: Mapping[Place, int], copies: Sequence[Copy],
    every_s: float, workers: int,
) -> list[Row]:  # fmt: skip
    """reached: how far each log partition is folded, as far as that is known."""
    rows = []
    logs = {e.name: e.log for e in pipeline.entities}
    for copy in copies:
        place, what = (logs.get(copy.entity, ""), copy.partition), f"{copy.entity}/{copy.partition}"
        if place in spans and copy.position > spans[place].end:
            rows.append(_beyond("checkpoints", what, f"is at offset {copy.position}", spans[place]))
        elif workers and copy.age > STALE_PERIODS * every_s and reached.get(place, 0) > copy.position:
            remedy = "see the worker's log, and whether HEADRACE_CHECKPOINTS can be written"
            rows.append(Row("checkpoints", what, "warn", f"the newest is {copy.age:,.0f} s old", remedy))
    oldest = max((c.age for c in copies), default=0)
    return rows or ok("checkpoints", f"{len(copies)} partitions have one, the oldest {oldest:,.0f} s old")


def holes(
    found: Iterable[Hole], stored: Mapping[Place, Stored], workers: int, now_ms: int, repeated_ms: int
) -> list[Row]:
    """What workers ask for and has not come. A worker repeats it; what came since is seen in the store."""
    rows = []
    for hole in found:
        store = stored.get((hole.log, hole.partition))
        came = store is not None and store.seen.get(hole.source, -1) not in range(-1, hole.highest + 1)
        forgotten = workers and now_ms - hole.at > repeated_ms
        if not came and not forgotten:
            rows.append(Row(
                "holes", f"{hole.log}/{hole.partition}", "wrong",
                f"asks for what came from source {hole.source} behind offset {hole.highest}, "
                f"since {(now_ms - hole.since) / 1000:,.0f} s",
                "its writer sends it again while a worker holds it: see that all partitions have a worker",
            ))  # fmt: skip
    return rows or ok("holes", "no record is missing between stages")


def _some(items: Sequence[object]) -> str:
    shown = ", ".join(map(str, items[:NAMED]))
    return shown if len(items) <= NAMED else f"{shown} and {len(items) - NAMED} more"
