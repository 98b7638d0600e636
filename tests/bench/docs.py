"""Puts what was measured into docs/performance.md, between markers, and draws docs/images/lookups.svg."""

import re
from pathlib import Path
from typing import Any

from tests.bench import plot
from tests.bench.report import HEADS, ROOT, cells, number

PAGE = ROOT / "docs" / "performance.md"
PLOT = ROOT / "docs" / "images" / "lookups.svg"
GENERATED = re.compile(r"(<!-- bench:([\w-]+) -->\n).*?(<!-- /bench:\2 -->)", re.DOTALL)


def table(heads: tuple[str, ...], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def group(document: dict[str, Any], name: str) -> str:
    """The rows of a group, and when and where they were measured."""
    measured = document["groups"].get(name)
    if measured is None:
        return "Not measured yet.\n"
    where = measured["machine"]
    versions = ", ".join(f"{what} {version}" for what, version in measured["versions"].items())
    text = table(HEADS, [cells(row) for row in measured["rows"]])
    text += (
        f"\nMeasured {where['at']} ({measured['scale']}, seed {measured['seed']}) on {where['processor']},"
        f" {where['cores']} cores, load {where['load']:g} after it; Python {where['python']}, {versions}.\n"
    )
    notes = [f"- {row['name']}: {row['note']}" for row in measured["rows"] if row["note"]]
    return text + ("\n" + "\n".join(notes) + "\n" if notes else "")


def curve(document: dict[str, Any]) -> str:
    """What a get costs by the number of nodes."""
    measured = document["groups"].get("lookups")
    if measured is None:
        return "Not measured yet.\n"
    stock = {each["nodes"]: each for each in measured["curve"]["stock"]}
    rows = []
    for each in measured["curve"]["ours"]:
        line = [f"{each['nodes']:,}"]
        for one in (each, stock.get(each["nodes"])):
            if one is None:
                line += ["-"] * 4
                continue
            line += [f"{one['found']} of {one['gets']}", f"{one['datagrams']:.1f}"]
            line += [f"{one['p50']:.3f}", f"{one['p95']:.3f}"]
        rows.append([*line, f"{each['put']:.0f}"])
    heads = ("nodes", "found", "datagrams", "p50 (s)", "p95 (s)")
    stock_heads = ("stock: found", "datagrams", "p50 (s)", "p95 (s)")
    return table((*heads, *stock_heads, "datagrams a put, ours"), rows)


def cost(document: dict[str, Any]) -> str:
    """What a record costs by nodes, records and publishers, and by kind of datagram."""
    measured = document["groups"].get("cost")
    if measured is None:
        return "Not measured yet.\n"
    cases = measured["curve"]["cases"]
    rows = [
        [
            *(f"{case[name]:,}" for name in ("nodes", "records", "publishers")),
            number(case["datagrams"]),
            number(case["bytes"]),
        ]
        for case in cases
    ]
    heads = ("nodes", "records", "publishers of each", "datagrams an hour", "bytes an hour")
    kinds = [[kind, number(each["datagrams"]), number(each["bytes"])] for kind, each in cases[0]["kinds"].items()]
    return (
        table(heads, rows)
        + "\nThe first line by kind (replies are not told apart; below zero: fewer than without records):\n\n"
        + table(("kind", "datagrams an hour", "bytes an hour"), kinds)
    )


def fill(page: str, document: dict[str, Any]) -> str:
    """The page with what stands between its markers made anew."""
    makers = {"curve": curve, "cost-cases": cost}

    def made(found: re.Match[str]) -> str:
        begin, name, end = found.groups()
        text = makers[name](document) if name in makers else group(document, name)
        return f"{begin}{text}{end}"

    return GENERATED.sub(made, page)


def write(document: dict[str, Any], page: Path = PAGE, image: Path = PLOT) -> None:
    """Refresh the page and the plot."""
    page.write_text(fill(page.read_text(), document))
    if "lookups" in document["groups"]:
        image.parent.mkdir(parents=True, exist_ok=True)
        image.write_text(plot.draw(document["groups"]["lookups"]["curve"]))
