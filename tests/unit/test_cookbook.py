"""The cookbook's pipeline is one."""

from __future__ import annotations

import re

from models.pipeline import parse
from tests.conftest import REPOSITORY

PAGE = (REPOSITORY / "docs" / "cookbook.md").read_text(encoding="utf-8")


def test_the_pipeline_of_the_page_compiles() -> None:
    (text,) = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    pipeline = parse(text, "cookbook.yaml")
    assert len(pipeline.vector) == 13
    assert "NB_7D_web" in pipeline.entities[0].features
