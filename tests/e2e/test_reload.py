"""A configuration file that changes while services run: SIGHUP reads it again, and a mistake in it does no harm."""

import asyncio
import json
import os
import signal
from pathlib import Path

from plasm_dht.config import parse_address
from tests.e2e.world import TARGET, Running, World, ask, fetch, read, soon

STRANGER = "ed25519:" + "0" * 64


def write(file: Path, *, dht: str = "", trust: str = "", provider: str = "") -> Path:
    """Write it as whoever edits a file does that is in use: what is read is the old one or the new one."""
    new = file.with_suffix(".new")
    new.write_text(f"[provider]\n{provider}\n[provider.dht]\n{dht}\n[trust]\n{trust}\n")
    return new.replace(file)


async def reload(running: Running, says: str) -> str:
    """Have the file read again. What is logged then, from the line on that says this."""
    before = len(running.stderr)
    running.process.send_signal(signal.SIGHUP)

    async def said() -> str:
        return running.stderr[before:] if says in running.stderr[before:] else ""

    return await soon(said)


async def life(via: Running) -> float:
    """The life (s) that the record was signed with which is found through this node."""
    record = await ask(via)
    assert record is not None
    return (record.expires_at - record.issued_at) / 1000


async def test_a_shorter_ttl_is_advertised_at_once_and_a_longer_one_with_the_next_refresh(
    world: World, artifacts: Path
) -> None:
    node = await world.node("127.0.0.10")
    file = write(world.folder / "provider.toml", dht=f'bootstrap = ["{node.dht}"]\nrecord_ttl = 600')
    provider = await world.provider("127.0.0.11", artifacts, "--config", file, joins=node.dht)
    assert await life(node) == 600
    write(file, dht=f'bootstrap = ["{node.dht}"]\nrecord_ttl = 4\nrefresh_interval = 2')
    said = await reload(provider, "settings changed: ")
    assert "provider.dht.record_ttl = 4, provider.dht.refresh_interval = 2" in said

    async def lives_for(seconds: float) -> bool:
        return await life(node) == seconds

    await soon(lambda: lives_for(4), within=2)
    shorter = await ask(node)
    write(file, dht=f'bootstrap = ["{node.dht}"]\nrecord_ttl = 900')
    await reload(provider, "settings changed: provider.dht.record_ttl = 900, provider.dht.refresh_interval is not set")
    await soon(lambda: lives_for(900), within=6)  # the refresh that was planned
    longer = await ask(node)
    assert shorter is not None
    assert longer is not None
    assert longer.seq > shorter.seq
    status = json.loads(await read(f"http://{provider.http}/status"))
    assert 570 - 30 < status["records"][0]["refresh_in"] <= 600
    assert (await provider.stop()).code == 0
    assert await ask(node) is None


async def test_a_bad_file_is_one_line_and_changes_nothing(world: World, artifacts: Path) -> None:
    node = await world.node("127.0.0.10")
    file = write(world.folder / "provider.toml", dht="record_ttl = 600")
    provider = await world.provider("127.0.0.11", artifacts, "--config", file, joins=node.dht)
    before = await ask(node)
    for text, wrong in (
        ("[provider.dht\n", "is not valid TOML"),
        (
            "[provider.dht]\nrecord_ttl = 5\nrefresh_interval = 5",
            "provider.dht.refresh_interval = 5: must be less than",
        ),
        ("[provider.dht]\nrecord_ttl = 5\n[trust]\npublishers = ['me']", "trust.publishers = 'me'"),
        ("[provider.dht]\nrecord_tll = 5", "did you mean provider.dht.record_ttl?"),
    ):
        file.write_text(text)
        said = await reload(provider, "the old settings stay")
        assert wrong in said
        assert said.count("\n") == 1
    file.unlink()
    assert "No such file" in await reload(provider, "the old settings stay")
    os.mkfifo(file)
    assert "is a pipe" in await reload(provider, "the old settings stay"), "nobody writes to it: it is not waited for"
    file.unlink()
    assert await ask(node) == before
    write(file, dht="record_ttl = 600")
    await reload(provider, "nothing has changed")
    assert provider.process.returncode is None


