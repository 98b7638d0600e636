"""Settings: defaults, the TOML file, what flags and variables override, and validation. Opens no socket.

A refusal is a `ConfigError` of one line: where the value came from, the key's full name, the value, what is allowed.
"""

import ipaddress
import math
import os
import re
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

from plasm_dht.errors import ConfigError, IdentityError
from plasm_dht.identity import parse_publisher_id

DEFAULT_PORT = 8468
DEFAULT_BOOTSTRAP = (("127.0.0.1", DEFAULT_PORT),)
DEFAULT_RECORD_TTL = 3600.0
# What a holder accepts at most (max_ttl): 7 days.
MAX_RECORD_TTL = 604_800
# More often than this a publisher only floods its neighbours: a lookup alone takes about as long.
MIN_REFRESH_INTERVAL = 0.1
# The pointer with the name, a URL and a version has to fit a record of 1,000 bytes.
MAX_NAME = 100
# A pointer's URL has at most 480 bytes, of which /CHANNEL/ARCH/manifest.json can take 142.
MAX_BASE_URL = 330
# A settings file is a few lines; far above that it is something else, and it is read into memory.
MAX_FILE = 1024 * 1024

Address = tuple[str, int]

_HOST_NAME = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?:\.[A-Za-z0-9_-]{1,63})*\.?")
# RFC 3986, 2, less what starts a query or a fragment.
_URL_WITHOUT_QUERY = re.compile(r"[A-Za-z0-9\-._~:/\[\]@!$&'()*+,;=%]+")
_INTEGER = re.compile(r"[+-]?[0-9]{1,20}")
_NUMBER = re.compile(r"[+-]?(?:[0-9]{1,20}\.?[0-9]{0,20}|\.[0-9]{1,20})(?:[eE][+-]?[0-9]{1,3})?")


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


def load(path: str | os.PathLike[str] | None = None, overrides: Iterable[Override] = ()) -> Settings:
    """The settings in the TOML file at `path`, with the overrides in place of what the file says.

    A later override of the same key beats an earlier one. A relative `artifacts_dir` in the file is relative to the
    folder of the file; one in an override to the working directory. Raises `ConfigError`.
    """
    values: dict[str, _Value] = {}
    if path is not None:
        values = {value.key: value for value in _read_file(Path(path))}
    for value in values.values():
        _KEYS[value.key](value)  # a mistake in the file is one even where the command line hides it
    for override in overrides:
        if override.value is not None:
            if override.key not in _KEYS:
                raise ValueError(f"there is no setting {override.key!r}")
            values[override.key] = _Value(override.key, override.value, override.source, is_text=True)
    checked = {key: _KEYS[key](value) for key, value in values.items()}
    _check_refresh_interval(values, checked)

    def section(table: str) -> dict[str, Any]:  # each value was checked by its own function in _KEYS
        return {key.rpartition(".")[2]: value for key, value in checked.items() if key.rpartition(".")[0] == table}

    return Settings(
        **section("provider"),
        dht=DhtSettings(**section("provider.dht")),
        trust=TrustSettings(**section("trust")),
    )


def parse_address(text: str) -> Address:
    """The (host, port) of `HOST:PORT`; an IPv6 address stands in brackets, `[::1]:8468`.

    Whether a host name has an address is not asked. Raises `ConfigError`.
    """
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        well_formed = ":" in host and _is_host(host)
    else:
        well_formed = ":" not in host and _is_host(host)
    if not colon or not well_formed or not _INTEGER.fullmatch(port) or not 1 <= int(port) <= 65535:
        raise ConfigError(
            f"address {_shown(text)} is not HOST:PORT with a port from 1 to 65535, as in 10.0.0.1:{DEFAULT_PORT}, "
            f"dht.example.net:{DEFAULT_PORT} or [::1]:{DEFAULT_PORT}"
        )
    return host, int(port)


