"""The UDP socket beneath asyncio's transport: read in a loop, written without a detour, to whom its family reaches.

asyncio wakes up once a datagram; a node that answers a hundred thousand a second reads all that has arrived in one go.
Where the transport has no real socket (the virtual network) asyncio's path serves.
"""

import asyncio
import os
import socket
from collections.abc import Callable
from typing import Any

from plasm_dht.dht.wire import MAX_READ

# Datagrams that are read before the loop turns: timers and our own tasks wait no longer than these take.
BATCH = 64
# How an IPv6 socket writes an IPv4 address (RFC 4291, 2.5.5.2).
MAPPED = "::ffff:"


class UdpSocket:
    """A second handle of the transport's socket. Neither reading nor writing ever waits or raises.

    One of IPv6 that is bound to `::` reaches IPv4 too; nobody above it sees the mapped form of such an address.
    """

    def __init__(self, handle: socket.socket, on_error: Callable[[OSError], None]) -> None:
        self._handle = handle
        self._on_error = on_error
        self._is_ipv6 = handle.family == socket.AF_INET6
        self._is_dual = self._is_ipv6 and handle.getsockname()[0] == "::" and not _takes_ipv6_alone(handle)
        handle.setblocking(False)

    def reaches(self, ip: str) -> bool:
        """Whether what is sent to this IP address can leave."""
        return self._is_dual or self._is_ipv6 == (":" in ip)

    @classmethod
    def beneath(cls, transport: asyncio.BaseTransport, on_error: Callable[[OSError], None]) -> "UdpSocket | None":
        """The transport's socket; `None` where it has none."""
        there = transport.get_extra_info("socket")
        if there is None:
            return None
        return cls(socket.socket(fileno=os.dup(there.fileno())), on_error)

    def drain(self, receive: Callable[[bytes, tuple[Any, ...]], None]) -> int:
        """Hand over what has arrived, `BATCH` datagrams at most. Returns how many."""
        read = self._handle.recvfrom
        count = 0
        try:
            for count in range(BATCH):  # noqa: B007  # the number of those before
                receive(*read(MAX_READ + 1))
        except BlockingIOError:
            return count
        except OSError as error:
            self._on_error(error)
            return count
        return BATCH

    def send(self, datagram: bytes, address: tuple[Any, ...]) -> None:
        """Send, or drop where the system has no room: datagrams may be lost, and memory must not grow."""
        if self._is_dual and ":" not in address[0]:
            address = (MAPPED + address[0], address[1])
        try:
            self._handle.sendto(datagram, address)
        except OSError as error:
            self._on_error(error)

    def close(self) -> None:
        """Close this handle; the transport's own stays open."""
        self._handle.close()


def _takes_ipv6_alone(handle: socket.socket) -> bool:
    return bool(handle.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY))  # the system's default is either


def plain(ip: str) -> str:
    """The IP address as it is written everywhere else: an IPv4 one without what an IPv6 socket puts before it."""
    return ip.removeprefix(MAPPED) if "." in ip else ip
