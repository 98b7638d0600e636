"""Real kernels and initrds: Debian's netboot packages, unpacked where `PLASM_NETBOOT` says; else skipped."""

import asyncio
import hashlib
import json
import os
import time
from pathlib import Path

import pytest

from plasm_dht.identity import parse_publisher_id
from plasm_dht.provider.manifest import verify_manifest
from tests.e2e.world import World, ask, note, read

IMAGES = "usr/lib/debian-installer/images/12/{arch}/text/debian-installer/{arch}"
ARCHITECTURES = ("arm64", "amd64")


@pytest.fixture
def netboot(tmp_path: Path) -> Path:
    """CHANNEL/ARCH folders with links to nothing: the files are copied, as an operator would."""
    named = os.environ.get("PLASM_NETBOOT")
    if not named:
        pytest.skip("PLASM_NETBOOT does not name a folder with debian-installer-12-netboot-{arm64,amd64} unpacked")
    for arch in ARCHITECTURES:
        (image,) = sorted(Path(named).rglob(IMAGES.format(arch=arch)))[:1] or pytest.fail(f"no {arch} in {named}")
        folder = tmp_path / "netboot" / "bookworm" / arch
        folder.mkdir(parents=True)
        (folder / "vmlinuz").write_bytes((image / "linux").read_bytes())
        (folder / "initrd.gz").write_bytes((image / "initrd.gz").read_bytes())
        (folder / "VERSION").write_text("12-netboot\n")
    return tmp_path / "netboot"


async def test_debians_netboot_images_for_two_architectures_are_served_found_and_downloaded(
    world: World, netboot: Path
) -> None:
    node = await world.node("127.0.0.10")
    began = time.time()
    provider = await world.provider("127.0.0.11", netboot, joins=node.dht)
    note(f"ready after {time.time() - began:.2f} s")
    targets = [f"bookworm/{arch}" for arch in ARCHITECTURES]
    for target, done in zip(
        targets, await asyncio.gather(*(world.get(node, "--json", target=target) for target in targets)), strict=True
    ):
        note(f"get {target} took {done.ended - done.began:.2f} s")
        manifest = await read(done.object["url"])
        assert hashlib.sha256(manifest).hexdigest() == done.object["manifest_sha256"]
        verified = verify_manifest(manifest, parse_publisher_id(provider.publisher))
        assert verified.artifacts.keys() == {"kernel", "initramfs"}
        for artifact in verified.artifacts.values():
            note(f"{target} {artifact.role}: {artifact.filename}, {artifact.size:,} bytes, sha256 {artifact.sha256}")
            path = netboot / target / artifact.filename
            assert hashlib.sha256(path.read_bytes()).hexdigest() == artifact.sha256
    artifacts = json.loads(await read(f"http://{provider.http}/bookworm/arm64/manifest.json"))["artifacts"]
    for entry in artifacts.values():
        began = time.time()
        content = await read(entry["urls"][0])
        note(f"downloaded {entry['filename']}: {len(content):,} bytes in {time.time() - began:.2f} s")
        assert (len(content), "sha256:" + hashlib.sha256(content).hexdigest()) == (entry["size"], entry["hash"])
    ended = await provider.stop()
    assert (ended.code, await ask(node, "bookworm/arm64")) == (0, None)
