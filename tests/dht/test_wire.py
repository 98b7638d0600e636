"""The shapes on the wire: byte-identical to rpcudp and umsgpack, never above one datagram, deaf to nonsense."""

import datetime
from typing import Any

import msgspec
import pytest
import umsgpack
from hypothesis import given
from hypothesis import strategies as st

from plasm_dht.dht import wire
from plasm_dht.dht.ids import NodeTuple, is_reachable
from plasm_dht.dht.wire import Found, Stored
from tests.dht.support import HERE, START

ids = st.binary(min_size=20, max_size=20)
ports = st.integers(1, 65535)
ips = st.one_of(st.ip_addresses(v=4).map(str), st.ip_addresses(v=6).map(str))
nodes = st.builds(NodeTuple, ids, ips, ports)
envelopes = st.binary(min_size=69, max_size=1000)
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(), st.text(), st.binary(max_size=1000)
)
carried = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20)
anything = st.recursive(
    scalars | st.datetimes(timezones=st.just(datetime.UTC)),
    lambda inner: (
        st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=4) | st.integers(-9, 9), inner, max_size=4)
    ),
    max_leaves=20,
)


# -- frames ----------------------------------------------------------------------------------------------------------


@given(ids, st.sampled_from(["ping", "stun", "store", "find_node", "find_value"]), st.lists(carried, max_size=4))
def test_a_request_has_the_bytes_that_rpcudp_sends(message_id: bytes, name: str, arguments: list[Any]) -> None:
    frame = wire.encode_request(message_id, name, arguments)
    assert frame == b"\x00" + message_id + umsgpack.packb([name, tuple(arguments)])


@given(ids, carried)
def test_a_response_has_the_bytes_that_rpcudp_sends(message_id: bytes, result: Any) -> None:
    assert wire.encode_response(message_id, result) == b"\x01" + message_id + umsgpack.packb(result)


@given(ids, st.lists(carried.filter(lambda value: value == value), max_size=4))
def test_what_rpcudp_sends_is_read(message_id: bytes, arguments: list[Any]) -> None:
    request = wire.decode_request(b"\x00" + message_id + umsgpack.packb(["store", tuple(arguments)]))
    assert request is not None
    assert repr(request) == repr(("store", arguments))
    response = wire.decode_response(b"\x01" + message_id + umsgpack.packb(arguments))
    assert repr(response) == repr(arguments)


@given(st.binary(max_size=300))
def test_arbitrary_bytes_never_raise(data: bytes) -> None:
    for frame in (data, bytes(21) + data, bytes(21) + b"\x92\xa4ping" + data):
        request = wire.decode_request(frame)
        assert request is None or (type(request[0]) is str and type(request[1]) is list)
        wire.parse_found(wire.decode_response(frame))
        wire.parse_stored(wire.decode_response(frame))


@pytest.mark.parametrize(
    "content",
    [b"", b"\xc1", b"\x81\x80\x01", b"\xa2\xff\xfe", b"\x91" * 9000 + b"\xc0", b"\xdd\xff\xff\xff\xff", b"\x01\x01",
     b"\xdf\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xc7\x0c\xff" + b"\xff" * 12, b"\xd7\xff" + b"\xff" * 8],
    ids=["nothing", "reserved", "map as key", "bad UTF-8", "deep", "endless array", "trailing", "endless map",
         "endless text", "time 96", "time 64"],
)  # fmt: skip
def test_hostile_msgpack_is_nothing(content: bytes) -> None:
    assert wire.decode_response(bytes(21) + content) is None
    assert wire.decode_request(bytes(21) + content) is None
    assert wire.decode_request(bytes(21) + b"\x92\xa4ping\x91" + content) is None


@pytest.mark.parametrize(
    "content", [["ping"], ["ping", [], 1], ["ping", {}], [b"ping", []], [1, []], {"ping": []}, None]
)
def test_a_request_is_a_name_and_a_list_of_arguments(content: Any) -> None:
    assert wire.decode_request(bytes(21) + umsgpack.packb(content)) is None
    assert wire.decode_request(bytes(21) + umsgpack.packb(["ping", [1]])) == ("ping", [1])


# -- what fits -------------------------------------------------------------------------------------------------------


def encoded(reply: object) -> bytes:
    frame = wire.encode_response(bytes(20), reply)
    assert len(frame) <= 1232
    return frame


