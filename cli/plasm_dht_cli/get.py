"""`plasm-dht get`: find the newest manifest of a channel and architecture."""

import contextlib
import logging
from typing import TYPE_CHECKING, Annotated

import typer

from plasm_dht.errors import ConfigError, VerificationError
from plasm_dht_cli import exits, logs, options
from plasm_dht_cli.options import option
from plasm_dht_cli.output import complain, emit

if TYPE_CHECKING:
    from collections.abc import Sequence

    from plasm_dht import PlasmServer
    from plasm_dht.config import Settings
    from plasm_dht.provider.manifest import Pointer
    from plasm_dht.record import Record

EXAMPLE = """\b
Examples:
  plasm-dht get stable/arm64
  plasm-dht get stable/arm64 --bootstrap 10.0.0.1:8468 --wait 60
  plasm-dht get stable/arm64 --all --json
Exit codes: 0 found; 1 no live record; 2 wrong usage; 3 no DHT node answered.
"""

# Between two attempts of --wait: short at first, for a provider that starts in this moment (s).
FIRST_PAUSE = 0.2
LONGEST_PAUSE = 2.0
# A lookup ends by itself when its time is over; this much later it is ended (s).
GRACE = 0.5

_log = logging.getLogger(__name__)

Target = Annotated[
    str, typer.Argument(metavar="CHANNEL/ARCH", help="What to look for, as in stable/arm64.", show_default=False)
]
Json = Annotated[
    bool,
    option("--json", help="Print a JSON object a line: key, url, version, publisher, seq, times in ms, and more."),
]
All = Annotated[bool, option("--all", help="Print every publisher's live record, freshest first, one a line.")]
Wait = Annotated[
    str | None,
    option("--wait", metavar="SECONDS", help="Keep trying for this long when there is none yet. Default: one attempt."),
]
Timeout = Annotated[
    str | None, option("--timeout", metavar="SECONDS", help="How long one attempt may take. Default: 10.")
]


def add_to(app: typer.Typer) -> None:
    """Make it a command of the application."""
    app.command("get", short_help="Print the URL of the newest manifest of CHANNEL/ARCH.", epilog=EXAMPLE)(get)


def get(
    ctx: typer.Context,
    target: Target,
    as_json: Json = False,
    every: All = False,
    trust: options.Trust = None,
    wait: Wait = None,
    timeout: Timeout = None,
    bootstrap: options.Bootstrap = None,
    config: options.Config = None,
    log_format: options.LogFormat = None,
    verbose: options.Verbose = 0,
    quiet: options.Quiet = False,
) -> None:
    """Print the URL of the newest manifest of CHANNEL/ARCH, alone, on stdout.

    Only live, correctly signed records count; of several publishers' the freshest is printed.
    """
    logs.set_up(log_format=log_format, verbose=verbose, quiet=quiet, usual=logging.WARNING)

    from plasm_dht.config import parse_seconds
    from plasm_dht.provider.manifest import check_target

    check_target(target)
    for_attempt = parse_seconds(timeout or "10", source=options.source_of(ctx, "timeout"), least=0.1)
    for_all = parse_seconds(wait or "0", source=options.source_of(ctx, "wait"))
    settings = options.settings(ctx)
    if not settings.dht.bootstrap:
        raise ConfigError("there is no DHT node to ask: name one with --bootstrap HOST:PORT")

    import asyncio

    code = asyncio.run(_get(target, settings, for_attempt=for_attempt, for_all=for_all, as_json=as_json, every=every))
    raise typer.Exit(code)


async def _get(
    target: str, settings: "Settings", *, for_attempt: float, for_all: float, as_json: bool, every: bool
) -> int:
    from plasm_dht import PlasmServer
    from plasm_dht.config import format_address

    # the id of a caller that will not stay: nobody puts it in a table
    async with PlasmServer(node_id=bytes(20)) as server:
        await server.listen(0, _interface(settings))
        found, answered = await _search(server, target, settings, for_attempt=for_attempt, for_all=for_all, every=every)
        now = server.now()
    trusted = settings.trust.publishers
    for record, pointer in found if every else found[:1]:
        emit(_as_json(target, record, pointer, now, trusted) if as_json else pointer.url)
    if found:
        return exits.DONE
    if answered:
        of_whom = " of a trusted publisher" if trusted else ""
        complain(f"not found: no live record{of_whom} for {target}")
        return exits.NOT_FOUND
    asked = ", ".join(format_address(address) for address in settings.dht.bootstrap)
    complain(f"no DHT node answered at {asked}: name one that runs with --bootstrap HOST:PORT")
    return exits.NO_NODE


async def _search(
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


def _as_json(target: str, record: "Record", pointer: "Pointer", now: int, trusted: "Sequence[str]") -> str:
    import json

    found = {
        "key": target,
        "url": pointer.url,
        "version": pointer.version,
        "publisher": record.publisher,
        "provider_name": pointer.provider_name,
        "seq": record.seq,
        "issued_at": record.issued_at,
        "expires_at": record.expires_at,
        "ttl_remaining": max(0, record.expires_at - now) / 1000,
        "manifest_sha256": pointer.manifest_sha256.hex(),
        "trusted": record.publisher in trusted,
    }
    return json.dumps(found)


def _interface(settings: "Settings") -> str:
    """The wildcard of the family that reaches the bootstrap addresses."""
    only_ipv6 = all(":" in host for host, _ in settings.dht.bootstrap)
    return "::" if only_ipv6 else "0.0.0.0"  # noqa: S104  # a client's socket: nobody is told of it
