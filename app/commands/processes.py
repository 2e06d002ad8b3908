"""What runs until it is asked to end, and what feeds it."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path

import click

from app.commands import common


@click.command(epilog="Example: headrace worker --pipeline flight-delays --port 8082")
@common.pipeline_options
@click.option(
    "--port", type=int, help="Of its health, metrics and look-ups; HEADRACE_WORKER_PORT by default."
)
def worker(name: str, alias: str | None, port: int | None) -> None:
    """Fold, score and predict. Start as many as you like: they share the partitions."""
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(0)
    )  # until it takes partitions there is nothing to let go
    from app.local import services

    settings = common.settings()
    pipeline = common.find(settings, name, alias)
    addresses = services.addresses(settings)

    from app import kafka, model_life
    from app import worker as workers
    from app.serving import Serving

    life = model_life.of(settings, addresses, pipeline)
    serving = Serving(life, settings.model_every_s, workers.say, settings.canary_bounds)
    counts = asyncio.run(kafka.checked_partitions(addresses.kafka, pipeline))
    built = workers.Worker(pipeline, serving, counts, addresses, settings, port or settings.worker_port)
    workers.run(built)


@click.command(
    epilog="Example: headrace api --pipeline flight-delays; curl localhost:8080/v1/features/origin/JFK"
)
@common.pipeline_options
@click.option("--port", type=int, help="HEADRACE_API_PORT by default.")
def api(name: str, alias: str | None, port: int | None) -> None:
    """Answer look-ups over HTTP."""
    import logging

    from app import model_life
    from app.api.process import Services, run
    from app.local import services

    settings = common.settings()
    logging.basicConfig(level=settings.log_level, format="%(name)s: %(message)s")
    pipeline = common.find(settings, name, alias)
    addresses = services.addresses(settings)
    found = Services(
        addresses.redis_url,
        addresses.get("kafka"),
        addresses.get("postgres"),
        model_life.of(settings, addresses, pipeline),
    )
    run(pipeline, found, settings.api_limits, settings.api_host, port or settings.api_port)


@click.command(epilog="Example: headrace quality --pipeline card-fraud & curl localhost:8089/metrics")
@common.pipeline_options
@click.option("--port", type=int, help="HEADRACE_QUALITY_PORT by default.")
def quality(name: str, alias: str | None, port: int | None) -> None:
    """Judge versions by their labels, as these come, and take a canary back that turns out worse."""
    from app import kafka, model_life
    from app import quality as process
    from app.local import services

    settings = common.settings()
    pipeline = common.find(settings, name, alias)
    addresses = services.addresses(settings)
    built = process.Quality(
        model_life.of(settings, addresses, pipeline), settings.quality_days, settings.quality_events,
        settings.canary_bounds, process.say,
    )  # fmt: skip
    asyncio.run(kafka.checked_partitions(addresses.kafka, pipeline))
    process.run(
        built, addresses.kafka, settings.api_host, port or settings.quality_port, settings.model_every_s
    )


@click.command(
    epilog="Example: headrace replay data/flights.parquet -p flight-delays --rate 2000 --start 2013-09-01"
)
@click.argument("file", type=click.Path(path_type=Path))
@common.pipeline_options
@click.option("--rate", default="max", show_default=True, help="Events a second, or max.")
@click.option("--start", help="The first day, e.g. 2013-09-01.")
@click.option("--end", help="The day after the last.")
@click.option("--json", "as_json", is_flag=True, help="One JSON line at the end.")
def replay(
    file: Path, name: str, alias: str | None, rate: str, start: str | None, end: str | None, as_json: bool
) -> None:
    """Publish a file's events in order of their time, and labels when they become known."""
    from app import replay as replays
    from app.local import services
    from app.terminal import progress

    settings = common.settings()
    pipeline = common.find(settings, name, alias)
    tape = replays.tape(file, pipeline, start, end)
    address = services.addresses(settings).kafka
    with progress("events") as advance:
        sent = asyncio.run(replays.publish(tape, pipeline, address, replays.parse_rate(rate), advance))
    if as_json:
        common.print_json(sent)
    else:
        click.echo(f"{sent['events']:,} events and {sent['labels']:,} labels in {sent['seconds']:.1f} s")


@click.command(epilog="Example: headrace start --pipeline card-fraud --workers 2 --without api")
@common.pipeline_option
@click.option("--workers", type=click.IntRange(min=0), help="How many, on ports in a row; 1 by default.")
@click.option(
    "--without", "left_out", multiple=True, metavar="PROCESS", help="Do not start it; may be repeated."
)
@click.option(
    "--file",
    type=click.Path(path_type=Path),
    default=Path("Procfile"),
    show_default=True,
    help="The Procfile.",
)
def start(name: str, workers: int | None, left_out: tuple[str, ...], file: Path) -> None:
    """Run all processes of a pipeline, as the Procfile has them, until Ctrl-C. Exit 1 if one ends by itself."""
    from app import starting

    settings = common.settings()
    common.find(settings, name)  # a wrong name is told once
    counts = dict.fromkeys(left_out, 0) | ({} if workers is None else {"worker": workers})
    starting.start(file, settings, name, counts)
