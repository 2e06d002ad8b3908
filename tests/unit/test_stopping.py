"""How a worker ends where Kafka's clients hang. On real ones: tests/integration/test_outages.py."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from app import worker as module
from app.settings import Settings
from app.worker import Worker, create_worker
from tests.fixtures.simulation import ADDRESSES, SERVING, SHOP, counts_of


@pytest.mark.parametrize(("crashed", "code"), [(False, 0), (True, 1)])
async def test_a_client_that_hangs_hides_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crashed: bool, code: int
) -> None:
    """Who starts it again looks at the code."""
    ends: list[int] = []

    def note(_: float, code: int) -> Any:
        ends.append(code)
        return SimpleNamespace(cancel=lambda: ends.remove(code))

    async def stop() -> None: ...

    monkeypatch.setattr(module, "_exit_after", note)
    worker = Worker(SHOP, SERVING, counts_of(SHOP), ADDRESSES, Settings(data_root=tmp_path), 0)
    worker.watchdog.stop()
    monkeypatch.setattr(worker, "stop", stop)
    app = create_worker(worker)
    app._consumer = SimpleNamespace(epoch=0)
    if crashed:
        app._crashed.set()
    await app.on_before_shutdown.send()
    assert ends == [code]
