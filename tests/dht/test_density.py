"""How near nodes are by chance: a crowd is found out, and honest networks are not taken for one."""

import random

import pytest

from plasm_dht.dht.density import _at_least, is_crowded, node_count, reach_bits

SPACE = 2**160


def drawn(seed: int, nodes: int, nearest: int) -> list[int]:
    """The distances of the nearest of so many random ids to a key."""
    source = random.Random(seed)
    return sorted(source.getrandbits(160) for _ in range(nodes))[:nearest]


@pytest.mark.parametrize("nodes", [100, 500, 5000])
def test_the_nodes_are_counted_to_a_half(nodes: int) -> None:
    counts = [node_count(drawn(seed, nodes, 20)) for seed in range(50)]
    assert all(count is not None and nodes / 2 < count < nodes * 2 for count in counts)
    assert node_count([1, 2]) is None


@pytest.mark.parametrize("nodes", [20, 100, 500, 5000])
def test_honest_neighbours_are_no_crowd(nodes: int) -> None:
    crowds = [is_crowded(drawn(seed, nodes, 20), nodes) for seed in range(300)]
    assert crowds.count(True) <= 1


@pytest.mark.parametrize("liars", [12, 20])
def test_liars_nearer_than_everybody_are_a_crowd(liars: int) -> None:
    for seed in range(50):
        honest = drawn(seed, 450, 20)
        source = random.Random(seed)
        near = sorted([source.randrange(honest[0]) // 4 for _ in range(liars)] + honest)[:20]
        assert is_crowded(near, 450)


def test_of_one_or_two_nodes_nothing_is_said() -> None:
    assert not is_crowded([0, 0], 1e6)
    assert is_crowded([0, 0, 0], 1e6)
    assert not is_crowded([], 1e6)


@pytest.mark.parametrize("nodes", [100, 500, 10_000, 1e9])
def test_the_reach_is_where_the_kth_is_by_chance_and_a_bit_beyond(nodes: float) -> None:
    low, high = reach_bits(20, nodes)
    assert high == low + 1
    assert 2.0**low <= 20 / nodes * SPACE < 2.0**high
    # a reader who counts up to four times as many, or a quarter, shares one of a publisher's
    for factor in (1 / 4, 1 / 1.99, 1, 1.99, 3.99):
        assert set(reach_bits(20, nodes)) & set(reach_bits(20, nodes * factor, 1))


@pytest.mark.parametrize("nodes", [1, 5, 20, 1e60])
def test_the_reach_is_within_the_ids(nodes: float) -> None:
    low, high = reach_bits(20, nodes)
    assert 0 <= low < high <= 159
    assert 0 <= min(reach_bits(20, nodes, 1)) < max(reach_bits(20, nodes, 1)) <= 159


def test_chances_are_those_of_poisson() -> None:
    assert _at_least(3, 0.1) == pytest.approx(1.5465e-4, rel=1e-2)
    assert _at_least(20, 5.0) == pytest.approx(3.45e-7, rel=2e-2)
    assert _at_least(5, 5.0) == 1.0
