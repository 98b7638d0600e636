"""HTTP clients that lie, stall, flood and never end, over raw sockets: each has an end, and the others are served."""

import asyncio
import logging
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from plasm_dht.provider import web
from plasm_dht.provider.artifacts import ArtifactFile, ArtifactScanner, ArtifactSet
from plasm_dht.provider.door import Connection, Door, Limits
from plasm_dht.provider.site import Page, Site
from plasm_dht.provider.web import create_app, serve

TARGET = "stable/arm64"
FILE = f"/{TARGET}/vmlinuz"
CONTENT = bytes(range(256)) * 64
MANIFEST = b"{" + b" " * 900_000 + b"}"
SECRET = b"TOP SECRET"
LARGE = 64 * 2**20  # more than the system's buffers take
HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
# An event that is waited for comes at once; this is for a machine with other things to do (s).
PATIENCE = 20.0


@pytest.fixture
def site(tmp_path: Path) -> Site:
    folder = tmp_path / "root" / TARGET
    folder.mkdir(parents=True)
    (folder / "vmlinuz").write_bytes(CONTENT)
    (folder / ".secret").write_bytes(SECRET)
    (tmp_path / "outside").write_bytes(SECRET)
    (kernel,) = ArtifactScanner(tmp_path / "root").scan().found[TARGET].files
    with (folder / "rootfs").open("wb") as file:
        file.truncate(LARGE)
    stamp = (folder / "rootfs").stat().st_mtime_ns
    rootfs = ArtifactFile("rootfs", "rootfs", folder / "rootfs", LARGE, "0" * 64, stamp)  # not hashed: it takes long
    return Site("rack-7", {TARGET: Page(ArtifactSet(TARGET, "1", (kernel, rootfs)), MANIFEST)})


@asynccontextmanager
async def serving(site: Site) -> AsyncIterator[int]:
    """The port of a server with the limits that hold now."""
    runner, port = await serve(create_app(site), "127.0.0.1", 0)
    try:
        yield port
    finally:
        await runner.cleanup()


@pytest.fixture
async def port(site: Site) -> AsyncIterator[int]:
    async with serving(site) as port:
        yield port


class Client:
    """A raw connection that reads nothing until it is told to."""

    def __init__(self, port: int, source: str = "127.0.0.1") -> None:
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.socket.bind((source, 0))
        self.socket.setblocking(False)
        self.port = port

    async def __aenter__(self) -> "Client":
        await asyncio.get_running_loop().sock_connect(self.socket, ("127.0.0.1", self.port))
        return self

    async def __aexit__(self, *_: object) -> None:
        self.socket.close()

    async def send(self, data: bytes) -> bool:
        """Whether all of it was taken before the other side ended the connection."""
        try:
            async with asyncio.timeout(PATIENCE):
                await asyncio.get_running_loop().sock_sendall(self.socket, data)
        except ConnectionError:
            return False
        return True

    async def read(self) -> bytes:
        """What comes until the other side ends it; a reset ends it too."""
        got = bytearray()
        async with asyncio.timeout(PATIENCE):
            try:
                while data := await asyncio.get_running_loop().sock_recv(self.socket, 2**16):
                    got += data
            except ConnectionError:
                pass
        return bytes(got)

    async def line(self, end: bytes = b"\n") -> bytes:
        """What comes up to this end; the rest stays where it is."""
        got = b""
        async with asyncio.timeout(PATIENCE):
            while not got.endswith(end) and (byte := await asyncio.get_running_loop().sock_recv(self.socket, 1)):
                got += byte
        return got


async def ask(port: int, request: bytes, source: str = "127.0.0.1") -> bytes:
    """All of the answer to a request, however long."""
    async with Client(port, source) as client:
        await client.send(request)
        return await client.read()


def get(path: str | bytes, *headers: bytes) -> bytes:
    target = path if isinstance(path, bytes) else path.encode()
    return b"\r\n".join([b"GET " + target + b" HTTP/1.1", b"Host: x", b"Connection: close", *headers, b"", b""])


