"""The benchmarks run and say what they measured. No figure is asserted: machines are shared and noisy."""

import json
import os
import subprocess
import sys

import pytest

from app.settings import Settings

pytestmark = pytest.mark.integration


def bench(*arguments: str) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-m", "app.cli", "bench", *arguments, "--json"],
        capture_output=True, text=True, timeout=240, check=False, env=os.environ,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result: dict[str, float] = json.loads(done.stdout)
    print(f"\n{done.stdout.strip()}")
    return result


@pytest.mark.timeout(300)
def test_throughput_of_a_backlog(trained: Settings) -> None:
    result = bench("throughput", "--events", "20000")
    assert result["events"] == result["predictions"] >= 20_000
    assert {"cpu_us_per_event", "events_per_s", "rss_mib"} <= result.keys()
    assert min(result["cpu_us_per_event"], result["events_per_s"], result["rss_mib"]) > 0


@pytest.mark.timeout(300)
def test_the_mirror_alone(world: Settings) -> None:
    result = bench("mirror", "--profiles", "2000", "--rows", "5", "--rounds", "2")
    assert min(result["profiles_per_s"], result["worker_us_per_profile"], result["read_us_per_profile"]) > 0
    assert result["bytes_per_profile"] > result["compact_bytes_per_profile"] > 5 * 8


@pytest.mark.timeout(300)
def test_latency_under_an_open_load(trained: Settings) -> None:
    result = bench("latency", "--rate", "500", "--seconds", "4")
    assert result["missing"] == 0
    assert result["events"] >= 4 * 500 - 5
    assert 0 < result["p50_ms"] <= result["p99_ms"] <= result["max_ms"]


@pytest.mark.timeout(300)
def test_the_ledger_takes_a_backlog(world: Settings, postgres_url: str) -> None:
    result = bench("ledger", "--rows", "20000")
    assert result["predictions"] == 20_000
    assert (
        min(result["rows_per_s"], result["cpu_us_per_row"], result["event_p50_ms"], result["entity_p50_ms"])
        > 0
    )


@pytest.mark.timeout(300)
def test_latency_around_swaps(trained: Settings) -> None:
    result = bench("swap", "--rate", "300", "--seconds", "12", "--swaps", "2", "--within", "1000")
    assert (result["swaps"], result["workers"]) == (2, 2)
    wrong = ("missing", "lost", "doubled", "differing", "changed_back")
    assert [result[figure] for figure in wrong] == [0] * len(wrong)
    assert 0 < result["events_around"] < result["events"]
    for part in ("ordinary", "swap"):
        assert 0 < result[f"{part}_p50_ms"] <= result[f"{part}_p99_ms"] <= result[f"{part}_max_ms"]
    assert result["p99_ratio"] > 0
    assert 0 < result["all_changed_median_s"] <= result["all_changed_most_s"]


@pytest.mark.timeout(300)
def test_look_ups(trained: Settings) -> None:
    result = bench("lookup", "--rate", "200", "--seconds", "3")
    assert result["rate"] > 0
    for part in ("", "batch_", "freshness_"):
        assert 0 < result[f"{part}p50_ms"] <= result[f"{part}p99_ms"]
