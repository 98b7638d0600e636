"""`fetch` and servers that lie: a real HTTP client on a virtual-time loop, its connections lists of bytes."""

import asyncio
import hashlib
import os
import re
import socket
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from plasm_dht.errors import ArtifactsError, PlasmError, VerificationError
from plasm_dht.provider.fetch import Fetched, Progress, UnavailableError, fetch
from plasm_dht.provider.folder import FolderError
from plasm_dht.provider.manifest import MANIFEST_FILE, Pointer, build_manifest, record_name
from plasm_dht.record import Record
from tests.dht.support import START, record
from tests.fuzz.documents import BY, File, signed, unsigned, varied
from tests.fuzz.guard import Stage, WatchedLoop, require
from tests.fuzz.pages import TARGET, Connection, descriptors
from tests.fuzz.source import TEXTS, Source, mutated
from tests.fuzz.states import MEMORY

HOST = "http://10.0.0.7:8080"
FILES = {"vmlinuz": bytes(range(256)) * 24, "initrd.gz": b"initrd" * 40, "empty": b""}
MANIFEST = build_manifest(
    BY, target=TARGET, version="1.2", base_url=HOST, manifest_version=7, created_at=START,
    files=[File(name, name, len(data), hashlib.sha256(data).hexdigest()) for name, data in FILES.items()],
)  # fmt: skip
SECRET = b"outside"
OTHERS: tuple[dict[str, str], ...] = ({"channel": "edge"}, {"expires_at": "2026-01-01T00:00:00Z"})
STATUSES = (200, 206, 204, 301, 304, 307, 400, 404, 416, 429, 500, 503, 100, 101, 999)
PLACES = (
    f"{HOST}/{TARGET}/vmlinuz", "/", "//10.0.0.8/x", "http://\u2100/", "http://[::1", "file:///etc/passwd", "http://h:x/",
    "https://10.0.0.7/", "", "http://" + "a" * 300 + "/", "http://xn--/", "http://h/\x01", "javascript:x", "http://:0/",
)  # fmt: skip
FIELDS = (
    "Content-Range: bytes 5-9/6144", "Content-Range: bytes */6144", "Content-Range: bytes */7", "Content-Type: ;;",
    "Content-Range: bytes " + "9" * 5000 + "-/*", 'ETag: "' + "0" * 64 + '"', "ETag: W/x", "Transfer-Encoding: chunked",
    "Content-Length: 3", "Content-Length: x", "Content-Length: " + "9" * 5000, "Set-Cookie: a=b\x01", "X: \x00",
    "Connection: upgrade\r\nUpgrade: x", "Transfer-Encoding: gzip, chunked", "X: y\r\n" * 300 + "Z: z",
    "Content-Encoding: gzip", "X" * 9000,
)  # fmt: skip
_ASKED = re.compile(rb"^GET (\S+) HTTP/1.1\r\n(?:.*\r\nRange: bytes=(\d+)-)?", re.DOTALL)


class Peer(Connection):
    """A server's end of one connection: each request is answered as the script says."""

    def __init__(self, loop: "ClientLoop", owner: Any) -> None:
        super().__init__(loop, owner)
        self._answer = loop.answer

    def write(self, data: Any) -> None:
        super().write(data)
        if b"\r\n\r\n" in self.written:
            request = bytes(self.written)
            self.written.clear()
            self.loop.create_task(self._serve(request))

    async def _serve(self, request: bytes) -> None:
        pieces, pause, stays = self._answer(request)
        for piece in pieces:
            await asyncio.sleep(pause)
            if self.closing:
                return
            if piece:
                self.owner.data_received(piece)
        if not stays and not self.closing:
            self.owner.eof_received()
            self.close()


class ClientLoop(WatchedLoop):
    """A virtual-time loop on which every name is known, and every address is that of one server."""

    answer: Callable[[bytes], tuple[Sequence[bytes], float, bool]]
    refuses: Callable[[], bool]

    async def getaddrinfo(self, host: Any, port: Any, **options: Any) -> Any:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.0.0.7", port))]

    async def sock_connect(self, sock: Any, address: Any) -> None:
        if self.refuses():
            raise ConnectionRefusedError(111, "refused")

    async def create_connection(self, protocol_factory: Any, *args: Any, sock: Any = None, **options: Any) -> Any:
        sock.close()
        owner = protocol_factory()
        return Peer(self, owner), owner


