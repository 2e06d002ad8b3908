"""Where versions of models and their aliases are kept: the folder of models alone, or an MLflow server.

With MLflow the folder is what this machine keeps of it: a version is saved there first, or fetched into it,
and what a worker loads always comes from there. So a worker starts with MLflow away. Spoken is MLflow's REST
interface, by the standard library: to import MLflow takes seconds and some hundred MB.

A version is an MLflow model version with the tags below, whose run holds the files of its folder as
artifacts, the card's metrics, and as parameters what else one may compare by.
"""

from __future__ import annotations

import base64
import http.client
import math
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from itertools import chain
from typing import Any, Protocol

import msgspec

from app.local.services import Addresses
from app.settings import Settings
from models.errors import HeadraceError
from models.scoring import Card, Refused
from tables.model_folder import (
    ARCHIVED,
    CARD,
    FEATURES,
    GRAPH,
    ModelFolder,
    Version,
    damaged,
    digest_of,
    is_name,
    too_large,
)

ANSWER_S = 3.0  # for each wait within a request: a worker is to notice an alias within 5 s
LARGEST_ANSWER = 32 * 2**20  # bytes of JSON: some ten thousand versions
VERSION, DEFINITION, DIGEST, METRICS, AWAY = (
    f"headrace.{tag}" for tag in ("version", "definition", "digest", "metrics", "archived")
)


class RegistryError(HeadraceError):
    """The registry cannot be asked, or refuses. What is loaded goes on."""


class Registry(Protocol):
    """Versions and aliases by pipeline: `tables.model_folder.ModelFolder`, and `Mlflow`."""

    @property
    def folder(self) -> ModelFolder: ...
    def aliases(self, name: str, /) -> dict[str, str]: ...
    def versions(self, name: str, /) -> list[Version]: ...
    def publish(self, name: str, version: str, /) -> None: ...
    def fetch(self, name: str, version: str, /) -> None: ...
    def point(self, name: str, alias: str, version: str, /) -> None: ...
    def archive(self, name: str, version: str, /) -> None: ...


def of(settings: Settings, addresses: Addresses) -> Registry:
    """The registry that the settings name, else that of `headrace up`, else the folder."""
    folder = ModelFolder(settings.models_root, settings.model_mib * 2**20)
    address = addresses.mlflow
    return folder if address is None else Mlflow(address, folder, settings.mlflow_token)


