"""Networks of production nodes on the simulated network: join them, ask them, kill them, look into them."""

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from typing import Any

from plasm_dht import Identity, PlasmServer
from plasm_dht.identity import Ed25519PrivateKey
from plasm_dht.record import Value, bound_key, shared_key
from tests.virtual.host import Host
from tests.virtual.network import Network

PORT = 8468


def identity(number: int) -> Identity:
    """The same key pair for the same number, in every run."""
    return Identity(Ed25519PrivateKey.from_private_bytes(number.to_bytes(32)))


@dataclass(eq=False)
class Node:
    """A PlasmServer and the machine that it runs on."""

    host: Host
    server: PlasmServer

    @property
    def address(self) -> tuple[str, int]:
        return self.host.address, PORT

    async def get(self, name: str, **options: Any) -> Value | None:
        return await self.host.run(self.server.get(name, **options))

    async def publish(self, name: str, value: Value, **options: Any) -> Any:
        return await self.host.run(self.server.publish(name, value, **options))

    async def withdraw(self, name: str) -> Any:
        return await self.host.run(self.server.withdraw(name))

    async def close(self) -> None:
        await self.host.run(self.server.close())

    def kill(self) -> None:
        self.host.kill()

    def seqs(self, name: str, publisher: Identity) -> set[int]:
        """The sequence numbers that this node holds of a publisher's record, under either key."""
        storage = self.server.storage
        held = (
            storage.holding(key, publisher.public_key)
            for key in (shared_key(name), bound_key(publisher.public_key, name))
        )
        return {holding.seq for holding in held if holding is not None}


class Nodes:
    """The nodes of one scenario."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.nodes: list[Node] = []

    async def start(self, bootstrap: Iterable[Node] = (), *, host: Host | None = None, **settings: Any) -> Node:
        """A new node that joins through the given ones."""
        host = host or self.network.host()
        server = PlasmServer(clock=host.clock, **settings)
        await host.run(server.listen(PORT, host.address))
        addresses = [node.address for node in bootstrap]
        if addresses:
            await host.run(server.bootstrap(addresses))
        node = Node(host, server)
        self.nodes.append(node)
        return node

    async def grow(self, count: int, *, every: float = 0.1, **settings: Any) -> list[Node]:
        """So many more nodes, which join through the first one, one after the other."""
        joining = []
        for _ in range(count):
            if not self.nodes:
                await self.start(**settings)
                continue
            joining.append(asyncio.ensure_future(self.start([self.nodes[0]], **settings)))
            await asyncio.sleep(every)
        await asyncio.gather(*joining)
        return self.nodes

    def alive(self) -> list[Node]:
        return [node for node in self.nodes if node.host.alive]


async def everywhere(nodes: Iterable[Node], ask: Callable[[Node], Coroutine[Any, Any, Any]]) -> list[Any]:
    """What each of the nodes answers, asked at the same moment."""
    return list(await asyncio.gather(*(ask(node) for node in nodes)))
