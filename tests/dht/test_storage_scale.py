"""What a million records cost: steps and bytes where the tests run, memory and pauses in `make soak`."""

import gc
import json
import random
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plasm_dht.dht import storage as module
from plasm_dht.dht.due import DueQueue
from plasm_dht.dht.order import BLOCK, SortedBytes
from plasm_dht.dht.storage import EVICTION_SLICE, Holding
from plasm_dht.record import decode, shared_key
from tests.dht.scale import Neighbours, name_of, unsigned
from tests.dht.support import IDENTITIES, START, ManualClock, record

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _nobody_verifies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "verify", lambda record: True)


def steps(call: Callable[[], object]) -> int:
    """Bytecode instructions that the call takes: its cost, whatever else the machine does."""
    count = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal count
        frame.f_trace_opcodes = True
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


# -- steps -----------------------------------------------------------------------------------------------------------


def costs(count: int) -> dict[str, int]:
    """Steps of what a node with that many records does for one of them."""
    here = Neighbours()
    storage, rng = here.storage, random.Random(2)
    for _ in range(30):
        here.add(rng.randbytes(20))
    here.fill(count)
    key, envelope = unsigned(rng, count)
    newer = envelope.replace(msgspec.msgpack.encode(START), msgspec.msgpack.encode(START + 1), 1)
    other_key, other = unsigned(rng, count + 1, life=60)
    newcomer = here.add(b"\xff" * 20)

    def forget_one() -> None:
        here.clock.advance(61)
        assert storage.forget(100) == 1

    cost = {
        "put": steps(lambda: storage.store(key, envelope)),
        "the same bytes": steps(lambda: storage.store(key, envelope)),
        "replace": steps(lambda: storage.store(key, newer)),
        "read": steps(lambda: storage.holdings(key)),
        "read what is not held": steps(lambda: storage.holdings(bytes(19) + key[:1])),
        "get": steps(lambda: storage.get(key)),
        "a new contact": steps(lambda: here.replicator.on_contact(newcomer)),
        "what a new contact far away concerns": steps(lambda: list(here.replicator.concerns(newcomer))),
        "put what ends first": steps(lambda: storage.store(other_key, other)),
        "forget": steps(forget_one),
    }
    storage.max_records = storage.records
    storage.attach(key, here.clock)  # every other key is farther
    cost["evict"] = steps(lambda: storage.store(key, unsigned(random.Random(3), count)[1]))
    assert storage.records == storage.max_records
    return cost


def test_no_cost_grows_with_what_is_held() -> None:
    steps(lambda: None)  # Python 3.12.1 counts nothing in the first call that is traced
    few, many = costs(300), costs(6000)
    assert {what: (few[what], many[what]) for what in few if many[what] > 1.5 * few[what] + 100} == {}
    assert many["read"] < 100
    assert many["read what is not held"] < 50


def test_no_put_costs_more_than_a_few_times_the_usual_one() -> None:
    here, rng = Neighbours(), random.Random(1)
    made = [unsigned(rng, number) for number in range(3000)]
    cost = [steps(lambda each=each: here.storage.store(*each)) for each in made]  # type: ignore[misc]
    assert max(cost) < 2500


def test_a_record_that_is_published_again_and_again_costs_the_same_each_time() -> None:
    here = Neighbours()
    here.fill(1000)
    made = [record(seq=seq) for seq in range(300)]
    cost = [steps(lambda each=each: here.storage.store(shared_key(each.name), each.envelope)) for each in made]  # type: ignore[misc]
    assert max(cost) < 4000


async def test_no_job_in_a_queue_costs_more_when_others_are_cancelled() -> None:
    queue = DueQueue[int](ManualClock())
    for number in range(2000):
        queue.schedule(number, number)

    def again(number: int) -> None:
        queue.schedule(number, 5000 - number)
        queue.cancel(number + 1)

    assert max(steps(lambda number=number: again(number)) for number in range(0, 2000, 2)) < 2500  # type: ignore[misc]


