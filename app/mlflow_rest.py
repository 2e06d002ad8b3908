"""MLflow's REST interface by the standard library: to import MLflow itself takes seconds and some hundred MB."""

from __future__ import annotations

import base64
import http.client
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

import msgspec

from app.errors import RegistryError

ANSWER_S = 3.0  # for each wait within a request: a worker is to notice an alias within 5 s
LARGEST_ANSWER = 32 * 2**20  # bytes of JSON: some ten thousand versions


class NotThere(RegistryError):
    """There is nothing of that name."""


class AlreadyThere(RegistryError):
    """There is something of that name."""


class Rest:
    """A server by its address. Raises RegistryError where it does not do what is asked."""

    def __init__(self, address: str, token: str | None) -> None:
        """address: http(s)://[user:password@]host[:port][/path]."""
        parts = urllib.parse.urlsplit(address)
        self._address = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
        self._headers = _authorization(parts, token)
        # Neither a proxy nor a redirect elsewhere, where the token would go too.
        self._open = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect).open

    def get(self, path: str, gives: str | None = None, /, **fields: str) -> dict[str, Any]:
        """gives: the field of the answer that is wanted; by default the answer itself."""
        query = urllib.parse.urlencode({name: value for name, value in fields.items() if value})
        return self._call("GET", f"{path}?{query}", None, gives)

    def post(self, path: str, gives: str | None = None, /, **fields: Any) -> dict[str, Any]:
        return self._call("POST", path, msgspec.json.encode(fields), gives)

    def delete(self, path: str, /, **fields: str) -> None:
        self._call("DELETE", path, msgspec.json.encode(fields), None)

    def upload(self, uri: str, file: str, content: bytes) -> None:
        """Give the server a file of a run, whose artifacts are at `uri`."""
        self._request("PUT", self._artifact(uri, file), content, "application/octet-stream", LARGEST_ANSWER)

    def download(self, uri: str, file: str, most: int) -> bytes:
        """At most so many bytes of a file of a run."""
        return self._request("GET", self._artifact(uri, file), None, "", most)

    def _call(self, method: str, path: str, body: bytes | None, gives: str | None) -> dict[str, Any]:
        url = f"{self._address}/api/2.0/mlflow/{path}"
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
        """Where the server itself gives out and takes a file."""
        parts = urllib.parse.urlsplit(uri)
        if parts.scheme != "mlflow-artifacts":
            raise RegistryError(
                f"MLflow at {self._address} keeps artifacts at {uri} and does not serve them; start it with "
                "--serve-artifacts and without --default-artifact-root."
            )
        path = urllib.parse.quote(f"{parts.path.strip('/')}/{file}")
        return f"{self._address}/api/2.0/mlflow-artifacts/artifacts/{path}"

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
        try:
            problem = msgspec.json.decode(error.read(10_000), type=dict[str, Any])
        except (msgspec.MsgspecError, OSError):
            problem = {}
        code = str(problem.get("error_code", ""))
        why = " ".join(f"{error.code} {code} {problem.get('message', error.reason)}".split())
        kind = {"RESOURCE_DOES_NOT_EXIST": NotThere, "RESOURCE_ALREADY_EXISTS": AlreadyThere}.get(
            code, RegistryError
        )
        return kind(f"MLflow at {self._address} refuses what was asked ({why}).")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


def _authorization(parts: urllib.parse.SplitResult, token: str | None) -> dict[str, str]:
    if token is not None:
        return {"Authorization": f"Bearer {token}"}
    if parts.username is None:
        return {}
    pair = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
    return {"Authorization": "Basic " + base64.b64encode(pair.encode()).decode()}