def order_of(envelopes: list[bytes], near: list[NodeTuple], now: int, skip: int) -> dict[str, Any]:
    """What the contract says a reply holds, by the simplest of ways: add one thing after another while it fits."""
    left = envelopes[skip:]
    reply: dict[str, Any] = {"value": left[0] if left else None, "records": [], "nodes": [], "more": False, "now": now}
    for items, where in ((near[:4], "nodes"), (left[1:], "records"), (near[4:], "nodes")):
        for item in items:
            reply[where].append(item)
            if len(wire.encode_response(bytes(20), reply)) > 1232:
                reply[where].pop()
                break
    reply["more"] = 1 + len(reply["records"]) < len(left)
    return reply


@given(st.lists(envelopes, max_size=34), st.lists(nodes, max_size=21), st.integers(1, 2**63), st.integers(0, 40))
def test_every_reply_to_find_value_fits_a_datagram(
    held: list[bytes], near: list[NodeTuple], now: int, skip: int
) -> None:
    reply: Any = wire.found_reply(held, near, now, skip)
    encoded(reply)
    left = held[skip:]
    assert reply["value"] == (left[0] if left else None)
    assert reply["records"] == left[1 : 1 + len(reply["records"])]
    assert reply["more"] is (len(reply["records"]) + 1 < len(left))
    assert reply["now"] == now
    assert reply["nodes"][:4] == near[: len(reply["nodes"][:4])]
    expected = order_of(held, near, now, skip)
    assert len(reply["nodes"][:4]) == len(expected["nodes"][:4])
    if all(len(each) >= 240 for each in left):  # few enough that no header grows
        assert len(expected["records"]) - len(reply["records"]) in (0, 1)


@given(st.lists(nodes, max_size=60))
def test_every_list_of_nodes_fits_a_datagram(near: list[NodeTuple]) -> None:
    reply = wire.nodes_reply(near)
    frame = encoded(reply)
    assert reply == near[: len(reply)]
    if len(reply) < len(near):
        assert len(frame) + 1 + 22 + 2 + len(near[len(reply)].ip) + 3 > 1232 - 3 - 4 * len(reply)


NEAR = [NodeTuple(bytes([n]) * 20, f"203.0.113.{n}", 8468) for n in range(1, 21)]


def test_twenty_nodes_fit_one_datagram() -> None:
    assert len(wire.nodes_reply(NEAR)) == 20


def test_a_reply_is_filled_in_the_order_of_the_contract() -> None:
    small = [bytes([n]) * 100 for n in range(8)]
    everything: Any = wire.found_reply(small[:2], NEAR[:6], START)
    assert everything == {
        "value": small[0], "records": [small[1]], "nodes": NEAR[:6], "more": False,
        "now": START,
    }  # fmt: skip
    records_first: Any = wire.found_reply(small, NEAR, START)
    assert records_first["records"] == small[1:]
    assert 4 < len(records_first["nodes"]) < 20
    for size, nodes_there in ((265, 9), (330, 4)):  # of which a record more, or a node less, would be another order
        crowded: Any = wire.found_reply([bytes([n]) * size for n in range(8)], NEAR, START)
        assert (len(crowded["records"]), len(crowded["nodes"])) == (2, nodes_there)
        assert crowded["more"]
    largest: Any = wire.found_reply([bytes(1000), bytes(1000)], NEAR, START)
    assert largest["value"] == bytes(1000)
    assert largest["records"] == []
    assert 1 <= len(largest["nodes"]) <= 4
    assert largest["more"]


def test_no_envelope_is_ever_skipped_over() -> None:
    held = [bytes(100), bytes([1]) * 1000, bytes([2]) * 100]
    reply: Any = wire.found_reply(held, [], START)
    assert reply["records"] == held[1:2]
    reply = wire.found_reply([bytes(600), bytes([1]) * 1000, bytes([2]) * 100], [], START)
    assert reply["records"] == []  # the third fits, the second does not: a reader skips by count
    assert reply["more"]


@given(st.lists(envelopes, min_size=1, max_size=32), st.lists(nodes, max_size=20))
def test_a_reader_that_skips_sees_every_envelope(held: list[bytes], near: list[NodeTuple]) -> None:
    seen: list[bytes] = []
    for _ in range(40):
        found = wire.parse_found(wire.decode_response(encoded(wire.found_reply(held, near, START, len(seen)))))
        assert found is not None
        seen += found.envelopes
        if not found.more:
            break
    assert seen == held


def test_a_reply_to_store_with_the_largest_envelope_fits() -> None:
    encoded(wire.stored_reply(2**63, "ttl_too_long", bytes(1000)))
    request = wire.encode_request(bytes(20), "store", (bytes(20), bytes(20), bytes(1000)))
    assert len(request) <= 1232


# -- what is read ----------------------------------------------------------------------------------------------------


