"""What the scenarios may rely on: time, machines and datagrams behave as the bench says."""

import asyncio
import errno
import random
import socket
import statistics
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.virtual.host import EPOCH, Host, HostDownError
from tests.virtual.loop import DeadlockError, LivelockError, VirtualLoop
from tests.virtual.network import Conditions, Network

ROOT = Path(__file__).parents[2]
STEADY = Conditions(latency=0.050, sigma=0)


class Inbox(asyncio.DatagramProtocol):
    """Keeps what arrives, and when; answers `ping` with `pong`."""

    def __init__(self) -> None:
        self.got: list[tuple[float, bytes, Any]] = []
        self.lost = False
        self.errors: list[Exception] = []

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.got.append((asyncio.get_running_loop().time(), data, addr))
        if data == b"ping":
            self.transport.sendto(b"pong", addr)

    def error_received(self, exc: Exception) -> None:
        self.errors.append(exc)

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True


async def inbox(host: Host, port: int = 8468, interface: str = "0.0.0.0") -> Inbox:
    with host:
        _, protocol = await asyncio.get_running_loop().create_datagram_endpoint(Inbox, local_addr=(interface, port))
    assert isinstance(protocol, Inbox)
    return protocol


async def pair(network: Network) -> tuple[Inbox, Inbox]:
    return await inbox(network.host("10.0.0.1")), await inbox(network.host("10.0.0.2"))


def to(protocol: Inbox) -> tuple[str, int]:
    address: tuple[str, int] = protocol.transport.get_extra_info("sockname")
    return address


# Time.


async def test_a_day_passes_in_an_instant(network: Network) -> None:
    loop = asyncio.get_running_loop()
    before = loop.time()
    await asyncio.sleep(86_400)
    assert loop.time() - before == 86_400


def test_waiting_for_what_nobody_will_do_is_an_error_that_says_where() -> None:
    async def wait_for_nobody() -> None:
        await asyncio.get_running_loop().create_future()

    with (
        pytest.raises(DeadlockError, match=r"for_nobody at .*py"),
        asyncio.Runner(loop_factory=VirtualLoop) as runner,
    ):
        runner.run(wait_for_nobody())


def test_a_task_that_spins_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    async def spin() -> None:
        while True:  # noqa: ASYNC110
            await asyncio.sleep(0)

    monkeypatch.setattr("tests.virtual.loop.LIVELOCK_TURNS", 1000)
    with pytest.raises(LivelockError, match="spin"), asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(spin())


async def test_work_for_a_thread_runs_in_the_loops_own(network: Network) -> None:
    assert await asyncio.to_thread(threading.current_thread) is threading.current_thread()
    with pytest.raises(ZeroDivisionError):
        await asyncio.to_thread(lambda: 1 / 0)


async def test_timeouts_and_groups_end_at_their_virtual_second(network: Network) -> None:
    host = network.host()

    async def work() -> float:
        loop = asyncio.get_running_loop()
        with pytest.raises(TimeoutError):  # noqa: PT012
            async with asyncio.timeout(30), asyncio.TaskGroup() as group:
                group.create_task(asyncio.sleep(20))
                group.create_task(asyncio.sleep(40))
        return loop.time()

    assert await host.run(work()) == 30


async def test_timers_of_one_instant_run_in_the_order_in_which_they_were_set(network: Network) -> None:
    loop = asyncio.get_running_loop()
    seen: list[object] = []
    for number in range(100):
        loop.call_at(5, seen.append, number)
    cancelled = [loop.call_at(5, seen.append, "cancelled") for _ in range(3000)]
    for timer in cancelled:
        timer.cancel()
    await asyncio.sleep(6)
    assert seen == list(range(100))


async def test_the_random_module_is_seeded(network: Network, virtual_seed: int) -> None:
    assert random.random() == random.Random(virtual_seed).random()


# Sockets.


