"""The life of one record at the default settings: found while its publisher lives, gone when it stops."""

import asyncio
import logging
import random

import pytest

from plasm_dht.record import shared_key, sign
from tests.virtual.network import Network
from tests.virtual.nodes import Node, Nodes, everywhere, identity

NAME = "/phase/stable/arm64/manifest"
HOUR = 3600.0


async def seen_by(nodes: list[Node]) -> list[object]:
    """What each of the nodes gets."""
    return await everywhere(nodes, lambda node: node.get(NAME))


async def until(node: Node, wall_ms: int) -> None:
    """Let time pass until a node's wall clock shows this."""
    await asyncio.sleep(max(wall_ms - node.host.clock.wall(), 0) / 1000)


@pytest.mark.parametrize("ttl", [3600, 6 * 3600])
async def test_a_record_is_found_while_its_publisher_lives_and_by_nobody_after(network: Network, ttl: int) -> None:
    nodes = Nodes(network)
    await nodes.grow(12)
    publisher = await nodes.start([nodes.nodes[0]], identity=identity(1), record_ttl=ttl)
    others = nodes.nodes[:-1]
    await publisher.publish(NAME, b"v1")
    assert await seen_by(others) == [b"v1"] * 12
    await asyncio.sleep(ttl * 0.7)  # past the first refresh
    assert await seen_by(others) == [b"v1"] * 12
    for _ in range(24):
        await asyncio.sleep(HOUR)
        assert await seen_by(random.sample(others, 4)) == [b"v1"] * 4

    (record,) = await others[0].host.run(others[0].server.get_records(NAME))
    publisher.kill()
    await asyncio.sleep(ttl / 6)
    others.append(await nodes.start([nodes.nodes[0]]))  # is handed the record, and not a longer life with it
    await until(others[0], record.expires_at - 2000)
    assert await seen_by(others) == [b"v1"] * 13, "the record has to live until its expiry"
    await until(others[0], record.expires_at + 1000)
    assert await seen_by(others) == [None] * 13, "one second after its expiry nobody may find it"
    for _ in range(24):  # holders replicate and nodes join meanwhile
        await asyncio.sleep(HOUR)
        newcomer = await nodes.start([nodes.nodes[0]])
        assert await seen_by([*random.sample(others, 4), newcomer]) == [None] * 5
    assert [node.seqs(NAME, identity(1)) for node in others] == [set()] * 13


async def test_a_clean_stop_takes_the_record_back_at_once_and_for_ever(network: Network) -> None:
    nodes = Nodes(network)
    await nodes.grow(20)
    publisher = await nodes.start([nodes.nodes[0]], identity=identity(1))
    others = nodes.nodes[:-1]
    await publisher.publish(NAME, b"v1")
    holder = next(node for node in others if node.seqs(NAME, identity(1)))
    network.partition([holder.host])
    await publisher.close()
    await asyncio.sleep(5)
    reachable = [node for node in others if node is not holder]
    assert await seen_by(reachable) == [None] * 19, "within 5 s of a clean stop it is gone from every reachable reader"
    await asyncio.sleep(300)
    network.heal()  # the holder comes back with the old record
    for _ in range(8):
        assert await seen_by(reachable) == [None] * 19
        await asyncio.sleep(600)
    assert await seen_by([holder]) == [None]


async def test_a_publisher_without_its_state_goes_on_from_what_the_network_holds(network: Network) -> None:
    nodes = Nodes(network)
    await nodes.grow(8)
    first = await nodes.start([nodes.nodes[0]], identity=identity(1))
    first.host.clock.step(+200)  # what it signs is ahead of what its successor will sign
    before = await first.publish(NAME, b"old")
    first.kill()
    second = await nodes.start([nodes.nodes[0]], identity=identity(1))
    after = await second.publish(NAME, b"new")
    assert after.seq > before.seq
    assert await seen_by(nodes.nodes[:8]) == [b"new"] * 8


async def test_a_long_life_does_not_come_back_after_a_shorter_one(network: Network) -> None:
    nodes = Nodes(network)
    await nodes.grow(12)
    publisher = await nodes.start([nodes.nodes[0]], identity=identity(1))
    others = nodes.nodes[:-1]
    await publisher.publish(NAME, b"long", ttl=24 * 3600)
    late = next(node for node in others if node.seqs(NAME, identity(1)))
    network.partition([late.host])
    await publisher.publish(NAME, b"short", ttl=600)
    await asyncio.sleep(30)
    publisher.kill()
    await asyncio.sleep(300)
    network.heal()
    await asyncio.sleep(310)
    for _ in range(25):  # until the long one would have ended, and longer
        found = await seen_by([node for node in others if node is not late])
        assert found == [None] * 11, (
            "the newest has expired, so nothing is found, however long an older one was to live"
        )
        await asyncio.sleep(HOUR)


