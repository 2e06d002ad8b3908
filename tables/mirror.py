"""The mirror: each profile's feature values in Redis, a hash per entity, for readers.

    headrace:<pipeline>:<entity>:<id>   _time (event time of the values, ms), _offset, _definition,
                                        _degraded (1 where they lack what retention has cut), and
                                        a field per feature; "null" where it has no value

    headrace:<pipeline>:_mirrored:<entity>:<partition>   definition and log position up to which that is so

Many profiles go in one script call, which also keeps an old owner from overwriting: an offset below
the stored one changes nothing, unless another definition wrote it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import redis.asyncio as redis

from models.pipeline import Entity, Pipeline
from tables.profiles import Touched

# KEYS: the profiles. ARGV: definition, life in ms, number of features, their names, then for each
# profile its event time, its offset, whether it is degraded, and its values.
_WRITE = """
local names, width = {}, tonumber(ARGV[3])
for k = 1, width do names[k] = ARGV[3 + k] end
local at, written = 3 + width, 0
for i, key in ipairs(KEYS) do
  local old = redis.call('HMGET', key, '_offset', '_definition')
  if not old[1] or old[2] ~= ARGV[1] or tonumber(old[1]) <= tonumber(ARGV[at + 2]) then
    local fields = {
      '_time', ARGV[at + 1], '_offset', ARGV[at + 2], '_degraded', ARGV[at + 3], '_definition', ARGV[1]
    }
    for k = 1, width do
      fields[#fields + 1] = names[k]
      fields[#fields + 1] = ARGV[at + 3 + k]
    end
    redis.call('HSET', key, unpack(fields))
    redis.call('PEXPIRE', key, ARGV[2])
    written = written + 1
  end
  at = at + 3 + width
end
return written
"""

# KEYS: marks. ARGV: definition, then for each mark the position expected and the new one. A mark that is
# not as expected stays: who lost it has to write all anew before it may say otherwise.
_MOVE = """
local found = {}
for i, key in ipairs(KEYS) do
  local old = redis.call('GET', key) or ''
  local position = string.match(old, '^' .. ARGV[1] .. ' (%d+)$') or 0
  if tonumber(position) == tonumber(ARGV[2 * i]) then
    redis.call('SET', key, ARGV[1] .. ' ' .. ARGV[2 * i + 1])
  end
  found[i] = old
end
return found
"""

AT_ONCE = 200  # profiles in one call: about a millisecond of Redis
SCAN_KEYS, SCAN_ROUNDS = 1000, 200  # a sample looks at so many keys of anybody's at most: a second of Redis


@dataclass(frozen=True)
class Mirrored:
    """An entity's features as the mirror holds them. time: as of, ms; offset: of the log."""

    time: int
    offset: int
    definition: str
    degraded: bool
    features: dict[str, float | None]


class Mirror:
    """The mirror of one pipeline, for its writer and its readers."""

    def __init__(self, client: redis.Redis, pipeline: Pipeline) -> None:
        self._client = client
        self._prefix = f"headrace:{pipeline.instance}:"
        self._definition = pipeline.definition
        self._write = client.register_script(_WRITE)
        self._move = client.register_script(_MOVE)

    def key(self, entity: Entity, id_: bytes) -> bytes:
        return f"{self._prefix}{entity.name}:".encode() + id_

    async def store(self, entity: Entity, touched: Touched) -> int:
        """Write up to AT_ONCE profiles; how many were news. They expire when no window reaches them."""
        width = len(entity.features)
        head: list[Any] = [self._definition, entity.retention, width, *entity.features]
        # One encoding for all values; JSON's shortest form reads back to the same bits.
        texts = msgspec.json.encode(touched.features.ravel().tolist())[1:-1].split(b",") if width else []
        times, offsets, degraded = (
            column.tolist() for column in (touched.times, touched.offsets, touched.degraded.astype(int))
        )
        for i in range(len(touched.keys)):
            head += (times[i], offsets[i], degraded[i], *texts[i * width : (i + 1) * width])
        written: int = await self._write([self.key(entity, k) for k in touched.keys], head)
        return written

    async def fetch(self, entity: Entity, id_: str) -> Mirrored | None:
        """The values of one entity, None where there are none."""
        return (await self.fetch_many([(entity, id_)]))[0]

    async def fetch_many(self, wanted: Sequence[tuple[Entity, str]]) -> list[Mirrored | None]:
        """Those of many entities, of any kinds, in one round trip."""
        async with self._client.pipeline(transaction=False) as pipe:
            for entity, id_ in wanted:
                pipe.hgetall(self.key(entity, id_.encode()))
            found: Any = await pipe.execute()
        return [self._mirrored(entity, one) for (entity, _), one in zip(wanted, found, strict=True)]

    def _mirrored(self, entity: Entity, found: Any) -> Mirrored | None:
        if not found:
            return None
        return Mirrored(
            int(found[b"_time"]),
            int(found[b"_offset"]),
            found[b"_definition"].decode(),
            found.get(b"_degraded") == b"1",
            {name: msgspec.json.decode(found.get(name.encode(), b"null")) for name in entity.features},
        )

    async def marks(self, entity: Entity, partitions: Sequence[int]) -> list[int | None]:
        """Up to which position each partition is mirrored; None where nothing says so."""
        found: Any = await self._client.mget([self._mark(entity, p) for p in partitions])
        return [self._position(value) for value in found]

    async def mark(self, entity: Entity, moves: Mapping[int, tuple[int, int]]) -> list[int | None]:
        """Say up to which position each partition is mirrored, where what was said is as expected.

        moves: by partition, the position expected (0: none) and the new one. Returns what was said before.
        """
        arguments: list[str | int] = [
            self._definition,
            *(position for move in moves.values() for position in move),
        ]
        found: Any = await self._move([self._mark(entity, p) for p in moves], arguments)
        return [self._position(value) for value in found]

    def _mark(self, entity: Entity, partition: int) -> str:
        return f"{self._prefix}_mirrored:{entity.name}:{partition}"

    def _position(self, mark: bytes | None) -> int | None:
        definition, _, position = (mark or b"").decode().partition(" ")
        return int(position) if definition == self._definition else None

    async def sample(self, entity: Entity, most: int) -> list[str]:
        """The ids of up to `most` entities that are mirrored, whichever come first."""
        prefix, cursor, found = self.key(entity, b""), 0, set[bytes]()
        for _ in range(SCAN_ROUNDS):
            answer: Any = await self._client.scan(cursor, match=prefix + b"*", count=SCAN_KEYS)
            cursor, keys = answer
            found.update(keys)
            if not cursor or len(found) >= most:
                break
        return [key[len(prefix) :].decode() for key in sorted(found)[:most]]

    async def clear(self) -> None:
        """Forget all of this pipeline's profiles."""
        async for key in self._client.scan_iter(match=f"{self._prefix}*", count=1000):
            await self._client.unlink(key)

    async def ping(self) -> None:
        """Raises redis.RedisError where there is no Redis."""
        await self._client.ping()

    async def close(self) -> None:
        await self._client.aclose()


def connect(url: str) -> redis.Redis:
    """A client; it connects when it is first used, and again after an outage."""
    client: redis.Redis = redis.Redis.from_url(url, socket_timeout=5.0, socket_connect_timeout=5.0)
    return client


RedisError = redis.RedisError
