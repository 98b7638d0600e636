"""Eight hosts with addresses of their own, over links that delay and lose: what the other tests show on one machine."""

import asyncio
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.process import SCRIPT
from tests.e2e.namespaces import DELAY, ROOT, Host, Network, UnavailableError
from tests.e2e.world import TARGET, Done, Running, World, note, put, soon, until

PORT = "8468"
OTHER = "stable/amd64"
# Within this time of a heal everybody has the newest, while its publisher lives (contract, "Life of a record", 5; s).
HEALED_WITHIN = 90.0


@pytest.fixture
def network() -> Iterator[Network]:
    """Eight hosts whose links delay and lose; deleted after the world's processes have ended."""
    try:
        network = Network.of(8)
    except UnavailableError as reason:
        pytest.skip(str(reason))
    try:
        note(f"delay and loss by {network.impair()}")
        yield network
    except UnavailableError as reason:
        pytest.skip(str(reason))
    finally:
        network.close()


class Hosts:
    """Runs `plasm-dht` on the hosts."""

    def __init__(self, world: World, network: Network) -> None:
        self.world = world
        self.network = network
        self.holders = network.hosts[:5]  # that run a node to the end

    async def start(self, host: Host, command: str, *options: str | Path, joins: Host | None = None) -> Running:
        """A node or provider on a host, once it is ready; it joins through another host."""
        bootstrap = (
            ("--bootstrap", f"{joins.address}:{PORT}") if joins else ("--config", self.world.folder / "alone.toml")
        )
        words = (SCRIPT, command, "--host", host.address, "--state-dir", self.world.folder / host.namespace)
        return await self.world.ready(await self.world.start(*host.command(*words, *bootstrap, *options)))

    async def serve(self, host: Host, artifacts: Path, *options: str, joins: Host) -> Running:
        return await self.start(
            host, "serve", "--artifacts", artifacts, "--http-host", host.address, *options, joins=joins
        )

    async def run(self, host: Host, *words: str | Path) -> Done:
        """Run a command on a host to its end."""
        began = time.time()
        process = await asyncio.create_subprocess_exec(
            *host.command(*words),
            env=self.world.environment,
            cwd=ROOT,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            stdout, stderr = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await process.communicate()
        assert process.returncode is not None
        done = Done(process.returncode, stdout.decode(), stderr.decode(), began, time.time())
        assert "Traceback" not in done.stderr, done.stderr
        return done

    async def get(self, host: Host, via: Host, target: str = TARGET, *options: str) -> Done:
        return await self.run(host, SCRIPT, "get", target, "--bootstrap", f"{via.address}:{PORT}", *options)

    async def version(self, host: Host, via: Host) -> str | None:
        done = await self.get(host, via, TARGET, "--json")
        return str(done.object["version"]) if done.code == 0 else None

    async def held(self, host: Host, target: str = TARGET) -> str:
        """The versions that the node on this host itself holds; "-" for one that was withdrawn."""
        return (
            await self.run(host, sys.executable, "-m", "tests.e2e.namespaces", "held", f"{host.address}:{PORT}", target)
        ).stdout.strip()

    async def nobody_finds(self, target: str) -> None:
        done = await asyncio.gather(*(self.get(host, host, target) for host in self.holders))
        assert [(each.code, each.stdout) for each in done] == [(1, "")] * len(self.holders), done


async def is_cut_off_and_healed(hosts: Hosts, artifacts: Path, alone: Host, bootstrap: Host, reader: Host) -> None:
    """The link of a holder is down while the value changes; the holder itself has the newest when it is up again."""
    assert await hosts.held(alone) == "1"
    hosts.network.cut_off(alone)
    put(artifacts, VERSION="2")

    async def is_changed() -> bool:
        return await hosts.version(reader, bootstrap) == "2"

    async def is_newest() -> bool:
        return await hosts.held(alone) == "2"

    await soon(is_changed)
    assert await hosts.held(alone) == "1"
    assert await hosts.version(alone, alone) == "1"  # cut off, it knows no better
    hosts.network.heal(alone)
    began = time.monotonic()
    await soon(is_newest, within=HEALED_WITHIN)
    note(f"healed: the newest was there after {time.monotonic() - began:.1f} s")
    assert await hosts.version(alone, alone) == "2"


async def is_killed_and_expires(hosts: Hosts, provider: Running, bootstrap: Host, reader: Host) -> None:
    """It is found until its expiry, and then by nobody."""
    await provider.kill()
    found = (await hosts.get(reader, bootstrap, OTHER, "--json")).object
    await until(found["expires_at"] / 1000)
    await hosts.nobody_finds(OTHER)


async def test_eight_hosts_find_change_lose_and_forget_a_record(
    network: Network, world: World, artifacts: Path
) -> None:
    hosts = Hosts(world, network)
    bootstrap, *nodes, serving, short, reader = network.hosts
    other = put(world.folder / "other", OTHER, vmlinuz="another kernel", VERSION="1")
    await hosts.start(bootstrap, "node")
    await asyncio.gather(*(hosts.start(node, "node", joins=bootstrap) for node in nodes))
    # so long a life that no refresh can be what tells the one that is cut off
    provider, killed = await asyncio.gather(
        hosts.serve(serving, artifacts, "--record-ttl", "3600", joins=bootstrap),
        hosts.serve(short, other, "--record-ttl", "30", joins=bootstrap),
    )
    done = await hosts.run(
        reader, SCRIPT, "fetch", TARGET, "-o", world.folder / "got", "--bootstrap", f"{nodes[0].address}:{PORT}"
    )
    assert done.code == 0, done
    assert (world.folder / "got" / "vmlinuz").read_text() == "a kernel"
    assert (await hosts.get(reader, bootstrap)).stdout == f"http://{serving.address}:8080/{TARGET}/manifest.json\n"
    async with asyncio.TaskGroup() as group:
        group.create_task(is_killed_and_expires(hosts, killed, bootstrap, reader))
        group.create_task(is_cut_off_and_healed(hosts, artifacts, nodes[-1], bootstrap, reader))
    ended = await provider.stop(signal.SIGTERM)
    assert (ended.code, ended.stdout) == (0, "")
    await hosts.nobody_finds(TARGET)
    told = [await hosts.held(node) for node in hosts.holders]
    assert told.count("-") >= len(told) - 1, told  # of the datagrams of one both may be lost


async def test_the_links_of_the_hosts_delay_and_lose(network: Network, world: World) -> None:
    """So the test above means what it says."""
    hosts = Hosts(world, network)
    one, two = network.hosts[:2]
    await hosts.start(one, "node")
    done = await hosts.run(two, sys.executable, "-m", "tests.e2e.namespaces", "echo", f"{one.address}:{PORT}")
    note(done.stdout)
    took = [float(each) for each in done.stdout.split() if each != "lost"]
    assert len(took) > 5
    assert min(took) > 2 * 1000 * DELAY  # there and back
    done = await hosts.run(two, sys.executable, "-m", "tests.e2e.namespaces", "count", f"{one.address}:{PORT}")
    note(f"{done.stdout.strip()} of 500 datagrams were answered")
    assert 400 < int(done.stdout) < 500  # none is lost there or back once in 500 million times
