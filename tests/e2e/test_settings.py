"""A provider that is configured by file, environment and flags together: flag beats variable beats file."""

import asyncio
import json
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.e2e.world import TARGET, World, ask, put, read, soon, version


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


async def test_a_base_url_is_advertised_instead_of_the_own_address(world: World, artifacts: Path) -> None:
    node = await world.node("127.0.0.10")
    base = "https://cdn.example.net/boot"
    provider = await world.provider("127.0.0.11", artifacts, "--base-url", base + "/", joins=node.dht)
    assert (await world.get(node)).stdout == f"{base}/{TARGET}/manifest.json\n"
    assert (await provider.stop()).code == 0
    assert await ask(node) is None


async def test_without_http_something_else_serves_the_folder_and_the_manifests_that_are_written(
    world: World, artifacts: Path
) -> None:
    manifests = world.folder / "serve-127.0.0.11" / "manifests"

    class Elsewhere(SimpleHTTPRequestHandler):
        def translate_path(self, path: str) -> str:
            return str((manifests if path.endswith("manifest.json") else artifacts) / path.lstrip("/"))

        def log_message(self, format: str, *args: object) -> None: ...  # noqa: A002  # as the base class has it

    with ThreadingHTTPServer(("127.0.0.12", 0), Elsewhere) as elsewhere:
        serving = asyncio.create_task(asyncio.to_thread(elsewhere.serve_forever, 0.05))
        try:
            node = await world.node("127.0.0.10")
            base = f"http://127.0.0.12:{elsewhere.server_port}"
            provider = await world.provider("127.0.0.11", artifacts, "--no-http", "--base-url", base, joins=node.dht)
            assert provider.http == "-"
            fetch = ("fetch", TARGET, "-o", "out", "--bootstrap", node.dht)
            assert (await world.run(*fetch)).stdout == "out/manifest.json\n"
            put(artifacts, VERSION="2", vmlinuz="another kernel")

            async def advertised() -> bool:
                return await version(node) == "2"

            await soon(advertised)
            assert (await world.run(*fetch)).stdout == "out/manifest.json\n"
            assert (world.folder / "out" / "vmlinuz").read_text() == "another kernel"
        finally:
            await asyncio.to_thread(elsewhere.shutdown)
            await serving


async def test_without_http_and_without_a_base_url_nobody_could_serve_what_is_advertised(
    world: World, artifacts: Path
) -> None:
    done = await world.run("serve", "--artifacts", artifacts, "--no-http", "--port", "0")
    assert (done.code, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "--base-url" in done.stderr
