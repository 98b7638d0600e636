"""A resolver that hangs holds up neither a deadline nor a stop."""

import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.cli.process import SCRIPT, Run

# What every Python process imports first: a resolver that never answers.
HANGS = "import socket, threading\nsocket.getaddrinfo = lambda *question, **more: threading.Event().wait()\n"
# Beside what was asked for: the start of a process, and its end (s).
ROOM = 2.5


@pytest.fixture(autouse=True)
def _resolver(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(HANGS)
    environment["PYTHONPATH"] = str(tmp_path)


def test_a_deadline_is_kept(plasm: Run) -> None:
    began = time.monotonic()
    done = plasm("get", "stable/arm64", "--bootstrap", "dht.example.net:8468", "--timeout", "1")
    assert (done.returncode, done.stdout) == (3, "")
    assert "no DHT node answered at dht.example.net:8468" in done.stderr
    assert time.monotonic() - began < 1 + ROOM


def test_a_service_that_is_told_to_stop_stops(environment: dict[str, str]) -> None:
    command = ["node", "--host", "127.0.0.1", "--port", "0", "--bootstrap", "dht.example.net:8468"]
    with subprocess.Popen([SCRIPT, *command], env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert "listens on" in process.stderr.readline()
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
    assert process.returncode == 0
    assert time.monotonic() - began < ROOM
