"""The gateway over real sockets: what it answers, whom it sends a client to, and what it does when too many ask."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

import aiohttp
import pytest

from plasm_dht import Identity, PlasmServer
from plasm_dht.clock import Clock
from plasm_dht.dht.routing import Contact, PlasmRoutingTable
from plasm_dht.errors import ListenError
from plasm_dht.provider import gateway
from plasm_dht.provider.gateway import Gateway
from plasm_dht.provider.manifest import Pointer, record_name
from plasm_dht.provider.site import Site
from plasm_dht.provider.web import create_app, serve
from plasm_dht.record import Record, Value, sign

TARGET = "stable/arm64"
PATH = f"/dht/{TARGET}"
URL = "http://10.0.0.7:8080/stable/arm64/manifest.json"
LIFE = 60_000


def pointer(url: str = URL, version: str = "1") -> bytes:
    return Pointer(url, version, "rack-7", bytes(32), 100).encode()


class Node:
    """A node whose every answer the test decides."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.table = PlasmRoutingTable(None, 20, Contact(bytes(19) + b"\x01", "127.0.0.1", 1), self.clock)
        self.records: list[Record] = []
        self.answers = True
        self.lookups = 0
        self.most = self.under_way = 0
        self.trusts: list[Sequence[str] | None] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.error: Exception | None = None
        self.ahead = 0

    def publish(self, identity: Identity, value: Value | None = None, *, life: int = LIFE, age: int = 0) -> Record:
        now = self.now() - age
        value = pointer() if value is None else value
        record = sign(identity, record_name(TARGET), value, seq=now, issued_at=now, expires_at=self.now() + life)
        self.records.append(record)
        return record

    def now(self) -> int:
        return self.clock.now() + self.ahead

    async def get_records(
        self, name: str, *, trust: Sequence[str] | None = None, timeout: float | None = None
    ) -> list[Record]:
        self.lookups += 1
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        self.trusts.append(trust)
        try:
            await self.gate.wait()
            await asyncio.sleep(0)
            if self.error is not None:
                raise self.error
            if self.answers:
                self.table.add_contact(Contact(bytes(19) + b"\x02", "127.0.0.2", 2))
            return [r for r in self.records if r.name == name and (not trust or r.publisher in trust)]
        finally:
            self.under_way -= 1


@pytest.fixture
def me() -> Identity:
    return Identity.generate()


@pytest.fixture
def other() -> Identity:
    return Identity.generate()


@pytest.fixture
async def node() -> Node:
    return Node()


@pytest.fixture
def door(node: Node, me: Identity) -> Gateway:
    return Gateway(node, node.table, (), me.publisher_id)


@pytest.fixture
async def client(door: Gateway) -> AsyncIterator[aiohttp.ClientSession]:
    app = create_app(Site())
    gateway.add_to(app, door)
    runner, port = await serve(app, "127.0.0.1", 0)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}", connector=connector) as session:
        yield session
    await runner.cleanup()


async def ask(client: aiohttp.ClientSession, path: str = PATH) -> tuple[int, Any, Any]:
    """The status, the JSON body (the whole text where there is none) and the headers. No redirect is followed."""
    async with client.get(path, allow_redirects=False) as response:
        text = await response.text()
        return response.status, json.loads(text) if text else None, response.headers


async def busy(node: Node, lookups: int) -> None:
    """Wait until that many lookups are under way."""
    while node.under_way < lookups:  # noqa: ASYNC110  # nobody tells
        await asyncio.sleep(0.01)


async def refused(client: aiohttp.ClientSession, status: int, says: str, path: str = PATH) -> None:
    got, body, headers = await ask(client, path)
    assert (got, list(body)) == (status, ["error"]), body
    assert says in body["error"]
    assert "\n" not in body["error"]
    assert headers["Cache-Control"] == "no-store"
    assert headers["Content-Type"].startswith("application/json")


# What is there


async def test_live_records_are_json_with_the_fields_of_get(client, node, me, other, door):
    door.trust = (other.publisher_id, me.publisher_id)
    record = node.publish(other, pointer(version="2"))
    node.publish(me, age=1000)
    status, body, headers = await ask(client)
    assert (status, [each["version"] for each in body]) == (200, ["2", "1"])
    first = body[0]
    assert 0 < first.pop("ttl_remaining") <= LIFE / 1000
    assert first == {
        "key": TARGET,
        "url": URL,
        "version": "2",
        "publisher": other.publisher_id,
        "provider_name": "rack-7",
        "seq": record.seq,
        "issued_at": record.issued_at,
        "expires_at": record.expires_at,
        "manifest_sha256": bytes(32).hex(),
        "trusted": True,
    }
    assert headers["Content-Type"].startswith("application/json")
    assert headers["Cache-Control"] == "max-age=1"
    assert node.trusts == [door.trust]


