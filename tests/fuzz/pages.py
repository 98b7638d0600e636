"""The HTTP application fed with bytes: a real aiohttp server on a virtual-time loop, its connections lists of bytes."""

import asyncio
import hashlib
import os
import re
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, cast

from plasm_dht.dht.routing import Contact
from plasm_dht.dht.server import PlasmServer
from plasm_dht.provider import gateway, page, web
from plasm_dht.provider.artifacts import ArtifactScanner
from plasm_dht.provider.journal import Journal
from plasm_dht.provider.manifest import Pointer, record_name
from plasm_dht.provider.metrics import Exposition
from plasm_dht.provider.site import Page, Site
from plasm_dht.record import shared_key
from tests.dht.support import IDENTITIES, HalfManualClock, record
from tests.fuzz.datagrams import LineLoop
from tests.fuzz.documents import MANIFEST
from tests.fuzz.guard import Stage, require
from tests.fuzz.source import Source, mutated

TARGET = "stable/arm64"
CONTENT = bytes(range(256)) * 40
SHA256 = hashlib.sha256(CONTENT).hexdigest()
SECRET = b"TOP SECRET"
HOSTILE = "<img src=x onerror=alert(1)>"
TRUSTED, OTHER = "http://10.0.0.7:8080/stable/arm64/manifest.json", "http://evil.example/stable/arm64/manifest.json"
STATUS: dict[str, object] = {
    "name": HOSTILE, "problems": {"x/y": HOSTILE},
    "records": [
        {"key": TARGET, "version": HOSTILE, "seq": 7, "refresh_in": None, "ttl_remaining": 5.0, "holders": 0},
        {"key": TARGET, "version": HOSTILE, "seq": 7, "refresh_in": 3.0, "ttl_remaining": 5.0, "holders": 20},
        {"key": f"x/{HOSTILE}", "version": HOSTILE},
    ],
}  # fmt: skip
# Live for as long as a world may be.
LIFE = 604_800
METHODS = ("GET", "GET", "GET", "GET", "HEAD", "POST", "OPTIONS", "CONNECT", "TRACE", "get", "X", "")
PATHS = (
    f"/{TARGET}/vmlinuz", f"/{TARGET}/changed", f"/{TARGET}/empty", f"/{TARGET}/manifest.json", "/", "/health",
    "/status", f"/{TARGET}/.secret", f"/{TARGET}/way-out", f"/{TARGET}/../../outside", f"/{TARGET}/..%2f..%2foutside",
    f"/{TARGET}/%2e%2e/%2e%2e/outside", "//etc/passwd", "/etc/passwd/x", f"/{TARGET}/vmlinuz%00.txt", "/%ff/%fe/%fd",
    f"/{TARGET}/vmlinuz/", f"/{TARGET}//vmlinuz", "http://h/x", "*", "h:443", "", "/\u00e9/\u00e9/\u00e9", "/a b/c/d",
    f"/dht/{TARGET}", f"/dht/{TARGET}/manifest.json", f"/dht/{TARGET}/manifest.json", "/dht/stable/none", "/dht/A/b",
    "/dht/none/x/manifest.json", f"/dht/{TARGET}/vmlinuz", "/dht/..%2f../x", "/dht/%00/%0a", "/dht/x/" + "y" * 5000,
    "/events", "/events", "/metrics", "/boot.ipxe", "/boot.ipxe?channel=stable", "/boot.ipxe?channel=%0d%0aX:%20y",
    "/boot.ipxe?channel=%ff&channel=", f"/{TARGET}/boot.ipxe", "/style.css", "/page.js?x", "/icon.svg", "/events/..",
    f"/{TARGET}/%0d%0aX:%20y", f"/{TARGET}/vmlinuz?a=%00#b", "/" + "x" * 9000, "/%", "/%u0041/a/b", "http://[::1/x",
)  # fmt: skip
HEADERS = (
    "Range: bytes=0-0", "Range: bytes=5-", "Range: bytes=-5", "Range: bytes=-0", "Range: bytes=-", "Range: bytes=9-3",
    "Range: bytes=0-1,3-4", "Range: bytes=99999999-", "Range: bytes=0-" + "9" * 4400, "Range: items=0-1",
    "Range: bytes=\u0661-", "Range: bytes=0-0\r\nRange: bytes=1-1", f'If-Range: "{SHA256}"', "If-Range: x",
    f'If-None-Match: "{SHA256}"', "If-None-Match: *", f'If-None-Match: W/"{SHA256}"', "If-Match: x", 'If-Match: "a',
    'If-Match: "' + "a" * 4000, "If-Modified-Since: x", "Content-Length: 5", "Content-Length: -1", "Content-Length: x",
    "Content-Length: 99999999999999999999", "Transfer-Encoding: chunked", "Transfer-Encoding: x", "Connection: close",
    "Connection: upgrade\r\nUpgrade: websocket", "Upgrade: h2c", "Expect: 100-continue", "Expect: x", "Cookie: a=\x01",
    "Content-Encoding: gzip", "Content-Type: multipart/form-data; boundary=", "Host: x", "Host: a\x00b", "X: \xff",
    "X-Long: " + "y" * 9000, "A: b\r\n" * 200 + "C: d", " folded: x", "NoColon", ": x", "X\x00: y", "Accept: br",
    "Accept: application/openmetrics-text", "Accept: application/openmetrics-text; version=\u0661", "Accept: ;;,=q;",
    "Last-Event-ID: 5", "Accept: text/event-stream",
)  # fmt: skip
BODIES = (b"", b"", b"hello", b"5\r\nhello\r\n0\r\n\r\n", b"fffffffff\r\n", b"-1\r\n", b"0\r\n" * 50)
STATUSES = {200, 206, 304, 307, 400, 403, 404, 405, 412, 414, 416, 417, 431, 502, 503}
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
# Where one answer of a connection ends and the next begins: no file and no name here has such a line.
_STATUS_LINE = re.compile(rb"HTTP/\d\.\d (\d{3}) [^\r\n]*\r\n")


