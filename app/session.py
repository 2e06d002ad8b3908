"""A run to be watched, for demo and bench: services, a fresh instance of a pipeline, real processes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from app import checkpoints, client, kafka
from app.local import services
from app.settings import OFF, Settings
from app.settings import environment as as_variables
from models.errors import HeadraceError
from models.pipeline import Pipeline
from models.predictions import Prediction, identity
from tables.mirror import Mirror, connect

READY_S = 60.0
RUN_ALIGNMENT_S = 6 * 3600.0  # of event time, of which a run has days in a minute
ANSWER_S = 5.0  # a process that takes longer to say that it is ready is not
GONE_S = 15.0  # a worker that was killed is in its group for a session's length
STALLED_S = 20.0  # without any new prediction: what is missing then does not come


class ProcessFailed(HeadraceError):
    """A process that was started for the run ended or never got ready."""

    def __init__(self, name: str, what: str, log: Path) -> None:
        tail = "\n".join(f"  {line}" for line in log.read_text(errors="replace").splitlines()[-8:])
        super().__init__(f"The {name} {what}; its log {log} ends with:\n{tail}")


def with_own_models(settings: Settings, name: str) -> Settings:
    """Settings of a run that neither takes the user's champion nor replaces it.

    A run packs days into minutes: what two workers take turns at must be more than seconds of it.
    """
    return settings.model_copy(
        update={
            "models_root": settings.data_root / name / "models",
            "mlflow": OFF,
            "alignment_s": RUN_ALIGNMENT_S,
        }
    )


@contextlib.contextmanager
def running_services(
    settings: Settings, report: Callable[[str, str], None], wanted: Sequence[str] = ("kafka", "redis")
) -> Iterator[services.Addresses]:
    """Kafka and Redis, or others, for as long as the run takes. Those that ran before go on.

    From here on SIGTERM is as good as Ctrl-C: both end what the run has started.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    before = {s.name for s in services.status(settings) if s.state in ("running", "configured")}
    try:
        yield services.up(settings, wanted, report)
    finally:
        services.down(settings, [name for name in wanted if name not in before])


async def fresh(settings: Settings, pipeline: Pipeline, addresses: services.Addresses) -> None:
    """Make an instance anew: its topics, stores and mirror hold nothing. Only for names made for it."""
    shared = [t for t in kafka.wanted_topics(pipeline) if not t.startswith(f"{pipeline.instance}.")]
    if shared or pipeline.instance == pipeline.name:
        raise HeadraceError(
            f"A run of its own would clear {', '.join(shared) or pipeline.name}, which is not its own; drop "
            "'topic:' from the pipeline file."
        )
    # A worker whose topics are deleted under it would lead the group astray.
    deadline = time.monotonic() + GONE_S
    while await kafka.members_of(addresses.kafka, kafka.group_of(pipeline)):
        if time.monotonic() > deadline:
            raise HeadraceError(
                f"Workers of {pipeline.instance} run already, perhaps of a run that was killed; end them first."
            )
        await asyncio.sleep(0.5)
    await kafka.delete_topics(addresses.kafka, pipeline)
    shutil.rmtree(settings.data_root / "profiles" / pipeline.instance, ignore_errors=True)
    stored = checkpoints.of(settings, pipeline)
    if stored is not None:
        stored.clear()
    mirror = Mirror(connect(addresses.redis_url), pipeline)
    await mirror.clear()
    await mirror.close()
    await kafka.create_topics(addresses.kafka, pipeline, settings.partitions, settings.replication)