async def test_a_datagram_arrives_after_the_latency_and_names_its_sender(network: Network) -> None:
    network.conditions = STEADY
    one, two = await pair(network)
    one.transport.sendto(bytearray(b"ping"), to(two))
    await asyncio.sleep(1)
    assert two.got == [(0.05, b"ping", ("10.0.0.1", 8468))]
    assert one.got == [(0.1, b"pong", ("10.0.0.2", 8468))]


async def test_latency_is_log_normal(network: Network) -> None:
    network.conditions = Conditions(latency=0.040, sigma=0.5)
    one, two = await pair(network)
    for _ in range(4000):
        one.transport.sendto(b"x", to(two))
    await asyncio.sleep(10)
    quartiles = statistics.quantiles(when for when, _, _ in two.got)
    assert quartiles == pytest.approx([0.0285, 0.040, 0.0560], rel=0.05)  # median * exp(+-0.6745 sigma)


async def test_a_taken_port_and_a_foreign_address_are_refused(network: Network) -> None:
    host = network.host("10.0.0.1")
    await inbox(host)
    for bound in [(host, "0.0.0.0"), (host, "10.0.0.1")]:
        with pytest.raises(OSError, match="in use") as refused:
            await inbox(bound[0], 8468, bound[1])
        assert refused.value.errno == errno.EADDRINUSE
    with pytest.raises(OSError, match="no address of") as refused:
        await inbox(network.host("10.0.0.2"), 1, "10.0.0.1")
    assert refused.value.errno == errno.EADDRNOTAVAIL
    with pytest.raises(OSError, match="with host"):
        await asyncio.get_running_loop().create_datagram_endpoint(Inbox, local_addr=("0.0.0.0", 1))


async def test_port_0_picks_a_free_one_and_a_closed_socket_frees_its_own(network: Network) -> None:
    host = network.host()
    first, second = await inbox(host, 0), await inbox(host, 0)
    assert to(first)[1] != to(second)[1]
    first.transport.close()
    await asyncio.sleep(0)
    assert first.lost
    assert to(await inbox(host, to(first)[1])) == to(first)


async def test_a_host_with_several_addresses_answers_from_its_first(network: Network) -> None:
    asker = await inbox(network.host("10.0.0.1"))
    await inbox(network.host("10.0.0.2", "10.0.0.3", "fd00::2"))
    asker.transport.sendto(b"ping", ("10.0.0.3", 8468))
    await asyncio.sleep(1)
    assert [source for _, _, source in asker.got] == [("10.0.0.2", 8468)]


async def test_ipv6_addresses_are_as_a_real_socket_gives_them(network: Network) -> None:
    one = await inbox(network.host("fd00::1"), interface="::")
    two = await inbox(network.host("fd00::2"), interface="fd00:0::2")
    one.transport.sendto(b"x", ("fd00::2", 8468))
    await asyncio.sleep(1)
    assert two.got[0][2] == ("fd00::1", 8468, 0, 0)


async def test_what_would_close_a_real_socket_raises(network: Network) -> None:
    one = await inbox(network.host())
    for address, error in [
        (("a.example", 1), ValueError),
        (("10.0.0.1", 70_000), OverflowError),
        ("10.0.0.1", TypeError),
    ]:
        with pytest.raises(error):
            one.transport.sendto(b"x", address)
    one.transport.sendto(bytes(70_000), ("10.0.0.9", 1))
    assert isinstance(one.errors[0], OSError)
    assert one.errors[0].errno == errno.EMSGSIZE


async def test_a_datagram_above_max_size_is_cut_off(network: Network) -> None:
    one, two = await pair(network)
    two.transport.max_size = 9
    one.transport.sendto(b"0123456789", to(two))
    await asyncio.sleep(1)
    assert two.got[0][1] == b"012345678"
    assert network.largest == 10


