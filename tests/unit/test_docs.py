"""The pages are tested against the code: what exists is documented, and what is shown works."""

import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import click
import msgspec
import pytest
from click.testing import CliRunner
from faust.types import TP
from prometheus_client import CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase

from app.api.problems import KINDS as KINDS_OF_PROBLEMS
from app.api.problems import Problem
from app.api.schemas import Features
from app.api.server import Backends, create_api
from app.cli import main
from app.explain import Explanation, Place, Served
from app.kafka import wanted_topics
from app.ledger import LedgerCollector
from app.metrics import WorkerCollector
from app.quality import QualityCollector
from app.settings import Settings, variable
from app.train_report import MEANINGS
from models import explain
from models.comparison import Figures, Pair
from models.dead_letters import DeadLetter, Replayed
from models.estimators import KINDS as KINDS_OF_MODELS
from models.evaluation import DAY_MS
from models.events import Code
from models.explain import Explained, Relabelled, View
from models.model_files import ModelFile
from models.pipeline import find, parse
from models.predictions import Origin, Prediction
from models.quality import Realised
from models.records import RecordCodec
from models.shadows import Shadow
from models.windows import OUTCOMES
from tables.mirror import Mirror, connect
from tests.conftest import MODEL_FILES, PIPELINES, REPOSITORY

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


def options(command: click.Command) -> list[str]:
    return [
        name
        for option in command.params
        if isinstance(option, click.Option)
        for name in (*option.opts, *option.secondary_opts)
    ]


def test_every_command_and_option() -> None:
    text = page("cli.md")
    rows = {
        m[1]: m[0]
        for m in re.finditer(r"^\| `(headrace [a-z ]+?)(?: [A-Z\[].*?)?` \|.*$", text, re.MULTILINE)
    }
    examples = [words for where, words, whole in SHOWN if where == "cli.md" and whole]
    assert set(rows) == set(commands(main))
    for name, command in commands(main).items():
        for option in options(command):
            where = rows[name] if option.startswith("--") else text
            assert re.search(rf"`{option}[` ]", where), (name, option)
        assert command.help, name
        assert "Example:" in (command.epilog or ""), name
        path = name.split()[1:]
        assert [words for words in examples if words[: len(path)] == path], f"{name} has no example"
    assert "`headrace --version`" in text


def test_exit_codes() -> None:
    assert re.search("Exit codes: 0 .*, 1 .*, 2 ", page("cli.md"), re.DOTALL)


def worker_metrics() -> dict[str, set[str]]:
    """Names and labels of a worker's metrics."""
    pipeline = find("card-fraud", PIPELINES)
    counted = SimpleNamespace(
        entity=pipeline.entities[0], counts={"folded": 1}, size=0, nbytes=0, loaded=0, evicted=0, order_skew=0
    )
    worker: Any = SimpleNamespace(
        stages=[counted],
        partitions=SimpleNamespace(committable={TP("log", 0): 1}, held={TP("log", 0)}, rebalances=1),
        serving=SimpleNamespace(
            models={
                alias: SimpleNamespace(card=SimpleNamespace(pipeline="", version="", definition=""))
                for alias in ("champion", "canary", "challenger-x")
            },
            shares={"canary": 5.0},
            taken_back={"": "scores"},
            refusals={"golden": 1},
            refused={"champion": SimpleNamespace(version="", reason="golden")},
            away=None,
        ),
        score=SimpleNamespace(predicted=0, unscored=0),
        shadow=SimpleNamespace(sent=0, missed=0),
        routes={"labels": SimpleNamespace(routed=0, waiting=0)},
        dead_letters=0,
        mirror=SimpleNamespace(written=0, failing=None, rebuilding=0, waiting=0, lag_s=0.0, refused=[]),
        checkpoint=SimpleNamespace(
            taken=[SimpleNamespace(entity="", partition=0, position=1, created_at=0)], failures=0
        ),
    )
    return {s.name: set(s.labels) for family in WorkerCollector(worker).collect() for s in family.samples}


def api_metrics() -> dict[str, set[str]]:
    """Names and labels of the API's metrics, as they are declared."""
    registry = CollectorRegistry()
    pipeline = find("card-fraud", PIPELINES)
    create_api(Backends(pipeline, Mirror(connect("redis://localhost"), pipeline)), registry, _ready)
    return {
        f"{metric._name}_total" if metric._type == "counter" else metric._name: set(metric._labelnames)
        for metric in registry._collector_to_names
        if isinstance(metric, MetricWrapperBase)
    }


def quality_metrics() -> dict[str, set[str]]:
    """Names and labels of what `headrace quality` tells."""
    realised = Realised(1, 0, 9)
    for id_ in range(2):
        realised.scored(id_, id_ * 2 * DAY_MS, {"a": 0.5})
        realised.labelled(id_, id_ * 2 * DAY_MS, 1, 1)
    realised.scored(3, 3 * DAY_MS, {"a": 0.5})
    quality: Any = SimpleNamespace(realised=realised, left=0, away=None)
    return {s.name: set(s.labels) for family in QualityCollector(quality).collect() for s in family.samples}


