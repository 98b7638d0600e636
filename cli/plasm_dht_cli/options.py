"""The options that commands share: names, variables, help, and the way from what was typed to settings."""

import stat
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from plasm_dht.errors import ConfigError

if TYPE_CHECKING:
    from plasm_dht.config import Loaded, Override, Settings
    from plasm_dht.dht.sqlite import SqliteStorage
    from plasm_dht.identity import Identity

PREFIX = "PLASM_DHT_"
FORMATS = ("text", "json")  # of log lines


def variable(flag: str) -> str:
    """The environment variable of an option: `--record-ttl` has `PLASM_DHT_RECORD_TTL`."""
    return PREFIX + flag.lstrip("-").replace("-", "_").upper()


def option(*names: str, help: str, metavar: str | None = None, **more: Any) -> Any:  # noqa: A002  # typer's own word
    """A typer option with its environment variable. Numbers come as text: the settings say what is wrong with them."""
    flag = next(name for name in names if name.startswith("--"))
    return typer.Option(
        *names, help=help, metavar=metavar, envvar=variable(flag), show_envvar=True, show_default=False, **more
    )


class Command(TyperCommand):
    """A command whose usage line names its arguments as manuals do: braces would be a choice."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """The words after the name of the command."""
        return [piece.removeprefix("{").removesuffix("}") for piece in super().collect_usage_pieces(ctx)]


def _yielding_to(other: str) -> Callable[[typer.Context, typer.CallbackParam, int], int]:
    """A flag beats a variable: `-v` given, `PLASM_DHT_QUIET` is not meant. Flags are looked at before variables."""

    def callback(ctx: typer.Context, param: typer.CallbackParam, value: int) -> int:
        mine, its = (ctx.get_parameter_source(name or "") for name in (param.name, other))
        variable_only = mine is not None and mine.name == "ENVIRONMENT"
        flag = its is not None and its.name == "COMMANDLINE" and ctx.params.get(other)
        return type(value)() if variable_only and flag else value

    return callback


def not_empty(ctx: typer.Context, param: typer.CallbackParam, value: str | None) -> str | None:
    """Refuse the text that a script has for a variable which it forgot to set: it would mean the working directory."""
    if value == "":
        raise ConfigError(
            f"--{(param.name or '').replace('_', '-')}: '': must not be empty: leave it out for the default"
        )
    return value


def _format(ctx: typer.Context, param: typer.CallbackParam, value: str | None) -> str | None:
    if value is not None and value not in FORMATS:
        raise ConfigError(f"{source_of(ctx, param.name or '')}: {value!r}: must be {' or '.join(FORMATS)}")
    return value


Host = Annotated[
    str | None,
    option("--host", metavar="ADDRESS", help="Address that the DHT node binds. Default: 0.0.0.0, all of them."),
]
Port = Annotated[
    str | None,
    option("--port", metavar="PORT", help="UDP port of the DHT node; 0 picks a free one. Default: 8468."),
]
HttpHost = Annotated[
    str | None,
    option("--http-host", metavar="ADDRESS", help="Address that the HTTP server binds. Default: 0.0.0.0, all of them."),
]
GatewayPort = Annotated[
    str | None,
    option(
        "--http-port",
        metavar="PORT",
        help="Serve a gateway into the DHT and a page for people at this TCP port; 0 picks a free one. "
        "Default: no HTTP, even if the configuration file has a port.",
    ),
]
Bootstrap = Annotated[
    list[str] | None,
    option(
        "--bootstrap",
        metavar="HOST:PORT",
        help="A DHT node to join through. Repeatable; in the variable separated by white space. An IPv6 address stands "
        "in brackets, [::1]:8468. Default: 127.0.0.1:8468.",
    ),
]
RecordTtl = Annotated[
    str | None,
    option(
        "--record-ttl",
        metavar="SECONDS",
        help="How long a published record lives unless it is refreshed: 1 to 604800 seconds. Default: 3600.",
    ),
]
RefreshInterval = Annotated[
    str | None,
    option(
        "--refresh-interval",
        metavar="SECONDS",
        help="Seconds from one publish of a record to the next; less than the record TTL. Default: 2/3 of the TTL.",
    ),
]
IdentityFile = Annotated[
    str | None,
    option(
        "--identity",
        metavar="FILE",
        callback=not_empty,
        help="The Ed25519 key file (PKCS#8 PEM, mode 0600). Default: identity.pem in the state directory.",
    ),
]
StateDir = Annotated[
    str | None,
    option(
        "--state-dir",
        metavar="DIR",
        callback=not_empty,
        help="Where the key, the node's id, its contacts and the records that it holds are kept between runs, for one "
        "process at a time. Default: plasm-dht in the user's state directory (~/.local/state on Linux).",
    ),
]
Config = Annotated[
    str | None,
    option("--config", metavar="FILE", callback=not_empty, help="A TOML configuration file. Default: none is read."),
]
Trust = Annotated[
    list[str] | None,
    option(
        "--trust",
        metavar="ID",
        help="Believe only this publisher, ed25519: and 64 hex digits. Repeatable; in the variable separated by white "
        "space. Default: anybody.",
    ),
]
LogFormat = Annotated[
    str | None,
    option(
        "--log-format",
        metavar="text|json",
        autocompletion=lambda: [*FORMATS],
        callback=_format,
        help="How log lines on stderr look. Default: text.",
    ),
]
Verbose = Annotated[
    int,
    option(
        "--verbose",
        "-v",
        count=True,
        callback=_yielding_to("quiet"),
        help="Log more; twice (in the variable: 2): the libraries' messages too.",
    ),
]
Quiet = Annotated[bool, option("--quiet", "-q", callback=_yielding_to("verbose"), help="Log errors only.")]

# Which setting an option overrides, by the name of the command's argument.
SETTINGS: Mapping[str, str] = {
    "name": "provider.name",
    "artifacts": "provider.artifacts_dir",
    "http_host": "provider.http_host",
    "http_port": "provider.http_port",
    "base_url": "provider.base_url",
    "host": "provider.dht.host",
    "port": "provider.dht.port",
    "bootstrap": "provider.dht.bootstrap",
    "record_ttl": "provider.dht.record_ttl",
    "refresh_interval": "provider.dht.refresh_interval",
    "trust": "trust.publishers",
}


def source_of(ctx: typer.Context, argument: str) -> str:
    """Where the value of a command's argument came from, for a refusal: `--port` or `PLASM_DHT_PORT`."""
    flag = "--" + argument.replace("_", "-")
    source = ctx.get_parameter_source(argument)
    return variable(flag) if source is not None and source.name == "ENVIRONMENT" else flag