class Connection(asyncio.Transport):
    """One client's connection: what the server writes is kept."""

    def __init__(self, loop: asyncio.AbstractEventLoop, owner: Any) -> None:
        super().__init__()
        self.written = bytearray()
        self.loop = loop
        self.owner = owner
        self.closing = self.paused = False
        owner.connection_made(self)

    def write(self, data: Any) -> None:
        if not self.closing:
            self.written += data

    def writelines(self, list_of_data: Any) -> None:
        for data in list_of_data:
            self.write(data)

    def close(self) -> None:
        if not self.closing:
            self.closing = True
            self.loop.call_soon(self.owner.connection_lost, None)

    abort = close

    def is_closing(self) -> bool:
        return self.closing

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False

    def is_reading(self) -> bool:
        return not self.paused

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """There is no buffer."""

    def get_write_buffer_size(self) -> int:
        return 0

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return ("10.0.0.1", 4711) if name in ("peername", "sockname") else default


class Door:
    """What listens: it has an address, and can be closed."""

    def __init__(self) -> None:
        self.sockets = [self]

    def getsockname(self) -> tuple[str, int]:
        return "10.0.0.9", 8080

    def close(self) -> None:
        """Nothing comes of itself."""

    async def wait_closed(self) -> None:
        """It is closed at once."""


class DoorLoop(LineLoop):
    """A virtual-time loop whose TCP servers are doors: `accept` makes who talks to one client."""

    accept: Any

    async def create_server(self, protocol_factory: Any, *args: Any, **options: Any) -> Any:
        self.accept = protocol_factory
        return Door()


