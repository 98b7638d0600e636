"""What a node serves over HTTP at this moment, and what it has answered: plain values that know no HTTP library."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from plasm_dht.provider.artifacts import ArtifactSet


@dataclass(frozen=True, slots=True)
class Page:
    """What is served of one `CHANNEL/ARCH`: files and the manifest that describes them."""

    artifacts: ArtifactSet
    manifest: bytes


# What is asked for.
KINDS = ("manifest", "artifact", "ipxe", "health", "status", "metrics", "gateway", "page", "unknown")


def _no_answers() -> Counter[tuple[str, str]]:
    return Counter({(kind, f"{status}xx"): 0 for kind in KINDS for status in (2, 3, 4, 5)})


@dataclass(slots=True)
class Traffic:
    """What was answered so far: requests, bytes of bodies, and requests by (one of `KINDS`, class of the status)."""

    requests: int = 0
    sent: int = 0
    answers: Counter[tuple[str, str]] = field(default_factory=_no_answers)


@dataclass(slots=True)
class Site:
    """What the provider serves at this moment. It changes the fields as it likes; the application only reads them.

    Attributes:
        name: the provider's name, for people.
        pages: by `CHANNEL/ARCH`.
        address: (host, port) that is bound, once it is.
        status: what `/status` answers.
        health: what `/health` answers: a reason why the provider is not well, or None.
        traffic: what the application has answered; it counts here itself.
        metrics: (content type, body) of what `/metrics` answers to an `Accept` header, or None: it is not served.
    """

    name: str = "plasm-dht"
    pages: Mapping[str, Page] = field(default_factory=dict)
    status: Callable[[], dict[str, object]] = dict
    health: Callable[[], str | None] = lambda: None
    traffic: Traffic = field(default_factory=Traffic)
    metrics: Callable[[str], tuple[str, bytes]] | None = None
    address: tuple[str, int] | None = None
