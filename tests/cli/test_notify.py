"""The notify protocol of systemd, spoken to a real datagram socket: by the class, and by services that run."""

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from plasm_dht_cli.notify import Notifier, watchdog_interval
from tests.cli.process import SCRIPT

ROOT = Path(__file__).parents[2]
PATIENCE = 30.0
Environment = dict[str, str]


class Manager:
    """What systemd is to a service: a socket that it is told things at, one datagram a message."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind("\0" + name[1:] if name.startswith("@") else name)
        self.socket.settimeout(PATIENCE)
        self.told: list[dict[str, str]] = []

    def hear(self) -> dict[str, str]:
        """The next message, its variables by name."""
        data = self.socket.recv(65536).decode()
        self.told.append(dict(line.split("=", 1) for line in data.splitlines()))
        return self.told[-1]

    def hear_until(self, variable: str) -> dict[str, str]:
        while variable not in (message := self.hear()):
            pass
        return message

    @property
    def has_message(self) -> bool:
        return bool(select.select([self.socket], [], [], 0)[0])


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)  # a socket's path has at most 107 bytes
        name = f"@plasm-test-{os.getpid()}-{time.monotonic_ns()}" if request.param == "abstract" else "notify"
        manager = Manager(name)
        yield manager
        manager.socket.close()


@pytest.fixture
def notifier(manager: Manager, monkeypatch: pytest.MonkeyPatch) -> Iterator[Notifier]:
    monkeypatch.setenv("NOTIFY_SOCKET", manager.name)
    notifier = Notifier()
    yield notifier
    notifier.close()


def test_each_message_is_one_datagram_of_variables(manager: Manager, notifier: Notifier) -> None:
    assert notifier.listens
    notifier.ready("3 records")
    notifier.reloading(12.5)
    notifier.status("as before")
    notifier.alive("2 records")
    notifier.stopping("stopping")
    assert [manager.hear() for _ in range(5)] == [
        {"READY": "1", "STATUS": "3 records"},
        {"RELOADING": "1", "MONOTONIC_USEC": "12500000", "STATUS": "reading the configuration again"},
        {"STATUS": "as before"},
        {"WATCHDOG": "1", "STATUS": "2 records"},
        {"STOPPING": "1", "STATUS": "stopping"},
    ]


def test_no_status_can_forge_a_variable_or_fail_to_be_sent(manager: Manager, notifier: Notifier) -> None:
    notifier.status("a\nREADY=1\u2028東京\ud800")
    assert manager.hear() == {"STATUS": r"a\nREADY=1\u2028\u6771\u4eac\ud800"}


def test_a_manager_that_has_gone_is_a_warning(
    manager: Manager, notifier: Notifier, caplog: pytest.LogCaptureFixture
) -> None:
    manager.socket.close()
    notifier.ready("3 records")
    assert "READY=1" in caplog.text


def test_a_manager_that_does_not_read_holds_nobody_up_for_long(
    manager: Manager, notifier: Notifier, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert notifier._notifier is not None
    assert notifier._notifier.socket.gettimeout() == 1.0
    notifier._notifier.socket.settimeout(0.01)
    for _ in range(10_000):
        notifier.alive("3 records")
        if caplog.records:
            break
    assert "WATCHDOG=1" in caplog.text


def test_without_a_manager_nothing_happens(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    nobody = Notifier()
    nobody.ready("3 records")
    nobody.close()
    assert not nobody.listens
    assert not caplog.records


@pytest.mark.filterwarnings("ignore:Exception ignored")  # the library leaves its socket to the collector
def test_a_socket_where_nobody_listens_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/nowhere/notify")
    assert not Notifier().listens
    assert "/nowhere/notify" in caplog.text


@pytest.mark.parametrize(
    ("variables", "seconds"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "500000", "WATCHDOG_PID": str(os.getpid())}, 0.5),
        ({"WATCHDOG_USEC": "500000", "WATCHDOG_PID": "1"}, None),  # meant for another process
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "-1"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({"WATCHDOG_USEC": "²"}, None),
    ],
)
def test_the_watchdog_says_how_often_it_wants_to_hear(
    monkeypatch: pytest.MonkeyPatch, variables: Environment, seconds: float | None
) -> None:
    for name in ("WATCHDOG_USEC", "WATCHDOG_PID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert watchdog_interval() == seconds


# --- services that run ----------------------------------------------------------------------------------------------

Launch = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def launch(environment: Environment, tmp_path: Path, manager: Manager) -> Iterator[Launch]:
    """Start a service as systemd does; what still runs at the end is killed."""
    processes: list[subprocess.Popen[str]] = []
    file = tmp_path / "plasm.toml"
    file.write_text("[provider.dht]\nbootstrap = []\n")

    def start(*arguments: str | Path, **variables: str) -> "subprocess.Popen[str]":
        where = ("--config", file, "--host", "127.0.0.1", "--port", "0", "--state-dir", tmp_path / "state")
        process = subprocess.Popen(
            [SCRIPT, *arguments, *where],
            env=environment | {"NOTIFY_SOCKET": manager.name} | variables,
            cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


SERVE = ("serve", "--artifacts", ROOT / "docs/examples/artifacts", "--http-host", "127.0.0.1", "--http-port", "0")


@pytest.mark.parametrize("command", [SERVE, ("node",)], ids=["serve", "node"])
def test_a_service_says_that_it_is_ready_reloading_and_stopping(
    launch: Launch, manager: Manager, command: tuple[str | Path, ...]
) -> None:
    process = launch(*command)
    ready = manager.hear()
    assert ready["READY"] == "1"
    assert ready["STATUS"].startswith("2 records advertised, 0 neighbours" if command == SERVE else "0 records held")
    assert process.stdout is not None
    assert select.select([process.stdout], [], [], 0)[0], "the ready line comes before READY=1"
    assert process.stdout.readline().startswith("ready ")
    before = time.monotonic()
    process.send_signal(signal.SIGHUP)
    reloading = manager.hear_until("RELOADING")
    assert before <= int(reloading["MONOTONIC_USEC"]) / 1e6 <= time.monotonic()
    assert manager.hear()["READY"] == "1"
    process.send_signal(signal.SIGTERM)
    assert manager.hear_until("STOPPING")["STOPPING"] == "1"
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 0
    while manager.has_message:
        assert manager.hear().keys() <= {"WATCHDOG", "STATUS"}


def test_a_reload_that_is_refused_ends_too_so_that_systemd_does_not_wait(
    launch: Launch, manager: Manager, tmp_path: Path
) -> None:
    process = launch("node")
    manager.hear_until("READY")
    (tmp_path / "plasm.toml").write_text("bad")
    process.send_signal(signal.SIGHUP)
    manager.hear_until("RELOADING")
    assert manager.hear_until("READY")["STATUS"].startswith("0 records held")
    process.send_signal(signal.SIGTERM)
    assert "the old settings stay: configuration file" in process.communicate(timeout=PATIENCE)[1]


def test_the_watchdog_hears_from_it_twice_in_its_time(launch: Launch, manager: Manager) -> None:
    launch("node", WATCHDOG_USEC="1000000")
    manager.hear_until("READY")
    moments = []
    for _ in range(5):
        assert manager.hear_until("WATCHDOG")["STATUS"].startswith("0 records held")
        moments.append(time.monotonic())
    mean = (moments[-1] - moments[0]) / 4
    assert 0.45 < mean < 0.9, "half of the second, on a machine that may be busy"


def test_the_watchdog_hears_nothing_from_a_loop_that_stands_still(launch: Launch, manager: Manager) -> None:
    process = launch("node", WATCHDOG_USEC="400000")
    manager.hear_until("WATCHDOG")
    process.send_signal(signal.SIGSTOP)
    while manager.has_message:
        manager.hear()
    manager.socket.settimeout(1.0)
    with pytest.raises(TimeoutError):
        manager.hear()
    process.send_signal(signal.SIGCONT)
    manager.hear_until("WATCHDOG")


def test_a_watchdog_meant_for_another_process_is_told_nothing(launch: Launch, manager: Manager) -> None:
    process = launch("node", WATCHDOG_USEC="100000", WATCHDOG_PID="1")
    manager.hear_until("READY")
    manager.socket.settimeout(0.5)
    with pytest.raises(TimeoutError):
        manager.hear_until("WATCHDOG")
    assert process.poll() is None


# --- signals before and around it -----------------------------------------------------------------------------------


START = (sys.executable, "-X", "importtime", "-c", "from plasm_dht_cli.start import main; main()")
WHERE = ("--host", "127.0.0.1", "--port", "0", "--bootstrap", "127.0.0.1:9")
NODE = ("node", *WHERE)
PUBLISH = ("publish", "/site/leader", "here", *WHERE)


def start_and_wait_for_import(
    environment: Environment, folder: Path, module: str, command: tuple[str, ...] = NODE
) -> "subprocess.Popen[str]":
    """A service that has just imported the module, and is still busy with what comes then."""
    process = subprocess.Popen(
        [*START, *command],
        env=environment, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    assert any(line.split("|")[-1].strip() == module for line in process.stderr)
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    ("command", "module"),
    [(NODE, "typer.models"), (NODE, "plasm_dht.config"), (NODE, "kademlia.network"), (PUBLISH, "plasm_dht.config")],
)
def test_a_service_that_is_told_to_stop_while_it_starts_exits_with_0(
    environment: Environment, tmp_path: Path, number: int, command: tuple[str, ...], module: str
) -> None:
    with start_and_wait_for_import(environment, tmp_path, module, command) as process:
        process.send_signal(number)
        _, stderr = process.communicate(timeout=PATIENCE)
    assert (process.returncode, "Traceback" in stderr) == (0, False)


def test_a_service_that_is_told_to_reload_while_it_starts_goes_on(environment: Environment, tmp_path: Path) -> None:
    with start_and_wait_for_import(environment, tmp_path, "plasm_dht.config") as process:
        process.send_signal(signal.SIGHUP)
        assert process.stdout is not None
        assert process.stdout.readline().startswith("ready ")
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=PATIENCE)
    assert process.returncode == 0


def test_a_terminal_that_has_gone_stops_the_service(environment: Environment, tmp_path: Path) -> None:
    ours, its = os.openpty()
    process = subprocess.Popen(
        [SCRIPT, "node", "--host", "127.0.0.1", "--port", "0", "--bootstrap", "127.0.0.1:9"],
        env=environment, cwd=tmp_path, stdin=its, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    os.close(its)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("ready ")
    process.send_signal(signal.SIGHUP)  # the terminal is there: it is a reload
    assert process.stderr is not None
    assert any("nothing has changed" in line for line in process.stderr)
    os.close(ours)
    process.send_signal(signal.SIGHUP)
    with contextlib.closing(process.stdout), contextlib.closing(process.stderr):
        assert process.wait(PATIENCE) == 0
