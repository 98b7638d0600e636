"""Which modules each command imports: its start takes as long as they take, and `get` runs on machines that boot."""

import asyncio
import http.server
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from plasm_dht.config import parse_address
from plasm_dht.provider.manifest import Pointer, record_name
from tests.cli.process import Process

ROOT = Path(__file__).parents[2]
TARGET = "stable/arm64"

# Runs a command and prints what it has imported. What the interpreter brings with it does not count, nor do the modules
# that an extension module only made up (they have no spec).
SCRIPT = """\
import sys
before = set(sys.modules)
from plasm_dht_cli.main import run
code = run(sys.argv[1:])
names = [name for name, module in sys.modules.items() if getattr(module, "__spec__", None)]
print(*sorted(set(names) - before), flush=True)
sys.exit(code)
"""

# Other people's packages that a command may import, itself or through another one of them.
COMMAND_LINE = {"typer", "annotated_doc", "click", "shellingham", "typing_extensions"}
KEY = {"cryptography", "_cffi_backend"}
DHT = KEY | {"kademlia", "rpcudp", "umsgpack", "msgspec", "sortedcontainers"}
HTTP = {"aiohttp", "aiohappyeyeballs", "aiosignal", "attr", "frozenlist", "idna", "multidict", "propcache", "yarl"}
ALLOWED = {
    "--version": COMMAND_LINE,
    "--help": COMMAND_LINE,
    "key": COMMAND_LINE | KEY,
    "get": COMMAND_LINE | DHT,
    "publish": COMMAND_LINE | DHT,
    "watch": COMMAND_LINE | DHT,
    "status": COMMAND_LINE | KEY,  # of the settings, which know publisher ids
    "node": COMMAND_LINE | DHT,
    "serve": COMMAND_LINE | DHT | HTTP | {"prometheus_client", "watchdog"},
}

# What none of them needs, or only where something is wrong, and costs milliseconds.
DEAR = {
    "cryptography.hazmat.primitives.ciphers",
    "cryptography.hazmat.primitives.serialization",  # brings SSH keys, ciphers and elliptic curves
    "cryptography.x509",
    "email",
    "http",
    "importlib.metadata",
    "multiprocessing",
    "sqlite3",
    "tempfile",
    "tomllib",
    "unittest",
    "urllib.request",
    "xml",
}
# What `get` does not need of ours: it publishes nothing, holds nothing, serves nothing.
NOT_FOR_GET = {
    "ctypes",
    "plasm_dht.dht.mmsg",
    "sortedcontainers",
    "statistics",
    "plasm_dht.dht.due",
    "plasm_dht.dht.refresh",
    "json",
    "plasm_dht.dht.intent",
    "plasm_dht.dht.publish",
    "plasm_dht.dht.replicate",
    "plasm_dht.provider.artifacts",
    "plasm_dht.provider.provider",
    "plasm_dht.provider.watch",
    "plasm_dht.provider.web",
    "plasm_dht_cli.config",
    "plasm_dht_cli.key",
    "plasm_dht_cli.node",
    "plasm_dht_cli.notify",
    "plasm_dht.dht.observe",
    "plasm_dht_cli.publish",
    "plasm_dht_cli.running",
    "plasm_dht_cli.serve",
    "plasm_dht_cli.status",
    "plasm_dht_cli.watch",
}

Loaded = Callable[..., set[str]]


@pytest.fixture
def loaded(environment: dict[str, str], tmp_path: Path) -> Loaded:
    """Run a command to its end, which must be a good one. The modules that it has imported."""

    def run(*arguments: str | Path) -> set[str]:
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, *arguments],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return set(done.stdout.splitlines()[-1].split())

    return run


@pytest.fixture
def loaded_by_service(environment: dict[str, str], tmp_path: Path) -> Iterator[Loaded]:
    """Start a command on loopback, and stop it when it is ready. The modules that it has imported."""
    processes: list[subprocess.Popen[str]] = []
    where = ("--host", "127.0.0.1", "--port", "0", "--bootstrap", "127.0.0.1:9", "--state-dir", tmp_path / "state")

    def run(*arguments: str | Path) -> set[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, *arguments, *where],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline().startswith("ready ")
        process.send_signal(signal.SIGTERM)
        stdout, stderr = process.communicate(timeout=15)
        assert process.returncode == 0, stderr
        return set(stdout.split())

    yield run
    for process in processes:
        process.kill()
        process.communicate()


def packages(modules: set[str]) -> set[str]:
    """The other people's packages among the modules."""
    top = {module.partition(".")[0] for module in modules}
    return {name for name in top if name not in sys.stdlib_module_names and not name.startswith("plasm_dht")}


