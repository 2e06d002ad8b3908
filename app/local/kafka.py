"""Kafka: one KRaft node, broker and controller in one process, by Java, else by Docker."""

import hashlib
import os
import re
import secrets
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

from app.errors import ProgramMissing, ServiceFailed
from app.local.ports import HOST, exchange
from app.local.process import Launch

VERSION = "4.3.1"  # of the Docker image; the jars have theirs in the pom
LEAST_JAVA = 17
POM = Path(__file__).with_name("kafka-pom.xml")
FETCH_WITHIN = 600.0  # seconds for 54 MB of jars over a slow line
FORMAT_WITHIN = 60.0
CONFIGURATION = "server.properties"
REMEDY = f"Install Java {LEAST_JAVA} or newer and Maven"
LOGGING = (  # warnings and worse, with the time
    "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn",
    "-Dorg.slf4j.simpleLogger.showDateTime=true",
    "-Dorg.slf4j.simpleLogger.dateTimeFormat=yyyy-MM-dd HH:mm:ss.SSS",
)
QUIET_JVM = ("-Xlog:disable", "-Xlog:all=error:stderr")


def launch(
    home: Path, preferred_port: int, reserve: Callable[[int], int], report: Callable[[str], None]
) -> Launch:
    """Fetch and format what is not there yet, and say how to start the node."""
    try:
        java = _java()
        jars = _jars(home, report)
    except ProgramMissing:
        if not _docker_answers():
            raise
        return _by_docker(home, reserve(preferred_port))
    return _by_java(home, java, jars, preferred_port, reserve)


def answers(port: int) -> bool:
    """Whether a broker answers an ApiVersions request; it listens only once it may serve (not fenced)."""
    correlation = 7
    request = struct.pack(">hhih", 18, 0, correlation, -1)  # ApiVersions, version 0, no client id
    answer = exchange(port, struct.pack(">i", len(request)) + request, 10)
    return len(answer) == 10 and struct.unpack(">iih", answer)[1:] == (correlation, 0)


def address(_home: Path, port: int) -> str:
    """The bootstrap address."""
    return f"{HOST}:{port}"


def data(home: Path) -> Path:
    """Where the topics are (with Docker: in a volume of the container's name instead)."""
    return home / "data"


def properties(host: str, port: int, controller_port: int, logs: str) -> dict[str, str]:
    """The configuration of the node, which listens on `host` and is reached at the loopback address."""
    return {
        "process.roles": "broker,controller",
        "node.id": "1",
        "controller.quorum.voters": f"1@{HOST}:{controller_port}",
        "controller.listener.names": "CONTROLLER",
        "listeners": f"PLAINTEXT://{host}:{port},CONTROLLER://{HOST}:{controller_port}",
        "advertised.listeners": f"PLAINTEXT://{HOST}:{port}",
        "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
        "log.dirs": logs,
        # A topic that nobody made has the wrong partitions; and nothing vanishes, however old its timestamp.
        "auto.create.topics.enable": "false",
        "log.retention.ms": "-1",
        "log.retention.bytes": "-1",
        "offsets.retention.minutes": str(10 * 365 * 24 * 60),
        # One node: one copy, few partitions of the topics that Kafka keeps for itself, no wait for members.
        "default.replication.factor": "1",
        "offsets.topic.replication.factor": "1",
        "offsets.topic.num.partitions": "8",
        "transaction.state.log.replication.factor": "1",
        "transaction.state.log.min.isr": "1",
        "transaction.state.log.num.partitions": "8",
        "share.coordinator.state.topic.replication.factor": "1",
        "share.coordinator.state.topic.min.isr": "1",
        "share.coordinator.state.topic.num.partitions": "8",
        "group.initial.rebalance.delay.ms": "0",
        "log.cleaner.threads": "1",
        "log.cleaner.dedupe.buffer.size": str(16 * 2**20),  # allocated at once; 128 MiB by default
    }


def _by_java(home: Path, java: str, jars: Path, preferred_port: int, reserve: Callable[[int], int]) -> Launch:
    port = reserve(preferred_port)
    # All paths are relative to `home`: absolute ones would have to be free of ":", "," and non-ASCII letters.
    values = properties(HOST, port, reserve(port + 1), data(home).name)
    (home / CONFIGURATION).write_text("".join(f"{name}={value}\n" for name, value in values.items()))
    command = (java, "-cp", f"{jars.name}/*", *QUIET_JVM, *LOGGING)
    if not (data(home) / "meta.properties").exists():
        _format(home, (*command, "-Xmx256m", "kafka.tools.StorageTool"))
    run = ("-Xmx1g", "-XX:+ExitOnOutOfMemoryError", "kafka.Kafka", CONFIGURATION)
    return Launch(command=(*command, *run), port=port, cwd=home)


