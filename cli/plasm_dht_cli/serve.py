"""`plasm-dht serve`: advertise and serve a folder of boot artifacts."""

import logging
from typing import Annotated

import typer

from plasm_dht.errors import ConfigError
from plasm_dht_cli import logs, options
from plasm_dht_cli.options import option

EXAMPLE = """\b
Examples:
  plasm-dht serve --artifacts /srv/boot
  plasm-dht serve --artifacts /srv/boot --host 10.0.0.7 --http-host 10.0.0.7 \\
      --bootstrap dht.example.net:8468 --record-ttl 600
  plasm-dht serve --config /etc/plasm-dht/plasm.toml
Signals: SIGTERM or SIGINT withdraws the records and stops; a second one stops
at once. SIGHUP reads the file again for TTL, refresh, trust and bootstrap.
Exit codes: 0 stopped by a signal; 2 wrong usage or configuration, a port in
use, a bad folder or key file.
"""

Artifacts = Annotated[
    str | None,
    option(
        "--artifacts",
        metavar="DIR",
        help="The folder to serve: DIR/CHANNEL/ARCH/ holds the files. Required, here or in the configuration file.",
    ),
]
HttpPort = Annotated[
    str | None,
    option("--http-port", metavar="PORT", help="TCP port of the HTTP server; 0 picks a free one. Default: 8080."),
]
Name = Annotated[
    str | None,
    option("--name", metavar="NAME", help="What people call this provider. Default: the name of this machine."),
]
BaseUrl = Annotated[
    str | None,
    option(
        "--base-url",
        metavar="URL",
        help="Advertise this http:// or https:// address, where something else (a CDN, a proxy) serves the folder. "
        "Default: this provider's own.",
    ),
]
NoHttp = Annotated[
    bool,
    option(
        "--no-http",
        help="Serve no HTTP: something else serves DIR at --base-url, and the manifests, CHANNEL/ARCH/manifest.json, "
        "that are written below manifests in the state directory.",
    ),
]
NoWithdraw = Annotated[
    bool, option("--no-withdraw", help="When stopped, leave the records to expire instead of taking them back.")
]


def add_to(app: typer.Typer) -> None:
    """Make it a command of the application."""
    short_help = "Serve and advertise a folder of boot artifacts, until stopped."
    app.command("serve", short_help=short_help, epilog=EXAMPLE)(serve)


def serve(
    ctx: typer.Context,
    artifacts: Artifacts = None,
    host: options.Host = None,
    port: options.Port = None,
    http_host: options.HttpHost = None,
    http_port: HttpPort = None,
    trust: options.Trust = None,
    bootstrap: options.Bootstrap = None,
    record_ttl: options.RecordTtl = None,
    refresh_interval: options.RefreshInterval = None,
    name: Name = None,
    base_url: BaseUrl = None,
    no_http: NoHttp = False,
    identity: options.IdentityFile = None,
    state_dir: options.StateDir = None,
    config: options.Config = None,
    no_withdraw: NoWithdraw = False,
    log_format: options.LogFormat = None,
    verbose: options.Verbose = 0,
    quiet: options.Quiet = False,
) -> None:
    """Serve a folder of boot artifacts and advertise each CHANNEL/ARCH in it on the DHT, until stopped.

    It scans the folder, signs a manifest for each channel and architecture, serves them over HTTP, publishes a signed
    record of each, keeps the records alive, and publishes anew when files change. SIGTERM or SIGINT withdraws them.
    When the first publish is done, one line on stdout says so: ready dht=HOST:PORT http=HOST:PORT publisher=ID.
    """
    logs.set_up(log_format=log_format, verbose=verbose, quiet=quiet, usual=logging.INFO)
    settings = options.settings(ctx)
    if settings.artifacts_dir is None:
        raise ConfigError(
            "there is no folder to serve: name it with --artifacts DIR, PLASM_DHT_ARTIFACTS, or provider.artifacts_dir "
            "in the configuration file"
        )
    key = options.load_identity(identity, state_dir)
    storage = options.open_storage(state_dir)
    manifests = options.state_path(state_dir) / "manifests" if no_http else None

    from plasm_dht.config import format_address
    from plasm_dht.provider.provider import Provider
    from plasm_dht_cli import running

    control = running.Control(lambda: options.settings_again(ctx))

    async def service() -> None:
        async with Provider(
            settings, key, no_http=no_http, manifests=manifests, withdraw=not no_withdraw, storage=storage
        ) as provider:
            http = provider.http_address
            where = format_address(provider.dht_address), format_address(http) if http else "-", key.publisher_id
            control.ready(where, status=provider.summary, apply=provider.apply)
            await provider.wait_failed()

    running.run_until_stopped(service, control)
