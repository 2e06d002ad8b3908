"""The report of a training: complete, the same each time, and a page that needs nothing but itself."""

import re
import xml.etree.ElementTree as ET
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from app import train_report
from app.cli import main
from models.figures import FIGURES
from models.histograms import Histograms
from tests.unit.test_training import DAY, MODEL, SHOP, START, TEXT, data, train


@pytest.fixture(scope="module")
def report() -> Any:
    model = msgspec.structs.replace(MODEL, entity="shop", amount="C")
    return train(data(), model, keys={"shop": np.arange(6_000) % 50}, folds=2).report


def test_the_page_is_the_same_each_time_and_names_no_host(report: Any) -> None:
    page = train_report.page(report)
    assert page == train_report.page(msgspec.json.decode(msgspec.json.encode(report)))
    assert not re.search(r"https?:|src=|<script|@import|url\(", page)
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page


def test_the_page_is_well_formed_and_holds_every_figure_and_plot(report: Any) -> None:
    page = train_report.page(report)
    html = re.sub(r"(<meta [^>]*)>", r"\1/>", page.removeprefix("<!doctype html>")).replace(" class=n", "")
    root = ET.fromstring(html)
    cells = [cell.text for cell in root.iter("td")]
    for name in (*train_report.MEANINGS, *SHOP.model.decisions):
        assert name in cells or name in [cell.text for cell in root.iter("th")], name
    assert "mean" in cells
    plots = list(root.iter("svg"))
    assert len(plots) == 6
    for plot in plots:
        assert plot.attrib["aria-label"]
        for number in re.findall(r"-?[\d.]+", " ".join(p.attrib.get("d", "") for p in plot.iter("path"))):
            assert -1 <= float(number) <= train_report.WIDTH
    assert set(FIGURES) <= set(train_report.MEANINGS)


def test_what_a_pipeline_names_is_escaped(report: Any) -> None:
    page = train_report.page({**report, "pipeline": "<b>", "importance": {"<i>": 1.0}})
    assert "<b>" not in page
    assert "<i>" not in page


def test_the_command_trains_by_a_model_file_and_leaves_its_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shop.yaml").write_text(TEXT)
    (tmp_path / "small.yaml").write_text("kind: lightgbm\nparameters: {n_estimators: 20}\ntest_days: 4\n")
    for name in ("PIPELINES", "MODEL_FILES", "MODELS_ROOT", "DATA_ROOT"):
        monkeypatch.setenv(f"HEADRACE_{name}", str(tmp_path))
    vectors, labels, times = data()
    columns = {name: vectors[:, i] for i, name in enumerate(SHOP.vector)}
    table = pa.table({"ID": np.arange(6_000), "AT": times, **columns, "BAD": labels})
    pq.write_table(table.replace_schema_metadata({"definition": SHOP.definition}), tmp_path / "f.parquet")
    call = ["train", "-p", "shop", "--features", str(tmp_path / "f.parquet"), "--model", "small"]
    done = CliRunner().invoke(main, [*call, "--folds", "2", "--json"])
    assert done.exit_code == 0, done.output
    report = msgspec.json.decode(done.stdout)
    assert report["model"]["kind"] == "lightgbm"
    assert [fold["split"] for fold in report["folds"]] == [START + 16 * DAY, START + 12 * DAY]
    folder = Path(report["path"])
    stored = msgspec.json.decode((folder / "report.json").read_bytes())
    assert stored == {k: v for k, v in report.items() if k not in ("champion", "path", "seconds")}
    spread = msgspec.json.decode((folder / "histograms.json").read_bytes(), type=Histograms)
    assert list(spread.features) == list(SHOP.vector)
    counted = {sum(h.counts) + h.missing for h in (*spread.features.values(), spread.score)}
    assert counted == {report["rows"]}
    manifest = msgspec.json.decode((folder / "manifest.json").read_bytes())
    assert manifest["features"]["sha256"] == sha256((tmp_path / "f.parquet").read_bytes()).hexdigest()
    assert (manifest["definition"], manifest["events"]["rows"]) == (SHOP.definition, 6_000)
    assert (folder / "report.html").read_text() == train_report.page(stored)
    shown = CliRunner().invoke(main, call)
    assert shown.exit_code == 0
    assert all(figure in shown.stdout for figure in FIGURES)
    wrong = CliRunner().invoke(main, [*call[:-1], "smal"])
    assert wrong.exit_code == 2
    assert "did you mean small?" in wrong.output
