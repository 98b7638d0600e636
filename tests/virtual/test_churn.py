"""Networks that are small, lossy, or whose nodes come and go without a word."""

import asyncio
import random

import pytest

from plasm_dht.record import shared_key
from tests.virtual.network import Conditions, Network
from tests.virtual.nodes import Nodes, everywhere, identity

NAME = "/phase/stable/arm64/manifest"
HOUR = 3600.0


@pytest.mark.parametrize("hours", [8, pytest.param(24, marks=pytest.mark.soak)])
async def test_under_churn_a_reader_finds_the_newest_value_every_minute(network: Network, hours: int) -> None:
    nodes = Nodes(network)
    await nodes.grow(24)
    first = nodes.nodes[0]  # it, the publisher and the reader stay; half of the others go every two hours
    publisher = await nodes.start([first], identity=identity(1))
    reader = await nodes.start([first], node_id=bytes(byte ^ 0xFF for byte in shared_key(NAME)))  # too far to hold it
    mortal = [node for node in nodes.nodes if node not in (first, publisher, reader)]
    value = b"0"
    await publisher.publish(NAME, value)
    replaced_at, changed_at = 0.0, 0.0
    lifetime = 2 * HOUR / (len(mortal) / 2)
    start = network.now
    assert reader.server.storage.get(shared_key(NAME)) is None, "what it finds others have told it"
    for minute in range(hours * 60):
        await asyncio.sleep(start + 60 * (minute + 1) - network.now)
        while network.now - start - replaced_at >= lifetime:
            replaced_at += lifetime
            random.choice(mortal).kill()
            mortal = [node for node in mortal if node.host.alive]
            mortal.append(await nodes.start([first]))
        if network.now - start - changed_at >= HOUR:
            changed_at += HOUR
            value = str(minute).encode()
            publishing = asyncio.ensure_future(publisher.publish(NAME, value))
            await asyncio.sleep(5)
            assert await reader.get(NAME) == value, f"minute {minute}, 5 s after the publish began"
            await publishing
        assert await reader.get(NAME) == value, f"minute {minute}"


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
async def test_a_small_network_works(network: Network, size: int) -> None:
    nodes = Nodes(network)
    publisher = await nodes.start(identity=identity(1))
    for _ in range(size - 1):
        await nodes.start([publisher])
    await publisher.publish(NAME, b"v1")
    for _ in range(5):
        assert await everywhere(nodes.nodes, lambda node: node.get(NAME)) == [b"v1"] * size
        await asyncio.sleep(HOUR)
    await publisher.withdraw(NAME)
    await asyncio.sleep(5)
    assert await everywhere(nodes.nodes, lambda node: node.get(NAME)) == [None] * size


async def test_a_lonely_publishers_record_is_pushed_as_soon_as_a_neighbour_appears(network: Network) -> None:
    nodes = Nodes(network)
    publisher = await nodes.start(identity=identity(1))
    receipt = await publisher.publish(NAME, b"v1")
    assert receipt.stored == 0
    await asyncio.sleep(1000)
    joined = await nodes.start([publisher])
    await asyncio.sleep(2)
    assert joined.seqs(NAME, identity(1))
    standing = publisher.server.standing(NAME)
    assert standing is not None
    assert standing.holders == 1, "the publisher has seen to it itself, besides what it hands off as a holder"
    publisher.kill()
    assert await joined.get(NAME) == b"v1"


async def test_the_only_bootstrap_node_may_restart(network: Network) -> None:
    nodes = Nodes(network)
    await nodes.grow(1)
    bootstrap = nodes.nodes[0]
    publisher = await nodes.start([bootstrap], identity=identity(1))
    reader = await nodes.start([bootstrap])
    await publisher.publish(NAME, b"v1")
    bootstrap.kill()
    await asyncio.sleep(600)
    assert await reader.get(NAME) == b"v1"
    again = await nodes.start(host=network.host(bootstrap.host.address))  # the same address, another id
    await asyncio.sleep(600)  # two rounds of pinging stale contacts: another id answers at the old one's address
    newcomer = await nodes.start([again])
    assert await everywhere([again, newcomer, reader], lambda node: node.get(NAME)) == [b"v1"] * 3


