"""What a reading asks of whom, when it ends, and what it mends: each test fails when its mechanism is switched off."""

import asyncio
import random
from collections import Counter

import pytest
from kademlia.node import Node as KeyNode

from plasm_dht.dht.find import RecordLookup
from plasm_dht.dht.ids import TRANSIENT_ID
from plasm_dht.dht.read import _is_amid
from plasm_dht.dht.routing import Contact
from plasm_dht.dht.wire import Outcome
from plasm_dht.record import Record, bound_key, shared_key, sign
from tests.virtual.network import Conditions, Network
from tests.virtual.nodes import PORT, Node, Nodes, everywhere, identity

NAME = "/phase/stable/arm64/manifest"
AUTHOR = identity(1)
HOUR = 3600.0
FIND = "find_node"


def signed(node: Node, value: bytes, seq: int) -> Record:
    now = node.host.clock.wall()
    return sign(AUTHOR, NAME, value, seq=seq, issued_at=now, expires_at=now + 3_600_000)


def nearest(nodes: Nodes) -> list[Node]:
    """All of them, the nearest to the shared key first."""
    key = int.from_bytes(shared_key(NAME))
    return sorted(nodes.nodes, key=lambda node: node.server.node.long_id ^ key)


def knows(node: Node, nodes: list[Node]) -> bool:
    """Whether these are whom a node asks first."""
    first = node.server.protocol.router.closest(int.from_bytes(shared_key(NAME)), len(nodes))
    return [contact.id for contact in first] == [each.server.node.id for each in nodes]


async def test_two_holders_of_an_older_record_next_to_the_reader_do_not_decide(network: Network) -> None:
    nodes = Nodes(network)
    await nodes.grow(40)
    holders = nearest(nodes)[:20]
    reader = next(node for node in nearest(nodes)[20:] if knows(node, holders[:5]))
    old, new = signed(reader, b"old", 1), signed(reader, b"new", 2)
    for node in holders[:2] + holders[5:]:  # the three between them lack it
        node.server.storage[shared_key(NAME)] = (old if node in holders[:2] else new).envelope
    for node in holders[:5]:  # they answer long before anybody else does
        network.link(reader.host, node.host, Conditions(latency=0.001))
        network.link(node.host, reader.host, Conditions(latency=0.001))
    assert await reader.get(NAME) == b"new"


async def test_a_quorum_that_is_fast_waits_for_whom_the_reader_has_asked_first(network: Network) -> None:
    nodes = Nodes(network)
    await nodes.grow(40)
    holders = nearest(nodes)[:20]
    reader = next(node for node in nearest(nodes)[20:] if knows(node, holders[:5]))
    old, new = signed(reader, b"old", 1), signed(reader, b"new", 2)
    fast = [holders[0], *holders[3:5]]  # the first of the three that are asked first, and two that are asked after it
    for node in holders:
        node.server.storage[shared_key(NAME)] = (old if node in fast else new).envelope
    for node in fast:
        network.link(reader.host, node.host, Conditions(latency=0.001))
        network.link(node.host, reader.host, Conditions(latency=0.001))
    assert await reader.get(NAME) == b"new", "one liar names others, and together they would be a quorum"


async def test_a_reader_repairs_a_holder_of_an_older_record(network: Network) -> None:
    nodes = Nodes(network)
    await nodes.grow(6)
    old, new = (signed(nodes.nodes[0], value, seq) for seq, value in ((1, b"old"), (2, b"new")))
    for node, record in zip(nodes.nodes, [old, new, new, new, new, old], strict=True):
        node.server.storage[shared_key(NAME)] = record.envelope
    assert await nodes.nodes[2].get(NAME) == b"new"
    await nodes.nodes[2].host.run(nodes.nodes[2].server.get_records(NAME))
    await asyncio.sleep(5)
    assert [node.seqs(NAME, AUTHOR) for node in nodes.nodes] == [{2}] * 6


async def test_a_reader_gives_the_record_to_the_nearest_node_that_lacks_it(network: Network) -> None:
    nodes = Nodes(network)
    await nodes.grow(40)
    lacking, *holders = nearest(nodes)[:20]
    reader = nearest(nodes)[-1]
    for node in holders:
        node.server.storage[shared_key(NAME)] = signed(reader, b"v1", 1).envelope
    await asyncio.sleep(60)
    assert not lacking.seqs(NAME, AUTHOR)
    await reader.host.run(reader.server.get_records(NAME))
    await asyncio.sleep(2)
    assert lacking.seqs(NAME, AUTHOR) == {1}


async def test_a_reader_with_a_live_record_does_not_wait_for_the_one_that_has_just_died(network: Network) -> None:
    nodes = Nodes(network)
    publisher = await nodes.start(identity=AUTHOR)
    other = await nodes.start([publisher])
    await publisher.publish(NAME, b"v1")
    other.kill()
    reader = await nodes.start([publisher], node_id=TRANSIENT_ID)  # as `plasm-dht get`: it never met the other
    started = network.now
    assert await reader.get(NAME) == b"v1"
    assert network.now - started < 1.2, "one holder is no quorum, and the other answers no more"


