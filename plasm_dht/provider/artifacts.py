"""Scanning and hashing the artifact folder. Blocking: the provider calls it in threads.

A scan ends in a snapshot: what it returns was all in the folder at one moment, or the target is reported as unsettled.
"""

import errno
import hashlib
import os
import re
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from plasm_dht.clock import Clock
from plasm_dht.errors import ArtifactsError
from plasm_dht.provider.manifest import MANIFEST_FILE, MAX_VERSION, check_filename, check_target, is_ignored

_ROLES = (
    ("kernel", re.compile(r"vmlinuz|bzImage$|Image|kernel")),
    ("initramfs", re.compile(r"initramfs|initrd")),
    ("rootfs", re.compile(r"rootfs")),
)
# A checksum or signature beside a kernel starts like the kernel and sorts after it; nobody wants to boot it.
_COMPANION = (".sig", ".asc", ".md5", ".sha256", ".sha512")
VERSION_FILE = "VERSION"
# How often a target is hashed again because it changed meanwhile, before it is left for the next scan.
ATTEMPTS = 3
# Two writes within the granularity of a file system's time stamps look like one. FAT has the coarsest, 2 s (ms).
GRANULARITY = 2000
_CHUNK = 2**20
_GONE = (errno.ENOENT, errno.ENOTDIR)
_DENIED = (errno.EACCES, errno.EPERM, errno.ELOOP)


class ScanStopped(Exception):  # noqa: N818  # not an error: the scanner was told to stop
    """`ArtifactScanner.stop` was called; the scan has no result."""


class _Changed(Exception):  # noqa: N818  # control flow within a scan
    """A file is not what it was a moment ago."""


class _Stamp(NamedTuple):
    """What changes when a file changes; with ctime, because `touch -r` and `cp -p` keep the other three."""

    size: int
    mtime_ns: int
    inode: int
    ctime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> "_Stamp":
        return cls(status.st_size, status.st_mtime_ns, status.st_ino, status.st_ctime_ns)


@dataclass(frozen=True, slots=True)
class ArtifactFile:
    """A file that is served. Two are equal when their role, name and content are; path and mtime do not count.

    Attributes:
        role: `kernel`, `initramfs`, `rootfs`, or the file's own name.
        filename: its name in the folder.
        path: where its bytes are, links resolved.
        size: bytes.
        sha256: 64 hex digits.
        mtime_ns: the modification time that it had when it was hashed, Unix ns.
    """

    role: str
    filename: str
    path: Path = field(compare=False)
    size: int
    sha256: str
    mtime_ns: int = field(compare=False)


@dataclass(frozen=True, slots=True)
class ArtifactSet:
    """The files of one `CHANNEL/ARCH`, sorted by role. Equal when there is nothing new to publish."""

    target: str
    version: str
    files: tuple[ArtifactFile, ...]


@dataclass(slots=True)
class Scan:
    """What a scan saw.

    Attributes:
        found: the targets that have files. A target that was asked for and is in neither `found` nor `unsettled` is
            gone.
        unsettled: targets that kept changing, or that could not be read at this moment: keep what is known of them and
            scan again.
        problems: what is not served and why, one line each, by path in the folder.
    """

    found: dict[str, ArtifactSet] = field(default_factory=dict)
    unsettled: set[str] = field(default_factory=set)
    problems: dict[str, str] = field(default_factory=dict)


class _Entry(NamedTuple):
    path: Path
    stamp: _Stamp


class _Hash(NamedTuple):
    stamp: _Stamp
    sha256: str
    trusted: bool


