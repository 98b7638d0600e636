"""The watcher on real folders: every way to change one ends in a hint, in time, and nothing else does."""

import asyncio
import errno
import os
import shutil
import threading
import time
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
from watchdog.observers.inotify_c import InotifyFD

from plasm_dht.provider import watch
from plasm_dht.provider.artifacts import ArtifactScanner
from plasm_dht.provider.watch import ArtifactWatcher

TARGET = "stable/arm64"
SETTLE, MAX_WAIT = 0.1, 0.3


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """A vanished root is noticed sooner, so that the tests are quick."""
    monkeypatch.setattr(watch, "ROOT_INTERVAL", 0.1)


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / TARGET
    folder.mkdir(parents=True)
    (folder / "vmlinuz").write_bytes(b"kernel")
    return folder


def watcher(root: Path, **changes) -> ArtifactWatcher:
    return ArtifactWatcher(root, **({"settle": SETTLE, "max_wait": MAX_WAIT, "rescan": 60.0} | changes))


async def hint(watching: ArtifactWatcher, within: float = 2.0) -> set[str] | None:
    async with asyncio.timeout(within):
        return await anext(watching)


async def silence(watching: ArtifactWatcher, seconds: float = 1.3 * MAX_WAIT) -> None:
    with pytest.raises(TimeoutError):
        await hint(watching, seconds)


async def until(watching: ArtifactWatcher, mode: str) -> None:
    """Returns when the change of mode has been told and everything is quiet."""
    told = False
    while watching.mode != mode or not told:
        told = await hint(watching) is None
    with suppress(TimeoutError):
        while True:
            await hint(watching, 2 * SETTLE)


