"""Downloading over real sockets: what ends up in the folder is what was signed, and goes on where it ended."""

import asyncio
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from plasm_dht.errors import VerificationError
from plasm_dht.provider.fetch import Progress
from tests.provider.shop import (
    HALF,
    INITRD,
    KERNEL,
    Shop,
    at_half,
    breaks_off,
    content,
    left_half,
    load,
    names,
    sha256,
    stalls,
)

pytestmark = pytest.mark.usefixtures("no_pauses")


# -- all of it ---------------------------------------------------------------------------------------------------------


async def test_everything_is_there_afterwards_and_nothing_else(shop: Shop, folder: Path) -> None:
    record, events = shop.record(), []
    fetched = await load(folder, [record], report=events.append)
    assert content(folder) == shop.files | {"manifest.json": shop.manifest()}
    assert names(folder) == ["initrd.gz", "manifest.json", "vmlinuz"]
    assert (fetched.path, fetched.record, fetched.manifest.version) == (folder / "manifest.json", record, "1")
    assert {event.filename for event in events if event.state == "verified"} == {"vmlinuz", "initrd.gz"}
    assert all(0 < event.done <= event.size for event in events)


async def test_what_is_there_and_right_is_not_downloaded_again(shop: Shop, folder: Path) -> None:
    await load(folder, [shop.record()])
    (folder / "initrd.gz").write_bytes(INITRD[:-1] + b"?")
    shop.requests.clear()
    events: list[Progress] = []
    await load(folder, [shop.record()], report=events.append)
    assert shop.requests == [("manifest.json", None), ("initrd.gz", None)]
    assert content(folder) == shop.files | {"manifest.json": shop.manifest()}
    assert [event.filename for event in events if event.state == "present"] == ["vmlinuz"]


async def test_a_folder_in_which_a_file_is_damaged_has_no_manifest_until_it_is_mended(shop: Shop, folder: Path) -> None:
    await load(folder, [shop.record()])
    (folder / "initrd.gz").write_bytes(INITRD[:-1] + b"?")
    shop.answers["initrd.gz"] = INITRD[:-1] + b"!"
    with pytest.raises(VerificationError):
        await load(folder, [shop.record()])
    assert names(folder) == ["initrd.gz", "initrd.gz.part", "vmlinuz"]
    del shop.answers["initrd.gz"]
    await load(folder, [shop.record()])
    assert content(folder) == shop.files | {"manifest.json": shop.manifest()}


async def test_an_empty_file_and_a_name_as_long_as_names_can_be(shop: Shop, folder: Path) -> None:
    shop.files = {"empty": b"", "n" * 255: b"long", "a b é#?.txt": b"odd"}
    document = shop.document()
    document["artifacts"]["a b é#?.txt"]["urls"] = [f"{shop.url}/a%20b%20%C3%A9%23%3F.txt"]
    shop.answers["manifest.json"] = manifest = shop.manifest(document)
    await load(folder, [shop.record(manifest)])
    assert content(folder) == shop.files | {"manifest.json": manifest}
    assert shop.asked("empty") == []


async def test_no_more_than_three_files_are_downloaded_at_once(shop: Shop, folder: Path) -> None:
    shop.files = {f"file-{number}": bytes([number]) for number in range(9)}
    running, most, three = 0, 0, asyncio.Event()

    async def answer(request: web.Request) -> web.Response:
        nonlocal running, most
        running += 1
        most = max(most, running)
        if running == 3:
            three.set()
        await three.wait()
        await asyncio.sleep(0.01)  # for a fourth, were it asked for
        running -= 1
        return web.Response(body=shop.files[request.match_info["name"]])

    shop.answers |= dict.fromkeys(shop.files, answer)
    await load(folder, [shop.record()])
    assert most == 3