async def test_a_reading_ends_at_its_deadline_with_the_best_that_it_has(network: Network) -> None:
    nodes = Nodes(network)
    await nodes.grow(3)
    gate, dead, holder = nodes.nodes
    holder.server.storage[shared_key(NAME)] = signed(holder, b"v1", 1).envelope
    dead.kill()  # a caller that does not know it waits for it for two seconds
    caller = await nodes.start([gate], node_id=TRANSIENT_ID)
    started = network.now
    records = await caller.host.run(caller.server.get_records(NAME, timeout=0.7))
    assert [record.value for record in records] == [b"v1"]
    assert 0.69 < network.now - started < 0.71


async def test_a_reading_that_nobody_answers_ends_after_ten_seconds(network: Network) -> None:
    node = await Nodes(network).start()
    for number in range(200):
        gone = Contact(random.randbytes(20), f"10.77.{number}.1", PORT)
        assert node.server.protocol.router.add_contact(gone)
    started = network.now
    assert await node.get(NAME) is None
    assert 9.9 < network.now - started < 10.1


async def test_the_only_neighbour_is_asked_once_more_when_both_requests_were_lost(network: Network) -> None:
    nodes = Nodes(network)
    await nodes.grow(2)
    reader, holder = nodes.nodes
    holder.server.storage[shared_key(NAME)] = signed(holder, b"v1", 1).envelope
    wait = reader.server.protocol.round_trips.timeout(holder.address)
    network.link(reader.host, holder.host, Conditions(loss=1.0))
    reading = asyncio.ensure_future(reader.get(NAME))
    await asyncio.sleep(1.5 * wait)
    network.link(reader.host, holder.host, Conditions())
    assert await reading == b"v1"


async def test_a_stranger_that_has_died_is_waited_for_once_and_not_for_each_key(network: Network) -> None:
    nodes = Nodes(network)
    await nodes.grow(2)
    gate, dead = nodes.nodes
    dead.kill()
    caller = await nodes.start([gate], node_id=TRANSIENT_ID)
    started = network.now
    assert await caller.get(NAME, trust=[AUTHOR.publisher_id]) is None  # under the bound key, then under the shared one
    assert 1.9 < network.now - started < 2.5


async def test_few_of_the_dead_are_asked_and_all_of_those_that_came_back(network: Network) -> None:
    nodes = Nodes(network)
    await nodes.grow(30)
    reader, living, gone = nodes.nodes[0], nodes.nodes[:8], nodes.nodes[8:]
    network.partition([node.host for node in gone])
    for _ in range(6):
        await everywhere(living, lambda node: node.get(NAME))
        await asyncio.sleep(300)
    router = reader.server.protocol.router
    assert router.live_count <= 7
    network.observe()
    await reader.host.run(reader.server.get_records(NAME))
    asked = {target for _, source, target, kind, _ in network.record if kind == "find_value"}
    dead = {node.address for node in gone}
    assert len(asked & dead) <= 3, "alpha of the dead are asked"
    network.heal()
    await reader.host.run(reader.server.get_records(NAME))
    assert router.live_count >= 20, "each that answers is a reason to ask two more"


async def test_a_caller_that_knows_one_node_finds_the_living_behind_those_who_just_died(network: Network) -> None:
    nodes = Nodes(network)
    gate, *others = await nodes.grow(12)
    key = int.from_bytes(shared_key(NAME))
    nearest = sorted(others, key=lambda node: node.server.node.long_id ^ key)
    holder = nearest[5]
    holder.server.storage[shared_key(NAME)] = signed(holder, b"v1", 1).envelope
    for node in nearest[:5]:
        node.kill()
    caller = await nodes.start([gate], node_id=TRANSIENT_ID)
    assert await caller.get(NAME) == b"v1"


async def test_a_caller_ends_at_its_deadline_when_its_only_contact_has_died(network: Network) -> None:
    nodes = Nodes(network)
    (gate,) = await nodes.grow(1)
    far = Conditions(latency=0.4)  # so slow that its answers are waited for two seconds, twice
    caller_host = network.host()
    network.link(caller_host, gate.host, far)
    network.link(gate.host, caller_host, far)
    caller = await nodes.start([gate], host=caller_host, node_id=TRANSIENT_ID)
    assert caller.server.protocol.router.live_count == 1
    gate.kill()
    started = network.now
    assert await caller.get(NAME, timeout=0.7) is None
    assert 0.69 < network.now - started < 0.71