async def test_who_has_lost_everybody_asks_the_bootstrap_nodes_at_once(network: Network) -> None:
    nodes = Nodes(network)
    await nodes.grow(1)
    first, later = nodes.nodes[0], network.host()
    lost = await nodes.start([first])
    await lost.host.run(lost.server.bootstrap([(later.address, 8468)]))  # nobody is there yet
    await asyncio.sleep(61)  # the next upkeep is in 50 s and more
    first.kill()
    there = await nodes.start(host=later)
    await lost.get(NAME)  # finds out that the only neighbour has died
    await asyncio.sleep(2)
    assert [each.address for each in lost.server.protocol.router.live()] == [there.address]


@pytest.mark.parametrize(("k", "every"), [(20, 300), (2, HOUR)])
async def test_bootstrap_addresses_are_asked_again_every_5_minutes_with_few_neighbours_and_else_hourly(
    network: Network, k: int, every: float
) -> None:
    nodes = Nodes(network)
    await nodes.grow(3, ksize=k)
    later = network.host()
    asking = await nodes.start([nodes.nodes[0]], ksize=k)
    await asking.host.run(asking.server.bootstrap([(later.address, 8468)]))  # nobody is there yet
    there = await nodes.start(host=later)  # it knows nobody
    await asyncio.sleep(every - 10)
    assert there.server.protocol.router.live() == []
    await asyncio.sleep(20)
    assert there.address in [each.address for each in asking.server.protocol.router.live()]


async def test_who_has_been_dead_for_a_day_is_forgotten(network: Network) -> None:
    nodes = Nodes(network)
    await nodes.grow(3)
    *living, dead = nodes.nodes
    dead.kill()
    await asyncio.sleep(23 * HOUR)
    assert [node.server.protocol.router.is_new_node(dead.server.node) for node in living] == [False, False]
    await asyncio.sleep(2 * HOUR)
    assert [node.server.protocol.router.is_new_node(dead.server.node) for node in living] == [True, True]


async def test_a_bucket_that_was_idle_for_an_hour_is_refreshed(network: Network) -> None:
    nodes = Nodes(network)
    await nodes.grow(3)
    await asyncio.sleep(HOUR + 61)
    assert [node.server.protocol.router.neglected() for node in nodes.nodes] == [[], [], []]
    await asyncio.sleep(HOUR)
    assert [node.server.protocol.router.neglected() for node in nodes.nodes] == [[], [], []]


async def test_without_its_bootstrap_node_a_small_network_notices_a_cut_and_that_it_has_healed(
    network: Network,
) -> None:
    nodes = Nodes(network)
    await nodes.grow(10)
    nodes.nodes[0].kill()
    one, other = nodes.nodes[1:5], nodes.nodes[5:]
    network.partition([node.host for node in one])
    await asyncio.sleep(1500)  # nobody asks for anything, and no bucket has been idle for an hour
    for side in (one, other):
        known = [{each.address for each in node.server.protocol.router.live()} for node in side]
        assert known == [{each.address for each in side if each is not node} for node in side]
    network.heal()
    await asyncio.sleep(660)  # two rounds of pinging three who were silent
    assert [node.server.protocol.router.live_count for node in nodes.alive()] == [8] * 9


async def test_a_publisher_whose_neighbours_have_all_died_still_shows_its_record_to_whoever_asks_it(
    network: Network,
) -> None:
    nodes = Nodes(network)
    publisher = await nodes.start(identity=identity(1), record_ttl=30)
    neighbour = await nodes.start([publisher])
    await publisher.publish(NAME, b"v1")
    neighbour.kill()
    for _ in range(600):
        await asyncio.sleep(1)
        assert await publisher.get(NAME) == b"v1"


