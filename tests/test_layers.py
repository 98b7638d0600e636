"""The layering of DESIGN.md: who may import whom, who may touch what, and that every module stands alone."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# The table of DESIGN.md. A module imports only from layers below its own.
LAYERS: dict[str, float] = {
    "plasm_dht.errors": 0,
    "plasm_dht.clock": 1,
    "plasm_dht.identity": 1,
    "plasm_dht.config": 2,
    "plasm_dht.record": 2,
    "plasm_dht.dht.storage": 3,
    "plasm_dht.dht.sqlite": 3.5,  # which extends the storage in memory
    "plasm_dht.dht.statefile": 3,  # the file beneath it
    "plasm_dht.dht.routing": 3,
    "plasm_dht.dht.wire": 3,
    "plasm_dht.dht.protocol": 4,
    "plasm_dht.dht.lookup": 4,
    "plasm_dht.dht.refresh": 5,
    "plasm_dht.dht.replicate": 5,
    "plasm_dht.dht.server": 6,
    "plasm_dht.provider.manifest": 2,
    "plasm_dht.provider.artifacts": 3,
    "plasm_dht.provider.watch": 3,
    "plasm_dht.provider.web": 4,
    "plasm_dht.provider.gateway": 5,
    "plasm_dht.provider.page": 5,
    "plasm_dht.provider.fetch": 4,
    "plasm_dht.provider.provider": 7,
    "plasm_dht.testing": 7,
    "plasm_dht_cli": 8,  # one room: its files may import each other
    # what the table does not name
    "plasm_dht.values": 1.5,  # one value of a setting
    "plasm_dht": 6.5,  # the names for embedders
    "plasm_dht.dht": 0,  # packages that only say what they are for
    "plasm_dht.provider": 0,
    "plasm_dht.dht.due": 3,  # what refresh and replicate share
    "plasm_dht.dht.intent": 4,  # what a publisher means, and whom it has told
    "plasm_dht.dht.publish": 5,  # what a publisher owes its holders
    "plasm_dht.dht.read": 5,  # how a name is read
    "plasm_dht.dht.observe": 5,  # how a name is watched
    "plasm_dht.dht.refused": 5,  # what of kademlia's server is refused
    "plasm_dht.dht.membership": 5,  # whom a node knows: joining, upkeep
    "plasm_dht.dht.holding": 2.5,  # what is held of one publisher
    "plasm_dht.dht.ids": 2,  # ids and addresses of nodes
    "plasm_dht.dht.find": 4.5,  # how a name is found under one key
    "plasm_dht.dht.candidate": 3.5,  # whom a lookup may ask
    "plasm_dht.dht.density": 3,  # how near nodes are by chance
    "plasm_dht.dht.order": 2,  # what is found by its distance or its time
    "plasm_dht.dht.limits": 3,  # what is remembered about addresses
    "plasm_dht.dht.roundtrip": 3,
    "plasm_dht.dht.stats": 3.5,  # what a node counts
    "plasm_dht.provider.metrics": 6.7,  # what it counts, for Prometheus
    "plasm_dht.provider.ipxe": 3,  # scripts for iPXE
    "plasm_dht.provider.journal": 2,  # what happened lately
    "plasm_dht.provider.observed": 6.5,  # a node that tells a journal
    "plasm_dht.text": 0,  # text from elsewhere
    "plasm_dht.provider.facts": 3,  # what is said of a record that was found
    "plasm_dht.provider.site": 3.5,  # what is served at this moment
    "plasm_dht.provider.front": 6.8,  # the HTTP server in front of a node
    "plasm_dht.provider.channels": 4,  # follows each CHANNEL/ARCH
    "plasm_dht.provider.address": 6.5,  # where clients find what is served
    "plasm_dht.provider.reload": 6.9,  # settings that are read again
    "plasm_dht.provider.door": 3.5,  # who may connect to the HTTP server
    "plasm_dht.provider.folder": 3,  # the folder that a download goes to
    "plasm_dht.dht.distance": 2.5,  # who is closest to a key
    "plasm_dht.dht.nearest": 3.2,  # the closest contacts, encoded and kept
    "plasm_dht.dht.answers": 3.5,  # what is said to find_node and find_value
    "plasm_dht.dht.mmsg": 3,  # many datagrams a system call
    "plasm_dht.dht.apart": 3.2,  # a socket for responses
    "plasm_dht.dht.call": 3.5,  # a request that waits for its answer
    "plasm_dht.dht.udp": 3.5,  # the socket beneath the transport
}

# An import that only one place may have: a library, and where.
ONLY_IN = {
    "aiohttp": {f"plasm_dht.provider.{room}" for room in ("web", "gateway", "page", "fetch")},
    "watchdog": {"plasm_dht.provider.watch"},
    "prometheus_client": {"plasm_dht.provider.metrics"},
    "cryptography": {"plasm_dht.identity"},
    "time": {"plasm_dht.clock"},
    "typer": {"plasm_dht_cli"},
}
MAX_LINES = 420


def modules(root: Path) -> dict[str, Path]:
    """Every module of the packages, by its dotted name."""
    found = {}
    for base, package in ((root, "plasm_dht"), (root / "cli", "plasm_dht_cli")):
        for path in sorted((base / package).rglob("*.py")):
            parts = path.relative_to(base).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def room(module: str) -> str:
    return "plasm_dht_cli" if module.split(".")[0] == "plasm_dht_cli" else module


def imports(tree: ast.AST, known: dict[str, Path]) -> Iterator[str]:
    """What a module imports, wherever in it: at its top, in a function, for the type checker."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            yield "."
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in known else node.module


