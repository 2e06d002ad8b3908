"""The copy of profiles in Redis, for readers."""

from __future__ import annotations

import asyncio

import click

from app.commands import common


@click.group()
def mirror() -> None:
    """The copy of profiles in Redis (HEADRACE_REDIS_URL)."""


@mirror.command("rebuild", epilog="Example: headrace mirror rebuild --pipeline card-fraud")
@common.pipeline_options
@click.option("--empty", is_flag=True, help="Delete all that is there first: readers find nothing meanwhile.")
@click.option("--within", default=600.0, show_default=True, help="Seconds to wait for the workers.")
@click.option("--json", "as_json", is_flag=True, help="One JSON line.")
def mirror_rebuild(name: str, alias: str | None, empty: bool, within: float, as_json: bool) -> None:
    """Have the workers write all profiles anew, and wait until they have."""
    from app.local import services
    from app.mirrors import rebuild
    from app.terminal import progress

    settings = common.settings()
    pipeline = common.find(settings, name, alias)
    with progress("partitions") as advance:
        done = asyncio.run(rebuild(pipeline, services.addresses(settings), empty, within, advance))
    if as_json:
        common.print_json(done)
    else:
        click.echo(f"{done['partitions']} partitions are mirrored anew, in {done['seconds']:.1f} s")


@mirror.command("show", epilog="Example: headrace mirror show --pipeline card-fraud customer 4711")
@common.pipeline_options
@click.argument("entity")
@click.argument("id_", metavar="ID")
@click.option("--json", "as_json", is_flag=True, help="One JSON line.")
def mirror_show(name: str, alias: str | None, entity: str, id_: str, as_json: bool) -> None:
    """What Redis holds of an entity, under which key, and its features as of now."""
    from app.local import services
    from app.mirrors import show

    settings = common.settings()
    pipeline = common.find(settings, name, alias)
    found = asyncio.run(show(pipeline, services.addresses(settings).redis_url, entity, id_))
    if as_json:
        common.print_json(found)
        return
    features, now = found.pop("features"), found.pop("now")
    for field, value in found.items():
        click.echo(f"{field:24} {value}")
    for feature, value in features.items():
        click.echo(f"{feature:36} {_shown(value):>16}  now {_shown(now[feature])}")


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"