async def test_the_disk_and_hashes_of_files_are_never_the_loops(
    shop: Shop, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, used = threading.get_ident(), set()
    for name in ("open", "pread", "pwrite", "fsync", "ftruncate", "replace"):
        original = getattr(os, name)

        def watched(*args: Any, original: Any = original, name: str = name, **more: Any) -> Any:
            if isinstance(args[0], int) or str(folder) in str(args[0]):
                assert threading.get_ident() != loop, name
                used.add(name)
            return original(*args, **more)

        monkeypatch.setattr(os, name, watched)
    left_half(folder)
    await load(folder, [shop.record()])
    assert used >= {"open", "pread", "pwrite", "fsync"}


# -- going on ----------------------------------------------------------------------------------------------------------


async def test_only_the_rest_of_an_unfinished_file_is_asked_for(shop: Shop, folder: Path) -> None:
    left_half(folder)
    await load(folder, [shop.record()])
    assert shop.asked("vmlinuz") == [f"bytes={HALF}-"]
    assert (folder / "vmlinuz").read_bytes() == KERNEL


async def test_a_part_that_is_complete_is_only_hashed(shop: Shop, folder: Path) -> None:
    left_half(folder, KERNEL)
    await load(folder, [shop.record()])
    assert shop.asked("vmlinuz") == []
    assert (folder / "vmlinuz").read_bytes() == KERNEL


@pytest.mark.parametrize("rubbish", [b"?" * HALF, b"?" * len(KERNEL), b"?" * (len(KERNEL) + 1)], ids=len)
async def test_a_part_of_something_else_is_started_over(shop: Shop, folder: Path, rubbish: bytes) -> None:
    left_half(folder, rubbish)
    await load(folder, [shop.record()])
    assert shop.asked("vmlinuz")[-1] is None
    assert len(shop.asked("vmlinuz")) == 1 + (len(rubbish) == HALF)
    assert (folder / "vmlinuz").read_bytes() == KERNEL


async def test_a_server_without_ranges_sends_all_of_it(shop: Shop, folder: Path) -> None:
    left_half(folder, b"?" * HALF)
    shop.ranges = False
    await load(folder, [shop.record()])
    assert shop.asked("vmlinuz") == [f"bytes={HALF}-"]
    assert (folder / "vmlinuz").read_bytes() == KERNEL


async def test_a_server_that_likes_to_compress_is_asked_not_to(shop: Shop, folder: Path) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.Response(body=KERNEL)
        response.enable_compression()
        return response

    shop.answers["vmlinuz"] = answer
    await load(folder, [shop.record()])
    assert (folder / "vmlinuz").read_bytes() == KERNEL


async def test_a_hash_as_etag_that_is_another_one_starts_over_before_the_rest_is_read(shop: Shop, folder: Path) -> None:
    left_half(folder)
    sent: list[int] = []

    async def answer(request: web.Request) -> web.StreamResponse:
        if "Range" not in request.headers:
            return web.Response(body=KERNEL)
        etag = {"ETag": f'"{sha256(b"another")}"', "Content-Range": f"bytes {HALF}-{len(KERNEL) - 1}/{len(KERNEL)}"}
        response = web.StreamResponse(status=206, headers=etag)
        await response.prepare(request)
        sent.append(1)
        await asyncio.Event().wait()  # who reads on waits for ever
        return response

    shop.answers["vmlinuz"] = answer
    await load(folder, [shop.record()])
    assert (sent, shop.asked("vmlinuz")) == ([1], [f"bytes={HALF}-", None])


@pytest.mark.parametrize("where", ["bytes 0-9/*", "bytes */*", "", "bytes x"])
async def test_a_range_that_was_not_asked_for_starts_over(shop: Shop, folder: Path, where: str) -> None:
    left_half(folder)

    async def answer(request: web.Request) -> web.StreamResponse:
        if "Range" in request.headers:
            return web.Response(status=206, body=KERNEL[HALF:], headers={"Content-Range": where} if where else {})
        return web.Response(body=KERNEL)

    shop.answers["vmlinuz"] = answer
    await load(folder, [shop.record()])
    assert shop.asked("vmlinuz") == [f"bytes={HALF}-", None]
    assert (folder / "vmlinuz").read_bytes() == KERNEL


async def test_a_part_is_kept_when_a_server_has_a_shorter_file(shop: Shop, other: Shop, folder: Path) -> None:
    left_half(folder)
    shop.answers["vmlinuz"] = b"short"  # 416 for what is asked
    await load(folder, [shop.record(), other.record()])
    assert other.asked("vmlinuz") == [f"bytes={HALF}-"]


async def test_a_connection_that_breaks_off_is_taken_up_where_it_ended(shop: Shop, folder: Path) -> None:
    taken = asyncio.Event()

    async def answer(request: web.Request) -> web.StreamResponse:
        if "Range" in request.headers:
            return shop.part(request, KERNEL)
        return await breaks_off(KERNEL, HALF, taken)(request)

    shop.answers["vmlinuz"] = answer
    await load(folder, [shop.record()], report=at_half(taken))
    assert shop.asked("vmlinuz") == [None, f"bytes={HALF}-"]
    assert (folder / "vmlinuz").read_bytes() == KERNEL


async def test_what_is_cancelled_goes_on_the_next_time(shop: Shop, folder: Path) -> None:
    reached = asyncio.Event()
    shop.answers["vmlinuz"] = stalls(KERNEL, HALF, reached)
    here = asyncio.Event()
    running = asyncio.create_task(load(folder, [shop.record()], report=at_half(here)))
    await here.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert (folder / "vmlinuz.part").read_bytes() == KERNEL[:HALF]
    assert "manifest.json" not in content(folder)
    shop.answers.clear()
    await load(folder, [shop.record()])
    assert shop.asked("vmlinuz") == [None, f"bytes={HALF}-"]


async def test_a_cancelled_fetch_lets_go_of_the_folder_and_of_every_file(shop: Shop, folder: Path) -> None:
    before = names("/proc/self/fd")
    for turns in range(12):
        running = asyncio.create_task(load(folder, [shop.record()]))
        for _ in range(3 * turns):
            await asyncio.sleep(0)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    await asyncio.sleep(0.1)  # for the server to see that we have gone
    after = names("/proc/self/fd")
    assert len(after) <= len(before) + 3  # listening sockets of the loop's own
    await load(folder, [shop.record()])
