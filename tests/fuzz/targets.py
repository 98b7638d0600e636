"""The targets: by name a function of bytes that fails when something is found, and inputs to start from.

A world (a node, a server) lives for `LIFE` inputs; when it ends nothing of it may be left.
"""

import asyncio
import gc
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from plasm_dht.dht import ids
from plasm_dht.dht.routing import network_of
from plasm_dht.record import bound_key, shared_key
from tests.fuzz import documents, shown, sockets, states
from tests.fuzz.datagrams import World
from tests.fuzz.downloads import Client
from tests.fuzz.pages import Server
from tests.fuzz.source import Source

LIFE = 500
SEEDS = 24


@dataclass
class Stages:
    """The worlds that are alive, and how much was fed into them."""

    world: World | None = None
    server: Server | None = None
    client: Client | None = None
    played: dict[str, int] = field(default_factory=dict)
    datagrams: int = 0
    requests: int = 0
    life: int = LIFE


stages = Stages()


def _count(target: str) -> bool:
    """Note one more input. Returns whether its world has lived long enough."""
    stages.played[target] = stages.played.get(target, 0) + 1
    return stages.played[target] % stages.life == 0


def datagram(data: bytes) -> None:
    """A script of datagrams, and of what the node does meanwhile."""
    if stages.world is None:
        stages.world = World()
    world, before = stages.world, stages.world.datagrams
    world.run(world.play(Source(data)))
    stages.datagrams += world.datagrams - before
    if _count("datagram"):
        end_world()


def page(data: bytes) -> None:
    """The requests of one HTTP connection."""
    if stages.server is None:
        stages.server = Server()
    server, before = stages.server, stages.server.requests
    server.run(server.play(Source(data)))
    stages.requests += server.requests - before
    if _count("page"):
        end_server()


def download(data: bytes) -> None:
    """Downloads from servers that lie."""
    if stages.client is None:
        stages.client = Client()
    client = stages.client
    client.run(client.play(Source(data)))
    if _count("fetch"):
        end_client()


def _counted(name: str, target: Callable[[bytes], None]) -> Callable[[bytes], None]:
    def one(data: bytes) -> None:
        if _count(name):
            documents.renew()
        target(data)

    return one


def end_world() -> None:
    """Stop the node."""
    world, stages.world = stages.world, None
    if world is not None:
        world.end()


def end_server() -> None:
    """Stop the server."""
    server, stages.server = stages.server, None
    if server is not None:
        server.end()


def end_client() -> None:
    """Fetch nothing more."""
    client, stages.client = stages.client, None
    if client is not None:
        client.end()


# The sockets first: server and client count what the process has open.
STOPS = (sockets.renew, end_world, end_server, end_client, documents.renew, states.renew)


def end() -> None:
    """Stop everything that is alive, and look whether it leaves something."""
    for stop in STOPS:
        stop()
    stages.played.clear()  # how long the next world lives does not depend on who was there before


def settle() -> None:
    """Wait until no call waits any more, and collect what nobody holds: what is left in memory is what is kept."""
    if stages.world is not None:
        stages.world.run(asyncio.sleep(40))
    for cached in (ids.is_reachable, network_of, shared_key, bound_key):
        cached.cache_clear()  # they have caps of their own, that take longer to reach
    gc.collect()


@contextmanager
def ended() -> Iterator[None]:
    """Nothing is alive afterwards, and what was found inside is what is raised."""
    try:
        yield
    except BaseException:
        for stop in STOPS:
            with suppress(Exception):
                stop()
        stages.played.clear()
        raise
    end()


TARGETS: dict[str, Callable[[bytes], None]] = {
    "datagram": datagram,
    "record": _counted("record", documents.record_bytes),
    "pointer": _counted("pointer", documents.pointer_bytes),
    "manifest": _counted("manifest", documents.manifest_bytes),
    "settings": _counted("settings", documents.settings_bytes),
    "state": _counted("state", states.state_bytes),
    "page": page,
    "fetch": download,
    "socket": _counted("socket", sockets.socket_bytes),
    "shown": _counted("shown", shown.shown_bytes),
}


def seeds(target: str) -> list[bytes]:
    """Inputs to start from: valid samples behind each choice that leads to them, and bytes that choose at random."""
    drawn = random.Random(target)
    samples = {
        "record": documents.ENVELOPE, "pointer": documents.POINTER, "manifest": documents.MANIFEST,
        "settings": b"[provider]\nname = 'a'\n[provider.dht]\nport = 1\n",
    }.get(target, b"")  # fmt: skip
    made = [bytes([first]) + samples for first in range(6)] + [bytes([0, first]) + samples for first in range(6)]
    return made + [drawn.randbytes(drawn.choice((40, 120, 400))) for _ in range(SEEDS)]
