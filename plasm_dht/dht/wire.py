"""The shapes of requests and replies, encoded and decoded, and what fits a datagram. docs/wire.md specifies them.

Bytes in, values out: no sockets, no state. A decoder of what the network sent returns `None` for what is not of the
shape.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from plasm_dht.dht.ids import ID_BYTES, TRANSIENT_ID, NodeTuple, is_reachable

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

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder().decode
_decode_request = msgspec.msgpack.Decoder(tuple[str, list[Any]]).decode
_DECODE_ERRORS = (msgspec.MsgspecError, RecursionError, UnicodeDecodeError, OverflowError, ValueError)

# A call's outcome, as in rpcudp: whether there was an answer, and its result.
Outcome = tuple[bool, Any]
NO_ANSWER: Outcome = (False, None)
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Found:
    """A reply to `find_value` or `find_node`.

    The envelopes are unverified; `more` tells that there are others; `now` is the answerer's clock in Unix ms.
    """

    envelopes: list[bytes]
    nodes: list[NodeTuple]
    more: bool = False
    now: int | None = None


@dataclass(frozen=True, slots=True)
class Stored:
    """A reply to `store`: whether it was accepted, else why not and what is held instead; the holder's clock (ms)."""

    ok: bool
    reason: str | None = None
    held: bytes | None = None
    now: int | None = None


def encode_request(message_id: bytes, name: str, arguments: Sequence[object]) -> bytes:
    """The datagram of a request."""
    return REQUEST + message_id + _encode((name, arguments))


def encode_response(message_id: bytes, result: object) -> bytes:
    """The datagram of a response."""
    return RESPONSE + message_id + _encode(result)


def decode_request(datagram: bytes) -> tuple[str, list[Any]] | None:
    """The name and the arguments of a request."""
    try:
        return _decode_request(memoryview(datagram)[HEADER:])
    except _DECODE_ERRORS:
        return None


def decode_response(datagram: bytes) -> Any:
    """The result in a response; `None` also for a result of nil, which no request has."""
    try:
        return _decode(memoryview(datagram)[HEADER:])
    except _DECODE_ERRORS:
        return None


def parse_nodes(value: object) -> list[NodeTuple] | None:
    """The nodes in a reply, without those that nobody could ask."""
    try:
        named = msgspec.convert(value, list[tuple[bytes, str, int]], builtin_types=(bytes,))  # else text is base64
    except msgspec.ValidationError:
        return None
    # An IPv6 zone means nothing elsewhere and is arbitrary text: asyncio closes our socket over one with a NUL in it.
    return [
        NodeTuple(node_id, ip, port)
        for node_id, ip, port in named[:MAX_NODES_READ]
        if len(node_id) == ID_BYTES
        and 0 < port < 65536
        and node_id != TRANSIENT_ID
        and "%" not in ip
        and is_reachable(ip)
    ]


def parse_found(reply: object) -> Found | None:
    """A reply to `find_value` or `find_node`."""
    if isinstance(reply, list):
        nodes = parse_nodes(reply)
        return None if nodes is None else Found([], nodes)
    if not isinstance(reply, dict) or "value" not in reply:
        return None
    nodes = parse_nodes(reply.get("nodes", []))
    records = reply.get("records", [])
    if nodes is None or not isinstance(records, list):
        return None
    envelopes = [item for item in [reply["value"], *records[:MAX_NODES_READ]] if type(item) is bytes]
    return Found(envelopes, nodes, reply.get("more") is True, _parse_now(reply))


def parse_stored(reply: object) -> Stored | None:
    """A reply to `store`, of ours or of a stock node."""
    if reply is True or reply is False:
        return Stored(reply)
    if not isinstance(reply, dict):
        return None
    reason, held = reply.get("reason"), reply.get("held")
    return Stored(
        reply.get("ok") is True,
        reason if type(reason) is str and len(reason) < 32 and reason.isidentifier() else None,
        held if type(held) is bytes else None,
        _parse_now(reply),
    )


def stored_reply(now: int, reason: str | None = None, held: bytes | None = None) -> dict[str, object]:
    """The result of `store`."""
    return {"ok": reason is None, "reason": reason, "held": held, "now": now}


def nodes_reply(nodes: Iterable[NodeTuple]) -> list[NodeTuple]:
    """The result of `find_node`: as many nodes as fit a datagram, the farthest left out."""
    return _fitting(list(nodes), _node_size, MAX_DATAGRAM - HEADER - 3)


def found_reply(envelopes: Sequence[bytes], nodes: Iterable[NodeTuple], now: int, skip: int = 0) -> dict[str, object]:
    """The result of `find_value` where `envelopes` (freshest first) are held; `nodes` nearest first."""
    left = list(envelopes[skip:])
    near = list(nodes)
    reply: dict[str, Any] = {"value": left[0] if left else None, "records": [], "nodes": [], "more": True, "now": now}
    # 4: the two arrays' headers may grow by two bytes each
    room = MAX_DATAGRAM - HEADER - len(_encode(reply)) - 4
    reply["nodes"] = _fitting(near[:NODES_FIRST], _node_size, room)
    room -= sum(map(_node_size, reply["nodes"]))
    reply["records"] = _fitting(left[1:], _envelope_size, room)
    room -= sum(map(_envelope_size, reply["records"]))
    reply["nodes"] += _fitting(near[NODES_FIRST:], _node_size, room)
    reply["more"] = 1 + len(reply["records"]) < len(left)
    return reply


def _fitting(items: Sequence[_T], size: Callable[[_T], int], room: int) -> list[_T]:
    """The first items whose encodings fit `room` bytes together."""
    if sum(map(size, items)) <= room:
        return list(items)
    for count, item in enumerate(items):
        room -= size(item)
        if room < 0:
            return list(items[:count])
    return list(items)


def _node_size(node: NodeTuple) -> int:
    """Bytes of an encoded node, at most: an array, 20 bytes of id, the IP address, a port of up to two bytes."""
    return 1 + (2 + ID_BYTES) + (2 + len(node.ip)) + 3


def _envelope_size(envelope: bytes) -> int:
    """Bytes of an encoded envelope, at most."""
    return 3 + len(envelope)


def _parse_now(reply: dict[Any, Any]) -> int | None:
    now = reply.get("now")
    # A time outside of 1970 to 2200 is junk; it would also overflow what we compute with it.
    return now if type(now) is int and 0 < now < 7_258_118_400_000 else None
