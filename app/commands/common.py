"""What commands share."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from app.settings import Settings
    from models.pipeline import Pipeline

pipeline_option = click.option(
    "--pipeline",
    "-p",
    "name",
    required=True,
    metavar="NAME",
    help="A file of configs/pipelines, by its name.",
)
_alias_option = click.option(
    "--as", "alias", metavar="NAME", help="Run under another name, with topics and stores of its own."
)


def pipeline_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Which pipeline, and under which name."""
    return pipeline_option(_alias_option(command))


def settings() -> Settings:
    from app.settings import Settings

    return Settings()


def find(settings: Settings, name: str, alias: str | None = None) -> Pipeline:
    from models.pipeline import find

    return find(name, settings.pipelines, alias)


def print_json(value: Any) -> None:
    click.echo(json.dumps(value))


def tell(sentence: str) -> None:
    click.echo(f"headrace: {sentence}", err=True)
