"""`plasm-dht publish`: real processes and signals on loopback; who looks is in this process."""

import asyncio
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from plasm_dht import PlasmServer
from plasm_dht.config import parse_address
from plasm_dht.record import Record
from tests.cli.process import SCRIPT, Process, Run

NAME = "/site/leader"
NOBODY = "127.0.0.1:9"  # discard: nobody answers there
LINE = re.compile(r"published seq=(\d+) expires_at=(\d+) holders=(\d+) publisher=(ed25519:[0-9a-f]{64})\n")

Publish = Callable[..., Process]


@pytest.fixture
def publish(environment: dict[str, str], tmp_path: Path) -> Iterator[Publish]:
    """Start `plasm-dht publish` and wait for its line; what still runs at the end is killed."""
    processes: list[subprocess.Popen[str]] = []

    def start(*arguments: str | Path) -> Process:
        process = subprocess.Popen(
            [SCRIPT, "publish", "--host", "127.0.0.1", *arguments],
            env=environment,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        assert process.stdout is not None
        return Process(process, process.stdout.readline())

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@asynccontextmanager
async def reader(node: Process) -> Any:
    async with PlasmServer(node_id=bytes(20)) as server:
        await server.listen(0, "127.0.0.1")
        assert await server.bootstrap([parse_address(node.address)])
        yield server


async def records(node: Process, name: str = NAME) -> list[Record]:
    async with reader(node) as server:
        return list(await server.get_records(name))


async def test_the_record_is_there_when_the_line_says_so_and_says_what_the_line_says(
    publish: Publish, node: Process
) -> None:
    process = await asyncio.to_thread(publish, NAME, "10.0.0.7:5432", "--bootstrap", node.address)
    match = LINE.fullmatch(process.line)
    assert match, process.line
    (record,) = await records(node)
    seq, expires_at, holders, publisher = match.groups()
    assert (record.value, record.publisher) == ("10.0.0.7:5432", publisher)
    assert (record.seq, record.expires_at, 1) == (int(seq), int(expires_at), int(holders))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_takes_the_record_back_within_three_seconds(
    publish: Publish, node: Process, number: int
) -> None:
    process = await asyncio.to_thread(publish, NAME, "here", "--bootstrap", node.address)
    assert await records(node)
    began = time.monotonic()
    code, stderr = await asyncio.to_thread(process.stop, number)
    assert time.monotonic() - began < 3.5
    assert (code, stderr) == (0, "")
    assert await records(node) == []


async def test_it_is_kept_alive_beyond_its_ttl_and_a_killed_ones_expires(publish: Publish, node: Process) -> None:
    options = ("--record-ttl", "2", "--bootstrap", node.address)
    process = await asyncio.to_thread(publish, NAME, "here", *options)
    match = LINE.fullmatch(process.line)
    assert match
    async with reader(node) as server:
        seqs = set()
        while time.time() < int(match[2]) / 1000 + 0.5:  # past the end of its first life, and at no moment gone
            (record,) = await server.get_records(NAME)
            seqs.add(record.seq)
        assert len(seqs) > 1
        await asyncio.to_thread(process.stop, signal.SIGKILL)
        killed = time.time()
        async with asyncio.timeout(10):
            while await server.get_records(NAME):
                pass
    assert time.time() < killed + 2.5  # whatever it signed last has ended


async def test_without_withdraw_it_is_left_to_expire(publish: Publish, node: Process) -> None:
    process = await asyncio.to_thread(publish, NAME, "here", "--no-withdraw", "--bootstrap", node.address)
    assert (await asyncio.to_thread(process.stop, signal.SIGTERM))[0] == 0
    assert [record.value for record in await records(node)] == ["here"]


async def test_without_any_node_it_says_so_and_pushes_as_soon_as_there_is_one(publish: Publish) -> None:
    async with PlasmServer() as first:
        await first.listen(0, "127.0.0.1")
        host, port = first.address
    process = await asyncio.to_thread(publish, NAME, "here", "--bootstrap", f"{host}:{port}")
    match = LINE.fullmatch(process.line)
    assert match
    assert match[3] == "0"
    async with PlasmServer() as late:
        await late.listen(port, host)
        async with asyncio.timeout(15):
            assert await anext(late.watch(NAME))
        assert await late.get(NAME) == "here"
        code, stderr = await asyncio.to_thread(process.stop, signal.SIGTERM)
        assert code == 0
    assert f"no other node holds {NAME!r} yet" in stderr
    assert "Traceback" not in stderr


async def test_json_says_what_became_of_it(publish: Publish, node: Process) -> None:
    process = await asyncio.to_thread(publish, NAME, "here", "--json", "--bootstrap", node.address)
    said = json.loads(process.line)
    (record,) = await records(node)
    assert said == {
        "name": NAME,
        "publisher": record.publisher,
        "seq": record.seq,
        "expires_at": record.expires_at,
        "holders": 1,
        "refused": {},
    }


# -- once ------------------------------------------------------------------------------------------------------------


async def test_once_sets_it_and_leaves(plasm: Run, node: Process) -> None:
    options = ("--once", "--host", "127.0.0.1", "--bootstrap", node.address, "--record-ttl", "60")
    done = await asyncio.to_thread(plasm, "publish", "any name, even ünusual", *options, "--json", "--", "-5 °C")
    assert (done.returncode, done.stderr) == (0, "")
    (record,) = await records(node, "any name, even ünusual")
    assert record.value == "-5 °C"
    assert json.loads(done.stdout)["seq"] == record.seq
    assert record.expires_at - record.issued_at == 60_000
    again = await asyncio.to_thread(plasm, "publish", "any name, even ünusual", "warmer", *options)
    assert LINE.fullmatch(again.stdout), again
    (later,) = await records(node, "any name, even ünusual")
    assert (later.value, later.publisher) == ("warmer", record.publisher), "the identity is kept between runs"
    assert later.seq > record.seq


def test_once_without_any_node_exits_with_3(plasm: Run) -> None:
    done = plasm("publish", NAME, "here", "--once", "--host", "127.0.0.1", "--bootstrap", NOBODY)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == (
        f"plasm-dht: error: no DHT node answered at {NOBODY}: name one that runs with --bootstrap HOST:PORT\n"
    )


async def test_once_that_every_node_refuses_exits_with_1_and_says_why(plasm: Run) -> None:
    async with PlasmServer(max_ttl=30) as strict:
        await strict.listen(0, "127.0.0.1")
        host, port = strict.address
        options = ("--once", "--host", "127.0.0.1", "--bootstrap", f"{host}:{port}", "--record-ttl", "60")
        done = await asyncio.to_thread(plasm, "publish", NAME, "here", *options)
    assert (done.returncode, done.stdout) == (1, "")
    assert "refused '/site/leader': ttl_too_long (2)" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_once_that_is_interrupted_does_not_say_that_it_was_done(environment: dict[str, str]) -> None:
    command = [SCRIPT, "publish", NAME, "here", "--once", "--host", "127.0.0.1", "--bootstrap", NOBODY, "-v"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        process.stderr.readline()  # it listens
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=15)
    assert (process.returncode, out) == (130, b"")


# -- settings --------------------------------------------------------------------------------------------------------


async def test_it_runs_beside_a_node_of_the_same_state_directory_at_a_port_of_its_own(
    publish: Publish, node: Process, tmp_path: Path
) -> None:
    (tmp_path / "bootstrap.toml").write_text(f'[provider.dht]\nbootstrap = ["{node.address}"]\n')
    options = ("--config", "bootstrap.toml", "--state-dir", tmp_path / "node")
    process = await asyncio.to_thread(publish, NAME, "here", *options)
    said = LINE.fullmatch(process.line)
    assert said, process.process.communicate()
    assert node.line.endswith(f" publisher={said[4]}\n")


def test_a_port_that_the_file_names_is_used(plasm: Run, node: Process, tmp_path: Path) -> None:
    port = node.address.rpartition(":")[2]
    (tmp_path / "port.toml").write_text(f"[provider.dht]\nport = {port}\n")
    done = plasm("publish", NAME, "here", "--host", "127.0.0.1", "--config", "port.toml")
    assert (done.returncode, done.stdout) == (2, "")
    assert f"UDP 127.0.0.1:{port} cannot be bound" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], ["NAME", "plasm-dht publish --help"]),
        ([NAME], ["VALUE", "plasm-dht publish --help"]),
        (["", "x"], ["name ''", "1 to 255"]),
        (["a\nb", "x"], [r"name 'a\nb'", "control character"]),
        (["n" * 256, "x"], ["256 bytes", "1 to 255"]),
        ([NAME, "v" * 1000], [NAME, "at most 1000 fit", "shorten"]),
        ([NAME, "x", "--record-ttl", "0"], ["--record-ttl", "'0'", "1 to 604800"]),
        ([NAME, "x", "--port", "http"], ["--port", "'http'"]),
        ([NAME, "x", "--identity", "."], ["key file ."]),
    ],
    ids=lambda value: " ".join(value)[:30],
)
def test_a_mistake_is_one_line_that_names_it(plasm: Run, arguments: list[str], says: list[str]) -> None:
    done = plasm("publish", *arguments, "--bootstrap", NOBODY)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("plasm-dht: error: ")
    assert done.stderr.count("\n") == 1
    for part in says:
        assert part in done.stderr
