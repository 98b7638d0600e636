"""`PlasmServer` over loopback: publish, find, take back, and never believe a liar."""

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest
from kademlia.network import Server
from kademlia.storage import ForgetfulStorage

from plasm_dht import Identity, PlasmServer, RecordStorage
from plasm_dht.dht.routing import Contact
from plasm_dht.errors import ConfigError, IdentityError, ListenError, RecordError
from plasm_dht.record import Record, Value, bound_key, decode, shared_key, sign, verify
from tests.dht.support import (
    HERE,
    IDENTITIES,
    NAME,
    HalfManualClock,
    forged,
    raw_node,
    record,
    server,
    servers,
    until,
)

ONE, TWO, THREE = IDENTITIES[1], IDENTITIES[2], IDENTITIES[3]


def held(node: PlasmServer, by: Identity, name: str = NAME) -> Record | None:
    """The record of the publisher under the name's shared key, at that node."""
    holding = node.storage.holding(shared_key(name), by.public_key)
    return None if holding is None else decode(holding.envelope)


def forget(nodes: list[PlasmServer], dead: PlasmServer) -> None:
    """Spare the test the time-outs of a neighbour that is gone."""
    for node in nodes:
        node.protocol.router.remove_contact(dead.node)


# -- publish, find, take back ----------------------------------------------------------------------------------------


async def test_a_published_value_is_found_by_others_and_gone_when_withdrawn() -> None:
    async with servers(4) as nodes, server(nodes[:1], identity=ONE) as publisher:
        publication = await publisher.publish(NAME, b"value")
        assert (publication.name, publication.stored, publication.refused) == (NAME, 4, {})
        for node in (*nodes, publisher):
            assert await node.get(NAME) == b"value"
        found = await nodes[2].get_records(NAME)
        assert [(each.name, each.publisher, each.value) for each in found] == [(NAME, ONE.publisher_id, b"value")]
        assert (found[0].seq, found[0].expires_at) == (publication.seq, publication.expires_at)
        assert found[0].expires_at - found[0].issued_at == 3_600_000
        assert publisher.standing(NAME) is not None
        withdrawn = await publisher.withdraw(NAME)
        assert withdrawn is not None
        assert withdrawn.seq > publication.seq
        assert withdrawn.expires_at >= publication.expires_at
        assert publisher.standing(NAME) is None
        for node in (*nodes, publisher):
            assert await node.get(NAME) is None
            assert await node.get_records(NAME) == []
            tombstone = held(node, ONE)
            assert tombstone is not None
            assert tombstone.withdrawn


async def test_a_record_is_held_under_both_of_its_keys() -> None:
    async with servers(3) as nodes, server(nodes[:1], identity=ONE) as publisher:
        await publisher.publish(NAME, b"value")
        for node in (*nodes, publisher):
            envelopes = [node.storage.get(key) for key in (shared_key(NAME), bound_key(ONE.public_key, NAME))]
            assert envelopes[0] == envelopes[1] is not None


async def test_publishing_again_replaces_the_value_everywhere() -> None:
    async with servers(3) as nodes, server(nodes[:1], identity=ONE) as publisher:
        first = await publisher.publish(NAME, b"first")
        second = await publisher.publish(NAME, b"second", ttl=60)
        assert second.seq > first.seq
        assert [each.value for each in await nodes[1].get_records(NAME)] == [b"second"]
        assert all(len(node.storage) == 2 for node in nodes)
        standing = publisher.standing(NAME)
        assert standing is not None
        assert 35 < (standing.refresh_in or 0) <= 40  # two thirds of its own life


async def test_set_is_once_and_true() -> None:
    async with servers(2) as nodes, server(nodes[:1], identity=ONE) as publisher:
        assert await publisher.set("any/name", "value", ttl=60) is True
        assert await nodes[1].get("any/name") == "value"
        assert publisher.standing("any/name") is None
        await publisher.publish("kept", 1)
        await publisher.set("kept", 2)
        assert publisher.standing("kept") is None
        assert await nodes[1].get("kept") == 2


async def test_withdrawing_what_was_never_published_says_so() -> None:
    async with servers(2) as nodes, server(nodes[:1], identity=ONE) as publisher:
        assert await publisher.withdraw(NAME) is None
        assert len(nodes[0].storage) == 0


