"""A partition's store changes hands without anybody's leave: whoever comes clones what is there."""

from __future__ import annotations

import logging
import os
import random
import signal
import subprocess
from pathlib import Path

import pytest

from tables import homes
from tables.checkpoints import Checkpoints, Manifest, Place
from tables.store import LAYOUT, Store, StoreError
from tests.unit.test_store import KEYS, WRITER, child, expected, snapshot


def incarnations(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir())


def written(folder: Path, position: int, *keys: bytes) -> Path:
    """One owner's life."""
    store = homes.open_store(folder, "d1")
    store.write(snapshot(position, *keys))
    store.close()
    return store.path


# --- taking over -------------------------------------------------------------------------------


def test_each_owner_has_a_directory_and_all_that_was_there(tmp_path: Path) -> None:
    folder = tmp_path / "customer" / "0003"
    assert homes.open_store(folder, "d1").position is None
    first = written(folder, 5, b"a")
    second = written(folder, 9, b"b")
    store = homes.open_store(folder, "d1")
    assert first.name < second.name < store.path.name
    assert (store.position, store.get(b"a"), store.get(b"b")) == (9, b"5 of a", b"9 of b")


def test_an_owner_that_wrote_nothing_leaves_what_was_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    written(tmp_path, 5, b"a")
    for damage in ("no CURRENT", "empty"):
        if damage == "empty":
            Store(homes._new(tmp_path), "d1").close()
        else:
            homes._new(tmp_path)  # killed before its clone was complete
        store = homes.open_store(tmp_path, "d1")
        assert store.position == 5, damage
        store.close()
    assert caplog.messages == [], "nothing is lost"


@pytest.mark.timeout(120)
def test_a_clone_of_a_running_store_is_a_prefix_of_whole_batches(tmp_path: Path) -> None:
    """Forty times while its owner writes, flushes and compacts; then once more when it was killed."""
    writer = child(WRITER, SEED=3, PATH=str(tmp_path / "00000001-00000000"))
    assert writer.stdout is not None
    rng, said, durable, behind = random.Random(4), 0, 0, 0
    try:
        for _ in range(40):
            for line in writer.stdout:
                said = int(line.split()[0])
                durable = said if line.endswith("flushed\n") else durable
                if rng.random() < 0.05:
                    break
            clone = homes._cloned(tmp_path / "00000001-00000000", tmp_path, "d1")
            if clone is None:
                assert durable == 0
                continue
            assert clone.position is not None
            assert clone.position >= durable, "what was flushed is there"
            assert values(clone) == expected(clone.position)
            behind += clone.position < said
            clone.close()
    finally:
        writer.kill()
        writer.wait(30)
    assert behind > 0, "else nothing was in its memory only"
    store = homes.open_store(tmp_path, "d1")
    assert values(store) == expected(store.position or 0)


def values(store: Store) -> dict[int, int]:
    return {k: int(v.split()[0]) for k in range(KEYS) if (v := store.get(b"%d" % k))}


def test_what_a_stopped_owner_writes_when_it_wakes_harms_nobody(tmp_path: Path) -> None:
    zombie = opened_elsewhere(tmp_path)
    os.kill(zombie.pid, signal.SIGSTOP)
    try:
        store = homes.open_store(tmp_path, "d1")
        assert (store.position, store.get(b"a")) == (5, b"5 of a")
        assert len(incarnations(tmp_path)) == 2, "the stopped one keeps its own"
        store.write(snapshot(7, b"a"))
        store.flush()
        os.kill(zombie.pid, signal.SIGCONT)
        assert said(zombie, "write") == "written"  # both put files of the same number down
        assert (store.position, store.get(b"a")) == (7, b"7 of a")
        store.close()
        again = homes.open_store(tmp_path, "d1")
        assert (again.position, again.get(b"a")) == (7, b"7 of a")
        assert len(incarnations(tmp_path)) == 2
        again.close()
    finally:
        zombie.kill()
        zombie.wait(30)
    last = homes.open_store(tmp_path, "d1")
    assert incarnations(tmp_path) == [last.path], "nobody holds the others now"