@asynccontextmanager
async def polling(root: Path, monkeypatch, **changes):
    """A watcher where inotify cannot be used."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "inotify watch limit reached")

    monkeypatch.setattr(InotifyFD, "add_callback", full)
    monkeypatch.setattr(watch, "POLL_INTERVAL", 0.1)
    async with watcher(root, **changes) as watching:
        yield watching


def kernel_queue() -> int:
    return int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())


def flood(folder: Path, events: int) -> None:
    for _ in range(events // 3 + 2000):  # created, closed, deleted; and watchdog has room for some that it has read
        (folder / ".file").touch()
        (folder / ".file").unlink()


# What is a change


async def test_a_written_file_is_a_hint_for_its_target(folder, tmp_path):
    async with watcher(tmp_path) as watching:
        assert watching.mode == "inotify"
        (folder / "vmlinuz").write_bytes(b"new")
        assert await hint(watching) == {TARGET}


async def test_an_atomic_rename_is_one_hint(folder, tmp_path):
    async with watcher(tmp_path) as watching:
        (folder / ".vmlinuz.new").write_bytes(b"new")
        (folder / ".vmlinuz.new").replace(folder / "vmlinuz")
        assert await hint(watching) == {TARGET}
        await silence(watching)


async def test_a_rename_from_one_target_to_another_is_a_hint_for_both(folder, tmp_path):
    (tmp_path / "edge" / "arm64").mkdir(parents=True)
    async with watcher(tmp_path) as watching:
        (folder / "vmlinuz").rename(tmp_path / "edge" / "arm64" / "vmlinuz")
        assert await hint(watching) == {TARGET, "edge/arm64"}


async def test_a_file_that_leaves_the_root_is_a_hint(folder, tmp_path, tmp_path_factory):
    async with watcher(tmp_path) as watching:
        (folder / "vmlinuz").rename(tmp_path_factory.mktemp("elsewhere") / "vmlinuz")
        assert await hint(watching) == {TARGET}


async def test_deleted_and_recreated_at_once_is_one_hint(folder, tmp_path):
    async with watcher(tmp_path) as watching:
        shutil.rmtree(folder)
        folder.mkdir()
        (folder / "vmlinuz").write_bytes(b"again")
        assert await hint(watching) == {TARGET}
        await silence(watching)


async def test_new_folders_are_watched_at_once(folder, tmp_path):
    async with watcher(tmp_path) as watching:
        (tmp_path / "edge" / "amd64").mkdir(parents=True)
        (tmp_path / "edge" / "amd64" / "vmlinuz").touch()
        assert await hint(watching) is None  # a new channel: everything
        (tmp_path / "edge" / "amd64" / "initrd").touch()
        assert await hint(watching) == {"edge/amd64"}


async def test_a_whole_tree_that_is_moved_in_is_a_hint_and_watched(folder, tmp_path, tmp_path_factory):
    staged = tmp_path_factory.mktemp("staged") / "arm64"
    staged.mkdir()
    (staged / "vmlinuz").touch()
    (tmp_path / "edge").mkdir()
    async with watcher(tmp_path) as watching:
        staged.rename(tmp_path / "edge" / "arm64")
        assert await hint(watching) == {"edge/arm64"}
        (tmp_path / "edge" / "arm64" / "vmlinuz").write_bytes(b"more")
        assert await hint(watching) == {"edge/arm64"}


async def test_a_vanished_folder_is_a_hint(folder, tmp_path):
    async with watcher(tmp_path) as watching:
        shutil.rmtree(folder)
        assert await hint(watching) == {TARGET}


async def test_a_swapped_link_to_a_channel_is_a_hint_for_everything(tmp_path):
    for release in ("1.1", "1.2"):
        (tmp_path / "releases" / release / "arm64").mkdir(parents=True)
    (tmp_path / "stable").symlink_to("releases/1.1")
    async with watcher(tmp_path) as watching:
        (tmp_path / ".stable.new").symlink_to("releases/1.2")
        (tmp_path / ".stable.new").replace(tmp_path / "stable")
        assert await hint(watching) is None


async def test_a_swapped_link_to_an_architecture_is_a_hint_for_it(tmp_path):
    (tmp_path / "stable").mkdir()
    (tmp_path / "stable" / "arm64").symlink_to("old")
    async with watcher(tmp_path) as watching:
        (tmp_path / "stable" / ".new").symlink_to("new")
        (tmp_path / "stable" / ".new").replace(tmp_path / "stable" / "arm64")
        assert await hint(watching) == {TARGET}


async def test_with_links_every_change_is_one_of_everything(tmp_path):
    """`releases/1.2/arm64/vmlinuz` is what `stable/arm64` serves; its path says nothing of that."""
    (tmp_path / "releases" / "1.2" / "arm64").mkdir(parents=True)
    (tmp_path / "stable").symlink_to("releases/1.2")
    (tmp_path / TARGET / "vmlinuz").write_bytes(b"old")
    scanner = ArtifactScanner(tmp_path)
    async with watcher(tmp_path) as watching:
        assert TARGET in scanner.scan().found
        watching.linked = scanner.linked
        (tmp_path / TARGET / "vmlinuz").write_bytes(b"new")
        assert await hint(watching) is None


# What is none


async def test_reading_and_hashing_the_files_is_no_change(folder, tmp_path):
    async with watcher(tmp_path) as watching:
        ArtifactScanner(tmp_path).scan()
        await silence(watching)


async def test_hidden_and_temporary_files_and_subfolders_are_no_change(folder, tmp_path):
    (folder / "sub").mkdir()
    async with watcher(tmp_path) as watching:
        (folder / ".vmlinuz.Xy12").write_bytes(b"partial")
        (folder / "vmlinuz.part").write_bytes(b"partial")
        (folder / "sub" / "vmlinuz").write_bytes(b"not served")
        (tmp_path / ".staging").mkdir()
        await silence(watching)


# When


async def test_a_target_is_told_once_it_is_quiet_and_not_before(folder, tmp_path):
    async with watcher(tmp_path, settle=0.2, max_wait=5) as watching:
        loop = asyncio.get_running_loop()
        for _ in range(4):
            (folder / "vmlinuz").write_bytes(b"x")
            last = loop.time()
            await silence(watching, 0.08)
        assert await hint(watching) == {TARGET}
        assert loop.time() - last >= 0.2
        await silence(watching)


async def test_a_target_that_never_rests_is_told_all_the_same(folder, tmp_path):
    async with watcher(tmp_path, settle=0.2, max_wait=0.4) as watching:
        loop = asyncio.get_running_loop()
        started = loop.time()
        writing = asyncio.create_task(write_on(folder / "rootfs"))
        try:
            assert await hint(watching) == {TARGET}
            assert 0.38 <= loop.time() - started <= 1.2
            assert await hint(watching) == {TARGET}
        finally:
            writing.cancel()


async def write_on(path: Path) -> None:
    with path.open("ab", buffering=0) as file:
        while True:
            file.write(b"x")
            await asyncio.sleep(0.02)


async def test_one_busy_target_does_not_delay_another(folder, tmp_path):
    (tmp_path / "edge" / "arm64").mkdir(parents=True)
    async with watcher(tmp_path, settle=0.2, max_wait=5) as watching:
        writing = asyncio.create_task(write_on(folder / "rootfs"))
        try:
            (tmp_path / "edge" / "arm64" / "vmlinuz").touch()
            assert await hint(watching) == {"edge/arm64"}
        finally:
            writing.cancel()


async def test_everything_is_due_at_each_rescan(folder, tmp_path):
    async with watcher(tmp_path, rescan=0.2) as watching:
        assert await hint(watching) is None
        assert await hint(watching) is None


async def test_more_targets_than_the_bound_are_everything(tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "MAX_TARGETS", 8)
    for number in range(20):
        (tmp_path / "stable" / f"arch{number}").mkdir(parents=True)
    async with watcher(tmp_path) as watching:
        for number in range(20):
            (tmp_path / "stable" / f"arch{number}" / "vmlinuz").touch()
        assert await hint(watching) is None


async def test_more_targets_than_the_bound_in_a_while_are_everything(tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "MAX_TARGETS", 8)
    for number in range(12):
        (tmp_path / "stable" / f"arch{number}").mkdir(parents=True)
    async with watcher(tmp_path, settle=0.5, max_wait=5) as watching:
        for number in range(12):
            (tmp_path / "stable" / f"arch{number}" / "vmlinuz").touch()
            if number % 6 == 5:
                await silence(watching, 0.1)
        assert len(watching._pending) <= 8
        assert await hint(watching) is None


async def test_events_that_the_kernel_dropped_end_in_a_scan_of_everything(folder, tmp_path):
    limit = kernel_queue()
    if limit > 50_000:
        pytest.skip(f"a queue of {limit} events takes too long to fill")
    async with watcher(tmp_path) as watching:
        descriptor = watching._observation._observer._inotify_fd
        with descriptor._lock:  # watchdog's thread cannot read on
            await asyncio.to_thread(flood, folder, limit)
        assert await hint(watching, 10) is None  # it has 16,384 others to read first
        await silence(watching)
        (folder / "vmlinuz").write_bytes(b"new")
        assert await hint(watching) == {TARGET}


# The root


@pytest.mark.parametrize("vanish", ["delete", "move"])
async def test_a_root_that_vanishes_and_comes_back_is_watched_again(tmp_path, vanish):
    root = tmp_path / "root"
    (root / TARGET).mkdir(parents=True)
    async with watcher(root) as watching:
        if vanish == "delete":
            shutil.rmtree(root)
        else:
            root.rename(tmp_path / "elsewhere")
        await until(watching, "none")
        (root / "edge" / "arm64").mkdir(parents=True)
        await until(watching, "inotify")
        (root / "edge" / "arm64" / "vmlinuz").touch()
        assert await hint(watching) == {"edge/arm64"}


async def test_a_root_that_is_replaced_is_watched_anew(folder, tmp_path):
    (tmp_path / "one" / TARGET).mkdir(parents=True)
    (tmp_path / "two" / TARGET).mkdir(parents=True)
    root = tmp_path / "current"
    root.symlink_to("one")
    async with watcher(root) as watching:
        (tmp_path / "new").symlink_to("two")
        (tmp_path / "new").replace(root)
        await until(watching, "inotify")
        (root / TARGET / "vmlinuz").touch()
        assert await hint(watching) == {TARGET}
        (root / "edge").mkdir()
        assert await hint(watching) is None


async def test_a_root_that_is_not_there_yet_is_waited_for(tmp_path):
    root = tmp_path / "later"
    async with watcher(root) as watching:
        assert watching.mode == "none"
        (root / TARGET).mkdir(parents=True)
        await until(watching, "inotify")


# Without inotify


async def test_where_inotify_cannot_be_used_the_folder_is_polled_and_a_warning_says_so(
    folder, tmp_path, monkeypatch, caplog
):
    async with polling(tmp_path, monkeypatch) as watching:
        assert watching.mode == "polling"
        assert "inotify watch limit reached" in caplog.text
        (folder / "initrd").write_bytes(b"new")
        assert await hint(watching) == {TARGET}
        (folder / "vmlinuz").write_bytes(b"changed")
        assert await hint(watching) == {TARGET}
        shutil.rmtree(folder)
        assert await hint(watching) == {TARGET}


async def test_polling_sees_swapped_links_and_ends_in_a_loop_of_links(folder, tmp_path, monkeypatch):
    (tmp_path / "edge").symlink_to("stable")
    (tmp_path / "loop").symlink_to(".")
    async with polling(tmp_path, monkeypatch) as watching:
        (tmp_path / ".edge").symlink_to("loop")
        (tmp_path / ".edge").replace(tmp_path / "edge")
        assert await hint(watching) is None


async def test_polling_survives_a_root_that_vanishes(tmp_path, monkeypatch):
    root = tmp_path / "root"
    (root / TARGET).mkdir(parents=True)
    async with polling(root, monkeypatch) as watching:
        shutil.rmtree(root)
        await until(watching, "none")
        (root / TARGET).mkdir(parents=True)
        await until(watching, "polling")
        (root / TARGET / "vmlinuz").touch()
        assert await hint(watching) == {TARGET}


def test_a_network_file_system_is_recognized_by_its_device(tmp_path):
    table = tmp_path / "mountinfo"
    table.write_text(
        "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n"
        "40 22 0:52 / /srv/boot rw,relatime shared:2 - nfs4 server:/boot rw,vers=4.2\n"
    )
    assert watch._network_file_system(os.makedev(8, 1), table) == ""
    assert "nfs4" in watch._network_file_system(os.makedev(0, 52), table)
    assert watch._network_file_system(os.makedev(0, 52), tmp_path / "missing") == ""


# The end


@pytest.mark.parametrize("mode", ["inotify", "polling"])
async def test_leaving_ends_the_threads_and_never_blocks_the_loop(folder, tmp_path, monkeypatch, mode):
    before = threading.active_count()
    longest = 0.0

    async def measure() -> None:
        nonlocal longest
        while True:
            started = time.perf_counter()
            await asyncio.sleep(0)
            longest = max(longest, time.perf_counter() - started)

    measuring = asyncio.create_task(measure())
    async with watcher(tmp_path) if mode == "inotify" else polling(tmp_path, monkeypatch) as watching:
        assert watching.mode == mode
        (folder / "vmlinuz").rename(tmp_path.parent / f"{tmp_path.name}-gone")
        await silence(watching, 0.1)  # now watchdog's thread sleeps half a second, for the other half of the move
    await asyncio.sleep(0)  # lets it see what just happened
    measuring.cancel()
    assert longest < 0.2  # 20 ms with a core to itself
    await asyncio.get_running_loop().shutdown_default_executor()
    assert threading.active_count() == before


async def test_a_start_that_is_cancelled_leaves_no_thread(folder, tmp_path, monkeypatch):
    before = threading.active_count()
    starting, go_on = threading.Event(), threading.Event()
    start = watch.InotifyObserver.start

    def slow(observer) -> None:
        starting.set()
        go_on.wait(5)
        start(observer)

    monkeypatch.setattr(watch.InotifyObserver, "start", slow)
    entering = asyncio.create_task(watcher(tmp_path).__aenter__())
    await asyncio.to_thread(starting.wait, 5)
    entering.cancel()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await entering
    await asyncio.get_running_loop().shutdown_default_executor()
    assert threading.active_count() == before
