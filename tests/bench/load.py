"""A generator of load that costs far less than the server it asks: batches of datagrams by sendmmsg and recvmmsg.

Every reply is matched with a request that waits for it, by the first four bytes of the message id; some are kept whole,
for the caller to look into.
"""

import ctypes
import os
import select
import socket
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

# Datagrams that one system call receives.
BATCH = 64
# Bytes between two received datagrams. Each begins at 3, so that the message id's first word is aligned.
STRIDE = 2048
HEAD = 3
# Without any reply for this long (s) all that was asked counts as lost, and more is asked.
STALLED = 2.0
# Between two looks (s): replies come in batches then, at a fraction of the price; the windows hold more work than that.
PAUSE = 0.0003
# Of each lane one reply in so many is kept, and so many at most.
SAMPLE_EVERY = 500
SAMPLES = 400
_libc = ctypes.CDLL(None, use_errno=True)
_WORD = struct.Struct("=I")


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class _Message(ctypes.Structure):
    """struct msghdr."""

    _fields_ = (
        ("name", ctypes.c_void_p),
        ("name_length", ctypes.c_uint),
        ("vectors", ctypes.POINTER(_Iovec)),
        ("vector_count", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_length", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


class _Header(ctypes.Structure):
    """struct mmsghdr: a message, and how many bytes were received."""

    _fields_ = (("message", _Message), ("length", ctypes.c_uint))


_WORDS = ctypes.sizeof(_Header) // 4
_LENGTH = _Header.length.offset // 4


def _headers(base: int, offsets: Sequence[tuple[int, int]]) -> tuple[ctypes.Array[_Header], object]:
    vectors = (_Iovec * len(offsets))(*((base + offset, length) for offset, length in offsets))
    headers = (_Header * len(offsets))()
    size = ctypes.sizeof(_Iovec)
    for index, header in enumerate(headers):
        header.message.vectors = ctypes.cast(ctypes.addressof(vectors) + index * size, ctypes.POINTER(_Iovec))
        header.message.vector_count = 1
    return headers, vectors


@dataclass
class Count:
    """What happened on one lane, or on all. `samples`: (index of the request, whole reply)."""

    answered: int = 0
    lost: int = 0
    strange: int = 0  # no reply, or to nothing that waits for one
    shortest: int = 1 << 30  # bytes of a reply
    longest: int = 0
    samples: list[tuple[int, bytes]] = field(default_factory=list)


class Lane:
    """One socket, the requests that it sends over and over, and those of them that wait for a reply.

    It begins with the one at `first`. `mark(index)` makes the four bytes that a reply to a request has at `id_at`.
    """

    def __init__(self, sock: socket.socket, requests: Sequence[bytes], window: int, first: int = 0) -> None:
        self.sock = sock
        self.window = window
        self.requests = list(requests)
        self.count = Count()
        self.waiting: set[int] = set()
        self._given_up: set[int] = set()  # counted as lost, but may still come: a busy machine can be that slow
        self._next = first
        self._since_sample = 0
        self._out = ctypes.create_string_buffer(b"".join(requests))
        offsets, offset = [], 0
        for request in requests:
            offsets.append((offset, len(request)))
            offset += len(request)
        self._out_headers, self._out_vectors = _headers(ctypes.addressof(self._out), offsets)
        self._in = bytearray(BATCH * STRIDE)
        keep = (ctypes.c_char * len(self._in)).from_buffer(self._in)
        places = [(index * STRIDE + HEAD, STRIDE - HEAD) for index in range(BATCH)]
        self._in_headers, self._in_vectors = _headers(ctypes.addressof(keep), places)
        self._keep = keep
        view = memoryview(self._in)
        self._types, self._ids = view[HEAD::STRIDE], view.cast("I")[(HEAD + 1) // 4 :: STRIDE // 4]
        self._lengths = memoryview(self._in_headers).cast("B").cast("I")[_LENGTH::_WORDS]

    def send(self, count: int) -> None:
        """Send so many more requests."""
        while count > 0:
            first = self._next
            batch = min(count, len(self.requests) - first)
            at = ctypes.byref(self._out_headers, first * ctypes.sizeof(_Header))
            sent = _libc.sendmmsg(self.sock.fileno(), at, batch, 0)
            if sent <= 0:
                error = ctypes.get_errno()
                raise OSError(error, f"sendmmsg: {os.strerror(error)}")
            self.waiting.update(range(first, first + sent))
            count -= sent
            self._next = (first + sent) % len(self.requests)
            if self._next == 0:  # a lap later, whatever has waited for most of it will not be answered any more
                late = {index for index in self.waiting if index < len(self.requests) // 2}
                self.count.lost += len(late)
                self.waiting -= late
                self._given_up |= late

    def receive(self) -> int:
        """Take in what is there. Returns how many datagrams."""
        got = _libc.recvmmsg(self.sock.fileno(), self._in_headers, BATCH, socket.MSG_DONTWAIT, None)
        if got <= 0:
            return 0
        self.took(got)
        return got

    def took(self, got: int) -> None:
        """Match the datagrams received with the requests that wait."""
        before = len(self.waiting)
        ids = self._ids[:got].tolist()
        self.waiting.difference_update(ids)
        good = before - len(self.waiting) if bytes(self._types[:got]) == b"\x01" * got else 0
        self.count.answered += good
        if good < got:
            late = self._given_up.intersection(ids)
            self._given_up -= late
            self.count.strange += max(0, got - good - len(late))
        self.keep(ids[0], self._lengths[:got].tolist())

    def keep(self, index: int, lengths: list[int]) -> None:
        """Note the sizes of what came, and now and then keep the first of it, the reply to the request `index`."""
        count = self.count
        count.shortest = min(count.shortest, *lengths)
        count.longest = max(count.longest, *lengths)
        self._since_sample += len(lengths)
        if not count.samples or (self._since_sample >= SAMPLE_EVERY and len(count.samples) < SAMPLES):
            self._since_sample = 0
            count.samples.append((index, bytes(self._in[HEAD : HEAD + lengths[0]])))

    def lose(self) -> None:
        """Nothing comes any more: what waits is lost."""
        self.count.lost += len(self.waiting)
        self._given_up |= self.waiting
        self.waiting.clear()


def message_id(index: int) -> bytes:
    """The 20 bytes by which the reply to the request `index` of a lane is known."""
    return _WORD.pack(index) + os.urandom(16)


@dataclass
class Burst:
    """What one repetition measured: replies, seconds of the wall, CPU seconds of the generator itself."""

    count: Count
    wall: float
    generator: float


def run(lanes: Sequence[Lane], seconds: float) -> Burst:
    """Keep each lane's window full for so long, then let what is under way arrive."""
    poller = select.poll()
    by_fd = {lane.sock.fileno(): lane for lane in lanes}
    for fd, lane in by_fd.items():
        lane.count = Count()
        poller.register(fd, select.POLLIN)
    cpu, started = time.process_time(), time.perf_counter()
    end = started + seconds
    for lane in lanes:
        lane.send(lane.window - len(lane.waiting))
    now = started
    while now < end:
        ready = poller.poll(STALLED * 1000)
        for fd, _ in ready:
            lane = by_fd[fd]
            while lane.receive() == BATCH:
                pass
            lane.send(lane.window - len(lane.waiting))
        if not ready:
            for lane in lanes:
                lane.lose()
                lane.send(lane.window)
        time.sleep(PAUSE)
        now = time.perf_counter()
    total = Count()
    for lane in lanes:  # what arrives later was not answered in this time
        total.answered += lane.count.answered
    burst = Burst(total, now - started, time.process_time() - cpu)
    while any(lane.waiting for lane in lanes) and (ready := poller.poll(STALLED * 1000)):
        for fd, _ in ready:
            by_fd[fd].receive()
    for lane in lanes:
        lane.lose()
        total.lost += lane.count.lost
        total.strange += lane.count.strange
        total.shortest = min(total.shortest, lane.count.shortest)
        total.longest = max(total.longest, lane.count.longest)
        total.samples += lane.count.samples
    return burst