class ArtifactScanner:
    """Scans `root/CHANNEL/ARCH/` and remembers the hashes. Different targets may be scanned at the same time.

    `linked` is true while a served file is reached through a link: an event in the folder then does not tell by its
    path whose file changed.
    """

    def __init__(self, root: Path, clock: Clock | None = None) -> None:
        self._root = root
        self._clock = clock or Clock()
        self._lock = threading.Lock()  # of what follows; nobody hashes while holding it
        self._stopped = threading.Event()
        self._hashes: dict[Path, _Hash] = {}
        self._hashing: dict[Path, threading.Lock] = {}  # of a file that several targets link to one hashes
        self._used: dict[str, set[Path]] = {}
        self._linked: set[str] = set()

    @property
    def linked(self) -> bool:
        """Whether a file that the last scans found is reached through a link."""
        return bool(self._linked)

    def stop(self) -> None:
        """Ends a running scan within a chunk of a hash, and every later one at once, with `ScanStopped`."""
        self._stopped.set()

    def targets(self) -> tuple[set[str], dict[str, str]]:
        """What there is to scan, known targets that have gone too; and what is in the folder that cannot be a target.

        Raises `ArtifactsError` when the folder is missing or cannot be read, and `ScanStopped`.
        """
        problems: dict[str, str] = {}
        with self._lock, self._reading():
            return self._list_targets(_resolve(self._root), problems) | self._used.keys(), problems

    def scan(self, targets: set[str] | None = None) -> Scan:
        """Looks at the targets, or at the whole folder.

        Raises `ArtifactsError` when the folder is missing or cannot be read, or a target is no `CHANNEL/ARCH`, and
        `ScanStopped`.
        """
        scan = Scan()
        if targets is None:
            targets, scan.problems = self.targets()
        with self._reading():
            root = _resolve(self._root)
        for target in sorted(targets):
            self._scan_target(root, check_target(target), scan)
        return scan

    @contextmanager
    def _reading(self) -> Iterator[None]:
        self._go_on()
        try:
            yield
        except OSError as error:
            raise ArtifactsError(
                f"artifact folder {self._root} cannot be read: {_reason(error)}; "
                "it must be a folder with CHANNEL/ARCH/ folders in it"
            ) from None

    def _go_on(self) -> None:
        if self._stopped.is_set():
            raise ScanStopped

    def _list_targets(self, root: Path, problems: dict[str, str]) -> set[str]:
        targets = set()
        for channel in _folders(root):
            try:
                names = [f"{channel}/{arch}" for arch in _folders(root / channel)]
            except OSError as error:
                problems[channel] = f"{channel!a}: cannot be read: {_reason(error)}"
                continue
            for name in names:
                try:
                    targets.add(check_target(name))
                except ArtifactsError as error:
                    problems[name] = str(error)
        return targets

    def _scan_target(self, root: Path, target: str, scan: Scan) -> None:
        problems: dict[str, str] = {}
        for _ in range(ATTEMPTS):
            problems.clear()
            try:
                before = _list_files(root, target, problems)
                self._use(target, {entry.path for entry in before.values()})
                artifacts = self._hash_all(target, before, problems)
                if _list_files(root, target, {}) != before:
                    continue
            except _Changed:
                continue
            except OSError as error:
                if error.errno not in _GONE + _DENIED:  # EIO, ESTALE: a network share that is away for a moment
                    scan.unsettled.add(target)
                if error.errno in _GONE:
                    self._use(target, set())
                    self._linked.discard(target)
                else:
                    scan.problems[target] = f"{target}: cannot be read: {_reason(error)}"
                return
            scan.problems.update(problems)
            self._linked.discard(target)
            if any(entry.path != root / target / name for name, entry in before.items()):
                self._linked.add(target)
            if artifacts.files:
                scan.found[target] = artifacts
            return
        scan.unsettled.add(target)

    def _use(self, target: str, paths: set[Path]) -> None:
        """Remember what the target's files are, and forget the hashes of what is no target's any more."""
        with self._lock:
            before = self._used.pop(target, set())
            if paths:
                self._used[target] = paths
            dropped = before - paths
            for path in dropped.difference(*self._used.values()) if dropped else ():
                self._hashes.pop(path, None)
                self._hashing.pop(path, None)

    def _hash_all(self, target: str, entries: dict[str, _Entry], problems: dict[str, str]) -> ArtifactSet:
        version = None
        hashes: dict[str, str] = {}
        for name, entry in entries.items():
            try:
                if name == VERSION_FILE:
                    version = _read_version(entry)
                else:
                    hashes[name] = self._hash(entry)
            except (OSError, ValueError) as error:
                if isinstance(error, OSError) and error.errno in _GONE:
                    raise _Changed from None
                if isinstance(error, OSError) and error.errno not in _DENIED:
                    raise
                problems[f"{target}/{name}"] = f"{target}/{name}: {_reason(error)}"
        roles = _roles(target, list(hashes), problems)
        files = [
            ArtifactFile(roles[name], name, entry.path, entry.stamp.size, hashes[name], entry.stamp.mtime_ns)
            for name, entry in entries.items()
            if name in hashes
        ]
        files.sort(key=lambda file: file.role)
        return ArtifactSet(target, version or _content_version(files), tuple(files))

    def _hash(self, entry: _Entry) -> str:
        with self._lock:
            hashing = self._hashing.setdefault(entry.path, threading.Lock())
        with hashing:
            known = self._hashes.get(entry.path)
            if known and known.trusted and known.stamp == entry.stamp:
                return known.sha256
            started = self._clock.wall()
            sha256 = self._read(entry)
            written = max(entry.stamp.mtime_ns, entry.stamp.ctime_ns) // 1_000_000
            # A time stamp far ahead is no recent write either: the clock was stepped, or somebody set the stamp.
            trusted = abs(started - written) > GRANULARITY
            with self._lock:
                self._hashes[entry.path] = _Hash(entry.stamp, sha256, trusted)
        return sha256

    def _read(self, entry: _Entry) -> str:
        digest = hashlib.sha256()
        with _unchanged(entry) as descriptor:
            left = entry.stamp.size  # no more than that: a file that grows as fast as it is read would have no end
            while left > 0 and (chunk := os.read(descriptor, _CHUNK)):
                self._go_on()
                digest.update(chunk)
                left -= len(chunk)
                _check_unchanged(entry, descriptor)  # a large one that is being written is given up at once
        return digest.hexdigest()


