"""The mirror on a real server: what is written is read back to the bit, and no old owner overwrites."""

import asyncio
import math
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agents import mirror as mirror_agent
from agents.mirror import MirrorAgent
from app.local.services import Addresses
from models.events import EventDecoder
from models.partitions import partitions_of
from models.pipeline import Pipeline, find
from models.windows import Arena
from tables.memory_mirror import MemoryMirror
from tables.mirror import Mark, Mirror, NotReadable, connect
from tables.profiles import Profiles, Touched
from tables.store import Store
from tests.conftest import PIPELINES
from tests.fixtures.logs import Fetched, order
from tests.fixtures.pipelines import shop

pytestmark = pytest.mark.integration

PARTITIONS = 4
DAY_MS = 86_400_000
NOW = 1_378_000_000_123  # of the events


@pytest.fixture
async def mirror(addresses: Addresses) -> AsyncIterator[Mirror]:
    mirror = Mirror(connect(addresses.redis_url), pipeline())
    await mirror.clear()
    yield mirror
    await mirror.clear()
    await mirror.close()


def pipeline() -> Pipeline:
    return find("flight-delays", PIPELINES, "mirror-test")


def touched(
    keys: list[bytes], value: float, offset: int, time: int = NOW, until: int = 0, clock: int | None = None
) -> Touched:
    """Profiles of the entity `tailnum`, which has two features. Each holds one event; its features are made up."""
    n = len(keys)
    homes = partitions_of(keys, np.zeros(n, np.int64), PARTITIONS)
    order = np.argsort(homes, kind="stable")
    entity = pipeline().entities[0]
    arena = Arena(entity.plan)
    slots = np.array([arena.new() for _ in keys])
    arena.fold(
        slots, np.zeros(n, np.int8), np.full(n, time), np.arange(n), np.full((n, len(entity.values)), 700),
        np.zeros(n, np.int8), np.full(n, -1),
    )  # fmt: skip
    return Touched(
        np.arange(n),
        [keys[i] for i in order],
        arena.pack(slots),
        np.column_stack([np.full(n, value), np.full(n, math.nan)]),
        np.full(n, time),
        np.full(n, offset),
        np.full(n, until),
        np.full(n, time if clock is None else clock),
        homes[order],
    )


async def put(mirror: Mirror | MemoryMirror, batch: Touched, now: int = 2**42) -> None:
    """Write as a new owner of the partitions would."""
    partitions = sorted(set(batch.partitions.tolist()))
    marks = await mirror.claim(pipeline().entities[0], partitions, PARTITIONS)
    assert await mirror.store(pipeline().entities[0], batch, marks, {}, now) == {}


# --- the contract: the same for Redis and for the twin in memory -----------------------------------


@pytest.fixture(params=["redis", "memory"])
async def either(request: pytest.FixtureRequest, mirror: Mirror) -> Mirror | MemoryMirror:
    return mirror if request.param == "redis" else MemoryMirror(pipeline(), lambda: 2**42)


async def count(mirror: Mirror | MemoryMirror, *ids: str) -> list[float | None]:
    found = await mirror.read(pipeline().entities[0], ids)
    return [None if f is None else f.features["TAILNUM_NB_7D"] for f in found]


async def test_values_are_read_back_to_the_bit(either: Mirror | MemoryMirror) -> None:
    entity = pipeline().entities[0]
    value = 0.1 + 0.2
    await put(either, touched([b"N1", b"N 2/\xc3\xa9"], value, 7, until=NOW + 1))
    found = await either.read(entity, ["N1", "N3", "N 2/é"])
    assert found[1] is None
    for each in (found[0], found[2]):
        assert each is not None
        assert (each.time, each.offset, each.definition) == (NOW, 7, pipeline().definition)
        assert each.features == {"TAILNUM_NB_7D": value, "TAILNUM_AVG_DEP_DELAY_7D": None}
        assert (each.degraded, each.degraded_at(NOW), each.degraded_at(NOW + 1)) == (True, True, False)
    assert await either.read(entity, []) == []


