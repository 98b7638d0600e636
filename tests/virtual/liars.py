"""Nodes that lie: raw datagram protocols that know everybody, join as others do, and answer as they please.

A liar says its own id when it is pinged, else it would be in nobody's table, and acknowledges every store. Its `kind`
says what else it does. What it was given to hold it hands out when that serves it.
"""

import asyncio
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec

from plasm_dht.dht import ids, wire
from plasm_dht.dht.ids import Address, NodeTuple
from tests.virtual.host import Host
from tests.virtual.network import Network
from tests.virtual.nodes import PORT, Node, Nodes

# Honest nodes near itself, and others, that a liar asks when it joins, so that it is in their tables.
NEAR, OTHERS = 40, 40
NAMED = 20
TWO_HOURS = 7_200_000
_encode = msgspec.msgpack.encode


class Book:
    """What all the liars of a network know together."""

    def __init__(self, honest: Iterable[Node] = ()) -> None:
        self.honest = [NodeTuple(node.server.node.id, *node.address) for node in honest]
        self.liars: list[NodeTuple] = []
        # What each key's publishers ever gave one of them, the oldest first.
        self.loot: defaultdict[bytes, list[bytes]] = defaultdict(list)


def nearest(nodes: Sequence[NodeTuple], key: bytes, count: int = NAMED) -> list[NodeTuple]:
    target = int.from_bytes(key)
    return sorted(nodes, key=lambda node: int.from_bytes(node.id) ^ target)[:count]


def beside(key: bytes, low_bits: int = 40) -> bytes:
    """An id that nobody's is nearer to the key than."""
    return (int.from_bytes(key) ^ random.getrandbits(low_bits) | 1).to_bytes(ids.ID_BYTES)


class Liar(asyncio.DatagramProtocol):
    """One of them."""

    transport: asyncio.DatagramTransport

    def __init__(self, host: Host, book: Book, node_id: bytes, kind: str) -> None:
        self.host, self.book, self.node_id, self.kind = host, book, node_id, kind
        self.answers: Callable[[bytes, bool], object] = getattr(self, f"say_{kind}")
        self.asked = 0  # requests that it got, without pings

    def connection_made(self, transport: asyncio.DatagramTransport) -> None:  # type: ignore[override]
        self.transport = transport

    def datagram_received(self, data: bytes, addr: tuple[Any, ...]) -> None:
        request = None if data[0] else wire.decode_request(data)
        if request is None:
            return
        answer = self.answer(request)
        if answer is not None:
            self.transport.sendto(
                b"\x01" + data[1 : wire.HEADER] + (answer if type(answer) is bytes else _encode(answer)), addr
            )

    def answer(self, request: wire.Request) -> object:
        if isinstance(request, wire.Ping):
            return _encode(self.node_id)
        self.asked += 1
        if isinstance(request, wire.Store):
            _, key, envelope = request.read()
            if envelope not in self.book.loot[key]:
                self.book.loot[key].append(envelope)
            return {"ok": True, "reason": None, "held": None, "now": self.now() + TWO_HOURS * (self.kind == "clock")}
        if isinstance(request, wire.FindValue):
            return self.answers(request.arguments.key, True)
        return self.answers(request.arguments[1], False) if isinstance(request, wire.FindNode) else None

    def now(self) -> int:
        return self.host.clock.wall()

    def found(self, key: bytes, envelope: bytes | None, ahead: int = 0) -> object:
        near = nearest(self.book.liars, key, 4)
        return {"value": envelope, "records": [], "nodes": near, "more": False, "now": self.now() + ahead}

    # What each kind says to `find_value` (`wanted`) and `find_node`.

    def say_junk(self, key: bytes, wanted: bool) -> object:
        return random.randbytes(random.randrange(1, 200))

    def say_far(self, key: bytes, wanted: bool) -> object:
        """Honest nodes, the farthest from the key."""
        return nearest(self.book.honest, bytes(255 - byte for byte in key))

    def say_each_other(self, key: bytes, wanted: bool) -> object:
        """Nobody but liars, and nothing held: an eclipse."""
        return nearest(self.book.liars, key)

    def say_itself(self, key: bytes, wanted: bool) -> object:
        """One address under many ids."""
        return [(beside(key), *self.host_address) for _ in range(NAMED)]

    def say_endless(self, key: bytes, wanted: bool) -> object:
        """Nodes that do not exist, nearer than everybody, and new ones each time."""
        return [(beside(key), f"10.200.{random.randrange(256)}.{random.randrange(256)}", PORT) for _ in range(NAMED)]

    def say_others(self, key: bytes, wanted: bool) -> object:
        """Honest addresses under made-up ids, nearer than everybody."""
        return [(beside(key), *node[1:]) for node in random.sample(self.book.honest, NAMED)]

    def say_forged(self, key: bytes, wanted: bool) -> object:
        """What it was given, with something else in it."""
        given = self.book.loot.get(key)
        return self.found(key, given[-1][:-1] + b"!") if wanted and given else self.say_each_other(key, wanted)

    def say_old(self, key: bytes, wanted: bool) -> object:
        """The first that anybody gave it: genuine, and not the newest."""
        given = self.book.loot.get(key)
        return self.found(key, given[0]) if wanted and given else self.say_each_other(key, wanted)

    def say_nothing(self, key: bytes, wanted: bool) -> object:
        """The truth about everybody, but nothing held."""
        return nearest([*self.book.honest, *self.book.liars], key)

    def say_clock(self, key: bytes, wanted: bool) -> object:
        """Nothing held, at another time."""
        return self.found(key, None, TWO_HOURS) if wanted else self.say_each_other(key, wanted)

    @property
    def host_address(self) -> Address:
        return self.host.address, PORT


KINDS = ("junk", "far", "each_other", "itself", "endless", "others", "forged", "old", "nothing", "clock")


async def join(network: Network, book: Book, liars: Iterable[tuple[bytes, str]], *, every: float = 0.1) -> list[Liar]:
    """Liars of these ids and kinds, one every so many seconds, who make themselves known to honest nodes."""
    joined = []
    for node_id, kind in liars:
        host = network.host()
        liar = Liar(host, book, node_id, kind)
        with host:
            await network.create_datagram_endpoint(lambda liar=liar: liar, local_addr=(host.address, PORT))  # type: ignore[misc]
        book.liars.append(NodeTuple(node_id, host.address, PORT))
        joined.append(liar)
        introduce(liar)
        await asyncio.sleep(every)
    return joined


def introduce(liar: Liar) -> None:
    """Ask many honest nodes, who then ping it."""
    book = liar.book
    others = random.sample(book.honest, min(OTHERS, len(book.honest)))
    for node in dict.fromkeys([*nearest(book.honest, liar.node_id, NEAR), *others]):  # in the same order each time
        request = wire.encode_request(random.randbytes(20), "find_node", (liar.node_id, liar.node_id))
        liar.transport.sendto(request, (node.ip, node.port))


async def mixed(nodes: Nodes, network: Network, count: int, kinds: Sequence[str] = KINDS) -> list[Liar]:
    """So many liars with random ids, of all kinds, in a network of honest nodes."""
    book = Book(nodes.nodes)
    return await join(network, book, [(random.randbytes(20), kinds[each % len(kinds)]) for each in range(count)])
