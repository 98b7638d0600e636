"""A socket for both families: nobody above it sees an IPv4 address in IPv6's form, whoever names it. Real sockets."""

import asyncio
import socket
from collections.abc import Iterator

import pytest
from kademlia.network import Server

from plasm_dht.dht import udp
from tests.dht.support import HERE, IDENTITIES, server, until


def bound(family: socket.AddressFamily, host: str, *, alone: bool = False) -> socket.socket:
    made = socket.socket(family, socket.SOCK_DGRAM)
    if family == socket.AF_INET6:
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, alone)
    made.bind((host, 0))
    return made


@pytest.fixture(autouse=True)
def _needs_ipv6() -> None:
    try:
        bound(socket.AF_INET6, "::1").close()
    except OSError:
        pytest.skip("this machine has no IPv6 on loopback")


@pytest.fixture
def peer() -> Iterator[socket.socket]:
    with bound(socket.AF_INET, HERE) as made:
        made.settimeout(5)
        yield made


@pytest.mark.parametrize(
    ("family", "host", "alone", "ipv4", "ipv6"),
    [
        (socket.AF_INET, "0.0.0.0", False, True, False),
        (socket.AF_INET6, "::", False, True, True),
        (socket.AF_INET6, "::", True, False, True),
        (socket.AF_INET6, "::1", False, False, True),
    ],
)
def test_a_socket_reaches_the_families_that_it_is_bound_to(
    family: socket.AddressFamily, host: str, alone: bool, ipv4: bool, ipv6: bool
) -> None:
    beneath = udp.UdpSocket(bound(family, host, alone=alone), pytest.fail)
    assert (beneath.reaches("192.0.2.1"), beneath.reaches("2001:db8::1")) == (ipv4, ipv6)
    beneath.close()


def test_ipv4_over_a_socket_for_both_has_plain_addresses_in_and_out(peer: socket.socket) -> None:
    handle = bound(socket.AF_INET6, "::")
    beneath = udp.UdpSocket(handle, pytest.fail)
    here, port = peer.getsockname()
    beneath.send(b"question", (here, port))
    assert peer.recvfrom(99)[0] == b"question"
    senders = []
    for _ in range(2):
        peer.sendto(b"request", (HERE, handle.getsockname()[1]))
    beneath.drain(lambda datagram, sender: senders.append(sender) or b"answer")
    assert senders == [(here, port)] * 2
    assert peer.recvfrom(99)[0] == b"answer"
    beneath.close()


async def test_who_is_named_by_its_mapped_address_is_asked_over_ipv4() -> None:
    stock = Server()
    await stock.listen(0, "::")
    where = (HERE, stock.transport.get_extra_info("sockname")[1])
    try:
        async with server(identity=IDENTITIES[0]) as first, server() as second:
            await first.bootstrap([where])
            await until(lambda: len(stock.bootstrappable_neighbors()) == 1)
            assert stock.bootstrappable_neighbors() == [(f"::ffff:{HERE}", first.address[1])]
            await second.bootstrap([where])
            found = second.protocol.router.find(first.node.id)
            assert found is not None
            assert found.address == first.address
    finally:
        stock.stop()
        await asyncio.sleep(0)
