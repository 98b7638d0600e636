"""How near nodes are to an id by chance, and whether those nearest to a key have been put there. Pure numbers.

Ids are free to choose, so an attacker with fifty nodes can be all of the k closest to a key and say that nothing is
held. That many nodes that near is what no network of honest nodes shows (docs/decisions/0007-crowded-keys.md).
"""

import math
from collections.abc import Sequence

from plasm_dht.dht.ids import ID_BYTES

SPACE_BITS = ID_BYTES * 8
# A key is crowded when by chance fewer than one in 100,000 have so many nodes so near. (A false alarm costs datagrams.)
CHANCE = 1e-5
# The number of nodes is known to about a quarter (20 neighbours: 1/sqrt(20)); it may be two of those larger.
SLACK = 1.5
# One node may be near by chance, and two: a network of few nodes says little.
LEAST = 3


def node_count(distances: Sequence[int]) -> float | None:
    """How many nodes the network has, of the distances of those nearest to an id; `None` when those are too few."""
    if len(distances) < LEAST:
        return None
    return (len(distances) - 1) * 2.0**SPACE_BITS / (distances[-1] + 1)


def is_crowded(distances: Sequence[int], nodes: float) -> bool:
    """Whether the nodes at these distances to a key (nearest first) are too near for a network of so many."""
    return any(
        _at_least(count, SLACK * nodes * (distances[count - 1] + 1) / 2.0**SPACE_BITS) < CHANCE
        for count in range(LEAST, len(distances) + 1)
    )


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
