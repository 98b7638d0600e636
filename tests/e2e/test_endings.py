"""When a provider stops, its record is gone: at once if it stopped by itself, at its expiry if it was killed."""

import asyncio
import signal
import time
from pathlib import Path

from plasm_dht.config import parse_address
from plasm_dht.provider.manifest import Pointer
from tests.e2e.world import TARGET, Running, World, ask, fetch, held, note, observe, put, read, soon, together, until

# A stop is over within 3 s; what the machine needs to notice that comes on top (s).
STOP_WITHIN = 3.0


async def stop(world: World, number: int, node: Running, provider: Running) -> None:
    """Told to stop, it withdraws, leaves with 0, and nobody finds it."""
    before = await ask(node, TARGET)
    assert before is not None
    ended = await provider.stop(number)
    assert (ended.code, ended.stdout) == (0, "")
    assert ended.ended - ended.began < STOP_WITHIN
    found, done = await asyncio.gather(ask(node, TARGET), world.get(node))
    assert found is None
    assert (done.code, done.stdout, done.stderr.count("\n")) == (1, "", 1)


async def test_a_provider_that_is_told_to_stop_takes_its_records_back_at_once(world: World, artifacts: Path) -> None:
    one, two = await asyncio.gather(world.node("127.0.0.10"), world.node("127.0.0.20"))
    await together(
        stop(world, signal.SIGTERM, one, await world.provider("127.0.0.11", artifacts, joins=one.dht)),
        stop(world, signal.SIGINT, two, await world.provider("127.0.0.21", artifacts, joins=two.dht)),
    )


async def stays_until_its_expiry(world: World, node: Running, provider: Running, number: int, code: int) -> None:
    """Asked all the time at both sides of the expiry: found before it, never after."""
    record = await ask(node)
    assert record is not None
    expires_at = record.expires_at / 1000
    assert (await provider.stop(number)).code == code
    observing = asyncio.create_task(observe(node, expires_at + 1.2))
    found = (await world.get(node, "--json")).object
    assert found["expires_at"] == record.expires_at
    assert 0 < found["ttl_remaining"] < record.expires_at / 1000 - record.issued_at / 1000
    await until(expires_at)
    done = await world.get(node)
    assert (done.code, done.stdout) == (1, "")
    sightings = await observing
    before = [sighting.record for sighting in sightings if sighting.ended < expires_at]
    after = [sighting.record for sighting in sightings if sighting.began >= expires_at]
    assert len(before) > 3
    assert len(after) > 3
    assert set(before) == {record}
    assert set(after) == {None}
    assert node.process.returncode is None


async def test_a_killed_providers_record_is_found_until_its_expiry_and_not_one_second_longer(
    world: World, artifacts: Path
) -> None:
    killed, left, frozen = await asyncio.gather(*(world.node(f"127.0.0.{n}") for n in (10, 20, 30)))
    life = ("--record-ttl", "7", "--refresh-interval", "6.9")
    one, two, three = await asyncio.gather(
        world.provider("127.0.0.11", artifacts, *life, joins=killed.dht),
        world.provider("127.0.0.21", artifacts, *life, "--no-withdraw", joins=left.dht),
        world.provider("127.0.0.31", artifacts, *life, joins=frozen.dht),
    )
    await together(
        stays_until_its_expiry(world, killed, one, signal.SIGKILL, -9),
        stays_until_its_expiry(world, left, two, signal.SIGTERM, 0),
        is_back_after_a_suspend(frozen, three),
        is_killed_while_it_publishes(world),
    )


async def is_back_after_a_suspend(node: Running, provider: Running) -> None:
    """A process that is stopped and continued is a machine that slept: its record ends, and is back at once."""
    provider.process.send_signal(signal.SIGSTOP)
    try:
        record = await ask(node)
        assert record is not None
        await until(record.expires_at / 1000)
        assert await ask(node) is None
    finally:
        provider.process.send_signal(signal.SIGCONT)
    again = await soon(lambda: ask(node), within=5)
    assert again.seq > record.seq


