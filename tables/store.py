"""The store of one log partition: its profiles and its position in RocksDB, changed together.

One WriteBatch carries the profiles that a flush makes durable, the position behind them and what
was seen of each writer. There is one column family and no WAL, so what a crash takes is a suffix of
whole batches, and the log still has it.

A directory has one owner for ever (tables.homes), which holds a lock on it while it lives.
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import msgspec
from rocksdict import (
    AccessType,
    BlockBasedOptions,
    Cache,
    Checkpoint,
    Options,
    Rdict,
    WriteBatch,
    WriteBufferManager,
    WriteOptions,
)

from models.errors import HeadraceError
from models.windows import NULL

LAYOUT = 2  # of keys and values below
_META = b"\x00meta"  # no entity's key begins with a zero byte: keys have the prefix below
_PROFILE = b"\x01"

# All stores of a process share these: by default each has 2 GiB of blocks, and its own buffers.
_BLOCKS = Cache(64 * 2**20)
_BUFFERS = WriteBufferManager(64 * 2**20, False)


class StoreError(HeadraceError):
    """A store that cannot be used: which, and what to do."""


class Progress(msgspec.Struct, frozen=True):
    """How far a partition's fold has come.

    position: the next offset to apply. seen: by source, what has come of it (models.records.fresh).
    sent: by partition of the next log, the last offset handed on to it. clock: the latest event time,
    ms. degraded_until: values as of a time before this lack what retention has cut, ms.
    """

    position: int
    seen: dict[int, int] = {}
    sent: dict[int, int] = {}
    clock: int = NULL
    degraded_until: int = NULL


@dataclass(frozen=True)
class Snapshot:
    """What one flush writes: a state of the partition between two micro-batches."""

    partition: int
    progress: Progress
    profiles: list[tuple[bytes, bytes]]


class _Head(msgspec.Struct):
    """What every layout of the meta value begins with."""

    layout: int
    definition: str


class _Meta(_Head):
    progress: Progress


def _options() -> Options:
    options = Options(raw_mode=True)
    options.set_write_buffer_size(16 * 2**20)
    options.set_keep_log_file_num(2)
    options.set_write_buffer_manager(_BUFFERS)
    blocks = BlockBasedOptions()
    blocks.set_block_cache(_BLOCKS)
    blocks.set_bloom_filter(10, False)  # a new key is not looked for in every file
    options.set_block_based_table_factory(blocks)
    return options


def _unopened(path: Path, error: Exception) -> StoreError:
    return StoreError(f"The store {path} cannot be opened ({error}); see whether its disk is full or broken.")


def _meta(db: Rdict, path: Path, definition: str) -> _Meta | None:
    """None where nothing was ever written. Raises StoreError for what another definition or layout wrote."""
    raw = db.get(_META)
    if raw is None:
        return None
    try:
        head = msgspec.msgpack.decode(raw, type=_Head)
        if (head.layout, head.definition) == (LAYOUT, definition):
            return msgspec.msgpack.decode(raw, type=_Meta)
        written = f"definition {head.definition} (layout {head.layout})"
    except msgspec.DecodeError:
        written = "a layout that cannot be read"
    raise StoreError(
        f"The store {path} was written for {written}, the pipeline is at {definition} (layout {LAYOUT})."
    )


def position_of(path: Path, definition: str) -> int | None:
    """The position of a store that nobody writes, changing nothing in it. Raises StoreError as Store does."""
    try:
        db = Rdict(str(path), _options(), access_type=AccessType.read_only())
    except Exception as error:  # rocksdict raises plain Exception
        raise _unopened(path, error) from None
    try:
        meta = _meta(db, path, definition)
    finally:
        db.close()
    return None if meta is None else meta.progress.position


@contextmanager
def alive(path: Path) -> Iterator[None]:
    """Hold a directory as one that a living process uses: see `is_free`."""
    held = _hold(path)
    try:
        yield
    finally:
        os.close(held)


def _hold(path: Path) -> int:
    # A lock of the open file, unlike RocksDB's own, is not lost when this process closes another descriptor.
    held = os.open(path, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_SH)
    return held


@contextmanager
def if_free(path: Path) -> Iterator[bool]:
    """Whether no living process, this one included, uses the directory."""
    held = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        free = True
    except BlockingIOError:
        free = False
    try:
        yield free
    finally:
        os.close(held)


class Store:
    """Open on construction; `progress` is None in a new store."""

    def __init__(self, path: Path, definition: str) -> None:
        """Raises StoreError where it is broken, or another definition or layout wrote it."""
        self.path = path
        self.closed = False
        self._definition = definition
        self._freezing = threading.Lock()
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._held = _hold(path)
        except OSError as error:
            raise _unopened(path, error) from None
        try:
            self._db = Rdict(str(path), _options())
        except Exception as error:  # rocksdict raises plain Exception
            os.close(self._held)
            raise _unopened(path, error) from None
        self._unlogged = WriteOptions()
        self._unlogged.disable_wal = True
        try:
            meta = _meta(self._db, path, definition)
        except StoreError:
            self.close()
            raise
        self.progress: Progress | None = None if meta is None else meta.progress

    @property
    def position(self) -> int | None:
        """The next offset to apply; None in a new store."""
        return None if self.progress is None else self.progress.position

    def get(self, key: bytes) -> bytes | None:
        """The packed profile of an entity."""
        value: bytes | None = self._db.get(_PROFILE + key)
        return value

    def keys(self, after: bytes, most: int) -> list[bytes]:
        """Up to `most` of the entities that are stored, in order, behind this one."""
        behind = self._db.keys(from_key=_PROFILE + after + b"\x00")
        return [key[len(_PROFILE) :] for key in islice(behind, most)]

    def write(self, snapshot: Snapshot) -> None:
        """Profiles and progress in one step. Not yet on disk: see `flush`."""
        batch = WriteBatch(raw_mode=True)
        for key, packed in snapshot.profiles:
            batch.put(_PROFILE + key, packed)
        self.progress = snapshot.progress
        batch.put(_META, msgspec.msgpack.encode(_Meta(LAYOUT, self._definition, snapshot.progress)))
        try:
            self._db.write(batch, self._unlogged)
        except Exception as error:  # rocksdict raises plain Exception
            raise self._unwritable(error) from None

    def flush(self) -> None:
        """Make what was written durable. Releases the GIL: call it in a thread."""
        try:
            self._db.flush()
        except Exception as error:
            raise self._unwritable(error) from None

    def freeze(self, target: Path) -> None:
        """A copy of the store as it is, on the same disk by hard links. Call it in a thread.

        target: must not exist. Raises StoreError where it cannot be, or the store was closed.
        """
        with self._freezing:
            try:
                Checkpoint(self._db).create_checkpoint(str(target))
            except Exception as error:
                raise self._unwritable(error) from None

    def _unwritable(self, error: Exception) -> StoreError:
        return StoreError(f"The store {self.path} cannot be written ({error}); see whether its disk is full.")

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        with self._freezing:
            self._db.close()
        os.close(self._held)