def calls(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)


def violations(root: Path) -> list[str]:
    known = modules(root)
    found = []
    for module, path in known.items():
        text = path.read_text()
        tree = ast.parse(text)
        mine = room(module)
        if mine not in LAYERS:
            found.append(f"{module} has no layer")
            continue
        if len(text.splitlines()) > MAX_LINES:
            found.append(f"{module} has more than {MAX_LINES} lines")
        for imported in set(imports(tree, known)):
            library, theirs = imported.split(".")[0], room(imported)
            if imported == ".":
                found.append(f"{module} has a relative import")
            elif library in ("plasm_dht", "plasm_dht_cli"):
                if theirs == mine == "plasm_dht_cli":
                    continue
                if LAYERS.get(theirs, 99) >= LAYERS[mine]:
                    found.append(f"{module} imports {imported}, which is not below it")
                if mine.startswith("plasm_dht.dht") and theirs.startswith("plasm_dht.provider"):
                    found.append(f"{module} imports {imported}: the dht wing never imports the provider wing")
            elif library in ONLY_IN and mine not in ONLY_IN[library]:
                found.append(f"{module} imports {library}")
        for called in set(calls(tree)):
            if called in ("print", "asyncio.run") and mine != "plasm_dht_cli":
                found.append(f"{module} calls {called}")
            if called.endswith(("datetime.now", "datetime.utcnow", "datetime.today")):
                found.append(f"{module} calls {called}: only clock reads clocks")
    return found


def test_every_module_keeps_to_its_layer() -> None:
    assert violations(ROOT) == []


def test_the_modules_are_found() -> None:
    assert {"plasm_dht", "plasm_dht.errors", "plasm_dht.dht.wire", "plasm_dht_cli.main"} <= modules(ROOT).keys()


def test_the_page_about_rooms_has_every_room_and_its_layer() -> None:
    packages = {"plasm_dht", "plasm_dht.dht", "plasm_dht.provider", "plasm_dht_cli"}
    told = {}
    for layer, rooms in re.findall(
        r"^\| ([\d.]+) \| (.*?) \|", (ROOT / "docs" / "architecture.md").read_text(), re.MULTILINE
    ):
        for path in re.findall(r"`([\w/]+)\.py`", rooms):
            told[f"plasm_dht.{path.replace('/', '.')}"] = float(layer)
    assert told == {module: layer for module, layer in LAYERS.items() if module not in packages}


@pytest.mark.parametrize(
    ("file", "text", "violation"),
    [
        ("plasm_dht/errors.py", "import plasm_dht.clock", "errors imports plasm_dht.clock, which is not below"),
        ("plasm_dht/clock.py", "from plasm_dht.identity import Identity", "clock imports plasm_dht.identity"),
        ("plasm_dht/record.py", "from plasm_dht import config", "record imports plasm_dht.config"),
        ("plasm_dht/record.py", "def late():\n    import plasm_dht.dht.wire", "record imports plasm_dht.dht.wire"),
        ("plasm_dht/dht/wire.py", "from plasm_dht import PlasmServer", "wire imports plasm_dht, which is not below"),
        ("plasm_dht/dht/server.py", "import plasm_dht.provider.manifest", "never imports the provider wing"),
        ("plasm_dht/testing.py", "import plasm_dht_cli.main", "testing imports plasm_dht_cli.main"),
        ("plasm_dht/dht/new.py", "", "plasm_dht.dht.new has no layer"),
        ("plasm_dht/dht/wire.py", "from . import storage", "relative import"),
        ("plasm_dht/provider/provider.py", "import aiohttp", "provider imports aiohttp"),
        ("cli/plasm_dht_cli/get.py", "from aiohttp import web", "get imports aiohttp"),
        ("plasm_dht/provider/artifacts.py", "import watchdog.events", "artifacts imports watchdog"),
        ("plasm_dht/record.py", "from cryptography.hazmat import primitives", "record imports cryptography"),
        ("plasm_dht/dht/storage.py", "from time import monotonic", "storage imports time"),
        ("cli/plasm_dht_cli/get.py", "import time", "get imports time"),
        ("plasm_dht/config.py", "import typer", "config imports typer"),
        ("plasm_dht/dht/server.py", "print(1)", "server calls print"),
        ("plasm_dht/dht/server.py", "import asyncio\nasyncio.run(main())", "server calls asyncio.run"),
        ("plasm_dht/record.py", "datetime.datetime.now()", "record calls datetime.datetime.now"),
        ("plasm_dht/record.py", "\n" * 421, "record has more than 420 lines"),
    ],
)
def test_a_module_that_does_not_is_found_out(tmp_path: Path, file: str, text: str, violation: str) -> None:
    for name in ("dht/wire.py", "dht/storage.py", "provider/manifest.py", "clock.py", "config.py", "identity.py"):
        (tmp_path / "plasm_dht" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "plasm_dht" / name).write_text("import asyncio\n")
    (tmp_path / "cli" / "plasm_dht_cli").mkdir(parents=True)
    (tmp_path / "cli" / "plasm_dht_cli" / "main.py").write_text("import plasm_dht.config, plasm_dht_cli.get\nprint()\n")
    assert violations(tmp_path) == []
    (tmp_path / file).write_text(text)
    assert [line for line in violations(tmp_path) if violation in line] != []


@pytest.mark.parametrize("module", modules(ROOT))
def test_every_module_can_be_imported_first_and_without_a_warning(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", f"import {module}"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
