"""Reversion: what was changed or withdrawn while a part of the network was cut off never comes back."""

import asyncio

import pytest

from plasm_dht.record import bound_key, decode, shared_key, sign
from tests.virtual.network import Network
from tests.virtual.nodes import Node, Nodes, everywhere, identity

CHANGED = "/phase/stable/arm64/manifest"
WITHDRAWN = "/phase/beta/arm64/manifest"
AUTHOR = identity(1)
NEAR = int.from_bytes(shared_key(CHANGED))
# A link that has just healed needs as long to carry a round trip and a resend.
ROUND_TRIP = 5


async def start(network: Network, ttl: int) -> tuple[Nodes, Node, list[Node]]:
    """30 nodes that hold two records of a publisher, and the half of them that will be cut off: the nearest to one."""
    nodes = Nodes(network)
    await nodes.grow(30)
    publisher = await nodes.start([nodes.nodes[0]], identity=AUTHOR, record_ttl=ttl)
    await publisher.publish(CHANGED, b"old")
    await publisher.publish(WITHDRAWN, b"old")
    await asyncio.sleep(60)
    return nodes, publisher, sorted(nodes.nodes[:30], key=lambda node: node.server.node.long_id ^ NEAR)[:15]


def held_by(nodes: list[Node], name: str) -> set[bytes]:
    """The envelopes of the record that any of the nodes holds, under either key."""
    keys = (shared_key(name), bound_key(AUTHOR.public_key, name))
    return {each.envelope for node in nodes for key in keys for each in node.server.storage.holdings(key)}


async def found_by(nodes: list[Node], name: str) -> set[object]:
    return set(await everywhere(nodes, lambda node: node.get(name)))


@pytest.mark.parametrize("ttl", [3600, 6 * 3600])
@pytest.mark.parametrize("cut_for", [120, 1500])
async def test_while_its_publisher_lives_everybody_has_the_newest_within_90_s_of_a_heal(
    network: Network, cut_for: int, ttl: int
) -> None:
    nodes, publisher, cut_off = await start(network, ttl)
    joining = [network.host(), network.host()]
    network.partition([*(node.host for node in cut_off), *joining])
    changed = await publisher.publish(CHANGED, b"new")
    withdrawn = await publisher.withdraw(WITHDRAWN)
    for number, host in enumerate(joining):  # are handed the old one on their side; the publisher does not know them
        await nodes.start([cut_off[0]], host=host, node_id=(NEAR ^ number).to_bytes(20))
    await asyncio.sleep(cut_for)
    assert all(node.seqs(CHANGED, AUTHOR) for node in nodes.nodes[31:]), "newcomers are handed what they should hold"
    assert await found_by(cut_off[:3], CHANGED) == {b"old"}, "the cut has to cut"
    network.heal()
    await asyncio.sleep(90)
    assert [decode(each).seq for each in held_by(nodes.nodes, CHANGED)] == [changed.seq], "the same bytes everywhere"
    assert [decode(each).seq for each in held_by(nodes.nodes, WITHDRAWN)] == [withdrawn.seq]
    everybody = [node for node in nodes.nodes if node is not publisher]
    for _ in range(5):
        assert await found_by(everybody, CHANGED) == {b"new"}
        assert await found_by(everybody, WITHDRAWN) == {None}
        await asyncio.sleep(1200)


@pytest.mark.parametrize("ttl", [3600, pytest.param(6 * 3600, marks=pytest.mark.soak)])
async def test_when_its_publisher_died_everybody_has_the_newest_within_11_minutes_of_a_heal(
    network: Network, ttl: int
) -> None:
    nodes, publisher, cut_off = await start(network, ttl)
    network.partition([node.host for node in cut_off])
    changed = await publisher.publish(CHANGED, b"new")
    withdrawn = await publisher.withdraw(WITHDRAWN)
    await asyncio.sleep(300)
    publisher.kill()
    await asyncio.sleep(600)
    network.heal()
    await asyncio.sleep(11 * 60)
    everybody = nodes.nodes[:30]
    assert [decode(each).seq for each in held_by(everybody, CHANGED)] == [changed.seq], "the same bytes everywhere"
    assert [decode(each).seq for each in held_by(everybody, WITHDRAWN)] == [withdrawn.seq]
    assert await found_by(everybody, CHANGED) == {b"new"}
    assert await found_by(everybody, WITHDRAWN) == {None}
    for _ in range(7):  # and from then on, ever
        await asyncio.sleep(3600)
        assert b"old" not in await found_by(everybody, CHANGED)
        assert await found_by(everybody, WITHDRAWN) == {None}


async def test_a_holder_that_passes_on_an_older_record_is_taught_the_newest(network: Network) -> None:
    nodes = Nodes(network)
    holder, publisher = await nodes.grow(2)
    key, now = shared_key(CHANGED), publisher.host.clock.wall()
    old, new = (
        sign(AUTHOR, CHANGED, value, seq=seq, issued_at=now, expires_at=now + 2 * 3_600_000)
        for seq, value in ((1, b"old"), (2, b"new"))
    )
    holder.server.storage[key] = old.envelope
    publisher.server.storage.keep_own(key, new)  # which it does not replicate
    await asyncio.sleep(3600 + 600 + 10)
    assert holder.server.storage[key] == new.envelope
