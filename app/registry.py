"""Where versions of models and their aliases are kept: the folder of models alone, or an MLflow server.

With MLflow the folder is what this machine keeps of it: a version is saved there first, or fetched into it,
and what a worker loads always comes from there. So a worker starts with MLflow away.

A version is an MLflow model version with the tags below, whose run holds the files of its folder as
artifacts, the card's metrics, and as parameters what else one may compare by.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from itertools import chain
from typing import Any, Protocol

import msgspec

from app.errors import RegistryError
from app.local.services import Addresses
from app.mlflow_rest import AlreadyThere, NotThere, Rest
from app.settings import Settings
from models.canary import Canary
from models.scoring import Card, Refused
from tables.model_folder import (
    ARCHIVED,
    CANARY,
    CARD,
    FEATURES,
    GRAPH,
    ModelFolder,
    Version,
    damaged,
    digest_of,
    is_name,
    parse_canary,
    too_large,
)

VERSION, DEFINITION, DIGEST, METRICS, AWAY, SHARE = (
    f"headrace.{tag}" for tag in ("version", "definition", "digest", "metrics", "archived", "canary")
)


class Registry(Protocol):
    """Versions and aliases by pipeline: `tables.model_folder.ModelFolder`, and `Mlflow`."""

    @property
    def folder(self) -> ModelFolder: ...
    def aliases(self, name: str, /) -> dict[str, str]: ...
    def versions(self, name: str, /) -> list[Version]: ...
    def publish(self, name: str, version: str, /) -> None: ...
    def fetch(self, name: str, version: str, /) -> None: ...
    def point(self, name: str, alias: str, version: str, /) -> None: ...
    def unpoint(self, name: str, alias: str, /) -> None: ...
    def archive(self, name: str, version: str, /) -> None: ...
    def canary(self, name: str, version: str, /) -> Canary | None: ...
    def note(self, name: str, version: str, canary: Canary, /) -> None: ...


def of(settings: Settings, addresses: Addresses) -> Registry:
    """The registry that the settings name, else that of `headrace up`, else the folder."""
    folder = ModelFolder(settings.models_root, settings.model_mib * 2**20)
    address = addresses.mlflow
    return folder if address is None else Mlflow(address, folder, settings.mlflow_token)


class Mlflow:
    """An MLflow 3 server by its address. Raises RegistryError where it does not do what is asked."""

    def __init__(self, address: str, folder: ModelFolder, token: str | None = None) -> None:
        self._rest, self._folder = Rest(address, token), folder
        self._found: dict[tuple[str, str], dict[str, Any]] = {}  # by name and number: what never changes

    @property
    def folder(self) -> ModelFolder:
        return self._folder

    def aliases(self, name: str) -> dict[str, str]:
        """Version by alias, in one request. One that is not of Headrace is told as #<its number>."""
        try:
            found = self._rest.get("registered-models/get", "registered_model", name=name)
        except NotThere:
            return {}
        return {a["alias"]: self._version_of(name, a["version"]) for a in found.get("aliases", [])}

    def versions(self, name: str) -> list[Version]:
        """Those that Headrace has registered, the newest first."""
        found = [_version(row) for row in self._rows(name) if VERSION in _tags(row)]
        return sorted(found, key=lambda v: -v.created)

    def publish(self, name: str, version: str) -> None:
        """Register a version that is in the folder, once. It exists when all of it is there."""
        if self._row(name, version) is not None:
            return
        graph, card = self._folder.read(name, version)
        home, now = self._folder.root / name / version, time.time_ns() // 1_000_000
        # 1. a run, with what people compare by
        experiment = self._experiment(name)
        run = self._rest.post(
            "runs/create", "run", experiment_id=experiment, start_time=now, run_name=version
        )
        id_, uri = run["info"]["run_id"], run["info"]["artifact_uri"]
        self._rest.post("runs/log-batch", run_id=id_, metrics=_metrics(card, now), params=_params(card))
        # 2. its files
        for file in sorted(home.iterdir()):
            if file.name not in (ARCHIVED, CANARY):
                self._rest.upload(uri, file.name, file.read_bytes())
        self._rest.post("runs/update", run_id=id_, status="FINISHED", end_time=now)
        # 3. the version, which makes it seen
        with contextlib.suppress(AlreadyThere):
            self._rest.post("registered-models/create", name=name)
        tags = _listing(card, digest_of(graph, (home / CARD).read_bytes()))
        self._rest.post("model-versions/create", name=name, source=uri, run_id=id_, tags=tags)

    def fetch(self, name: str, version: str) -> None:
        """Have a version in the folder, whole, as it was registered. Raises Refused too."""
        row = self._row(name, version)
        if row is None or not is_name(version):
            raise Refused(
                "foreign",
                f"The version {version} of {name} was not registered by Headrace; promote one of "
                f"`headrace models list --pipeline {name}`.",
            )
        digest = _tags(row).get(DIGEST, "")
        if self._folder.holds(name, version, digest):
            return
        files = {file: self._bounded(row["source"], file, version) for file in (GRAPH, CARD, FEATURES)}
        if digest_of(files[GRAPH], files[CARD]) != digest:
            raise damaged(version, "MLflow's files are not those that were registered")
        self._folder.adopt(name, version, files)

    def point(self, name: str, alias: str, version: str) -> None:
        """Let an alias name a version."""
        number = self._number(name, version)
        self._rest.post("registered-models/alias", name=name, alias=alias, version=number)

    def unpoint(self, name: str, alias: str) -> None:
        """Let an alias name nothing."""
        self._rest.delete("registered-models/alias", name=name, alias=alias)

    def archive(self, name: str, version: str) -> None:
        """Put a version away. It stays in MLflow, with a tag."""
        number = self._number(name, version)
        self._rest.post("model-versions/set-tag", name=name, version=number, key=AWAY, value="true")

    def canary(self, name: str, version: str) -> Canary | None:
        """What a version has, or had, as the canary, as MLflow says now; None where it never was."""
        row = self._row(name, version)
        if row is None:
            return None
        number = str(row["version"])
        try:
            return _canary(self._rest.get("model-versions/get", "model_version", name=name, version=number))
        except NotThere:  # deleted since: what is known of a row is kept
            return None

    def note(self, name: str, version: str, canary: Canary) -> None:
        """Write that, in one request."""
        value = msgspec.json.encode(canary).decode()
        number = self._number(name, version)
        self._rest.post("model-versions/set-tag", name=name, version=number, key=SHARE, value=value)

    def _bounded(self, uri: str, file: str, version: str) -> bytes:
        content = self._rest.download(uri, file, self._folder.largest + 1)
        if len(content) > self._folder.largest:
            raise too_large(version, file, self._folder.largest)
        return content

    def _rows(self, name: str) -> Iterator[dict[str, Any]]:
        token = ""
        while True:
            page = self._rest.get(
                "model-versions/search", filter=f"name='{name}'", max_results="200", page_token=token
            )
            for row in page.get("model_versions", []):
                self._found[name, row["version"]] = row
                yield row
            token = page.get("next_page_token", "")
            if not token:
                return

    def _row(self, name: str, version: str) -> dict[str, Any] | None:
        known = [row for (of, _), row in self._found.items() if of == name]
        rows = chain(known, self._rows(name))
        return next((row for row in rows if _tags(row).get(VERSION) == version), None)

    def _version_of(self, name: str, number: str) -> str:
        row = self._found.get((name, number))
        if row is None:
            row = self._rest.get("model-versions/get", "model_version", name=name, version=number)
            self._found[name, number] = row
        return _tags(row).get(VERSION, f"#{number}")

    def _number(self, name: str, version: str) -> str:
        row = self._row(name, version)
        if row is None:
            raise no_such(name, version)
        return str(row["version"])

    def _experiment(self, name: str) -> str:
        try:
            found = self._rest.get("experiments/get-by-name", "experiment", experiment_name=name)
        except NotThere:
            found = self._rest.post("experiments/create", name=name)
        return str(found["experiment_id"])


