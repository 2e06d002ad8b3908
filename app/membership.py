"""Membership of the consumer group: quick to be missed, told when it is lost, left on purpose.

A worker whose membership is lost must not go on: its partitions are another's. aiokafka's coordinator
would rejoin silently, with state in hand; here it ends the process, and who started it starts it again.
It extends internals of aiokafka 0.14, as `app.faust_batches` does those of Faust.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from aiokafka.consumer.group_coordinator import GroupCoordinator

from models.errors import HeadraceError

HEARTBEAT_S = 0.5  # members learn by one that partitions change hands, and the quickest wait for the others
REBALANCE_S = 15.0  # for a member to hand over and join again; above what handing over may take
BEAT_S = 0.05  # between two signs of life of the main loop
NEVER_S = 1e9  # a worker without partitions polls nothing, and is as alive as any other

End = Callable[[Exception], object]  # ends the process


@dataclass(frozen=True)
class Membership:
    """session_s: of silence, after which the group counts a worker out.

    instance: makes the member static; who comes back under it within the session keeps its partitions.
    """

    session_s: float
    instance: str | None = None


class MembershipLost(HeadraceError):
    """Kafka does not count this worker to its group any more."""

    def __init__(self, session_s: float, instance: str | None, reason: str = "") -> None:
        other = f", or another worker runs with HEADRACE_INSTANCE_ID={instance}" if instance else ""
        super().__init__(
            f"Kafka does not count this worker to its group any more{reason}: it was silent for longer than the "
            f"session of {session_s:g} s (HEADRACE_SESSION_S){other}. It ends before it does what is another's to "
            "do; started again, it goes on from its stores."
        )


class GroupRefused(HeadraceError):
    """Kafka does not let this worker into the group."""

    def __init__(self, group: str, reason: object) -> None:
        super().__init__(
            f"Kafka does not let this worker into the group {group} ({reason}). Correct the cause, and start "
            "it again: rights on the group, HEADRACE_SESSION_S within the broker's bounds, all workers of one version."
        )


class StoodStill(HeadraceError):
    """The process was stopped, or its loop blocked, for so long that another may own its partitions."""

    def __init__(self, stood_s: float, session_s: float) -> None:
        super().__init__(
            f"This worker stood still for {stood_s:.1f} s, more than two thirds of the session of {session_s:g} s "
            "(HEADRACE_SESSION_S), so its partitions may be another's. Started again, it goes on from its stores."
        )


class Coordinator(GroupCoordinator):  # type: ignore[misc]
    """aiokafka's coordinator of one member, changed in what it does when the group has lost it."""

    _end: End

    @classmethod
    def take_over(cls, coordinator: Any, end: End) -> None:
        """Change a coordinator that has not joined yet: aiokafka names the class of its own in the code."""
        coordinator.__class__ = cls
        coordinator._end = end
        coordinator._coordination_task.add_done_callback(coordinator._ended)

    def reset_generation(self) -> None:
        """The answer to a heartbeat, commit, join or sync was: unknown member, or illegal generation."""
        if self.generation > 0 and not self._closing.done():
            self._end(self._lost())
        super().reset_generation()

    def _lost(self, reason: str = "") -> MembershipLost:
        return MembershipLost(self._session_timeout_ms / 1000, self._group_instance_id, reason)

    def _push_error_to_user(self, exc: Exception) -> Any:
        """What aiokafka cannot recover from, and would tell the next poll, if there is one."""
        if not self._closing.done():
            self._end(self._sentence(exc))
        return super()._push_error_to_user(exc)

    def _sentence(self, exc: BaseException) -> Exception:
        if isinstance(exc.__cause__, HeadraceError):  # raised by our assignor
            return exc.__cause__
        if self.generation > 0 and self._group_instance_id:  # aiokafka does not know the code of "fenced"
            return self._lost(f" ({exc})")
        return GroupRefused(self.group_id, exc)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """Nobody would speak for this worker any more."""
        error = None if task.cancelled() else task.exception()
        if error is not None and not self._closing.done():
            self._end(self._sentence(error))

    async def _perform_assignment(self, response: Any) -> Any:
        """As the leader: with the topics as they are now. One that it did not know would have no owner."""
        await self._client.force_metadata_update()
        return await super()._perform_assignment(response)

    async def _do_commit_offsets(self, assignment: Any, offsets: Any) -> None:
        """Nothing while it joins: behind a JoinGroup Kafka answers as to a member that is lost."""
        if not self._performed_join_prepare:
            await super()._do_commit_offsets(assignment, offsets)

    async def _maybe_leave_group(self) -> None:
        """At the end. aiokafka lets static members go without a word; Kafka takes it from them too."""
        self._group_instance_id = None
        await super()._maybe_leave_group()


class Watchdog:
    """Ends a worker whose main loop, or whole process, stood still for two thirds of a session.

    The group does not see it: heartbeats go by a thread of their own, and after SIGSTOP or a closed
    lid the process goes on as if nothing had been.
    """

    def __init__(self, session_s: float, end: End, clock: Callable[[], float] | None = None) -> None:
        """clock: in seconds; the default one goes on while the machine sleeps."""
        self._session_s, self._end, self._clock = session_s, end, clock or _clock
        self._stopped = threading.Event()
        self._seen = 0.0

    def start(self) -> None:
        """Watch the running loop, until `stop`."""
        self._seen = self._clock()
        self._beat(asyncio.get_running_loop())
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()

    def check(self) -> None:
        """To be called before what only the owner of a partition may do."""
        stood = self._clock() - self._seen
        if stood > self._session_s * 2 / 3 and not self._stopped.is_set():
            self._end(StoodStill(stood, self._session_s))

    def _beat(self, loop: asyncio.AbstractEventLoop) -> None:
        if not self._stopped.is_set():
            self.check()
            self._seen = self._clock()
            loop.call_later(BEAT_S, self._beat, loop)

    def _watch(self) -> None:
        while not self._stopped.wait(BEAT_S):
            self.check()


def _clock() -> float:
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
