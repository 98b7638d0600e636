"""What liars can do to lookups: in numbers, among honest nodes, over addresses that share no network."""

import asyncio
import logging
import random
from collections.abc import Callable, Iterable, Sequence
from ipaddress import IPv4Address

import pytest

from plasm_dht.clock import RELEASED
from plasm_dht.dht import wire
from plasm_dht.dht.candidate import Candidate
from plasm_dht.dht.find import MAX_IN_REPLY, RecordLookup
from plasm_dht.dht.ids import TRANSIENT_ID, NodeTuple
from plasm_dht.dht.lookup import ROOTS, NodeLookup
from plasm_dht.dht.protocol import PlasmProtocol
from plasm_dht.dht.routing import Contact
from plasm_dht.record import Record, bound_key, shared_key, sign
from tests.virtual import liars
from tests.virtual.liars import KINDS, Book, Liar
from tests.virtual.lookups import lookup, name_of
from tests.virtual.network import Network
from tests.virtual.nodes import PORT, Node, Nodes, everywhere, identity

PUBLISHERS = 10
NAME = "/phase/stable/arm64/manifest"
BOUND, SHARED = bound_key(identity(1).public_key, NAME), shared_key(NAME)


async def grown(network: Network, honest: int) -> Nodes:
    """So many honest nodes, some of which can publish."""
    nodes = Nodes(network)
    await nodes.grow(honest - PUBLISHERS)
    for number in range(PUBLISHERS):
        await nodes.start([nodes.nodes[0]], identity=identity(number + 1))
    await asyncio.sleep(30)
    return nodes


def publishers(nodes: Nodes) -> list[Node]:
    return [node for node in nodes.nodes if node.server.identity]


async def publish_all(nodes: Nodes, value: int) -> None:
    for number, node in enumerate(publishers(nodes)):
        await node.publish(name_of(number), value)


async def trusted_gets(nodes: Nodes, count: int, value: int) -> tuple[int, int, float]:
    """Of so many gets with a trust list: how many found the newest value, an older one; the 95th of 100 times (s)."""
    readers = [node for node in nodes.nodes if not node.server.identity]
    outcomes: list[object] = []
    took: list[float] = []

    async def get(node: Node) -> None:
        number = random.randrange(PUBLISHERS)
        began = asyncio.get_running_loop().time()
        outcomes.append(await node.get(name_of(number), trust=[identity(number + 1).publisher_id]))
        took.append(asyncio.get_running_loop().time() - began)

    for start in range(0, count, 50):
        await asyncio.gather(*(get(node) for node in random.choices(readers, k=min(50, count - start))))
    found = [each for each in outcomes if each is not None]
    return found.count(value), len(found) - found.count(value), sorted(took)[int(0.95 * len(took))]


async def check_ids(nodes: Nodes) -> None:
    """Nobody is in a table or among the k closest under an id that the node at that address does not say it has."""
    real = {node.address: node.server.node.id for node in nodes.nodes}

    def strangers(contacts: Iterable[Contact]) -> list[Contact]:
        return [each for each in contacts if each.address in real and each.id != real[each.address]]

    for node in nodes.nodes:
        assert strangers(node.server.protocol.router) == []
    for node in random.sample(nodes.nodes, 10):
        assert strangers(await node.host.run(lookup(node.server, random.randbytes(20)))) == []


async def among_liars(
    network: Network, honest: int, lying: int, kinds: Sequence[str], gets: int
) -> tuple[int, int, float]:
    nodes = await grown(network, honest)
    await liars.mixed(nodes, network, lying, kinds)
    await asyncio.sleep(30)
    await publish_all(nodes, 1)
    await asyncio.sleep(10)
    await publish_all(nodes, 2)
    await asyncio.sleep(10)
    figures = await trusted_gets(nodes, gets, 2)
    await check_ids(nodes)
    print(f"{honest} honest, {lying} {'/'.join(kinds)}: {figures} of {gets}")  # noqa: T201
    return figures


async def test_a_fifth_of_all_nodes_may_lie(network: Network) -> None:
    newest, older, late = await among_liars(network, 160, 40, KINDS, 200)
    assert newest + older >= 199
    assert newest >= 190
    assert late < 3


