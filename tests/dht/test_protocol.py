"""The datagram path over real sockets: stock nodes, raw bytes, liars."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
import umsgpack
from kademlia.network import Server
from kademlia.node import Node
from kademlia.utils import digest

from plasm_dht.dht import wire
from plasm_dht.dht.limits import SILENT_FOR, VERIFIED_FOR
from plasm_dht.dht.protocol import MAX_PINGS
from plasm_dht.dht.routing import Contact
from plasm_dht.dht.server import PlasmServer
from plasm_dht.record import bound_key, decode, shared_key
from tests.dht.support import (
    HERE,
    IDENTITIES,
    NAME,
    HalfManualClock,
    RawNode,
    forged,
    node_id,
    raw_node,
    record,
    server,
    servers,
    until,
)

KEY = shared_key(NAME)
OWN = b"\x22" * 20


@pytest.fixture
async def ours() -> AsyncIterator[PlasmServer]:
    async with server(node_id=OWN, clock=HalfManualClock()) as node:
        yield node


@pytest.fixture
async def raw() -> AsyncIterator[RawNode]:
    async with raw_node() as node:
        yield node


def fresh(node: PlasmServer, **options: Any) -> bytes:
    """An envelope that the node's clock takes for new."""
    return record(issued_at=node.clock.wall(), **options).envelope


@asynccontextmanager
async def stock(**options: Any) -> AsyncIterator[Server]:
    """A stock kademlia node that stays as long as the block, and leaves no timer."""
    node = Server(**options)
    await node.listen(0, HERE)
    try:
        yield node
    finally:
        for _, timeout in node.protocol._outstanding.values():
            timeout.cancel()
        node.stop()
        await asyncio.sleep(0)


def port_of(node: Server) -> int:
    port: int = node.transport.get_extra_info("sockname")[1]
    return port


# -- kademlia's own RPCs ---------------------------------------------------------------------------------------------


async def test_ping_and_stun_are_answered(ours: PlasmServer, raw: RawNode) -> None:
    assert await raw.ask(ours.address, "ping", raw.node_id) == OWN
    assert await raw.ask(ours.address, "stun") == list(raw.address)


async def test_who_asks_is_pinged_once_and_enters_by_its_answer(ours: PlasmServer, raw: RawNode) -> None:
    for _ in range(5):
        await raw.ask(ours.address, "find_node", raw.node_id, KEY)
    await until(lambda: len(ours.protocol.router) == 1)
    assert raw.named("ping") == [[OWN]]
    assert ours.protocol.router.find(raw.node_id).address == raw.address


async def test_who_asks_is_pinged_only_where_its_id_would_get_a_place(raw: RawNode) -> None:
    async with server(node_id=OWN, ksize=2) as node:
        for number in range(4):
            node.protocol.router.add_contact(
                Contact(node_id((0xF << 156) + (number << 150)), f"127.8.0.{number + 1}", 9)
            )
        for asks_as, pings in ((b"\xf7" * 20, 0), (b"\x23" * 20, 1)):
            await raw.ask(node.address, "find_node", asks_as, KEY)
            assert len(raw.named("ping")) == pings


async def test_an_id_that_the_ping_does_not_confirm_does_not_enter(ours: PlasmServer, raw: RawNode) -> None:
    await raw.ask(ours.address, "ping", b"\x99" * 20)
    await until(lambda: len(ours.protocol.router) == 1)
    assert ours.protocol.router.find(b"\x99" * 20) is None
    assert ours.protocol.router.find(raw.node_id) is not None


async def test_a_caller_that_will_not_stay_is_answered_and_never_pinged(ours: PlasmServer, raw: RawNode) -> None:
    for name, arguments in (("ping", []), ("find_node", [KEY]), ("find_value", [KEY])):
        await raw.ask(ours.address, name, bytes(20), *arguments)
    await raw.ask(ours.address, "stun")
    assert raw.named("ping") == []
    assert len(ours.protocol.router) == 0


