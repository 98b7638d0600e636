"""The gateway as a machine that boots meets it: a node that anybody can ask over HTTP, and providers somewhere else."""

import asyncio
import json
import urllib.request
from pathlib import Path

from plasm_dht.provider.manifest import Pointer, record_name
from plasm_dht.record import Record
from tests.e2e.world import TARGET, Running, World, ask, fetch, put, read, soon


async def answer(via: Running, path: str = TARGET) -> tuple[int, str]:
    status, body = await fetch(f"http://{via.http}/dht/{path}")
    return status, body.decode()


def follow(url: str) -> bytes:
    """What is at the end of the redirects, as `curl -L` and wget would get it."""
    with urllib.request.urlopen(url, timeout=10) as response:
        return bytes(response.read())


def error(answered: tuple[int, str]) -> tuple[int, str]:
    return answered[0], json.loads(answered[1])["error"].partition(":")[0]


async def test_a_node_finds_for_http_clients_what_lives_and_what_is_withdrawn_is_gone(
    world: World, artifacts: Path
) -> None:
    node = await world.node("127.0.0.40", "--http-host", "127.0.0.40", "--http-port", "0")
    assert node.http.startswith("127.0.0.40:")
    assert error(await answer(node)) == (502, "no network")
    provider = await world.provider("127.0.0.41", artifacts, "--name", "rack-7", joins=node.dht)
    status, body = await answer(node)
    (shown,) = json.loads(body)
    (done,) = [json.loads((await world.get(node, "--json", "--all")).stdout)]
    assert status == 200
    assert shown.pop("ttl_remaining") > done.pop("ttl_remaining") - 10
    assert shown == done  # field by field what the command says
    assert error(await answer(node, "no/such")) == (404, "no record")
    status, body = await answer(node, f"{TARGET}/manifest.json")
    assert (status, "publishes nothing itself" in body) == (403, True)

    assert "neighbours</p>" in (await read(f"http://{node.http}/")).decode()
    await provider.stop()

    async def gone() -> bool:
        return (await answer(node))[0] != 200

    await soon(gone, within=2)
    assert node.stderr.count("Traceback") == 0


async def test_a_provider_sends_clients_to_its_own_manifest_and_a_trusting_node_to_the_trusted(
    world: World, artifacts: Path
) -> None:
    first = await world.node("127.0.0.42")
    provider = await world.provider("127.0.0.43", artifacts, joins=first.dht)
    other = await world.provider("127.0.0.44", put(world.folder / "other", vmlinuz="other"), joins=first.dht)
    http = ("--http-host", "127.0.0.45", "--http-port", "0")
    trusting = await world.node("127.0.0.45", *http, "--trust", provider.publisher, joins=first.dht)
    for via, expected in ((provider, provider), (other, other), (trusting, provider)):
        followed = await asyncio.to_thread(follow, f"http://{via.http}/dht/{TARGET}/manifest.json")
        assert followed == await read(f"http://{expected.http}/{TARGET}/manifest.json")
    assert len(json.loads((await answer(provider))[1])) == 2
    assert [each["trusted"] for each in json.loads((await answer(trusting))[1])] == [True]


async def test_a_node_serves_http_only_when_it_is_told_to(world: World) -> None:
    node = await world.node("127.0.0.46")
    assert node.http == "-"
    done = await world.run("node", "--port", "0", "--http-port", "x")
    assert (done.code, done.stderr.count("\n")) == (2, 1)
    assert "--http-port" in done.stderr


async def test_a_provider_has_scripts_for_ipxe(world: World, artifacts: Path) -> None:
    put(artifacts, cmdline="quiet console=ttyS0\n")
    provider = await world.provider("127.0.0.47", artifacts)
    choice = (await read(f"http://{provider.http}/boot.ipxe")).decode()
    assert f"chain --replace --autofree {TARGET}/boot.ipxe" in choice
    script = (await read(f"http://{provider.http}/{TARGET}/boot.ipxe")).decode().splitlines()
    url = f"http://{provider.http}/{TARGET}"
    assert f"kernel {url}/vmlinuz initrd=initramfs quiet console=ttyS0 || goto failed" in script
    assert await read(f"{url}/initrd.gz") == b"an initramfs"
    record = await ask(provider)
    assert isinstance(record, Record)
    assert (record.name, Pointer.decode(record.value).url) == (record_name(TARGET), f"{url}/manifest.json")
