"""The set-up of logging: to stderr, as text or as JSON. No message, and no exception's, can forge a second line."""

import logging
import sys
from datetime import UTC, datetime
from types import TracebackType
from typing import TextIO

from plasm_dht.errors import ConfigError
from plasm_dht_cli.output import printable

# The base libraries warn about every datagram that nobody answered, which on a DHT is everyday life.
_NOISY = ("kademlia", "rpcudp")
_OURS = ("plasm_dht", "plasm_dht_cli")

_log = logging.getLogger(__name__)


class TextFormatter(logging.Formatter):
    """`2026-01-31T12:00:00.000Z INFO plasm_dht.dht.server: message`; lines of a traceback are indented."""

    def format(self, record: logging.LogRecord) -> str:
        """The entry's lines, joined."""
        lines = [f"{_time(record)} {record.levelname} {record.name}: {printable(record.getMessage())}"]
        if record.exc_info:
            lines += ["    " + printable(line) for line in self.formatException(record.exc_info).splitlines()]
        return "\n".join(lines)


class JsonFormatter(logging.Formatter):
    """One object a line: `time` (RFC 3339, UTC), `level`, `logger`, `message`, and `exception` when there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """The entry's line."""
        import json

        entry = {
            "time": _time(record),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry)  # plain ASCII: control characters and line separators are escaped


def set_up(*, log_format: str | None, verbose: int, quiet: bool, usual: int) -> None:
    """Log to stderr at the level `usual`, or at another one if `-v` (DEBUG) or `-q` (ERROR) was given.

    With `-v` twice the libraries' messages are logged too. Without it a service, whose `usual` level is below WARNING,
    says of each kind of line ten a minute (`LimitedHandler`). Raises `ConfigError` for what cannot be asked for.
    """
    if verbose and quiet:
        raise ConfigError("--verbose and --quiet: only one of them can be given")
    level = logging.DEBUG if verbose else logging.ERROR if quiet else usual
    handler = _handler(limited=usual < logging.WARNING and not verbose)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    everything = verbose > 1
    logging.basicConfig(handlers=[handler], level=level if everything else max(level, logging.WARNING), force=True)
    logging.raiseExceptions = False  # a reader of stderr that has gone is no reason for a traceback
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.DEBUG if everything else logging.CRITICAL)
    for name in _OURS:
        logging.getLogger(name).setLevel(level)
    sys.excepthook = _log_bug


def _handler(*, limited: bool) -> "logging.StreamHandler[TextIO]":
    if not limited:
        return logging.StreamHandler()
    from plasm_dht_cli.log_limit import LimitedHandler  # imports asyncio, which what only prints does without

    return LimitedHandler()


def _log_bug(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """What ends the process goes through the log: the interpreter would print an exception's text as it is."""
    if issubclass(kind, Exception):
        _log.critical("a bug of plasm-dht ended it", exc_info=(kind, error, traceback))
    else:
        sys.__excepthook__(kind, error, traceback)


def _time(record: logging.LogRecord) -> str:
    moment = datetime.fromtimestamp(record.created, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
