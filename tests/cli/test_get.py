"""`plasm-dht get` and `plasm-dht node`: real processes on loopback; the publisher is in this one."""

import asyncio
import json
import re
import signal
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from plasm_dht import Identity, PlasmServer
from plasm_dht.config import format_address, parse_address
from plasm_dht.provider.manifest import Pointer, record_name
from tests.cli.process import SCRIPT, Process, Run, Start

TARGET = "stable/arm64"
URL = "http://127.0.0.1:8080/stable/arm64/manifest.json"
NOBODY = "127.0.0.1:9"  # discard: nobody answers there


@asynccontextmanager
async def publisher(node: Process, value: bytes, identity: Identity | None = None) -> AsyncIterator[PlasmServer]:
    async with PlasmServer(identity=identity or Identity.generate(), record_ttl=60) as server:
        await server.listen(0, "127.0.0.1")
        await server.bootstrap([parse_address(node.address)])
        publication = await server.publish(record_name(TARGET), value)
        assert publication.stored
        yield server


def pointer(url: str = URL) -> bytes:
    return Pointer(url, "2026.1", "rack-7", bytes(range(32)), 1234).encode()


async def get(plasm: Run, node: Process, *options: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    return await asyncio.to_thread(plasm, "get", TARGET, "--bootstrap", node.address, *options, **variables)


async def test_the_url_alone_is_on_stdout(plasm: Run, node: Process) -> None:
    async with publisher(node, pointer()):
        done = await get(plasm, node)
    assert (done.returncode, done.stdout, done.stderr) == (0, URL + "\n", "")


async def test_json_is_one_object_with_everything_that_the_record_says(plasm: Run, node: Process) -> None:
    identity = Identity.generate()
    async with publisher(node, pointer(), identity) as server:
        (record,) = await server.get_records(record_name(TARGET))
        done = await get(plasm, node, "--json")
    assert done.stdout.count("\n") == 1
    found = json.loads(done.stdout)
    assert 50 < found.pop("ttl_remaining") <= 60
    assert found == {
        "key": TARGET,
        "url": URL,
        "version": "2026.1",
        "publisher": identity.publisher_id,
        "provider_name": "rack-7",
        "seq": record.seq,
        "issued_at": record.issued_at,
        "expires_at": record.issued_at + 60_000,
        "manifest_sha256": bytes(range(32)).hex(),
        "trusted": False,
    }


async def test_of_several_publishers_the_freshest_is_printed_and_all_prints_each(plasm: Run, node: Process) -> None:
    async with publisher(node, pointer(URL + "/old")):
        await asyncio.sleep(0.01)
        async with publisher(node, pointer(URL + "/new")):
            assert (await get(plasm, node)).stdout == f"{URL}/new\n"
            assert (await get(plasm, node, "--all")).stdout == f"{URL}/new\n{URL}/old\n"


async def test_trust_leaves_everybody_else_out(plasm: Run, node: Process) -> None:
    identity = Identity.generate()
    async with publisher(node, pointer(URL + "/trusted"), identity):
        await asyncio.sleep(0.01)
        async with publisher(node, pointer(URL + "/stranger")):
            done = await get(plasm, node, "--trust", identity.publisher_id, "--all", "--json")
            found = json.loads(done.stdout)  # one line only
            assert (found["url"], found["trusted"]) == (URL + "/trusted", True)
            nobody = await get(plasm, node, PLASM_DHT_TRUST=Identity.generate().publisher_id)
    assert (nobody.returncode, nobody.stdout) == (1, "")
    assert "of a trusted publisher" in nobody.stderr


async def test_the_trust_list_is_the_flags_then_the_variables_then_the_files(
    plasm: Run, node: Process, tmp_path: Path
) -> None:
    identity, other = Identity.generate(), Identity.generate().publisher_id
    ours = identity.publisher_id
    for name, publishers in (("ours", ours), ("other", other)):
        (tmp_path / f"{name}.toml").write_text(f'[trust]\npublishers = ["{publishers}"]')
    async with publisher(node, pointer(), identity):
        assert (await get(plasm, node, "--config", "ours.toml")).returncode == 0
        assert (await get(plasm, node, "--config", "other.toml")).returncode == 1
        assert (await get(plasm, node, "--config", "other.toml", PLASM_DHT_TRUST=ours)).returncode == 0
        assert (await get(plasm, node, "--config", "ours.toml", "--trust", other, PLASM_DHT_TRUST=ours)).returncode == 1


async def test_a_value_that_is_no_pointer_is_skipped_with_a_warning(plasm: Run, node: Process) -> None:
    identity = Identity.generate()
    async with publisher(node, pointer()):
        await asyncio.sleep(0.01)
        async with publisher(node, b"something else", identity):
            done = await get(plasm, node)
    assert (done.returncode, done.stdout) == (0, URL + "\n")
    assert f"WARNING plasm_dht_cli.asking: skipping the record of {identity.publisher_id}" in done.stderr
    assert done.stderr.count("\n") == 1


async def test_what_was_withdrawn_is_not_found(plasm: Run, node: Process) -> None:
    async with publisher(node, pointer()):
        assert (await get(plasm, node)).returncode == 0
    done = await get(plasm, node)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"plasm-dht: error: not found: .*stable/arm64\n", done.stderr)


