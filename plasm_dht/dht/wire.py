"""The shapes of requests and replies, encoded and decoded, and what fits a datagram. docs/wire.md specifies them.

Bytes in, values out: no sockets, no state. A decoder of what the network sent returns `None` for what is not of the
shape. A result is msgpack, ready to be sent behind the header of its response.
"""

import functools
import struct
from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeAlias

import msgspec

from plasm_dht.dht.ids import ID_BYTES, Address, NodeTuple

# The least IPv6 MTU of 1,280 bytes (RFC 8200, section 5) less 40 bytes of IPv6 and 8 of UDP header.
MAX_DATAGRAM = 1232
# Stock nodes send requests of up to 8 KiB and a frame around them.
MAX_READ = 9 * 1024
REQUEST, RESPONSE = b"\x00", b"\x01"
HEADER = 1 + ID_BYTES
# A stock node hands out 20 nodes; what is beyond this many in one reply is not looked at.
MAX_NODES_READ = 40
# Nodes that a reply carries before further records: enough for a lookup to go on (contract, "On the wire").
NODES_FIRST = 4
# Times outside of 1970 to 2200 (Unix ms) are junk; they would also overflow what we compute with them.
MAX_TIME = 7_258_118_400_000

_encode = msgspec.msgpack.Encoder().encode
_DECODE_ERRORS = (msgspec.MsgspecError, RecursionError, UnicodeDecodeError, OverflowError, ValueError)

# A call's outcome, as in rpcudp: whether there was an answer, and what its decoder made of it.
Outcome = tuple[bool, Any]
NO_ANSWER: Outcome = (False, None)

# -- requests --------------------------------------------------------------------------------------------------------

Id = Annotated[bytes, msgspec.Meta(min_length=ID_BYTES, max_length=ID_BYTES)]


class _Request(msgspec.Struct, array_like=True, forbid_unknown_fields=True, frozen=True, gc=False):
    """A request is the array [name, [arguments]]."""


class Ping(_Request, frozen=True, gc=False, tag="ping"):
    """`ping(node_id)`."""

    arguments: tuple[Id]


class Stun(_Request, frozen=True, gc=False, tag="stun"):
    """`stun()`."""

    arguments: tuple[()]


class Store(_Request, frozen=True, gc=False, tag="store"):
    """`store(node_id, key, envelope)`, the last one as it was sent."""

    arguments: tuple[Id, Id, msgspec.Raw]

    def read(self) -> tuple[bytes, bytes, bytes | None]:
        """The arguments; `None` for an envelope that is no bytes, which is not taken apart.

        9 KiB of empty maps would take half a millisecond to make, and are forgotten: a batch of them stopped the node.
        """
        node_id, key, sent = self.arguments
        try:
            return node_id, key, _decode_bytes(sent)
        except _DECODE_ERRORS:
            return node_id, key, None


class FindNode(_Request, frozen=True, gc=False, tag="find_node"):
    """`find_node(node_id, key)`."""

    arguments: tuple[Id, Id]


class Wanted(msgspec.Struct, array_like=True, forbid_unknown_fields=True, frozen=True, gc=False):
    """The arguments of `find_value`; `skip` is how many envelopes the reader has seen."""

    node_id: Id
    key: Id
    skip: Annotated[int, msgspec.Meta(ge=0, lt=2**16)] = 0


class FindValue(_Request, frozen=True, gc=False, tag="find_value"):
    """`find_value(node_id, key)`, and `skip` as a third argument."""

    arguments: Wanted


Request: TypeAlias = Ping | Stun | Store | FindNode | FindValue
_decode_bytes: Callable[[msgspec.Raw], bytes] = msgspec.msgpack.Decoder(bytes).decode
_decode_request: Callable[[bytes | memoryview], Request] = msgspec.msgpack.Decoder(Request).decode


def encode_request(message_id: bytes, name: str, arguments: Sequence[object]) -> bytes:
    """The datagram of a request."""
    return REQUEST + message_id + _encode((name, arguments))


