"""Watching a name over hours: each change once, within the stated bound, and with no more looks than that takes."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from plasm_dht import Event, Identity
from plasm_dht.dht import observe
from plasm_dht.record import Value, bound_key, shared_key
from tests.virtual.host import EPOCH
from tests.virtual.network import Network
from tests.virtual.nodes import Node, Nodes, identity

NAME = "/phase/stable/arm64/manifest"
HOUR, DAY = 3600.0, 86400.0
# Time that a look takes in a network without trouble (s).
LOOK = 3.0
# Holders of a key: fewer than there are nodes, so that the watcher is none of them.
K = 4


@dataclass
class Log:
    """What a watcher was told: seconds of virtual time, kind and value. `looks`: when it asked the network."""

    events: list[tuple[float, str, Value]] = field(default_factory=list)
    looks: list[float] = field(default_factory=list)

    @property
    def kinds(self) -> list[str]:
        return [kind for _, kind, _ in self.events]

    def since(self, moment: float) -> list[tuple[str, Value]]:
        return [(kind, value) for at, kind, value in self.events if at >= moment]


@asynccontextmanager
async def watching(node: Node, monkeypatch: pytest.MonkeyPatch, **options: Any) -> AsyncIterator[Log]:
    """A watcher on the node; what it is told, when, and when it asks."""
    log = Log()
    network = node.host.network
    original = observe.Watch._look

    async def look(watch: observe.Watch) -> None:
        log.looks.append(network.now)
        await original(watch)

    async def follow() -> None:
        event: Event
        async for event in node.server.watch(NAME, **options):
            assert event.record.name == NAME
            log.events.append((network.now, event.kind, event.record.value))

    with monkeypatch.context() as patch:
        patch.setattr(observe.Watch, "_look", look)
        task = node.host.spawn(follow())
        try:
            yield log
        finally:
            task.cancel()
            await asyncio.wait({task})
            assert not node.server.storage.observers


async def far_watcher(nodes: Nodes, *publishers: Identity, name: str = NAME) -> Node:
    """A node that is not among the closest to any key of the name."""
    keys = [shared_key(name), *(bound_key(each.public_key, name) for each in publishers)]
    while True:
        node = await nodes.start([nodes.nodes[0]], ksize=K)
        others = [each.server.node.long_id for each in nodes.nodes if each is not node]
        own = node.server.node.long_id
        if all(
            sum((other ^ int.from_bytes(key)) < (own ^ int.from_bytes(key)) for other in others) > K for key in keys
        ):
            return node


async def test_in_a_day_each_change_is_seen_once_within_a_minute(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = Nodes(network)
    await nodes.grow(14, ksize=K)
    publisher = await nodes.start([nodes.nodes[0]], identity=identity(1), ksize=K)
    watcher = await far_watcher(nodes, identity(1))
    async with watching(watcher, monkeypatch) as log:
        await asyncio.sleep(600)
        said: list[tuple[float, str, Value]] = []
        for pause, value in [(7 * HOUR, b"v1"), (5 * HOUR, b"v2"), (90, b"v3"), (8 * HOUR, b"v4")]:
            said.append((network.now, "changed" if said else "published", value))
            await publisher.publish(NAME, value)
            await asyncio.sleep(pause)
        said.append((network.now, "withdrawn", b"v4"))
        await publisher.withdraw(NAME)
        await asyncio.sleep(DAY - network.now)
    assert [event[1:] for event in log.events] == [event[1:] for event in said]
    for (when, *_), (seen, *_) in zip(said, log.events, strict=True):
        assert 0 <= seen - when <= observe.LONGEST_PAUSE + LOOK
    # one a minute, and at the start and at the end the first few of those that find nothing, at 1, 2, 4, … seconds
    assert DAY / 60 * 0.9 < len(log.looks) <= DAY / 60 + 2 * 7
    assert min(later - sooner for sooner, later in zip(log.looks, log.looks[1:], strict=False)) >= 1


async def test_what_is_stored_at_the_watching_node_is_seen_at_once(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = Nodes(network)
    await nodes.grow(8)  # with k = 20 everybody holds everything
    publisher = await nodes.start([nodes.nodes[0]], identity=identity(1))
    async with watching(nodes.nodes[3], monkeypatch) as log:
        for value in (b"v1", b"v2"):
            await asyncio.sleep(95.5)
            began = network.now
            await publisher.publish(NAME, value)
            await asyncio.sleep(1)
            assert [each[1:] for each in log.events if each[0] - began <= 1 and each[0] >= began] == [
                ("published" if value == b"v1" else "changed", value)
            ]
        await asyncio.sleep(40)
        began = network.now
        await publisher.close()
        assert log.since(began) == [("withdrawn", b"v2")]


@pytest.mark.parametrize("ttl", [5, 60, 3600])
async def test_a_killed_publishers_record_is_reported_at_its_expiry_and_a_living_ones_never(
    network: Network, monkeypatch: pytest.MonkeyPatch, ttl: int
) -> None:
    nodes = Nodes(network)
    await nodes.grow(10, ksize=K)
    publisher = await nodes.start([nodes.nodes[0]], identity=identity(1), record_ttl=ttl, ksize=K)
    watcher = await far_watcher(nodes, identity(1))
    await publisher.publish(NAME, b"v1")
    async with watching(watcher, monkeypatch) as log:
        await asyncio.sleep(min(20 * ttl, 6 * HOUR))
        assert log.kinds == ["published"], "refreshes are no changes, and its life never seems to be over"
        publisher.kill()
        # in 1 s some holders still learn of nothing newer: what counts is the newest that any of them has
        newest = max(max(node.seqs(NAME, identity(1)), default=0) for node in nodes.nodes)
        expiry = (newest + ttl * 1000 - EPOCH) / 1000
        await asyncio.sleep(ttl + 100)
        assert log.kinds == ["published", "expired"]
        assert abs(log.events[1][0] - expiry) < 0.05
        assert len(log.looks) <= (20 + 1) * 20 + 20 * 4 + 20


async def test_expiry_is_reported_at_its_moment_while_the_network_is_lost_and_that_is_said_once(
    network: Network, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "plasm_dht.dht.observe")

    def said() -> list[str]:
        return [each.levelname for each in caplog.records if each.name == "plasm_dht.dht.observe"]

    nodes = Nodes(network)
    await nodes.grow(8, ksize=K)
    publisher = await nodes.start([nodes.nodes[0]], identity=identity(1), record_ttl=1200, ksize=K)
    watcher = await far_watcher(nodes, identity(1))
    publication = await publisher.publish(NAME, b"v1")
    async with watching(watcher, monkeypatch) as log:
        await asyncio.sleep(100)
        network.partition([watcher.host])
        await asyncio.sleep(2 * HOUR)
        assert log.kinds == ["published", "expired"]
        assert abs(log.events[1][0] - (publication.expires_at - EPOCH) / 1000) < 0.05
        assert said() == ["WARNING"]
        assert "no DHT node answers" in caplog.text
        healed = network.now
        network.heal()
        await asyncio.sleep(2 * 60 + 10)  # the node joins again within a minute, and is asked within another
        assert log.since(healed) == [("published", b"v1")]
        assert said() == ["WARNING", "INFO"]


async def test_after_a_suspend_what_goes_on_is_not_reported_as_expired(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = Nodes(network)
    await nodes.grow(8, ksize=K)
    living = await nodes.start([nodes.nodes[0]], identity=identity(1), ksize=K)
    dying = await nodes.start([nodes.nodes[0]], identity=identity(2), ksize=K)
    watcher = await far_watcher(nodes, identity(1), identity(2))
    await living.publish(NAME, b"living")
    await dying.publish(NAME, b"dying")
    async with watching(watcher, monkeypatch) as log:
        await asyncio.sleep(100)
        assert sorted(log.since(0)) == [("published", b"dying"), ("published", b"living")]
        watcher.host.suspend()
        dying.kill()
        await asyncio.sleep(3 * HOUR)
        await living.publish(NAME, b"changed")
        woken = network.now
        watcher.host.resume()
        await asyncio.sleep(observe.LOOK_AGAIN + 2 * LOOK)
        assert sorted(log.since(woken)) == [("changed", b"changed"), ("expired", b"dying")]


@pytest.mark.parametrize("step", [+7200, -7200])
async def test_a_step_of_the_watchers_clock_ends_and_hides_nothing(
    network: Network, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    nodes = Nodes(network)
    await nodes.grow(10, ksize=K)
    publisher = await nodes.start([nodes.nodes[0]], identity=identity(1), record_ttl=600, ksize=K)
    watcher = await far_watcher(nodes, identity(1))
    await publisher.publish(NAME, b"v1")
    async with watching(watcher, monkeypatch) as log:
        await asyncio.sleep(100)
        watcher.host.clock.step(step)
        await asyncio.sleep(2 * HOUR)
        await publisher.publish(NAME, b"v2")
        await asyncio.sleep(100)
        assert log.since(0) == [("published", b"v1"), ("changed", b"v2")]
        watcher.host.clock.step(-step)
        await asyncio.sleep(100)
        publisher.kill()
        await asyncio.sleep(700)
        assert log.since(0)[2:] == [("expired", b"v2")]


@pytest.mark.parametrize("own", [-2 * HOUR, 2 * HOUR])
async def test_a_watcher_whose_clock_is_corrected_as_a_publisher_reports_nothing_of_others_as_expired(
    network: Network, monkeypatch: pytest.MonkeyPatch, own: float
) -> None:
    nodes = Nodes(network)
    await nodes.grow(8)
    await (await nodes.start([nodes.nodes[0]], identity=identity(1))).publish(NAME, b"v1")
    watcher = await nodes.start([nodes.nodes[0]], identity=identity(2))
    watcher.host.clock.step(own)
    async with watching(watcher, monkeypatch) as log:
        await asyncio.sleep(30)
        await watcher.publish("other", b"v1")
        assert watcher.server.clock.correction == pytest.approx(-own * 1000, abs=1000)
        await asyncio.sleep(HOUR)
    assert log.kinds == ["published"]


async def test_with_a_trust_list_nobody_else_is_reported(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = Nodes(network)
    await nodes.grow(6)
    trusted = await nodes.start([nodes.nodes[0]], identity=identity(1))
    stranger = await nodes.start([nodes.nodes[0]], identity=identity(2))
    async with watching(nodes.nodes[2], monkeypatch, trust=[identity(1).publisher_id]) as log:
        await stranger.publish(NAME, b"stranger")
        await asyncio.sleep(100)
        await trusted.publish(NAME, b"trusted")
        await asyncio.sleep(100)
        await stranger.withdraw(NAME)
        await trusted.withdraw(NAME)
        await asyncio.sleep(100)
    assert log.since(0) == [("published", b"trusted"), ("withdrawn", b"trusted")]


async def test_a_holder_that_was_cut_off_and_shows_an_old_record_brings_nothing_back(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = Nodes(network)
    await nodes.grow(10, ksize=K)
    publisher = await nodes.start([nodes.nodes[0]], identity=identity(1), ksize=K)
    watcher = await far_watcher(nodes, identity(1))
    await publisher.publish(NAME, b"v1")
    holders = [node for node in nodes.nodes if node.seqs(NAME, identity(1)) and node is not publisher]
    async with watching(watcher, monkeypatch) as log:
        await asyncio.sleep(100)
        network.partition([holders[0].host])
        await publisher.withdraw(NAME)
        await asyncio.sleep(200)
        publisher.kill()
        for holder in holders[1:]:
            holder.kill()  # whoever knows of the tombstone
        network.heal()
        await asyncio.sleep(1800)
        assert log.since(0) == [("published", b"v1"), ("withdrawn", b"v1")]
