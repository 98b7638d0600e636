"""Signed, expiring records on a Kademlia DHT: found while their publisher lives, gone when it stops."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from plasm_dht.dht.intent import Publication as Publication
    from plasm_dht.dht.observe import Event as Event
    from plasm_dht.dht.server import PlasmServer as PlasmServer
    from plasm_dht.dht.storage import RecordStorage as RecordStorage
    from plasm_dht.errors import PlasmError as PlasmError
    from plasm_dht.identity import Identity as Identity
    from plasm_dht.record import Record as Record

# Where each name is. It is loaded when it is first used, so that `plasm-dht key` need not load a DHT.
_HOMES = {
    "Event": "plasm_dht.dht.observe",
    "Identity": "plasm_dht.identity",
    "PlasmError": "plasm_dht.errors",
    "PlasmServer": "plasm_dht.dht.server",
    "Publication": "plasm_dht.dht.intent",
    "Record": "plasm_dht.record",
    "RecordStorage": "plasm_dht.dht.storage",
}

__all__ = ["Event", "Identity", "PlasmError", "PlasmServer", "Publication", "Record", "RecordStorage"]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value: object = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
