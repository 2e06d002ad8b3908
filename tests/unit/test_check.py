"""`headrace check`: against another version, against files of events, and where no Kafka answers."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pcsv
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from app.cli import main
from app.session import free_port
from tests.conftest import PIPELINES
from tests.fixtures.pipelines import SHOP, edited, shop

DAY_MS = 86_400_000
START = 1_530_000_000_000


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data root without services, and the small pipeline in a folder of its own."""
    monkeypatch.setenv("HEADRACE_DATA_ROOT", str(tmp_path / "data"))
    monkeypatch.setenv("HEADRACE_PIPELINES", str(tmp_path))
    monkeypatch.setenv("HEADRACE_KAFKA", "")
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "shop.yaml").write_text(SHOP)
    return tmp_path


def run(*arguments: Any) -> Result:
    result = CliRunner().invoke(main, ["check", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    return result


def report(*arguments: Any) -> tuple[int, dict[str, Any]]:
    result = run(*arguments, "--json")
    (found,) = json.loads(result.stdout).values()
    return result.exit_code, found


def previous(folder: Path, *pieces: str) -> Path:
    path = folder / "before" / "previous.yaml"
    path.parent.mkdir(exist_ok=True)
    text = SHOP
    for old, new in zip(pieces[::2], pieces[1::2], strict=True):
        text = edited(text, old, new)
    path.write_text(text)
    return path


def order(number: int, **changes: Any) -> dict[str, Any]:
    """Orders of five customers, one a day."""
    return {
        "ID": number, "AT": START + number * DAY_MS, "CUSTOMER": number % 5, "SHOP": "one", "AMOUNT": 9.5, "ITEMS": 2,
        "WEIGHT": 0.5, **changes,
    }  # fmt: skip


# --- another version -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pieces", "level", "code"),
    [
        (("review: 0.1", "review: 0.2"), "safe", 0),
        (("window: 1h", "window: 2h"), "rebuild", 0),
        (("scale: 2", "scale: 3"), "breaks", 1),
    ],
)
def test_the_exit_code_tells_what_breaks(
    folder: Path, pieces: tuple[str, ...], level: str, code: int
) -> None:
    path = previous(folder, *pieces)
    got, found = report("--against", path)
    assert (got, found["breaks"]) == (code, code == 1)
    (change,) = found["against"]["changes"]
    assert change["level"] == level
    shown = run("--against", path)
    assert (shown.exit_code, level in shown.stdout) == (code, True)
    assert change["effect"].split()[0] in shown.stdout


def test_another_version_is_that_of_the_pipeline_of_its_name(folder: Path) -> None:
    (folder / "card-fraud.yaml").write_text((PIPELINES / "card-fraud.yaml").read_text())
    code, found = report("--against", previous(folder))
    assert (code, found["against"]["changes"]) == (0, [])
    assert "stays" in run("--against", previous(folder)).stdout
    other = previous(folder, "name: shop", "name: store")
    assert run("--against", other).exit_code == 2
    code, found = report(
        folder / "shop.yaml", "--against", other
    )  # a file that is named is compared all the same
    assert code == 1
    assert {c["what"] for c in found["against"]["changes"]} == {"name", "streams.topic", "labels.topic"}


def test_a_version_that_is_wrong_is_told_with_its_line(folder: Path) -> None:
    result = run("--against", previous(folder, "window: 1h", "window: soon"))
    assert result.exit_code == 2
    assert "previous.yaml>:29: entities.shop.features.SHOP_ITEMS.window" in result.stderr


# --- files of events -----------------------------------------------------------------------------


def ndjson(folder: Path, orders: list[Any]) -> Path:
    path = folder / "orders.ndjson"
    path.write_text("".join(f"{o if isinstance(o, str) else json.dumps(o)}\n" for o in orders))
    return path


def test_refusals_are_counted_by_reason_and_fields_told(folder: Path) -> None:
    good = [{k: v for k, v in order(n, CHANNEL="web").items() if k != "WEIGHT"} for n in range(20)]
    lacking = {k: v for k, v in order(20).items() if k not in ("AMOUNT", "WEIGHT")}
    retyped = order(21, ITEMS="2", WEIGHT=None)
    cents = [order(n, AMOUNT=0.001, WEIGHT=None) for n in (22, 23)]
    code, found = report("--against", ndjson(folder, [*good, lacking, retyped, *cents, "no json"]))
    (trial,) = found["against"]["trials"]
    assert (code, found["breaks"], trial["records"], trial["refused"]) == (1, True, 25, 5)
    assert trial["by_reason"] == {"missing-field": 1, "wrong-value": 1, "wrong-decimal": 2, "not-json": 1}
    assert any("ITEMS" in r["error"] for r in trial["refusals"])
    assert (trial["unnamed"], trial["never"]) == (["CHANNEL"], ["WEIGHT"])
    shown = run("--against", folder / "orders.ndjson").stdout
    assert "25 records, 5 would be refused" in shown
    assert "ignored: CHANNEL." in shown and "Never with a value: WEIGHT." in shown


def test_fields_that_a_file_does_not_name_are_tolerated(folder: Path) -> None:
    code, found = report("--against", ndjson(folder, [order(n, CHANNEL="web") for n in range(40)]))
    assert (code, found["breaks"], found["against"]["trials"][0]["refused"]) == (0, False, 0)
    # seven days and an hour of one order a day: by keys that have one within them
    customer, shop_ = found["estimates"]
    assert (customer["rows"], shop_["rows"]) == (pytest.approx(8 / 5), 4.0)
    assert "measured" in run("--against", folder / "orders.ndjson").stdout
    assert "at least" in run("--against", ndjson(folder, [order(0)])).stdout
    assert "assumed" in run("--against", ndjson(folder, [])).stdout


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_tables_are_tried_as_what_would_be_published(folder: Path, kind: str) -> None:
    rows = [order(n, NOTE=str(n), RETURNED=0, KNOWN=START, SHOP="7") for n in range(9)]
    rows[3]["AMOUNT"] = 0.001
    table = pa.Table.from_pylist(rows)
    table = table.set_column(1, "AT", table["AT"].cast(pa.timestamp("ms", "UTC")))
    path = folder / f"orders.{kind}"
    write = pq.write_table if kind == "parquet" else pcsv.write_csv
    write(table, path)
    code, found = report("--against", path)
    (trial,) = found["against"]["trials"]
    assert (code, trial["records"], trial["by_reason"]) == (1, 9, {"wrong-decimal": 1})
    assert (trial["unnamed"], trial["never"]) == (["NOTE"], [])
    write(table.drop_columns(["AMOUNT"]), path)
    assert report("--against", path)[1]["against"]["trials"][0]["by_reason"] == {"missing-field": 9}


@pytest.mark.parametrize(
    ("against", "sentence"),
    [
        ("events.txt", "write topic, or a file that ends in"),
        ("nowhere.yaml", "nowhere.yaml: cannot be read"),
        ("nowhere.parquet", "nowhere.parquet cannot be read as Parquet"),
        ("nowhere.csv", "nowhere.csv cannot be read as CSV"),
        ("nowhere.ndjson", "nowhere.ndjson cannot be read"),
    ],
)
def test_what_cannot_be_compared_is_told(against: str, sentence: str) -> None:
    result = run("--against", against)
    assert result.exit_code == 2
    assert sentence in result.stderr


def test_events_are_of_one_pipeline(folder: Path) -> None:
    (folder / "card-fraud.yaml").write_text((PIPELINES / "card-fraud.yaml").read_text())
    result = run("--against", ndjson(folder, [order(0)]))
    assert (result.exit_code, "name its file" in result.stderr) == (2, True)
    assert report(folder / "shop.yaml", "--against", folder / "orders.ndjson")[0] == 0


# --- without Kafka -------------------------------------------------------------------------------


@pytest.mark.parametrize("known", [False, True])
def test_it_works_where_no_kafka_answers(monkeypatch: pytest.MonkeyPatch, known: bool) -> None:
    if known:
        monkeypatch.setenv("HEADRACE_KAFKA", f"127.0.0.1:{free_port()}")
    code, found = report("--rate", "10")
    assert (code, found["definition"], found["against"]) == (0, shop().definition, None)
    assert [e["rows"] for e in found["estimates"]] == [
        pytest.approx(70, rel=0.01),
        pytest.approx(30, rel=0.02),
    ]
    assert {log["topic"]: (log["needed"], log["has"]) for log in found["logs"]} == dict.fromkeys(
        ("shop.orders", "shop.shop.log", "shop.labels"), (7 * DAY_MS + 3_600_000, None)
    )
    assert [row["verdict"] for row in found["topics"]] == ["skipped"]
    assert run().stderr.count("retention of topics was not looked at") == 1
    result = run("--against", "topic")
    assert result.exit_code == 1
    assert ("No Kafka answers" if known else "headrace up") in result.stderr


def test_a_wrong_file_is_told_beside_what_is_right(folder: Path) -> None:
    (folder / "bad.yaml").write_text("name: bad\n")
    result = run()
    assert result.exit_code == 2
    assert "bad.yaml:1" in result.stderr and shop().definition in result.stdout
