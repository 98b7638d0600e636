"""Each channel is followed by itself, in a real folder: what is being written is waited for, and said."""

import asyncio
import logging
import threading
from pathlib import Path

import pytest

from plasm_dht.clock import Clock
from plasm_dht.provider.artifacts import ArtifactSet
from plasm_dht.provider.channels import Channels

PATIENCE = 10.0  # for what takes a second (s)


async def test_what_is_written_all_the_time_is_said_once_and_found_when_it_rests(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "plasm_dht.provider.channels")
    folder = tmp_path / "stable/arm64"
    folder.mkdir(parents=True)
    (folder / "rootfs").write_bytes(bytes(8 * 2**20))  # longer to hash than the pause between two writes
    sizes: list[int] = []
    found, rests = asyncio.Event(), threading.Event()

    def note(target: str, artifacts: ArtifactSet) -> None:
        sizes.append(artifacts.files[0].size)
        found.set()

    def write() -> None:
        with (folder / "rootfs").open("ab", buffering=0) as rootfs:
            while not rests.wait(0.0005):
                rootfs.write(b"x")

    writing = asyncio.create_task(asyncio.to_thread(write))
    channels = Channels(tmp_path, Clock(), found=note, gone=lambda target: pytest.fail(f"{target} is there"))
    try:
        async with asyncio.timeout(PATIENCE), channels.open():
            following = asyncio.create_task(channels.run())
            await channels.seen.wait()
            assert caplog.messages == ["stable/arm64 is being changed: it is published when it rests"]
            assert sizes == []
            assert not channels.is_empty
            rests.set()
            await writing
            await found.wait()
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
    finally:
        rests.set()
    assert sizes == [(folder / "rootfs").stat().st_size]
    assert len(caplog.messages) == 1
