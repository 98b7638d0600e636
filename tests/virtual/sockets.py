"""Simulated UDP sockets: what code under test holds in its hands."""

import asyncio
import errno
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.virtual.host import Host
    from tests.virtual.network import Network

Address = tuple[Any, ...]

# The most that UDP over IPv4 carries: 65,535 less the headers.
MAX_UDP = 65_507


class Port:
    """One UDP address of the world, and the socket that is bound there now."""

    __slots__ = ("address", "ip", "network", "number", "transport")

    def __init__(self, network: "Network", ip: str, port: int, number: int) -> None:
        self.network = network
        self.ip = ip
        self.address: Address = (ip, port, 0, 0) if ":" in ip else (ip, port)
        self.number = number
        self.transport: Transport | None = None

    def arrive(self, data: bytes, source: "Port") -> None:
        """A datagram is here. Called by the loop."""
        transport = self.transport
        if transport is None:
            # no ICMP comes back, as on Linux to a socket that is not connected
            self.network.lost["nobody"] += 1
            return
        host = transport.host
        if host.halted:
            self.network.lost["suspended"] += 1
            return
        if transport.remote is not None and transport.remote is not source:
            self.network.lost["not the peer"] += 1
            return
        host.received += 1
        host.received_bytes += len(data)
        transport.context.run(transport.protocol.datagram_received, data[: transport.max_size], source.address)


class Transport(asyncio.DatagramTransport):
    """The transport of a simulated UDP socket. Unlike asyncio's, a bad address raises instead of closing the socket."""

    def __init__(self, network: "Network", host: "Host", protocol: Any, ports: list[Port], remote: Port | None) -> None:
        super().__init__()
        self.host = host
        self.protocol = protocol
        self.ports = ports
        self.remote = remote
        self.context = host.context()
        self.max_size = 256 * 1024  # as in asyncio: a longer datagram is cut off here
        self._network = network
        self._closing = False
        self._source = ports[0] if len(ports) == 1 else None
        self._sources = {":" in port.ip: port for port in reversed(ports)}  # by family, the first address

    def sendto(self, data: Any, addr: Any = None) -> None:
        network = self._network
        target = self.remote if addr is None else network.ports.get(addr) or network.port(addr)
        if target is None:
            raise ValueError("sendto without an address on a socket that is not connected")
        if type(data) is not bytes:
            data = bytes(data)
        source = self._source or self._sources.get(":" in target.ip)
        if self._closing:
            network.lost["closed"] += 1
        elif source is None or len(data) > MAX_UDP:
            code = errno.EMSGSIZE if source else errno.ENETUNREACH
            self.protocol.error_received(OSError(code, os.strerror(code)))
        else:
            network.send(self.host, source, target, data)

    def close(self) -> None:
        if not self._closing:
            self._closing = True
            self._network.loop.call_soon(self._lost, context=self.context)

    abort = close

    def is_closing(self) -> bool:
        return self._closing

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        if name == "sockname":
            return self.ports[0].address
        if name == "peername" and self.remote is not None:
            return self.remote.address
        return default

    def get_protocol(self) -> Any:
        return self.protocol

    def set_protocol(self, protocol: Any) -> None:
        self.protocol = protocol

    def get_write_buffer_size(self) -> int:
        return 0

    def vanish(self) -> None:
        """The socket is gone, and nobody is told."""
        for port in self.ports:
            if port.transport is self:
                port.transport = None
        if self in self.host.transports:
            self.host.transports.remove(self)

    def _lost(self) -> None:
        self.vanish()
        self.protocol.connection_lost(None)
