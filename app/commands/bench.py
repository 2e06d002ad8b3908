"""Benchmarks."""

from __future__ import annotations

import sys
from typing import Any

import click

from app.commands import common


@click.group()
def bench() -> None:
    """Measure a real worker on this machine. Figures are of this minute: compare within one run."""


def _bench_result(result: dict[str, Any], as_json: bool) -> None:
    from app.terminal import table

    if as_json:
        common.print_json(result)
    else:
        table(["figure", "value"], [[k, v] for k, v in result.items()])


@bench.command("throughput", epilog="Example: headrace bench throughput --pipeline card-fraud --json")
@click.option("--pipeline", "-p", "name", default="card-fraud", show_default=True, metavar="NAME")
@click.option("--events", default=200_000, show_default=True, help="How large the backlog is.")
@click.option("--json", "as_json", is_flag=True, help="One JSON line.")
def bench_throughput(name: str, events: int, as_json: bool) -> None:
    """CPU per event, events/s and memory of one worker that catches up a backlog."""
    from app import bench as benches

    _bench_result(benches.throughput(common.settings(), name, events), as_json)


@bench.command("catchup", epilog="Example: headrace bench catchup --customers 20000 --late 60 --json")
@click.option("--pipeline", "-p", "name", default="card-fraud", show_default=True, metavar="NAME")
@click.option("--customers", default=5000, show_default=True, help="Of the city: 1.9 payments a day each.")
@click.option("--days", default=30, show_default=True, help="How long the backlog is, in event time.")
@click.option("--late", default=15.0, show_default=True, help="Seconds until the second worker starts.")
@click.option(
    "--alignment", default=21600.0, show_default=True, help="HEADRACE_ALIGNMENT_S of the run in step."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON line.")
def bench_catchup(name: str, customers: int, days: int, late: float, alignment: float, as_json: bool) -> None:
    """Two workers, one of them late, catch a backlog up: in step, and not."""
    from app import bench as benches

    _bench_result(benches.catchup(common.settings(), name, customers, days, late, alignment), as_json)


@bench.command("latency", epilog="Example: headrace bench latency --rate 2000 --json")
@click.option("--pipeline", "-p", "name", default="card-fraud", show_default=True, metavar="NAME")
@click.option("--rate", default=2000.0, show_default=True, help="Events a second, sent whatever comes back.")
@click.option("--seconds", default=20.0, show_default=True, help="How long, after five seconds of warm-up.")
@click.option("--json", "as_json", is_flag=True, help="One JSON line.")
def bench_latency(name: str, rate: float, seconds: float, as_json: bool) -> None:
    """From when an event is due to be sent until its prediction is read."""
    from app import bench as benches

    _bench_result(benches.latency(common.settings(), name, rate, seconds), as_json)


@bench.command("swap", epilog="Example: headrace bench swap --swaps 10 --json")
@click.option("--pipeline", "-p", "name", default="card-fraud", show_default=True, metavar="NAME")
@click.option("--rate", default=1000.0, show_default=True, help="Events a second, sent whatever comes back.")
@click.option("--seconds", default=60.0, show_default=True, help="How long, after five seconds of warm-up.")
@click.option("--swaps", default=10, show_default=True, help="How many new versions are promoted meanwhile.")
@click.option("--workers", default=2, show_default=True, help="How many share the load.")
@click.option(
    "--within",
    default=2.0,
    show_default=True,
    help="Exit 1 where the p99 around swaps is more times the other.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON line.")
def bench_swap(
    name: str, rate: float, seconds: float, swaps: int, workers: int, within: float, as_json: bool
) -> None:
    """How long predictions take while the model changes under load, with an MLflow server of its own.

    Exit 1 where any is lost, doubled or differs, or that takes too long.
    """
    from app import bench_swap as benches

    result = benches.swap(common.settings(), name, rate, seconds, swaps, workers)
    _bench_result(result, as_json)
    if not benches.good(result, within):
        sys.exit(1)


@bench.command("fold", epilog="Example: headrace bench fold --json")
@click.option("--repeats", default=3, show_default=True, help="How often each is measured.")
@click.option("--hot-seconds", default=3600, show_default=True, help="Event time of the hot key.")
@click.option("--json", "as_json", is_flag=True, help="One JSON line.")
def bench_fold(repeats: int, hot_seconds: int, as_json: bool) -> None:
    """The fold alone: on a history, on one hot key, on a million keys."""
    from app.bench_fold import fold

    _bench_result(fold(common.settings(), repeats, hot_seconds), as_json)


@bench.command("mirror", epilog="Example: headrace bench mirror --json")
@click.option("--pipeline", "-p", "name", default="card-fraud", show_default=True, metavar="NAME")
@click.option("--profiles", default=20_000, show_default=True, help="How many entities have a profile.")
@click.option("--rows", default=57, show_default=True, help="Events of each that a profile remembers.")
@click.option("--rounds", default=5, show_default=True, help="How often all of them are mirrored.")
@click.option("--json", "as_json", is_flag=True, help="One JSON line.")
def bench_mirror(name: str, profiles: int, rows: int, rounds: int, as_json: bool) -> None:
    """The mirror alone: profiles a second, and CPU and memory of each, in a real Redis."""
    from app.bench_mirror import mirror

    _bench_result(mirror(common.settings(), name, profiles, rows, rounds), as_json)


@bench.command("memory", epilog="Example: headrace bench memory --profiles 1000000 --mib 256 --json")
@click.option("--pipeline", "-p", "name", default="card-fraud", show_default=True, metavar="NAME")
@click.option("--profiles", default=1_000_000, show_default=True, help="How many entities have a profile.")
@click.option("--mib", default=256, show_default=True, help="The bound on their memory.")
@click.option("--json", "as_json", is_flag=True, help="One JSON line.")
def bench_memory(name: str, profiles: int, mib: int, as_json: bool) -> None:
    """What it costs to have more profiles than memory: one stage, without Kafka."""


@bench.command("ledger", epilog="Example: headrace bench ledger --rows 100000 --json")
@click.option("--pipeline", "-p", "name", default="card-fraud", show_default=True, metavar="NAME")
@click.option("--rows", default=200_000, show_default=True, help="How many predictions there are.")
@click.option("--json", "as_json", is_flag=True, help="One JSON line.")
def bench_ledger(name: str, rows: int, as_json: bool) -> None:
    """Rows/s of one process that writes a backlog of predictions to PostgreSQL, and look-ups then."""
    from app.bench_ledger import ledger

    _bench_result(ledger(common.settings(), name, rows), as_json)


@bench.command("lookup", epilog="Example: headrace bench lookup --rate 1000 --json")
@click.option("--pipeline", "-p", "name", default="card-fraud", show_default=True, metavar="NAME")
@click.option("--rate", default=1000.0, show_default=True, help="Look-ups a second, whatever comes back.")
@click.option("--seconds", default=20.0, show_default=True, help="How long, for look-ups of one entity.")
@click.option("--json", "as_json", is_flag=True, help="One JSON line.")
def bench_lookup(name: str, rate: float, seconds: float, as_json: bool) -> None:
    """Look-ups over HTTP from one API process: of one entity, of a hundred at once, and how fresh they are."""
    from app.bench_lookup import lookup

    _bench_result(lookup(common.settings(), name, rate, seconds), as_json)