def test_a_store_evicts_in_slices_when_the_nodes_own_records_have_made_it_far_too_many() -> None:
    here = Neighbours(max_records=1000, max_bytes=2**40)
    here.fill(1000)
    rng = random.Random(2)
    for number in range(500):
        here.storage.keep_own(*own_record(rng, number))
    key, envelope = next(
        each for each in (unsigned(rng, 5000 + number) for number in range(100)) if each[0][0] < 8
    )  # near
    assert here.storage.store(key, envelope).reason is None
    assert here.storage.records == 1500 + 1 - EVICTION_SLICE


def own_record(rng: random.Random, number: int) -> tuple[bytes, Any]:
    key, envelope = unsigned(rng, 1_000_000 + number)
    return key, decode(envelope)


def test_a_store_full_of_the_nodes_own_records_refuses_others_without_looking_at_them() -> None:
    here, rng = Neighbours(max_records=100, max_bytes=2**40), random.Random(2)
    for number in range(3000):
        here.storage.keep_own(*own_record(rng, number))
    here.storage.attach(shared_key(name_of(1)), here.clock)
    key, envelope = unsigned(rng, 1)
    assert steps(lambda: here.storage.store(key, envelope)) < 2000
    assert here.storage.store(key, envelope).reason == "full"


# -- changes and reading ---------------------------------------------------------------------------------------------


def test_who_keeps_replies_is_told_of_every_change_and_of_nothing_else() -> None:
    here = Neighbours()
    storage, clock = here.storage, here.clock
    first, second = record(b"a", seq=1, life=10), record(b"b", seq=2, life=10)
    key = shared_key(first.name)
    shelved: list[bytes] = []
    storage.on_shelved = shelved.append
    for wait, change in (
        (0, lambda: storage.store(key, first.envelope)),
        (0, lambda: storage.store(key, second.envelope)),
        (0, lambda: storage.store(key, record(by=IDENTITIES[1], life=20).envelope)),
        (11, lambda: storage.forget(10)),
        (11, lambda: storage.holdings(key)),
    ):
        clock.advance(wait)
        change()
        assert set(shelved) == {key}
        shelved.clear()
    assert storage.records == 0
    storage.store(key, record(issued_at=clock.wall()).envelope)
    shelved.clear()
    storage.store(key, record(issued_at=clock.wall()).envelope)  # the same bytes
    storage.store(key, first.envelope)  # refused
    storage.holdings(key)
    storage.forget(10)
    assert shelved == []


def test_a_read_looks_at_one_clock_once_and_at_none_where_nothing_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Neighbours()
    here.fill(3)
    looks: list[str] = []
    for clock in ("wall", "monotonic"):
        reading = getattr(here.clock, clock)()

        def look(clock: str = clock, reading: float = reading) -> float:
            looks.append(clock)
            return reading

        monkeypatch.setattr(here.clock, clock, look)
    assert here.storage.holdings(bytes(20)) == ()
    assert looks == []
    assert len(here.storage.holdings(shared_key(name_of(0)))) == 1
    assert looks == ["monotonic"]


# -- memory ----------------------------------------------------------------------------------------------------------


def test_a_record_takes_less_than_900_bytes_with_what_its_replication_needs() -> None:
    here = Neighbours()
    here.fill(100)
    gc.collect()
    tracemalloc.start()
    try:
        here.fill(20_000, seed=2)
        gc.collect()
        size, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert size / 20_000 < 900


def test_the_garbage_collector_sees_no_more_objects_when_more_is_held() -> None:
    here = Neighbours()
    here.fill(1000)
    gc.collect()
    before = len(gc.get_objects())
    here.fill(3000, seed=2)  # a second publisher of the first thousand names
    gc.collect()
    assert len(gc.get_objects()) - before < 100


