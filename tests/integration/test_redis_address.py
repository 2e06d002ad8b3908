"""The mirror behind each kind of address: TLS, an ACL user, a cluster, sentinels."""

import asyncio
import contextlib
import datetime as dt
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from app.local import valkey
from tables.mirror import Mirror, RedisError, connect
from tables.redis_address import RedisAddressError
from tests.integration.test_mirror import count, pipeline, put, touched

pytestmark = pytest.mark.integration

# What a worker and a reader may do, as docs/mirror.md has it.
WRITER = "on >write ~headrace:* +@connection +evalsha +eval +hmget +hset +hincrby +pexpire +time +hgetall +unlink +scan"
READER = "on >read %R~headrace:* +@connection +hmget +hgetall"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def server(home: Path, *options: str, conf: str = "", port: int | None = None) -> Iterator[int]:
    """A server of its own, which is killed in the end. Returns its port. conf: the text of its file of settings."""
    home.mkdir(exist_ok=True)
    file = home / "server.conf"
    file.write_text(conf)
    port = port or free_port()
    process = subprocess.Popen(
        [
            valkey.program(),
            str(file),
            *options,
            "--port",
            str(port),
            "--bind",
            "127.0.0.1",
            "--save",
            "",
            "--dir",
            str(home),
        ],
        stdout=subprocess.DEVNULL,
    )
    try:
        yield port
    finally:
        process.kill()
        process.wait(10)


async def eventually(done: Callable[[], Any]) -> Any:
    """What `done` gives once it neither raises nor is false."""
    async with asyncio.timeout(60):
        while True:
            with contextlib.suppress(RedisError, OSError):
                if found := await done():
                    return found
            await asyncio.sleep(0.05)


async def works(url: str, user: str | None = None) -> None:
    """Profiles of several partitions are written and read back by this address; others read by `user`."""
    mirror = Mirror(connect(url), pipeline())
    reader = mirror if user is None else Mirror(connect(user), pipeline())
    try:
        await eventually(lambda: ready(mirror))
        keys = [b"N%d" % i for i in range(40)]
        await put(mirror, touched(keys, 5.0, 9))
        assert await count(reader, *(k.decode() for k in keys), "N99") == [5.0] * 40 + [None]
        assert len(await mirror.sample(pipeline().entities[0], 100)) == 40
        await mirror.clear()
        assert await count(reader, "N1") == [None]
    finally:
        await mirror.close()
        await reader.close()


async def ready(mirror: Mirror) -> bool:
    await mirror.ping()
    return True


def certificates(folder: Path) -> tuple[Path, Path]:
    """A certificate of 127.0.0.1 that is its own authority, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "headrace test")])
    now = dt.datetime.now(dt.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(1)
        .not_valid_before(now - dt.timedelta(days=1)).not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    certificate, private = folder / "server.crt", folder / "server.key"
    certificate.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    private.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return certificate, private


@contextlib.asynccontextmanager
async def tls_before(port: int, certificate: Path, private: Path) -> AsyncIterator[int]:
    """A port that takes TLS and passes on to this one: the shipped server has none built in."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, private)

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            behind, to = await asyncio.open_connection("127.0.0.1", port)
            await asyncio.gather(pass_on(reader, to), pass_on(behind, writer))

    listening = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    try:
        yield listening.sockets[0].getsockname()[1]
    finally:
        listening.close()


async def test_tls_and_users_with_no_more_rights_than_the_handbook_gives(tmp_path: Path) -> None:
    certificate, private = certificates(tmp_path)
    users = f"user default off\nuser writer {WRITER}\nuser reader {READER}\n"
    with server(tmp_path / "data", conf=users) as plain:
        async with tls_before(plain, certificate, private) as port:
            at = f"127.0.0.1:{port}/0?ssl_ca_certs={certificate}"
            await works(f"rediss://writer:write@{at}", f"rediss://reader:read@{at}")
            reader = Mirror(connect(f"rediss://reader:read@{at}"), pipeline())
            with pytest.raises(RedisError, match=r"(?i)noperm|permission"):
                await put(reader, touched([b"N1"], 5.0, 9))
            await reader.close()
            for url in (
                f"rediss://writer:write@127.0.0.1:{port}/0",  # an authority that nobody knows
                f"rediss://writer:wrong@{at}",
                f"redis://writer:write@127.0.0.1:{port}/0",  # no TLS
            ):
                mirror = Mirror(connect(url), pipeline())
                with pytest.raises((RedisError, OSError)):
                    await mirror.ping()
                await mirror.close()