def opened_elsewhere(folder: Path) -> subprocess.Popen[str]:
    """A process that owns the partition, at position 5; it writes a batch for each line that it is sent."""
    process = child("""
        from tables import homes
        store = homes.open_store(Path(FOLDER), "d1")
        store.write(Snapshot(0, Progress(5), [(b"a", b"5 of a")]))
        store.flush()
        print("open", flush=True)
        while input():
            store.write(Snapshot(0, Progress(6), [(b"a", b"6 of a" * 100)]))
            store.flush()
            print("written", flush=True)
    """, FOLDER=str(folder))  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "open\n"
    return process


def said(process: subprocess.Popen[str], line: str) -> str:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(f"{line}\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


def test_a_table_that_is_not_in_the_clone_is_never_written_into(tmp_path: Path) -> None:
    """A file that its owner had not yet finished is linked too, and RocksDB might have used its number."""
    old = written(tmp_path, 5, b"a")
    numbers = [int(p.stem) for p in old.glob("*.sst")]
    for number in range(max(numbers, default=1) + 1, 60):
        (old / f"{number:06d}.sst").write_bytes(b"half a table")
    for target in (tmp_path / "clone",):
        target.mkdir()
        homes.clone(old, target)
        store = Store(target, "d1")
        for position in range(6, 20):
            store.write(snapshot(position, b"a"))
            store.flush()
        store.close()
    left = [p.read_bytes() for p in old.glob("*.sst") if int(p.stem) > max(numbers, default=1)]
    assert set(left) == {b"half a table"}


def test_a_file_that_vanishes_under_the_clone_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = written(tmp_path, 5, b"a")
    real, times = homes.clone, 0

    def compacted(source: Path, target: Path) -> None:
        nonlocal times
        times += 1
        real(source, target)
        if times < 3:  # its owner removes a table that the copy of the manifest still names
            (old / f"{times:06d}.sst").write_bytes(b"of a compaction")
            for table in target.glob("*.sst"):
                table.unlink()

    monkeypatch.setattr(homes, "clone", compacted)
    assert homes.open_store(tmp_path, "d1").position == 5
    assert times == 3


def test_without_hard_links_tables_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path, 5, b"a")

    def no_link(*_: object) -> None:
        raise PermissionError("operation not permitted")

    monkeypatch.setattr(os, "link", no_link)
    store = homes.open_store(tmp_path, "d1")
    assert (store.position, store.get(b"a")) == (5, b"5 of a")


# --- what cannot be used -----------------------------------------------------------------------


def broken(store: Path) -> None:
    for manifest in store.glob("MANIFEST-*"):
        manifest.write_bytes(b"broken")


def test_behind_a_broken_store_comes_the_next_older_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    zombie = opened_elsewhere(tmp_path)  # keeps the older one alive
    newer = written(tmp_path, 9, b"a")
    broken(newer)
    with caplog.at_level(logging.WARNING):
        store = homes.open_store(tmp_path, "d1")
    zombie.kill()
    zombie.wait(30)
    assert (store.position, store.get(b"a")) == (5, b"5 of a")
    (told,) = caplog.messages
    assert told.startswith(f"{newer} is left unread: The store ")
    assert (
        "The next older one is taken, without one a checkpoint, and else the profiles are folded again"
        in told
    )
    assert not newer.exists()


def test_without_any_other_it_is_built_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    old = written(tmp_path, 9, b"a")
    broken(old)
    assert homes.open_store(tmp_path, "d1").position is None
    assert len(caplog.messages) == 1
    assert old.exists(), "until there is something better it may be looked at"
    written(tmp_path, 3)
    homes.open_store(tmp_path, "d1")
    assert not old.exists()


@pytest.mark.parametrize("what", ["definition", "layout"])
def test_a_store_of_something_else_is_left_unread(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    written(tmp_path, 9, b"a")
    if what == "layout":
        monkeypatch.setattr("tables.store.LAYOUT", LAYOUT + 1)
    store = homes.open_store(tmp_path, "d1" if what == "layout" else "d2")
    assert (store.position, store.get(b"a")) == (None, None)
    assert "was written for definition d1" in caplog.text


def test_a_place_where_nothing_can_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"The folder .* cannot be made"):
        homes.open_store(tmp_path / "file" / "0000", "d1")


# --- checkpoints -------------------------------------------------------------------------------


