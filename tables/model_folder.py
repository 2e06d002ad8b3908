"""Where exported models lie: a folder for each version, and a file for each alias, which holds a version.

<pipeline>/<version>/model.onnx     the graph, the only thing that is ever loaded
<pipeline>/<version>/model.json     its card (models.scoring.Card)
<pipeline>/<version>/features.txt   the names of its inputs in their order, for people
<pipeline>/<version>/digest         SHA-256 of graph and card
<pipeline>/<version>/archived       is there when it was put away
<pipeline>/<version>/canary         what share it has, or had, as the canary, and why it was taken back
<pipeline>/champion                 the version that scores; likewise `previous`, `canary` and `challenger-*`
"""

from __future__ import annotations

import hashlib
import re
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from models.canary import Canary
from models.pipeline import Pipeline
from models.scoring import Card, Model, ModelError, Refused

CHAMPION, PREVIOUS, CANARY = "champion", "previous", "canary"
GRAPH, CARD, FEATURES, DIGEST, ARCHIVED = "model.onnx", "model.json", "features.txt", "digest", "archived"
LARGEST = 256 * 2**20  # bytes of a graph or a card; a thousand deep trees take some ten million

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")  # of versions and aliases, which become paths


class Version(msgspec.Struct):
    """What a registry says of a version. created: ms since the epoch."""

    version: str
    created: int
    definition: str
    metrics: dict[str, float]
    archived: bool = False
    canary: Canary | None = None


def digest_of(graph: bytes, card: bytes) -> str:
    """What tells these two files from any others."""
    return hashlib.sha256(len(graph).to_bytes(8, "big") + graph + card).hexdigest()


def is_name(text: str) -> bool:
    """Whether a version or alias may be called so, by people or by a server."""
    return _NAME.fullmatch(text) is not None


