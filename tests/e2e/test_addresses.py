"""What a provider advertises is where clients reach it, over IPv4 and IPv6, also when it learns better later."""

import asyncio
import socket
from pathlib import Path

import pytest

from tests.e2e.world import TARGET, Running, World, ask, fetch, put, read, soon

# Neighbours are asked a second after they came, and answer in milliseconds; with time to publish and to be asked (s).
CORRECTED_WITHIN = 5.0


@pytest.fixture(autouse=True)
def _needs_ipv6() -> None:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as probe:
            probe.bind(("::1", 0))
    except OSError:
        pytest.skip("this machine has no IPv6 on loopback")


def port(address: str) -> str:
    return address.rpartition(":")[2]


async def test_over_both_families_everybody_finds_everybodys_records(world: World, artifacts: Path) -> None:
    dual = await world.node("::")
    over_ipv4, over_ipv6 = f"127.0.0.1:{port(dual.dht)}", f"[::1]:{port(dual.dht)}"
    put(artifacts, "beta/x86_64", bzImage="another kernel")
    old = await world.provider("127.0.0.11", artifacts, joins=over_ipv4)
    new = await world.provider("::1", artifacts, joins=over_ipv6)
    assert new.http.startswith("[::1]:")
    both = {f"http://{provider.http}/{TARGET}/manifest.json" for provider in (old, new)}

    async def finds(via: str) -> None:
        async def all_of_them() -> bool:
            return set((await world.get(via, "--all")).stdout.splitlines()) == both

        await soon(all_of_them)

    async with asyncio.TaskGroup() as group:
        for via in (over_ipv4, over_ipv6, old.dht, new.dht):
            group.create_task(finds(via))
    for provider in (old, new):
        assert (
            f'"url": "http://{new.http}/{TARGET}/manifest.json"'
            in (await read(f"http://{provider.http}/dht/{TARGET}")).decode()
        )
    mapped = f"[::ffff:127.0.0.1]:{port(dual.dht)}"
    mixed, fetched, by_mapped = await asyncio.gather(
        world.run("get", TARGET, "--bootstrap", "127.0.0.1:9", "--bootstrap", over_ipv6),
        world.run("fetch", TARGET, "-o", "got", "--trust", new.publisher, "--bootstrap", over_ipv4),
        world.get(mapped),
    )
    assert (mixed.code, fetched.code, by_mapped.code) == (0, 0, 0), (mixed, fetched, by_mapped)
    assert (world.folder / "got/vmlinuz").read_text() == "a kernel"


async def test_an_http_server_on_every_address_answers_over_both_families(world: World, artifacts: Path) -> None:
    provider = await world.provider("::", artifacts)
    number = port(provider.http)
    assert provider.http == f"[::]:{number}"
    answers = [await fetch(f"http://{host}:{number}/health") for host in ("127.0.0.1", "[::1]")]
    assert answers[0] == answers[1] == (200, b'{"status": "ok"}')


async def test_who_starts_alone_advertises_another_address_soon_after_a_neighbour_has_told_it(
    world: World, artifacts: Path
) -> None:
    provider = await world.provider("::", artifacts)
    number = port(provider.http)

    async def url(via: str | Running) -> str:
        done = await world.get(via)
        return done.stdout.strip()

    assert await url(f"[::1]:{port(provider.dht)}") == f"http://[::1]:{number}/{TARGET}/manifest.json"
    assert f"http://[::1]:{number} is advertised until one does; --base-url names another address" in provider.stderr
    before = await ask(f"127.0.0.1:{port(provider.dht)}")
    node = await world.node("127.0.0.10", joins=f"127.0.0.1:{port(provider.dht)}")

    async def is_corrected() -> bool:
        return await url(node) == f"http://127.0.0.1:{number}/{TARGET}/manifest.json"

    await soon(is_corrected, within=CORRECTED_WITHIN)
    manifest = (await read(f"http://127.0.0.1:{number}/{TARGET}/manifest.json")).decode()
    assert f'"http://127.0.0.1:{number}/{TARGET}/vmlinuz"' in manifest
    after = await ask(node)
    assert before is not None
    assert after is not None
    assert after.seq > before.seq
    warnings = [line for line in provider.stderr.splitlines() if " WARNING plasm_dht.provider.address: " in line]
    assert len(warnings) == 2
    assert f"http://127.0.0.1:{number} is advertised, a private address" in warnings[1]


async def test_an_address_that_was_named_is_advertised_as_it_is_and_nothing_is_said(
    world: World, artifacts: Path
) -> None:
    node = await world.node("127.0.0.10")
    provider = await world.provider("0.0.0.0", artifacts, "--base-url", "https://cdn.example.net/boot/", joins=node.dht)
    assert (await world.get(node)).stdout == f"https://cdn.example.net/boot/{TARGET}/manifest.json\n"
    assert " WARNING " not in provider.stderr


async def test_a_node_that_cannot_reach_a_family_says_so(world: World) -> None:
    node = await world.start("node", "--host", "127.0.0.1", "--port", "0", "--bootstrap", "[::1]:9")
    await world.ready(node)
    assert "bootstrap address ::1 cannot be reached from 127.0.0.1: listen on ::" in node.stderr
