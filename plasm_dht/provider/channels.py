"""Follows the artifact folder: each `CHANNEL/ARCH` by itself, so that none waits for the large files of another.

Knows the watcher and the scanner, and neither HTTP nor the DHT: what is found and what has gone it tells two callables.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import ParamSpec, TypeVar

from plasm_dht.clock import Clock
from plasm_dht.errors import ArtifactsError
from plasm_dht.provider.artifacts import ArtifactScanner, ArtifactSet, Scan, ScanStopped
from plasm_dht.provider.watch import ArtifactWatcher

log = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")

# A target that has vanished, or that kept changing, is looked at again after this long (s): whoever deletes and
# recreates a folder in a moment does not want it withdrawn.
LOOK_AGAIN = 1.0
# Targets that are hashed at the same time, each in a thread that holds a chunk of 1 MiB. More of them wait.
SCANS_AT_ONCE = 16


class Channels:
    """What is in the folder, target by target.

    `found(target, artifacts)` is called whenever a target has been looked at, changed or not; `gone(target)` once one
    that was found has not been there for `LOOK_AGAIN` s.

    Attributes:
        seen: set when everything that was there at the start has been looked at once.
        unseen: of these the targets that have not been looked at yet.
        problems: what is not served and why, one line each, by path in the folder.
        unreadable: why the folder cannot be read; `None` when it can.
    """

    def __init__(
        self, root: Path, clock: Clock, *, found: Callable[[str, ArtifactSet], None], gone: Callable[[str], None]
    ) -> None:
        self.seen = asyncio.Event()
        self.unseen: set[str] = set()
        self.unreadable: str | None = None
        self._root = root
        self._clock = clock
        self._found = found
        self._gone = gone
        self._scanner = ArtifactScanner(root, clock)
        self._watcher = ArtifactWatcher(root)
        self._threads = ThreadPoolExecutor(SCANS_AT_ONCE, thread_name_prefix="plasm-dht-scan")
        self._group: asyncio.TaskGroup
        self._looking: dict[str, asyncio.Event] = {}  # set: look again
        self._present: set[str] = set()
        self._changing: set[str] = set()
        self._missing: dict[str, float] = {}  # since when (monotonic)
        self._problems: dict[str, dict[str, str]] = {}  # by target; "": what is none

    @property
    def mode(self) -> str:
        """How changes are seen: `inotify`, `polling` or `none`."""
        return self._watcher.mode

    @property
    def problems(self) -> dict[str, str]:
        """What is not served and why, one line each, by path in the folder."""
        return {path: problem for of_one in self._problems.values() for path, problem in sorted(of_one.items())}

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing that is served or will be."""
        return not self._present and not self._looking

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Watch the folder; raises `ArtifactsError` when it cannot be read. `run` it inside."""
        try:
            await self._in_thread(self._scanner.targets)
            async with self._watcher:
                yield
        finally:
            self._scanner.stop()
            await asyncio.to_thread(self._threads.shutdown)

    async def run(self) -> None:
        """Look at everything, then at whatever changes, until cancelled."""
        async with asyncio.TaskGroup() as self._group:
            self.unseen = await self._look_at_all()
            self._note_seen()
            async for targets in self._watcher:
                if targets is None:
                    await self._look_at_all()
                for target in targets or ():
                    self._look(target)

    # -- one target --------------------------------------------------------------------------------------------------

    def _look(self, target: str) -> None:
        again = self._looking.get(target)
        if again is not None:
            again.set()
            return
        self._looking[target] = again = asyncio.Event()
        self._group.create_task(self._follow(target, again))

    async def _follow(self, target: str, again: asyncio.Event) -> None:
        """Look at the target until it is settled: found as it is, or gone for good."""
        try:
            while True:
                again.clear()
                scan = await self._scan(target)
                settled = scan is None or self._take(target, scan)
                self._note_seen(target)
                if settled and not again.is_set():
                    return
                if not settled:
                    with suppress(TimeoutError):
                        async with asyncio.timeout(LOOK_AGAIN):
                            await again.wait()
        except ScanStopped:
            pass
        finally:
            del self._looking[target]

    def _take(self, target: str, scan: Scan) -> bool:
        """Take note of what a scan saw. Whether that is all for now."""
        if target in scan.found:
            self._missing.pop(target, None)
            self._changing.discard(target)
            self._present.add(target)
            self._found(target, scan.found[target])
            return True
        if target in scan.unsettled:
            self._missing.pop(target, None)
            if target not in self._changing and target not in scan.problems:
                self._changing.add(target)
                log.info("%s is being changed: it is published when it rests", target)
            return False
        self._changing.discard(target)
        now = self._clock.monotonic()
        if target in self._present and now - self._missing.setdefault(target, now) < LOOK_AGAIN:
            return False
        self._missing.pop(target, None)
        if target in self._present:
            self._present.discard(target)
            self._gone(target)
        return True

    async def _scan(self, target: str) -> Scan | None:
        """What is there; `None` when the folder is, but cannot be read just now."""
        try:
            scan = await self._in_thread(self._scanner.scan, {target})
        except ArtifactsError as error:
            self._note_unreadable(error)
            return None if await asyncio.to_thread(self._root.exists) else Scan()
        self.unreadable = None
        self._watcher.linked = self._scanner.linked
        self._note_problems(target, scan.problems)
        return scan

    # -- all of them -------------------------------------------------------------------------------------------------

    async def _look_at_all(self) -> set[str]:
        """Look at what there is; what has gone is looked at too."""
        try:
            targets, problems = await self._in_thread(self._scanner.targets)
        except ArtifactsError as error:
            self._note_unreadable(error)
            targets = set(self._present)
        except ScanStopped:
            return set()
        else:
            self.unreadable = None
            self._note_problems("", problems)
        for target in sorted(targets | self._present):
            self._look(target)
        return targets

    async def _in_thread(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, lambda: function(*args, **kwargs))

    # -- what people are told ----------------------------------------------------------------------------------------

    def _note_seen(self, target: str = "") -> None:
        self.unseen.discard(target)
        if not self.unseen:
            self.seen.set()

    def _note_unreadable(self, error: ArtifactsError) -> None:
        if self.unreadable is None:
            log.warning("%s", error)
        self.unreadable = str(error)

    def _note_problems(self, target: str, problems: dict[str, str]) -> None:
        """Say once what is not served."""
        before = self._problems.get(target, {})
        for path, problem in problems.items():
            if before.get(path) != problem:
                log.warning("%s: %s", path, problem)
        if problems:
            self._problems[target] = problems
        else:
            self._problems.pop(target, None)
