"""`plasm-dht node`: a DHT node without artifacts."""

import logging

import typer

from plasm_dht_cli import logs, options

EXAMPLE = """\b
Examples:
  plasm-dht node --host 10.0.0.1
  plasm-dht node --port 0 --bootstrap 10.0.0.1:8468
"""


def add_to(app: typer.Typer) -> None:
    """Make it a command of the application."""
    app.command("node", short_help="Run a DHT node without artifacts, until stopped.", epilog=EXAMPLE)(node)


def node(
    ctx: typer.Context,
    host: options.Host = None,
    port: options.Port = None,
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

    When it listens and has tried to join, one line on stdout says so: ready dht=HOST:PORT http=- publisher=ID.
    """
    logs.set_up(log_format=log_format, verbose=verbose, quiet=quiet, usual=logging.INFO)
    settings = options.settings(ctx).dht
    key = options.load_identity(identity, state_dir)

    from plasm_dht import PlasmServer
    from plasm_dht.config import format_address
    from plasm_dht_cli import running

    async def service() -> None:
        server = PlasmServer(identity=key, record_ttl=settings.record_ttl, refresh_interval=settings.refresh_interval)
        async with server:
            await server.listen(settings.port, settings.host)
            await server.bootstrap(settings.bootstrap)
            running.announce(format_address(server.address), "-", key.publisher_id)
            await server.wait_failed()

    running.run_until_stopped(service)
