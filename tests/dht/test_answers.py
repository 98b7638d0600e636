"""What a node says to find_node and find_value: exactly the closest, as the table and the storage are now."""

import random
from typing import Any

import pytest
import umsgpack
from kademlia.node import Node

from plasm_dht.dht.answers import KEPT, NEAREST_KEPT, Answers
from plasm_dht.dht.routing import Contact, PlasmRoutingTable
from plasm_dht.dht.storage import RecordStorage
from plasm_dht.record import shared_key
from tests.dht.support import IDENTITIES, NAME, START, ManualClock, record

KEY = shared_key(NAME)
ASKER = ("198.51.100.1", 1)
OWN = b"\x22" * 20
ID = b"\x33" * 20  # of the message


class Setting:
    def __init__(self, contacts: int = 200) -> None:
        self.clock = ManualClock()
        self.storage = RecordStorage(clock=self.clock)
        self.storage.attach(OWN, self.clock)
        self.router = PlasmRoutingTable(None, 20, Node(OWN), self.clock)
        rnd = random.Random(contacts)
        for number in range(contacts):
            self.router.add_contact(Contact(rnd.randbytes(20), f"10.0.{number % 250}.1", 8000 + number))
        self.answers = Answers(self.router, self.storage, self.clock, 20)

    def nodes(self, key: bytes = KEY, asker: Any = ASKER) -> list[Any]:
        self.answers.stamp()
        answer: list[Any] = umsgpack.unpackb(self.answers.find_node(ID, key, self.named_at(asker))[len(ID) + 1 :])
        return answer

    def found(self, skip: int = 0, asker: Any = ASKER) -> Any:
        self.answers.stamp()
        return umsgpack.unpackb(self.answers.find_value(ID, KEY, self.named_at(asker), skip)[len(ID) + 1 :])

    def named_at(self, address: Any) -> bytes:
        contact = self.router.at(address)
        return b"" if contact is None else contact.encoded

    def expected(self, key: bytes = KEY, without: Contact | None = None) -> list[Any]:
        live = [contact for contact in self.router if not contact.is_stale and contact is not without]
        near = sorted(live, key=lambda contact: contact.long_id ^ int.from_bytes(key))
        return [[contact.id, contact.ip, contact.port] for contact in near[:20]]


@pytest.fixture
def here() -> Setting:
    return Setting()


@pytest.mark.parametrize("contacts", [0, 1, 19, 20, 21, 60, 500])
def test_the_closest_are_those_of_brute_force_whoever_asks_and_however_often(contacts: int) -> None:
    here = Setting(contacts)
    rnd = random.Random(1)
    for key in [rnd.randbytes(20) for _ in range(30)] * 2:
        assert here.nodes(key) == here.expected(key)
        near = here.router.closest(int.from_bytes(key), 1)
        for contact in near:
            assert here.nodes(key, contact.address) == here.expected(key, without=contact)
        assert here.nodes(key) == here.expected(key)


def test_a_change_of_the_table_shows_at_once(here: Setting) -> None:
    before = here.nodes()
    nearest = here.router.closest(int.from_bytes(KEY), 1)[0]
    for _ in range(2):
        here.router.miss(nearest)
    assert here.nodes() == here.expected() != before
    here.router.add_contact(nearest)
    assert here.nodes() == before
    here.router.remove_contact(nearest)
    assert here.nodes() == here.expected() != before
    newcomer = Contact(KEY[:-1] + bytes([KEY[-1] ^ 1]), "203.0.113.9", 1)
    if here.router.add_contact(newcomer):
        assert here.nodes()[0] == [newcomer.id, newcomer.ip, newcomer.port]


def test_a_change_of_the_table_shows_though_the_lists_are_kept(here: Setting) -> None:
    drawn = random.Random(4)
    keys = [drawn.randbytes(20) for _ in range(600)]

    def check() -> None:
        here.answers.stamp()
        for key in [*keys, *keys]:
            here.answers.find_node(ID, key, b"")
        assert len(here.answers._nearest) > 400
        for key in keys:
            assert here.nodes(key) == here.expected(key)

    check()
    gone = drawn.sample(list(here.router), 20)
    for each in gone:
        here.router.miss(each)
        here.router.miss(each)
    check()
    for each in gone:
        here.router.add_contact(each)
    check()
    here.router.flush()
    while len(here.router) < 150 and here.router.version < 10**6:
        here.router.add_contact(Contact(drawn.randbytes(20), "10.9.9.1", 1000 + here.router.version))
    check()


def test_a_change_of_what_is_held_shows_at_once(here: Setting) -> None:
    assert here.found() == here.expected()  # nothing is held: as find_node
    first = record(b"v1")
    here.storage.store(KEY, first.envelope)
    assert here.found()["value"] == first.envelope
    assert here.found()["nodes"] == here.expected()[: len(here.found()["nodes"])]
    second = record(b"v2", issued_at=START + 1)
    here.storage.store(KEY, second.envelope)
    assert (here.found()["value"], here.found()["records"]) == (second.envelope, [])
    other = record(b"other", by=IDENTITIES[1], issued_at=START - 1)
    here.storage.store(KEY, other.envelope)
    assert (here.found()["value"], here.found()["records"]) == (second.envelope, [other.envelope])
    assert (here.found(skip=1)["value"], here.found()["value"]) == (other.envelope, second.envelope)
    here.clock.advance(3601)
    here.storage.forget(100)
    assert here.found() == here.expected()


