"""What lookups cost: `python -m tests.virtual.lookups [nodes] [share dead ...]`, 1,000 nodes and 0 0.25 0.5 by default.

Nodes join one every 0.1 s, values are published, 60 s after the last has joined a share of all nodes dies without a
word, and living ones ask for the values. Prints times, misses and every datagram by what caused it. The same seed
gives the same figures.
"""

import argparse
import asyncio
import gc
import os
import random
import statistics
import time
import traceback
from collections import Counter
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

from plasm_dht import PlasmServer
from plasm_dht.dht import ids, wire
from plasm_dht.dht.lookup import NodeLookup
from plasm_dht.record import shared_key
from tests.virtual.loop import VirtualLoop
from tests.virtual.network import Conditions, Network, rpc_kind
from tests.virtual.nodes import Node, Nodes, identity
from tests.virtual.sockets import Port

# Nodes that publish, and names that nobody has published.
PUBLISHERS = 20
# A get's consequences (resends, repairs, pings of strangers) are counted for this long after the last one (s).
AFTERWARDS = 10.0


class Tap(Network):
    """A network that notes of each datagram, from `start` on, which request it belongs to and why that was sent."""

    causes: Counter[str]
    _open: dict[bytes, str]

    def start(self) -> None:
        """Count from here."""
        self.causes = Counter()
        self._open = {}
        self.observe()

    def _observe(self, now: float, source: Port, target: Port, data: bytes) -> None:
        kind, message_id = rpc_kind(data), data[1 : wire.HEADER]
        if kind == "reply":
            self.causes[f"{self._open.get(message_id, 'earlier')} reply"] += 1
        elif message_id in self._open:
            self.causes[f"{self._open[message_id]} resent"] += 1
        else:
            self._open[message_id] = kind
            self.causes[kind] += 1


@dataclass
class Figures:
    """What some lookups took: seconds of each, misses, datagrams of the whole network by cause."""

    took: list[float] = field(default_factory=list)
    missed: int = 0
    causes: Counter[str] = field(default_factory=Counter)

    def quantile(self, share: float) -> float:
        return sorted(self.took)[min(int(share * len(self.took)), len(self.took) - 1)]

    @property
    def datagrams(self) -> float:
        """A lookup, everything included."""
        return self.causes.total() / len(self.took)

    def __str__(self) -> str:
        causes = ", ".join(f"{cause} {count / len(self.took):.2f}" for cause, count in self.causes.most_common())
        times = "/".join(f"{self.quantile(share):.3f}" for share in (0.5, 0.95, 1))
        missed = f"{self.missed} of {len(self.took)} missed"
        return f"p50/p95/max {times} s, {missed}, {self.datagrams:.1f} datagrams: {causes}"


def name_of(number: int) -> str:
    return f"/phase/c{number}/arm64/manifest"


async def grown(nodes: Nodes, count: int, *, publishers: int = PUBLISHERS, through: str = "first") -> None:
    """So many nodes, of which some publish, 60 s after the last has joined."""
    await nodes.start()
    joining = []
    for number in range(1, count):
        gate = nodes.nodes[0] if through == "first" else random.choice(nodes.nodes)
        settings = {"identity": identity(number)} if number <= publishers else {}
        joining.append(asyncio.ensure_future(nodes.start([gate], **settings)))
        await asyncio.sleep(0.1)
    await asyncio.gather(*joining)
    await asyncio.sleep(50)
    providers = sorted((node for node in nodes.nodes if node.server.identity), key=lambda node: node.address)
    await asyncio.gather(*(node.publish(name_of(number), number) for number, node in enumerate(providers)))
    await asyncio.sleep(10)


def kill(nodes: Nodes, share: float) -> list[Node]:
    """That share of all nodes dies. Returns the living."""
    for node in random.sample(nodes.nodes, int(share * len(nodes.nodes))):
        node.kill()
    return nodes.alive()


async def gets(
    tap: Tap, readers: Sequence[Node], names: Sequence[str], count: int, *, over: float = 0.0, found: bool = True
) -> Figures:
    """The gets of random readers, all at once or spread over so many seconds, and what they cost."""
    figures = Figures()

    async def get(delay: float, node: Node, name: str) -> None:
        await asyncio.sleep(delay)
        started = tap.now
        value = await node.get(name)
        figures.took.append(tap.now - started)
        figures.missed += (value is not None) is not found

    tap.start()
    chosen = random.sample(readers, count) if count <= len(readers) else random.choices(readers, k=count)
    await asyncio.gather(*(get(random.random() * over, node, random.choice(names)) for node in chosen))
    await asyncio.sleep(AFTERWARDS)
    figures.causes = tap.causes
    return figures


