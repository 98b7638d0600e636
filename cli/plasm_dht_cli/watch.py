"""`plasm-dht watch`: a line each time the record of a channel and architecture changes, is withdrawn or expires."""

import logging
import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

from plasm_dht.errors import VerificationError
from plasm_dht_cli import asking, logs, options
from plasm_dht_cli.options import option
from plasm_dht_cli.output import emit, printable

if TYPE_CHECKING:
    from plasm_dht import Event
    from plasm_dht.record import Value

EXAMPLE = """\b
Examples:
  plasm-dht watch stable/arm64
  plasm-dht watch stable/arm64 --json --trust ed25519:0123...
  plasm-dht watch /site/leader --bootstrap 10.0.0.1:8468
Exit codes: 0 stopped by a signal; 2 wrong usage or configuration.
"""

# What the engine says once when nobody answers, this logger says with each attempt to join again.
_JOINING = "plasm_dht.dht.membership"

Target = Annotated[
    str,
    typer.Argument(
        metavar="CHANNEL/ARCH",
        help="What to watch, as in stable/arm64; what starts with a slash is the name itself, as publish has it.",
    ),
]
Json = Annotated[
    bool, option("--json", help="Print a JSON object a line: event, key, at, publisher, seq, times in ms, and more.")
]


def add_to(app: typer.Typer) -> None:
    """Make it a command of the application."""
    short_help = "Print a line each time the record of CHANNEL/ARCH changes."
    app.command("watch", cls=options.Command, short_help=short_help, epilog=EXAMPLE)(watch)


def watch(
    ctx: typer.Context,
    target: Target,
    as_json: Json = False,
    trust: options.Trust = None,
    bootstrap: options.Bootstrap = None,
    config: options.Config = None,
    log_format: options.LogFormat = None,
    verbose: options.Verbose = 0,
    quiet: options.Quiet = False,
) -> None:
    """Print a line each time a record of CHANNEL/ARCH is published, changes, is withdrawn or expires, until stopped.

    The records that are live already come first. A refresh is no change. When no DHT node answers any more, one line on
    stderr says so, and it goes on.
    """
    logs.set_up(log_format=log_format, verbose=verbose, quiet=quiet, usual=logging.WARNING)
    if not verbose:
        logging.getLogger(_JOINING).setLevel(logging.ERROR)

    from plasm_dht.provider.manifest import check_target, record_name
    from plasm_dht.record import check_name

    name = check_name(target) if target.startswith("/") else record_name(check_target(target))
    settings = asking.settings_of(ctx)

    from plasm_dht import PlasmServer
    from plasm_dht_cli import running

    async def service() -> None:
        async with PlasmServer() as server:  # a node like any other: what is stored there is seen at once
            await asking.listen(server)
            await server.bootstrap(settings.dht.bootstrap)
            async for event in server.watch(name, trust=settings.trust.publishers or None):
                emit(_as_json(target, event) if as_json else _as_text(target, event))
            await server.wait_failed()

    running.run_until_stopped(service)


def _as_text(target: str, event: "Event") -> str:
    """The event on one line: when, what, of which name, and what it says."""
    from datetime import UTC, datetime

    moment = datetime.fromtimestamp(event.at / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    fields = {"publisher": event.record.publisher, "seq": event.record.seq} | _said(event.record.value)
    return printable(" ".join([moment, event.kind, target, *(f"{name}={value}" for name, value in fields.items())]))


def _as_json(target: str, event: "Event") -> str:
    import json

    record = event.record
    fields = {
        "event": event.kind,
        "key": target,
        "at": event.at,
        "publisher": record.publisher,
        "seq": record.seq,
        "issued_at": record.issued_at,
        "expires_at": record.expires_at,
    }
    return json.dumps(fields | _said(record.value))


def _said(value: "Value") -> dict[str, Any]:
    """What the value says: a pointer's URL and version, else the value itself, bytes in base64."""
    from plasm_dht.provider.manifest import Pointer

    try:
        pointer = Pointer.decode(value)
    except VerificationError:
        pass
    else:
        return {
            "url": pointer.url,
            "version": pointer.version,
            "provider_name": pointer.provider_name,
            "manifest_sha256": pointer.manifest_sha256.hex(),
        }
    if isinstance(value, bytes):
        import base64

        return {"value_base64": base64.b64encode(value).decode()}
    if isinstance(value, float) and not math.isfinite(value):
        return {"value": str(value)}  # JSON has no word for it
    return {"value": value}
