"""A publisher of thousands of records: spread, in time, and none lost."""

import asyncio
from collections import Counter

import pytest

from plasm_dht.record import shared_key
from tests.virtual.network import Network
from tests.virtual.nodes import Nodes, identity

TTL, INTERVAL = 3600, 2400


@pytest.mark.parametrize("count", [1000, pytest.param(5000, marks=pytest.mark.soak)])
async def test_the_refreshes_of_many_records_are_spread_in_time_and_survive_an_outage(
    network: Network, count: int
) -> None:
    nodes = Nodes(network)
    await nodes.grow(1)
    publisher = await nodes.start([nodes.nodes[0]], identity=identity(1), rate_limit=None)
    for node in nodes.nodes:
        node.server.storage.max_records = 2 * count
    names = [f"service/{number}" for number in range(count)]
    publishing = asyncio.gather(*(publisher.publish(name, b"up") for name in names))
    await publishing
    signed_at = {name: _issued(publisher, name) for name in names}
    # all within a moment of each other: without jitter they would be refreshed within a moment, too
    assert max(signed_at.values()) - min(signed_at.values()) < 120_000

    await asyncio.sleep(INTERVAL + 60)
    refreshed_at = {name: _issued(publisher, name) for name in names}
    early = [(refreshed_at[name] - signed_at[name]) / 1000 for name in names]
    assert min(early) >= INTERVAL * 0.95 - 1
    assert max(early) <= INTERVAL + 30, "each is refreshed in time"
    seconds = Counter(moment // 1000 for moment in refreshed_at.values())
    assert max(seconds.values()) <= 3 * count / (INTERVAL * 0.05)

    await asyncio.sleep(INTERVAL - 300)
    network.partition([publisher.host])  # the network is down for TTL/4, just when the next refreshes are due
    await asyncio.sleep(TTL / 4)
    network.heal()
    other = nodes.nodes[0]
    for wait in (90, 900):  # the second time what was not refreshed in the outage would have expired
        await asyncio.sleep(wait)
        lost = [name for name in names if other.server.storage.get(shared_key(name)) is None]
        assert not lost
        assert await other.get(names[0]) == b"up"


def _issued(publisher: object, name: str) -> int:
    record = publisher.server._publisher.intents[name].record  # type: ignore[attr-defined]
    return record.issued_at  # type: ignore[no-any-return]
