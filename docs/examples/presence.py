"""A presence list: who is in a room, as it changes.

Two terminals:

    python presence.py lobby ada --port 8468
    python presence.py lobby grace

Each prints `+ NAME` when somebody comes and `- NAME` when somebody leaves: with Ctrl-C at once, after a crash when the
TTL is over.
"""

import argparse
import asyncio
import contextlib

from plasm_dht import Identity, PlasmServer
from plasm_dht.config import parse_address

# How long somebody whose machine has died is still shown (s).
TTL = 10


async def attend(room: str, name: str, port: int, bootstrap: str) -> None:
    # Everybody publishes under the same name, each with a key of their own.
    async with PlasmServer(identity=Identity.generate(), record_ttl=TTL) as server:
        await server.listen(port, "127.0.0.1")
        await server.bootstrap([parse_address(bootstrap)])
        await server.publish(f"presence/{room}", name)
        async for event in server.watch(f"presence/{room}"):
            if event.kind == "published":
                print(f"+ {event.record.value}", flush=True)
            elif event.kind in ("withdrawn", "expired"):
                print(f"- {event.record.value}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("room")
    parser.add_argument("name")
    parser.add_argument("--port", type=int, default=0, help="UDP port of this node (0: a free one)")
    parser.add_argument("--bootstrap", default="127.0.0.1:8468", help="any node that runs")
    given = parser.parse_args()
    asyncio.run(attend(given.room, given.name, given.port, given.bootstrap))


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):  # leaving the `async with` block has withdrawn what was published
        main()
