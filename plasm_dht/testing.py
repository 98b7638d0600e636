"""A network of nodes in one process, on loopback, for the tests of whoever embeds `PlasmServer`.

The sockets are real and the ports free ones, so that tests can run beside each other and beside a node of the machine.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from plasm_dht.dht.ids import Address
from plasm_dht.dht.server import DEFAULT_TTL, PlasmServer
from plasm_dht.errors import ConfigError
from plasm_dht.identity import Identity

HOST = "127.0.0.1"


class LocalNetwork:
    """The nodes of a network on loopback, which all know each other.

    Attributes:
        nodes: those that run, in the order in which they joined.
        record_ttl: how long a record lives in this network unless it is refreshed (s).
    """

    def __init__(self, record_ttl: float) -> None:
        self.nodes: list[PlasmServer] = []
        self.record_ttl = record_ttl

    @property
    def addresses(self) -> list[Address]:
        """(host, port) of each node, for `bootstrap`."""
        return [node.address for node in self.nodes]

    async def join(self, **settings: Any) -> PlasmServer:
        """One more node. `settings` are those of `PlasmServer`; it has an identity of its own unless told otherwise."""
        usual: dict[str, Any] = {"identity": Identity.generate(), "record_ttl": self.record_ttl, "rate_limit": None}
        node = PlasmServer(**usual | settings)  # no limit: all of them have the same address
        try:
            await node.listen(0, HOST)
            if self.nodes:
                await node.bootstrap(self.addresses)
        except BaseException:
            await node.close()
            raise
        self.nodes.append(node)
        return node

    async def leave(self, node: PlasmServer) -> None:
        """Stop a node cleanly: it withdraws what it has published."""
        self.nodes.remove(node)
        await node.close()

    async def kill(self, node: PlasmServer) -> None:
        """Stop a node as if its machine had lost power: nothing is withdrawn, what it has published expires."""
        self.nodes.remove(node)
        await node.close(withdraw=False)

    async def close(self) -> None:
        """Stop every node. Nothing is withdrawn: there is nobody left who would notice."""
        while self.nodes:
            await self.kill(self.nodes[-1])


@asynccontextmanager
async def local_network(n: int, *, record_ttl: float = DEFAULT_TTL) -> AsyncIterator[LocalNetwork]:
    """A network of `n` nodes on 127.0.0.1 that have joined each other; all of them are stopped at the end.

    `record_ttl` is the life of their records in seconds: with 1, the least, a killed node's record is gone a second
    later, and a living one's is refreshed every 0.6 s. Raises `ConfigError` for fewer than one node.
    """
    if n < 1:
        raise ConfigError(f"n is {n}: a network has at least 1 node")
    network = LocalNetwork(record_ttl)
    try:
        for _ in range(n):
            await network.join()
        yield network
    finally:
        await network.close()