def _format(home: Path, tool: tuple[str, ...]) -> None:
    # 22 characters of base64url for 16 bytes, as Kafka makes them; a leading "-" would read as an option.
    cluster = f"H{secrets.token_urlsafe(16)[:20]}Q"
    _run(home / "format.log", (*tool, "format", "-t", cluster, "-c", CONFIGURATION), FORMAT_WITHIN)


def _jars(home: Path, report: Callable[[str], None]) -> Path:
    """The directory of the jars of this pom; fetched when they are not there, whole or not at all."""
    version = hashlib.sha256(POM.read_bytes()).hexdigest()[:12]
    jars = home / f"jars-{version}"
    if jars.exists():
        return jars
    maven = shutil.which("mvn")
    if maven is None:
        raise ProgramMissing("Kafka", "there is no Maven (mvn) to fetch it with", REMEDY, "HEADRACE_KAFKA")
    report("fetching jars")
    part = home / "jars.part"
    shutil.rmtree(part, ignore_errors=True)
    goal = ("dependency:copy-dependencies", "-DincludeScope=runtime", f"-DoutputDirectory={part}")
    _run(home / "fetch.log", (maven, "-q", "-B", "-f", str(POM), *goal), FETCH_WITHIN)
    part.rename(jars)
    return jars


def _java() -> str:
    """The path of a Java that is new enough: that of JAVA_HOME, else that of the PATH."""
    at_home = Path(os.environ.get("JAVA_HOME", ""), "bin", "java")
    java = str(at_home) if os.environ.get("JAVA_HOME") and at_home.exists() else shutil.which("java")
    said = (
        subprocess.run([java, "-version"], capture_output=True, check=False).stderr.decode() if java else ""
    )
    found = re.search(
        r'version "(?:1\.)?(\d+)', said
    )  # macOS has a java without a version, which only complains
    if java is None or found is None:
        raise ProgramMissing("Kafka", "there is no Java", REMEDY, "HEADRACE_KAFKA")
    if int(found[1]) < LEAST_JAVA:
        raise ProgramMissing(
            "Kafka", f"{java} is Java {found[1]}, older than {LEAST_JAVA}", REMEDY, "HEADRACE_KAFKA"
        )
    return java


def _run(log: Path, command: tuple[str, ...], within: float) -> None:
    try:
        with log.open("wb") as output:
            subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                check=True,
                timeout=within,
                cwd=log.parent,
            )
    except (OSError, subprocess.SubprocessError) as error:
        raise ServiceFailed("Kafka", f"cannot be prepared: `{Path(command[0]).name}` failed.", log) from error


def _docker_answers() -> bool:
    docker = shutil.which("docker")
    if docker is None:
        return False
    try:
        return subprocess.run([docker, "info"], capture_output=True, check=False, timeout=10).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def _by_docker(home: Path, port: int) -> Launch:
    """The same node in a container. The client process stands for it: signals reach the node through it."""
    docker = shutil.which("docker") or "docker"
    name = f"headrace-kafka-{hashlib.sha256(str(home).encode()).hexdigest()[:8]}"
    # The node listens inside on the port that it has outside, because it also calls itself by that address.
    everywhere = "0.0.0.0"  # noqa: S104 (within the container, which publishes the port on loopback only)
    values = properties(everywhere, port, port + 1 if port < 65535 else port - 1, "/var/lib/kafka/data")
    environment = {f"KAFKA_{key.upper().replace('.', '_')}": value for key, value in values.items()}
    environment["KAFKA_HEAP_OPTS"] = "-Xmx1g"
    options = [option for key, value in environment.items() for option in ("--env", f"{key}={value}")]
    publish = ("--publish", f"{HOST}:{port}:{port}", "--volume", f"{name}:/var/lib/kafka/data")
    return Launch(
        command=(docker, "run", "--rm", "--name", name, *publish, *options, f"apache/kafka:{VERSION}"),
        port=port,
        cwd=home,
        cleanup=(docker, "rm", "--force", name),
    )
