"""What a benchmark says: rows with a spread, a ratio to stock and a target; as JSON and as a table."""

import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from time import gmtime, strftime
from typing import Any

ROOT = Path(__file__).parents[2]
# Where a run is written unless told otherwise.
RESULTS = ROOT / "build" / "bench.json"
NOT_INSTALLED = "not installed"
VERSIONS = ("kademlia", "rpcudp", "msgspec", "cryptography", "opendht", "uvloop")


@dataclass(frozen=True)
class Spread:
    """The middle of some repetitions, and the least and the greatest of them."""

    median: float
    low: float
    high: float
    count: int = 1


def spread(values: Iterable[float]) -> Spread:
    """The spread of at least one value."""
    found = sorted(values)
    return Spread(statistics.median(found), found[0], found[-1], len(found))


def percentile(values: Iterable[float], share: float) -> float:
    """The value that `share` of all are not above (nearest rank)."""
    found = sorted(values)
    return found[min(len(found) - 1, max(0, -(-len(found) * share // 1).__int__() - 1))]


def ratios(ours: Sequence[float], others: Sequence[float]) -> Spread:
    """Ours over theirs, repetition by repetition: what slowed the machine down slowed down both of a pair."""
    return spread(one / other for one, other in zip(ours, others, strict=True))


@dataclass
class Row:
    """One thing measured.

    group, name: its place; `name` is unique. unit: of `ours`, `stock` and `opendht`.
    ratio: ours over stock; `better` says which way is good: "more" or "less".
    target: in words; reached: `None` where none is set, or it cannot be told from this run.
    opendht: a spread, or why there is none.
    """

    group: str
    name: str
    unit: str
    ours: Spread
    stock: Spread | None = None
    opendht: Spread | str = ""
    ratio: Spread | None = None
    better: str = "less"
    target: str = "none set"
    reached: bool | None = None
    note: str = ""


@dataclass
class Result:
    """What one group of rows measured; `curve` holds what is plotted or shown in tables of its own."""

    rows: list[Row] = field(default_factory=list)
    curve: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Scale:
    """How much is measured. `tiny` only shows that the bench works."""

    name: str  # tiny, quick or full
    seed: int = 1

    def pick(self, tiny: Any, quick: Any, full: Any = None) -> Any:
        """The value for this scale; `full` is as `quick` where it is not given."""
        return {"tiny": tiny, "quick": quick, "full": quick if full is None else full}[self.name]


Group = Callable[[Scale], Result]


def machine() -> dict[str, Any]:
    """Where and on what a group was measured."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return {
        "at": strftime("%Y-%m-%dT%H:%M:%SZ", gmtime()),
        "processor": model,
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
    }


def versions() -> dict[str, str]:
    """What is installed of what counts here."""
    found = {}
    for name in VERSIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = NOT_INSTALLED
    return found


# -- JSON --------------------------------------------------------------------------------------------------------------


def save(path: Path, group: str, scale: Scale, result: Result, seconds: float) -> None:
    """Put one group's results into the file, and leave those of other groups there."""
    document = load(path) if path.exists() else {"format": 1, "groups": {}}
    document["groups"][group] = {
        "scale": scale.name,
        "seed": scale.seed,
        "seconds": round(seconds, 1),
        "machine": machine(),
        "versions": versions(),
        "rows": [asdict(row) for row in result.rows],
        "curve": result.curve,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")


def load(path: Path) -> dict[str, Any]:
    """A file that `save` wrote."""
    return dict(json.loads(path.read_text()))


# -- tables ------------------------------------------------------------------------------------------------------------

HEADS = ("what", "unit", "ours", "stock", "OpenDHT", "ours / stock", "target", "reached")


def number(value: float) -> str:
    """Three figures that count, or all of a whole number."""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def show(value: dict[str, float] | str | None) -> str:
    """A spread as `median (least to greatest)`."""
    if value is None or value == "":
        return "-"
    if isinstance(value, str):
        return value
    if value["count"] < 2 or number(value["low"]) == number(value["high"]):
        return number(value["median"])
    return f"{number(value['median'])} ({number(value['low'])} to {number(value['high'])})"


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the table, in the order of `HEADS`."""
    reached = {True: "yes", False: "no", None: "-"}[row["reached"]]
    return [
        row["name"],
        row["unit"],
        show(row["ours"]),
        show(row["stock"]),
        show(row["opendht"]),
        show(row["ratio"]),
        row["target"],
        reached,
    ]


def print_table(document: dict[str, Any]) -> None:
    """All rows on the terminal."""
    from rich.console import Console
    from rich.table import Table

    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 200)
    for name, group in document["groups"].items():
        where = group["machine"]
        title = f"{name} ({group['scale']}, {group['seconds']:g} s, load {where['load']:g})"
        table = Table(*HEADS, title=title, title_justify="left")
        for row in group["rows"]:
            table.add_row(*cells(row), style="red" if row["reached"] is False else None)
        console.print(table)
        for row in group["rows"]:
            if row["note"]:
                console.print(f"  {row['name']}: {row['note']}", highlight=False)
