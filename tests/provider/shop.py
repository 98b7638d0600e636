"""Providers over real sockets whose every answer a test decides, and the records that lead to them."""

import asyncio
import base64
import hashlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web

from plasm_dht import record
from plasm_dht.identity import Identity
from plasm_dht.provider.fetch import Fetched, Progress, fetch
from plasm_dht.provider.manifest import Pointer, record_name

TARGET = "stable/arm64"
NOW = 1_800_000_000_000
KERNEL = bytes(range(256)) * 4096  # 1 MiB
HALF = len(KERNEL) // 2
INITRD = b"initrd" * 1000

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@dataclass(slots=True)
class Shop:
    """A publisher and its HTTP server. `files` is what it signs; `answers` is what it serves instead."""

    files: dict[str, bytes] = field(default_factory=lambda: {"vmlinuz": KERNEL, "initrd.gz": INITRD})
    identity: Identity = field(default_factory=Identity.generate)
    answers: dict[str, bytes | Answer] = field(default_factory=dict)
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    ranges: bool = True
    seq: int = 1
    url: str = ""
    port: int = 0

    def document(self, **changes: Any) -> dict[str, Any]:
        artifacts = {
            name: {
                "filename": name,
                "hash": f"sha256:{sha256(content)}",
                "size": len(content),
                "urls": [f"{self.url}/{name}"],
            }
            for name, content in self.files.items()
        }
        channel, arch = TARGET.split("/")
        document = {"manifest_version": 1, "version": "1", "channel": channel, "arch": arch, "artifacts": artifacts}
        times = {"created_at": "2026-01-01T00:00:00Z", "expires_at": "2099-02-01T00:00:00Z"}
        return document | times | changes

    def manifest(self, document: dict[str, Any] | None = None) -> bytes:
        """The signed bytes of a document, whatever it says."""
        document = document or self.document()
        data = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
        signature = self.identity.sign(hashlib.sha256(data).digest())
        signatures = [{"keyid": self.identity.publisher_id, "sig": base64.b64encode(signature).decode()}]
        signed = {"signatures": signatures, "signed": {"data": base64.b64encode(data).decode()}}
        return json.dumps(document | signed, ensure_ascii=False).encode()

    def pointer(self, manifest: bytes | None = None) -> bytes:
        manifest = manifest or self.manifest()
        digest = hashlib.sha256(manifest).digest()
        return Pointer(f"{self.url}/manifest.json", "1", "shop", digest, len(manifest)).encode()

    def record(self, manifest: bytes | None = None) -> record.Record:
        self.seq += 1
        return record.sign(
            self.identity,
            record_name(TARGET),
            self.pointer(manifest),
            seq=self.seq,
            issued_at=NOW + self.seq,
            expires_at=NOW + 3_600_000,
        )

    def asked(self, name: str) -> list[str | None]:
        """The ranges of the requests for a file."""
        return [asked for requested, asked in self.requests if requested == name]

    async def answer(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["name"]
        self.requests.append((name, request.headers.get("Range")))
        answer = self.answers.get(name)
        if answer is None:
            answer = self.manifest() if name == "manifest.json" else self.files.get(name)
        if answer is None:
            raise web.HTTPNotFound
        return self.part(request, answer) if isinstance(answer, bytes) else await answer(request)

    def part(self, request: web.Request, content: bytes, headers: dict[str, str] | None = None) -> web.Response:
        """The bytes asked for."""
        start = request.http_range.start if self.ranges else None
        if start is None:
            return web.Response(body=content, headers=headers)
        if start >= len(content):
            return web.Response(status=416, headers={"Content-Range": f"bytes */{len(content)}"})
        where = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        return web.Response(status=206, body=content[start:], headers=(headers or {}) | where)


@asynccontextmanager
async def opened(shop: Shop) -> AsyncIterator[Shop]:
    app = web.Application()
    app.add_routes([web.get("/{name}", shop.answer)])
    runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", shop.port).start()
    shop.port = runner.addresses[0][1]
    shop.url = f"http://127.0.0.1:{shop.port}"
    try:
        yield shop
    finally:
        await runner.cleanup()


def breaks_off(content: bytes, at: int, taken: asyncio.Event) -> Answer:
    """Promises all, sends so much, and ends the connection when that is taken."""

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        response.content_length = len(content)
        await response.prepare(request)
        await response.write(content[:at])
        await taken.wait()
        assert request.transport is not None
        request.transport.close()
        return response

    return answer


def stalls(content: bytes, at: int, reached: asyncio.Event) -> Answer:
    """Sends so much, says so, and then nothing more."""

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        response.content_length = len(content)
        await response.prepare(request)
        await response.write(content[:at])
        reached.set()
        await asyncio.Event().wait()
        return response

    return answer


def endless(size: int) -> Answer:
    """Sends chunks for as long as they are taken."""

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(bytes(size))

    return answer


# -- fetching from them ----------------------------------------------------------------------------------------------


async def load(
    folder: Path, *looks: list[record.Record], report: Callable[[Progress], None] | None = None, now: int = NOW
) -> Fetched:
    """Fetch, where the DHT answers with each of these in turn, and with the last one ever after."""
    left = list(looks)

    async def find() -> list[record.Record]:
        return left.pop(0) if len(left) > 1 else left[0]

    async with asyncio.timeout(20):
        return await fetch(TARGET, folder, find=find, now=lambda: now, progress=report)


def content(folder: Path) -> dict[str, bytes]:
    """What is in the folder, if there is one, less what is unfinished."""
    return {path.name: path.read_bytes() for path in folder.glob("*") if path.suffix != ".part"}


def at_half(reached: asyncio.Event) -> Callable[[Progress], None]:
    """Set the event when half of the kernel is here."""

    def report(progress: Progress) -> None:
        if (progress.filename, progress.done) == ("vmlinuz", HALF):
            reached.set()

    return report


def names(folder: Path | str) -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


def make(folder: Path) -> None:
    folder.mkdir(parents=True)


def left_half(folder: Path, half: bytes = KERNEL[:HALF]) -> None:
    make(folder)
    (folder / "vmlinuz.part").write_bytes(half)