async def test_a_caller_that_will_not_stay_is_not_pinged_where_a_contact_was_that_died(
    ours: PlasmServer, raw: RawNode
) -> None:
    contact = Contact(raw.node_id, *raw.address)
    ours.protocol.router.add_contact(contact)
    for _ in range(2):
        ours.protocol.router.miss(contact)
    await raw.ask(ours.address, "ping", bytes(20))
    await raw.ask(ours.address, "stun")
    assert raw.named("ping") == []
    await raw.ask(ours.address, "ping", raw.node_id)
    await until(lambda: ours.protocol.router.live_count == 1)


async def test_find_node_gives_the_closest_without_the_caller(ours: PlasmServer, raw: RawNode) -> None:
    for number in range(1, 30):
        ours.protocol.router.add_contact(Contact(node_id(number), "203.0.113.7", number))
    ours.protocol.router.add_contact(Contact(raw.node_id, *raw.address))
    found = await raw.ask(ours.address, "find_node", raw.node_id, node_id(0))
    assert [each[0] for each in found] == [node_id(number) for number in range(1, 21)]
    near_caller = await raw.ask(ours.address, "find_node", raw.node_id, raw.node_id)
    assert raw.node_id not in [each[0] for each in near_caller]
    assert len(near_caller) == 20
    assert await raw.ask(ours.address, "find_value", raw.node_id, node_id(0)) == found  # nothing is held


async def test_find_value_gives_what_is_held_and_the_holders_time(ours: PlasmServer, raw: RawNode) -> None:
    older = record(by=IDENTITIES[1], issued_at=ours.clock.wall() - 1000).envelope
    newer, tombstone = fresh(ours, by=IDENTITIES[2]), fresh(ours, by=IDENTITIES[3], withdrawn=True)
    for envelope in (older, newer, tombstone):
        assert ours.storage.store(KEY, envelope).reason is None
    ours.protocol.router.add_contact(Contact(node_id(5), "203.0.113.7", 1))
    found = await raw.ask(ours.address, "find_value", bytes(20), KEY)
    in_order = [holding.envelope for holding in ours.storage.holdings(KEY)]
    assert [found["value"], *found["records"]] == in_order
    assert found["nodes"] == [[node_id(5), "203.0.113.7", 1]]
    assert found["more"] is False
    assert abs(found["now"] - ours.clock.wall()) < 5000
    skipped = await raw.ask(ours.address, "find_value", bytes(20), KEY, 2)
    assert [skipped["value"], *skipped["records"]] == in_order[2:]
    nothing = await raw.ask(ours.address, "find_value", bytes(20), KEY, 3)
    assert (nothing["value"], nothing["records"], nothing["more"]) == (None, [], False)


# -- what is dropped -------------------------------------------------------------------------------------------------

FRAME = b"\x00" + bytes(20)


def request(name: object, *arguments: object) -> bytes:
    return FRAME + umsgpack.packb([name, list(arguments)])


MALFORMED = [
    b"", b"\x00", b"\x00" * 21, b"\xff" * 300, b"\x02" + bytes(40),
    FRAME + b"\xc1", FRAME + b"\x92\xa4ping", FRAME + b"\x81\x80\x01", FRAME + b"\x91" * 9000,
    FRAME + umsgpack.packb("ping"), FRAME + umsgpack.packb(["ping"]), FRAME + umsgpack.packb({"ping": []}),
    FRAME + umsgpack.packb(["ping", {"a": 1}]), FRAME + umsgpack.packb(["ping", [OWN], 1]),
    request(b"ping", OWN), request(1, OWN), request(None), request("", OWN),
    # no attribute of the node becomes a remote call
    request("__class__"), request("stop"), request("_send", b"", [HERE, 1]), request("welcome", [HERE, 1], OWN),
    request("rpc_ping", OWN), request("datagram_received", b"", [HERE, 1]), request("call_ping", OWN),
    request("connection_lost", None),
    # arity
    request("ping"), request("ping", OWN, 1), request("stun", OWN), request("find_node", OWN),
    request("find_node", OWN, KEY, 1), request("find_value", OWN), request("find_value", OWN, KEY, 0, 0),
    request("store", OWN, KEY), request("store", OWN, KEY, b"", 1),
    # types
    request("ping", "x" * 20), request("ping", 1), request("ping", None), request("ping", [OWN]),
    request("ping", OWN[1:]), request("ping", OWN + b"x"), request("ping", {"a": 1}),
    request("find_node", OWN, 1), request("find_node", OWN, "x" * 20), request("find_node", 7, KEY),
    request("find_value", OWN, b"short"), request("find_value", OWN, KEY, -1), request("find_value", OWN, KEY, "1"),
    request("find_value", OWN, KEY, True), request("find_value", OWN, KEY, 2**40), request("find_value", OWN, KEY, 1.0),
    request("store", OWN, 1, b""), request("store", 1, KEY, b""), request("store", OWN, KEY[1:], b""),
]  # fmt: skip


