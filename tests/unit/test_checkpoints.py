"""Checkpoints on a folder and in memory: complete or not there, each file once, damage found."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import msgspec
import pytest

from agents.checkpoint import CheckpointAgent
from tables import checkpoints as module
from tables import homes
from tables.checkpoints import GRACE_S, KEPT, CheckpointError, Checkpoints, Manifest, Place
from tables.store import LAYOUT, Store
from tests.unit.test_store import snapshot

LATER = 10**15  # ms: when everything is old


@pytest.fixture(params=["folder", "memory"])
def checkpoints(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Checkpoints]:
    """Two file systems, the same rules."""
    if request.param == "folder":
        yield Checkpoints(str(tmp_path / "copies"), "cards", "d1")
        return
    found = Checkpoints("memory://copies/of", "cards", "d1")
    yield found
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]


@pytest.fixture
def place(checkpoints: Checkpoints) -> Place:
    return checkpoints.place("customer", 3)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = homes.open_store(tmp_path / "owner", "d1")
    yield opened
    opened.close()


def advance(store: Store, position: int) -> None:
    """A batch that becomes a table of its own."""
    store.write(snapshot(position, b"%d" % position))
    store.flush()


def manifests(place: Place) -> list[Manifest]:
    return [place.read(name) for name in place.names()]


def named(place: Place) -> set[str]:
    return {file.stored for manifest in manifests(place) for file in manifest.files}


def puts(place: Place, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is uploaded from now on."""
    real, seen = place._put, []

    def put(name: str, content: Any) -> None:
        seen.append(name)
        real(name, content)

    monkeypatch.setattr(place, "_put", put)
    return seen


def test_what_was_taken_is_restored(place: Place, store: Store, tmp_path: Path) -> None:
    advance(store, 5)
    advance(store, 9)
    taken = place.take(store, 1234)
    advance(store, 11)
    assert manifests(place) == [taken]
    assert (taken.position, taken.created_at, taken.layout, taken.definition) == (9, 1234, LAYOUT, "d1")
    assert (taken.entity, taken.partition) == ("customer", 3)
    assert not (store.path / "frozen").exists()
    restored = Store(homes.restore(tmp_path / "cold", "d1", place, taken), "d1")
    assert (restored.position, restored.get(b"5"), restored.get(b"9")) == (9, b"5 of 5", b"9 of 9")
    assert restored.get(b"11") is None


