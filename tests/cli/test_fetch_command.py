"""`plasm-dht fetch`: a real process and a real node on loopback; the publishers are in this process."""

import asyncio
import os
import pty
import signal
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from plasm_dht import Identity, PlasmServer
from plasm_dht.config import parse_address
from plasm_dht.provider.manifest import record_name
from plasm_dht_cli import exits
from tests.cli.process import SCRIPT, Process, Run
from tests.provider.shop import HALF, KERNEL, TARGET, Shop, opened, stalls

NOBODY = "127.0.0.1:9"  # discard: nobody answers there


@asynccontextmanager
async def advertised(node: Process, shop: Shop) -> AsyncIterator[Shop]:
    """A publisher, its files, and its record on the DHT."""
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(opened(shop))
        server = await stack.enter_async_context(PlasmServer(identity=shop.identity, record_ttl=60))
        await server.listen(0, "127.0.0.1")
        await server.bootstrap([parse_address(node.address)])
        assert (await server.publish(record_name(TARGET), shop.pointer())).stored
        yield shop


async def fetch(plasm: Run, node: Process, *options: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    return await asyncio.to_thread(
        plasm, "fetch", TARGET, "-o", "out", "--bootstrap", node.address, *options, **variables
    )


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*") if path.suffix != ".part"}


async def test_the_path_of_the_manifest_alone_is_on_stdout(plasm: Run, node: Process, tmp_path: Path) -> None:
    async with advertised(node, Shop()) as shop:
        done = await fetch(plasm, node)
    assert (done.returncode, done.stdout) == (0, "out/manifest.json\n")
    assert content(tmp_path / "out") == shop.files | {"manifest.json": shop.manifest()}


async def test_where_there_is_no_terminal_it_says_a_line_a_file_and_quietly_nothing(plasm: Run, node: Process) -> None:
    async with advertised(node, Shop()) as shop:
        first = await fetch(plasm, node)
        again = await fetch(plasm, node, "--log-format", "json")
        quiet = await fetch(plasm, node, "-q")
    lines = first.stderr.splitlines()
    assert len(lines) == 3
    assert all(" INFO plasm_dht_cli.fetch: " in line and line.isprintable() for line in lines)
    assert any(line.endswith(f"vmlinuz: {len(KERNEL)} bytes, verified") for line in lines)
    assert lines[-1].endswith(f"{TARGET}: version 1 of {shop.identity.publisher_id}, 2 files")
    assert all(line.startswith("{") for line in again.stderr.splitlines())
    assert again.stderr.count("was here") == 2
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "out/manifest.json\n", "")


async def test_on_a_terminal_it_draws_a_bar_a_file_and_keeps_stdout_clean(
    environment: dict[str, str], node: Process, tmp_path: Path
) -> None:
    ours, theirs = pty.openpty()
    shop = Shop(files={"[red]kernel": KERNEL})
    async with advertised(node, shop):
        document = shop.document()
        document["artifacts"]["[red]kernel"]["urls"] = [f"{shop.url}/%5Bred%5Dkernel"]
        async with republished(node, shop, document):
            process = await asyncio.create_subprocess_exec(
                *(SCRIPT, "fetch", TARGET, "-o", "out", "--bootstrap", node.address),
                env=environment | {"TERM": "xterm"},
                cwd=tmp_path,
                stdout=subprocess.PIPE,
                stderr=theirs,
            )
            os.close(theirs)
            drawn, (stdout, _) = await asyncio.gather(asyncio.to_thread(read_all, ours), process.communicate())
    assert (process.returncode, stdout) == (0, b"out/manifest.json\n")
    assert "\x1b[" in drawn
    assert "[red]kernel" in drawn
    assert "1.0/1.0 MiB" in drawn
    assert "INFO" not in drawn


@asynccontextmanager
async def republished(node: Process, shop: Shop, document: dict[str, object]) -> AsyncIterator[None]:
    shop.answers["manifest.json"] = manifest = shop.manifest(document)
    async with PlasmServer(identity=shop.identity, record_ttl=60) as server:
        await server.listen(0, "127.0.0.1")
        await server.bootstrap([parse_address(node.address)])
        await server.publish(record_name(TARGET), shop.pointer(manifest))
        yield


def read_all(terminal: int) -> str:
    """What is drawn on a terminal until nobody has it open any more."""
    drawn = b""
    while True:
        try:
            chunk = os.read(terminal, 65536)
        except OSError:  # Linux says EIO for that
            chunk = b""
        if not chunk:
            os.close(terminal)
            return drawn.decode()
        drawn += chunk


