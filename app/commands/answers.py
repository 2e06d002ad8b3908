"""What a running system says of itself."""

from __future__ import annotations

import asyncio
import sys

import click

from app.commands import common


@click.command(epilog="Example: headrace doctor --pipeline card-fraud")
@common.pipeline_options
@click.option("--json", "as_json", is_flag=True, help="One JSON object with all rows.")
def doctor(name: str, alias: str | None, as_json: bool) -> None:
    """Compare log, stores, predictions, mirror, group and model. Exit 1 if something is wrong."""
    import logging
    from dataclasses import asdict

    from app import doctor as doctors
    from app.terminal import table

    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # what does not answer is told as a row
    settings = common.settings()
    pipeline = common.find(settings, name, alias)
    rows = asyncio.run(doctors.examine(settings, pipeline))
    wrong = sum(row.verdict == "wrong" for row in rows)
    if as_json:
        about = {"pipeline": pipeline.name, "instance": pipeline.instance, "definition": pipeline.definition}
        common.print_json(about | {"wrong": wrong, "rows": [asdict(row) for row in rows]})
    else:
        table(["verdict", "of", "what was seen", "remedy"], doctors.shown(rows))
    if wrong:
        sys.exit(1)


@click.command(
    epilog="Example: headrace explain -p card-fraud --entity terminal --key 7 --feature TERMINAL_ID_RISK_7DAY_WINDOW"
)
@common.pipeline_options
@click.option("--entity", required=True, metavar="NAME", help="Whose features.")
@click.option("--key", required=True, metavar="KEY", help="Of which customer, terminal or the like.")
@click.option(
    "--feature", "features", multiple=True, metavar="NAME", help="Show its events; may be repeated."
)
@click.option("--event", metavar="ID", help="As its prediction was made; the key's newest by default.")
@click.option("--at", metavar="TIME", help="As known at this time, ISO in UTC or ms.")
@click.option("--all", "everything", is_flag=True, help="All events of the windows, not the newest 20.")
@click.option("--json", "as_json", is_flag=True, help="One JSON line, with all events.")
def explain(
    name: str, alias: str | None, entity: str, key: str, features: tuple[str, ...], event: str | None,
    at: str | None, everything: bool, as_json: bool,
) -> None:  # fmt: skip
    """Show which events made a feature's value, then and now, from the log alone."""
    import msgspec

    from app import explain as explains
    from app.explain_table import show
    from app.history import instant
    from app.local import services

    if event is not None and at is not None:
        raise click.UsageError("Give either --event or --at.")
    time = None if at is None else int(at) if at.isdigit() else instant(at)
    settings = common.settings()
    pipeline, address = common.find(settings, name, alias), services.addresses(settings).kafka
    found = asyncio.run(explains.explained(pipeline, address, entity, key, features, event, time))
    if as_json:
        click.echo(msgspec.json.encode(found))
    else:
        show(found, bool(features), everything)
