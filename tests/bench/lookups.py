"""What a get costs as a network grows, and when much of it has died: production code on the virtual network.

Computing takes no virtual time, so the figures are the same on every machine for the same seed and the same code, and
two networks run side by side. A network is a process: `python -m tests.bench.lookups KIND SEED GETS DEAD SIZE...`.
"""

import asyncio
import functools
import gc
import logging
import os
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from kademlia.network import Server
from kademlia.utils import digest

from plasm_dht import PlasmServer
from tests.bench.children import BenchError, Child, end_with_parent, say
from tests.bench.report import Result, Row, Scale, Spread, percentile
from tests.virtual.host import Host
from tests.virtual.loop import VirtualLoop
from tests.virtual.network import Network
from tests.virtual.nodes import identity
from tests.virtual.sockets import Port

PORT = 8468
VALUE = bytes(100)
NAMES = 50
PUBLISHERS = 10
# Virtual seconds: between two joins, from the last join to the gets, and between two gets.
JOIN_EVERY, SETTLE, GET_EVERY = 0.1, 60.0, 0.1
SIZES = (50, 100, 250, 500, 1000, 2500, 5000)
STOCK_UP_TO = 1000
# Datagrams that the gets of one measurement may set off, far above what they need; then nothing is sent any more. Among
# stock nodes a store that is answered by a node with no place in the table (its bucket is full) is followed by a store
# of everything held there, each of which is answered: within a second there would be millions.
STORM = 20_000
# Shares of the nodes that die at once, and what p95 of a get among the others may be (s).
DEAD_BOUNDS = {0: 0.35, 25: 0.55, 50: 1.0}
MAX_DATAGRAMS = 30


class Bounded(Network):
    """A network that falls silent once `budget` datagrams were sent."""

    budget: int | None = None

    def send(self, host: Host, source: Port, target: Port, data: bytes) -> None:
        """As in any network, while there is budget."""
        if self.budget is not None:
            if self.budget <= 0:
                return
            self.budget -= 1
        super().send(host, source, target, data)


