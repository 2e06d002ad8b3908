"""Whole runs that prove themselves."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from app.commands import common
from models.errors import HeadraceError


@click.command(epilog="Example: headrace demo --pipeline card-fraud --json")
@click.option("--pipeline", "-p", "name", default="flight-delays", show_default=True, metavar="NAME")
@click.option(
    "--data",
    "folder",
    type=click.Path(path_type=Path),
    default=Path("data"),
    show_default=True,
    help="Where data files are, or are made.",
)
@click.option("--stay/--no-stay", default=None, help="Keep all running at the end; by default on a terminal.")
@click.option("--json", "as_json", is_flag=True, help="The summary as one JSON line.")
def demo(name: str, folder: Path, stay: bool | None, as_json: bool) -> None:
    """Run the whole of it on real data and prove the result. Exit 1 if anything was lost, doubled or differs."""
    from app import demo as demonstration

    if stay is None:
        stay = sys.stdout.isatty() and not as_json
    summary = demonstration.run(common.settings(), name, folder, stay, as_json)
    if as_json:
        click.echo(summary.as_json())
    if not summary.good:
        raise HeadraceError("The run is not exact: see lost, doubled and features_equal above.")


@click.command(epilog="Example: headrace chaos --seed 7 --minutes 10 --json")
@click.option("--pipeline", "-p", "name", default="card-fraud", show_default=True, metavar="NAME")
@click.option("--seed", default=1, show_default=True, help="Decides the load and the schedule of faults.")
@click.option("--minutes", default=5.0, show_default=True, help="How long the load lasts.")
@click.option("--seconds", type=float, help="The same in seconds.")
@click.option("--rate", default=500.0, show_default=True, help="Events a second, sent whatever comes back.")
@click.option("--apart", is_flag=True, help="Workers share no disk, only checkpoints, every 10 s.")
@click.option("--json", "as_json", is_flag=True, help="The summary as one JSON line.")
def chaos(
    name: str, seed: int, minutes: float, seconds: float | None, rate: float, apart: bool, as_json: bool
) -> None:
    """Kill, stop and cut what runs, under a rough load. Exit 1 if a prediction was lost, doubled or differs."""
    from app import chaos as chaotic

    minutes = minutes if seconds is None else seconds / 60
    if not (minutes > 0 and rate > 0):
        raise click.UsageError("--minutes, --seconds and --rate are to be above 0.")
    summary = chaotic.run(common.settings(), name, seed, minutes, rate, apart, as_json)
    if as_json:
        click.echo(summary.as_json())
    if not summary.good:
        raise HeadraceError(
            "The run is not exact: see lost, doubled, differing and unaccounted above, and chaos/findings.jsonl "
            "under the data root."
        )