def test_what_is_held_near_the_node_is_spread_over_small_dicts() -> None:
    here, number = Neighbours(), 0
    while here.storage.records < 500:
        each = record(name=name_of(number))
        number += 1
        if shared_key(each.name)[0] < 8:
            here.storage.keep_own(shared_key(each.name), each)
    assert max(map(len, here.storage._shelves)) < 16


def test_a_holding_leads_to_no_other_but_from_the_freshest_of_its_key() -> None:
    here = Neighbours()
    key = shared_key(record().name)
    gone: list[Holding] = []
    for turn in range(20):  # by turns another one is the freshest
        gone += here.storage.holdings(key)
        assert here.storage.store(key, record(by=IDENTITIES[turn % 3], issued_at=START + turn).envelope).reason is None
    freshest, *others = here.storage.holdings(key)
    assert freshest.others == tuple(others)
    assert {each.others for each in [*gone, *others] if each is not freshest} == {()}


def test_nothing_is_left_of_forgotten_holdings_that_the_garbage_collector_cannot_see() -> None:
    here = Neighbours()
    here.fill(500)
    here.fill(500, seed=2)  # two publishers a key
    gc.collect()
    tracemalloc.start()
    try:
        here.fill(2000, seed=3)
        here.clock.advance(3601)
        while here.storage.forget(100):
            pass
        gc.collect()
        size, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(here.storage) == len(here.replicator._due) == 0
    assert size < 2**20  # the dicts do not shrink


# -- order -----------------------------------------------------------------------------------------------------------

ENTRIES = st.lists(st.tuples(st.booleans(), st.binary(min_size=2, max_size=2)), max_size=400)


@given(ENTRIES, st.binary(min_size=2, max_size=2))
def test_sorted_bytes_are_a_sorted_list(changes: list[tuple[bool, bytes]], start: bytes) -> None:
    entries, model = SortedBytes(2), list[bytes]()
    for put, entry in changes:
        if put or not model:
            entries.add(entry)
            model.append(entry)
        else:
            gone = model.pop(int.from_bytes(entry) % len(model))
            entries.remove(gone)
    model.sort()
    assert len(entries) == len(model)
    assert bool(entries) == bool(model)
    assert entries.first() == (model[0] if model else None)
    assert list(entries.descending()) == model[::-1]
    if len(set(model)) == len(model):
        assert list(entries.ascending(start)) == [each for each in model if each >= start]


def test_many_sorted_bytes_in_several_blocks_and_the_same_one_many_times() -> None:
    entries, rng = SortedBytes(3), random.Random(1)
    model = [rng.randbytes(3) for _ in range(20 * BLOCK)] + [b"abc"] * (3 * BLOCK)
    rng.shuffle(model)
    for entry in model:
        entries.add(entry)
    assert list(entries.descending()) == sorted(model, reverse=True)
    assert max(map(len, entries._blocks)) <= 3 * BLOCK  # each change copies one
    rng.shuffle(model)
    for entry in model:
        entries.remove(entry)
    assert not entries
    with pytest.raises(KeyError):
        entries.remove(b"abc")


def test_whoever_walks_the_keys_misses_none_and_sees_none_twice_while_others_come_and_go() -> None:
    here = Neighbours()
    here.fill(1000)
    there = set(here.storage.keys())
    rng, seen = random.Random(2), list[bytes]()
    for number, key in enumerate(here.storage.keys()):
        seen.append(key)
        here.storage.store(*unsigned(rng, 5000 + number))
        if number == 500:
            here.clock.advance(1)
    assert sorted(seen) == sorted(set(seen))
    assert there <= set(seen)
    assert seen == sorted(seen)


# -- a million -------------------------------------------------------------------------------------------------------


@pytest.mark.soak
def test_a_million_records_take_at_most_1000_bytes_each_and_no_pause_is_above_20_ms() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "tests.dht.scale", "1000000"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    print(ran.stdout)  # noqa: T201
    measured = json.loads(ran.stdout)
    assert measured["bytes_a_record"] <= 1000
    assert {what: ms for what, ms in measured["longest_cpu_ms"].items() if ms > 20} == {}
