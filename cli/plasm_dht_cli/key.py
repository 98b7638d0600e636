"""`plasm-dht key show` and `plasm-dht key new`: the identity that signs records."""

import os
from typing import Annotated

import typer

from plasm_dht.errors import IdentityError
from plasm_dht_cli.options import IdentityFile, StateDir, identity_path, option
from plasm_dht_cli.output import emit

_commands = typer.Typer(
    help="The identity: the Ed25519 key pair that signs records, and the publisher id that readers trust.",
    epilog="""\b
Example:
  plasm-dht key new && plasm-dht key show
""",
    rich_markup_mode=None,
)

_SHOW_EXAMPLE = """\b
Example:
  plasm-dht get stable/arm64 --trust "$(plasm-dht key show)"
Exit codes: 0 shown; 2 wrong usage, there is no key file, or it is a bad one.
"""
_NEW_EXAMPLE = """\b
Example:
  plasm-dht key new --identity /etc/plasm-dht/identity.pem
Exit codes: 0 made; 2 wrong usage, the file exists or cannot be written.
"""

Force = Annotated[bool, option("--force", help="Replace the key that is there: its publisher id is lost for good.")]


def add_to(app: typer.Typer) -> None:
    """Make them commands of the application."""
    app.add_typer(_commands, name="key", short_help="Show or make the identity that signs records.")


@_commands.command(epilog=_SHOW_EXAMPLE)
def show(identity: IdentityFile = None, state_dir: StateDir = None) -> None:
    """Print the publisher id, alone, on stdout. Creates nothing."""
    from plasm_dht.identity import read_publisher_id

    path = identity_path(identity, state_dir)
    try:
        emit(read_publisher_id(path))  # a service's key, too, that belongs to the service's user
    except FileNotFoundError:
        raise IdentityError(
            f"there is no key file {path}: make one with 'plasm-dht key new', or name it with --identity"
        ) from None


@_commands.command(epilog=_NEW_EXAMPLE)
def new(identity: IdentityFile = None, state_dir: StateDir = None, force: Force = False) -> None:
    """Create a key pair and print its publisher id on stdout. Never overwrites a key unless told to."""
    from plasm_dht.identity import Identity

    path = identity_path(identity, state_dir)
    if os.path.exists(path) and not force:  # noqa: PTH110  # where we may not look, Path.exists raises
        raise IdentityError(
            f"key file {path} exists: name another one with --identity, or replace it with --force "
            "(readers that trust its publisher id then have to be told the new one)"
        )
    emit(Identity.create(path, replace=force).publisher_id)