class Mlflow:
    """An MLflow 3 server by its address. Raises RegistryError where it does not do what is asked."""

    def __init__(self, address: str, folder: ModelFolder, token: str | None = None) -> None:
        """address: http(s)://[user:password@]host[:port][/path]."""
        parts = urllib.parse.urlsplit(address)
        self._address = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
        self._headers = _authorization(parts, token)
        self._folder = folder
        self._found: dict[tuple[str, str], dict[str, Any]] = {}  # by name and number, which never change
        # Neither a proxy nor a redirect elsewhere, where the token would go too.
        self._open = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect).open

    @property
    def folder(self) -> ModelFolder:
        return self._folder

    def aliases(self, name: str) -> dict[str, str]:
        """Version by alias, in one request. One that is not of Headrace is told as #<its number>."""
        try:
            found = self._call("GET", "registered-models/get", "registered_model", name=name)
        except _NotThere:
            return {}
        return {a["alias"]: self._version_of(name, a["version"]) for a in found.get("aliases", [])}

    def versions(self, name: str) -> list[Version]:
        """Those that Headrace has registered, the newest first."""
        found = []
        for row in self._rows(name):
            tags = _tags(row)
            if VERSION in tags:
                found.append(
                    Version(
                        tags[VERSION], int(row["creation_timestamp"]), tags.get(DEFINITION, ""),
                        msgspec.json.decode(tags.get(METRICS, "{}")), AWAY in tags,
                    )
                )  # fmt: skip
        return sorted(found, key=lambda v: -v.created)

    def publish(self, name: str, version: str) -> None:
        """Register a version that is in the folder, once. It exists when all of it is there."""
        if self._row(name, version) is not None:
            return
        graph, card = self._folder.read(name, version)
        home = self._folder.root / name / version
        # 1. a run, with what people compare by
        now = time.time_ns() // 1_000_000
        run = self._call(
            "POST",
            "runs/create",
            "run",
            experiment_id=self._experiment(name),
            start_time=now,
            run_name=version,
        )["info"]
        self._call(
            "POST", "runs/log-batch", run_id=run["run_id"], metrics=_metrics(card, now), params=_params(card)
        )
        # 2. its files
        for file in sorted(home.iterdir()):
            if file.name != ARCHIVED:
                self._put(self._artifact(run["artifact_uri"], file.name), file.read_bytes())
        self._call("POST", "runs/update", run_id=run["run_id"], status="FINISHED", end_time=now)
        # 3. the version, which makes it seen
        try:
            self._call("POST", "registered-models/create", name=name)
        except RegistryError as error:
            if "RESOURCE_ALREADY_EXISTS" not in str(error):
                raise
        metrics = {key: value for key, value in card.metrics.items() if math.isfinite(value)}
        tags = {
            VERSION: version, DEFINITION: card.definition, METRICS: msgspec.json.encode(metrics).decode(),
            DIGEST: digest_of(graph, (home / CARD).read_bytes()),
        }  # fmt: skip
        self._call(
            "POST", "model-versions/create", name=name, source=run["artifact_uri"], run_id=run["run_id"],
            tags=[{"key": key, "value": value} for key, value in tags.items()],
        )  # fmt: skip

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
        files = {
            file: self._get(self._artifact(row["source"], file), version) for file in (GRAPH, CARD, FEATURES)
        }
        if digest_of(files[GRAPH], files[CARD]) != digest:
            raise damaged(version, "MLflow's files are not those that were registered")
        self._folder.adopt(name, version, files)

    def point(self, name: str, alias: str, version: str) -> None:
        """Let an alias name a version."""
        self._call(
            "POST", "registered-models/alias", name=name, alias=alias, version=self._number(name, version)
        )

    def archive(self, name: str, version: str) -> None:
        """Put a version away. It stays in MLflow, with a tag."""
        number = self._number(name, version)
        self._call("POST", "model-versions/set-tag", name=name, version=number, key=AWAY, value="true")

    # --- versions --------------------------------------------------------------------------------

    def _rows(self, name: str) -> Iterator[dict[str, Any]]:
        token = ""
        while True:
            page = self._call(
                "GET", "model-versions/search", filter=f"name='{name}'", max_results="200", page_token=token
            )
            for row in page.get("model_versions", []):
                self._found[name, row["version"]] = row
                yield row
            token = page.get("next_page_token", "")
            if not token:
                return

    def _row(self, name: str, version: str) -> dict[str, Any] | None:
        known = [row for (of, _), row in self._found.items() if of == name]
        for row in chain(known, self._rows(name)):
            if _tags(row).get(VERSION) == version:
                return row
        return None

    def _version_of(self, name: str, number: str) -> str:
        row = self._found.get((name, number))
        if row is None:
            row = self._call("GET", "model-versions/get", "model_version", name=name, version=number)
            self._found[name, number] = row
        return _tags(row).get(VERSION, f"#{number}")

    def _number(self, name: str, version: str) -> str:
        row = self._row(name, version)
        if row is None:
            raise no_such(name, version)
        return str(row["version"])

    def _experiment(self, name: str) -> str:
        try:
            found = self._call("GET", "experiments/get-by-name", "experiment", experiment_name=name)
        except _NotThere:
            found = self._call("POST", "experiments/create", name=name)
        return str(found["experiment_id"])

    # --- HTTP ------------------------------------------------------------------------------------

    def _call(self, method: str, path: str, gives: str | None = None, /, **fields: Any) -> dict[str, Any]:
        """gives: the field of the answer that is wanted; by default the answer itself."""
        url = f"{self._address}/api/2.0/mlflow/{path}"
        body = None
        if method == "GET":
            url += "?" + urllib.parse.urlencode({k: v for k, v in fields.items() if v})
        else:
            body = msgspec.json.encode(fields)
        answer = self._request(method, url, body, "application/json", LARGEST_ANSWER)
        try:
            whole = msgspec.json.decode(answer or b"{}", type=dict[str, Any])
            found: dict[str, Any] = whole if gives is None else whole[gives]
        except (msgspec.MsgspecError, KeyError):
            raise RegistryError(
                f"What answers at {self._address} is no MLflow server; set HEADRACE_MLFLOW to one."
            ) from None
        return found

    def _artifact(self, uri: str, file: str) -> str:
        """Where the server itself gives out and takes a file of a run."""
        parts = urllib.parse.urlsplit(uri)
        if parts.scheme != "mlflow-artifacts":
            raise RegistryError(
                f"MLflow at {self._address} keeps artifacts at {uri} and does not serve them; start it with "
                "--serve-artifacts and without --default-artifact-root."
            )
        path = urllib.parse.quote(f"{parts.path.strip('/')}/{file}")
        return f"{self._address}/api/2.0/mlflow-artifacts/artifacts/{path}"

    def _put(self, url: str, content: bytes) -> None:
        self._request("PUT", url, content, "application/octet-stream", LARGEST_ANSWER)

    def _get(self, url: str, version: str) -> bytes:
        largest = self._folder.largest
        content = self._request("GET", url, None, "", largest + 1)
        if len(content) > largest:
            raise too_large(version, url.rpartition("/")[2], largest)
        return content

    def _request(self, method: str, url: str, body: bytes | None, kind: str, most: int) -> bytes:
        """At most so many bytes of the answer."""
        headers = self._headers | ({"Content-Type": kind} if body is not None else {})
        request = urllib.request.Request(url, body, headers, method=method)  # noqa: S310 - http(s), by the settings
        try:
            with self._open(request, timeout=ANSWER_S) as response:
                return bytes(response.read(most))
        except urllib.error.HTTPError as error:
            raise self._refusal(error) from None
        except (OSError, http.client.HTTPException) as error:
            why = getattr(error, "reason", None) or str(error) or type(error).__name__
            raise RegistryError(
                f"MLflow at {self._address} does not answer ({why}); start it, or set HEADRACE_MLFLOW."
            ) from None

    def _refusal(self, error: urllib.error.HTTPError) -> RegistryError:
        if error.code in (401, 403):
            return RegistryError(
                f"MLflow at {self._address} does not let this in ({error.code}); set HEADRACE_MLFLOW_TOKEN, or user "
                "and password in HEADRACE_MLFLOW."
            )
        said = error.read(10_000)
        try:
            problem = msgspec.json.decode(said, type=dict[str, Any])
        except msgspec.MsgspecError:
            problem = {}
        why = f"{error.code} {problem.get('error_code', '')} {problem.get('message', error.reason)}"
        kind = _NotThere if problem.get("error_code") == "RESOURCE_DOES_NOT_EXIST" else RegistryError
        return kind(f"MLflow at {self._address} refuses what was asked ({' '.join(why.split())}).")


