"""Tokens of the API."""

from __future__ import annotations

from pathlib import Path

import click

from app.commands import common


@click.group()
def token() -> None:
    """Make tokens of the query API, of which only hashes are kept."""


@token.command("new", epilog="Example: headrace token new dashboard --scope read --file tokens.txt")
@click.argument("name")
@click.option(
    "--scope", "scopes", multiple=True, type=click.Choice(["read", "publish", "admin"]), default=["read"],
    show_default=True, help="What it may do; may be repeated. admin may do all.",
)  # fmt: skip
@click.option("--rate", type=click.FloatRange(min=0), help="Requests a second; HEADRACE_API_RATE by default.")
@click.option("--file", type=click.Path(path_type=Path), help="Append its line here.")
def new(name: str, scopes: tuple[str, ...], rate: float | None, file: Path | None) -> None:
    """Print a token, once, and the line of the file HEADRACE_API_TOKENS that lets it in."""
    from app.api.security import new_token
    from app.errors import SettingsError

    if not name or any(c.isspace() or c == "#" for c in name):
        raise SettingsError(f"The name {name!r} of a token has no spaces and no '#'; choose another.")
    made, line = new_token(name, list(scopes), rate)
    if file is None:
        common.tell("add the line to the file that HEADRACE_API_TOKENS names")
        click.echo(made)
        click.echo(line)
        return
    try:
        before = file.read_text(encoding="utf-8") if file.exists() else ""
        if not file.exists():
            file.touch(mode=0o600)
        with file.open("a", encoding="utf-8") as lines:
            lines.write(("" if before.endswith("\n") or not before else "\n") + line + "\n")
    except OSError as error:
        raise SettingsError(f"{file} cannot be written ({error}); name another --file.") from None
    click.echo(made)
