"""What is not what was signed, and servers that cannot be had or mean harm: the next is tried, or nothing is there."""

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from plasm_dht.errors import ArtifactsError, VerificationError
from plasm_dht.identity import Identity
from plasm_dht.provider import fetch as module
from plasm_dht.provider.fetch import UnavailableError, fetch
from plasm_dht.record import Record
from tests.provider.shop import (
    HALF,
    INITRD,
    KERNEL,
    NOW,
    TARGET,
    Shop,
    at_half,
    breaks_off,
    content,
    endless,
    load,
    make,
    names,
    opened,
    sha256,
    stalls,
)

pytestmark = pytest.mark.usefixtures("no_pauses")


# -- what is not what was signed ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "served", [KERNEL[:-1] + b"?", KERNEL + b"?", KERNEL[:-1], b""], ids=["changed", "longer", "shorter", "empty"]
)
async def test_a_wrong_file_leaves_nothing_that_looks_finished(shop: Shop, folder: Path, served: bytes) -> None:
    shop.answers["vmlinuz"] = served
    with pytest.raises(VerificationError, match=r"/vmlinuz "):
        await load(folder, [shop.record()])
    assert content(folder) == {}


async def test_a_wrong_file_takes_nothing_away_from_what_was_complete(shop: Shop, folder: Path) -> None:
    await load(folder, [shop.record()])
    before = content(folder)
    shop.files = {"vmlinuz": b"new", "initrd.gz": b"newer"}
    shop.answers["vmlinuz"] = b"old"
    with pytest.raises(VerificationError):
        await load(folder, [shop.record()])
    assert content(folder) == before
    shop.answers.clear()
    await load(folder, [shop.record()])
    assert content(folder) == shop.files | {"manifest.json": shop.manifest()}


async def test_a_wrong_manifest_is_no_manifest(shop: Shop, folder: Path) -> None:
    record = shop.record()
    shop.answers["manifest.json"] = shop.manifest().replace(b'"version": "1"', b'"version": "2"')
    with pytest.raises(VerificationError, match=r"manifest.json is not what was signed: its SHA-256"):
        await load(folder, [record])
    assert content(folder) == {}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"arch": "amd64"}, "manifest of stable/amd64, not of stable/arm64"),
        ({"expires_at": "2027-01-02T00:00:00Z"}, "expired at"),
        ({"artifacts": {"kernel": {}}}, "filename"),
    ],
)
async def test_a_signed_manifest_that_says_something_impossible(
    shop: Shop, folder: Path, changes: dict[str, Any], says: str
) -> None:
    shop.answers["manifest.json"] = manifest = shop.manifest(shop.document(**changes))
    with pytest.raises(VerificationError, match=says):
        await load(folder, [shop.record(manifest)])


async def test_a_manifest_that_somebody_else_signed(shop: Shop, folder: Path) -> None:
    record = shop.record()
    manifest = Shop(identity=Identity.generate(), files=shop.files, url=shop.url).manifest()
    shop.answers["manifest.json"] = manifest
    with pytest.raises(VerificationError, match="no valid signature"):
        await load(folder, [shop.record(manifest)])
    assert record.publisher not in manifest.decode()


@pytest.mark.parametrize(
    "name", ["../out", "a/b", "/etc/x", "..", ".x", "a\\b", "a\n", "", "manifest.json", "MANIFEST.json", "x.part", "x~"]
)
async def test_no_name_leaves_the_folder_or_takes_a_name_that_is_ours(shop: Shop, folder: Path, name: str) -> None:
    shop.files = {"x": b"evil"}
    document = shop.document()
    document["artifacts"]["x"]["filename"] = name
    shop.answers["manifest.json"] = manifest = shop.manifest(document)
    with pytest.raises(VerificationError):
        await load(folder, [shop.record(manifest)])
    assert names(folder.parent.parent) == []


async def test_a_name_too_long_for_a_part_shares_its_part_with_no_other(shop: Shop, folder: Path) -> None:
    long = "x" * 255
    shop.files = {long: KERNEL, sha256(long.encode()): bytes(reversed(KERNEL))}
    await load(folder, [shop.record()])
    assert content(folder) == shop.files | {"manifest.json": shop.manifest()}


@pytest.mark.unguarded("lost")  # the server's: its client has gone
@pytest.mark.parametrize("name", ["vmlinuz", "manifest.json"])
async def test_a_body_without_an_end_is_left(shop: Shop, folder: Path, name: str) -> None:
    shop.answers[name] = endless(65536)
    with pytest.raises(VerificationError, match="more than"):
        await load(folder, [shop.record()])
    assert content(folder) == {}
    left = names(folder) if name == "vmlinuz" else []  # without a manifest there is no folder
    assert sum((folder / each).stat().st_size for each in left) <= len(KERNEL) + len(INITRD)


