"""Hosts, processes and questions of the end-to-end tests: each address in 127.0.0.0/8 is a host of its own."""

import asyncio
import json
import os
import re
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from kademlia.node import Node

from plasm_dht import PlasmServer
from plasm_dht.config import parse_address
from plasm_dht.provider.manifest import Pointer, record_name
from plasm_dht.record import Record, decode, shared_key
from tests.cli.process import SCRIPT

READY = re.compile(r"ready dht=(\S+:\d+) http=(\S+:\d+|-) publisher=(ed25519:[0-9a-f]{64})\n")
TARGET = "stable/arm64"
# For whatever the contract sets no bound to, on a machine with other things to do (s).
PATIENCE = 30.0
# Between two looks at something that will be so (s).
PAUSE = 0.05

T = TypeVar("T")


def note(text: str) -> None:
    """Say what was measured or logged; pytest shows it when the test fails, and with -s or -rP."""
    sys.stdout.write(text + "\n")


@dataclass(frozen=True, slots=True)
class Done:
    """A command that has ended. `began` and `ended` in Unix seconds."""

    code: int
    stdout: str
    stderr: str
    began: float
    ended: float

    @property
    def object(self) -> dict[str, Any]:
        """What `get --json` printed."""
        assert (self.code, self.stdout.count("\n")) == (0, 1), self
        return dict(json.loads(self.stdout))


@dataclass(slots=True)
class Running:
    """A process that serves something."""

    process: asyncio.subprocess.Process
    log: Path
    line: str = ""
    dht: str = ""
    http: str = ""
    publisher: str = ""

    @property
    def stderr(self) -> str:
        return self.log.read_text()

    async def stop(self, number: int = signal.SIGTERM) -> Done:
        """Send the signal and wait for the end. `stdout` is what was printed after the ready line."""
        began = time.time()
        if self.process.returncode is None:
            self.process.send_signal(number)
        assert self.process.stdout is not None
        async with asyncio.timeout(PATIENCE):
            rest = await self.process.stdout.read()
            code = await self.process.wait()
        return Done(code, rest.decode(), self.stderr, began, time.time())

    async def kill(self) -> None:
        await self.stop(signal.SIGKILL)


@dataclass(frozen=True, slots=True)
class Sighting:
    """What one question found. `began` and `ended` in Unix seconds."""

    record: Record | None
    began: float
    ended: float


