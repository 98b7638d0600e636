"""Providers to fetch from, and a folder to fetch into."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from plasm_dht.provider import fetch
from tests.provider.shop import Shop, opened


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A publisher gets as many second looks as ever, in no time."""
    monkeypatch.setattr(fetch, "SECOND_LOOKS", tuple(moment / 100 for moment in fetch.SECOND_LOOKS))


@pytest.fixture
async def shop() -> AsyncIterator[Shop]:
    async with opened(Shop()) as shop:
        yield shop


@pytest.fixture
async def other() -> AsyncIterator[Shop]:
    async with opened(Shop()) as shop:
        yield shop


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """It is not there yet."""
    return tmp_path / "a" / "folder"
