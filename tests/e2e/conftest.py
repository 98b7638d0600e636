"""A world of its own for each test: a network of real processes, which ends with the test."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.e2e.world import World, put


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """Processes, files and questions. Every process is ended, and what it logged is shown when the test fails."""
    world = World(tmp_path)
    try:
        yield world
    finally:
        await world.close()


@pytest.fixture
def artifacts(tmp_path: Path) -> Path:
    """A folder with one channel and architecture."""
    return put(tmp_path / "artifacts", vmlinuz="a kernel", initrd__gz="an initramfs", VERSION="1")
