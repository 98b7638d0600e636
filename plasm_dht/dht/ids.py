"""Names of nodes: their 20-byte ids and their addresses."""

import functools
import ipaddress
from typing import NamedTuple, TypeGuard

import msgspec

# How an IPv6 socket writes an IPv4 address (RFC 4291, 2.5.5.2).
MAPPED = "::ffff:"
ID_BYTES = 20
# The longest text of an IP address: INET6_ADDRSTRLEN without its NUL.
MAX_IP = 45
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


_encode = msgspec.msgpack.Encoder().encode


def encode_node(node_id: bytes, ip: str, port: int) -> bytes:
    """How the wire names a node: the msgpack array [id, ip, port]."""
    return _encode((node_id, ip, port))


@functools.lru_cache(maxsize=16384)
def is_reachable(ip: str) -> bool:
    """Whether the text is the address of one host: no name, no multicast, no wildcard."""
    try:
        address = ipaddress.ip_address(ip)
    except ValueError:
        return False
    address = getattr(address, "ipv4_mapped", None) or address  # what it is over a socket for both families
    return not (address.is_multicast or address.is_unspecified)


def is_of_use(ip: str) -> bool:
    """Whether what somebody named is the address of one host that others can reach, too."""
    # An IPv6 zone means nothing elsewhere and is arbitrary text: asyncio closes our socket over one with a NUL in it.
    # And of a text of 9 KiB nothing is kept.
    return len(ip) <= MAX_IP and "%" not in ip and is_reachable(ip)


def is_askable(node: NodeTuple) -> bool:
    """Whether a node that somebody named can be asked: an id of 20 bytes, but not the zero id, and an address."""
    return len(node.id) == ID_BYTES and node.id != TRANSIENT_ID and 0 < node.port < 65536 and is_of_use(node.ip)


def plain(ip: str) -> str:
    """The IP address as it is written everywhere else: an IPv4 one without what an IPv6 socket puts before it."""
    return ip.removeprefix(MAPPED) if "." in ip else ip