class Process:
    """`headrace worker`, `headrace api` or `headrace ledger run`, as a user would start it, in a session of its own."""

    def __init__(
        self, settings: Settings, pipeline: Pipeline, command: str, number: int = 1, **environment: str
    ) -> None:
        """environment: further variables of the process."""
        self.name = command
        self.port = free_port()
        self.log = (
            settings.data_root / "logs" / f"{pipeline.instance}-{command.replace(' ', '-')}-{number}.log"
        )
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.log.unlink(missing_ok=True)
        self._arguments = [
            sys.executable, "-m", "app.cli", *command.split(), "--pipeline", pipeline.name, "--as", pipeline.instance,
            "--port", str(self.port),
        ]  # fmt: skip
        self._environment = (
            os.environ
            | as_variables(settings)
            # a run asks its processes, which nobody else reaches
            | {"HEADRACE_API_HOST": "127.0.0.1", "HEADRACE_API_TOKENS": OFF}
            | environment
        )
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it, or start it again: the log goes on."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._arguments, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=self._environment,
                start_new_session=True,
            )  # fmt: skip

    async def ready(self) -> None:
        """Wait until it says that it is ready. Raises ProcessFailed."""
        deadline = time.monotonic() + READY_S
        while not await self.is_ready():
            self.check()
            if time.monotonic() > deadline:
                raise ProcessFailed(self.name, f"was not ready within {READY_S:.0f} s", self.log)
            await asyncio.sleep(0.1)

    async def is_ready(self) -> bool:
        """Whether it says now that it is ready."""
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            async with (
                asyncio.timeout(ANSWER_S),
                aiohttp.ClientSession() as http,
                http.get(f"{self.url}/readyz") as response,
            ):
                return response.status == 200
        return False

    def check(self) -> None:
        """Raises ProcessFailed where it has ended by itself."""
        if self.exit_code is not None:
            raise ProcessFailed(self.name, f"ended with exit code {self.exit_code}", self.log)

    async def metrics(self) -> dict[str, float]:
        """Its metrics now, by name with labels in braces."""
        async with aiohttp.ClientSession() as http, http.get(f"{self.url}/metrics") as response:
            text = await response.text()
        return {
            sample.name
            + ("{" + ",".join(sample.labels.values()) + "}" if sample.labels else ""): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    @property
    def exit_code(self) -> int | None:
        """None while it runs, -9 after a kill -9."""
        return None if self._process is None else self._process.poll()

    def send(self, number: signal.Signals) -> None:
        """Send a signal, if it runs."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    def stop(self, number: signal.Signals = signal.SIGTERM, within: float = 40.0) -> int:
        """End it and wait. Its exit code."""
        if self._process is None:
            return 0
        if self._process.poll() is None:
            self._process.send_signal(number)
            try:
                self._process.wait(within)
            except subprocess.TimeoutExpired:
                self._process.kill()
        return self._process.wait()


class Predictions:
    """Reads the predictions of an instance as they come, with the time at which each arrived.

    ids: the 64-bit ones of the events.
    """

    def __init__(
        self, address: str, pipeline: Pipeline, seen: Callable[[Prediction], None] | None = None
    ) -> None:
        self._address, self._pipeline, self._seen = address, pipeline, seen
        self.ids: list[int] = []
        self.arrived: list[float] = []  # seconds since the epoch
        self.scores: list[float | None] = []

    @contextlib.asynccontextmanager
    async def reading(self) -> AsyncIterator[Predictions]:
        """Read in the background, from now on."""
        async with client.Predictions(
            self._address, self._pipeline.predictions, start="latest"
        ) as predictions:
            task = asyncio.create_task(self._read(predictions))
            try:
                yield self
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    async def _read(self, predictions: client.Predictions) -> None:
        async for prediction in predictions:
            self.ids.append(identity(self._pipeline, prediction))
            self.arrived.append(time.time())
            self.scores.append(prediction.score)
            if self._seen is not None:
                self._seen(prediction)

    async def until(self, count: int, check: Callable[[], None]) -> None:
        """Wait until so many have come, or none comes any more. check: raises where waiting is vain."""
        seen, since = -1, time.monotonic()
        while len(self.ids) < count and time.monotonic() - since < STALLED_S:
            check()
            if len(self.ids) != seen:
                seen, since = len(self.ids), time.monotonic()
            await asyncio.sleep(0.05)


def free_port() -> int:
    """A port of loopback that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
