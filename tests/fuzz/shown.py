"""What the command line shows of what others wrote: one line of text, or JSON, whatever it is."""

import io
import json
import socket
from typing import Any
from unittest import mock

from plasm_dht import Event
from plasm_dht.errors import RecordError, VerificationError
from plasm_dht.provider.facts import facts
from plasm_dht.provider.manifest import Pointer
from plasm_dht_cli import status, watch
from tests.dht.support import IDENTITIES, START, record
from tests.fuzz.documents import URLS, as_json, dumps
from tests.fuzz.guard import require
from tests.fuzz.source import NUMBERS, TEXTS, Source, mutated, packed

TARGET = "stable/arm64"
FIELDS = ("key", "version", "seq", "refresh_in", "ttl_remaining", "holders")
_ODD: tuple[Any, ...] = (0.5, float("nan"), float("-inf"), True, False, "\ud7ff", b"", b"\xff" * 300, "a\u202eb")
# As deep as Python reads, and about as deep as it writes again from where a command is.
DEPTHS = (1, 50, 900, 960, 975, 980, 985, 990, 995, 5000)


class Peer:
    """A socket that has one answer to everything."""

    def __init__(self, answer: bytes) -> None:
        self._answer = answer

    family = socket.AF_INET

    def makefile(self, mode: str = "r", *args: Any, encoding: str | None = None, **options: Any) -> Any:
        """The answer, from its beginning; FTP, to which a server may redirect, reads text."""
        data = io.BytesIO(self._answer)
        return data if "b" in mode else io.TextIOWrapper(data, encoding=encoding, newline="\r\n")

    def getsockopt(self, *args: object) -> int:
        """TLS asks, and cannot go on with this."""
        raise OSError(92, "no such option")

    def sendall(self, *data: object) -> None:
        """Nobody reads it."""

    setsockopt = settimeout = close = sendall


def shown_bytes(data: bytes) -> None:
    """The value of a record as `watch` and `get` show it, or the answer of a provider as `status` does."""
    source = Source(data)
    if source.below(3):
        _record(source)
    else:
        _status(source)


def _record(source: Source) -> None:
    pointer = Pointer(URLS[0], "1.2", "rack-7", bytes(32), 1234).encode()
    values: tuple[Any, ...] = (source.pick((*_ODD, *NUMBERS, *TEXTS[:16])), mutated(source, pointer), source.some())
    fields = [1, source.pick(URLS), source.pick(TEXTS), source.pick(TEXTS), bytes(32), source.pick(NUMBERS)]
    value = source.pick((*values, packed(source, fields)))
    try:
        made = record(value)
    except RecordError:  # it is too large
        return
    event = Event(source.pick(("published", "changed", "withdrawn", "expired")), made, START)
    line = watch._as_text(TARGET, event)
    require(line.isprintable(), f"more than one line: {line!r}")
    _parse(watch._as_json(TARGET, event))
    try:
        found = Pointer.decode(value)
    except VerificationError:
        return
    _parse(
        json.dumps(
            facts(TARGET, made, found, now=START + source.pick((0, 10**9)), trusted=[IDENTITIES[0].publisher_id])
        )
    )


def _parse(line: str) -> None:
    require(line.isascii() and line.isprintable(), f"more than one line: {line!r}")
    json.loads(line, parse_constant=lambda name: require(False, f"{name} is no JSON"))


def _answer(source: Source) -> bytes:
    """What a server says that should be a provider."""
    said: Any = as_json(source) if source.one_in(4) else {name: as_json(source) for name in ("name", "dht", "http")}
    if isinstance(said, dict):
        row = lambda: {source.pick(FIELDS): as_json(source) for _ in range(source.below(7))}  # noqa: E731
        said["records"] = [row() for _ in range(source.below(4))] if source.below(4) else as_json(source)
    body = dumps(said).encode("utf-8", "surrogatepass")
    if source.one_in(4):
        depth = source.pick(DEPTHS)
        body = b'{"records": [], "name": ' + b"[" * depth + b"]" * depth + b"}"
    body = mutated(source, body) if source.one_in(4) else body
    if source.one_in(6):
        return b"HTTP/1.0 302 x\r\nLocation: " + source.pick((*URLS, "ftp://h/x;type=q", "x")).encode() + b"\r\n\r\n"
    head = b"HTTP/1.1 %d x\r\nContent-Length: %d\r\n\r\n" % (source.pick((200, 200, 200, 404, 999)), len(body))
    answer = head + body
    return mutated(source, answer) if source.one_in(4) else answer


def _status(source: Source) -> None:
    peer = Peer(_answer(source))
    lost: list[object] = []
    with (
        mock.patch.object(socket, "create_connection", return_value=peer),
        mock.patch.object(socket, "gethostbyname", return_value="10.0.0.7"),
        mock.patch("threading.excepthook", lost.append),
    ):
        try:
            answer = status._ask("http://10.0.0.7:8080/status", 5.0)
            lines = list(status._lines(answer, as_json=source.below(2) == 0))
        except status.NoProviderError as error:
            lines = [str(error)]
    require(not lost, f"lost in a thread: {lost}")
    for line in lines:
        require(line.isprintable(), f"more than one line: {line[:500]!r}")
