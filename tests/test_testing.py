"""`plasm_dht.testing`: what embedders test with has to do what it says, on real sockets."""

import asyncio

import pytest

from plasm_dht import Identity, PlasmServer
from plasm_dht.errors import ConfigError
from plasm_dht.testing import local_network

NAME = "any/name"


async def test_every_node_knows_every_other_and_finds_what_any_of_them_publishes() -> None:
    async with local_network(5) as network:
        assert len(set(network.addresses)) == 5
        assert [host for host, _ in network.addresses] == ["127.0.0.1"] * 5
        for node in network.nodes:
            assert len(node.bootstrappable_neighbors()) == 4
        publication = await network.nodes[1].publish(NAME, "here")
        assert publication.stored == 4
        assert [await node.get(NAME) for node in network.nodes] == ["here"] * 5


async def test_at_the_end_nothing_listens_any_more() -> None:
    async with local_network(3) as network:
        nodes, addresses = list(network.nodes), network.addresses
        assert [node.record_ttl for node in nodes] == [3600] * 3
    assert network.nodes == []
    async with PlasmServer() as caller:
        await caller.listen(0, "127.0.0.1")
        assert await caller.bootstrap_node(addresses[0]) is None
    for node in nodes:
        await node.wait_failed()  # it returns: the node has stopped


async def test_at_the_end_nothing_listens_any_more_after_an_error_too() -> None:
    addresses = []

    async def fail() -> None:
        async with local_network(2) as network:
            addresses.extend(network.addresses)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()
    async with PlasmServer() as caller:
        host, port = addresses[1]
        await caller.listen(port, host)


async def test_with_a_short_ttl_a_killed_nodes_record_is_soon_gone_and_a_living_ones_stays() -> None:
    async with local_network(4, record_ttl=1) as network:
        killed, living = network.nodes[2:]
        await killed.publish("killed", 1)
        await living.publish("living", 2)
        await network.kill(killed)
        assert len(network.nodes) == 3
        await asyncio.sleep(2.2)
        assert [await node.get("killed") for node in network.nodes] == [None] * 3
        async with asyncio.timeout(20):  # on a busy machine a refresh may be late; what was published first is over
            for node in network.nodes:
                while await node.get("living") is None:  # noqa: ASYNC110  # nobody tells
                    await asyncio.sleep(0.05)


async def test_a_node_that_is_killed_withdraws_nothing() -> None:
    async with local_network(3) as network:
        await network.nodes[0].publish(NAME, "here")
        await network.kill(network.nodes[0])
        assert [await node.get(NAME) for node in network.nodes] == ["here"] * 2


async def test_a_node_that_leaves_withdraws() -> None:
    async with local_network(3) as network:
        await network.nodes[0].publish(NAME, "here")
        await network.leave(network.nodes[0])
        assert [await node.get(NAME) for node in network.nodes] == [None] * 2


async def test_a_node_with_settings_of_its_own_can_join() -> None:
    identity = Identity.generate()
    async with local_network(2, record_ttl=60) as network:
        node = await network.join(identity=identity, record_ttl=5)
        assert network.nodes[-1] is node
        assert (node.identity, node.record_ttl) == (identity, 5)
        await network.nodes[0].publish(NAME, "here")
        assert await node.get(NAME) == "here"


@pytest.mark.parametrize("n", [0, -1])
async def test_a_network_without_a_node_is_refused(n: int) -> None:
    with pytest.raises(ConfigError, match=f"n is {n}: .* at least 1"):
        async with local_network(n):
            pass
