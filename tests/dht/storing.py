"""A node's storage that stores all the time, until it is killed: `python -m tests.dht.storing FILE`.

It prints what it found, {name: seq}, as one line of JSON; then a line `seq name moment` for each record that it has
accepted, in seconds of the machine's monotonic clock.
"""

import asyncio
import json
import random
import sys
import time
from pathlib import Path

from plasm_dht.dht.sqlite import SqliteStorage
from plasm_dht.record import decode, shared_key
from tests.dht.support import IDENTITIES, record

# Names that are stored again and again, and how many records a second are.
NAMES, RATE = 300, 500
HOUR = 3600.0


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


async def store(path: Path) -> None:
    storage = SqliteStorage(path)
    storage.attach(storage.node_id or b"\x01" * 20, storage.clock)
    found = [decode(envelope) for _, envelope in storage]
    say(json.dumps({each.name: each.seq for each in found}))
    running = asyncio.create_task(storage.run())
    while not running.done():
        now = storage.clock.wall()
        made = record(random.randbytes(200), by=IDENTITIES[1], name=f"n{random.randrange(NAMES)}", issued_at=now)
        if storage.store(shared_key(made.name), made.envelope).reason is None:
            say(f"{made.seq} {made.name} {time.monotonic()}")
        await asyncio.sleep(1 / RATE)  # the pace: what it stores has to be known by its time
    running.result()


if __name__ == "__main__":
    asyncio.run(store(Path(sys.argv[1])))