def settings(ctx: typer.Context) -> "Settings":
    """The settings of the command that is running: flag beats variable beats file beats default.

    Raises `ConfigError`.
    """
    return load_settings(ctx).settings


def settings_again(ctx: typer.Context) -> "Settings":
    """As `settings`, while a service runs: a pipe has been read, and could be waited for until after the end."""
    file = ctx.params.get("config")
    if file is not None:
        with suppress(OSError):  # reading it says so
            if stat.S_ISFIFO(Path(file).stat().st_mode):
                raise ConfigError(f"configuration file {file} is a pipe, which is read once")
    return settings(ctx)


def load_settings(ctx: typer.Context) -> "Loaded":
    """As `settings`, and where each came from."""
    from plasm_dht.config import load_with_sources

    return load_with_sources(ctx.params.get("config"), _overrides(ctx))


def identity_path(identity: str | None, state_dir: str | None) -> Path:
    """The key file: the one named, else identity.pem in the state directory."""
    return Path(identity) if identity is not None else state_path(state_dir) / "identity.pem"


def state_path(state_dir: str | None) -> Path:
    """The state directory: the one named, else the user's."""
    if state_dir is not None:
        return Path(state_dir)
    import platformdirs

    return Path(platformdirs.user_state_dir("plasm-dht"))


def open_storage(state_dir: str | None) -> "SqliteStorage":
    """What a node holds, in the state directory. Blocks. Raises `ConfigError`."""
    from plasm_dht.dht.sqlite import SqliteStorage

    return SqliteStorage(state_path(state_dir) / "node.sqlite")


def load_identity(identity: str | None, state_dir: str | None) -> "Identity":
    """The identity in the key file, which is created when there is none. Raises `IdentityError`."""
    from plasm_dht.identity import Identity

    return Identity.load(identity_path(identity, state_dir))


def _overrides(ctx: typer.Context) -> "list[Override]":
    from plasm_dht.config import Override

    overrides = []
    for argument, key in SETTINGS.items():
        value = ctx.params.get(argument)
        if value is None or value == [] or value == ():
            continue
        typed = tuple(value) if isinstance(value, list | tuple) else value
        overrides.append(Override(key, typed, source_of(ctx, argument)))
    return overrides