async def test_get_imports_what_a_reader_needs_and_nothing_else(loaded: Loaded, node: Process) -> None:
    from plasm_dht import Identity, PlasmServer

    async with PlasmServer(identity=Identity.generate(), record_ttl=60) as server:
        await server.listen(0, "127.0.0.1")
        await server.bootstrap([parse_address(node.address)])
        pointer = Pointer("http://127.0.0.1:8080/stable/arm64/manifest.json", "2026.1", "rack-7", bytes(32), 1234)
        assert (await server.publish(record_name(TARGET), pointer.encode())).stored
        modules = await asyncio.to_thread(loaded, "get", TARGET, "--bootstrap", node.address)
    assert {"plasm_dht.dht.server", "plasm_dht.provider.manifest"} <= modules
    assert packages(modules) - ALLOWED["get"] == set()
    assert modules & (DEAR | NOT_FOR_GET) == set()


def test_publish_imports_no_http_and_nothing_of_a_provider(loaded: Loaded, node: Process) -> None:
    where = ("--host", "127.0.0.1", "--bootstrap", node.address, "--identity", "key.pem")
    modules = loaded("publish", "/site/leader", "10.0.0.7", "--once", *where)
    assert "plasm_dht.dht.publish" in modules
    assert packages(modules) - ALLOWED["publish"] == set()
    ours = {module for module in modules if module.startswith(("plasm_dht.provider", "plasm_dht_cli."))}
    assert ours & {"plasm_dht.provider", "plasm_dht_cli.get", "plasm_dht_cli.running", "plasm_dht_cli.serve"} == set()


def test_watch_imports_what_a_reader_needs_and_publishes_nothing(environment: dict[str, str], node: Process) -> None:
    arguments = ("watch", TARGET, "--bootstrap", "127.0.0.1:9")
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    assert "no DHT node answers" in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=15)
    assert process.returncode == 0, stderr
    modules = set(stdout.split())
    assert {"plasm_dht.dht.observe", "plasm_dht.provider.manifest"} <= modules
    assert packages(modules) - ALLOWED["watch"] == set()
    assert modules & {"plasm_dht.dht.publish", "plasm_dht.provider.provider", "plasm_dht_cli.serve"} == set()


def test_status_imports_no_dht_and_no_event_loop(loaded: Loaded) -> None:
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"records": []}')

        def log_message(self, *_: object) -> None:
            """Nothing on stderr."""

    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            modules = loaded("status", "--url", f"http://127.0.0.1:{server.server_port}")
        finally:
            server.shutdown()
            thread.join()
    assert packages(modules) - ALLOWED["status"] == set()
    assert modules & {"asyncio", "plasm_dht.dht.server", "plasm_dht.provider", "plasm_dht_cli.get"} == set()


@pytest.mark.parametrize("command", ["new", "show"])
def test_key_imports_no_dht(loaded: Loaded, command: str) -> None:
    loaded("key", "new", "--identity", "first.pem")
    modules = loaded("key", command, "--identity", "first.pem" if command == "show" else "second.pem")
    assert "plasm_dht.identity" in modules
    assert packages(modules) - ALLOWED["key"] == set()
    assert modules & {"asyncio", "plasm_dht.config", "plasm_dht_cli.get", "plasm_dht_cli.node"} == set()


def test_node_imports_no_http_and_nothing_of_a_provider(loaded_by_service: Loaded) -> None:
    modules = loaded_by_service("node")
    assert "plasm_dht.dht.publish" in modules
    assert packages(modules) - ALLOWED["node"] == set()
    ours = {module for module in modules if module.startswith(("plasm_dht.provider", "plasm_dht_cli."))}
    assert ours & {"plasm_dht.provider", "plasm_dht_cli.get", "plasm_dht_cli.key", "plasm_dht_cli.serve"} == set()


def test_serve_imports_what_serves_and_watches_and_nothing_else(loaded_by_service: Loaded) -> None:
    artifacts = ROOT / "docs/examples/artifacts"
    modules = loaded_by_service("serve", "--artifacts", artifacts, "--http-host", "127.0.0.1", "--http-port", "0")
    assert {"aiohttp", "watchdog", "plasm_dht.provider.provider"} <= modules
    assert packages(modules) - ALLOWED["serve"] == set()
    assert modules & {"plasm_dht_cli.get", "plasm_dht_cli.key", "plasm_dht_cli.node"} == set()


def test_serve_without_http_imports_no_http(loaded_by_service: Loaded) -> None:
    artifacts = ROOT / "docs/examples/artifacts"
    elsewhere = ("--no-http", "--base-url", "https://cdn.example.net/boot")
    modules = loaded_by_service("serve", "--artifacts", artifacts, *elsewhere)
    assert {"watchdog", "plasm_dht.provider.provider"} <= modules
    assert packages(modules) - ALLOWED["serve"] | packages(modules) & (HTTP | {"prometheus_client"}) == set()


@pytest.mark.parametrize("option", ["--version", "--help"])
def test_what_only_prints_imports_no_library_but_that_of_the_command_line(loaded: Loaded, option: str) -> None:
    modules = loaded(option)
    assert packages(modules) - ALLOWED[option] == set()
    assert modules & {"asyncio", "plasm_dht.config", "plasm_dht.identity"} == set()