async def test_a_caller_that_does_not_stay_asks_few_how_many_nodes_there_are(network: Network) -> None:
    nodes = Nodes(network)

    async def asked(gates: list[Node]) -> list[object]:
        caller = await nodes.start(gates, node_id=TRANSIENT_ID)
        await asyncio.sleep(1)  # it goes on as soon as one has answered
        nodes.nodes.remove(caller)
        network.observe()
        for _ in range(2):  # what it has met in the first reading may be a crowd
            before = len(network.record)
            await caller.get(NAME)
        sent = (each for each in network.record[before:] if each[1] == caller.address and each[3] == "find_node")
        return sorted(target for _, _, target, _, _ in sent)

    await nodes.grow(12)
    *near, far = nearest(nodes)
    assert await asked([far]) == [far.address], "though most are nearer to the key, in a small network"
    several = [*near[:2], far]
    assert await asked(several) == sorted(node.address for node in several)
    more = [*near[:3], far]
    told = await asked(more)
    assert len(told) == 3
    assert {*told} < {node.address for node in more}
    await nodes.grow(28)
    await asyncio.sleep(10)
    some = nearest(nodes)[7]
    assert await asked([some]) == [some.address]


async def test_a_caller_that_does_not_stay_pings_nobody_who_shows_the_record(network: Network) -> None:
    nodes = Nodes(network)
    await nodes.grow(60)
    await asyncio.sleep(10)
    holders, gate = nearest(nodes)[:20], nearest(nodes)[-1]
    record = signed(gate, b"v1", 1)
    for node in holders:
        node.server.storage[shared_key(NAME)] = record.envelope
    caller = await nodes.start([gate], node_id=TRANSIENT_ID)
    network.observe()
    assert await caller.get(NAME) == b"v1"
    await asyncio.sleep(1)
    pinged = {target for _, source, target, kind, _ in network.record if source == caller.address and kind == "ping"}
    assert pinged.isdisjoint(node.address for node in holders)


async def test_nodes_far_from_the_keys_are_asked_once_who_is_near_them(network: Network) -> None:
    nodes = Nodes(network)
    await nodes.grow(60)
    await asyncio.sleep(10)
    key = int.from_bytes(shared_key(NAME))

    def may_be_amid_a_crowd(node: Node) -> bool:
        own = node.server.node.long_id
        return _is_amid(key, own, [each.long_id for each in node.server.protocol.router.closest(own, 20)])

    gate = next(node for node in nearest(nodes) if may_be_amid_a_crowd(node))
    caller = await nodes.start([gate], node_id=TRANSIENT_ID)
    network.observe()
    await caller.get(NAME)
    asked = Counter(target for _, source, target, kind, _ in network.record if (source, kind) == (caller.address, FIND))
    assert asked.pop(gate.address) == 2, "for its own neighbours, and who is near a place far off"
    assert len(asked) >= 3
    assert {*asked.values()} == {1}


async def test_who_is_asked_beyond_a_crowd_is_asked_for_all_that_it_holds_until_the_deadline(network: Network) -> None:
    nodes = Nodes(network)
    reader, holder, dead = await nodes.grow(3)
    dead.kill()
    network.link(reader.host, holder.host, Conditions(latency=0.01))
    network.link(holder.host, reader.host, Conditions(latency=0.01))
    now = reader.host.clock.wall()
    for number in range(1, 25):  # more than fit one reply
        record = sign(identity(number), NAME, b"v", seq=1, issued_at=now, expires_at=now + 3_600_000)
        holder.server.storage[shared_key(NAME)] = record.envelope
    search = RecordLookup(reader.server.protocol, shared_key(NAME), k=20, alpha=3)
    contacts = [Contact(node.server.node.id, *node.address) for node in (holder, dead, reader)]
    started = network.now
    await reader.host.run(search.ask_also(contacts, 0.4))
    assert len(search.winners) == 24
    assert [each.contact for each in search.answered()] == contacts[:1]
    assert 0.39 < network.now - started < 0.41


async def test_a_reader_with_a_trust_list_asks_the_shared_key_only_when_no_bound_one_shows_a_live_record(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = Nodes(network)
    await nodes.grow(8)
    publisher = await nodes.start([nodes.nodes[0]], identity=AUTHOR)
    await publisher.publish(NAME, b"v1")
    asked: set[bytes] = set()
    reader = nodes.nodes[1]
    ask = reader.server.protocol.call_find_value

    def note(contact: Contact, key: KeyNode, skip: int = 0) -> asyncio.Future[Outcome]:
        asked.add(key.id)
        return ask(contact, key, skip)

    monkeypatch.setattr(reader.server.protocol, "call_find_value", note)
    trust = [AUTHOR.publisher_id]
    assert await reader.get(NAME, trust=trust) == b"v1"
    assert asked == {bound_key(AUTHOR.public_key, NAME)}
    await publisher.withdraw(NAME)
    assert await reader.get(NAME, trust=trust) is None
    assert asked == {bound_key(AUTHOR.public_key, NAME), shared_key(NAME)}
