"""Who is closest to a key: entries in the order of their ids, of which the closest are found by halving the range."""

from bisect import bisect_left
from collections.abc import Iterator
from typing import Generic, TypeVar

Entry = TypeVar("Entry")


def _in(parts: list[tuple[int, int]], items: list[Entry]) -> list[Entry]:
    """What is in these ranges."""
    found: list[Entry] = []
    for low, high in parts:
        found += items[low:high]
    return found


class ByDistance(Generic[Entry]):
    """Entries by id (a number of 160 bits), each id once."""

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._entries: list[Entry] = []

    def __len__(self) -> int:
        return len(self._ids)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries)

    def add(self, long_id: int, entry: Entry) -> None:
        """Take in an entry whose id is not there yet."""
        at = bisect_left(self._ids, long_id)
        self._ids.insert(at, long_id)
        self._entries.insert(at, entry)

    def remove(self, long_id: int) -> None:
        """Forget the entry with this id, which is there."""
        at = bisect_left(self._ids, long_id)
        del self._ids[at], self._entries[at]

    def count_between(self, low: int, high: int) -> int:
        """How many ids are at least `low` and below `high`."""
        return bisect_left(self._ids, high) - bisect_left(self._ids, low)

    def closest(self, key: int, k: int) -> list[Entry]:
        """Exactly the k entries of the smallest XOR distance to the key, nearest first."""
        parts, _ = self._nearest(key, k)
        ids = _in(parts, self._ids)
        by_id = dict(zip(ids, _in(parts, self._entries), strict=True))
        return [by_id[each] for each in sorted(ids, key=key.__xor__)]

    def nearest(self, key: int, k: int) -> tuple[list[Entry], list[Entry], list[int]]:
        """The k closest, in no order; who comes next, or nobody; the bits of the key (the highest is 159) that decide.

        For all keys that are alike in these bits, in this order, it is the same entries and bits.
        """
        parts, bits = self._nearest(key, k + 1)
        if len(self._ids) <= k:
            return self._entries[:], [], bits
        low, high = parts.pop()
        while high - low > 1:  # the last part has the farthest of k + 1: who comes next
            bit, middle = self._split(low, high)
            bits.append(bit)
            if key >> bit & 1:
                parts.append((middle, high))
                high = middle
            else:
                parts.append((low, middle))
                low = middle
        return _in(parts, self._entries), self._entries[low:high], bits

    def _nearest(self, key: int, k: int) -> tuple[list[tuple[int, int]], list[int]]:
        """Where the k closest are, in ranges of which the last has the farthest; the bits of the key that decide."""
        parts, bits = [], []
        low, high = 0, len(self._ids)
        while high - low > k:
            bit, middle = self._split(low, high)
            bits.append(bit)
            near, far = ((middle, high), (low, middle)) if key >> bit & 1 else ((low, middle), (middle, high))
            size = near[1] - near[0]
            if size < k:
                parts.append(near)
                k -= size
                low, high = far
            else:
                low, high = near
        parts.append((low, high))
        return parts, bits

    def _split(self, low: int, high: int) -> tuple[int, int]:
        """The highest bit in which ids of this range differ, and where those begin that have it.

        All of them agree above it, and those that agree with a key in it are nearer to that than all others.
        """
        last = self._ids[high - 1]
        bit = (self._ids[low] ^ last).bit_length() - 1
        return bit, bisect_left(self._ids, last >> bit << bit, low, high)