async def test_of_two_providers_of_one_name_one_leaves_and_the_other_stays(network: Network) -> None:
    nodes = Nodes(network)
    await nodes.grow(10)
    one = await nodes.start([nodes.nodes[0]], identity=identity(1))
    two = await nodes.start([nodes.nodes[0]], identity=identity(2))
    others = nodes.nodes[:10]
    await one.publish(NAME, b"one")
    await asyncio.sleep(10)
    await two.publish(NAME, b"two")
    assert await seen_by(others) == [b"two"] * 10
    await two.close()
    await asyncio.sleep(5)
    assert await seen_by(others) == [b"one"] * 10
    await asyncio.sleep(2 * HOUR)
    assert await seen_by(others) == [b"one"] * 10


async def test_one_key_on_two_hosts_converges_and_is_warned_of(
    network: Network, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    nodes = Nodes(network)
    await nodes.grow(10)
    one = await nodes.start([nodes.nodes[0]], identity=identity(1))
    two = await nodes.start([nodes.nodes[0]], identity=identity(1))
    await one.publish(NAME, b"one")
    await asyncio.sleep(60)
    await two.publish(NAME, b"two")
    for _ in range(6):
        await asyncio.sleep(2000)
        holders = [node.seqs(NAME, identity(1)) for node in nodes.nodes]
        assert len(set().union(*holders)) == 1, "every holder has the same record"
    assert "another node publishes" in caplog.text


async def test_a_suspended_publishers_record_is_gone_and_back_within_ten_seconds_of_waking(network: Network) -> None:
    nodes = Nodes(network)
    await nodes.grow(10)
    publisher = await nodes.start([nodes.nodes[0]], identity=identity(1))
    others = nodes.nodes[:10]
    await publisher.publish(NAME, b"v1")
    publisher.host.suspend()
    await asyncio.sleep(3599)
    assert await seen_by(others) == [b"v1"] * 10
    await asyncio.sleep(2)
    assert await seen_by(others) == [None] * 10
    await asyncio.sleep(HOUR)
    publisher.host.resume()
    await asyncio.sleep(10)
    assert await seen_by(others) == [b"v1"] * 10


@pytest.mark.parametrize("step", [+3600, -3600])
@pytest.mark.parametrize("who", ["publisher", "holder", "reader"])
async def test_a_clock_step_of_one_machine_loses_nothing_for_the_others(network: Network, who: str, step: int) -> None:
    nodes = Nodes(network)
    await nodes.grow(12)
    publisher = await nodes.start([nodes.nodes[0]], identity=identity(1))
    others = nodes.nodes[:12]
    await publisher.publish(NAME, b"v1")
    holder = next(node for node in others if node.seqs(NAME, identity(1)))
    reader = next(node for node in others if node is not holder)
    await asyncio.sleep(600)
    {"publisher": publisher, "holder": holder, "reader": reader}[who].host.clock.step(step)
    bystanders = [node for node in others if node not in (holder, reader)]
    for _ in range(8):
        await asyncio.sleep(900)
        assert await seen_by([*bystanders, reader]) == [b"v1"] * 11
    publisher.kill()
    await asyncio.sleep(3601 + 300)  # whoever signs with the network's time is off by less than its agreement, 60 s
    assert await seen_by(bystanders) == [None] * 10


async def test_a_reader_repairs_a_holder_of_an_older_record(network: Network) -> None:
    nodes = Nodes(network)
    await nodes.grow(6)
    author = identity(1)
    now = nodes.nodes[0].host.clock.wall()
    old, new = (
        sign(author, NAME, value, seq=seq, issued_at=now, expires_at=now + 3_600_000)
        for seq, value in ((1, b"old"), (2, b"new"))
    )
    for node, record in zip(nodes.nodes, [old, new, new, new, new, old], strict=True):
        node.server.storage[shared_key(NAME)] = record.envelope
    assert await nodes.nodes[2].get(NAME) == b"new"
    await nodes.nodes[2].host.run(nodes.nodes[2].server.get_records(NAME))
    await asyncio.sleep(5)
    assert [node.seqs(NAME, author) for node in nodes.nodes] == [{2}] * 6