@dataclass(slots=True)
class World:
    """Starts processes and asks for records; `close` ends every process that still runs."""

    folder: Path
    running: list[Running] = field(default_factory=list)
    started: int = 0

    def __post_init__(self) -> None:
        # a node that is told of nobody joins nobody: the default address might be somebody's on this machine
        (self.folder / "alone.toml").write_text("[provider.dht]\nbootstrap = []\n")

    @property
    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PLASM_", "XDG_", "PYTEST"))}
        own = {"HOME": str(self.folder), "XDG_STATE_HOME": str(self.folder / "state"), "COLUMNS": "100"}
        return kept | own | {"PYTHONWARNINGS": "error"}

    # -- processes ---------------------------------------------------------------------------------------------------

    async def start(self, *command: str | Path, **variables: str) -> Running:
        """Start a command, and do not wait for it."""
        self.started += 1
        log = self.folder / f"{self.started}-{Path(command[0]).name}.log"
        with log.open("wb") as stderr:
            process = await asyncio.create_subprocess_exec(
                *(SCRIPT, *command) if command[0] in ("node", "serve") else command,
                env=self.environment | variables,
                cwd=self.folder,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=stderr,
            )
        self.running.append(running := Running(process, log))
        return running

    async def ready(self, running: Running) -> Running:
        """Wait for the ready line and read it."""
        assert running.process.stdout is not None
        async with asyncio.timeout(PATIENCE):
            running.line = (await running.process.stdout.readline()).decode()
        match = READY.fullmatch(running.line)
        assert match, f"no ready line but {running.line!r}:\n{running.stderr}"
        running.dht, running.http, running.publisher = match.groups()
        return running

    async def node(self, host: str, *options: str | Path, port: int | str = 0, joins: str = "") -> Running:
        """A node that holds records, bound to a host of its own, joined through the address given."""
        return await self.ready(await self._start("node", host, *options, port=port, joins=joins))

    async def provider(
        self, host: str, artifacts: Path, *options: str | Path, port: int | str = 0, joins: str = "", wait: bool = True
    ) -> Running:
        """A provider bound to a host of its own; the identity belongs to the host."""
        more = ("--artifacts", artifacts, "--http-host", host, "--http-port", "0", *options)
        running = await self._start("serve", host, *more, port=port, joins=joins)
        return await self.ready(running) if wait else running

    async def _start(self, command: str, host: str, *options: str | Path, port: int | str, joins: str) -> Running:
        network = ("--bootstrap", joins) if joins else ("--config", self.folder / "alone.toml")
        state = self.folder / f"{command}-{host.replace(':', '_')}"
        return await self.start(
            *(command, "--host", host, "--port", str(port), "--state-dir", state, *network, *options)
        )

    async def run(self, *arguments: str | Path, **variables: str) -> Done:
        """Run `plasm-dht` to its end. Never with a traceback."""
        began = time.time()
        process = await asyncio.create_subprocess_exec(
            SCRIPT,
            *arguments,
            env=self.environment | variables,
            cwd=self.folder,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            async with asyncio.timeout(2 * PATIENCE):
                stdout, stderr = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await process.communicate()
        assert process.returncode is not None
        done = Done(process.returncode, stdout.decode(), stderr.decode(), began, time.time())
        assert "Traceback" not in done.stderr, done.stderr
        return done

    async def get(self, via: Running | str, *options: str, target: str = TARGET) -> Done:
        """`plasm-dht get` through one node."""
        address = via if isinstance(via, str) else via.dht
        return await self.run("get", target, "--bootstrap", address, *options)

    async def close(self) -> None:
        """End every process and show what it logged; fail for one that had a traceback."""
        for running in self.running:
            await running.kill()
            note(f"--- {running.log.name}: exit code {running.process.returncode}\n{running.stderr}")
        bad = [running.log.name for running in self.running if "Traceback" in running.stderr]
        assert not bad, f"a traceback in {bad}"


# -- questions from this process: many of them cost less than as many processes --------------------------------------


async def ask(via: Running | str, target: str = TARGET) -> Record | None:
    """The freshest live record, looked up by a caller that knows this one node and forgets it after."""
    async with PlasmServer(node_id=bytes(20)) as reader:
        await reader.listen(0)
        if not await reader.bootstrap([parse_address(via if isinstance(via, str) else via.dht)]):
            return None
        records = await reader.get_records(record_name(target))
    return records[0] if records else None


async def held(node: Running, target: str = TARGET) -> list[Record]:
    """What this node itself holds, live or not, whoever else does."""
    async with PlasmServer(node_id=bytes(20)) as reader:
        await reader.listen(0)
        (contact,) = await reader.bootstrap([parse_address(node.dht)])
        key = Node(shared_key(record_name(target)))
        _, found = await reader.protocol.call_find_value(contact, key, 0)
    return [decode(envelope) for envelope in found.envelopes] if found else []


async def version(via: Running | str, target: str = TARGET) -> str | None:
    """The version that is advertised."""
    record = await ask(via, target)
    return Pointer.decode(record.value).version if record else None


async def observe(via: Running | str, until: float, *, target: str = TARGET, every: float = 0.2) -> list[Sighting]:
    """Ask again and again, also while answers are awaited, up to a moment (Unix seconds)."""

    async def look() -> Sighting:
        began = time.time()
        return Sighting(await ask(via, target), began, time.time())

    async with asyncio.TaskGroup() as group:
        looks = []
        while time.time() < until:
            looks.append(group.create_task(look()))
            await asyncio.sleep(every)
    return [each.result() for each in looks]


async def soon(holds: Callable[[], Awaitable[T]], within: float = PATIENCE) -> T:
    """What is returned once it is true of something; an `AssertionError` when that takes longer (s)."""
    end = time.monotonic() + within
    while not (result := await holds()):
        assert time.monotonic() < end, f"not within {within} s: {holds}"
        await asyncio.sleep(PAUSE)
    return result


async def together(*scenarios: Coroutine[Any, Any, None]) -> None:
    """Play scenarios at the same time, because each of them waits most of it; when one fails the others end."""
    async with asyncio.TaskGroup() as group:
        for scenario in scenarios:
            group.create_task(scenario)


async def until(moment: float) -> None:
    """Wait for a moment (Unix seconds)."""
    await asyncio.sleep(max(0.0, moment - time.time()))


async def read(url: str, method: str = "GET") -> bytes:
    """The body of an answer to an HTTP request."""
    status, body = await fetch(url, method)
    assert status == 200, (url, status, body)
    return body


async def fetch(url: str, method: str = "GET", **headers: str) -> tuple[int, bytes]:
    """The status and the body, over a connection of its own."""
    host, _, path = url.removeprefix("http://").partition("/")
    address, port = parse_address(host)
    reader, writer = await asyncio.open_connection(address, port, limit=2**20)
    try:
        more = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
        writer.write(f"{method} /{path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n{more}\r\n".encode())
        async with asyncio.timeout(PATIENCE):
            head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    finally:
        writer.close()
    return int(head.split()[1]), body


def put(folder: Path, target: str = TARGET, **files: str) -> Path:
    """Files of a CHANNEL/ARCH, `VERSION="1"` and the like; a double underscore is a dot."""
    place = folder / target
    place.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (place / name.replace("__", ".")).write_text(content)
    return folder
