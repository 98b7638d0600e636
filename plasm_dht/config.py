"""Settings: defaults, the TOML file, what flags and variables override, and validation. Opens no socket.

A refusal is a `ConfigError` of one line: where the value came from, the key's full name, the value, what is allowed.
"""

import os
import socket
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from plasm_dht.errors import ConfigError
from plasm_dht.text import printable
from plasm_dht.values import CHECKS, DEFAULT_PORT, MAX_NAME, Given
from plasm_dht.values import Address as Address
from plasm_dht.values import format_address as format_address
from plasm_dht.values import parse_address as parse_address
from plasm_dht.values import parse_seconds as parse_seconds
from plasm_dht.values import toml as toml

DEFAULT_BOOTSTRAP = (("127.0.0.1", DEFAULT_PORT),)
DEFAULT_RECORD_TTL = 3600.0
# A settings file is a few lines; far above that it is something else, and it is read into memory.
MAX_FILE = 1024 * 1024
# What can change while a service runs; all else is bound, opened or signed into manifests when it starts.
CHANGEABLE = (
    "provider.dht.bootstrap",
    "provider.dht.record_ttl",
    "provider.dht.refresh_interval",
    "trust.publishers",
)

_TABLES = ("provider", "provider.dht", "trust")


@dataclass(frozen=True, slots=True)
class DhtSettings:
    """`[provider.dht]`: the node on the DHT."""

    host: str = "0.0.0.0"  # noqa: S104  # machines that boot come from anywhere
    """The address that the node binds, an IP address or a host name."""
    port: int = DEFAULT_PORT
    """The UDP port that it binds; 0 picks one."""
    bootstrap: tuple[Address, ...] = DEFAULT_BOOTSTRAP
    """(host, port) of nodes to join through; empty: wait for others to come."""
    record_ttl: float = DEFAULT_RECORD_TTL
    """Seconds that a published record lives unless it is refreshed: 1 to 604,800."""
    refresh_interval: float | None = None
    """Seconds from one publish to the next, below `record_ttl`. None: 2/3 of `record_ttl`."""


@dataclass(frozen=True, slots=True)
class TrustSettings:
    """`[trust]`: whom a reader believes."""

    publishers: tuple[str, ...] = ()
    """Publisher ids, `ed25519:` and 64 hex digits; empty: anybody."""


