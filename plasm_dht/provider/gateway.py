"""The gateway into the DHT for clients that speak HTTP alone: who has a `CHANNEL/ARCH`, and the way to one of them.

It believes nobody more than `get` does: every record was verified by the lookup, and an address is passed on only as
`Pointer.decode` allows it. It fetches nothing itself.
"""

import asyncio
import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from aiohttp import hdrs, web

from plasm_dht.clock import Clock
from plasm_dht.dht.limits import source_of
from plasm_dht.dht.routing import PlasmRoutingTable
from plasm_dht.errors import ArtifactsError, PlasmError, VerificationError
from plasm_dht.provider.facts import facts
from plasm_dht.provider.manifest import MANIFEST_FILE, RESERVED_CHANNEL, Pointer, check_target, record_name
from plasm_dht.record import Record

log = logging.getLogger(__name__)

# Lookups under way at once; each of them has some ten datagrams in flight.
MAX_LOOKUPS = 32
# A quarter of them for what one client can come from, as with connections (`dht.limits.source_of`).
MAX_PER_SOURCE = 8
# What a lookup found is good for this long, here and (in whole seconds) in a client's cache (s): a record that was
# withdrawn has to be gone at once.
FRESH_FOR = 1.0
# Answers that are remembered: whoever asks for names without end fills no memory.
MAX_REMEMBERED = 1024
_NO_STORE: dict[str, str] = {hdrs.CACHE_CONTROL: "no-store"}


class Finder(Protocol):
    """What the gateway needs of a node; `PlasmServer` is one."""

    clock: Clock

    async def get_records(
        self, name: str, *, trust: Sequence[str] | None = None, timeout: float | None = None
    ) -> list[Record]:
        """Every publisher's live record, freshest first."""

    def now(self) -> int:
        """Unix ms."""


@dataclass(frozen=True, slots=True)
class Found:
    """What a lookup found, freshest first, and whether any node answered it. Good `until` then (monotonic s)."""

    records: tuple[tuple[Record, Pointer], ...]
    answered: bool
    until: float


