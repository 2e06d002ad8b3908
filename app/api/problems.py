"""Errors of the API: problem documents (RFC 9457), which name the field that is wrong.

{"type": "/docs#invalid", "title": "A value is wrong", "status": 422, "detail": "...",
 "errors": [{"field": "at", "detail": "..."}]}
"""

from __future__ import annotations

import re

import msgspec
from aiohttp import web

MEDIA = "application/problem+json"

# By kind: its status, and what is always so.
KINDS = {
    "not-json": (400, "The body is no JSON"),
    "unauthorized": (401, "A token is needed"),
    "forbidden": (403, "The token does not allow this"),
    "not-found": (404, "There is no such thing"),
    "method": (405, "The route has other methods"),
    "too-large": (413, "The request is too large"),
    "media-type": (415, "The body should be JSON"),
    "invalid": (422, "A value is wrong"),
    "rate": (429, "Too many requests"),
    "internal": (500, "The server failed"),
    "unavailable": (503, "Something that is needed does not answer"),
    "refused": (400, "The request is no HTTP that is understood"),
}
RETRY_S = 1  # after which a client may try again what was unavailable


class Fault(msgspec.Struct):
    """A value that is wrong: where it stands (`entities[3].id`), and why."""

    field: str
    detail: str


class Problem(msgspec.Struct, omit_defaults=True):
    """What went wrong. type: the kind; detail: one sentence with its remedy; errors: each wrong value."""

    type: str
    title: str
    status: int
    detail: str
    errors: list[Fault] = []


class ProblemError(Exception):
    """Ends a request with a problem document."""

    def __init__(
        self, kind: str, detail: str, *faults: Fault, retry_s: float | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(detail)
        self.kind, self.detail, self.faults = kind, detail, faults
        self.headers = dict(headers or {})
        if kind == "unavailable" and retry_s is None:
            retry_s = RETRY_S
        if retry_s is not None:
            self.headers["Retry-After"] = str(max(1, round(retry_s)))

    @property
    def status(self) -> int:
        return KINDS[self.kind][0]

    def response(self) -> web.Response:
        """The answer."""
        status, title = KINDS[self.kind]
        problem = Problem(f"/docs#{self.kind}", title, status, self.detail, list(self.faults))
        return web.Response(
            body=msgspec.json.encode(problem), status=status, content_type=MEDIA, headers=self.headers
        )


def invalid(field: str, detail: str) -> ProblemError:
    """A value of the request is wrong."""
    return ProblemError("invalid", f"{field}: {detail}", Fault(field, detail))


_AT = re.compile(r" - at `(?:key in )?\$(.*)`$")
_NAMED = re.compile(r"`([^`$]+)`$")


def fault_of(error: msgspec.ValidationError, within: str = "") -> Fault:
    """The field that msgspec speaks of, and why.

    >>> fault_of(msgspec.ValidationError("Expected `int`, got `str` - at `$.limit`"))
    Fault(field='limit', detail='Expected `int`, got `str`')
    >>> fault_of(msgspec.ValidationError("Object missing required field `id` - at `$.entities[0]`")).field
    'entities[0].id'
    """
    return fault_in(str(error), within)


def fault_in(text: str, within: str = "") -> Fault:
    """Likewise of the sentence that it has made."""
    found = _AT.search(text)
    path = found[1] if found else ""
    sentence = text[: found.start()] if found else text
    if "required field" in sentence or "unknown field" in sentence:
        named = _NAMED.search(sentence)
        path += f".{named[1]}" if named else ""
    path = f"{within}{path}" if within else path.lstrip(".")
    return Fault(path or "body", sentence)