async def trickle(client: Client) -> None:
    """A byte now and then, each before any time is over, until the other side has had enough."""
    for _ in range(int(PATIENCE / 0.02)):
        if not await client.send(b"a"):
            return
        await asyncio.sleep(0.02)
    pytest.fail(f"the connection was still open after {PATIENCE} s")


async def is_served_again(port: int, source: str = "127.0.0.1") -> None:
    """Waits for room."""
    for _ in range(int(PATIENCE / 0.02)):
        if await is_served(port, source):
            return
        await asyncio.sleep(0.02)
    pytest.fail(f"there was still no room after {PATIENCE} s")


async def is_served(port: int, source: str = "127.0.0.1") -> bool:
    return (await ask(port, get("/health"), source)).startswith(b"HTTP/1.1 200")


# Slow ones


@pytest.mark.parametrize("start", [b"", b"GET /", b"GET / HTTP/1.1\r\nHost: x\r\nX-Slow: "])
async def test_a_request_that_is_never_finished_is_cut_off_however_busy_its_client_is(
    site: Site, monkeypatch: pytest.MonkeyPatch, start: bytes
) -> None:
    monkeypatch.setattr(web, "KEEPALIVE", 0.3)
    async with serving(site) as port, Client(port) as client, asyncio.timeout(PATIENCE):
        await client.send(start)
        if start:
            await trickle(client)
        assert await client.read() == b""


async def test_the_next_request_on_a_connection_has_the_same_time(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "KEEPALIVE", 0.3)
    async with serving(site) as port, Client(port) as client, asyncio.timeout(PATIENCE):
        await client.send(HEALTH)
        assert (await client.line()).startswith(b"HTTP/1.1 200")
        await client.send(b"GET / HTTP/1.1\r\nX: ")
        await trickle(client)


