"""The page for people at `/`, and `/events`, which keeps it up to date.

The server fills in what is read without JavaScript; the script draws the same from the state that the page has too,
and then from what `/events` sends.
Whatever comes from the network or a folder is text: escaped here, `textContent` there.
"""

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from string import Template
from typing import Any
from urllib.parse import quote

from aiohttp import hdrs, web

from plasm_dht.config import format_address
from plasm_dht.dht.limits import source_of
from plasm_dht.dht.routing import Contact, PlasmRoutingTable
from plasm_dht.provider.ipxe import BOOT_FILE
from plasm_dht.provider.journal import Journal
from plasm_dht.provider.manifest import MANIFEST_FILE
from plasm_dht.provider.site import Site
from plasm_dht.provider.web import SITE

log = logging.getLogger(__name__)

# Pages that are open at once; each holds one of the server's connections for as long as it is.
MAX_LISTENERS = 64
# A quarter of them for what one client can come from, as with connections (`dht.limits.source_of`).
MAX_PER_SOURCE = 16
# How often it is looked whether something is new (s).
TICK = 0.5
# A line without content, so that proxies and browsers see that somebody is there (s).
HEARTBEAT = 15.0
# A listener that takes nothing for this long is dropped (s).
STALL = 10.0
# Contacts that are drawn, and files and problems of one kind that are listed.
MAX_DRAWN = 240
MAX_LISTED = 100
ID_BITS = 160