def wait_for(part: Path) -> None:
    """Wait until half of the kernel is on the disk."""
    deadline = time.monotonic() + 30
    while not part.exists() or part.stat().st_size < HALF:
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
async def test_what_is_interrupted_goes_on_the_next_time(
    plasm: Run, node: Process, environment: dict[str, str], tmp_path: Path, number: int
) -> None:
    shop = Shop(files={"vmlinuz": KERNEL})
    shop.answers["vmlinuz"] = stalls(KERNEL, HALF, asyncio.Event())
    part = tmp_path / "out" / "vmlinuz.part"
    async with advertised(node, shop):
        process = await asyncio.create_subprocess_exec(
            *(SCRIPT, "fetch", TARGET, "-o", "out", "--bootstrap", node.address, "-q"), env=environment, cwd=tmp_path
        )
        await asyncio.to_thread(wait_for, part)
        process.send_signal(number)
        code = await process.wait()
        assert code == (exits.INTERRUPTED if number == signal.SIGINT else -number)
        assert content(tmp_path / "out") == {}
        shop.answers.clear()
        assert (await fetch(plasm, node)).returncode == 0
    assert shop.asked("vmlinuz") == [None, f"bytes={HALF}-"]
    assert content(tmp_path / "out") == shop.files | {"manifest.json": shop.manifest()}


@pytest.mark.parametrize("name", ["vmlinuz", "manifest.json"])
async def test_what_is_not_what_was_signed_is_4_and_nothing_looks_finished(
    plasm: Run, node: Process, tmp_path: Path, name: str
) -> None:
    async with advertised(node, Shop()) as shop:
        shop.answers[name] = b"?" * len(KERNEL if name == "vmlinuz" else shop.manifest())
        done = await fetch(plasm, node, "-q")
    assert (done.returncode, done.stdout) == (exits.VERIFICATION_FAILED, "")
    assert done.stderr.startswith(f"plasm-dht: error: {shop.url}/{name} is not what ")
    assert done.stderr.count("\n") == 1
    assert content(tmp_path / "out") == {}


async def test_the_next_publisher_is_taken_and_with_trust_only_the_trusted(plasm: Run, node: Process) -> None:
    honest, liar = Shop(), Shop()
    async with advertised(node, honest):
        await asyncio.sleep(0.01)
        async with advertised(node, liar):
            liar.answers["manifest.json"] = b"?"
            done = await fetch(plasm, node)
            trusted = await fetch(plasm, node, "-q", "--trust", liar.identity.publisher_id)
            nobody = await fetch(plasm, node, PLASM_DHT_TRUST=Identity.generate().publisher_id)
    assert done.returncode == 0
    assert f"trying {honest.url}/manifest.json of {honest.identity.publisher_id}" in done.stderr
    assert (trusted.returncode, nobody.returncode) == (exits.VERIFICATION_FAILED, exits.NOT_FOUND)


async def test_nothing_to_fetch_is_1_and_nobody_to_ask_is_3(plasm: Run, node: Process) -> None:
    nothing = await fetch(plasm, node)
    assert (nothing.returncode, nothing.stdout) == (exits.NOT_FOUND, "")
    assert nothing.stderr == f"plasm-dht: error: not found: no live record for {TARGET}\n"
    async with advertised(node, Shop()) as shop:
        shop.answers["manifest.json"] = b""
        async with PlasmServer(identity=shop.identity, record_ttl=60) as server:
            await server.listen(0, "127.0.0.1")
            await server.bootstrap([parse_address(node.address)])
            shop.url = f"http://{NOBODY}"
            await server.publish(record_name(TARGET), shop.pointer())
            gone = await fetch(plasm, node)
    assert (gone.returncode, gone.stdout) == (exits.NOT_FOUND, "")
    assert f"http://{NOBODY}/manifest.json: cannot connect" in gone.stderr
    alone = await asyncio.to_thread(plasm, "fetch", TARGET, "-o", "out", "--bootstrap", NOBODY, "--timeout", "0.5")
    assert (alone.returncode, alone.stdout) == (exits.NO_NODE, "")
    assert f"no DHT node answered at {NOBODY}" in alone.stderr


async def test_a_folder_that_cannot_be_used_is_one_line(plasm: Run, node: Process, tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    async with advertised(node, Shop()):
        done = await fetch(plasm, node)
    assert (done.returncode, done.stdout) == (exits.USAGE, "")
    assert done.stderr.startswith("plasm-dht: error: out cannot be used: File exists;")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["stable", "-o", "x"], ["'stable'", "CHANNEL/ARCH"]),
        ([TARGET], ["-o DIR", "PLASM_DHT_OUTPUT"]),
        ([TARGET, "-o", ""], ["-o DIR"]),
        ([TARGET, "-o", "x", "--timeout", "0"], ["--timeout", "'0'", "at least 0.1"]),
        ([TARGET, "-o", "x", "--wait", "-1"], ["--wait", "'-1'"]),
        ([TARGET, "-o", "x", "--trust", "me"], ["--trust", "'me'"]),
        ([TARGET, "-o", "x", "-v", "-q"], ["--verbose", "--quiet"]),
    ],
)
def test_a_mistake_is_one_line_and_makes_no_folder(
    plasm: Run, tmp_path: Path, arguments: list[str], says: list[str]
) -> None:
    done = plasm("fetch", *arguments)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (exits.USAGE, "", 1)
    assert all(part in done.stderr for part in says)
    assert not (tmp_path / "x").exists()
