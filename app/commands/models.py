"""A model's life: training, and the versions."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from app.commands import common

if TYPE_CHECKING:
    from app.model_life import ModelLife
    from app.settings import Settings


@click.command(epilog="Example: headrace train -p flight-delays --features data/flights.features.parquet")
@common.pipeline_options
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

    settings = common.settings()
    life = _life(settings, name, alias)
    report = lifecycle.train(
        life, source, lambda step: click.echo(f"  {step}", err=True), before, promote,
        model=model_files.find(model or life.pipeline.model.train, settings.model_files), folds=folds,
    )  # fmt: skip
    if as_json:
        common.print_json(report)
    else:
        show(report)


def _life(settings: Settings, name: str, alias: str | None = None) -> ModelLife:
    from app import model_life
    from app.local import services

    return model_life.of(settings, services.addresses(settings), common.find(settings, name, alias))


@click.group()
def models() -> None:
    """Versions of a pipeline's model: in MLflow where there is one, else in the folder of models."""


@models.command("list", epilog="Example: headrace models list --pipeline card-fraud")
@common.pipeline_option
@click.option("--all", "everything", is_flag=True, help="Archived ones too.")
@click.option("--json", "as_json", is_flag=True, help="One JSON array.")
def models_list(name: str, everything: bool, as_json: bool) -> None:
    """The versions, the newest first."""
    import msgspec

    from app.terminal import table, utc

    life = _life(common.settings(), name)
    named = life.aliases()
    rows: list[dict[str, Any]] = [
        {
            "version": v.version,
            "aliases": [alias for alias, version in named.items() if version == v.version],
            "registered": utc(v.created), "definition": v.definition, "auc": v.metrics.get("auc"),
            "ap": v.metrics.get("ap"), "archived": v.archived,
            "canary": None if v.canary is None else msgspec.to_builtins(v.canary),
        }
        for v in life.registry.versions(name)
        if everything or not v.archived
    ]  # fmt: skip
    if as_json:
        common.print_json(rows)
    else:
        columns = ["version", "aliases", "registered", "definition", "auc", "ap", "archived", "canary"]
        shown = [row | {"aliases": ", ".join(row["aliases"]), "canary": _canary(row)} for row in rows]
        table(columns, [[*row.values()] for row in shown])
        for row in rows:
            if row["canary"] is not None and "reason" in row["canary"]:
                click.echo(f"{row['version']} was taken back: {row['canary']['reason']}")


def _canary(row: dict[str, Any]) -> str | None:
    """What a version is, or was, as the canary."""
    canary = row["canary"]
    if canary is None:
        return None
    if "reason" in canary:
        return f"taken back ({canary['rail']})"
    return f"{canary['share']:g} %" if "canary" in row["aliases"] else None


@models.command("show", epilog="Example: headrace models show champion --pipeline card-fraud")
@click.argument("version")
@common.pipeline_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def models_show(version: str, name: str, as_json: bool) -> None:
    """A version, by its name or alias, and whether workers of this definition take it. Exit 1 if not."""
    from app.terminal import table, utc

    found = _life(common.settings(), name).examined(version)
    if "registered" in found:
        found["registered"] = utc(found["registered"])
    if found.get("tested"):
        found["tested"] = [utc(time) for time in found["tested"]]
    if as_json:
        common.print_json(found)
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
@common.pipeline_option
def models_promote(version: str, name: str) -> None:
    """Let workers score with a version, by its name or alias, if it passes their gate. They change within 5 s."""
    version = _life(common.settings(), name).promote(version)
    click.echo(f"{version} is the champion of {name}")


@models.command("shadow", epilog="Example: headrace models shadow 0d5a4a3e77c1 deep --pipeline card-fraud")
@click.argument("version")
@click.argument("challenger")
@common.pipeline_option
def models_shadow(version: str, challenger: str, name: str) -> None:
    """Let a version score the same events in the shadow, as challenger-CHALLENGER, if it passes the gate."""
    from app.model_life import CHALLENGER

    alias = f"{CHALLENGER}{challenger}"
    version = _life(common.settings(), name).promote(version, alias)
    click.echo(f"{version} is {alias} of {name}")


@models.command("rollback", epilog="Example: headrace models rollback --pipeline card-fraud")
@common.pipeline_option
def models_rollback(name: str) -> None:
    """Make the champion before the champion again; a second time undoes it."""
    click.echo(f"{_life(common.settings(), name).rollback()} is the champion of {name}")


@models.command(
    "canary", epilog="Example: headrace models canary challenger-deep --share 5 --pipeline card-fraud"
)
@click.argument("version")
@common.pipeline_option
@click.option(
    "--share", type=click.FloatRange(0, 100, min_open=True), required=True, metavar="PERCENT",
    help="Of the entities, which are chosen by a hash.",
)  # fmt: skip
def models_canary(version: str, name: str, share: float) -> None:
    """Let a version decide for a share of the entities, if it passes the gate. Workers follow within 5 s.

    It decides until it is promoted or withdrawn, or a guard rail takes it back.
    """
    version = _life(common.settings(), name).set_canary(version, share)
    click.echo(f"{version} is the canary of {name}, for {share:g} % of its entities")


@models.command("withdraw", epilog="Example: headrace models withdraw challenger-deep --pipeline card-fraud")
@click.argument("alias")
@common.pipeline_option
def models_withdraw(alias: str, name: str) -> None:
    """End the canary, or a challenger's time in the shadow. Its version stays."""
    click.echo(f"{_life(common.settings(), name).withdraw(alias)} is no {alias} of {name} any more")


@models.command("compare", epilog="Example: headrace models compare champion challenger-deep -p card-fraud")
@click.argument("versions", nargs=-1, metavar="[A B]")
@common.pipeline_options
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
    settings = common.settings()
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
@common.pipeline_option
def models_archive(version: str, name: str) -> None:
    """Put a version away that has no alias: it is promoted no more. Its files stay."""
    _life(common.settings(), name).archive(version)
    click.echo(f"{version} of {name} is archived")
