"""A minute of chaos, in a folder with nothing in it: faults, and nothing lost, doubled or different."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.e2e.test_demo import environment, left_running

pytestmark = pytest.mark.integration


def chaos(folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "app.cli", "chaos", "--rate", "300", "--json", *arguments], cwd=folder,
        env=environment(folder), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.mark.timeout(480)
def test_a_minute_of_faults(tmp_path: Path) -> None:
    """The seed's schedule: Redis killed, Redis wiped, a worker stopped past its session, a worker killed."""
    process = chaos(tmp_path, "--seed", "163", "--seconds", "60")
    out, err = process.communicate(timeout=460)
    print(f"\n{out.strip()}\n{err}")
    root = tmp_path / ".headrace" / "chaos"
    assert process.returncode == 0, (root / "findings.jsonl").read_text()[:3000]
    summary = json.loads(out)
    assert (summary["lost"], summary["doubled"], summary["doubled_plain"], summary["differing"]) == (
        0,
        0,
        0,
        0,
    )
    assert summary["events"] == summary["predictions"] >= 60 * 300
    assert summary["dead_letters"] > 0
    assert summary["dead_letters_unaccounted"] == 0
    assert summary["zombies"] == 1
    assert summary["faults"] == sum(summary["kinds"].values()) >= 3
    log = [json.loads(line) for line in (root / "faults.jsonl").read_text().splitlines()]
    assert [x["kind"] for x in log if x["what"] == "begins"] == [
        x["kind"] for x in log if x["what"] == "is over"
    ]
    assert left_running(tmp_path) == []


@pytest.mark.timeout(240)
def test_an_interrupt_leaves_nothing_behind(tmp_path: Path) -> None:
    """Also a worker that is stopped at that moment goes: this seed begins with stopping one."""
    process = chaos(tmp_path, "--seed", "3", "--seconds", "60")
    log = tmp_path / ".headrace" / "chaos" / "faults.jsonl"
    try:
        deadline = time.monotonic() + 200
        while not (log.exists() and "worker_zombie" in log.read_text()):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        running = left_running(tmp_path)
    finally:
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert len(running) >= 4  # itself, Kafka, Valkey, a worker or two
    assert process.returncode not in (0, None)
    assert "Traceback" not in err
    assert out == ""
    assert left_running(tmp_path) == []