class Client(Stage):
    """Whoever fetches, into a folder that is there for one input."""

    def __init__(self) -> None:
        super().__init__(loop := ClientLoop())
        self._temporary = tempfile.TemporaryDirectory(prefix="plasm-fuzz-", dir=MEMORY if MEMORY.is_dir() else None)
        self.root = Path(self._temporary.name)
        self.count = self.refused = 0
        loop.answer, loop.refuses = self._answer, lambda: self._source.one_in(12)
        self._source = Source(b"")
        self.manifests: dict[str, bytes] = {}
        self.run(self.play(Source(b"")))  # everything is imported
        require(not self.refused, "what an honest server sends is refused")
        self.descriptors = descriptors()
        self.built()

    async def play(self, source: Source) -> None:
        """Up to two downloads into one folder, in which something may lie already."""
        self._source = source
        self.count += 1
        self.manifests = {}
        home = self.root / str(self.count)
        folder = home / "folder"
        folder.mkdir(parents=True)
        (home / "outside").write_bytes(SECRET)
        laid = self._lay(folder) if source.below(2) else set()
        for _ in range(1 + source.below(2)):
            try:
                fetched = await fetch(TARGET, folder, find=self._find, now=lambda: START, progress=self._progress)
            except (UnavailableError, VerificationError, FolderError, ArtifactsError) as error:
                self._refused(error)
            else:
                self._complete(fetched, folder)
            self._look(folder, laid)
        require({each.name for each in home.iterdir()} == {"folder", "outside"}, "something was written elsewhere")
        require((home / "outside").read_bytes() == SECRET, "a link was followed")
        await asyncio.sleep(100)  # so long a server may still send
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        require(not tasks, f"tasks are left: {tasks}")
        self._clear(home)

    def _lay(self, folder: Path) -> set[str]:
        """What may lie where a file is going to be. Returns the names of what is nothing of ours."""
        laid = set()
        for _ in range(1 + self._source.below(3)):
            name = self._source.pick((*FILES, MANIFEST_FILE)) + self._source.pick(("", ".part", ".part"))
            path, kind = folder / name, self._source.below(6)
            if path.exists() or path.is_symlink():
                continue
            if kind == 0:
                path.symlink_to("../outside")
            elif kind == 1:
                path.mkdir()
            elif kind == 2:
                os.mkfifo(path)
            else:
                content = FILES.get(name.removesuffix(".part"), MANIFEST)
                path.write_bytes(content[: self._source.below(len(content) + 1)] if kind > 3 else self._source.some())
            laid.add(name)
        return laid

    # -- what is offered ---------------------------------------------------------------------------------------------

    async def _find(self) -> list[Record]:
        """The live records: each leads to a manifest that somebody has signed, whatever it says."""
        return [self._record() for _ in range(1 + self._source.below(3))]

    def _record(self) -> Record:
        source = self._source
        document = signed(varied(source, MANIFEST)) if source.one_in(3) else MANIFEST
        document = mutated(source, document) if source.one_in(8) else document
        if source.one_in(8):  # right, but of something else, or old
            document = signed(
                unsigned(MANIFEST) | source.pick(({"channel": "edge"}, {"expires_at": "2026-01-01T00:00Z"}))
            )
        path = f"/{TARGET}/manifest.json" + (f"?{len(self.manifests)}" if document is not MANIFEST else "")
        self.manifests[path] = document
        size = len(document) + (1 if source.one_in(16) else 0)
        pointer = Pointer(HOST + path, "1.2", "rack-7", hashlib.sha256(document).digest(), size)
        try:
            value = pointer.encode()
        except PlasmError:
            value = b"no pointer"
        value = mutated(source, value) if source.one_in(16) else value
        return record(value, by=BY, name=record_name(TARGET), seq=START + source.below(4))

    # -- what is served ----------------------------------------------------------------------------------------------

    def _answer(self, request: bytes) -> tuple[Sequence[bytes], float, bool]:
        """The pieces of an answer, the pause before each (s), and whether the connection stays open."""
        source = self._source
        asked = _ASKED.match(request)
        require(asked, f"asked in a way that no server knows: {request[:200]!r}")
        assert asked is not None
        path, offset = asked[1].decode("latin-1"), int(asked[2] or 0)
        content = self.manifests.get(path, FILES.get(path.rpartition("/")[2], b"?"))
        if kind := source.below(8):
            data, stays = self._strange(kind, content, offset), source.below(3) == 0
        else:
            data, stays = _right(content, offset), True
        if source.one_in(4):
            cut = source.below(len(data) + 1)
            return (data[:cut], data[cut:]), source.pick((0.0, 0.1, 20.0, 29.0, 31.0, 80.0)), stays
        if source.one_in(8):
            return [data[at : at + 700] for at in range(0, len(data), 700)], source.pick((0.0, 1.0, 12.0)), stays
        return (data[: source.below(len(data) + 1)] if source.one_in(4) else data,), 0.0, stays

    def _strange(self, kind: int, content: bytes, offset: int) -> bytes:
        source = self._source
        if kind == 1:
            return mutated(source, _right(content, offset))
        if kind == 2:
            return _right(mutated(source, content), offset)
        if kind == 3:
            return source.some() * source.pick((1, 1, 3000))
        if kind == 4:
            place = source.pick(PLACES)
            return f"HTTP/1.1 {source.pick((301, 302, 307, 308))} x\r\nLocation: {place}\r\n\r\n".encode()
        if kind == 5:
            body = content[offset:]
            head = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
            return head.encode() + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
        if kind == 6:  # as if nothing had been asked for but a file
            return b"HTTP/1.1 200 OK\r\n\r\n" + content + (b"more" if source.below(2) else b"")
        fields = [source.pick(FIELDS) for _ in range(source.below(3))]
        fields += [f"Content-Range: bytes {offset}-{len(content) - 1}/{len(content)}"] if source.below(2) else []
        fields += [f"X: {source.pick(TEXTS)}"] if source.one_in(4) else []
        line = f"HTTP/1.1 {source.pick(STATUSES)} {source.pick(('x', '', TEXTS[7], TEXTS[9]))}"
        return "\r\n".join([line, *fields, "", ""]).encode("utf-8", "surrogateescape") + content[offset:]

    # -- what must hold ----------------------------------------------------------------------------------------------

    def _progress(self, progress: Progress) -> None:
        require(0 <= progress.done <= progress.size, f"{progress}")

    def _refused(self, error: PlasmError) -> None:
        self.refused += 1
        text = str(error)
        require(text.isprintable() and len(text) < 2000, f"an error of {len(text)} characters: {text[:500]!r}")

    def _complete(self, fetched: Fetched, folder: Path) -> None:
        require((folder / MANIFEST_FILE).read_bytes() in self.manifests.values(), "a manifest that nobody signed")
        manifest = fetched.manifest
        require(
            manifest.target == TARGET and manifest.expires_at > START, f"the manifest of something else: {manifest}"
        )
        for artifact in manifest.artifacts.values():
            path = folder / artifact.filename
            require(path.is_file() and not path.is_symlink(), f"{path.name} is no file")
            require(hashlib.sha256(path.read_bytes()).hexdigest() == artifact.sha256, f"{path.name} is another file")

    def _look(self, folder: Path, laid: set[str]) -> None:
        """Under no final name is anything that was not signed, but what lay there before."""
        for path in folder.iterdir():
            if path.name in laid or path.suffix == ".part":
                continue
            content = path.read_bytes()
            require(content in (*FILES.values(), *self.manifests.values()), f"{path.name!r} is what nobody signed")

    def check(self) -> None:
        """No descriptor stays open."""
        require(descriptors() <= self.descriptors, f"{descriptors()} descriptors, {self.descriptors} at first")

    def _clear(self, home: Path) -> None:
        for folder, folders, files in os.walk(home, topdown=False):
            for name in files:
                (Path(folder) / name).unlink()
            for name in folders:
                path = Path(folder) / name
                path.unlink() if path.is_symlink() else path.rmdir()
        home.rmdir()

    def end(self) -> None:
        """Nothing of it may be left."""
        try:
            self.check()
        finally:
            super().end()
            self._temporary.cleanup()


def _right(content: bytes, offset: int) -> bytes:
    """What a provider of ours answers."""
    if offset:
        head = f"206 Partial Content\r\nContent-Range: bytes {offset}-{len(content) - 1}/{len(content)}"
        if offset >= len(content):
            head, content = f"416 x\r\nContent-Range: bytes */{len(content)}", b""
    else:
        head = "200 OK"
    digest = hashlib.sha256(content).hexdigest()
    etag = f'\r\nETag: "{digest}"'
    return f"HTTP/1.1 {head}\r\nContent-Length: {len(content[offset:])}{etag}\r\n\r\n".encode() + content[offset:]
