"""What runs here."""

from __future__ import annotations

import sys

import click

from app.commands import common


@click.command(epilog="Example: headrace up && headrace status")
def up() -> None:
    """Start Kafka, Valkey, PostgreSQL and MLflow here, as far as no setting names others."""
    from app.local import services

    settings = common.settings()
    services.up(settings, progress=lambda service, event: click.echo(f"{service:>9}  {event}", err=True))
    for status in services.status(settings):
        click.echo(f"{status.label:<11} {status.address or status.state}")


@click.command(epilog="Example: headrace down")
def down() -> None:
    """Stop what `headrace up` started. Its data stays."""
    from app.local import services

    services.down(
        common.settings(), progress=lambda service, event: click.echo(f"{service:>9}  {event}", err=True)
    )


@click.command(epilog="Example: headrace status --json | jq -r .kafka.address")
@click.option("--json", "as_json", is_flag=True, help="One JSON object, by service.")
def status(as_json: bool) -> None:
    """What runs, and where. Exit 1 if a service does not answer."""
    from app.local import services
    from app.terminal import table

    found = services.status(common.settings())
    if as_json:
        common.print_json({s.name: {"state": s.state, "address": s.address, "pid": s.pid} for s in found})
    else:
        table(["service", "state", "address", "pid", "log"],
              [[s.label, s.state, s.address, s.pid and str(s.pid), s.log] for s in found])  # fmt: skip
    if any(s.state in ("silent", "stopped") for s in found):
        sys.exit(1)
