"""`plasm-dht config show`: the effective settings, and where each of them came from."""

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from plasm_dht_cli import logs, options
from plasm_dht_cli.options import option
from plasm_dht_cli.output import emit, printable
from plasm_dht_cli.serve import Artifacts, BaseUrl, HttpPort, Name, NoHttp, NoWithdraw

if TYPE_CHECKING:
    from plasm_dht.config import Loaded

_commands = typer.Typer(
    help="The settings: file, environment and flags taken together.",
    epilog="""\b
Example:
  plasm-dht config show --config /etc/plasm-dht/plasm.toml
""",
    rich_markup_mode=None,
)

EXAMPLE = """\b
Examples:
  plasm-dht config show
  plasm-dht config show --config /etc/plasm-dht/plasm.toml --record-ttl 600
  plasm-dht config show > plasm.toml
Exit codes: 0 the settings are good; 2 the usage, the file, a variable or a
flag is wrong.
"""

# What a file says where the default is nothing: an example, and what the default means.
_UNSET = {
    "provider.artifacts_dir": ("/var/lib/plasm/artifacts", "not set; serve needs it"),
    "provider.base_url": ("https://cdn.example.net/boot", "not set; this provider serves the files itself"),
}

Json = Annotated[
    bool,
    option("--json", help="Print one JSON object: value and source of each setting by its full name."),
]


def add_to(app: typer.Typer) -> None:
    """Make it a command of the application."""
    app.add_typer(_commands, name="config", short_help="Show the effective settings and where they came from.")


# Without a callback typer makes a group of one command that command.
_commands.callback()(lambda: None)


@_commands.command(short_help="Print the settings and where each came from.", epilog=EXAMPLE)
def show(
    ctx: typer.Context,
    as_json: Json = False,
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
    """Print the settings that serve has with the same options, variables and file, and where each came from.

    The output is a configuration file: TOML, with the source of each value in a comment. What a file cannot say (the
    key file, the state directory, switches) is in comments at its end.
    """
    logs.set_up(log_format=log_format, verbose=verbose, quiet=quiet, usual=logging.WARNING)
    loaded = options.load_settings(ctx)
    others = dict(_others(ctx, identity, state_dir))
    if as_json:
        emit(_json(loaded, others))
        return
    for line in _file(loaded, others):
        emit(line)


def _file(loaded: "Loaded", others: dict[str, tuple[str, str]]) -> Iterator[str]:
    from plasm_dht.config import flat

    table = ""
    for key, value in flat(loaded.settings).items():
        of, _, name = key.rpartition(".")
        if of != table:
            if table:
                yield ""
            yield f"[{of}]"
            table = of
        yield _setting(name, key, value, loaded)
    yield ""
    yield "# not in a file:"
    for name, (text, source) in others.items():
        yield f"# {name}: {printable(text)} ({printable(source)})"


def _setting(name: str, key: str, value: object, loaded: "Loaded") -> str:
    from plasm_dht.config import toml

    source = printable(loaded.sources.get(key, "default"))
    if key == "provider.dht.refresh_interval" and value is None:
        return f"# {name} = {toml(_refresh_interval(loaded))}  # default: 2/3 of record_ttl"
    if value is None:
        example, meaning = _UNSET[key]
        return f"# {name} = {toml(example)}  # default: {meaning}"
    try:
        return f"{name} = {toml(value)}  # {source}"
    except ValueError as error:
        return f"# {name}: {error}  # {source}"


def _json(loaded: "Loaded", others: dict[str, tuple[str, str]]) -> str:
    import json

    from plasm_dht.config import flat, format_address

    shown: dict[str, dict[str, object]] = {}
    for key, value in flat(loaded.settings).items():
        plain: object = value
        if key == "provider.dht.refresh_interval" and value is None:
            plain = _refresh_interval(loaded)
        elif key == "provider.dht.bootstrap":
            plain = [format_address(address) for address in loaded.settings.dht.bootstrap]
        elif key == "provider.artifacts_dir" and loaded.settings.artifacts_dir is not None:
            plain = str(loaded.settings.artifacts_dir.absolute())
        shown[key] = {"value": plain, "source": loaded.sources.get(key, "default")}
    more = {name: {"value": text, "source": source} for name, (text, source) in others.items()}
    return json.dumps({"settings": shown, "options": more})


def _refresh_interval(loaded: "Loaded") -> float:
    from plasm_dht.record import REFRESH_AT

    return loaded.settings.dht.record_ttl * REFRESH_AT


def _others(ctx: typer.Context, identity: str | None, state_dir: str | None) -> Iterator[tuple[str, tuple[str, str]]]:
    """What no file can say: the name, the value as text, and where it came from."""

    def source(argument: str) -> str:
        default = ctx.params.get(argument) in (None, False, 0)
        return "default" if default else options.source_of(ctx, argument)

    yield "config", (str(ctx.params.get("config") or "none"), source("config"))
    yield "identity", (str(options.identity_path(identity, state_dir)), source("identity"))
    yield "state-dir", (str(options.state_path(state_dir)), source("state_dir"))
    yield "log-format", (str(ctx.params.get("log_format") or "text"), source("log_format"))
    for switch in ("no_http", "no_withdraw"):
        yield switch.replace("_", "-"), (str(bool(ctx.params.get(switch))).lower(), source(switch))