def host_name() -> str:
    """The name of this machine, the default of `provider.name`."""
    name = socket.gethostname()
    return name if 1 <= len(name.encode(errors="replace")) <= MAX_NAME and name.isprintable() else "provider"


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that a configuration file can say. Made by `load`; values in here have passed validation."""

    name: str = field(default_factory=host_name)
    """`provider.name`: what people call this provider; 1 to 100 bytes of UTF-8 without control characters."""
    artifacts_dir: Path | None = None
    """`provider.artifacts_dir`: the folder with CHANNEL/ARCH folders. Only `serve` needs it."""
    http_host: str = "0.0.0.0"  # noqa: S104  # machines that boot come from anywhere
    """`provider.http_host`: the address that the HTTP server binds."""
    http_port: int = 8080
    """`provider.http_port`: the TCP port that it binds; 0 picks one."""
    base_url: str | None = None
    """`provider.base_url`: where the folder is served, without a `/` at its end. None: by this provider itself."""
    dht: DhtSettings = field(default_factory=DhtSettings)
    """`[provider.dht]`."""
    trust: TrustSettings = field(default_factory=TrustSettings)
    """`[trust]`."""


@dataclass(frozen=True, slots=True)
class Override:
    """A value from the command line or the environment. It is text, or a list of texts; None: it was not given."""

    key: str
    """The full name of the setting, `provider.dht.port`."""
    value: str | tuple[str, ...] | None
    """As it was typed."""
    source: str
    """What a refusal names: `--port` or `PLASM_DHT_PORT`."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """Settings, and where each that is not the default came from."""

    settings: Settings
    """The effective settings."""
    sources: Mapping[str, str]
    """By the full name of the setting: the path of the file, or the `source` of the override."""


def load(path: str | os.PathLike[str] | None = None, overrides: Iterable[Override] = ()) -> Settings:
    """The settings in the TOML file at `path`, with the overrides in place of what the file says.

    A later override of the same key beats an earlier one. A relative `artifacts_dir` in the file is relative to the
    folder of the file; one in an override to the working directory. Raises `ConfigError`.
    """
    return load_with_sources(path, overrides).settings


def load_with_sources(path: str | os.PathLike[str] | None = None, overrides: Iterable[Override] = ()) -> Loaded:
    """As `load`, and where each came from."""
    values: dict[str, Given] = {}
    if path is not None:
        values = {value.key: value for value in _read_file(Path(path))}
    for value in values.values():
        CHECKS[value.key](value)  # a mistake in the file is one even where the command line hides it
    for override in overrides:
        if override.value is not None:
            if override.key not in CHECKS:
                raise ValueError(f"there is no setting {override.key!r}")
            values[override.key] = Given(override.key, override.value, override.source, is_text=True)
    checked = {key: CHECKS[key](value) for key, value in values.items()}
    _check_refresh_interval(values, checked)

    def section(table: str) -> dict[str, Any]:  # each value was checked by its own function in CHECKS
        return {key.rpartition(".")[2]: value for key, value in checked.items() if key.rpartition(".")[0] == table}

    settings = Settings(
        **section("provider"),
        dht=DhtSettings(**section("provider.dht")),
        trust=TrustSettings(**section("trust")),
    )
    return Loaded(settings, {key: value.source for key, value in values.items()})


def flat(settings: Settings) -> dict[str, object]:
    """Each setting by its full name, in the order of the documentation."""
    tables = {"provider": settings, "provider.dht": settings.dht, "trust": settings.trust}
    return {key: getattr(tables[key.rpartition(".")[0]], key.rpartition(".")[2]) for key in CHECKS}


def shown(settings: Settings, key: str) -> str:
    """The setting of this full name for people: `provider.dht.port = 8468`."""
    value = flat(settings)[key]
    return f"{key} is not set" if value is None else f"{key} = {printable(toml(value))}"


@dataclass(frozen=True, slots=True)
class Change:
    """What becomes of the settings of a service that reads its file again."""

    settings: Settings
    """What is in effect from now on."""
    read: Settings
    """What was read."""
    applied: tuple[str, ...]
    """The full names of the settings that change."""
    later: tuple[str, ...]
    """The full names of those that differ and need a restart."""


def change(running: Settings, read: Settings) -> Change:
    """What a service that runs with the one does when the other is read."""
    before, after = flat(running), flat(read)
    differing = [key for key in before if before[key] != after[key]]
    settings = replace(running, dht=_with_life_and_bootstrap(running.dht, read.dht), trust=read.trust)
    return Change(
        settings,
        read,
        tuple(key for key in differing if key in CHANGEABLE),
        tuple(key for key in differing if key not in CHANGEABLE),
    )


def _with_life_and_bootstrap(running: DhtSettings, read: DhtSettings) -> DhtSettings:
    return replace(
        running, bootstrap=read.bootstrap, record_ttl=read.record_ttl, refresh_interval=read.refresh_interval
    )


def _check_refresh_interval(values: Mapping[str, Given], checked: Mapping[str, object]) -> None:
    interval = checked.get("provider.dht.refresh_interval")
    if interval is None:
        return
    record_ttl = checked.get("provider.dht.record_ttl", DEFAULT_RECORD_TTL)
    assert isinstance(interval, float)  # noqa: S101  # for the type checker
    assert isinstance(record_ttl, float)  # noqa: S101
    if interval >= record_ttl:
        of_ttl = values.get("provider.dht.record_ttl")
        source = of_ttl.source if of_ttl else "the default"
        values["provider.dht.refresh_interval"].refuse(
            f"must be less than provider.dht.record_ttl, which is {record_ttl:g} s ({source})"
        )


# --- the file -------------------------------------------------------------------------------------------------------


def _read_file(path: Path) -> Iterator[Given]:
    shown = printable(str(path))
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"configuration file {shown} cannot be read: {reason}") from None
    if len(data) > MAX_FILE:
        raise ConfigError(f"configuration file {shown} has more than {MAX_FILE} bytes: is it the right file?")
    import tomllib

    try:
        document = tomllib.loads(data.decode("utf-8-sig"))  # an editor's byte order mark cannot be seen
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"configuration file {shown} is not UTF-8 (at line {line})") from None
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ConfigError(printable(f"configuration file {shown} is not valid TOML: {reason}")) from None
    return _flatten(document, "", path, shown)


def _flatten(table: Mapping[str, object], prefix: str, path: Path, shown: str) -> Iterator[Given]:
    for name, raw in table.items():
        key = prefix + name
        value = Given(key, raw, shown, folder=path.absolute().parent)
        quoted = "." in name  # "dht.port" = 1 in quotes: it only looks like one of ours
        if key in _TABLES and not quoted:
            if not isinstance(raw, dict):
                value.refuse(f"must be a table: [{key}]")
            yield from _flatten(raw, key + ".", path, shown)
        elif key in CHECKS and not quoted:
            yield value
        else:
            what = "table" if isinstance(raw, dict) else "setting"
            value.refuse(f"there is no such {what}: {_known_keys(key, prefix)}")


def _known_keys(key: str, prefix: str) -> str:
    known = {full.rpartition(".")[2]: full for full in (*CHECKS, *_TABLES)}  # no two end alike
    import difflib

    for near in difflib.get_close_matches(key.rpartition(".")[2], known, n=1):
        return f"did you mean {known[near]}?"
    siblings = sorted(full for full in known.values() if full.startswith(prefix) and "." not in full[len(prefix) :])
    return f"allowed here: {', '.join(siblings)}"
