"""The only reader of clocks. Whoever needs the time is given a `Clock` or a `now`."""

import asyncio
import time
from collections.abc import Sequence

# A forward jump of wall time against monotonic time by more than this is a suspend or a step, not a slew (s).
JUMP = 1.0
# Clocks this close to each other agree (ms).
AGREEMENT = 60_000
# Responders that have to agree before a reader mistrusts its own clock.
LEAST_RESPONDERS = 3
# When this release was made (Unix ms, 2026-11-23): a clock that is older has never been set.
RELEASED = 1_795_392_000_000


class Clock:
    """The clocks of one machine.

    Wall time can be stepped; monotonic time stands still while the machine sleeps; neither alone can end a record.
    Subclass it and override `wall` and `monotonic` to run a node on another time.
    """

    def __init__(self) -> None:
        # What the network's time is ahead of the wall clock (ms), when that has been found to be wrong.
        self.correction = 0
        self._drift: float | None = None
        self._skipped = 0.0

    def wall(self) -> int:
        """Unix time of this machine in ms, as it is set, right or wrong."""
        return int(time.time() * 1000)

    def now(self) -> int:
        """Unix ms as far as this machine knows: what governs signing and what is live."""
        # Never before 1970, which no record could say: who is believed may lie, and then our clock may be set back.
        return max(self.wall() + self.correction, 0)

    def monotonic(self) -> float:
        """Seconds that never go back. The running loop's time, so that a virtual-time loop ages records too."""
        try:
            return asyncio.get_running_loop().time()
        except RuntimeError:
            return time.monotonic()

    def elapsed(self) -> float:
        """Monotonic seconds plus every forward jump of the wall clock (a suspend, a step).

        What is due by this is overdue at once after a suspend, and no wall clock that steps back delays it.
        """
        monotonic = self.monotonic()
        drift = self.wall() / 1000 - monotonic
        if self._drift is not None and drift - self._drift > JUMP:
            self._skipped += drift - self._drift
        self._drift = drift
        return monotonic + self._skipped


def that_count(samples: Sequence[int], own: int) -> list[int]:
    """Those of the responders' clocks (ms) that say something, in order: none never set, if ours or any was set."""
    are_set = sorted(sample for sample in samples if sample >= RELEASED)
    return are_set if are_set or own >= RELEASED else sorted(samples)


def network_time(samples: Sequence[int], own: int, least: int = 1) -> int | None:
    """The median of the responders' clocks (ms), when more than half agree with each other and differ from our own.

    `None`: our own clock is as good, or they do not agree, or fewer than `least` do.
    """
    ordered = that_count(samples, own)
    most = max(len(ordered) // 2 + 1, least)
    agree = any(ordered[i + most - 1] - ordered[i] <= AGREEMENT for i in range(len(ordered) - most + 1))
    if not ordered or not agree:
        return None
    median = _middle(ordered)
    return median if abs(median - own) > AGREEMENT else None


def is_right_again(samples: Sequence[int], own: int) -> bool:
    """Whether a clock need not be corrected any more: no majority contradicts it, and half of all agree with it."""
    counting = that_count(samples, own)
    agree = sum(abs(sample - own) <= AGREEMENT for sample in counting)
    return network_time(samples, own) is None and 2 * agree >= len(counting) > 0


def _middle(ordered: Sequence[int]) -> int:
    """The lower median. `statistics` has one too, and imports fractions and decimals with it."""
    return ordered[(len(ordered) - 1) // 2]


def reader_time(samples: Sequence[int], own: int) -> int:
    """What a reader takes for the time (ms): its own clock, unless that was never set or a majority differs."""
    if own < RELEASED and samples:
        return max(_middle(that_count(samples, own)), own)
    return network_time(samples, own, LEAST_RESPONDERS) or own


def is_in_doubt(samples: Sequence[int], own: int) -> bool:
    """Whether most responders contradict what a reader takes for the time: hearing more of them may settle it."""
    now, counting = reader_time(samples, own), that_count(samples, own)
    return sum(abs(sample - now) > AGREEMENT for sample in counting) > len(counting) // 2


class NetworkTime:
    """What a reader takes for the time between its readings: what the last one that said anything of it showed.

    Where that was another time than our clock's it holds until the clock is stepped: whoever has set it may be right.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._ahead: int | None = None  # of the wall clock, however far off it may be known to be (ms)
        self._drift = 0.0

    def learn(self, samples: Sequence[int]) -> None:
        """Take in the clocks of the responders of one reading (Unix ms)."""
        if samples:
            own = self._clock.now()
            found = reader_time(samples, own)
            self._ahead = None if found == own else found - self._clock.wall()
            self._drift = self._clock.wall() / 1000 - self._clock.monotonic()

    def now(self) -> int:
        """Unix ms: the network's time where our own clock is wrong."""
        wall = self._clock.wall()
        if self._ahead is None or abs(wall / 1000 - self._clock.monotonic() - self._drift) > JUMP:
            return self._clock.now()
        return max(wall + self._ahead, 0)