@dataclass(slots=True)
class Gateway:
    """Looks records up for HTTP clients.

    Attributes:
        node: asks the DHT.
        table: its routing table, which shows whether anybody answered.
        trust: publisher ids; anybody else's records are not shown. Empty: everybody's are shown, and a client is only
            sent to `own`.
        own: our own publisher id, `None` where nothing is published.
    """

    node: Finder
    table: PlasmRoutingTable
    trust: Sequence[str] = ()
    own: str | None = None
    _running: dict[str, "asyncio.Task[Found]"] = field(default_factory=dict)
    _shares: Counter[str] = field(default_factory=Counter)
    _known: dict[str, Found] = field(default_factory=dict)

    async def find(self, target: str, source: str = "") -> Found | None:
        """What is known since a second ago, or what a lookup finds, one for all who wait. `None`: too many lookups.

        A lookup counts for the `source` of the client that asked first.

        Raises `PlasmError` when the node cannot ask.
        """
        known = self._known.get(target)
        if known is not None and self.node.clock.monotonic() < known.until:
            return known
        task = self._running.get(target)
        if task is None:
            if len(self._running) >= MAX_LOOKUPS or self._shares[source] >= MAX_PER_SOURCE:
                return None
            self._shares[source] += 1
            task = self._running[target] = asyncio.create_task(self._look_up(target))
            task.add_done_callback(lambda done: self._end(target, source, done))
        return await asyncio.shield(task)  # whoever goes away takes the answer from nobody else

    async def close(self) -> None:
        """End what is under way."""
        tasks = list(self._running.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def is_trusted(self, record: Record) -> bool:
        """Whether a client is sent to this record's publisher."""
        return record.publisher in self.trust if self.trust else record.publisher == self.own

    def _end(self, target: str, source: str, task: "asyncio.Task[Found]") -> None:
        del self._running[target]
        self._shares[source] -= 1
        if not self._shares[source]:
            del self._shares[source]  # or every address that ever came would be remembered
        if not task.cancelled():
            task.exception()  # all who waited may have gone: then nobody else asks for it

    async def _look_up(self, target: str) -> Found:
        started = self.node.clock.monotonic()
        records = await self.node.get_records(record_name(target), trust=self.trust or None)
        answered = any(contact.heard_at >= started for contact in self.table.live())
        usable = tuple(_usable(records))
        now = self.node.now()
        left = min((record.expires_at - now for record, _ in usable), default=1000 * FRESH_FOR) / 1000
        found = Found(usable, answered, self.node.clock.monotonic() + min(FRESH_FOR, left))
        if usable or answered:  # a network that comes back is seen at once
            self._remember(target, found)
        return found

    def _remember(self, target: str, found: Found) -> None:
        monotonic = self.node.clock.monotonic()
        if len(self._known) >= MAX_REMEMBERED:
            self._known = {each: known for each, known in self._known.items() if known.until > monotonic}
        if len(self._known) < MAX_REMEMBERED:
            self._known[target] = found


GATEWAY = web.AppKey("gateway", Gateway)


def add_to(app: web.Application, gateway: Gateway) -> None:
    """Have the application answer under `/dht/`."""

    async def close(app: web.Application) -> None:
        await app[GATEWAY].close()

    app[GATEWAY] = gateway
    app.on_shutdown.append(close)
    prefix = f"/{RESERVED_CHANNEL}/{{channel}}/{{arch}}"
    app.add_routes([web.get(prefix, _records), web.get(f"{prefix}/{MANIFEST_FILE}", _redirect)])


async def _records(request: web.Request) -> web.Response:
    target, found = await _found(request)
    gateway = request.app[GATEWAY]
    now = gateway.node.now()
    shown = [facts(target, record, pointer, now=now, trusted=gateway.trust) for record, pointer in found]
    return web.json_response(shown, headers=_cache(found, now))


async def _redirect(request: web.Request) -> web.Response:
    target, found = await _found(request)
    gateway = request.app[GATEWAY]
    chosen = next((each for each in found if gateway.is_trusted(each[0])), None)
    if chosen is None:
        sends = "sends clients to its own records alone" if gateway.own else "publishes nothing itself"
        raise _refusal(
            web.HTTPForbidden,
            f"{target} is advertised, but this gateway has no trust list and {sends}: name publishers under "
            f"trust.publishers, or read /{RESERVED_CHANNEL}/{target} and decide yourself",
        )
    # Not a `web.HTTPTemporaryRedirect`: that would write the address anew, and it is signed as it is.
    headers = {hdrs.LOCATION: chosen[1].url} | _cache([chosen], gateway.node.now())
    return web.Response(status=307, headers=headers)


async def _found(request: web.Request) -> tuple[str, list[tuple[Record, Pointer]]]:
    """The `CHANNEL/ARCH` that is asked for and its live records, of which there is at least one."""
    gateway = request.app[GATEWAY]
    try:
        target = check_target(f"{request.match_info['channel']}/{request.match_info['arch']}")
        found = await gateway.find(target, source_of(request.remote) if request.remote else "")
    except ArtifactsError as error:
        raise _refusal(web.HTTPBadRequest, str(error)) from None
    except PlasmError as error:
        raise _refusal(web.HTTPBadGateway, f"no network: {error}") from None
    if found is None:
        busy = (
            f"{MAX_LOOKUPS} lookups are under way, or {MAX_PER_SOURCE} of your address, which is all at once: try again"
        )
        raise _refusal(web.HTTPServiceUnavailable, busy, **{hdrs.RETRY_AFTER: "1"})
    now = gateway.node.now()
    live = [(record, pointer) for record, pointer in found.records if record.is_live(now)]
    if not live and not found.answered:
        raise _refusal(web.HTTPBadGateway, f"no network: no DHT node answered when asked for {target}")
    if not live:
        of_whom = " of a trusted publisher" if gateway.trust else ""
        raise _refusal(web.HTTPNotFound, f"no record: the DHT has no live one{of_whom} for {target}")
    return target, live


def _cache(found: Sequence[tuple[Record, Pointer]], now: int) -> dict[str, str]:
    left = min(record.expires_at for record, _ in found) - now
    return {hdrs.CACHE_CONTROL: f"max-age={int(max(0, min(left / 1000, FRESH_FOR)))}"}


def _refusal(kind: type[web.HTTPError], reason: str, **headers: str) -> web.HTTPError:
    return kind(text=json.dumps({"error": reason}) + "\n", content_type="application/json", headers=headers | _NO_STORE)


def _usable(records: Sequence[Record]) -> list[tuple[Record, Pointer]]:
    usable = []
    for record in records:
        try:
            usable.append((record, Pointer.decode(record.value)))
        except VerificationError as error:
            log.debug("skipping the record of %s: %s", record.publisher, error)
    return usable
