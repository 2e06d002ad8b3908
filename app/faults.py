"""What `headrace chaos` does to a run: a schedule of faults by seed, and the workers' supervisor.

Only processes that the run itself started are touched: its workers, and the Kafka and Valkey of its own
data root.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Literal

import aiohttp

from app import session
from app.local import services
from app.settings import Settings
from models.pipeline import Pipeline
from tables.mirror import connect

FEWEST, MOST = 2, 4  # workers
BACK_OFF_S = 1.0  # before a worker that ended by itself is started again
READY_S = 120.0  # for the first workers, on a busy machine
LOOK_S = 0.1  # between looks at the workers
FIRST_S, QUIET_S = 6.0, 10.0  # no fault so long after the beginning, and before the end
APART_CHECKPOINT_S = 10.0  # so that a run of some minutes has restores from several
RECOVERY_S = 6.0  # at least so long between a fault's end and the next one


_WORK = ("headrace_records_total", "headrace_mirrored_total")


@dataclass(frozen=True)
class Kind:
    """lasts, pause: seconds, from and to: how long a fault holds, and how long nothing follows it.

    often: how many there are in a round of all kinds; needs: the service that it ends.
    """

    lasts: tuple[float, float]
    pause: tuple[float, float]
    often: int = 1
    needs: Literal["kafka", "redis"] | None = None


_SESSION_S = float(Settings.model_fields["session_s"].default)

KINDS = {
    "worker_kill": Kind((0, 8), (12, 16), 2),
    "worker_zombie": Kind(
        (_SESSION_S + 1, _SESSION_S + 5), (9, 14), 3
    ),  # the group gives its partitions away
    "worker_pause": Kind((0.2, _SESSION_S / 2), (6, 9)),  # and here it does not notice
    "worker_restart": Kind((0, 2), (8, 12)),
    "worker_added": Kind((0, 0), (8, 12)),
    "worker_removed": Kind((0, 0), (8, 12)),
    "broker_kill": Kind((0, 5), (10, 14), needs="kafka"),
    "broker_stop": Kind((2, 8), (10, 14), needs="kafka"),
    "redis_kill": Kind((0, 6), (6, 8), needs="redis"),
    "redis_wiped": Kind((0, 0), (6, 8), needs="redis"),
    "redis_cut": Kind((3, 12), (6, 8), needs="redis"),
}


@dataclass(frozen=True)
class Fault:
    """at: when it is due, seconds from the load's beginning; lasts: seconds; whom: which worker, 0 to 1."""

    at: float
    kind: str
    lasts: float
    whom: float


def plan(seconds: float, kinds: list[str], seed: int) -> list[Fault]:
    """The faults of a run. Every kind comes once before a second round of all begins."""
    rng = random.Random(f"faults {seed}")  # noqa: S311 - a schedule that can be repeated, no secret
    faults: list[Fault] = []
    at, workers, waiting = rng.uniform(FIRST_S, FIRST_S + 3), FEWEST, list[str]()
    removed = False
    while True:
        if not waiting:
            waiting = _round(kinds, rng)
        kind = waiting.pop(0)
        if kind in ("worker_added", "worker_removed"):
            fewer = workers == MOST or (workers > FEWEST and (not removed or rng.random() < 0.5))
            kind = "worker_removed" if fewer else "worker_added"
            removed = removed or fewer
            workers += -1 if fewer else 1
        lasts = rng.uniform(*KINDS[kind].lasts)
        if at + lasts > seconds - QUIET_S:
            return faults
        faults.append(Fault(at, kind, lasts, rng.random()))
        at += lasts + rng.uniform(*KINDS[kind].pause)


def _round(kinds: list[str], rng: random.Random) -> list[str]:
    """All kinds in some order, then those again that come more than once in a round."""
    once, again = list(kinds), [k for k in kinds for _ in range(KINDS[k].often - 1)]
    rng.shuffle(once)
    rng.shuffle(again)
    return once + again


