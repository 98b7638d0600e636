"""Each test that docs/lifecycle.md names as a proof exists."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECTION = (ROOT / "docs" / "lifecycle.md").read_text().split("\n## Promises, bounds, proofs\n")[1]
ROWS = [line for line in SECTION.splitlines() if line.startswith("| ")][1:]


def proofs(cell: str) -> list[tuple[Path, str]]:
    """The files and tests that the last cell of a row names. `…`: the file named before."""
    found = []
    file = Path()
    for name in re.findall(r"`([^`]+)`", cell):
        path, _, test = name.partition("::")
        if path != "…":
            file = ROOT / path if "/" in path else ROOT / "tests" / "virtual" / path
        found.append((file, test))
    return found


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("|")[1].strip()[:40])
def test_what_a_promise_is_proved_by_is_there(row: str) -> None:
    promise, bound, cell = (part.strip() for part in row.strip("|").split("|"))
    assert promise
    assert bound
    assert proofs(cell) or cell.startswith("the same")
    for file, test in proofs(cell):
        body = ast.parse(file.read_text()).body
        tests = [each.name for each in body if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)]
        assert any(each == test if test else each.startswith("test_") for each in tests), f"{file.name}::{test}"
