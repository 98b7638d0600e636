"""A simulated network of hosts on a `VirtualLoop`, and everything that can happen to a datagram between two of them.

One seed decides all of it. Code under test gets its sockets from `loop.create_datagram_endpoint`, as on a real loop.
"""

import asyncio
import errno
import functools
import ipaddress
import itertools
import math
import random
import socket
import statistics
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from heapq import heappush
from typing import Any
from zlib import crc32

from tests.virtual.host import Host
from tests.virtual.loop import MACHINE, VirtualLoop
from tests.virtual.sockets import Address, Port, Transport

# Latencies are drawn from 2**12 equally likely quantiles: random bits are cheaper than a logarithm a datagram.
QUANTILE_BITS = 12
# What stands before the payload of an rpcudp frame: its type and the random id of the message.
HEADER = 21


@functools.cache
def _latencies(median: float, sigma: float) -> tuple[float, ...]:
    count = 1 << QUANTILE_BITS
    normal = statistics.NormalDist()
    return tuple(median * math.exp(sigma * normal.inv_cdf((index + 0.5) / count)) for index in range(count))


@dataclass(frozen=True)
class Conditions:
    """What a datagram meets on its way. Shares are between 0 and 1, times in seconds.

    latency: median one-way latency of a log-normal distribution; sigma: its shape (0: constant).
    loss: share that never arrives. duplicate: share that arrives twice.
    reorder: share that is held back by ten more latencies, so that later ones overtake it.
    """

    latency: float = 0.040
    sigma: float = 0.5
    loss: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0

    def __post_init__(self) -> None:
        if self.latency <= 0:
            raise ValueError(f"latency is {self.latency}: it must be above 0, or time could stand still")
        for name in ("loss", "duplicate", "reorder"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be between 0 and 1")

    @functools.cached_property
    def latencies(self) -> tuple[float, ...]:
        return _latencies(self.latency, self.sigma)

    @functools.cached_property
    def odd(self) -> bool:
        return bool(self.duplicate or self.reorder)


def rpc_kind(datagram: bytes) -> str:
    """The name of the request in an rpcudp frame; `reply` for an answer; `other`."""
    if datagram[:1] == b"\x01":
        return "reply"
    if datagram[:1] == b"\x00" and datagram[21:22] == b"\x92" and 0xA0 <= datagram[22] < 0xC0:
        return datagram[23 : 23 + (datagram[22] & 0x1F)].decode("ascii", "replace")
    return "other"


class Network:
    """The hosts and what lies between them. `seed` decides every latency and loss."""

    def __init__(self, loop: VirtualLoop, *, seed: int | str = 1, conditions: Conditions | None = None) -> None:
        self.loop = loop
        self.seed = seed
        self.hosts: dict[str, Host] = {}  # by address, those alive
        self.ports: dict[Address, Port] = {}
        self.names: dict[str, list[str]] = {}  # what the resolver knows: addresses by host name
        self.lost: Counter[str] = Counter()  # datagrams by what became of them
        self.largest = 0  # the biggest datagram sent, in bytes
        self.kinds: Counter[str] = Counter()  # after `observe`: datagrams by RPC, their bytes, and each of them
        self.kind_bytes: Counter[str] = Counter()
        self.record: list[tuple[float, Address, Address, str, int]] = []
        self._everybody: list[Host] = []
        source = random.Random(f"network {seed}")  # a string: seeded by SHA-512, the same in every process
        self._draw, self._bits = source.random, source.getrandbits
        self._conditions = conditions or Conditions()
        self._links: dict[tuple[Host, Host], Conditions] = {}
        self._cuts: list[tuple[frozenset[Host], frozenset[Host]]] = []
        self._plain = True
        self._observed = False
        self._trace = 0
        loop.network = self

    # Time.

    @property
    def now(self) -> float:
        """Virtual seconds since the start."""
        return self.loop.now

    # Hosts.

    def host(self, *addresses: str) -> Host:
        """A new host. Without an address it gets the next 10.x.y.1, each in a /24 of its own."""
        if not addresses:
            count = itertools.count(len(self._everybody))
            free = (f"10.{number >> 8}.{number & 0xFF}.1" for number in count)
            addresses = (next(address for address in free if address not in self.hosts),)
        addresses = tuple(str(ipaddress.ip_address(address)) for address in addresses)
        for address in addresses:
            if address in self.hosts:
                raise ValueError(f"{self.hosts[address]!r} has the address {address} and is alive")
        host = Host(self, addresses)
        self.hosts.update(dict.fromkeys(addresses, host))
        self._everybody.append(host)
        return host

    def forget(self, host: Host) -> None:
        """The sockets and addresses of a dead host vanish."""
        for transport in list(host.transports):
            transport.vanish()
        for address in host.addresses:
            del self.hosts[address]

    def getaddrinfo(self, name: Any, port: Any, *, type: int = 0, proto: int = 0, **_: Any) -> list[Any]:  # noqa: A002
        """What `loop.getaddrinfo` answers: from `names`, or the address itself."""
        try:
            addresses = [str(ipaddress.ip_address(name))]
        except ValueError:
            addresses = self.names.get(name, [])
        if not addresses:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [
            (socket.AF_INET6, type, proto, "", (address, port or 0, 0, 0))
            if ":" in address
            else (socket.AF_INET, type, proto, "", (address, port or 0))
            for address in addresses
        ]

    # What lies between hosts.

    @property
    def conditions(self) -> Conditions:
        """What datagrams meet where neither a link nor a host has conditions of its own."""
        return self._conditions

    @conditions.setter
    def conditions(self, conditions: Conditions) -> None:
        self._conditions = conditions

    def link(self, source: Host, target: Host, conditions: Conditions | None) -> None:
        """The conditions from `source` to `target`, this way only; they go before those of the two hosts."""
        self._links.pop((source, target), None)
        if conditions is not None:
            self._links[source, target] = conditions
        self.reconsider()

    def partition(self, *groups: Iterable[Host]) -> None:
        """Cut the network into these groups; hosts in none of them are one more group, later ones too."""
        for host in self._everybody:
            host.island = 0
        for island, group in enumerate(groups, 1):
            for host in group:
                host.island = island
        self.reconsider()

    def cut(self, sources: Iterable[Host], targets: Iterable[Host]) -> None:
        """Nothing passes from `sources` to `targets` any more; the other way is as it was."""
        self._cuts.append((frozenset(sources), frozenset(targets)))
        self.reconsider()

    def heal(self) -> None:
        """End every partition and cut."""
        self._cuts.clear()
        self.partition()

    def reconsider(self) -> None:
        """Some rule changed: see whether any datagram needs to be looked at more closely."""
        self._plain = not (self._cuts or self._links or any(host.island or host.conditions for host in self._everybody))

    def _between(self, source: Host, target: Host | None) -> Conditions | None:
        """What a datagram meets; `None` when nothing passes."""
        if target is None:
            return source.conditions or self._conditions
        if source.island != target.island and source is not target:
            return None
        for sources, targets in self._cuts:
            if source in sources and target in targets:
                return None
        return self._links.get((source, target)) or source.conditions or target.conditions or self._conditions

    def send(self, host: Host, source: Port, target: Port, data: bytes) -> None:
        """Take a datagram from a socket and decide what becomes of it."""
        loop = self.loop
        now = loop.now
        size = len(data)
        host.sent += 1
        host.sent_bytes += size
        # A hash of numbers only, so it is the same in every process; the random id of a message is not.
        told = crc32(data[HEADER:], crc32(data[:1]))
        self._trace = hash((self._trace, now, source.number, target.number, told))
        if size > self.largest:
            self.largest = size
        if self._observed:
            self._observe(now, source, target, data)
        conditions = self._conditions
        if not self._plain:
            between = self._between(host, self.hosts.get(target.ip))
            if between is None:
                self.lost["cut"] += 1
                return
            conditions = between
        if conditions.loss and self._draw() < conditions.loss:
            self.lost["loss"] += 1
            return
        arrival = now + conditions.latencies[self._bits(QUANTILE_BITS)]
        if conditions.odd:
            if self._draw() < conditions.reorder:
                arrival += 10 * conditions.latency
            if self._draw() < conditions.duplicate:
                again = now + conditions.latencies[self._bits(QUANTILE_BITS)]
                heappush(loop.events, (again, loop.sequence(), target.arrive, data, source))
        heappush(loop.events, (arrival, loop.sequence(), target.arrive, data, source))

    # What was seen.

    def observe(self) -> None:
        """From now on count requests by RPC in `kinds` and `kind_bytes`, and keep every datagram in `record`."""
        self._observed = True

    def _observe(self, now: float, source: Port, target: Port, data: bytes) -> None:
        kind = rpc_kind(data)
        self.kinds[kind] += 1
        self.kind_bytes[kind] += len(data)
        self.record.append((now, source.address, target.address, kind, len(data)))

    @property
    def sent(self) -> int:
        return sum(host.sent for host in self._everybody)

    @property
    def sent_bytes(self) -> int:
        return sum(host.sent_bytes for host in self._everybody)

    @property
    def received(self) -> int:
        return sum(host.received for host in self._everybody)

    @property
    def received_bytes(self) -> int:
        return sum(host.received_bytes for host in self._everybody)

    @property
    def trace(self) -> str:
        """A digest of every datagram sent so far: when, by whom, to whom, what."""
        return f"{self._trace & (1 << 64) - 1:016x}"

    # Sockets.

    def port(self, address: Address) -> Port:
        """The `Port` of an address as a socket is given it. Raises for what is none."""
        if not isinstance(address, tuple) or len(address) not in (2, 4):
            raise TypeError(f"a datagram's address is {address!r}: it must be (ip, port)")
        ip, number = str(ipaddress.ip_address(address[0])), address[1]
        if not isinstance(number, int) or not 0 < number < 65536:
            raise OverflowError(f"a datagram's address is {address!r}: its port must be between 1 and 65535")
        port = self.ports.get((ip, number))
        if port is None:
            port = self.ports[ip, number] = Port(self, ip, number, len(self.ports))
        self.ports[address] = port
        return port

    async def create_datagram_endpoint(
        self,
        protocol_factory: Callable[[], Any],
        local_addr: Address | None = None,
        remote_addr: Address | None = None,
        *,
        sock: object = None,
        **_: Any,
    ) -> tuple[Transport, Any]:
        """As the method of a real loop; `family`, `reuse_port` and the like change nothing."""
        if sock is not None:
            raise ValueError("a real socket cannot be used on a simulated network")
        remote = self.port(remote_addr) if remote_addr else None
        if local_addr is None:
            if remote is None:
                raise ValueError("unexpected address family")
            local_addr = ("::" if ":" in remote.ip else "0.0.0.0", 0)
        interface, number = local_addr[:2]
        host, ports = self._bind(interface, number)
        protocol = protocol_factory()
        transport = Transport(self, host, protocol, ports, remote)
        for port in ports:
            port.transport = transport
        host.transports.append(transport)
        self.loop.call_soon(protocol.connection_made, transport, context=transport.context)
        await asyncio.sleep(0)
        return transport, protocol

    def _bind(self, interface: str, number: int) -> tuple[Host, list[Port]]:
        address = ipaddress.ip_address(interface)
        current = MACHINE.get()
        if address.is_unspecified:
            if not isinstance(current, Host):
                raise OSError(errno.EADDRNOTAVAIL, f"{interface} on no host: bind within `with host:`")
            host = current
            addresses = [one for one in host.addresses if (":" in one) == (address.version == 6)]
        else:
            found = self.hosts.get(str(address))
            if found is None or (current is not None and current is not found):
                raise OSError(errno.EADDRNOTAVAIL, f"{interface} is no address of {current or 'any host'}")
            host, addresses = found, [str(address)]
        if not addresses or not host.alive:
            raise OSError(errno.EADDRNOTAVAIL, f"{host!r} has no address for {interface}")
        if number:
            if self._taken(addresses, number):
                raise OSError(errno.EADDRINUSE, f"{interface}:{number} is in use on {host!r}")
            return host, [self.port((one, number)) for one in addresses]
        while self._taken(addresses, host.next_port):
            host.next_port += 1
        number, host.next_port = host.next_port, host.next_port + 1
        return host, [self.port((one, number)) for one in addresses]

    def _taken(self, addresses: list[str], number: int) -> bool:
        return any(self.port((one, number)).transport is not None for one in addresses)

    async def close(self) -> None:
        """Switch everything off. What is left after it is a leak: of no host, or of one that had closed its sockets."""
        self.heal()
        for host in self._everybody:
            if host.suspended or (host.alive and host.transports):
                host.kill()
        self.loop.mute = True  # nobody sees how a dead machine's tasks end
        for host in self._everybody:
            if not host.alive:
                await host.bury()
        self.loop.mute = False
