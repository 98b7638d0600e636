"""Nodes that come late, restart or are stock: what is advertised is found through them, or one line says why not."""

import asyncio
import socket
import sys
import time
from pathlib import Path

import pytest

from plasm_dht.config import parse_address
from plasm_dht.provider.manifest import Pointer
from tests.e2e.world import PATIENCE, TARGET, Running, World, ask, held, note, observe, soon, together, until

STOCK = Path(__file__).with_name("stock.py")


async def stock(world: World, host: str, *arguments: str) -> Running:
    """A stock kademlia node; its address is in `dht`."""
    running = await world.start(sys.executable, STOCK, host, *arguments, PYTHONWARNINGS="default")
    assert running.process.stdout is not None
    async with asyncio.timeout(PATIENCE):
        running.dht = (await running.process.stdout.readline()).decode().strip()
    assert running.dht.startswith(f"{host}:"), running.stderr
    return running


async def test_nodes_and_providers_may_start_and_restart_in_any_order(world: World, artifacts: Path) -> None:
    await together(
        nodes_that_join_a_lonely_provider_hold_its_record(world, artifacts),
        a_provider_that_starts_before_its_bootstrap_node_is_found_there_soon(world, artifacts),
        a_bootstrap_node_that_restarts_holds_the_record_again(world, artifacts),
        bootstrap_takes_host_names_several_addresses_and_its_own(world, artifacts),
    )


async def nodes_that_join_a_lonely_provider_hold_its_record(world: World, artifacts: Path) -> None:
    provider = await world.provider("127.0.0.11", artifacts)
    record = await ask(provider)
    assert record is not None
    node = await world.node("127.0.0.10", joins=provider.dht)
    await soon(lambda: held(node), within=10)
    later = await world.node("127.0.0.12", joins=node.dht)
    await soon(lambda: held(later), within=10)
    await asyncio.gather(provider.kill(), node.kill())
    assert await ask(later) == record


async def a_provider_that_starts_before_its_bootstrap_node_is_found_there_soon(world: World, artifacts: Path) -> None:
    with socket.socket(type=socket.SOCK_DGRAM) as free:
        free.bind(("127.0.0.20", 0))
        port = free.getsockname()[1]
    provider = await world.provider("127.0.0.21", artifacts, joins=f"127.0.0.20:{port}")
    assert await ask(provider)
    node = await world.node("127.0.0.20", port=port)
    assert await soon(lambda: ask(node), within=10)
    assert "no bootstrap node answered" in provider.stderr
    assert "joined the network" in provider.stderr


async def a_bootstrap_node_that_restarts_holds_the_record_again(world: World, artifacts: Path) -> None:
    node = await world.node("127.0.0.30")
    provider = await world.provider("127.0.0.31", artifacts, "--record-ttl", "6", joins=node.dht)
    first = await ask(node)
    assert first is not None
    assert (await node.stop()).code == 0
    again = await world.node("127.0.0.30", port=parse_address(node.dht)[1])
    await soon(lambda: held(again), within=8)  # the next refresh brings it, at the latest
    found = await ask(again)
    assert found is not None
    assert found.seq >= first.seq
    await provider.stop()
    assert await ask(again) is None


async def bootstrap_takes_host_names_several_addresses_and_its_own(world: World, artifacts: Path) -> None:
    node = await world.node("127.0.0.1")
    port = parse_address(node.dht)[1]
    names = ("--bootstrap", "127.0.0.99:9", "--bootstrap", "no-such-host.invalid:8468")
    provider = await world.provider("127.0.0.41", artifacts, *names, joins=f"localhost:{port}")
    done = await world.get(f"localhost:{port}")
    assert (done.code, done.stdout) == (0, f"http://{provider.http}/{TARGET}/manifest.json\n")
    known = parse_address(provider.dht)[1]
    await provider.stop()
    itself = await world.provider(
        "127.0.0.41", artifacts, "--bootstrap", node.dht, joins=f"127.0.0.41:{known}", port=known
    )
    assert await ask(node)
    assert "127.0.0.41" not in itself.stderr.split("listens on", 1)[1].split("\n", 1)[1]


