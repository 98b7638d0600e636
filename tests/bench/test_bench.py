"""The bench runs, says what it promises, and the page names every row. No figure is judged here."""

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from tests.bench import docs, plot
from tests.bench.__main__ import GROUPS
from tests.bench.children import BenchError, Child
from tests.bench.report import Row, Spread, percentile, ratios, spread

ROOT = Path(__file__).parents[2]
# In tiny runs there are fewer nodes and records than on the page.
TINY = {"1,000": "100,000", "50 nodes": "1,000 nodes"}


def test_a_tiny_run_of_everything(tmp_path: Path) -> None:
    document = tiny_run(tmp_path / "bench.json")  # one test: workers that share out several would each run it
    check_fields(document)
    names = [row["name"] for row in rows(document)]
    assert len(names) == len(set(names))
    check_that_the_page_names_every_row(document)
    check_what_is_written(document, tmp_path)


def tiny_run(path: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.bench", "--tiny", "--json", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(path.read_text())
    assert all(row["name"] in done.stdout.replace("\n", " ") for row in rows(found) if len(row["name"]) < 20)
    return found


def rows(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for group in document["groups"].values() for row in group["rows"]]


def check_fields(document: dict[str, Any]) -> None:
    """Every group is measured, with the fields of a row."""
    assert list(document["groups"]) == list(GROUPS)
    fields = set(Row.__dataclass_fields__)
    for group in document["groups"].values():
        assert group["scale"] == "tiny"
        assert group["rows"]
        for row in group["rows"]:
            assert set(row) == fields
            assert row["reached"] in (True, False, None)
            assert row["target"]
            for each in (row["ours"], row["stock"], row["ratio"]):
                assert each is None or each["low"] <= each["median"] <= each["high"]


def check_that_the_page_names_every_row(document: dict[str, Any]) -> None:
    page = re.sub(r"<!-- bench:([\w-]+) -->.*?<!-- /bench:\1 -->", "", docs.PAGE.read_text(), flags=re.DOTALL)
    said = re.sub(r"\s+", " ", page)
    for row in rows(document):
        name = row["name"]
        for tiny, there in TINY.items():
            name = name.replace(tiny, there)
        known = name in said or re.sub(r"\b(25|50) % dead", "0 % dead", name) in said
        assert known, f"docs/performance.md does not name the row {name!r}"


def check_what_is_written(document: dict[str, Any], tmp_path: Path) -> None:
    """The page and the plot are written from the results."""
    page, image = tmp_path / "performance.md", tmp_path / "images" / "lookups.svg"
    page.write_text(docs.PAGE.read_text())
    docs.write(document, page, image)
    written = page.read_text()
    assert "Not measured yet" not in written
    assert all(f"| {row['name']} |" in written for row in rows(document))
    docs.write(document, page, image)
    assert page.read_text() == written, "a second time changes nothing"
    assert ET.fromstring(image.read_text()).tag.endswith("svg")


def test_the_plot_has_a_line_for_each_kind() -> None:
    points = [{"nodes": n, "datagrams": 10.0 + n / 100, "p50": 0.1, "p95": 0.3} for n in (50, 500, 5000)]
    svg = plot.draw({"ours": points, "stock": points[:2]})
    assert svg.count("<polyline") == 6
    assert "nan" not in svg


def test_spreads_and_ratios() -> None:
    assert spread([3, 1, 2]) == Spread(2, 1, 3, 3)
    assert ratios([2, 6, 4], [1, 2, 4]) == Spread(2, 1, 3, 3)
    assert percentile(range(1, 101), 0.95) == 95
    assert percentile([7], 0.5) == 7


def test_a_child_that_fails_is_told_with_what_it_said() -> None:
    with pytest.raises(BenchError, match=r"tests\.bench\.nothing"):
        Child("tests.bench.nothing")
