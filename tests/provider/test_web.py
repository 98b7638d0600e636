"""The HTTP application over real sockets: what is served, what is refused, and that it never contradicts itself."""

import asyncio
import hashlib
import json
import os
import socket
from pathlib import Path

import aiohttp
import pytest

from plasm_dht.errors import ListenError
from plasm_dht.provider import web
from plasm_dht.provider.artifacts import ArtifactScanner, ArtifactSet
from plasm_dht.provider.site import Page, Site
from plasm_dht.provider.web import create_app, serve

TARGET = "stable/arm64"
CONTENT = bytes(range(256)) * 4096  # 1 MiB: several chunks
SHA256 = hashlib.sha256(CONTENT).hexdigest()
MANIFEST = b'{"version": "1"}\n'


@pytest.fixture
def root(tmp_path) -> Path:
    folder = tmp_path / "root" / TARGET
    folder.mkdir(parents=True)
    (folder / "vmlinuz").write_bytes(CONTENT)
    (folder / "a b é#?.txt").write_bytes(b"odd")
    (folder / "empty").touch()
    (folder / ".secret").write_bytes(b"TOP SECRET")
    (tmp_path / "outside").write_bytes(b"TOP SECRET")
    (folder / "way-out").symlink_to(tmp_path / "outside")
    return tmp_path / "root"


@pytest.fixture
def kernel(root) -> Path:
    return root / TARGET / "vmlinuz"


@pytest.fixture
def site(root) -> Site:
    artifacts = ArtifactScanner(root).scan().found[TARGET]
    return Site("rack <7>", {TARGET: Page(artifacts, MANIFEST)}, status=lambda: {"peers": 3})


@pytest.fixture
async def port(site):
    runner, port = await serve(create_app(site), "127.0.0.1", 0)
    yield port
    await runner.cleanup()


@pytest.fixture
async def client(port):
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}", auto_decompress=False) as session:
        yield session