@pytest.mark.parametrize("path", [f"/{TARGET}/rootfs", f"/{TARGET}/manifest.json"])
async def test_a_client_that_takes_nothing_is_let_go_and_makes_room(
    site: Site, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setattr(web, "STALL", 0.3)
    monkeypatch.setattr(web, "MAX_CONNECTIONS", 1)
    request = f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    async with serving(site) as port, Client(port) as client:
        await client.send(request * 20)  # of the manifest one fits the system's buffers
        assert await client.line() == b"HTTP/1.1 200 OK\r\n"
        assert not await is_served(port)
        await is_served_again(port)
        assert len(await client.read()) < LARGE


class Farewell(asyncio.Protocol):
    """A handler that says a little more than the system's buffers take, and closes: it does not wait."""

    def __init__(self, ended: asyncio.Event) -> None:
        self.ended = ended

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        while not transport.get_write_buffer_size():
            transport.write(bytes(1024))
        transport.close()

    def pause_writing(self) -> None: ...

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended.set()


async def test_what_is_unsent_when_the_connection_is_closed_does_not_keep_it() -> None:
    ended = asyncio.Event()
    door = Door(Limits(connections=1, per_source=1, unanswered=9, stall=0.2, refusal=b"busy"))
    server = await door.listen(lambda: Farewell(ended), "127.0.0.1", 0)
    async with Client(server.sockets[0].getsockname()[1]), asyncio.timeout(PATIENCE):
        await ended.wait()
    server.close()
    await server.wait_closed()


# Many of them


async def test_no_more_connections_than_the_bound_also_when_they_come_at_one_moment(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web, "MAX_CONNECTIONS", 5)
    async with serving(site) as port:
        clients = [Client(port) for _ in range(100)]
        await asyncio.gather(*(client.__aenter__() for client in clients))
        await asyncio.gather(*(client.send(HEALTH) for client in clients))
        lines = await asyncio.gather(*(client.line() for client in clients))
        assert sorted({line.split()[1] for line in lines}) == [b"200", b"503"]
        assert sum(line.startswith(b"HTTP/1.1 200") for line in lines) == 5
        for client in clients:
            client.socket.close()
        await is_served_again(port)


async def test_one_address_cannot_take_the_connections_of_the_others(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web, "MAX_PER_ADDRESS", 3)
    async with serving(site) as port:
        clients = [await Client(port, "127.0.0.7").__aenter__() for _ in range(3)]
        for client in clients:
            await client.send(HEALTH)
            assert (await client.line()).startswith(b"HTTP/1.1 200")
        refused = await ask(port, get("/health"), "127.0.0.7")
        assert refused.startswith(b"HTTP/1.1 503")
        assert b"\r\nRetry-After: 5\r\n" in refused
        assert await is_served(port, "127.0.0.8")
        clients.pop().socket.close()
        await is_served_again(port, "127.0.0.7")
        for client in clients:
            client.socket.close()
        await asyncio.gather(*(is_served_again(port, "127.0.0.7") for _ in range(3)))


class Wire(asyncio.Transport):
    """A connection from a peer that says nothing and is told nothing."""

    is_cut_off = False

    def __init__(self, peer: object) -> None:
        super().__init__({"peername": peer})

    def abort(self) -> None:
        self.is_cut_off = True

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None: ...

    def write(self, data: object) -> None: ...

    def close(self) -> None: ...


class Noted(asyncio.Protocol):
    """A handler that notes its connection."""

    def __init__(self, entered: list[object]) -> None:
        self.entered = entered

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.entered.append(transport)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (("192.0.2.1", 1), ("192.0.2.1", 2), True),
        (("192.0.2.1", 1), ("192.0.2.2", 1), False),
        (("2001:db8::1", 1, 0, 0), ("2001:db8::ffff:1", 1, 0, 0), True),
        (("2001:db8:0:1::1", 1, 0, 0), ("2001:db8:0:2::1", 1, 0, 0), False),
        (("fe80::1%eth0", 1, 0, 2), ("fe80::2%eth0", 1, 0, 2), False),
        (("::ffff:192.0.2.1", 1, 0, 0), ("::ffff:192.0.2.2", 1, 0, 0), False),
        (None, ("192.0.2.1", 1), False),
    ],
)
def test_a_share_is_of_an_ipv4_address_or_of_an_ipv6_64(one: object, other: object, same: bool) -> None:
    limits = Limits(connections=9, per_source=1, unanswered=9, stall=9, refusal=b"")
    door = Door(limits)
    entered: list[object] = []
    connections = [(Connection(door, limits, Noted(entered)), Wire(peer)) for peer in (one, other)]
    for connection, wire in connections:
        connection.connection_made(wire)
    assert len(entered) == (1 if same else 2)
    for connection, _ in connections:
        connection.connection_lost(None)
    assert not door._shares  # nor does it remember who has come


# Floods of one connection


@pytest.mark.parametrize(
    "flood",
    [
        pytest.param(b"GET / HTTP/1.1\r\nA: " + b"a" * 2**20, id="one header of 1 MiB"),
        pytest.param(b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 100_000, id="100,000 headers"),
        pytest.param(b"GET / HTTP/1.1\r\n" + (b"A: " + b"b" * 8000 + b"\r\n") * 120, id="120 headers of 8,000 bytes"),
        pytest.param(b"GET /" + b"a" * 2**20, id="a request line of 1 MiB"),
        pytest.param(b"nonsense\r\n\r\n" * 100_000, id="nonsense"),
        pytest.param(b"\x16\x03\x01" + b"\x00" * 2**20, id="something like TLS"),
    ],
)
async def test_a_head_without_end_ends_the_connection(port: int, flood: bytes) -> None:
    async with Client(port) as client, asyncio.timeout(PATIENCE):
        while await client.send(flood):  # the client would go on for ever
            pass
    assert await is_served(port)


