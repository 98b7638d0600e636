"""What changes in the folder is found at another node within 2 s of the last write; what does not is not published."""

import asyncio
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from plasm_dht.provider.manifest import Pointer
from tests.e2e.world import PAUSE, TARGET, Running, World, ask, fetch, note, put, read, soon, version

# From the last write to where another node's client finds it (s).
FOUND_WITHIN = 2.0
# A folder that is gone is looked at twice, a second apart (s).
WITHDRAWN_WITHIN = 5.0
# A file without content, which takes minutes to be hashed all the same (bytes).
LARGE = 500 * 2**30


async def found_after_write(node: Running, target: str, expected: str) -> float:
    """Seconds from the last write, which is now, to where the version is found."""
    written = time.time()

    async def found() -> bool:
        return await version(node, target) == expected

    await soon(found, within=10)
    return time.time() - written


def write_in_place(folder: Path) -> None:
    (folder / "VERSION").write_text("2")


def rename_over(folder: Path) -> None:
    (folder / "VERSION.tmp").write_text("2")
    (folder / "VERSION.tmp").rename(folder / "VERSION")


def delete_and_write(folder: Path) -> None:
    (folder / "VERSION").unlink()
    (folder / "VERSION").write_text("2")


def replace_the_folder(folder: Path) -> None:
    new = folder.with_name("new.tmp")
    shutil.copytree(folder, new)
    (new / "VERSION").write_text("2")
    folder.rename(folder.with_name("old.tmp"))
    new.rename(folder)


def new_folder(folder: Path) -> None:
    put(folder, "fresh-channel/new-arch", vmlinuz="a kernel", VERSION="2")


def swap_a_link(folder: Path) -> None:
    (folder / "next").symlink_to("releases/2")
    (folder / "next").rename(folder / "linked")


Kinds = dict[str, Callable[[Path], None]]
IN_A_FOLDER: Kinds = {
    "write": write_in_place,
    "rename": rename_over,
    "delete": delete_and_write,
    "replace": replace_the_folder,
}


async def test_every_kind_of_change_is_found_within_two_seconds_of_the_last_write(
    world: World, artifacts: Path
) -> None:
    for kind in IN_A_FOLDER:
        put(artifacts, f"{kind}/arm64", vmlinuz="a kernel", VERSION="1")
    node = await world.node("127.0.0.10")
    provider = await world.provider("127.0.0.11", artifacts, joins=node.dht)
    old = {kind: await ask(node, f"{kind}/arm64") for kind in IN_A_FOLDER}
    seconds = {}

    async def change(kind: str, make: Callable[[Path], None]) -> None:
        await asyncio.to_thread(make, artifacts / kind / "arm64")
        seconds[kind] = await found_after_write(node, f"{kind}/arm64", "2")

    async def new() -> None:
        new_folder(artifacts)
        seconds["new"] = await found_after_write(node, "fresh-channel/new-arch", "2")

    async def grow() -> None:
        """Somebody copies a large kernel over: what is found in the end is the whole of it."""
        folder = artifacts / "stable/arm64"
        with (folder / "vmlinuz").open("wb") as kernel:
            for _ in range(8):
                kernel.write(b"x" * 200_000)
                kernel.flush()
                await asyncio.sleep(0.2)
        (folder / "VERSION").write_text("2")
        seconds["grow"] = await found_after_write(node, "stable/arm64", "2")
        kernel_now = json.loads(await read(f"http://{provider.http}/stable/arm64/manifest.json"))["artifacts"]["kernel"]
        assert kernel_now["size"] == 1_600_000
        assert len(await read(kernel_now["urls"][0])) == 1_600_000

    await asyncio.gather(*(change(kind, make) for kind, make in IN_A_FOLDER.items()), new(), grow())
    note(f"found after {seconds}")
    assert max(seconds.values()) < FOUND_WITHIN, seconds
    for kind, before in old.items():
        after = await ask(node, f"{kind}/arm64")
        assert before is not None
        assert after is not None
        assert after.seq > before.seq
    found = (await world.get(node, "--json", target="fresh-channel/new-arch")).object
    assert (found["version"], found["url"]) == ("2", f"http://{provider.http}/fresh-channel/new-arch/manifest.json")


