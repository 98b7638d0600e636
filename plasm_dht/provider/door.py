"""Who may connect to the HTTP server, and for how long a client may do nothing. Knows no HTTP.

Whatever a client does or does not do, its connection ends; and no client, nor all that share its address, can take more
than its share of them.
"""

import asyncio
import socket
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from plasm_dht.dht.limits import source_of

# Connections that the system keeps for us until we take them.
BACKLOG = 128


@dataclass(frozen=True, slots=True)
class Limits:
    """The bounds of a door.

    Attributes:
        connections: open at once, in all.
        per_source: open at once of what one host can come from: an IPv4 address, the /64 of an IPv6 address.
        unanswered: bytes that a client may send before it is answered.
        stall: seconds that a client may take for what the system has no room for.
        refusal: what a client is told for which there is no room.
    """

    connections: int
    per_source: int
    unanswered: int
    stall: float
    refusal: bytes


class Door:
    """Lets connections in, and ends those that stall."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._open: dict[asyncio.Protocol, Connection] = {}
        self._shares: Counter[str] = Counter()

    async def listen(self, handler: Callable[[], asyncio.Protocol], host: str, port: int) -> asyncio.Server:
        """Serve connections, each with a handler of its own. Raises `OSError`."""
        loop = asyncio.get_running_loop()

        def connection() -> Connection:
            return Connection(self, self._limits, handler())

        if host == "::":  # asyncio would serve IPv6 alone
            both = socket.create_server((host, port), family=socket.AF_INET6, backlog=BACKLOG, dualstack_ipv6=True)
            return await loop.create_server(connection, sock=both)
        return await loop.create_server(connection, host, port, backlog=BACKLOG)

    def answered(self, handler: asyncio.Protocol) -> None:
        """What the client sends from now on belongs to its next request."""
        if handler in self._open:
            self._open[handler].unanswered = 0

    def enter(self, handler: asyncio.Protocol, connection: "Connection") -> bool:
        """Whether there is room for this one; it then counts until it leaves."""
        share = self._shares[connection.source]
        if len(self._open) >= self._limits.connections or share >= self._limits.per_source:
            return False
        self._open[handler] = connection
        self._shares[connection.source] = share + 1
        return True

    def leave(self, handler: asyncio.Protocol) -> None:
        """The connection is no more."""
        source = self._open.pop(handler).source
        self._shares[source] -= 1
        if not self._shares[source]:
            del self._shares[source]  # or every address that ever came would be remembered


class Connection(asyncio.Protocol):
    """Stands between a client and the handler.

    The handler ends a connection on which nothing is asked; this one ends it when the client does not take what was
    answered, or sends without waiting for an answer.
    """

    def __init__(self, door: Door, limits: Limits, handler: asyncio.Protocol) -> None:
        self._door = door
        self._limits = limits
        self._handler = handler
        self._entered = False
        self._stalled: asyncio.TimerHandle | None = None
        self.source = ""
        self.unanswered = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Counted here: many connections are accepted before any of them is made."""
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=0)  # paused whenever a byte is unsent: all of them have a deadline
        peer = transport.get_extra_info("peername")
        self.source = source_of(peer[0]) if peer else ""  # none: the client has gone already
        self._entered = self._door.enter(self._handler, self)
        if self._entered:
            self._handler.connection_made(transport)
        else:
            self._transport.write(self._limits.refusal)
            self._transport.close()

    def data_received(self, data: bytes) -> None:
        """Hand it on, as long as the client waits for answers."""
        if not self._entered:
            return
        self.unanswered += len(data)
        if self.unanswered > self._limits.unanswered:
            self._transport.abort()
        else:
            self._handler.data_received(data)

    def eof_received(self) -> bool | None:
        """The client has said all."""
        return self._handler.eof_received() if self._entered else None

    def pause_writing(self) -> None:
        """The client takes less than it is sent."""
        self._stalled = asyncio.get_running_loop().call_later(self._limits.stall, self._transport.abort)
        if self._entered:
            self._handler.pause_writing()

    def resume_writing(self) -> None:
        """It has taken all of it."""
        self._go_on()
        if self._entered:
            self._handler.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """Over, whoever ended it."""
        self._go_on()
        if self._entered:
            self._door.leave(self._handler)
            self._handler.connection_lost(exc)

    def _go_on(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None