async def test_nothing_malformed_is_answered_or_raises(ours: PlasmServer, raw: RawNode) -> None:
    for datagram in MALFORMED:
        raw.transport.sendto(datagram, ours.address)
    for _ in range(50):
        raw.transport.sendto(os.urandom(200), ours.address)
        raw.transport.sendto(FRAME + os.urandom(60), ours.address)
    assert await raw.ask(ours.address, "ping", bytes(20)) == OWN  # it came after all of them, and is the only answer
    assert raw.datagrams == [b"\x01" + raw._count.to_bytes(20) + umsgpack.packb(OWN)]
    assert ours.protocol.dropped.total() >= len(MALFORMED) - 1  # the empty datagram may be lost by the system
    assert len(ours.protocol.router) == 0


@pytest.mark.parametrize("size", [9 * 1024 + 1, 20_000])
async def test_a_datagram_above_9_kib_is_dropped(ours: PlasmServer, raw: RawNode, size: int) -> None:
    raw.transport.sendto(request("store", OWN, KEY, bytes(size)), ours.address)
    assert await raw.ask(ours.address, "ping", bytes(20)) == OWN
    assert ours.protocol.dropped["size"] == 1
    assert len(raw.datagrams) == 1


async def test_a_large_store_of_a_stock_node_is_read_and_refused(ours: PlasmServer, raw: RawNode) -> None:
    answer = await raw.ask(ours.address, "store", raw.node_id, KEY, bytes(8000))
    assert (answer["ok"], answer["reason"]) == (False, "too_large")


async def test_an_answer_that_nobody_asked_for_is_dropped(ours: PlasmServer, raw: RawNode) -> None:
    raw.transport.sendto(b"\x01" + bytes(20) + umsgpack.packb(OWN), ours.address)
    await raw.ask(ours.address, "ping", bytes(20))
    assert ours.protocol.dropped["unasked"] == 1
    assert len(ours.protocol.router) == 0


async def test_no_attribute_becomes_a_remote_call(ours: PlasmServer) -> None:
    for name in ("ping", "store", "find_node", "misspelt", "call_sotre", "rpc_unknown"):
        assert not hasattr(ours.protocol, name)
        with pytest.raises(AttributeError, match=name):
            getattr(ours.protocol, name)


@pytest.mark.parametrize(
    "answer",
    [1, True, "text", b"short", [], {}, [1], {"value": 1}, {"value": None, "nodes": 5},
     {"value": b"x", "nodes": [[1]]},
     [[b"\x01" * 20, "fe80::1%\x00", 1]], [[b"\x01" * 20, "::1", 1]], [[b"\x01" * 20, "255.255.255.255", 1]],
     [[b"\x01" * 20, HERE, 0]], [[bytes(20), HERE, 1]], [[OWN, HERE, 1]]],
    ids=repr,
)  # fmt: skip
async def test_no_answer_breaks_a_lookup_or_the_socket(ours: PlasmServer, raw: RawNode, answer: Any) -> None:
    raw.answers |= {"find_node": lambda *_: answer, "find_value": lambda *_: answer, "store": lambda *_: answer}
    ours.protocol.router.add_contact(Contact(raw.node_id, *raw.address))
    assert await ours.get(NAME, timeout=0.1) is None
    assert await ours.get_records(NAME, timeout=0.1) == []
    assert not ours.transport.is_closing()
    assert await raw.ask(ours.address, "ping", bytes(20)) == OWN