def ledger_metrics() -> dict[str, set[str]]:
    """Names and labels of the metrics of a process of the ledger."""
    recorder = SimpleNamespace(dropped=0, foreign=0, expired=0)
    ledger: Any = SimpleNamespace(recorder=recorder, rows=0, away=None, lags=lambda: [("topic", 0, 1)])
    return {s.name: set(s.labels) for family in LedgerCollector(ledger).collect() for s in family.samples}


async def _ready() -> str | None:
    return None


def test_every_metric() -> None:
    rows = re.findall(r"^\| `(headrace_\w+)` \|(.*?)\|", page("metrics.md"), re.MULTILINE)
    shown = {name: set(re.findall(r"`(\w+)`", labels)) for name, labels in rows}
    assert len(api_metrics()) >= 2
    assert shown == worker_metrics() | api_metrics() | quality_metrics() | ledger_metrics()


def test_every_route() -> None:
    pipeline = find("card-fraud", PIPELINES)
    api = create_api(
        Backends(pipeline, Mirror(connect("redis://localhost"), pipeline)), CollectorRegistry(), _ready
    )
    text = page("api.md")
    for route in api.router.routes():
        if route.method == "HEAD" or route.resource is None:
            continue
        path = re.sub(r":[^}]+", "", route.resource.canonical)
        assert f"| `{route.method} {path}` |" in text, path
    for status in {status for status, _ in KINDS_OF_PROBLEMS.values()} - {500}:
        assert re.search(rf"^\| [0-9, ]*\b{status}\b", text, re.MULTILINE), status


def test_every_topic() -> None:
    text = page("topics.md")
    pipeline = find("flight-delays", PIPELINES)
    kinds = {
        pipeline.stream.topic: "<pipeline>.<stream>",
        **{e.log: "<pipeline>.<entity>.log" for e in pipeline.entities[1:]},
    }
    for topic in wanted_topics(pipeline):
        assert f"`{kinds.get(topic) or topic.replace('flight-delays', '<pipeline>')}`" in text, topic


def test_every_outcome() -> None:
    for outcome in OUTCOMES:
        assert f"`{outcome}`" in page("guarantees.md"), outcome


def test_every_figure_of_a_comparison() -> None:
    for name in fields(Figures, Pair) - {"version", "versions"}:
        assert re.search(rf"^\|.*`{name}`.*\|", page("models.md"), re.MULTILINE), name


def test_every_key_kind_and_figure_of_a_training() -> None:
    text = page("training.md")
    rows = {
        name
        for row in re.findall(r"^\| (.*?) \|", text, re.MULTILINE)
        for name in re.findall(r"`(\w+)`", row)
    }
    assert fields(ModelFile) | set(KINDS_OF_MODELS) | set(MEANINGS) == rows
    for path in MODEL_FILES.glob("*.yaml"):
        assert path.stem in text, path
    for field in msgspec.structs.fields(ModelFile):
        if isinstance(field.default, int | float) and field.name != "skip_known":
            assert f"| `{field.name}` | {field.default:g} |" in text, field.name


def fields(*structs: type[msgspec.Struct]) -> set[str]:
    return {field.encode_name for struct in structs for field in msgspec.structs.fields(struct)}


def test_every_field_of_a_record() -> None:
    topics, api = page("topics.md"), page("api.md")
    columns = RecordCodec(find("card-fraud", PIPELINES), 1).dtype.names or ()
    for name in fields(Prediction, Shadow, Origin, DeadLetter, Replayed):
        assert f"`{name}`" in topics, name
        assert f'"{name}"' in topics, name
    for name in set(columns) - {"fields", "features"}:  # those two are told in words
        assert re.search(rf"\b{name}\s[iu]\d", topics), name
    for code in get_args(Code):
        assert f"| `{code}` |" in topics, code
    for name in fields(Features, Problem):
        assert f'"{name}"' in api, name
    for name in fields(Explanation, Place, Served, Explained, View, explain.Event, Relabelled):
        assert f'"{name}"' in page("explain.md"), name


def test_the_pipeline_file_of_the_first_page_compiles() -> None:
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"^```yaml\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    assert parse(text).name == "card-fraud"


def test_the_transforms_that_are_shown_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = page("pipelines.md").partition("## Transforms")[2]
    shown = dict(re.findall(r"^```(yaml|python)\n(.*?)^```", section, re.MULTILINE | re.DOTALL))
    (tmp_path / "mypackage").mkdir()
    (tmp_path / "mypackage" / "module.py").write_text(shown["python"])
    monkeypatch.syspath_prepend(tmp_path)
    names = re.findall(r"^  (\w+):", shown["yaml"], re.MULTILINE)
    text = (PIPELINES / "flight-delays.yaml").read_text(encoding="utf-8")
    text = text.replace("transforms:\n  HOUR: hour(EVENT_TS)\n", shown["yaml"])
    text = text.replace("  - HOUR\n", "".join(f"  - {name}\n" for name in names))
    assert list(parse(text).transforms) == names


