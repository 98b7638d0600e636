"""What the commands share that ask the DHT and leave: their options, whom they ask, and the search itself."""

import contextlib
import logging
from typing import TYPE_CHECKING, Annotated

import typer

from plasm_dht.errors import ConfigError, VerificationError
from plasm_dht_cli import options
from plasm_dht_cli.options import option

if TYPE_CHECKING:
    from collections.abc import Sequence

    from plasm_dht import PlasmServer
    from plasm_dht.config import Settings
    from plasm_dht.provider.manifest import Pointer
    from plasm_dht.record import Record

# Between two attempts of --wait: short at first, for a provider that starts in this moment (s).
FIRST_PAUSE = 0.2
LONGEST_PAUSE = 2.0
# A lookup ends by itself when its time is over; this much later it is ended (s).
GRACE = 0.5

_log = logging.getLogger(__name__)

Target = Annotated[
    str, typer.Argument(metavar="CHANNEL/ARCH", help="What to look for, as in stable/arm64.", show_default=False)
]
Wait = Annotated[
    str | None,
    option(
        "--wait",
        metavar="SECONDS",
        callback=options.not_empty,
        help="Keep trying for this long when there is none yet. Default: one attempt.",
    ),
]
Timeout = Annotated[
    str | None,
    option(
        "--timeout",
        metavar="SECONDS",
        callback=options.not_empty,
        help="How long one attempt may take. Default: 10.",
    ),
]


def settings_of(ctx: typer.Context) -> "Settings":
    """The settings of a command that asks. Raises `ConfigError`, also when there is nobody to ask."""
    settings = options.settings(ctx)
    if not settings.dht.bootstrap:
        raise ConfigError("there is no DHT node to ask: name one with --bootstrap HOST:PORT")
    return settings


def times_of(ctx: typer.Context, timeout: str | None, wait: str | None) -> tuple[float, float]:
    """Seconds that one attempt may take, and all of them; 0: there is one. Raises `ConfigError`."""
    from plasm_dht.config import parse_seconds

    for_attempt = parse_seconds(timeout or "10", source=options.source_of(ctx, "timeout"), least=0.1)
    return for_attempt, parse_seconds(wait or "0", source=options.source_of(ctx, "wait"))


def nobody_answered(settings: "Settings") -> str:
    """The line of exit code 3."""
    from plasm_dht.config import format_address

    asked = ", ".join(format_address(address) for address in settings.dht.bootstrap) or "no address"
    return f"no DHT node answered at {asked}: name one that runs with --bootstrap HOST:PORT"


async def listen(server: "PlasmServer", port: int = 0) -> None:
    """Bind a port of a client for both families, or for IPv4 where one socket does not serve both; `ListenError`."""
    import socket

    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as probe:
            serves_both = not probe.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
    except OSError:  # there is no IPv6
        serves_both = False
    await server.listen(port, "::" if serves_both else "0.0.0.0")  # noqa: S104  # a client's: nobody is told of it


async def search(
    server: "PlasmServer", target: str, settings: "Settings", *, for_attempt: float, for_all: float, every: bool
) -> "tuple[list[tuple[Record, Pointer]], bool]":
    """What was found, freshest first, and whether any node answered."""
    import asyncio

    loop = asyncio.get_running_loop()
    deadline = loop.time() + (for_all or for_attempt)
    pause = FIRST_PAUSE
    answered = False
    while True:
        until = min(loop.time() + for_attempt, deadline)
        records, some_answered = await _attempt(server, target, settings, until, every=every)
        answered = answered or some_answered
        found = _usable(records)
        left = deadline - loop.time()
        if found or not for_all or left < FIRST_PAUSE / 2:
            return found, answered
        pause = min(pause, left / 2)  # so that there is an attempt close to the end
        _log.info("%s: trying again in %.1f s", "not found yet" if some_answered else "no DHT node answered", pause)
        await asyncio.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)


async def _attempt(
    server: "PlasmServer", target: str, settings: "Settings", until: float, *, every: bool
) -> "tuple[list[Record], bool]":
    """The live records that one attempt finds before the loop's time `until`, and whether any node answered."""
    import asyncio

    from plasm_dht.provider.manifest import record_name

    loop = asyncio.get_running_loop()
    joining = asyncio.ensure_future(server.bootstrap(settings.dht.bootstrap))
    try:
        # one dead address among those given must not use up the time when another one has answered
        await asyncio.wait({joining}, timeout=(until - loop.time()) / 2)
        if not joining.done() and not server.bootstrappable_neighbors():
            await asyncio.wait({joining}, timeout=until - loop.time())
        if joining.done():
            joining.result()  # raises what it raised
        if not server.bootstrappable_neighbors():
            return [], False
        trust = settings.trust.publishers or None
        async with asyncio.timeout_at(until + GRACE):
            return await _read(server, record_name(target), trust, until, every=every), True
    except TimeoutError:
        return [], True
    finally:
        joining.cancel()


async def _read(
    server: "PlasmServer", name: str, trust: "Sequence[str] | None", until: float, *, every: bool
) -> "list[Record]":
    """The freshest record, at a quorum; every holder's records if asked for, or if the freshest is no pointer."""
    import asyncio

    from plasm_dht.provider.manifest import Pointer

    loop = asyncio.get_running_loop()
    if not every:
        record = await server.get_record(name, trust=trust, timeout=until - loop.time())
        if record is None:
            return []
        with contextlib.suppress(VerificationError):
            Pointer.decode(record.value)
            return [record]
    return await server.get_records(name, trust=trust, timeout=until - loop.time())


def _usable(records: "Sequence[Record]") -> "list[tuple[Record, Pointer]]":
    from plasm_dht.provider.manifest import Pointer

    usable = []
    for record in records:
        try:
            pointer = Pointer.decode(record.value)
        except VerificationError as error:
            _log.warning("skipping the record of %s: %s", record.publisher, error)
        else:
            usable.append((record, pointer))
    return usable
