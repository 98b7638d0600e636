"""A provider that is configured by file, environment and flags together: flag beats variable beats file."""

import asyncio
import json
from pathlib import Path

from tests.e2e.world import TARGET, World, ask, read


async def test_a_flag_beats_a_variable_and_a_variable_beats_the_file(world: World, artifacts: Path) -> None:
    node = await world.node("127.0.0.10")
    file = world.folder / "provider.toml"
    file.write_text(
        f"""
        [provider]
        name = "of-the-file"
        artifacts_dir = "{artifacts.name}"      # relative to this file
        http_host = "127.0.0.11"
        http_port = 1
        [provider.dht]
        host = "127.0.0.11"
        port = 1
        bootstrap = ["127.0.0.99:9"]
        record_ttl = 1000
        refresh_interval = 5
        """
    )
    options = ("--config", file, "--record-ttl", "50", "--port", "0", "--http-port", "0")
    variables = {
        "PLASM_DHT_NAME": "of-the-environment",
        "PLASM_DHT_RECORD_TTL": "200",
        "PLASM_DHT_BOOTSTRAP": f"{node.dht} 127.0.0.99:9",
        "PLASM_DHT_STATE_DIR": str(world.folder / "own state"),
        "PLASM_DHT_HTTP_PORT": "2",
    }
    provider = await world.ready(await world.start("serve", *options, **variables))
    assert (provider.dht.split(":")[0], provider.http.split(":")[0]) == ("127.0.0.11", "127.0.0.11")
    found = (await world.get(node, "--json")).object
    assert found["provider_name"] == "of-the-environment"  # the variable, not the file
    assert found["expires_at"] - found["issued_at"] == 50_000  # the flag, not the variable
    status = json.loads(await read(f"http://{provider.http}/status"))
    assert 0 <= status["records"][0]["refresh_in"] <= 5  # the file
    assert (world.folder / "own state" / "identity.pem").stat().st_mode & 0o777 == 0o600
    shown = await world.run("key", "show", PLASM_DHT_STATE_DIR=variables["PLASM_DHT_STATE_DIR"])
    assert shown.stdout == f"{provider.publisher}\n"
    # a reader takes its network and its trust from a file, too
    reader = world.folder / "reader.toml"
    trust = f'[trust]\npublishers = ["{shown.stdout.strip()}"]\n'
    reader.write_text(f'[provider.dht]\nbootstrap = ["{node.dht}"]\n{trust}')
    trusted, distrusted = await asyncio.gather(
        world.run("get", TARGET, "--config", reader, "--json"),
        world.run("get", TARGET, "--config", reader, PLASM_DHT_TRUST="ed25519:" + "0" * 64),
    )
    assert (trusted.object["publisher"], trusted.object["trusted"]) == (provider.publisher, True)
    assert (distrusted.code, distrusted.stdout) == (1, "")
    await provider.stop()
    assert await ask(node) is None


async def test_an_impossible_setting_is_refused_before_anything_starts(world: World, artifacts: Path) -> None:
    file = world.folder / "provider.toml"
    serve = ("serve", "--config", file, "--artifacts", artifacts, "--port", "0", "--http-port", "0", "-q")
    for text, variables, wrong in (
        ("[provider.dht]\nrecord_ttl = 10\nrefresh_interval = 10", {}, "provider.dht.refresh_interval = 10"),
        ("[provider.dht]\nttl = 10", {}, "provider.dht.ttl"),
        ("", {"PLASM_DHT_RECORD_TTL": "0"}, "PLASM_DHT_RECORD_TTL"),
    ):
        file.write_text(text)
        done = await world.run(*serve, **variables)
        assert (done.code, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert wrong in done.stderr


async def test_a_base_url_is_advertised_instead_of_the_own_address_with_http_and_without(
    world: World, artifacts: Path
) -> None:
    node = await world.node("127.0.0.10")
    base = "https://cdn.example.net/boot"
    provider = await world.provider("127.0.0.11", artifacts, "--base-url", base + "/", "--no-http", joins=node.dht)
    assert provider.http == "-"
    assert (await world.get(node)).stdout == f"{base}/{TARGET}/manifest.json\n"
    assert (await provider.stop()).code == 0
    assert await ask(node) is None
