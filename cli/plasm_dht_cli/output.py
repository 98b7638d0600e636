"""What goes to stdout and stderr: results line by line, one-line errors, and text that cannot pretend to be more."""

import sys

from plasm_dht.errors import PlasmError
from plasm_dht.text import printable as printable


class OutputClosedError(Exception):
    """Whoever read our stdout has gone. Not an `OSError`, which typer would swallow on the way."""


class OutputError(PlasmError):
    """Stdout takes nothing more: it is a file on a disk that is full, or a terminal that has gone."""


def emit(line: str) -> None:
    """Print one line of the result, at once. Raises `OutputClosedError`, `OutputError`."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        raise OutputClosedError from None
    except OSError as error:
        raise OutputError(f"stdout cannot be written to: {error.strerror}") from None


def complain(text: str) -> None:
    """Print the one line of an error to stderr; never raises for want of a reader."""
    try:
        print(f"plasm-dht: error: {printable(text)}", file=sys.stderr, flush=True)
    except (OSError, ValueError):
        return