async def test_what_a_killed_publisher_left_can_be_withdrawn_by_who_has_its_key() -> None:
    async with servers(3) as nodes:
        async with server(nodes[:1], identity=ONE) as publisher:
            await publisher.publish(NAME, b"value")
        forget(nodes, publisher)
        async with server(nodes[:1], identity=ONE) as again:
            assert await again.withdraw(NAME) is not None
        assert await nodes[0].get(NAME) is None


@pytest.mark.parametrize("value", [0, -1, 2**64 - 1, -(2**63), 0.5, True, False, "", "größe", b"", b"\x00\xff"])
async def test_every_type_of_value_comes_back_as_it_was(value: Value) -> None:
    async with servers(1) as nodes, server(nodes, identity=ONE) as publisher:
        await publisher.publish("any/name", value)
        publisher.stop()
        forget(nodes, publisher)
        found = await nodes[0].get("any/name")
        assert found == value
        assert type(found) is type(value)


@pytest.mark.parametrize("value", [None, [], {}, bytearray(b"x"), object()])
async def test_a_value_of_another_type_is_the_callers_bug(value: Any) -> None:
    async with server(identity=ONE) as node:
        for publish in (node.publish, node.set):
            with pytest.raises(TypeError):
                await publish(NAME, value)


@pytest.mark.parametrize("value", [bytes(1000), "\ud800", 2**64])
async def test_a_value_that_does_not_fit_leaves_what_is_published_alone(value: Value) -> None:
    async with servers(1) as nodes, server(nodes, identity=ONE) as publisher:
        first = await publisher.publish(NAME, b"value")
        with pytest.raises(RecordError):
            await publisher.publish(NAME, value)
        standing = publisher.standing(NAME)
        assert standing is not None
        assert standing.seq == first.seq
        assert standing.refresh_in is not None  # it is kept alive as before
        assert await nodes[0].get(NAME) == b"value"
        with pytest.raises(RecordError):
            await publisher.publish("another", value)
        assert publisher.standing("another") is None
        assert publisher._publisher is not None
        assert list(publisher._publisher.intents) == [NAME]


@pytest.mark.parametrize("name", ["", "a\x00", "a" * 256, "\ud800"])
async def test_a_bad_name_is_refused_everywhere(name: str) -> None:
    async with server(identity=ONE) as node:
        for call in (lambda: node.publish(name, 1), lambda: node.get(name), lambda: node.get_records(name),
                     lambda: node.withdraw(name), lambda: node.set(name, 1)):  # fmt: skip
            with pytest.raises(RecordError):
                await call()


# -- several publishers, trust ---------------------------------------------------------------------------------------


async def test_publishers_live_side_by_side_and_trust_chooses() -> None:
    async with AsyncExitStack() as stack:
        nodes = await stack.enter_async_context(servers(2))
        publishers = [await stack.enter_async_context(server(nodes[:1], identity=by)) for by in (ONE, TWO, THREE)]
        for number, publisher in enumerate(publishers):
            await until(lambda: nodes[0].clock.wall() > max((h.issued_at for h in nodes[0].storage.holdings(
                shared_key(NAME))), default=0))  # fmt: skip
            await publisher.publish(NAME, number)
        assert [each.value for each in await nodes[1].get_records(NAME)] == [2, 1, 0]  # freshest first
        assert await nodes[1].get(NAME) == 2
        assert await nodes[1].get(NAME, trust=[ONE.publisher_id]) == 0
        both = await nodes[1].get_records(NAME, trust=[ONE.publisher_id, TWO.publisher_id])
        assert [each.value for each in both] == [1, 0]
        assert await nodes[1].get(NAME, trust=[IDENTITIES[9].publisher_id]) is None
        await publishers[2].withdraw(NAME)
        assert await nodes[1].get(NAME) == 1
        assert [each.value for each in await nodes[0].get_records(NAME)] == [1, 0]
        with pytest.raises(IdentityError):
            await nodes[0].get(NAME, trust=["somebody"])