async def test_get_says_in_one_line_why_there_is_nothing(world: World) -> None:
    node = await world.node("127.0.0.10")
    nobody = "127.0.0.99:9"
    stranger = "ed25519:" + "1" * 64
    cases = {
        (TARGET, "--bootstrap", node.dht): 1,
        (TARGET, "--bootstrap", node.dht, "--trust", stranger, "--all", "--json", "--wait", "0.5"): 1,
        (TARGET, "--bootstrap", nobody, "--wait", "1"): 3,
        (TARGET, "--bootstrap", "no-such-host.invalid:8468", "--timeout", "1", "-q"): 3,
        ("Stable/arm64", "--bootstrap", node.dht): 2,
        ("stable/arm64/../x\n", "--bootstrap", node.dht): 2,
        (TARGET, "--bootstrap", "127.0.0.10"): 2,
        (TARGET, "--config", "no-such-file.toml"): 2,
    }
    running = asyncio.Semaphore(3)

    async def get(*arguments: str) -> tuple[int, str, int]:
        async with running:
            done = await world.run("get", *arguments)
        return done.code, done.stdout, done.stderr.count("\n")

    found = dict(zip(cases, await asyncio.gather(*(get(*arguments) for arguments in cases)), strict=True))
    assert found == {arguments: (code, "", 1) for arguments, code in cases.items()}


async def test_stock_nodes_between_provider_and_client_carry_the_record_and_cannot_prolong_it(
    world: World, artifacts: Path
) -> None:
    first = await stock(world, "127.0.0.40")
    second = await stock(world, "127.0.0.41", first.dht)
    third = await stock(world, "127.0.0.42", second.dht, f"/phase/{TARGET}/manifest")
    provider = await world.provider("127.0.0.11", artifacts, "--record-ttl", "3", joins=first.dht)
    done = await world.get(third)
    assert (done.code, done.stdout) == (0, f"http://{provider.http}/{TARGET}/manifest.json\n")
    record = await ask(third)
    assert record is not None
    sightings = await observe(third, record.expires_at / 1000 + 0.5)
    assert all(sighting.record for sighting in sightings)
    await provider.kill()
    last = await ask(third)
    assert last is not None
    assert last.seq > record.seq
    await until(last.expires_at / 1000)
    assert await asyncio.gather(ask(first), ask(second), ask(third)) == [None] * 3
    # it comes back, and what the stock nodes still have of it does no harm
    again = await world.provider("127.0.0.11", artifacts, joins=first.dht)
    assert Pointer.decode((await soon(lambda: ask(third))).value).url.startswith(f"http://{again.http}/")
    await again.stop()
    assert await asyncio.gather(ask(first), ask(second), ask(third)) == [None] * 3


async def test_what_is_not_of_this_machine_or_taken_is_said_in_one_line_and_a_port_of_0_picks_one(
    world: World, artifacts: Path
) -> None:
    node = await world.node("127.0.0.10")
    provider = await world.provider("127.0.0.11", artifacts, joins=node.dht)
    dht, http = (str(parse_address(address)[1]) for address in (provider.dht, provider.http))
    assert 0 not in (int(dht), int(http))
    serve = ("serve", "--artifacts", artifacts, "--host", "127.0.0.11", "--http-host", "127.0.0.11", "-q")
    own = [("--state-dir", world.folder / f"own-{number}") for number in range(6)]  # one process at a time has a state
    dones = await asyncio.gather(
        world.run(*serve, "--port", dht, "--http-port", "0", *own[0]),
        world.run(*serve, "--port", "0", "--http-port", http, *own[1]),
        world.run("node", "--host", "127.0.0.11", "--port", dht, *own[2]),
    )
    for done, address in zip(dones, (provider.dht, provider.http, provider.dht), strict=True):
        assert (done.code, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert address in done.stderr
    dones = await asyncio.gather(
        world.run("node", "--host", "192.0.2.1", "--port", "0", "-q", *own[3]),
        world.run("serve", "--artifacts", "no-such-folder", "--host", "127.0.0.11", "--port", "0", "-q", *own[4]),
        world.run("serve", "--artifacts", artifacts, "--identity", artifacts / TARGET / "vmlinuz", *own[5]),
    )
    for done, wrong in zip(dones, ("192.0.2.1", "no-such-folder", "vmlinuz"), strict=True):
        assert (done.code, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert wrong in done.stderr
    assert await ask(node)


async def test_two_terminals_on_one_machine_just_work(world: World, artifacts: Path) -> None:
    serve = ("serve", "--artifacts", artifacts, "--host", "127.0.0.1", "--http-host", "127.0.0.1")
    provider = await world.start(*serve, "--http-port", "0", "--state-dir", world.folder / "own")
    line = (await provider.process.stdout.readline()).decode() if provider.process.stdout else ""
    if not line and "127.0.0.1:8468" in provider.stderr:
        pytest.skip("UDP 127.0.0.1:8468, the default, is in use on this machine")
    assert line.startswith("ready dht=127.0.0.1:8468 ")
    began = time.time()
    done = await world.run("get", TARGET)
    assert (done.code, done.stderr) == (0, "")
    assert done.stdout.endswith(f"/{TARGET}/manifest.json\n")
    note(f"get took {time.time() - began:.2f} s")