def blocks(text: str) -> list[str]:
    """What stands between fences, but for the languages that have no commands."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [code for language, code in found if language in ("", "sh")]


def simple_commands(line: str) -> list[list[str]]:
    """The words of each command of a line, without what the shell makes of it."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    found: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= set("();<>|&"):
            found.append([])
        elif found[-1] or not re.fullmatch(r"[A-Z_]+=.*", word):  # FOO=bar before a command
            found[-1].append(word)
    return found


def shown() -> list[tuple[str, list[str], bool]]:
    """The headrace commands of the pages: where, the words behind `headrace`, and whether it is a whole one."""
    found = []
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        lines = [line for code in blocks(text) for line in code.replace("\\\n", " ").splitlines()]
        for whole, candidates in ((True, lines), (False, re.findall(r"`([^`\n]*)`", text))):
            for line in candidates:
                if "headrace " not in line:
                    continue
                found += [
                    (path.name, words[1:], whole)
                    for words in simple_commands(line)
                    if words and words[0].rpartition("/")[2] == "headrace" and "COMMAND" not in words
                ]
    return found


SHOWN = shown()


@pytest.mark.parametrize(
    ("where", "words", "whole"), SHOWN, ids=[f"{where}: {' '.join(words)}" for where, words, _ in SHOWN]
)
def test_what_is_shown_parses(where: str, words: list[str], whole: bool) -> None:
    command: click.Command = main
    rest = list(words)
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        assert rest[0] in command.commands, f"{where}: {' '.join(words)}"
        command = command.commands[rest.pop(0)]
    if whole:
        assert not isinstance(command, click.Group), f"{where}: {' '.join(words)} is no command yet"
        command.make_context("headrace", rest)  # raises UsageError for what cannot be
    known = {*options(command), "--help", "-h", "--version"}
    assert {word for word in rest if word.startswith("-")} <= known, f"{where}: {' '.join(words)}"


def test_commands_are_found() -> None:
    assert simple_commands("A=1 b 'c d' | e > f && g # h") == [["b", "c d"], ["e"], ["f"], ["g"]]
    assert len([whole for _, _, whole in SHOWN if whole]) > 20
    assert {"README.md", "cli.md", "pipelines.md"} <= {where for where, _, _ in SHOWN}


def test_targets_of_make_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):.*##", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    for path in PAGES:
        for target in re.findall(r"(?:^|`)make ([a-z]+)", path.read_text(encoding="utf-8"), re.MULTILINE):
            assert target in targets, f"{path.name}: make {target}"


def test_files_that_are_named_exist() -> None:
    made = ("data/", "model_artifacts")  # on demand
    folders = "app|agents|tables|models|configs|ops|tests|scripts|docs|data|model_artifacts"
    for path in PAGES:
        for name in re.findall(rf"`((?:{folders})/[\w./-]+)`", path.read_text(encoding="utf-8")):
            assert (REPOSITORY / name).exists() or name.startswith(made), f"{path.name}: {name}"


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


def test_every_safeguard_has_its_test() -> None:
    rows = re.findall(r"^\|.*\| `(test_without_\w+)` \|$", page("proof.md"), re.MULTILINE)
    source = (REPOSITORY / "tests" / "unit" / "test_exactness.py").read_text(encoding="utf-8")
    assert sorted(rows) == sorted(re.findall(r"^def (test_without_\w+)\(", source, re.MULTILINE))


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
    for path in (DOCS / "adr").glob("*.md"):
        assert f"(adr/{path.name})" in index, path


@pytest.mark.parametrize(
    ("options", "path"),
    [([], "configs/pipelines/schema.json"), (["--markdown"], "docs/reference.md")],
    ids=["schema", "reference"],
)
def test_what_is_made_of_the_code_is_its_newest(options: list[str], path: str) -> None:
    made = CliRunner().invoke(main, ["schema", *options]).output
    command = " ".join(["headrace schema", *options])
    assert made == (REPOSITORY / path).read_text(encoding="utf-8"), f"run `{command} > {path}`"


def test_no_path_of_a_machine_is_in_a_page() -> None:
    for path in PAGES:
        assert not re.search(r"(?<![\w.])/(?:root|home|work|tmp)/", path.read_text(encoding="utf-8")), path


def test_the_tests_that_the_proof_names_exist() -> None:
    tests = "\n".join(path.read_text() for path in Path(__file__).parents[1].rglob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", page("proof.md"))
    assert len(named) > 20
    assert [name for name in named if f"def {name}(" not in tests] == []
