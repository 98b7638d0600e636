"""Which URL is advertised, and what is said about one that clients may not reach. The neighbours are real nodes."""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest

from plasm_dht import PlasmServer
from plasm_dht.config import Settings
from plasm_dht.dht import wire
from plasm_dht.provider.address import BaseUrl

OUTER = "198.51.100.7"  # of nobody (RFC 5737)
PUBLIC = "1.1.1.1"
ROOM = logging.getLogger("plasm_dht.provider.address").name


def sees(node: PlasmServer, ip: str) -> None:
    """Have a node see everybody at this address, as one does that is behind an address translation."""
    node.protocol._handlers[wire.Stun] = lambda sender, message_id, request: wire.response(
        message_id, wire.address_result((ip, sender[1]))
    )


@asynccontextmanager
async def among(seen_at: Sequence[str], interface: str = "127.0.0.1") -> AsyncIterator[PlasmServer]:
    """A node among neighbours that see it at these addresses."""
    async with PlasmServer() as server:
        await server.listen(0, interface)
        neighbours = [PlasmServer() for _ in seen_at]
        try:
            for neighbour, ip in zip(neighbours, seen_at, strict=True):
                await neighbour.listen(0, "127.0.0.1")
                sees(neighbour, ip)
                await server.bootstrap([neighbour.address])
            yield server
        finally:
            for neighbour in neighbours:
                await neighbour.close()


def url_of(server: PlasmServer, http: tuple[str, int], settings: Settings | None = None) -> BaseUrl:
    return BaseUrl(settings or Settings(), server, http, asyncio.Event())


async def test_on_a_wildcard_it_is_where_most_neighbours_see_us() -> None:
    async with among([PUBLIC, OUTER, PUBLIC]) as server:
        assert await url_of(server, ("0.0.0.0", 8080)).look() == f"http://{PUBLIC}:8080"


async def test_an_address_of_another_family_than_what_is_bound_is_nobodys() -> None:
    async with among(["2606:4700::1111", "2606:4700::1111", PUBLIC]) as server:
        assert await url_of(server, ("0.0.0.0", 80)).look() == f"http://{PUBLIC}:80"
        assert await url_of(server, ("::", 80)).look() == "http://[2606:4700::1111]:80"


@pytest.mark.parametrize(("before", "new"), [(PUBLIC, OUTER), (OUTER, PUBLIC)])
async def test_of_two_with_as_many_votes_the_one_of_before_stays(before: str, new: str) -> None:
    async with among([before]) as server, PlasmServer() as late:
        assert await server.seen_address() == before
        await late.listen(0, "127.0.0.1")
        sees(late, new)
        await server.bootstrap([late.address])
        assert {await server.seen_address() for _ in range(3)} == {before}


async def test_what_neighbours_said_last_stays_when_they_are_gone() -> None:
    async with among([PUBLIC]) as server:
        url = url_of(server, ("0.0.0.0", 8080))
        assert await url.look() == f"http://{PUBLIC}:8080"
        server.protocol.router.remove_contact(server.protocol.router.live()[0])
        assert await url.look() == f"http://{PUBLIC}:8080"


@pytest.mark.parametrize(
    ("bound", "http", "said"),
    [
        ("127.0.0.1", "127.0.0.1", "it binds 127.0.0.1, and http://127.0.0.1:8080 is advertised"),
        ("0.0.0.0", "127.0.0.1", "it has no such address, and http://127.0.0.1:8080 is advertised"),
        ("0.0.0.0", "0.0.0.0", f"it has no such address, and http://{OUTER}:8080 is advertised"),
    ],
)
async def test_an_address_that_is_not_ours_is_said_once(
    bound: str, http: str, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, ROOM)
    async with among([OUTER], bound) as server:
        url = url_of(server, (http, 8080))
        await url.look()
        await url.look()
    assert caplog.messages == [
        f"neighbours see this node at {OUTER}, but {said}; --base-url names another address",
    ]


async def test_a_private_one_is_said_where_it_was_not_chosen(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, ROOM)
    async with among(["127.0.0.1"]) as server:
        await url_of(server, ("127.0.0.1", 8080)).look()
        assert caplog.messages == []
        await url_of(server, ("0.0.0.0", 8080)).look()
    (line,) = caplog.messages
    assert line.startswith("http://127.0.0.1:8080 is advertised, a private address, ")


async def test_one_that_was_named_is_taken_as_it_is_and_nobody_is_asked(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, ROOM)
    async with among([OUTER]) as server:
        url = url_of(server, ("0.0.0.0", 8080), Settings(base_url="https://cdn.example.net/boot"))
        assert await url.look() == "https://cdn.example.net/boot"
        await url.follow(lambda _: pytest.fail("it never changes"))
    assert caplog.messages == []
