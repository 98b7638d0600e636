"""How long a get and a put take among 64 nodes on loopback, where the network costs nothing.

All nodes of a kind live in one process: `python -m tests.bench.latency ours|stock COUNT SEED`. The two take turns, so
that one is idle while the other is asked.
"""

import asyncio
import logging
import random
import statistics
import sys
import time
from typing import Any

from kademlia.network import Server
from kademlia.utils import digest

from plasm_dht import Identity, PlasmServer
from tests.bench.children import BenchError, Child, serve
from tests.bench.report import Result, Row, Scale, percentile, ratios, spread

HOST = "127.0.0.1"
VALUE = bytes(100)
NOT_MEASURED = "not measured"
# A stock get among dead nodes takes rounds of 5 s.
STOCK_PATIENCE = 120.0


class Nodes:
    """The nodes of one kind in this process."""

    def __init__(self, kind: str, seed: str) -> None:
        self.kind = kind
        self.source = random.Random(seed)
        self.servers: list[Any] = []
        self.dead: list[Any] = []
        self.names: list[str] = []

    async def start(self, count: int) -> None:
        """Start them, each joined through the first."""
        for _ in range(count):
            server: Any = PlasmServer(identity=Identity.generate()) if self.kind == "ours" else Server()
            await server.listen(0, HOST)
            if self.servers:
                await server.bootstrap([self.servers[0].transport.get_extra_info("sockname")])
            self.servers.append(server)
        await asyncio.sleep(0.5)  # nothing tells when what joining has set off, at both kinds of node, is over

    async def put(self, count: int, again: bool) -> list[float]:
        """Seconds of each of so many puts, under new names or under those that a node of ours has put before."""
        took = []
        for _ in range(count):
            if again:
                number = self.source.randrange(len(self.names))
            else:
                number = len(self.names)
                self.names.append(f"bench/{number}")
            server = self.servers[number % len(self.servers)]
            started = time.perf_counter()
            stored = await server.set(self.names[number], VALUE)
            took.append(time.perf_counter() - started)
            if not stored:
                raise BenchError(f"{self.kind}: a put was not stored")
        return took

    def readers(self, name: str) -> list[Any]:
        """Who does not hold the name, so has to ask."""
        return [server for server in self.servers if server.storage.get(digest(name)) is None]

    async def get(self, reader: Any, name: str) -> float | None:
        """Seconds of one get; `None` when the value was not found."""
        started = time.perf_counter()
        found = await reader.get(name)
        took = time.perf_counter() - started
        return took if found == VALUE else None

    async def gets(self, count: int) -> list[float | None]:
        """So many gets, one after the other, each by a node that does not hold the value."""
        took = []
        while len(took) < count:
            name = self.source.choice(self.names)
            took.append(await self.get(self.source.choice(self.readers(name)), name))
        return took

    async def each_gets(self, at_once: bool) -> list[float | None]:
        """Each node gets one value that it does not hold, for the first time since the others died."""
        pairs = []
        for server in self.servers:
            names = [name for name in self.names if server.storage.get(digest(name)) is None]
            if names:
                pairs.append((server, self.source.choice(names)))
        if at_once:
            return list(await asyncio.gather(*(self.get(*pair) for pair in pairs)))
        return [await self.get(*pair) for pair in pairs]

    def kill(self, share: float) -> int:
        """Stop a share of them without a word."""
        self.dead = self.source.sample(self.servers[1:], round(len(self.servers) * share))
        for server in self.dead:
            server.stop()
        self.servers = [server for server in self.servers if server not in self.dead]
        return len(self.dead)


async def main(kind: str, count: int, seed: str) -> None:
    """Do what is asked until the input ends."""
    logging.disable(logging.CRITICAL)
    nodes = Nodes(kind, seed)
    await nodes.start(count)

    async def handle(question: dict[str, Any]) -> Any:
        match question["do"]:
            case "put":
                return await nodes.put(question["count"], question.get("again", False))
            case "get":
                return await nodes.gets(question["count"])
            case "kill":
                return nodes.kill(question["share"])
        return await nodes.each_gets(question["at_once"])

    await serve(handle, {})
    for server in nodes.servers:
        server.stop()


# -- the bench's side --------------------------------------------------------------------------------------------------


def found(kind: str, seconds: list[float | None]) -> list[float]:
    """The times of gets that all found their value. Raises `BenchError` when one did not."""
    times = [each for each in seconds if each is not None]
    if len(times) < len(seconds):
        raise BenchError(f"{kind}: {len(seconds) - len(times)} of {len(seconds)} gets found nothing")
    return times


