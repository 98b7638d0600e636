"""What a real process held before SIGKILL it has when it is started again; and what it says of a file it cannot use."""

import asyncio
import re
import signal
import time
from pathlib import Path

from plasm_dht.record import Record
from tests.e2e.world import Running, World, ask, held, put, soon, until, version

LISTENS = re.compile(r"node ([0-9a-f]{40}) listens")


def node_id(running: Running) -> str:
    found = LISTENS.search(running.stderr)
    assert found is not None, running.stderr
    return found[1]


async def test_killed_nodes_come_back_with_their_ids_and_records_which_end_when_they_would_have(
    world: World, artifacts: Path
) -> None:
    """Two nodes, which are told of nobody when they start again, and a provider that dies for good."""
    one = await world.node("127.0.0.10")
    two = await world.node("127.0.0.20", joins=one.dht)
    life = ("--record-ttl", "12", "--refresh-interval", "11")
    provider = await world.provider("127.0.0.11", artifacts, *life, joins=two.dht)
    record = await ask(one)
    assert record is not None
    await asyncio.sleep(1.0)  # what is older is on the disk
    await asyncio.gather(*(each.kill() for each in (one, two, provider)))
    ports = [each.dht.split(":")[1] for each in (one, two)]
    again = await asyncio.gather(
        *(world.node(host, port=port) for host, port in zip(("127.0.0.10", "127.0.0.20"), ports, strict=True))
    )
    assert [node_id(each) for each in again] == [node_id(one), node_id(two)]
    for each in again:
        assert await held(each) == [record]

    async def both_know_each_other() -> bool:
        return all([await ask(each) == record for each in again])

    await soon(both_know_each_other, 10)
    found = await asyncio.gather(*(world.get(each, "--json") for each in again))
    assert [done.object["expires_at"] for done in found] == [record.expires_at] * 2
    await until(record.expires_at / 1000)
    assert [await ask(each) for each in again] == [None, None]
    assert await asyncio.gather(*(told(each) for each in again)) == [0, 0]


async def told(running: Running) -> int:
    """How much a restart has logged above `info`, but for that nobody was there yet."""
    lines = [line for line in running.stderr.splitlines() if " WARNING " in line or " ERROR " in line]
    return len([line for line in lines if "no bootstrap node answered" not in line])


async def test_a_killed_provider_comes_back_with_its_id_above_its_last_seq(world: World, artifacts: Path) -> None:
    node = await world.node("127.0.0.10")
    provider = await world.provider("127.0.0.11", artifacts, joins=node.dht)
    before = await ask(node)
    assert before is not None
    await asyncio.sleep(1.0)
    await provider.kill()
    put(artifacts, VERSION="2")
    port = provider.dht.split(":")[1]
    again = await world.provider("127.0.0.11", artifacts, port=port, joins=node.dht)
    assert (node_id(again), again.publisher) == (node_id(provider), provider.publisher)
    assert await version(node) == "2"
    after = await ask(node)
    assert isinstance(after, Record)
    assert after.seq > before.seq
    assert (await again.stop()).code == 0
    assert await ask(node) is None


async def test_a_file_that_is_not_its_own_is_set_aside_and_said_and_the_node_starts(world: World) -> None:
    state = world.folder / "node-127.0.0.10"
    state.mkdir()
    (state / "node.sqlite").write_text("a shopping list")
    node = await world.node("127.0.0.10", "-q")
    (line,) = node.stderr.splitlines()
    (aside,) = state.glob("node.sqlite.bad-*")
    assert aside.read_text() == "a shopping list"
    assert str(aside) in line
    assert f"state file {state / 'node.sqlite'} cannot be used" in line
    assert (await node.stop()).code == 0


async def test_two_processes_in_one_state_directory_and_one_that_cannot_be_written_to_are_refused(
    world: World, artifacts: Path
) -> None:
    node = await world.node("127.0.0.10")
    state = world.folder / "node-127.0.0.10"
    (world.folder / "file").touch()
    identity = state / "identity.pem"
    began = time.monotonic()
    for command in (("node",), ("serve", "--artifacts", artifacts, "--http-port", "0")):
        for folder, wrong in ((state, "in use by another process"), (world.folder / "file", "cannot be used")):
            options = ("--port", "0", "--host", "127.0.0.20", "--state-dir", folder, "--identity", identity)
            done = await world.run(*command, *options)
            assert (done.code, done.stdout, done.stderr.count("\n")) == (2, "", 1), done
            assert done.stderr.startswith(f"plasm-dht: error: state file {folder / 'node.sqlite'} ")
            assert wrong in done.stderr
            assert "--state-dir" in done.stderr
    assert time.monotonic() - began < 30
    assert (await node.stop(signal.SIGTERM)).code == 0
    again = await world.node("127.0.0.10")
    assert node_id(again) == node_id(node)
