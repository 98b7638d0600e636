"""A holder of very many records, with neighbours that are not there; and what a million of them cost in one process.

Run as a program with a number of records it prints what it measured: `python -m tests.dht.scale 1000000`.
Its envelopes are not signed (a million signatures take minutes) and so not verified; all else goes the way of a store.
"""

import asyncio
import gc
import json
import random
import sys
import time
from contextlib import suppress
from typing import Any, cast

import msgspec
from kademlia.node import Node

from plasm_dht.dht import storage as module
from plasm_dht.dht.protocol import PlasmProtocol
from plasm_dht.dht.replicate import Replicator
from plasm_dht.dht.routing import Contact, PlasmRoutingTable
from plasm_dht.dht.server import FORGET_SLICE
from plasm_dht.dht.storage import RecordStorage
from plasm_dht.dht.wire import Stored
from plasm_dht.record import shared_key
from tests.dht.support import HERE, START, ManualClock
from tests.measure import Pauses, resident

SIZE = 250  # bytes of an envelope
UNBOUNDED = {"max_records": 2**40, "max_bytes": 2**50}


def name_of(number: int) -> str:
    return f"/phase/bench/{number:07d}/manifest"


def unsigned(rng: random.Random, number: int, *, seq: int = START, life: int = 3600) -> tuple[bytes, bytes]:
    """A key, and an envelope of 250 bytes with a signature that nobody made, of a publisher that no other one has."""
    body: list[Any] = [name_of(number), rng.randbytes(32), seq, START, START + life * 1000, False, b""]
    body[6] = rng.randbytes(SIZE - 68 - len(msgspec.msgpack.encode(body)) - 1)
    return shared_key(body[0]), b"PLR1" + rng.randbytes(64) + msgspec.msgpack.encode(body)


class Neighbours:
    """What a replicator needs of the datagram path, with a neighbourhood that accepts everything."""

    def __init__(self, own: bytes = bytes(20), **caps: int) -> None:
        self.clock = ManualClock()
        self.source_node = Node(own)
        self.storage = RecordStorage(clock=self.clock, **(caps or UNBOUNDED))
        self.storage.attach(own, self.clock)
        self.router = PlasmRoutingTable(None, 20, self.source_node, self.clock)
        self.stored: list[tuple[bytes, bytes]] = []
        self.replicator = Replicator(cast(PlasmProtocol, self), self.clock, k=20, alpha=3)
        self.storage.on_change = self.replicator.on_change

    def call_store(self, contact: Contact, key: bytes, value: bytes) -> "asyncio.Future[tuple[bool, Stored]]":
        self.stored.append((contact.id, key))
        future = asyncio.get_running_loop().create_future()
        future.set_result((True, Stored(True)))
        return future

    def add(self, node_id: bytes) -> Contact:
        contact = Contact(node_id, HERE, 1024 + len(self.router))
        assert self.router.add_contact(contact)
        return contact

    def fill(self, count: int, *, seed: int = 1, life: int = 3600) -> None:
        rng = random.Random(seed)
        for number in range(count):
            assert self.storage.store(*unsigned(rng, number, life=life)).reason is None


async def measure(count: int) -> dict[str, Any]:
    """Fill a store with a replicator, read, greet newcomers, expire all of it at one moment."""
    setattr(module, "verify", lambda record: True)  # noqa: B010  # it is not exported
    here, rng, pauses = Neighbours(random.Random(0).randbytes(20)), random.Random(1), Pauses()
    for number in range(1000):
        unsigned(rng, number)  # what imports, caches and arenas take at first
    gc.collect()
    with pauses.timed("garbage collection, nothing held"):
        gc.collect()
    before, began = resident(), time.perf_counter()
    for number in range(count):
        key, envelope = unsigned(rng, number)
        with pauses.timed("put"):
            verdict = here.storage.store(key, envelope)
        assert verdict.reason is None
    took = time.perf_counter() - began
    held = (resident() - before) / count
    with pauses.timed("garbage collection"):
        gc.collect()
    for _ in range(20_000):
        key = shared_key(name_of(rng.randrange(2 * count)))
        with pauses.timed("read"):
            here.storage.holdings(key)
    handed = [await greet(here, rng.randbytes(20), pauses, "newcomer, nobody else known")]
    for _ in range(60):
        here.add(rng.randbytes(20))
    near = (int.from_bytes(here.source_node.id) ^ 2**155).to_bytes(20)
    handed += [await greet(here, each, pauses, "newcomer") for each in (near, rng.randbytes(20))]
    here.clock.advance(3601)
    async with pauses.turns("expiry"):
        with pauses.timed("expiry, all of it"):
            while here.storage.forget(FORGET_SLICE):  # noqa: ASYNC110  # as the server does
                await asyncio.sleep(0)
    assert len(here.storage) == len(here.replicator._due) == 0
    expiry = pauses.cpu.pop("expiry, all of it") / count * 1000
    pauses.wall.pop("expiry, all of it")
    return {
        "records": count,
        "fill_s": round(took, 1),
        "bytes_a_record": round(held),
        "expiry_us_a_record": round(expiry, 1),
        "handed_off": handed,
        "longest_wall_ms": pauses.wall,
        "longest_cpu_ms": pauses.cpu,
    }


async def greet(here: Neighbours, node_id: bytes, pauses: Pauses, what: str) -> int:
    """Hand off to a newcomer for two seconds at most; how many records it got."""
    contact = here.add(node_id)
    here.stored.clear()
    async with pauses.turns(what):
        with suppress(TimeoutError):
            async with asyncio.timeout(2):
                await here.replicator._hand_off(contact.address)
    return len(here.stored)


if __name__ == "__main__":
    print(json.dumps(asyncio.run(measure(int(sys.argv[1]))), indent=1))  # noqa: T201