def row(name: str, ours: list[float], stock: list[float], target: str, bound: float | None, note: str = "") -> Row:
    """A row of times: repetitions in seconds, shown in ms; `bound` is of the ratio."""
    ratio = ratios(ours, stock)
    return Row(
        "latency",
        name,
        "ms",
        spread(1000 * each for each in ours),
        spread(1000 * each for each in stock),
        NOT_MEASURED,
        ratio,
        "less",
        target,
        None if bound is None else ratio.median <= bound,
        note,
    )


def alive(scale: Scale) -> list[Row]:
    """All nodes alive."""
    count, repetitions, puts, gets = scale.pick((26, 1, 3, 4), (64, 7, 30, 60), (64, 15, 60, 120))
    times: dict[str, dict[str, list[list[float]]]] = {}
    with (
        Child("tests.bench.latency", "ours", str(count), str(scale.seed)) as ours,
        Child("tests.bench.latency", "stock", str(count), str(scale.seed)) as stock,
    ):
        for _ in range(repetitions):
            for kind, child in (("ours", ours), ("stock", stock)):
                mine = times.setdefault(kind, {"put": [], "again": [], "get": []})
                mine["put"].append(child.ask(do="put", count=puts))
                mine["again"].append(child.ask(do="put", count=puts, again=True))
                mine["get"].append(found(kind, child.ask(do="get", count=gets)))

    def middle(kind: str, what: str, share: float = 0.5) -> list[float]:
        pick = statistics.median if share == 0.5 else lambda each: percentile(each, share)
        return [pick(each) for each in times[kind][what]]

    rows = []
    for what, name, bound in (
        ("get", "get", 2.0),
        ("put", "put, a new name", 1.5),
        ("again", "put, a name again", 1.5),
    ):
        ours_p95, stock_p95 = (statistics.median(middle(kind, what, 0.95)) for kind in ("ours", "stock"))
        note = f"p95: ours {1000 * ours_p95:.2f} ms, stock {1000 * stock_p95:.2f} ms; {count} nodes"
        target = f"at most {bound:g} times stock (medians)"
        rows.append(row(f"{name}, all alive", middle("ours", what), middle("stock", what), target, bound, note))
    return rows


def among_dead(scale: Scale) -> Row:
    """A quarter has died a moment ago, and each of the others gets something for the first time since."""
    count, repetitions = scale.pick((26, 1), (64, 5), (64, 15))
    p95: list[float] = []
    every: list[float] = []
    missed: dict[str, int] = {}
    for repetition in range(repetitions):
        with Child("tests.bench.latency", "ours", str(count), str(repetition)) as child:
            child.ask(do="put", count=count)
            child.ask(do="kill", share=0.25)
            got = child.ask(do="each", at_once=False)
            missed["ours"] = missed.get("ours", 0) + got.count(None)
            times = [each for each in got if each is not None]
            p95.append(percentile(times, 0.95))
            every += times
    result = Row(
        "latency",
        "get, a quarter just died (p95)",
        "ms",
        spread(1000 * each for each in p95),
        opendht="11 (not measured here)",
        target="about 20 ms",
        reached=percentile(every, 0.95) <= 0.020 and not missed["ours"],
        note=f"ours: median {1000 * statistics.median(every):.1f} ms, longest {1000 * max(every):.1f} ms of"
        f" {len(every)}, {missed['ours']} not found",
    )
    if scale.name == "tiny":  # stock takes 10 s
        return result
    with Child("tests.bench.latency", "stock", str(count), "0") as child:
        child.ask(do="put", count=count)
        child.ask(do="kill", share=0.25)
        got = child.ask(do="each", at_once=True, patience=STOCK_PATIENCE)
    times = [each for each in got if each is not None]
    stock = percentile(times, 0.95)
    result.stock = spread([1000 * stock])
    result.ratio = spread(each / stock for each in p95)
    result.note += (
        f"; stock, once, all readers at the same moment: median {1000 * statistics.median(times):,.0f} ms,"
        f" longest {1000 * max(times):,.0f} ms of {len(times)}, {got.count(None)} not found"
    )
    return result


def measure(scale: Scale) -> Result:
    """The rows of this group."""
    return Result([*alive(scale), among_dead(scale)])


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), sys.argv[3]))
