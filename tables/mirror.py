"""The mirror: each profile in Redis, a hash per entity, for readers.

    headrace:{<instance>:<entity>:<partition>}:<id>

        _time             event time of the newest event in it, ms; its values are as of then
        _offset           of its newest record in the entity's log
        _definition       the definition hash
        _degraded_until   values as of a time before this lack what retention has cut, ms; 0 if none do
        _profile          the compact profile (Arena.pack), from which values are read as of any time
        <FEATURE>         one field each, as JSON: a number that reads back to the same bits, or null

    headrace:{<instance>:<entity>:<partition>}     the mark: definition, epoch, position, writes
    headrace:<instance>:partitions                 by entity, how many partitions its log has

The partition is that of the entity's log. What stands between the braces decides the slot of a Redis
Cluster, so a partition's profiles and its mark are on one node: they are changed together by one script, and
are lost together. The mark says who may write (`epoch`, which grows with each claim), up to which
position of the log the profiles are there, and how often anything was written. Who writes names the mark as it
knows it; where it is another, nothing is written. So neither an owner of some time ago nor a call of one's own
that comes late can overwrite anything, and what Redis has lost is noticed with the next write.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import msgspec
import numpy as np
from redis.exceptions import NoScriptError

from models.compact import CompactReader
from models.errors import HeadraceError
from models.partitions import partitions_of
from models.pipeline import Entity, Pipeline
from models.windows import OP_OLDER, Floats, Ints
from tables.profiles import Touched
from tables.redis_address import Client, RedisError, connect

__all__ = [
    "AT_ONCE", "Mark", "Mirror", "MirrorReader", "MirrorWriter", "Mirrored", "NotReadable", "RedisError", "connect",
]  # fmt: skip

AT_ONCE = 500  # profiles in one call: some milliseconds of Redis, and of encoding
SCAN_KEYS, SCAN_ROUNDS = 1000, 200  # a sample looks at so many keys of anybody's at most: a second of Redis
LEARN_S = 5.0  # between looks at how many partitions there are


class NotReadable(HeadraceError):
    """A profile that cannot tell what its features were at a time."""


class Mark(NamedTuple):
    """Of a partition: whose definition and epoch hold, up to which position it is mirrored, after how many writes."""

    definition: str
    epoch: int
    position: int
    writes: int

    def moved(self, position: int | None) -> Mark:
        """What a write makes of it. position: None where it stays."""
        return self._replace(position=self.position if position is None else position, writes=self.writes + 1)


@dataclass(frozen=True)
class Mirrored:
    """An entity as the mirror holds it.

    time: event time of its newest event, ms, as of which `features` are; offset: of its newest record in the
    log; definition: the hash of what its features mean; degraded_until: values as of a time before this, ms,
    lack what retention has cut, 0 where none do; profile: compact.
    """

    time: int
    offset: int
    definition: str
    degraded_until: int
    features: dict[str, float | None]
    profile: bytes = field(default=b"", repr=False)
    reader: CompactReader | None = field(default=None, repr=False, compare=False)

    @property
    def degraded(self) -> bool:
        """Whether `features` lack what retention has cut."""
        return self.degraded_at(self.time)

    def degraded_at(self, time: int) -> bool:
        """Whether values as of this time do."""
        return time < self.degraded_until

    @property
    def since(self) -> int:
        """The earliest time, ms, for which `at` can answer: older rows are forgotten."""
        return self.time if self.reader is None else self.reader.since(self.time)

    def at(self, time: int) -> dict[str, float | None]:
        """The features exactly as of a time, ms, by what is known now: those that the stage would read then.

        Raises NotReadable for a time before `since`, and where another definition wrote the profile.
        """
        if self.reader is None:
            raise NotReadable(
                f"The profile is of definition {self.definition}, which is not this pipeline's; workers of this "
                "definition write it anew."
            )
        if time < self.since:
            raise NotReadable(
                f"Nothing before {self.since} ms can be read from this profile, whose newest event is of {self.time} "
                "ms; ask `headrace explain`, which reads the log."
            )
        (row,) = self.reader.read_at([self.profile], np.array([time], np.int64)).tolist()
        return {n: None if v != v else v for n, v in zip(self.features, row, strict=True)}  # noqa: PLR0124


class MirrorReader(Protocol):
    """What readers use: the real one and its twin in memory."""

    async def read(self, entity: Entity, ids: Sequence[str]) -> list[Mirrored | None]:
        """What is mirrored of each of these ids, in their order; None where there is nothing.

        One round trip. Raises RedisError or OSError where Redis does not answer, ValueError where an entry is damaged.
        """
        ...

    async def ping(self) -> None:
        """Raises RedisError or OSError where there is no Redis."""
        ...


class MirrorWriter(Protocol):
    """What the agent uses. All of it raises RedisError or OSError where Redis does not answer."""

    async def claim(self, entity: Entity, partitions: Sequence[int], count: int) -> dict[int, Mark]:
        """Take partitions over: the new mark of each. Who held one before is refused from then on.

        count: how many partitions the log has. A mark that was missing, or another definition's, is at position 0.
        """
        ...

    async def store(
        self,
        entity: Entity,
        touched: Touched,
        marks: Mapping[int, Mark],
        reached: Mapping[int, int],
        now: int,
    ) -> dict[int, Mark | None]:
        """Write profiles, and move marks. Returns the marks that were found where the partition was refused.

        marks: as they are known, of all partitions concerned; one that is found to be another, or missing (None),
        refuses what is of its partition. reached: by partition, where its mark is to be once that is written.
        now: ms, from which expiry counts.
        """
        ...

    async def tell(self, entity: Entity, count: int) -> None:
        """Say how many partitions the entity's log has: readers need it to find a key."""
        ...


