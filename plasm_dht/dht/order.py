"""Order without a pause: what has to be found by its distance or its time, among a million others.

Nothing here is ever rebuilt, and nothing is made of objects that the garbage collector walks through.
"""

import struct
from bisect import bisect_right
from collections.abc import Iterator

KEY_BYTES = 20
# Entries of one block at most: few enough to be copied by each change, many enough to need few blocks.
BLOCK = 128


class SortedBytes:
    """Byte strings of one width, in order; the same one may be in it more than once. Each change is O(log n).

    They lie side by side in blocks of bytes, so that a million of them take little more than their own bytes, and
    nothing that the garbage collector has to walk through (it stops for 100 ms at a million ints in a `SortedList`).
    """

    def __init__(self, width: int) -> None:
        self._width = width
        self._blocks: list[bytes] = []  # none is empty
        self._firsts: list[bytes] = []  # the first entry of each block

    def __bool__(self) -> bool:
        return bool(self._blocks)

    def __len__(self) -> int:
        return sum(map(len, self._blocks)) // self._width

    def add(self, entry: bytes) -> None:
        """Put an entry in its place."""
        if not self._blocks:
            self._set(0, 0, [entry])
            return
        index, at = self._find(entry)
        block = self._blocks[index]
        block = b"".join((block[:at], entry, block[at:]))
        half = BLOCK // 2 * self._width
        self._set(index, 1, [block] if len(block) <= BLOCK * self._width else [block[:half], block[half:]])

    def remove(self, entry: bytes) -> None:
        """Take an entry out once. One that is not there is a bug: `KeyError`."""
        index, at = self._find(entry) if self._blocks else (0, 0)
        block = self._blocks[index] if self._blocks else b""
        if block[at : at + self._width] != entry:
            raise KeyError(entry)
        block = block[:at] + block[at + self._width :]
        self._set(index, 1, [block] if block else [])

    def first(self) -> bytes | None:
        """The least entry."""
        return self._firsts[0] if self._firsts else None

    def ascending(self, start: bytes = b"") -> Iterator[bytes]:
        """The entries from `start` on, if none is in it twice. A change meanwhile shows from the next block on."""
        index, at = self._find(start) if self._blocks else (0, 0)
        while index < len(self._blocks):
            block = self._blocks[index]
            for offset in range(at, len(block), self._width):
                yield block[offset : offset + self._width]
            index, at = bisect_right(self._firsts, block[-self._width :]), 0

    def descending(self) -> Iterator[bytes]:
        """The entries, greatest first. Nothing may change meanwhile."""
        for block in reversed(self._blocks):
            for end in range(len(block), 0, -self._width):
                yield block[end - self._width : end]

    def _find(self, entry: bytes) -> tuple[int, int]:
        """The block that has the entry or should, and its offset there."""
        index = max(bisect_right(self._firsts, entry) - 1, 0)
        block, width = self._blocks[index], self._width
        low, high = 0, len(block)
        while low < high:  # `bisect_left` would need a function for each look, which takes longer than the look
            middle = (low + high) // (2 * width) * width
            if block[middle : middle + width] < entry:
                low = middle + width
            else:
                high = middle
        return index, low

    def _set(self, index: int, count: int, blocks: list[bytes]) -> None:
        """Replace `count` blocks from `index` on."""
        self._blocks[index : index + count] = blocks
        self._firsts[index : index + count] = [block[: self._width] for block in blocks]


class TimedKeys(SortedBytes):
    """Keys (20 bytes) in the order of a time (s, not negative)."""

    _ENTRY = struct.Struct(f">d{KEY_BYTES}s")  # the bytes of a float that is not negative sort as it does

    def __init__(self) -> None:
        super().__init__(self._ENTRY.size)

    def schedule(self, at: float, key: bytes) -> None:
        """Note a time for the key, besides others that it may have."""
        self.add(self._ENTRY.pack(at, key))

    def cancel(self, at: float, key: bytes) -> None:
        """Take back what was scheduled."""
        self.remove(self._ENTRY.pack(at, key))

    def soonest(self) -> tuple[float, bytes] | None:
        """The first time, and the key."""
        first = self.first()
        return None if first is None else self._ENTRY.unpack(first)