async def test_without_a_trust_list_everybody_is_shown_and_nobody_is_trusted(client, node, other):
    node.publish(other)
    _, body, _ = await ask(client)
    assert (node.trusts, [each["trusted"] for each in body]) == ([None], [False])


async def test_what_is_no_pointer_is_left_out_and_alone_is_no_record(client, node, me, other):
    node.publish(other, b"something else")
    await refused(client, 404, "no record")
    node.publish(me)
    node.ahead += 1
    await asyncio.sleep(gateway.FRESH_FOR)
    assert len((await ask(client))[1]) == 1


async def test_no_record_and_no_network_are_told_apart(client, node):
    await refused(client, 404, "no record: the DHT has no live one for stable/arm64")
    node.answers = False
    await refused(client, 502, "no network: no DHT node answered", "/dht/edge/arm64")
    node.answers = True
    await refused(client, 404, "no record", "/dht/edge/arm64")  # at once: silence is not remembered
    node.error = ListenError("this node does not listen")
    await refused(client, 502, "no network: this node does not listen", "/dht/old/arm64")


async def test_a_contact_that_answered_an_earlier_lookup_does_not_count(client, node):
    await refused(client, 404, "no record")
    node.answers = False
    await asyncio.sleep(gateway.FRESH_FOR)
    await refused(client, 502, "no network")


@pytest.mark.parametrize("path", ["/dht/Stable/arm64", "/dht/dht/arm64", "/dht/a%2Fb/c", "/dht/a%0Ab/c"])
async def test_what_is_no_channel_and_architecture_is_the_askers_mistake(client, node, path):
    await refused(client, 400, "channel" if "dht/dht" in path else "no CHANNEL/ARCH", path)
    assert node.lookups == 0


# Where a client is sent


async def test_with_a_trust_list_a_client_is_sent_to_the_freshest_of_it(client, node, me, other, door):
    door.trust = (other.publisher_id,)
    node.publish(me)
    node.publish(other, pointer("https://10.0.0.8/stable/arm64/manifest.json"), age=5000)
    status, _, headers = await ask(client, f"{PATH}/manifest.json")
    assert (status, headers["Location"]) == (307, "https://10.0.0.8/stable/arm64/manifest.json")
    assert headers["Cache-Control"] == "max-age=1"


async def test_without_one_a_client_is_only_sent_to_our_own(client, node, me, other):
    node.publish(other, pointer("http://evil/manifest.json"))
    await refused(client, 403, "no trust list and sends clients to its own records alone", f"{PATH}/manifest.json")
    node.publish(me, age=5000)
    await asyncio.sleep(gateway.FRESH_FOR)
    status, _, headers = await ask(client, f"{PATH}/manifest.json")
    assert (status, headers["Location"]) == (307, URL)


async def test_a_node_that_publishes_nothing_and_trusts_nobody_sends_clients_nowhere(client, node, other, door):
    door.own = None
    node.publish(other)
    await refused(client, 403, "publishes nothing itself", f"{PATH}/manifest.json")
    await refused(client, 404, "no record", "/dht/edge/arm64/manifest.json")


@pytest.mark.parametrize(
    "url", ["ftp://h/x", "javascript:alert(1)", "//h/x", "file:///etc/passwd", "http://u@h/x", "http://h/x\r\nX: y"]
)
async def test_an_address_that_is_not_http_is_passed_on_to_nobody(client, node, me, url):
    import msgspec

    node.publish(me, msgspec.msgpack.encode([1, url, "1", "rack-7", bytes(32), 100]))
    await refused(client, 404, "no record", f"{PATH}/manifest.json")
    await asyncio.sleep(0)
    await refused(client, 404, "no record")


# How long, how many


async def test_no_answer_may_be_kept_longer_than_the_record_lives(client, node, me):
    node.publish(me, life=900)
    _, _, headers = await ask(client)
    assert headers["Cache-Control"] == "max-age=0"


async def test_a_record_that_expires_while_it_is_remembered_is_gone(client, node, me):
    node.publish(me, life=400)
    assert (await ask(client))[0] == 200
    node.records.clear()
    await asyncio.sleep(0.45)
    await refused(client, 404, "no record")


async def test_a_record_that_ends_by_a_clock_that_is_set_is_gone_too(client, node, me):
    node.publish(me)
    assert (await ask(client))[0] == 200
    node.ahead = LIFE
    await refused(client, 404, "no record")
    assert node.lookups == 1


