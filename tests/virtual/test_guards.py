"""Each guard of tests/conftest.py fails the test that it should, and no other."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

CONFTEST = """
from tests.conftest import *
from tests.virtual.conftest import network, virtual_seed, pytest_runtest_makereport
"""

TESTS = """
import asyncio, threading, time
import pytest
import tests.conftest
from tests.virtual.loop import VirtualLoop

held = []

@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(tests.conftest, "BLOCKED_AFTER", 0.2)

@pytest.fixture(scope="module")
def worker():
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    yield
    stop.set()
    thread.join()

async def test_good():
    task = asyncio.ensure_future(asyncio.sleep(0.01))
    await task

def test_good_worker_of_the_module(worker):
    pass

async def test_bad_blocked():
    time.sleep(0.3)

async def test_bad_task():
    held.append(asyncio.ensure_future(asyncio.sleep(100)))

def test_bad_task_of_asyncio_run():
    async def main():
        held.append(asyncio.ensure_future(asyncio.sleep(100)))
    asyncio.run(main())

async def test_bad_lost_exception_of_a_task():
    async def fail():
        raise ZeroDivisionError
    asyncio.ensure_future(fail())
    await asyncio.sleep(0)
    await asyncio.sleep(0)

async def test_bad_lost_exception_of_a_callback():
    asyncio.get_running_loop().call_soon(lambda: 1 / 0)
    await asyncio.sleep(0)

async def test_bad_coroutine_never_awaited():
    class Cycle: pass
    cycle = Cycle()
    cycle.own, cycle.coroutine = cycle, asyncio.sleep(0)

def test_bad_thread():
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()

@pytest.mark.unguarded("blocked")
async def test_good_because_unguarded():
    time.sleep(0.3)
"""

VIRTUAL = """
import asyncio, time
import pytest
from tests.virtual.loop import VirtualLoop

held = []

def pytest_asyncio_loop_factories(config, item):
    return {"virtual": VirtualLoop}

class Server(asyncio.DatagramProtocol):
    pass

async def serve(network):
    host = network.host()
    with host:
        transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(Server, local_addr=("0.0.0.0", 1))
        held.append(asyncio.ensure_future(asyncio.sleep(100)))
    return transport

async def test_good_running_at_the_end(network):
    await serve(network)

async def test_bad_task_left_after_closing(network):
    (await serve(network)).close()
    await asyncio.sleep(1)

async def test_bad_datagram_handler_that_blocks(network):
    transport = await serve(network)
    asyncio.get_running_loop().slow_callback_duration = 0.2
    transport.protocol.datagram_received = lambda data, addr: time.sleep(0.3)
    transport.sendto(b"x", transport.get_extra_info("sockname"))
    await asyncio.sleep(1)

async def test_bad_datagram_handler_that_raises(network):
    transport = await serve(network)
    transport.protocol.datagram_received = lambda data, addr: 1 / 0
    transport.sendto(b"x", transport.get_extra_info("sockname"))
    await asyncio.sleep(1)

async def test_good_thread_work_takes_its_time(network):
    asyncio.get_running_loop().slow_callback_duration = 0.2
    await asyncio.to_thread(time.sleep, 0.3)

async def test_bad_assertion(network):
    await asyncio.sleep(24000)
    assert False

@pytest.mark.soak
async def test_bad_assertion_of_soak(network):
    assert False
"""


def outcomes(folder: Path, conftest: str, tests: str, *options: str) -> tuple[dict[str, bool], str]:
    """Whether each test passed, and what pytest printed."""
    (folder / "conftest.py").write_text(conftest)
    (folder / "test_sample.py").write_text(tests)
    config = [
        "-c",
        str(ROOT / "pyproject.toml"),
        "--rootdir",
        str(folder),
        "-p",
        "no:cacheprovider",
        "-o",
        "pythonpath=",
    ]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *config, "-v", "--color=no", *options, str(folder / "test_sample.py")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    lines = re.findall(r"::(test_\w+)(?:\[\w+\])? (PASSED|FAILED|ERROR)", run.stdout)
    passed: dict[str, bool] = {}
    for name, outcome in lines:
        passed[name] = passed.get(name, True) and outcome == "PASSED"
    return passed, run.stdout + run.stderr


def test_guards_fail_tests_that_block_leak_or_lose(tmp_path: Path) -> None:
    passed, output = outcomes(tmp_path, CONFTEST, TESTS)
    assert len(passed) == 10, output
    assert {name for name, good in passed.items() if good} == {name for name in passed if "good" in name}, output


def test_guards_fail_virtual_tests_too(tmp_path: Path) -> None:
    factories = VIRTUAL[VIRTUAL.index("def pytest_asyncio") : VIRTUAL.index("class Server")]
    head = CONFTEST + "from tests.virtual.loop import VirtualLoop\n"
    passed, output = outcomes(tmp_path, head + factories, VIRTUAL, "--virtual-seed=77")
    assert len(passed) == 6, output
    assert {name for name, good in passed.items() if good} == {name for name in passed if "good" in name}, output
    replay = re.search(
        r"seed 77 at 24000.000 virtual seconds.*\nreplay: .*test_bad_assertion' --virtual-seed=77\n", output
    )
    assert replay, output


def test_the_printed_command_replays_a_soak_test_too(tmp_path: Path) -> None:
    factories = VIRTUAL[VIRTUAL.index("def pytest_asyncio") : VIRTUAL.index("class Server")]
    head = CONFTEST + "from tests.virtual.loop import VirtualLoop\n"
    _, output = outcomes(tmp_path, head + factories, VIRTUAL, "-m", "soak")
    replay = re.search(r"\nreplay: .*::test_bad_assertion_of_soak' (--virtual-seed=1 .*)", output)
    assert replay, output
    passed, output = outcomes(tmp_path, head + factories, VIRTUAL, *replay[1].split())
    assert passed == {"test_bad_assertion_of_soak": False}, output
