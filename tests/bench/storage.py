"""What a record costs in memory, and the longest time that a full store holds anything up.

Each store is a process of its own: `python -m tests.bench.storage ours|stock RECORDS`. Pauses are CPU time of one turn
of the event loop, or of one call, so waiting for a core is no part of them; collecting garbage is. On a busy machine
they are longer all the same.
"""

import asyncio
import gc
import logging
import os
import random
import sys
import time
from collections.abc import Iterator
from typing import Any

from kademlia.network import Server
from kademlia.storage import ForgetfulStorage

from plasm_dht import Identity, PlasmServer
from plasm_dht.clock import Clock
from plasm_dht.dht.storage import RecordStorage
from plasm_dht.record import shared_key, sign
from tests.bench.children import Child, end_with_parent, say
from tests.bench.report import Result, Row, Scale, Spread
from tests.measure import Pauses, resident

HOST = "127.0.0.1"
VALUE_BYTES = 250
ENVELOPE_REST = 146
MEMORY_BOUND, PAUSE_BOUND = 1000, 20
LIFE = 3600
# Seconds that a newcomer, and what it is handed, is watched for, and records for each of them.
WATCHED, RECORDS_A_SECOND = 3.0, 10_000


class Steps(Clock):
    """A clock that can be moved on."""

    def __init__(self) -> None:
        super().__init__()
        self.ahead = 0.0

    def wall(self) -> int:
        return super().wall() + round(self.ahead * 1000)

    def monotonic(self) -> float:
        return super().monotonic() + self.ahead


def records(count: int, started: int) -> Iterator[tuple[bytes, bytes]]:
    """Keys and envelopes of so many different names."""
    identity, value = Identity.generate(), bytes(VALUE_BYTES - ENVELOPE_REST)
    for number in range(count):
        name = f"bench/{number:08d}"
        record = sign(identity, name, value, seq=started, issued_at=started, expires_at=started + LIFE * 1000)
        yield shared_key(name), record.envelope


async def ours(count: int) -> dict[str, Any]:
    """Fill our store, read it, welcome a newcomer, and let everything expire."""
    clock, pauses = Steps(), Pauses()
    storage = RecordStorage(max_records=count, max_bytes=count * 1000)
    server = PlasmServer(storage=storage, clock=clock)
    await server.listen(0, HOST)
    before, cpu, stored = resident(), time.process_time(), 0.0
    keys = []
    for key, envelope in records(count, clock.wall()):
        started = time.thread_time()
        with pauses.timed("store"):
            storage.store(key, envelope)
        stored += time.thread_time() - started
        keys.append(key)
    held = len(storage)
    source = random.Random(1)
    for key in source.sample(keys, min(10_000, count)):
        with pauses.timed("read"):
            storage.holdings(key)
    gc.collect()
    each = (resident() - before - sys.getsizeof(keys)) / count
    del keys  # a list of a million that the node does not have: collecting garbage would walk it
    with pauses.timed("collecting all garbage"):
        gc.collect()
    async with pauses.turns("a newcomer"), PlasmServer() as newcomer:
        await newcomer.listen(0, HOST)
        await newcomer.bootstrap([server.address])
        await asyncio.sleep(min(WATCHED, count / RECORDS_A_SECOND))
    clock.ahead = LIFE * 1.5
    expired = time.thread_time()
    async with pauses.turns("expiry"):
        await server._tidy()
    expired = time.thread_time() - expired
    left = len(storage)
    server.stop()
    return {
        "held": held,
        "left": left,
        "memory": each,
        "pauses": pauses.cpu,
        "store": stored / count,
        "expiry": expired / count,
        "cpu": time.process_time() - cpu,
    }


async def stock(count: int) -> dict[str, Any]:
    """The same with the base's store, as far as it has the like."""
    logging.disable(logging.CRITICAL)
    pauses = Pauses()
    storage = ForgetfulStorage()
    server = Server()
    server.storage = storage  # an empty one counts as none
    await server.listen(0, HOST)
    before = resident()
    keys, stored = [], 0.0
    value = os.urandom(VALUE_BYTES)
    for number in range(count):
        key, each = number.to_bytes(20), value[:-4] + number.to_bytes(4)
        started = time.thread_time()
        with pauses.timed("store"):
            storage[key] = each
        stored += time.thread_time() - started
        keys.append(key)
    for key in random.Random(1).sample(keys, min(10_000, count)):
        with pauses.timed("read"):
            storage.get(key)
    each_bytes = (resident() - before - sys.getsizeof(keys)) / count
    # Somebody that is farther than all neighbours, so that it is handed nothing: only the walk is measured.
    for number in range(1, 21):
        server.protocol.router.add_contact(_node(number))
    with pauses.timed("a newcomer"):
        server.protocol.welcome_if_new(_node(255))
    server.stop()
    return {"held": len(storage.data), "memory": each_bytes, "pauses": pauses.cpu, "store": stored / count}


def _node(number: int) -> Any:
    from kademlia.node import Node

    return Node(bytes([number]) * 20, "127.1.0.1", number)


# -- the bench's side --------------------------------------------------------------------------------------------------


def once(value: float) -> Spread:
    """A spread of one."""
    return Spread(value, value, value)


def rows(count: int, ours: dict[str, Any], stock: dict[str, Any] | None) -> list[Row]:
    """Memory and pauses at this many records."""
    told = f"{count:,} records of {VALUE_BYTES} bytes"
    pauses = ", ".join(f"{what} {took:.3g} ms" for what, took in ours["pauses"].items())
    whole = ours["held"] == count and ours["left"] == 0
    memory = Row(
        "storage",
        f"memory a record, {count:,}",
        "bytes",
        once(ours["memory"]),
        target=f"at most {MEMORY_BOUND:,} at a million",
        reached=whole and ours["memory"] <= MEMORY_BOUND,
        note=f"{told}; {ours['held']:,} held, {ours['left']:,} left after expiry; storing one, verified, took"
        f" {1e6 * ours['store']:.0f} µs and forgetting one {1e6 * ours['expiry']:.1f} µs of CPU time",
    )
    # Collecting by hand looks at everything; what happened by itself is within the other pauses.
    worst = max(took for what, took in ours["pauses"].items() if what != "collecting all garbage")
    pause = Row(
        "storage",
        f"longest pause, {count:,}",
        "ms",
        once(worst),
        target=f"at most {PAUSE_BOUND} ms",
        reached=whole and worst <= PAUSE_BOUND,
        note=f"ours: {pauses}",
    )
    if stock is not None:
        memory.stock, memory.ratio = once(stock["memory"]), once(ours["memory"] / stock["memory"])
        theirs = max(stock["pauses"].values())
        pause.stock, pause.ratio = once(theirs), once(worst / theirs)
        pause.note += "; stock: " + ", ".join(f"{what} {took:.3g} ms" for what, took in stock["pauses"].items())
    return [memory, pause]


def measure(scale: Scale) -> Result:
    """The rows of this group."""
    result = Result()
    for count in scale.pick([1_000], [100_000], [100_000, 1_000_000]):
        told = {}
        for kind in ("ours", "stock"):
            with Child("tests.bench.storage", kind, str(count), patience=1800) as child:
                told[kind] = child.hello
        result.rows += rows(count, told["ours"], told["stock"])
    return result


if __name__ == "__main__":
    end_with_parent()
    say(asyncio.run({"ours": ours, "stock": stock}[sys.argv[1]](int(sys.argv[2]))))
