"""The only reader of clocks. Whoever needs the time is given a `Clock` or a `now`."""

import asyncio
import time

# A forward jump of wall time against monotonic time by more than this is a suspend or a step, not a slew (s).
JUMP = 1.0


class Clock:
    """The clocks of one machine.

    Wall time can be stepped; monotonic time stands still while the machine sleeps; neither alone can end a record.
    Subclass it and override `wall` and `monotonic` to run a node on another time.
    """

    def __init__(self) -> None:
        self._drift: float | None = None
        self._skipped = 0.0

    def wall(self) -> int:
        """Unix time of this machine in ms, as it is set, right or wrong."""
        return int(time.time() * 1000)

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
