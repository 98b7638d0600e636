"""What a lookup finds, how long it takes and how many datagrams it costs, when a share of all nodes has just died.

Times are virtual, so nothing here depends on the machine. `python -m tests.virtual.lookups` prints the figures.
"""

import asyncio
from collections.abc import AsyncIterator

import pytest
from kademlia.node import Node

from plasm_dht.clock import Clock
from plasm_dht.dht.protocol import PlasmProtocol
from plasm_dht.dht.routing import Contact, PlasmRoutingTable
from plasm_dht.dht.wire import Outcome
from tests.dht.support import ManualClock
from tests.virtual import lookups
from tests.virtual.lookups import PUBLISHERS, Tap
from tests.virtual.loop import VirtualLoop
from tests.virtual.network import Conditions, Network
from tests.virtual.nodes import Nodes, identity

NAMES = [lookups.name_of(number) for number in range(PUBLISHERS)]


@pytest.fixture
async def tap(network: Network, virtual_seed: int) -> AsyncIterator[Tap]:
    """The simulated network, and what every datagram is for."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    tap = Tap(loop, seed=virtual_seed)
    yield tap
    await tap.close()


async def test_with_everybody_alive_lookups_are_exact_and_cheap(tap: Tap) -> None:
    nodes = Nodes(tap)
    await lookups.grown(nodes, 200)
    assert tap.sent < 365 * 200  # joined, five or six lookups each, and published; 65 of them ask for ids
    assert min(node.server.protocol.router.live_count for node in nodes.nodes) > 60
    gets = await lookups.gets(tap, nodes.nodes, NAMES, 100)
    assert gets.missed == 0
    assert gets.quantile(0.95) < 0.26
    assert gets.causes["find_value"] < 6 * 100
    assert gets.datagrams < 20
    later = await lookups.gets(tap, nodes.nodes, NAMES, 100, over=60.0)
    assert later.missed == 0
    assert later.datagrams < 20
    calls = await lookups.calls(tap, nodes.nodes, NAMES, 100)  # each has one node to start from
    assert calls.missed == 0
    assert calls.quantile(0.5) < 0.38
    assert calls.datagrams < 29
    publisher = next(node for node in nodes.nodes if node.server.identity)
    tap.start()
    await publisher.publish("another/name", b"v1")
    await asyncio.sleep(10)
    assert tap.causes["store"] == 2 * 20  # the k closest to both keys, each once
    assert tap.causes["find_node"] + tap.causes["find_value"] < 2 * 23
    assert tap.causes.total() < 250
    nothing = await lookups.gets(tap, nodes.nodes, ["no/such"], 50, found=False)
    assert nothing.missed == 0
    assert nothing.quantile(1) < 1.2
    assert nothing.causes["find_value"] < 23 * 50  # the 20 closest, and few others
    found, exact = await lookups.node_lookups(tap, nodes.nodes, 50)
    assert exact == 1
    assert found.causes["find_node"] < 23 * 50


@pytest.mark.parametrize(
    ("share", "bound", "miss"), [pytest.param(0.25, 0.5, 1.8, marks=pytest.mark.soak), (0.5, 0.9, 3.5)]
)
async def test_the_dead_hold_up_nobody(tap: Tap, share: float, bound: float, miss: float) -> None:
    nodes = Nodes(tap)
    await lookups.grown(nodes, 200)
    living = lookups.kill(nodes, share)
    gets = await lookups.gets(tap, living, NAMES, 100)
    assert gets.missed == 0
    assert gets.quantile(0.95) < bound
    assert gets.datagrams < 26
    nothing = await lookups.gets(tap, living, ["no/such"], 50, found=False)
    assert nothing.missed == 0
    assert nothing.quantile(0.5) < miss
    assert nothing.quantile(0.95) < 4.5
    found, exact = await lookups.node_lookups(tap, living, 50)
    assert exact > 0.85  # so many have just died that no table shows the living behind them all
    assert found.causes["find_node reply"] > 20 * 50


async def test_on_a_lan_a_get_does_not_wait_for_the_quarter_that_died_a_moment_ago(tap: Tap) -> None:
    tap.conditions = Conditions(latency=0.0002)
    nodes = Nodes(tap)
    await lookups.grown(nodes, 64)
    gets = await lookups.gets(tap, lookups.kill(nodes, 0.25), NAMES, 48)
    assert gets.missed == 0
    assert gets.quantile(1) < 0.020
    assert gets.datagrams < 20


async def test_the_next_is_asked_as_soon_as_one_has_answered_and_not_in_rounds(network: Network) -> None:
    network.conditions = Conditions(latency=0.01, sigma=0)
    nodes = Nodes(network)
    reader, *_ = await nodes.grow(30)
    await asyncio.sleep(10)
    protocol, key = reader.server.protocol, bytes(range(20))
    far = protocol.router.closest(int.from_bytes(key), 1)[0]  # of the three that are asked first
    host = next(node.host for node in nodes.nodes if node.address == far.address)
    for link in ((reader.host, host), (host, reader.host)):
        network.link(*link, Conditions(latency=0.1, sigma=0))
    for _ in range(10):
        await reader.host.run(ping(protocol, far))  # so that it is as fast as expected
    network.observe()
    started = network.now
    await reader.host.run(lookups.lookup(reader.server, key))
    sent = [each for each in network.record if each[1] == reader.address and each[3] == "find_node"]
    assert sum(at == started for at, *_ in sent) == 3
    assert sum(at < started + 0.19 for at, *_ in sent) > 12  # two every 20 ms besides the far one; in rounds only three


async def test_a_publish_looks_up_and_stores_under_both_keys_at_the_same_time(tap: Tap) -> None:
    tap.conditions = Conditions(latency=0.05, sigma=0)
    nodes = Nodes(tap)
    await nodes.grow(3)
    publisher = await nodes.start([nodes.nodes[0]], identity=identity(1))
    await asyncio.sleep(10)
    started = tap.now
    receipt = await publisher.publish(NAMES[0], b"v1")
    assert receipt.stored == 3
    assert tap.now - started < 0.25  # one round trip for the lookups, one for the stores


async def test_a_lost_datagram_is_sent_again(tap: Tap) -> None:
    nodes = Nodes(tap)
    await lookups.grown(nodes, 40)
    tap.conditions = Conditions(loss=0.2)  # 36 % of all exchanges fail, of those that are tried twice 13 %
    _, exact = await lookups.node_lookups(tap, nodes.nodes, 40)
    assert exact > 0.75


async def test_whoever_joined_knows_k_in_the_far_half(tap: Tap) -> None:
    nodes = Nodes(tap)
    await lookups.grown(nodes, 120, through="random")
    known = [node.server.protocol.router.count_at(159) for node in nodes.nodes[60:]]  # earlier there were few to know
    assert min(known) >= 18


async def ping(protocol: PlasmProtocol, contact: Contact) -> Outcome:
    return await protocol.call_ping(contact)


def table(clock: Clock) -> PlasmRoutingTable:
    return PlasmRoutingTable(None, 20, Node(bytes(19) + b"\x01"), clock)


def contact(number: int) -> Contact:
    return Contact(number.to_bytes(20), f"10.{number >> 8 & 255}.{number & 255}.1", 8468)


def test_strangers_are_welcome_until_two_k_are_known_at_their_distance() -> None:
    router = table(ManualClock())
    far = [(1 << 159) + (number << 153) + number for number in range(41)]
    for number in far[:40]:
        assert router.has_room_for(contact(number))
        router.add_contact(contact(number))
    assert not router.has_room_for(contact(far[40]))
    assert router.has_room_for(contact(1 << 158))


def test_one_bucket_of_each_distance_is_looked_up_in_an_hour() -> None:
    clock = ManualClock()
    router = table(clock)
    for number in range(100):  # all in the far half, spread evenly
        router.add_contact(contact((1 << 159) + (number << 152) + number))
    assert len(router.buckets) > 4
    assert router.neglected() == []
    clock.advance(3600)
    assert len(router.neglected()) == len({bucket.range[0] >> 159 for bucket in router.buckets})
    for bucket in router.neglected():
        bucket.touch_last_updated()
    assert router.neglected() == []
    clock.advance(3600)
    assert {bucket.last_updated for bucket in router.neglected()} == {1000.0, 4600.0}  # in turn, where it was split


@pytest.mark.soak
@pytest.mark.parametrize(("share", "bound"), [(0.0, 0.35), (0.25, 0.55), (0.5, 1.0)])
async def test_of_1000_nodes_a_share_may_die(tap: Tap, share: float, bound: float) -> None:
    nodes = Nodes(tap)
    await lookups.grown(nodes, 1000)
    living = lookups.kill(nodes, share)
    for over in (0.0, 60.0):
        gets = await lookups.gets(tap, living, NAMES, 400, over=over)
        assert gets.missed == 0
        assert gets.quantile(0.95) <= bound
        assert gets.datagrams <= 30
    if not share:
        _, exact = await lookups.node_lookups(tap, living, 400)
        assert exact == 1


@pytest.mark.parametrize("latency", [0.1, 0.4])
async def test_a_contact_that_has_become_far_is_waited_for_longer(tap: Tap, latency: float) -> None:
    tap.conditions = Conditions(latency=0.01, sigma=0)
    nodes = Nodes(tap)
    node, other = await nodes.grow(2)
    protocol, contact = node.server.protocol, other.server.node
    known = protocol.router.find(contact.id)
    for _ in range(10):
        assert (await node.host.run(ping(protocol, known)))[0]
    tap.conditions = Conditions(latency=latency, sigma=0)
    for _ in range(4):  # two are missed, and only then is it waited for longer: most who do not answer are dead
        await node.host.run(ping(protocol, known))
    await asyncio.sleep(2)
    tap.start()
    for _ in range(10):
        assert (await node.host.run(ping(protocol, known)))[0]
    assert tap.causes["ping resent"] == 0
    assert not known.is_stale
