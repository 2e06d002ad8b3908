"""The store on a real RocksDB: all of a batch or nothing, and a prefix of batches after any kill."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import msgspec
import pytest

from models.windows import NULL
from tables.store import LAYOUT, Progress, Snapshot, Store, StoreError, if_free, position_of

ROOT = Path(__file__).parents[2]


def snapshot(position: int, *keys: bytes, seen: dict[int, int] | None = None) -> Snapshot:
    return Snapshot(0, Progress(position, seen or {}), [(k, b"%d of " % position + k) for k in keys])


def test_a_new_store_has_no_position(tmp_path: Path) -> None:
    store = Store(tmp_path / "deep" / "down" / "0000", "d1")
    assert (store.progress, store.get(b"a")) == (None, None)
    store.close()
    reopened = Store(tmp_path / "deep" / "down" / "0000", "d1")
    assert reopened.progress is None


def test_what_was_written_is_there_when_it_is_opened_again(tmp_path: Path) -> None:
    store = Store(tmp_path / "s", "d1")
    store.write(snapshot(5, b"a", b"b", seen={0: 3}))
    store.write(snapshot(9, b"b", b"", b"\x00meta", b"meta", seen={0: 4, 17: 2**40}))
    for _ in range(2):  # as it stands, and from disk
        assert store.progress == Progress(9, {0: 4, 17: 2**40})
        assert store.get(b"a") == b"5 of a"
        assert store.get(b"b") == b"9 of b"
        # an entity may have any name, and none of them is the position's
        assert [store.get(k) for k in (b"", b"\x00meta", b"meta")] == [
            b"9 of ",
            b"9 of \x00meta",
            b"9 of meta",
        ]
        assert store.get(b"c") is None
        store.close()
        store = Store(tmp_path / "s", "d1")


def test_position_and_profiles_change_in_one_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path / "s", "d1")
    store.write(snapshot(5, b"a"))
    batches = []
    real = store._db.write
    monkeypatch.setattr(
        store, "_db", Spy(store._db, lambda batch, *rest: (batches.append(batch.len()), real(batch, *rest)))
    )
    store.write(snapshot(9, b"a", b"b", b"c"))
    assert batches == [4]


class Spy:
    """A database whose writes are watched."""

    def __init__(self, db: object, write: object) -> None:
        self._db = db
        self.write = write

    def __getattr__(self, name: str) -> object:
        return getattr(self._db, name)


def test_another_definition_is_refused(tmp_path: Path) -> None:
    Store(tmp_path / "s", "d1").close()  # nothing was written: any definition may have it
    store = Store(tmp_path / "s", "d2")
    store.write(snapshot(1))
    store.close()
    with pytest.raises(StoreError) as refused:
        Store(tmp_path / "s", "d3")
    assert str(refused.value) == (
        f"The store {tmp_path / 's'} was written for definition d2 (layout {LAYOUT}), the pipeline is at d3 "
        f"(layout {LAYOUT})."
    )
    # and it was closed, so that whoever asks rightly gets it
    assert Store(tmp_path / "s", "d2").progress == Progress(1)


def test_another_layout_is_refused_before_its_values_are_read(tmp_path: Path) -> None:
    """The layout of tomorrow may keep the position otherwise, or be no such message at all."""
    tomorrow = msgspec.msgpack.encode({"layout": LAYOUT + 1, "definition": "d1", "position": "far"})
    for meta, said in (
        (tomorrow, rf"for definition d1 \(layout {LAYOUT + 1}\)"),
        (b"\xc1", "cannot be read"),
    ):
        store = Store(tmp_path / said, "d1")
        store._db[b"\x00meta"] = meta
        store.close()
        with pytest.raises(StoreError, match=rf"{said}, the pipeline is at d1 \(layout {LAYOUT}\)"):
            Store(tmp_path / said, "d1")


def test_a_broken_store_is_said(tmp_path: Path) -> None:
    store = Store(tmp_path / "s", "d1")
    store.write(snapshot(1))
    store.close()
    for manifest in (tmp_path / "s").glob("MANIFEST-*"):
        manifest.write_bytes(b"broken")
    with pytest.raises(
        StoreError, match=r"cannot be opened \(.*\); see whether its disk is full or broken\."
    ):
        Store(tmp_path / "s", "d1")


def test_a_frozen_copy_is_the_state_of_then(tmp_path: Path) -> None:
    store = Store(tmp_path / "s", "d1")
    store.write(snapshot(5, b"a"))
    store.freeze(tmp_path / "s" / "frozen")
    store.write(snapshot(9, b"a"))
    assert position_of(tmp_path / "s" / "frozen", "d1") == 5
    with pytest.raises(StoreError, match=r"d1 .*, the pipeline is at d2"):
        position_of(tmp_path / "s" / "frozen", "d2")
    store.close()
    with pytest.raises(StoreError):
        store.freeze(tmp_path / "s" / "again")
    store = Store(tmp_path / "s", "d1")  # which has a folder in it that is not its own
    assert (store.position, store.get(b"a")) == (9, b"9 of a")


def test_who_lives_is_known_to_all(tmp_path: Path) -> None:
    """In this process too, where looking must not take a lock away."""
    store = Store(tmp_path / "s", "d1")
    for _ in range(2):
        with if_free(tmp_path / "s") as free:
            assert not free
    store.close()
    other = child("""
        store = Store(Path(PATH), "d1")
        print("open", flush=True)
        input()
    """, PATH=str(tmp_path / "s"))  # fmt: skip
    assert other.stdout.readline() == "open\n"
    with if_free(tmp_path / "s") as free:
        assert not free
    other.kill()
    assert other.wait(30) == -signal.SIGKILL
    with if_free(tmp_path / "s") as free:
        assert free


def test_a_place_that_cannot_be_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "s"):
        with pytest.raises(StoreError, match="cannot be opened"):
            Store(path, "d1")


def test_a_snapshot_holds_for_an_entity_what_it_was(tmp_path: Path) -> None:
    """A megabyte in one profile, and ten thousand profiles in one batch."""
    store = Store(tmp_path / "s", "d1")
    store.write(
        Snapshot(0, Progress(1), [(b"big", bytes(2**20)), *((b"%d" % i, b"%d" % -i) for i in range(10_000))])
    )
    store.flush()
    assert store.get(b"big") == bytes(2**20)
    assert all(store.get(b"%d" % i) == b"%d" % -i for i in range(10_000))


# --- crashes -----------------------------------------------------------------------------------

# Batch n of the log changes three of ten profiles, and says so in each; some are large, so that RocksDB
# flushes and compacts on its own, too.
KEYS = 10


def changed(n: int) -> list[int]:
    return [n % KEYS, n * 7 % KEYS, n * n % KEYS]


def expected(position: int) -> dict[int, int]:
    """The last batch that changed each profile, when so many were written."""
    return {key: n for n in range(position) for key in changed(n)}


WRITER = f"""
    rng = random.Random(SEED)
    store = Store(Path(PATH), "d1")
    for n in range(store.progress.position if store.progress else 0, 10**9):
        store.write(Snapshot(0, Progress(n + 1, {{3: n}}), [
            (b"%d" % key, b"%d " % n + rng.randbytes(rng.choice([20, 200_000])))
            for key in sorted({{n % {KEYS}, n * 7 % {KEYS}, n * n % {KEYS}}})
        ]))
        print(n + 1, "written", flush=True)
        if rng.random() < 0.05:
            store.flush()
            print(n + 1, "flushed", flush=True)
