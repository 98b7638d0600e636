"""The downloading, verifying client: from signed records to a folder that holds what they promise.

Nothing that a server sends counts before its hash is the signed one. How the DHT is asked is the caller's; nothing is
printed. Whatever touches the disk or hashes runs in a thread, a few MiB at a time.
"""

import asyncio
import contextlib
import hashlib
import logging
import math
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

import aiohttp

from plasm_dht.errors import PlasmError, VerificationError
from plasm_dht.provider.folder import File, Folder, FolderError, can_be_named, in_thread
from plasm_dht.provider.manifest import MANIFEST_FILE, Artifact, Manifest, Pointer, check_target, verify_manifest
from plasm_dht.record import Record
from plasm_dht.text import printable

# More connections to one server do not make a link wider; three hide the pauses between small files.
PARALLEL = 3
# A server that lives answers a SYN within a few retransmissions (s).
CONNECT_WITHIN = 10.0
# All of connecting, redirects and headers (s).
ANSWER_WITHIN = 30.0
# A server that sends less than LEAST bytes in this time is as good as gone (s). 9,600 baud is seven times as fast.
SILENCE = 30.0
LEAST = 4096
# A mirror or two, and http to https.
MAX_REDIRECTS = 5
# How often a connection that breaks off is taken up again at one URL, as long as each brings something.
MAX_BREAKS = 20
# When the DHT is asked again after a mismatch (s): a provider publishes a change within 2 s of the last write, and
# serves it a little before that.
SECOND_LOOKS = (0.0, 0.5, 2.0)
# How many different records of one publisher are tried, so that one that changes all the time ends.
MAX_TRIES = 5
# Of what the HTTP library says of a failure, in which a server may be quoted (characters).
MAX_REASON = 300
_BUFFER = 2**20
_SHA256_ETAG = re.compile(r'"([0-9a-f]{64})"')
_CONTENT_RANGE = re.compile(r"bytes (?:([0-9]{1,19})-[0-9]{1,19}|\*)/([0-9]{1,19}|\*)")

_log = logging.getLogger(__name__)
T = TypeVar("T")
State = Literal["checking", "downloading", "verified", "present"]


class UnavailableError(PlasmError):
    """There is no live record, or nobody who has one serves what it promises just now."""


class _RefusedError(UnavailableError):
    """A server answered with something else than the file. It may be about to change what it serves."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far one file is.

    Attributes:
        filename: its name in the manifest; no control characters, but not safe for a terminal's markup.
        state: `checking`: what an earlier run left is hashed; `downloading`; `verified`: it is what was signed;
            `present`: so was the file that had been there.
        done: bytes that are hashed or here.
        size: bytes of the whole file.
    """

    filename: str
    state: State
    done: int
    size: int


@dataclass(frozen=True, slots=True)
class Fetched:
    """What is in the folder now: the path of `manifest.json`, what it says, and whose record promised it."""

    path: Path
    manifest: Manifest
    record: Record


@dataclass(frozen=True, slots=True)
class _Offer:
    record: Record
    pointer: Pointer


async def fetch(
    target: str,
    folder: str | os.PathLike[str],
    *,
    find: Callable[[], Awaitable[Sequence[Record]]],
    now: Callable[[], int],
    progress: Callable[[Progress], None] | None = None,
) -> Fetched:
    """Download the newest manifest of a `CHANNEL/ARCH` and its artifacts into the folder, which is made if need be.

    `find` looks up the live records of `record_name(target)`, freshest first, as `PlasmServer.get_records` does. It is
    asked again when a publisher does not serve what its record says: the first time the freshest alone will do.
    `now` is Unix ms, as `PlasmServer.now`; `progress` is called in the loop and must not raise.

    `manifest.json` is written last: where it is, all of it is. When this fails, what was complete before still is. An
    unfinished file stays as `NAME.part` and is gone on with the next time.

    Raises `ArtifactsError` when `target` is none, `UnavailableError`, `VerificationError` when a publisher serves
    something else than it signed and nobody else serves what they did, and `FolderError`.
    """
    check_target(target)
    place = Folder(Path(folder))
    timeout = aiohttp.ClientTimeout(total=None, connect=CONNECT_WITHIN, sock_connect=CONNECT_WITHIN, sock_read=SILENCE)
    try:
        await in_thread(place.open)
        async with aiohttp.ClientSession(
            timeout=timeout, auto_decompress=False, cookie_jar=aiohttp.DummyCookieJar(), read_bufsize=_BUFFER
        ) as session:
            return await _Fetch(target, place, session, find, now, progress or (lambda _: None)).run()
    finally:
        place.close()


