"""What a holder admits, hands out and forgets."""

import gc
import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kademlia.storage import IStorage

from plasm_dht.dht.storage import ACCEPTED, RecordStorage, Verdict
from plasm_dht.errors import RecordError
from plasm_dht.record import Record, bound_key, shared_key, sign, verify
from tests.dht.support import HOUR, IDENTITIES, NAME, START, ManualClock, forged, record

KEY = shared_key(NAME)
MINE = IDENTITIES[0].public_key


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def storage(clock: ManualClock) -> RecordStorage:
    return RecordStorage(clock=clock)


def held(storage: RecordStorage, key: bytes = KEY) -> list[bytes]:
    return [holding.envelope for holding in storage.holdings(key)]


# -- kademlia's IStorage ---------------------------------------------------------------------------------------------


def test_it_is_a_storage_of_kademlias(storage: RecordStorage, clock: ManualClock) -> None:
    assert isinstance(storage, IStorage)
    older, newer = record(b"older"), record(b"newer", by=IDENTITIES[1], issued_at=START + 1)
    assert storage.get(KEY) is None
    assert storage.get(KEY, b"default") == b"default"
    with pytest.raises(KeyError):
        storage[KEY]
    storage[KEY] = older.envelope
    clock.advance(60)
    storage[KEY] = newer.envelope
    assert len(storage) == 2
    assert storage[KEY] == storage.get(KEY) == newer.envelope  # the freshest publisher's
    assert set(storage) == {(KEY, older.envelope), (KEY, newer.envelope)}
    assert storage.iter_older_than(60) == [(KEY, older.envelope)]
    assert storage.iter_older_than(61) == []


def test_what_is_refused_raises_with_its_reason(storage: RecordStorage) -> None:
    with pytest.raises(RecordError, match="malformed") as caught:
        storage[KEY] = b"plain value"
    assert caught.value.reason == "malformed"
    assert len(storage) == 0


def test_iteration_and_reading_leave_out_what_is_over(storage: RecordStorage, clock: ManualClock) -> None:
    storage[KEY] = record(life=10).envelope
    clock.advance(10)
    assert storage.get(KEY) is None
    assert list(storage) == []
    assert storage.iter_older_than(0) == []


def test_a_tombstone_is_no_value_but_it_is_passed_on(storage: RecordStorage) -> None:
    tombstone = record(withdrawn=True)
    storage[KEY] = tombstone.envelope
    assert storage.get(KEY) is None
    assert list(storage) == [(KEY, tombstone.envelope)]


# -- refusals --------------------------------------------------------------------------------------------------------


def good() -> Record:
    return record(seq=5, issued_at=START, life=3600)


def test_a_good_record_is_accepted_under_both_of_its_keys(storage: RecordStorage) -> None:
    assert storage.store(KEY, good().envelope) == ACCEPTED
    assert storage.store(bound_key(MINE, NAME), good().envelope) == Verdict(None, None)
    assert len(storage) == 2


REFUSALS: list[tuple[str, Callable[[], object]]] = [
    ("too_large", lambda: bytes(1001)),
    ("malformed", lambda: b"plain value"),
    ("malformed", lambda: "text"),
    ("malformed", lambda: 1),
    ("malformed", lambda: None),
    ("wrong_key", lambda: record(name="another").envelope),
    ("clock", lambda: record(issued_at=START + 300_001).envelope),
    ("expired", lambda: record(issued_at=START - 10_000, life=10).envelope),
    ("expired", lambda: record(life=0).envelope),
    ("expired", lambda: record(issued_at=START + 5000, life=-1).envelope),
    ("ttl_too_long", lambda: record(life=604_800.001).envelope),
    ("bad_signature", lambda: forged(good())),
]


@pytest.mark.parametrize(("reason", "make"), REFUSALS)
def test_each_refusal_has_its_name(storage: RecordStorage, reason: str, make: Callable[[], object]) -> None:
    assert storage.store(KEY, make()) == Verdict(reason, None)
    assert len(storage) == 0