@dataclass
class _Member:
    """A worker and what the supervisor knows of it."""

    process: session.Process
    state: Literal["running", "paused", "down"] = "down"


class Fleet:
    """Workers under a supervisor. note: is told each thing that happens, for the log.

    apart: each has a data root of its own, as on machines of their own; they share checkpoints.
    """

    def __init__(
        self, settings: Settings, pipeline: Pipeline, addresses: services.Addresses,
        note: Callable[[dict[str, Any]], None], apart: bool,
    ) -> None:  # fmt: skip
        self._settings, self._pipeline, self._addresses = settings, pipeline, addresses
        self._note, self._apart = note, apart
        self._members: list[_Member] = []
        self._made = 0
        self.self_stops = 0
        self.bad_ends = 0  # by another exit code than 1 by itself and 0 when asked

    def add(self) -> None:
        """Start one more worker."""
        self._made += 1
        environment: dict[str, str] = {}
        if self._apart:
            root = self._settings.data_root
            environment = {
                "HEADRACE_KAFKA": self._addresses.kafka,
                "HEADRACE_REDIS_URL": self._addresses.redis_url,
                "HEADRACE_DATA_ROOT": str(root / "apart" / str(self._made)),
                "HEADRACE_CHECKPOINTS": str(root / "checkpoints"),
                "HEADRACE_CHECKPOINT_EVERY_S": str(APART_CHECKPOINT_S),
            }
        process = session.Process(self._settings, self._pipeline, "worker", self._made, **environment)
        member = _Member(process)
        self._members.append(member)
        self._start(member)

    def _start(self, member: _Member) -> None:
        if member.state != "running":
            member.process.start()
            member.state = "running"

    @property
    def states(self) -> str:
        """One word for each worker, for people."""
        return " ".join(m.state for m in self._members)

    async def ready(self) -> None:
        """Wait until all are ready, be it after some starts. Raises session.ProcessFailed."""
        deadline = time.monotonic() + READY_S
        for member in self._members:
            while not await member.process.is_ready():
                if time.monotonic() > deadline:
                    process = member.process
                    raise session.ProcessFailed(
                        process.name, f"was not ready within {READY_S:.0f} s", process.log
                    )
                await asyncio.sleep(LOOK_S)

    async def done(self) -> float:
        """Records folded and profiles mirrored, by all workers since each began; -1 where one does not answer."""
        try:
            async with asyncio.timeout(session.ANSWER_S):
                found = await asyncio.gather(*(m.process.metrics() for m in self._members))
        except (aiohttp.ClientError, TimeoutError):
            return -1
        return sum(v for metrics in found for k, v in metrics.items() if k.startswith(_WORK))

    @contextlib.asynccontextmanager
    async def supervised(self) -> AsyncIterator[None]:
        """Meanwhile, start again what ends by itself."""
        task = asyncio.create_task(self._supervise())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _supervise(self) -> None:
        due: list[tuple[float, _Member]] = []
        while True:
            for member in self._members:
                if member.state == "running" and (code := member.process.exit_code) is not None:
                    due.append((time.monotonic() + BACK_OFF_S, member))
                    self._ended(member, code)
            for moment, member in [d for d in due if d[0] <= time.monotonic()]:
                due.remove((moment, member))
                if member in self._members:
                    self._start(member)
            await asyncio.sleep(LOOK_S)

    def _ended(self, member: _Member, code: int) -> None:
        """A worker ended by itself."""
        member.state = "down"
        if code == 1:
            self.self_stops += 1
        else:
            self.bad_ends += 1
        self._note({"what": "ended by itself", "worker": member.process.log.stem, "code": code})

    async def stop(self) -> None:
        """End all in good order."""
        await asyncio.gather(*(self._stop(m) for m in self._members))
        self._members.clear()

    async def _stop(self, member: _Member) -> None:
        if member.state == "running" and (ended := member.process.exit_code) is not None:
            self._ended(member, ended)
            return
        member.state = "down"
        if (code := await asyncio.to_thread(member.process.stop)) != 0:
            self.bad_ends += 1
            self._note({"what": "ended when asked", "worker": member.process.log.stem, "code": code})

    def end(self) -> None:
        """End what is left, also what was stopped, without waiting for good order."""
        for member in self._members:
            member.process.send(signal.SIGCONT)
            member.process.stop(signal.SIGKILL)
        self._members.clear()

    # --- faults --------------------------------------------------------------------------------

    async def _pick(self, whom: float) -> _Member:
        """A worker that is at work, else one that runs, else any."""
        running = [m for m in self._members if m.state == "running"] or self._members
        ready = await asyncio.gather(*(m.process.is_ready() for m in running))
        among = [m for m, at_work in zip(running, ready, strict=True) if at_work] or running
        return among[int(whom * len(among))]

    async def kill(self, fault: Fault) -> str:
        member = await self._pick(fault.whom)
        member.state = "down"
        await asyncio.to_thread(member.process.stop, signal.SIGKILL)
        await asyncio.sleep(fault.lasts)
        self._start(member)
        return member.process.log.stem

    async def pause(self, fault: Fault) -> str:
        member = await self._pick(fault.whom)
        member.state = "paused"
        member.process.send(signal.SIGSTOP)
        try:
            await asyncio.sleep(fault.lasts)
        finally:
            member.process.send(signal.SIGCONT)
            member.state = "running"
        return member.process.log.stem

    async def restart(self, fault: Fault) -> str:
        member = await self._pick(fault.whom)
        await self._stop(member)
        await asyncio.sleep(fault.lasts)
        self._start(member)
        return member.process.log.stem

    async def added(self, _: Fault) -> str:
        self.add()
        return self._members[-1].process.log.stem

    async def removed(self, fault: Fault) -> str:
        member = await self._pick(fault.whom)
        await self._stop(member)
        self._members.remove(member)
        return member.process.log.stem