@given(anything)
def test_parsing_arbitrary_values_never_raises(value: Any) -> None:
    for each in (value, {"value": value}, {"value": b"", "records": value, "nodes": [], "now": value, "more": value},
                 {"value": b"", "nodes": value}, [value], [[value] * 3], [[bytes(20), value, value]],
                 {"ok": value, "reason": value, "held": value, "now": value}):  # fmt: skip
        found = wire.parse_found(each)
        assert found is None or all(type(envelope) is bytes for envelope in found.envelopes)
        stored = wire.parse_stored(each)
        assert stored is None or stored.held is None or type(stored.held) is bytes
        wire.parse_nodes(each)
        read = wire.decode_response(bytes(21) + msgspec.msgpack.encode(each))
        assert wire.parse_found(read) is None or found is not None


@given(st.lists(nodes, max_size=20))
def test_nodes_come_back(near: list[NodeTuple]) -> None:
    parsed = wire.parse_nodes([list(node) for node in near])
    askable = [NodeTuple(*node) for node in near if is_reachable(node[1]) and node[0] != bytes(20)]
    assert parsed == askable


ID = b"\x01" * 20


@pytest.mark.parametrize(
    "node",
    [
        (ID, HERE, 0), (ID, HERE, 65536), (ID, HERE, -1),
        (ID, "0.0.0.0", 1), (ID, "::", 1), (ID, "224.0.0.1", 1), (ID, "ff02::1", 1),
        (ID, "localhost", 1), (ID, "", 1), (ID, "1.2.3", 1), (ID, "1.2.3.4\x00", 1), (ID, "1.2.3.4 ", 1),
        (ID, "fe80::1%eth0", 1), (ID, "fe80::1%\x00", 1), (ID, "fe80::1%\u2024", 1),
        (bytes(20), HERE, 1), (ID[1:], HERE, 1), (ID + b"x", HERE, 1),
    ],
)  # fmt: skip
def test_a_node_that_nobody_could_ask_is_left_out(node: tuple[bytes, str, int]) -> None:
    assert wire.parse_nodes([list(node), [ID, HERE, 1]]) == [NodeTuple(ID, HERE, 1)]


@pytest.mark.parametrize(
    "value",
    [None, 1, "x", b"x", {}, {"a": 1},
     [["AQEBAQEBAQEBAQEBAQEBAQEBAQE=", HERE, 1]], [1], [[ID, HERE]], [[ID, HERE, 1, 1]], [["x" * 20, HERE, 1]],
     [[ID, b"127.0.0.1", 1]], [[ID, HERE, True]], [[ID, HERE, 1.0]], [[ID, HERE, "1"]]],
)  # fmt: skip
def test_what_is_no_list_of_nodes_is_nothing(value: Any) -> None:
    assert wire.parse_nodes(value) is None


def test_no_more_than_40_nodes_of_a_reply_are_looked_at() -> None:
    assert len(wire.parse_nodes([[ID, HERE, 1]] * 1000) or []) == 40


def test_a_found_reply_of_ours_and_of_a_stock_node_is_read() -> None:
    ours: Any = wire.found_reply([b"a", b"b"], NEAR[:1], START)
    assert wire.parse_found(wire.decode_response(encoded(ours))) == Found([b"a", b"b"], NEAR[:1], False, START)
    assert wire.parse_found({"value": b"a"}) == Found([b"a"], [])
    assert wire.parse_found({"value": "text"}) == Found([], [])
    assert wire.parse_found([list(NEAR[0])]) == Found([], NEAR[:1])
    assert wire.parse_found([]) == Found([], [])
    assert wire.parse_found({}) is None
    assert wire.parse_found({"value": b"a", "nodes": 1}) is None
    assert wire.parse_found({"value": b"a", "records": 1}) is None
    assert wire.parse_found(True) is None


def test_a_stored_reply_of_ours_and_of_a_stock_node_is_read() -> None:
    assert wire.parse_stored(True) == Stored(True)
    assert wire.parse_stored(False) == Stored(False)
    assert wire.parse_stored(wire.stored_reply(START)) == Stored(True, None, None, START)
    assert wire.parse_stored(wire.stored_reply(START, "stale", b"h")) == Stored(False, "stale", b"h", START)
    assert wire.parse_stored({"ok": 1, "reason": "x" * 40, "held": "x", "now": 1.5}) == Stored(False)
    assert wire.parse_stored({"ok": True, "reason": "no\nword"}) == Stored(True)
    for nonsense in (None, 1, 0, b"", "True", []):
        assert wire.parse_stored(nonsense) is None


@pytest.mark.parametrize("now", [0, -1, 2**63, 7_258_118_400_000, 1.0, "1", True, None])
def test_a_time_that_cannot_be_is_no_time(now: Any) -> None:
    stored = wire.parse_stored({"ok": True, "now": now})
    assert stored is not None
    assert stored.now is None