async def test_a_head_is_cut_off_at_its_bound_and_not_one_byte_before(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = get("/health", *[b"A: " + b"b" * 1000] * 100)
    monkeypatch.setattr(web, "MAX_UNANSWERED", len(head))
    async with serving(site) as port:
        assert (await ask(port, head)).startswith(b"HTTP/1.1 200")
        assert await ask(port, head.replace(b"A: ", b"AA: ", 1)) == b""


def test_a_head_that_comes_byte_by_byte_has_the_same_bound() -> None:
    limits = Limits(connections=9, per_source=9, unanswered=9, stall=9, refusal=b"")
    wire = Wire(("192.0.2.1", 1))
    connection = Connection(Door(limits), limits, Noted([]))
    connection.connection_made(wire)
    for sent in range(1, 11):
        connection.data_received(b"x")
        assert wire.is_cut_off is (sent > 9)


async def test_what_was_answered_does_not_count_against_the_next_request(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web, "MAX_UNANSWERED", 2 * len(HEALTH))
    async with serving(site) as port, Client(port) as client:
        for _ in range(10):
            await client.send(HEALTH)
            assert (await client.line(b"}")).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("count", [2, 500])
async def test_pipelined_requests_are_answered_in_turn(port: int, count: int) -> None:
    answer = await ask(port, HEALTH * (count - 1) + get("/health"))
    assert answer.count(b"HTTP/1.1 200 OK\r\n") == count


@pytest.mark.parametrize(
    "body",
    [
        b"Content-Length: 1000000000\r\n\r\n" + b"x" * 1000,
        b"Content-Length: 99999999999999999999\r\n\r\n",
        b"Content-Length: -1\r\n\r\n",
        b"Transfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\n",
        b"Transfer-Encoding: chunked\r\n\r\n5\r\nhel",
        b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\nGET /secret HTTP/1.1\r\n\r\n",
        b"Connection: upgrade\r\nUpgrade: websocket\r\n\r\n" + b"\x81" * 1000,
    ],
)
async def test_nobody_waits_for_the_body_of_a_get(port: int, body: bytes) -> None:
    async with asyncio.timeout(5):  # aiohttp would wait 10 s for the rest
        answer = await ask(port, b"GET /health HTTP/1.1\r\nHost: x\r\n" + body)
    assert answer.startswith((b"HTTP/1.1 200", b"HTTP/1.0 400", b"HTTP/1.1 400"))
    assert await is_served(port)


# Odd requests


@pytest.mark.parametrize(
    "path",
    [
        b"/%c0%ae%c0%ae%2f%c0%ae%c0%ae%2foutside/x/y",
        b"/" + TARGET.encode() + b"/%c0%ae%c0%ae%c0%afoutside",
        b"/" + TARGET.encode() + b"/%e0%80%ae%e0%80%ae%2foutside",
        b"/" + TARGET.encode() + b"/%252e%252e%252foutside",
        b"/" + TARGET.encode() + b"/..;/outside",
        b"/" + TARGET.encode() + b"/\xff\xfe",
        b"/" + TARGET.encode() + b"/%u002e%u002e/outside",
        b"/" + TARGET.encode() + b"/vmlinuz%00",
        b"/" + TARGET.encode() + b"/%0d%0aSet-Cookie:%20a=b",
        b"/" + TARGET.encode() + b"/%2esecret",
        b"/" + TARGET.encode() + b"/.%2fvmlinuz",
        b"file:///etc/passwd",
        b"http://evil.example/etc/passwd",
        b"*",
        b"../../outside",
    ],
)
async def test_no_way_of_writing_a_path_leaves_the_artifacts(port: int, path: bytes) -> None:
    answer = await ask(port, get(path))
    assert answer.split(b" ", 2)[1] in (b"400", b"404")
    head, _, body = answer.partition(b"\r\n\r\n")
    assert SECRET not in body
    assert b"root:" not in body
    assert b"Set-Cookie" not in head


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET http://evil.example" + FILE.encode() + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", b"200"),
        (b"GET /health HTTP/1.1\r\nHost: <script>:99999\r\nConnection: close\r\n\r\n", b"200"),
        (b"GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", b"400"),
        (b"GET /health HTTP/1.1\r\nHost: a\x00b\r\n\r\n", b"400"),
        (b"GET /health HTTP/1.1\r\n folded: x\r\n\r\n", b"400"),
        (b"GET /health HTTP/1.1\r\nX : y\r\n\r\n", b"400"),
        (b"GET /health\r\n\r\n", b"200"),
        (b"GET /health HTTP/9.9\r\n\r\n", b"400"),
        (b"FROBNICATE / HTTP/1.1\r\nHost: x\r\n\r\n", b"400"),
        (b"TRACE /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", b"405"),
        (b"CONNECT h:443 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", b"404"),
        (b"OPTIONS * HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", b"404"),
    ],
)
async def test_what_is_no_request_of_a_boot_client_has_an_answer_and_an_end(
    site: Site, monkeypatch: pytest.MonkeyPatch, request_: bytes, status: bytes
) -> None:
    monkeypatch.setattr(web, "KEEPALIVE", 0.2)  # CONNECT is not closed after its answer
    async with serving(site) as port:
        assert (await ask(port, request_)).split(b" ", 2)[1] == status


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([b"Range: bytes=" + b",".join(b"%d-%d" % (i, i) for i in range(700))], b"200"),
        ([b"Range: bytes=" + b",".join([b"0-1"] * 10_000)], b"400"),
        ([b"Range: bytes=-" + b"9" * 4200], b"206"),
        ([b"Range: bytes=" + b"9" * 4200 + b"-"], b"416"),
        ([b"Range: bytes=--5"], b"200"),
        ([b"Range: bytes=0-0", b"Range: bytes=1-1"], b"206"),
        ([b"Range: bytes=0-0", b'If-Range: "x", "y"'], b"200"),
        ([b"Range: bytes=0-0", b'If-Range: "' + b"x" * 8000 + b'"'], b"200"),
        ([b"If-None-Match: " + b'"a",' * 2000], b"200"),
        ([b"If-None-Match: " + b"W/" * 4000], b"200"),
        ([b'If-None-Match: "' + b'"\\' * 4000], b"200"),
    ],
)
async def test_no_range_or_condition_costs_more_than_the_file(port: int, headers: list[bytes], status: bytes) -> None:
    answer = await ask(port, get(FILE, *headers))
    assert answer.split(b" ", 2)[1] == status
    assert len(answer) < len(CONTENT) + 1000