class Faults:
    """Carries faults out. What a fault has stopped goes on when its call returns, whatever way."""

    def __init__(self, fleet: Fleet, settings: Settings, redis_url: str) -> None:
        self._settings, self._redis_url = settings, redis_url
        self._acts = {
            "worker_kill": fleet.kill, "worker_zombie": fleet.pause, "worker_pause": fleet.pause,
            "worker_restart": fleet.restart, "worker_added": fleet.added, "worker_removed": fleet.removed,
            "broker_kill": self._broker_kill, "broker_stop": self._broker_stop,
            "redis_kill": self._redis_kill, "redis_wiped": self._redis_wiped, "redis_cut": self._redis_cut,
        }  # fmt: skip

    async def act(self, fault: Fault) -> str:
        """Do it, and undo it after its time. Whom it met."""
        return await self._acts[fault.kind](fault)

    async def _broker_kill(self, fault: Fault) -> str:
        return await self._kill("kafka", fault)

    async def _redis_kill(self, fault: Fault) -> str:
        return await self._kill("redis", fault)

    async def _kill(self, service: str, fault: Fault) -> str:
        await asyncio.to_thread(services.kill, self._settings, service)
        await asyncio.sleep(fault.lasts)
        await asyncio.to_thread(services.up, self._settings, [service])
        return service

    async def _broker_stop(self, fault: Fault) -> str:
        await asyncio.to_thread(services.down, self._settings, ["kafka"])
        await asyncio.sleep(fault.lasts)
        await asyncio.to_thread(services.up, self._settings, ["kafka"])
        return "kafka"

    async def _redis_wiped(self, _: Fault) -> str:
        client = connect(self._redis_url)
        await client.flushall()
        await client.aclose()
        return "redis"

    async def _redis_cut(self, fault: Fault) -> str:
        """Redis takes connections and does not answer."""
        pid = next(s.pid for s in services.status(self._settings) if s.name == "redis")
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        try:
            await asyncio.sleep(fault.lasts)
        finally:
            os.kill(pid, signal.SIGCONT)
        return "redis"