def test_what_has_ended_is_not_shown_from_memory(here: Setting) -> None:
    here.storage.store(KEY, record().envelope)
    assert here.found()["value"] is not None
    here.clock.advance(3601)  # and nothing is stored or forgotten by then
    assert here.found() == here.expected()


def test_the_time_in_an_answer_is_that_of_the_answer(here: Setting) -> None:
    here.storage.store(KEY, record().envelope)
    assert here.found()["now"] == START
    here.clock.advance(7)
    assert here.found()["now"] == START + 7000


def test_the_asker_is_not_named_to_itself_where_something_is_held(here: Setting) -> None:
    here.storage.store(KEY, record().envelope)
    nearest = here.router.closest(int.from_bytes(KEY), 1)[0]
    assert here.found()["nodes"][0][0] == nearest.id
    assert nearest.id not in [node[0] for node in here.found(asker=nearest.address)["nodes"]]
    assert here.found()["nodes"][0][0] == nearest.id


def made(here: Setting, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The keys that are looked up in the table from now on."""
    keys: list[int] = []
    deciding = here.router.deciding_bits
    monkeypatch.setattr(here.router, "deciding_bits", lambda key: (keys.append(key), deciding(key))[1])
    return keys


def test_what_is_asked_for_once_is_not_kept(here: Setting) -> None:
    names = [f"name/{number}" for number in range(2 * KEPT)]
    for name in names:
        here.storage.store(shared_key(name), record(name=name).envelope)
    here.answers.stamp()
    for name in names:
        here.answers.find_value(ID, shared_key(name), here.named_at(ASKER))
        assert not here.answers._found
        assert len(here.answers._asked) <= KEPT
    here.answers.find_value(ID, shared_key(names[-1]), here.named_at(ASKER))
    assert list(here.answers._found) == [shared_key(names[-1])]


def test_what_is_asked_again_is_not_made_again(here: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    here.storage.store(KEY, record().envelope)
    here.found()
    nearest = here.router.closest(int.from_bytes(KEY), 1)[0]
    keys = made(here, monkeypatch)
    for asker in (ASKER, nearest.address):  # whom the answer names gets one of its own
        first = here.found(asker=asker)["nodes"]
        assert len(keys) == 1
        assert here.found(asker=asker)["nodes"] == first
        assert len(keys) == 1
        keys.clear()


def test_a_store_forgets_the_answers_of_its_own_key_alone(here: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    here.storage.store(KEY, record().envelope)
    nearest = here.router.closest(int.from_bytes(KEY), 1)[0]
    for asker in (ASKER, ASKER, nearest.address):
        here.found(asker=asker)
    other = "/phase/other/arm64/manifest"
    keys = made(here, monkeypatch)
    here.storage.store(shared_key(other), record(name=other).envelope)
    for asker in (ASKER, nearest.address):
        here.found(asker=asker)
    assert keys == [], "what others ask for is not made anew for each record that is taken in"
    here.storage.store(KEY, record(b"v2", issued_at=START + 1).envelope)
    for asker in (ASKER, nearest.address):
        here.found(asker=asker)
    assert len(keys) == 2


def test_keys_with_the_same_closest_are_looked_up_once_and_endless_ones_keep_no_endless_lists(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here = Setting(contacts=900)
    looked_up = 0
    closest = here.router.closest

    def count(key: int, k: int) -> list[Contact]:
        nonlocal looked_up
        looked_up += 1
        return closest(key, k)

    monkeypatch.setattr(here.router, "closest", count)
    drawn = random.Random(2)
    here.answers.stamp()
    first = [drawn.randbytes(20) for _ in range(30_000)]
    here.answers.find_node(ID, first[0], b"")
    assert not here.answers._nearest, "one alone is not worth to look around"
    for key in first:
        here.answers.find_node(ID, key, b"")
    assert len(here.answers._nearest) == NEAREST_KEPT < looked_up
    before = looked_up
    for key in first:  # now a part of them, whatever comes
        here.answers.find_node(ID, key[:-8] + drawn.randbytes(8), b"")
    assert before < looked_up < before + 0.8 * len(first)
    for key in first[:200]:
        assert here.nodes(key) == here.expected(key)
    here.router.remove_contact(next(iter(here.router)))
    here.answers.stamp()
    assert not here.answers._nearest


def test_endless_keys_and_askers_keep_no_endless_answers(here: Setting) -> None:
    names = [f"name/{number}" for number in range(KEPT // 4)]
    for name in names:
        here.storage.store(shared_key(name), record(name=name).envelope)
    here.answers.stamp()
    most = 0
    for key in map(shared_key, names):
        for asker in (ASKER, ASKER, *(near.address for near in here.router.closest(int.from_bytes(key), 6))):
            here.answers.find_value(ID, key, here.named_at(asker))
        most = max(most, len(here.answers._found) + sum(map(len, here.answers._found_for.values())))
    assert KEPT - 7 < most <= KEPT
