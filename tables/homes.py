"""Where the store of a log partition lives: a directory for each incarnation of its owner.

A process that was stopped keeps its directory, and whoever takes its partition over clones it into one
of its own. So nobody waits for anybody, and what the stopped one writes when it wakes harms nobody.
Any state of the old store will do: its position is inside, and the log has what comes behind it.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from models.pipeline import Pipeline
from tables.checkpoints import CheckpointError, Manifest, Place
from tables.store import Store, StoreError, alive, if_free, position_of

TRIES = 20  # of cloning a store whose living owner compacts it meanwhile
AHEAD = 100_000  # records by which a checkpoint is ahead: to restore it is quicker than to fold them

_NAME = re.compile(r"\d{8}-[0-9a-f]{8}")  # a number that grows, and what makes it unique

log = logging.getLogger(__name__)


def folder_of(data_root: Path, pipeline: Pipeline, entity: str, partition: int) -> Path:
    """Where the incarnations of a log partition lie under a data root."""
    return root_of(data_root, pipeline) / entity / f"{partition:04d}"


def root_of(data_root: Path, pipeline: Pipeline) -> Path:
    """Of all partitions of a pipeline as it is defined now."""
    return data_root / "profiles" / pipeline.instance / pipeline.definition


def open_store(
    folder: Path, definition: str, place: Place | None = None, first: int = 0, at_most: int | None = None
) -> Store:
    """The store of a partition for a new owner, in a directory of its own under `folder`.

    The newest usable incarnation is cloned; a checkpoint from `place` is restored where there is none, or it
    is behind `first`, the log's first offset, or far behind the checkpoint. Else the store is empty. What
    cannot be used is told and passed over. at_most: neither counts where its position is behind this offset,
    for the log is to be folded again from there. Raises StoreError where no store can be made at all.
    """
    store, unread = _newest(folder, definition, at_most)
    if place is not None:
        store = _restored(store, folder, definition, place, first, at_most)
    _remove_dead(folder, store.path, unread if store.position is None else [])
    return store


def restore(folder: Path, definition: str, place: Place, manifest: Manifest) -> Path:
    """A new incarnation from a checkpoint, which the next owner clones. Raises CheckpointError, StoreError."""
    path = _new(folder)
    try:
        with alive(path):
            place.restore(manifest, path)
            Store(path, definition).close()
    except (CheckpointError, StoreError):
        shutil.rmtree(path, ignore_errors=True)
        raise
    return path


def newest_position(folder: Path, definition: str) -> int | None:
    """The position of the newest usable incarnation; None where there is none."""
    for path in _incarnations(folder):
        try:
            position = position_of(path, definition)
        except StoreError:
            continue
        if position is not None:
            return position
    return None


@contextmanager
def looked_into(folder: Path, definition: str) -> Iterator[Store | None]:
    """A passing copy of the newest usable incarnation, whose owner may be at work; None where there is none.

    Raises StoreError where there are some, and none can be used.
    """
    unread: StoreError | None = None
    with tempfile.TemporaryDirectory(prefix="look-", dir=folder) as scratch:
        for path in _incarnations(folder):
            try:
                store = _cloned(path, Path(scratch), definition)
            except StoreError as error:
                unread = unread or error
                continue
            if store is not None:
                try:
                    yield store
                finally:
                    store.close()
                return
    if unread is not None:
        raise unread
    yield None


def clone(source: Path, target: Path) -> None:
    """Copy a store that a living process may be writing. target: an empty directory on the same disk, best.

    Raises FileNotFoundError where a file vanished meanwhile; one that did so unseen is missing in the copy.
    """
    # 1. logs of writes, before what says that they were put into tables
    for path in source.glob("*.log"):
        shutil.copyfile(path, target / path.name)
    # 2. what says which tables there are: it only grows, and a torn end does not count
    current = (source / "CURRENT").read_bytes()
    for name in (current.decode().strip(), "rocksdict-config.json"):
        shutil.copyfile(source / name, target / name)
    # 3. the tables, which never change; one too many does no harm, RocksDB removes its name
    for path in source.glob("*.sst"):
        try:
            os.link(path, target / path.name)
        except FileNotFoundError:
            raise
        except OSError:  # a disk without hard links, or another one
            shutil.copyfile(path, target / path.name)
    # 4. what makes it a store
    (target / "CURRENT").write_bytes(current)


def _incarnations(folder: Path) -> list[Path]:
    """Newest first."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if _NAME.fullmatch(p.name)), reverse=True)