async def test_whoever_starts_before_its_bootstrap_node_joins_when_it_comes(network: Network) -> None:
    nodes = Nodes(network)
    host = network.host()
    later = network.host()
    early = await nodes.start(host=host, identity=identity(1))
    assert await host.run(early.server.bootstrap([(later.address, 8468)])) == []
    await early.publish(NAME, b"v1")
    await asyncio.sleep(300)
    bootstrap = await nodes.start(host=later)
    await asyncio.sleep(65)  # the longest pause between two attempts is 60 s
    assert await bootstrap.get(NAME) == b"v1"


@pytest.mark.parametrize(("loss", "bound"), [pytest.param(0.1, 2.0, marks=pytest.mark.soak), (0.3, 3.0)])
async def test_with_lost_datagrams_everything_is_found_in_time(network: Network, loss: float, bound: float) -> None:
    network.conditions = Conditions(latency=0.040, sigma=0.5, loss=loss)
    nodes = Nodes(network)
    await nodes.grow(100)
    publisher = await nodes.start([nodes.nodes[0]], identity=identity(1))
    await publisher.publish(NAME, b"v1")
    await asyncio.sleep(60)
    took = []
    for _ in range(2):
        for node in random.sample(nodes.nodes[:100], 40):
            started = network.now
            assert await node.get(NAME) == b"v1"
            took.append(network.now - started)
        await asyncio.sleep(HOUR)
    took.sort()
    assert took[int(0.95 * len(took))] < bound


async def test_at_50_percent_loss_tables_do_not_dissolve(network: Network) -> None:
    nodes = Nodes(network)
    await nodes.grow(50)
    publisher = await nodes.start([nodes.nodes[0]], identity=identity(1))
    await publisher.publish(NAME, b"v1")
    before = [len(node.server.protocol.router) for node in nodes.nodes]
    network.conditions = Conditions(latency=0.040, sigma=0.5, loss=0.5)
    await asyncio.sleep(4 * HOUR)
    after = [len(node.server.protocol.router) for node in nodes.nodes]
    assert sum(after) >= sum(before) * 0.9
    assert min(node.server.protocol.router.live_count for node in nodes.nodes) >= 5
    found = await everywhere(random.sample(nodes.nodes, 20), lambda node: node.get(NAME))
    assert found.count(b"v1") >= 18


async def test_half_of_all_nodes_may_die_at_one_moment(network: Network) -> None:
    nodes = Nodes(network)
    await nodes.grow(100)
    publisher = await nodes.start([nodes.nodes[0]], identity=identity(1))
    await publisher.publish(NAME, b"v1")
    await asyncio.sleep(60)
    survivors = random.sample(nodes.nodes[:100], 50)
    for node in nodes.nodes[:100]:
        if node not in survivors:
            node.kill()
    assert await everywhere(survivors, lambda node: node.get(NAME)) == [b"v1"] * 50
    for _ in range(4):
        await asyncio.sleep(HOUR)
        assert await everywhere(survivors, lambda node: node.get(NAME)) == [b"v1"] * 50


async def test_all_but_the_publisher_may_be_replaced(network: Network) -> None:
    nodes = Nodes(network)
    publisher = await nodes.start(identity=identity(1))
    await nodes.grow(20)
    await publisher.publish(NAME, b"v1")
    await asyncio.sleep(60)
    for node in nodes.nodes[1:]:
        node.kill()
    newcomers = [await nodes.start([publisher]) for _ in range(20)]
    await asyncio.sleep(60)
    assert await everywhere(newcomers, lambda node: node.get(NAME)) == [b"v1"] * 20
    await asyncio.sleep(2400)
    publisher.kill()
    assert await everywhere(newcomers, lambda node: node.get(NAME)) == [b"v1"] * 20