def no_such(name: str, version: str) -> RegistryError:
    return RegistryError(
        f"There is no version {version} of {name}; see `headrace models list --pipeline {name} --all`."
    )


def _tags(row: dict[str, Any]) -> dict[str, str]:
    return {tag["key"]: tag["value"] for tag in row.get("tags", [])}


def _version(row: dict[str, Any]) -> Version:
    tags = _tags(row)
    metrics = msgspec.json.decode(tags.get(METRICS, "{}"))
    return Version(
        tags[VERSION], int(row["creation_timestamp"]), tags.get(DEFINITION, ""), metrics, AWAY in tags,
        _canary(row),
    )  # fmt: skip


def _canary(row: dict[str, Any]) -> Canary | None:
    written = _tags(row).get(SHARE)
    return None if written is None else parse_canary(written)


def _listing(card: Card, digest: str) -> list[dict[str, str]]:
    """The tags of a version: what a list of versions shows, and what tells its files from others."""
    metrics = msgspec.json.encode(_finite(card)).decode()
    tags = {VERSION: card.version, DEFINITION: card.definition, DIGEST: digest, METRICS: metrics}
    return [{"key": key, "value": value} for key, value in tags.items()]


def _metrics(card: Card, now: int) -> list[dict[str, Any]]:
    found = _finite(card).items()
    return [{"key": key, "value": value, "timestamp": now, "step": 0} for key, value in found]


def _finite(card: Card) -> dict[str, float]:
    return {key: value for key, value in card.metrics.items() if math.isfinite(value)}  # others have no JSON


def _params(card: Card) -> list[dict[str, str]]:
    params: dict[str, Any] = {"definition": card.definition, "features": len(card.features)}
    params |= {f"threshold.{name}": value for name, value in card.thresholds.items()}
    if card.tested is not None:
        params |= {"tested_after": card.tested[0], "tested_until": card.tested[1]}
    return [{"key": key, "value": str(value)} for key, value in params.items()]
