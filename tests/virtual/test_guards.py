"""Each guard of tests/conftest.py fails the test that it should, and no other."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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

FACTORIES = """
from tests.virtual.loop import VirtualLoop

def pytest_asyncio_loop_factories(config, item):
    return {"virtual": VirtualLoop}
"""

VIRTUAL = """
import asyncio, time
import pytest

held = []

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
"""

# What happens in both depends on the seed: which datagrams are lost, and when the others arrive.
SCENARIOS = """
import asyncio
import pytest
from tests.virtual.network import Conditions
from tests.virtual.speed import PAYLOAD, Bounce

async def fail(network):
    network.conditions = Conditions(loss=0.01)
    for _ in range(5):
        with network.host() as host:
            transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(
                Bounce, local_addr=("0.0.0.0", 8468)
            )
        transport.sendto(PAYLOAD, ("10.0.0.1", 8468))
    await asyncio.sleep(600)
    assert False

async def test_short(network):
    await fail(network)

@pytest.mark.soak
async def test_long(network):
    await fail(network)
"""

FAILURE = re.compile(r"\n(?P<what>seed 77 at 600\.000 virtual seconds, trace [0-9a-f]{16})\nreplay: (?P<replay>.*)\n")


def outcomes(folder: Path, conftest: str, tests: str, *options: str) -> tuple[dict[str, bool], str]:
    """Whether each test passed, and what pytest printed. The folder has the settings of this repository."""
    (folder / "conftest.py").write_text(conftest)
    (folder / "test_sample.py").write_text(tests)
    shutil.copy(ROOT / "pyproject.toml", folder)
    output = run(folder, shlex.join([sys.executable, "-m", "pytest", "-v", *options, "test_sample.py"]))
    passed: dict[str, bool] = {}
    for name, outcome in re.findall(r"::(test_\w+)(?:\[\w+\])? (PASSED|FAILED|ERROR)", output):
        passed[name] = passed.get(name, True) and outcome == "PASSED"
    return passed, output


def run(folder: Path, command: str) -> str:
    """What a shell command printed."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "NO_COLOR": "1"}
    ran = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=folder, env=environment, check=False)
    return ran.stdout + ran.stderr


def test_guards_fail_tests_that_block_leak_or_lose(tmp_path: Path) -> None:
    passed, output = outcomes(tmp_path, CONFTEST, TESTS)
    assert len(passed) == 10, output
    assert {name for name, good in passed.items() if good} == {name for name in passed if "good" in name}, output


def test_guards_fail_virtual_tests_too(tmp_path: Path) -> None:
    passed, output = outcomes(tmp_path, CONFTEST + FACTORIES, VIRTUAL)
    assert len(passed) == 5, output
    assert {name for name, good in passed.items() if good} == {name for name in passed if "good" in name}, output


@pytest.mark.parametrize("marks", ["not soak", "soak"])
def test_the_printed_command_replays_a_scenario_that_failed(tmp_path: Path, marks: str) -> None:
    _, output = outcomes(tmp_path, CONFTEST + FACTORIES, SCENARIOS, "-m", marks, "--virtual-seed=77")
    failed = FAILURE.search(output)
    assert failed, output
    replayed = run(tmp_path, failed["replay"])
    again = FAILURE.search(replayed)
    assert again, replayed
    assert again["what"] == failed["what"], "the same seed, the same moment, the same trace"