async def test_a_trusted_publisher_is_found_at_its_own_key_when_the_shared_one_is_crowded() -> None:
    async with servers(3) as nodes, server(nodes[:1], identity=ONE) as publisher:
        now = publisher.clock.wall()
        for node in (*nodes, publisher):
            for by in IDENTITIES[4:36]:
                node.storage.store(shared_key(NAME), record(by=by, issued_at=now).envelope)
        publication = await publisher.publish(NAME, b"value")
        assert publication.refused == {"full": 3}
        publisher.stop()
        assert await nodes[1].get(NAME, trust=[ONE.publisher_id]) == b"value"
        assert len(await nodes[1].get_records(NAME)) == 32


# -- alone, and later not --------------------------------------------------------------------------------------------


async def test_a_lonely_publisher_keeps_its_record_and_pushes_it_when_a_neighbour_appears() -> None:
    async with server(identity=ONE) as publisher:
        publication = await publisher.publish(NAME, b"value")
        assert (publication.stored, publication.refused) == (0, {})
        assert await publisher.get(NAME) == b"value"
        assert await publisher.set("once", 1)
        async with server([publisher]) as neighbour:
            await until(lambda: held(neighbour, ONE) is not None and held(neighbour, ONE, "once") is not None)
            assert held(neighbour, ONE).seq == publication.seq  # type: ignore[union-attr]  # the same bytes
            publisher.stop()
            assert await neighbour.get(NAME) == b"value"


async def test_a_withdrawal_reaches_the_neighbour_that_appears_later() -> None:
    async with server(identity=ONE) as publisher:
        await publisher.publish(NAME, b"value")
        await publisher.withdraw(NAME)
        async with server([publisher]) as neighbour:
            await until(lambda: held(neighbour, ONE) is not None)
            assert await neighbour.get(NAME) is None


async def test_a_push_of_the_same_bytes_does_not_put_off_the_refresh() -> None:
    clock = HalfManualClock()
    async with server(identity=ONE, clock=clock) as publisher:
        publication = await publisher.publish(NAME, b"value")
        clock.ahead += 2000  # of its 3,600 s; a refresh is due after at most 2,400
        async with server([publisher], clock=clock) as neighbour:
            await until(lambda: held(neighbour, ONE) is not None)
            assert publisher._publisher is not None
            await until(lambda: publisher._publisher.intents[NAME].stored == 1)  # type: ignore[union-attr]
            standing = publisher.standing(NAME)
            assert standing is not None
            assert standing.seq == publication.seq
            assert standing.refresh_in is not None
            assert standing.refresh_in <= 400


async def test_a_record_is_refreshed_when_it_is_due_and_lives_on() -> None:
    clock = HalfManualClock()
    async with server(clock=clock) as neighbour, server([neighbour], identity=ONE, clock=clock) as publisher:
        first = await publisher.publish(NAME, b"value", ttl=3600)
        clock.ahead += 2401
        await publisher.publish("wakes the scheduler", 1, ttl=1)
        bound = bound_key(ONE.public_key, NAME)
        await until(lambda: any(each.seq > first.seq for each in neighbour.storage.holdings(bound)), seconds=8)
        assert neighbour.storage.holdings(bound)[0].expires_at > first.expires_at
        clock.ahead += 1300  # the first would have ended
        assert await neighbour.get(NAME) == b"value"


async def test_what_is_not_refreshed_is_gone_at_its_expiry() -> None:
    clock = HalfManualClock()
    async with servers(2, clock=clock) as nodes:
        async with server(nodes[:1], identity=ONE, clock=clock) as publisher:
            await publisher.publish(NAME, b"value", ttl=100)
        clock.ahead += 98
        assert await nodes[1].get(NAME) == b"value"
        clock.ahead += 2
        assert await nodes[1].get(NAME) is None
        assert await nodes[0].get_records(NAME) == []


# -- the same key again ----------------------------------------------------------------------------------------------


