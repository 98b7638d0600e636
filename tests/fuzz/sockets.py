"""The socket beneath a node: real datagrams of any size on loopback, read one by one or with one call."""

import socket
from contextlib import suppress
from typing import Any

from plasm_dht.dht.udp import BATCH, SHORT_BATCH, UdpSocket
from plasm_dht.dht.wire import MAX_READ
from tests.fuzz.datagrams import MOST
from tests.fuzz.guard import require
from tests.fuzz.source import Source

# None, few, those around what is read at most, and more. All of a round has to fit into the socket's buffer.
SIZES = (0, 1, 21, 40, 77, 400, MOST, MAX_READ - 1, MAX_READ, MAX_READ + 1, 15_000)
FAMILIES = ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"))


class Pair:
    """A node's socket of one family, and those who send to it."""

    def __init__(self, family: int, ip: str) -> None:
        self.errors: list[OSError] = []
        self.handle = socket.socket(family, socket.SOCK_DGRAM)
        self.handle.bind((ip, 0))
        self.address = self.handle.getsockname()
        self.node = UdpSocket(self.handle, self.errors.append)
        self.senders = [socket.socket(family, socket.SOCK_DGRAM) for _ in range(3)]
        for sender in self.senders:
            sender.bind((ip, 0))
            sender.setblocking(False)

    def close(self) -> None:
        """Close all of them."""
        for each in (self.handle, *self.senders):
            each.close()


class _Stage:
    pairs: list[Pair] | None = None


def renew() -> None:
    """Close the sockets."""
    for pair in _Stage.pairs or []:
        pair.close()
    _Stage.pairs = None


def socket_bytes(data: bytes) -> None:
    """A few rounds of datagrams from several senders; what is read and answered must be theirs, byte for byte."""
    source = Source(data)
    pairs = _Stage.pairs = _Stage.pairs or _pairs()
    pair = source.pick(pairs)
    for _ in range(1 + source.below(3)):
        _round(source, pair)


def _pairs() -> list[Pair]:
    pairs = [Pair(*FAMILIES[0])]
    with suppress(OSError):  # a machine without IPv6
        pairs.append(Pair(*FAMILIES[1]))
    return pairs


def _round(source: Source, pair: Pair) -> None:
    sent: list[tuple[bytes, tuple[str, int]]] = []
    for number in range(source.pick((1, 2, 17, 70))):
        size = source.pick(SIZES) if number < 4 else 40 + number
        sender = source.pick(pair.senders)
        content = bytes([number]) + source.some()
        content = (content * (size // len(content) + 1))[:size]
        sender.sendto(content, pair.address)
        sent.append((content[: MAX_READ + 1], sender.getsockname()[:2]))
    replies = [source.below(3) for _ in sent]
    read: list[Any] = []

    def answer(datagram: bytes, address: Any) -> bytes | None:
        read.append((datagram, address))
        return b"r%d" % len(read) if replies[len(read) - 1] else None

    answered, most = 0, source.pick((BATCH, SHORT_BATCH))
    while len(read) < len(sent):
        before = len(read)
        count, responses = pair.node.drain(answer, most)
        answered += responses
        require(count == len(read) - before and 0 < count <= most, f"{count} datagrams were read, {len(read)} seen")
    require(not pair.errors, f"{pair.errors}")
    require(read == sent, "other datagrams, or of others, than were sent")
    require(answered == sum(map(bool, replies)), f"{answered} were answered of {replies}")
    expected = {each.getsockname()[:2]: [] for each in pair.senders}  # type: ignore[var-annotated]
    for number, (_, address) in enumerate(sent):
        if replies[number]:
            expected[address].append(b"r%d" % (number + 1))
    for sender in pair.senders:
        got = [sender.recv(100) for _ in expected[sender.getsockname()[:2]]]
        require(got == expected[sender.getsockname()[:2]], f"{got} arrived where it was not asked")