async def test_a_cluster(tmp_path: Path) -> None:
    """Each script touches one slot only: a cluster refuses others."""
    with server(tmp_path / "data", "--cluster-enabled", "yes", "--cluster-port", str(free_port())) as port:
        node: Any = connect(f"redis://127.0.0.1:{port}/0")
        await eventually(lambda: node.execute_command("PING"))
        await node.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)

        async def up() -> bool:
            return b"cluster_state:ok" in await node.execute_command("CLUSTER", "INFO")

        await eventually(up)
        await works(f"redis+cluster://127.0.0.1:{port}")
        # the slot is that of the partition, for its profiles and its mark
        mirror = Mirror(connect(f"redis+cluster://127.0.0.1:{port}"), pipeline())
        batch = touched([b"N%d" % i for i in range(40)], 5.0, 9)
        await put(mirror, batch)
        slots, entity = set(), pipeline().entities[0]
        for key, home in zip(batch.keys, batch.partitions.tolist(), strict=True):
            at = await mirror.key_of(entity, key.decode())
            slots.add((home, await node.execute_command("CLUSTER", "KEYSLOT", at)))
        assert len(slots) == len(set(batch.partitions.tolist())) == 4
        await mirror.close()
        await node.aclose()


async def test_sentinels_name_the_master_also_after_it_was_lost(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        one = stack.enter_context(server(tmp_path / "one"))
        two = stack.enter_context(server(tmp_path / "two", "--replicaof", f"127.0.0.1 {one}"))
        watched = (
            f"sentinel monitor mirror 127.0.0.1 {one} 1\nsentinel down-after-milliseconds mirror 500\n"
            "sentinel failover-timeout mirror 5000\n"
        )
        port = stack.enter_context(server(tmp_path / "sentinel", "--sentinel", conf=watched))
        url = f"redis+sentinel://127.0.0.1:{port}/mirror/0"
        first: Any = connect(f"redis://127.0.0.1:{one}/0")
        second: Any = connect(f"redis://127.0.0.1:{two}/0")
        watching: Any = connect(f"redis://127.0.0.1:{port}/0")
        try:
            await works(url)

            async def copied() -> bool:
                """And the sentinel, which asks every ten seconds, knows of the copy."""
                knows = await watching.execute_command("SENTINEL", "REPLICAS", "mirror")
                return bool(knows) and str((await second.info("replication"))["master_link_status"]) == "up"

            await eventually(copied)
            mirror = Mirror(connect(url), pipeline())
            await put(mirror, touched([b"N1"], 5.0, 9))
            with contextlib.suppress(RedisError, OSError):
                await first.execute_command("SHUTDOWN", "NOSAVE")

            async def written() -> bool:
                await put(mirror, touched([b"N1"], 6.0, 10))
                return True

            await eventually(written)

            async def promoted() -> bool:
                return str((await second.info("replication"))["role"]) == "master"

            await eventually(promoted)
            assert await count(mirror, "N1") == [6.0]
            await mirror.close()
        finally:
            await first.aclose()
            await second.aclose()
            await watching.aclose()


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("redis+cluster://host", "should be HOST:PORT"),
        ("redis+sentinel://host:1", "names no master"),
        ("rediss+cluster://host:1?colour=red", "no option colour"),
    ],
)
def test_an_address_that_cannot_be_honoured(url: str, sentence: str) -> None:
    with pytest.raises(RedisAddressError, match=sentence):
        connect(url)
