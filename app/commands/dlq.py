"""Dead letters."""

from __future__ import annotations

import asyncio

import click

from app.commands import common
from models.errors import HeadraceError


@click.group()
def dlq() -> None:
    """Dead letters: what was refused, why, and sending it again."""


_REASON = click.option(
    "--reason", "reasons", multiple=True, metavar="CODE", help="Only these; may be repeated."
)


@dlq.command("list", epilog="Example: headrace dlq list -p card-fraud --reason wrong-key --since 2026-01-31")
@common.pipeline_options
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

    settings = common.settings()
    wanted = dead.Wanted(reasons=frozenset(reasons), since=instant(since) if since else 0)
    address = services.addresses(settings).kafka
    letters = asyncio.run(dead.read(common.find(settings, name, alias), address, wanted))
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
@common.pipeline_options
def dlq_show(origin: str, name: str, alias: str | None) -> None:
    """Show one letter whole; ORIGIN is topic/partition/offset. Bytes are text where they are UTF-8, else hex."""
    from app import dlq as dead
    from app.local import services
    from models.dead_letters import Original, original

    settings = common.settings()
    pipeline, address = common.find(settings, name, alias), services.addresses(settings).kafka

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
@common.pipeline_options
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
    settings = common.settings()
    pipeline, address = common.find(settings, name, alias), services.addresses(settings).kafka
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