async def test_undecodable_answers_end_a_call(ours: PlasmServer, raw: RawNode) -> None:
    class Junk(RawNode):
        def datagram_received(self, data: bytes, addr: tuple[Any, ...]) -> None:
            self.transport.sendto(b"\x01" + data[1:21] + b"\x81\x80\x01", addr)

    transport, junk = await asyncio.get_running_loop().create_datagram_endpoint(Junk, local_addr=(HERE, 0))
    answered, result = await ours.protocol.call_find_node(Contact(b"\x55" * 20, *junk.address), Node(KEY))
    assert (answered, result) == (True, None)
    assert await ours.protocol.ping_address(junk.address)
    transport.close()
    assert len(ours.protocol._calls) == 0


# -- calls of ours ---------------------------------------------------------------------------------------------------


async def test_a_request_that_is_not_answered_is_sent_once_more_under_the_same_id(
    ours: PlasmServer, raw: RawNode
) -> None:
    raw.answers = {}
    ours.protocol.round_trips.sample(raw.address, 0.001)  # so that it waits 150 ms
    contact = Contact(raw.node_id, *raw.address)
    ours.protocol.router.add_contact(contact)
    answered, _ = await ours.protocol.call_find_node(contact, Node(KEY))
    assert not answered
    assert [name for _, name, _ in raw.requests] == ["find_node", "find_node"]
    assert len({message_id for message_id, _, _ in raw.requests}) == 1
    assert len(set(raw.datagrams)) == 1
    assert ours.protocol.router.find(raw.node_id).missed == 1
    assert ours.protocol._calls == {}


async def test_an_answer_to_the_second_sending_counts_but_is_no_sample(ours: PlasmServer, raw: RawNode) -> None:
    sent: list[int] = []
    raw.answers["find_node"] = lambda *_: sent.append(1) or ([] if len(sent) == 2 else None)
    ours.protocol.round_trips.sample(raw.address, 0.001)
    before = ours.protocol.round_trips._estimates[raw.address]
    answered, result = await ours.protocol.call_find_node(Contact(raw.node_id, *raw.address), Node(KEY))
    assert (answered, result) == (True, wire.Found([], []))
    assert ours.protocol.round_trips._estimates[raw.address] == before
    await until(lambda: ours.protocol.router.find(raw.node_id) is not None)  # after a ping: it says its id itself


async def test_an_id_that_somebody_named_enters_only_when_the_node_has_said_it(ours: PlasmServer, raw: RawNode) -> None:
    raw.answers |= {"find_node": lambda *_: [], "find_value": lambda *_: []}
    named = Contact(b"\x11" * 20, *raw.address)
    assert not ours.protocol.is_known(named)
    for _ in range(3):
        assert (await ours.protocol.call_find_node(named, Node(KEY)))[0]
        assert (await ours.protocol.call_find_value(named, Node(KEY)))[0]
    await until(lambda: len(ours.protocol.router) == 1)
    assert ours.protocol.router.find(raw.node_id) is not None
    assert ours.protocol.router.find(named.id) is None
    assert not ours.protocol.is_known(named)
    assert ours.protocol.is_known(Contact(raw.node_id, *raw.address))
    assert len(raw.named("ping")) <= 6  # one for each answer at most


async def test_junk_is_no_answer_of_a_contact(ours: PlasmServer, raw: RawNode) -> None:
    raw.answers["find_node"] = lambda *_: "junk"
    contact = Contact(raw.node_id, *raw.address)
    ours.protocol.router.add_contact(contact)
    for _ in range(2):
        assert await ours.protocol.call_find_node(contact, Node(KEY)) == (True, None)
    assert contact.is_stale
    assert ours.protocol.router.closest(0, 1) == []


async def test_an_answer_from_another_address_is_used_but_verifies_nothing(ours: PlasmServer, raw: RawNode) -> None:
    async with raw_node() as other:
        raw.answer_from = other
        answered, result = await ours.protocol.ping_address(raw.address)
        assert (answered, result) == (True, raw.node_id)
        assert await ours.bootstrap_node(raw.address) is None
        assert len(ours.protocol.router) == 0
        now = ours.clock.monotonic()
        assert not ours.protocol._verified.has(raw.address, now)
        assert not ours.protocol._verified.has(other.address, now)
        stored = await raw.ask(ours.address, "store", raw.node_id, KEY, fresh(ours))
        assert (stored["ok"], stored["reason"]) == (False, "unverified")


