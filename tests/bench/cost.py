"""What a published record costs: bytes and datagrams an hour, of its publisher and of all who hold it.

Two virtual networks of the same seed, one with records and one without; the difference, by the record. Computing takes
no virtual time, so the figures are the same on every machine. A network is a process:
`python -m tests.bench.cost SEED NODES RECORDS PUBLISHERS`.
"""

import asyncio
import functools
import gc
import os
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tests.bench.children import Child, end_with_parent, say
from tests.bench.report import Result, Row, Scale, Spread
from tests.virtual.loop import VirtualLoop
from tests.virtual.network import Network
from tests.virtual.nodes import Nodes, identity

VALUE = bytes(100)
PUBLISHERS = 32  # the most that a key holds
# Virtual seconds: from the last publish to the count, and how long is counted: three refreshes of 2,400 s.
SETTLE, COUNTED = 600, 7200
# Bytes that IPv4 and UDP put before each datagram.
HEADERS = 28


async def run(seed: int, size: int, records: int, publishers: int) -> None:
    """Count what all of the network sends: `records` names, each published by so many publishers."""
    random.seed(seed)
    gc.set_threshold(200_000, 20, 20)
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    network = Network(loop, seed=seed)
    nodes = Nodes(network)
    await nodes.start()
    # Who may publish is the same in every network, whether it publishes or not.
    for number in range(1, size):
        await nodes.start([nodes.nodes[0]], identity=identity(number) if number <= PUBLISHERS else None)
    for record in range(records):
        for publisher in range(publishers):
            await nodes.nodes[1 + (record + publisher) % PUBLISHERS].publish(f"bench/{record}", VALUE)
    await asyncio.sleep(SETTLE)
    network.observe()
    before = network.sent, network.sent_bytes
    for _ in range(COUNTED // 60):
        await asyncio.sleep(60)  # virtual
        network.record.clear()  # the counts are enough
    hours = COUNTED / 3600
    say(
        {
            "nodes": size,
            "records": records,
            "publishers": publishers,
            "datagrams": (network.sent - before[0]) / hours,
            "bytes": (network.sent_bytes - before[1]) / hours,
            "kinds": {kind: count / hours for kind, count in network.kinds.items()},
            "kind_bytes": {kind: count / hours for kind, count in network.kind_bytes.items()},
        }
    )
    os._exit(0)  # what a network leaves behind needs no tidying


# -- the bench's side --------------------------------------------------------------------------------------------------


def simulate(seed: int, size: int, records: int, publishers: int) -> dict[str, Any]:
    """What one network sent in an hour."""
    arguments = [str(each) for each in (seed, size, records, publishers)]
    with Child("tests.bench.cost", *arguments, patience=3600) as child:
        return dict(child.hello)


def less(one: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """What each publisher's record added, an hour."""
    count = one["records"] * one["publishers"]
    kinds = {
        kind: {
            "datagrams": (one["kinds"].get(kind, 0) - base["kinds"].get(kind, 0)) / count,
            "bytes": (one["kind_bytes"].get(kind, 0) - base["kind_bytes"].get(kind, 0)) / count,
        }
        for kind in sorted(one["kinds"])
    }
    return {
        **{name: one[name] for name in ("nodes", "records", "publishers")},
        "datagrams": (one["datagrams"] - base["datagrams"]) / count,
        "bytes": (one["bytes"] - base["bytes"]) / count,
        "kinds": kinds,
        "idle": base["datagrams"],
    }


def measure(scale: Scale) -> Result:
    """The rows and the tables of this group."""
    main, many = scale.pick((34, 1), (100, 100))
    sizes = scale.pick([], [50, 200], [50, 200, 500])
    records = scale.pick([], [1, 10], [1, 10, 1000])
    publishers = scale.pick([], [8, 32])
    cases = [(main, many, 1), *((size, many, 1) for size in sizes), *((main, each, 1) for each in records)]
    cases += [(main, 10, each) for each in publishers]
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        start = functools.partial(pool.submit, simulate, scale.seed)
        idle = {size: start(size, 0, 0) for size in {main, *sizes}}
        started = [start(*case) for case in cases]
        measured = [less(each.result(), idle[each.result()["nodes"]].result()) for each in started]
    whole = measured[0]
    note = (
        f"a record of {len(VALUE)} bytes of value in a network of {main} nodes, by the difference of {many} records to"
        " none;"
        f" with IPv4 and UDP headers {whole['bytes'] + HEADERS * whole['datagrams']:,.0f} bytes;"
        f" {whole['idle']:,.0f} datagrams an hour without any record"
    )
    rows = [
        Row("cost", f"{what} an hour of one record", what, Spread(value, value, value), note=note if index == 0 else "")
        for index, (what, value) in enumerate((("bytes", whole["bytes"]), ("datagrams", whole["datagrams"])))
    ]
    return Result(rows, {"cases": measured})


if __name__ == "__main__":
    end_with_parent()
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(run(*map(int, sys.argv[1:])))