@dataclass(slots=True)
class _Fetch:
    """One call of `fetch`."""

    target: str
    folder: Folder
    session: aiohttp.ClientSession
    find: Callable[[], Awaitable[Sequence[Record]]]
    now: Callable[[], int]
    report: Callable[[Progress], None]
    slots: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(PARALLEL))
    # Which content each NAME.part of this run is of: another publisher's file of that name may be another one.
    parts: dict[str, str] = field(default_factory=dict)

    async def run(self) -> Fetched:
        """Try each publisher, and each record that a publisher changes to meanwhile."""
        offers = await self._look()
        tried: dict[str, list[Pointer]] = {}
        failures: list[PlasmError] = []
        while offer := self._next(offers, tried):
            tried.setdefault(offer.record.publisher, []).append(offer.pointer)
            if failures:
                _log.warning("%s; trying %s of %s", failures[-1], offer.pointer.url, offer.record.publisher)
            try:
                return await self._take(offer)
            except (VerificationError, UnavailableError) as error:
                failures.append(error)
                offers = await self._look_again(offer, offers, error)
        if not failures:
            raise UnavailableError(f"not found: no live record for {self.target}")
        raise _gravest(failures)

    def _next(self, offers: Sequence[_Offer], tried: dict[str, list[Pointer]]) -> _Offer | None:
        for offer in offers:
            before = tried.get(offer.record.publisher, [])
            if offer.pointer not in before and len(before) < MAX_TRIES and offer.record.is_live(self.now()):
                return offer
        return None

    async def _look(self) -> list[_Offer]:
        offers = []
        for record in await self.find():
            try:
                offers.append(_Offer(record, Pointer.decode(record.value)))
            except VerificationError as error:
                _log.warning("skipping the record of %s: %s", record.publisher, error)
        return offers

    async def _look_again(self, failed: _Offer, offers: list[_Offer], error: PlasmError) -> list[_Offer]:
        """The records of now. A publisher that answers, with something else, gets the time to publish a change."""
        gone = isinstance(error, UnavailableError) and not isinstance(error, _RefusedError)
        moments = SECOND_LOOKS[:1] if gone else SECOND_LOOKS
        same = failed.record.publisher, failed.pointer
        time = asyncio.get_running_loop().time
        began = time()
        for moment, following in zip(moments, (*moments[1:], math.inf), strict=True):
            if time() > began + following:  # the look before this one took long: one at the end is enough
                continue
            await asyncio.sleep(began + moment - time())
            offers = await self._look() or offers
            if all((each.record.publisher, each.pointer) != same for each in offers):
                break
        return offers

    async def _take(self, offer: _Offer) -> Fetched:
        data, manifest = await self._manifest(offer)
        artifacts = manifest.artifacts.values()
        complete = await _all_or_none(self._artifact(artifact, data) for artifact in artifacts)
        names = [name for name in complete if name is not None]
        left_over = {*self.parts, *(artifact.filename for artifact in artifacts)} - {*names}
        await in_thread(self.folder.commit, names, data, left_over)
        return Fetched(self.folder.path / MANIFEST_FILE, manifest, offer.record)

    async def _manifest(self, offer: _Offer) -> tuple[bytes, Manifest]:
        pointer, data = offer.pointer, bytearray()
        async with self._get(pointer.url) as response, asyncio.timeout(ANSWER_WITHIN):
            if response.status != 200:
                raise _refusal(response, pointer.url)
            _check_length(response, pointer.url, pointer.manifest_size)
            async for chunk in response.content.iter_any():
                data += chunk
                if len(data) > pointer.manifest_size:
                    raise VerificationError(f"{pointer.url} sends more than the {pointer.manifest_size} bytes signed")
        return bytes(data), await in_thread(_verify, bytes(data), offer, self.target, self.now())

    # -- one artifact ------------------------------------------------------------------------------------------------

    async def _artifact(self, artifact: Artifact, manifest: bytes) -> str | None:
        """Its name, when it is complete as `NAME.part`; `None` when it was there."""
        async with self.slots:
            if await self._is_there(artifact):
                self._note(artifact, "present", artifact.size)
                return None
            await in_thread(self.folder.retract, manifest)
            part = self.folder.part(artifact.filename)
            try:
                await in_thread(part.open)
                if self.parts.setdefault(artifact.filename, artifact.sha256) != artifact.sha256:
                    await in_thread(part.clear)
                self.parts[artifact.filename] = artifact.sha256
                await self._complete(part, artifact)
                await in_thread(part.sync)
            finally:
                await in_thread(part.close)
            self._note(artifact, "verified", artifact.size)
            return artifact.filename

    def _note(self, artifact: Artifact, state: State, done: int) -> None:
        self.report(Progress(artifact.filename, state, done, artifact.size))

    async def _is_there(self, artifact: Artifact) -> bool:
        file = self.folder.file(artifact.filename)
        try:
            await in_thread(file.open)
            return file.size == artifact.size and await self._is_right(file, artifact)
        except FolderError:  # nothing, a link, something unreadable: it is downloaded and takes its place
            return False
        finally:
            await in_thread(file.close)

    async def _is_right(self, file: File, artifact: Artifact) -> bool:
        """Whether it is the artifact; what nobody has hashed yet is hashed."""
        while file.hashed < file.size:
            await in_thread(file.hash_more)
            self._note(artifact, "checking", file.hashed)
        return file.size == artifact.size and file.sha256 == artifact.sha256

    async def _complete(self, part: File, artifact: Artifact) -> None:
        """Go on with what is there, at each URL in turn. Raises `VerificationError`, `UnavailableError`."""
        if part.size > artifact.size:
            await in_thread(part.clear)
        if await self._is_right(part, artifact):
            return
        if part.size == artifact.size:
            await in_thread(part.clear)
        failures: list[PlasmError] = []
        for url in artifact.urls:
            if failures:
                _log.warning("%s; trying %s", failures[-1], url)
            try:
                await self._download(url, part, artifact)
            except (VerificationError, UnavailableError) as error:
                failures.append(error)
            else:
                return
        raise _gravest(failures)

    async def _download(self, url: str, part: File, artifact: Artifact) -> None:
        again = False
        for _ in range(MAX_BREAKS):
            before = part.size
            try:
                resumed = await self._transfer(url, part, artifact)
            except UnavailableError as error:
                if isinstance(error, _RefusedError) or part.size <= before:
                    raise
                _log.info("%s; going on at byte %d", error, part.size)
                continue
            if part.size == artifact.size and part.sha256 == artifact.sha256:
                return
            await in_thread(part.clear)
            if again or not resumed:  # else what was there may have been wrong: once more, from the start
                raise VerificationError(f"{url} is not what the manifest says: its SHA-256 is not {artifact.sha256}")
            again = True
        raise UnavailableError(f"{url} broke off {MAX_BREAKS} times")

    async def _transfer(self, url: str, part: File, artifact: Artifact) -> bool:
        """Append the rest of the file; true if it was appended to something, or nothing could be."""
        offset = part.size
        async with self._get(url, **({"Range": f"bytes={offset}-"} if offset else {})) as response:
            if offset and response.status in (206, 416):
                if not _continues(response, url, offset, artifact):
                    return True
            elif response.status != 200:
                raise _refusal(response, url)
            elif offset:  # it knows no ranges: all of it comes
                _check_length(response, url, artifact.size)
                await in_thread(part.clear)
            _check_length(response, url, artifact.size - part.size)
            resumed = part.size > 0
            await self._receive(response, url, part, artifact)
        return resumed

    async def _receive(self, response: aiohttp.ClientResponse, url: str, part: File, artifact: Artifact) -> None:
        time = asyncio.get_running_loop().time
        since, received = time(), 0
        async for chunk in response.content.iter_any():
            if part.size + len(chunk) > artifact.size:
                await in_thread(part.clear)
                raise VerificationError(f"{url} sends more than the {artifact.size} bytes that the manifest says")
            await in_thread(part.append, chunk)
            self._note(artifact, "downloading", part.size)
            received += len(chunk)
            if received >= LEAST:
                since, received = time(), 0
            elif time() - since > SILENCE:
                raise UnavailableError(f"{url}: fewer than {LEAST} bytes in {SILENCE:.0f} s")
        if part.size < artifact.size:
            raise UnavailableError(f"{url} ended after {part.size} of {artifact.size} bytes")

    @contextlib.asynccontextmanager
    async def _get(self, url: str, **headers: str) -> AsyncIterator[aiohttp.ClientResponse]:
        """The answer to a GET. Raises `UnavailableError` for whatever the network does, in the block too."""
        try:
            async with asyncio.timeout(ANSWER_WITHIN):
                response = await self.session.get(
                    url, headers={"Accept-Encoding": "identity", **headers}, max_redirects=MAX_REDIRECTS
                )
            async with response:
                yield response
        except (aiohttp.ClientError, OSError, ValueError) as error:  # a TimeoutError is an OSError
            raise UnavailableError(f"{url}: {_reason(error)}") from None


