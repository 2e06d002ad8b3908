"""`headrace doctor`: do log, stores, predictions, mirror, group and model say the same?

Workers go on while they are looked at. So what can only follow is read first: a store before the
predictions of what it holds, all positions before the logs' ends, the logs' beginnings before all.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import msgspec
import numpy as np
from aiokafka.errors import KafkaError

from app import checkpoints, control, diagnosis, kafka, model_life, verify
from app.diagnosis import Copy, Event, Hole, Row, Stored, Tail
from app.errors import RegistryError
from app.kafka import Place, Span
from app.local import services
from app.settings import Settings
from models.dead_letters import DeadLetter, Origin
from models.dead_letters import decode as decode_letter
from models.errors import HeadraceError
from models.events import EventDecoder, streams_of
from models.partitions import partition_of
from models.pipeline import Entity, Pipeline
from models.predictions import Prediction, identities
from models.predictions import decode as decode_prediction
from models.records import RecordCodec
from models.windows import EVENT
from tables import homes
from tables.mirror import Mirror, Mirrored, RedisError, connect
from tables.model_folder import CANARY

STEP_S, TOTAL_S = 8.0, 20.0  # for one thing to be read, and for all of them
ANSWER_S = 4.0  # for a service to say that it is there
SAMPLE = 200  # mirrored profiles that are looked at
WINDOW = 1000  # records of a partition, before the store's position, whose predictions are looked for
TAIL = 4000  # predictions of a partition among which they are: a worker predicts ahead of its store
FIRST = 64  # of a tail, whose times say how old it is
LETTERS_MS = 3_600_000
LETTERS = 2000  # of a partition, that are counted
WORDS = 20_000  # of the control topic; a hole is told again every few seconds
QUIET_MS = 60_000  # of a log, after which the mirror has what workers have flushed
AGAIN_S = 1.0  # for the mirror to take what was just flushed

NEED_KAFKA = (
    "topics",
    "group",
    "lag",
    "stores",
    "predictions",
    "mirror",
    "checkpoints",
    "dead letters",
    "holes",
)

_T = TypeVar("_T")
_ERRORS = (HeadraceError, KafkaError, RedisError, OSError, TimeoutError)


async def examine(settings: Settings, pipeline: Pipeline) -> list[Row]:
    """Look at all, within TOTAL_S or somewhat more. What cannot be read is a row too."""
    return await _Doctor(settings, pipeline).rows_of_all()


class _Doctor:
    """One look. What was read stays for the judgements that come later."""

    def __init__(self, settings: Settings, pipeline: Pipeline) -> None:
        self._settings, self._pipeline = settings, pipeline
        self._rows: list[Row] = []
        self._deadline = time.monotonic() + TOTAL_S
        self._now = time.time_ns() // 1_000_000
        self._address = ""
        self._mirror: Mirror | None = None
        self._counts: dict[str, int] = {}
        self._workers = 0
        self._canary: str | None = None
        self._committed: dict[Place, int] = {}
        self._stored: dict[Place, Stored] = {}
        self._mirrored: dict[str, dict[str, Mirrored | None]] = {}
        self._first: list[Span] = []
        self._spans: dict[Place, Span] = {}

    async def rows_of_all(self) -> list[Row]:
        await self._services()
        champion = await self._step("model", _in_thread(self._champion))
        if self._address:
            await self._step("topics", self._topics())
        else:
            self._rows += [
                Row(check, "", "skipped", "not looked at: Kafka does not answer") for check in NEED_KAFKA
            ]
        if self._counts:
            self._first = await self._step("lag", kafka.offsets_of(self._address, self._logs())) or []
            await self._step("group", self._group())
            await self._step("mirror", self._sample())
            await self._step("stores", _in_thread(self._look_into_stores))
            tails = await self._step("predictions", self._tails()) or {}
            events = await self._step("predictions", self._events()) or {}
            await self._step("lag", self._ends())
            self._judge(champion, tails, events)
            await self._step("mirror", self._judge_mirror())
            await self._step("checkpoints", _in_thread(self._checkpoints))
            await self._step("dead letters", self._letters())
            await self._step("holes", self._holes())
        await self._step("disk", _in_thread(self._disk))
        if self._mirror is not None:
            await self._mirror.close()
        return self._rows

    async def _step(self, check: str, work: Awaitable[_T]) -> _T | None:
        """Do it within the time there is. What fails becomes a row, and its result None."""
        try:
            return await asyncio.wait_for(work, min(STEP_S, max(self._deadline - time.monotonic(), 0.5)))
        except Exception as error:  # whatever it is: the others are still to be looked at
            why = str(error) or type(error).__name__
            self._rows.append(Row(check, "", "warn", f"could not be read: {why}", "ask again"))
            return None

    # --- services, model, topics, group ----------------------------------------------------------

    def _champion(self) -> str | None:
        try:
            known = services.addresses(self._settings)
            life = model_life.of(self._settings, known, self._pipeline)
            card = life.champion().card
            aliases = life.aliases()
            canary = life.canary(aliases)
        except RegistryError as error:
            self._rows.append(Row("model", "", "warn", str(error), "workers score with what they have"))
            return None
        except HeadraceError as error:
            self._rows.append(Row("model", "", "wrong", str(error), "workers keep the one before, if any"))
            return None
        self._rows += diagnosis.ok("model", f"champion {card.version} gives its golden vectors their scores")
        if canary is not None:
            self._canary = aliases[CANARY]
            self._rows += diagnosis.canary(self._canary, canary)
        return card.version

    async def _services(self) -> None:
        before, known = len(self._rows), services.addresses(self._settings)
        try:
            async with asyncio.timeout(ANSWER_S), kafka.admin(known.kafka):
                self._address = known.kafka
        except _ERRORS as error:
            self._silent("Kafka", "HEADRACE_KAFKA", error)
        try:
            self._mirror = Mirror(connect(known.redis_url), self._pipeline)
            await asyncio.wait_for(self._mirror.ping(), ANSWER_S)
        except _ERRORS as error:
            if self._mirror is not None:
                await self._mirror.close()
            self._mirror = None
            self._silent("Redis", "HEADRACE_REDIS_URL", error)
            if self._address:
                self._rows.append(Row("mirror", "", "skipped", "not looked at: Redis does not answer"))
        if len(self._rows) == before:
            self._rows += diagnosis.ok("services", f"Kafka at {known.kafka} and Redis answer")

    def _silent(self, label: str, variable: str, error: Exception) -> None:
        why = str(error) or "no answer"
        remedy = f"run `headrace up`, or set {variable}"
        self._rows.append(Row("services", label, "wrong", f"does not answer: {why}", remedy))

    async def _topics(self) -> None:
        counts, configs = await kafka.topics_as_they_are(self._address, self._pipeline)
        self._rows += diagnosis.topics(self._pipeline, counts, configs)
        self._counts = counts

    def _logs(self) -> dict[str, int]:
        """Partitions of what workers read."""
        pipeline = self._pipeline
        names = dict.fromkeys([*(e.log for e in pipeline.entities), *pipeline.inputs])
        return {name: self._counts[name] for name in names}

    async def _group(self) -> None:
        name = kafka.group_of(self._pipeline)
        found = await kafka.group_as_it_is(self._address, name)
        self._workers = len(found.members)
        self._rows += diagnosis.group(self._logs(), found)
        self._committed = await kafka.committed_of(self._address, name)

    async def _ends(self) -> None:
        first = {(s.topic, s.partition): s.first for s in self._first}
        for span in await kafka.offsets_of(self._address, self._logs()):
            place = span.topic, span.partition
            self._spans[place] = Span(*place, first.get(place, span.first), span.end)

    def _judge(self, champion: str | None, tails: dict[int, tuple[Tail, Any]], events: Any) -> None:
        """What needs the logs' ends."""
        pipeline, last = self._pipeline, self._pipeline.entities[-1].log
        if not self._spans:
            return
        self._rows += diagnosis.lag(self._spans.values(), self._committed)
        self._rows += diagnosis.stores(pipeline, self._spans, self._stored, self._workers)
        log = {p: span for (topic, p), span in self._spans.items() if topic == last}
        if self._counts[pipeline.predictions] and tails:
            newest = max((x for _, x in tails.values() if x), key=lambda x: int(x[0]), default=None)
            made = newest and newest[1]
            by_canary = made is not None and made.version == self._canary
            stale = diagnosis.latest(pipeline, made, None if by_canary else champion)
            found = diagnosis.predictions(log, {p: tail for p, (tail, _) in tails.items()}, events)
            self._rows += [r for r in found if not stale or r.verdict != "ok"] + stale

    # --- stores ----------------------------------------------------------------------------------

    def _look_into_stores(self) -> None:
        pipeline, root = self._pipeline, homes.root_of(self._settings.data_root, self._pipeline)
        wanted = self._keys_by_place()
        for entity in pipeline.entities:
            for folder in sorted(root.glob(f"{entity.name}/[0-9]*")):
                place = entity.log, int(folder.name)
                try:
                    with homes.looked_into(folder, pipeline.definition) as store:
                        if store is not None and store.progress is not None:
                            profiles = {key: store.get(key) for key in wanted.get(place, ())}
                            progress = store.progress
                            self._stored[place] = Stored(progress.position, progress.seen, profiles)
                except HeadraceError as error:
                    remedy = "a start folds again, or restores a checkpoint"
                    self._rows.append(Row("stores", f"{entity.name}/{place[1]}", "warn", str(error), remedy))

    def _keys_by_place(self) -> dict[Place, list[bytes]]:
        """The mirrored profiles by the partition that has them."""
        wanted: dict[Place, list[bytes]] = {}
        for entity in self._pipeline.entities:
            for id_ in self._mirrored.get(entity.name, ()):
                wanted.setdefault(self._place(entity, id_), []).append(id_.encode())
        return wanted

    def _place(self, entity: Entity, id_: str) -> Place:
        return entity.log, partition_of(id_.encode(), max(self._counts[entity.log], 1))

    def _disk(self) -> None:
        root = self._settings.data_root
        if not root.exists():
            return
        usage = shutil.disk_usage(root)
        folders = (root / "profiles" / self._pipeline.instance).glob("*")
        old = {f.name: _size(f) for f in folders if f.is_dir() and f.name != self._pipeline.definition}
        self._rows += diagnosis.disk(usage.total, usage.free, old)

    # --- predictions -----------------------------------------------------------------------------

    async def _tails(self) -> dict[int, tuple[Tail, tuple[int, Prediction] | None]]:
        """By partition: the last predictions, and the very last with the time when it was sent."""
        topic = self._pipeline.predictions
        spans = await kafka.offsets_of(self._address, {topic: self._counts[topic]})
        found: dict[int, list[tuple[int, Prediction]]] = {s.partition: [] for s in spans}
        async for record in kafka.read_between(self._address, topic, dict.fromkeys(found, -TAIL)):
            try:
                found[record.partition].append((record.timestamp, decode_prediction(record.value or b"")))
            except msgspec.MsgspecError:
                continue  # not one of ours: a predictions topic may be written by hand
        return {
            s.partition: (_tail(self._pipeline, [x for _, x in found[s.partition]], s.first == 0 and s.end <= TAIL),
                          found[s.partition][-1] if found[s.partition] else None)
            for s in spans
        }  # fmt: skip

    async def _events(self) -> dict[int, list[Event]]:
        """The events among the last records before what is known to be flushed."""
        log = self._pipeline.entities[-1].log
        stops = {
            p: at for (topic, p), at in self._reached().items() if topic == log and p < self._counts[log]
        }
        starts = {p: max(at - WINDOW, 0) for p, at in stops.items()}
        records = [r async for r in kafka.read_between(self._address, log, starts, stops)]
        return _events_of(self._pipeline, records, self._counts[log]) if records else {}

    def _reached(self) -> dict[Place, int]:
        """How far each log is folded and flushed, as the group and the stores here say."""
        stored = {place: store.position for place, store in self._stored.items()}
        return {p: max(stored.get(p, 0), self._committed.get(p, 0)) for p in stored | self._committed}

    # --- mirror ----------------------------------------------------------------------------------

    async def _sample(self) -> None:
        if self._mirror is None:
            return
        entities = self._pipeline.entities
        for entity in entities:
            ids = await self._mirror.sample(entity, SAMPLE // len(entities))
            self._mirrored[entity.name] = {id_: await self._fetch(entity, id_) for id_ in ids}

    async def _fetch(self, entity: Entity, id_: str) -> Mirrored | None:
        assert self._mirror is not None
        try:
            (found,) = await self._mirror.read(entity, [id_])
            # one that expired just now is as good as any
            return found or Mirrored(0, -1, self._pipeline.definition, 0, {})
        except ValueError:
            return None  # not written by a worker

    async def _judge_mirror(self) -> None:
        if self._mirror is None:
            return
        pipeline, before = self._pipeline, len(self._rows)
        suspects = {e.name: self._differing(e, self._mirrored.get(e.name, {})) for e in pipeline.entities}
        if any(suspects.values()) and self._workers:
            await asyncio.sleep(AGAIN_S)
        for entity in pipeline.entities:
            found = self._mirrored.get(entity.name, {})
            spans = {i: self._spans[p] for i in found if (p := self._place(entity, i)) in self._spans}
            self._rows += diagnosis.mirror(pipeline, entity, spans, found)
            again = {i: await self._fetch(entity, i) for i in suspects[entity.name]}
            stuck = [i for i in self._differing(entity, again) if _same_offset(again[i], found[i])]
            busy = self._workers > 0 and bool(stuck) and await self._moved(entity.log)
            self._rows += diagnosis.mirror_differs(pipeline, entity, stuck, busy)
        if len(self._rows) == before:
            count = sum(map(len, self._mirrored.values()))
            self._rows += diagnosis.ok("mirror", f"{count} profiles are as their stores and logs have them")

    async def _moved(self, log: str) -> bool:
        """Whether anything has come lately."""
        lately = await kafka.offsets_of(self._address, {log: self._counts[log]}, self._now - QUIET_MS)
        return any(span.first < span.end for span in lately)

    def _differing(self, entity: Entity, found: Mapping[str, Mirrored | None]) -> list[str]:
        """The ids whose values are not those of a store that is ahead of them."""
        result = []
        for id_, mirrored in found.items():
            store = self._stored.get(self._place(entity, id_))
            if store is None or mirrored is None or not 0 <= mirrored.offset < store.position:
                continue
            if mirrored.definition != self._pipeline.definition:
                continue
            if diagnosis.differs(entity, mirrored, store.profiles.get(id_.encode())):
                result.append(id_)
        return result

    # --- checkpoints, dead letters, holes ----------------------------------------------------------

    def _checkpoints(self) -> None:
        settings, pipeline = self._settings, self._pipeline
        if settings.checkpoints_url is None:
            self._rows += diagnosis.ok("checkpoints", "off")
            return
        damaged: list[str] = []
        newest: dict[tuple[str, int], Copy] = {}
        try:
            for one in checkpoints.listed(settings, pipeline, self._now, damaged.append):
                copy = Copy(one["entity"], one["partition"], one["position"], one["age_s"])
                newest.setdefault((copy.entity, copy.partition), copy)
        except HeadraceError as error:
            remedy = "wait until a worker has taken one, or see its log"
            self._rows.append(Row("checkpoints", "", "warn", str(error), remedy))
            return
        self._rows += [
            Row("checkpoints", "", "warn", s, "run `headrace checkpoints verify`") for s in damaged
        ]
        self._rows += diagnosis.checkpoints(
            pipeline, self._spans, self._reached(), list(newest.values()), settings.checkpoint_every_s, self._workers
        )  # fmt: skip

    async def _letters(self) -> None:
        topic = self._pipeline.dead_letters
        spans = await kafka.offsets_of(self._address, {topic: self._counts[topic]}, self._now - LETTERS_MS)
        starts = {s.partition: s.first for s in spans if s.first < s.end}
        stops = {p: start + LETTERS for p, start in starts.items()}
        open_: set[Origin] = set()
        async for record in kafka.read_between(self._address, topic, starts, stops):
            try:
                letter = decode_letter(record.value or b"")
            except msgspec.MsgspecError:
                continue
            (open_.add if isinstance(letter, DeadLetter) else open_.discard)(letter.origin)
        if not open_:
            self._rows += diagnosis.ok("dead letters", "none in the last hour that was not replayed")
            return
        more = " or more" if any(s.end - s.first > LETTERS for s in spans) else ""
        seen = f"{len(open_):,}{more} records were refused in the last hour"
        remedy = f"see `headrace dlq list {diagnosis.call(self._pipeline)}`"
        self._rows.append(Row("dead letters", "", "warn", seen, remedy))

    async def _holes(self) -> None:
        topic = self._pipeline.control
        starts = dict.fromkeys(range(self._counts[topic]), -WORDS)
        holes: dict[tuple[str, int, int], Hole] = {}
        async for record in kafka.read_between(self._address, topic, starts):
            said = control.missing(record)
            if said is None:
                continue
            at, highest = said
            if highest is None:
                holes.pop(at, None)
                continue
            old = holes.get(at)
            since = old.since if old is not None and old.highest == highest else record.timestamp
            holes[at] = Hole(*at, highest, since, record.timestamp)
        self._rows += diagnosis.holes(
            holes.values(), self._stored, self._workers, self._now, round(3000 * control.REPEAT_S)
        )


def _tail(pipeline: Pipeline, predictions: list[Prediction], whole: bool) -> Tail:
    return Tail(
        frozenset(x.origin.offset for x in predictions),
        frozenset(identities(pipeline, predictions).tolist()),
        max((x.event_time for x in predictions[:FIRST]), default=0),
        whole,
    )


def _events_of(pipeline: Pipeline, records: list[Any], count: int) -> dict[int, list[Event]]:
    """By partition, those of the last log's records that a worker predicts when they come first."""
    values, logs = [r.value or b"" for r in records], np.array([r.partition for r in records], np.int64)
    number = len(pipeline.entities) - 1
    if number or pipeline.routed:
        batch, kept, _ = RecordCodec(pipeline, number).decode(values, [r.key for r in records])
    else:
        sent = np.array([r.timestamp for r in records], np.int64)
        batch, kept, _ = EventDecoder(pipeline, pipeline.stream).decode(values, sent)
        home = verify.at_home(batch, logs[kept], count)
        batch, kept = batch.where(home), kept[home]
    found: dict[int, list[Event]] = {}
    scored = np.array([stream.scored for stream in pipeline.streams])[streams_of(pipeline, batch)]
    for row in np.flatnonzero((batch.kinds == EVENT) & scored).tolist():
        record = records[kept[row]]
        event = Event(record.offset, int(batch.ids[row]), int(batch.times[row]))
        found.setdefault(record.partition, []).append(event)
    return found


def _same_offset(a: Mirrored | None, b: Mirrored | None) -> bool:
    return a is not None and b is not None and a.offset == b.offset


def _size(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


def _in_thread(work: Callable[[], _T]) -> Awaitable[_T]:
    """Its result; a thread that hangs does not keep the process."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[_T] = loop.create_future()

    def settle(value: _T | None, error: BaseException | None) -> None:
        if future.done():
            return  # it took too long
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(cast(_T, value))

    def run() -> None:
        value, failed = None, None
        try:
            value = work()
        except Exception as error:
            failed = error
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(settle, value, failed)

    threading.Thread(target=run, daemon=True).start()
    return future


def shown(rows: Iterable[Row]) -> list[tuple[str, str, str, str]]:
    """As people read it, by line: rows alike are told by the first of them."""
    alike: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        own = (row.seen,) if row.verdict == "skipped" else (row.check, row.remedy)
        alike.setdefault((row.verdict, *own), []).append(row)
    return [_line(same) for same in alike.values()]


def _line(same: list[Row]) -> tuple[str, str, str, str]:
    first = same[0]
    if first.verdict == "skipped":
        return first.verdict, ", ".join(row.check for row in same), first.seen, ""
    more = f" (and {len(same) - 1} more alike)" if len(same) > 1 else ""
    return first.verdict, first.check, f"{first.what} {first.seen}".strip() + more, first.remedy