class Nodes:
    """A network of one kind."""

    def __init__(self, kind: str, seed: int) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        self.kind = kind
        self.source = random.Random(seed)
        self.network = Bounded(loop, seed=seed)
        self.all: list[tuple[Host, Any]] = []

    async def _join(self, number: int) -> None:
        host = self.network.host()
        owner = identity(number + 1) if number < PUBLISHERS else None
        server: Any = PlasmServer(clock=host.clock, identity=owner) if self.kind == "ours" else Server()
        self.all.append((host, server))
        await host.run(server.listen(PORT, host.address))
        if number:
            await host.run(server.bootstrap([(self.all[0][0].address, PORT)]))

    async def grow(self, count: int) -> None:
        """Join, one after the other through the first node, until there are so many."""
        joining = []
        for number in range(len(self.all), count):
            joining.append(asyncio.ensure_future(self._join(number)))
            await asyncio.sleep(JOIN_EVERY)
        await asyncio.gather(*joining)

    async def measure(self, gets: int, dead: int) -> dict[str, Any]:
        """Publish, wait, kill so many percent, and have others get."""
        size = len(self.all)
        names = [f"bench/{size}/{number}" for number in range(min(NAMES, gets))]
        before = self.network.sent
        for number, name in enumerate(names):
            host, server = self.all[number % PUBLISHERS]
            await host.run(server.set(name, VALUE))
        put = (self.network.sent - before) / len(names)
        await asyncio.sleep(SETTLE)
        # Publishers read nothing: they hold it. They may die like anybody else.
        for host, _ in self.source.sample(self.all, size * dead // 100):
            host.kill()
        pairs = []
        alive = [node for node in self.all if node[0].alive]
        for number in range(gets):
            name = names[number % len(names)]
            asking = [node for node in alive if node[1].storage.get(digest(name)) is None]
            if not asking:
                raise BenchError(f"everybody alive holds {name}: {size} nodes are too few to get it from")
            pairs.append((self.source.choice(asking), name))
        before, largest = self.network.sent, self.network.largest
        self.network.budget = STORM
        asked = []
        for (host, server), name in pairs:
            asked.append(asyncio.ensure_future(self._get(host, server, name)))
            await asyncio.sleep(GET_EVERY)
            if not self.network.budget:
                break
        pending = set(asked)
        while pending and self.network.budget:
            _, pending = await asyncio.wait(pending, timeout=1)
        self.network.budget = None
        took = [each.result() for each in asked if each.done()]
        found = [each for each in took if each is not None]
        return {
            "nodes": size,
            "dead": dead,
            "gets": len(took),
            "cut": gets - len(took),
            "found": len(found),
            "p50": percentile(found, 0.5),
            "p95": percentile(found, 0.95),
            "longest": max(found),
            "datagrams": (self.network.sent - before) / len(asked),
            "put": put,
            "largest": largest,
        }

    async def _get(self, host: Host, server: Any, name: str) -> float | None:
        started = self.network.now
        value = await host.run(server.get(name))
        return self.network.now - started if value == VALUE else None


async def run(kind: str, seed: int, gets: int, dead: int, sizes: list[int]) -> None:
    """Say what was measured at each size; the nodes die at the last one."""
    random.seed(seed)
    gc.freeze()
    gc.set_threshold(200_000, 20, 20)
    logging.disable(logging.CRITICAL)
    nodes = Nodes(kind, seed)
    for size in sizes:
        await nodes.grow(size)
        say(await nodes.measure(gets, dead if size == sizes[-1] else 0))
    os._exit(0)  # what thousands of nodes leave behind needs no tidying


# -- the bench's side --------------------------------------------------------------------------------------------------


def simulate(scale: Scale, kind: str, gets: int, dead: int, sizes: list[int]) -> list[dict[str, Any]]:
    """What one network measured, size by size."""
    arguments = [kind, str(scale.seed), str(gets), str(dead), *map(str, sizes)]
    with Child("tests.bench.lookups", *arguments, patience=3600) as child:
        return [child.hello, *(child.answer(3600) for _ in sizes[1:])]


def once(value: float) -> Spread:
    """A spread of one: the same seed gives the same."""
    return Spread(value, value, value)


def rows(ours: dict[str, Any], stock: dict[str, Any] | None) -> list[Row]:
    """The time and the datagrams of a get at one share of dead nodes."""
    size, dead = ours["nodes"], ours["dead"]
    bound = DEAD_BOUNDS[dead]
    what = f"{size:,} nodes, {dead} % dead"
    all_found = ours["found"] == ours["gets"]
    judged = size == 1000
    notes = [
        f"{kind}: {each['found']} of {each['gets']} found, median {each['p50']:.3f} s, longest {each['longest']:.2f} s"
        + (f"; stopped after {STORM:,} datagrams with {each['cut']} gets not ended or not begun" if each["cut"] else "")
        for kind, each in (("ours", ours), ("stock", stock))
        if each is not None
    ]
    time = Row(
        "lookups",
        f"get, p95, {what}",
        "s",
        once(ours["p95"]),
        once(stock["p95"]) if stock else None,
        "",
        once(ours["p95"] / stock["p95"]) if stock else None,
        "less",
        f"at most {bound:g}, all found",
        ours["p95"] <= bound and all_found if judged else None,
        "; ".join(notes),
    )
    datagrams = Row(
        "lookups",
        f"datagrams a get, {what}",
        "datagrams",
        once(ours["datagrams"]),
        once(stock["datagrams"]) if stock else None,
        "",
        once(ours["datagrams"] / stock["datagrams"]) if stock else None,
        "less",
        f"at most {MAX_DATAGRAMS}",
        ours["datagrams"] <= MAX_DATAGRAMS if judged else None,
        f"all that anybody sent meanwhile; the largest of the run had {ours['largest']:,} bytes",
    )
    return [time, datagrams]


def measure(scale: Scale) -> Result:
    """The rows and the curve of this group."""
    gets, size = scale.pick(5, 200), scale.pick(50, 1000)
    sizes = scale.pick([size], SIZES[:5], SIZES)
    shares = [0, 25, 50]
    stock_shares = scale.pick([0], shares)
    stock_sizes = [each for each in sizes if each <= STOCK_UP_TO]
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        start = functools.partial(pool.submit, simulate, scale)
        stock_dead = {dead: start("stock", gets, dead, [size]) for dead in stock_shares}
        ours_dead = {dead: start("ours", gets, dead, [size]) for dead in shares}
        ours_curve, stock_curve = start("ours", gets, 0, sizes), start("stock", gets, 0, stock_sizes)
        result = Result()
        for dead in shares:
            stock = stock_dead[dead].result()[-1] if dead in stock_dead else None
            result.rows += rows(ours_dead[dead].result()[-1], stock)
        result.curve = {"ours": ours_curve.result(), "stock": stock_curve.result()}
    return result


if __name__ == "__main__":
    end_with_parent()
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        kind, seed, gets, dead, *sizes = sys.argv[1:]
        runner.run(run(kind, int(seed), int(gets), int(dead), [int(size) for size in sizes]))