def _gravest(failures: Sequence[PlasmError]) -> PlasmError:
    return next((error for error in failures if isinstance(error, VerificationError)), failures[0])


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "it does not answer"
    if isinstance(error, aiohttp.ClientConnectorError):
        number = error.os_error.errno or 0  # a resolver's is below 0; asyncio's text is that a call failed, not why
        return f"cannot connect: {os.strerror(number) if number > 0 else error.os_error.strerror or error.os_error}"
    if isinstance(error, aiohttp.TooManyRedirects):
        return "too many redirects"
    if isinstance(error, aiohttp.ClientPayloadError):
        return "it broke off"
    # aiohttp quotes, over several lines, all that a server sent instead of HTTP, or as an address
    said = error.message if isinstance(error, aiohttp.ClientResponseError) else str(error)
    text = printable(" ".join(said[: 2 * MAX_REASON].split()))[:MAX_REASON] or type(error).__name__
    if isinstance(error, aiohttp.RedirectClientError):
        return f"it redirects to {text}, which is no http:// or https:// address"
    return text


def _refusal(response: aiohttp.ClientResponse, url: str) -> _RefusedError:
    return _RefusedError(f"{url}: HTTP {response.status}, not the file")


def _check_length(response: aiohttp.ClientResponse, url: str, size: int) -> None:
    if response.content_length not in (None, size):
        raise VerificationError(f"{url} sends {response.content_length} bytes: {size} are what was signed")


