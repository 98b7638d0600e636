"""Bytes from a fuzzer read as choices, so that one stream of bytes makes whole datagrams, documents and scripts."""

import datetime
from collections.abc import Sequence
from typing import Any, TypeVar

import msgspec

T = TypeVar("T")

NUMBERS = (
    0, 1, -1, 2, 19, 20, 21, 32, 127, 128, 255, 256, 999, 65_535, 65_536, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1,
    2**63, 2**64 - 1, -(2**63), 1_800_000_000_000, 1_800_000_300_001, 7_258_118_400_000,
)  # fmt: skip
TEXTS = (
    "", "a", "ping", "store", "stale", "clock", "value", "\x00", "a\nb", "\x1b[2J", "é", "\u2028", "\U0001f600", "%s",
    "{}", "../..", "127.0.0.1", "::1", "fe80::1%\x00\n", "10.0.0.1" + "0" * 300, "x" * 255, "x" * 256, "y" * 5000,
)  # fmt: skip


class Source:
    """What is left of the bytes. Where nothing is left every choice is the first one."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def __bool__(self) -> bool:
        return self._at < len(self._data)

    def take(self, count: int) -> bytes:
        """The next bytes, as many as there are."""
        taken = self._data[self._at : self._at + count]
        self._at += len(taken)
        return taken

    def some(self) -> bytes:
        """Bytes of a length that is read first."""
        return self.take(self.below(64))

    def rest(self) -> bytes:
        """All that is left."""
        return self.take(len(self._data))

    def below(self, limit: int) -> int:
        """A number from 0 up to and without the limit."""
        width = (limit - 1).bit_length() + 7 >> 3
        return int.from_bytes(self.take(width)) % limit

    def pick(self, options: Sequence[T]) -> T:
        """One of them."""
        return options[self.below(len(options))]

    def one_in(self, count: int) -> bool:
        """Rarely true; false where nothing is left."""
        return self.below(count) == count - 1


def mutated(source: Source, data: bytes) -> bytes:
    """The same bytes with a few of them changed, cut, doubled or put in."""
    for _ in range(1 + source.below(3)):
        kind, at = source.below(6), source.below(max(len(data), 1))
        if kind == 0:
            data = data[:at] + bytes([source.below(256)]) + data[at + 1 :]
        elif kind == 1:
            data = data[:at] + source.some() + data[at:]
        elif kind == 2:
            data = data[:at] + data[at + 1 + source.below(8) :]
        elif kind == 3:
            data = data[:at]
        elif kind == 4:
            data = data[:at] + data[at : at + 1 + source.below(32)] * (1 + source.below(4)) + data[at:]
        else:
            data = data[:at] + source.pick((b"\xc1", b"\xdd\xff\xff\xff\xff", b"\xc7\x0c\xff", b"\x00", b"\r\n", b'"'))
    return data


def anything(source: Source, depth: int = 3) -> Any:
    """A value that msgpack can hold, nested a little; unlikely ones too."""
    kind = source.below(14 if depth else 10)
    if kind < 2:
        return source.pick(NUMBERS)
    if kind < 4:
        return source.some()
    if kind < 6:
        return source.pick(TEXTS)
    if kind < 10:
        moment = datetime.datetime.fromtimestamp(source.pick(NUMBERS) % 2**37, datetime.UTC)
        odd = (float("nan"), float("-inf"), 0.5, moment, msgspec.msgpack.Ext(source.below(100), source.some()))
        return (None, True, False, source.pick(odd))[kind - 6]
    if kind < 13:
        return [anything(source, depth - 1) for _ in range(source.below(6))]
    return {source.pick(TEXTS): anything(source, depth - 1) for _ in range(source.below(5))}


def packed(source: Source, value: Any) -> bytes:
    """The value in msgpack, now and then with something wrong in the bytes."""
    data = msgspec.msgpack.encode(value)
    return mutated(source, data) if source.one_in(4) else data