async def raw(port: int, request: bytes) -> bytes:
    """The whole answer to bytes that no well-behaved client sends."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request)
        async with asyncio.timeout(5):
            return await reader.read()
    finally:
        writer.close()


def get(path: str, *headers: str) -> bytes:
    return "\r\n".join([f"GET {path} HTTP/1.1", "Host: x", "Connection: close", *headers, "", ""]).encode()


FILE = f"/{TARGET}/vmlinuz"

# Whole files


async def test_a_file_is_served_with_the_hash_as_its_etag(client):
    async with client.get(FILE) as response:
        assert response.status == 200
        assert await response.read() == CONTENT
        assert response.headers["ETag"] == f'"{SHA256}"'
        assert response.headers["Content-Type"] == "application/octet-stream"
        assert response.headers["Accept-Ranges"] == "bytes"
        assert response.headers["Cache-Control"] == "no-cache"
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert "Last-Modified" not in response.headers


async def test_head_tells_what_get_would(client, site):
    async with client.get(FILE) as got:
        await got.read()
    sent = site.traffic.sent
    async with client.head(FILE, headers={"Range": "bytes=0-1"}) as response:
        assert response.status == 200
        assert await response.read() == b""
        for name in ("ETag", "Content-Length", "Content-Type", "Accept-Ranges", "Cache-Control"):
            assert response.headers[name] == got.headers[name]
    assert site.traffic.sent == sent > 0


async def test_empty_files_and_odd_names_are_served(client):
    async with client.get(f"/{TARGET}/empty") as response:
        assert (response.status, await response.read()) == (200, b"")
    async with client.get(f"/{TARGET}/a%20b%20%C3%A9%23%3F.txt") as response:
        assert (response.status, await response.read()) == (200, b"odd")


async def test_a_compressed_neighbour_is_never_served_in_its_stead(client, root):
    (root / TARGET / "vmlinuz.gz").write_bytes(b"something else")
    async with client.get(FILE, headers={"Accept-Encoding": "gzip, br"}) as response:
        assert await response.read() == CONTENT
        assert "Content-Encoding" not in response.headers


async def test_the_manifest_is_served_as_it_was_built(client):
    async with client.get(f"/{TARGET}/manifest.json") as response:
        assert (response.status, await response.read()) == (200, MANIFEST)
        assert response.headers["Content-Type"].startswith("application/json")
        assert response.headers["Cache-Control"] == "no-cache"
        etag = response.headers["ETag"]
    async with client.get(f"/{TARGET}/manifest.json", headers={"If-None-Match": etag}) as response:
        assert response.status == 304


async def test_what_the_provider_changes_is_served_at_once(client, site):
    site.pages = {}
    async with client.get(FILE) as response:
        assert response.status == 404
    site.pages = {TARGET: Page(ArtifactSet(TARGET, "2", ()), b"{}")}
    async with client.get(f"/{TARGET}/manifest.json") as response:
        assert await response.read() == b"{}"


# Conditions and ranges


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"If-None-Match": f'"{SHA256}"'}, 304),
        ({"If-None-Match": f'W/"{SHA256}"'}, 304),
        ({"If-None-Match": f'"x", "{SHA256}"'}, 304),
        ({"If-None-Match": "*"}, 304),
        ({"If-None-Match": '"other"'}, 200),
        ({"If-Match": f'"{SHA256}"'}, 200),
        ({"If-Match": "*"}, 200),
        ({"If-Match": f'W/"{SHA256}"'}, 412),
        ({"If-Match": '"other"'}, 412),
        ({"If-Modified-Since": "Fri, 01 Jan 2100 00:00:00 GMT"}, 200),
    ],
)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_the_hash_alone_decides_a_condition(client, headers, status, method):
    async with client.request(method, FILE, headers=headers) as response:
        assert response.status == status
        assert response.headers["ETag"] == f'"{SHA256}"'


SIZE = len(CONTENT)


@pytest.mark.parametrize(
    ("asked", "start", "end"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=100-299999", 100, 300_000),
        ("bytes=1000000-", 1_000_000, SIZE),
        ("bytes=-5", SIZE - 5, SIZE),
        ("bytes=0-99999999", 0, SIZE),
        ("bytes=-99999999", 0, SIZE),
    ],
)
async def test_a_range_is_exactly_that_part(client, asked, start, end):
    async with client.get(FILE, headers={"Range": asked}) as response:
        assert response.status == 206
        assert response.headers["Content-Range"] == f"bytes {start}-{end - 1}/{SIZE}"
        assert await response.read() == CONTENT[start:end]


@pytest.mark.parametrize("asked", [f"bytes={SIZE}-", "bytes=99999999-999999999", "bytes=-0", "bytes=-00"])
async def test_a_range_without_a_byte_of_the_file_is_refused_with_the_size(client, asked):
    async with client.get(FILE, headers={"Range": asked}) as response:
        assert response.status == 416
        assert response.headers["Content-Range"] == f"bytes */{SIZE}"


@pytest.mark.parametrize(
    "asked", ["bytes=0-1,4-5", "bytes=5-2", "lines=1-2", "bytes=a-b", "bytes=-", "", "bytes=" + "9" * 5000 + "-"]
)
async def test_a_range_that_cannot_be_used_is_ignored(client, asked):
    async with client.get(FILE, headers={"Range": asked}) as response:
        assert (response.status, await response.read()) == (200, CONTENT)


@pytest.mark.parametrize(
    ("condition", "status"),
    [(f'"{SHA256}"', 206), ('"other"', 200), (f'W/"{SHA256}"', 200), ("Fri, 01 Jan 2100 00:00:00 GMT", 200)],
)
async def test_a_download_is_resumed_only_while_the_content_is_the_same(client, condition, status):
    async with client.get(FILE, headers={"Range": "bytes=10-", "If-Range": condition}) as response:
        assert response.status == status
        assert await response.read() == (CONTENT[10:] if status == 206 else CONTENT)


# Files that change


async def test_a_file_that_was_changed_is_not_served_as_what_it_was(client, kernel):
    os.utime(kernel, ns=(0, 0))
    for method in ("GET", "HEAD"):
        async with client.request(method, FILE) as response:
            assert response.status == 503
            assert response.headers["Retry-After"] == "1"
    kernel.unlink()
    async with client.get(FILE) as response:
        assert response.status == 503
        assert "has just changed" in await response.text()
        assert "ETag" not in response.headers


async def test_a_file_that_became_a_link_or_a_pipe_is_not_followed(client, kernel, tmp_path):
    status = kernel.stat()
    kernel.rename(tmp_path / "same")  # the same size and time, so only the link itself tells
    kernel.symlink_to(tmp_path / "same")
    assert kernel.stat().st_mtime_ns == status.st_mtime_ns
    async with client.get(FILE) as response:
        assert response.status == 503
    kernel.unlink()
    os.mkfifo(kernel)
    async with client.get(FILE) as response:
        assert response.status == 503


async def test_a_replaced_file_does_not_disturb_a_download_that_has_begun(client, kernel, monkeypatch):
    monkeypatch.setattr(web, "_CHUNK", 1024)
    async with client.get(FILE) as response:
        fresh = kernel.with_name(".fresh")
        fresh.write_bytes(b"new")
        fresh.replace(kernel)
        assert await response.read() == CONTENT


async def test_a_file_that_is_cut_off_ends_the_connection_so_that_the_client_notices(client, kernel, monkeypatch):
    pread = os.pread

    def cut(descriptor: int, size: int, offset: int) -> bytes:
        data = pread(descriptor, size, offset)
        os.truncate(kernel, 10)
        return data

    monkeypatch.setattr(os, "pread", cut)
    with pytest.raises(aiohttp.ClientError):
        async with asyncio.timeout(5), client.get(FILE) as response:
            await response.read()


# What is refused


@pytest.mark.parametrize(
    "path",
    [
        f"/{TARGET}/../../../outside",
        f"/{TARGET}/..%2F..%2F..%2Foutside",
        f"/{TARGET}/%2e%2e/%2e%2e/%2e%2e/outside",
        f"/{TARGET}/..%5c..%5coutside",
        f"/{TARGET}/%2Fetc%2Fpasswd",
        f"/{TARGET}//etc/passwd",
        f"/{TARGET}/vmlinuz%00.txt",
        f"/{TARGET}/vmlinuz/",
        f"/{TARGET}/.secret",
        f"/{TARGET}/way-out",
        f"/{TARGET}/VERSION",
        f"/{TARGET}/",
        f"/{TARGET}",
        "/stable/../stable/arm65/vmlinuz",
        "/..%2f..%2fetc/passwd/x",
        "//etc/passwd",
        "/%ff/%fe/%fd",
        "/etc/passwd",
    ],
)
async def test_nothing_but_the_artifacts_can_be_had(port, path):
    answer = await raw(port, get(path))
    assert answer.split(b" ", 2)[1] in (b"400", b"404")
    assert b"TOP SECRET" not in answer
    assert b"root:" not in answer  # the first line of /etc/passwd


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
@pytest.mark.parametrize("path", ["/boot.ipxe", "/health", FILE, f"/{TARGET}/manifest.json"])
async def test_other_methods_are_refused(client, method, path):
    async with client.request(method, path) as response:
        assert response.status == 405
        assert response.headers["Allow"] == "GET,HEAD"


@pytest.mark.parametrize(
    "request_",
    [b"nonsense\r\n\r\n", get("/" + "x" * 20_000), get("/", "X: " + "y" * 20_000), get("/", *["A: b"] * 500)],
)
async def test_a_request_that_is_none_or_too_large_is_refused(port, request_):
    assert (await raw(port, request_)).startswith((b"HTTP/1.1 400", b"HTTP/1.0 400", b"HTTP/1.1 431", b"HTTP/1.1 414"))


async def test_a_client_that_never_finishes_its_request_is_let_go(site, monkeypatch):
    monkeypatch.setattr(web, "KEEPALIVE", 0.2)
    runner, port = await serve(create_app(site), "127.0.0.1", 0)
    assert await raw(port, b"GET / HTTP/1.1\r\nHost: x\r\nX-Slow: ") == b""
    await runner.cleanup()


async def test_connections_above_the_bound_are_refused_and_those_below_go_on(site, monkeypatch):
    monkeypatch.setattr(web, "MAX_CONNECTIONS", 2)
    runner, port = await serve(create_app(site), "127.0.0.1", 0)
    held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
    for _, writer in held:
        writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    for reader, _ in held:
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
    assert (await raw(port, b"")).startswith(b"HTTP/1.1 503")
    for _, writer in held:
        writer.close()
    await runner.cleanup()


# Health and status


async def test_health_is_ok_or_says_why_not(client, site):
    async with client.get("/health") as response:
        assert (response.status, await response.json()) == (200, {"status": "ok"})
    site.health = lambda: "no neighbour"
    async with client.get("/health") as response:
        assert (response.status, await response.json()) == (503, {"status": "unhealthy", "reason": "no neighbour"})


async def test_status_is_what_the_provider_says(client):
    async with client.get("/status") as response:
        assert (response.status, json.loads(await response.read())) == (200, {"peers": 3})


# The socket


async def test_a_port_in_use_is_one_line_that_names_it(site):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ListenError, match=rf"127\.0\.0\.1:{port}: the port is in use, .*--http-port"):
            await serve(create_app(site), "127.0.0.1", port)


@pytest.mark.parametrize("host", ["192.0.2.1", "host.invalid"])
async def test_an_address_that_is_not_of_this_machine_is_one_line_that_names_it(site, host):
    with pytest.raises(ListenError, match=f"{host}:8080: .*--http-host") as caught:
        await serve(create_app(site), host, 8080)
    assert "\n" not in str(caught.value)


async def test_stopping_waits_for_no_idle_connection(site):
    runner, port = await serve(create_app(site), "127.0.0.1", 0)
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    async with asyncio.timeout(web.SHUTDOWN):
        await runner.cleanup()
    writer.close()
    with pytest.raises(ConnectionError):
        await asyncio.open_connection("127.0.0.1", port)