async def calls(tap: Tap, gates: Sequence[Node], names: Sequence[str], count: int) -> Figures:
    """The gets of callers that do not stay, one after the other, each through one of the nodes; joining is included."""
    figures = Figures()
    nodes = Nodes(tap)
    tap.start()
    for _ in range(count):
        started = tap.now
        caller = await nodes.start([random.choice(gates)], node_id=ids.TRANSIENT_ID)
        figures.missed += await caller.get(random.choice(names)) is None
        figures.took.append(tap.now - started)
        await caller.close()
    await asyncio.sleep(AFTERWARDS)
    figures.causes = tap.causes
    return figures


async def node_lookups(tap: Tap, readers: Sequence[Node], count: int) -> tuple[Figures, float]:
    """Lookups of random ids, and how many of the truly closest living nodes they found, as a share."""
    figures, shares = Figures(), []
    everybody = {node.server.node.long_id: node for node in readers}

    async def look(node: Node) -> None:
        key = random.randbytes(ids.ID_BYTES)
        others = [each for each in everybody if each != node.server.node.long_id]
        closest = sorted(others, key=int.from_bytes(key).__xor__)[: node.server.ksize]
        started = tap.now
        found = await node.host.run(lookup(node.server, key))
        figures.took.append(tap.now - started)
        shares.append(len({each.long_id for each in found} & set(closest)) / len(closest))
        figures.missed += shares[-1] < 1

    tap.start()
    await asyncio.gather(*(look(node) for node in random.sample(readers, count)))
    await asyncio.sleep(AFTERWARDS)
    figures.causes = tap.causes
    return figures, statistics.fmean(shares)


def lookup(server: PlasmServer, key: bytes) -> Coroutine[Any, Any, Any]:
    return NodeLookup(server.protocol, key, k=server.ksize, alpha=server.alpha).run()


async def report(nodes: Nodes, share: float, count: int) -> None:
    """Everything after the deaths of a share."""
    tap = nodes.network
    assert isinstance(tap, Tap)
    names = [name_of(number) for number in range(PUBLISHERS)]
    living = kill(nodes, share)
    tables = [node.server.protocol.router.live_count for node in living]
    held = [sum(bool(node.server.storage.holdings(shared_key(name))) for node in living) for name in names]
    heading = f"{share:.0%} dead: tables {min(tables)} to {max(tables)}, median {statistics.median(tables):.0f};"
    lines = [f"{heading} holders {min(held)} to {max(held)}"]
    lines.append(f"  at once       {await gets(tap, living, names, count)}")
    lines.append(f"  in a minute   {await gets(tap, living, names, count, over=60.0)}")
    nothing = [f"/phase/nothing/{number}/manifest" for number in range(PUBLISHERS)]
    lines.append(f"  of nothing    {await gets(tap, living, nothing, count, found=False)}")
    lines.append(f"  by callers    {await calls(tap, living, names, count)}")
    figures, exact = await node_lookups(tap, living, min(count, len(living)))
    lines.append(f"  of nodes      {figures}; {exact:.2%} of the closest")
    print("\n".join(lines), flush=True)  # noqa: T201


async def build(arguments: argparse.Namespace) -> Nodes:
    """The network, as it is before anybody dies."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    random.seed(arguments.seed)
    tap = Tap(loop, seed=arguments.seed, conditions=Conditions(latency=arguments.latency))
    nodes = Nodes(tap)
    started = time.perf_counter()
    await grown(nodes, arguments.nodes, through=arguments.through)
    took = time.perf_counter() - started
    each = tap.sent / arguments.nodes
    print(f"{arguments.nodes} nodes joined, {each:.0f} datagrams each, in {took:.0f} s", flush=True)  # noqa: T201
    return nodes


def measure(arguments: argparse.Namespace) -> None:
    """One network, and for each share of deaths a copy of the process, in which it goes on."""
    gc.set_threshold(200_000, 20, 20)
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        nodes = runner.run(build(arguments))
        gc.freeze()
        state = random.getstate()
        for share in arguments.dead:
            child = os.fork()
            if child == 0:
                random.setstate(state)  # Python seeds a copied process anew
                try:
                    runner.run(report(nodes, share, min(arguments.gets, int((1 - share) * arguments.nodes))))
                except BaseException:  # noqa: BLE001 - the copy must not go on as the original would
                    traceback.print_exc()
                os._exit(0)
            os.waitpid(child, 0)
        os._exit(0)  # a thousand nodes need not be taken down


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("nodes", nargs="?", type=int, default=1000)
    parser.add_argument("dead", nargs="*", type=float, default=[0.0, 0.25, 0.5])
    parser.add_argument("--gets", type=int, default=400)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--latency", type=float, default=0.040, help="median one-way latency (s)")
    parser.add_argument("--through", choices=("first", "random"), default="first")
    return parser.parse_args()


if __name__ == "__main__":
    measure(parse())
