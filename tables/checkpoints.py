"""Checkpoints: copies of a partition's store away from its disk, in a folder or any fsspec URL.

RocksDB's tables never change, so each is uploaded once, under a name that tells its content. A manifest
names the files of one state, and is written last: a checkpoint is complete, or not there.
"""

from __future__ import annotations

import datetime
import hashlib
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, BinaryIO

import fsspec
import msgspec

from models.errors import HeadraceError
from tables.store import LAYOUT, Store, position_of

KEPT = 3  # manifests of a partition: if the newest is damaged there is another, and one more
# A file that no manifest names may belong to one that is being written, so it stays for so long; and
# who needs longer for a checkpoint gives it up.
GRACE_S = 900.0
LOOK_S = 30.0  # what was seen so long ago is no reason to remove anything: the process may have been stopped

_LAYOUT_OF_MANIFESTS = 1


class CheckpointError(HeadraceError):
    """A checkpoint that cannot be taken or used: which, and what to do."""


class File(msgspec.Struct, frozen=True):
    """A file of a store. name: as in the store's directory, with no way out of it."""

    name: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$")]
    size: int
    sha256: str

    @property
    def stored(self) -> str:
        """Its name under `files`: equal names are equal files."""
        return f"{self.name}.{self.size}.{self.sha256}"


class Manifest(msgspec.Struct, frozen=True):
    """One state of a partition's store. created_at: ms since the epoch."""

    version: int
    layout: int
    definition: str
    entity: str
    partition: int
    position: int
    created_at: int
    files: list[File]

    @property
    def size(self) -> int:
        """Bytes of all its files."""
        return sum(f.size for f in self.files)


class Checkpoints:
    """The checkpoints of one instance and definition under a URL."""

    def __init__(self, url: str, instance: str, definition: str) -> None:
        """Raises CheckpointError where there is no file system for the URL."""
        try:
            self.fs, root = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise CheckpointError(
                f"Checkpoints cannot go to {url} ({error}); install what it names, or set HEADRACE_CHECKPOINTS to a "
                "folder or another URL."
            ) from None
        self.url, self.definition = url, definition
        self._instance = f"{root.rstrip('/')}/{instance}"
        self._root = f"{self._instance}/{definition}"

    def place(self, entity: str, partition: int) -> Place:
        return Place(self, f"{self._root}/{entity}/{partition:04d}", entity, partition)

    def places(self) -> list[Place]:
        """Those that have checkpoints, by entity and partition. Raises CheckpointError."""
        with _told(self.url, "read"):
            self.fs.invalidate_cache()
            found = sorted(self.fs.glob(f"{self._root}/*/*/manifests"))
        parts = [path.split("/") for path in found]
        return [self.place(p[-3], int(p[-2])) for p in parts if p[-2].isdecimal()]

    def clear(self) -> None:
        """Remove all checkpoints of the instance, of any definition. Raises CheckpointError."""
        with _told(self.url, "removed"):
            if self.fs.exists(self._instance):
                self.fs.rm(self._instance, recursive=True)


