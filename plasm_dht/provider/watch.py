"""Change events of the artifact folder, debounced, per `CHANNEL/ARCH`. The only module that imports watchdog.

What comes out are hints: something may have changed there, look. Nothing is read from a file here, and an event that
was lost costs at most a `rescan` interval.
"""

import asyncio
import logging
import os
import stat
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Literal, Self

from watchdog.events import (
    DirCreatedEvent,
    DirDeletedEvent,
    DirMovedEvent,
    FileAttribEvent,
    FileClosedEvent,
    FileCreatedEvent,
    FileDeletedEvent,
    FileModifiedEvent,
    FileMovedEvent,
    FileSystemEvent,
    FileSystemEventHandler,
)
from watchdog.observers.api import BaseObserver
from watchdog.observers.inotify import InotifyObserver
from watchdog.observers.inotify_c import CallbackId, InotifyConstants, InotifyEvent, Mask, WatchDescriptor
from watchdog.observers.polling import PollingObserverVFS

from plasm_dht.errors import ArtifactsError
from plasm_dht.provider.manifest import check_target, is_ignored

logger = logging.getLogger(__name__)

Mode = Literal["inotify", "polling", "none"]

# No opens and no closes without a write: hashing a file must not trigger itself. No modified folders: watchdog makes
# that one up for the parent of every event.
_EVENTS: list[type[FileSystemEvent]] = [
    DirCreatedEvent,
    DirDeletedEvent,
    DirMovedEvent,
    FileAttribEvent,
    FileClosedEvent,
    FileCreatedEvent,
    FileDeletedEvent,
    FileModifiedEvent,
    FileMovedEvent,
]
# More targets than this at once are a change of everything: a scan of all of them costs no more.
MAX_TARGETS = 256
# A folder on these changes from elsewhere too, and inotify says nothing of it. As in /proc/self/mountinfo.
_NETWORK = ("nfs", "nfs4", "cifs", "smb3", "9p", "afs", "ceph", "lustre", "gpfs", "glusterfs", "fuse.", "virtiofs")
# Between two looks at the folder, s; polling has to leave time to settle, hash and publish within 2 s.
POLL_INTERVAL = 0.5
# Between two looks at whether the root is still the same folder (s). inotify follows a folder that is moved away, and
# says nothing when another is mounted over it.
ROOT_INTERVAL = 1.0