async def test_a_bootstrap_node_is_who_answers_from_the_address_that_was_asked(ours: PlasmServer, raw: RawNode) -> None:
    found = await ours.bootstrap_node(raw.address)
    assert found is not None
    assert (found.id, found.address) == (raw.node_id, raw.address)
    raw.answers = {}
    assert await ours.bootstrap_node(raw.address) is None


async def test_message_ids_are_drawn_anew_for_each_request(ours: PlasmServer, raw: RawNode) -> None:
    raw.answers["stun"] = lambda sender: list(sender)
    contact = Contact(raw.node_id, *raw.address)
    for _ in range(50):
        await ours.protocol.call_stun(contact)
    assert len({message_id for message_id, name, _ in raw.requests if name == "stun"}) == 50


async def test_pings_to_one_address_are_one(ours: PlasmServer, raw: RawNode) -> None:
    outcomes = await asyncio.gather(*(ours.protocol.ping_address(raw.address) for _ in range(10)))
    assert outcomes == [(True, raw.node_id)] * 10
    assert len(raw.named("ping")) == 1


async def test_a_closed_node_answers_its_own_calls_with_nothing(raw: RawNode) -> None:
    async with server() as node:
        raw.answers = {}
        waiting = node.protocol.ping_address(raw.address)
        node.stop()
        assert await waiting == (False, None)
        assert await node.protocol.call_find_node(Contact(raw.node_id, *raw.address), Node(KEY)) == (False, None)
        assert node.protocol._calls == {}


async def test_a_named_id_does_not_drive_out_the_node_that_lives_at_the_address(
    ours: PlasmServer, raw: RawNode
) -> None:
    raw.answers["find_node"] = lambda *_: []
    await ours.bootstrap([raw.address])
    assert ours.protocol.router.find(raw.node_id) is not None
    async with raw_node(b"\x66" * 20) as liar:
        liar.answers["find_node"] = lambda *_: [[b"\x11" * 20, *raw.address]]
        await ours.bootstrap([liar.address])
        assert ours.protocol.router.find(raw.node_id) is not None
        assert ours.protocol.router.find(b"\x11" * 20) is None


# -- stores ----------------------------------------------------------------------------------------------------------


async def test_a_store_is_admitted_after_the_sender_answered_a_ping(ours: PlasmServer, raw: RawNode) -> None:
    envelope = fresh(ours)
    answer = await raw.ask(ours.address, "store", raw.node_id, KEY, envelope)
    assert {key: answer[key] for key in ("ok", "reason", "held")} == {"ok": True, "reason": None, "held": None}
    assert abs(answer["now"] - ours.clock.wall()) < 5000
    assert ours.storage.get(KEY) == envelope
    assert len(raw.named("ping")) == 1
    await raw.ask(ours.address, "store", raw.node_id, bound_key(IDENTITIES[0].public_key, NAME), envelope)
    assert len(raw.named("ping")) == 1  # it is verified now
    for after, pings in ((VERIFIED_FOR - 1, 1), (2, 2)):
        ours.clock.ahead += after
        assert (await raw.ask(ours.address, "store", raw.node_id, KEY, fresh(ours)))["ok"]
        assert len(raw.named("ping")) == pings


async def test_refusals_carry_their_reason_and_what_is_held(ours: PlasmServer, raw: RawNode) -> None:
    newer = fresh(ours, seq=2)
    for envelope, reason, held in (
        (newer, None, None),
        (newer, None, None),
        (fresh(ours, seq=1), "stale", newer),
        (b"plain", "malformed", None),
        ("text", "malformed", None),
        (forged(decode(fresh(ours, seq=3))), "bad_signature", None),
        (fresh(ours, name="other"), "wrong_key", None),
    ):
        answer = await raw.ask(ours.address, "store", raw.node_id, KEY, envelope)
        assert (answer["ok"], answer["reason"], answer["held"]) == (reason is None, reason, held)
    assert ours.protocol.stats.stores_received["stale"] == 1
    assert ours.storage.get(KEY) == newer


