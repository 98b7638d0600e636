"""The `PlasmError` tree: everything that a user, a file or the network can cause.

An error's text is one line that names the thing, its value and what would be right. The command line prints it as it
is.
A `TypeError` or a bare `ValueError` from this package is a bug of the caller, anything else is a bug of ours.
"""


class PlasmError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(PlasmError):
    """A setting is unknown, of the wrong type or impossible."""


class IdentityError(PlasmError):
    """A key file or a publisher id cannot be used, or an operation needs an identity and there is none."""


class RecordError(PlasmError, ValueError):
    """A record, a name or a value breaks the contract.

    `reason` is the refusal's name on the wire: `too_large`, `malformed`, `wrong_key`, `clock`, `expired`,
    `ttl_too_long`, `stale`, `unverified`, `bad_signature`, `conflict` or `full`.
    """

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


class ListenError(PlasmError):
    """An address cannot be bound: it is in use, or not of this machine."""


class ResolveError(PlasmError):
    """A host name has no address."""


class ArtifactsError(PlasmError):
    """The artifact folder, or a channel or architecture in it, cannot be served."""


class VerificationError(PlasmError):
    """What was downloaded is not what the signed record promised."""