def _continues(response: aiohttp.ClientResponse, url: str, offset: int, artifact: Artifact) -> bool:
    """Whether what comes goes on at the offset. Raises `VerificationError` when it is of a file of another size.

    There is no If-Range: only the server that a part is from would know the validator, and the hash tells more.
    """
    match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    if match and match[2] not in ("*", str(artifact.size)):
        raise VerificationError(f"{url} has {match[2]} bytes: {artifact.size} are what was signed")
    etag = _SHA256_ETAG.fullmatch(response.headers.get("ETag", ""))  # a provider of ours: no need to read it all
    same = etag is None or etag[1] == artifact.sha256
    return response.status == 206 and match is not None and match[1] == str(offset) and same


def _verify(data: bytes, offer: _Offer, target: str, now: int) -> Manifest:
    """The manifest, if it is what the record says, of this target, and one that can be written down."""
    pointer = offer.pointer
    if len(data) != pointer.manifest_size or hashlib.sha256(data).digest() != pointer.manifest_sha256:
        digest = pointer.manifest_sha256.hex()
        raise VerificationError(f"{pointer.url} is not what was signed: its SHA-256 is not {digest}")
    manifest = verify_manifest(data, offer.record.public_key)
    if manifest.target != target:
        raise VerificationError(f"{pointer.url} is the manifest of {manifest.target}, not of {target}")
    if manifest.expires_at <= now:
        raise VerificationError(f"{pointer.url} expired at {manifest.expires_at} (Unix ms), and it is {now}")
    for artifact in manifest.artifacts.values():
        if not can_be_named(artifact.filename):
            raise VerificationError(f"{pointer.url}: file name {artifact.filename!r} is none that an artifact can have")
    return manifest


async def _all_or_none(work: Iterable[Awaitable[T]]) -> list[T]:
    """The results of all; when one fails the others are ended."""
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
