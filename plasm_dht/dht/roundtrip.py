"""Round-trip times: how long to wait for an answer (RFC 6298), and when one is slower than expected."""

from collections import OrderedDict

from plasm_dht.dht.ids import Address

# Bounds of a time-out and what a stranger gets (s).
FLOOR, CAP, STRANGER = 0.15, 3.0, 1.0
# Bounds of what counts as slower than expected (s).
SLOW_FLOOR, SLOW_CAP = 0.005, 0.25
# Gains of the estimator (RFC 6298, section 2.3), and the clock granularity that it adds (s).
ALPHA, BETA, GRANULARITY = 1 / 8, 1 / 4, 0.001
MAX_ADDRESSES = 10_000
# The median contact is computed from this many recent answers.
RECENT = 64


class RoundTrips:
    """Smoothed round trips by address, all in seconds. Bounded: the longest unused address is forgotten first."""

    def __init__(self) -> None:
        self._estimates: OrderedDict[Address, tuple[float, float]] = OrderedDict()
        self._backed_off: OrderedDict[Address, float] = OrderedDict()
        self._recent: OrderedDict[Address, float] = OrderedDict()
        self._median: float | None = None

    def sample(self, address: Address, seconds: float) -> None:
        """Note a round trip; never one of a request that was sent twice (Karn's algorithm)."""
        self._backed_off.pop(address, None)
        known = self._estimates.pop(address, None)
        if known is None:
            smoothed, variation = seconds, seconds / 2
        else:
            variation = (1 - BETA) * known[1] + BETA * abs(known[0] - seconds)
            smoothed = (1 - ALPHA) * known[0] + ALPHA * seconds
        self._estimates[address] = (smoothed, variation)
        if len(self._estimates) > MAX_ADDRESSES:
            self._estimates.popitem(last=False)
        self._recent[address] = smoothed
        self._recent.move_to_end(address)
        if len(self._recent) > RECENT:
            self._recent.popitem(last=False)
        self._median = None

    def back_off(self, address: Address, *, late: bool = False) -> None:
        """Wait twice as long until the next sample (RFC 6298, section 5.5).

        Of a request that was sent twice there is none: whoever has become far would be taken for dead for ever. That
        an answer was only `late` once is chance: to wait longer then is to wait longer for those who die, too.
        """
        wait = self.timeout(address)
        is_chance = late and address not in self._backed_off
        self._backed_off[address] = wait if is_chance else min(2 * wait, CAP)
        if len(self._backed_off) > MAX_ADDRESSES:
            self._backed_off.popitem(last=False)

    def knows(self, address: Address) -> bool:
        """Whether a round trip of this address is known."""
        return address in self._estimates

    def timeout(self, address: Address) -> float:
        """How long to wait for an answer before the request is sent again."""
        backed_off = self._backed_off.get(address)
        if backed_off is not None:
            return backed_off
        known = self._estimates.get(address)
        if known is None:
            return STRANGER
        return min(max(known[0] + max(GRANULARITY, 4 * known[1]), FLOOR), CAP)

    def slow_after(self, address: Address) -> float:
        """After how long an answer is slower than expected: twice the smoothed round trip, a stranger's the median."""
        known = self._estimates.get(address)
        if known is not None:
            expected = known[0]
        elif self._recent:
            if self._median is None:
                ordered = sorted(self._recent.values())
                half = len(ordered) // 2
                self._median = (ordered[half] + ordered[~half]) / 2  # `statistics` would cost the start 10 ms
            expected = self._median
        else:
            return SLOW_CAP
        return min(max(2 * expected, SLOW_FLOOR), SLOW_CAP)