def checkpointed(tmp_path: Path, *positions: int) -> Place:
    """Checkpoints at these positions, of a store elsewhere that has as many profiles."""
    place = Checkpoints(str(tmp_path / "copies"), "cards", "d1").place("customer", 0)
    store = homes.open_store(tmp_path / "elsewhere", "d1")
    for position in positions:
        store.write(snapshot(position, b"%d" % position))
        taken: Manifest = place.take(store, 0)
        assert taken.position == position
    store.close()
    return place


def test_a_cold_machine_begins_at_the_newest_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = checkpointed(tmp_path, 5, 7)
    store = homes.open_store(tmp_path / "here", "d1", place)
    assert (store.position, store.get(b"5"), store.get(b"7")) == (7, b"5 of 5", b"7 of 7")
    assert "restored from the checkpoint at offset 7" in caplog.text
    assert "MB/s" in caplog.text
    assert incarnations(tmp_path / "here") == [store.path]


@pytest.mark.parametrize(
    ("here", "copy", "first", "begins"),
    [
        (5, 5 + homes.AHEAD, 0, 5),  # to fold is as quick
        (5, 6 + homes.AHEAD, 0, 6 + homes.AHEAD),
        (5, 7, 6, 7),  # retention has cut what comes behind the store
        (5, 7, 8, 5),  # and behind the checkpoint: the caller says so
        (None, 7, 8, None),
        (9, 7, 0, 9),
    ],
)
def test_the_store_here_or_the_checkpoint(
    tmp_path: Path, here: int | None, copy: int, first: int, begins: int | None
) -> None:
    place = checkpointed(tmp_path, copy)
    if here is not None:
        written(tmp_path / "here", here)
    store = homes.open_store(tmp_path / "here", "d1", place, first)
    assert store.position == begins
    assert incarnations(tmp_path / "here") == [store.path]


def test_behind_a_damaged_checkpoint_comes_the_next_older_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = checkpointed(tmp_path, 5, 7, 9)
    root = Path(place.root)
    newest, older = (place.read(name) for name in place.names()[:2])
    (root / "manifests" / place.names()[0]).write_text("{")
    (only,) = {f for f in older.files if f.name.endswith(".sst")} - set(place.read(place.names()[2]).files)
    damaged = root / "files" / only.stored
    damaged.write_bytes(b"x" * only.size)
    assert newest.position == 9
    store = homes.open_store(tmp_path / "here", "d1", place)
    assert store.position == 5
    assert "is damaged" in caplog.messages[0]
    assert caplog.messages[1].startswith(f"The file {damaged} of a checkpoint is damaged.")


def test_with_the_checkpoints_away_the_store_here_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = checkpointed(tmp_path, 7)
    written(tmp_path / "here", 5)

    def away(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(place._fs, "ls", away)
    assert homes.open_store(tmp_path / "here", "d1", place).position == 5
    assert "cannot be read (no route to host). The worker goes on without them" in caplog.text


def test_a_restored_store_is_what_the_next_owner_clones(tmp_path: Path) -> None:
    place = checkpointed(tmp_path, 7)
    written(tmp_path / "here", 5)
    homes.restore(tmp_path / "here", "d1", place, place.read(place.names()[0]))
    assert homes.newest_position(tmp_path / "here", "d1") == 7
    store = homes.open_store(tmp_path / "here", "d1")
    assert (store.position, store.get(b"7")) == (7, b"7 of 7")


def test_a_look_at_a_living_store_leaves_nothing_behind(tmp_path: Path) -> None:
    folder = tmp_path / "customer" / "0003"
    written(folder, 5, b"a")
    owner = homes.open_store(folder, "d1")
    owner.write(snapshot(9, b"b"))
    owner.flush()
    before = sorted(folder.rglob("*"))
    with homes.looked_into(folder, "d1") as store:
        assert store is not None
        assert (store.position, store.get(b"a"), store.get(b"b")) == (9, b"5 of a", b"9 of b")
    assert sorted(folder.rglob("*")) == before
    owner.write(snapshot(12, b"c"))
    owner.close()
    with pytest.raises(StoreError, match="was written for definition d1"), homes.looked_into(folder, "d2"):
        pass
    empty = tmp_path / "empty"
    empty.mkdir()
    with homes.looked_into(empty, "d1") as store:
        assert store is None