@pytest.mark.parametrize(
    "accepted",
    [{"issued_at": START + 300_000}, {"issued_at": START - 10_000, "life": 10.001}, {"life": 604_800}, {"life": 0.001}],
)
def test_at_each_limit_a_record_is_accepted(storage: RecordStorage, accepted: dict[str, int]) -> None:
    assert storage.store(KEY, record(**accepted).envelope) == ACCEPTED  # type: ignore[arg-type]


def test_stale_and_conflict_carry_what_is_held(storage: RecordStorage) -> None:
    low, high = sorted((record(b"a", seq=5), record(b"b", seq=5)), key=lambda each: each.envelope)
    older = record(seq=4)
    assert storage.store(KEY, high.envelope) == ACCEPTED
    assert storage.store(KEY, low.envelope) == Verdict("conflict", high.envelope)
    assert storage.store(KEY, older.envelope) == Verdict("stale", high.envelope)
    assert held(storage) == [high.envelope]


def test_on_a_tie_the_greater_envelope_wins_whoever_comes_first(storage: RecordStorage) -> None:
    low, high = sorted((record(b"a", seq=5), record(b"b", seq=5)), key=lambda each: each.envelope)
    assert storage.store(KEY, low.envelope) == ACCEPTED
    assert storage.store(KEY, high.envelope) == ACCEPTED
    assert held(storage) == [high.envelope]


AHEAD = START + 300_001
ORDER: list[tuple[str, Callable[[], object]]] = [
    # each breaks the rule in front and every later one that a record can still break
    ("too_large", lambda: b"x" * 1001),
    ("malformed", lambda: b"PLR1" + bytes(300)),
    ("wrong_key", lambda: forged(record(name="other", seq=1, issued_at=AHEAD, life=-9e6))),
    ("clock", lambda: forged(record(seq=1, issued_at=AHEAD, life=-9e6))),
    ("clock", lambda: forged(record(seq=1, issued_at=AHEAD, life=700_000))),
    ("expired", lambda: forged(record(seq=1, issued_at=START - 700_000_000, life=699_999))),
    ("ttl_too_long", lambda: forged(record(seq=1, life=700_000))),
    ("stale", lambda: forged(record(seq=1))),
    ("bad_signature", lambda: forged(record(seq=5))),
    ("bad_signature", lambda: forged(record(by=IDENTITIES[39]))),
]


@pytest.mark.parametrize(("reason", "make"), ORDER)
def test_of_several_broken_rules_the_first_of_the_contract_is_named(
    clock: ManualClock, reason: str, make: Callable[[], object]
) -> None:
    storage = RecordStorage(clock=clock)
    assert storage.store(KEY, record(b"held", seq=5).envelope) == ACCEPTED
    for other in IDENTITIES[1:32]:
        assert storage.store(KEY, record(by=other).envelope) == ACCEPTED  # full, too
    assert storage.store(KEY, make()).reason == reason


def test_conflict_comes_before_full(clock: ManualClock) -> None:
    low, high = sorted((record(b"a", seq=5), record(b"b", seq=5)), key=lambda each: each.envelope)
    storage = RecordStorage(clock=clock, max_bytes=len(high.envelope))
    assert storage.store(KEY, high.envelope) == ACCEPTED
    storage.max_bytes = 1
    assert storage.store(KEY, low.envelope) == Verdict("conflict", high.envelope)


