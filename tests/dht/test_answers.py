"""What a node says to find_node and find_value: exactly the closest, as the table and the storage are now."""

import random
from typing import Any

import pytest
import umsgpack
from kademlia.node import Node

from plasm_dht.dht.answers import KEPT, Answers
from plasm_dht.dht.nearest import Nearest
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
        """The nodes of an answer, which are in no order, nearest first."""
        self.answers.stamp()
        answer: list[Any] = umsgpack.unpackb(self.answers.find_node(ID, key, self.named_at(asker))[len(ID) + 1 :])
        return in_order(answer, key)

    def found(self, skip: int = 0, asker: Any = ASKER) -> Any:
        self.answers.stamp()
        return umsgpack.unpackb(self.answers.find_value(ID, KEY, self.named_at(asker), skip)[len(ID) + 1 :])

    def named_at(self, address: Any) -> bytes:
        contact = self.router.at(address)
        return b"" if contact is None else contact.encoded

    def expected(self, key: bytes = KEY, without: Contact | None = None) -> list[Any]:
        live = [contact for contact in self.router if not contact.is_stale and contact is not without]
        return in_order([[contact.id, contact.ip, contact.port] for contact in live], key)[:20]


def in_order(nodes: list[Any], key: bytes = KEY) -> list[Any]:
    return sorted(nodes, key=lambda node: int.from_bytes(node[0]) ^ int.from_bytes(key))


@pytest.fixture
def here() -> Setting:
    return Setting()


@pytest.mark.parametrize("contacts", [0, 1, 19, 20, 21, 60, 500])
def test_the_closest_are_those_of_brute_force_whoever_asks_and_however_often(contacts: int) -> None:
    here = Setting(contacts)
    rnd = random.Random(1)
    for key in [rnd.randbytes(20) for _ in range(30)] * 2:
        assert here.nodes(key) == here.expected(key)
        for contact in here.router.closest(int.from_bytes(key), 22):
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


def test_a_change_of_what_is_held_shows_at_once(here: Setting) -> None:
    assert in_order(here.found()) == here.expected()  # nothing is held: as find_node
    first = record(b"v1")
    here.storage.store(KEY, first.envelope)
    assert here.found()["value"] == first.envelope
    assert in_order(here.found()["nodes"]) == here.expected()
    second = record(b"v2", issued_at=START + 1)
    here.storage.store(KEY, second.envelope)
    assert (here.found()["value"], here.found()["records"]) == (second.envelope, [])
    other = record(b"other", by=IDENTITIES[1], issued_at=START - 1)
    here.storage.store(KEY, other.envelope)
    assert (here.found()["value"], here.found()["records"]) == (second.envelope, [other.envelope])
    assert (here.found(skip=1)["value"], here.found()["value"]) == (other.envelope, second.envelope)
    here.clock.advance(3601)
    here.storage.forget(100)
    assert in_order(here.found()) == here.expected()


@pytest.mark.parametrize(("size", "publishers"), [(250, 1), (600, 1), (780, 1), (250, 2), (250, 4), (250, 9)])
@pytest.mark.parametrize("contacts", [3, 200])
def test_where_not_all_fit_the_nearest_are_named_whoever_asks(size: int, publishers: int, contacts: int) -> None:
    here = Setting(contacts)
    held = [record(bytes(size), by=IDENTITIES[each], issued_at=START - each) for each in range(publishers)]
    for each in held:
        here.storage.store(KEY, each.envelope)
    near = here.router.closest(int.from_bytes(KEY), 2)
    for contact in (None, *near):
        for _ in range(2):
            found = here.found(asker=ASKER if contact is None else contact.address)
            assert found["value"] == held[0].envelope
            shown = in_order(found["nodes"])
            assert min(4, contacts - 1) <= len(shown)
            assert shown == here.expected(without=contact)[: len(shown)]
            if publishers == 1 and size == 250:
                assert len(shown) == min(20, contacts - (contact is not None))


