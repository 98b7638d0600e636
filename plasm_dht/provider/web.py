"""The HTTP application: manifests, artifacts, iPXE, health and status. It reads what the provider put into a `Site`.

The only bytes that leave are those of files in the current `ArtifactSet`, found by name and never by path. The hash is
the only validator: dates lie after a rollback, when older files replace newer ones.
"""

import asyncio
import errno
import hashlib
import logging
import os
import re
from collections.abc import Awaitable, Callable
from typing import cast

from aiohttp import hdrs, web
from aiohttp.helpers import ETAG_ANY, ETag
from aiohttp.http_exceptions import HttpProcessingError

from plasm_dht.errors import ListenError
from plasm_dht.provider import ipxe
from plasm_dht.provider.artifacts import ArtifactFile, open_regular
from plasm_dht.provider.door import Door, Limits
from plasm_dht.provider.manifest import MANIFEST_FILE, RESERVED_CHANNEL
from plasm_dht.provider.site import Page, Site
from plasm_dht.values import format_address

# Each connection that downloads holds two descriptors, and 1,024 are the usual limit of a process.
MAX_CONNECTIONS = 400
# One client, or all that share its address, can take no more than a quarter of them.
MAX_PER_ADDRESS = 100
# A boot client asks for three files in a row; an idle connection is of no use after that, nor is one whose client has
# not finished its request by then, however busy it is with it (s).
KEEPALIVE = 15.0
# A client that has not taken a chunk, or another whole answer, by then has gone or wants to hold the connection (s).
STALL = 60.0
# What a client may send before it is answered: room for 16 of the largest header fields and for hundreds of requests.
# Without it each connection could make us keep 1 MiB of headers (bytes).
MAX_UNANSWERED = 128 * 1024
# Downloads that are running when the provider stops get this long (s): all of a stop has 3 s.
SHUTDOWN = 0.5
# Nothing here reads a body. aiohttp would wait 10 s for the rest of one, even of a client that has gone: a task each,
# that MAX_CONNECTIONS does not count (s).
LINGER = 0.0
# Read in a thread, because sendfile would read a cold disk or a network share on the loop (bytes).
_CHUNK = 256 * 1024
_LAST_NONE = re.compile("bytes=-0+")
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
}
_REFUSAL = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 5\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
# Whatever is at an address today may be something else tomorrow: keep it, but ask.
_NO_CACHE: dict[str, str] = {hdrs.CACHE_CONTROL: "no-cache"}


# What is asked for, by the route's path; every other route is of the page for people.
_KINDS = {
    "/{channel}/{arch}/" + MANIFEST_FILE: "manifest",
    "/{channel}/{arch}/{filename}": "artifact",
    f"/{ipxe.BOOT_FILE}": "ipxe",
    "/health": "health",
    "/status": "status",
    "/metrics": "metrics",
}
SITE = web.AppKey("site", Site)


def create_app(site: Site) -> web.Application:
    """The application that serves the site."""
    app = web.Application()
    app[SITE] = site
    app.on_response_prepare.extend([_add_headers, _count])
    app.add_routes(
        [
            web.get("/health", _health),
            web.get("/status", _status),
            web.get("/metrics", _metrics),
            web.get(f"/{ipxe.BOOT_FILE}", _choose),
            web.get("/{channel}/{arch}/" + MANIFEST_FILE, _manifest),
            web.get("/{channel}/{arch}/{filename}", _file),
        ]
    )
    return app


Application = web.Application
Runner = web.AppRunner


async def serve(app: web.Application, host: str, port: int) -> tuple[Runner, int]:
    """Serves the application; `port` 0 picks one. Returns what `cleanup()` is called on, and the port.

    Raises `ListenError` when the address cannot be bound.
    """
    door = Door(Limits(MAX_CONNECTIONS, MAX_PER_ADDRESS, MAX_UNANSWERED, STALL, _REFUSAL))
    app.on_response_prepare.append(_answered(door))
    runner = web.AppRunner(
        app, logger=_logger(), keepalive_timeout=KEEPALIVE, shutdown_timeout=SHUTDOWN, lingering_time=LINGER
    )
    await runner.setup()
    try:
        await _BoundedSite(door, runner, host, port).start()
    except OSError as error:
        await runner.cleanup()
        raise ListenError(f"HTTP cannot listen on {format_address((host, port))}: {_advice(error)}") from None
    return runner, runner.addresses[0][1]