class Server(Stage):
    """The application with a folder of files, some of which must never leave."""

    def __init__(self) -> None:
        super().__init__(DoorLoop())
        self._folder = tempfile.TemporaryDirectory(prefix="plasm-fuzz-")
        root = Path(self._folder.name) / "root"
        target = root / TARGET
        target.mkdir(parents=True)
        (target / "vmlinuz").write_bytes(CONTENT)
        (target / "empty").touch()
        (target / ".secret").write_bytes(SECRET)
        (root.parent / "outside").write_bytes(SECRET)
        (target / "way-out").symlink_to(root.parent / "outside")
        (target / "changed").write_bytes(CONTENT)
        (target / "cmdline").write_text("console=ttyS0 ; # || ${x}")
        artifacts = ArtifactScanner(root).scan().found[TARGET]
        (target / "changed").write_bytes(SECRET)  # after it was hashed
        self.requests = 0
        self.statuses: Counter[int] = Counter()
        self.node = self._node()
        self.runner, _ = self.run(web.serve(self._application(Page(artifacts, MANIFEST)), "10.0.0.9", 8080))
        self.server: Any = self.runner.server
        self.base = len(asyncio.all_tasks(self.loop))
        self.descriptors = descriptors()
        self.built()

    def _node(self) -> PlasmServer:
        """A node that holds records of somebody who is trusted and of others, and has nobody to ask."""
        node = PlasmServer(node_id=b"\x55" * 20, clock=HalfManualClock())
        self.run(node.listen(8468))
        name = record_name(TARGET)
        trusted, other = (Pointer(url, "1", HOSTILE, bytes(32), 1).encode() for url in (TRUSTED, OTHER))
        for by, value in zip(IDENTITIES, (trusted, other, b"no pointer"), strict=False):
            node.storage.store(shared_key(name), record(value, by=by, name=name, life=LIFE).envelope)
        return node

    def _application(self, target: Page) -> web.Application:
        """All that a provider answers over HTTP."""
        site = Site(HOSTILE, {TARGET: target}, status=lambda: STATUS)
        app = web.create_app(site)
        table = self.node.protocol.router.__class__(None, 20, self.node.node, self.node.clock)
        table.add_contact(Contact(b"\x01" * 20, "2001:db8::1", 8468))
        journal = Journal(self.node.clock.now)
        journal.note("published", HOSTILE, HOSTILE)
        gateway.add_to(app, gateway.Gateway(self.node, table, [IDENTITIES[0].publisher_id]))
        page.add_to(app, table, journal, lambda target: [HOSTILE])
        self.feed = app[page.FEED]
        site.metrics = Exposition(self.node, site.traffic).render
        return app

    async def play(self, source: Source) -> None:
        """One connection with up to four requests in it, in pieces."""
        connection = Connection(self.loop, cast(DoorLoop, self.loop).accept())
        expected: list[tuple[int, bytes] | None] = []
        for _ in range(1 + source.below(4)):
            data, answer = self._request(source)
            expected.append(answer)
            self.requests += 1
            cut = source.below(len(data) + 1) if source.one_in(4) else len(data)
            for piece in (data[:cut], data[cut:]):
                if piece and not connection.closing:
                    connection.owner.data_received(piece)
                    if source.below(2):
                        await self.settle()
        await self.settle()
        if source.one_in(16):
            await asyncio.sleep(source.pick((0.1, 3.0, 16.0, 100.0)))
        self._check(bytes(connection.written), expected)
        if not connection.closing:
            connection.owner.eof_received()
            connection.close()
        await self.settle()
        await asyncio.sleep(2 * page.TICK)  # so long the place of a page that was closed is kept
        left = len(asyncio.all_tasks(self.loop))
        require(left <= self.base + 1, f"{left} tasks are left by a client that has gone")

    def _request(self, source: Source) -> tuple[bytes, tuple[int, bytes] | None]:
        """The bytes, and what must come back when that is known."""
        kind = source.below(8)
        if kind == 0:
            return source.some() * source.pick((1, 1, 500)), None
        if kind == 1:
            start, length = source.below(len(CONTENT)), source.below(len(CONTENT))
            head = f"GET /{TARGET}/vmlinuz HTTP/1.1\r\nHost: x\r\nRange: bytes={start}-{start + length}\r\n\r\n"
            return head.encode(), (206, CONTENT[start : start + length + 1])
        if kind > 4:  # else most requests would be refused before anything looks at what is asked for
            header = f"{source.pick(HEADERS)}\r\n" if source.below(2) else ""
            return f"GET {source.pick(PATHS)} HTTP/1.1\r\nHost: x\r\n{header}\r\n".encode(), None
        lines = [f"{source.pick(METHODS)} {source.pick(PATHS)} HTTP/{source.pick(('1.1', '1.1', '1.0', '2.0', '9'))}"]
        lines += ["Host: x", *(source.pick(HEADERS) for _ in range(source.below(4)))]
        data = ("\r\n".join(lines) + "\r\n\r\n").encode("utf-8", "surrogateescape")
        data += source.pick(BODIES)
        return (mutated(source, data) if kind == 2 else data), None

    def _check(self, answer: bytes, expected: list[tuple[int, bytes] | None]) -> None:
        require(SECRET not in answer and b"root:" not in answer, "a file that is not served has left")
        require(b"Traceback" not in answer and b"/plasm_dht/" not in answer, "what happens inside is shown")
        require(b"\r\nX: y" not in answer, "a header was put in by the client")
        answer = answer.replace(_CONTINUE, b"")
        if not answer:
            return
        starts = [line.start() for line in _STATUS_LINE.finditer(answer)]
        require(starts and starts[0] == 0, f"no HTTP: {answer[:100]!r}")
        for start, end in zip(starts, [*starts[1:], len(answer)], strict=True):
            self._check_one(answer[start:end])
        if expected[0] is not None:  # the first one met a fresh connection
            status, content = expected[0]
            head, _, body = answer.partition(b"\r\n\r\n")
            require(answer[9:12] == b"%d" % status, f"{answer[:20]!r} instead of {status}")
            require(b"\r\nContent-Length: %d\r\n" % len(content) in head, f"another length: {head!r}")
            require(body.startswith(content), "another range than the one that was asked for")

    def _check_one(self, answer: bytes) -> None:
        status = int(answer[9:12])
        self.statuses[status] += 1
        head, _, body = answer.partition(b"\r\n\r\n")
        require(b"<img" not in body or b"text/html" not in head, "a name is markup")
        location = re.search(rb"\r\nLocation: ([^\r\n]*)", head)
        require(location is None or location[1] == TRUSTED.encode(), f"a client is sent to {head!r}")
        require(status in STATUSES, f"status {status}: {answer[:300]!r}")

    def check(self) -> None:
        """No descriptor stays open, no connection and no page is remembered."""
        require(len(self.server.connections) <= 1, f"{len(self.server.connections)} connections are remembered")
        require(not self.feed.listeners, f"{len(self.feed.listeners)} pages that were closed are kept up to date")
        require(descriptors() <= self.descriptors + 2, f"{descriptors()} descriptors, {self.descriptors} at first")

    def end(self) -> None:
        """Stop the server; nothing of it may be left."""
        self.check()
        try:
            self.run(self.runner.cleanup())
            self.run(self.node.close())
        finally:
            super().end()
            self._folder.cleanup()


def descriptors() -> int:
    """How many files and sockets this process has open."""
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208  # no path is wanted
