"""Signed, expiring records on a Kademlia DHT: found while their publisher lives, gone when it stops."""

from plasm_dht.dht.publish import Publication
from plasm_dht.dht.server import PlasmServer
from plasm_dht.dht.storage import RecordStorage
from plasm_dht.errors import PlasmError
from plasm_dht.identity import Identity
from plasm_dht.record import Record

__all__ = ["Identity", "PlasmError", "PlasmServer", "Publication", "Record", "RecordStorage"]