@pytest.mark.parametrize("name", ["vmlinuz", "manifest.json"])
async def test_a_body_that_says_it_is_too_long_is_not_read(shop: Shop, folder: Path, name: str) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        response.content_length = 2**40
        await response.prepare(request)
        await asyncio.Event().wait()
        return response

    shop.answers[name] = answer
    with pytest.raises(VerificationError, match="1099511627776 bytes"):
        await load(folder, [shop.record()])


# -- somebody else -----------------------------------------------------------------------------------------------------


async def test_the_next_url_of_a_file_is_tried(shop: Shop, other: Shop, folder: Path) -> None:
    document = shop.document()
    document["artifacts"]["vmlinuz"]["urls"] = [
        "http://127.0.0.1:9/vmlinuz",
        f"{shop.url}/nowhere",
        f"{shop.url}/wrong",
        f"{other.url}/vmlinuz",
    ]
    shop.answers |= {"wrong": b"?" * len(KERNEL), "manifest.json": (manifest := shop.manifest(document))}
    await load(folder, [shop.record(manifest)])
    assert content(folder) == shop.files | {"manifest.json": manifest}
    assert (len(shop.asked("wrong")), other.asked("vmlinuz")) == (1, [None])


@pytest.mark.parametrize("lie", ["manifest.json", "vmlinuz"])
async def test_a_publisher_that_serves_something_else_yields_to_the_next(
    shop: Shop, other: Shop, folder: Path, lie: str, caplog: pytest.LogCaptureFixture
) -> None:
    records = [shop.record(), other.record()]
    shop.answers[lie] = b"?" * len(shop.manifest() if lie == "manifest.json" else KERNEL)
    fetched = await load(folder, records)
    assert fetched.record == records[1]
    assert content(folder) == other.files | {"manifest.json": other.manifest()}
    assert f"trying {other.url}/manifest.json" in caplog.text


async def test_a_publisher_that_is_gone_yields_to_the_next(shop: Shop, folder: Path) -> None:
    async with opened(Shop()) as dead:
        record = dead.record()
    fetched = await load(folder, [record, shop.record()])
    assert fetched.record.publisher == shop.identity.publisher_id


async def test_a_file_of_the_next_publisher_does_not_go_on_from_the_first_ones(
    shop: Shop, other: Shop, folder: Path
) -> None:
    other.files = {"vmlinuz": KERNEL[::-1]}
    taken = asyncio.Event()

    async def answer(request: web.Request) -> web.StreamResponse:
        if "Range" in request.headers:
            raise web.HTTPNotFound
        return await breaks_off(KERNEL, HALF, taken)(request)

    shop.answers["vmlinuz"] = answer
    await load(folder, [shop.record(), other.record()], report=at_half(taken))
    assert other.asked("vmlinuz") == [None]
    assert names(folder) == ["manifest.json", "vmlinuz"]


async def test_the_record_is_asked_for_again_because_it_may_just_have_changed(shop: Shop, folder: Path) -> None:
    old = shop.record()
    shop.files = {"vmlinuz": b"new"}
    new = shop.record()
    fetched = await load(folder, [old], [new])
    assert (fetched.record, content(folder)["vmlinuz"]) == (new, b"new")


async def test_a_publisher_gets_the_time_to_publish_what_it_serves_already(shop: Shop, folder: Path) -> None:
    old = shop.record()
    shop.files = {"vmlinuz": b"new"}
    new = shop.record()
    assert (await load(folder, [old], [old], [old], [new])).record == new


async def test_files_that_change_while_they_are_downloaded(shop: Shop, folder: Path) -> None:
    old = shop.record()
    shop.answers["manifest.json"] = shop.manifest()
    shop.files = {"vmlinuz": b"new"}

    async def answer(request: web.Request) -> web.Response:
        shop.answers.clear()  # from now on all of it is new
        raise web.HTTPServiceUnavailable

    shop.answers["vmlinuz"] = shop.answers["initrd.gz"] = answer  # whichever is asked for first
    new = shop.record()
    assert (await load(folder, [old], [new])).record == new
    assert content(folder)["vmlinuz"] == b"new"


async def test_a_refresh_of_the_same_lie_is_no_change(shop: Shop, folder: Path) -> None:
    shop.answers["manifest.json"] = b"?"
    with pytest.raises(VerificationError):
        await load(folder, [shop.record()], [shop.record()], [shop.record()])
    assert shop.asked("manifest.json") == [None]


async def test_a_publisher_that_changes_for_ever_is_left(shop: Shop, folder: Path) -> None:
    shop.answers["manifest.json"] = b"?"

    async def find() -> list[Record]:
        shop.files = {"vmlinuz": os.urandom(8)}
        return [shop.record()]

    with pytest.raises(VerificationError):
        await fetch(TARGET, folder, find=find, now=lambda: NOW)
    assert len(shop.requests) == module.MAX_TRIES


