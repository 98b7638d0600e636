"""A simulated machine: its addresses, its clocks, its life. What travels between machines is in `network`."""

import asyncio
import contextvars
from collections.abc import Coroutine
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from plasm_dht.clock import Clock
from tests.virtual.loop import MACHINE, Machine

if TYPE_CHECKING:
    from tests.virtual.network import Conditions, Network
    from tests.virtual.sockets import Transport

# 2027-01-01T00:00:00Z at virtual time 0, in ms: a trace is the same whenever and wherever it is made, and the clock is
# one that has been set (not older than the release).
EPOCH = 1_798_761_600_000

T = TypeVar("T")

_outer: contextvars.ContextVar[tuple[Machine | None, ...]] = contextvars.ContextVar("outer machines", default=())


class HostDownError(Exception):
    """The host was killed while somebody waited for its code."""


class HostClock(Clock):
    """The clocks of one host. `offset`: how far its wall clock is ahead, in s."""

    def __init__(self, host: "Host") -> None:
        super().__init__()
        self._host = host
        self.offset = 0.0

    def wall(self) -> int:
        """Goes on while the host is suspended (its battery-backed clock does)."""
        return EPOCH + round((self._host.network.now + self.offset) * 1000)

    def monotonic(self) -> float:
        """Stands still while the host is suspended."""
        host = self._host
        return (host.halted_at if host.halted else host.network.now) - host.slept

    def step(self, seconds: float) -> None:
        """Step the wall clock: forward, or back when negative."""
        self.offset += seconds

    def set(self, unix_ms: int) -> None:
        """Set the wall clock: 0 is a machine without a battery, just booted."""
        self.offset += (unix_ms - self.wall()) / 1000


class Host(Machine):
    """A machine. Code is its own when it runs in `with host:`, `host.spawn` or `host.run`, or comes of any of these.

    Timers and time of code that belongs to no host never stop, so give work that must sleep with its host to the host.
    """

    def __init__(self, network: "Network", addresses: tuple[str, ...]) -> None:
        super().__init__()
        self.network = network
        self.addresses = addresses
        self.clock = HostClock(self)
        self.alive = True
        self.island = 0
        self.transports: list[Transport] = []
        self.sent = self.sent_bytes = self.received = self.received_bytes = 0
        self.next_port = 32768  # the first ephemeral port of Linux
        self._conditions: Conditions | None = None
        self._remains: set[asyncio.Task[Any]] = set()
        self._gone: asyncio.Future[None] | None = None

    def __repr__(self) -> str:
        state = "" if self.alive else " (dead)"
        return f"<host {self.address}{' (suspended)' if self.alive and self.halted else state}>"

    @property
    def address(self) -> str:
        """The first of its addresses."""
        return self.addresses[0]

    @property
    def suspended(self) -> bool:
        return self.alive and self.halted

    @property
    def conditions(self) -> "Conditions | None":
        """What datagrams from and to this host meet; `None`: the network's."""
        return self._conditions

    @conditions.setter
    def conditions(self, conditions: "Conditions | None") -> None:
        self._conditions = conditions
        self.network.reconsider()

    # Its code.

    def __enter__(self) -> "Host":
        _outer.set((*_outer.get(), MACHINE.get()))
        MACHINE.set(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        *outer, previous = _outer.get()
        _outer.set(tuple(outer))
        MACHINE.set(previous)

    def context(self) -> contextvars.Context:
        """A copy of the current context in which this host is the current one."""
        context = contextvars.copy_context()
        context.run(MACHINE.set, self)
        return context

    def spawn(self, coro: Coroutine[Any, Any, T], *, name: str | None = None) -> asyncio.Task[T]:
        """Start a task on this host."""
        if not self.alive:
            coro.close()
            raise HostDownError(f"{self!r} runs nothing any more")
        return self.network.loop.create_task(coro, name=name, context=self.context())

    async def run(self, coro: Coroutine[Any, Any, T]) -> T:
        """Run `coro` on this host; its result or exception. `HostDownError` when the host is killed meanwhile."""
        task = self.spawn(coro)
        if self._gone is None:
            self._gone = self.network.loop.create_future()
        try:
            await asyncio.wait((task, self._gone), return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            task.cancel()
            raise
        if not task.done():
            raise HostDownError(f"{self!r} was killed")
        return task.result()

    # Its life.

    def suspend(self) -> None:
        """Put it to sleep: its callbacks, timers and monotonic time stand still, datagrams to it are lost."""
        if self.halted:
            raise RuntimeError(f"{self!r} cannot be suspended")
        self.network.loop.halt(self)

    def resume(self) -> None:
        """Wake it: each of its timers is late by the time slept, by the wall clock."""
        if not self.suspended:
            raise RuntimeError(f"{self!r} is not suspended")
        self.network.loop.resume(self)

    def kill(self) -> None:
        """It dies without a word: its sockets vanish, and none of its code runs any more.

        Its tasks are kept as they are and cancelled when the network is closed, so that no `finally` of a dead machine
        changes what a scenario sees. A new host may take its addresses.
        """
        if not self.alive:
            raise RuntimeError(f"{self!r} cannot be killed")
        if not self.halted:
            self.network.loop.halt(self)
        self.alive = False
        self._remains = {task for task in self.tasks if not task.done()}
        self.network.forget(self)
        if self._gone is not None and not self._gone.done():
            self._gone.set_result(None)

    async def bury(self) -> None:
        """Let the cancelled tasks of a dead host end. Only the network does this, when it closes."""
        self.network.loop.resume(self)
        self.parked_timers.clear()
        for _ in range(3):  # what a task starts as it ends, is ended too
            for task in self._remains:
                task.cancel()
            if self._remains:
                await asyncio.wait(self._remains, timeout=60)
            for task in self._remains:
                if task.done() and not task.cancelled():
                    task.exception()
            self._remains = {task for task in self.tasks if not task.done()}
