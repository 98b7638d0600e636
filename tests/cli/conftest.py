"""The command line as its users have it: real processes with an environment of their own."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.process import SCRIPT, Process, Run, Start


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """An environment with a home of its own and without settings of the one who runs the tests."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PLASM_DHT_", "XDG_"))}
    return kept | {"HOME": str(tmp_path / "home"), "XDG_STATE_HOME": str(tmp_path / "state"), "COLUMNS": "100"}


@pytest.fixture
def plasm(environment: dict[str, str], tmp_path: Path) -> Run:
    """Run `plasm-dht` to its end; keyword arguments are environment variables."""

    def run(*arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [SCRIPT, *arguments],
            env=environment | variables,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return run


@pytest.fixture
def start(environment: dict[str, str], tmp_path: Path) -> Iterator[Start]:
    """Start `plasm-dht` on loopback and wait for its ready line; what still runs at the end is killed.

    A node of its own bootstraps from nobody unless it is told to.
    """
    processes: list[subprocess.Popen[str]] = []
    alone = tmp_path / "alone.toml"
    alone.write_text("[provider.dht]\nbootstrap = []\n")

    def start_process(command: str, *arguments: str | Path) -> Process:
        process = subprocess.Popen(
            [SCRIPT, command, "--config", alone, "--host", "127.0.0.1", "--state-dir", tmp_path / command, *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        assert process.stdout is not None
        return Process(process, process.stdout.readline())

    yield start_process
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def node(start: Start) -> Process:
    """A node that holds records and is nobody's provider."""
    return start("node", "--port", "0")