def decode_request(datagram: bytes | memoryview) -> Request | None:
    """The request in a datagram."""
    try:
        return _decode_request(datagram[HEADER:])
    except _DECODE_ERRORS:
        return None


# What nearly all requests are: `find_node` or `find_value` with two arguments. What stands before the node id, and
# before the key.
ID_MARK = b"\xc4" + bytes((ID_BYTES,))
FIND_NODE, FIND_VALUE = (b"\x92" + _encode(name) + b"\x92" + ID_MARK for name in ("find_node", "find_value"))
# By the size of such a datagram what takes it apart: type, message id, what stands before, node id, mark, key.
SPLIT_FIND: dict[int, Callable[[bytes], tuple[bytes, ...]]] = {
    each.size: each.unpack for each in (struct.Struct(f"1s20s{len(head)}s20s2s20s") for head in (FIND_NODE, FIND_VALUE))
}

# Bytes of encoded nodes that a datagram has room for, beside the start of an array.
_NODES_ROOM = MAX_DATAGRAM - HEADER - 3

# -- results that we send --------------------------------------------------------------------------------------------


def response(message_id: bytes, result: bytes) -> bytes:
    """The datagram of a response."""
    return RESPONSE + message_id + result


def id_result(node_id: bytes) -> bytes:
    """The result of `ping`."""
    return _encode(node_id)


def address_result(address: Address) -> bytes:
    """The result of `stun`."""
    return _encode(address)


def stored_result(now: int, reason: str | None = None, held: bytes | None = None) -> bytes:
    """The result of `store`; `now` in Unix ms."""
    return _encode({"ok": reason is None, "reason": reason, "held": held, "now": now})


def fit(names: Sequence[bytes]) -> bool:
    """Whether a datagram has room for all these encoded nodes."""
    return sum(map(len, names)) <= _NODES_ROOM


def nodes_array(names: Sequence[bytes]) -> bytes:
    """The result of `find_node`: these encoded nodes, as many of the first as fit."""
    count = _fitting(names, _NODES_ROOM)
    return b"".join((_array_header(count), *names[:count]))


def found_alone(envelope: bytes, array: bytes) -> bytes | None:
    """As `found_result` of one envelope and all nodes of the array; `None` where a datagram has no room for them."""
    value = _encode(envelope)
    if HEADER + _FOUND_AROUND + len(value) + len(array) > MAX_DATAGRAM:
        return None
    return b"".join((b"\x85\xa5value", value, b"\xa7records\x90\xa5nodes", array, b"\xa4more\xc2\xa3now"))


def found_result(envelopes: Sequence[bytes], names: Sequence[bytes], skip: int = 0) -> bytes:
    """The result of `find_value` where `envelopes` (freshest first) are held, up to where `time_result` follows.

    `names` are encoded nodes, nearest first.
    """
    left = envelopes[skip:]
    value = _encode(left[0] if left else None)
    records = [_encode(envelope) for envelope in left[1:]]
    room = MAX_DATAGRAM - HEADER - _FOUND_AROUND - len(value)
    near = _fitting(names[:NODES_FIRST], room)
    room -= sum(map(len, names[:near]))
    shown = _fitting(records, room)
    room -= sum(map(len, records[:shown]))
    near += _fitting(names[near:], room) if near == NODES_FIRST else 0
    return b"".join(
        (
            b"\x85\xa5value", value, b"\xa7records", _array_header(shown), *records[:shown],
            b"\xa5nodes", _array_header(near), *names[:near], b"\xa4more", _encode(shown < len(records)), b"\xa3now",
        )
    )  # fmt: skip


# What is around the envelopes and nodes of a found result: a map, its keys, two arrays of up to 65,535 items, a bool
# and a time.
_FOUND_AROUND = len(b"\x85\xa5value\xa7records\xa5nodes\xa4more\xa3now") + 2 * 3 + 1 + 9


