"""The command line: `headrace COMMAND`.

Exit codes: 0 done, 1 it could not be done (one sentence says why), 2 the call or a file is wrong.
"""

from __future__ import annotations

from typing import Any

import click

from app.commands import (
    answers,
    bench,
    checkpoints,
    data,
    dlq,
    ledger,
    mirror,
    models,
    pipelines,
    processes,
    runs,
    services,
    token,
)
from models.errors import HeadraceError


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


for command in (
    services.up, services.down, services.status,
    pipelines.check, pipelines.schema, pipelines.topics, pipelines.features,
    checkpoints.checkpoints, mirror.mirror, data.data, models.train, models.models,
    processes.worker, processes.api, processes.quality, processes.start, processes.replay, ledger.ledger,
    answers.doctor, answers.explain, dlq.dlq,
    runs.demo, runs.chaos, bench.bench, token.token,
):  # fmt: skip
    main.add_command(command)


if __name__ == "__main__":
    main()
