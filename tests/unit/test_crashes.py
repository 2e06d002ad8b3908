"""Killed at any moment, a worker leaves in each store what its log says up to the end of some micro-batch."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from models.events import key_bytes
from tables.store import Store
from tests.fixtures import mortal_worker
from tests.fixtures.mortal_worker import BATCH, CUSTOMERS, PARTITIONS, SHOP

ROOT = Path(__file__).parents[2]
LIVES = 18


class Truth:
    """What a store holds when all of the log up to a position is folded and none of it was ever lost."""

    def __init__(self, root: Path, partition: int) -> None:
        self._partition = partition
        self._profiles = mortal_worker.stage(root)
        self._profiles.open(partition)
        self._profiles.start_at(partition, 0)
        self.position = 0
        self.packed: dict[bytes, bytes] = {}

    def until(self, position: int) -> dict[bytes, bytes]:
        while self.position < position:
            self._profiles.apply([(self._partition, mortal_worker.batch(self._partition, self.position))])
            self.position += BATCH
        for snapshot in self._profiles.snapshots():
            self.packed.update(snapshot.profiles)
        return self.packed


@pytest.mark.timeout(120)
def test_a_kill_takes_whole_micro_batches_from_the_end_and_none_that_was_durable(tmp_path: Path) -> None:
    rng = random.Random(11)
    truths = [Truth(tmp_path / "truth", p) for p in range(PARTITIONS)]
    lost = 0
    worker = subprocess.Popen(
        [sys.executable, "-m", "tests.fixtures.mortal_worker", str(tmp_path / "lives")],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
    )  # fmt: skip
    assert worker.stdin is not None and worker.stdout is not None
    for life in range(LIVES):
        worker.stdin.write(f"{life}\n")
        pid = int(worker.stdout.readline().split()[0])
        said = {"written": [0] * PARTITIONS, "durable": [0] * PARTITIONS}
        heard(worker.stdout, said, rng.randrange(1, 30))
        until = time.perf_counter() + rng.random() / 100
        while time.perf_counter() < until:
            pass
        os.kill(pid, signal.SIGKILL)
        heard(worker.stdout, said, None)
        for p, truth in enumerate(truths):
            store = Store(tmp_path / "lives" / str(p), SHOP.definition)
            held = store.progress.position if store.progress else 0
            assert held % BATCH == 0
            assert max(said["durable"][p], truth.position) <= held
            found = {key_bytes(c): store.get(key_bytes(c)) for c in CUSTOMERS[p]}
            store.close()
            assert {k: v for k, v in found.items() if v is not None} == truth.until(held)
            lost += max(said["written"][p] - held, 0)
    worker.stdin.close()
    assert worker.wait(30) == 0
    assert all(truth.position > 0 for truth in truths)
    assert lost > 0, "else nothing crashed"


def heard(lines: object, said: dict[str, list[int]], most: int | None) -> None:
    """Take so many lines of a life, or all that it said until it died."""
    for line in iter(lines.readline, "dead\n"):  # type: ignore[attr-defined]
        assert line, "the worker has ended"
        *positions, what = line.split()
        said[what] = [int(p) for p in positions]
        if most is not None and (most := most - 1) == 0:
            return