async def test_after_a_reinstall_a_publisher_goes_on_from_what_it_finds() -> None:
    async with servers(3) as nodes:
        future = record(b"before", by=ONE, seq=2**50, issued_at=nodes[0].clock.wall(), life=7200)
        for node in nodes:
            for key in (shared_key(NAME), bound_key(ONE.public_key, NAME)):
                assert node.storage.store(key, future.envelope).reason is None
        async with server(nodes[:1], identity=ONE) as again:
            publication = await again.publish(NAME, b"after")
            assert publication.seq == 2**50 + 1
            assert publication.stored == 3
            assert await nodes[2].get(NAME) == b"after"
            tombstone = await again.withdraw(NAME)
            assert tombstone is not None
            assert tombstone.expires_at == future.expires_at  # no earlier than any that it replaces
            assert await nodes[2].get(NAME) is None


async def test_a_restarted_publisher_replaces_its_record_after_that_was_over() -> None:
    clock = HalfManualClock()
    async with servers(2, clock=clock) as nodes:
        for value in (b"first", b"second"):
            async with server(nodes[:1], identity=ONE, clock=clock) as publisher:
                publication = await publisher.publish(NAME, value, ttl=10)
                assert publication.stored == 2
                assert await nodes[1].get(NAME) == value
            forget(nodes, publisher)
            clock.ahead += 11  # nobody has tidied up


# -- leaving ---------------------------------------------------------------------------------------------------------


async def test_leaving_the_block_withdraws_what_is_kept_alive() -> None:
    async with servers(3) as nodes:
        async with PlasmServer(identity=ONE) as publisher:
            await publisher.listen(0, HERE)
            await publisher.bootstrap([nodes[0].address])
            await publisher.publish(NAME, b"value")
            await publisher.publish("another", b"value")
            assert await nodes[1].get(NAME) == b"value"
        assert await nodes[1].get(NAME) is None
        assert await nodes[1].get("another") is None


async def test_closing_without_withdrawing_leaves_it_to_expire() -> None:
    async with servers(3) as nodes:
        publisher = PlasmServer(identity=ONE)
        await publisher.listen(0, HERE)
        await publisher.bootstrap([nodes[0].address])
        await publisher.publish(NAME, b"value")
        await publisher.close(withdraw=False)
        assert await nodes[1].get(NAME) == b"value"
        await publisher.close()  # again does no harm


async def test_a_node_that_never_listened_closes_and_says_so_when_asked() -> None:
    async with PlasmServer(identity=ONE) as node:
        for call in (lambda: node.get(NAME), lambda: node.publish(NAME, 1), lambda: node.withdraw(NAME),
                     lambda: node.bootstrap([(HERE, 1)])):  # fmt: skip
            with pytest.raises(ListenError, match="call listen"):
                await call()


async def test_a_port_in_use_is_one_clear_error() -> None:
    async with server() as node, PlasmServer() as second:
        with pytest.raises(ListenError, match=str(node.address[1])):
            await second.listen(node.address[1], HERE)


# -- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", [ForgetfulStorage(), {}, object()])
def test_a_foreign_storage_is_a_type_error(storage: Any) -> None:
    with pytest.raises(TypeError, match="RecordStorage"):
        PlasmServer(storage=storage)


def test_a_storage_of_ours_is_used_even_when_it_is_empty() -> None:
    storage = RecordStorage(max_records=5)
    node = PlasmServer(storage=storage)
    assert node.storage is storage
    assert isinstance(node, Server)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("record_ttl", 0), ("record_ttl", 0.99), ("record_ttl", 604_801), ("record_ttl", float("nan")),
        ("record_ttl", float("inf")), ("record_ttl", -1),
        ("refresh_interval", 0), ("refresh_interval", 3600), ("refresh_interval", 4000), ("refresh_interval", -1),
        ("refresh_interval", float("nan")),
        ("node_id", b"short"), ("node_id", "x" * 20), ("ksize", 0), ("alpha", 0), ("quorum", 0),
        ("max_ttl", 0), ("max_records", 0), ("max_bytes", 1.5),
        ("rate_limit", 0), ("rate_limit", 0.5), ("rate_limit", -1), ("rate_limit", float("nan")),
    ],
)  # fmt: skip
def test_an_impossible_setting_is_refused_by_its_name(setting: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=setting):
        PlasmServer(**{setting: value})


