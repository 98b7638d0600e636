"""Processes that the bench starts, asks and ends. A question and an answer are one line of JSON each."""

import asyncio
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any, Self

from tests.bench.report import ROOT

# Longest wait for an answer (s) unless the question says more.
PATIENCE = 120.0
# A child that was told to end has this long (s) before it is killed.
GRACE = 3.0
# From <linux/posix-timers.h>: the CPU time of a whole process, read from another one.
CPUCLOCK_SCHED = 2


class BenchError(Exception):
    """The bench could not measure, or measured something else than it says."""


class Child:
    """A Python module as a process. `hello` is what it said when it was ready."""

    def __init__(self, module: str, *arguments: str, patience: float = PATIENCE) -> None:
        self.module = module
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed in `close`
        self._unread = b""
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            cwd=ROOT,
            bufsize=0,
        )
        try:
            self.hello = self._answer(patience)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def cpu(self) -> float:
        """Seconds of CPU time that the process has used, its threads and its part of the kernel included."""
        return time.clock_gettime((~self.process.pid << 3) | CPUCLOCK_SCHED)

    def ask(self, *, patience: float = PATIENCE, **question: Any) -> Any:
        """Its answer. Raises `BenchError` when it does not come in time or the process has ended."""
        self.tell(**question)
        return self._answer(patience)

    def tell(self, **question: Any) -> None:
        """Ask, and fetch the answer later."""
        assert self.process.stdin is not None
        data = json.dumps(question).encode() + b"\n"
        try:
            while data:
                data = data[self.process.stdin.write(data) or 0 :]
        except BrokenPipeError:
            raise self._failure("has ended") from None

    def answer(self, patience: float = PATIENCE) -> Any:
        """The answer to what was told."""
        return self._answer(patience)

    def _answer(self, patience: float) -> Any:
        assert self.process.stdout is not None
        deadline = time.monotonic() + patience
        while b"\n" not in self._unread:
            if not select.select([self.process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise self._failure(f"did not answer within {patience:g} s")
            data = os.read(self.process.stdout.fileno(), 1 << 20)
            if not data:
                raise self._failure("has ended")
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        return json.loads(line)

    def _failure(self, what: str) -> BenchError:
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace")[-4000:]
        return BenchError(f"{self.module} (pid {self.process.pid}) {what}\n{said}")

    def close(self) -> None:
        """End it: by the end of its input, else by its pid."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        try:
            self.process.wait(GRACE)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
        self.process.stdout.close()
        self._errors.close()


# -- the child's side --------------------------------------------------------------------------------------------------


def say(answer: Any) -> None:
    """Answer the parent, or greet it."""
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def end_with_parent() -> None:
    """For a child that is asked nothing: end as soon as the parent closes the pipe or dies."""

    def wait() -> None:
        os.read(sys.stdin.fileno(), 1)  # not the buffer: its lock would be in the way of a regular end
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


async def serve(handle: Callable[[dict[str, Any]], Awaitable[Any]], hello: Any) -> None:
    """Answer questions until the parent closes the pipe or dies."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=1 << 26)
    transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    say(hello)
    while line := await reader.readline():
        say(await handle(json.loads(line)))
    transport.close()
