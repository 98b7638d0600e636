"""A service registry without a server: instances announce themselves, clients find those that live.

Two terminals (a third instance, a fourth … find each other through any that runs):

    python service_registry.py run web http://10.0.0.5:8000 --port 8468
    python service_registry.py find web

Stop the first with Ctrl-C and it is gone at once; kill it and it is gone when its TTL is over.
"""

import argparse
import asyncio
import contextlib

from plasm_dht import Identity, PlasmServer
from plasm_dht.config import parse_address

# How long a service that has died is still listed (s).
TTL = 10


async def run(service: str, url: str, port: int, bootstrap: str) -> None:
    # Every instance has a key of its own, so that each has its own record under the same name.
    async with PlasmServer(identity=Identity.generate(), record_ttl=TTL) as server:
        await server.listen(port, "127.0.0.1")
        await server.bootstrap([parse_address(bootstrap)])
        await server.publish(f"service/{service}", url)  # and it is refreshed for as long as this runs
        print(f"{service} is registered as {url}", flush=True)
        await server.wait_failed()  # for ever, unless the node fails


async def find(service: str, bootstrap: str) -> None:
    # The id of 20 zero bytes is for callers that do not stay: nobody remembers them.
    async with PlasmServer(node_id=bytes(20)) as server:
        await server.listen(0, "127.0.0.1")
        await server.bootstrap([parse_address(bootstrap)])
        for record in await server.get_records(f"service/{service}"):
            print(record.value, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("do", choices=["run", "find"])
    parser.add_argument("service")
    parser.add_argument("url", nargs="?", help="where this instance serves; only with run")
    parser.add_argument("--port", type=int, default=0, help="UDP port of this node (0: a free one)")
    parser.add_argument("--bootstrap", default="127.0.0.1:8468", help="any node that runs")
    given = parser.parse_args()
    if given.do == "run" and not given.url:
        parser.error("run needs the URL of this instance")
    if given.do == "run":
        asyncio.run(run(given.service, given.url, given.port, given.bootstrap))
    else:
        asyncio.run(find(given.service, given.bootstrap))


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):  # leaving the `async with` block has withdrawn what was published
        main()