@pytest.mark.parametrize("ttl", [0, 0.5, 604_801, float("nan")])
async def test_an_impossible_life_is_refused(ttl: float) -> None:
    async with server(identity=ONE) as node:
        with pytest.raises(ConfigError, match="ttl"):
            await node.publish(NAME, 1, ttl=ttl)
        assert node.standing(NAME) is None


def test_the_refresh_is_at_two_thirds_of_the_life_by_default() -> None:
    assert PlasmServer().refresh_interval == 2400
    assert PlasmServer(record_ttl=60).refresh_interval == 40
    assert PlasmServer(record_ttl=60, refresh_interval=10).refresh_interval == 10


async def test_a_node_without_an_identity_holds_and_reads_but_publishes_nothing() -> None:
    async with server() as node:
        for call in (lambda: node.publish(NAME, 1), lambda: node.set(NAME, 1), lambda: node.withdraw(NAME)):
            with pytest.raises(IdentityError, match="no identity"):
                await call()
        assert await node.get(NAME) is None


async def test_its_own_address_among_the_bootstrap_addresses_is_ignored() -> None:
    async with server() as node:
        assert await node.bootstrap([node.address]) == []
        assert len(node.protocol.router) == 0


# -- repair ----------------------------------------------------------------------------------------------------------


async def test_reading_repairs_a_holder_with_an_older_record_with_the_same_bytes() -> None:
    async with servers(4, quorum=4) as nodes:
        now = nodes[0].clock.wall()
        older, newer = record(b"older", seq=1, issued_at=now), record(b"newer", seq=2, issued_at=now)
        key = shared_key(NAME)
        for node in nodes[:3]:
            assert node.storage.store(key, older.envelope).reason is None
        assert nodes[2].storage.store(key, newer.envelope).reason is None
        assert [each.value for each in await nodes[3].get_records(NAME)] == [b"newer"]
        await until(lambda: all(node.storage.get(key) == newer.envelope for node in nodes[:3]))


async def test_reading_passes_a_tombstone_on_to_who_missed_it() -> None:
    async with servers(3) as nodes:
        now = nodes[0].clock.wall()
        live, tombstone = record(seq=1, issued_at=now), record(seq=2, issued_at=now, withdrawn=True)
        key = shared_key(NAME)
        nodes[0].storage.store(key, live.envelope)
        nodes[1].storage.store(key, tombstone.envelope)
        assert await nodes[2].get_records(NAME) == []
        await until(lambda: nodes[0].storage.get(key) is None)


# -- liars -----------------------------------------------------------------------------------------------------------

Answer = Callable[[int], Any]


def forged_issue(envelope: bytes) -> bytes:
    return envelope[:-1] + bytes([envelope[-1] ^ 1])