def format_address(address: Address) -> str:
    """`HOST:PORT` of a (host, port), with an IPv6 address in brackets: the inverse of `parse_address`."""
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parse_seconds(text: str, *, source: str, least: float = 0.0, most: float = math.inf) -> float:
    """The number of seconds in the text, from `least` to `most`. Raises `ConfigError` that names `source`."""
    seconds = _number(text, is_text=True)
    if seconds is None or not least <= seconds <= most:
        allowed = f"from {least:g} to {most:.0f}" if math.isfinite(most) else f"of at least {least:g}"
        raise ConfigError(_printable(f"{source}: {_shown(text)}: must be a number of seconds {allowed}"))
    return seconds


@dataclass(frozen=True, slots=True)
class _Value:
    """A value on its way to being checked."""

    key: str
    raw: object
    source: str
    is_text: bool = False
    """It was typed, so that a number is still text; in a file a number is a number."""
    folder: Path | None = None
    """What a relative path is relative to; None: the working directory."""

    def refuse(self, allowed: str, *, raw: object = None) -> NoReturn:
        """Raise the refusal. `raw`: the part of the value that is meant."""
        shown = _shown(self.raw if raw is None else raw)
        raise ConfigError(_printable(f"{self.source}: {self.key} = {shown}: {allowed}"))


def _check_refresh_interval(values: Mapping[str, _Value], checked: Mapping[str, object]) -> None:
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


# --- the checks, one for each kind of value -------------------------------------------------------------------------


def _string(value: _Value) -> str:
    if not isinstance(value.raw, str):
        value.refuse("must be a string")
    return value.raw


def _strings(value: _Value) -> list[str]:
    if not isinstance(value.raw, list | tuple):
        value.refuse("must be a list of strings")
    texts: list[str] = []
    for item in value.raw:
        if not isinstance(item, str):
            value.refuse("must be a string", raw=item)
        texts.append(item)
    return texts


def _name(value: _Value) -> str:
    name = _string(value)
    import unicodedata

    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        size = 0
    if not 1 <= size <= MAX_NAME or any(unicodedata.category(char) == "Cc" for char in name):
        value.refuse(f"must be 1 to {MAX_NAME} bytes of UTF-8 without control characters")
    return name


def _path(value: _Value) -> Path:
    text = _string(value)
    if not text or "\0" in text:
        value.refuse("must be the path of a folder")
    path = Path(text)
    if value.folder is not None:
        try:
            path = value.folder / path.expanduser()
        except RuntimeError:
            value.refuse("must be the path of a folder: the home directory that it names is not known")
    return path


def _host(value: _Value) -> str:
    host = _string(value)
    if not _is_host(host):
        value.refuse("must be an IP address or a host name, without a port")
    return host


def _port(value: _Value) -> int:
    port = value.raw
    if value.is_text and isinstance(port, str) and _INTEGER.fullmatch(port):
        port = int(port)
    if type(port) is not int or not 0 <= port <= 65535:
        value.refuse("must be an integer from 0 to 65535 (0 picks a free port)")
    return port


def _record_ttl(value: _Value) -> float:
    seconds = _number(value.raw, is_text=value.is_text)
    if seconds is None or not 1 <= seconds <= MAX_RECORD_TTL:
        value.refuse(f"must be a number of seconds from 1 to {MAX_RECORD_TTL}")
    return seconds


def _refresh_interval(value: _Value) -> float:
    seconds = _number(value.raw, is_text=value.is_text)
    if seconds is None or seconds < MIN_REFRESH_INTERVAL:
        value.refuse(f"must be a number of seconds from {MIN_REFRESH_INTERVAL} to less than provider.dht.record_ttl")
    return seconds


def _addresses(value: _Value) -> tuple[Address, ...]:
    addresses: list[Address] = []
    for text in _strings(value):
        try:
            addresses.append(parse_address(text))
        except ConfigError:
            value.refuse(
                "must be HOST:PORT with a port from 1 to 65535, and an IPv6 address in brackets, as in "
                f"dht.example.net:{DEFAULT_PORT} or [::1]:{DEFAULT_PORT}",
                raw=text,
            )
    return tuple(dict.fromkeys(addresses))