async def test_an_unverified_sender_is_refused_after_2_s_and_its_resends_make_nothing(ours: PlasmServer) -> None:
    async with raw_node() as silent:
        silent.answers = {}
        loop = asyncio.get_running_loop()
        began, tasks = loop.time(), len(asyncio.all_tasks())
        stores = [silent.send(ours.address, "store", silent.node_id, KEY, fresh(ours), message_id=b"i" * 20)]
        stores += [silent.send(ours.address, "store", silent.node_id, KEY, fresh(ours), message_id=b"i" * 20)] * 9
        await silent.arrived.wait()
        assert len(asyncio.all_tasks()) == tasks + 1
        message_id, answer = await silent.responses.get()
        assert message_id == b"i" * 20
        assert (answer["ok"], answer["reason"]) == (False, "unverified")
        assert 1.8 < loop.time() - began < 3
        assert silent.responses.empty()
        assert len(ours.storage) == 0
        assert len({message_id for message_id, _, _ in silent.requests}) == 1  # one ping-back, sent twice
        assert ours.protocol._deferred == set()


async def test_what_refuses_cheaply_needs_no_ping(ours: PlasmServer) -> None:
    async with raw_node() as silent:
        silent.answers = {}
        for envelope in (b"plain", bytes(1001), fresh(ours, name="other"), fresh(ours, life=700_000)):
            answer = await silent.ask(ours.address, "store", bytes(20), KEY, envelope)
            assert answer["ok"] is False
        assert silent.requests == []


async def test_stale_is_said_before_the_sender_is_pinged_and_a_bad_signature_after(ours: PlasmServer) -> None:
    assert ours.storage.store(KEY, fresh(ours, seq=5)).reason is None
    async with raw_node() as silent:
        silent.answers = {}
        answer = await silent.ask(ours.address, "store", bytes(20), KEY, forged(decode(fresh(ours, seq=1))))
        assert (answer["reason"], silent.requests) == ("stale", [])
        answer = await silent.ask(ours.address, "store", bytes(20), KEY, forged(decode(fresh(ours, seq=6))))
        assert answer["reason"] == "unverified"


async def test_the_same_bytes_of_an_unverified_sender_put_off_no_replication(ours: PlasmServer, raw: RawNode) -> None:
    envelope = fresh(ours)
    assert ours.storage.store(KEY, envelope).reason is None
    (holding,) = ours.storage.holdings(KEY)
    received = holding.received
    ours.clock.ahead += 100
    answer = await raw.ask(ours.address, "store", bytes(20), KEY, envelope)
    assert answer["ok"] is True
    assert holding.received == received
    assert await ours.protocol.ping_address(raw.address) == (True, raw.node_id)
    await raw.ask(ours.address, "store", bytes(20), KEY, envelope)
    assert holding.received >= received + 100


async def test_a_resend_while_the_sender_is_pinged_is_answered_once(ours: PlasmServer, raw: RawNode) -> None:
    pings: list[tuple[bytes, tuple[Any, ...]]] = []
    raw.answers["ping"] = lambda sender, _: pings.append((raw.requests[-1][0], sender))
    envelope = fresh(ours)
    for _ in range(3):
        raw.send(ours.address, "store", raw.node_id, KEY, envelope, message_id=b"s" * 20)
    await raw.arrived.wait()
    ping, sender = pings[0]
    raw.transport.sendto(b"\x01" + ping + umsgpack.packb(raw.node_id), sender)
    message_id, answer = await raw.responses.get()
    assert (message_id, answer["ok"]) == (b"s" * 20, True)
    await raw.ask(ours.address, "stun")
    assert raw.responses.empty()
    assert len(ours.storage) == 1