async def test_a_link_that_is_swapped_is_a_change_within_two_seconds(world: World, artifacts: Path) -> None:
    for number in ("1", "2"):
        put(artifacts, f"releases/{number}", vmlinuz=f"kernel {number}", VERSION=number)
    (artifacts / "linked").mkdir()
    (artifacts / "linked/arm64").symlink_to("../releases/1")
    node = await world.node("127.0.0.10")
    provider = await world.provider("127.0.0.11", artifacts, joins=node.dht)
    assert await version(node, "linked/arm64") == "1"
    (artifacts / "linked/next.tmp").symlink_to("../releases/2")
    (artifacts / "linked/next.tmp").rename(artifacts / "linked/arm64")
    seconds = await found_after_write(node, "linked/arm64", "2")
    note(f"found after {seconds:.2f} s")
    assert seconds < FOUND_WITHIN
    assert await read(f"http://{provider.http}/linked/arm64/vmlinuz") == b"kernel 2"
    # and a write through the link is one of what it leads to
    (artifacts / "linked/arm64/VERSION").write_text("3")
    seconds = await found_after_write(node, "linked/arm64", "3")
    assert seconds < FOUND_WITHIN
    assert await version(node, "releases/2") == "3"


async def test_what_vanishes_is_withdrawn_and_what_only_blinks_is_not(world: World, artifacts: Path) -> None:
    put(artifacts, "gone/arm64", vmlinuz="a kernel")
    put(artifacts, "emptied/arm64", vmlinuz="a kernel")
    put(artifacts, "blinks/arm64", vmlinuz="a kernel", VERSION="1")
    put(artifacts, "touched/arm64", vmlinuz="a kernel", VERSION="1")
    node = await world.node("127.0.0.10")
    provider = await world.provider("127.0.0.11", artifacts, joins=node.dht)
    before = {target: await ask(node, target) for target in ("blinks/arm64", "touched/arm64", "stable/arm64")}
    assert all(before.values())

    def blink() -> None:
        shutil.rmtree(artifacts / "blinks")
        time.sleep(0.7)  # longer than the watcher waits for quiet: it has been looked at meanwhile
        put(artifacts, "blinks/arm64", vmlinuz="a kernel", VERSION="1")

    changed = time.time()
    shutil.rmtree(artifacts / "gone")
    (artifacts / "emptied/arm64/vmlinuz").unlink()
    (artifacts / "touched/arm64/vmlinuz").touch()
    (artifacts / "touched/arm64/VERSION").write_text("1")
    (artifacts / "touched/arm64/.hidden").write_text("no artifact")
    (artifacts / "touched/arm64/upload.part").write_text("not yet one")
    await asyncio.to_thread(blink)

    async def withdrawn() -> bool:
        assert await ask(node, "blinks/arm64") is not None
        return not any(await asyncio.gather(ask(node, "gone/arm64"), ask(node, "emptied/arm64")))

    await soon(withdrawn, within=WITHDRAWN_WITHIN)
    note(f"withdrawn after {time.time() - changed:.2f} s")
    assert (await world.get(node, target="gone/arm64")).code == 1
    for target in ("gone/arm64", "emptied/arm64"):
        assert (await fetch(f"http://{provider.http}/{target}/manifest.json"))[0] == 404
    # as long again as a change takes to be found
    await asyncio.sleep(max(0.0, changed + FOUND_WITHIN + 1 - time.time()))
    assert {target: await ask(node, target) for target in before} == before

    # back again: found again
    put(artifacts, "gone/arm64", vmlinuz="a kernel", VERSION="back")
    assert await found_after_write(node, "gone/arm64", "back") < FOUND_WITHIN


