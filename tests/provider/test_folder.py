"""The folder that is fetched into: links, pipes, full disks, other fetches, and the order in which files appear."""

import asyncio
import errno
import os
from pathlib import Path

import pytest

from plasm_dht.provider.folder import STEP, File, FolderError
from tests.provider.shop import (
    HALF,
    KERNEL,
    Shop,
    content,
    load,
    make,
    names,
    stalls,
)

pytestmark = pytest.mark.usefixtures("no_pauses")


async def test_links_are_not_followed(shop: Shop, folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(b"mine")
    make(folder)
    for name in ("vmlinuz", "manifest.json"):
        (folder / name).symlink_to(outside)
    await load(folder, [shop.record()])
    assert content(folder) == shop.files | {"manifest.json": shop.manifest()}
    assert not any((folder / name).is_symlink() for name in names(folder))
    for name in ("vmlinuz", "manifest.json"):
        (folder / name).unlink()
        (folder / f"{name}.part").symlink_to(outside)
        with pytest.raises(FolderError, match=rf"{name}.part .*link"):
            await load(folder, [shop.record()])
        (folder / f"{name}.part").unlink()
        await load(folder, [shop.record()])
    assert outside.read_bytes() == b"mine"


async def test_a_pipe_or_a_folder_in_the_way_is_said(shop: Shop, folder: Path) -> None:
    make(folder)
    os.mkfifo(folder / "vmlinuz.part")
    with pytest.raises(FolderError, match=r"vmlinuz.part is not a regular file"):
        await load(folder, [shop.record()])
    (folder / "vmlinuz.part").unlink()
    (folder / "vmlinuz").mkdir()
    with pytest.raises(FolderError, match=r"/vmlinuz cannot be used"):
        await load(folder, [shop.record()])
    assert "manifest.json" not in names(folder)


async def test_a_file_where_the_folder_should_be(shop: Shop, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(FolderError, match=f"{path} cannot be used"):
            await load(path, [shop.record()])
    assert shop.requests == []


async def test_a_full_disk_is_said_with_the_file(shop: Shop, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(FolderError, match=r"\.part cannot be used: No space left on device; free some space"):
        await load(folder, [shop.record()])
    assert content(folder) == {}


async def test_two_at_once_do_not_share_a_folder(shop: Shop, folder: Path) -> None:
    reached = asyncio.Event()
    shop.answers["vmlinuz"] = stalls(KERNEL, HALF, reached)
    first = asyncio.create_task(load(folder, [shop.record()]))
    await reached.wait()
    with pytest.raises(FolderError, match="in use: another fetch"):
        await load(folder, [shop.record()])
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)


async def test_while_files_take_their_names_there_is_no_manifest(
    shop: Shop, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await load(folder, [shop.record()])
    shop.files = {"vmlinuz": b"new", "initrd.gz": b"newer"}
    seen, replace = [], Path.replace

    def watched(path: Path, target: Path) -> Path:
        seen.append((target.name, (folder / "manifest.json").exists()))
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", watched)
    await load(folder, [shop.record()])
    assert seen == [("vmlinuz", False), ("initrd.gz", False), ("manifest.json", False)]


def test_a_file_that_somebody_cuts_off_while_it_is_hashed_ends(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(STEP + 1))
    file = File(path, os.O_RDONLY)
    file.open()
    file.hash_more()
    os.truncate(path, 10)
    file.hash_more()
    assert file.size == file.hashed == STEP
    file.close()
