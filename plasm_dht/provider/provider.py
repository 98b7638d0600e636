"""`Provider`: wires, starts and stops what serves and advertises a folder of boot artifacts.

No algorithm of its own: what changed, how it is hashed, signed, served and published is in the rooms below.
"""

import asyncio
import hashlib
import logging
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from plasm_dht.clock import Clock
from plasm_dht.config import Change, Settings, format_address
from plasm_dht.dht.stats import counted
from plasm_dht.dht.storage import RecordStorage
from plasm_dht.errors import ArtifactsError, ConfigError, PlasmError
from plasm_dht.identity import Identity
from plasm_dht.provider.address import BaseUrl
from plasm_dht.provider.artifacts import ArtifactSet
from plasm_dht.provider.channels import Channels
from plasm_dht.provider.folder import in_thread, write_manifest
from plasm_dht.provider.journal import Journal
from plasm_dht.provider.manifest import MANIFEST_FILE, REBUILD_AFTER, Pointer, build_manifest, record_name
from plasm_dht.provider.observed import ObservedServer
from plasm_dht.provider.reload import take_over
from plasm_dht.provider.site import Page, Site

if TYPE_CHECKING:
    from plasm_dht.provider.front import Front

log = logging.getLogger(__name__)

Address = tuple[str, int]