LIES: dict[str, Answer] = {
    "expired": lambda now: record(issued_at=now - 20_000, life=10).envelope,
    "expiring now": lambda now: record(issued_at=now - 10_000, life=10).envelope,
    "withdrawn": lambda now: record(issued_at=now, withdrawn=True).envelope,
    "unsigned": lambda now: forged(record(issued_at=now)),
    "altered": lambda now: forged_issue(record(issued_at=now).envelope),
    "of another name": lambda now: record(issued_at=now, name="another").envelope,
    "plain": lambda now: b"a plain value",
    "text": lambda now: "a plain value",
    "huge": lambda now: bytes(1001),
    "nothing": lambda now: None,
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
@pytest.mark.parametrize("place", ["value", "records"])
async def test_what_a_liar_serves_is_never_returned(lie: Answer, place: str) -> None:
    async with server(quorum=1) as reader, raw_node() as liar:
        envelope = lie(reader.clock.wall())
        reply = {"value": envelope if place == "value" else b"", "records": [envelope] * (place == "records"),
                 "nodes": [], "more": False, "now": reader.clock.wall()}  # fmt: skip
        liar.answers["find_value"] = lambda *_: reply
        reader.protocol.router.add_contact(Contact(liar.node_id, *liar.address))
        assert await reader.get(NAME) is None
        assert await reader.get_records(NAME) == []
        assert await reader.get(NAME, trust=[IDENTITIES[0].publisher_id]) is None
        assert len(reader.storage) == 0


async def test_an_honest_record_beside_the_lies_is_found() -> None:
    async with server() as reader, raw_node() as liar:
        now = reader.clock.wall()
        honest = record(b"honest", by=ONE, issued_at=now).envelope
        reply = {
            "value": LIES["unsigned"](now),
            "records": [*(lie(now) for lie in LIES.values()), honest],
            "more": True,
        }
        liar.answers["find_value"] = lambda *_: reply  # and there is always more
        reader.protocol.router.add_contact(Contact(liar.node_id, *liar.address))
        assert await reader.get(NAME) == b"honest"
        assert [each.value for each in await reader.get_records(NAME)] == [b"honest"]
        assert len(liar.named("find_value")) < 40


async def test_an_older_record_of_a_liar_does_not_hide_the_newest() -> None:
    async with servers(1) as (holder,), raw_node() as liar:
        now = holder.clock.wall()
        older, tombstone = record(b"older", seq=1, issued_at=now), record(seq=2, issued_at=now, withdrawn=True)
        holder.storage.store(shared_key(NAME), tombstone.envelope)
        liar.answers["find_value"] = lambda *_: {"value": older.envelope}
        async with server(quorum=1, node_id=b"\x01" * 20) as reader:
            for node in (holder, liar):
                where = node.node.id if isinstance(node, PlasmServer) else node.node_id
                reader.protocol.router.add_contact(Contact(where, *node.address))
            assert await reader.get_records(NAME) == []


async def test_a_liar_with_endless_nodes_ends_a_lookup() -> None:
    async with server(ksize=4) as reader, raw_node() as liar:
        count = 0

        def endless(*_: Any) -> list[Any]:
            nonlocal count
            count += 1
            return [[shared_key(NAME)[:17] + (count * 20 + n).to_bytes(3), *liar.address] for n in range(20)]

        liar.answers["find_value"] = endless
        reader.protocol.router.add_contact(Contact(liar.node_id, *liar.address))
        assert await reader.get(NAME, timeout=5) is None
        assert count <= 10 * 4


async def test_a_read_ends_at_its_timeout_with_what_is_known_by_then() -> None:
    async with server() as reader, raw_node() as slow, raw_node(b"\x78" * 20) as quick:
        slow.answers = {}
        honest = record(b"honest", issued_at=reader.clock.wall()).envelope
        quick.answers["find_value"] = lambda *_: {"value": honest}
        for node in (slow, quick):
            reader.protocol.router.add_contact(Contact(node.node_id, *node.address))
        loop = asyncio.get_running_loop()
        began = loop.time()
        assert await reader.get(NAME, timeout=0.1) == b"honest"
        assert loop.time() - began < 1


async def test_a_holder_that_refuses_is_counted_by_its_reason() -> None:
    async with server(identity=ONE) as publisher, raw_node() as refusing:
        refusing.answers |= {
            "find_node": lambda *_: [],
            "find_value": lambda *_: [],
            "store": lambda *_: {"ok": False, "reason": "full", "held": None, "now": publisher.clock.wall()},
        }
        publisher.protocol.router.add_contact(Contact(refusing.node_id, *refusing.address))
        publication = await publisher.publish(NAME, b"value")
        assert (publication.stored, publication.refused) == (0, {"full": 2})
        standing = publisher.standing(NAME)
        assert standing is not None
        assert (standing.refresh_in or 99) <= 5  # a failed publish is no success
        envelopes = {arguments[2] for arguments in refusing.named("store")}
        assert len(envelopes) == 1
        assert verify(decode(envelopes.pop()))


async def test_a_held_record_that_only_claims_to_be_ours_teaches_nothing() -> None:
    async with server(identity=ONE) as publisher, raw_node() as liar:
        claim = forged(sign(ONE, NAME, b"", seq=2**60, issued_at=1, expires_at=2**60))
        liar.answers |= {
            "find_node": lambda *_: [],
            "find_value": lambda *_: {"value": claim},
            "store": lambda *_: {"ok": False, "reason": "stale", "held": claim, "now": publisher.clock.wall()},
        }
        publisher.protocol.router.add_contact(Contact(liar.node_id, *liar.address))
        publication = await publisher.publish(NAME, b"value")
        assert publication.seq < 2**60
        assert publication.refused == {"stale": 2}
