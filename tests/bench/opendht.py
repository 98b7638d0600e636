"""OpenDHT beside the others, where its Python package can be imported: its own wire format, the same generator.

As a program it is a process with such nodes: `python -m tests.bench.opendht COUNT [PORT]`, joined through the port.
"""

import importlib.util
import os
import random
import socket
import sys
import time
from contextlib import ExitStack
from typing import Any

import umsgpack

from tests.bench.children import BenchError, Child, say
from tests.bench.load import HEAD, STRIDE, Count, Lane, run
from tests.bench.report import Scale

HOST = "127.0.0.1"
# Nodes around the one that is asked. It is to be among the 8 closest to many keys, and to have 8 contacts to name.
CROWD = 16
# The crowd has so long to join (s).
JOIN_WITHIN = 20.0
# What follows the message id in a reply: its kind, and the implementation, which has another name in each version.
TAIL = b"\xa1y\xa1r\xa1v"
# Message ids begin here, so that msgpack gives each the same four bytes.
BASE = 1 << 31
POOL = 4096
CONTACT_BYTES = 26
REPLY_CONTACTS = 8


def installed() -> bool:
    """Whether there is anything to measure."""
    return importlib.util.find_spec("opendht") is not None


class _Lane(Lane):
    """A lane that finds the message id where OpenDHT puts it: near the end, before `tail`."""

    def __init__(self, sock: socket.socket, requests: list[bytes], window: int, tail: bytes) -> None:
        super().__init__(sock, requests, window)
        self.tail = tail

    def took(self, got: int) -> None:
        lengths = self._lengths[:got].tolist()
        ids = []
        for index, length in enumerate(lengths):
            end = index * STRIDE + HEAD + length
            at = end - len(self.tail)
            if self._in[at:end] == self.tail:
                ids.append(int.from_bytes(self._in[at - 4 : at]) - BASE)
        before = len(self.waiting)
        self.waiting.difference_update(ids)
        self.count.answered += before - len(self.waiting)  # the others are its own requests
        if ids and len(ids) == got:
            self.keep(ids[0], lengths)


