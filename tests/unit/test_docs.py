"""The pages are tested against the code: what exists is documented, and what is shown works."""

import re
import shlex

import click
import pytest
from prometheus_client import CollectorRegistry

from app import metrics
from app.api.server import create_api
from app.cli import main
from app.kafka import wanted_topics
from app.settings import Settings, variable
from models.expressions import FUNCTIONS
from models.pipeline import find, schema
from models.windows import AGGREGATES, OUTCOMES
from tables.mirror import Mirror, connect
from tests.conftest import PIPELINES, REPOSITORY

DOCS = REPOSITORY / "docs"
PAGES = [
    *sorted(DOCS.rglob("*.md")),
    *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "data/README.md")),
    REPOSITORY / "model_artifacts" / "README.md",
    REPOSITORY / "ops" / "local" / "README.md",
]


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def test_every_setting() -> None:
    text = page("settings.md")
    for name, field in Settings.model_fields.items():
        row = re.search(rf"^\| `{variable(name)}` \| (.*?) \|", text, re.MULTILINE)
        assert row, variable(name)
        if field.default is not None:
            assert row[1].strip("`") == str(field.default), variable(name)
    assert set(re.findall(r"^\| `(HEADRACE_\w+)`", text, re.MULTILINE)) == {
        variable(n) for n in Settings.model_fields
    }


def commands(group: click.Group, path: str = "headrace") -> dict[str, click.Command]:
    found: dict[str, click.Command] = {}
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            found |= commands(command, f"{path} {name}")
        else:
            found[f"{path} {name}"] = command
    return found


def test_every_command_and_option() -> None:
    text = page("cli.md")
    rows = {
        m[1]: m[0]
        for m in re.finditer(r"^\| `(headrace [a-z ]+?)(?: [A-Z\[].*?)?` \|.*$", text, re.MULTILINE)
    }
    assert set(rows) == set(commands(main))
    for name, command in commands(main).items():
        for option in command.params:
            if isinstance(option, click.Option):
                long = max(option.opts, key=len)
                assert f"`{long}`" in rows[name], (name, long)
        assert command.help, name
        assert "Example:" in (command.epilog or ""), name


def metric_names() -> list[str]:
    api = CollectorRegistry()
    create_api(
        find("card-fraud", PIPELINES),
        Mirror(connect("redis://localhost"), find("card-fraud", PIPELINES)),
        api,
        _ready,
    )
    counters = {"headrace_records", "headrace_predictions", "headrace_labels_routed", "headrace_dead_letters",
                "headrace_mirrored", "headrace_lookups"}  # fmt: skip
    families = [v[0] for k, v in vars(metrics).items() if k.isupper() and isinstance(v, tuple)]
    families += [m.name for m in api.collect()]
    return [f"{name}_total" if name in counters else name for name in families]


async def _ready() -> str | None:
    return None


def test_every_metric() -> None:
    text = page("metrics.md")
    names = metric_names()
    assert len(names) >= 12
    assert set(re.findall(r"^\| `(headrace_\w+)`", text, re.MULTILINE)) == set(names)


def test_every_route() -> None:
    pipeline = find("card-fraud", PIPELINES)
    api = create_api(pipeline, Mirror(connect("redis://localhost"), pipeline), CollectorRegistry(), _ready)
    for resource in api.router.resources():
        path = re.sub(r":[^}]+", "", resource.canonical)
        assert f"GET {path}`" in page("api.md"), path


def test_every_topic() -> None:
    text = page("topics.md")
    pipeline = find("flight-delays", PIPELINES)
    kinds = {
        pipeline.stream.topic: "<pipeline>.<stream>",
        **{e.log: "<pipeline>.<entity>.log" for e in pipeline.entities[1:]},
    }
    for topic in wanted_topics(pipeline):
        assert f"`{kinds.get(topic) or topic.replace('flight-delays', '<pipeline>')}`" in text, topic


def test_every_aggregate_function_outcome_and_key() -> None:
    text = page("pipelines.md")
    for name in AGGREGATES:
        assert re.search(rf"^\| `{name}` \|", text, re.MULTILINE), name
    for name, (_, count) in FUNCTIONS.items():
        assert f"`{name}({', '.join('xy'[:count])})`" in text or f"`{name}(t)`" in text, name
    for outcome in OUTCOMES:
        assert f"`{outcome}`" in page("guarantees.md"), outcome
    for key in schema()["$defs"]["PipelineSpec"]["properties"]:
        assert f"| `{key}` |" in text, key
    for key in schema()["$defs"]["ModelSpec"]["properties"]:
        assert f"`{key}`" in text, key


def shown() -> list[tuple[str, str]]:
    """The headrace commands in code of the pages."""
    found = []
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        code = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        lines = [line for block in code for line in block.splitlines()]
        lines += re.findall(r"`(headrace [^`]*)`", text)
        for raw in lines:
            line = raw.split("#")[0].strip().rstrip("&").strip()
            if line.startswith("headrace ") and not re.search(r"[A-Z]{4,}|\.\.\.|NAME|FILE", line):
                found.append((path.name, line))
    return found


@pytest.mark.parametrize(("where", "line"), shown())
def test_what_is_shown_parses(where: str, line: str) -> None:
    known = commands(main)
    words = shlex.split(line)
    if words[1].startswith("-"):
        assert words[1] in ("--version", "--help", "-h"), f"{where}: {line}"
        return
    depth = next((n for n in (3, 2) if " ".join(words[:n]) in known), None)
    assert depth, f"{where}: {line}"
    command = known[" ".join(words[:depth])]
    given = words[depth:]
    options = {
        o: p for p in command.params if isinstance(p, click.Option) for o in (*p.opts, *p.secondary_opts)
    }
    for word in given:
        if word.startswith("-"):
            assert word in options, f"{where}: {line}"


def test_links_lead_somewhere() -> None:
    for path in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_anchors_are_headings() -> None:
    for path in PAGES:
        for target, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", path.read_text(encoding="utf-8")):
            text = ((path.parent / target) if target else path).read_text(encoding="utf-8")
            headings = {
                re.sub(r"[^\w -]", "", h.lower()).strip().replace(" ", "-")
                for h in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
            }
            assert anchor in headings, f"{path.name}: {target}#{anchor}"


def test_nothing_is_left_to_be_filled_in() -> None:
    marker = "TB" + "D"
    for path in PAGES:
        assert marker not in path.read_text(encoding="utf-8"), path


def test_every_page_is_in_the_index() -> None:
    index = page("index.md")
    for path in DOCS.glob("*.md"):
        assert path.name == "index.md" or f"({path.name})" in index, path
    numbers = [int(p.name[:4]) for p in sorted((DOCS / "adr").glob("*.md"))]
    assert numbers == list(range(1, len(numbers) + 1))


def test_the_schema_file_is_the_code_s() -> None:
    import json

    stored = json.loads((PIPELINES / "schema.json").read_text(encoding="utf-8"))
    assert stored == schema(), "run `headrace schema > configs/pipelines/schema.json`"


def test_no_path_of_a_machine_is_in_a_page() -> None:
    for path in PAGES:
        assert not re.search(r"(?<![\w.])/(?:root|home|work|tmp)/", path.read_text(encoding="utf-8")), path
