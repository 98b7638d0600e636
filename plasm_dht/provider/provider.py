"""`Provider`: wires, starts and stops what serves and advertises a folder of boot artifacts.

No algorithm of its own: what changed, how it is hashed, signed, served and published is in the rooms below.
"""

import asyncio
import hashlib
import ipaddress
import logging
from contextlib import AsyncExitStack
from typing import Self

from plasm_dht.clock import Clock
from plasm_dht.config import Change, Settings, change, format_address
from plasm_dht.dht.stats import counted
from plasm_dht.dht.storage import RecordStorage
from plasm_dht.errors import ArtifactsError, ConfigError, PlasmError
from plasm_dht.identity import Identity
from plasm_dht.provider import gateway, web
from plasm_dht.provider import page as people
from plasm_dht.provider.artifacts import ArtifactScanner, ArtifactSet, Scan
from plasm_dht.provider.journal import Journal
from plasm_dht.provider.manifest import MANIFEST_FILE, REBUILD_AFTER, Pointer, build_manifest, record_name
from plasm_dht.provider.observed import ObservedServer
from plasm_dht.provider.watch import ArtifactWatcher

log = logging.getLogger(__name__)

Address = tuple[str, int]

# A target that has vanished, or that kept changing, is looked at again after this long (s): whoever deletes and
# recreates a folder in a moment does not want it withdrawn.
LOOK_AGAIN = 1.0


