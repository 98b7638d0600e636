"""What the engine's tests share: a clock that is set by hand, publishers with fixed keys, a node made of raw bytes."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import umsgpack
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from plasm_dht.clock import Clock
from plasm_dht.dht.server import PlasmServer
from plasm_dht.identity import Identity
from plasm_dht.record import Record, Value, sign

# 2027-01-15, Unix ms: later than the release, so that no reader takes its clock for unset.
START = 1_800_000_000_000
HOUR = 3_600_000
HERE = "127.0.0.1"
NAME = "/phase/stable/arm64/manifest"

Address = tuple[str, int]


class ManualClock(Clock):
    """A clock that stands still until it is told."""

    def __init__(self, wall: int = START, monotonic: float = 1000.0) -> None:
        super().__init__()
        self.wall_ms = wall
        self.seconds = monotonic

    def wall(self) -> int:
        return self.wall_ms

    def monotonic(self) -> float:
        return self.seconds

    def advance(self, seconds: float) -> None:
        """Time passes."""
        self.wall_ms += round(seconds * 1000)
        self.seconds += seconds

    def step(self, seconds: float) -> None:
        """Somebody sets the wall clock."""
        self.wall_ms += round(seconds * 1000)


class HalfManualClock(Clock):
    """The loop's monotonic time, which timers need, ahead by what it is told; and a wall clock that goes with it."""

    def __init__(self) -> None:
        super().__init__()
        self.ahead = 0.0
        self.stepped = 0.0

    def wall(self) -> int:
        return START + round((self.monotonic() + self.stepped) * 1000)

    def monotonic(self) -> float:
        return super().monotonic() + self.ahead


def identity(number: int = 0) -> Identity:
    """The identity made of 32 times the same byte."""
    return Identity(Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32))


IDENTITIES = [identity(number) for number in range(40)]


def record(
    value: Value = b"value",
    *,
    by: Identity = IDENTITIES[0],
    name: str = NAME,
    seq: int | None = None,
    issued_at: int = START,
    life: float = 3600,
    withdrawn: bool = False,
) -> Record:
    """A signed record that lives for `life` seconds; a tombstone has no value."""
    return sign(
        by,
        name,
        b"" if withdrawn else value,
        seq=issued_at if seq is None else seq,
        issued_at=issued_at,
        expires_at=issued_at + round(life * 1000),
        withdrawn=withdrawn,
    )


def forged(original: Record) -> bytes:
    """The same record with a signature that nobody made."""
    return original.envelope[:4] + bytes(64) + original.envelope[68:]


class RawNode(asyncio.DatagramProtocol):
    """A node made of raw bytes, by rpcudp and umsgpack alone: it answers what `answers` says, and notes what it got.

    `answers`: by the name of the request a function of (sender, *arguments); one that returns `None` stays silent.
    """

    transport: asyncio.DatagramTransport

    def __init__(self, node_id: bytes = b"\x77" * 20) -> None:
        self.node_id = node_id
        self.answers: dict[str, Callable[..., Any]] = {"ping": lambda *_: self.node_id}
        self.requests: list[tuple[bytes, str, list[Any]]] = []
        self.datagrams: list[bytes] = []
        self.responses: asyncio.Queue[tuple[bytes, Any]] = asyncio.Queue()
        self.arrived = asyncio.Event()
        self.answer_from: RawNode | None = None
        self._count = 0

    @property
    def address(self) -> Address:
        host, port = self.transport.get_extra_info("sockname")[:2]
        return host, port

    # typeshed has any transport here; a datagram protocol is given one of datagrams
    def connection_made(self, transport: asyncio.DatagramTransport) -> None:  # type: ignore[override]
        self.transport = transport

    def datagram_received(self, data: bytes, addr: tuple[Any, ...]) -> None:
        self.datagrams.append(data)
        message_id, content = data[1:21], umsgpack.unpackb(data[21:])
        if data[0] == 1:
            self.responses.put_nowait((message_id, content))
            return
        name, arguments = content
        self.requests.append((message_id, name, arguments))
        self.arrived.set()
        if name in self.answers:
            answer = self.answers[name](addr, *arguments)
            if answer is not None:
                source = self.answer_from or self
                source.transport.sendto(b"\x01" + message_id + umsgpack.packb(answer), addr)

    def named(self, name: str) -> list[list[Any]]:
        """The arguments of every request of that name that has arrived."""
        return [arguments for _, each, arguments in self.requests if each == name]

    def send(self, address: Address, name: str, *arguments: Any, message_id: bytes | None = None) -> bytes:
        self._count += 1
        message_id = message_id or self._count.to_bytes(20)
        self.transport.sendto(b"\x00" + message_id + umsgpack.packb([name, list(arguments)]), address)
        return message_id

    async def ask(self, address: Address, name: str, *arguments: Any) -> Any:
        """The answer to a request, whatever else arrives before."""
        message_id = self.send(address, name, *arguments)
        async with asyncio.timeout(5):
            while True:
                answered, content = await self.responses.get()
                if answered == message_id:
                    return content


@asynccontextmanager
async def raw_node(node_id: bytes = b"\x77" * 20, host: str = HERE) -> AsyncIterator[RawNode]:
    loop = asyncio.get_running_loop()
    transport, node = await loop.create_datagram_endpoint(lambda: RawNode(node_id), local_addr=(host, 0))
    try:
        yield node
    finally:
        transport.close()
        await asyncio.sleep(0)


@asynccontextmanager
async def server(bootstrap: Iterable[PlasmServer | RawNode] = (), **options: Any) -> AsyncIterator[PlasmServer]:
    """A node of ours on loopback that withdraws nothing when it ends."""
    node = PlasmServer(**options)
    try:
        await node.listen(0, HERE)
        await node.bootstrap([each.address for each in bootstrap])
        yield node
    finally:
        await node.close(withdraw=False)


@asynccontextmanager
async def servers(count: int, **options: Any) -> AsyncIterator[list[PlasmServer]]:
    """Nodes of ours that know each other."""
    async with AsyncExitStack() as stack:
        nodes: list[PlasmServer] = []
        for _ in range(count):
            nodes.append(await stack.enter_async_context(server(nodes[:1], **options)))
        await until(lambda: all(len(node.protocol.router) == count - 1 for node in nodes))
        yield nodes


async def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    """Let the loop turn until the condition holds; fails after `seconds`."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110  # what is waited for tells nobody
            await asyncio.sleep(0.002)


def node_id(number: int) -> bytes:
    """The 20-byte id of that number."""
    return number.to_bytes(20)