async def test_the_compact_profile_is_read_at_any_time(either: Mirror | MemoryMirror) -> None:
    await put(either, touched([b"N1"], 5.0, 9))
    (found,) = await either.read(pipeline().entities[0], ["N1"])
    assert found is not None
    counts = [found.at(NOW + after)["TAILNUM_NB_7D"] for after in (-1, 0, 7 * DAY_MS - 1, 7 * DAY_MS)]
    assert counts == [0, 1, 1, 0]
    assert found.at(NOW)["TAILNUM_AVG_DEP_DELAY_7D"] == 700
    assert found.at(NOW + 7 * DAY_MS)["TAILNUM_AVG_DEP_DELAY_7D"] is None
    assert found.since == NOW - 3_600_000  # the lateness: windows before it reach what is forgotten
    assert found.at(found.since) is not None
    with pytest.raises(NotReadable):
        found.at(found.since - 1)


async def test_an_old_owner_writes_nothing(either: Mirror | MemoryMirror) -> None:
    entity = pipeline().entities[0]
    batch = touched([b"N1"], 5.0, 9)
    (home,) = batch.partitions.tolist()
    old = await either.claim(entity, [home], PARTITIONS)
    assert await either.store(entity, batch, old, {home: 10}, NOW) == {}
    old = {home: old[home].moved(10)}
    new = await either.claim(entity, [home], PARTITIONS)
    assert new[home].epoch > old[home].epoch
    assert new[home].position == 10
    # farther on in the log, and yet refused, also before the new owner has written anything
    assert await either.store(entity, touched([b"N1", b"N1"], 6.0, 11), old, {home: 12}, NOW) == new
    assert await either.store(entity, touched([b"N1"], 7.0, 10), new, {home: 11}, NOW) == {}
    assert await either.store(entity, touched([b"N1"], 6.0, 11), old, {home: 12}, NOW) != {}
    assert await count(either, "N1") == [7]
    assert (await either.marks(entity, [home]))[home] == new[home].moved(11)


async def test_a_call_that_comes_late_changes_nothing(either: Mirror | MemoryMirror) -> None:
    """As one that timed out, was given up and written again, and arrives after all."""
    entity = pipeline().entities[0]
    late, batch = touched([b"N1"], 5.0, 9), touched([b"N1"], 6.0, 10)
    (home,) = batch.partitions.tolist()
    before = await either.claim(entity, [home], PARTITIONS)
    again = await either.claim(entity, [home], PARTITIONS)
    assert await either.store(entity, batch, again, {}, NOW) == {}
    assert await either.store(entity, late, before, {}, NOW) == {home: again[home].moved(None)}
    # nor one of the same epoch; that it is no reason for doubt is for a client that sends again what was done
    assert await either.store(entity, late, again, {}, NOW) in ({}, {home: again[home].moved(None)})
    assert await count(either, "N1") == [6]


async def test_what_was_lost_refuses_the_next_write(either: Mirror | MemoryMirror) -> None:
    entity = pipeline().entities[0]
    batch = touched([b"N1"], 5.0, 9)
    (home,) = batch.partitions.tolist()
    marks = await either.claim(entity, [home], PARTITIONS)
    await either.clear()
    assert await either.store(entity, batch, marks, {}, NOW) == {home: None}
    assert await either.marks(entity, [home]) == {home: None}
    assert await count(either, "N1") == [None]
    claimed = (await either.claim(entity, [home], PARTITIONS))[home]
    assert claimed.epoch > 0
    assert (claimed.position, claimed.writes) == (0, 0)


