"""A publisher whose TTL and refresh interval change while it runs, as they do when a provider reads its file again."""

import asyncio

import pytest

from plasm_dht.errors import ConfigError
from tests.virtual.network import Network
from tests.virtual.nodes import Node, Nodes, everywhere, identity

NAME = "/phase/stable/arm64/manifest"


async def provider_of(nodes: Nodes, ttl: float, interval: float | None = None) -> Node:
    await nodes.grow(12)
    provider = await nodes.start([nodes.nodes[0]], identity=identity(1), record_ttl=ttl, refresh_interval=interval)
    await provider.publish(NAME, b"v1")
    return provider


async def set_life(node: Node, ttl: float, interval: float | None = None) -> None:
    async def change() -> None:
        node.server.set_life(ttl, interval)

    await node.host.run(change())


async def life_of(node: Node) -> float:
    """The life (s) that the record was signed with which this node finds."""
    (record,) = await node.host.run(node.server.get_records(NAME))
    return (record.expires_at - record.issued_at) / 1000


def due_in(node: Node) -> float:
    standing = node.server.standing(NAME)
    assert standing is not None
    assert standing.refresh_in is not None
    return standing.refresh_in


async def test_a_shorter_ttl_is_published_at_once_and_no_holder_keeps_the_longer_record(network: Network) -> None:
    nodes = Nodes(network)
    provider = await provider_of(nodes, 6 * 3600)
    others = nodes.nodes[:-1]
    holder = next(node for node in others if node.seqs(NAME, identity(1)))
    network.partition([holder.host])
    await set_life(provider, 600)
    await asyncio.sleep(20)
    assert [await life_of(node) for node in others if node is not holder] == [600] * 11
    assert due_in(provider) <= 400
    network.heal()
    await asyncio.sleep(90)  # whoever was away is owed it as a change is
    assert holder.seqs(NAME, identity(1)) == provider.seqs(NAME, identity(1))
    provider.kill()
    await asyncio.sleep(700)
    assert await everywhere(others, lambda node: node.get(NAME)) == [None] * 12, "nobody goes back to the longer one"


async def test_a_longer_ttl_comes_with_the_refresh_that_was_planned(network: Network) -> None:
    nodes = Nodes(network)
    provider = await provider_of(nodes, 600)
    await set_life(provider, 6 * 3600)
    assert due_in(provider) <= 400, "what is out there still lives for 600 s only"
    for _ in range(8):
        await asyncio.sleep(100)
        assert await nodes.nodes[0].get(NAME) == b"v1"
    assert await life_of(nodes.nodes[0]) == 6 * 3600
    assert 3 * 3600 < due_in(provider) <= 4 * 3600


async def test_a_longer_ttl_that_comes_while_a_refresh_is_under_way_does_not_let_the_record_expire(
    network: Network,
) -> None:
    nodes = Nodes(network)
    provider = await provider_of(nodes, 600)
    publishing = asyncio.ensure_future(provider.publish(NAME, b"v2"))
    await asyncio.sleep(0.01)  # it is signed for 600 s and on its way
    await set_life(provider, 6 * 3600)
    await publishing
    assert due_in(provider) <= 400
    await asyncio.sleep(700)
    assert await nodes.nodes[0].get(NAME) == b"v2"


@pytest.mark.parametrize(("before", "after"), [(2400, 60), (60, 2400)])
async def test_another_refresh_interval_moves_what_is_planned(network: Network, before: int, after: int) -> None:
    nodes = Nodes(network)
    provider = await provider_of(nodes, 3600, before)
    await set_life(provider, 3600, after)
    assert 0.95 * after - 10 <= due_in(provider) <= after
    first = provider.seqs(NAME, identity(1))
    await asyncio.sleep(after + 10)
    assert provider.seqs(NAME, identity(1)) != first
    assert await life_of(nodes.nodes[0]) == 3600


async def test_a_refresh_that_failed_is_not_put_off_by_a_longer_interval(network: Network) -> None:
    nodes = Nodes(network)
    provider = await provider_of(nodes, 600, 60)
    network.partition([provider.host])
    await asyncio.sleep(120)
    await set_life(provider, 600, 500)
    assert due_in(provider) <= 60


async def test_what_has_a_ttl_of_its_own_keeps_it(network: Network) -> None:
    nodes = Nodes(network)
    provider = await provider_of(nodes, 3600)
    await provider.publish(NAME, b"v1", ttl=100)
    await set_life(provider, 600)
    await asyncio.sleep(10)
    assert await life_of(nodes.nodes[0]) == 100


async def test_an_impossible_life_is_refused_and_changes_nothing(network: Network) -> None:
    nodes = Nodes(network)
    provider = await provider_of(nodes, 3600, 1000)
    for ttl, interval in ((0, None), (700_000, None), (100, 100)):
        with pytest.raises(ConfigError):
            await set_life(provider, ttl, interval)
    assert (provider.server.record_ttl, provider.server.refresh_interval) == (3600, 1000)
    assert 900 < due_in(provider) <= 1000


async def test_bootstrap_addresses_are_replaced_when_told_and_added_to_otherwise(network: Network) -> None:
    nodes = Nodes(network)
    await nodes.grow(3)
    first, second, third = (node.address for node in nodes.nodes)
    node = await nodes.start([nodes.nodes[0]])
    await node.host.run(node.server.bootstrap([second]))
    assert node.server._membership is not None
    assert node.server._membership._addresses == [first, second]
    await node.host.run(node.server.bootstrap([third], replace=True))
    assert node.server._membership._addresses == [third]
