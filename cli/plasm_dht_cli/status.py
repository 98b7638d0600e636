"""`plasm-dht status`: what a running provider advertises, as its own HTTP server tells it."""

import json
import logging
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

import typer

from plasm_dht.errors import ConfigError, PlasmError
from plasm_dht_cli import exits, logs, options
from plasm_dht_cli.options import option
from plasm_dht_cli.output import complain, emit, printable

EXAMPLE = """\b
Examples:
  plasm-dht status
  plasm-dht status --url http://10.0.0.7:8080 --json
Exit codes: 0 it answered; 1 no provider answered there; 2 wrong usage.
"""

DEFAULT_URL = "http://127.0.0.1:8080"
DEFAULT_TIMEOUT = "5"
# A provider of a thousand channels says less than half of that (bytes).
MAX_ANSWER = 4 * 2**20

Url = Annotated[
    str | None,
    option(
        "--url",
        metavar="URL",
        callback=options.not_empty,
        help=f"Where the provider's HTTP server is. Default: {DEFAULT_URL}.",
    ),
]
Timeout = Annotated[
    str | None,
    option(
        "--timeout",
        metavar="SECONDS",
        callback=options.not_empty,
        help=f"How long it may take. Default: {DEFAULT_TIMEOUT}.",
    ),
]
Json = Annotated[bool, option("--json", help="Print the provider's answer itself, a JSON object on one line.")]

_COLUMNS = ("RECORD", "VERSION", "SEQ", "REFRESH IN", "EXPIRES IN", "HOLDERS")


class NoProviderError(PlasmError):
    """Nobody is there who answers as a provider does."""


def add_to(app: typer.Typer) -> None:
    """Make it a command of the application."""
    app.command("status", short_help="Show what a running provider advertises.", epilog=EXAMPLE)(status)


def status(
    ctx: typer.Context,
    url: Url = None,
    timeout: Timeout = None,
    as_json: Json = False,
    log_format: options.LogFormat = None,
    verbose: options.Verbose = 0,
    quiet: options.Quiet = False,
) -> None:
    """Show what a running provider advertises: each record, its seq, when it is refreshed and expires, its holders.

    It asks the provider's HTTP server, by default that of this machine; one that runs with --no-http cannot be asked.
    """
    logs.set_up(log_format=log_format, verbose=verbose, quiet=quiet, usual=logging.WARNING)

    from plasm_dht.config import parse_seconds

    within = parse_seconds(timeout or DEFAULT_TIMEOUT, source=options.source_of(ctx, "timeout"), least=0.1)
    base = _check_url(url or DEFAULT_URL, options.source_of(ctx, "url"))
    try:
        lines = list(_lines(_ask(f"{base}/status", within), as_json=as_json))
    except NoProviderError as error:
        complain(f"no provider answers at {base}/status: {error}: name a running provider's HTTP server with --url")
        raise typer.Exit(exits.NOT_FOUND) from None
    for line in lines:
        emit(line)


def _check_url(url: str, source: str) -> str:
    from urllib.parse import urlsplit

    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    authority = url.partition("://")[2].partition("/")[0]
    if "@" in authority:  # not quoted: a password in it would get into whatever log this goes to
        raise ConfigError(f"{source}: it has a user, but status logs in nowhere: name a host and a port alone")
    if not usable or not url.isascii() or not url.isprintable() or " " in url or parts.query or parts.fragment:
        raise ConfigError(f"{source}: {url!r}: must be http:// or https://, a host and a port, as in {DEFAULT_URL}")
    return url.rstrip("/")


def _ask(url: str, timeout: float) -> dict[str, Any]:
    """The object at the URL. Raises `NoProviderError`."""
    outcome: list[dict[str, Any] | str] = []
    # A server that sends a byte now and then never runs into the timeout of a socket, but into this one.
    thread = threading.Thread(target=lambda: outcome.append(_fetch(url, timeout)), daemon=True)
    thread.start()
    thread.join(timeout)
    result = outcome[0] if outcome else f"no answer within {timeout:g} s"
    if isinstance(result, str):
        raise NoProviderError(result)
    return result


def _fetch(url: str, timeout: float) -> dict[str, Any] | str:
    """The object, or why there is none."""
    from http.client import HTTPException
    from urllib import request
    from urllib.error import HTTPError, URLError

    opener = request.OpenerDirector()  # that of urllib follows a redirect to FTP, and asks proxies
    for handler in (
        request.HTTPHandler,
        request.HTTPSHandler,
        request.HTTPDefaultErrorHandler,
        request.HTTPErrorProcessor,
        request.HTTPRedirectHandler,
        request.UnknownHandler,
    ):
        opener.add_handler(handler())
    try:
        with opener.open(url, timeout=timeout) as response:
            answer = json.loads(response.read(MAX_ANSWER))
    except HTTPError as error:
        error.close()
        return f"HTTP {error.code}"
    except URLError as error:
        return str(getattr(error.reason, "strerror", None) or error.reason)
    except OSError as error:
        return error.strerror or str(error)
    except HTTPException as error:
        return f"no HTTP: {type(error).__name__}"
    except (ValueError, RecursionError):
        return "what it sent is not JSON"
    records = answer.get("records") if isinstance(answer, dict) else None
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        return "what it sent is not the status of a provider"
    return dict(answer)


def _lines(answer: Mapping[str, Any], *, as_json: bool) -> Iterable[str]:
    """What is printed. Raises `NoProviderError`."""
    try:
        yield from [json.dumps(answer)] if as_json else map(printable, _table(answer))
    except RecursionError:  # so deep that it could just be read, in a thread that had called little before
        raise NoProviderError("what it sent is not the status of a provider") from None


def _table(status: Mapping[str, Any]) -> Iterable[str]:
    """The lines for people."""
    yield f"{_text(status, 'name')} ({_text(status, 'publisher')})"
    yield (
        f"DHT {_text(status, 'dht')}, HTTP {_text(status, 'http')}, neighbours {_text(status, 'neighbours')}, "
        f"records held {_text(status, 'records_held')}"
    )
    rows = [_row(record) for record in status["records"]]
    yield ""
    if not rows:
        yield "It advertises nothing."
        return
    widths = [max(len(row[column]) for row in [_COLUMNS, *rows]) for column in range(len(_COLUMNS))]
    for row in [_COLUMNS, *rows]:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _row(record: Mapping[str, Any]) -> Sequence[str]:
    if "seq" not in record:
        return (_text(record, "key"), _text(record, "version"), "-", "not published yet", "-", "-")
    return (
        _text(record, "key"),
        _text(record, "version"),
        _text(record, "seq"),
        _duration(record.get("refresh_in"), "now"),
        _duration(record.get("ttl_remaining"), "expired"),
        _text(record, "holders"),
    )


def _text(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name)
    return "-" if value is None else printable(str(value))


def _duration(seconds: object, over: str) -> str:
    """`1 h 2 min`, `39 min 58 s`, `7 s`; what it is when there is nothing left."""
    if not isinstance(seconds, int | float) or not 0 < seconds < 10**9:
        return over
    whole = int(seconds)
    for size, unit, smaller, part in ((3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // smaller} {part}"
    return f"{whole} s"