"""


def child(code: str, **names: object) -> subprocess.Popen[str]:
    """Another process that has a store."""
    head = "import random\nfrom pathlib import Path\nfrom tables.store import Progress, Snapshot, Store, StoreError\n"
    head += "".join(f"{name} = {value!r}\n" for name, value in names.items())
    return subprocess.Popen(
        [sys.executable, "-c", head + textwrap.dedent(code)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.timeout(120)
def test_a_killed_worker_leaves_a_prefix_of_whole_batches(tmp_path: Path) -> None:
    """Killed at eight moments, each time continued from what the store holds."""
    rng = random.Random(5)
    position, lost = 0, 0
    for life in range(8):
        writer = child(WRITER, SEED=life, PATH=str(tmp_path / "s"))
        assert writer.stdout is not None
        last, durable, said = rng.randrange(1, 150), position, position
        try:
            for line in writer.stdout:
                said, durable = heard(line, said, durable)
                if said >= position + last:
                    break
        finally:
            writer.kill()
            for line in writer.stdout:  # what it said until it died
                said, durable = heard(line, said, durable)
            assert writer.wait(30) == -signal.SIGKILL
        store = Store(tmp_path / "s", "d1")
        held = store.progress.position if store.progress else 0
        assert durable <= held, "what was flushed is durable"
        assert {k: int(v.split()[0]) for k in range(KEYS) if (v := store.get(b"%d" % k))} == expected(held)
        assert store.progress == (Progress(held, {3: held - 1}) if held else None)
        store.close()
        position, lost = held, lost + said - held
    assert position > 0
    assert lost > 0, "else nothing crashed"


def heard(line: str, said: int, durable: int) -> tuple[int, int]:
    count, what = line.split()
    return int(count), int(count) if what == "flushed" else durable


def test_the_position_is_stored_as_it_is_documented(tmp_path: Path) -> None:
    """A store of today is read by the version of tomorrow: this layout may change only with LAYOUT."""
    store = Store(tmp_path / "s", "d1")
    store.write(snapshot(7, b"a", seen={2: 5}))
    raw = dict(store._db.items())
    assert raw.keys() == {b"\x00meta", b"\x01a"}
    assert msgspec.msgpack.decode(raw[b"\x00meta"]) == {
        "layout": 2, "definition": "d1",
        "progress": {"position": 7, "seen": {2: 5}, "sent": {}, "clock": NULL, "degraded_until": NULL},
    }  # fmt: skip