async def test_wait_finds_what_is_published_later(environment: dict[str, str], node: Process) -> None:
    command = ("get", TARGET, "--bootstrap", node.address, "--wait", "30", "-v")
    streams = {"stdout": asyncio.subprocess.PIPE, "stderr": asyncio.subprocess.PIPE}
    waiting = await asyncio.create_subprocess_exec(SCRIPT, *command, env=environment, **streams)
    assert waiting.stderr is not None
    async with asyncio.timeout(30):
        async for line in waiting.stderr:
            if b"not found yet: trying again" in line:
                break
    async with publisher(node, pointer()):
        stdout, _ = await waiting.communicate()
    assert (waiting.returncode, stdout.decode()) == (0, URL + "\n")


@pytest.mark.parametrize("options", [("--timeout", "0.5"), ("--wait", "1")], ids=" ".join)
def test_where_nobody_answers_the_exit_code_is_3(plasm: Run, options: tuple[str, ...]) -> None:
    done = plasm("get", TARGET, "--bootstrap", NOBODY, *options)
    assert (done.returncode, done.stdout) == (3, "")
    assert f"no DHT node answered at {NOBODY}" in done.stderr
    assert done.stderr.count("plasm-dht: error") == 1


async def test_a_dead_bootstrap_address_does_not_hide_a_live_one(plasm: Run, node: Process) -> None:
    async with publisher(node, pointer()):
        done = await get(plasm, node, "--bootstrap", NOBODY, "--timeout", "3")
    assert (done.returncode, done.stdout) == (0, URL + "\n")


def test_a_node_says_where_it_listens_and_who_it_is(node: Process, plasm: Run, tmp_path: Path) -> None:
    shown = plasm("key", "show", "--state-dir", tmp_path / "node").stdout.strip()
    assert node.line == f"ready dht={node.address} http=- publisher={shown}\n"
    assert parse_address(node.address)[1] > 0
    assert format_address(parse_address(node.address)) == node.address


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_node_that_is_told_to_stop_exits_with_0(node: Process, number: int) -> None:
    node.process.send_signal(number)
    _, stderr = node.process.communicate(timeout=10)
    assert node.process.returncode == 0
    assert "Traceback" not in stderr


def test_a_port_in_use_is_one_line(start: Start, node: Process, tmp_path: Path) -> None:
    port = node.address.rpartition(":")[2]
    second = start("node", "--port", port, "--state-dir", tmp_path / "second", "--log-format", "json", "-q")
    _, stderr = second.process.communicate(timeout=10)
    assert second.process.returncode == 2
    assert f"127.0.0.1:{port}" in stderr
    assert stderr.startswith("plasm-dht: error: ")
    assert stderr.count("\n") == 1
