"""The UDP socket beneath asyncio's transport: read in a loop, written without a detour, to whom its family reaches.

asyncio wakes up once a datagram; a node that answers a hundred thousand a second reads all that has arrived in one go,
and where the system can (`mmsg`) with one call. Where the transport has no real socket (the virtual network) asyncio's
path serves. Where the system can (`apart`) responses have a socket of their own.
"""

import asyncio
import os
import socket
import sys
from collections.abc import Callable
from typing import Any

from plasm_dht.dht.apart import socket_for_responses
from plasm_dht.dht.ids import MAPPED, Address, plain
from plasm_dht.dht.wire import MAX_READ

# Datagrams that are read before the loop turns: timers and our own tasks wait no longer than these take.
BATCH = 64
# After a wake-up with so many the next ones are read with one call; for few it costs more than it saves.
MANY = 16
# Read at once while an answer to us is awaited: a lookup takes many turns of the loop. Fewer would be read one by one.
SHORT_BATCH = MANY

Answer = Callable[[bytes, Address], bytes | None]


class UdpSocket:
    """A second handle of the transport's socket. Neither reading nor writing ever waits or raises.

    One of IPv6 that is bound to `::` reaches IPv4 too; nobody above it sees the mapped form of such an address.
    """

    def __init__(self, handle: socket.socket, on_error: Callable[[OSError], None]) -> None:
        self._handle = handle
        self._on_error = on_error
        self._apart: UdpSocket | None = None
        self._is_busy = False
        self._drain_batch: Callable[[Answer, int], tuple[int, int]] | None = None
        self._may_batch = sys.platform == "linux"
        self._is_ipv6 = handle.family == socket.AF_INET6
        self._is_dual = self._is_ipv6 and handle.getsockname()[0] == "::" and not _takes_ipv6_alone(handle)
        handle.setblocking(False)

    def reaches(self, ip: str) -> bool:
        """Whether what is sent to this IP address can leave."""
        return self._is_dual or self._is_ipv6 == (":" in ip)

    @classmethod
    def beneath(
        cls,
        transport: asyncio.BaseTransport,
        on_error: Callable[[OSError], None],
        on_responses: Callable[["UdpSocket"], None],
    ) -> "UdpSocket | None":
        """The transport's socket; `None` where it has none.

        `on_responses` is called when responses have arrived at a socket of their own, with that, to drain it.
        """
        there = transport.get_extra_info("socket")
        if there is None:
            return None
        beneath = cls(socket.socket(fileno=os.dup(there.fileno())), on_error)
        apart = socket_for_responses(beneath._handle)
        if apart is not None:
            beneath._apart = cls(apart, on_error)
            asyncio.get_running_loop().add_reader(apart.fileno(), on_responses, beneath._apart)
        return beneath

    def drain(self, answer: Answer, most: int = BATCH) -> tuple[int, int]:
        """Hand over what has arrived, `most` datagrams at most, each with its sender, who is sent what that returns.

        Returns how many were read, and how many responses sent.
        """
        if self._is_busy and self._drain_batch is None and self._may_batch:
            self._prepare_batches()
        if self._is_busy and self._drain_batch is not None:
            read, answered = self._drain_batch(answer, most)
            if MANY <= read < most:  # what came meanwhile needs no wake-up of its own
                more, also_answered = self._drain_batch(answer, most - read)
                read, answered = read + more, answered + also_answered
        else:
            read, answered = self._drain_singly(answer, most)
        self._is_busy = read >= MANY
        return read, answered

    def _drain_singly(self, answer: Answer, most: int) -> tuple[int, int]:
        read = answered = 0
        try:
            while read < most:
                datagram, sender = self._handle.recvfrom(MAX_READ + 1)
                read += 1
                reply = answer(datagram, sender_of(sender))
                if reply is not None:
                    self.send(reply, sender)
                    answered += 1
        except BlockingIOError:
            pass
        except OSError as error:
            self._on_error(error)
        return read, answered

    def send(self, datagram: bytes, address: tuple[Any, ...]) -> None:
        """Send, or drop where the system has no room: datagrams may be lost, and memory must not grow."""
        if self._is_dual and ":" not in address[0]:
            address = (MAPPED + address[0], address[1])
        try:
            self._handle.sendto(datagram, address)
        except OSError as error:
            self._on_error(error)

    def close(self) -> None:
        """Close this handle, and the socket apart; the transport's own stays open."""
        if self._apart is not None:
            asyncio.get_running_loop().remove_reader(self._apart._handle.fileno())
            self._apart.close()
        self._handle.close()

    def _prepare_batches(self) -> None:
        from plasm_dht.dht.mmsg import Batches  # ctypes takes 2 ms to import: what is asked little does without

        try:
            self._drain_batch = Batches(self._handle, BATCH, MAX_READ + 1, self._on_error).drain
        except OSError:
            self._may_batch = False


def _takes_ipv6_alone(handle: socket.socket) -> bool:
    return bool(handle.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY))  # the system's default is either


def sender_of(address: tuple[Any, ...]) -> Address:
    """The (ip, port) of a socket's address; one of IPv6 adds flow and scope."""
    return address if len(address) == 2 else (plain(address[0]), address[1])
