"""Who may ask, and how often: bearer tokens with scopes, of which only hashes are kept, and a rate for each.

A file of tokens has a line for each: its name, its scopes, the SHA-256 of the token, and perhaps a rate of its own.

    dashboard read                 9f86d081...
    shop      read,publish         60303ae2... rate=500
    operator  admin                fd61a03a...

`headrace token new` makes such lines. The file is read again when it changes: without its line, a token is
locked out.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import logging
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from app.api.problems import ProblemError
from app.errors import SettingsError

Scope = Literal["read", "publish", "admin"]
SCOPES = frozenset(get_args(Scope))
PREFIX = "hr_"  # so that scanners for secrets can know one
LOOK_S = 1.0  # between looks whether the file has changed

# For every answer. The page of docs widens the policy for its own style.
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
}

log = logging.getLogger(__name__)


@dataclass
class Bucket:
    """Requests that may still be made: `rate` a second, and as many at once.

    >>> bucket = Bucket(2)
    >>> [bucket.wait(0.0), bucket.wait(0.0), bucket.wait(0.0), bucket.wait(0.5)]
    [0.0, 0.0, 0.5, 0.0]
    """

    rate: float
    _left: float = field(default=-1.0)
    _at: float = field(default=0.0)

    def wait(self, now: float) -> float:
        """Take one. Seconds until there is one, 0 where it was taken."""
        most = max(1.0, self.rate)
        self._left = most if self._left < 0 else min(most, self._left + (now - self._at) * self.rate)
        self._at = now
        if self._left < 1:
            return (1 - self._left) / self.rate
        self._left -= 1
        return 0.0


@dataclass
class Caller:
    """Whose request it is. bucket: None where nothing bounds it."""

    name: str
    scopes: frozenset[str]
    bucket: Bucket | None = None

    def may(self, scope: Scope) -> bool:
        return scope in self.scopes or "admin" in self.scopes


class Guard:
    """Lets requests through, or raises ProblemError. Without a file of tokens everyone may do everything.

    rate: requests a second of a token, or of all together without tokens; 0 for no bound.
    """

    def __init__(
        self, path: Path | None = None, rate: float = 0.0, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        """Raises SettingsError where the file cannot be read."""
        self._path, self._rate, self._monotonic = path, rate, monotonic
        self._open = Caller("anyone", SCOPES, Bucket(rate) if rate else None)
        self._callers: dict[str, Caller] = {}
        self._seen: object = None
        self._looked = 0.0
        if path is not None:
            self._callers, self._seen = self._read(path), _state(path)
            self._looked = monotonic()

    @property
    def is_open(self) -> bool:
        """Whether no tokens are asked for."""
        return self._path is None

    def admit(self, authorization: str | None, scope: Scope) -> Caller:
        """The caller of a request by its Authorization header."""
        now = self._monotonic()
        caller = self._open if self._path is None else self._known(authorization, now)
        if not caller.may(scope):
            raise ProblemError(
                "forbidden", f"The token {caller.name} has no scope {scope}; use one that has."
            )
        if caller.bucket is not None and (wait := caller.bucket.wait(now)):
            raise ProblemError(
                "rate", f"{caller.name} may make {caller.bucket.rate:g} requests a second; wait, or ask in batches.",
                retry_s=wait,
            )  # fmt: skip
        return caller

    def _known(self, authorization: str | None, now: float) -> Caller:
        if now - self._looked > LOOK_S:
            self._looked = now
            self._look()
        token = _token_of(authorization)
        caller = self._callers.get(hash_of(token)) if token else None
        if caller is None:
            detail = "The token is not known; ask for one" if token else "Send `Authorization: Bearer TOKEN`"
            raise ProblemError(
                "unauthorized", f"{detail} (`headrace token new`).",
                headers={"WWW-Authenticate": 'Bearer realm="headrace", Basic realm="headrace"'},
            )  # fmt: skip
        return caller

    def _look(self) -> None:
        assert self._path is not None
        seen = _state(self._path)
        if seen == self._seen:
            return
        self._seen = seen
        try:
            callers = self._read(self._path)
        except SettingsError as error:
            log.warning("The tokens stay as they were: %s", error)
            return
        for hashed, caller in callers.items():
            before = self._callers.get(hashed)
            if before and before.bucket and caller.bucket and before.bucket.rate == caller.bucket.rate:
                caller.bucket = before.bucket  # nobody gets more by a change of the file
        self._callers = callers

    def _read(self, path: Path) -> dict[str, Caller]:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(
                f"HEADRACE_API_TOKENS names {path}, which cannot be read ({error}); make it by `headrace token new`."
            ) from None
        found: dict[str, Caller] = {}
        for number, line in enumerate(lines, 1):
            words = line.partition("#")[0].split()
            if not words:
                continue
            try:
                hashed, caller = self._line(*words)
            except (ValueError, TypeError):
                raise SettingsError(
                    f"{path}:{number}: a line is NAME SCOPES SHA256 [rate=N], with scopes among "
                    f"{', '.join(sorted(SCOPES))}; mend it, or make one by `headrace token new`."
                ) from None
            found[hashed] = caller
        return found

    def _line(self, name: str, scopes: str, hashed: str, rate: str = "") -> tuple[str, Caller]:
        given = frozenset(scopes.split(","))
        own = float(rate.removeprefix("rate=")) if rate else self._rate
        if not given <= SCOPES or not re.fullmatch(r"[0-9a-f]{64}", hashed) or not 0 <= own < float("inf"):
            raise ValueError(hashed)
        return hashed, Caller(name, given, Bucket(own) if own else None)


def hash_of(token: str) -> str:
    """What is kept of a token. It is random, so that a plain hash is enough."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()


def new_token(name: str, scopes: list[str], rate: float | None = None) -> tuple[str, str]:
    """A token, and the line that lets it in."""
    token = PREFIX + secrets.token_urlsafe(32)
    own = "" if rate is None else f" rate={rate:g}"
    return token, f"{name} {','.join(scopes)} {hash_of(token)}{own}"


def _token_of(authorization: str | None) -> str | None:
    """A bearer token; or a browser's password, whatever the name."""
    kind, _, rest = (authorization or "").partition(" ")
    if kind.lower() == "bearer":
        return rest.strip() or None
    if kind.lower() == "basic":
        try:
            return base64.b64decode(rest, validate=True).decode().partition(":")[2] or None
        except (binascii.Error, UnicodeDecodeError, ValueError):
            return None
    return None


def _state(path: Path) -> object:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
