"""`plasm-dht node`: a DHT node without artifacts."""

import contextlib
import logging
from typing import TYPE_CHECKING, Any

import typer

from plasm_dht_cli import logs, options

if TYPE_CHECKING:
    from plasm_dht import PlasmServer
    from plasm_dht.config import Address, Change, Settings
    from plasm_dht.provider.gateway import Gateway
    from plasm_dht.provider.journal import Journal
    from plasm_dht.provider.observed import ObservedServer
    from plasm_dht.provider.web import Runner

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

    control = running.Control(lambda: options.settings(ctx))

    async def join(server: PlasmServer, http: str, gateway: "Gateway | None" = None) -> None:
        await server.bootstrap(settings.dht.bootstrap)
        follower = _Follower(settings, server, gateway)
        line = format_address(server.address), http, key.publisher_id
        control.ready(line, status=follower.summary, apply=follower.apply)
        await server.wait_failed()

    async def service() -> None:
        async with PlasmServer(identity=key, **life) as server:
            await server.listen(settings.dht.port, settings.dht.host)
            await join(server, "-")

    async def service_with_http() -> None:
        from plasm_dht.clock import Clock
        from plasm_dht.provider.journal import Journal
        from plasm_dht.provider.observed import ObservedServer

        journal = Journal((clock := Clock()).now)
        async with (
            ObservedServer(journal, identity=key, clock=clock, **life) as server,
            contextlib.AsyncExitStack() as stack,
        ):
            await server.listen(settings.dht.port, settings.dht.host)
            runner, address, gateway = await _serve_http(server, journal, settings)
            stack.push_async_callback(runner.cleanup)
            await join(server, format_address(address), gateway)

    running.run_until_stopped(service if http_port is None else service_with_http, control)


class _Follower:
    """Takes over changed settings while the node runs."""

    def __init__(self, settings: "Settings", server: "PlasmServer", gateway: "Gateway | None") -> None:
        self._settings = settings
        self._server = server
        self._gateway = gateway

    def summary(self) -> str:
        """How the node is, in a line for people."""
        return f"{self._server.storage.records} records held, {self._server.protocol.router.live_count} neighbours"

    async def apply(self, settings: "Settings") -> "Change":
        """As `Provider.apply`."""
        from plasm_dht.config import change

        what = change(self._settings, settings)
        before, self._settings = self._settings.dht, what.settings
        now = what.settings.dht
        if (now.record_ttl, now.refresh_interval) != (before.record_ttl, before.refresh_interval):
            self._server.set_life(now.record_ttl, now.refresh_interval)
        if self._gateway is not None:
            self._gateway.trust = what.settings.trust.publishers
        if now.bootstrap != before.bootstrap:
            await self._server.bootstrap(now.bootstrap, replace=True)
        return what


async def _serve_http(
    server: "ObservedServer", journal: "Journal", settings: "Settings"
) -> "tuple[Runner, Address, Gateway]":
    """The gateway and the page. What serves HTTP is imported only where it is asked for."""
    from plasm_dht.config import format_address
    from plasm_dht.provider import gateway, page, web
    from plasm_dht.provider.metrics import Exposition

    bound: list[str] = []

    def status() -> dict[str, object]:
        return {
            "name": settings.name,
            "publisher": server.identity.publisher_id if server.identity else None,
            "dht": format_address(server.address),
            "http": bound[0] if bound else None,
            "neighbours": server.protocol.router.live_count,
            "records_held": server.storage.records,
            "records": [],
        }

    def health() -> str | None:
        return None if server.protocol.router.live_count else "no neighbour: nobody answers this node"

    site = web.Site(settings.name, status=status, health=health)
    site.metrics = Exposition(server, site.traffic).render
    app = web.create_app(site)
    table = server.protocol.router
    asked = gateway.Gateway(server, table, settings.trust.publishers)
    gateway.add_to(app, asked)
    page.add_to(app, table, journal)
    runner, port = await web.serve(app, settings.http_host, settings.http_port)
    bound.append(format_address((settings.http_host, port)))
    return runner, (settings.http_host, port), asked