def _new(folder: Path) -> Path:
    number = 1 + max((int(p.name[:8]) for p in _incarnations(folder)), default=0)
    path = folder / f"{number:08d}-{secrets.token_hex(4)}"
    try:
        path.mkdir(parents=True)
    except OSError as error:
        raise StoreError(
            f"The folder {path} cannot be made ({error}); see whether its disk is full."
        ) from None
    return path


def _newest(folder: Path, definition: str, at_most: int | None) -> tuple[Store, list[Path]]:
    """The newest usable incarnation, cloned, else an empty store; and those that could not be used."""
    unread = []
    for old in _incarnations(folder):
        try:
            store = _cloned(old, folder, definition)
        except StoreError as error:
            log.warning(
                "%s is left unread: %s The next older one is taken, without one a checkpoint, and else the profiles "
                "are folded again from the log", old, error,
            )  # fmt: skip
            unread.append(old)
            continue
        if store is not None and at_most is not None and (store.position or 0) > at_most:
            store.close()
            shutil.rmtree(store.path, ignore_errors=True)
        elif store is not None:
            return store, unread
    return Store(_new(folder), definition), unread


def _cloned(old: Path, folder: Path, definition: str) -> Store | None:
    """The clone of one incarnation; None where nothing was ever written. Raises StoreError."""
    for _ in range(TRIES):
        before = _listing(old)
        if "CURRENT" not in before:
            return None  # its maker is at work, or ended before it was done
        path = _new(folder)
        try:
            with alive(path):
                clone(old, path)
                store = Store(path, definition)
        except (OSError, StoreError) as error:
            robbed = not path.exists()  # taken for dead before it was held
            shutil.rmtree(path, ignore_errors=True)
            if not robbed and _listing(old) == before:
                raise StoreError(str(error)) from None
            continue
        if store.position is not None:
            return store
        store.close()
        shutil.rmtree(path, ignore_errors=True)
        return None
    raise StoreError(f"It changed {TRIES} times while it was cloned.")


def _listing(store: Path) -> dict[str, int]:
    """Names and sizes of what a clone takes; equal before and after, nothing changed meanwhile."""
    try:
        return {
            e.name: e.stat().st_size
            for e in os.scandir(store)
            if e.name == "CURRENT" or e.name.startswith("MANIFEST-") or e.name.endswith(".sst")
        }
    except FileNotFoundError:  # removed, or a table that vanished between the two
        return {"CURRENT": -1} if store.exists() else {}


def _restored(
    store: Store, folder: Path, definition: str, place: Place, first: int, at_most: int | None
) -> Store:
    """The store from a checkpoint where that is better, else the one given."""
    try:
        for manifest in _better(place, store.position, first):
            if at_most is not None and manifest.position > at_most:
                continue
            started = time.perf_counter()
            try:
                path = restore(folder, definition, place, manifest)
            except (CheckpointError, StoreError) as error:
                log.warning("%s The next older checkpoint is taken, if there is one", error)
                continue
            seconds = time.perf_counter() - started
            log.warning(
                "%s: restored from the checkpoint at offset %d, %.1f MB at %.1f MB/s; the store here was at %s",
                folder, manifest.position, manifest.size / 1e6, manifest.size / 1e6 / seconds, store.position,
            )  # fmt: skip
            store.close()
            return Store(path, definition)
    except CheckpointError as error:
        log.warning("%s The worker goes on without them, from offset %s of %s", error, store.position, folder)
    return store


def _better(place: Place, position: int | None, first: int) -> Iterator[Manifest]:
    """The checkpoints that are worth more than a store at this position, newest first."""
    for name in place.names():
        try:
            manifest = place.read(name)
        except CheckpointError as error:
            log.warning("%s The next older checkpoint is taken, if there is one", error)
            continue
        if manifest.position < first:
            return
        if position is not None and first <= position and manifest.position <= position + AHEAD:
            return
        yield manifest


def _remove_dead(folder: Path, own: Path, kept: list[Path]) -> None:
    """Remove older incarnations that no living process holds."""
    for path in _incarnations(folder):
        if path.name[:8] >= own.name[:8] or path in kept:
            continue
        try:
            with if_free(path) as free:
                if free:
                    shutil.rmtree(path, ignore_errors=True)
        except FileNotFoundError:
            continue  # another owner was quicker
