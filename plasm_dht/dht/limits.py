"""Bounded memory about addresses: how fast each may ask, and which have answered us."""

from collections import OrderedDict

from plasm_dht.dht.ids import Address

# Addresses that each table remembers; the longest unseen goes first.
MAX_ADDRESSES = 10_000
# An address that answered a query is taken for real for this long (s): longer than the time between two refreshes.
VERIFIED_FOR = 3600.0
# A stranger that did not answer a ping is not pinged again for this long (s).
SILENT_FOR = 60.0


class RateLimit:
    """A token bucket for each source address: `rate` requests a second, bursts of twice that. Times in s, monotonic."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._burst = 2 * rate
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def allows(self, ip: str, now: float) -> bool:
        """Take a token of this address, if it has one."""
        tokens, since = self._buckets.pop(ip, (self._burst, now))
        tokens = min(self._burst, tokens + (now - since) * self._rate)
        allowed = tokens >= 1
        self._buckets[ip] = (tokens - 1 if allowed else tokens, now)
        if len(self._buckets) > MAX_ADDRESSES:
            self._buckets.popitem(last=False)
        return allowed


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