class Provider:
    """A DHT node, an HTTP server, a watcher, and the records that they make of a folder.

    Entering starts everything and returns when all that is in the folder has been published, each channel as soon as
    it is hashed; leaving withdraws it (unless `withdraw` is false) and stops. Entering raises `ArtifactsError`,
    `ListenError` or `ConfigError`. With `manifests`, a folder, each manifest is written there as
    `CHANNEL/ARCH/manifest.json` before its record names it, for something else to serve.

    Attributes:
        dht_address: (host, port) of the DHT node, as bound.
        http_address: (host, port) of the HTTP server, `None` without one.
    """

    def __init__(
        self,
        settings: Settings,
        identity: Identity,
        *,
        no_http: bool = False,
        manifests: Path | None = None,
        withdraw: bool = True,
        clock: Clock | None = None,
        storage: RecordStorage | None = None,
    ) -> None:
        if settings.artifacts_dir is None:
            raise ConfigError("provider.artifacts_dir is not set: name the folder that holds CHANNEL/ARCH/ folders")
        if no_http and settings.base_url is None:
            raise ConfigError(
                "provider.base_url is not set, and this provider serves no HTTP: say with --base-url where something "
                "else serves the files and manifests"
            )
        self._settings = settings
        self._identity = identity
        self._no_http = no_http
        self._manifests = manifests
        self._writing = asyncio.Lock()
        self._withdraw = withdraw
        self._clock = clock or Clock()
        self._root = settings.artifacts_dir
        self._channels = Channels(self._root, self._clock, found=self._found, gone=self._take_down)
        self._artifacts: dict[str, ArtifactSet] = {}  # by target, as they were found last
        self._pages: dict[str, Page] = {}
        self._site = Site(settings.name, self._pages, status=self.status, health=self.health)
        self._created: dict[str, int] = {}  # by target, when its manifest was made (Unix ms)
        self._urls: dict[str, str] = {}  # by target, the base URL that its manifest names
        self._manifest_version = 0
        self._base_url: str | None = None  # None: not known yet
        self._address: BaseUrl
        self._met = asyncio.Event()
        self._tasks: asyncio.TaskGroup
        self._publishing: set[asyncio.Task[None]] = set()
        self._stack = AsyncExitStack()
        self._front: Front | None = None
        self._following: asyncio.Task[None] | None = None
        self.dht_address: Address
        self.http_address: Address | None = None
        self._journal = Journal(self._clock.now)
        self.server = ObservedServer(
            self._journal,
            identity=identity,
            record_ttl=settings.dht.record_ttl,
            refresh_interval=settings.dht.refresh_interval,
            clock=self._clock,
            storage=storage,
            met=self._met.set,
        )

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            stack.push_async_callback(self._close)
            await stack.enter_async_context(self._channels.open())  # a wrong folder is said before any port is bound
            await self.server.listen(self._settings.dht.port, self._settings.dht.host)
            self.dht_address = self.server.address
            if not self._no_http:
                await self._open_front()
            http = self.http_address or (self._settings.http_host, self._settings.http_port)
            self._address = BaseUrl(self._settings, self.server, http, self._met)
            published = asyncio.Event()
            self._following = asyncio.create_task(self._follow(published))
            stack.push_async_callback(self._stop_following)
            await self._unless_failed(self._channels.seen.wait())
            if self._channels.is_empty:
                raise ArtifactsError(_nothing_found(str(self._root), self._channels.problems))
            await self._unless_failed(published.wait())
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def wait_failed(self) -> None:
        """Wait until a part of the provider fails, and raise what it failed with."""
        assert self._following is not None  # noqa: S101  # it was entered
        node = asyncio.create_task(self.server.wait_failed())
        try:
            await asyncio.wait({node, self._following}, return_when=asyncio.FIRST_COMPLETED)
            for task in (node, self._following):
                if task.done():
                    task.result()
        finally:
            node.cancel()

    async def apply(self, settings: Settings) -> Change:
        """Take over from these settings what can change while it runs. What that is, and what needs a restart."""
        what = await take_over(self._settings, settings, self.server, self._front)
        self._settings = what.settings
        return what

    def health(self) -> str | None:
        """Why the provider is not well; `None` when it is."""
        if self._channels.unreadable is not None:
            return self._channels.unreadable
        there = self._artifacts.keys() | self._channels.unseen
        unsettled = sorted(target for target in there if self.server.standing(record_name(target)) is None)
        return f"not advertised: {', '.join(unsettled)}" if unsettled else None

    def summary(self) -> str:
        """How it is, in a line for people: `2 records advertised, 5 neighbours, next refresh in 1200 s`."""
        standings = [self.server.standing(record_name(target)) for target in self._pages]
        due = [standing.refresh_in for standing in standings if standing and standing.refresh_in is not None]
        records = sum(standing is not None for standing in standings)
        counts = f"{records} records advertised, {self.server.protocol.router.live_count} neighbours"
        return counts + (f", next refresh in {max(min(due), 0):.0f} s" if due else "")

    def status(self) -> dict[str, object]:
        """What is advertised and how it stands, for `/status`. Times in Unix ms, durations in s."""
        now = self.server.now()
        records = []
        for target, page in sorted(self._pages.items()):
            standing = self.server.standing(record_name(target))
            record: dict[str, object] = {"key": target, "version": page.artifacts.version, "url": self._url(target)}
            if standing is not None:
                record |= {
                    "seq": standing.seq,
                    "expires_at": standing.expires_at,
                    "ttl_remaining": max(standing.expires_at - now, 0) / 1000,
                    "refresh_in": standing.refresh_in,
                    "holders": standing.holders,
                }
            records.append(record)
        return {
            "name": self._settings.name,
            "publisher": self._identity.publisher_id,
            "dht": format_address(self.dht_address),
            "http": format_address(self.http_address) if self.http_address else None,
            "watching": self._channels.mode,
            "neighbours": len(self.server.protocol.router.live()),
            "records_held": self.server.storage.records,
            "record_ttl": self.server.record_ttl,
            "refresh_interval": self.server.refresh_interval,
            "records": records,
            "problems": self._channels.problems,
        }

    async def _open_front(self) -> None:
        from plasm_dht.provider.front import Front  # it takes 100 ms, and who serves no HTTP needs none

        own = self._identity.publisher_id
        self._front = await Front.open(self._settings, self._site, self.server, self._journal, own=own)
        self.http_address = self._front.address

    # -- following the folder ----------------------------------------------------------------------------------------

    async def _follow(self, published: asyncio.Event) -> None:
        """Join, and publish what is in the folder and whatever changes in it, until cancelled."""
        async with asyncio.TaskGroup() as self._tasks:
            self._tasks.create_task(self._channels.run())
            await self.server.bootstrap(self._settings.dht.bootstrap)
            self._advertise_at(await self._address.look())
            await self._channels.seen.wait()
            await asyncio.gather(*self._publishing)
            published.set()
            await self._address.follow(self._advertise_at)

    def _advertise_at(self, base_url: str) -> None:
        self._base_url = base_url
        for target, found in self._artifacts.items():
            self._advertise(target, found)

    def _found(self, target: str, found: ArtifactSet) -> None:
        self._artifacts[target] = found
        if self._base_url is not None:
            self._advertise(target, found)

    def _advertise(self, target: str, found: ArtifactSet) -> None:
        """Serve the files, with a new manifest and record if the content, the address or the month is another."""
        assert self._base_url is not None  # noqa: S101  # the callers saw to it
        page = self._pages.get(target)
        now = self._clock.now()
        same = page is not None and page.artifacts == found and self._urls[target] == self._base_url
        if page is not None and same and now - self._created[target] < REBUILD_AFTER:
            self._pages[target] = Page(found, page.manifest)  # where the bytes are may have changed
            return
        self._manifest_version = max(self._manifest_version + 1, now)
        try:
            manifest = build_manifest(
                self._identity,
                target=target,
                version=found.version,
                files=found.files,
                base_url=self._base_url,
                manifest_version=self._manifest_version,
                created_at=now,
            )
            self._pages[target] = Page(found, manifest)
            self._created[target], self._urls[target] = now, self._base_url
            url, name = self._url(target), self._settings.name
            pointer = Pointer(url, found.version, name, hashlib.sha256(manifest).digest(), len(manifest)).encode()
        except PlasmError as error:
            log.warning("%s is not advertised: %s", target, error)
            return
        task = self._tasks.create_task(self._publish(target, found.version, pointer))
        self._publishing.add(task)
        task.add_done_callback(self._publishing.discard)

    async def _publish(self, target: str, version: str, pointer: bytes) -> None:
        try:
            await self._write_manifest(target)
            publication = await self.server.publish(record_name(target), pointer)
        except PlasmError as error:
            log.warning("%s is not advertised: %s", target, error)
            return
        log.info(
            "published %s: version %s, seq %d, %s",
            target,
            version,
            publication.seq,
            counted(publication.stored, "holder"),
        )

    async def _write_manifest(self, target: str) -> None:
        """Write the newest manifest of the target for what serves it. Raises `FolderError`."""
        async with self._writing:  # in turn, so that what is written last is the newest
            page = self._pages.get(target)
            if self._manifests is not None and page is not None:
                await in_thread(write_manifest, self._manifests / target, page.manifest)

    def _take_down(self, target: str) -> None:
        self._artifacts.pop(target, None)
        if self._pages.pop(target, None) is not None:
            log.info("%s has vanished from the folder: withdrawn", target)
            self._tasks.create_task(self._withdraw_record(target))

    async def _withdraw_record(self, target: str) -> None:
        await self.server.withdraw(record_name(target))

    def _url(self, target: str) -> str:
        return f"{self._urls[target].rstrip('/')}/{target}/{MANIFEST_FILE}"

    # -- stopping ----------------------------------------------------------------------------------------------------

    async def _unless_failed(self, event: Coroutine[Any, Any, object]) -> None:
        """Wait for the event, or raise what following the folder has failed with."""
        assert self._following is not None  # noqa: S101  # the caller has just made it
        waiting = asyncio.create_task(event)
        try:
            await asyncio.wait({waiting, self._following}, return_when=asyncio.FIRST_COMPLETED)
            if self._following.done():
                self._following.result()
        finally:
            waiting.cancel()

    async def _stop_following(self) -> None:
        assert self._following is not None  # noqa: S101  # it was started before this was pushed
        self._following.cancel()
        await asyncio.gather(self._following, return_exceptions=True)

    async def _close(self) -> None:
        """Both at once: withdrawing may take 3 s, and a download that stalls must not add to it."""
        cleanup = [self._front.close()] if self._front is not None else []
        await asyncio.gather(self.server.close(withdraw=self._withdraw), *cleanup)


def _nothing_found(root: str, problems: dict[str, str]) -> str:
    reasons = "".join(f"; {problem}" for problem in list(problems.values())[:3])
    return f"artifact folder {root} has nothing to serve: it must hold files in CHANNEL/ARCH/ folders{reasons}"
