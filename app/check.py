"""`headrace check` beyond the file itself: what it will need, and what becomes of what there is."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
from aiokafka.errors import KafkaError

from app import diagnosis, kafka, trial
from app.diagnosis import Row
from app.history import FileWrong
from app.local.services import Addresses
from app.terminal import table
from models.errors import HeadraceError
from models.estimates import DAY_MS, Estimate, estimate, log_retention
from models.evolution import Change, compare
from models.pipeline import Pipeline, load

ANSWER_S = 4.0  # for Kafka to say that it is there
READ_S = 30.0  # for it to say what topics there are


@dataclass(frozen=True)
class Kept:
    """How long a log is kept, ms. needed: by its readers' rows; made: with what `topics create` makes it;
    has: what Kafka has, None where that is not known, below 0 for ever."""

    topic: str
    needed: int
    made: int
    has: int | None


@dataclass(frozen=True)
class Report:
    """Of one pipeline. topics: what the doctor says of them; before: another version, with its changes."""

    pipeline: Pipeline
    estimates: list[Estimate]
    logs: list[Kept]
    topics: list[Row]
    before: Pipeline | None = None
    changes: Sequence[Change] = ()
    tried: trial.Tried | None = None

    @property
    def breaks(self) -> bool:
        return any(c.level == "breaks" for c in self.changes) or bool(self.tried and self.tried.refused)

    def as_dict(self) -> dict[str, Any]:
        against: dict[str, Any] | None = None
        if self.before is not None:
            against = {"definition": self.before.definition, "changes": [asdict(c) for c in self.changes]}
        elif self.tried is not None:
            against = {"trials": [t.as_dict() for t in self.tried.trials]}
        return {
            "definition": self.pipeline.definition, "vector": self.pipeline.vector,
            "estimates": [asdict(e) for e in self.estimates], "logs": [asdict(k) for k in self.logs],
            "topics": [asdict(row) for row in self.topics], "against": against, "breaks": self.breaks,
        }  # fmt: skip


def examine(
    pipelines: Sequence[Pipeline],
    against: str | None,
    alias: str | None,
    per_day: float,
    addresses: Addresses,
) -> list[Report]:
    """against: `topic`, or a file: another version of a pipeline, or events. per_day: events of an entity."""
    reports = [
        Report(p, [estimate(e, per_day=per_day) for e in p.entities], logs, rows)
        for p, (logs, rows) in zip(pipelines, kept(addresses.get("kafka"), pipelines), strict=True)
    ]
    if against is None:
        return reports
    if against == "topic":
        return [
            _tried(r, asyncio.run(trial.try_topic(addresses.kafka, r.pipeline)), per_day) for r in reports
        ]
    path = Path(against)
    if path.suffix in (".yaml", ".yml"):
        before = load(path, alias, any_name=True)
        same = reports if len(reports) == 1 else [r for r in reports if r.pipeline.name == before.name]
        if not same:
            raise FileWrong(
                f"No pipeline is named {before.name}, as that of {path} is; name the file to compare."
            )
        return [replace(r, before=before, changes=compare(before, r.pipeline)) for r in same]
    if path.suffix not in trial.SUFFIXES and not path.is_dir():
        raise FileWrong(
            f"--against {against}: write topic, or a file that ends in {', '.join(('.yaml', *trial.SUFFIXES))}, or for "
            "several streams a folder."
        )
    if len(reports) != 1:
        raise FileWrong(f"{path} has the events of one pipeline; name its file.")
    return [_tried(reports[0], trial.try_file(path, reports[0].pipeline), per_day)]


def _tried(report: Report, tried: trial.Tried, per_day: float) -> Report:
    rows = tried.sizes.rows()
    estimates = [estimate(e, rows.get(e.name), per_day) for e in report.pipeline.entities]
    return replace(report, tried=tried, estimates=estimates)


def show(reports: Sequence[Report]) -> None:
    """As people read it."""
    table(
        ["pipeline", "definition", "entities", "features", "vector"],
        [
            [p.name, p.definition, " > ".join(e.name for e in p.entities),
             sum(len(e.features) for e in p.entities), len(p.vector)]
            for p in (r.pipeline for r in reports)
        ],
    )  # fmt: skip
    for report in reports:
        click.echo()
        _show_needs(report)
        if report.before is not None:
            _show_changes(report.before, report)
        for one in report.tried.trials if report.tried else ():
            _show_trial(one)
    for seen in dict.fromkeys(row.seen for r in reports for row in r.topics if row.verdict == "skipped"):
        click.echo(f"headrace: {seen}", err=True)


def _show_needs(report: Report) -> None:
    known = report.tried.sizes.known if report.tried else lambda entity: "assumed"
    table(
        [f"entity of {report.pipeline.instance}", "looks back, days", "keeps, days", "rows of a profile",
         "rows are", "bytes of a row", "of a profile"],
        [
            [e.entity, e.reach / DAY_MS, e.retention / DAY_MS, float(e.rows), known(e.entity), e.row_bytes,
             e.profile_bytes]
            for e in report.estimates
        ],
    )  # fmt: skip
    click.echo()
    table(
        ["log", "needs, days", "is made with, days", "has, days"],
        [[k.topic, k.needed / DAY_MS, k.made / DAY_MS, _days(k.has)] for k in report.logs],
    )
    bad = [r for r in report.topics if r.verdict in ("warn", "wrong")]
    if bad:
        click.echo()
        table(
            ["verdict", "topic", "what was seen", "remedy"],
            [[r.verdict, r.what, r.seen, r.remedy] for r in bad],
        )


def _days(has: int | None) -> float | str | None:
    return "for ever" if has is not None and has < 0 else has and has / DAY_MS


def _show_changes(before: Pipeline, report: Report) -> None:
    now = report.pipeline.definition
    same = before.definition == now
    click.echo(
        f"\nThe definition hash stays {now}."
        if same
        else f"\nThe definition hash: {before.definition} > {now}."
    )
    if report.changes:
        columns = ["level", "of", "change", "what happens"]
        table(columns, [[c.level, c.what, c.change, c.effect] for c in report.changes])


def _show_trial(one: trial.Trial) -> None:
    found = one.as_dict()
    click.echo(f"\n{one.source}: {found['records']:,} records, {found['refused']:,} would be refused.")
    if found["refused"]:
        table(
            ["reason", "records", "error"],
            [[r["reason"], r["records"], r["error"]] for r in found["refusals"]],
        )
    for names, what in (
        (one.unnamed, "Not named by the file, so ignored"),
        (one.never, "Never with a value"),
    ):
        if names:
            click.echo(f"{what}: {', '.join(names)}.")


# --- retention of the logs -----------------------------------------------------------------------


def kept(address: str | None, pipelines: Sequence[Pipeline]) -> list[tuple[list[Kept], list[Row]]]:
    """Of each pipeline, its logs and what the doctor says of its topics. Offline if Kafka does not answer."""
    skipped = "no Kafka is known" if address is None else f"Kafka at {address} does not answer"
    if address is not None:
        try:
            return asyncio.run(_kept(address, pipelines))
        except (HeadraceError, KafkaError, OSError, TimeoutError):
            pass
    row = Row("topics", "", "skipped", f"retention of topics was not looked at: {skipped}")
    return [(_logs(p, {}), [row]) for p in pipelines]


async def _kept(address: str, pipelines: Sequence[Pipeline]) -> list[tuple[list[Kept], list[Row]]]:
    async with asyncio.timeout(ANSWER_S), kafka.admin(address):
        pass  # it is there
    found = []
    async with asyncio.timeout(READ_S):
        for pipeline in pipelines:
            counts, configs = await kafka.topics_as_they_are(address, pipeline)
            rows = [Row("topics", "", "skipped", f"{pipeline.instance} has no topics yet")]
            if any(counts.values()):
                rows = diagnosis.topics(pipeline, counts, configs)
            found.append((_logs(pipeline, configs), rows))
    return found


def _logs(pipeline: Pipeline, configs: Mapping[str, Mapping[str, str]]) -> list[Kept]:
    logs = {*pipeline.inputs, *(e.log for e in pipeline.entities)}
    return [
        Kept(
            topic,
            log_retention(pipeline),
            made,
            int(configs[topic]["retention.ms"]) if topic in configs else None,
        )
        for topic, made in kafka.wanted_topics(pipeline).items()
        if topic in logs and made is not None
    ]