def test_a_change_of_the_table_shows_where_something_is_held(here: Setting) -> None:
    here.storage.store(KEY, record().envelope)
    before = in_order(here.found()["nodes"])
    nearest = here.router.closest(int.from_bytes(KEY), 1)[0]
    here.router.remove_contact(nearest)
    assert in_order(here.found()["nodes"]) == here.expected() != before
    here.router.flush()
    assert here.found()["nodes"] == here.nodes() == []


def test_what_is_to_be_left_out_is_left_out_however_little_is_held(here: Setting) -> None:
    here.storage.store(KEY, record().envelope)
    for _ in range(2):
        found = here.found(skip=1)
        assert (found["value"], found["records"], found["more"]) == (None, [], False)
        assert in_order(found["nodes"]) == here.expected()


def test_k_nodes_are_named_beside_several_small_records(here: Setting) -> None:
    for each in range(2):
        here.storage.store(KEY, record(b"", by=IDENTITIES[each], issued_at=START - each).envelope)
    assert in_order(here.found()["nodes"]) == here.expected()


def test_what_has_ended_is_not_shown_from_memory(here: Setting) -> None:
    here.storage.store(KEY, record().envelope)
    assert here.found()["value"] is not None
    here.clock.advance(3601)  # and nothing is stored or forgotten by then
    assert in_order(here.found()) == here.expected()


def test_the_time_in_an_answer_is_that_of_the_answer(here: Setting) -> None:
    here.storage.store(KEY, record().envelope)
    assert here.found()["now"] == START
    here.clock.advance(7)
    assert here.found()["now"] == START + 7000


def test_the_asker_is_not_named_to_itself_where_something_is_held(here: Setting) -> None:
    here.storage.store(KEY, record().envelope)
    nearest = here.router.closest(int.from_bytes(KEY), 1)[0]
    for _ in range(2):
        assert in_order(here.found()["nodes"]) == here.expected()
        assert in_order(here.found(asker=nearest.address)["nodes"]) == here.expected(without=nearest)


def made(here: Setting, monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The keys for which the closest are asked from now on."""
    keys: list[bytes] = []
    to = here.answers._nearest.to

    def note(key: bytes) -> Nearest:
        keys.append(key)
        return to(key)

    monkeypatch.setattr(here.answers._nearest, "to", note)
    return keys


def test_what_is_asked_again_is_not_made_again(here: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    here.storage.store(KEY, record().envelope)
    nearest = here.router.closest(int.from_bytes(KEY), 1)[0]
    keys = made(here, monkeypatch)
    for asker in (ASKER, nearest.address):  # whom the answer names gets one of its own
        first = here.found(asker=asker)
        assert set(keys) == {KEY}
        keys.clear()
        assert here.found(asker=asker) == first
        assert keys == []


def test_a_store_forgets_the_answers_of_its_own_key_alone(here: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    here.storage.store(KEY, record().envelope)
    nearest = here.router.closest(int.from_bytes(KEY), 1)[0]
    for asker in (ASKER, nearest.address):
        here.found(asker=asker)
    other = "/phase/other/arm64/manifest"
    keys = made(here, monkeypatch)
    here.storage.store(shared_key(other), record(name=other).envelope)
    for asker in (ASKER, nearest.address):
        here.found(asker=asker)
    assert keys == [], "what others ask for is not made anew for each record that is taken in"
    here.storage.store(KEY, record(b"v2", issued_at=START + 1).envelope)
    for asker in (ASKER, nearest.address):
        keys.clear()
        here.found(asker=asker)
        assert set(keys) == {KEY}


def test_endless_keys_and_askers_keep_no_endless_answers(here: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    assert KEPT == 4096
    monkeypatch.setattr("plasm_dht.dht.answers.KEPT", 256)
    names = [f"name/{number}" for number in range(128)]
    for name in names:
        here.storage.store(shared_key(name), record(name=name).envelope)
    here.answers.stamp()
    most = 0
    for key in map(shared_key, names):
        for asker in (ASKER, *(near.address for near in here.router.closest(int.from_bytes(key), 6))):
            here.answers.find_value(ID, key, here.named_at(asker))
        most = max(most, len(here.answers._found) + sum(map(len, here.answers._found_for.values())))
    assert 256 - 7 < most <= 256
