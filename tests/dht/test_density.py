"""How near nodes are by chance: a crowd is found out, and honest networks are not taken for one."""

import random

import pytest

from plasm_dht.dht.density import CORE, _at_least, crowd_radius, node_count, reach, reach_bits

SPACE = 2**160


def drawn(seed: int, nodes: int, nearest: int) -> list[int]:
    """The distances of the nearest of so many random ids to a key."""
    source = random.Random(seed)
    return sorted(source.getrandbits(160) for _ in range(nodes))[:nearest]


def counted(distances: list[int], key: int) -> float:
    count = node_count(distances, [key], 20)
    assert count is not None
    return count


@pytest.mark.parametrize("nodes", [100, 500, 5000])
@pytest.mark.parametrize("key", [0, 1 << 159, 1 << 153, 1 << 140])
def test_the_nodes_are_counted_to_a_half(nodes: int, key: int) -> None:
    counts = [counted(drawn(seed, nodes, 80), key) for seed in range(50)]
    assert all(nodes / 2.5 < count < nodes * 2.5 for count in counts)
    assert node_count([1, 2], [0], 20) is None


def test_a_table_that_knows_a_few_of_the_far_makes_the_network_no_smaller() -> None:
    counts = []
    for seed in range(300):
        source = random.Random(seed)
        everybody = drawn(seed, 200, 200)
        known = set(everybody[:20])
        for bit in range(153, 161):
            there = [each for each in everybody if each.bit_length() == bit]
            known.update(source.sample(there, min(len(there), 20)))
        counts.append(counted(sorted(known)[:80], source.getrandbits(160)))
    assert sum(count < 200 / 2 for count in counts) < 6


@pytest.mark.parametrize("rank", [1, 5, 15, 100])
def test_a_crowd_around_a_key_is_not_counted_whoever_is_near_the_key(rank: int) -> None:
    for seed in range(50):
        source = random.Random(seed)
        honest = sorted(source.getrandbits(160) for _ in range(450))  # by their distances to the key
        own = honest[rank - 1]
        crowd = [source.randrange(honest[0]) for _ in range(50)]
        around = sorted(each ^ own for each in [*honest, *crowd] if each != own)
        assert 450 / 2.5 < counted(around, own) < 450 * 2.5


def test_of_two_keys_the_crowd_of_neither_is_counted() -> None:
    for seed in range(50):
        source = random.Random(seed)
        honest = sorted(source.getrandbits(160) for _ in range(450))
        own, other = honest[5], source.getrandbits(160)
        crowd = [source.randrange(honest[0]) for _ in range(50)]
        around = sorted(each ^ own for each in [*honest, *crowd] if each != own)[:80]
        for keys in ([own, own ^ other], [own ^ other, own]):
            count = node_count(around, keys, 20)
            assert count is not None
            assert 450 / 2.5 < count < 450 * 2.5
    assert node_count([9, 10, 11, 12, 20], [8, 1 << 100], 20) is None, "all but one may be a crowd"


@pytest.mark.parametrize("nodes", [20, 100, 500, 5000])
def test_honest_neighbours_are_no_crowd(nodes: int) -> None:
    crowds = [crowd_radius(drawn(seed, nodes, 20), nodes) for seed in range(300)]
    assert crowds.count(None) >= 299


@pytest.mark.parametrize("liars", [12, 20, 50])
def test_liars_nearer_than_everybody_are_a_crowd_and_left_out(liars: int) -> None:
    for seed in range(50):
        honest = drawn(seed, 450, 40)
        source = random.Random(seed)
        crowd = [source.randrange(honest[0]) // 4 for _ in range(liars)]
        radius = crowd_radius(sorted(crowd + honest)[:20], 450)
        assert radius is not None
        assert max(crowd) < radius
        assert sum(each < radius for each in honest) <= 20


def test_of_one_or_two_nodes_nothing_is_said() -> None:
    assert crowd_radius([0, 0], 1e6) is None
    assert crowd_radius([0, 0, 0], 1e6) == reach(CORE, 1e6)
    assert crowd_radius([], 1e6) is None


def test_of_a_crowd_more_is_left_out_than_is_seen_and_never_all_who_hold_the_record() -> None:
    spacing = SPACE // 450
    assert crowd_radius([spacing // 2] * 20, 450) == pytest.approx(reach(CORE, 450))
    assert crowd_radius([2 * spacing] * 20, 450) == pytest.approx(8 * spacing, rel=1e-9)
    assert crowd_radius([3 * spacing] * 20, 450) == pytest.approx(reach(10, 450), rel=1e-9)
    assert reach(CORE, 8) == SPACE / 4  # of few nodes a quarter


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
