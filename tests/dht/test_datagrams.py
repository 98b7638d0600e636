"""The datagram path by what it costs: tasks, wake-ups, turns of the loop. Real sockets."""

import asyncio
import itertools
import random
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import umsgpack

from plasm_dht.dht import udp, wire
from plasm_dht.dht.protocol import PlasmProtocol
from plasm_dht.dht.routing import Contact
from plasm_dht.dht.server import PlasmServer
from plasm_dht.record import shared_key
from tests.dht.support import HERE, IDENTITIES, NAME, raw_node, record, server, servers, until

KEY = shared_key(NAME)
ZERO = bytes(20)


@contextmanager
def counted_tasks() -> Iterator[list[str]]:
    """The tasks that are made inside the block."""
    loop = asyncio.get_running_loop()
    made: list[str] = []

    def factory(loop: Any, coroutine: Any, **options: Any) -> Any:
        made.append(coroutine.__qualname__)
        return asyncio.Task(coroutine, loop=loop, **options)

    loop.set_task_factory(factory)
    try:
        yield made
    finally:
        loop.set_task_factory(None)


def request(name: str, *arguments: object, number: int = 0) -> bytes:
    return wire.encode_request(number.to_bytes(20), name, arguments)


async def test_no_request_costs_a_task() -> None:
    async with server(rate_limit=None) as node, raw_node() as raw:
        node.protocol._verified.add(raw.address, node.clock.monotonic())
        envelopes = [record(issued_at=node.clock.wall(), by=by).envelope for by in IDENTITIES[:5]]
        with counted_tasks() as made:
            for name, arguments in (
                ("ping", []),
                ("find_node", [KEY]),
                ("find_value", [KEY]),
                ("find_value", [KEY, 1]),
            ):
                for _ in range(10):
                    raw.send(node.address, name, ZERO, *arguments)
            for envelope in envelopes:
                raw.send(node.address, "store", ZERO, KEY, envelope)
            raw.send(node.address, "stun")
            await until(lambda: len(raw.datagrams) == 46)
        assert made == []
        assert len(node.storage) == 5


class Counting(PlasmProtocol):
    """Counts how often asyncio wakes it up, and what it has read by then."""

    wake_ups = 0
    read = 0

    def datagram_received(self, data: bytes, addr: tuple[Any, ...]) -> None:
        self.wake_ups += 1
        super().datagram_received(data, addr)

    def _receive(self, data: bytes, sender: tuple[Any, ...]) -> bytes | None:
        self.read += 1
        return super()._receive(data, sender)


class CountingServer(PlasmServer):
    def _create_protocol(self) -> PlasmProtocol:
        return Counting(
            self.node, self.storage, self.ksize, clock=self.clock, rate_limit=None, spawn=self._spawn,
            on_contact=self._on_contact,
        )  # fmt: skip


async def test_a_flood_is_read_in_batches_between_which_the_loop_turns() -> None:
    async with CountingServer() as node:
        await node.listen(0, HERE)
        flood = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        flood.connect(node.address)
        for number in range(200):  # before the loop can turn once
            flood.send(request("ping", ZERO, number=number))
        protocol: Any = node.protocol
        read: list[int] = []
        while protocol.read < 200:
            await asyncio.sleep(0)
            read.append(protocol.read)
        assert max(later - earlier for earlier, later in zip([0, *read], read, strict=False)) <= udp.BATCH + 1
        assert protocol.wake_ups <= 200 / udp.BATCH + 1
        flood.close()


@pytest.mark.parametrize("may_batch", [True, False], ids=["in batches", "one by one"])
async def test_a_flood_is_answered_one_for_one(may_batch: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", sys.platform if may_batch else "another")
    async with server(rate_limit=None) as node, raw_node() as raw:
        node.protocol._verified.add(raw.address, node.clock.monotonic())
        for _ in range(3):
            raw.datagrams.clear()
            before = node.protocol.stats.sent
            for _ in range(100):  # before the loop can turn once
                raw.send(node.address, "find_node", ZERO, KEY)
                raw.send(node.address, "find_value", ZERO, KEY, 1 << 20)  # not to be answered
            await until(lambda: len(raw.datagrams) == 100)
            assert node.protocol.stats.sent - before == 100
        assert node.protocol.stats.received == 600
        assert node.protocol.dropped["malformed"] == 300
        assert (node.protocol._socket._drain_batch is not None) == (may_batch and sys.platform == "linux")


def mutations(datagram: bytes) -> Iterator[bytes]:
    """The datagram, cut, extended, and with each of its bytes changed."""
    yield datagram
    for size in range(len(datagram)):
        yield datagram[:size]
    yield datagram + b"\x00"
    for at in range(len(datagram)):
        for changed in {0, 1, 0xC4, 0xFF, datagram[at] ^ 1, datagram[at] ^ 0x80} - {datagram[at]}:
            yield datagram[:at] + bytes([changed]) + datagram[at + 1 :]


async def test_the_short_way_of_a_request_answers_and_drops_exactly_what_the_long_way_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with server(rate_limit=None) as node, raw_node() as raw:
        protocol = node.protocol
        for number in range(60):
            protocol.router.add_contact(Contact(bytes([number * 4 + 1]) * 20, HERE, 20_000 + number))
        known = next(iter(protocol.router))
        node.storage.store(KEY, record(issued_at=node.clock.wall()).envelope)
        source = random.Random(1)
        datagrams = [source.randbytes(size) for size in (77, 78) for _ in range(50)]
        for name, key in itertools.product(("find_node", "find_value"), (KEY, bytes(20))):
            for node_id in (known.id, ZERO, source.randbytes(20)):
                datagrams += mutations(request(name, node_id, key, number=source.getrandbits(160)))
        protocol._answers.stamp()
        split = wire.SPLIT_FIND
        outcomes = []
        for way in (split, {}):
            monkeypatch.setattr(wire, "SPLIT_FIND", way)
            before = protocol.dropped.copy()
            said = [protocol._receive(each, sender) for each in datagrams for sender in (known.address, raw.address)]
            outcomes.append((said, protocol.dropped - before))
        assert outcomes[0] == outcomes[1]
        assert sum(said is not None for said in outcomes[0][0]) > 1000


@pytest.mark.parametrize(("name", "arguments"), [("ping", []), ("find_node", [KEY]), ("find_value", [KEY])])
async def test_every_kind_of_request_counts_against_the_rate(name: str, arguments: list[Any]) -> None:
    async with server(rate_limit=1) as node, raw_node() as raw:  # two at once, then one a second
        for _ in range(50):
            raw.send(node.address, name, ZERO, *arguments)
        await until(lambda: node.protocol.stats.received == 50)
        assert node.protocol.dropped["rate_limit"] >= 45
        await until(lambda: len(raw.datagrams) + node.protocol.dropped["rate_limit"] == 50)


def test_one_wake_up_reads_no_more_than_a_batch_however_much_arrives_meanwhile() -> None:
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as here,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender,
    ):
        here.bind((HERE, 0))
        sender.connect(here.getsockname())
        endpoint = udp.UdpSocket(here, lambda _: None)
        for _ in range(udp.MANY):
            sender.send(b"x")
        endpoint.drain(lambda *_: None)  # from now on in batches
        for _ in range(udp.BATCH - 10):
            sender.send(b"x")
        read = [endpoint.drain(lambda *_: sender.send(b"x") and None)[0] for _ in range(3)]
        assert read == [udp.BATCH] * 3 if sys.platform == "linux" else max(read) <= udp.BATCH