class Place:
    """The checkpoints of one partition."""

    def __init__(self, checkpoints: Checkpoints, root: str, entity: str, partition: int) -> None:
        self.entity, self.partition = entity, partition
        self._fs, self.definition = checkpoints.fs, checkpoints.definition
        self.root = root
        self._sums: dict[tuple[Path, str], str] = {}  # of tables, by the store's directory and name

    def names(self) -> list[str]:
        """The manifests, newest first. Raises CheckpointError."""
        with _told(self.root, "read"):
            names = [name for name in self._sizes("manifests") if name.endswith(".json")]
        return sorted(names, reverse=True)

    def read(self, name: str) -> Manifest:
        """Raises CheckpointError where it is damaged, or of another layout or definition."""
        path = f"{self.root}/manifests/{name}"
        with _told(path, "read"):
            raw = self._fs.cat_file(path)
        try:
            manifest = msgspec.json.decode(raw, type=Manifest)
        except msgspec.DecodeError as error:
            raise CheckpointError(f"The manifest {path} is damaged ({error}).") from None
        if (manifest.layout, manifest.definition) != (LAYOUT, self.definition):
            raise CheckpointError(
                f"The checkpoint {path} was written for definition {manifest.definition} (layout {manifest.layout}), "
                f"the pipeline is at {self.definition} (layout {LAYOUT})."
            )
        return manifest

    # --- taking --------------------------------------------------------------------------------

    def take(self, store: Store, now_ms: int) -> Manifest:
        """Upload the state of an open store, and remove what is older than the newest three. Call it in a thread.

        Raises CheckpointError, StoreError; then the checkpoints are as before.
        """
        frozen = store.path / "frozen"
        shutil.rmtree(frozen, ignore_errors=True)  # of one that failed
        started = time.monotonic()
        try:
            store.freeze(frozen)
            position = position_of(frozen, self.definition)
            assert position is not None, "a store that was never written has no checkpoint"
            files = self._described(store.path, frozen)
            with _told(self.root, "written"):
                self._upload_missing(store, frozen, files)
                if time.monotonic() - started > GRACE_S:
                    raise CheckpointError(
                        f"The checkpoint {self.root} took longer than {GRACE_S:.0f} s and was given up; give the "
                        "worker a quicker way to it."
                    )
                manifest = Manifest(
                    _LAYOUT_OF_MANIFESTS, LAYOUT, self.definition, self.entity, self.partition, position, now_ms, files
                )  # fmt: skip
                name = f"{position:020d}-{store.path.name}-{secrets.token_hex(4)}.json"
                self._put(f"manifests/{name}", msgspec.json.encode(manifest))
                self._prune(now_ms)
        finally:
            shutil.rmtree(frozen, ignore_errors=True)
        return manifest

    def _described(self, home: Path, frozen: Path) -> list[File]:
        """The files of a frozen store. A table is summed once in its owner's life."""
        sums, files = {}, []
        for path in sorted(frozen.iterdir()):
            if path.name.startswith("OPTIONS-"):
                continue  # written anew by whoever opens it
            digest = self._sums.get((home, path.name)) or _sum_of_path(path)
            if path.suffix == ".sst":
                sums[home, path.name] = digest
            files.append(File(path.name, path.stat().st_size, digest))
        self._sums = sums
        return files

    def _upload_missing(self, store: Store, frozen: Path, files: list[File]) -> None:
        # Only what the newest checkpoint names is relied on: anything else may be removed at any moment.
        newest = self.names()[:1]
        try:
            named = {f.stored for name in newest for f in self.read(name).files}
        except CheckpointError:  # damaged, or removed meanwhile
            named = set()
        there = self._sizes("files")
        for file in files:
            if file.stored in named and there.get(file.stored) == file.size:
                continue
            if store.closed:
                raise CheckpointError(f"The checkpoint {self.root} was given up with its partition.")
            self._put(f"files/{file.stored}", frozen / file.name)

    def _put(self, name: str, content: bytes | Path) -> None:
        """Complete or not there, wherever it goes."""
        part = f"{self.root}/{name}.{secrets.token_hex(4)}.part"
        self._fs.makedirs(part.rpartition("/")[0], exist_ok=True)
        if isinstance(content, Path):
            self._fs.put_file(str(content), part)
        else:
            self._fs.pipe_file(part, content)
        self._fs.mv(part, f"{self.root}/{name}")

    def _prune(self, now_ms: int) -> None:
        looked = time.monotonic()
        names = self.names()
        for old in names[KEPT:]:
            self._remove(f"manifests/{old}")
        named = {f.stored for name in names[:KEPT] for f in self.read(name).files}
        for folder in ("files", "manifests"):
            for name in self._sizes(folder):
                if name in named or name.endswith(".json") or not self._is_old(f"{folder}/{name}", now_ms):
                    continue
                if time.monotonic() - looked > LOOK_S:
                    return
                self._remove(f"{folder}/{name}")

    def _is_old(self, name: str, now_ms: int) -> bool:
        try:
            modified: datetime.datetime = self._fs.modified(f"{self.root}/{name}")
        except FileNotFoundError:
            return False  # another owner was quicker
        if modified.tzinfo is None:
            modified = modified.replace(tzinfo=datetime.UTC)
        return now_ms / 1000 - modified.timestamp() > GRACE_S

    def _remove(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self._fs.rm_file(f"{self.root}/{name}")

    def _sizes(self, folder: str) -> dict[str, int]:
        """What is in one of the two folders, as it is now."""
        self._fs.invalidate_cache()
        try:
            found = self._fs.ls(f"{self.root}/{folder}", detail=True)
        except FileNotFoundError:
            return {}
        return {f["name"].rpartition("/")[2]: f["size"] for f in found if f["type"] == "file"}

    # --- using ---------------------------------------------------------------------------------

    def restore(self, manifest: Manifest, target: Path) -> None:
        """Download into an empty directory, every file checked. Raises CheckpointError."""
        # What makes it a store comes last.
        for file in sorted(manifest.files, key=lambda f: f.name == "CURRENT"):
            with _told(self._path(file), "read"):
                self._fs.get_file(self._path(file), str(target / file.name))
            if _sum_of_path(target / file.name) != file.sha256:
                raise self._damaged(file)

    def verify(self, file: File) -> None:
        """Read a file whole. Raises CheckpointError where it is not what the manifest says."""
        with _told(self._path(file), "read"), self._fs.open(self._path(file), "rb") as content:
            found = _sum_of(content)
        if found != file.sha256:
            raise self._damaged(file)

    def _path(self, file: File) -> str:
        return f"{self.root}/files/{file.stored}"

    def _damaged(self, file: File) -> CheckpointError:
        return CheckpointError(f"The file {self._path(file)} of a checkpoint is damaged.")


@contextmanager
def _told(where: str, done: str) -> Iterator[None]:
    """What a file system raises, and each has its own, as a CheckpointError."""
    try:
        yield
    except HeadraceError:
        raise
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise CheckpointError(f"The checkpoints in {where} cannot be {done} ({reason}).") from None


def _sum_of_path(path: Path) -> str:
    with path.open("rb") as content:
        return _sum_of(content)


def _sum_of(content: BinaryIO) -> str:
    return hashlib.file_digest(content, "sha256").hexdigest()  # type: ignore[arg-type]
