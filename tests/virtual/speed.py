"""How fast the simulator is: `python -m tests.virtual.speed [nodes] [seconds between two pings of a node]`."""

import asyncio
import gc
import random
import sys
import time
from typing import Any

from tests.virtual.host import Host
from tests.virtual.loop import VirtualLoop
from tests.virtual.network import Network

PAYLOAD = bytes(100)


class PingPong(asyncio.DatagramProtocol):
    """Pings a random node at an interval, with a timeout that the answer cancels; answers pings at once."""

    transport: asyncio.DatagramTransport

    def __init__(self, peers: list[tuple[str, int]], interval: float) -> None:
        self.peers = peers
        self.interval = interval
        self.timeout: asyncio.TimerHandle | None = None
        self.loop = asyncio.get_running_loop()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.loop.call_later(random.random() * self.interval, self.ping)

    def ping(self) -> None:
        self.transport.sendto(b"?" + PAYLOAD, random.choice(self.peers))
        self.timeout = self.loop.call_later(5, self.expired)
        self.loop.call_later(self.interval, self.ping)

    def expired(self) -> None:
        self.timeout = None

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        if data[0] == 63:
            self.transport.sendto(b"!" + PAYLOAD, addr)
        elif self.timeout is not None:
            self.timeout.cancel()


class Bounce(asyncio.DatagramProtocol):
    """Sends back what comes: the price of a datagram and of nothing else."""

    transport: asyncio.DatagramTransport

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self.transport.sendto(data, addr)


async def bounce(nodes: int, virtual: float = 60.0) -> None:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    network = Network(loop, seed=1)
    hosts = [network.host() for _ in range(nodes)]
    for host in hosts:
        transport, _ = await loop.create_datagram_endpoint(Bounce, local_addr=(host.address, 8468))
        transport.sendto(PAYLOAD, (hosts[0].address, 8468))
    started = time.perf_counter()
    await asyncio.sleep(virtual)
    print(f"{network.sent / (time.perf_counter() - started):,.0f} datagrams a second with trivial handlers")  # noqa: T201
    await network.close()


async def measure(nodes: int, interval: float, virtual: float = 3600.0) -> None:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    random.seed(1)
    network = Network(loop, seed=1)
    hosts: list[Host] = [network.host() for _ in range(nodes)]
    peers = [(host.address, 8468) for host in hosts]
    for host in hosts:
        with host:
            await loop.create_datagram_endpoint(lambda: PingPong(peers, interval), local_addr=("0.0.0.0", 8468))
    gc.collect()
    gc.freeze()
    gc.set_threshold(200_000, 20, 20)
    started = time.perf_counter()
    await asyncio.sleep(virtual)
    wall = time.perf_counter() - started
    hours = virtual / 3600
    print(  # noqa: T201
        f"{nodes} nodes, a ping every {interval:g} s: {wall / hours:.1f} s of real time a virtual hour,"
        f" {network.sent / wall:,.0f} datagrams a second, trace {network.trace}"
    )
    await network.close()


if __name__ == "__main__":
    arguments = [float(argument) for argument in sys.argv[1:]]
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(bounce(1000))
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(measure(int(arguments[0]) if arguments else 1000, arguments[1] if arguments[1:] else 10.0))
