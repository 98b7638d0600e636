"""What is answered to us arrives however many ask. Counted in datagrams, not in seconds; real sockets."""

import asyncio
import itertools
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from plasm_dht.dht import wire
from plasm_dht.dht.apart import socket_for_responses
from tests.dht.support import HERE, raw_node, server

# More than a socket takes: 212,992 bytes by default, and one of these counts for 768 there.
MORE_THAN_FITS = 2000
# Where the node's socket is bound, and where it is asked.
PLACES = [(HERE, HERE), ("0.0.0.0", HERE), ("::1", "::1"), ("::", "::1"), ("::", HERE)]

only_linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has sockets choose by what arrives")


@contextmanager
def bound(ip: str, *options: int) -> Iterator[socket.socket]:
    """A socket of UDP at a free port."""
    with socket.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET, socket.SOCK_DGRAM) as made:
        if ip == "::":
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        for option in options:
            made.setsockopt(socket.SOL_SOCKET, option, 1)
        try:
            made.bind((ip, 0))
        except OSError as error:
            pytest.skip(f"no IPv6: {error}")
        made.setblocking(False)
        yield made


def read(endpoint: socket.socket) -> list[bytes]:
    """Everything that has arrived."""
    found = []
    while True:
        try:
            found.append(endpoint.recv(wire.MAX_READ))
        except BlockingIOError:
            return found


def flood(ip: str, port: int, datagram: bytes, count: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET, socket.SOCK_DGRAM) as sender:
        for _ in range(count):
            sender.sendto(datagram, (ip, port))


@only_linux
@pytest.mark.parametrize("rate_limit", [None, 10], ids=["all may ask", "few may ask"])
async def test_a_crowd_that_asks_neither_drops_nor_delays_what_is_answered_to_us(rate_limit: float | None) -> None:
    async with server(rate_limit=rate_limit) as node, raw_node() as neighbour:
        del neighbour.answers["ping"]
        pinged = node.protocol.ping_address(neighbour.address)
        await neighbour.arrived.wait()
        message_id = neighbour.requests[0][0]
        request = wire.encode_request(bytes(20), "find_node", (bytes(20), bytes(20)))
        flood(*node.address, request, MORE_THAN_FITS)  # before the loop can turn once
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as neighbours:
            neighbours.sendto(wire.response(message_id, wire.id_result(neighbour.node_id)), node.address)
        before = node.protocol.stats.received
        assert await pinged == (True, neighbour.node_id)
        # The answer, and what was read in its turn of the loop and in the turn at whose end it is handed on.
        assert node.protocol.stats.received - before <= 1 + 17 + 65


async def most_read_a_turn() -> int:
    """How many of 200 requests that are there are read in one turn of the loop, while an answer is awaited."""
    async with server(rate_limit=None) as node, raw_node() as silent:
        del silent.answers["ping"]
        node.protocol.ping_address(silent.address)
        flood(*node.address, wire.encode_request(bytes(20), "ping", (bytes(20),)), 200)  # before the loop can turn once
        received = [node.protocol.stats.received]
        while received[-1] < 200:
            await asyncio.sleep(0)
            received.append(node.protocol.stats.received)
        return max(later - earlier for earlier, later in itertools.pairwise(received))


async def test_while_an_answer_is_awaited_the_loop_turns_more_often() -> None:
    assert await most_read_a_turn() <= 17


def test_uvloop_turns_between_what_it_reads_too() -> None:
    uvloop = pytest.importorskip("uvloop", reason="uvloop is optional")
    make: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=make) as runner:
        assert runner.run(most_read_a_turn()) <= 33  # libuv reads 32 and then turns


@only_linux
@pytest.mark.parametrize(("ip", "asked"), PLACES, ids=[f"{ip} at {asked}" for ip, asked in PLACES])
def test_only_responses_arrive_at_the_socket_for_them_and_all_else_at_the_first(ip: str, asked: str) -> None:
    with bound(ip) as first:
        apart = socket_for_responses(first)
        assert apart is not None
        with apart:
            apart.setblocking(False)
            said = [b"", b"\x00", b"\x01", b"\x02", b"\xff", b"\x00" + bytes(76), b"\x01" + bytes(1200)]
            for datagram in said:
                flood(asked, first.getsockname()[1], datagram, 3)
            assert read(apart) == [each for each in said for _ in range(3) if each[:1] == wire.RESPONSE]
            assert read(first) == [each for each in said for _ in range(3) if each[:1] != wire.RESPONSE]


@only_linux
def test_a_port_that_is_ours_stays_ours() -> None:
    with bound(HERE) as first:
        apart = socket_for_responses(first)
        assert apart is not None
        with apart, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
            with pytest.raises(OSError, match="in use"):
                other.bind(first.getsockname())
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            other.bind(first.getsockname())  # the system allows it to the same user
            other.setblocking(False)
            for kind in range(256):
                flood(*first.getsockname(), bytes((kind,)), 1)
            assert read(other) == []


@only_linux
def test_where_no_second_socket_may_be_the_first_has_everything_and_its_port_alone() -> None:
    with bound(HERE, socket.SO_REUSEADDR) as first:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            other.bind(first.getsockname())  # does not share the port in our way, so nobody may
            assert socket_for_responses(first) is None
        assert first.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT) == 0
        flood(*first.getsockname(), wire.RESPONSE, 1)
        assert read(first) == [wire.RESPONSE]


async def test_both_sockets_are_closed_with_the_node() -> None:
    async with server() as node:
        beneath: Any = node.protocol._socket
        await node.close()
        await asyncio.sleep(0)
        apart = beneath._apart
        assert (apart is not None) == (sys.platform == "linux")
        assert [each._handle.fileno() for each in (beneath, apart) if each is not None] == [-1] * (1 + bool(apart))
