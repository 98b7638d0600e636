"""The production code on the bench: nothing in it reads another clock, and the same seed gives the same run."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import kademlia.routing
import kademlia.storage
import pytest

from plasm_dht.config import DhtSettings, Settings
from plasm_dht.provider.provider import Provider
from tests.virtual.loop import VirtualLoop
from tests.virtual.network import Conditions, Network
from tests.virtual.nodes import PORT, Nodes, identity

ROOT = Path(__file__).parents[2]
NAME = "/phase/stable/arm64/manifest"


def _forbidden() -> float:
    raise AssertionError("the base library's own clock was read")


async def test_nothing_ages_by_a_clock_that_stands_still_here(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (kademlia.routing, kademlia.storage):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=_forbidden))
    nodes = Nodes(network)
    await nodes.grow(15)
    publisher = await nodes.start([nodes.nodes[0]], identity=identity(1))
    await publisher.publish(NAME, b"v1")
    await asyncio.sleep(600)
    network.observe()
    await asyncio.sleep(1800)
    assert not network.kinds["find_node"] > 200, "no bucket has been idle for an hour yet"
    before = network.kinds["find_node"]
    await asyncio.sleep(3600)
    assert network.kinds["find_node"] - before > 200, "buckets that idled for an hour are refreshed"

    victim = nodes.nodes[5]
    victim.kill()
    await asyncio.sleep(12 * 3600)
    tables = [node.server.protocol.router for node in nodes.alive()]
    knowing = [table for table in tables if (contact := table.find(victim.server.node.id)) and contact.is_stale]
    assert knowing, "a stale contact is kept for a day"
    await asyncio.sleep(14 * 3600)
    assert not [table for table in tables if table.find(victim.server.node.id)]


async def test_a_store_waits_4_s_and_a_missed_one_is_no_missed_answer_of_the_contact(network: Network) -> None:
    nodes = Nodes(network)
    one, other = await nodes.grow(2)
    protocol = one.server.protocol
    contact = protocol.router.find(other.server.node.id)
    other.kill()
    began = network.now
    assert not (await protocol.call_store(contact, bytes(20), b"x"))[0]
    assert (network.now - began, contact.missed) == (pytest.approx(4), 0)
    assert not (await protocol.call_ping(contact))[0]
    assert contact.missed == 1


async def test_a_provider_runs_on_the_bench_as_it_is(network: Network, tmp_path: Path) -> None:
    nodes = Nodes(network)
    await nodes.grow(5)
    target = tmp_path / "stable" / "arm64"
    target.mkdir(parents=True)
    (target / "vmlinuz").write_bytes(b"kernel")
    (target / "VERSION").write_text("1")
    host = network.host()
    settings = Settings(
        name="rack-7",
        artifacts_dir=tmp_path,
        base_url="http://10.1.2.3/boot",
        dht=DhtSettings(host=host.address, port=PORT, bootstrap=(nodes.nodes[0].address,)),
    )
    reader = nodes.nodes[3]
    with host:
        provider = Provider(settings, identity(1), no_http=True, clock=host.clock)
        await host.run(provider.__aenter__())
    first = await reader.get(NAME)
    assert isinstance(first, bytes)
    assert b"http://10.1.2.3/boot/stable/arm64/manifest.json" in first
    await asyncio.sleep(6 * 3600)
    assert await reader.get(NAME) == first, "nothing has changed, so the manifest is the same"
    (target / "VERSION").write_text("2")
    await asyncio.sleep(65)  # the full rescan; here the watcher's thread may be later than that, in virtual time
    second = await reader.get(NAME)
    assert isinstance(second, bytes)
    assert second != first
    await host.run(provider.__aexit__())
    await asyncio.sleep(5)
    assert await reader.get(NAME) is None


SCENARIO = """
import asyncio, random
from tests.virtual.loop import VirtualLoop
from tests.virtual.test_engine import trace_of_a_run
with asyncio.Runner(loop_factory=VirtualLoop) as runner:
    print(runner.run(trace_of_a_run({seed})))
"""


async def trace_of_a_run(seed: int) -> str:
    """The trace of an hour with publishes, losses, a death and a withdrawal."""
    import random

    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    random.seed(seed)
    network = Network(loop, seed=seed, conditions=Conditions(loss=0.05, duplicate=0.02))
    nodes = Nodes(network)
    await nodes.grow(25)
    one = await nodes.start([nodes.nodes[0]], identity=identity(1))
    two = await nodes.start([nodes.nodes[0]], identity=identity(2))
    for number in range(5):
        await one.publish(f"name/{number}", number)
    await two.publish("name/0", b"two")
    nodes.nodes[7].kill()
    await asyncio.sleep(3600)
    await two.withdraw("name/0")
    await nodes.nodes[3].get("name/0")
    await asyncio.sleep(600)
    trace = network.trace
    await network.close()
    return trace


def test_the_same_seed_gives_the_same_run_in_another_process() -> None:
    def run(seed: int, hash_seed: str) -> str:
        environment = os.environ | {"PYTHONHASHSEED": hash_seed}
        command = [sys.executable, "-c", SCENARIO.format(seed=seed)]
        return subprocess.run(
            command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True
        ).stdout.strip()

    assert run(7, "1") == run(7, "2")
    assert run(7, "1") != run(8, "1")


def trace_of_a_datagram(data: bytes) -> str:
    async def send() -> str:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        network = Network(loop)
        host = network.host()
        with host:
            transport, _ = await loop.create_datagram_endpoint(asyncio.DatagramProtocol, local_addr=("0.0.0.0", PORT))
        transport.sendto(data, (host.address, PORT + 1))
        await network.close()
        return network.trace

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(send())


def test_a_trace_tells_what_was_sent_without_the_random_id_of_the_message() -> None:
    assert trace_of_a_datagram(b"\x00" + b"a" * 20 + b"one") == trace_of_a_datagram(b"\x00" + b"b" * 20 + b"one")
    assert trace_of_a_datagram(b"\x00" + b"a" * 20 + b"one") != trace_of_a_datagram(b"\x00" + b"a" * 20 + b"two")
    assert trace_of_a_datagram(b"\x00" + b"a" * 20 + b"one") != trace_of_a_datagram(b"\x01" + b"a" * 20 + b"one")
