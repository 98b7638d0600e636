"""docs/security.md says what the code does: every limit in its table is compared with the constant that it names."""

import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import plasm_dht
import plasm_dht_cli
from plasm_dht import Identity, PlasmServer
from plasm_dht.dht import wire
from plasm_dht.dht.ids import encode_node
from plasm_dht.provider import web
from plasm_dht.record import sign

PAGE = (Path(__file__).parents[1] / "docs" / "security.md").read_text()
ROW = re.compile(r"^\| `(?P<name>[^`]+)` \| (?P<number>[0-9][0-9,.]*) ?(?P<unit>[^|]*?) \| (?P<reason>[^|]+) \|$", re.M)
ARGUMENT = re.compile(r"PlasmServer\((\w+)=\)")
UNITS = {"KiB": 2**10, "MiB": 2**20}


def in_code(name: str) -> object:
    """The value of a constant, below `plasm_dht` if no package is named, or of an argument's default."""
    argument = ARGUMENT.fullmatch(name)
    if argument:
        return inspect.signature(PlasmServer).parameters[argument[1]].default
    module, _, constant = name.rpartition(".")
    return getattr(importlib.import_module(in_full(module)), constant)


def in_full(module: str) -> str:
    """The name of a module by that of the table."""
    return module if module.startswith("plasm_dht_cli.") else f"plasm_dht.{module}"


def table() -> str:
    section: str = PAGE.split("\n## Limits\n")[1].split("\n## ")[0]
    return section


ROWS = [row.groupdict() for row in ROW.finditer(table())]


def test_every_row_of_the_table_is_read() -> None:
    lines = [line for line in table().splitlines() if line.startswith("| `")]
    assert len(ROWS) == len(lines) > 60
    assert len({row["name"] for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["name"])
def test_a_limit_is_what_the_page_says(row: dict[str, str]) -> None:
    number = float(row["number"].replace(",", "")) if "." in row["number"] else int(row["number"].replace(",", ""))
    assert in_code(row["name"]) == number * UNITS.get(row["unit"], 1)


def modules() -> list[str]:
    """Every module of the library, without the package's own name, and of the command line."""
    library = pkgutil.walk_packages(plasm_dht.__path__, "plasm_dht.")
    found = [*library, *pkgutil.walk_packages(plasm_dht_cli.__path__, "plasm_dht_cli.")]
    return [each.name.removeprefix("plasm_dht.") for each in found if not each.ispkg]


@pytest.mark.parametrize("module", modules())
def test_no_bound_is_missing(module: str) -> None:
    """A constant called MAX_ or DEFAULT_MAX_ bounds what others can do; each is in the table, or an argument is."""
    named = {row["name"] for row in ROWS}
    arguments = {f"DEFAULT_{name[:-2].removeprefix('PlasmServer(').upper()}" for name in named if name.endswith("=)")}
    source = inspect.getsource(importlib.import_module(in_full(module)))
    constants = {match[1] for match in re.finditer(r"^((?:DEFAULT_)?MAX_[A-Z_]+)\b.* = ", source, re.M)}
    assert {name for name in constants if f"{module}.{name}" not in named and name not in arguments} == set()


def test_the_figures_of_amplification_are_the_wires() -> None:
    key = bytes([255]) * 20
    asked = {name: len(wire.encode_request(key, name, [key, key])) for name in ("find_node", "find_value")}
    node = encode_node(key, "203.113.100.255", 65535)  # of the longest text
    answered = len(wire.response(key, wire.nodes_array([node] * 20)))
    assert f"`find_node` of {asked['find_node']} bytes is answered with at most {answered} bytes" in squeezed()
    assert f"a ratio of {answered / asked['find_node']:.0f}" in squeezed()
    assert f"`find_value` of {asked['find_value']} bytes with at most {wire.MAX_DATAGRAM:,} bytes" in squeezed()
    assert f"a ratio of {wire.MAX_DATAGRAM / asked['find_value']:.0f}" in squeezed()
    assert f"one ping of {len(wire.encode_request(key, 'ping', [key]))} bytes" in squeezed()
    smallest = sign(Identity.generate(), "n", 0, seq=0, issued_at=0, expires_at=1).envelope
    assert len(wire.encode_request(key, "store", [key, key, smallest])) > 2 * 50
    assert f"{2000 * wire.MAX_DATAGRAM / 1e6:.1f} MB a second" in squeezed()


def test_the_figures_of_the_http_server_are_its_own() -> None:
    assert f"in chunks of {web._CHUNK // 1024} KiB" in squeezed()
    assert f"{web._CHUNK / web.STALL / 1000:.1f} kB a second" in squeezed()
    assert f"{web.MAX_CONNECTIONS} connections in all and {web.MAX_PER_ADDRESS} for each source" in squeezed()


def squeezed() -> str:
    return " ".join(PAGE.split())
