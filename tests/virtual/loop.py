"""An asyncio event loop whose time jumps to the next thing that is due. Nothing here waits.

All machines of a simulated network share one loop. A machine's code runs in contexts in which `MACHINE` names it;
by that the loop keeps a time for each: `time()` and every timer are in the machine's own monotonic time, which stands
still while the machine is suspended, as CLOCK_MONOTONIC does. Outside any machine, `time()` is the time since the loop
began, from 0: a machine that has just booted has a small monotonic time too.

Computing takes no virtual time. `run_in_executor` runs its function at the loop's next turn, in the loop's own thread.
"""

import asyncio
import contextvars
import itertools
import weakref
from collections import deque
from collections.abc import Callable, Coroutine
from heapq import heapify, heappop, heappush
from time import perf_counter
from typing import Any

MACHINE: contextvars.ContextVar["Machine | None"] = contextvars.ContextVar("machine", default=None)

# Real seconds after which a callback has blocked the loop: far above any honest callback, so that a machine
# with more to do than cores does not fail a test.
BLOCKED_AFTER = 2.0
# Turns at one instant after which time will not move again: a task spins, or a timer re-arms itself at 0.
LIVELOCK_TURNS = 1_000_000


class DeadlockError(RuntimeError):
    """Nothing is ready and no timer is set: on a real loop the program would hang here for ever."""


class LivelockError(RuntimeError):
    """The loop has turned a million times and time did not move."""


class Machine:
    """What the loop knows of a machine. `halted`: suspended or dead, none of its callbacks run."""

    def __init__(self) -> None:
        self.halted = False
        self.slept = 0.0
        self.tasks: weakref.WeakSet[asyncio.Task[Any]] = weakref.WeakSet()
        self.halted_at = 0.0
        self.parked: list[asyncio.Handle] = []
        self.parked_timers: list[Timer] = []


class _Handle(asyncio.Handle):
    """A handle without debugging: a simulation makes millions."""

    __slots__ = ()

    def __init__(self, callback: Callable[..., object], args: Any, loop: "VirtualLoop", context: contextvars.Context):
        self._context = context
        self._loop = loop
        self._callback = callback
        self._args = args
        self._cancelled = False
        self._repr = None
        self._source_traceback = None


class Timer(asyncio.TimerHandle):
    """A timer in the monotonic time of `machine`."""

    __slots__ = ("machine",)

    def __init__(
        self,
        when: float,
        callback: Callable[..., object],
        args: Any,
        loop: "VirtualLoop",
        context: contextvars.Context,
        machine: Machine | None,
    ):
        self._context = context
        self._loop = loop
        self._callback = callback
        self._args = args
        self._cancelled = False
        self._repr = None
        self._source_traceback = None
        self._when = when
        self._scheduled = True
        self.machine = machine

    def cancel(self) -> None:
        if not self._cancelled:
            self._cancelled = True
            self._callback = None  # type: ignore[assignment]
            self._args = None  # type: ignore[assignment]
            if self._scheduled:
                self._loop._timer_handle_cancelled(self)


