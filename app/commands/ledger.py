"""The ledger in PostgreSQL: its tables, and the process that fills them."""

from __future__ import annotations

import asyncio
import signal
import sys

import click

from app.commands import common
from models.errors import HeadraceError


@click.group()
def ledger() -> None:
    """Predictions and labels in PostgreSQL."""


@ledger.command(epilog="Example: headrace ledger migrate")
@click.option("--to", "revision", default="head", show_default=True, help="A revision, or base: no tables.")
@click.option("--drop", is_flag=True, help="Allow a way down, which drops tables or columns with their rows.")
def migrate(revision: str, drop: bool) -> None:
    """Make or change the tables. Rows stay, but for what an older revision has no place for (--drop)."""
    from tables.ledger import migrating

    url = _url()
    before = asyncio.run(migrating.revisions(url))
    if migrating.is_down(before, revision) and not drop:
        raise HeadraceError(
            f"From revision {before.current} to {revision} goes down, and rows are lost; add --drop if that is meant."
        )
    after = asyncio.run(migrating.migrate(url, revision))
    click.echo(f"revision {before.current or 'none'} -> {after.current or 'none'}")


@ledger.command(epilog="Example: headrace ledger status --pipeline flight-delays")
@common.pipeline_options
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def status(name: str, alias: str | None, as_json: bool) -> None:
    """Which revision the tables have, what is in them, and how far each topic was read. Exit 1 if they do not fit."""
    from app import ledger as ledgers
    from app.terminal import table

    settings = common.settings()
    pipeline = common.find(settings, name, alias)
    found = asyncio.run(ledgers.status(pipeline, _url()))
    if as_json:
        common.print_json(found)
    else:
        click.echo(f"revision {found['revision'] or 'none'}, of {found['newest']}")
        click.echo(
            f"predictions {found['predictions']:,}, labels {found['labels']:,}, days {found['days']:,}"
        )
        table(
            ["topic", "partition", "next offset", "whole until"],
            [list(p.values()) for p in found["positions"]],
        )
    if found["revision"] != found["newest"]:
        sys.exit(1)


@ledger.command(epilog="Example: headrace ledger run --pipeline flight-delays --port 8085")
@common.pipeline_options
@click.option("--port", type=int, help="Of its health and metrics; HEADRACE_LEDGER_PORT by default.")
def run(name: str, alias: str | None, port: int | None) -> None:
    """Write what is in the topics. Start as many as you like: they share the partitions."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # until it has a loop there is nothing to end
    from app import ledger as ledgers
    from app.local import services

    settings = common.settings()
    pipeline = common.find(settings, name, alias)
    addresses = services.addresses(settings)
    made = ledgers.Ledger(
        pipeline, addresses.kafka, addresses.postgres_url, settings.ledger_days, settings.session_s
    )
    ledgers.run(made, settings.api_host, port or settings.ledger_port)


@ledger.command(epilog="Example: headrace ledger rewind --pipeline flight-delays --as try")
@common.pipeline_options
def rewind(name: str, alias: str | None) -> None:
    """Read the topics from their beginning again: they were made anew. Rows stay, and none is written twice."""
    from app import ledger as ledgers

    asyncio.run(ledgers.rewind(common.find(common.settings(), name, alias), _url()))


def _url() -> str:
    from app.local import services

    return services.addresses(common.settings()).postgres_url