def _logger() -> logging.Logger:
    """aiohttp's log, without a traceback for what a client sent that is no HTTP."""

    def without_clients_mistakes(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        return not isinstance(error, HttpProcessingError)

    logger = logging.getLogger(f"{__name__}.http")
    logger.filters[:] = [without_clients_mistakes]
    return logger


def _advice(error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return "the port is in use, stop what uses it or choose another with --http-port (0 picks a free one)"
    if error.errno == errno.EADDRNOTAVAIL:
        return "the address is not of this machine, choose one that is with --http-host (0.0.0.0 is all of them)"
    if error.errno in (errno.EACCES, errno.EPERM):
        return "it is not permitted, choose a port above 1023 with --http-port"
    return f"{error.strerror or error}, choose another address with --http-host and --http-port"


class _BoundedSite(web.TCPSite):
    """A site behind a door; aiohttp bounds neither connections nor how long an answer takes."""

    def __init__(self, door: Door, runner: Runner, host: str, port: int) -> None:
        super().__init__(runner, host, port)
        self._door = door

    async def start(self) -> None:
        await web.BaseSite.start(self)
        server = cast(web.Server, self._runner.server)  # the runner is set up
        self._server = await self._door.listen(server, cast(str, self._host), self._port)


def _answered(door: Door) -> Callable[[web.Request, web.StreamResponse], Awaitable[None]]:
    async def tell(request: web.Request, response: web.StreamResponse) -> None:
        door.answered(request.protocol)

    return tell


async def _add_headers(request: web.Request, response: web.StreamResponse) -> None:
    for name, value in _HEADERS.items():
        response.headers.setdefault(name, value)


async def _count(request: web.Request, response: web.StreamResponse) -> None:
    traffic = request.app[SITE].traffic
    traffic.requests += 1
    traffic.answers[_kind(request), f"{response.status // 100}xx"] += 1
    if request.method != hdrs.METH_HEAD and isinstance(response, web.Response):
        traffic.sent += response.content_length or 0


def _kind(request: web.Request) -> str:
    """What was asked for: one of `KINDS`, whatever the client made up."""
    resource = request.match_info.route.resource
    if resource is None:
        return "unknown"
    if request.match_info.get("filename") == ipxe.BOOT_FILE:
        return "ipxe"
    in_gateway = resource.canonical.startswith(f"/{RESERVED_CHANNEL}/")
    return "gateway" if in_gateway else _KINDS.get(resource.canonical, "page")


async def _health(request: web.Request) -> web.Response:
    reason = request.app[SITE].health()
    if reason is None:
        return web.json_response({"status": "ok"}, headers=_NO_CACHE)
    return web.json_response({"status": "unhealthy", "reason": reason}, status=503, headers=_NO_CACHE)


async def _status(request: web.Request) -> web.Response:
    return web.json_response(request.app[SITE].status(), headers=_NO_CACHE)


async def _metrics(request: web.Request) -> web.Response:
    metrics = request.app[SITE].metrics
    if metrics is None:
        raise web.HTTPNotFound(text="there are no metrics here\n")
    content_type, body = metrics(request.headers.get(hdrs.ACCEPT, ""))
    return web.Response(body=body, headers={hdrs.CONTENT_TYPE: content_type} | _NO_CACHE)


def _page(request: web.Request) -> Page:
    target = f"{request.match_info['channel']}/{request.match_info['arch']}"
    page = request.app[SITE].pages.get(target)
    if page is None:
        raise web.HTTPNotFound(text=f"{target!a} is not served here: / lists what is\n")
    return page


async def _manifest(request: web.Request) -> web.StreamResponse:
    manifest = _page(request).manifest
    answer = _precondition(request, hashlib.sha256(manifest).hexdigest())
    if isinstance(answer, web.Response):
        return answer
    return web.Response(body=manifest, content_type="application/json", headers=answer)


async def _file(request: web.Request) -> web.StreamResponse:
    page = _page(request)
    name = request.match_info["filename"]
    file = next((file for file in page.artifacts.files if file.filename == name), None)
    if file is None and name == ipxe.BOOT_FILE:  # one among the artifacts is served as it is: the manifest has its hash
        return await _boot(page)
    if file is None:
        raise web.HTTPNotFound(text=f"{name!a} is not among the artifacts of {page.artifacts.target}\n")
    answer = _precondition(request, file.sha256)
    if isinstance(answer, web.Response):
        return answer
    descriptor = await _descriptor(page, file)
    try:
        return await _send(request, file, descriptor, answer)
    finally:
        os.close(descriptor)


async def _boot(page: Page) -> web.Response:
    """The iPXE script of a `CHANNEL/ARCH`."""
    file = next((file for file in page.artifacts.files if file.filename == ipxe.CMDLINE_FILE), None)
    try:
        cmdline: list[str] = []
        if file is not None:
            descriptor = await _descriptor(page, file)
            try:
                cmdline = ipxe.read_cmdline(await asyncio.to_thread(os.pread, descriptor, ipxe.MAX_CMDLINE + 1, 0))
            except ValueError as error:
                raise ValueError(f"{ipxe.CMDLINE_FILE} cannot be a command line: {error}") from None
            finally:
                os.close(descriptor)
        script = ipxe.boot_script(page.artifacts.target, page.artifacts.version, page.manifest, cmdline)
    except ValueError as error:
        raise web.HTTPNotFound(
            text=f"{page.artifacts.target} has no iPXE script: {error}\n", headers=_NO_CACHE
        ) from None
    return web.Response(text=script, headers=_NO_CACHE)


async def _choose(request: web.Request) -> web.Response:
    """The iPXE script that finds the one for the client's architecture."""
    try:
        channel, archs = ipxe.choose_channel(request.query.get("channel"), request.app[SITE].pages)
    except LookupError as error:
        raise web.HTTPNotFound(text=f"{error}\n", headers=_NO_CACHE) from None
    return web.Response(text=ipxe.choice_script(channel, archs), headers=_NO_CACHE)


async def _descriptor(page: Page, file: ArtifactFile) -> int:
    descriptor = await asyncio.to_thread(_open, file)
    if descriptor is None:
        text = f"{file.filename!a} of {page.artifacts.target} has just changed: its manifest is being built anew, "
        raise web.HTTPServiceUnavailable(text=f"{text}try again\n", headers={hdrs.RETRY_AFTER: "1"} | _NO_CACHE)
    return descriptor


def _open(file: ArtifactFile) -> int | None:
    """A descriptor of the file if it is what was hashed. What is checked is what will be read, whatever happens to the
    path after."""
    try:
        descriptor, status = open_regular(file.path)
    except OSError:
        return None
    if (status.st_size, status.st_mtime_ns) != (file.size, file.mtime_ns):
        os.close(descriptor)
        return None
    return descriptor


async def _send(
    request: web.Request, file: ArtifactFile, descriptor: int, headers: dict[str, str]
) -> web.StreamResponse:
    response = web.StreamResponse(headers=headers | {hdrs.ACCEPT_RANGES: "bytes"})
    response.content_type = "application/octet-stream"
    start, end = 0, file.size
    asked = _range(request, file)
    if asked is not None:
        start, end = asked
        if start >= file.size:
            raise web.HTTPRequestRangeNotSatisfiable(headers={hdrs.CONTENT_RANGE: f"bytes */{file.size}"})
        response.set_status(206)
        response.headers[hdrs.CONTENT_RANGE] = f"bytes {start}-{end - 1}/{file.size}"
    response.content_length = end - start
    await response.prepare(request)
    if request.method == hdrs.METH_HEAD:
        return response
    transport = request.transport  # aiohttp forgets it before it cancels us
    while start < end:
        chunk = await asyncio.to_thread(os.pread, descriptor, min(_CHUNK, end - start), start)
        if not chunk:  # it was cut off under us, and the length is promised already
            _abort(request)
            break
        try:
            await response.write(chunk)
        except ConnectionError:  # the client has gone; aiohttp says so in two ways
            break
        except asyncio.CancelledError:  # we stop: what the client does not take would keep the connection open
            if transport:
                transport.abort()
            raise
        start += len(chunk)
        request.app[SITE].traffic.sent += len(chunk)
    return response


def _abort(request: web.Request) -> None:
    """Ends the connection, so that the client sees that bytes are missing."""
    if request.transport:
        request.transport.abort()


def _range(request: web.Request, file: ArtifactFile) -> tuple[int, int] | None:
    """The first byte and the one after the last that are asked for; None for all of the file.

    A header that cannot be used is ignored (RFC 9110, 14.2): several ranges, another unit, an If-Range that names
    other content. A start at or after the end of the file is returned as it is.
    """
    if request.method != hdrs.METH_GET or hdrs.RANGE not in request.headers:
        return None
    if request.headers.get(hdrs.IF_RANGE, f'"{file.sha256}"') != f'"{file.sha256}"':
        return None
    if _LAST_NONE.fullmatch(request.headers[hdrs.RANGE]):  # aiohttp takes the last 0 bytes for all of them
        return file.size, file.size
    try:
        asked = request.http_range
    except ValueError:
        return None
    if asked.start < 0:
        return max(0, file.size + asked.start), file.size
    return asked.start, file.size if asked.stop is None else min(asked.stop, file.size)


def _precondition(request: web.Request, sha256: str) -> web.Response | dict[str, str]:
    """The headers to answer with, or the answer when the client's conditions decide it (RFC 9110, 13.2.2)."""
    headers = {**_NO_CACHE, hdrs.ETAG: f'"{sha256}"'}
    if not _matches(request.if_match, sha256, weak=False, default=True):
        return web.Response(status=412, text="the content is another one by now\n", headers=headers)
    if _matches(request.if_none_match, sha256, weak=True, default=False):
        return web.Response(status=304, headers=headers)
    return headers


def _matches(etags: tuple[ETag, ...] | None, sha256: str, *, weak: bool, default: bool) -> bool:
    if etags is None:
        return default
    return any(etag.value in (sha256, ETAG_ANY) for etag in etags if weak or not etag.is_weak)
