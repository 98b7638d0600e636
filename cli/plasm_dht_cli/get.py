"""`plasm-dht get`: find the newest manifest of a channel and architecture."""

import logging
from typing import TYPE_CHECKING, Annotated

import typer

from plasm_dht_cli import asking, exits, logs, options
from plasm_dht_cli.options import option
from plasm_dht_cli.output import complain, emit

if TYPE_CHECKING:
    from plasm_dht.config import Settings

EXAMPLE = """\b
Examples:
  plasm-dht get stable/arm64
  plasm-dht get stable/arm64 --bootstrap 10.0.0.1:8468 --wait 60
  plasm-dht get stable/arm64 --all --json
Exit codes: 0 found; 1 no live record; 2 wrong usage; 3 no DHT node answered.
"""

Json = Annotated[
    bool,
    option("--json", help="Print a JSON object a line: key, url, version, publisher, seq, times in ms, and more."),
]
All = Annotated[bool, option("--all", help="Print every publisher's live record, freshest first, one a line.")]


def add_to(app: typer.Typer) -> None:
    """Make it a command of the application."""
    short_help = "Print the URL of the newest manifest of CHANNEL/ARCH."
    app.command("get", cls=options.Command, short_help=short_help, epilog=EXAMPLE)(get)


def get(
    ctx: typer.Context,
    target: asking.Target,
    as_json: Json = False,
    every: All = False,
    trust: options.Trust = None,
    wait: asking.Wait = None,
    timeout: asking.Timeout = None,
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

    from plasm_dht.provider.manifest import check_target

    check_target(target)
    for_attempt, for_all = asking.times_of(ctx, timeout, wait)
    settings = asking.settings_of(ctx)

    from plasm_dht_cli import loop

    code = loop.run(_get(target, settings, for_attempt=for_attempt, for_all=for_all, as_json=as_json, every=every))
    raise typer.Exit(code)


async def _get(
    target: str, settings: "Settings", *, for_attempt: float, for_all: float, as_json: bool, every: bool
) -> int:
    from plasm_dht import PlasmServer

    # the id of a caller that will not stay: nobody puts it in a table
    async with PlasmServer(node_id=bytes(20)) as server:
        await asking.listen(server)
        found, answered = await asking.search(
            server, target, settings, for_attempt=for_attempt, for_all=for_all, every=every
        )
        now = server.now()
    trusted = settings.trust.publishers
    for record, pointer in found if every else found[:1]:
        if as_json:
            import json

            from plasm_dht.provider.facts import facts

            emit(json.dumps(facts(target, record, pointer, now=now, trusted=trusted)))
        else:
            emit(pointer.url)
    if found:
        return exits.DONE
    if answered:
        of_whom = " of a trusted publisher" if trusted else ""
        complain(f"not found: no live record{of_whom} for {target}")
        return exits.NOT_FOUND
    complain(asking.nobody_answered(settings))
    return exits.NO_NODE
