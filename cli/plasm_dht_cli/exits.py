"""The exit codes of the contract, and which error has which."""

from plasm_dht.errors import PlasmError, VerificationError

DONE = 0
NOT_FOUND = 1
USAGE = 2
NO_NODE = 3
VERIFICATION_FAILED = 4
# What a shell reports for a process that SIGINT or SIGPIPE has ended: 128 and the signal's number.
INTERRUPTED = 130
OUTPUT_CLOSED = 141


def exit_code(error: PlasmError) -> int:
    """The exit code of an error that ended a command."""
    return VERIFICATION_FAILED if isinstance(error, VerificationError) else USAGE
