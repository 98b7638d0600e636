"""`plasm-dht serve`, end to end: real processes, files, HTTP and signals; asked at a node that is not the provider."""

import hashlib
import json
import shutil
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from plasm_dht.config import parse_address
from tests.cli.process import Process, Run, Start

ROOT = Path(__file__).parents[2]
TARGETS = ("stable/amd64", "stable/arm64")


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


@pytest.fixture
def ask(plasm: Run, node: Process) -> Callable[..., str]:
    def get(target: str = "stable/arm64", *options: str) -> str:
        done = plasm("get", target, "--bootstrap", node.address, *options)
        assert done.returncode == (0 if done.stdout else 1), done.stderr
        return done.stdout

    return get


def read(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=5) as answer:
        return bytes(answer.read())


def within(seconds: float, holds: Callable[[], bool]) -> bool:
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def test_every_channel_and_architecture_is_found_and_what_is_downloaded_is_what_was_signed(
    serve: Callable[..., Process], ask: Callable[..., str]
) -> None:
    provider = serve()
    for target in TARGETS:
        found = json.loads(ask(target, "--json"))
        manifest = read(found["url"])
        assert hashlib.sha256(manifest).hexdigest() == found["manifest_sha256"]
        kernel = json.loads(manifest)["artifacts"]["kernel"]
        assert "sha256:" + hashlib.sha256(read(kernel["urls"][0])).hexdigest() == kernel["hash"]
        assert provider.line.endswith(f" publisher={found['publisher']}\n")


def test_the_ready_line_says_where_both_servers_listen(serve: Callable[..., Process]) -> None:
    line = serve().line
    ready, dht, http, publisher = line.split()
    assert (ready, publisher[:18]) == ("ready", "publisher=ed25519:")
    assert parse_address(dht.removeprefix("dht=")) > ("127.0.0.1", 0)
    assert read(f"http://{http.removeprefix('http=')}/health")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_provider_that_is_told_to_stop_takes_its_records_back_at_once(
    serve: Callable[..., Process], ask: Callable[..., str], number: int
) -> None:
    provider = serve()
    assert all(ask(target) for target in TARGETS)
    began = time.monotonic()
    code, stderr = provider.stop(number)
    assert time.monotonic() - began < 4
    assert code == 0
    assert "Traceback" not in stderr
    assert not any(ask(target) for target in TARGETS)


def test_without_withdraw_the_records_stay_until_they_expire(
    serve: Callable[..., Process], ask: Callable[..., str]
) -> None:
    provider = serve("--no-withdraw", "--record-ttl", "60")
    assert provider.stop(signal.SIGTERM)[0] == 0
    assert ask()


def test_a_record_is_still_found_after_its_first_expiry_would_have_passed(
    serve: Callable[..., Process], ask: Callable[..., str]
) -> None:
    provider = serve("--record-ttl", "3")
    first = json.loads(ask("stable/arm64", "--json"))
    while time.time() * 1000 < first["expires_at"] + 500:
        time.sleep(0.1)
    later = json.loads(ask("stable/arm64", "--json"))
    assert later["seq"] > first["seq"]
    assert provider.process.poll() is None


def test_a_killed_providers_record_is_found_until_its_expiry_and_then_no_more(
    serve: Callable[..., Process], ask: Callable[..., str]
) -> None:
    provider = serve("--record-ttl", "9", "--refresh-interval", "8.9")
    provider.stop(signal.SIGKILL)
    expires_at = json.loads(ask("stable/arm64", "--json"))["expires_at"] / 1000
    time.sleep(max(0.0, expires_at - time.time() - 4))  # a lookup waits two for the dead holder
    assert ask()
    time.sleep(max(0.0, expires_at - time.time()))
    assert not ask()


def test_a_change_is_published_within_two_seconds_of_the_last_write(
    serve: Callable[..., Process], ask: Callable[..., str], artifacts: Path
) -> None:
    serve()
    before = json.loads(ask("stable/arm64", "--json"))
    (artifacts / "stable/arm64/VERSION").write_text("2026.2\n")

    def changed() -> bool:
        return bool(json.loads(ask("stable/arm64", "--json"))["version"] == "2026.2")

    assert within(2.5, changed)  # asking takes a moment too
    after = json.loads(ask("stable/arm64", "--json"))
    assert after["seq"] > before["seq"]
    assert hashlib.sha256(read(after["url"])).hexdigest() == after["manifest_sha256"]
    assert json.loads(ask("stable/amd64", "--json"))["version"] == "2026.1"


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