def time_result(now: int) -> bytes:
    """The end of a found result: our time in Unix ms."""
    return b"\xcf" + now.to_bytes(8) if now >= 2**32 else _encode(now)


@functools.lru_cache(maxsize=64)
def _array_header(count: int) -> bytes:
    """The start of a msgpack array of so many items."""
    return bytes((0x90 + count,)) if count < 16 else b"\xdc" + count.to_bytes(2)


def _fitting(items: Sequence[bytes], room: int) -> int:
    """How many of the first items fit `room` bytes together."""
    if sum(map(len, items)) <= room:
        return len(items)
    for count, item in enumerate(items):
        room -= len(item)
        if room < 0:
            return count
    return len(items)


# -- replies that we get ---------------------------------------------------------------------------------------------


class Found(msgspec.Struct, frozen=True, gc=False):
    """A reply to `find_value` or `find_node`.

    The envelopes are unverified, and the nodes may be nonsense (`ids.is_askable`); `more` tells that there are other
    envelopes; `now` is the answerer's clock in Unix ms.
    """

    envelopes: list[bytes]
    nodes: list[NodeTuple]
    more: bool = False
    now: int | None = None


class Stored(msgspec.Struct, frozen=True, gc=False):
    """A reply to `store`: whether it was accepted, else why not and what is held instead; the holder's clock (ms)."""

    ok: bool
    reason: str | None = None
    held: bytes | None = None
    now: int | None = None


class _FoundMap(msgspec.Struct, gc=False):
    value: Any
    records: list[Any] = []
    nodes: list[NodeTuple] = []
    more: Any = False
    now: Any = None


class _StoredMap(msgspec.Struct, gc=False):
    ok: Any = None
    reason: Any = None
    held: Any = None
    now: Any = None


_decode_id = msgspec.msgpack.Decoder(Id).decode
_decode_address = msgspec.msgpack.Decoder(tuple[str, int]).decode
_decode_found = msgspec.msgpack.Decoder(list[NodeTuple] | _FoundMap).decode
_decode_stored = msgspec.msgpack.Decoder(bool | _StoredMap).decode


def read_id(datagram: bytes | memoryview) -> bytes | None:
    """The id in a response to `ping`."""
    try:
        return _decode_id(datagram[HEADER:])
    except _DECODE_ERRORS:
        return None


def read_address(datagram: bytes | memoryview) -> Address | None:
    """The (ip, port) in a response to `stun`."""
    try:
        return _decode_address(datagram[HEADER:])
    except _DECODE_ERRORS:
        return None


def read_found(datagram: bytes | memoryview) -> Found | None:
    """What is in a response to `find_value` or `find_node`."""
    try:
        found = _decode_found(datagram[HEADER:])
    except _DECODE_ERRORS:
        return None
    if isinstance(found, list):
        return Found([], found[:MAX_NODES_READ])
    envelopes = [item for item in (found.value, *found.records[:MAX_NODES_READ]) if type(item) is bytes]
    return Found(envelopes, found.nodes[:MAX_NODES_READ], found.more is True, _time(found.now))


def read_stored(datagram: bytes | memoryview) -> Stored | None:
    """What is in a response to `store`, of ours or of a stock node."""
    try:
        stored = _decode_stored(datagram[HEADER:])
    except _DECODE_ERRORS:
        return None
    if isinstance(stored, bool):
        return Stored(stored)
    reason, held = stored.reason, stored.held
    return Stored(
        stored.ok is True,
        reason if type(reason) is str and len(reason) < 32 and reason.isidentifier() else None,
        held if type(held) is bytes else None,
        _time(stored.now),
    )


READERS = {
    "ping": read_id,
    "stun": read_address,
    "find_node": read_found,
    "find_value": read_found,
    "store": read_stored,
}


def _time(now: object) -> int | None:
    return now if type(now) is int and 0 < now < MAX_TIME else None