@pytest.mark.parametrize("kind", ["endless", "others", "itself"])
async def test_whoever_names_what_is_not_there_is_believed_no_further(network: Network, kind: str) -> None:
    newest, older, late = await among_liars(network, 80, 20, [kind], 60)
    assert (newest, older) == (60, 0)
    assert late < 0.8


def answer_all(
    monkeypatch: pytest.MonkeyPatch, protocol: PlasmProtocol, name: Callable[[], Iterable[NodeTuple]], other: int = 0
) -> None:
    """Have whoever is asked by this node answer after 10 ms, with such nodes, and as whom it was named.

    With `other` as somebody else, whose id differs in these bits.
    """

    def answer(result: object) -> asyncio.Future[wire.Outcome]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[wire.Outcome] = loop.create_future()
        loop.call_later(0.01, future.set_result, (True, result))
        return future

    monkeypatch.setattr(protocol, "call_find_node", lambda *_: answer(wire.Found([], list(name()))))
    monkeypatch.setattr(protocol, "call_ping", lambda contact: answer((contact.long_id ^ other).to_bytes(20)))


@pytest.mark.parametrize("far", [0, 1 << 159], ids=["as they are named", "as others, farther than all"])
async def test_of_endless_nodes_that_all_answer_a_lookup_remembers_and_asks_so_many(
    network: Network, monkeypatch: pytest.MonkeyPatch, far: int
) -> None:
    nodes = Nodes(network)
    await nodes.grow(12)
    node = nodes.nodes[0]
    key = nodes.nodes[1].server.node.long_id ^ 1 << 159  # our contacts are farther than all that are made up
    remembered = []

    def name_nearer() -> Iterable[NodeTuple]:
        remembered.append(max(len(search._candidates), len(search._by_id)))
        for _ in range(wire.MAX_NODES_READ):
            near = key ^ 1 << 150 - len(remembered) // 2 ^ random.getrandbits(40)
            yield NodeTuple(near.to_bytes(20), str(IPv4Address(0x0B000000 + random.getrandbits(24))), PORT)

    search = NodeLookup(node.server.protocol, key.to_bytes(20), k=20, alpha=3)
    answer_all(monkeypatch, node.server.protocol, name_nearer, far)
    found = await node.host.run(search.run())
    assert len(found) == 20 if not far else len(found) >= ROOTS  # who is another is forgotten, being the farthest
    assert len(remembered) == 200
    assert max(remembered) == 400 + 1  # and our own id, which is nobody to be asked
    assert len(search._own) == 11
    assert set(search._own) <= set(search._candidates)


