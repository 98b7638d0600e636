"""Many datagrams a system call: Linux's recvmmsg(2) and sendmmsg(2), for a socket that is read and answered in batches.

What the two calls need is laid out once and used again and again. A response goes to the address that its request came
from as the system gave it, so that no address is turned into text and back.
"""

import ctypes
import errno
import mmap
import os
import socket
import struct
from array import array
from collections.abc import Callable
from itertools import accumulate
from typing import Any, Literal

from plasm_dht.dht.ids import Address, plain

# Senders whose addresses are remembered as text. All are forgotten when there are more.
MAX_SENDERS = 16_384
# Of struct sockaddr_in and sockaddr_in6 the port and the address; flow and scope of IPv6 count on the way back alone.
_NAMES = {socket.AF_INET: struct.Struct("!2xH4s8x"), socket.AF_INET6: struct.Struct("!2xH4x16s4x")}

Answer = Callable[[bytes, Address], bytes | None]


class _Vector(ctypes.Structure):
    """struct iovec."""

    _fields_ = (("start", ctypes.c_void_p), ("length", ctypes.c_size_t))


class _Message(ctypes.Structure):
    """struct msghdr."""

    _fields_ = (
        ("name", ctypes.c_void_p),
        ("name_length", ctypes.c_uint),
        ("vectors", ctypes.c_void_p),
        ("vector_count", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_length", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


class _Header(ctypes.Structure):
    """struct mmsghdr: a message, and how many bytes of it were received or sent."""

    _fields_ = (("message", _Message), ("length", ctypes.c_uint))


class Batches:
    """Reads up to `size` datagrams in one call, of each up to `longest` bytes, and sends the responses in another one.

    `on_error` is told of what could be neither read nor sent. Raises `OSError` where the system has no such calls, or
    the socket is not one of UDP.
    """

    def __init__(self, handle: socket.socket, size: int, longest: int, on_error: Callable[[OSError], None]) -> None:
        name = _NAMES.get(handle.family)
        if name is None or handle.type != socket.SOCK_DGRAM:
            raise OSError(errno.ENOTSUP, "not a UDP socket")
        self._handle = handle
        self._size = size
        self._on_error = on_error
        self._senders: dict[bytes, Address] = {}
        self._split_name = name.unpack
        self._split_names = struct.Struct(f"{name.size}s" * size).unpack
        self._names = ctypes.create_string_buffer(size * name.size)
        # Not a bytearray, which is filled with zeros: only the pages that something is read into are taken up.
        self._read = mmap.mmap(-1, size * longest)
        self._starts = range(0, size * longest, longest)
        self._read_vectors, self._sent_vectors = (_Vector * size)(), (_Vector * size)()
        self._read_headers, self._sent_headers = (_Header * size)(), (_Header * size)()
        read, home = ctypes.addressof(ctypes.c_char.from_buffer(self._read)), ctypes.addressof(self._names)
        self._homes = range(home, home + size * name.size, name.size)
        for number in range(size):
            self._read_vectors[number] = _Vector(read + self._starts[number], longest)
            for headers, vectors in (
                (self._read_headers, self._read_vectors),
                (self._sent_headers, self._sent_vectors),
            ):
                at = ctypes.addressof(vectors) + number * ctypes.sizeof(_Vector)
                headers[number] = _Header(_Message(self._homes[number], name.size, at, 1))
        # What changes from batch to batch: the n-th word of each view belongs to the n-th datagram.
        self._read_lengths = _view(self._read_headers, "I", _Header.length.offset)
        self._sent_homes = _view(self._sent_headers, "L", _Message.name.offset)
        self._sent_starts = _view(self._sent_vectors, "L", _Vector.start.offset)
        self._sent_lengths = _view(self._sent_vectors, "L", _Vector.length.offset)
        libc = ctypes.CDLL(None, use_errno=True)
        try:
            self._recvmmsg, self._sendmmsg = libc.recvmmsg, libc.sendmmsg
        except AttributeError as error:
            raise OSError(errno.ENOSYS, str(error)) from None
        if self._receive(0) < 0 or self._send(0, 0) < 0:  # a sandbox may have the functions and refuse the calls
            raise _last_error()

    def drain(self, answer: Answer, most: int) -> tuple[int, int]:
        """Hand over what has arrived, at most so many (and `size`), and send what that returns.

        Returns how many were read, and how many responses sent.
        """
        count = self._receive(min(most, self._size))
        if count <= 0:
            if ctypes.get_errno() != errno.EAGAIN:
                self._on_error(_last_error())
            return 0, 0
        read, senders = self._read, self._senders
        lengths, names = self._read_lengths[:count].tolist(), self._split_names(self._names)
        responses, homes = [], []
        for start, length, name, home in zip(self._starts, lengths, names, self._homes, strict=False):
            response = answer(read[start : start + length], senders.get(name) or self._sender(name))
            if response is not None:
                responses.append(response)
                homes.append(home)
        if responses:
            self._respond(responses, homes)
        return count, len(responses)

    def _respond(self, responses: list[bytes], homes: list[int]) -> None:
        """Send each to its home, the place in memory of the socket address that its request came from."""
        count = len(responses)
        joined = b"".join(responses)
        start = ctypes.cast(ctypes.c_char_p(joined), ctypes.c_void_p).value
        lengths = array("L", map(len, responses))
        self._sent_homes[:count] = array("L", homes)
        self._sent_lengths[:count] = lengths
        self._sent_starts[:count] = array("L", accumulate(lengths[:-1], initial=start))
        done = 0
        while done < count:
            sent = self._send(done, count - done)
            if sent <= 0:  # the first of these cannot be sent; those after it may
                self._on_error(_last_error())
                sent = 1
            done += sent

    def _receive(self, count: int) -> int:
        received: int = self._recvmmsg(self._handle.fileno(), self._read_headers, count, socket.MSG_DONTWAIT, None)
        return received

    def _send(self, first: int, count: int) -> int:
        headers = ctypes.byref(self._sent_headers, first * ctypes.sizeof(_Header))
        sent: int = self._sendmmsg(self._handle.fileno(), headers, count, socket.MSG_DONTWAIT)
        return sent

    def _sender(self, name: bytes) -> Address:
        """The (ip, port) of a socket address."""
        if len(self._senders) >= MAX_SENDERS:
            self._senders.clear()
        port, ip = self._split_name(name)
        address = self._senders[name] = plain(socket.inet_ntop(self._handle.family, ip)), port
        return address


def _last_error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))


def _view(structures: ctypes.Array[Any], form: Literal["I", "L"], offset: int) -> memoryview:
    """The word at this offset of each of the structures."""
    width, size = ctypes.sizeof(structures._type_), struct.calcsize(form)
    words: memoryview = memoryview(structures).cast("B").cast(form)
    return words[offset // size :: width // size]