_STATIC = Path(__file__).parent / "static"
_POLICY = (
    "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_PAGE_HEADERS: dict[str, str] = {hdrs.CACHE_CONTROL: "no-cache", hdrs.CONTENT_SECURITY_POLICY: _POLICY}
# What changes by the passing of time alone is no news.
_FLEETING = ("ttl_remaining", "refresh_in")

State = dict[str, Any]


def _nobody(target: str) -> list[str]:
    return []


@dataclass(slots=True)
class View:
    """What the page shows beyond the site: the routing table, what happened, and who holds a `CHANNEL/ARCH`."""

    site: Site
    table: PlasmRoutingTable
    journal: Journal
    holders: Callable[[str], list[str]] = _nobody

    def state(self) -> State:
        """All that the page shows, as JSON has it. Durations in s, times in Unix ms."""
        status = self.site.status()
        records = [self._record(record) for record in _records(status)]
        traffic = self.site.traffic
        kept = ("name", "publisher", "dht", "http", "watching", "records_held", "record_ttl", "refresh_interval")
        return {name: status.get(name) for name in kept} | {
            "unwell": self.site.health(),
            "problems": _problems(status)[:MAX_LISTED],
            "records": records,
            "traffic": {"requests": traffic.requests, "bytes": traffic.sent},
            "table": self._table(),
            "events": [
                {"at": event.at, "kind": event.kind, "subject": event.subject, "text": event.text, "count": event.count}
                for event in self.journal.events
            ],
        }

    def _record(self, record: Mapping[str, Any]) -> State:
        page = self.site.pages.get(str(record["key"]))
        files = page.artifacts.files if page is not None else ()
        return dict(record) | {
            "held_by": self.holders(str(record["key"]))[:MAX_LISTED],
            "files": [{"name": file.filename, "role": file.role, "size": file.size} for file in files[:MAX_LISTED]],
            "more_files": max(0, len(files) - MAX_LISTED),
        }

    def _table(self) -> State:
        own = self.table.node.long_id
        contacts = list(self.table)
        nearest = sorted(contacts, key=lambda contact: contact.long_id ^ own)
        step = -(-len(nearest) // MAX_DRAWN) or 1  # of very many every nth is drawn, so that the picture stays true
        return {
            "id": self.table.node.id.hex(),
            "live": self.table.live_count,
            "stale": len(contacts) - self.table.live_count,
            "contacts": [_place(contact, own) for contact in nearest[::step]],
        }


def _place(contact: Contact, own: int) -> State:
    """Where a contact is drawn: which ring (the first bits that it shares with us), and how far around it (0 to 1)."""
    shared = ID_BITS - (contact.long_id ^ own).bit_length()
    rest = ID_BITS - shared - 1  # bits after the first that differs: they tell the contacts of one ring apart
    around = (contact.long_id & ((1 << rest) - 1)) / (1 << rest) if rest > 0 else 0.0
    return {
        "id": contact.id.hex()[:12],
        "address": format_address(contact.address),
        "shared": shared,
        "around": round(around, 4),
        "stale": contact.is_stale,
    }


def _records(status: Mapping[str, object]) -> list[Mapping[str, Any]]:
    records = status.get("records")
    return records if isinstance(records, list) else []


def _problems(status: Mapping[str, object]) -> list[str]:
    problems = status.get("problems")
    return [str(problem) for problem in problems.values()] if isinstance(problems, Mapping) else []


def _news(state: State) -> State:
    """The state without what the passing of time changes, to see whether there is something to tell."""
    records = [
        {name: value for name, value in record.items() if name not in _FLEETING}
        | {"refreshing": record.get("refresh_in") is None}
        for record in state["records"]
    ]
    return state | {"records": records}


class Listener:
    """One open page. Of what it has not taken yet only the last is kept: it needs no other."""

    def __init__(self) -> None:
        self._waiting: bytes | None = None
        self._woken = asyncio.Event()
        self.ended = False

    def tell(self, message: bytes) -> None:
        """Send this next. A heartbeat does not take the place of news."""
        if self._waiting is None or message != _BEAT:
            self._waiting = message
        self._woken.set()

    def end(self) -> None:
        """There is nothing more to come."""
        self.ended = True
        self._woken.set()

    async def next(self) -> bytes | None:
        """What to send; `None` at the end."""
        await self._woken.wait()
        self._woken.clear()
        message, self._waiting = self._waiting, None
        return None if self.ended else message


_BEAT = b":\n\n"


@dataclass(slots=True)
class Feed:
    """Looks at the view twice a second while somebody listens, and tells all of them what is new."""

    view: View
    listeners: dict[Listener, web.Request] = field(default_factory=dict)
    closed: bool = False
    _woken: asyncio.Event = field(default_factory=asyncio.Event)

    def add(self, request: web.Request) -> Listener | None:
        """A listener that gets all of the state at once; `None` when there are too many, or we stop."""
        share = sum(_source(each) == _source(request) for each in self.listeners.values())
        if self.closed or len(self.listeners) >= MAX_LISTENERS or share >= MAX_PER_SOURCE:
            return None
        listener = Listener()
        self.listeners[listener] = request
        listener.tell(_message(self.view.state()))
        self._woken.set()
        return listener

    def remove(self, listener: Listener) -> None:
        """It has gone."""
        self.listeners.pop(listener, None)

    def close(self) -> None:
        """End every listener, so that no open page holds up a stop."""
        self.closed = True
        for listener in self.listeners:
            listener.end()

    async def run(self) -> None:
        """Until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            self._woken.clear()
            if not self.listeners:
                await self._woken.wait()
            told, beat_at = _news(self.view.state()), loop.time() + HEARTBEAT
            while self.listeners:
                await asyncio.sleep(TICK)
                state = self.view.state()
                if (news := _news(state)) != told:
                    told = news
                    self._tell_all(_message(state))
                    beat_at = loop.time() + HEARTBEAT
                elif loop.time() >= beat_at:
                    self._tell_all(_BEAT)
                    beat_at = loop.time() + HEARTBEAT
                for listener, request in self.listeners.items():
                    if request.transport is None or request.transport.is_closing():
                        listener.end()  # its place is free at once, not at the next heartbeat

    def _tell_all(self, message: bytes) -> None:
        for listener in self.listeners:
            listener.tell(message)


def _source(request: web.Request) -> str:
    return source_of(request.remote) if request.remote else ""


def _message(state: State) -> bytes:
    return f"data: {_json(state)}\n\n".encode()


def _json(state: State) -> str:
    return json.dumps(state, separators=(",", ":"))


VIEW = web.AppKey("view", View)
FEED = web.AppKey("feed", Feed)


def add_to(
    app: web.Application, table: PlasmRoutingTable, journal: Journal, holders: Callable[[str], list[str]] = _nobody
) -> None:
    """Have the application answer at `/` and `/events`."""
    app[VIEW] = View(app[SITE], table, journal, holders)
    app[FEED] = Feed(app[VIEW])
    app.cleanup_ctx.append(_run_feed)
    app.on_shutdown.append(_close_feed)
    page = Template((_STATIC / "index.html").read_text(encoding="utf-8"))

    async def index(request: web.Request) -> web.Response:
        text = page.substitute(_static_parts(request.app[VIEW].state()))
        return web.Response(text=text, content_type="text/html", headers=_PAGE_HEADERS)

    app.add_routes(
        [
            web.get("/", index),
            web.get("/style.css", _serve_static("style.css", "text/css")),
            web.get("/page.js", _serve_static("page.js", "text/javascript")),
            web.get("/icon.svg", _serve_static("icon.svg", "image/svg+xml")),
            web.get("/events", _events),
        ]
    )


async def _run_feed(app: web.Application) -> AsyncIterator[None]:
    task = asyncio.create_task(app[FEED].run())
    task.add_done_callback(_report)
    yield
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def _close_feed(app: web.Application) -> None:
    app[FEED].close()


def _report(task: "asyncio.Task[None]") -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("the page for people is not kept up to date any more", exc_info=error)


def _serve_static(name: str, content_type: str) -> Callable[[web.Request], Any]:
    text = (_STATIC / name).read_text(encoding="utf-8")

    async def serve(request: web.Request) -> web.Response:
        return web.Response(text=text, content_type=content_type, headers={hdrs.CACHE_CONTROL: "no-cache"})

    return serve


async def _events(request: web.Request) -> web.StreamResponse:
    feed = request.app[FEED]
    headers = {hdrs.CACHE_CONTROL: "no-store", "X-Accel-Buffering": "no"}  # nginx would hold lines back
    if request.method == hdrs.METH_HEAD:
        return web.Response(content_type="text/event-stream", headers=headers)
    listener = feed.add(request)
    if listener is None:
        text = f"{MAX_LISTENERS} pages are open, or {MAX_PER_SOURCE} of your address, which is all at once\n"
        raise web.HTTPServiceUnavailable(text=text, headers=headers | {hdrs.RETRY_AFTER: "10"})
    response = web.StreamResponse(headers=headers)
    response.content_type = "text/event-stream"
    response.charset = "utf-8"
    try:
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            while (message := await listener.next()) is not None:
                async with asyncio.timeout(STALL):
                    await response.write(message)
    except TimeoutError:
        if request.transport:
            request.transport.abort()
    finally:
        feed.remove(listener)
    return response


# -- what is read without JavaScript ---------------------------------------------------------------------------------


def _static_parts(state: State) -> dict[str, str]:
    table, traffic = state["table"], state["traffic"]
    health = escape(state["unwell"] or "well")
    return {
        "state": escape(_json(state)),
        "name": escape(str(state["name"] or "plasm-dht")),
        "publisher": escape(str(state["publisher"] or "publishes nothing")),
        "health": health,
        "health_class": "bad" if state["unwell"] else "good",
        "dht": escape(str(state["dht"] or "-")),
        "advertised": str(len(state["records"])),
        "neighbours": str(table["live"]),
        "held": str(state["records_held"] or 0),
        "requests": f"{traffic['requests']:,}",
        "bytes": f"{traffic['bytes']:,} B",
        "records": "".join(map(_record_html, state["records"])) or '<p class="none">Nothing at this moment.</p>',
        "problems": "".join(f"<li>{escape(problem)}</li>" for problem in state["problems"]),
        "contacts": "".join(map(_contact_html, table["contacts"])) or '<tr><td colspan="4">nobody</td></tr>',
        "events": "".join(map(_event_html, state["events"])) or "<li>nothing yet</li>",
    }


def _record_html(record: State) -> str:
    key, url = record["key"], escape(quote(record["key"]))
    facts = [("version", record["version"]), ("seq", record.get("seq", "not advertised yet"))]
    if "seq" in record:
        refresh = record["refresh_in"]
        facts += [
            ("refresh in", "now" if refresh is None else f"{max(0.0, refresh):.0f} s"),
            ("expires in", f"{record['ttl_remaining']:.0f} s"),
            ("holders", record["holders"]),
            ("held by", ", ".join(record["held_by"]) or "nobody else"),
        ]
    rows = "".join(f"<div><dt>{name}</dt><dd>{escape(str(value))}</dd></div>" for name, value in facts)
    files = "".join(_file_html(url, file) for file in record["files"])
    more = f"<li>and {record['more_files']} more</li>" if record["more_files"] else ""
    names = {file["name"] for file in record["files"]}
    boots = BOOT_FILE not in names and any(file["role"] == "kernel" for file in record["files"])
    made = (MANIFEST_FILE, BOOT_FILE) if boots else (MANIFEST_FILE,)
    links = "".join(f'<li><a href="{url}/{name}">{name}</a></li>' for name in made)
    listed = f'<ul class="files">{links}{files}{more}</ul>'
    return f'<article class="record card"><h3>{escape(key)}</h3><dl>{rows}</dl>{listed}</article>'


def _file_html(url: str, file: State) -> str:
    name, role = escape(file["name"]), escape(file["role"])
    link = f'<a href="{url}/{quote(file["name"], safe="")}">{name}</a>'
    return f"<li>{link} <span>{role}, {file['size']:,} bytes</span></li>"


def _contact_html(contact: State) -> str:
    cells: Iterable[object] = (
        contact["address"],
        contact["id"],
        contact["shared"],
        "silent" if contact["stale"] else "answers",
    )
    return f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in cells)}</tr>"


def _event_html(event: State) -> str:
    more = f" and {event['count'] - 1} more" if event["count"] > 1 else ""
    text = f" {escape(event['text'])}" if event["text"] else ""
    at = datetime.fromtimestamp(event["at"] / 1000, UTC)
    time = f'<time datetime="{at:%FT%TZ}">{at:%F %T} UTC</time>'
    return f"<li>{time} {event['kind']} {escape(event['subject'])}{more}{text}</li>"