def _forever(entity: Entity) -> bool:
    """Whether it has features that count for life, so that it always has something to tell."""
    return bool((entity.plan.ops[:, OP_OLDER] == -1).any())


def lives(entity: Entity, touched: Touched, now: int) -> list[str]:
    """For how long, ms, each profile is worth keeping: empty for ever; what no window reaches has none, 0 or less.

    That is until the last event + longest window + delay + lateness, on the log's own clock where that is
    behind the wall clock: what is replayed from years ago is as good as on its day.
    """
    if _forever(entity):
        return [""] * len(touched.keys)
    return _texts(touched.times + entity.retention - np.minimum(touched.clocks, now))


def _texts(numbers: Ints | Floats) -> list[str]:
    """The JSON of each; NaN is null."""
    return msgspec.json.encode(numbers.tolist())[1:-1].decode().split(",")


def runs(touched: Touched) -> Iterator[tuple[int, int, int]]:
    """Of profiles in the order of their partitions: partition, begin and end of each run."""
    edges = [0, *(np.flatnonzero(np.diff(touched.partitions)) + 1).tolist(), len(touched.keys)]
    for begin, end in pairwise(edges):
        if end > begin:
            yield int(touched.partitions[begin]), begin, end


# KEYS: the mark, then profiles. ARGV: definition, epoch and writes of the mark as it should be, the position
# to set or '', the features' names, and a MessagePack array that has for each profile its event time, its offset,
# until when it is degraded, its life in ms, and its values as JSON, all as text: one argument costs both ends far less
# than one for each of these would. Then the compact profiles. Arrays are filled, not made, for each profile.
_STORE = """
local call, keys, argv = redis.call, KEYS, ARGV
local old = call('HMGET', keys[1], 'definition', 'epoch', 'position', 'writes')
if old[1] ~= argv[1] or old[2] ~= argv[2] or old[4] ~= argv[3] then return old end
local names, values = cmsgpack.unpack(argv[5]), cmsgpack.unpack(argv[6])
local fields = {'_definition', argv[1], '_time', 0, '_offset', 0, '_degraded_until', 0, '_profile', 0}
local width, at = #names, 0
for k = 1, width do
  fields[9 + 2 * k] = names[k]
  fields[10 + 2 * k] = 0
end
local last = 10 + 2 * width
for i = 2, #keys do
  fields[4], fields[6], fields[8], fields[10] = values[at + 1], values[at + 2], values[at + 3], argv[i + 5]
  for k = 1, width do fields[10 + 2 * k] = values[at + 4 + k] end
  call('HSET', keys[i], unpack(fields, 1, last))
  if values[at + 4] ~= '' then call('PEXPIRE', keys[i], values[at + 4]) end
  at = at + 4 + width
end
call('HINCRBY', keys[1], 'writes', 1)
if argv[4] ~= '' then call('HSET', keys[1], 'position', argv[4]) end
return 0
"""

# KEYS: the mark. ARGV: definition. An epoch is a time, so that it grows also where the last one was lost.
_CLAIM = """
local old = redis.call('HMGET', KEYS[1], 'definition', 'epoch', 'position', 'writes')
local now = redis.call('TIME')
local epoch = math.max(tonumber(old[2] or 0) + 1, now[1] * 1000 + math.floor(now[2] / 1000))
local position = old[1] == ARGV[1] and old[3] or '0'
local writes = old[4] or '0'
epoch = string.format('%.0f', epoch)
redis.call('HSET', KEYS[1], 'definition', ARGV[1], 'epoch', epoch, 'position', position, 'writes', writes)
return {ARGV[1], epoch, position, writes}
"""

_NOTHING = msgspec.msgpack.encode([])
_VALUES = msgspec.json.Decoder(list[float | None])
_HEAD = ("_time", "_offset", "_definition", "_degraded_until", "_profile")