class _NotThere(RegistryError):
    """There is nothing of that name."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


def no_such(name: str, version: str) -> RegistryError:
    return RegistryError(
        f"There is no version {version} of {name}; see `headrace models list --pipeline {name} --all`."
    )


def _authorization(parts: urllib.parse.SplitResult, token: str | None) -> dict[str, str]:
    if token is not None:
        return {"Authorization": f"Bearer {token}"}
    if parts.username is None:
        return {}
    pair = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
    return {"Authorization": "Basic " + base64.b64encode(pair.encode()).decode()}


def _tags(row: dict[str, Any]) -> dict[str, str]:
    return {tag["key"]: tag["value"] for tag in row.get("tags", [])}


def _metrics(card: Card, now: int) -> list[dict[str, Any]]:
    return [
        {"key": key, "value": value, "timestamp": now, "step": 0}
        for key, value in card.metrics.items()
        if math.isfinite(value)  # others have no JSON
    ]


def _params(card: Card) -> list[dict[str, str]]:
    params: dict[str, Any] = {"definition": card.definition, "features": len(card.features)}
    params |= {f"threshold.{name}": value for name, value in card.thresholds.items()}
    if card.tested is not None:
        params |= {"tested_after": card.tested[0], "tested_until": card.tested[1]}
    return [{"key": key, "value": str(value)} for key, value in params.items()]
