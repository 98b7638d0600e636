"""One node as a process that only answers: `python -m tests.bench.answerer ours|stock|bare`. `requests` loads it.

First it is told whom it knows and what it holds; then it answers datagrams until its input ends. `bare` is no node: it
reads batches of datagrams and sends as many of a given size, and so shows what the system's calls alone cost in Python.
"""

import asyncio
import gc
import itertools
import logging
import socket
import sys
from typing import Any

from kademlia.network import Server
from kademlia.node import Node

from plasm_dht import PlasmServer
from plasm_dht.dht.ids import Address
from plasm_dht.dht.mmsg import Batches
from plasm_dht.dht.udp import BATCH
from plasm_dht.dht.wire import MAX_READ
from tests.bench.children import serve

NODE_ID = bytes.fromhex("5a" * 20)
HOST = "127.0.0.1"
# Between two changes of the table (s), where it is to change: as if its 400 contacts stayed for 7 minutes each.
TURNOVER = 1.0


def make(kind: str) -> Any:
    """A server of the kind, not listening yet."""
    if kind == "ours":
        return PlasmServer(node_id=NODE_ID, rate_limit=None)
    logging.disable(logging.CRITICAL)  # the base logs several lines for a request
    return Server(node_id=NODE_ID)


def contacts(server: Any) -> int:
    """How many nodes its routing table has."""
    return sum(len(bucket) for bucket in server.protocol.router.buckets)


async def turn_over(router: Any) -> None:
    """Again and again one contact goes and comes back at once."""
    members = [contact for bucket in router.buckets for contact in bucket.nodes.values()]
    for contact in itertools.cycle(members):
        router.remove_contact(contact)
        router.add_contact(contact)
        await asyncio.sleep(TURNOVER)


async def main(kind: str) -> None:
    """Serve until the input ends."""
    server = make(kind)
    await server.listen(0, HOST)
    turnover: asyncio.Task[None] | None = None

    async def handle(question: dict[str, Any]) -> Any:
        nonlocal turnover
        if question.get("turnover"):
            turnover = asyncio.create_task(turn_over(server.protocol.router))
        for node_id, ip, port in question.get("contacts", ()):
            server.protocol.router.add_contact(Node(bytes.fromhex(node_id), ip, port))
        for key, value in question.get("held", ()):
            server.storage[bytes.fromhex(key)] = bytes.fromhex(value)
        gc.collect()
        return {"contacts": contacts(server), "pending": len(asyncio.all_tasks())}

    await serve(handle, {"port": server.transport.get_extra_info("sockname")[1]})
    if turnover is not None:
        turnover.cancel()
    server.stop()


async def bare() -> None:
    """Answer whatever comes with as many bytes as were asked for last."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind((HOST, 0))
    content = b""

    def answer(data: bytes, _: Address) -> bytes:
        return b"\x01" + data[1:21] + content

    async def handle(question: dict[str, Any]) -> Any:
        nonlocal content
        content = bytes(question["size"] - 21)
        return {}

    batches = Batches(sock, BATCH, MAX_READ + 1, lambda error: None)
    asyncio.get_running_loop().add_reader(sock.fileno(), batches.drain, answer, BATCH)
    await serve(handle, {"port": sock.getsockname()[1]})
    asyncio.get_running_loop().remove_reader(sock.fileno())
    sock.close()


if __name__ == "__main__":
    asyncio.run(bare() if sys.argv[1] == "bare" else main(sys.argv[1]))
