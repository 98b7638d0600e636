"""Datagrams by recvmmsg and sendmmsg: everybody gets the answer to what it sent. Real sockets."""

import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from plasm_dht.dht import mmsg
from plasm_dht.dht.mmsg import Batches
from tests.dht.support import HERE

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="these are calls of Linux")

SIZE, LONGEST = 16, 9217


class Setting:
    """A socket that is read in batches, and others that ask it."""

    def __init__(self, stack: ExitStack, family: socket.AddressFamily) -> None:
        self._stack = stack
        self.family = family
        self.here = self.bound()
        self.here.setblocking(False)
        self.errors: list[OSError] = []
        self.batches = Batches(self.here, SIZE, LONGEST, self.errors.append)

    def bound(self) -> socket.socket:
        made = self._stack.enter_context(socket.socket(self.family, socket.SOCK_DGRAM))
        made.bind(("::1" if self.family == socket.AF_INET6 else HERE, 0))
        made.settimeout(5)
        return made

    def drain(self, answer: mmsg.Answer) -> tuple[int, int]:
        return self.batches.drain(answer, 1000)

    def ask(self, *datagrams: bytes) -> list[socket.socket]:
        """Send each from a socket of its own."""
        asking = [self.bound() for _ in datagrams]
        for sock, datagram in zip(asking, datagrams, strict=True):
            sock.sendto(datagram, self.here.getsockname())
        return asking


@pytest.fixture(params=[socket.AF_INET, socket.AF_INET6], ids=["IPv4", "IPv6"])
def here(request: Any) -> Iterator[Setting]:
    with ExitStack() as stack:
        try:
            yield Setting(stack, request.param)
        except OSError as error:  # a machine without IPv6
            pytest.skip(str(error))


def test_everybody_gets_the_answer_to_its_own_datagram(here: Setting) -> None:
    senders = []

    def answer(datagram: bytes, sender: Any) -> bytes:
        senders.append(sender)
        return datagram[::-1] * 100

    sent = [bytes([number]) * 3 + b"end" for number in range(SIZE)]
    for _ in range(3):  # from other addresses each time
        senders.clear()
        asking = here.ask(*sent)
        assert here.drain(answer) == (SIZE, SIZE)
        assert senders == [sock.getsockname()[:2] for sock in asking]
        assert [sock.recv(4096) for sock in asking] == [datagram[::-1] * 100 for datagram in sent]
    assert here.errors == []


def test_who_is_not_answered_moves_no_answer_to_another(here: Setting) -> None:
    asking = here.ask(*(bytes([number]) for number in range(10)))
    assert here.drain(lambda datagram, _: datagram * 2 if datagram[0] % 3 == 1 else None) == (10, 3)
    for number in (1, 4, 7):
        assert asking[number].recv(100) == bytes([number]) * 2
    for number in (0, 2, 3, 5, 6, 8, 9):
        asking[number].setblocking(False)
        with pytest.raises(BlockingIOError):
            asking[number].recv(100)


def test_what_is_beyond_a_batch_waits_for_the_next(here: Setting) -> None:
    here.ask(*[b"x"] * (SIZE + 3))
    assert [here.drain(lambda *_: None)[0] for _ in range(3)] == [SIZE, 3, 0]
    assert here.errors == []


def test_no_more_is_read_than_asked_for(here: Setting) -> None:
    here.ask(*[b"x"] * 5)
    assert [here.batches.drain(lambda *_: b"y", 3) for _ in range(2)] == [(3, 3), (2, 2)]


def test_an_answer_that_cannot_be_sent_is_reported_and_the_others_arrive(here: Setting) -> None:
    asking = here.ask(b"a", b"b", b"c", b"d")
    assert here.drain(lambda datagram, _: bytes(70_000) if datagram in b"ac" else datagram) == (4, 4)
    assert [error.errno for error in here.errors] == [90, 90]  # EMSGSIZE
    assert (asking[1].recv(100), asking[3].recv(100)) == (b"b", b"d")


def test_a_datagram_arrives_whole_or_as_long_as_it_may_be(here: Setting) -> None:
    read: list[bytes] = []
    for size in (0, 1, LONGEST - 1, LONGEST, LONGEST + 1, 60_000, 5):
        here.ask(bytes(size))
    here.drain(lambda datagram, _: read.append(datagram))
    assert [len(datagram) for datagram in read] == [0, 1, LONGEST - 1, LONGEST, LONGEST, LONGEST, 5]


def test_a_socket_that_is_closed_meanwhile_is_neither_read_nor_written(here: Setting) -> None:
    here.ask(b"a", b"b")

    def answer(datagram: bytes, sender: Any) -> bytes:
        here.here.close()
        return datagram

    assert here.drain(answer) == (2, 2)
    assert here.drain(answer) == (0, 0)
    assert [error.errno for error in here.errors] == [9, 9, 9]  # EBADF


def test_endless_senders_are_not_all_remembered(here: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmsg, "MAX_SENDERS", 5)
    for _ in range(3):
        asking = here.ask(*[b"x"] * 4)
        here.drain(lambda *_: b"y")
        assert [sock.recv(10) for sock in asking] == [b"y"] * 4
        assert len(here.batches._senders) <= 5


@pytest.mark.parametrize("make", [
    lambda: socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM), lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM),
])  # fmt: skip
def test_only_a_udp_socket_is_read_in_batches(make: Callable[[], socket.socket]) -> None:
    with make() as sock, pytest.raises(OSError, match="not a UDP socket"):
        Batches(sock, SIZE, LONGEST, lambda _: None)


def test_a_system_that_refuses_the_calls_is_found_out_at_once() -> None:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        Batches(sock, SIZE, LONGEST, lambda _: None)
