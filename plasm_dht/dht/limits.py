"""Bounded memory about addresses: how fast each may ask, and which have answered us."""

import functools
import ipaddress
from collections import OrderedDict

from plasm_dht.dht.ids import Address

# Addresses that each table remembers; the longest unseen goes first.
MAX_ADDRESSES = 10_000
# An address that answered a query is taken for real for this long (s): longer than the time between two refreshes.
VERIFIED_FOR = 3600.0
# A stranger that did not answer a ping is not pinged again for this long (s).
SILENT_FOR = 60.0


@functools.lru_cache(maxsize=16384)
def source_of(ip: str) -> str:
    """What one host can send from, as far as we can tell: an IPv4 address, the /64 of an IPv6 address (RFC 4291)."""
    address = ipaddress.ip_address(ip)
    if address.version == 4 or address.is_link_local:  # all hosts on a link share one /64
        return ip
    mapped = address.ipv4_mapped
    return str(mapped) if mapped is not None else str(ipaddress.ip_network((int(address) >> 64 << 64, 64)))


class RateLimit:
    """A token bucket for each source (`source_of`): `rate` requests a second, bursts of twice that. Times in s,
    monotonic.
    """

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._burst = 2 * rate
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def allows(self, ip: str, now: float) -> bool:
        """Take a token of this address's source, if it has one."""
        if ":" in ip:
            ip = source_of(ip)
        tokens, since = self._buckets.pop(ip, (self._burst, now))
        tokens = min(self._burst, tokens + (now - since) * self._rate)
        allowed = tokens >= 1
        self._buckets[ip] = (tokens - 1 if allowed else tokens, now)
        if len(self._buckets) > MAX_ADDRESSES:
            self._buckets.popitem(last=False)
        return allowed


class Said:
    """Which id the node at an address said it has, not longer than `lifetime` seconds ago."""

    def __init__(self, lifetime: float) -> None:
        self._lifetime = lifetime
        self._ids: OrderedDict[Address, tuple[bytes, float]] = OrderedDict()

    def add(self, address: Address, node_id: bytes, now: float) -> None:
        """Note that it said so now."""
        self._ids[address] = node_id, now
        self._ids.move_to_end(address)
        if len(self._ids) > MAX_ADDRESSES:
            self._ids.popitem(last=False)

    def has(self, address: Address, node_id: bytes, now: float) -> bool:
        """Whether that is what it said last, and recently."""
        said = self._ids.get(address)
        return said is not None and said[0] == node_id and now - said[1] < self._lifetime


class Seen:
    """Addresses that did something (answered, stayed silent) not longer than `lifetime` seconds ago."""

    def __init__(self, lifetime: float) -> None:
        self._lifetime = lifetime
        self._times: OrderedDict[Address, float] = OrderedDict()

    def add(self, address: Address, now: float) -> None:
        """Note that it did so now."""
        self._times[address] = now
        self._times.move_to_end(address)
        if len(self._times) > MAX_ADDRESSES:
            self._times.popitem(last=False)

    def discard(self, address: Address) -> None:
        """Forget it."""
        self._times.pop(address, None)

    def has(self, address: Address, now: float) -> bool:
        """Whether it did so recently."""
        since = self._times.get(address)
        return since is not None and now - since < self._lifetime
