"""The watchdog, with a clock of the test's own, and with a loop that really stands still."""

import threading
import time

from app.membership import StoodStill, Watchdog

SESSION_S = 6.0


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


async def test_standing_still_is_told_at_the_next_check() -> None:
    clock, ended = Clock(), list[Exception]()
    watchdog = Watchdog(SESSION_S, ended.append, clock)
    watchdog.start()
    try:
        clock.now += SESSION_S * 2 / 3
        watchdog.check()
        assert ended == []
        clock.now += 0.5
        watchdog.check()
        assert isinstance(ended[0], StoodStill)
        assert "stood still for 4.5 s" in str(ended[0])
    finally:
        watchdog.stop()


async def test_a_blocked_loop_is_noticed_by_the_thread() -> None:
    ended = threading.Event()
    watchdog = Watchdog(0.3, lambda error: ended.set())
    watchdog.start()
    try:
        deadline = time.monotonic() + 10
        while not ended.is_set() and time.monotonic() < deadline:
            time.sleep(0.01)  # noqa: ASYNC251 - the loop stands still
        assert ended.is_set()
    finally:
        watchdog.stop()


async def test_after_its_stop_nothing_is_told() -> None:
    clock, ended = Clock(), list[Exception]()
    watchdog = Watchdog(SESSION_S, ended.append, clock)
    watchdog.start()
    watchdog.stop()
    clock.now += 100
    watchdog.check()
    assert ended == []
