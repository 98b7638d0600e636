"""Longer runs, by `make soak`: a thousand nodes, three days of churn."""

import asyncio
import random
import time

import pytest

from tests.virtual.network import Network
from tests.virtual.nodes import Nodes, identity

pytestmark = pytest.mark.soak
NAME = "/phase/stable/arm64/manifest"
HOUR = 3600.0


async def test_a_thousand_nodes_for_a_virtual_hour_run_in_under_a_minute(network: Network) -> None:
    nodes = Nodes(network)
    await nodes.grow(1000)
    publisher = await nodes.start([nodes.nodes[0]], identity=identity(1))
    await publisher.publish(NAME, b"v1")
    started = time.perf_counter()
    await asyncio.sleep(HOUR)
    took = time.perf_counter() - started
    for node in random.sample(nodes.nodes, 50):
        assert await node.get(NAME) == b"v1"
    assert network.largest <= 1232
    print(f"1,000 nodes, one virtual hour: {took:.1f} s, {network.sent} datagrams in all")  # noqa: T201  # what `make soak -s` is for
    assert took < 60


async def test_three_days_of_churn_lose_nothing(network: Network) -> None:
    nodes = Nodes(network)
    await nodes.grow(30)
    first = nodes.nodes[0]
    publisher = await nodes.start([first], identity=identity(1))
    reader = await nodes.start([first])
    mortal = [node for node in nodes.nodes if node not in (first, publisher, reader)]
    await publisher.publish(NAME, b"v1")
    for minute in range(0, 3 * 24 * 60, 8):  # half of the others every two hours
        await asyncio.sleep(480)
        random.choice(mortal).kill()
        mortal = [node for node in mortal if node.host.alive]
        mortal.append(await nodes.start([first]))
        assert await reader.get(NAME) == b"v1", f"minute {minute}"
        nodes.nodes = nodes.alive()
