"""The page without a browser: what the server writes, what `/events` sends and to whom, and that all of it ends."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from html import unescape
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from plasm_dht import Identity, PlasmServer
from plasm_dht.clock import Clock
from plasm_dht.dht.routing import Contact, PlasmRoutingTable
from plasm_dht.provider import page
from plasm_dht.provider.artifacts import ArtifactScanner
from plasm_dht.provider.journal import SIZE, Journal
from plasm_dht.provider.manifest import Pointer, record_name
from plasm_dht.provider.observed import ObservedServer
from plasm_dht.provider.page import View
from plasm_dht.provider.site import Page, Site
from plasm_dht.provider.web import create_app, serve

TARGET = "stable/arm64"
HOSTILE = "<img src=x onerror=alert(1)>"
STATE = re.compile(r' data-state="([^"]*)"')
STATIC = Path(page.__file__).parent / "static"


def record(**changes: Any) -> dict[str, Any]:
    standing = {"seq": 7, "expires_at": 0, "ttl_remaining": 90.4, "refresh_in": 60.6, "holders": 3}
    return {"key": TARGET, "version": "1", "url": "http://h/x", **standing, **changes}


class Told:
    """What the site says of itself; a test changes it."""

    def __init__(self) -> None:
        self.records = [record()]
        self.unwell: str | None = None
        self.problems: dict[str, str] = {}

    def status(self) -> dict[str, object]:
        known = {"name": HOSTILE, "publisher": "ed25519:ab", "dht": "127.0.0.1:1", "records_held": 5}
        return known | {"records": self.records, "problems": self.problems, "record_ttl": 120, "refresh_interval": 80}


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def site(tmp_path: Path, told: Told) -> Site:
    folder = tmp_path / TARGET
    folder.mkdir(parents=True)
    (folder / "vmlinuz").write_bytes(b"kernel")
    (folder / "a b é#?.txt").write_bytes(b"odd")
    (folder / "<script>x").write_bytes(b"")
    artifacts = ArtifactScanner(tmp_path).scan().found[TARGET]
    return Site("rack", {TARGET: Page(artifacts, b"{}")}, status=told.status, health=lambda: told.unwell)


@pytest.fixture
def table() -> PlasmRoutingTable:
    return PlasmRoutingTable(None, 20, Contact(bytes(20), "127.0.0.1", 1), Clock())


@pytest.fixture
def journal() -> Journal:
    return Journal(lambda: 1_800_000_000_000)


@pytest.fixture
def app(site: Site, table: PlasmRoutingTable, journal: Journal) -> web.Application:
    app = create_app(site)
    page.add_to(app, table, journal, lambda target: ["127.0.0.2:2"])
    return app


@pytest.fixture
async def client(app: web.Application) -> AsyncIterator[aiohttp.ClientSession]:
    runner, port = await serve(app, "127.0.0.1", 0)
    everything = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}", connector=everything) as session:
        yield session
    await runner.cleanup()


async def text_of(client: aiohttp.ClientSession) -> str:
    """The page as it is read without JavaScript: without the state that only the script reads."""
    async with client.get("/") as response:
        assert response.status == 200
        text = await response.text()
    without, states = STATE.subn("", text)
    assert states == 1
    return without


async def message(response: aiohttp.ClientResponse, within: float = 5.0) -> Any:
    """The next state that is sent; `None` when nothing more comes."""
    async with asyncio.timeout(within):
        async for line in response.content:
            if line.startswith(b"data: "):
                return json.loads(line.removeprefix(b"data: "))
    return None


def with_id(first: int, port: int) -> Contact:
    return Contact(bytes([first]) + bytes(18) + b"\x01", "127.0.0.2", port)


# Without JavaScript


async def test_the_page_can_be_read_without_javascript(client, journal, table):
    table.add_contact(with_id(0x80, 2))
    journal.note("published", TARGET, "version 1")
    text = await text_of(client)
    for shown in (TARGET, "61 s", "90 s", "ed25519:ab", "vmlinuz", "127.0.0.2:2</td>", "published", "version 1"):
        assert shown in text
    assert "<dt>held by</dt><dd>127.0.0.2:2</dd>" in text
    assert "2027-01-15 08:00:00 UTC" in text
    assert f'href="{TARGET}/a%20b%20%C3%A9%23%3F.txt"' in text
    assert f'href="{TARGET}/boot.ipxe"' in text
    assert "$" not in text


async def test_the_page_has_the_state_that_its_script_draws_first(client, told, journal):
    told.problems = {"x": "\"'>" + HOSTILE}
    journal.note("published", HOSTILE, '"')
    async with client.get("/") as response:
        text = await response.text()
    (held,) = STATE.findall(text)
    assert "<" not in held
    async with client.get("/events") as response:
        told_at_once = await message(response)
    first = json.loads(unescape(held))
    assert first.pop("traffic")["requests"] < told_at_once.pop("traffic")["requests"]
    assert first == told_at_once


async def test_every_name_is_escaped(client, told, journal):
    told.records = [record(version=HOSTILE), record(key="edge/x", version="<b>")]
    told.problems = {"x": HOSTILE}
    told.unwell = HOSTILE
    journal.note("published", HOSTILE, HOSTILE)
    text = await text_of(client)
    assert "<img" not in text
    assert "<b>" not in text
    assert text.count("<script") == 1
    assert "&lt;script&gt;x" in text
    assert text.count("&lt;img src=x onerror=alert(1)&gt;") == 7
    async with client.get(f"/{TARGET}/%3Cscript%3Ex") as response:
        assert response.status == 200


async def test_nothing_advertised_and_not_advertised_yet_are_said(client, told):
    told.records = [{"key": TARGET, "version": "1", "url": "u"}]
    assert "not advertised yet" in await text_of(client)
    told.records = []
    assert "Nothing at this moment" in await text_of(client)


async def test_a_record_that_is_being_refreshed_says_so(client, told):
    told.records = [record(refresh_in=None)]
    assert "<dt>refresh in</dt><dd>now</dd>" in await text_of(client)


async def test_the_page_runs_nothing_and_loads_nothing_but_its_own(client):
    async with client.get("/") as response:
        policy = response.headers["Content-Security-Policy"]
        assert response.headers["Cache-Control"] == "no-cache"
    for part in ("default-src 'none'", "script-src 'self'", "style-src 'self'", "connect-src 'self'", "img-src 'self'"):
        assert part in policy
    assert "unsafe" not in policy
    for file in STATIC.iterdir():
        text = file.read_text()
        addresses = set(re.findall(r"(?:https?:)?//[\w.]+\.\w+[^\s\"'`]*", text)) - {"http://www.w3.org/2000/svg"}
        assert addresses == set(), file
    script = (STATIC / "page.js").read_text()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|new Function", script)
    assert not re.search(r"\son\w+=|style=|<script>|<style", (STATIC / "index.html").read_text())


@pytest.mark.parametrize(
    ("path", "kind"), [("/style.css", "text/css"), ("/page.js", "text/javascript"), ("/icon.svg", "image/svg+xml")]
)
async def test_what_the_page_is_made_of_is_served(client, path, kind):
    async with client.get(path) as response:
        assert response.headers["Content-Type"].startswith(kind)
        assert await response.text() == (STATIC / path[1:]).read_text()


# The drawing


def test_a_contact_is_placed_by_the_bits_that_it_shares_and_the_rest(site, table, journal):
    for first, port in ((0x80, 2), (0xC0, 3), (0x40, 4), (0x01, 5)):
        table.add_contact(with_id(first, port))
    placed = {each["address"]: each for each in View(site, table, journal).state()["table"]["contacts"]}
    where = {address[-1]: (each["shared"], each["around"]) for address, each in placed.items()}
    assert where == {"2": (0, 0.0), "3": (0, 0.5), "4": (1, 0.0), "5": (7, 0.0)}


def test_of_very_many_contacts_some_are_drawn_and_all_are_counted(site, table, journal, monkeypatch):
    monkeypatch.setattr(page, "MAX_DRAWN", 10)
    for each in range(15):
        table.add_contact(with_id(0x80 + each, 100 + each))
    contact = with_id(0x81, 101)
    for _ in range(2):
        table.miss(contact)
    drawn = View(site, table, journal).state()["table"]
    assert (len(drawn["contacts"]), drawn["live"], drawn["stale"]) == (8, 14, 1)


# Events


async def test_a_listener_gets_the_state_at_once_and_whatever_changes(client, told, site):
    async with client.get("/events") as response:
        assert response.headers["Content-Type"].startswith("text/event-stream")
        assert response.headers["Cache-Control"] == "no-store"
        first = await message(response)
        assert (first["records"][0]["seq"], first["records"][0]["held_by"]) == (7, ["127.0.0.2:2"])
        assert [file["name"] for file in first["records"][0]["files"]] == ["<script>x", "a b é#?.txt", "vmlinuz"]
        told.records = [record(seq=8)]
        assert (await message(response))["records"][0]["seq"] == 8
        told.records = []
        assert (await message(response))["records"] == []
        site.traffic.sent += 1000
        assert (await message(response))["traffic"]["bytes"] >= 1000


async def test_the_passing_of_time_is_no_news_but_a_heartbeat_comes(client, told, monkeypatch):
    monkeypatch.setattr(page, "TICK", 0.02)
    monkeypatch.setattr(page, "HEARTBEAT", 0.1)
    async with client.get("/events") as response:
        await message(response)
        lines = []
        for each in range(12):
            told.records = [record(ttl_remaining=80.0 - each, refresh_in=50.0 - each)]
            async with asyncio.timeout(5):
                lines.append(await response.content.readline())
    assert b":\n" in lines
    assert not [line for line in lines if line.startswith(b"data")]


async def test_a_refresh_that_begins_and_ends_is_news(client, told):
    async with client.get("/events") as response:
        await message(response)
        told.records = [record(refresh_in=None)]
        assert (await message(response))["records"][0]["refresh_in"] is None
        told.records = [record()]
        assert (await message(response))["records"][0]["refresh_in"] == 60.6


async def test_more_pages_than_are_kept_up_to_date_are_asked_to_come_again(client, app, monkeypatch):
    monkeypatch.setattr(page, "MAX_LISTENERS", 2)
    one, other = await client.get("/events"), await client.get("/events")
    async with client.get("/events") as response:
        assert (response.status, response.headers["Retry-After"]) == (503, "10")
    while (await message(other))["traffic"]["requests"] < 3:
        pass
    one.close()  # and nothing is sent on which that would be noticed
    async with asyncio.timeout(3):  # sooner than a heartbeat would notice
        while len(app[page.FEED].listeners) == 2:  # noqa: ASYNC110  # nobody tells
            await asyncio.sleep(0.05)
    async with client.get("/events") as response:
        assert response.status == 200
    other.close()


async def test_one_client_takes_no_more_than_its_share_of_the_pages(app, monkeypatch):
    monkeypatch.setattr(page, "MAX_PER_SOURCE", 2)
    runner, port = await serve(app, "127.0.0.1", 0)
    one, other = (
        aiohttp.ClientSession(f"http://127.0.0.1:{port}", connector=aiohttp.TCPConnector(limit=0, local_addr=(host, 0)))
        for host in ("127.0.0.2", "127.0.0.3")
    )
    async with one, other:
        first, second = [await one.get("/events") for _ in range(2)]
        async with one.get("/events") as response:
            assert (response.status, response.headers["Retry-After"]) == (503, "10")
            assert "2 of your address" in await response.text()
        async with other.get("/events") as response:
            assert response.status == 200
        first.close()
        async with asyncio.timeout(3):
            while len(app[page.FEED].listeners) > 1:  # noqa: ASYNC110  # nobody tells
                await asyncio.sleep(0.05)
        async with one.get("/events") as response:
            assert response.status == 200
        second.close()
    await runner.cleanup()


async def test_a_listener_that_takes_nothing_is_dropped_and_holds_up_nobody(app, told, monkeypatch):
    monkeypatch.setattr(page, "TICK", 0.02)
    monkeypatch.setattr(page, "STALL", 0.3)
    runner, port = await serve(app, "127.0.0.1", 0)
    _, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**10)
    writer.write(b"GET /events HTTP/1.1\r\nHost: x\r\n\r\n")  # and never reads on
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session, session.get("/events") as response:
        feed = app[page.FEED]
        while len(feed.listeners) < 2:  # noqa: ASYNC110  # nobody tells
            await asyncio.sleep(0.01)
        seq = 8
        async with asyncio.timeout(20):
            while len(feed.listeners) == 2:
                seq += 1
                told.records = [record(seq=seq, version="x" * 500_000)]
                while (await message(response))["records"][0]["seq"] != seq:
                    pass
        assert len(feed.listeners) == 1
        async with asyncio.timeout(5):
            while len(runner.server.connections) > 1:  # noqa: ASYNC110  # nor does it keep its connection
                await asyncio.sleep(0.01)
    writer.close()
    await runner.cleanup()


async def test_a_stop_ends_every_page_at_once(app):
    runner, port = await serve(app, "127.0.0.1", 0)
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
        responses = [await session.get("/events") for _ in range(5)]
        for response in responses:
            await message(response)
        async with asyncio.timeout(0.4):  # less than what downloads get
            await runner.cleanup()
        for response in responses:
            assert await message(response) is None
            response.close()
    assert not app[page.FEED].listeners


async def test_head_of_the_events_ends(client):
    async with asyncio.timeout(2), client.head("/events") as response:
        assert response.status == 200


@pytest.mark.parametrize("path", ["/", "/events", "/style.css"])
async def test_the_page_is_only_read(client, path):
    async with client.post(path) as response:
        assert response.status == 405


async def test_answers_are_counted(client, site):
    async with client.get(f"/{TARGET}/vmlinuz") as response:
        await response.read()
    async with client.get("/nothing") as response:
        missing = len(await response.read())
    async with client.head("/page.js"):
        pass
    assert (site.traffic.requests, site.traffic.sent) == (3, len(b"kernel") + missing)


# What happened


def test_a_journal_forgets_the_oldest_and_counts_neighbours_in_a_row(journal):
    for each in range(SIZE + 5):
        journal.note("refreshed", str(each))
    for each in range(3):
        journal.note("neighbour", str(each))
    assert len(journal.events) == SIZE
    assert (journal.events[0].subject, journal.events[0].count) == ("2", 3)
    assert journal.events[1].subject == str(SIZE + 4)


async def test_a_node_tells_what_becomes_of_its_records():
    journal = Journal(Clock().now)

    def kinds() -> list[str]:
        return [event.kind for event in reversed(journal.events)]

    name = record_name(TARGET)
    first, second = (Pointer("http://h/x", version, "r", bytes(32), 1).encode() for version in "12")
    async with PlasmServer() as holder, ObservedServer(journal, identity=Identity.generate(), record_ttl=60) as server:
        await holder.listen(0, "127.0.0.1")
        await server.listen(0, "127.0.0.1")
        await server.bootstrap([holder.address])
        assert kinds() == ["neighbour"]
        await server.publish(name, first)
        assert server.holders(TARGET) == [f"127.0.0.1:{holder.address[1]}"]
        await server._publisher.refresh(name)
        await server.publish(name, second)
        assert kinds() == ["neighbour", "published", "refreshed", "changed"]
        assert (journal.events[0].subject, journal.events[0].text) == (TARGET, "version 2, 1 holder")
        await holder.close()
        await server._publisher.refresh(name)
        assert kinds()[-1] == "failed"
        await server.withdraw(name)
        assert kinds()[-1] == "withdrawn"
        assert server.holders("no/such") == []