async def test_the_whole_folder_may_go_and_come_back(world: World, artifacts: Path) -> None:
    node = await world.node("127.0.0.10")
    provider = await world.provider("127.0.0.11", artifacts, joins=node.dht)
    await asyncio.to_thread(artifacts.rename, artifacts.with_name("away"))

    async def withdrawn() -> bool:
        return await ask(node) is None

    await soon(withdrawn, within=WITHDRAWN_WITHIN)
    put(artifacts, vmlinuz="a kernel", VERSION="2")

    async def found() -> bool:
        return await version(node) == "2"

    await soon(found)
    record = await ask(node)
    assert record is not None
    assert await read(Pointer.decode(record.value).url)
    assert provider.process.returncode is None


async def test_no_channel_waits_for_the_large_files_of_another(world: World, artifacts: Path) -> None:
    put(artifacts, "large/arm64", vmlinuz="a kernel", VERSION="1")
    with (artifacts / "large/arm64/rootfs.img").open("wb") as rootfs:
        rootfs.truncate(LARGE)
    node = await world.node("127.0.0.10")
    provider = await world.provider("127.0.0.11", artifacts, "--http-port", "8087", joins=node.dht, wait=False)

    async def found() -> bool:
        return await version(node) == "1"

    await soon(found)
    put(artifacts, VERSION="2")
    assert await found_after_write(node, TARGET, "2") < FOUND_WITHIN
    status, health = await fetch("http://127.0.0.11:8087/health")
    assert (status, json.loads(health)["reason"]) == (503, "not advertised: large/arm64")
    assert provider.process.stdout is not None
    with pytest.raises(TimeoutError):  # that it is ready is said when everything has been hashed
        async with asyncio.timeout(PAUSE):
            await world.ready(provider)
    (artifacts / "large/arm64/rootfs.img").unlink()
    await world.ready(provider)
    assert await version(node, "large/arm64") == "1"


async def test_health_and_status_tell_what_is_advertised_while_files_change(world: World, artifacts: Path) -> None:
    put(artifacts, "other/arm64", vmlinuz="a kernel", VERSION="1")
    node = await world.node("127.0.0.10")
    provider = await world.provider("127.0.0.11", artifacts, "--record-ttl", "60", "--name", "rack-7", joins=node.dht)
    site = f"http://{provider.http}"
    answers: list[int] = []

    async def keep_asking() -> None:
        while True:
            status, body = await fetch(f"{site}/health")
            assert body
            answers.append(status)
            await asyncio.sleep(PAUSE)

    asking = asyncio.create_task(keep_asking())
    status = json.loads(await read(f"{site}/status"))
    assert {key: status[key] for key in ("name", "publisher", "dht", "http", "watching", "neighbours")} == {
        "name": "rack-7",
        "publisher": provider.publisher,
        "dht": provider.dht,
        "http": provider.http,
        "watching": "inotify",
        "neighbours": 1,
    }
    assert [(record["key"], record["version"], record["holders"]) for record in status["records"]] == [
        ("other/arm64", "1", 1),
        ("stable/arm64", "1", 1),
    ]
    for record in status["records"]:
        in_the_network = await ask(node, record["key"])
        assert in_the_network is not None
        assert (record["seq"], record["expires_at"]) == (in_the_network.seq, in_the_network.expires_at)
        assert 30 < record["ttl_remaining"] <= 60
        assert 25 < record["refresh_in"] <= 40
        assert record["url"] == Pointer.decode(in_the_network.value).url

    for number in range(2, 5):
        put(artifacts, VERSION=str(number))
        await found_after_write(node, "stable/arm64", str(number))
        after = json.loads(await read(f"{site}/status"))
        assert [record["version"] for record in after["records"]] == ["1", str(number)]
    shutil.rmtree(artifacts / "other")

    async def withdrawn() -> bool:
        return [record["key"] for record in json.loads(await read(f"{site}/status"))["records"]] == ["stable/arm64"]

    await soon(withdrawn, within=WITHDRAWN_WITHIN)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert set(answers) == {200}
