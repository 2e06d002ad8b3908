"""The mirror on a real server: what is written is read back to the bit, and no old owner overwrites."""

import asyncio
import math
from collections.abc import AsyncIterator

import numpy as np
import pytest

from app.local.services import Addresses
from models.pipeline import Pipeline, find
from tables.mirror import Mirror, connect
from tables.profiles import Touched
from tests.conftest import PIPELINES

pytestmark = pytest.mark.integration


@pytest.fixture
async def mirror(addresses: Addresses) -> AsyncIterator[Mirror]:
    mirror = Mirror(connect(addresses.redis_url), pipeline())
    await mirror.clear()
    yield mirror
    await mirror.clear()
    await mirror.close()


def pipeline() -> Pipeline:
    return find("flight-delays", PIPELINES, "mirror-test")


def touched(keys: list[bytes], value: float, offset: int, time: int = 1000) -> Touched:
    """Profiles of the entity `tailnum`, which has two features."""
    n = len(keys)
    features = np.column_stack([np.full(n, value), np.full(n, math.nan)])
    return Touched(np.arange(n), keys, features, np.full(n, time), np.full(n, offset), np.zeros(n, np.bool_))


async def test_values_are_read_back_to_the_bit(mirror: Mirror) -> None:
    entity = pipeline().entities[0]
    value = 0.1 + 0.2
    assert await mirror.store(entity, touched([b"N1", b"N 2/\xc3\xa9"], value, 7, 1_378_000_000_123)) == 2
    for key in ("N1", "N 2/é"):
        found = await mirror.fetch(entity, key)
        assert found is not None
        assert (found.time, found.offset, found.definition) == (1_378_000_000_123, 7, pipeline().definition)
        assert found.features == {"TAILNUM_NB_7D": value, "TAILNUM_AVG_DEP_DELAY_7D": None}
    assert await mirror.fetch(entity, "N3") is None


async def test_an_older_offset_changes_nothing(mirror: Mirror) -> None:
    entity = pipeline().entities[0]
    await mirror.store(entity, touched([b"N1"], 5.0, 9))
    assert await mirror.store(entity, touched([b"N1", b"N2"], 4.0, 8)) == 1
    found = await mirror.fetch(entity, "N1")
    assert found is not None
    assert (found.offset, found.features["TAILNUM_NB_7D"]) == (9, 5.0)
    assert await mirror.store(entity, touched([b"N1"], 6.0, 9)) == 1  # a label at the same place may


async def test_entries_expire_when_no_window_reaches_them(addresses: Addresses, mirror: Mirror) -> None:
    entity = pipeline().entities[0]
    await mirror.store(entity, touched([b"N1"], 5.0, 9))
    client = connect(addresses.redis_url)
    left = await client.pttl(mirror.key(entity, b"N1"))
    await client.aclose()
    assert entity.retention - 5000 < left <= entity.retention == (7 * 24 + 1) * 3_600_000


async def test_clear_leaves_other_pipelines_alone(addresses: Addresses, mirror: Mirror) -> None:
    entity = pipeline().entities[0]
    other = Mirror(connect(addresses.redis_url), find("flight-delays", PIPELINES, "mirror-other"))
    for each in (mirror, other):
        await each.store(entity, touched([b"N1"], 5.0, 9))
    await mirror.clear()
    assert await mirror.fetch(entity, "N1") is None
    assert await other.fetch(entity, "N1") is not None
    await other.clear()
    await other.close()
    await asyncio.sleep(0)