async def is_killed_while_it_publishes(world: World) -> None:
    """Whatever was published by then is true and ends; the next start has all of it."""
    folder = world.folder / "many"
    targets = [f"stable/machine-{number}" for number in range(40)]
    for target in targets:
        put(folder, target, vmlinuz=f"the kernel of {target}")
    node = await world.node("127.0.0.40")
    options = ("--record-ttl", "4", "-q")
    provider = await world.provider("127.0.0.41", folder, *options, joins=node.dht, wait=False)
    await soon(lambda: ask(node, targets[0]))
    await provider.kill()
    records = dict(zip(targets, await asyncio.gather(*(ask(node, target) for target in targets)), strict=True))
    for target, record in records.items():
        if record is not None:
            assert Pointer.decode(record.value).url.endswith(f"/{target}/manifest.json")
    assert any(records.values())
    await until(max(record.expires_at for record in records.values() if record) / 1000)
    assert not any(await asyncio.gather(*(ask(node, target) for target in targets)))
    await world.provider("127.0.0.41", folder, *options, joins=node.dht)
    assert all(await asyncio.gather(*(ask(node, target) for target in targets)))


async def test_a_provider_that_is_killed_and_comes_back_is_found_all_along_and_goes_on(
    world: World, artifacts: Path
) -> None:
    node = await world.node("127.0.0.10")
    first = await world.provider("127.0.0.11", artifacts, "--record-ttl", "600", joins=node.dht)
    before = await ask(node)
    assert before is not None
    await first.kill()
    put(artifacts, VERSION="2")
    port = parse_address(first.dht)[1]
    options = ("--record-ttl", "5")
    starting = await world.provider("127.0.0.11", artifacts, *options, joins=node.dht, port=port, wait=False)
    observing = asyncio.create_task(observe(node, time.time() + 0.5))
    second = await world.ready(starting)
    after = await ask(node)
    assert after is not None
    assert all(sighting.record for sighting in await observing)
    assert second.publisher == first.publisher
    assert after.seq > before.seq
    assert Pointer.decode(after.value).version == "2"
    await second.stop()
    assert await ask(node) is None
    (tombstone,) = await held(node)
    assert tombstone.withdrawn
    # somebody may still have the record of the one that was killed
    assert tombstone.expires_at >= before.expires_at


async def test_a_stop_needs_neither_an_answer_nor_the_end_of_a_download_nor_of_a_scan(
    world: World, artifacts: Path
) -> None:
    with (artifacts / TARGET / "rootfs.img").open("wb") as image:
        image.truncate(4 * 2**30)  # takes long to hash, and no space
    other = put(world.folder / "other", vmlinuz="a kernel", rootfs="r" * 30_000_000)
    node, dead = await asyncio.gather(world.node("127.0.0.10"), world.node("127.0.0.20"))
    scanning = await world.provider("127.0.0.11", artifacts, joins=node.dht, wait=False)
    served, lonely = await asyncio.gather(
        world.provider("127.0.0.12", other, joins=node.dht), world.provider("127.0.0.21", other, joins=dead.dht)
    )
    await dead.kill()
    await soon(lambda: _listens(scanning))
    reader, writer = await asyncio.open_connection(*parse_address(served.http), limit=2**16)
    writer.write(f"GET /{TARGET}/rootfs HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    await reader.readline()  # and then it takes nothing more
    try:
        ends = await asyncio.gather(scanning.stop(), served.stop(signal.SIGINT), lonely.stop())
    finally:
        writer.close()
    assert [end.code for end in ends] == [0, 0, 0]
    seconds = [end.ended - end.began for end in ends]
    note(f"stopped after {seconds}")
    assert max(seconds) < STOP_WITHIN + 1.5, seconds
    assert await ask(node) is None


async def _listens(provider: Running) -> bool:
    return "listens on" in provider.stderr


async def test_a_provider_alone_serves_and_stops_as_any_other(world: World, artifacts: Path) -> None:
    provider = await world.provider("127.0.0.11", artifacts)
    assert (await world.get(provider)).stdout == f"http://{provider.http}/{TARGET}/manifest.json\n"
    assert await read(f"http://{provider.http}/{TARGET}/vmlinuz") == b"a kernel"
    assert (await fetch(f"http://{provider.http}/{TARGET}/vmlinuz", Range="bytes=2-4")) == (206, b"ker")
    ended = await provider.stop(signal.SIGINT)
    assert (ended.code, ended.stdout) == (0, "")
    assert ended.ended - ended.began < STOP_WITHIN