class Subject:
    """One OpenDHT node to ask, and the processes that it lives in and with."""

    def __init__(self, stack: ExitStack, scale: Scale) -> None:
        self.child = stack.enter_context(Child("tests.bench.opendht", "1"))
        port = self.child.hello["ports"][0]
        crowd = stack.enter_context(Child("tests.bench.opendht", str(CROWD), str(port)))
        self.value_bytes = 250
        source = random.Random(scale.seed)
        keys = [source.randbytes(20) for _ in range(scale.pick(60, 800))]
        # Not by the node that is asked: it would look into each of its own searches at every datagram from then on.
        crowd.ask(put=[key.hex() for key in keys], size=self.value_bytes)
        self.sockets = []
        for number in range(4):
            sock = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
            sock.bind((f"127.0.0.{number + 2}", 0))
            sock.connect((HOST, port))
            self.sockets.append(sock)
        self.ids = [source.randbytes(20) for _ in self.sockets]
        self.tail = b""
        self._wait_for_contacts(source.randbytes(20))
        self.held = [key for key in keys if b"values" in self._once("get", key)]
        if len(self.held) < len(keys) // 8:
            raise BenchError(f"OpenDHT holds {len(self.held)} of {len(keys)} values")
        self.lanes: list[Lane] = []
        self.rpc = ""

    def _wait_for_contacts(self, target: bytes) -> None:
        """Nothing tells when the crowd has joined: only what is answered."""
        deadline = time.monotonic() + JOIN_WITHIN
        while len(umsgpack.unpackb(self._once("find", target))["r"]["n4"]) < REPLY_CONTACTS * CONTACT_BYTES:
            if time.monotonic() > deadline:
                raise BenchError(f"OpenDHT names fewer than {REPLY_CONTACTS} contacts after {JOIN_WITHIN:.0f} s")
            time.sleep(0.1)

    def _request(self, query: str, target: bytes, number: int, index: int) -> bytes:
        name = "h" if query == "get" else "target"
        message_id = (BASE + index).to_bytes(4)
        body = {"a": {"id": self.ids[number], name: target}, "q": query, "t": message_id, "y": "q", "v": "RNG1"}
        return bytes(umsgpack.packb(body))

    def _once(self, query: str, target: bytes) -> bytes:
        sock = self.sockets[0]
        sock.settimeout(1)
        sock.send(self._request(query, target, 0, POOL))
        mark = (BASE + POOL).to_bytes(4) + TAIL
        try:
            while mark not in (reply := sock.recv(4096)):
                pass
        except TimeoutError:
            raise BenchError(f"OpenDHT {query}: no reply within {sock.gettimeout():.0f} s") from None
        sock.setblocking(False)
        self.tail = reply[reply.rindex(mark) + 4 :]
        return reply

    def prepare(self, rpc: str) -> None:
        """Make the requests of this kind."""
        source = random.Random(rpc)
        query = {"find_value": "get", "find_node": "find"}[rpc]
        self.rpc = rpc
        self.lanes = [
            _Lane(
                sock,
                [
                    self._request(
                        query, source.choice(self.held) if query == "get" else source.randbytes(20), number, i
                    )
                    for i in range(POOL)
                ],
                48,
                self.tail,
            )
            for number, sock in enumerate(self.sockets)
        ]

    def measure(self, seconds: float) -> dict[str, float]:
        """One repetition. Raises `BenchError` when replies are wrong."""
        before = self.child.cpu
        burst = run(self.lanes, seconds)
        used = self.child.cpu - before
        self.check(burst.count)
        answered = burst.count.answered
        return {
            "wall": answered / burst.wall,
            "cpu": answered / used,
            "generator": burst.generator / used,
            "lost": burst.count.lost / answered,
            "bytes": burst.count.longest,
        }

    def check(self, count: Count) -> None:
        """Whether what came back is what was asked for."""
        if not count.samples:
            raise BenchError(f"OpenDHT {self.rpc}: no reply")
        for _, datagram in count.samples:
            result = umsgpack.unpackb(datagram)["r"]
            if len(result["n4"]) != REPLY_CONTACTS * CONTACT_BYTES:
                raise BenchError(f"OpenDHT {self.rpc}: not {REPLY_CONTACTS} contacts: {result!r}")
            if self.rpc == "find_value" and result["values"][0]["dat"]["body"]["data"] != bytes(self.value_bytes):
                raise BenchError(f"OpenDHT {self.rpc}: another value than was put: {result!r}")


def subject(stack: ExitStack, scale: Scale) -> Subject | None:
    """A node of it to ask, or `None`."""
    return Subject(stack, scale) if installed() else None


# -- the process -------------------------------------------------------------------------------------------------------


def nodes(count: int, bootstrap: str | None) -> list[Any]:
    """So many nodes on loopback, without limits of requests."""
    import opendht

    made = []
    for _ in range(count):
        config = opendht.DhtConfig()
        config.setRateLimit(-1, -1)
        node = opendht.DhtRunner()
        node.run(port=0, ipv4=HOST, config=config)
        join = bootstrap or (str(made[0].getBound().getPort()) if made else None)
        if join:
            node.bootstrap(HOST, join)
        made.append(node)
    return made


def serve(count: int, bootstrap: str | None) -> None:
    """Run nodes until the input ends."""
    import json

    import opendht

    made = nodes(count, bootstrap)
    if bootstrap:
        time.sleep(2)  # `bootstrap` returns at once, and its package tells nobody when it has joined
    say({"ports": [node.getBound().getPort() for node in made]})
    for line in sys.stdin:
        question = json.loads(line)
        done: list[bool] = []
        for key in question["put"]:
            made[0].put(
                opendht.InfoHash(key.encode()),
                opendht.Value(bytes(question["size"])),
                lambda ok, _, done=done: done.append(ok),
            )
        deadline = time.monotonic() + 30
        while len(done) < len(question["put"]) and time.monotonic() < deadline:
            time.sleep(0.01)
        say({"put": sum(done)})
    os._exit(0)  # its threads need seconds to end, and nobody needs them


if __name__ == "__main__":
    serve(int(sys.argv[1]), sys.argv[2] if sys.argv[2:] else None)
