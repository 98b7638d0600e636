"""`plasm-dht fetch`: download the newest manifest and its artifacts, and verify them."""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from plasm_dht.errors import ConfigError
from plasm_dht_cli import asking, exits, logs, options
from plasm_dht_cli.options import option
from plasm_dht_cli.output import complain, emit, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rich.progress import TaskID

    from plasm_dht.config import Settings
    from plasm_dht.provider.fetch import Progress
    from plasm_dht.record import Record

    Report = Callable[[Progress], None]

EXAMPLE = """\b
Examples:
  plasm-dht fetch stable/arm64 -o /srv/tftp/arm64
  plasm-dht fetch stable/arm64 -o . --trust ed25519:0123...
Exit codes: 0 all of it is there; 1 no live record, or nobody serves what it
promises now; 2 wrong usage, or the folder cannot be used; 3 no DHT node
answered; 4 what is served is not what was signed.
"""

_log = logging.getLogger(__name__)

Output = Annotated[
    str | None,
    option(
        "--output",
        "-o",
        metavar="DIR",
        help="The folder to download into, made when there is none. What is there and right is not downloaded again. "
        "Required.",
    ),
]


def add_to(app: typer.Typer) -> None:
    """Make it a command of the application."""
    short_help = "Download and verify the files of CHANNEL/ARCH."
    app.command("fetch", cls=options.Command, short_help=short_help, epilog=EXAMPLE)(fetch)


def fetch(
    ctx: typer.Context,
    target: asking.Target,
    output: Output = None,
    trust: options.Trust = None,
    wait: asking.Wait = None,
    timeout: asking.Timeout = None,
    bootstrap: options.Bootstrap = None,
    config: options.Config = None,
    log_format: options.LogFormat = None,
    verbose: options.Verbose = 0,
    quiet: options.Quiet = False,
) -> None:
    """Download the newest manifest of CHANNEL/ARCH and its files, verified, and print the path of manifest.json.

    Every file is checked against the signed record. manifest.json is written last: where it is, all of it is. What a
    run that was interrupted left as NAME.part is gone on with. When a publisher is gone or serves something else, the
    next one is tried.
    """
    logs.set_up(log_format=log_format, verbose=verbose, quiet=quiet, usual=logging.WARNING)
    terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    bars = terminal and not verbose and not quiet and log_format != "json"
    if not verbose and not quiet and not bars:
        _log.setLevel(logging.INFO)  # a line a file, without the DHT's own

    from plasm_dht.provider.manifest import check_target

    check_target(target)
    for_attempt, for_all = asking.times_of(ctx, timeout, wait)
    if not output:
        raise ConfigError("there is no folder to download into: name it with -o DIR or PLASM_DHT_OUTPUT")
    settings = asking.settings_of(ctx)

    from plasm_dht_cli import loop

    with _bars() if bars else contextlib.nullcontext(_line) as report:
        code, text = loop.run(_fetch(target, output, settings, report, for_attempt=for_attempt, for_all=for_all))
    if code == exits.DONE:
        emit(text)
    else:
        complain(text)
    raise typer.Exit(code)


async def _fetch(
    target: str, output: str, settings: "Settings", report: "Report", *, for_attempt: float, for_all: float
) -> tuple[int, str]:
    """The exit code, and the path of the manifest or what went wrong."""
    from plasm_dht import PlasmServer
    from plasm_dht.provider import fetch as client
    from plasm_dht.provider.manifest import record_name

    joined = answered = False

    async with PlasmServer(node_id=bytes(20)) as server:  # the id of a caller that will not stay

        async def find() -> "Sequence[Record]":
            nonlocal joined, answered
            if joined:  # the freshest was not to be had: now everybody's, and nothing to join or wait for
                return await server.get_records(
                    record_name(target), trust=settings.trust.publishers or None, timeout=for_attempt
                )
            found, answered = await asking.search(
                server, target, settings, for_attempt=for_attempt, for_all=for_all, every=False
            )
            joined = True
            return [record for record, _ in found]

        await asking.listen(server)
        try:
            fetched = await client.fetch(target, output, find=find, now=server.now, progress=report)
        except client.UnavailableError as error:
            if answered:
                return exits.NOT_FOUND, str(error)
            return exits.NO_NODE, asking.nobody_answered(settings)
    manifest, publisher = fetched.manifest, fetched.record.publisher
    _log.info("%s: version %s of %s, %d files", target, manifest.version, publisher, len(manifest.artifacts))
    return exits.DONE, str(fetched.path)


def _line(progress: "Progress") -> None:
    """One line for a file that is done."""
    if progress.state == "verified":
        _log.info("%s: %d bytes, verified", progress.filename, progress.size)
    elif progress.state == "present":
        _log.info("%s: %d bytes, verified, was here", progress.filename, progress.size)


@contextlib.contextmanager
def _bars() -> "Iterator[Report]":
    """A bar a file on the terminal; log lines go above them."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Display

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[state]}", markup=False),
    )
    tasks: dict[str, TaskID] = {}
    with Display(*columns, console=Console(stderr=True), redirect_stdout=False) as display, _logging_to_stderr():

        def report(progress: "Progress") -> None:
            name = printable(progress.filename)
            if name not in tasks:
                tasks[name] = display.add_task(name, total=progress.size, state="")
            display.update(tasks[name], completed=progress.done, total=progress.size, state=progress.state)

        yield report


@contextlib.contextmanager
def _logging_to_stderr() -> Iterator[None]:
    """Log to what `sys.stderr` is now: while there are bars, what prints above them."""
    handlers = [each for each in logging.getLogger().handlers if isinstance(each, logging.StreamHandler)]
    streams = [handler.stream for handler in handlers]
    for handler in handlers:
        handler.setStream(sys.stderr)
    try:
        yield
    finally:
        for handler, stream in zip(handlers, streams, strict=True):
            handler.setStream(stream)