async def test_what_is_stored_shows_to_who_asks_in_the_same_batch() -> None:
    async with server(rate_limit=None) as node, raw_node() as raw:
        node.protocol._verified.add(raw.address, node.clock.monotonic())
        first, second = (record(issued_at=node.clock.wall() + later).envelope for later in (0, 1))
        node.storage.store(KEY, first)
        for name, arguments in (("find_value", [KEY]), ("store", [KEY, second]), ("find_value", [KEY])):
            raw.send(node.address, name, ZERO, *arguments)
        await until(lambda: len(raw.datagrams) == 3)
        before, _, after = (umsgpack.unpackb(datagram[wire.HEADER :]) for datagram in raw.datagrams)
        assert (before["value"], after["value"]) == (first, second)


async def test_each_of_a_batch_has_an_address_and_a_port_over_ipv6_too() -> None:
    node = PlasmServer()
    try:
        await node.listen(0, "::1")
    except OSError as error:
        pytest.skip(f"no IPv6: {error}")
    async with node, raw_node(host="::1") as raw:
        for _ in range(3):  # asyncio reads the first, then they are read one by one, then in batches
            raw.datagrams.clear()
            for _ in range(udp.MANY + 1):  # before the loop can turn once
                raw.send(node.address, "stun")
            await until(lambda: len(raw.datagrams) == udp.MANY + 1)
            assert {tuple(umsgpack.unpackb(each[wire.HEADER :])) for each in raw.datagrams} == {raw.address}


async def test_what_cannot_be_sent_is_counted_and_harms_nothing() -> None:
    async with server() as node, raw_node() as raw:
        node.protocol._send(bytes(100), ("255.255.255.255", 1))  # not allowed without SO_BROADCAST
        node.protocol._send(bytes(70_000), raw.address)
        assert node.protocol.dropped["network_error"] == 2
        assert await raw.ask(node.address, "ping", ZERO) == node.node.id


def test_a_full_send_buffer_drops_and_never_waits(tmp_path: Path) -> None:
    errors: list[OSError] = []
    reader: Any = str(tmp_path / "reader")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as left, socket.socket(left.family, left.type) as right:
        right.bind(reader)  # and never reads
        endpoint = udp.UdpSocket(left, errors.append)
        for _ in range(10_000):
            endpoint.send(bytes(1000), reader)
    assert errors
    assert all(isinstance(error, BlockingIOError) for error in errors)


async def test_a_datagram_is_read_into_no_more_room_than_the_largest_needs() -> None:
    async with PlasmServer() as node:
        await node.listen(0, HERE)
        assert node.transport.max_size == wire.MAX_READ + 1  # by default asyncio takes 256 KiB for each


async def test_the_socket_is_closed_with_the_node() -> None:
    node = PlasmServer()
    await node.listen(0, HERE)
    handle = node.protocol._socket._handle
    port = node.address[1]
    await node.close()
    await asyncio.sleep(0)
    assert handle.fileno() == -1
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as again:
        again.bind((HERE, port))


def test_it_runs_on_uvloop() -> None:
    uvloop = pytest.importorskip("uvloop", reason="uvloop is optional")

    async def publish_and_get() -> object:
        async with servers(5, rate_limit=None) as nodes:
            publisher = PlasmServer(identity=IDENTITIES[0])
            async with publisher:
                await publisher.listen(0, HERE)
                await publisher.bootstrap([nodes[0].address])
                await publisher.publish(NAME, b"v1")
                return await nodes[3].get(NAME)

    make: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=make) as runner:
        assert runner.run(publish_and_get()) == b"v1"
