"""What counts as around a swap, and what a run may not show."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from app import bench_swap
from app.bench_swap import _around, _Changes, good, swap
from app.settings import Settings
from models.errors import HeadraceError

GOOD: dict[str, Any] = {
    "missing": 0, "lost": 0, "doubled": 0, "differing": 0, "changed_back": 0, "p99_ratio": 1.9,
}  # fmt: skip


def read(changes: _Changes, monkeypatch: pytest.MonkeyPatch, *seen: tuple[float, int, str]) -> None:
    for at, partition, version in seen:
        monkeypatch.setattr(bench_swap, "time", SimpleNamespace(time=lambda at=at: at))
        prediction: Any = SimpleNamespace(version=version, origin=SimpleNamespace(partition=partition))
        changes.see(prediction)


def test_a_change_lasts_until_the_last_worker_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    changes = _Changes()
    read(
        changes, monkeypatch,
        (10.0, 0, "a"), (10.0, 1, "a"), (20.0, 0, "b"), (21.5, 1, "a"), (21.6, 1, "b"), (30.0, 0, "b"),
    )  # fmt: skip
    due = np.array([18.9, 19.1, 21.0, 22.4, 22.6, 30.0])
    near, took = _around(changes, ["a", "b", "never"], [0.0, 18.0, 40.0], due)
    assert near.tolist() == [False, True, True, True, False, False]
    assert took == [3.5]
    assert changes.back == 0


def test_a_partition_that_goes_back_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    changes = _Changes()
    read(changes, monkeypatch, (1.0, 0, "a"), (2.0, 0, "b"), (3.0, 0, "a"), (4.0, 0, "a"), (5.0, 1, "a"))
    assert changes.back == 1


def test_what_a_run_may_not_show() -> None:
    assert good(GOOD, within=2.0)
    assert not good(GOOD | {"p99_ratio": 2.1}, within=2.0)
    assert not good(GOOD | {"p99_ratio": float("nan")}, within=2.0)
    for figure in ("missing", "lost", "doubled", "differing", "changed_back"):
        assert not good(GOOD | {figure: 1}, within=2.0)


def test_swaps_must_not_run_into_each_other() -> None:
    with pytest.raises(
        HeadraceError, match="10 swaps in 30 s would run into each other; let it take 40 or more"
    ):
        swap(Settings(), "card-fraud", 1000, 30, 10, 1)
