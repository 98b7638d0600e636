"""What is served is found at another node, is what was signed, and stays found for as long as its provider lives."""

import asyncio
import hashlib
import json
import time
from pathlib import Path

from plasm_dht.identity import parse_publisher_id
from plasm_dht.provider.manifest import Pointer, verify_manifest
from tests.e2e.world import TARGET, World, ask, observe, put, read, soon


async def test_what_get_prints_leads_to_files_that_are_what_the_provider_signed(world: World, artifacts: Path) -> None:
    put(artifacts, "beta/x86_64", bzImage="another kernel", rootfs__squashfs="a" * 300_000, cmdline="quiet")
    node = await world.node("127.0.0.10")
    provider = await world.provider("127.0.0.11", artifacts, joins=node.dht)
    assert provider.dht.startswith("127.0.0.11:")
    assert provider.http.startswith("127.0.0.11:")
    for target, roles in {TARGET: {"kernel", "initramfs"}, "beta/x86_64": {"kernel", "rootfs", "cmdline"}}.items():
        plain, as_json, record = await asyncio.gather(
            world.get(node, target=target), world.get(node, "--json", target=target), ask(node, target)
        )
        assert (plain.code, plain.stderr) == (0, "")
        assert plain.stdout == f"http://{provider.http}/{target}/manifest.json\n"
        assert (as_json.object["url"], as_json.object["publisher"]) == (plain.stdout.strip(), provider.publisher)
        assert record is not None
        pointer = Pointer.decode(record.value)
        manifest = await read(plain.stdout.strip())
        digest = hashlib.sha256(manifest).digest()
        assert (len(manifest), digest) == (pointer.manifest_size, pointer.manifest_sha256)
        assert digest.hex() == as_json.object["manifest_sha256"]
        verified = verify_manifest(manifest, parse_publisher_id(provider.publisher))
        assert (verified.target, verified.version, verified.artifacts.keys()) == (target, pointer.version, roles)
        for artifact in verified.artifacts.values():
            content = await read(artifact.urls[0])
            assert content == (artifacts / target / artifact.filename).read_bytes()
            assert (len(content), hashlib.sha256(content).hexdigest()) == (artifact.size, artifact.sha256)
    ended = await provider.stop()
    assert ended.stdout == ""  # the ready line was all


async def test_a_provider_on_every_address_advertises_one_that_clients_can_reach(world: World, artifacts: Path) -> None:
    node = await world.node("127.0.0.10")
    provider = await world.provider("0.0.0.0", artifacts, joins=node.dht)
    url = (await world.get(node)).stdout.strip()
    assert url == f"http://127.0.0.1:{provider.http.split(':')[1]}/{TARGET}/manifest.json"
    assert json.loads(await read(url))["version"] == "1"


async def test_a_record_stays_found_all_along_for_as_long_as_its_provider_lives(world: World, artifacts: Path) -> None:
    node = await world.node("127.0.0.10")
    provider = await world.provider("127.0.0.11", artifacts, "--record-ttl", "4", joins=node.dht)
    first = (await world.get(node, "--json")).object
    assert first["expires_at"] - first["issued_at"] == 4000
    sightings = await observe(node, first["expires_at"] / 1000 + 1.5)
    assert all(sighting.record for sighting in sightings)
    later = (await world.get(node, "--json")).object
    assert later["seq"] > first["seq"]
    assert later["expires_at"] > first["expires_at"]
    assert (later["url"], later["manifest_sha256"]) == (first["url"], first["manifest_sha256"])
    assert provider.process.returncode is None


async def test_of_two_providers_get_gives_the_freshest_all_gives_both_and_trust_picks_one(
    world: World, artifacts: Path
) -> None:
    node = await world.node("127.0.0.10")
    one = await world.provider("127.0.0.11", artifacts, joins=node.dht)
    two = await world.provider("127.0.0.12", artifacts, joins=one.dht)
    stranger = "ed25519:" + "0" * 64
    freshest, both, trusted, first_trusted, nobody, as_json = await asyncio.gather(
        world.get(node),
        world.get(node, "--all"),
        world.get(node, "--trust", one.publisher),
        world.get(node, "--trust", stranger, "--trust", one.publisher, "--json"),
        world.get(node, "--trust", stranger),
        world.get(node, "--all", "--json", "--trust", one.publisher, "--trust", two.publisher),
    )
    urls = [f"http://{provider.http}/{TARGET}/manifest.json" for provider in (two, one)]
    assert freshest.stdout.splitlines() == urls[:1]
    assert both.stdout.splitlines() == urls
    assert trusted.stdout.splitlines() == urls[1:]
    assert (first_trusted.object["publisher"], first_trusted.object["trusted"]) == (one.publisher, True)
    assert (nobody.code, nobody.stdout, nobody.stderr.count("\n")) == (1, "", 1)
    assert [json.loads(line)["publisher"] for line in as_json.stdout.splitlines()] == [two.publisher, one.publisher]

    await two.stop()
    left, gone = await asyncio.gather(world.get(node, "--all"), world.get(node, "--trust", two.publisher))
    assert left.stdout.splitlines() == urls[1:]
    assert (gone.code, gone.stdout) == (1, "")


async def test_wait_finds_a_provider_that_starts_later(world: World, artifacts: Path) -> None:
    node = await world.node("127.0.0.10")
    waiting = asyncio.create_task(world.get(node, "--wait", "30"))
    waiting_for_a_node = asyncio.create_task(world.get("127.0.0.12:8468", "--wait", "30"))
    await soon(lambda: _refused_or_found(world, node.dht))
    provider = await world.provider("127.0.0.12", artifacts, port=8468, joins=node.dht)
    began = time.time()
    url = f"http://{provider.http}/{TARGET}/manifest.json\n"
    for done in await asyncio.gather(waiting, waiting_for_a_node):
        assert (done.code, done.stdout) == (0, url)
        assert done.ended - began < 10  # a pause has at most 2 s


async def _refused_or_found(world: World, address: str) -> bool:
    return (await world.get(address, "--timeout", "3")).code == 1
