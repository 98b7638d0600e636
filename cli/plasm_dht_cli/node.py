"""`plasm-dht node`: a DHT node without artifacts."""

import logging
from typing import TYPE_CHECKING, Any

import typer

from plasm_dht_cli import logs, options

if TYPE_CHECKING:
    from plasm_dht import PlasmServer
    from plasm_dht.config import Change, Settings
    from plasm_dht.provider.front import Front
    from plasm_dht.provider.site import Site

EXAMPLE = """\b
Examples:
  plasm-dht node --host 10.0.0.1
  plasm-dht node --port 0 --bootstrap 10.0.0.1:8468
  plasm-dht node --http-port 8080 --trust ed25519:0123...
Signals: SIGTERM or SIGINT stops it; a second one at once. SIGHUP reads the
file again for TTL, refresh, trust and bootstrap.
Exit codes: 0 stopped by a signal; 2 wrong usage or configuration, a port in
use, a bad key file.
"""


def add_to(app: typer.Typer) -> None:
    """Make it a command of the application."""
    app.command("node", short_help="Run a DHT node without artifacts, until stopped.", epilog=EXAMPLE)(node)


def node(
    ctx: typer.Context,
    host: options.Host = None,
    port: options.Port = None,
    http_host: options.HttpHost = None,
    http_port: options.GatewayPort = None,
    trust: options.Trust = None,
    bootstrap: options.Bootstrap = None,
    record_ttl: options.RecordTtl = None,
    refresh_interval: options.RefreshInterval = None,
    identity: options.IdentityFile = None,
    state_dir: options.StateDir = None,
    config: options.Config = None,
    log_format: options.LogFormat = None,
    verbose: options.Verbose = 0,
    quiet: options.Quiet = False,
) -> None:
    """Run a DHT node without artifacts, for others to bootstrap from and to hold records, until stopped.

    With --http-port it answers HTTP clients that look for records, too. When it listens and has tried to join, one line
    on stdout says so: ready dht=HOST:PORT http=HOST:PORT publisher=ID (http=- without HTTP).
    """
    logs.set_up(log_format=log_format, verbose=verbose, quiet=quiet, usual=logging.INFO)
    settings = options.settings(ctx)
    key = options.load_identity(identity, state_dir)

    from plasm_dht import PlasmServer
    from plasm_dht.config import format_address
    from plasm_dht_cli import running

    life: dict[str, Any] = {"record_ttl": settings.dht.record_ttl, "refresh_interval": settings.dht.refresh_interval}
    life["storage"] = options.open_storage(state_dir)

    control = running.Control(lambda: options.settings_again(ctx))

    async def run(server: PlasmServer, front: "Front | None" = None) -> None:
        await server.bootstrap(settings.dht.bootstrap)
        following = _Following(settings, server, front)
        http = format_address(front.address) if front is not None else "-"
        line = format_address(server.address), http, key.publisher_id
        control.ready(line, status=following.summary, apply=following.apply)
        await server.wait_failed()

    async def service() -> None:
        async with PlasmServer(identity=key, **life) as server:
            await server.listen(settings.dht.port, settings.dht.host)
            await run(server)

    async def service_with_http() -> None:
        from plasm_dht.clock import Clock
        from plasm_dht.provider.front import Front
        from plasm_dht.provider.journal import Journal
        from plasm_dht.provider.observed import ObservedServer

        journal = Journal((clock := Clock()).now)
        async with ObservedServer(journal, identity=key, clock=clock, **life) as server:
            await server.listen(settings.dht.port, settings.dht.host)
            site = _site(server, settings)
            front = await Front.open(settings, site, server, journal)
            try:
                await run(server, front)
            finally:
                await front.close()

    running.run_until_stopped(service if http_port is None else service_with_http, control)


class _Following:
    """Takes over changed settings while the node runs."""

    def __init__(self, settings: "Settings", server: "PlasmServer", front: "Front | None") -> None:
        self._settings = settings
        self._server = server
        self._front = front

    def summary(self) -> str:
        """How the node is, in a line for people."""
        return f"{self._server.storage.records} records held, {self._server.protocol.router.live_count} neighbours"

    async def apply(self, settings: "Settings") -> "Change":
        """As `Provider.apply`."""
        from plasm_dht.provider.reload import take_over

        what = await take_over(self._settings, settings, self._server, self._front)
        self._settings = what.settings
        return what


def _site(server: "PlasmServer", settings: "Settings") -> "Site":
    """What a node without artifacts tells of itself over HTTP."""
    from plasm_dht.config import format_address
    from plasm_dht.provider.site import Site

    def status() -> dict[str, object]:
        return {
            "name": settings.name,
            "publisher": server.identity.publisher_id if server.identity else None,
            "dht": format_address(server.address),
            "http": format_address(site.address) if site.address else None,
            "neighbours": server.protocol.router.live_count,
            "records_held": server.storage.records,
            "records": [],
        }

    def health() -> str | None:
        return None if server.protocol.router.live_count else "no neighbour: nobody answers this node"

    site = Site(settings.name, status=status, health=health)
    return site
