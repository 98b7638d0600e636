"""`plasm-dht serve` as its user meets it: the ready line, and what is refused. The rest of it is in `tests/e2e`."""

import shutil
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from plasm_dht.config import parse_address
from tests.cli.process import Process, Run, Start

ROOT = Path(__file__).parents[2]


@pytest.fixture
def artifacts(tmp_path: Path) -> Path:
    return Path(shutil.copytree(ROOT / "docs/examples/artifacts", tmp_path / "artifacts"))


@pytest.fixture
def serve(start: Start, node: Process, artifacts: Path) -> Callable[..., Process]:
    def start_serve(*options: str) -> Process:
        return start(
            *("serve", "--artifacts", artifacts, "--http-host", "127.0.0.1", "--port", "0", "--http-port", "0"),
            *("--bootstrap", node.address, *options),
        )

    return start_serve


def read(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=5) as answer:
        return bytes(answer.read())


def test_the_ready_line_says_where_both_servers_listen(serve: Callable[..., Process]) -> None:
    line = serve().line
    ready, dht, http, publisher = line.split()
    assert (ready, publisher[:18]) == ("ready", "publisher=ed25519:")
    assert parse_address(dht.removeprefix("dht=")) > ("127.0.0.1", 0)
    assert read(f"http://{http.removeprefix('http=')}/health")


def test_a_folder_that_is_not_there_or_holds_nothing_is_one_line(plasm: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder in ("none", "empty"):
        done = plasm(
            *("serve", "--artifacts", folder, "--host", "127.0.0.1", "--http-host", "127.0.0.1"),
            *("--port", "0", "--http-port", "0", "-q"),
        )
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"plasm-dht: error: artifact folder {folder} ")
        assert done.stderr.count("\n") == 1


def test_an_http_port_in_use_is_one_line(
    serve: Callable[..., Process], start: Start, artifacts: Path, tmp_path: Path
) -> None:
    port = serve().line.split("http=127.0.0.1:")[1].split()[0]
    second = start(
        *("serve", "--artifacts", artifacts, "--http-host", "127.0.0.1", "--port", "0", "--http-port", port, "-q"),
        *("--state-dir", tmp_path / "second"),
    )
    _, stderr = second.process.communicate(timeout=15)
    assert second.process.returncode == 2
    assert f"127.0.0.1:{port}" in stderr
    assert stderr.count("\n") == 1


def test_a_providers_file_does_for_a_node_beside_it_which_opens_no_http_port(start: Start, tmp_path: Path) -> None:
    file = tmp_path / "provider.toml"
    file.write_text('[provider]\nhttp_host = "127.0.0.1"\nhttp_port = 0\n[provider.dht]\nbootstrap = []\n')
    assert " http=- " in start("node", "--port", "0", "--config", file).line
    assert (
        " http=127.0.0.1:"
        in start(
            *("node", "--port", "0", "--config", file, "--http-port", "0", "--state-dir", tmp_path / "gateway")
        ).line
    )
