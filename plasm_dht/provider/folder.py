"""The folder that is downloaded into: unfinished files, what is hashed of them, and how they become finished.

Blocking: called through `in_thread`, at most a few MiB at a time. Links are not followed, and nothing here knows where
bytes come from.
"""

import asyncio
import contextlib
import errno
import fcntl
import hashlib
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import ParamSpec, TypeVar

from plasm_dht.errors import PlasmError
from plasm_dht.provider.manifest import MANIFEST_FILE, MAX_FILENAME, is_ignored

P = ParamSpec("P")
T = TypeVar("T")
PART = ".part"
# Hashed in one call: some milliseconds, so that Ctrl-C need not wait for all of a file (bytes).
STEP = 4 * 2**20
_ADVICE = {
    errno.ENOSPC: "free some space there, or choose another folder",
    errno.EDQUOT: "free some space there, or choose another folder",
    errno.ELOOP: "it may be a link, which is not followed: remove it",
}


class FolderError(PlasmError):
    """The folder that is downloaded into cannot be used: it is not writable, full, or in use."""


def can_be_named(filename: str) -> bool:
    """Whether a file can have this name here, where `*.part` is an unfinished one, and case may not tell apart."""
    return not is_ignored(filename) and filename.casefold() != MANIFEST_FILE


class File:
    """A regular file and the SHA-256 of its first `hashed` bytes. One thread at a time. All raise `FolderError`.

    `size` is in bytes. Writing goes on at its end, and only when all of it is hashed.
    """

    def __init__(self, path: Path, flags: int) -> None:
        self._path, self._flags = path, flags
        self._hash = hashlib.sha256()
        self._descriptor = -1
        self.size = self.hashed = 0

    @property
    def sha256(self) -> str:
        """64 hex digits."""
        return self._hash.hexdigest()

    def open(self) -> None:
        """Open it, and nothing that is no regular file."""
        with _on_disk(self._path):
            flags = self._flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            self._descriptor = os.open(self._path, flags, 0o666)
            status = os.fstat(self._descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise FolderError(f"{self._path} is not a regular file: remove it")
        self.size = status.st_size

    def hash_more(self) -> None:
        """Hash the next few MiB."""
        with _on_disk(self._path):
            chunk = os.pread(self._descriptor, STEP, self.hashed)
        self._hash.update(chunk)
        self.hashed += len(chunk)
        if not chunk:  # somebody else has cut it off
            self.size = self.hashed

    def append(self, chunk: bytes) -> None:
        """Write and hash all of the chunk."""
        rest = memoryview(chunk)
        while rest:
            with _on_disk(self._path):
                written = os.pwrite(self._descriptor, rest, self.size)
            self._hash.update(rest[:written])
            self.size += written
            self.hashed += written
            rest = rest[written:]

    def clear(self) -> None:
        """Cut it to nothing."""
        with _on_disk(self._path):
            os.ftruncate(self._descriptor, 0)
        self._hash = hashlib.sha256()
        self.size = self.hashed = 0

    def sync(self) -> None:
        """Wait until the disk has it."""
        with _on_disk(self._path):
            os.fsync(self._descriptor)

    def close(self) -> None:
        """Close it, if it is open."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


class Folder:
    """The folder, held for one `fetch` alone while it is open."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._made: list[Path] = []  # the innermost first
        self._descriptor = -1

    def open(self) -> None:
        """Make it if need be, and lock it. Raises `FolderError`, also when another fetch holds it."""
        with _on_disk(self.path):
            self._made = [each for each in (self.path, *self.path.parents) if not each.exists()]
            self.path.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FolderError(f"{self.path} is in use: another fetch is downloading into it") from None
        except OSError:  # a network share that has no locks
            pass

    def close(self) -> None:
        """Let others have it. What was made for it and is still empty goes again."""
        for made in self._made:
            with contextlib.suppress(OSError):
                made.rmdir()
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def file(self, name: str) -> File:
        """A finished file, to be read."""
        return File(self.path / name, os.O_RDONLY)

    def part(self, name: str) -> File:
        """An unfinished one, made when it is opened."""
        return File(self._part_path(name), os.O_RDWR | os.O_CREAT)

    def retract(self, manifest: bytes) -> None:
        """Take `manifest.json` away if it is this one and not all of it is here. Raises `FolderError`."""
        file = self.file(MANIFEST_FILE)
        try:
            file.open()
            while file.hashed < file.size:
                file.hash_more()
        except FolderError:  # there is none, or something that `commit` complains of
            return
        finally:
            file.close()
        if file.sha256 == hashlib.sha256(manifest).hexdigest():
            with _on_disk(self.path / MANIFEST_FILE):
                (self.path / MANIFEST_FILE).unlink(missing_ok=True)

    def commit(self, names: Sequence[str], manifest: bytes, left_over: Iterable[str]) -> None:
        """Give the complete parts their names, and then write the manifest. Raises `FolderError`.

        `left_over` names what may have a part that is of no more use.
        """
        target = self.path / MANIFEST_FILE
        if names:  # from here on the folder is no more what the old manifest says
            with _on_disk(target):
                target.unlink(missing_ok=True)
        for name in names:
            with _on_disk(self.path / name):
                self._part_path(name).replace(self.path / name)
        for name in left_over:
            with contextlib.suppress(OSError):
                self._part_path(name).unlink(missing_ok=True)
        part = self.part(MANIFEST_FILE)
        try:
            part.open()
            part.clear()
            part.append(manifest)
            part.sync()
        finally:
            part.close()
        with _on_disk(target):
            os.fsync(self._descriptor)  # the names of the files before that of the manifest
            self._part_path(MANIFEST_FILE).replace(target)
            os.fsync(self._descriptor)

    def _part_path(self, name: str) -> Path:
        """`NAME.part`; for a name that has no room for that its hash, behind a dot, which no artifact's name has."""
        if len(name.encode()) + len(PART) > MAX_FILENAME:
            name = "." + hashlib.sha256(name.encode()).hexdigest()
        return self.path / (name + PART)


def write_manifest(folder: Path, manifest: bytes) -> None:
    """Put the bytes into the folder as `manifest.json`, all or nothing. Raises `FolderError`."""
    place = Folder(folder)
    try:
        place.open()
        place.commit([], manifest, [])
    finally:
        place.close()


async def in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """As `asyncio.to_thread`, but when it is cancelled it ends after the thread has: nobody closes what it uses."""
    running = asyncio.ensure_future(asyncio.to_thread(function, *args, **kwargs))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        while not running.done():  # cancelled once more, it still waits
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait({running})
        if not running.cancelled():
            running.exception()  # nobody else will ask
        raise


@contextlib.contextmanager
def _on_disk(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        advice = _ADVICE.get(error.errno or 0, "choose a folder that can be written to")
        raise FolderError(f"{path} cannot be used: {error.strerror}; {advice}") from None
