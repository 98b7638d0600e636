"""The scripts in `docs/examples`, as real processes that do what their first lines and docs/how-to/embed.md say."""

import asyncio
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from plasm_dht import PlasmServer
from plasm_dht.config import format_address

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
# For what takes a moment on a machine with other things to do; above the TTL of the examples, 10 s.
PATIENCE = 25.0


class Script:
    """An example that runs."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def line(self, within: float = PATIENCE) -> str:
        assert self.process.stdout is not None
        async with asyncio.timeout(within):
            return (await self.process.stdout.readline()).decode().rstrip("\n")

    def type(self, text: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text.encode())

    async def end(self, number: int | None = None) -> list[str]:
        """Wait for its end, after a signal if one is given. The lines that were still to be read."""
        if number is not None:
            self.process.send_signal(number)
        async with asyncio.timeout(PATIENCE):
            out, err = await self.process.communicate()
        assert (self.process.returncode, err.decode()) == (-number if number == signal.SIGKILL else 0, "")
        return out.decode().splitlines()


Start = Callable[..., Awaitable[Script]]


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    """Start an example; what still runs at the end is killed."""
    scripts: list[Script] = []

    async def start_script(name: str, *arguments: str) -> Script:
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-W", "error", EXAMPLES / name, *arguments),
            cwd=tmp_path,
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
        )
        scripts.append(Script(process))
        return scripts[-1]

    yield start_script
    for script in scripts:
        if script.process.returncode is None:
            script.process.kill()
        await script.process.communicate()


@pytest.fixture
async def bootstrap() -> AsyncIterator[str]:
    """A node that the examples join through, at a port that nobody else has."""
    async with PlasmServer() as server:
        await server.listen(0, "127.0.0.1")
        yield format_address(server.address)


async def test_the_service_registry_lists_what_lives(start: Start, bootstrap: str) -> None:
    join = ("--bootstrap", bootstrap)
    urls = ["http://10.0.0.5:8000", "http://10.0.0.6:8000"]
    instances = [await start("service_registry.py", "run", "web", url, *join) for url in urls]
    for instance, url in zip(instances, urls, strict=True):
        assert await instance.line() == f"web is registered as {url}"

    async def found(service: str = "web") -> list[str]:
        return sorted(await (await start("service_registry.py", "find", service, *join)).end())

    assert await found() == urls
    assert await found("mail") == []
    assert await instances[0].end(signal.SIGINT) == []
    assert await found() == urls[1:]
    await instances[1].end(signal.SIGKILL)
    assert await found() == urls[1:], "it lives until its TTL is over"
    async with asyncio.timeout(PATIENCE):
        while await found():
            pass


async def test_the_presence_list_says_who_comes_and_who_leaves(start: Start, bootstrap: str) -> None:
    join = ("--bootstrap", bootstrap)
    ada = await start("presence.py", "lobby", "ada", *join)
    assert await ada.line() == "+ ada"
    grace = await start("presence.py", "lobby", "grace", *join)
    assert await ada.line() == "+ grace"
    assert sorted([await grace.line(), await grace.line()]) == ["+ ada", "+ grace"]
    await start("presence.py", "elsewhere", "mallory", *join)
    assert await grace.end(signal.SIGINT) == []
    assert await ada.line() == "- grace"
    joan = await start("presence.py", "lobby", "joan", *join)
    assert await ada.line() == "+ joan"
    await joan.end(signal.SIGKILL)
    assert await ada.line() == "- joan"


async def test_the_config_pointer_is_followed_by_those_who_trust_its_publisher(start: Start, bootstrap: str) -> None:
    join = ("--bootstrap", bootstrap)
    setter, stranger = [await start("config_pointer.py", "set", "app", *join) for _ in range(2)]
    publisher = await setter.line()
    assert await stranger.line() != publisher
    follower = await start("config_pointer.py", "follow", "app", publisher, *join)
    stranger.type("9.9\n")
    setter.type("1.0\n")
    assert await follower.line() == "1.0"
    setter.type("1.1\n")
    assert await follower.line() == "1.1"
    setter.type("\n")  # it ends, and takes back what it said
    assert await setter.end() == []
    assert await follower.line() == "none"
    assert await follower.end(signal.SIGINT) == []


async def test_the_config_pointer_can_be_interrupted_while_it_waits_for_a_line(start: Start, bootstrap: str) -> None:
    setter = await start("config_pointer.py", "set", "app", "--bootstrap", bootstrap)
    assert (await setter.line()).startswith("ed25519:")
    assert await setter.end(signal.SIGINT) == []


@pytest.mark.parametrize("script", sorted(path.name for path in EXAMPLES.glob("*.py")))
async def test_each_has_help_that_shows_two_terminals_and_is_explained_in_the_docs(start: Start, script: str) -> None:
    lines = await (await start(script, "--help")).end()
    assert sum(line.strip().startswith(f"python {script} ") for line in lines) == 2
    assert f"examples/{script}" in (EXAMPLES.parent / "how-to/embed.md").read_text()
    assert len((EXAMPLES / script).read_text().splitlines()) < 80