async def test_partitions_do_not_hinder_each_other(either: Mirror | MemoryMirror) -> None:
    entity = pipeline().entities[0]
    keys = [b"N%d" % i for i in range(40)]
    batch = touched(keys, 5.0, 9)
    everywhere = list(range(PARTITIONS))
    marks = await either.claim(entity, everywhere, PARTITIONS)
    newer = await either.claim(entity, [2], PARTITIONS)
    assert await either.store(entity, batch, marks, dict.fromkeys(everywhere, 10), NOW) == newer
    found = await count(either, *(k.decode() for k in batch.keys))
    assert found == [None if p == 2 else 5 for p in batch.partitions.tolist()]
    after = await either.marks(entity, everywhere)
    assert after == {p: newer[2] if p == 2 else marks[p].moved(10) for p in everywhere}


async def test_another_definition_begins_at_nothing(addresses: Addresses, mirror: Mirror) -> None:
    """Workers of another definition take the mirror over; those of the first are refused from then on."""
    entity = pipeline().entities[0]
    batch = touched([b"N1"], 5.0, 9)
    (home,) = batch.partitions.tolist()
    marks = await mirror.claim(entity, [home], PARTITIONS)
    await mirror.store(entity, batch, marks, {home: 10}, NOW)
    other = Mirror(connect(addresses.redis_url), pipeline())
    other._definition = "0123456789abcdef"
    newer = await other.claim(entity, [home], PARTITIONS)
    assert newer[home] == Mark("0123456789abcdef", newer[home].epoch, 0, marks[home].writes + 1)
    refused = await mirror.store(entity, batch, {home: marks[home].moved(10)}, {}, NOW)
    assert refused == newer
    assert await other.store(entity, batch, newer, {}, NOW) == {}
    (found,) = await mirror.read(entity, ["N1"])
    assert found is not None
    assert found.definition == "0123456789abcdef"
    with pytest.raises(NotReadable, match="0123456789abcdef"):
        found.at(NOW)
    await other.close()


# --- what only Redis can show ----------------------------------------------------------------------


async def left(addresses: Addresses, mirror: Mirror, id_: str) -> int:
    key = await mirror.key_of(pipeline().entities[0], id_)
    client: Any = connect(addresses.redis_url)
    left: int = await client.pttl(key)
    await client.aclose()
    return left


async def test_entries_expire_when_no_window_reaches_them(addresses: Addresses, mirror: Mirror) -> None:
    entity = pipeline().entities[0]
    assert entity.retention == 7 * DAY_MS + 3_600_000
    await put(mirror, touched([b"N1"], 5.0, 9))  # replayed from years ago: by the log's own clock
    assert entity.retention - 5000 < await left(addresses, mirror, "N1") <= entity.retention
    await put(mirror, touched([b"N1"], 5.0, 9, clock=NOW + 2 * DAY_MS))
    assert 0 < entity.retention - 2 * DAY_MS - await left(addresses, mirror, "N1") < 5000
    # a partition's clock that is ahead of the time, for a sender's was, takes nothing away
    await put(mirror, touched([b"N1"], 5.0, 9, clock=NOW + 2 * DAY_MS), now=NOW)
    assert entity.retention - 5000 < await left(addresses, mirror, "N1") <= entity.retention
    await put(mirror, touched([b"N1"], 5.0, 9, clock=NOW + 8 * DAY_MS))
    assert await count(mirror, "N1") == [None]


async def test_what_is_counted_for_life_does_not_expire(addresses: Addresses, tmp_path: Path) -> None:
    lifetime = shop("{aggregate: count, window: 1d}", "{aggregate: count, window: lifetime}")
    bench = Bench(tmp_path / "store", connect(addresses.redis_url), lifetime)
    await bench.mirror.clear()
    bench.fold(7)
    await bench.settled()
    assert await bench.client.pttl(await bench.mirror.key_of(bench.entity, "7")) == -1
    await bench.mirror.clear()
    await bench.mirror.close()


async def test_clear_leaves_other_pipelines_alone(addresses: Addresses, mirror: Mirror) -> None:
    other = Mirror(connect(addresses.redis_url), find("flight-delays", PIPELINES, "mirror-other"))
    for each in (mirror, other):
        await put(each, touched([b"N1"], 5.0, 9))
    assert await mirror.sample(pipeline().entities[0], 5) == ["N1"]
    await mirror.clear()
    assert await count(mirror, "N1") == [None]
    assert await count(other, "N1") == [5]
    await other.clear()
    await other.close()