def test_the_same_bytes_under_the_other_key_are_verified_once(
    storage: RecordStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    verified: list[Record] = []
    monkeypatch.setattr("plasm_dht.dht.storage.verify", lambda each: (verified.append(each), verify(each))[1])
    mine, other = bound_key(MINE, NAME), record(by=IDENTITIES[1])
    assert storage.store(KEY, good().envelope) is ACCEPTED
    assert storage.store(mine, good().envelope) is ACCEPTED
    assert len(verified) == 1
    assert storage.store(mine, forged(record(seq=START + 1))).reason == "bad_signature"
    assert storage.store(KEY, forged(other)).reason == "bad_signature"
    assert len(verified) == 3


def test_the_dear_check_of_the_signature_is_made_in_admit_alone(storage: RecordStorage) -> None:
    envelope = forged(good())
    checked = storage.check(KEY, envelope)
    assert isinstance(checked, Record)
    assert len(storage) == 0
    assert storage.admit(KEY, checked) == Verdict("bad_signature")


def test_a_holders_max_ttl_is_a_setting(clock: ManualClock) -> None:
    storage = RecordStorage(clock=clock, max_ttl=10)
    assert storage.store(KEY, record(life=10.001).envelope) == Verdict("ttl_too_long")
    assert storage.store(KEY, record(life=10).envelope) == ACCEPTED


# -- the same bytes --------------------------------------------------------------------------------------------------


def test_the_same_bytes_are_accepted_and_change_nothing(storage: RecordStorage, clock: ManualClock) -> None:
    changes: list[bytes] = []
    storage.on_change = lambda key, _: changes.append(key)
    envelope = record(life=100).envelope
    storage.store(KEY, envelope)
    before = storage.holdings(KEY)[0]
    deadline, size = before.deadline, storage.bytes
    clock.advance(50)
    clock.step(-25)  # a copy that arrives when the wall clock says that more is left
    assert storage.store(KEY, envelope) == ACCEPTED
    assert storage.holdings(KEY) == (before,)
    assert (before.deadline, before.keep_deadline, storage.bytes, len(storage)) == (deadline, deadline, size, 1)
    assert changes == [KEY]
    clock.advance(50)
    assert storage.get(KEY) is None


def test_copies_never_extend_a_life(storage: RecordStorage, clock: ManualClock) -> None:
    envelope = record(life=3600).envelope
    for _ in range(359):
        assert storage.store(KEY, envelope) == ACCEPTED
        clock.advance(10)
    assert storage.get(KEY) == envelope
    clock.advance(10)
    assert storage.get(KEY) is None
    assert storage.store(KEY, envelope) == Verdict("expired")


def test_a_copy_that_is_received_again_need_not_be_passed_on_yet(storage: RecordStorage, clock: ManualClock) -> None:
    envelope = record().envelope
    storage.store(KEY, envelope)
    clock.advance(100)
    storage.store(KEY, envelope)
    assert storage.iter_older_than(1) == []
    clock.advance(1)
    assert storage.iter_older_than(1) == [(KEY, envelope)]


# -- expiry ----------------------------------------------------------------------------------------------------------


def test_a_record_is_over_exactly_at_expires_at(storage: RecordStorage, clock: ManualClock) -> None:
    storage.store(KEY, record(life=10).envelope)
    clock.advance(9.999)
    assert storage.get(KEY) is not None
    clock.advance(0.001)
    assert storage.get(KEY) is None


def test_a_record_ends_by_the_wall_clock_when_the_machine_has_slept(storage: RecordStorage, clock: ManualClock) -> None:
    storage.store(KEY, record(life=10).envelope)
    clock.step(10)  # monotonic time stood still
    assert storage.get(KEY) is None


def test_a_record_ends_by_the_monotonic_clock_when_the_wall_clock_is_stepped_back(
    storage: RecordStorage, clock: ManualClock
) -> None:
    storage.store(KEY, record(life=10).envelope)
    clock.step(-200)
    clock.advance(9.9)
    assert storage.get(KEY) is not None
    clock.advance(0.2)
    assert storage.get(KEY) is None
    assert storage.store(KEY, record(life=10).envelope) == ACCEPTED  # the same bytes
    assert storage.get(KEY) is None


def test_the_deadline_is_what_is_left_by_the_wall_or_the_whole_life_whichever_is_smaller(
    storage: RecordStorage, clock: ManualClock
) -> None:
    storage.store(KEY, record(issued_at=START + 200_000, life=10).envelope)  # its publisher's clock is ahead
    storage.store(shared_key("b"), record(name="b", issued_at=START - 6000, life=10).envelope)
    assert storage.holdings(KEY)[0].deadline == clock.monotonic() + 10
    assert storage.holdings(shared_key("b"))[0].deadline == clock.monotonic() + 4


def test_a_wall_clock_stepped_back_revives_nothing_that_was_forgotten_or_not(
    storage: RecordStorage, clock: ManualClock
) -> None:
    envelope = record(life=10).envelope
    storage.store(KEY, envelope)
    clock.advance(11)
    assert storage.get(KEY) is None
    clock.step(-60)
    assert storage.get(KEY) is None
    storage.forget(100)
    assert storage.get(KEY) is None
    storage.store(KEY, envelope)
    assert storage.get(KEY) is None


def test_what_is_over_is_forgotten(storage: RecordStorage, clock: ManualClock) -> None:
    for number in range(10):
        storage.store(shared_key(f"n{number}"), record(name=f"n{number}", life=10 + number).envelope)
    clock.advance(15)
    assert storage.forget(100) == 6
    assert len(storage) == 4
    assert len(list(storage.keys())) == 4
    assert storage.bytes == sum(len(envelope) for _, envelope in storage)
    clock.advance(100)
    storage.forget(100)
    assert (len(storage), storage.bytes, list(storage.keys())) == (0, 0, [])


def test_forgetting_looks_at_no_more_keys_than_it_is_told(storage: RecordStorage, clock: ManualClock) -> None:
    for number in range(10):
        storage.store(shared_key(f"n{number}"), record(name=f"n{number}", life=10).envelope)
    clock.advance(11)
    assert storage.forget(4) == 4
    assert len(storage) == 6
    assert storage.forget(100) == 6


@pytest.mark.parametrize("publishers", [1, 2, 32])
def test_forgetting_ends_while_the_wall_clock_is_behind(clock: ManualClock, publishers: int) -> None:
    storage = RecordStorage(clock=clock)
    for number in range(20):
        for by in IDENTITIES[:publishers]:
            storage.store(shared_key(f"n{number}"), record(name=f"n{number}", by=by, life=10).envelope)
    clock.step(-3600)
    clock.advance(100)
    looked = 0
    while (some := storage.forget(100)) == 100 and looked < 100_000:
        looked += some
    assert looked < 100 * 20 * publishers
    assert storage.forget(100) == 0  # nothing is due before the wall clock has caught up
    assert len(storage) == 20 * publishers
    clock.advance(3600)
    while storage.forget(100):
        pass
    assert len(storage) == 0


def test_a_wall_clock_that_was_in_1970_for_a_moment_keeps_nothing_for_half_a_century(clock: ManualClock) -> None:
    storage = RecordStorage(clock=clock)
    for by in IDENTITIES[:32]:
        storage.store(KEY, record(by=by, life=10).envelope)
    clock.advance(11)
    clock.step(-START / 1000)
    storage.forget(100)
    clock.step(START / 1000)
    clock.advance(HOUR / 1000)
    newcomer = record(by=IDENTITIES[32], issued_at=clock.wall())
    assert storage.store(KEY, newcomer.envelope) == ACCEPTED
    assert held(storage) == [newcomer.envelope]


def test_a_wall_clock_stepped_forward_forgets_when_both_clocks_agree(
    storage: RecordStorage, clock: ManualClock
) -> None:
    storage.store(KEY, record(life=100).envelope)
    clock.step(200)
    storage.forget(100)
    assert storage.get(KEY) is None
    clock.advance(101)
    storage.forget(100)
    assert len(storage) == 0


# -- the guard -------------------------------------------------------------------------------------------------------


def test_an_older_record_with_a_longer_life_cannot_come_back(storage: RecordStorage, clock: ManualClock) -> None:
    long, short = record(b"long", life=3600), record(b"short", issued_at=START + 1, life=60)
    storage.store(KEY, long.envelope)
    storage.store(KEY, short.envelope)
    for _ in range(58):
        clock.advance(61)
        storage.forget(1000)
        assert storage.get(KEY) is None
        assert storage.store(KEY, long.envelope) == Verdict("stale", short.envelope)
        assert held(storage) == [short.envelope]
    clock.advance(62)  # the long one has ended by itself
    assert storage.store(KEY, long.envelope) == Verdict("expired")
    storage.forget(1000)
    assert len(storage) == 0


@pytest.mark.parametrize("back", [0, 1800])
def test_the_guard_lasts_until_the_older_record_has_ended_by_the_wall_clock(
    storage: RecordStorage, clock: ManualClock, back: int
) -> None:
    long, short = record(b"long", life=3600), record(b"short", issued_at=START + 1, life=60)
    storage.store(KEY, long.envelope)
    storage.store(KEY, short.envelope)
    clock.advance(1800)
    clock.step(-back)
    for _ in range(5):
        clock.advance((1800 + back) / 6)
        storage.forget(1000)
        assert storage.store(KEY, long.envelope).reason == "stale"
        assert storage.get(KEY) is None


def test_a_wall_clock_that_is_ahead_for_a_moment_ends_no_guard(storage: RecordStorage, clock: ManualClock) -> None:
    long, short = record(b"long", life=3600), record(b"short", issued_at=START + 1, life=60)
    storage.store(KEY, long.envelope)
    storage.store(KEY, short.envelope)
    clock.advance(61)
    clock.step(4000)
    storage.forget(1000)
    clock.step(-4000)
    assert storage.store(KEY, long.envelope).reason == "stale"


def test_the_guard_lasts_through_several_replacements(storage: RecordStorage, clock: ManualClock) -> None:
    for seq, life in enumerate((3600, 60, 120, 30)):
        storage.store(KEY, record(seq=seq, life=life).envelope)
    clock.advance(3599)
    storage.forget(1000)
    assert storage.store(KEY, record(seq=0, life=3600).envelope).reason == "stale"
    clock.advance(1.1)
    storage.forget(1000)
    assert len(storage) == 0


def test_a_tombstone_guards_until_the_record_that_it_replaced_would_have_ended(
    storage: RecordStorage, clock: ManualClock
) -> None:
    live, tombstone = record(life=3600), record(issued_at=START + 1, life=3599.999, withdrawn=True)
    storage.store(KEY, live.envelope)
    storage.store(KEY, tombstone.envelope)
    clock.advance(3599.9)
    storage.forget(1000)
    assert storage.store(KEY, live.envelope) == Verdict("stale", tombstone.envelope)


def test_a_newer_record_is_taken_after_the_held_one_is_over(storage: RecordStorage, clock: ManualClock) -> None:
    storage.store(KEY, record(life=10).envelope)
    clock.advance(11)  # over, and nobody has tidied up since
    newer = record(b"newer", issued_at=clock.wall(), life=10)
    assert storage.store(KEY, newer.envelope) == ACCEPTED
    assert storage.get(KEY) == newer.envelope
    assert (len(storage), storage.bytes) == (1, len(newer.envelope))


def test_a_publisher_of_a_crowd_is_taken_after_others_are_over(storage: RecordStorage, clock: ManualClock) -> None:
    for by in IDENTITIES[:32]:
        storage.store(KEY, record(by=by, life=10).envelope)
    clock.advance(11)
    assert storage.store(KEY, record(by=IDENTITIES[33], issued_at=clock.wall()).envelope) == ACCEPTED
    assert len(storage) == 1


# -- what a replaced record leaves -----------------------------------------------------------------------------------


def test_a_record_is_contested_until_the_different_one_that_it_replaced_has_ended(storage: RecordStorage) -> None:
    storage.store(KEY, record(b"a", seq=1, life=3600).envelope)
    assert storage.holdings(KEY)[0].contested_until == 0
    storage.store(KEY, record(b"a", seq=2, life=1800).envelope)  # a refresh: the same value
    assert storage.holdings(KEY)[0].contested_until == 0
    storage.store(KEY, record(b"b", seq=3, life=900).envelope)
    assert storage.holdings(KEY)[0].contested_until == START + 1_800_000
    storage.store(KEY, record(b"b", seq=4, life=7200).envelope)
    assert storage.holdings(KEY)[0].contested_until == START + 1_800_000
    storage.store(KEY, record(seq=5, life=7200, withdrawn=True).envelope)
    assert storage.holdings(KEY)[0].contested_until == START + 7_200_000


def test_a_change_is_told_with_what_is_held_now(storage: RecordStorage) -> None:
    told: list[tuple[bytes, bytes]] = []
    storage.on_change = lambda key, holding: told.append((key, holding.envelope))
    first, second = record(seq=1), record(seq=2)
    for each in (first, second, first):
        storage.store(KEY, each.envelope)
    assert told == [(KEY, first.envelope), (KEY, second.envelope)]


# -- several publishers ----------------------------------------------------------------------------------------------


def test_publishers_live_side_by_side_freshest_first(storage: RecordStorage) -> None:
    envelopes = [record(by=IDENTITIES[n], issued_at=START + n).envelope for n in (3, 1, 2)]
    for envelope in envelopes:
        assert storage.store(KEY, envelope) == ACCEPTED
    assert held(storage) == [envelopes[0], envelopes[2], envelopes[1]]
    assert storage.get(KEY) == envelopes[0]


def test_at_most_32_publishers_share_a_key_and_none_is_evicted(storage: RecordStorage) -> None:
    for by in IDENTITIES[:32]:
        assert storage.store(KEY, record(by=by).envelope) == ACCEPTED
    before = set(held(storage))
    assert storage.store(KEY, record(by=IDENTITIES[32], issued_at=START + 9).envelope) == Verdict("full")
    assert set(held(storage)) == before
    assert storage.store(bound_key(IDENTITIES[32].public_key, NAME), record(by=IDENTITIES[32]).envelope) == ACCEPTED
    newer = record(b"newer", by=IDENTITIES[31], issued_at=START + 9)
    assert storage.store(KEY, newer.envelope) == ACCEPTED
    assert storage.holding(KEY, IDENTITIES[31].public_key) is storage.holdings(KEY)[0]
    storage.keep_own(KEY, record(by=IDENTITIES[33]))
    assert len(storage) == 34


def test_the_end_of_one_publishers_record_leaves_the_others(storage: RecordStorage, clock: ManualClock) -> None:
    short, long = record(by=IDENTITIES[1], issued_at=START + 1, life=10), record(by=IDENTITIES[2], life=20)
    storage.store(KEY, short.envelope)
    storage.store(KEY, long.envelope)
    clock.advance(12)
    assert storage.get(KEY) == long.envelope
    storage.forget(100)
    assert held(storage) == [long.envelope]


# -- caps ------------------------------------------------------------------------------------------------------------


def at_distances(count: int) -> list[tuple[int, bytes, Record]]:
    """Records of many names, nearest to the zero id first."""
    made = [record(name=f"name {number}", value=bytes(50)) for number in range(count)]
    return sorted((int.from_bytes(shared_key(each.name)), shared_key(each.name), each) for each in made)


MANY = [(key, each) for _, key, each in at_distances(30)]


def test_a_full_store_gives_up_only_what_is_strictly_farther(clock: ManualClock) -> None:
    storage = RecordStorage(clock=clock, max_records=10)
    storage.attach(bytes(20), clock)
    for key, each in MANY[10:20]:
        assert storage.store(key, each.envelope) == ACCEPTED
    assert storage.store(MANY[25][0], MANY[25][1].envelope) == Verdict("full")
    assert storage.store(MANY[5][0], MANY[5][1].envelope) == ACCEPTED
    assert list(storage.keys()) == [MANY[5][0], *(key for key, _ in MANY[10:19])]
    # another publisher of the farthest key is not farther
    farthest = MANY[18][1]
    assert storage.store(MANY[18][0], record(name=farthest.name, by=IDENTITIES[1]).envelope) == Verdict("full")
    assert len(storage) == 10


def test_bytes_are_capped_like_records(clock: ManualClock) -> None:
    size = max(len(each.envelope) for _, each in MANY)
    storage = RecordStorage(clock=clock, max_bytes=10 * size)
    storage.attach(bytes(20), clock)
    for key, each in MANY[10:20]:
        assert storage.store(key, each.envelope) == ACCEPTED
    big = sign(IDENTITIES[0], MANY[0][1].name, bytes(size + 50), seq=1, issued_at=START, expires_at=START + HOUR)
    assert storage.store(MANY[0][0], big.envelope) == ACCEPTED
    assert storage.bytes == sum(len(envelope) for _, envelope in storage) <= storage.max_bytes
    assert next(iter(storage.keys())) == MANY[0][0]
    kept = [key for key, _ in MANY[10:20] if storage.holdings(key)]
    assert kept == [key for key, _ in MANY[10 : 10 + len(kept)]]  # the farthest went
    assert storage.store(MANY[29][0], MANY[29][1].envelope) == Verdict("full")


def test_a_refused_newcomer_evicts_nobody(clock: ManualClock) -> None:
    storage = RecordStorage(clock=clock, max_bytes=400)
    storage.attach(bytes(20), clock)
    near, middle, far = MANY[0], MANY[1], MANY[2]
    storage.store(near[0], near[1].envelope)
    storage.store(far[0], far[1].envelope)
    before = list(storage)
    big = sign(IDENTITIES[0], middle[1].name, bytes(300), seq=1, issued_at=START, expires_at=START + HOUR)
    assert storage.store(middle[0], big.envelope) == Verdict("full")
    assert list(storage) == before


def test_a_nodes_own_records_are_never_evicted_and_always_kept(clock: ManualClock) -> None:
    storage = RecordStorage(clock=clock, max_records=2)
    storage.attach(bytes(20), clock)
    for key, each in MANY[20:25]:
        storage.keep_own(key, each)
    assert len(storage) == 5
    assert storage.store(MANY[0][0], MANY[0][1].envelope) == Verdict("full")
    assert {key for key, _ in storage} == {key for key, _ in MANY[20:25]}


def test_a_nodes_own_record_stays_when_others_under_its_key_are_evicted(clock: ManualClock) -> None:
    storage = RecordStorage(clock=clock, max_records=3)
    storage.attach(bytes(20), clock)
    key, own = MANY[29]
    storage.keep_own(key, own)  # the oldest of its key, and so the first to go
    for by in IDENTITIES[1:3]:
        assert storage.store(key, record(name=own.name, by=by, issued_at=START + 1).envelope) == ACCEPTED
    for near, each in MANY[:2]:
        assert storage.store(near, each.envelope) == ACCEPTED
    assert storage.store(MANY[2][0], MANY[2][1].envelope) == Verdict("full")
    assert {envelope for _, envelope in storage} == {own.envelope, MANY[0][1].envelope, MANY[1][1].envelope}


def test_a_full_store_takes_a_newer_record_of_what_it_holds(clock: ManualClock) -> None:
    storage = RecordStorage(clock=clock, max_records=2)
    storage.attach(bytes(20), clock)
    key, each = MANY[29]
    storage.store(key, each.envelope)
    storage.keep_own(*MANY[0])
    storage.keep_own(*MANY[1])  # three where two fit
    tombstone = record(name=each.name, issued_at=START + 1, withdrawn=True)
    assert storage.store(key, tombstone.envelope) == ACCEPTED
    assert storage.holdings(key)[0].withdrawn


def test_of_a_newer_record_only_the_bytes_that_it_adds_need_room(clock: ManualClock) -> None:
    near, far = MANY[0], MANY[29]
    storage = RecordStorage(clock=clock, max_bytes=len(near[1].envelope) + len(far[1].envelope))
    storage.attach(bytes(20), clock)

    def newer(each: Record, size: int) -> bytes:
        return record(name=each.name, value=bytes(size), issued_at=START + size).envelope

    for key, each in (near, far):
        assert storage.store(key, each.envelope) == ACCEPTED
        assert storage.store(key, newer(each, 50)) == ACCEPTED  # as large as what it replaces
    assert len(storage) == 2
    assert storage.store(far[0], newer(far[1], 51)) == Verdict("full")
    assert storage.store(near[0], newer(near[1], 51)) == ACCEPTED
    assert [envelope for _, envelope in storage] == [newer(near[1], 51)]


def test_a_record_stays_the_nodes_own_when_another_node_with_its_key_replaces_it(storage: RecordStorage) -> None:
    storage.keep_own(KEY, record(seq=1))
    storage.store(KEY, record(b"from elsewhere", seq=2).envelope)
    assert storage.holdings(KEY)[0].own


def test_own_records_live_by_the_corrected_clock_and_others_by_the_holders(
    storage: RecordStorage, clock: ManualClock
) -> None:
    for clock.correction in (-HOUR, HOUR):  # the network says that we are an hour ahead, or behind
        storage.keep_own(KEY, record(issued_at=START + clock.correction, life=10))
        assert storage.get(KEY) is not None
        assert storage.holdings(KEY)[0].deadline == clock.monotonic() + 10
    other = shared_key("other")
    assert storage.store(other, record(name="other", issued_at=START + HOUR).envelope) == Verdict("clock")
    storage.store(other, record(name="other", life=HOUR / 1000).envelope)  # what is admitted our own clock says,
    assert held(storage, other)
    assert storage.get(other) is None  # what is live the network's


# -- bounded ---------------------------------------------------------------------------------------------------------


def test_one_record_published_ten_thousand_times_has_one_time_of_expiry(
    storage: RecordStorage,
) -> None:
    for seq in range(10_000):
        storage.keep_own(KEY, record_of(seq))
    assert len(storage) == 1
    assert len(storage._expiry) == 1


_TEMPLATE = record(seq=0)


def record_of(seq: int) -> Record:
    """Not signed anew: a test of memory needs many, and our own are not verified."""
    return Record(
        _TEMPLATE.name, MINE, seq, START, START + HOUR + seq, withdrawn=False, value=b"", envelope=_TEMPLATE.envelope
    )


def test_nothing_stays_of_records_that_are_forgotten(storage: RecordStorage, clock: ManualClock) -> None:
    for number in range(300):
        storage.store(shared_key(f"n{number}"), record(name=f"n{number}", life=1).envelope)
    clock.advance(2)
    while storage.forget(100):
        pass
    gc.collect()
    assert not any(storage._shelves)
    assert not storage._expiry
    assert not storage._foreign
    assert not storage._own


# -- order by distance -----------------------------------------------------------------------------------------------


@given(st.binary(min_size=20, max_size=20), st.integers(0, 2**160), st.integers(0, 2**160))
def test_keys_between_are_those_of_the_range_in_the_order_of_distance(own: bytes, nearest: int, farthest: int) -> None:
    clock = ManualClock()
    storage = RecordStorage(clock=clock)
    for key, each in MANY:
        storage.keep_own(key, each)
    storage.attach(own, clock)  # held before it is known for whom
    distances = {key: int.from_bytes(key) ^ int.from_bytes(own) for key, _ in MANY}
    in_order = sorted(distances, key=lambda key: distances[key])
    assert list(storage.keys()) == in_order
    expected = [key for key in in_order if nearest <= distances[key] < farthest]
    assert list(storage.keys_between(nearest, farthest)) == expected
    first, last = distances[in_order[0]], distances[in_order[-1]]
    assert list(storage.keys_between(first, last)) == in_order[:-1]


# -- the order of arrival --------------------------------------------------------------------------------------------

POOL = [
    record(value, by=IDENTITIES[by], seq=seq, life=1000 + seq, withdrawn=withdrawn)
    for by in range(2)
    for seq in range(3)
    for value, withdrawn in ((b"a", False), (b"b", False), (b"", True))
]


@given(st.lists(st.sampled_from(POOL), max_size=15), st.integers(0, 2**32))
def test_every_holder_ends_with_the_same_records_whatever_the_order(some: list[Record], seed: int) -> None:
    shuffled = [*some, *some[:3]]
    random.Random(seed).shuffle(shuffled)
    ends = []
    for order in (some, shuffled):
        storage = RecordStorage(clock=ManualClock())
        for each in order:
            storage.store(KEY, each.envelope)
        ends.append((held(storage), len(storage), storage.bytes))
    assert ends[0] == ends[1]
