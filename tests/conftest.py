"""Guards of the whole suite: a blocked loop, a leaked task or thread, a lost exception fail the test at fault.

`@pytest.mark.unguarded("blocked", "lost", "tasks", "threads")` turns the named guards off, without names all.
"""

import asyncio
import asyncio.runners
import gc
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Generator
from typing import Any

import pytest

# Real seconds that one callback may take. On a machine with more to do than cores an honest one may wait for a
# core for some tenths of a second; a resolver, a lock, a sleep or a walk over a big store takes longer than this.
BLOCKED_AFTER = 2.0
# What a closed server may still need to end after its last line: turns of the loop, and seconds for a thread.
SETTLE_TURNS = 10
THREAD_GRACE = 2.0


class Guard:
    """What went wrong in one test, by kind."""

    def __init__(self, off: frozenset[str] = frozenset(), *, all_off: bool = False) -> None:
        self.off, self.all_off = off, all_off
        self.problems: list[str] = []
        self.threads = set(threading.enumerate())
        self.used_a_loop = False
        self.failed = False

    def note(self, kind: str, problem: str) -> None:
        if not self.all_off and kind not in self.off:
            self.problems.append(f"{kind}: {problem}")

    def report(self) -> None:
        problems, self.problems = self.problems, []
        if problems:
            pytest.fail("\n".join(problems), pytrace=False)


guard = Guard(all_off=True)  # of the test that runs now
# Of any type: the guards replace what is private to asyncio.
_handles: Any = asyncio.Handle
_loops: Any = asyncio.BaseEventLoop
_runners: Any = asyncio.runners
# The originals, while the guards are in place.
_run_handle = _handles._run
_handle_exception = _loops.call_exception_handler
_cancel_all_tasks = _runners._cancel_all_tasks


def _guarded_run(handle: Any) -> None:
    callback = handle._callback
    started = time.perf_counter()
    _run_handle(handle)
    seconds = time.perf_counter() - started
    if seconds > BLOCKED_AFTER:
        guard.note(
            "blocked", f"the event loop stood still for {seconds:.1f} s in {getattr(callback, '__self__', callback)!r}"
        )


def _guarded_handle_exception(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    kind = "blocked" if context.get("blocked") else "lost"
    guard.note(kind, f"{context.get('message')}: {context.get('exception') or context.get('task')!r}")
    _handle_exception(loop, context)


def _guarded_cancel_all_tasks(loop: asyncio.AbstractEventLoop) -> None:
    """What a Runner does before it closes its loop: whoever is still there then was left behind."""
    guard.used_a_loop = True
    if sys.exc_info()[0] is None and not guard.failed:
        for _ in range(SETTLE_TURNS):
            loop.run_until_complete(asyncio.sleep(0))
        for task in asyncio.all_tasks(loop):
            guard.note("tasks", f"{task!r} was left running")
    _cancel_all_tasks(loop)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--virtual-seed",
        default=os.environ.get("PLASM_SEED", "1"),
        help="seed of the simulated network: a number, or `random` to draw one (default: $PLASM_SEED, else 1)",
    )


def pytest_configure(config: pytest.Config) -> None:
    # A shell that runs the suite in the background has it ignore SIGINT, and every child would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line("markers", "unguarded(*kinds): turn guards off: blocked, lost, tasks, threads; none: all")
    drawn = config.getoption("--virtual-seed")
    seed = random.SystemRandom().randrange(2**32) if drawn == "random" else int(drawn)
    config.virtual_seed = seed  # type: ignore[attr-defined]  # pytest's way to hand something to fixtures
    _handles._run = _guarded_run
    _loops.call_exception_handler = _guarded_handle_exception
    _runners._cancel_all_tasks = _guarded_cancel_all_tasks


def pytest_unconfigure() -> None:
    _handles._run = _run_handle
    _loops.call_exception_handler = _handle_exception
    _runners._cancel_all_tasks = _cancel_all_tasks


def pytest_report_header(config: pytest.Config) -> str:
    return f"virtual seed: {config.virtual_seed}"  # type: ignore[attr-defined]  # as above


def pytest_collection_finish() -> None:
    # What was imported lives as long as the process: no collection needs to look at it again.
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, None, None]:
    global guard
    marks = list(item.iter_markers("unguarded"))
    off = frozenset(kind for mark in marks for kind in mark.args)
    guard = Guard(off, all_off=any(not mark.args for mark in marks))
    yield


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any]) -> Generator[None, object, object]:
    before = set(threading.enumerate())
    result = yield
    if fixturedef.scope != "function":
        guard.threads |= set(threading.enumerate()) - before  # it outlives the test by right
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, None, None]:
    try:
        yield
    except BaseException:
        guard.failed = True
        raise
    guard.report()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown() -> Generator[None, None, None]:
    yield
    if guard.used_a_loop or guard.all_off:
        # Tasks and coroutines in cycles report what they lost only when they are collected: of a test that may lose
        # something too, or a later one is blamed for it.
        previous, sys.unraisablehook = sys.unraisablehook, lambda lost: guard.note("lost", f"{lost.exc_value!r}")
        try:
            gc.collect()
        finally:
            sys.unraisablehook = previous
    deadline = time.monotonic() + THREAD_GRACE
    for thread in set(threading.enumerate()) - guard.threads:
        thread.join(max(0.0, deadline - time.monotonic()))
        if thread.is_alive():
            guard.note("threads", f"{thread!r} was left running")
    guard.report()
