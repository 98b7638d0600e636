"""`plasm-dht watch`: a real process that is told of what publishers in this one do."""

import asyncio
import json
import re
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from plasm_dht import Identity, PlasmServer
from plasm_dht.config import format_address, parse_address
from plasm_dht.provider.manifest import Pointer, record_name
from plasm_dht.record import Value
from tests.cli.process import SCRIPT, Process, Run

TARGET = "stable/arm64"
URL = "http://127.0.0.1:8080/stable/arm64/manifest.json"
NOBODY = "127.0.0.1:9"  # discard: nobody answers there
# For what takes a moment on a machine with other things to do (s).
PATIENCE = 20.0


class Watcher:
    """A `plasm-dht watch` that runs."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def line(self, within: float = PATIENCE) -> str:
        assert self.process.stdout is not None
        async with asyncio.timeout(within):
            return (await self.process.stdout.readline()).decode()

    async def event(self, within: float = PATIENCE) -> dict[str, Any]:
        return dict(json.loads(await self.line(within)))

    async def complaint(self, within: float = PATIENCE) -> str:
        assert self.process.stderr is not None
        async with asyncio.timeout(within):
            return (await self.process.stderr.readline()).decode()

    async def stop(self, number: int = signal.SIGTERM) -> tuple[int, str, str]:
        self.process.send_signal(number)
        async with asyncio.timeout(PATIENCE):
            out, err = await self.process.communicate()
        assert self.process.returncode is not None
        return self.process.returncode, out.decode(), err.decode()


Watch = Callable[..., Awaitable[Watcher]]


@pytest.fixture
async def watch(environment: dict[str, str], tmp_path: Path) -> AsyncIterator[Watch]:
    watchers: list[Watcher] = []

    async def start(*arguments: str) -> Watcher:
        process = await asyncio.create_subprocess_exec(
            *(SCRIPT, "watch", *arguments),
            env=environment,
            cwd=tmp_path,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        watchers.append(Watcher(process))
        return watchers[-1]

    yield start
    for watcher in watchers:
        if watcher.process.returncode is None:
            watcher.process.kill()
            await watcher.process.communicate()


@asynccontextmanager
async def publisher(node: Process, **settings: Any) -> AsyncIterator[PlasmServer]:
    async with PlasmServer(**{"identity": Identity.generate(), "record_ttl": 60} | settings) as server:
        await server.listen(0, "127.0.0.1")
        await server.bootstrap([parse_address(node.address)])
        yield server


def pointer(version: str) -> bytes:
    return Pointer(URL, version, "rack-7", bytes(range(32)), 1234).encode()


async def test_a_line_is_printed_when_a_record_is_published_changes_and_is_withdrawn(
    watch: Watch, node: Process
) -> None:
    name = record_name(TARGET)
    async with publisher(node) as server:
        await server.publish(name, pointer("1"))  # before anybody watches
        watcher = await watch(TARGET, "--json", "--bootstrap", node.address)
        first = await watcher.event()
        (record,) = await server.get_records(name)
        assert abs(first.pop("at") - server.now()) < PATIENCE * 1000
        assert first == {
            "event": "published",
            "key": TARGET,
            "publisher": record.publisher,
            "seq": record.seq,
            "issued_at": record.issued_at,
            "expires_at": record.expires_at,
            "url": URL,
            "version": "1",
            "provider_name": "rack-7",
            "manifest_sha256": bytes(range(32)).hex(),
        }
        await server.publish(name, pointer("1"))  # a refresh says nothing new
        await server.publish(name, pointer("2"))
        changed = await watcher.event(within=5)  # it is stored at the watching node, too
        assert (changed["event"], changed["version"]) == ("changed", "2")
        await server.withdraw(name)
        gone = await watcher.event(within=5)
        assert (gone["event"], gone["version"]) == ("withdrawn", "2")
        assert await watcher.stop() == (0, "", "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_the_lines_for_people_say_when_what_and_who(watch: Watch, node: Process, number: int) -> None:
    watcher = await watch(TARGET, "--bootstrap", node.address)
    async with publisher(node) as server:
        assert server.identity is not None
        await server.publish(record_name(TARGET), pointer("2026.1"))
        line = await watcher.line()
        fields = rf"publisher={server.identity.publisher_id} seq=\d+ url={URL} version=2026.1 provider_name=rack-7"
        assert re.match(rf"\d{{4}}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{{3}}Z published {TARGET} {fields} ", line)
        await server.close(withdraw=False)
    code, _, err = await watcher.stop(number)
    assert (code, err) == (0, "")


async def test_an_expiry_is_a_line_at_its_moment(watch: Watch, node: Process) -> None:
    async with publisher(node, record_ttl=4) as server:
        await server.publish(record_name(TARGET), pointer("1"))
        watcher = await watch(TARGET, "--json", "--bootstrap", node.address)
        assert (await watcher.event())["event"] == "published"
        await server.close(withdraw=False)
        expired = await watcher.event(within=8)
    assert expired["event"] == "expired"
    assert 0 <= expired["at"] - expired["expires_at"] < 1500


async def test_with_trust_nobody_else_is_a_line(watch: Watch, node: Process) -> None:
    identity = Identity.generate()
    watcher = await watch(TARGET, "--json", "--bootstrap", node.address, "--trust", identity.publisher_id)
    async with publisher(node) as stranger, publisher(node, identity=identity) as trusted:
        await stranger.publish(record_name(TARGET), pointer("theirs"))
        await trusted.publish(record_name(TARGET), pointer("ours"))
        event = await watcher.event()
        assert (event["event"], event["version"], event["publisher"]) == ("published", "ours", identity.publisher_id)


VALUES: list[tuple[Value, dict[str, object]]] = [
    ("text\nplasm", {"value": "text\nplasm"}),
    (7, {"value": 7}),
    (True, {"value": True}),
    (float("inf"), {"value": "inf"}),
    (b"\x00\xff", {"value_base64": "AP8="}),
]


async def test_any_name_that_starts_with_a_slash_can_be_watched_whatever_its_value(watch: Watch, node: Process) -> None:
    watcher = await watch("/site/leader", "--json", "--bootstrap", node.address)
    text = await watch("/site/leader", "--bootstrap", node.address)
    async with publisher(node) as server:
        for value, shown in VALUES:
            await server.publish("/site/leader", value)
            event = await watcher.event()
            assert event["key"] == "/site/leader"
            assert {name: event[name] for name in event if name.startswith("value")} == shown
            line = await text.line()
            assert line[:-1].isprintable()
        assert line.rstrip().endswith("value_base64=AP8=")


async def test_when_the_network_is_lost_one_line_on_stderr_says_so_and_it_goes_on(watch: Watch, node: Process) -> None:
    async with publisher(node, record_ttl=12) as server:
        await server.publish(record_name(TARGET), pointer("1"))
        watcher = await watch(TARGET, "--json", "--bootstrap", node.address)
        assert (await watcher.event())["event"] == "published"
        host, port = parse_address(node.address)
        await asyncio.to_thread(node.stop, signal.SIGKILL)
        await server.close(withdraw=False)
    assert "no DHT node answers" in await watcher.complaint()
    assert (await watcher.event())["event"] == "expired"
    async with PlasmServer(identity=Identity.generate()) as again:
        await again.listen(port, host)
        await again.publish(record_name(TARGET), pointer("2"))
        event = await watcher.event(within=70)
        assert (event["event"], event["version"]) == ("published", "2")
    assert (await watcher.stop())[::2] == (0, "")


async def test_without_any_node_it_keeps_trying_and_says_so_once(watch: Watch) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.1", 0))
        silent.setblocking(False)
        watcher = await watch(TARGET, "--bootstrap", format_address(silent.getsockname()))
        assert "no DHT node answers" in await watcher.complaint()
        asked: set[bytes] = set()
        async with asyncio.timeout(PATIENCE):
            while len(asked) < 4:  # different requests: it has tried again several times
                asked.add(await asyncio.get_running_loop().sock_recv(silent, 9000))
        assert await watcher.stop() == (0, "", "")


async def test_when_whoever_reads_stdout_has_gone_it_ends(watch: Watch, node: Process) -> None:
    watcher = await watch(TARGET, "--json", "--bootstrap", node.address)
    async with publisher(node) as server:
        await server.publish(record_name(TARGET), pointer("1"))
        await watcher.event()
        process: Any = watcher.process  # of any type: asyncio lets go of a pipe no other way
        process._transport.get_pipe_transport(1).close()
        await server.publish(record_name(TARGET), pointer("2"))
        async with asyncio.timeout(PATIENCE):
            assert await watcher.process.wait() == 141


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], ["CHANNEL/ARCH", "plasm-dht watch --help"]),
        (["stable"], ["'stable'", "CHANNEL/ARCH"]),
        (["/a\nb"], [r"name '/a\nb'", "control character"]),
        (["/" + "n" * 255], ["256 bytes"]),
        ([TARGET, "--trust", "me"], ["--trust", "'me'"]),
        ([TARGET, "--config", "alone.toml"], ["no DHT node to ask", "--bootstrap"]),
    ],
    ids=lambda value: " ".join(value)[:30],
)
def test_a_mistake_is_one_line_that_names_it(plasm: Run, tmp_path: Path, arguments: list[str], says: list[str]) -> None:
    (tmp_path / "alone.toml").write_text("[provider.dht]\nbootstrap = []\n")
    done = plasm("watch", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("plasm-dht: error: ")
    assert done.stderr.count("\n") == 1
    for part in says:
        assert part in done.stderr