async def test_a_damaged_entry_is_told(addresses: Addresses, mirror: Mirror) -> None:
    entity = pipeline().entities[0]
    await put(mirror, touched([b"N1"], 5.0, 9))
    client: Any = connect(addresses.redis_url)
    await client.hset(await mirror.key_of(entity, "N1"), "TAILNUM_NB_7D", "many")
    with pytest.raises(ValueError, match="cannot be read"):
        await mirror.read(entity, ["N1"])
    await client.hdel(await mirror.key_of(entity, "N1"), "_profile")
    with pytest.raises(ValueError, match="lacks one of"):
        await mirror.read(entity, ["N1"])
    await client.aclose()


# --- written anew --------------------------------------------------------------------------------


class Bench:
    """The first stage of the small pipeline over a real store, mirrored to the real Redis."""

    def __init__(self, path: Path, client: Any, pipeline: Pipeline | None = None) -> None:
        self.client = client
        self.pipeline = pipeline or shop()
        self.entity = self.pipeline.entities[0]
        decoder = EventDecoder(self.pipeline, self.pipeline.stream)
        self.mirror = Mirror(client, self.pipeline)
        self._path, self._decode = path, lambda values, keys, sent: decoder.decode(values, sent)
        self._offset = 0
        self.begin()

    def begin(self) -> None:
        """A new owner of the store."""
        self.profiles = Profiles(
            self.entity, self._decode, lambda p, at_most: Store(self._path, self.pipeline.definition), 1,
            self.pipeline.columns,
        )  # fmt: skip
        self.profiles.start_at(0, self.profiles.open(0) or 0)
        self.agent = MirrorAgent([self.profiles], self.mirror, {self.entity.log: 1}, lambda: 2**42)

    def fold(self, *customers: int) -> None:
        values = [order(self._offset + i, CUSTOMER=c) for i, c in enumerate(customers)]
        records = [Fetched(self._offset + i, v, b"", 2**41) for i, v in enumerate(values)]
        self._offset += len(records)
        self.profiles.apply([(0, records)])

    def again(self, *customers: int) -> None:
        """Fold from the store's position on, as a new owner does."""
        self._offset = self.profiles.positions[0]
        self.fold(*customers)

    def flush(self) -> None:
        for snapshot in self.profiles.snapshots():
            self.profiles.write(snapshot)

    async def counts(self, *customers: int) -> list[float | None]:
        name = self.entity.features[0]
        found = await self.mirror.read(self.entity, [str(c) for c in customers])
        for each in found:
            assert each is None or each.at(each.time) == each.features
        return [None if f is None else f.features[name] for f in found]

    async def settled(self) -> None:
        """After as many rounds as it takes; the first may find out what is the matter, and the second claim."""
        async with asyncio.timeout(20):
            self.agent._looked = -1e9
            await self.agent.once()
            await self.agent.once()
            while self.agent.rebuilding or self.agent.waiting:
                await self.agent.once()
        assert self.agent.lag_s == 0

    async def begun(self) -> None:
        """Until it writes anew, of which each round does a step."""
        async with asyncio.timeout(20):
            self.agent._looked = -1e9
            while not self.agent.rebuilding:
                await self.agent.once()

    async def saved(self) -> dict[bytes, bytes]:
        """What Redis has, as it would be in its snapshot."""
        return {key: await self.client.dump(key) async for key in self.client.scan_iter("headrace:*shop*")}

    async def restore(self, saved: dict[bytes, bytes]) -> None:
        """As Redis is when it was killed and came back with this."""
        await self.mirror.clear()
        for key, value in saved.items():
            await self.client.restore(key, 0, value)