async def test_names_are_resolved_from_the_networks_own_list(network: Network) -> None:
    loop = asyncio.get_running_loop()
    network.names["dht.example.net"] = ["10.0.0.1"]
    assert (await loop.getaddrinfo("dht.example.net", 8468, type=socket.SOCK_DGRAM))[0][4] == ("10.0.0.1", 8468)
    with pytest.raises(socket.gaierror):
        await loop.getaddrinfo("nowhere.example", 1)


async def test_a_connected_socket_hears_its_peer_only(network: Network) -> None:
    one, two = await pair(network)
    with network.host("10.0.0.3"):
        transport, box = await asyncio.get_running_loop().create_datagram_endpoint(Inbox, remote_addr=to(one))
    assert transport.get_extra_info("peername") == to(one)
    transport.sendto(b"ping")
    two.transport.sendto(b"x", to(box))
    await asyncio.sleep(1)
    assert [data for _, data, _ in box.got] == [b"pong"]


# What happens to datagrams.


async def count_of(network: Network, conditions: Conditions) -> int:
    network.conditions = conditions
    one, two = await pair(network)
    for _ in range(10_000):
        one.transport.sendto(b"x", to(two))
    await asyncio.sleep(10)
    return len(two.got)


async def test_a_share_of_datagrams_is_lost(network: Network) -> None:
    assert await count_of(network, Conditions(loss=0.3)) == pytest.approx(7000, rel=0.03)
    assert network.sent == network.received + network.lost["loss"]


async def test_a_share_of_datagrams_arrives_twice(network: Network) -> None:
    assert await count_of(network, Conditions(duplicate=0.2)) == pytest.approx(12_000, rel=0.03)


@pytest.mark.parametrize(("conditions", "overtaken"), [(STEADY, 0), (Conditions(0.05, 0, reorder=0.1), 100)])
async def test_a_share_of_datagrams_is_overtaken(network: Network, conditions: Conditions, overtaken: int) -> None:
    network.conditions = conditions
    one, two = await pair(network)
    for number in range(1000):
        one.transport.sendto(b"%d" % number, to(two))
        await asyncio.sleep(0.01)
    await asyncio.sleep(1)
    numbers = [int(data) for _, data, _ in two.got]
    assert sum(later < earlier for earlier, later in pairwise(numbers)) == pytest.approx(overtaken, rel=0.3)


async def test_hosts_and_links_have_conditions_of_their_own(network: Network) -> None:
    network.conditions = STEADY
    one, two = await pair(network)
    three = await inbox(network.host("10.0.0.3"))
    two.transport.host.conditions = Conditions(latency=0.2, sigma=0)
    network.link(one.transport.host, two.transport.host, Conditions(latency=3, sigma=0))
    for source, target in [(one, two), (two, one), (one, three)]:
        source.transport.sendto(b"x", to(target))
    await asyncio.sleep(5)
    assert [box.got[0][0] for box in (two, one, three)] == [3, 0.2, 0.05]


async def test_a_partition_cuts_both_ways_until_it_heals(network: Network) -> None:
    one, two = await pair(network)
    three = await inbox(network.host("10.0.0.3"))
    network.partition([two.transport.host])
    one.transport.sendto(b"ping", to(two))
    two.transport.sendto(b"ping", to(one))
    one.transport.sendto(b"ping", to(three))
    await asyncio.sleep(1)
    assert (len(two.got), [data for _, data, _ in one.got], network.lost["cut"]) == (0, [b"pong"], 2)
    network.heal()
    one.transport.sendto(b"ping", to(two))
    await asyncio.sleep(1)
    assert len(two.got) == 1


async def test_a_one_way_cut_lets_the_other_way_pass(network: Network) -> None:
    one, two = await pair(network)
    network.cut([two.transport.host], [one.transport.host])
    one.transport.sendto(b"ping", to(two))
    await asyncio.sleep(1)
    assert (len(two.got), len(one.got)) == (1, 0)


# Machines.


