"""How late a node's timers, pings and gets are while a crowd asks it more than it can read.

Node, neighbours and crowd are processes of their own: `python -m tests.bench.flood neighbours COUNT`, `node
RATE_LIMIT ADDRESS`, `crowd ADDRESS SOURCES`. The crowd sends as fast as one core can, and reads nothing.
"""

import asyncio
import json
import random
import socket
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

from kademlia.utils import digest

from plasm_dht import Identity, PlasmServer
from plasm_dht.dht import wire
from plasm_dht.dht.ids import Address
from tests.bench.children import Child, end_with_parent, say, serve
from tests.bench.load import BATCH, Lane, message_id
from tests.bench.report import Result, Row, Scale, percentile, spread

HOST = "127.0.0.1"
NAMES = [f"bench/{number}" for number in range(30)]
VALUE = bytes(100)
# Between two pings, and two gets, and how far ahead a timer is set (s).
PAUSE = 0.02
AHEAD = 0.005
# Before anything is measured (s): what joining has set off is over then, and round trips are known.
WARM = 0.3
KINDS = ("timers", "pings", "gets")
BOUND = 50  # ms
# Different requests that each address of the crowd sends over and over.
POOL = 4 * BATCH
# What floods: from how many addresses, and the node's limit for each (requests a second).
CROWDS: dict[str, tuple[int, int | None]] = {
    "one address over its limit": (1, 2000),
    "50 addresses over their limit": (50, 2000),
    "50 addresses without a limit": (50, None),
}


async def neighbours(count: int) -> None:
    """Nodes that hold records, until the input ends."""
    servers: list[PlasmServer] = []
    for _ in range(count):
        server = PlasmServer(identity=Identity.generate())
        await server.listen(0, HOST)
        if servers:
            await server.bootstrap([servers[0].address])
        servers.append(server)
    for number, name in enumerate(NAMES):
        await servers[number % count].set(name, VALUE)

    async def handle(_: dict[str, Any]) -> None:
        """They are asked nothing here."""

    await serve(handle, servers[0].address)
    for server in servers:
        server.stop()


class Flooded:
    """The node, and what it does for itself while it is flooded."""

    def __init__(self, server: PlasmServer) -> None:
        self.server = server
        self.source = random.Random(1)
        self.missed = 0

    async def timer(self) -> None:
        """A timer that does nothing."""
        due = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_later(AHEAD, due.set_result, None)
        await due

    async def ping(self) -> None:
        """Ping a neighbour."""
        contact = self.source.choice(list(self.server.protocol.router))
        answered, _ = await self.server.protocol.call_ping(contact)
        self.missed += not answered

    async def get(self) -> None:
        """Get what others hold."""
        names = [name for name in NAMES if self.server.storage.get(digest(name)) is None]
        self.missed += await self.server.get(self.source.choice(names or NAMES)) != VALUE

    async def repeat(self, what: Callable[[], Awaitable[None]], end: float, ahead: float, pause: float) -> Any:
        """How long each took beyond what it was to take, and the CPU time of this process meanwhile (s)."""
        loop, took = asyncio.get_running_loop(), []
        while (started := loop.time()) < end:
            used = time.process_time()
            await what()
            took.append((loop.time() - started - ahead, time.process_time() - used))
            await asyncio.sleep(pause)
        return took

    async def measure(self, seconds: float) -> dict[str, Any]:
        """All of it at once for so long."""
        before, self.missed = self.server.protocol.stats.received, 0
        end = asyncio.get_running_loop().time() + seconds
        timers, pings, gets = await asyncio.gather(
            self.repeat(self.timer, end, AHEAD, 0),
            self.repeat(self.ping, end, 0, PAUSE),
            self.repeat(self.get, end, 0, PAUSE),
        )
        read = (self.server.protocol.stats.received - before) / seconds
        return {"timers": timers, "pings": pings, "gets": gets, "missed": self.missed, "read": read}


async def node(rate_limit: float | None, neighbour: Address) -> None:
    """A node that measures itself when it is told to."""
    async with PlasmServer(rate_limit=rate_limit) as server:
        await server.listen(0, HOST)
        await server.bootstrap([neighbour])
        flooded = Flooded(server)
        await flooded.measure(WARM)

        async def handle(question: dict[str, Any]) -> Any:
            return await flooded.measure(question["seconds"])

        await serve(handle, server.address)


def crowd(address: Address, sources: int) -> None:
    """Ask as fast as possible for what nobody has asked for, under ids that nobody has, until the input ends."""
    source, lanes = random.Random(1), []
    for number in range(sources):
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind((f"127.0.1.{number + 1}", 0))
        sock.connect(address)
        asked = [
            wire.encode_request(message_id(index), "find_node", (source.randbytes(20), source.randbytes(20)))
            for index in range(POOL)
        ]
        lanes.append(Lane(sock, asked, 0))
    say("asking")
    while True:
        for lane in lanes:
            lane.send(BATCH)


# -- the bench's side --------------------------------------------------------------------------------------------------


def told(every: list[dict[str, Any]], by: int) -> str:
    """What is said of so many measurements."""
    parts = []
    for what in KINDS:
        took = [each[by] for one in every for each in one[what]]
        shares = " / ".join(f"{1000 * percentile(took, share):.1f}" for share in (0.5, 0.95, 0.99, 1))
        parts.append(f"{what} {shares}")
    return f"{', '.join(parts)}; {sum(one['missed'] for one in every)} without an answer"


def flooded(name: str, scale: Scale, neighbour: Address) -> list[Row]:
    """The greatest of three p95 while one crowd asks, by CPU time and by the clock."""
    sources, rate_limit = CROWDS[name]
    repetitions, seconds = scale.pick((1, 0.1), (5, 2.0), (15, 4.0))
    with Child("tests.bench.flood", "node", json.dumps(rate_limit), json.dumps(neighbour)) as child:
        quiet = child.ask(seconds=seconds)
        with Child("tests.bench.flood", "crowd", json.dumps(child.hello), str(sources)):
            every = [child.ask(seconds=seconds) for _ in range(repetitions)]
    read = spread(one["read"] for one in every).median
    rows = []
    for by, clock in ((1, "by CPU time"), (0, "by the clock")):
        late = spread(1000 * max(percentile((each[by] for each in one[what]), 0.95) for what in KINDS) for one in every)
        rows.append(
            Row(
                "flood",
                f"delay by {name}, {clock}",
                "ms",
                late,
                target=f"at most {BOUND} ms",
                reached=late.median <= BOUND and not any(one["missed"] for one in every),
                note=f"median / p95 / p99 / longest, in ms: {told(every, by)}. It read {read:,.0f} datagrams a second."
                f" Not flooded: {told([quiet], by)}",
            )
        )
    return rows


def measure(scale: Scale) -> Result:
    """The rows of this group."""
    with Child("tests.bench.flood", "neighbours", str(scale.pick(4, 32, 32))) as others:
        return Result([row for name in CROWDS for row in flooded(name, scale, others.hello)])


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["neighbours", count]:
            asyncio.run(neighbours(int(count)))
        case ["node", limit, address]:
            asyncio.run(node(json.loads(limit), tuple(json.loads(address))))
        case ["crowd", address, count]:
            end_with_parent()
            crowd(tuple(json.loads(address)), int(count))