class ArtifactWatcher:
    """Watches `root` and yields what to scan: a set of targets, or None for everything.

    A target is yielded when it has been quiet for `settle` s, at the latest `max_wait` s after its first event, and
    None at least every `rescan` s. The root may be missing, vanish and come back. Enter it, scan once, then iterate;
    one task does all of that.

    Set `linked` (see `ArtifactScanner.linked`) when an event's path does not tell whose file changed: every event is
    then one of everything.
    """

    def __init__(self, root: Path, *, settle: float = 0.3, max_wait: float = 1.0, rescan: float = 60.0) -> None:
        self.linked = False
        self._root = root
        self._settle = settle
        self._max_wait = max_wait
        self._rescan = rescan
        self._observation: _Observation | None = None
        self._guard: asyncio.Task[None] | None = None
        self._woken = asyncio.Event()
        # Per target (None: everything) the time of its first event and the time when it is due.
        self._pending: dict[str | None, tuple[float, float]] = {}
        self._rescan_at = 0.0
        self._warning = ""

    @property
    def mode(self) -> Mode:
        """How changes are seen: by `inotify`, by `polling`, or not at all (`none`: there is no folder)."""
        return self._observation.mode if self._observation else "none"

    async def __aenter__(self) -> Self:
        self._rescan_at = asyncio.get_running_loop().time() + self._rescan
        try:
            await self._observe()
        except BaseException:
            await self._drop_observation()
            raise
        self._pending.clear()  # the caller scans after this
        self._guard = asyncio.create_task(self._keep_observing())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._guard:
            self._guard.cancel()
            await asyncio.gather(self._guard, return_exceptions=True)
        await self._drop_observation()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> set[str] | None:
        loop = asyncio.get_running_loop()
        while True:
            now = loop.time()
            ready = {target for target, (_, due) in self._pending.items() if due <= now}
            if None in ready or now >= self._rescan_at:
                self._pending.clear()
                self._rescan_at = now + self._rescan
                return None
            if ready:
                self._pending = {target: times for target, times in self._pending.items() if target not in ready}
                return {target for target in ready if target is not None}
            self._woken.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout_at(min([self._rescan_at, *(due for _, due in self._pending.values())])):
                    await self._woken.wait()

    def _hint(self, targets: set[str | None]) -> None:
        """Takes note of events. What is pending already only becomes due later, so nobody has to be woken for it."""
        now = asyncio.get_running_loop().time()
        together = self._pending.keys() | targets
        if None in together or len(together) > MAX_TARGETS:  # everything includes them all
            self._pending = {None: min(self._pending.values(), default=(now, now))}
            targets = {None}
            self._woken.set()
        for target in targets:
            if target not in self._pending:
                self._woken.set()
            first, _ = self._pending.get(target, (now, now))
            self._pending[target] = first, min(now + self._settle, first + self._max_wait)

    def _targets(self, path: str, root: str) -> set[str | None]:
        """What to scan because of an event on `path`. Runs in watchdog's thread."""
        if self.linked or path == root:
            return {None}
        parts = path.removeprefix(root + "/").split("/")
        if len(parts) > 3 or any(is_ignored(part) for part in parts):
            return set()  # neither a file in a folder below CHANNEL/ARCH nor a hidden or temporary one is served
        if len(parts) == 1:
            return {None}
        try:
            return {check_target("/".join(parts[:2]))}
        except ArtifactsError:
            return {None}

    async def _keep_observing(self) -> None:
        while True:
            await asyncio.sleep(ROOT_INTERVAL)
            await self._observe()

    async def _observe(self) -> None:
        """Watches the folder that `root` is now, unless it is watched already."""
        identity = await asyncio.to_thread(_identity, self._root)
        if self._observation and self._observation.identity == identity and self._observation.alive:
            return
        before = self.mode
        await self._drop_observation()
        if identity:
            self._observation = _Observation(self._root, identity, self._targets, self._hint)
            warning = await asyncio.to_thread(self._observation.start)
            if warning not in ("", self._warning):
                logger.warning("artifact folder %s %s", self._root, warning)
            self._warning = warning
        if (before, self.mode) != ("none", "none"):
            self._hint({None})  # for what changed since the last watch ended

    async def _drop_observation(self) -> None:
        """Stops watching; its threads have ended when it returns."""
        if self._observation:
            await asyncio.to_thread(self._observation.stop)
            self._observation = None