async def test_nobody_can_be_reached(folder: Path) -> None:
    async with opened(Shop()) as one, opened(Shop()) as two:
        records = [one.record(), two.record()]
    with pytest.raises(UnavailableError, match="cannot connect: Connection refused"):
        await load(folder, records)


async def test_there_is_no_record_that_lives(shop: Shop, folder: Path) -> None:
    for records in ([], [shop.record()]):
        with pytest.raises(UnavailableError, match="no live record for stable/arm64"):
            await load(folder, records, now=NOW + 3_600_010)
    assert shop.requests == []


async def test_when_there_is_nothing_to_fetch_no_folder_is_left_that_was_not_there(folder: Path) -> None:
    with pytest.raises(UnavailableError):
        await load(folder, [])
    assert names(folder.parent.parent) == []
    make(folder)
    with pytest.raises(UnavailableError):
        await load(folder, [])
    assert names(folder.parent) == ["folder"], "it was there before"


async def test_a_target_that_is_none_is_said_before_anything_is_made(folder: Path) -> None:
    with pytest.raises(ArtifactsError, match="'stable'"):
        await fetch("stable", folder, find=lambda: pytest.fail("asked"), now=lambda: NOW)
    assert names(folder.parent.parent) == []


# -- the network -------------------------------------------------------------------------------------------------------


async def test_redirects_are_followed_but_not_for_ever(shop: Shop, other: Shop, folder: Path) -> None:
    def to(url: str) -> Any:
        async def answer(request: web.Request) -> web.Response:
            return web.Response(status=302, headers={"Location": url})  # as it is; an exception would mend it

        return answer

    shop.answers["vmlinuz"] = to(f"{other.url}/vmlinuz")
    await load(folder, [shop.record()])
    for url in (f"{shop.url}/initrd.gz", "file:///etc/passwd", "ftp://127.0.0.1/x", "http://[::1"):
        shop.answers["initrd.gz"] = to(url)
        (folder / "initrd.gz").unlink(missing_ok=True)
        why = "too many redirects" if url.startswith(shop.url) else "it redirects to .*, which is no http"
        with pytest.raises(UnavailableError, match=why):
            await load(folder, [shop.record()])
    assert len(shop.asked("initrd.gz")) < 15


async def test_a_manifest_that_breaks_off_is_said_in_a_few_words(shop: Shop, folder: Path) -> None:
    taken = asyncio.Event()
    taken.set()
    shop.answers["manifest.json"] = breaks_off(shop.manifest(), 100, taken)
    with pytest.raises(UnavailableError, match=r"/manifest\.json: it broke off$"):
        await load(folder, [shop.record()])


@pytest.mark.parametrize("name", ["vmlinuz", "manifest.json"])
async def test_a_server_that_falls_silent_is_left(
    shop: Shop, folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SILENCE", 0.2)
    promised = {"vmlinuz": KERNEL, "manifest.json": shop.manifest()}
    shop.answers[name] = stalls(promised[name], 100, asyncio.Event())
    with pytest.raises(UnavailableError):
        await load(folder, [shop.record()])


async def test_a_server_that_only_drips_is_left(shop: Shop, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SILENCE", 0.3)
    monkeypatch.setattr(module, "MAX_BREAKS", 1)

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        response.content_length = len(KERNEL)
        await response.prepare(request)
        while True:
            await response.write(b"?")
            await asyncio.sleep(0.05)

    shop.answers["vmlinuz"] = answer
    with pytest.raises(UnavailableError):
        await load(folder, [shop.record()])


async def test_a_server_that_never_answers_is_left(shop: Shop, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ANSWER_WITHIN", 0.2)

    async def answer(request: web.Request) -> web.StreamResponse:
        await asyncio.Event().wait()
        raise AssertionError

    shop.answers["manifest.json"] = answer
    with pytest.raises(UnavailableError, match="does not answer"):
        await load(folder, [shop.record()])


async def test_what_is_no_http_is_quoted_in_a_few_words(folder: Path) -> None:
    async def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-OpenSSH_9.2 " + b"\xb4\n" * 60_000)
        writer.close()

    server = await asyncio.start_server(greet, "127.0.0.1", 0)
    shop = Shop(url=f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    async with server:
        with pytest.raises(UnavailableError) as caught:
            await load(folder, [shop.record()])
    assert str(caught.value).startswith(f"{shop.url}/manifest.json: Bad status line: ")
    assert "SSH-2.0-OpenSSH_9.2" in str(caught.value)
    assert len(str(caught.value)) < 2 * module.MAX_REASON