class _Script:
    def __init__(self, text: str) -> None:
        self.text = text
        self.sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


class Mirror:
    """The mirror of one pipeline, for its writer and its readers."""

    def __init__(self, client: Client, pipeline: Pipeline) -> None:
        self._client = client
        self._prefix = f"headrace:{pipeline.instance}"
        self._tag = f"headrace:{{{pipeline.instance}:"
        self._pipeline = pipeline
        self._definition = pipeline.definition
        self._storing, self._claiming = _Script(_STORE), _Script(_CLAIM)
        self._readers = {e.name: CompactReader(e.plan) for e in pipeline.entities}
        self._fields = {e.name: (*_HEAD, *e.features) for e in pipeline.entities}
        self._partitions: dict[str, int] = {}
        self._learned = -LEARN_S

    # --- writing -----------------------------------------------------------------------------------

    async def claim(self, entity: Entity, partitions: Sequence[int], count: int) -> dict[int, Mark]:
        calls = [((self._mark(entity, p),), (self._definition,)) for p in partitions]
        found = await self._run(self._claiming, calls)
        await self.tell(entity, count)
        return {p: _mark_of(f) or Mark("", 0, 0, 0) for p, f in zip(partitions, found, strict=True)}

    async def tell(self, entity: Entity, count: int) -> None:
        answer: Any = self._client.hset(f"{self._prefix}:partitions", entity.name, str(count))
        await answer

    async def store(
        self,
        entity: Entity,
        touched: Touched,
        marks: Mapping[int, Mark],
        reached: Mapping[int, int],
        now: int,
    ) -> dict[int, Mark | None]:
        width = len(entity.features)
        # One encoding for all numbers of a kind; JSON's shortest form reads back to the same bits.
        values = _texts(touched.features.ravel())
        times, offsets, until = _texts(touched.times), _texts(touched.offsets), _texts(touched.degraded_until)
        life = lives(entity, touched, now)
        names = msgspec.msgpack.encode(entity.features)
        keys, profiles = touched.keys, touched.profiles
        calls: dict[int, tuple[list[bytes], list[Any]]] = {}
        for partition in reached:
            calls[partition] = [self._mark(entity, partition)], [_NOTHING]
        for partition, begin, end in runs(touched):
            mark = self._mark(entity, partition)
            flat: list[str] = []
            for i in range(begin, end):
                flat += (times[i], offsets[i], until[i], life[i])
                flat += values[i * width : (i + 1) * width]
            calls[partition] = (
                [mark, *[b"%b:%b" % (mark, key) for key in keys[begin:end]]],
                [msgspec.msgpack.encode(flat), *profiles[begin:end]],
            )
        for partition, (_, arguments) in calls.items():
            known, to = marks[partition], reached.get(partition, "")
            arguments[:0] = self._definition, known.epoch, known.writes, to, names
        refused: dict[int, Mark | None] = {}
        for partition, answer in zip(
            calls, await self._run(self._storing, list(calls.values())), strict=True
        ):
            if answer != 0:
                found = _mark_of(answer)
                # A client sends again what it had no answer to: it may have been done.
                if found != marks[partition].moved(reached.get(partition)):
                    refused[partition] = found
        return refused

    async def marks(self, entity: Entity, partitions: Sequence[int]) -> dict[int, Mark | None]:
        """The marks of these partitions."""
        pipe: Any = self._client.pipeline(transaction=False)
        for p in partitions:
            pipe.execute_command("HMGET", self._mark(entity, p), *Mark._fields)
        return dict(zip(partitions, map(_mark_of, await pipe.execute()), strict=True))

    async def forget(self, entity: Entity, partitions: Sequence[int]) -> None:
        """Remove marks: who holds these partitions writes all their profiles anew, over those that are there."""
        pipe: Any = self._client.pipeline(transaction=False)
        for p in partitions:
            pipe.execute_command("UNLINK", self._mark(entity, p))
        await pipe.execute()

    async def clear(self) -> None:
        """Forget all of this pipeline's profiles and marks."""
        await self._client.unlink(f"{self._prefix}:partitions")
        for entity in self._pipeline.entities:
            async for keys in self._scan(self._tag + f"{entity.name}:*"):
                if keys:
                    pipe: Any = self._client.pipeline(transaction=False)
                    for key in keys:
                        pipe.execute_command("UNLINK", key)
                    await pipe.execute()
        self._partitions, self._learned = {}, -LEARN_S

    # --- reading -----------------------------------------------------------------------------------

    async def read(self, entity: Entity, ids: Sequence[str]) -> list[Mirrored | None]:
        partitions = await self._count(entity)
        if not partitions or not ids:
            return [None] * len(ids)
        fields = self._fields[entity.name]
        keys = self._keys(entity, ids, partitions)
        if len(keys) == 1:
            rows: Any = [await self._client.execute_command("HMGET", keys[0], *fields)]
        else:
            pipe: Any = self._client.pipeline(transaction=False)
            for key in keys:
                pipe.execute_command("HMGET", key, *fields)
            rows = await pipe.execute()
        return [None if row[0] is None else self._mirrored(entity, row) for row in rows]

    def _mirrored(self, entity: Entity, row: list[bytes | None]) -> Mirrored:
        time_, offset, definition, until, profile, *texts = row
        if time_ is None or offset is None or definition is None or until is None or profile is None:
            raise ValueError(f"An entry of {entity.name} lacks one of {', '.join(_HEAD)}.")
        try:
            values = _VALUES.decode(b"[%b]" % b",".join([b"null" if t is None else t for t in texts]))
        except msgspec.DecodeError as error:
            raise ValueError(f"An entry of {entity.name} cannot be read ({error}).") from None
        whose = definition.decode()
        return Mirrored(
            int(time_), int(offset), whose, int(until), dict(zip(entity.features, values, strict=True)), profile,
            self._readers[entity.name] if whose == self._definition else None,
        )  # fmt: skip

    async def key_of(self, entity: Entity, id_: str) -> bytes | None:
        """The key of an entity's hash; None where nothing was ever mirrored."""
        partitions = await self._count(entity)
        return self._keys(entity, [id_], partitions)[0] if partitions else None

    def _keys(self, entity: Entity, ids: Sequence[str], partitions: int) -> list[bytes]:
        names = [id_.encode() for id_ in ids]
        homes = partitions_of(names, np.zeros(len(names), np.int64), partitions).tolist()
        return [self._mark(entity, p) + b":" + name for p, name in zip(homes, names, strict=True)]

    async def _count(self, entity: Entity) -> int:
        """How many partitions the entity's log has, 0 where nothing says so.

        A topic may be made anew with more partitions, so it is looked up from time to time.
        """
        since = time.monotonic() - self._learned
        if since > LEARN_S or entity.name not in self._partitions:
            answer: Any = self._client.hgetall(f"{self._prefix}:partitions")
            self._partitions = {name.decode(): int(count) for name, count in (await answer).items()}
            self._learned = time.monotonic()
        return self._partitions.get(entity.name, 0)

    async def sample(self, entity: Entity, most: int) -> list[str]:
        """The ids of up to `most` entities that are mirrored, whichever come first."""
        found: set[str] = set()
        rounds = 0
        async for keys in self._scan(self._tag + f"{entity.name}:*}}:*"):
            found.update(key.partition(b"}:")[2].decode() for key in keys)
            rounds += 1
            if len(found) >= most or rounds >= SCAN_ROUNDS:
                break
        return sorted(found)[:most]

    async def _scan(self, pattern: str) -> AsyncIterator[list[bytes]]:
        client: Any = self._client
        for node in client.get_primaries() if hasattr(client, "get_primaries") else [None]:
            cursor, to = 0, {} if node is None else {"target_nodes": node}
            while True:
                cursor, keys = await client.scan(cursor, match=pattern, count=SCAN_KEYS, **to)
                cursor = next(iter(cursor.values())) if isinstance(cursor, dict) else cursor
                yield keys
                if not cursor:
                    break

    async def ping(self) -> None:
        await self._client.ping()

    async def close(self) -> None:
        await self._client.aclose()

    # --- calls -------------------------------------------------------------------------------------

    def _mark(self, entity: Entity, partition: int) -> bytes:
        return f"{self._tag}{entity.name}:{partition}}}".encode()

    async def _run(self, script: _Script, calls: Sequence[tuple[Sequence[Any], Sequence[Any]]]) -> list[Any]:
        """Run a script once for each of keys and arguments, all on their way together."""
        answers = await self._send("EVALSHA", script.sha, calls)
        unknown = [i for i, answer in enumerate(answers) if isinstance(answer, NoScriptError)]
        if unknown:
            again = await self._send("EVAL", script.text, [calls[i] for i in unknown])
            for i, answer in zip(unknown, again, strict=True):
                answers[i] = answer
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return answers

    async def _send(
        self, command: str, script: str, calls: Sequence[tuple[Sequence[Any], Sequence[Any]]]
    ) -> list[Any]:
        if not calls:
            return []
        pipe: Any = self._client.pipeline(transaction=False)
        for keys, arguments in calls:
            pipe.execute_command(command, script, len(keys), *keys, *arguments)
        answers: list[Any] = await pipe.execute(raise_on_error=False)
        return answers


def _mark_of(found: Sequence[bytes | None]) -> Mark | None:
    definition, epoch, position, writes = found
    if definition is None or epoch is None or position is None or writes is None:
        return None
    return Mark(definition.decode(), int(epoch), int(position), int(writes))