# The log


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Callable[[], str]:
    caplog.set_level(logging.WARNING)  # as the command line does, without -vv
    caplog.set_level(logging.INFO, "plasm_dht")
    return lambda: caplog.text


async def test_nothing_that_a_client_sends_or_does_not_reaches_the_log(
    site: Site, monkeypatch: pytest.MonkeyPatch, logged: Callable[[], str]
) -> None:
    monkeypatch.setattr(web, "STALL", 0.1)
    async with serving(site) as port:
        for request in (
            get("/FORGED%0aFORGED"),
            b"FORGED / HTTP/1.1\r\n\r\n",
            b"GET /\r\nFORGED\r\n\r\n",
            get("/health", b"X: " + b"FORGED" * 3000),
            get("/health", b"User-Agent: FORGED\x1b[2J"),
        ):
            await ask(port, request)
        async with Client(port) as gone:
            await gone.send(f"GET /{TARGET}/rootfs?FORGED HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            await gone.line()
    monkeypatch.setattr(web, "MAX_CONNECTIONS", 1)  # so that others are served when this one has been ended
    async with serving(site) as port, Client(port) as stalled:
        await stalled.send(f"GET /{TARGET}/rootfs?FORGED HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        await stalled.line()
        await is_served_again(port)
    assert "FORGED" not in logged()
    assert "Traceback" not in logged()


async def test_a_client_that_resets_its_download_is_no_error(site: Site, logged: Callable[[], str]) -> None:
    async with serving(site) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(get(f"/{TARGET}/rootfs"))
        await reader.readline()
        await asyncio.sleep(0.2)  # by then the server waits for room to write
        connection = writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
        await is_served_again(port)
        await asyncio.sleep(0.1)  # what is said of it comes a moment later
    assert logged() == ""