@dataclass(frozen=True)
class ModelFolder:
    """A registry of its own, and what workers keep of another one."""

    root: Path
    largest: int = LARGEST

    @property
    def folder(self) -> ModelFolder:
        return self

    def aliases(self, name: str) -> dict[str, str]:
        """Version by alias."""
        home = self.root / name
        try:
            files = sorted(f for f in home.iterdir() if is_name(f.name)) if home.is_dir() else []
            return {file.name: file.read_text().strip() for file in files if file.is_file()}
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"The aliases in {home} cannot be read ({error}); mend that.") from None

    def versions(self, name: str) -> list[Version]:
        """The newest first. One whose card cannot be read has no definition and no metrics."""
        cards = [card for card in (self.root / name).glob(f"*/{CARD}") if is_name(card.parent.name)]
        return sorted(map(_listed, cards), key=lambda v: -v.created)

    def point(self, name: str, alias: str, version: str) -> None:
        """Let an alias name a version. A crash leaves the old one or the new one."""
        part = self.root / name / f".{alias}.{secrets.token_hex(4)}"
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(version + "\n")
        part.replace(self.root / name / alias)

    def unpoint(self, name: str, alias: str) -> None:
        """Let an alias name nothing."""
        (self.root / name / alias).unlink(missing_ok=True)

    def archive(self, name: str, version: str) -> None:
        """Put a version away. Its files stay."""
        (self.root / name / version / ARCHIVED).touch()

    def canary(self, name: str, version: str) -> Canary | None:
        """What a version has, or had, as the canary; None where it never was."""
        return _canary(self.root / name / version)

    def note(self, name: str, version: str, canary: Canary) -> None:
        """Write that, whole or not at all."""
        part = self.root / name / version / f".{CANARY}.{secrets.token_hex(4)}"
        part.write_bytes(msgspec.json.encode(canary))
        part.replace(self.root / name / version / CANARY)

    def publish(self, name: str, version: str) -> None:
        """What is saved is published."""

    def fetch(self, name: str, version: str) -> None:
        """What is here need not be fetched."""

    def save(self, graph: bytes, card: Card, files: Mapping[str, bytes] | None = None) -> Path:
        """Write a version, whole or not at all. files: what else belongs to it, by name."""
        written = msgspec.json.format(msgspec.json.encode(card))
        names = "".join(f"{feature}\n" for feature in card.features).encode()
        whole = {GRAPH: graph, CARD: written, FEATURES: names, **(files or {})}
        return self.adopt(card.pipeline, card.version, whole)

    def adopt(self, name: str, version: str, files: Mapping[str, bytes]) -> Path:
        """Write a version's files as they are, whole or not at all."""
        home, digest = self.root / name / version, digest_of(files[GRAPH], files[CARD])
        if self.holds(name, version, digest):
            return home
        was_there = home.exists()
        part = home.with_name(f".{version}.{secrets.token_hex(4)}")
        old = part.with_name(part.name + ".old")
        part.mkdir(parents=True)
        for file, content in {**files, DIGEST: digest.encode()}.items():
            (part / file).write_bytes(content)
        if was_there:  # damaged
            home.replace(old)
        try:
            part.replace(home)
        except OSError:  # another process was quicker
            if not self.holds(name, version, digest):
                raise
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
        return home

    def holds(self, name: str, version: str, digest: str) -> bool:
        """Whether the version is here with just this content."""
        try:
            graph, card = self._files(name, version)
        except ModelError:
            return False
        return digest_of(graph, card) == digest

    def read(self, name: str, version: str) -> tuple[bytes, Card]:
        """A version's graph and card. Raises Refused where they are not what was written."""
        graph, written = self._files(name, version)
        return graph, parse_card(written, version)

    def load(self, pipeline: Pipeline, version: str | None = None) -> Model:
        """A version as a worker takes it, the champion by default. Raises ModelError."""
        if version is None:
            version = self.aliases(pipeline.name).get(CHAMPION)
        if version is None:
            raise ModelError(
                f"There is no model of {pipeline.name} in {self.root}; "
                f"run `headrace train --pipeline {pipeline.name}`."
            )
        graph, card = self.read(pipeline.name, version)
        return Model(graph, card, pipeline)

    def _files(self, name: str, version: str) -> tuple[bytes, bytes]:
        home = self.root / name / version
        if not is_name(version):  # it would lead elsewhere
            raise damaged(version, "this is no name of a version")
        try:
            graph, card = (self._bounded(home / file, version) for file in (GRAPH, CARD))
            digest = (home / DIGEST).read_text()
        except OSError as error:
            raise Refused(
                "damaged",
                f"The model {version} of {name} is not whole ({error.filename} cannot be read); "
                f"run `headrace train --pipeline {name}`, or promote another.",
            ) from None
        if digest_of(graph, card) != digest:
            raise damaged(version, f"{home} does not hold what its digest says")
        return graph, card

    def _bounded(self, file: Path, version: str) -> bytes:
        if file.stat().st_size > self.largest:
            raise too_large(version, file.name, self.largest)
        return file.read_bytes()


def _listed(card_file: Path) -> Version:
    home, created = card_file.parent, card_file.stat().st_mtime_ns // 1_000_000
    archived = (home / ARCHIVED).exists()
    try:
        card = parse_card(card_file.read_bytes(), home.name)
    except Refused:
        return Version(home.name, created, "", {}, archived)
    return Version(home.name, created, card.definition, card.metrics, archived, _canary(home))


def _canary(home: Path) -> Canary | None:
    try:
        return parse_canary((home / CANARY).read_bytes())
    except FileNotFoundError:
        return None


def parse_canary(written: bytes | str) -> Canary | None:
    """None where it is none of ours: such a version decides nothing."""
    try:
        return msgspec.json.decode(written, type=Canary)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None


def parse_card(written: bytes, version: str) -> Card:
    """Raises Refused where it is no card, or another version's."""
    try:
        card = msgspec.json.decode(written, type=Card)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise damaged(version, f"its card cannot be read: {error}") from None
    if card.version != version:
        raise damaged(version, f"its card is of {card.version}")
    return card


def damaged(version: str, how: str) -> Refused:
    return Refused("damaged", f"The model {version} is damaged ({how}); train again, or promote another.")


def too_large(version: str, file: str, largest: int) -> Refused:
    return Refused(
        "size",
        f"{file} of the model {version} is larger than {largest // 2**20} MiB; train a smaller one, or raise "
        "HEADRACE_MODEL_MIB.",
    )