@pytest.fixture
async def bench(addresses: Addresses, tmp_path: Path) -> AsyncIterator[Bench]:
    bench = Bench(tmp_path / "store", connect(addresses.redis_url))
    await bench.mirror.clear()
    yield bench
    await bench.mirror.clear()
    await bench.mirror.close()


async def test_what_redis_has_lost_is_written_anew_also_of_profiles_that_are_on_disk_only(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = range(100, 700)  # more than go in one call
    bench.fold(1, 1, 2, *many)
    bench.flush()
    await bench.settled()
    assert sum(bench.profiles.sweep(True)) > 0, "evicted"
    assert bench.profiles.size == 0
    bench.fold(2, 3)  # one of them comes back into memory
    await bench.mirror.clear()
    with monkeypatch.context() as patch:
        patch.setattr(mirror_agent, "REBUILD_S", 0.0)
        await bench.begun()  # with those in memory
        await bench.agent.once()
        assert 0 < await known(bench, *many) < len(many)
    await bench.settled()
    assert await bench.counts(1, 2, 3, *many) == [2, 2, 1, *[1] * len(many)]


async def known(bench: Bench, *customers: int) -> int:
    return sum(c is not None for c in await bench.counts(*customers))


async def test_what_was_mirrored_and_not_flushed_is_written_anew_too(bench: Bench) -> None:
    bench.fold(1, 2)
    bench.flush()
    await bench.settled()
    bench.fold(1, 3)
    await bench.settled()
    await bench.mirror.clear()
    await bench.settled()
    assert await bench.counts(1, 2, 3) == [2, 1, 1]


async def test_a_copy_of_some_time_ago_is_noticed(bench: Bench) -> None:
    """As when Redis was killed and came back with what it had saved."""
    bench.fold(1, 2)
    bench.flush()
    await bench.settled()
    saved = await bench.saved()
    bench.fold(1, 3)
    bench.flush()
    await bench.settled()
    await bench.restore(saved)
    assert await bench.counts(1, 2, 3) == [1, 1, None]
    await bench.settled()
    assert await bench.counts(1, 2, 3) == [2, 1, 1]


async def test_a_copy_of_the_middle_of_a_round_is_noticed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its position is the one that was said last, but it lacks what was written after it."""
    bench.fold(1)
    await bench.settled()
    saved = await bench.saved()
    bench.fold(1, 2, 3)
    monkeypatch.setattr(mirror_agent, "AT_ONCE", 1)
    store, calls = bench.mirror.store, []

    async def fails(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            raise ConnectionError("killed")
        return await store(*args)

    with monkeypatch.context() as patch:
        patch.setattr(bench.mirror, "store", fails)
        with pytest.raises(ConnectionError):
            await bench.agent.once()
    assert await bench.counts(1, 2) == [2, 1]
    await bench.restore(saved)
    await bench.settled()
    assert await bench.counts(1, 2, 3) == [2, 1, 1]


async def test_an_answer_that_was_lost_is_no_answer_to_the_next_call(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The call was done, and nobody knows: what comes next must not be taken for it."""
    bench.fold(1, 2)
    await bench.settled()
    monkeypatch.setattr(mirror_agent, "AT_ONCE", 1)
    store = bench.mirror.store

    async def lost(*args: Any) -> Any:
        await store(*args)
        raise ConnectionError("the answer is lost")

    bench.fold(1, 2)
    with monkeypatch.context() as patch:
        patch.setattr(bench.mirror, "store", lost)
        with pytest.raises(ConnectionError):
            await bench.agent.once()
    bench.fold(1)
    await bench.settled()
    assert await bench.counts(1, 2) == [3, 2]


async def test_who_does_not_finish_leaves_it_to_the_next(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redis lost its data, the owner noticed, and went before all was written anew."""
    bench.fold(1, 2)
    bench.flush()
    await bench.settled()
    await bench.mirror.clear()
    bench.fold(3)
    bench.flush()
    with monkeypatch.context() as patch:
        patch.setattr(mirror_agent, "REBUILD_S", 0.0)
        await bench.begun()
    bench.profiles.close(0)
    bench.begin()
    await bench.settled()
    assert await bench.counts(1, 2, 3) == [1, 1, 1]


async def test_what_an_owner_flushed_and_had_not_mirrored_its_successor_writes(bench: Bench) -> None:
    bench.fold(1)
    bench.flush()
    await bench.settled()
    bench.fold(1, 2)
    bench.flush()
    bench.profiles.close(0)  # it died here
    bench.begin()
    await bench.settled()
    assert await bench.counts(1, 2) == [2, 1]


async def test_a_successor_of_an_owner_that_mirrored_all_writes_nothing(bench: Bench) -> None:
    bench.fold(1, 2)
    bench.flush()
    await bench.settled()
    bench.profiles.close(0)
    bench.begin()
    await bench.settled()
    assert bench.agent.written == 0


async def test_readers_never_go_back_in_time(bench: Bench) -> None:
    """An owner that folds again what its predecessor had mirrored waits until it is as far."""
    bench.fold(1)
    bench.flush()
    await bench.settled()
    bench.fold(1, 1, 2)
    await bench.settled()
    bench.profiles.close(0)  # killed before it flushed
    bench.begin()
    bench.again(1, 1)
    await bench.agent.once()
    assert await bench.counts(1, 2) == [3, 1]
    assert bench.agent.waiting == 1
    bench.again(2, 4)
    await bench.settled()
    assert await bench.counts(1, 2, 4) == [3, 1, 1]
    assert bench.agent.written == 3


async def test_a_mark_beyond_its_log_is_another_logs(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The topic was made anew, and the mirror knows offsets of the old one."""
    marks = await bench.mirror.claim(bench.entity, [0], 1)
    await bench.mirror.store(bench.entity, bench.profiles.nothing, marks, {0: 10**6}, 2**42)
    bench.fold(1, 2)
    await bench.agent.once()
    assert await bench.counts(1, 2) == [None, None]
    monkeypatch.setattr(mirror_agent, "STILL_S", -1.0)
    bench.agent._looked = -1e9
    await bench.agent.once()
    bench.agent._looked = -1e9
    await bench.settled()
    assert await bench.counts(1, 2) == [1, 1]
    mark = (await bench.mirror.marks(bench.entity, [0]))[0]
    assert mark is not None
    assert mark.position == 2


async def test_two_owners_of_a_partition(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One was counted out while it stood still, and goes on writing as if nothing had been."""
    old = bench
    old.fold(1, 2)
    await old.settled()
    new = Bench(tmp_path / "of the new one", connect_again(bench))
    new.fold(1, 2, 1, 3)
    await new.settled()
    old.fold(9, 2, 2, 2, 4)
    await old.agent.once()
    assert await old.counts(1, 2, 3, 4, 9) == [2, 1, 1, None, None]
    assert old.agent.refused == [f"{old.entity.log}/0"]
    assert old.agent.lag_s > 0
    await old.agent.once()  # nor does it ask for it again at once
    assert old.agent.refused
    new.fold(1)
    await new.settled()
    assert await old.counts(1) == [3]
    # who holds the partition still after a while is no zombie
    monkeypatch.setattr(mirror_agent, "REFUSED_S", -1.0)
    await old.agent.once()
    assert not old.agent.refused
    await new.mirror.close()


def connect_again(bench: Bench) -> Any:
    kwargs = bench.client.connection_pool.connection_kwargs
    return connect(f"redis://{kwargs['host']}:{kwargs['port']}/0")


async def test_each_refusal_is_given_out_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror_agent, "AT_ONCE", 2)
    bench.fold(1)
    await bench.settled()
    bench.fold(*range(10, 17))
    await bench.mirror.claim(bench.entity, [0], 1)
    await bench.agent.once()
    assert bench.agent.waiting == 7
    monkeypatch.setattr(mirror_agent, "REFUSED_S", -1.0)
    await bench.settled()
    assert await bench.counts(*range(10, 17)) == [1] * 7
