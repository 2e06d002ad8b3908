"""The demonstration as a newcomer runs it, in a folder with nothing in it, services included."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import PIPELINES

pytestmark = pytest.mark.integration

FIELDS = {
    "pipeline", "events", "predictions", "lost", "doubled", "features_equal", "cells", "order_skew_cells",
    "events_per_s", "p50_ms", "p99_ms", "auc", "ap", "seconds",
}  # fmt: skip


def environment(folder: Path) -> dict[str, str]:
    """A world of its own, apart from that of the other tests; Maven's jars are fetched again from its cache."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HEADRACE_")}
    return kept | {
        "HEADRACE_PIPELINES": str(PIPELINES),
        "HEADRACE_DATA_ROOT": str(folder / ".headrace"),
        "HEADRACE_KAFKA_PORT": "39092",
        "HEADRACE_REDIS_PORT": "36379",
        "HEADRACE_PARTITIONS": "4",
    }


def demo(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "app.cli", "demo", *arguments], cwd=folder, env=environment(folder), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def left_running(folder: Path) -> list[str]:
    """Processes that the demonstration started and that still run: they have its data root in their environment."""
    found = subprocess.run(
        ["ps", "axeww", "-o", "pid=,command="], capture_output=True, text=True, check=True
    ).stdout
    return [line[:200] for line in found.splitlines() if f"HEADRACE_DATA_ROOT={folder}/" in line]


@pytest.mark.timeout(420)
@pytest.mark.parametrize("pipeline", ["flight-delays", "card-fraud"])
def test_nothing_lost_nothing_doubled_features_equal(tmp_path: Path, pipeline: str) -> None:
    process = demo(tmp_path, "--pipeline", pipeline, "--json")
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    summary = json.loads(out)
    print(f"\n{out.strip()}")
    assert summary.keys() >= FIELDS
    assert (summary["lost"], summary["doubled"], summary["features_equal"]) == (0, 0, True)
    assert summary["events"] == summary["predictions"] > 20_000
    assert summary["cells"] > summary["events"]
    assert 0.5 < summary["auc"] < 1
    assert 0 < summary["ap"] < 1
    assert left_running(tmp_path) == []


@pytest.mark.timeout(240)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_stops_everything(tmp_path: Path, number: signal.Signals) -> None:
    process = demo(tmp_path, "--json")
    try:
        deadline = time.monotonic() + 180
        while not list(tmp_path.glob(".headrace/logs/*-worker-1.log")):  # the worker was started
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert len(left_running(tmp_path)) >= 4  # itself, Kafka, Valkey, the worker
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode not in (0, None)
    assert "Traceback" not in err
    assert out == ""
    assert left_running(tmp_path) == []
