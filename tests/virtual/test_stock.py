"""Stock kademlia runs on the bench unmodified, the same for the same seed."""

import asyncio
import os
import random
import subprocess
import sys
from pathlib import Path

from kademlia.network import Server
from kademlia.storage import ForgetfulStorage
from kademlia.utils import digest

from tests.virtual.host import Host
from tests.virtual.loop import VirtualLoop
from tests.virtual.network import Conditions, Network

ROOT = Path(__file__).parents[2]


async def servers(network: Network, count: int) -> list[tuple[Host, Server]]:
    """Stock kademlia nodes that know each other; few hold a value."""
    nodes = []
    for _ in range(count):
        host, server = network.host(), Server(ksize=5)
        await host.run(server.listen(8468))
        nodes.append((host, server))
    for host, server in nodes[1:]:
        await host.run(server.bootstrap([(nodes[0][0].address, 8468)]))
    return nodes


def without(nodes: list[tuple[Host, Server]], name: str) -> list[tuple[Host, Server]]:
    """The nodes that do not hold `name`, so must ask others."""
    return [(host, server) for host, server in nodes if server.storage.get(digest(name)) is None]


async def test_stock_nodes_find_each_others_values(network: Network) -> None:
    network.conditions = Conditions(duplicate=0.05)
    nodes = await servers(network, 20)
    network.observe()
    assert await nodes[3][0].run(nodes[3][1].set("name", "value"))
    reader, asker = without(nodes, "name")[0]
    started = network.now
    assert await reader.run(asker.get("name")) == "value"
    assert 0.04 < network.now - started < 5
    assert {"find_node", "find_value", "store", "reply"} <= set(network.kinds)
    assert network.kinds.total() == len(network.record)
    assert max(size for *_, size in network.record) <= network.largest < 1232


async def test_stock_nodes_find_values_among_dead_neighbours(network: Network) -> None:
    nodes = await servers(network, 20)
    assert await nodes[0][0].run(nodes[0][1].set("name", "value"))
    readers = without(nodes, "name")
    holders = [node for node in nodes if node not in readers]
    for host, _ in readers[1:] + holders[2:]:
        host.kill()
    reader, asker = readers[0]
    assert await reader.run(asker.get("name")) == "value"
    assert network.lost["nobody"]


async def test_stock_nodes_find_values_through_loss(network: Network) -> None:
    network.conditions = Conditions(loss=0.1)
    nodes = await servers(network, 20)
    await nodes[0][0].run(nodes[0][1].set("name", "value"))
    found = [await host.run(server.get("name")) for host, server in without(nodes, "name")]
    assert found.count("value") > len(found) / 2
    assert network.lost["loss"]


async def test_stock_nodes_find_nothing_across_a_partition(network: Network) -> None:
    nodes = await servers(network, 20)
    here, there = nodes[:10], nodes[10:]
    network.partition([host for host, _ in here])
    await here[0][0].run(here[0][1].set("name", "value"))
    for (host, server), found in [(without(here, "name")[0], "value"), (there[0], None)]:
        assert await host.run(server.get("name")) == found


async def test_stock_storage_never_ages_here_because_it_reads_a_clock_itself(network: Network) -> None:
    storage = ForgetfulStorage(ttl=60)
    storage[b"key"] = "value"
    await asyncio.sleep(86_400)
    assert storage.get(b"key") == "value", "it forgets now: say so in STYLE.md and let the scenarios use it"


# The same seed.

PROGRAM = """
import asyncio, random, sys
from tests.virtual.loop import VirtualLoop
from tests.virtual.network import Conditions, Network
from tests.virtual.test_stock import trace_of
with asyncio.Runner(loop_factory=VirtualLoop) as runner:
    print(runner.run(trace_of(int(sys.argv[1]))))
"""


async def trace_of(seed: int) -> str:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    random.seed(seed)
    network = Network(loop, seed=seed, conditions=Conditions(loss=0.1, duplicate=0.1, reorder=0.1))
    nodes = await servers(network, 12)
    await nodes[1][0].run(nodes[1][1].set("name", "value"))
    nodes[2][0].kill()
    await nodes[5][0].run(nodes[5][1].get("name"))
    await asyncio.sleep(3600)
    trace = network.trace
    await network.close()
    return trace


def test_the_same_seed_gives_the_same_trace_in_another_process() -> None:
    def run(seed: int, hash_seed: str) -> str:
        return subprocess.run(
            [sys.executable, "-c", PROGRAM, str(seed)],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
        ).stdout

    one, same, other = run(1, "1"), run(1, "2"), run(2, "1")
    assert one == same
    assert one != other