async def test_a_lookup_is_remembered_for_a_second(client, node, me):
    node.publish(me)
    for _ in range(5):
        assert (await ask(client))[0] == 200
    assert node.lookups == 1
    node.records.clear()
    await asyncio.sleep(gateway.FRESH_FOR)
    await refused(client, 404, "no record")
    assert node.lookups == 2


async def test_all_who_ask_for_the_same_at_once_share_one_lookup(client, node, me):
    node.publish(me)
    node.gate.clear()
    asking = [asyncio.create_task(ask(client)) for _ in range(20)]
    await busy(node, 1)
    await asyncio.sleep(0.1)
    node.gate.set()
    assert [status for status, _, _ in await asyncio.gather(*asking)] == [200] * 20
    assert node.lookups == 1


async def test_who_goes_away_takes_the_answer_from_nobody_else(node, me, door):
    node.publish(me)
    node.gate.clear()
    leaving, staying = (asyncio.create_task(door.find(TARGET)) for _ in range(2))
    await busy(node, 1)
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    node.gate.set()
    found = await staying
    assert found is not None
    assert (len(found.records), node.lookups) == (1, 1)


async def test_more_lookups_than_it_does_at_once_are_asked_to_come_again(client, node, monkeypatch):
    monkeypatch.setattr(gateway, "MAX_LOOKUPS", 3)
    node.gate.clear()
    asking = [asyncio.create_task(ask(client, f"/dht/a{each}/b")) for each in range(3)]
    await busy(node, 3)
    status, body, headers = await ask(client, "/dht/one/more")
    assert (status, headers["Retry-After"], headers["Cache-Control"]) == (503, "1", "no-store")
    assert "3 lookups are under way" in body["error"]
    node.gate.set()
    assert [status for status, _, _ in await asyncio.gather(*asking)] == [404] * 3
    assert (await ask(client, "/dht/one/more"))[0] == 404
    assert node.most == 3


async def test_one_client_takes_no_more_than_its_share_of_the_lookups(node, door, monkeypatch):
    monkeypatch.setattr(gateway, "MAX_PER_SOURCE", 2)
    node.gate.clear()
    asking = [asyncio.create_task(door.find(f"a{each}/b", "192.0.2.1")) for each in range(5)]
    await busy(node, 2)
    asking.append(asyncio.create_task(door.find(TARGET, "192.0.2.2")))
    asking.append(asyncio.create_task(door.find("a0/b", "192.0.2.1")))  # is under way
    await busy(node, 3)
    node.gate.set()
    found = await asyncio.gather(*asking)
    assert [each is not None for each in found] == [True, True, False, False, False, True, True]
    assert await door.find("one/more", "192.0.2.1") is not None
    assert not door._shares


async def test_a_client_over_http_has_its_share(client, node, monkeypatch):
    monkeypatch.setattr(gateway, "MAX_PER_SOURCE", 1)
    node.gate.clear()
    asking = asyncio.create_task(ask(client, "/dht/a/b"))
    await busy(node, 1)
    status, body, _ = await ask(client, "/dht/one/more")
    assert (status, "1 of your address" in body["error"]) == (503, True)
    node.gate.set()
    assert (await asking)[0] == 404


async def test_names_without_end_fill_no_memory(client, node, door, monkeypatch):
    monkeypatch.setattr(gateway, "MAX_REMEMBERED", 4)
    for each in range(10):
        await ask(client, f"/dht/a{each}/b")
    assert (len(door._known), len(door._running)) == (4, 0)


async def test_a_stop_waits_for_no_lookup(node, me):
    app = create_app(Site())
    gateway.add_to(app, Gateway(node, node.table))
    runner, port = await serve(app, "127.0.0.1", 0)
    node.gate.clear()
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
        asking = asyncio.create_task(ask(session))
        await busy(node, 1)
        async with asyncio.timeout(1):
            await runner.cleanup()
        await asyncio.gather(asking, return_exceptions=True)
    assert node.under_way == 0


# With a real node


async def test_a_real_node_finds_what_another_publishes_and_says_when_it_is_alone(me):
    async with PlasmServer(identity=me) as publisher, PlasmServer() as asked:
        await publisher.listen(0, "127.0.0.1")
        await asked.listen(0, "127.0.0.1")
        app = create_app(Site())
        gateway.add_to(app, Gateway(asked, asked.protocol.router))
        runner, port = await serve(app, "127.0.0.1", 0)
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
            await refused(session, 502, "no network", "/dht/edge/arm64")
            await asked.bootstrap([publisher.address])
            await publisher.publish(record_name(TARGET), pointer())
            status, body, _ = await ask(session)
            assert (status, body[0]["publisher"]) == (200, me.publisher_id)
            await refused(session, 404, "no record", "/dht/old/arm64")
        await runner.cleanup()
