"""One value of a setting: what may be written or typed, what the code gets for it, and the words of a refusal."""

import ipaddress
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn
from urllib.parse import urlsplit

from plasm_dht.errors import ConfigError, IdentityError
from plasm_dht.identity import parse_publisher_id
from plasm_dht.text import printable

DEFAULT_PORT = 8468
# What a holder accepts at most (max_ttl): 7 days.
MAX_RECORD_TTL = 604_800
# More often than this a publisher only floods its neighbours: a lookup alone takes about as long.
MIN_REFRESH_INTERVAL = 0.1
# The pointer with the name, a URL and a version has to fit a record of 1,000 bytes.
MAX_NAME = 100
# A pointer's URL has at most 480 bytes, of which /CHANNEL/ARCH/manifest.json can take 142.
MAX_BASE_URL = 330

Address = tuple[str, int]

_HOST_NAME = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?:\.[A-Za-z0-9_-]{1,63})*\.?")
# RFC 3986, 2, less what starts a query or a fragment.
_URL_WITHOUT_QUERY = re.compile(r"[A-Za-z0-9\-._~:/\[\]@!$&'()*+,;=%]+")
# Who logs in, and with which password: a refusal gets into whatever log it goes to.
_LOGIN = re.compile("//.*@")
_INTEGER = re.compile(r"[+-]?[0-9]{1,20}")
_NUMBER = re.compile(r"[+-]?(?:[0-9]{1,20}\.?[0-9]{0,20}|\.[0-9]{1,20})(?:[eE][+-]?[0-9]{1,3})?")


@dataclass(frozen=True, slots=True)
class Given:
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
        raise ConfigError(printable(f"{self.source}: {self.key} = {shown}: {allowed}"))


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
        raise ConfigError(printable(f"{source}: {_shown(text)}: must be a number of seconds {allowed}"))
    return seconds


# --- the checks, one for each kind of value -------------------------------------------------------------------------


def _string(value: Given) -> str:
    if not isinstance(value.raw, str):
        value.refuse("must be a string")
    return value.raw


def _strings(value: Given) -> list[str]:
    if not isinstance(value.raw, list | tuple):
        value.refuse("must be a list of strings")
    texts: list[str] = []
    for item in value.raw:
        if not isinstance(item, str):
            value.refuse("must be a string", raw=item)
        texts.append(item)
    return texts


def _name(value: Given) -> str:
    name = _string(value)
    import unicodedata

    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        size = 0
    if not 1 <= size <= MAX_NAME or any(unicodedata.category(char) == "Cc" for char in name):
        value.refuse(f"must be 1 to {MAX_NAME} bytes of UTF-8 without control characters")
    return name


def _path(value: Given) -> Path:
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


def _host(value: Given) -> str:
    host = _string(value)
    if not _is_host(host):
        value.refuse("must be an IP address or a host name, without a port")
    return host


def _port(value: Given) -> int:
    port = value.raw
    if value.is_text and isinstance(port, str) and _INTEGER.fullmatch(port):
        port = int(port)
    if type(port) is not int or not 0 <= port <= 65535:
        value.refuse("must be an integer from 0 to 65535 (0 picks a free port)")
    return port


def _record_ttl(value: Given) -> float:
    seconds = _number(value.raw, is_text=value.is_text)
    if seconds is None or not 1 <= seconds <= MAX_RECORD_TTL:
        value.refuse(f"must be a number of seconds from 1 to {MAX_RECORD_TTL}")
    return seconds


def _refresh_interval(value: Given) -> float:
    seconds = _number(value.raw, is_text=value.is_text)
    if seconds is None or seconds < MIN_REFRESH_INTERVAL:
        value.refuse(f"must be a number of seconds from {MIN_REFRESH_INTERVAL} to less than provider.dht.record_ttl")
    return seconds


def _addresses(value: Given) -> tuple[Address, ...]:
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


def _publishers(value: Given) -> tuple[str, ...]:
    publishers = _strings(value)
    for text in publishers:
        try:
            parse_publisher_id(text)
        except IdentityError:
            value.refuse("must be publisher ids, each ed25519: and 64 lower-case hex digits", raw=text)
    return tuple(dict.fromkeys(publishers))


def _base_url(value: Given) -> str:
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


CHECKS: dict[str, Callable[[Given], object]] = {
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
    text = _LOGIN.sub("//...@", text)
    return text if len(text) <= 100 else text[:97] + "..."


def toml(value: object) -> str:
    """The value of a setting as a file says it. Raises `ValueError` for what no file can say: a path not in UTF-8."""
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else repr(value)
    if isinstance(value, int):
        return str(value)
    if isinstance(value, tuple):
        return "[" + ", ".join(toml(format_address(each) if isinstance(each, tuple) else each) for each in value) + "]"
    if isinstance(value, Path):
        value = str(value.absolute())
    if not isinstance(value, str) or any("\ud800" <= char <= "\udfff" for char in value):
        raise ValueError(f"{_shown(value)} cannot be written in a TOML file")
    return '"' + "".join(_escaped(char) for char in value) + '"'


def _escaped(char: str) -> str:
    if char in '"\\':
        return "\\" + char
    return char if char.isprintable() else f"\\U{ord(char):08X}"