async def test_a_record_that_came_while_the_sender_was_pinged_is_not_lost(ours: PlasmServer, raw: RawNode) -> None:
    pings: list[tuple[bytes, tuple[Any, ...]]] = []
    raw.answers["ping"] = lambda sender, _: pings.append((raw.requests[-1][0], sender))
    newer = fresh(ours, seq=9)
    raw.send(ours.address, "store", raw.node_id, KEY, fresh(ours, seq=1))
    await raw.arrived.wait()
    assert ours.storage.store(KEY, newer).reason is None
    ping, sender = pings[0]
    raw.transport.sendto(b"\x01" + ping + umsgpack.packb(raw.node_id), sender)
    _, answer = await raw.responses.get()
    assert (answer["reason"], answer["held"]) == ("stale", newer)
    assert ours.storage.get(KEY) == newer


# -- limits ----------------------------------------------------------------------------------------------------------


async def test_requests_are_limited_by_source_address() -> None:
    async with server(node_id=OWN, rate_limit=5) as node, raw_node() as flood, raw_node(host="127.0.0.2") as other:
        for _ in range(100):
            flood.send(node.address, "ping", bytes(20))
        assert await other.ask(node.address, "ping", bytes(20)) == OWN
        await until(lambda: flood.responses.qsize() >= 10)
        assert flood.responses.qsize() <= 12
        assert node.protocol.dropped["rate_limit"] == 100 - flood.responses.qsize()


async def test_each_source_address_has_a_limit_of_its_own() -> None:
    hosts = [f"127.0.1.{number}" for number in range(1, 6)]
    async with AsyncExitStack() as stack:
        node = await stack.enter_async_context(server(node_id=OWN, rate_limit=5))
        floods = [await stack.enter_async_context(raw_node(host=host)) for host in hosts]
        for _ in range(40):
            for flood in floods:
                flood.send(node.address, "ping", bytes(20))
        await until(lambda: node.protocol.stats.received == 200)
        await until(lambda: all(flood.responses.qsize() >= 10 for flood in floods))
        assert all(flood.responses.qsize() <= 12 for flood in floods)
        answered = sum(flood.responses.qsize() for flood in floods)
        assert node.protocol.dropped["rate_limit"] == 200 - answered


def test_the_default_limit_is_2000_a_second_with_bursts_of_4000() -> None:
    limit = PlasmServer()._create_protocol()._rate_limit
    assert limit is not None
    assert sum(limit.allows("192.0.2.1", 0.0) for _ in range(5000)) == 4000
    assert sum(limit.allows("192.0.2.1", 1.0) for _ in range(5000)) == 2000


async def test_without_a_limit_all_are_answered() -> None:
    async with server(node_id=OWN, rate_limit=None) as node, raw_node() as flood:
        for _ in range(100):
            flood.send(node.address, "ping", bytes(20))
        await until(lambda: flood.responses.qsize() == 100)


async def test_a_stranger_that_stayed_silent_is_not_pinged_again_for_a_minute(ours: PlasmServer, raw: RawNode) -> None:
    raw.answers = {}
    ours.protocol.round_trips.sample(raw.address, 0.001)  # so that it is waited for 300 ms
    for after, pings in ((0.0, 1), (SILENT_FOR - 1, 1), (1.0, 2)):
        ours.clock.ahead += after
        await raw.ask(ours.address, "find_node", raw.node_id, KEY)
        await until(lambda: not ours.protocol._pings)
        assert len({message_id for message_id, _, _ in raw.requests}) == pings


async def test_no_more_strangers_are_pinged_at_once_than_the_bound_and_stores_that_wait_are_as_many(
    ours: PlasmServer,
) -> None:
    protocol, envelope = ours.protocol, fresh(ours)
    strangers = [(f"127.9.{number // 250}.{number % 250 + 1}", 9) for number in range(MAX_PINGS + 50)]
    for number, stranger in enumerate(strangers):
        request = wire.encode_request(node_id(number + 1), "find_node", (node_id(number + 1), KEY))
        assert protocol._receive(request, stranger) is not None
    assert len(protocol._pings) == MAX_PINGS
    for number, stranger in enumerate(strangers):
        request = wire.encode_request(node_id(number + 1), "store", (bytes(20), KEY, envelope))
        assert protocol._receive(request, stranger) is None
    assert (len(protocol._deferred), protocol.dropped["busy"]) == (MAX_PINGS, 50)


