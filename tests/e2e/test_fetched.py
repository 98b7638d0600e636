"""`plasm-dht fetch` from real providers through a real network."""

import asyncio
from pathlib import Path

from tests.e2e.world import TARGET, Done, Running, World, put, soon, version


async def fetch(world: World, via: Running, folder: str, *options: str) -> Done:
    return await world.run("fetch", TARGET, "-o", folder, "--bootstrap", via.dht, *options)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


async def test_what_a_provider_serves_is_what_is_fetched_and_so_is_what_it_changes_to(
    world: World, artifacts: Path
) -> None:
    put(artifacts, rootfs__squashfs="r" * 5_000_000, cmdline="quiet")
    node = await world.node("127.0.0.10")
    await world.provider("127.0.0.11", artifacts, joins=node.dht)
    done = await fetch(world, node, "out")
    assert (done.code, done.stdout) == (0, "out/manifest.json\n")
    fetched = files(world.folder / "out")
    assert fetched.pop("manifest.json")
    source = files(artifacts / TARGET)
    source.pop("VERSION")
    assert fetched == source

    put(artifacts, VERSION="2", vmlinuz="another kernel")

    async def advertised() -> bool:
        return await version(node) == "2"

    await soon(advertised)
    again = await fetch(world, node, "out")
    assert again.stderr.count("was here") == len(source) - 1
    assert (world.folder / "out" / "vmlinuz").read_text() == "another kernel"


async def test_a_change_that_comes_while_it_is_fetched_is_never_an_error(world: World, artifacts: Path) -> None:
    node = await world.node("127.0.0.10")
    await world.provider("127.0.0.11", artifacts, joins=node.dht)

    async def change() -> None:
        for number in range(6):
            (artifacts / TARGET / "new").write_text(f"kernel {number}")
            (artifacts / TARGET / "new").rename(artifacts / TARGET / "vmlinuz")
            await asyncio.sleep(1)

    changing = asyncio.create_task(change())
    while not changing.done():
        done = await fetch(world, node, "out")
        assert done.code == 0, done
    await changing


async def test_a_provider_that_was_killed_yields_to_the_other(world: World, artifacts: Path) -> None:
    node = await world.node("127.0.0.10")
    honest = await world.provider("127.0.0.11", artifacts, joins=node.dht)
    dead = await world.provider("127.0.0.12", artifacts, joins=node.dht)
    await dead.kill()
    done = await fetch(world, node, "out", "--timeout", "20")
    assert (done.code, done.stdout) == (0, "out/manifest.json\n")
    assert f"{dead.http}/{TARGET}/manifest.json: cannot connect" in done.stderr
    assert f"of {honest.publisher}, 2 files" in done.stderr
