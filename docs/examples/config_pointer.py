"""A config pointer: one machine says which version is current, all others follow, and believe nobody else.

Two terminals:

    python config_pointer.py set app --port 8468        # prints its publisher id; type a version, and another one …
    python config_pointer.py follow app ed25519:…       # with that id

A follower prints the version that is current and each new one; `none` when it was withdrawn or its publisher is gone.
"""

import argparse
import asyncio
import contextlib
import sys

from plasm_dht import Identity, PlasmServer
from plasm_dht.config import parse_address

# How long the last version is believed when the machine that says so has died (s).
TTL = 10


async def say(app: str, port: int, bootstrap: str) -> None:
    # A real one keeps its key: Identity.load("identity.pem") makes the file when there is none.
    identity = Identity.generate()
    async with PlasmServer(identity=identity, record_ttl=TTL) as server:
        await server.listen(port, "127.0.0.1")
        await server.bootstrap([parse_address(bootstrap)])
        print(identity.publisher_id, flush=True)
        lines = asyncio.StreamReader()
        typing = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(lines), sys.stdin
        )
        with contextlib.closing(typing[0]):
            while version := (await lines.readline()).decode().strip():
                await server.publish(f"config/{app}", version)  # in place of the one before, and kept alive


async def follow(app: str, publisher: str, port: int, bootstrap: str) -> None:
    async with PlasmServer() as server:
        await server.listen(port, "127.0.0.1")
        await server.bootstrap([parse_address(bootstrap)])
        async for event in server.watch(f"config/{app}", trust=[publisher]):
            print(event.record.value if event.kind in ("published", "changed") else "none", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("do", choices=["set", "follow"])
    parser.add_argument("app")
    parser.add_argument("publisher", nargs="?", help="whom to believe; only with follow")
    parser.add_argument("--port", type=int, default=0, help="UDP port of this node (0: a free one)")
    parser.add_argument("--bootstrap", default="127.0.0.1:8468", help="any node that runs")
    given = parser.parse_args()
    if given.do == "follow" and not given.publisher:
        parser.error("follow needs the publisher id that set has printed")
    if given.do == "set":
        asyncio.run(say(given.app, given.port, given.bootstrap))
    else:
        asyncio.run(follow(given.app, given.publisher, given.port, given.bootstrap))


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):  # leaving the `async with` block has withdrawn what was published
        main()
