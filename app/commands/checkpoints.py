"""Copies of the workers' stores."""

from __future__ import annotations

import sys

import click

from app.commands import common


@click.group()
def checkpoints() -> None:
    """Copies of the workers' stores, in a folder or at a URL (HEADRACE_CHECKPOINTS)."""


@checkpoints.command("list", epilog="Example: headrace checkpoints list --pipeline card-fraud")
@common.pipeline_options
@click.option("--json", "as_json", is_flag=True, help="One JSON array.")
def checkpoints_list(name: str, alias: str | None, as_json: bool) -> None:
    """What there is, the newest of each partition first."""
    import time

    from app import checkpoints as copies
    from app.terminal import table

    settings = common.settings()
    found = copies.listed(
        settings, common.find(settings, name, alias), time.time_ns() // 1_000_000, common.tell
    )
    if as_json:
        common.print_json(found)
    else:
        table(["entity", "partition", "position", "age, s", "files", "MB"], [list(c.values()) for c in found])


@checkpoints.command("verify", epilog="Example: headrace checkpoints verify --pipeline card-fraud")
@common.pipeline_options
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def checkpoints_verify(name: str, alias: str | None, as_json: bool) -> None:
    """Read every file and compare its checksum. Exit 1 if one is damaged, each named."""
    from app import checkpoints as copies

    settings = common.settings()
    counts = copies.verify(settings, common.find(settings, name, alias), common.tell)
    if as_json:
        common.print_json(counts)
    else:
        click.echo(
            f"{counts['checkpoints']:,} checkpoints, {counts['files']:,} files, {counts['bytes'] / 1e6:,.1f} MB, "
            f"{counts['damaged']:,} damaged"
        )
    if counts["damaged"]:
        sys.exit(1)


@checkpoints.command("restore", epilog="Example: headrace checkpoints restore --pipeline card-fraud")
@common.pipeline_options
@click.option("--partition", type=click.IntRange(min=0), help="Only this one, of each entity.")
@click.option("--json", "as_json", is_flag=True, help="One JSON array.")
def checkpoints_restore(name: str, alias: str | None, partition: int | None, as_json: bool) -> None:
    """Put the newest good ones where a worker of this data root begins. Newer stores here stay."""
    from dataclasses import asdict

    from app import checkpoints as copies

    settings = common.settings()
    done = []
    for one in copies.restore(settings, common.find(settings, name, alias), partition, common.tell):
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
        common.print_json(done)