def _publishers(value: _Value) -> tuple[str, ...]:
    publishers = _strings(value)
    for text in publishers:
        try:
            parse_publisher_id(text)
        except IdentityError:
            value.refuse("must be publisher ids, each ed25519: and 64 lower-case hex digits", raw=text)
    return tuple(dict.fromkeys(publishers))


def _base_url(value: _Value) -> str:
    url = _string(value)
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and parts.hostname and "@" not in parts.netloc and parts.port != 0
    except ValueError:  # a port that is no port, a bracket that is not closed
        valid = False
    if not valid or len(url) > MAX_BASE_URL or not _URL_WITHOUT_QUERY.fullmatch(url):
        value.refuse(
            f"must be http://HOST/... or https://HOST/... of at most {MAX_BASE_URL} characters, percent-encoded, "
            "without user, query or fragment"
        )
    return url.rstrip("/")


_KEYS: dict[str, Callable[[_Value], object]] = {
    "provider.name": _name,
    "provider.artifacts_dir": _path,
    "provider.http_host": _host,
    "provider.http_port": _port,
    "provider.base_url": _base_url,
    "provider.dht.host": _host,
    "provider.dht.port": _port,
    "provider.dht.bootstrap": _addresses,
    "provider.dht.record_ttl": _record_ttl,
    "provider.dht.refresh_interval": _refresh_interval,
    "trust.publishers": _publishers,
}
_TABLES = ("provider", "provider.dht", "trust")


# --- the file -------------------------------------------------------------------------------------------------------


def _read_file(path: Path) -> Iterator[_Value]:
    shown = _printable(str(path))
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
        document = tomllib.loads(data.decode())
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"configuration file {shown} is not UTF-8 (at line {line})") from None
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ConfigError(_printable(f"configuration file {shown} is not valid TOML: {reason}")) from None
    return _flatten(document, "", path, shown)


def _flatten(table: Mapping[str, object], prefix: str, path: Path, shown: str) -> Iterator[_Value]:
    for name, raw in table.items():
        key = prefix + name
        value = _Value(key, raw, shown, folder=path.absolute().parent)
        quoted = "." in name  # "dht.port" = 1 in quotes: it only looks like one of ours
        if key in _TABLES and not quoted:
            if not isinstance(raw, dict):
                value.refuse(f"must be a table: [{key}]")
            yield from _flatten(raw, key + ".", path, shown)
        elif key in _KEYS and not quoted:
            yield value
        else:
            what = "table" if isinstance(raw, dict) else "setting"
            value.refuse(f"there is no such {what}: {_known_keys(key, prefix)}")


def _known_keys(key: str, prefix: str) -> str:
    known = [*_KEYS, *_TABLES]
    same_name = [full for full in known if full.rpartition(".")[2] == key.rpartition(".")[2]]
    import difflib

    near = same_name or difflib.get_close_matches(key, known, n=1)
    if near:
        return f"did you mean {near[0]}?"
    siblings = sorted(full for full in known if full.startswith(prefix) and "." not in full[len(prefix) :])
    return f"allowed here: {', '.join(siblings)}"


# --- text -----------------------------------------------------------------------------------------------------------


def _is_host(host: str) -> bool:
    if ":" in host or re.fullmatch(r"[0-9.]+", host):
        try:
            ipaddress.ip_address(host)
        except ValueError:
            return False
        return True
    return len(host) <= 253 and _HOST_NAME.fullmatch(host) is not None


def _number(raw: object, *, is_text: bool) -> float | None:
    """The finite number, or None."""
    if is_text and isinstance(raw, str) and _NUMBER.fullmatch(raw):
        raw = float(raw)
    if type(raw) is int and abs(raw) < 10**20:
        raw = float(raw)
    return raw if type(raw) is float and math.isfinite(raw) else None


def _shown(value: object) -> str:
    try:
        text = repr(value).lower() if isinstance(value, bool) else repr(value)
    except (ValueError, RecursionError):  # an int of more than 4,300 digits, tables within tables without end
        return f"a {type(value).__name__} too large to show"
    return text if len(text) <= 100 else text[:97] + "..."


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