async def test_one_address_is_one_node_whatever_ids_it_says(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = Nodes(network)
    await nodes.grow(2)
    node, other = nodes.nodes
    key = other.server.node.id

    def name_one() -> Iterable[NodeTuple]:
        return (NodeTuple(liars.beside(key), "11.0.0.1", PORT) for _ in range(20))

    answer_all(monkeypatch, node.server.protocol, name_one)
    found = await node.host.run(NodeLookup(node.server.protocol, key, k=20, alpha=3).run())
    assert [contact.ip for contact in found] in ([other.host.address, "11.0.0.1"], ["11.0.0.1", other.host.address])


async def test_liars_who_name_each_other_and_show_an_older_record_lead_few_astray(network: Network) -> None:
    newest, older, _ = await among_liars(network, 120, 30, ["old"], 100)
    assert newest + older == 100
    assert newest >= 90


def shown(protocol: PlasmProtocol, record: Record, holders: Iterable[tuple[int, str]]) -> RecordLookup:
    """A lookup in which holders at these distances to the key (of 2^160) and addresses have shown the record."""
    search = RecordLookup(protocol, SHARED, k=20, alpha=3, quorum=3)
    search.count(protocol.node_count(SHARED))
    for distance, ip in holders:
        contact = Contact((int.from_bytes(SHARED) ^ distance).to_bytes(20), ip, PORT)
        search._candidates.append(Candidate(contact, distance, stale=False))
        search._learn(search._candidates[-1], [record.envelope])
    return search


async def test_a_network_counts_for_two_in_a_quorum(network: Network) -> None:
    nodes = Nodes(network)
    node = await nodes.start()
    now = node.host.clock.wall()
    record = sign(identity(1), NAME, b"value", seq=now, issued_at=now, expires_at=now + 3_600_000)
    for ips, agreed in (
        (["8.8.8.1", "8.8.8.2", "8.8.8.3", "8.8.8.4"], False),
        (["8.8.8.1", "8.8.8.2", "8.8.8.3", "8.8.9.1"], True),
        (["10.0.0.1", "10.0.0.2", "127.0.0.1"], True),
    ):
        assert shown(node.server.protocol, record, enumerate(ips, 1))._is_agreed(record) is agreed


async def test_the_nearest_alone_are_no_quorum(network: Network) -> None:
    nodes = Nodes(network)
    await nodes.grow(40)
    protocol, now = nodes.nodes[1].server.protocol, nodes.nodes[1].host.clock.wall()
    record = sign(identity(1), NAME, b"value", seq=now, issued_at=now, expires_at=now + 3_600_000)
    near = [(number << 150, f"10.0.0.{number}") for number in range(1, 11)]  # by chance four are nearer than 2^157
    assert not shown(protocol, record, near)._is_agreed(record)
    assert shown(protocol, record, [*near[:2], (1 << 158, "10.0.1.1")])._is_agreed(record)
    assert not shown(protocol, record, [near[0], (1 << 158, "10.0.1.1")])._is_agreed(record)


async def test_of_those_who_are_asked_first_one_is_not_among_the_nearest(network: Network) -> None:
    nodes = Nodes(network)
    await nodes.grow(40)
    protocol = nodes.nodes[1].server.protocol
    search = RecordLookup(protocol, SHARED, k=20, alpha=3, quorum=3)
    search.count(protocol.node_count(SHARED))
    near = [
        Contact((int.from_bytes(SHARED) ^ each << 150).to_bytes(20), f"10.9.0.{each}", PORT) for each in range(1, 31)
    ]
    apart = Contact((int.from_bytes(SHARED) ^ 1 << 158).to_bytes(20), "10.9.1.1", PORT)
    search._add([*near, apart])
    asked = []
    for _ in range(4):
        candidate, _ = search._next()
        assert candidate is not None
        candidate.asked = True
        asked.append(candidate.contact)
    assert asked == [near[0], near[1], apart, near[2]]


async def test_of_a_reply_no_more_signatures_are_checked_than_an_honest_one_can_have(network: Network) -> None:
    node = await Nodes(network).start()
    now = node.host.clock.wall()
    small = [sign(identity(number), "n", 0, seq=number, issued_at=now, expires_at=now + 1) for number in range(1, 33)]
    envelopes = [record.envelope for record in small]
    result = wire.found_result(envelopes, []) + wire.time_result(now)
    honest = wire.read_found(wire.response(bytes(20), result))
    assert honest is not None
    assert 8 < len(honest.envelopes) <= MAX_IN_REPLY
    search = RecordLookup(node.server.protocol, shared_key("n"), k=20, alpha=3)
    candidate = Candidate(Contact(bytes(19) + b"\x01", "10.0.0.1", PORT), 1, stale=False)
    assert search.receive(candidate, wire.Found(envelopes, [], True, now))  # the rest is asked for again
    assert (len(search.winners), candidate.shown) == (MAX_IN_REPLY, MAX_IN_REPLY)


@pytest.mark.parametrize("withdrawn", [True, False])
async def test_an_older_end_at_the_bound_key_does_not_hide_what_the_shared_one_has(
    network: Network, withdrawn: bool
) -> None:
    nodes = Nodes(network)
    await nodes.grow(8)
    now = nodes.nodes[0].host.clock.wall()
    value = b"" if withdrawn else b"old"
    old = sign(identity(1), NAME, value, seq=1, issued_at=now, expires_at=now + 60_000, withdrawn=withdrawn)
    new = sign(identity(1), NAME, b"new", seq=2, issued_at=now, expires_at=now + 3_600_000)
    for node in nodes.nodes:
        node.server.storage[BOUND] = old.envelope
        node.server.storage[SHARED] = new.envelope
    if not withdrawn:
        await asyncio.sleep(61)
    trust = [identity(1).publisher_id]
    assert await everywhere(nodes.nodes, lambda node: node.get(NAME, trust=trust)) == [b"new"] * 8
    for node in nodes.nodes:  # and the newest decides, live or not
        tomb = sign(identity(1), NAME, b"", seq=3, issued_at=now, expires_at=now + 3_600_000, withdrawn=True)
        node.server.storage[BOUND] = tomb.envelope
    assert await everywhere(nodes.nodes, lambda node: node.get(NAME, trust=trust)) == [None] * 8


@pytest.mark.soak
@pytest.mark.parametrize("kinds", [KINDS, *((kind,) for kind in KINDS)], ids="-".join)
async def test_a_fifth_of_500_nodes_may_lie(network: Network, kinds: Sequence[str]) -> None:
    newest, older, late = await among_liars(network, 400, 100, kinds, 400)
    assert newest + older >= 396
    assert late < 6


CROWDS = ["each_other", "old", "forged", "nothing", "clock", "junk"]


async def crowd(network: Network, book: Book, key: bytes, count: int, kind: str) -> list[Liar]:
    """Liars, all of them nearer to the key than any honest node."""
    least = min(int.from_bytes(node.id) ^ int.from_bytes(key) for node in book.honest)
    own = [(int.from_bytes(key) ^ random.randrange(1, least)).to_bytes(20) for _ in range(count)]
    return await liars.join(network, book, [(each, kind) for each in own])


async def crowded(
    network: Network,
    honest: int,
    keys: Sequence[bytes],
    count: int,
    kind: str,
    *,
    readers: int = 20,
    early: bool = False,
) -> list[object]:
    """What readers with a trust list find of a name whose keys are each surrounded by so many liars.

    A quarter of them are callers that do not stay, and have no table.
    """
    nodes = await grown(network, honest)
    publisher = publishers(nodes)[0]
    if not early:
        await publisher.publish(NAME, b"before")
    book = Book(nodes.nodes)
    for key in keys:
        await crowd(network, book, key, count, kind)
    await asyncio.sleep(60)
    if early:
        await publisher.publish(NAME, b"before")
        await asyncio.sleep(60)
    trust = [identity(1).publisher_id]
    others = [node for node in nodes.nodes if node is not publisher]
    chosen = random.sample(others, readers)
    for _ in range(readers // 4):  # and some that only ask, through one node each
        chosen[random.randrange(readers)] = await nodes.start([random.choice(others)], node_id=bytes(20))
    found = await everywhere(chosen, lambda node: node.get(NAME, trust=trust))
    await asyncio.sleep(2500)  # past a refresh, which meets the crowd
    await publisher.publish(NAME, b"after")
    await asyncio.sleep(60)
    found += await everywhere(chosen, lambda node: node.get(NAME, trust=trust))
    print(f"{honest} honest, {count} {kind} at each of {len(keys)} keys: {found}")  # noqa: T201
    return found


@pytest.mark.parametrize("kind", ["old", pytest.param("clock", marks=pytest.mark.soak)])
async def test_a_tenth_of_all_nodes_may_crowd_around_a_key(network: Network, kind: str) -> None:
    found = await crowded(network, 135, [BOUND], 25, kind)
    assert found == [b"before"] * 20 + [b"after"] * 20


async def test_liars_may_crowd_around_both_keys_of_a_name(network: Network) -> None:
    found = await crowded(network, 140, [BOUND, SHARED], 25, "each_other")
    assert found == [b"before"] * 20 + [b"after"] * 20


async def test_a_crowd_that_was_there_first_hides_no_record(network: Network) -> None:
    found = await crowded(network, 135, [BOUND, SHARED], 25, "each_other", early=True)
    assert found == [b"before"] * 20 + [b"after"] * 20


async def test_where_a_crowd_was_first_the_publisher_tells_honest_nodes_too(network: Network) -> None:
    nodes = await grown(network, 135)
    book = Book(nodes.nodes)
    for key in (BOUND, SHARED):
        await crowd(network, book, key, 25, "each_other")
    await asyncio.sleep(60)
    publisher, *_ = publishers(nodes)
    await publisher.publish(NAME, b"x")
    holders = [node for node in nodes.nodes if node is not publisher and node.seqs(NAME, identity(1))]
    assert len(holders) >= 40, "twenty at each of the places beyond"


@pytest.mark.parametrize("count", [15, 60])
async def test_a_crowd_beside_the_only_contact_of_a_caller_is_not_counted(network: Network, count: int) -> None:
    nodes = await grown(network, 135)
    book = Book(nodes.nodes)
    for key in (BOUND, SHARED):
        await crowd(network, book, key, count, "each_other")
    await asyncio.sleep(60)
    for key in (BOUND, SHARED):
        near = sorted(nodes.nodes, key=lambda node: node.server.node.long_id ^ int.from_bytes(key))
        for gate in (*near[:3], near[10]):
            caller = await nodes.start([gate], node_id=bytes(20))
            asking = caller.server._reader._ask_count(
                {int.from_bytes(each) for each in (BOUND, SHARED)}, network.now + 10
            )
            counted = await caller.host.run(asking)
            assert counted is not None
            assert 135 / 5 < counted < 135 * 2.5
            nodes.nodes.remove(caller)


@pytest.mark.soak
@pytest.mark.parametrize("kind", CROWDS)
async def test_50_of_500_nodes_may_crowd_around_a_key(network: Network, kind: str) -> None:
    found = await crowded(network, 450, [BOUND], 50, kind, readers=50)
    assert found == [b"before"] * 50 + [b"after"] * 50


@pytest.mark.soak
@pytest.mark.parametrize("kind", CROWDS)
async def test_50_of_500_nodes_may_crowd_around_both_keys(network: Network, kind: str) -> None:
    found = await crowded(network, 450, [BOUND, SHARED], 25, kind, readers=50)
    assert found == [b"before"] * 50 + [b"after"] * 50


@pytest.mark.soak
@pytest.mark.parametrize("keys", [[BOUND], [BOUND, SHARED]], ids=["one key", "both keys"])
@pytest.mark.parametrize("kind", CROWDS)
async def test_a_crowd_may_be_there_before_the_first_publish(network: Network, keys: list[bytes], kind: str) -> None:
    found = await crowded(network, 450, keys, 50 // len(keys), kind, readers=50, early=True)
    assert found[:50] == [b"before"] * 50
    assert found[50:].count(b"after") >= 47, "honest nodes may hold the older one, of which the publisher does not know"
    assert None not in found


# -- a crowd of publishers -------------------------------------------------------------------------------------------


async def test_a_crowd_of_publishers_under_one_name_evicts_nobody(network: Network) -> None:
    nodes = Nodes(network)
    await nodes.grow(30)
    first = await nodes.start([nodes.nodes[0]], identity=identity(1))
    await first.publish(NAME, b"first")
    holders = [node for node in nodes.nodes if node.server.storage.holdings(SHARED)]
    assert len(holders) > 20
    crowd = [await nodes.start([nodes.nodes[0]], identity=identity(100 + number)) for number in range(5)]
    now = first.host.clock.wall()
    for number in range(200):
        record = sign(
            identity(1000 + number), NAME, b"crowd", seq=now + number, issued_at=now, expires_at=now + 3_600_000
        )
        node = crowd[number % len(crowd)]
        asked = node.server.protocol.router.closest(int.from_bytes(SHARED), 20)
        await asyncio.gather(*(node.server.protocol.call_store(each, SHARED, record.envelope) for each in asked))
    late = await nodes.start([nodes.nodes[0]], identity=identity(2))
    publication = await late.publish(NAME, b"late")
    assert publication.refused["full"] > 0
    for node in holders:
        held = node.server.storage.holdings(SHARED)
        assert len(held) <= 33  # its own record besides
        assert identity(1).public_key in [holding.public_key for holding in held]
    assert late.server.storage.holding(SHARED, identity(2).public_key) is not None
    readers = nodes.nodes[:10]
    for publisher, value in ((identity(1), b"first"), (identity(2), b"late")):
        trust = [publisher.publisher_id]
        assert await everywhere(readers, lambda node, trust=trust: node.get(NAME, trust=trust)) == [value] * 10  # type: ignore[misc]


# -- time ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trust", [None, [identity(1).publisher_id]])
async def test_a_machine_that_believes_it_is_1970_finds_what_is_live_and_nothing_that_is_over(
    network: Network, trust: list[str] | None
) -> None:
    nodes = Nodes(network)
    await nodes.grow(12)
    publisher = await nodes.start([nodes.nodes[0]], identity=identity(1), record_ttl=600)
    await publisher.publish(NAME, b"v1")
    for start in (0, RELEASED - 1):
        host = network.host()
        host.clock.set(start)
        reader = await nodes.start([nodes.nodes[0]], host=host, node_id=bytes(20))
        assert await reader.get(NAME, trust=trust) == b"v1"
    publisher.kill()
    await asyncio.sleep(601)
    assert await reader.get(NAME, trust=trust) is None


async def test_what_ends_while_a_machine_that_believes_it_is_1970_waits_for_the_dead_is_over(network: Network) -> None:
    nodes = Nodes(network)
    await nodes.grow(6)
    publisher = await nodes.start([nodes.nodes[0]], identity=identity(1), record_ttl=600)
    record = await publisher.publish(NAME, b"v1")
    reader = await nodes.start([nodes.nodes[0]], node_id=TRANSIENT_ID)
    reader.host.clock.set(0)
    publisher.kill()
    await asyncio.sleep((record.expires_at - nodes.nodes[0].host.clock.wall()) / 1000 - 0.5)
    nodes.nodes[1].kill()  # nobody knows that yet
    started = network.now
    assert await reader.host.run(reader.server.get_records(NAME)) == []
    assert network.now > started + 1.5
    assert abs(reader.server.now() - nodes.nodes[0].host.clock.wall()) < 500


@pytest.mark.parametrize("hours", [2, -2])
async def test_a_publisher_two_hours_off_is_corrected_and_warned(
    network: Network, hours: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    nodes = Nodes(network)
    await nodes.grow(12)
    host = network.host()
    host.clock.step(hours * 3600)
    publisher = await nodes.start([nodes.nodes[0]], host=host, identity=identity(1))
    assert (await publisher.publish(NAME, b"v1")).stored == 12
    readers = nodes.nodes[:12]
    assert await everywhere(readers, lambda node: node.get(NAME)) == [b"v1"] * 12
    assert f"the clock of this machine is {hours * 3600} s off" in caplog.text
    (record,) = await readers[0].host.run(readers[0].server.get_records(NAME))
    assert abs(record.issued_at - readers[0].host.clock.wall()) < 5000
    await asyncio.sleep(2 * 3600)
    assert await everywhere(readers, lambda node: node.get(NAME)) == [b"v1"] * 12
    publisher.kill()
    await asyncio.sleep(3660)
    assert await everywhere(readers, lambda node: node.get(NAME)) == [None] * 12


async def test_when_the_clock_of_a_publisher_is_set_it_says_that_it_agrees_again_and_signs_with_it(
    network: Network, caplog: pytest.LogCaptureFixture
) -> None:
    nodes = Nodes(network)
    await nodes.grow(12)
    host = network.host()
    host.clock.step(7200)
    publisher = await nodes.start([nodes.nodes[0]], host=host, identity=identity(1))
    await publisher.publish(NAME, b"v1")
    assert publisher.server.clock.correction == pytest.approx(-7_200_000, abs=1000)
    caplog.clear()
    caplog.set_level(logging.INFO)
    host.clock.step(-7205)  # as near as a second hand
    assert (await publisher.publish(NAME, b"v2")).stored == 12
    assert publisher.server.clock.correction == 0
    assert "the clock of this machine agrees again with those of the holders" in caplog.text
    assert "off by" not in caplog.text
    assert await everywhere(nodes.nodes[:12], lambda node: node.get(NAME)) == [b"v2"] * 12


@pytest.mark.parametrize("hours", [2, -2])
async def test_a_publisher_corrected_by_its_only_holder_goes_back_to_its_clock_when_another_agrees_with_that(
    network: Network, hours: int
) -> None:
    nodes = Nodes(network)
    wrong = await nodes.start()
    publisher = await nodes.start([wrong], identity=identity(1))
    wrong.host.clock.step(hours * 3600)
    await publisher.publish(NAME, b"v1")
    assert publisher.server.clock.correction == pytest.approx(hours * 3_600_000, abs=1000)
    right = await nodes.start([wrong])
    receipt = await publisher.publish(NAME, b"v2")
    assert publisher.server.clock.correction == 0
    assert receipt.expires_at <= publisher.host.clock.wall() + 3_600_000
    assert await right.get(NAME) == b"v2"
    await publisher.publish(NAME, b"v3")
    assert publisher.server.clock.correction == 0


async def test_whom_a_liar_had_sign_for_a_far_future_can_still_take_back_what_it_says(network: Network) -> None:
    nodes = Nodes(network)
    liar = await nodes.start()
    publisher = await nodes.start([liar], identity=identity(1))
    liar.host.clock.step(50 * 365 * 86_400)
    await publisher.publish(NAME, b"v1")  # the only holder says so
    liar.kill()
    honest = [await nodes.start([publisher]) for _ in range(8)]
    assert (await publisher.publish(NAME, b"v2")).stored == 8
    assert await everywhere(honest, lambda node: node.get(NAME)) == [b"v2"] * 8
    assert (await publisher.withdraw(NAME)).stored == 8
    assert await everywhere(honest, lambda node: node.get(NAME)) == [None] * 8


@pytest.mark.parametrize("own", [-24, 2], ids="{} h".format)
async def test_what_a_reading_says_of_the_time_holds_until_another_says_something_or_the_clock_is_set(
    network: Network, own: int
) -> None:
    nodes = Nodes(network)
    await nodes.grow(8)
    await (await nodes.start([nodes.nodes[0]], identity=identity(1))).publish(NAME, b"v1")
    reader = await nodes.start([nodes.nodes[0]], identity=identity(2))
    reader.host.clock.step(own * 3600)

    def off_by() -> float:
        return abs(reader.server.now() - nodes.nodes[0].host.clock.wall())

    assert await reader.get(NAME) == b"v1"
    assert off_by() < 1000
    assert await reader.get("what nobody holds") is None  # and of which nobody says the time
    assert off_by() < 1000
    await reader.publish("other", b"v1")
    assert reader.server.clock.correction == pytest.approx(-own * 3_600_000, abs=1000)
    assert off_by() < 1000
    reader.server.clock.correction = 0
    reader.host.clock.step(-own * 3600)
    assert off_by() < 1000


@pytest.mark.parametrize("hours", [2, -2])
async def test_a_holder_with_a_wrong_clock_harms_only_itself(network: Network, hours: int) -> None:
    nodes = Nodes(network)
    await nodes.grow(12)
    for node in nodes.nodes[:4]:
        node.host.clock.step(hours * 3600)
    publisher = await nodes.start([nodes.nodes[0]], identity=identity(1))
    await publisher.publish(NAME, b"v1")
    assert publisher.server.clock.correction == 0
    right = nodes.nodes[4:12]
    for _ in range(8):
        assert await everywhere(right, lambda node: node.get(NAME)) == [b"v1"] * 8
        await asyncio.sleep(900)
    publisher.kill()
    await asyncio.sleep(3601)
    assert await everywhere(right, lambda node: node.get(NAME)) == [None] * 8


@pytest.mark.parametrize(("neighbours", "wrong", "enough"), [(2, [2], True), (3, [-2], True), (3, [2, -2], False)])
async def test_a_publisher_with_few_neighbours_does_not_wait_for_one_whose_clock_is_wrong(
    network: Network, caplog: pytest.LogCaptureFixture, neighbours: int, wrong: list[int], enough: bool
) -> None:
    nodes = Nodes(network)
    await nodes.grow(neighbours)
    for node, hours in zip(nodes.nodes, wrong, strict=False):
        node.host.clock.step(hours * 3600)
    publisher = await nodes.start([nodes.nodes[-1]], identity=identity(1))
    await publisher.publish(NAME, b"v1")
    await asyncio.sleep(600)  # as long as ten further tries would take
    stats = publisher.server.protocol.stats
    assert publisher.server.clock.correction == 0
    if not enough:  # who wins it over does not outvote more of whom it cannot know that they are wrong
        assert stats.rounds_failed > 5
        return
    assert (stats.rounds_done, stats.rounds_failed) == (1, 0)
    assert [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING] == [
        f"{NAME!r} is held by few (of {2 * neighbours} stores {2 * neighbours - 2} acknowledged, 2 refused "
        f"({'expired' if wrong[0] > 0 else 'clock'} 2), 0 not answered): set the clocks of those who refuse it, or ours"
    ]
    nodes.nodes[0].host.clock.step(-wrong[0] * 3600)  # it is asked again, as whoever is owed something is
    await asyncio.sleep(61)
    assert await nodes.nodes[0].get(NAME) == b"v1"
    assert nodes.nodes[0].server.storage.get(BOUND) is not None


async def test_a_publisher_that_was_misled_by_most_of_few_comes_back_a_minute_after_they_are_right(
    network: Network,
) -> None:
    nodes = Nodes(network)
    await nodes.grow(3)
    for node in nodes.nodes[:2]:
        node.host.clock.step(2 * 3600)
    publisher = await nodes.start([nodes.nodes[2]], identity=identity(1))
    await publisher.publish(NAME, b"v1")
    await asyncio.sleep(120)
    assert publisher.server.clock.correction == pytest.approx(7_200_000, abs=1000)
    for node in nodes.nodes[:2]:
        node.host.clock.step(-2 * 3600)
    await asyncio.sleep(61)
    assert publisher.server.clock.correction == 0
    assert await nodes.nodes[2].get(NAME) == b"v1"


@pytest.mark.parametrize("own", [-24, -2, 2, 24], ids="{} h".format)
async def test_a_reader_with_a_wrong_clock_is_not_left_alone_with_it_by_a_holder_with_another(
    network: Network, own: int
) -> None:
    nodes = Nodes(network)
    await nodes.grow(12)
    publisher = await nodes.start([nodes.nodes[0]], identity=identity(1))
    await publisher.publish(NAME, b"v1")
    wrong = nodes.nodes[:2]
    for node, hours in zip(wrong, (4, -4), strict=True):
        node.host.clock.step(hours * 3600)
    for held in (False, True):  # a holder is one of its own quorum, and fewer others answer it
        for _ in range(12):
            settings = {} if held else {"node_id": TRANSIENT_ID}
            reader = await nodes.start([nodes.nodes[2]], **settings)
            if held:
                (record,) = await nodes.nodes[3].host.run(nodes.nodes[3].server.get_records(NAME))
                reader.server.storage[SHARED] = record.envelope
            reader.host.clock.step(own * 3600)
            assert await reader.get(NAME) == b"v1"
            assert abs(reader.server.now() - publisher.host.clock.wall()) < 1000
            reader.kill()


@pytest.mark.parametrize("right", [1, 2])
async def test_holders_whose_clock_was_never_set_have_no_say_about_the_time(network: Network, right: int) -> None:
    nodes = Nodes(network)
    await nodes.grow(2 * right + 1)
    for node in nodes.nodes[: right + 1]:
        node.host.clock.set(1000)  # all booted at the same moment, so that they agree
    others = nodes.nodes[right + 1 :]
    for hours, found in ((0, 0), (2, -7_200_000)):
        publisher = await nodes.start([others[0]], identity=identity(1))
        publisher.host.clock.step(hours * 3600)
        assert (await publisher.publish(NAME, b"v1")).stored == right
        assert publisher.server.clock.correction == pytest.approx(found, abs=1000)
        assert await everywhere(others, lambda node: node.get(NAME)) == [b"v1"] * right
        publisher.kill()
    reader = await nodes.start([others[0]], node_id=TRANSIENT_ID)
    reader.host.clock.set(5000)
    assert await reader.get(NAME) == b"v1"
    assert abs(reader.server.now() - others[0].host.clock.wall()) < 1000


async def test_a_publisher_is_not_corrected_by_holders_whose_clocks_are_wrong_in_different_ways(
    network: Network,
) -> None:
    nodes = Nodes(network)
    await nodes.grow(3)
    for node, hours in zip(nodes.nodes, (3, -2), strict=False):
        node.host.clock.step(hours * 3600)
    publisher = await nodes.start([nodes.nodes[2]], identity=identity(1))
    for _ in range(2):
        receipt = await publisher.publish(NAME, b"v1")
        assert receipt.refused == {"expired": 2, "clock": 2}
        assert publisher.server.clock.correction == 0
        assert receipt.expires_at <= publisher.host.clock.wall() + 3_600_000


async def test_liars_about_the_time_below_a_majority_change_nothing(network: Network) -> None:
    nodes = await grown(network, 30)
    await liars.mixed(nodes, network, 14, ["clock"])
    await asyncio.sleep(30)
    await publish_all(nodes, 1)
    assert {node.server.clock.correction for node in nodes.nodes} == {0}
    assert (await trusted_gets(nodes, 30, 1))[:2] == (30, 0)
    for node in nodes.nodes[:20]:
        await node.get(name_of(1))
        assert abs(node.server.now() - node.host.clock.wall()) < 1000
