"""Pipeline files, their topics, and features of a history."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import click

from app.commands import common
from models.errors import HeadraceError


@click.command(epilog="Example: headrace check configs/pipelines/card-fraud.yaml --against topic")
@click.argument("files", nargs=-1, type=click.Path(path_type=Path))
@click.option(
    "--against",
    metavar="topic|FILE",
    help="What is in the topics, another version of the pipeline "
    "(.yaml), or a file of events (.parquet, .csv, .ndjson).",
)
@click.option("--as", "alias", metavar="NAME", help="The instance whose topics are looked at.")
@click.option(
    "--rate",
    type=click.FloatRange(min=0, min_open=True),
    default=1.0,
    show_default=True,
    help="Events a day of an entity, for estimates, where --against measures none.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object, by pipeline.")
def check(
    files: tuple[Path, ...], against: str | None, alias: str | None, rate: float, as_json: bool
) -> None:
    """Check pipeline files, all of configs/pipelines by default, and say what they will need.

    Exit 2 if one is wrong, 1 if what it is compared with breaks: events or labels that are sent now would be
    refused, misread or not read. A change that asks for a rebuild is told, with exit 0.
    """
    import logging

    from app import check as checks
    from app.local import services
    from models.pipeline import load
    from models.specs import PipelineError

    logging.getLogger("aiokafka").setLevel(
        logging.CRITICAL
    )  # a Kafka that does not answer is told in a sentence
    settings = common.settings()
    found, wrong = [], False
    for file in files or sorted(settings.pipelines.glob("*.yaml")):
        try:
            found.append(load(file, alias))
        except PipelineError as error:
            click.echo(str(error), err=True)
            wrong = True
    reports = checks.examine(found, against, alias, rate, services.addresses(settings)) if found else []
    if as_json:
        common.print_json({r.pipeline.name: r.as_dict() for r in reports})
    elif reports:
        checks.show(reports)
    if not found and not wrong:
        raise HeadraceError(
            f"There is no pipeline file in {settings.pipelines}; write one, or set HEADRACE_PIPELINES."
        )
    if wrong:
        sys.exit(2)
    if any(report.breaks for report in reports):
        sys.exit(1)


@click.command(epilog="Example: headrace schema > configs/pipelines/schema.json")
@click.option("--markdown", is_flag=True, help="The reference for people, docs/reference.md.")
def schema(markdown: bool) -> None:
    """Print the JSON Schema of pipeline files, for editors, or their reference."""
    from models import pipeline, reference

    text = reference.markdown() if markdown else json.dumps(pipeline.schema(), indent=2) + "\n"
    click.echo(text, nl=False)


@click.group()
def topics() -> None:
    """The Kafka topics of a pipeline."""


@topics.command("create", epilog="Example: headrace topics create --pipeline card-fraud")
@common.pipeline_options
def topics_create(name: str, alias: str | None) -> None:
    """Create the topics that are missing, with partitions and retention as the settings say."""
    from app import kafka
    from app.local import services

    settings = common.settings()
    pipeline = common.find(settings, name, alias)
    address = services.addresses(settings).kafka
    made = asyncio.run(kafka.create_topics(address, pipeline, settings.partitions, settings.replication))
    for topic in kafka.wanted_topics(pipeline):
        click.echo(f"{topic}  {'created' if topic in made else 'was there'}")


@click.group()
def features() -> None:
    """Features of a history."""


@features.command(
    "compute",
    epilog="Example: headrace features compute -p flight-delays -i data/flights.parquet -o flights.features.parquet",
)
@common.pipeline_options
@click.option(
    "--input",
    "-i",
    "source",
    type=click.Path(path_type=Path),
    required=True,
    help="Parquet, columns as the stream's fields.",
)
@click.option(
    "--output",
    "-o",
    "target",
    type=click.Path(path_type=Path),
    required=True,
    help="Parquet: event id, time, vector, label.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON line.")
def features_compute(name: str, alias: str | None, source: Path, target: Path, as_json: bool) -> None:
    """Fold a file of events as the worker would, without any service."""
    import time

    from app import history

    started = time.perf_counter()
    pipeline = common.find(common.settings(), name, alias)
    rows = history.compute(source, target, pipeline)
    seconds = time.perf_counter() - started
    if as_json:
        common.print_json({"rows": rows, "seconds": round(seconds, 3), "rows_per_s": round(rows / seconds)})
    else:
        click.echo(f"{rows:,} rows in {target}, {rows / seconds:,.0f} rows/s")
