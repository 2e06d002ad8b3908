"""A client of Redis or Valkey by URL: one server, a cluster, or the master that sentinels name.

    redis://[USER:PASSWORD@]HOST:PORT/0                          rediss:// with TLS; unix:///path?db=0
    redis+cluster://[USER:PASSWORD@]HOST:PORT,HOST:PORT          any of its nodes; rediss+cluster://
    redis+sentinel://[USER:PASSWORD@]HOST:PORT,HOST:PORT/MASTER/0   sentinels; rediss+sentinel://

Behind a `?` may stand, joined by `&`: ssl_ca_certs=FILE, ssl_certfile=FILE, ssl_keyfile=FILE,
ssl_check_hostname=false; for sentinels with users of their own sentinel_username and sentinel_password.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

import redis
import redis.asyncio as aio
from redis.asyncio.cluster import ClusterNode

from models.errors import HeadraceError

SCHEMES = (
    "redis", "rediss", "unix", "redis+cluster", "rediss+cluster", "redis+sentinel", "rediss+sentinel",
)  # fmt: skip
WAIT_S = 5.0  # for a connection, and for an answer

Client = aio.Redis | aio.RedisCluster
RedisError = redis.RedisError

_FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
_SENTINEL_USER = ("sentinel_username", "sentinel_password")


class RedisAddressError(HeadraceError):
    """A URL of Redis that cannot be honoured."""


def connect(url: str) -> Client:
    """A client; it connects when it is first used, and again after an outage. Raises RedisAddressError."""
    parts = urlsplit(url)
    kind = parts.scheme.partition("+")[2]
    waits: dict[str, Any] = {"socket_timeout": WAIT_S, "socket_connect_timeout": WAIT_S}
    if not kind:
        client: aio.Redis = aio.Redis.from_url(url, **waits)
        return client
    options = _options(parts)
    sentinel = {name: options.pop(name) for name in _SENTINEL_USER if name in options}
    hosts = _hosts(parts.netloc.rpartition("@")[2])
    if kind == "cluster":
        return aio.RedisCluster(startup_nodes=[ClusterNode(h, p) for h, p in hosts], **options, **waits)
    master, _, database = parts.path.strip("/").partition("/")
    if not master:
        raise RedisAddressError(
            f"The address {parts.scheme}://... names no master; write it behind the sentinels, as in "
            "redis+sentinel://HOST:26379/mymaster/0."
        )
    own = {name.removeprefix("sentinel_"): value for name, value in sentinel.items()}
    tls = {name: value for name, value in options.items() if name.startswith("ssl")}
    sentinels: Any = aio.Sentinel  # it is not annotated
    known = sentinels(hosts, sentinel_kwargs={**own, **tls, **waits}, **options, **waits)
    client = known.master_for(master, db=int(database or 0))
    return client  # noqa: RET504 - it is typed here


def _options(parts: SplitResult) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if parts.username:
        options["username"] = unquote(parts.username)
    if parts.password:
        options["password"] = unquote(parts.password)
    if parts.scheme.startswith("rediss"):
        options["ssl"] = True
    for name, value in parse_qsl(parts.query):
        if name in _FILES or name in _SENTINEL_USER:
            options[name] = value
        elif name == "ssl_check_hostname":
            options[name] = value.lower() not in ("0", "false", "no")
        else:
            known = ", ".join((*_FILES, "ssl_check_hostname", *_SENTINEL_USER))
            raise RedisAddressError(f"An address of Redis has no option {name}; there are {known}.")
    return options


def _hosts(text: str) -> list[tuple[str, int]]:
    hosts = []
    for each in text.split(","):
        host, _, port = each.rpartition(":")
        if not host or not port.isdigit():
            raise RedisAddressError(f"{each!r} in the address of Redis should be HOST:PORT.")
        hosts.append((host.strip("[]"), int(port)))
    return hosts
