"""How near nodes are to an id by chance, and whether those nearest to a key have been put there. Pure numbers.

Ids are free to choose, so an attacker with fifty nodes can be all of the k closest to a key and say that nothing is
held. That many nodes that near is what no network of honest nodes shows (docs/decisions/0007-crowded-keys.md).
"""

import math
from collections.abc import Iterable, Sequence

from plasm_dht.dht.ids import ID_BYTES

SPACE_BITS = ID_BYTES * 8
# A key is crowded when by chance fewer than one in 100,000 have so many nodes so near. (A false alarm costs datagrams.)
CHANCE = 1e-5
# The number of nodes is known to about a quarter (20 neighbours: 1/sqrt(20)); it may be two of those larger.
SLACK = 1.5
# One node may be near by chance, and two: a network of few nodes says little.
LEAST = 3
# Of the nodes farther from us than the k nearest a sixth at least is known: whoever joined has met k of each distance.
UNKNOWN = 6
# The nearest to a key that so many are by chance: of 50 liars who are nearer to it than anybody honest all are among
# those, but for one key in fifty. Of the k = 20 who hold a record most are not.
CORE = 4
# The k closest that are seen may be a quarter of a crowd.
FARTHER = 4


def node_count(distances: Sequence[int], keys: Iterable[int], k: int) -> float | None:
    """How many nodes the network has, by k of those nearest to an id; `None` when those are too few.

    `distances`: of these and more, nearest first. `keys`: the distances of keys. No crowd around one is counted.
    """
    least: float | None = math.inf
    for key in keys:
        count = _count_without(key, distances, k)
        least = None if least is None or count is None else min(least, count)
    return least


def _count_without(key: int, distances: Sequence[int], k: int) -> float | None:
    """The count without a crowd around a key at this distance.

    The crowd differs from the id in the same highest bit as the key, and where the id is as near to the key as the
    crowd, in a lower one. So the k nearest that differ in a lower bit are counted, unless they are far too many: then
    those who are farther than the key, of whom not all are known. If either are fewer than k, both are counted.
    """
    outer = 1 << key.bit_length()
    inner = outer >> 1 if key else 0
    farther = [each for each in distances if each >= outer][:k]
    without = k * 2.0**SPACE_BITS / (farther[-1] + 1 - outer) if len(farther) == k else None
    nearer = [each for each in distances if each < inner][:k]
    if len(nearer) == k:
        count = k * 2.0**SPACE_BITS / (nearer[-1] + 1)
        if without is None or count < UNKNOWN * without:
            return count
    if without is not None:
        return without
    counted = [each for each in distances if not inner <= each < outer][:k]
    if len(counted) < LEAST:
        return None
    left_out = outer - inner if counted[-1] >= outer else 0
    return (len(counted) - 1) * 2.0**SPACE_BITS / (counted[-1] + 1 - left_out)


def crowd_radius(distances: Sequence[int], nodes: float) -> float | None:
    """How far a crowd around a key may reach; `None` when the nodes at these distances (nearest first) are no crowd.

    A crowd is too near for a network of so many nodes. More of it may be farther than those seen, but whoever is nearer
    than anybody honest is mostly within `CORE`; more than half of the k closest are left out in no case.
    """
    crowd = [
        distance
        for count, distance in enumerate(distances, 1)
        if count >= LEAST and _at_least(count, SLACK * nodes * (distance + 1) / 2.0**SPACE_BITS) < CHANCE
    ]
    return min(max(reach(CORE, nodes), FARTHER * crowd[-1]), reach(2.5 * CORE, nodes)) if crowd else None


def reach(rank: float, nodes: float) -> float:
    """The distance from a key within which so many of the nodes are by chance; of few nodes a quarter at most."""
    return min(rank / nodes, 0.25) * 2.0**SPACE_BITS


def reach_bits(k: int, nodes: float, margin: int = 0) -> range:
    """The bit of the distance at which the k-th closest of so many nodes is by chance, and the next one.

    A publisher's two are among a reader's four (`margin` 1), unless one takes the network for eight times as large as
    the other.
    """
    bit = math.floor(math.log2(max(k / nodes, 2.0**-SPACE_BITS))) + SPACE_BITS
    bit = min(max(bit, 0), SPACE_BITS - 2)
    return range(max(bit - margin, 0), min(bit + 2 + margin, SPACE_BITS))


def _at_least(count: int, expected: float) -> float:
    """The chance of `count` or more where so many are expected (Poisson)."""
    if expected >= count:
        return 1.0
    term = math.exp(count * math.log(expected) - expected - math.lgamma(count + 1))
    total = 0.0
    while term > total * 1e-3:
        total += term
        count += 1
        term *= expected / count
    return total
