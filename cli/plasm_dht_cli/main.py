"""The console script: it picks the command and turns what went wrong into one line and an exit code."""

import gc
import importlib
import os
import sys
from typing import Annotated

import typer

from plasm_dht.errors import PlasmError
from plasm_dht_cli import exits
from plasm_dht_cli.output import OutputClosedError, complain, emit

# typer up to 0.25 raises click's exceptions, later ones their own copy of them; BadParameter is exported by all.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]

# The commands in the order of --help; the module of this name has an `add_to(app)`. Only the one that is asked for is
# imported: `plasm-dht get` runs on machines that boot.
COMMANDS = ("serve", "get", "fetch", "publish", "watch", "status", "node", "key", "config")

_HELP = (
    "Signed, expiring records on a Kademlia DHT: machines that boot find the newest manifest without a central server."
)
_EPILOG = """\b
Two terminals on one machine:
  plasm-dht serve --artifacts DIR
  plasm-dht get stable/arm64
Exit codes: 0 done; 1 not found; 2 wrong usage or configuration; 3 no DHT node
answered; 4 verification failed. Results go to stdout, all else to stderr.
"""


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        emit(f"plasm-dht {version('plasm-dht')}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def _application(arguments: list[str]) -> typer.Typer:
    """The application with the one command that the arguments name; if they start with anything else, with all.

    So it is for completion, too: a shell that asks what could come next gives no arguments.
    """
    named = [name for name in COMMANDS if name in arguments[:1]]
    app = typer.Typer(
        help=_HELP, epilog=_EPILOG, rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=not named
    )
    app.callback()(_options)
    for command in named or COMMANDS:
        importlib.import_module(f"plasm_dht_cli.{command}").add_to(app)
    return app


def main() -> None:
    """Run the command line and leave with the contract's exit code."""
    code = run(sys.argv[1:])
    # The interpreter collects garbage several times as it ends, for a tenth of the time of `plasm-dht get`; the memory
    # is given back with the process anyway.
    gc.freeze()
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Run one command. The exit code; only a bug of ours raises."""
    try:
        command = typer.main.get_command(_application(arguments))
        result = command(arguments, prog_name="plasm-dht", standalone_mode=False)
        _flush()
    except OutputClosedError:
        return _give_up_stdout()
    except PlasmError as error:
        complain(str(error))
        return exits.exit_code(error)
    except _UsageError as error:
        complain(_usage(error, arguments))
        return exits.USAGE
    except (KeyboardInterrupt, typer.Abort):
        return exits.INTERRUPTED
    except OSError as error:  # a disk that is full, a folder that is not ours: the machine's matter, not a bug
        complain(str(error))
        return exits.USAGE
    return result if isinstance(result, int) else exits.DONE


def _usage(error: Exception, arguments: list[str]) -> str:
    message = error.format_message() if hasattr(error, "format_message") else str(error)
    context = getattr(error, "ctx", None)
    named = [word for word in arguments[:1] if word in COMMANDS]  # without a context click knows no command
    command = context.command_path if context is not None else " ".join(["plasm-dht", *named])
    return f"{message.rstrip('.')}: see {command} --help"


def _flush() -> None:
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        raise OutputClosedError from None


def _give_up_stdout() -> int:
    # the interpreter flushes stdout once more when it ends, and would complain
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return exits.OUTPUT_CLOSED