def open_regular(path: Path) -> tuple[int, os.stat_result]:
    """A descriptor of a regular file, for reading, and its status. Raises `OSError`.

    It neither follows a link in the last part of the path nor waits for a writer when it is a pipe.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise OSError(errno.EACCES, "it is not a regular file", str(path))
    return descriptor, status


@contextmanager
def _unchanged(entry: _Entry) -> Iterator[int]:
    """The open file; raises `_Changed` when it is not the listed one before and after it was read."""
    descriptor, status = open_regular(entry.path)
    try:
        if _Stamp.of(status) != entry.stamp:
            raise _Changed
        yield descriptor
        _check_unchanged(entry, descriptor)
    finally:
        os.close(descriptor)


def _check_unchanged(entry: _Entry, descriptor: int) -> None:
    if _Stamp.of(os.fstat(descriptor)) != entry.stamp:
        raise _Changed


def _folders(folder: Path) -> list[str]:
    """Names of the folders in it, links to folders too. Raises `OSError`."""
    names = sorted(os.listdir(folder))  # noqa: PTH208  # pathlib has no is_dir that is false for whatever goes wrong
    return [name for name in names if not is_ignored(name) and os.path.isdir(folder / name)]  # noqa: PTH112


def _resolve(path: Path) -> Path:
    """The path without links. Raises `OSError`, for a loop too, which `Path.resolve` reports differently by version."""
    return Path(os.path.realpath(path, strict=True))


def _list_files(root: Path, target: str, problems: dict[str, str]) -> dict[str, _Entry]:
    """The files of a target by name, links resolved. Raises `OSError`, also when the target itself leaves the root."""
    folder = _resolve(root / target)
    if not folder.is_relative_to(root):
        raise OSError(errno.EACCES, f"it is a link to {folder}, out of the artifact folder")
    found = {}
    for name in sorted(os.listdir(folder)):  # noqa: PTH208  # names are all that is needed
        if is_ignored(name):
            continue
        try:
            path = _resolve(folder / name)
            status = path.stat()
            if stat.S_ISDIR(status.st_mode):
                continue
            _check_file(root, name, path, status)
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno not in _GONE + _DENIED:
                raise
            if isinstance(error, FileNotFoundError) and not (folder / name).is_symlink():
                continue  # it went away since the folder was listed
            problems[f"{target}/{name}"] = f"{target}/{name!a}: {_reason(error)}"
            continue
        found[name] = _Entry(path, _Stamp.of(status))
    return found


def _check_file(root: Path, name: str, path: Path, status: os.stat_result) -> None:
    """Raises `ValueError` when the file cannot be an artifact."""
    if not path.is_relative_to(root):
        raise ValueError(f"it is a link to {str(path)!a}, out of the artifact folder")
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is not a regular file")
    if check_filename(name) == MANIFEST_FILE:
        raise ValueError("the signed manifest is served under this name, rename the file")


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)


def _read_version(entry: _Entry) -> str:
    """The one line of a VERSION file. Raises `ValueError` when it is something else."""
    with _unchanged(entry) as descriptor:
        data = os.read(descriptor, 4 * MAX_VERSION)
    text = data.decode().strip()
    if not text.isprintable() or not 1 <= len(text.encode()) <= MAX_VERSION:
        raise ValueError(
            f"it must be one line of 1 to {MAX_VERSION} bytes without control characters; "
            "a hash of the content is the version until it is"
        )
    return text


def _content_version(files: list[ArtifactFile]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.filename}\0{file.sha256}\n".encode())
    return digest.hexdigest()[:12]


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts 5.10 after 5.9. An even position is always text, so that numbers are compared with numbers alone."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"([0-9]+)", name)]


def _roles(target: str, names: list[str], problems: dict[str, str]) -> dict[str, str]:
    """The role of each file. Of several for one role the last in version order has it, the others their own names."""
    roles = {name: name for name in names}
    for role, pattern in _ROLES:
        candidates = [name for name in names if pattern.match(name) and not name.endswith(_COMPANION)]
        if not candidates:
            continue
        # A file that bears the role's very name keeps it, or two artifacts would have one name in the manifest.
        chosen = role if role in candidates else max(candidates, key=lambda name: (_natural(name), name))
        roles[chosen] = role
        if len(candidates) > 1:
            others = ", ".join(name for name in candidates if name != chosen)
            problems[f"{target}/{role}"] = f"{target}: {chosen} is served as the {role}, not {others}: leave only one"
    return roles