class _Observation(FileSystemEventHandler):
    """watchdog's threads on one folder, from `start` to `stop`, both blocking; and what is called in these threads."""

    def __init__(
        self,
        root: Path,
        identity: tuple[int, int],
        targets: Callable[[str, str], set[str | None]],
        hint: Callable[[set[str | None]], None],
    ) -> None:
        self.identity = identity
        self.mode: Mode = "none"
        self._root = root
        self._path = ""
        self._targets = targets
        self._hint = hint
        self._loop = asyncio.get_running_loop()
        self._inbox: set[str | None] = set()
        self._inbox_lock = threading.Lock()
        self._observer: BaseObserver | None = None
        self._stopped = False
        self._start_lock = threading.Lock()

    @property
    def alive(self) -> bool:
        """Whether events still come: watchdog ends a thread when the folder is deleted, or by an error of its own."""
        if self._observer is None:
            return False
        threads: list[threading.Thread] = [self._observer, *self._observer.emitters]
        if isinstance(self._observer, InotifyObserver):
            threads.append(self._observer._inotify_fd)
        return len(threads) > 1 and all(thread.is_alive() for thread in threads)

    def start(self) -> str:
        """Starts watching. Returns what people should know of it, or ''."""
        with self._start_lock:
            if self._stopped:  # the caller was cancelled meanwhile
                return ""
            self._path = os.path.realpath(self._root)  # inotify would watch a link, not the folder
            try:
                return self._start()
            except (FileNotFoundError, NotADirectoryError):
                return ""  # it vanished since
            except (OSError, RuntimeError) as error:  # RuntimeError: no thread can be started
                return f"cannot be watched: {error}"

    def _start(self) -> str:
        # watchdog warns, in its own thread, whenever `mkdir -p` is faster than it is; nothing is wrong then.
        warnings.filterwarnings("ignore", "Callback with id", RuntimeWarning)
        reason = _network_file_system(self.identity[0])
        if not reason:
            try:
                self._observer = self._started(InotifyObserver())
            except (FileNotFoundError, NotADirectoryError):
                raise
            except OSError as error:
                reason = str(error)
            else:
                self.mode = "inotify"
                return ""
        # lstat: a link that is swapped is a change, and a loop of links has no end
        self._observer = self._started(PollingObserverVFS(os.lstat, os.scandir, polling_interval=POLL_INTERVAL))
        self.mode = "polling"
        return f"is looked at every {POLL_INTERVAL} s instead of watched: {reason}"

    def _started(self, observer: BaseObserver) -> BaseObserver:
        try:
            observer.schedule(self, self._path, recursive=True, event_filter=_EVENTS)
            observer.start()
            if isinstance(observer, InotifyObserver):
                # To hear of an overflow, which watchdog tells only to what watches, and to find out whether the limit
                # of watches was reached: watchdog skips folders that it cannot watch, in silence.
                mask = InotifyConstants.IN_DELETE_SELF | InotifyConstants.IN_MASK_ADD
                observer._inotify_fd.add_callback(b"/", Mask(mask), self, CallbackId(id(self)))
        except BaseException:
            _stop(observer)
            raise
        return observer

    def stop(self) -> None:
        with self._start_lock:
            self._stopped = True
            if self._observer:
                _stop(self._observer)

    def dispatch(self, event: FileSystemEvent) -> None:
        """Reduces an event to targets and wakes the loop, once for all that come until it has looked."""
        paths = [os.fsdecode(path) for path in (event.src_path, event.dest_path) if path]
        self._put(set().union(*(self._targets(path, self._path) for path in paths)))

    def on_event(self, event: InotifyEvent) -> None:
        """Of the watch on `/`, which asks for nothing."""

    def on_watch_deleted(self, wd: WatchDescriptor) -> None:
        """Of the watch on `/`: at the end."""

    def on_queue_overflow(self) -> None:
        """The kernel dropped events."""
        self._put({None})

    def _put(self, targets: set[str | None]) -> None:
        with self._inbox_lock:
            idle = not self._inbox
            self._inbox |= targets
            if len(self._inbox) > MAX_TARGETS:
                self._inbox = {None}
        if idle and targets:
            with suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._collect)

    def _collect(self) -> None:
        with self._inbox_lock:
            targets, self._inbox = self._inbox, set()
        self._hint(targets)


def _stop(observer: BaseObserver) -> None:
    observer.stop()
    if observer.is_alive():
        observer.join()


def _identity(root: Path) -> tuple[int, int] | None:
    """Which folder `root` is at this moment: device and inode. None when there is none."""
    try:
        status = root.stat()
    except OSError:
        return None
    return (status.st_dev, status.st_ino) if stat.S_ISDIR(status.st_mode) else None


def _network_file_system(device: int, mountinfo: Path = Path("/proc/self/mountinfo")) -> str:
    """The name of the file system if others can change it unseen by this kernel, else ''. See proc(5)."""
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        lines = mountinfo.read_text(errors="replace").splitlines()
    except OSError:
        return ""
    for line in lines:
        mount, _, source = line.partition(" - ")
        kind = source.split(" ")[0]
        if mount.split(" ")[2:3] == [number] and kind.startswith(_NETWORK):
            return f"{kind} tells of no change that another machine makes"
    return ""