def test_a_table_is_uploaded_once(
    place: Place, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tables(names: list[str]) -> int:
        return sum(".sst." in name for name in names)

    seen = puts(place, monkeypatch)
    advance(store, 5)
    advance(store, 6)
    place.take(store, 0)
    assert tables(seen) == 2
    seen.clear()
    advance(store, 7)
    read: list[Path] = []
    real = module._sum_of_path
    monkeypatch.setattr(module, "_sum_of_path", lambda path: (read.append(path), real(path))[1])
    place.take(store, 0)
    assert tables(seen) == 1
    assert sum(path.suffix == ".sst" for path in read) == 1, "nor is it read again"
    # and by the next owner neither, whose store is a clone
    store.close()
    clone = homes.open_store(tmp_path / "owner", "d1")
    seen.clear()
    advance(clone, 8)
    place.take(clone, 0)
    assert tables(seen) == 1
    clone.close()


def test_what_is_cut_short_is_uploaded_again(place: Place, store: Store) -> None:
    advance(store, 5)
    (table,) = [f for f in place.take(store, 0).files if f.name.endswith(".sst")]
    path = f"{place.root}/files/{table.stored}"
    place._fs.pipe_file(path, b"half")
    advance(store, 6)
    newest = place.take(store, 0)
    for file in newest.files:
        place.verify(file)


def test_the_newest_three_stay_and_what_they_name(place: Place, store: Store) -> None:
    for position in range(1, 7):
        advance(store, position)
        place.take(store, 0)
    assert [m.position for m in manifests(place)] == [6, 5, 4]
    assert set(place._sizes("files")) > named(place), "what is young may be named in a moment"
    advance(store, 7)
    place._fs.pipe_file(f"{place.root}/files/000001.sst.1.ab.part", b"of an owner that was killed")
    place.take(store, LATER)
    assert set(place._sizes("files")) == named(place)
    assert len(place.names()) == KEPT
    for manifest in manifests(place):
        for file in manifest.files:
            place.verify(file)


def test_a_file_that_no_kept_manifest_names_is_not_relied_on(
    checkpoints: Checkpoints, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two owners at once, one of which was stopped: what one removes, the other does not build on."""
    mine, other = checkpoints.place("customer", 3), checkpoints.place("customer", 3)
    advance(store, 5)
    (name,) = [f.stored for f in mine.take(store, 0).files if f.name.endswith(".sst")]
    mine._remove(f"manifests/{mine.names()[0]}")  # the file is there, and nobody names it
    seen = puts(other, monkeypatch)
    advance(store, 6)
    other.take(store, 0)
    assert f"files/{name}" in seen


def test_two_owners_that_prune_at_once_leave_whole_checkpoints(
    checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A zombie and its successor, whose stores share tables, while what nobody names soon goes."""
    monkeypatch.setattr(module, "GRACE_S", 0.5)
    first = homes.open_store(tmp_path / "owner", "d1")
    advance(first, 1)
    second = homes.open_store(tmp_path / "owner", "d1")
    taken: list[int] = []

    def own(store: Store, start: int) -> None:
        place = checkpoints.place("customer", 3)
        for position in range(start, start + 60, 2):
            advance(store, position)
            with contextlib.suppress(CheckpointError):  # pruned under its eyes, or given up as too slow
                taken.append(place.take(store, time.time_ns() // 1_000_000).position)

    threads = [threading.Thread(target=own, args=(s, start)) for s, start in ((first, 2), (second, 3))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    place = checkpoints.place("customer", 3)
    assert taken
    assert 1 <= len(place.names()) <= KEPT + 1
    for manifest in manifests(place):
        for file in manifest.files:
            place.verify(file)
    for opened in (first, second):
        opened.close()


def test_a_look_of_long_ago_removes_nothing(
    place: Place, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is stopped between looking and removing wakes to another world."""
    for position in range(1, 6):
        advance(store, position)
        place.take(store, 0)
    before = set(place._sizes("files"))
    clock = itertools.count(0, 31)
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(clock)))
    place._prune(LATER)
    assert set(place._sizes("files")) == before


def test_one_that_takes_too_long_is_given_up(
    place: Place, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance(store, 1)
    clock = itertools.count(0, GRACE_S + 1)
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(clock)))
    with pytest.raises(CheckpointError, match="took longer than 900 s"):
        place.take(store, 0)
    assert place.names() == []


def test_damage_is_found_and_named(place: Place, store: Store, tmp_path: Path) -> None:
    advance(store, 1)
    taken = place.take(store, 0)
    table = next(f for f in taken.files if f.name.endswith(".sst"))
    path = f"{place.root}/files/{table.stored}"
    content = bytearray(place._fs.cat_file(path))
    content[len(content) // 2] ^= 1
    place._fs.pipe_file(path, bytes(content))
    with pytest.raises(CheckpointError, match=rf"{table.stored} of a checkpoint is damaged"):
        place.verify(table)
    with pytest.raises(CheckpointError, match=rf"{table.stored} of a checkpoint is damaged"):
        homes.restore(tmp_path / "cold", "d1", place, taken)
    assert list((tmp_path / "cold").iterdir()) == [], "nothing is left of it"
    place._fs.rm_file(path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        place.verify(table)


def test_a_manifest_cannot_name_a_file_elsewhere(place: Place, store: Store) -> None:
    advance(store, 1)
    place.take(store, 0)
    (name,) = place.names()
    manifest = msgspec.json.decode(place._fs.cat_file(f"{place.root}/manifests/{name}"))
    for wrong in ("../../CURRENT", "/etc/passwd", "..", ".profile"):
        manifest["files"][0]["name"] = wrong
        place._fs.pipe_file(f"{place.root}/manifests/{name}", msgspec.json.encode(manifest))
        with pytest.raises(CheckpointError, match="is damaged"):
            place.read(name)


def test_another_layout_or_definition_is_refused(
    place: Place, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance(store, 1)
    place.take(store, 0)
    monkeypatch.setattr(module, "LAYOUT", LAYOUT + 1)
    with pytest.raises(CheckpointError, match=rf"layout {LAYOUT}\), the pipeline is at d1"):
        place.read(place.names()[0])


def test_places_and_clearing(checkpoints: Checkpoints, store: Store) -> None:
    assert checkpoints.places() == []
    checkpoints.clear()
    advance(store, 1)
    for entity, partition in (("terminal", 0), ("customer", 12), ("customer", 3)):
        checkpoints.place(entity, partition).take(store, 0)
    assert [(p.entity, p.partition) for p in checkpoints.places()] == [
        ("customer", 3), ("customer", 12), ("terminal", 0),
    ]  # fmt: skip
    checkpoints.clear()
    assert checkpoints.places() == []


def test_a_url_without_a_file_system_is_said() -> None:
    with pytest.raises(
        CheckpointError, match=r"Checkpoints cannot go to nowhere://x .*set HEADRACE_CHECKPOINTS"
    ):
        Checkpoints("nowhere://x", "cards", "d1")


# --- in the background -------------------------------------------------------------------------


class Stage:
    """What the agent sees of a stage."""

    def __init__(self, **stores: Store) -> None:
        self.entity = msgspec.defstruct("Entity", [("name", str)])("customer")
        self.stores = {int(k[1:]): v for k, v in stores.items()}


async def test_only_what_moved_is_taken(checkpoints: Checkpoints, store: Store) -> None:
    stage: Any = Stage(p3=store)
    agent = CheckpointAgent([stage], checkpoints, 1, lambda: 77)
    place = checkpoints.place("customer", 3)
    await agent.once()
    assert place.names() == [], "nothing was ever written"
    advance(store, 1)
    await agent.once()
    await agent.once()
    assert [m.position for m in manifests(place)] == [1]
    advance(store, 2)
    await agent.once()
    assert [m.position for m in manifests(place)] == [2, 1]
    assert [(m.position, m.created_at) for m in agent.taken] == [(2, 77)]
    stage.stores.clear()
    await agent.once()
    assert agent.taken == [], "others tell of it now"


async def test_a_url_that_is_away_stops_nothing(
    tmp_path: Path, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "copies").write_text("no folder")
    checkpoints = Checkpoints(str(tmp_path / "copies"), "cards", "d1")
    stage: Any = Stage(p3=store, p4=store)
    agent = CheckpointAgent([stage], checkpoints, 1, lambda: 0)
    advance(store, 1)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            await agent.once()
    assert agent.failures == 3
    assert len(caplog.messages) == 1, "told once"
    os.remove(tmp_path / "copies")
    await agent.once()
    assert [m.position for m in agent.taken] == [1]
    advance(store, 2)
    store.close()  # handed over while a checkpoint was to begin
    await agent.once()
    assert agent.failures == 3
