"""The store of one log partition: its profiles and its position in RocksDB, changed together.

One WriteBatch carries the profiles that a flush makes durable, the position behind them and what
was seen of each writer. There is one column family and no WAL, so what a crash takes is a suffix of
whole batches, and the log still has it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec
from rocksdict import (
    BlockBasedOptions,
    Cache,
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


class _Meta(msgspec.Struct):
    layout: int
    definition: str
    progress: Progress


class Store:
    """Open on construction; `progress` is None in a new store."""

    def __init__(self, path: Path, definition: str) -> None:
        """Raises StoreError where another process holds the store, or another definition wrote it."""
        self.path = path
        self._definition = definition
        options = Options(raw_mode=True)
        options.set_write_buffer_size(16 * 2**20)
        options.set_keep_log_file_num(2)
        options.set_write_buffer_manager(_BUFFERS)
        blocks = BlockBasedOptions()
        blocks.set_block_cache(_BLOCKS)
        blocks.set_bloom_filter(10, False)  # a new key is not looked for in every file
        options.set_block_based_table_factory(blocks)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = Rdict(str(path), options)
        except Exception as error:  # rocksdict raises plain Exception
            if "While lock file" in str(error) or "lock hold by" in str(error):
                raise StoreError(
                    f"Another process holds the profiles in {path}. Stop it, or give this worker its own "
                    "data root (HEADRACE_DATA_ROOT)."
                ) from None
            raise StoreError(
                f"The store {path} cannot be opened ({error}). Remove it: it is folded again from the log."
            ) from None
        self._unlogged = WriteOptions()
        self._unlogged.disable_wal = True
        self.progress: Progress | None = None
        self._load()

    def _load(self) -> None:
        raw = self._db.get(_META)
        if raw is None:
            return
        meta = msgspec.msgpack.decode(raw, type=_Meta)
        if (meta.layout, meta.definition) != (LAYOUT, self._definition):
            self.close()
            raise StoreError(
                f"The store {self.path} was written for definition {meta.definition} (layout {meta.layout}), the "
                f"pipeline is at {self._definition} (layout {LAYOUT}). Remove it: it is folded again from the log."
            )
        self.progress = meta.progress

    def get(self, key: bytes) -> bytes | None:
        """The packed profile of an entity."""
        value: bytes | None = self._db.get(_PROFILE + key)
        return value

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

    def _unwritable(self, error: Exception) -> StoreError:
        return StoreError(f"The store {self.path} cannot be written ({error}); see whether its disk is full.")

    def close(self) -> None:
        self._db.close()
