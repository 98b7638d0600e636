"""Every node of a network is killed at one moment and comes back from its disk: nothing is lost, nothing returns."""

import asyncio
import random
import shutil
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import pytest

from plasm_dht.dht.ids import Address
from plasm_dht.dht.sqlite import SqliteStorage
from tests.virtual.network import Network
from tests.virtual.nodes import Node, Nodes, everywhere, identity

NODES, RECORDS = 40, 6
HOUR = 3600.0


class Restartable(Nodes):
    """Nodes with a disk each."""

    def __init__(self, network: Network, folder: Path) -> None:
        super().__init__(network)
        self.folder = folder
        self.storages: list[SqliteStorage] = []
        self.boots = 0

    async def boot(self, address: str | None, bootstrap: Iterable[Node] = (), **settings: object) -> Node:
        """A node with what is on the disk of that address, or with an empty one."""
        host = self.network.host(address) if address else self.network.host()
        storage = SqliteStorage(self.disk(host.address) / "node.sqlite", clock=host.clock)
        self.storages.append(storage)
        return await self.start(bootstrap, host=host, storage=storage, **settings)

    def disk(self, address: str) -> Path:
        return self.folder / str(self.boots) / address

    def cut_the_power(self) -> list[Node]:
        """Kill every node. What is on the disks at this moment is what they find when they boot again."""
        for node in (killed := self.alive()):
            node.kill()
        shutil.copytree(self.folder / str(self.boots), self.folder / str(self.boots + 1))
        self.boots += 1
        return killed

    async def close(self) -> None:
        for storage in self.storages:
            await asyncio.to_thread(storage.abandon)  # SQLite tidies up when it closes


@pytest.fixture
async def nodes(network: Network, tmp_path: Path) -> AsyncIterator[Restartable]:
    nodes = Restartable(network, tmp_path)
    yield nodes
    await nodes.close()


@pytest.mark.parametrize("knows_bootstrap", [pytest.param(True, marks=pytest.mark.soak), False])
async def test_all_nodes_are_killed_and_restarted_at_once_and_every_unexpired_record_is_found_within_10_s(
    network: Network, nodes: Restartable, knows_bootstrap: bool
) -> None:
    first = await nodes.boot(None)
    for number in range(1, NODES):
        await nodes.boot(None, [first], identity=identity(number) if number <= RECORDS else None)
    publishers = nodes.nodes[1 : RECORDS + 1]
    await asyncio.sleep(60)
    for number, publisher in enumerate(publishers):
        for name in (f"stays {number}", f"withdrawn {number}"):
            await publisher.publish(name, f"value {number}", ttl=HOUR)
        await publisher.publish(f"expires {number}", "short", ttl=45)
        await publisher.publish(f"shortened {number}", "long", ttl=HOUR)
        await publisher.publish(f"shortened {number}", "short", ttl=45)
    await asyncio.sleep(1)
    for number, publisher in enumerate(publishers):
        await publisher.withdraw(f"withdrawn {number}")
    await asyncio.sleep(1.1)  # a second is what may be lost
    expected = [
        await publisher.host.run(publisher.server.get_record(f"stays {number}"))
        for number, publisher in enumerate(publishers)
    ]
    assert None not in expected

    killed = nodes.cut_the_power()
    await asyncio.sleep(45)
    died = network.now
    random.shuffle(killed)
    again = await asyncio.gather(*(restart(nodes, node, first if knows_bootstrap else None) for node in killed))
    assert {node.server.node.id for node in again} == {node.server.node.id for node in killed}

    async def look(node: Node) -> None:
        async def one(number: int) -> None:
            assert await node.host.run(node.server.get_record(f"stays {number}")) == expected[number], number
            for gone in ("withdrawn", "expires", "shortened"):
                assert await node.get(f"{gone} {number}") is None, (gone, number)

        await asyncio.gather(*(one(number) for number in range(RECORDS)))

    await asyncio.sleep(died + 5 - network.now)
    await everywhere(again, look)
    assert network.now < died + 10
    if knows_bootstrap:
        return
    # nobody signs any more, and no restart makes a life longer
    await asyncio.sleep(HOUR - 300)
    assert await again[0].get("stays 0") == "value 0"
    await asyncio.sleep(400)
    for node in again[::10]:
        assert await node.get("stays 0") is None
        assert await node.get("withdrawn 0") is None


async def restart(nodes: Restartable, node: Node, bootstrap: Node | None) -> Node:
    """Within two seconds of each other, in any order; nobody publishes again."""
    await asyncio.sleep(random.uniform(0, 2))
    joins = [bootstrap] if bootstrap is not None and bootstrap.address != node.address else []
    return await nodes.boot(node.host.address, joins)


async def test_a_publisher_that_restarts_alone_is_found_by_who_asks_it_and_goes_on_above_its_last_seq(
    network: Network, nodes: Restartable
) -> None:
    publisher = await nodes.boot(None, identity=identity(1))
    before = await publisher.publish("name", "one", ttl=HOUR)
    await asyncio.sleep(2)
    nodes.cut_the_power()
    host = network.host(publisher.host.address)
    host.clock.step(-600)
    storage = SqliteStorage(nodes.disk(host.address) / "node.sqlite", clock=host.clock)
    nodes.storages.append(storage)
    again = await nodes.start(host=host, storage=storage, identity=identity(1))
    assert await again.get("name") == "one"
    after = await again.publish("name", "two", ttl=HOUR)
    assert after.seq == before.seq + 1


async def test_what_is_kept_of_the_contacts_follows_the_table_and_is_not_told_again(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = Nodes(network)
    first, second = await nodes.grow(2)
    kept: list[list[Address]] = []
    monkeypatch.setattr(first.server.storage, "keep_contacts", kept.append)
    await asyncio.sleep(61)
    third = await nodes.start([first])
    await asyncio.sleep(61)
    assert set(kept[-1]) == {second.address, third.address}
    told = len(kept)
    await asyncio.sleep(600)
    assert len(kept) == told
    third.kill()
    await asyncio.sleep(600)
    assert kept[-1] == [second.address]