class Provider:
    """A DHT node, an HTTP server, a watcher, and the records that they make of a folder.

    Entering starts everything and returns when all that is in the folder has been published; leaving withdraws it
    (unless `withdraw` is false) and stops. Entering raises `ArtifactsError`, `ListenError` or `ConfigError`.

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
        withdraw: bool = True,
        clock: Clock | None = None,
        storage: RecordStorage | None = None,
    ) -> None:
        if settings.artifacts_dir is None:
            raise ConfigError("provider.artifacts_dir is not set: name the folder that holds CHANNEL/ARCH/ folders")
        if no_http and settings.base_url is None and settings.http_port == 0:
            raise ConfigError(
                "provider.http_port is 0 and this provider serves no HTTP: say with --base-url or --http-port where "
                "the files are served"
            )
        self._settings = settings
        self._identity = identity
        self._no_http = no_http
        self._withdraw = withdraw
        self._clock = clock or Clock()
        self._root = settings.artifacts_dir
        self._scanner = ArtifactScanner(self._root, self._clock)
        self._watcher = ArtifactWatcher(self._root)
        self._site = web.Site(settings.name, status=self.status, health=self.health)
        self._pages: dict[str, web.Page] = {}
        self._site.pages = self._pages
        self._created: dict[str, int] = {}  # by target, when its manifest was made (Unix ms)
        self._urls: dict[str, str] = {}  # by target, the base URL that its manifest names
        self._manifest_version = 0
        self._missing: dict[str, float] = {}  # since when (monotonic)
        self._again: set[str] = set()
        self._problems: dict[str, str] = {}
        self._unreadable: str | None = None
        self._stack = AsyncExitStack()
        self._http: web.Runner | None = None
        self._gateway: gateway.Gateway | None = None
        self._seen: str | None = None  # our address as neighbours saw it last
        self._following: asyncio.Task[None] | None = None
        self._tasks: asyncio.TaskGroup | None = None
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
        )

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            stack.push_async_callback(self._close)
            await asyncio.to_thread(self._scanner.scan, set())  # a wrong folder is said before any port is bound
            await self.server.listen(self._settings.dht.port, self._settings.dht.host)
            self.dht_address = self.server.address
            if not self._no_http:
                host = self._settings.http_host
                self._http, port = await web.serve(self._application(), host, self._settings.http_port)
                self.http_address = (host, port)
            await stack.enter_async_context(self._watcher)
            stack.callback(self._scanner.stop)
            scan = await asyncio.to_thread(self._scanner.scan)
            if not scan.found and not scan.unsettled:
                raise ArtifactsError(_nothing_found(str(self._root), scan))
            await self.server.bootstrap(self._settings.dht.bootstrap)
            self._following = asyncio.create_task(self._follow(scan, first := asyncio.Event()))
            stack.push_async_callback(self._stop_following)
            await self._first_publish(first)
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
        what = change(self._settings, settings)
        before, self._settings = self._settings.dht, what.settings
        now = what.settings.dht
        if (now.record_ttl, now.refresh_interval) != (before.record_ttl, before.refresh_interval):
            self.server.set_life(now.record_ttl, now.refresh_interval)
        if self._gateway is not None:
            self._gateway.trust = what.settings.trust.publishers
        if now.bootstrap != before.bootstrap:
            await self.server.bootstrap(now.bootstrap, replace=True)
        return what

    def health(self) -> str | None:
        """Why the provider is not well; `None` when it is."""
        if self._unreadable is not None:
            return self._unreadable
        unsettled = sorted(target for target in self._pages if self.server.standing(record_name(target)) is None)
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
            "watching": self._watcher.mode,
            "neighbours": len(self.server.protocol.router.live()),
            "records_held": self.server.storage.records,
            "record_ttl": self.server.record_ttl,
            "refresh_interval": self.server.refresh_interval,
            "records": records,
            "problems": self._problems,
        }

    def _application(self) -> web.Application:
        from plasm_dht.provider.metrics import Exposition  # it takes 25 ms, and who serves no HTTP needs none

        app = web.create_app(self._site)
        table = self.server.protocol.router
        own = self._identity.publisher_id
        self._gateway = gateway.Gateway(self.server, table, self._settings.trust.publishers, own)
        gateway.add_to(app, self._gateway)
        people.add_to(app, table, self._journal, self.server.holders)
        self._site.metrics = Exposition(self.server, self._site.traffic).render
        return app

    # -- following the folder ----------------------------------------------------------------------------------------

    async def _follow(self, scan: Scan, first: asyncio.Event) -> None:
        """Publish what the scan found, then whatever changes, until cancelled."""
        async with asyncio.TaskGroup() as group:
            base_url = await self._base_url(look=True)
            await asyncio.gather(*(self._update(base_url, target, found) for target, found in scan.found.items()))
            self._note(scan, None)
            first.set()
            self._tasks = group
            while True:
                await self._look(await self._next_targets())

    async def _next_targets(self) -> set[str] | None:
        """What to scan now: what the watcher says, and what has to be looked at again."""
        targets: set[str] | None = set()
        try:
            async with asyncio.timeout(LOOK_AGAIN if self._again else None):
                targets = await anext(self._watcher)
        except TimeoutError:
            pass
        return None if targets is None else targets | self._again

    async def _look(self, targets: set[str] | None) -> None:
        try:
            scan = await asyncio.to_thread(self._scanner.scan, targets)
            self._unreadable = None
        except ArtifactsError as error:
            if self._unreadable is None:
                log.warning("%s", error)
            self._unreadable = str(error)
            if await asyncio.to_thread(self._root.exists):
                return  # it is there, but cannot be read just now: keep what is known
            scan = Scan()
        base_url = await self._base_url(look=targets is None)
        for target, found in scan.found.items():
            self._spawn(target, found, base_url)
        self._note(scan, targets)

    def _note(self, scan: Scan, targets: set[str] | None) -> None:
        """Take note of what is not there, and say once what is not served."""
        looked_at = self._pages.keys() if targets is None else targets & self._pages.keys()
        missing = looked_at - scan.found.keys() - scan.unsettled
        now = self._clock.monotonic()
        self._missing = {target: self._missing.get(target, now) for target in missing}
        for target in [target for target, since in self._missing.items() if now - since >= LOOK_AGAIN]:
            del self._missing[target]
            self._take_down(target)
        self._again = self._missing.keys() | scan.unsettled
        self._watcher.linked = self._scanner.linked
        for path, problem in scan.problems.items():
            if self._problems.get(path) != problem:
                log.warning("%s: %s", path, problem)
        self._problems = scan.problems if targets is None else self._problems | scan.problems

    def _spawn(self, target: str, found: ArtifactSet, base_url: str) -> None:
        if self._tasks is not None:
            self._tasks.create_task(self._update(base_url, target, found))

    async def _update(self, base_url: str, target: str, found: ArtifactSet) -> None:
        """Serve the files, with a new manifest and record if the content, the address or the month is another."""
        page = self._pages.get(target)
        now = self._clock.now()
        same = page is not None and page.artifacts == found and self._urls[target] == base_url
        if page is not None and same and now - self._created[target] < REBUILD_AFTER:
            self._pages[target] = web.Page(found, page.manifest)  # where the bytes are may have changed
            return
        self._manifest_version = max(self._manifest_version + 1, now)
        try:
            manifest = build_manifest(
                self._identity,
                target=target,
                version=found.version,
                files=found.files,
                base_url=base_url,
                manifest_version=self._manifest_version,
                created_at=now,
            )
            self._pages[target] = web.Page(found, manifest)
            self._created[target], self._urls[target] = now, base_url
            pointer = Pointer(
                self._url(target), found.version, self._settings.name, hashlib.sha256(manifest).digest(), len(manifest)
            )
            publication = await self.server.publish(record_name(target), pointer.encode())
        except PlasmError as error:
            log.warning("%s is not advertised: %s", target, error)
            return
        log.info(
            "published %s: version %s, seq %d, %s",
            target,
            found.version,
            publication.seq,
            counted(publication.stored, "holder"),
        )

    def _take_down(self, target: str) -> None:
        log.info("%s has vanished from the folder: withdrawn", target)
        del self._pages[target]
        if self._tasks is not None:
            self._tasks.create_task(self._withdraw_record(target))

    async def _withdraw_record(self, target: str) -> None:
        await self.server.withdraw(record_name(target))

    # -- addresses ---------------------------------------------------------------------------------------------------

    def _url(self, target: str) -> str:
        return f"{self._urls[target].rstrip('/')}/{target}/{MANIFEST_FILE}"

    async def _base_url(self, *, look: bool) -> str:
        """Where clients find what is served: as configured, else the address that is bound or that neighbours see.

        Neighbours are asked when we `look`, and as long as none has ever answered; what they said last stays true
        when they are gone.
        """
        if self._settings.base_url is not None:
            return self._settings.base_url
        host, port = self.http_address or (self._settings.http_host, self._settings.http_port)
        if _is_wildcard(host):
            if look or self._seen is None:
                self._seen = await self.server.seen_address() or self._seen
            host = self._seen or ("::1" if ":" in host else "127.0.0.1")
        return f"http://{format_address((host, port))}"

    # -- stopping ----------------------------------------------------------------------------------------------------

    async def _first_publish(self, first: asyncio.Event) -> None:
        assert self._following is not None  # noqa: S101  # the caller has just made it
        waiting = asyncio.create_task(first.wait())
        try:
            await asyncio.wait({waiting, self._following}, return_when=asyncio.FIRST_COMPLETED)
            if self._following.done():
                self._following.result()
        finally:
            waiting.cancel()

    async def _stop_following(self) -> None:
        assert self._following is not None  # noqa: S101  # it was started before this was pushed
        self._scanner.stop()
        self._following.cancel()
        await asyncio.gather(self._following, return_exceptions=True)

    async def _close(self) -> None:
        """Both at once: withdrawing may take 3 s, and a download that stalls must not add to it."""
        cleanup = [self._http.cleanup()] if self._http is not None else []
        await asyncio.gather(self.server.close(withdraw=self._withdraw), *cleanup)


def _is_wildcard(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def _nothing_found(root: str, scan: Scan) -> str:
    reasons = "".join(f"; {path}: {problem}" for path, problem in list(scan.problems.items())[:3])
    return f"artifact folder {root} has nothing to serve: it must hold files in CHANNEL/ARCH/ folders{reasons}"