async def test_a_killed_host_says_and_hears_nothing_more_and_may_be_replaced(network: Network) -> None:
    one, two = await pair(network)
    victim, ticks = two.transport.host, []

    async def tick() -> None:
        while True:
            await asyncio.sleep(1)
            ticks.append(network.now)

    victim.spawn(tick())
    waiting = asyncio.ensure_future(victim.run(asyncio.sleep(100)))
    await asyncio.sleep(2.5)
    victim.kill()
    with pytest.raises(HostDownError):
        await waiting
    one.transport.sendto(b"ping", to(two))
    await asyncio.sleep(10)
    assert (ticks, two.got, two.lost, network.lost["nobody"]) == ([1, 2], [], False, 1)
    again = await inbox(network.host("10.0.0.2"))
    one.transport.sendto(b"ping", to(again))
    await asyncio.sleep(1)
    assert [data for _, data, _ in one.got] == [b"pong"]


async def test_the_tasks_of_a_killed_host_run_no_farewell(network: Network) -> None:
    host, farewells = network.host(), []

    async def polite() -> None:
        try:
            await asyncio.sleep(1000)
        finally:
            farewells.append(network.now)

    host.spawn(polite())
    await asyncio.sleep(1)
    host.kill()
    await asyncio.sleep(5000)
    assert farewells == []
    await network.close()
    assert len(farewells) == 1


async def test_a_suspended_host_goes_on_after_what_was_left_of_its_timers(network: Network) -> None:
    host = network.host()
    seen: dict[str, tuple[float, float, float]] = {}
    loop = asyncio.get_running_loop()

    async def sleep(name: str, seconds: float) -> None:
        await asyncio.sleep(seconds)
        seen[name] = (network.now, loop.time(), host.clock.monotonic())

    async def impatient() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(10):
                await sleep("never", 60)
        seen["timeout"] = (network.now, loop.time(), host.clock.monotonic())

    tasks = [host.spawn(sleep("near", 5)), host.spawn(sleep("far", 100)), host.spawn(impatient())]
    await asyncio.sleep(3)
    host.suspend()
    await asyncio.sleep(20)
    assert (seen, host.clock.monotonic(), host.clock.wall() - EPOCH) == ({}, 3, 23_000)
    host.resume()
    await asyncio.wait(tasks)
    assert seen == {"near": (25, 5, 5), "timeout": (30, 10, 10), "far": (120, 100, 100)}
    assert host.clock.wall() - EPOCH == 120_000


async def test_a_suspended_host_hears_nothing_and_its_ready_tasks_wait(network: Network) -> None:
    one, two = await pair(network)
    host = two.transport.host
    event, woken = asyncio.Event(), []

    async def wait() -> None:
        await event.wait()
        woken.append(network.now)

    task = host.spawn(wait())
    await asyncio.sleep(1)
    host.suspend()
    event.set()
    one.transport.sendto(b"ping", to(two))
    await asyncio.sleep(9)
    assert (woken, two.got, network.lost["suspended"]) == ([], [], 1)
    host.resume()
    await task
    assert woken == [10]


async def test_what_is_due_by_elapsed_time_is_overdue_after_a_suspend(network: Network) -> None:
    host = network.host()
    before = host.clock.elapsed()
    host.suspend()
    await asyncio.sleep(7200)
    host.resume()
    assert host.clock.elapsed() - before == pytest.approx(7200)
    assert host.clock.monotonic() == 0


async def test_a_wall_clock_steps_for_its_own_host_only(network: Network) -> None:
    one, two = network.host(), network.host()
    await asyncio.sleep(10)
    one.clock.step(+3600)
    assert (one.clock.wall() - EPOCH, two.clock.wall() - EPOCH, one.clock.monotonic()) == (3_610_000, 10_000, 10)
    one.clock.step(-7200)
    two.clock.set(0)
    await asyncio.sleep(1)
    assert (one.clock.wall() - EPOCH, two.clock.wall()) == (-3_589_000, 1000)
