"""Every async test here runs on a virtual-time loop; `network` is its simulated network."""

import asyncio
import gc
import random
import sys
from collections.abc import AsyncIterator, Callable, Generator
from typing import Any

import pytest

from tests.virtual.loop import VirtualLoop
from tests.virtual.network import Network

# Objects between two collections of the youngest generation: a network of nodes makes many and few of them in cycles.
GC_THRESHOLD = 200_000


def pytest_asyncio_loop_factories(config: pytest.Config, item: pytest.Item) -> dict[str, Callable[[], Any]]:
    return {"virtual": VirtualLoop}


@pytest.fixture
def virtual_seed(request: pytest.FixtureRequest) -> int:
    seed: int = request.config.virtual_seed  # type: ignore[attr-defined]
    return seed


@pytest.fixture
async def network(virtual_seed: int) -> AsyncIterator[Network]:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    before, thresholds = random.getstate(), gc.get_threshold()
    random.seed(virtual_seed)
    gc.set_threshold(GC_THRESHOLD, 20, 20)
    network = Network(loop, seed=virtual_seed)
    try:
        yield network
        await network.close()
    finally:
        gc.set_threshold(*thresholds)
        random.setstate(before)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed and "virtual_seed" in getattr(item, "fixturenames", ()):
        seed = item.config.virtual_seed  # type: ignore[attr-defined]
        network = getattr(item, "funcargs", {}).get("network")
        when = "" if network is None else f" at {network.now:.3f} virtual seconds, trace {network.trace}"
        marked = " -m soak" if item.get_closest_marker("soak") else ""  # which the settings leave out
        replay = f"{sys.executable} -m pytest '{item.nodeid}' --virtual-seed={seed}{marked}"
        report.sections.append(("simulation", f"seed {seed}{when}\nreplay: {replay}"))
    return report