async def test_what_needs_a_restart_is_named_and_what_does_not_is_applied(world: World, artifacts: Path) -> None:
    file = write(world.folder / "provider.toml", provider='name = "a"', dht="bootstrap = []")
    provider = await world.ready(
        await world.start(
            *("serve", "--config", file, "--artifacts", artifacts, "--state-dir", world.folder / "state"),
            *("--host", "127.0.0.11", "--http-host", "127.0.0.11", "--port", "0", "--http-port", "0"),
        )
    )
    write(file, provider='name = "b"\nhttp_port = 1', dht="bootstrap = []\nport = 1\nrecord_ttl = 60")
    said = await reload(provider, "not changed before a restart")
    assert "settings changed: provider.dht.record_ttl = 60\n" in said
    assert 'not changed before a restart: provider.name = "a" (read: provider.name = "b")\n' in said
    assert "_port" not in said, "flags beat the file: these do not differ"
    assert "not changed before a restart: provider.name" in await reload(provider, "restart"), "as long as it differs"
    assert json.loads(await read(f"http://{provider.http}/status"))["name"] == "a"


async def test_flags_and_variables_beat_the_file_that_is_read_again(world: World, artifacts: Path) -> None:
    file = write(world.folder / "provider.toml", dht="bootstrap = []")
    provider = await world.ready(
        await world.start(
            *("serve", "--config", file, "--artifacts", artifacts, "--state-dir", world.folder / "state"),
            *("--host", "127.0.0.11", "--http-host", "127.0.0.11", "--port", "0", "--http-port", "0"),
            *("--record-ttl", "50"),
            PLASM_DHT_REFRESH_INTERVAL="20",
        )
    )
    write(file, dht="bootstrap = []\nrecord_ttl = 900\nrefresh_interval = 30")
    await reload(provider, "nothing has changed")
    assert await life(provider) == 50


async def test_a_node_asks_the_bootstrap_addresses_that_it_reads(world: World) -> None:
    first = await world.node("127.0.0.10")
    file = write(world.folder / "node.toml", dht="bootstrap = []")
    node = await world.ready(
        await world.start("node", "--config", file, "--host", "127.0.0.11", "--port", "0", "--state-dir", "own")
    )
    assert not await knows(node, first)
    write(file, dht=f'bootstrap = ["{first.dht}"]')
    await reload(node, f'settings changed: provider.dht.bootstrap = ["{first.dht}"]')
    assert await knows(node, first)
    assert (await node.stop()).code == 0


async def knows(node: Running, other: Running) -> bool:
    """Whether a node names the other one to somebody who looks for it."""
    from plasm_dht import PlasmServer

    async with PlasmServer(node_id=bytes(20)) as reader:
        await reader.listen(0)
        (contact,) = await reader.bootstrap([parse_address(node.dht)])
        _, found = await reader.protocol.call_find_node(contact, contact)
    assert found is not None
    return parse_address(other.dht) in [(host, port) for _, host, port in found.nodes]


async def test_a_gateway_believes_the_publishers_that_it_reads(world: World, artifacts: Path) -> None:
    first = await world.node("127.0.0.10")
    provider = await world.provider("127.0.0.11", artifacts, joins=first.dht)
    own = write(world.folder / "node.toml", trust=f'publishers = ["{STRANGER}"]')
    options = ("--config", own, "--http-host", "127.0.0.12", "--http-port", "0")
    gateway = await world.node("127.0.0.12", *options, joins=first.dht)
    url = f"http://{gateway.http}/dht/{TARGET}/manifest.json"

    async def redirects(status: int) -> bool:  # an answer is good for a second
        return (await fetch(url))[0] == status

    await soon(lambda: redirects(404))
    write(own, trust=f'publishers = ["{provider.publisher}"]')
    await reload(gateway, f'settings changed: trust.publishers = ["{provider.publisher}"]')
    await soon(lambda: redirects(307), within=5)
    write(own, trust=f'publishers = ["{STRANGER}"]')
    await reload(gateway, f'settings changed: trust.publishers = ["{STRANGER}"]')
    await soon(lambda: redirects(404), within=5)


async def test_many_hangups_at_once_and_a_stop_among_them_are_no_harm(world: World, artifacts: Path) -> None:
    file = write(world.folder / "provider.toml", dht="bootstrap = []")
    provider = await world.ready(
        await world.start(
            *("serve", "--config", file, "--artifacts", artifacts, "--state-dir", world.folder / "state"),
            *("--host", "127.0.0.11", "--http-host", "127.0.0.11", "--port", "0", "--http-port", "0"),
        )
    )
    for ttl in range(120, 99, -1):
        write(file, dht=f"bootstrap = []\nrecord_ttl = {ttl}")
        provider.process.send_signal(signal.SIGHUP)
        await asyncio.sleep(0)

    async def lives_for_the_last() -> bool:
        return await life(provider) == 100

    await soon(lives_for_the_last)
    provider.process.send_signal(signal.SIGHUP)
    assert (await provider.stop()).code == 0
