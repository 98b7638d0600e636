"""`plasm-dht publish`: one record of any name, kept alive until stopped, or set once."""

import contextlib
import logging
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Annotated

import typer

from plasm_dht_cli import asking, exits, logs, options
from plasm_dht_cli.options import option
from plasm_dht_cli.output import complain, emit

if TYPE_CHECKING:
    from plasm_dht import Identity, PlasmServer, Publication
    from plasm_dht.config import Settings

    Bound = tuple[str | None, int]  # None: every address of this machine

EXAMPLE = """\b
Examples:
  plasm-dht publish /motd "back at noon"
  plasm-dht publish /site/leader 10.0.0.7:5432 --record-ttl 30
  plasm-dht publish /motd "back at noon" --once --record-ttl 7200 --json
Exit codes: 0 published, and taken back; with --once: another node holds it;
1 with --once: nodes answered, none accepted it; 2 wrong usage;
3 with --once: no DHT node answered.
"""

# Whoever leaves at once does not try again, whatever these say.
_TRYING_AGAIN = ("plasm_dht.dht.membership", "plasm_dht.dht.refresh")

_log = logging.getLogger(__name__)

Name = Annotated[str, typer.Argument(metavar="NAME", help="The DHT name: 1 to 255 bytes of UTF-8, as in /site/leader.")]
Text = Annotated[str, typer.Argument(metavar="VALUE", help="The value: text; after -- it may start with a dash.")]
Host = Annotated[
    str | None,
    option("--host", metavar="ADDRESS", help="Address that the DHT node binds. Default: all of them, IPv4 and IPv6."),
]
Port = Annotated[
    str | None,
    option("--port", metavar="PORT", help="UDP port of the DHT node. Default: 0, which picks a free one."),
]
Once = Annotated[
    bool, option("--once", help="Set it and leave: the record is not refreshed, and expires after its TTL.")
]
Json = Annotated[
    bool, option("--json", help="Print a JSON object: name, publisher, seq, expires_at in ms, holders, refused.")
]
NoWithdraw = Annotated[
    bool, option("--no-withdraw", help="When stopped, leave the record to expire instead of taking it back.")
]


def add_to(app: typer.Typer) -> None:
    """Make it a command of the application."""
    short_help = "Publish VALUE under NAME and keep it alive, until stopped."
    app.command("publish", cls=options.Command, short_help=short_help, epilog=EXAMPLE)(publish)


def publish(
    ctx: typer.Context,
    name: Name,
    value: Text,
    once: Once = False,
    as_json: Json = False,
    host: Host = None,
    port: Port = None,
    bootstrap: options.Bootstrap = None,
    record_ttl: options.RecordTtl = None,
    refresh_interval: options.RefreshInterval = None,
    identity: options.IdentityFile = None,
    state_dir: options.StateDir = None,
    config: options.Config = None,
    no_withdraw: NoWithdraw = False,
    log_format: options.LogFormat = None,
    verbose: options.Verbose = 0,
    quiet: options.Quiet = False,
) -> None:
    """Publish VALUE under NAME, signed, and keep it alive until stopped. SIGTERM or SIGINT takes it back.

    When it is published, one line on stdout says so: published seq=N expires_at=MS holders=N publisher=ID.
    """
    logs.set_up(log_format=log_format, verbose=verbose, quiet=quiet, usual=logging.WARNING)
    if once and not verbose:
        for logger in _TRYING_AGAIN:
            logging.getLogger(logger).setLevel(logging.ERROR)

    from plasm_dht.record import MAX_SEQ, check_name, sign

    check_name(name)
    loaded = options.load_settings(ctx)
    settings = loaded.settings
    # beside a node of this machine: the usual port is that node's
    at = settings.dht.port if "provider.dht.port" in loaded.sources else 0
    bound = settings.dht.host if "provider.dht.host" in loaded.sources else None, at
    key = options.load_identity(identity, state_dir)
    sign(key, name, value, seq=MAX_SEQ, issued_at=MAX_SEQ, expires_at=MAX_SEQ)  # whether it fits, before anything else

    if once:
        from plasm_dht_cli import loop

        raise typer.Exit(loop.run(_once(name, value, key, settings, bound, as_json=as_json)))

    from plasm_dht_cli import running

    async def service() -> None:
        async with _node(key, settings, bound, withdraw=not no_withdraw) as server:
            await server.bootstrap(settings.dht.bootstrap)
            publication = await server.publish(name, value)
            if not publication.stored:
                _log.warning("no other node holds %r yet: it is kept here, and pushed as soon as one can", name)
            emit(_shown(publication, key.publisher_id, as_json=as_json))
            await server.wait_failed()

    running.run_until_stopped(service)


async def _once(name: str, value: str, key: "Identity", settings: "Settings", bound: "Bound", *, as_json: bool) -> int:
    async with _node(key, settings, bound, withdraw=False) as server:
        neighbours = await server.bootstrap(settings.dht.bootstrap)
        publication = await server.publish(name, value) if neighbours else None
    if publication is None:
        complain(asking.nobody_answered(settings))
        return exits.NO_NODE
    if publication.stored:
        emit(_shown(publication, key.publisher_id, as_json=as_json))
        return exits.DONE
    if publication.refused:
        reasons = ", ".join(f"{reason} ({count})" for reason, count in sorted(publication.refused.items()))
        complain(f"not published: every DHT node that answered refused {name!r}: {reasons}")
        return exits.NOT_FOUND
    complain(f"not published: no DHT node answered when {name!r} was to be stored: try again")
    return exits.NO_NODE


@contextlib.asynccontextmanager
async def _node(
    key: "Identity", settings: "Settings", bound: "Bound", *, withdraw: bool
) -> "AsyncIterator[PlasmServer]":
    """A node that listens and has forgotten what other runs held: the state directory may be another process's."""
    from plasm_dht import PlasmServer

    dht = settings.dht
    server = PlasmServer(identity=key, record_ttl=dht.record_ttl, refresh_interval=dht.refresh_interval)
    try:
        host, at = bound
        await (asking.listen(server, at) if host is None else server.listen(at, host))
        yield server
    finally:
        await server.close(withdraw=withdraw)


def _shown(publication: "Publication", publisher: str, *, as_json: bool) -> str:
    if not as_json:
        return (
            f"published seq={publication.seq} expires_at={publication.expires_at} holders={publication.stored} "
            f"publisher={publisher}"
        )
    import json

    return json.dumps(
        {
            "name": publication.name,
            "publisher": publisher,
            "seq": publication.seq,
            "expires_at": publication.expires_at,
            "holders": publication.stored,
            "refused": publication.refused,
        }
    )