class VirtualLoop(asyncio.BaseEventLoop):
    """The loop. `asyncio.Runner(loop_factory=VirtualLoop)` runs a program on it."""

    _ready: deque[Any]  # of handles, whose attributes typeshed hides
    _stopping: bool

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        # (when, sequence, callback, argument, argument): no context, no handle, no cancelling. Datagrams travel here.
        self.events: list[tuple[float, int, Callable[[Any, Any], object], Any, Any]] = []
        self.sequence = itertools.count().__next__
        self.network: Any = None
        self.slow_callback_duration = BLOCKED_AFTER
        self.mute = False
        self._timers: list[tuple[float, int, Timer]] = []
        self._cancelled_timers = 0
        self._halted_machines = 0
        self._turns = 0
        self._turned_at = 0.0
        self._excused = 0.0

    # Time and timers.

    def time(self) -> float:
        machine = MACHINE.get()
        if machine is None:
            return self.now
        return (machine.halted_at if machine.halted else self.now) - machine.slept

    def call_at(  # type: ignore[override]
        self,
        when: float,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> Timer:
        if context is None:
            context = contextvars.copy_context()
        machine = context.get(MACHINE)
        timer = Timer(when, callback, args, self, context, machine)
        due = when if machine is None else when + machine.slept
        heappush(self._timers, (due, self.sequence(), timer))
        return timer

    def call_later(  # type: ignore[override]
        self,
        delay: float,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> Timer:
        # `call_at(self.time() + delay)` spelt out: every request sets a timer
        if context is None:
            context = contextvars.copy_context()
        machine = context.get(MACHINE)
        if machine is None:
            when = due = self.now + delay
        else:
            when = (machine.halted_at if machine.halted else self.now) - machine.slept + delay
            due = when + machine.slept
        timer = Timer(when, callback, args, self, context, machine)
        heappush(self._timers, (due, self.sequence(), timer))
        return timer

    def call_soon(  # type: ignore[override]
        self,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> asyncio.Handle:
        self._check_closed()  # type: ignore[attr-defined]
        handle = _Handle(callback, args, self, contextvars.copy_context() if context is None else context)
        self._ready.append(handle)
        return handle

    call_soon_threadsafe = call_soon  # type: ignore[assignment]

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        # A request's timeout is cancelled by its reply: without this most of the heap would be dead timers.
        self._cancelled_timers += 1
        if self._cancelled_timers > 1000 and self._cancelled_timers * 2 > len(self._timers):
            self._timers[:] = [entry for entry in self._timers if not entry[2]._cancelled]
            heapify(self._timers)
            self._cancelled_timers = 0

    # Turning.

    def _run_once(self) -> None:
        ready = self._ready
        if self.now != self._turned_at:
            self._turned_at = self.now
            self._turns = 0
        if ready:
            self._turns += 1
            if self._turns > LIVELOCK_TURNS:
                self._turns = 0
                raise LivelockError(
                    f"{LIVELOCK_TURNS:,} turns at {self.now:.6f} s, next {ready[0]!r}\n{self._waiting()}"
                )
        elif self._stopping:
            return
        else:
            self._advance()
        started = perf_counter()
        limit = self.slow_callback_duration
        for _ in range(len(ready)):
            handle = ready.popleft()
            if handle._cancelled:
                continue
            if self._halted_machines:
                machine = handle._context.get(MACHINE)
                if machine is not None and machine.halted:
                    machine.parked.append(handle)
                    continue
            try:
                handle._context.run(handle._callback, *handle._args)
            except (SystemExit, KeyboardInterrupt):
                raise
            except BaseException as error:  # noqa: BLE001 - as asyncio does: the handler is told, the loop goes on
                self.call_exception_handler(
                    {"message": f"Exception in callback {handle!r}", "exception": error, "handle": handle}
                )
            ended = perf_counter()
            if ended - started > limit:
                self._blocked(ended - started, handle._callback)
            started = ended

    def _advance(self) -> None:
        """Move time to what is due next, and run datagrams, until a callback is ready."""
        ready, events, timers = self._ready, self.events, self._timers
        limit = self.slow_callback_duration
        started = perf_counter()
        while not ready and not self._stopping:
            if events and not (timers and timers[0] < events[0]):
                when, _, callback, first, second = heappop(events)
                self.now = when
                try:
                    callback(first, second)
                except (SystemExit, KeyboardInterrupt):
                    raise
                except BaseException as error:  # noqa: BLE001
                    self.call_exception_handler({"message": f"Exception in {callback!r}", "exception": error})
                ended = perf_counter()
                if ended - started > limit:
                    self._blocked(ended - started, callback)
                started = ended
            elif timers:
                # as asyncio does, all that is due at this instant runs before anything that it makes ready
                when = timers[0][0]
                while timers and timers[0][0] == when:
                    self._due(heappop(timers))
            else:
                raise DeadlockError(f"nothing is ready and no timer is set at {self.now:.6f} s\n{self._waiting()}")

    def _due(self, entry: tuple[float, int, Timer]) -> None:
        when, _, timer = entry
        if timer._cancelled:
            self._cancelled_timers -= 1
            return
        machine = timer.machine
        if machine is not None:
            if machine.halted:
                timer._scheduled = False
                machine.parked_timers.append(timer)
                return
            if timer._when + machine.slept > when:
                # the machine slept after this timer was set: it is due that much later
                heappush(self._timers, (timer._when + machine.slept, self.sequence(), timer))
                return
        if when > self.now:
            self.now = when
        timer._scheduled = False
        self._ready.append(timer)

    def _blocked(self, seconds: float, what: object) -> None:
        seconds -= self._excused
        self._excused = 0.0
        if seconds > self.slow_callback_duration:
            message = (
                f"the event loop was blocked for {seconds:.1f} s of real time by {getattr(what, '__self__', what)!r}"
            )
            self.call_exception_handler({"message": message, "blocked": True})

    def _waiting(self) -> str:
        lines = []
        for task in asyncio.all_tasks(self):
            frames = task.get_stack(limit=1)
            where = f"{frames[0].f_code.co_filename}:{frames[0].f_lineno}" if frames else "not started"
            lines.append(f"  {task.get_name()}: {getattr(task.get_coro(), '__qualname__', '?')} at {where}")
        return "waiting:\n" + "\n".join(sorted(lines))

    # Machines that stop and go on.

    def halt(self, machine: Machine) -> None:
        """From now on no callback and no timer of `machine` runs, and its time stands still."""
        if MACHINE.get() is machine:
            raise RuntimeError(f"{machine!r} cannot halt from within its own code: leave its `with` block first")
        machine.halted = True
        machine.halted_at = self.now
        self._halted_machines += 1

    def resume(self, machine: Machine) -> None:
        """`machine` goes on where it stopped: what was ready runs, each timer after what was left of it."""
        machine.halted = False
        machine.slept += self.now - machine.halted_at
        self._halted_machines -= 1
        self._ready.extend(machine.parked)
        machine.parked.clear()
        for timer in machine.parked_timers:
            if not timer._cancelled:
                timer._scheduled = True
                heappush(self._timers, (timer._when + machine.slept, self.sequence(), timer))
        machine.parked_timers.clear()

    # What a selector loop has and production code uses.

    def create_task(self, coro: Coroutine[Any, Any, Any], **options: Any) -> asyncio.Task[Any]:  # type: ignore[override]
        task = super().create_task(coro, **options)
        context = options.get("context")
        machine = MACHINE.get() if context is None else context.get(MACHINE)
        if machine is not None:
            machine.tasks.add(task)
        return task

    def run_in_executor(  # type: ignore[override]
        self, executor: object, func: Callable[..., Any], *args: Any
    ) -> asyncio.Future[Any]:
        future = self.create_future()
        self.call_soon(self._execute, future, func, args)
        return future

    def _execute(self, future: asyncio.Future[Any], func: Callable[..., Any], args: tuple[Any, ...]) -> None:
        if future.cancelled():
            return
        started = perf_counter()
        try:
            result = func(*args)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:  # noqa: BLE001 - it belongs to whoever awaits
            future.set_exception(error)
        else:
            future.set_result(result)
        self._excused = perf_counter() - started  # a thread would not have blocked the loop

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:
        """No thread was started."""

    async def create_datagram_endpoint(self, protocol_factory: Any, *args: Any, **options: Any) -> Any:
        if self.network is None:
            raise RuntimeError("this loop has no network: make a tests.virtual.network.Network on it")
        return await self.network.create_datagram_endpoint(protocol_factory, *args, **options)

    async def getaddrinfo(self, host: Any, port: Any, **options: Any) -> Any:
        if self.network is None:
            raise RuntimeError("this loop has no network: make a tests.virtual.network.Network on it")
        await asyncio.sleep(0)
        return self.network.getaddrinfo(host, port, **options)

    def call_exception_handler(self, context: Any) -> None:
        if not self.mute:
            super().call_exception_handler(context)

    def _write_to_self(self) -> None:
        """Nobody waits, so nobody needs to be woken."""

    def _process_events(self, event_list: object) -> None:
        """There is no selector."""

    def close(self) -> None:
        self.events.clear()
        self._timers.clear()
        super().close()