async def test_no_reply_is_above_one_datagram_and_a_reader_sees_every_publisher(
    ours: PlasmServer, raw: RawNode
) -> None:
    for by in IDENTITIES[:32]:
        assert ours.storage.store(KEY, fresh(ours, value=os.urandom(700), by=by)).reason is None
    for number in range(1, 60):
        address = f"2001:db8:{number:x}:ffff:ffff:ffff:ffff:ffff"
        ours.protocol.router.add_contact(Contact(node_id(number << 150 | number), address, 65535))
    seen: list[bytes] = []
    for _ in range(32):
        found = await raw.ask(ours.address, "find_value", bytes(20), KEY, len(seen))
        seen += [found["value"], *found["records"]]
        if not found["more"]:
            break
    assert seen == [holding.envelope for holding in ours.storage.holdings(KEY)]
    await raw.ask(ours.address, "find_node", bytes(20), KEY)
    assert max(map(len, raw.datagrams)) <= 1232


async def test_no_task_is_made_for_a_request(ours: PlasmServer, raw: RawNode) -> None:
    before = asyncio.all_tasks()
    for number in range(40):
        raw.send(ours.address, "ping", node_id(number + 1))
        raw.send(ours.address, "find_node", bytes(20), KEY)
        raw.send(ours.address, "find_value", bytes(20), KEY)
    peak = 0
    async with asyncio.timeout(5):
        while raw.responses.qsize() < 120:
            peak = max(peak, len(asyncio.all_tasks() - before))
            await asyncio.sleep(0)
    assert peak == 0


# -- stock nodes -----------------------------------------------------------------------------------------------------


async def test_stock_nodes_join_through_ours_and_find_each_other() -> None:
    async with servers(3) as nodes, stock() as one, stock() as two:
        await one.bootstrap([nodes[0].address])
        await two.bootstrap([nodes[0].address])
        await until(lambda: all(len(node.protocol.router) == 4 for node in nodes))
        await one.bootstrap([nodes[1].address])
        known = {each.id for bucket in one.protocol.router.buckets for each in bucket.get_nodes()}
        assert {two.node.id, *(node.node.id for node in nodes)} <= known


async def test_a_stock_value_is_refused_by_ours_and_kept_by_stock_nodes() -> None:
    async with server() as node, stock() as one, stock() as two:
        await one.bootstrap([node.address])
        await two.bootstrap([node.address])
        await until(lambda: len(node.protocol.router) == 2)
        await one.set("name", "a plain value")
        assert node.protocol.stats.stores_received["malformed"] >= 1
        assert len(node.storage) == 0
        assert await node.get("name") is None
        assert await node.get_records("name") == []


async def test_a_stock_node_holds_our_records_as_bytes_and_hands_them_back() -> None:
    async with stock() as plain:
        address = (HERE, port_of(plain))
        async with server(identity=IDENTITIES[1]) as publisher, server() as reader:
            await publisher.bootstrap([address])
            publication = await publisher.publish(NAME, b"value")
            assert publication.stored == 1
            assert publication.refused == {}
            held = plain.storage.get(digest(NAME))
            assert decode(held).value == b"value"
            publisher.stop()
            assert await reader.bootstrap([address])
            assert await reader.get(NAME) == b"value"
            assert await reader.get(NAME, trust=[IDENTITIES[1].publisher_id]) == b"value"


async def test_a_stock_node_reads_our_record_as_opaque_bytes() -> None:
    async with server(identity=IDENTITIES[1]) as publisher, stock() as plain:
        await plain.bootstrap([publisher.address])
        await until(lambda: len(publisher.protocol.router) == 1)
        await publisher.publish(NAME, b"value")
        plain.storage.data.clear()
        assert decode(await plain.get(NAME)).value == b"value"


async def test_our_node_routes_through_stock_nodes() -> None:
    async with stock() as plain, server(identity=IDENTITIES[1]) as one, server() as two:
        address = (HERE, port_of(plain))
        await one.bootstrap([address])
        await two.bootstrap([address])
        await until(lambda: len(one.protocol.router) == len(two.protocol.router) == 2)
        await one.publish(NAME, b"value")
        assert await two.get(NAME) == b"value"
        assert two.storage.get(shared_key(NAME)) is not None
