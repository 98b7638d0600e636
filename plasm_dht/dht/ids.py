"""Names of nodes: their 20-byte ids and their addresses."""

import functools
import ipaddress
from typing import NamedTuple, TypeGuard

ID_BYTES = 20
# The id of a caller that will not stay.
TRANSIENT_ID = bytes(ID_BYTES)

# IP address and UDP port.
Address = tuple[str, int]


class NodeTuple(NamedTuple):
    """A node as the wire names it: its 20-byte id, its IP address and its port."""

    id: bytes
    ip: str
    port: int


def is_id(value: object) -> TypeGuard[bytes]:
    """Whether the value is a node's id or a key: 20 bytes."""
    return type(value) is bytes and len(value) == ID_BYTES


@functools.lru_cache(maxsize=16384)
def is_reachable(ip: str) -> bool:
    """Whether the text is the address of one host: no name, no multicast, no wildcard."""
    try:
        address = ipaddress.ip_address(ip)
    except ValueError:
        return False
    return not (address.is_multicast or address.is_unspecified)
