"""A stock kademlia node as a process: `stock.py HOST [BOOTSTRAP [NAME]]`.

It prints its address when it has joined, and stored a plain value under the name, as kademlia's own users do.
"""

import asyncio
import sys

from kademlia.network import Server


async def main(host: str, bootstrap: list[str], names: list[str]) -> None:
    server = Server(ksize=5)
    await server.listen(0, host)
    for address in bootstrap:
        host_of_it, _, port = address.rpartition(":")
        await server.bootstrap([(host_of_it, int(port))])
    for name in names:
        await server.set(name, "a plain value")
    sys.stdout.write(f"{host}:{server.transport.get_extra_info('sockname')[1]}\n")
    sys.stdout.flush()
    await asyncio.Event().wait()


arguments = sys.argv[1:]
asyncio.run(main(arguments[0], arguments[1:2], arguments[2:]))
