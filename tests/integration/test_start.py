"""`headrace start`: the processes of a Procfile, together and to their end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from app.settings import Settings
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.integration

PORTS = {"WORKER": "28081", "API": "28080", "LEDGER": "28090", "QUALITY": "28091"}


@contextmanager
def started(*options: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "app.cli", "start", "-p", "flight-delays", *options], cwd=REPOSITORY, text=True,
        env=os.environ | {f"HEADRACE_{kind}_PORT": port for kind, port in PORTS.items()},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def answers(url: str, within: float = 60) -> str:
    deadline = time.monotonic() + within
    while True:
        try:
            with urllib.request.urlopen(url, timeout=2) as response:
                return str(response.read().decode())
        except (urllib.error.URLError, OSError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def run(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "app.cli", *words], check=True, capture_output=True, timeout=60)


def ended(process: subprocess.Popen[str], within: float = 60) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=within)
    return process.returncode, out, err


@pytest.mark.timeout(200)
def test_all_processes_run_and_end_together(trained: Settings, postgres_url: str) -> None:
    run("topics", "create", "-p", "flight-delays")
    with started("--workers", "2") as process:
        for port in (28081, 28082, 28080, 28090, 28091):
            assert answers(f"http://127.0.0.1:{port}/readyz") == "ready\n"
        process.send_signal(signal.SIGTERM)
        code, out, err = ended(process)
    assert (code, err) == (0, "")
    assert {"worker.1", "worker.2", "api.1", "ledger.1", "quality.1"} <= {
        line.split(" ", 1)[1].split(" ")[0] for line in out.splitlines()
    }
    for port in (28081, 28082, 28080, 28090, 28091):
        with pytest.raises((urllib.error.URLError, OSError)):
            answers(f"http://127.0.0.1:{port}/healthz", within=0)


@pytest.mark.timeout(120)
def test_one_that_ends_ends_the_others(world: Settings, tmp_path: Path) -> None:
    file = tmp_path / "Procfile"
    file.write_text("long: sleep 600\nshort: echo no disk; exit 3\n")
    with started("--file", str(file)) as process:
        code, out, err = ended(process)
    assert (code, err) == (
        1,
        "headrace: A process ended by itself, so all were: its last lines above say why.\n",
    )
    assert "no disk" in out and "short.1 stopped (rc=3)" in out


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "cannot be read"),
        ("# nothing\n", "names no process"),
        ("api: x\n", "no process 'worker'; it has api"),
    ],
)
def test_a_procfile_that_is_no_use_is_told(
    world: Settings, tmp_path: Path, text: str | None, says: str
) -> None:
    file = tmp_path / "Procfile"
    if text is not None:
        file.write_text(text)
    with started("--file", str(file), "--workers", "2") as process:
        code, _, err = ended(process)
    assert code == 1 and says in err and "Traceback" not in err
