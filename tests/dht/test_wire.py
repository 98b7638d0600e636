"""The shapes on the wire: byte-identical to rpcudp and umsgpack, never above one datagram, deaf to nonsense."""

import datetime
import sys
from typing import Any

import msgspec
import pytest
import umsgpack
from hypothesis import given
from hypothesis import strategies as st

from plasm_dht.dht import wire
from plasm_dht.dht.ids import NodeTuple, encode_node, is_askable
from plasm_dht.dht.wire import Found, Stored
from tests.dht.support import HERE, START

ids = st.binary(min_size=20, max_size=20)
ports = st.integers(1, 65535)
ips = st.one_of(st.ip_addresses(v=4).map(str), st.ip_addresses(v=6).map(str))
nodes = st.builds(NodeTuple, ids, ips, ports)
envelopes = st.binary(min_size=69, max_size=1000)
times = st.integers(0, wire.MAX_TIME - 1)
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


ID = b"\x01" * 20


def encoded(near: list[NodeTuple]) -> list[bytes]:
    return [encode_node(*node) for node in near]


# -- frames ----------------------------------------------------------------------------------------------------------


@given(ids, st.sampled_from(["ping", "stun", "store", "find_node", "find_value"]), st.lists(carried, max_size=4))
def test_a_request_has_the_bytes_that_rpcudp_sends(message_id: bytes, name: str, arguments: list[Any]) -> None:
    frame = wire.encode_request(message_id, name, arguments)
    assert frame == b"\x00" + message_id + umsgpack.packb([name, tuple(arguments)])


@given(ids, st.booleans(), st.one_of(st.none(), st.text(max_size=31)), st.one_of(st.none(), envelopes), times)
def test_a_response_has_the_bytes_that_rpcudp_sends(
    message_id: bytes, ok: bool, reason: str | None, held: bytes | None, now: int
) -> None:
    stored = {"ok": reason is None, "reason": reason, "held": held, "now": now}
    for result, value in (
        (wire.id_result(message_id), message_id),
        (wire.address_result((HERE, 8468)), (HERE, 8468)),
        (wire.stored_result(now, reason, held), stored),
    ):
        assert wire.response(message_id, result) == b"\x01" + message_id + umsgpack.packb(value)


@given(st.lists(nodes, max_size=40))
def test_a_list_of_nodes_has_the_bytes_of_umsgpack(near: list[NodeTuple]) -> None:
    message_id = bytes(range(20))
    datagram = wire.response(message_id, wire.nodes_array(encoded(near)))
    listed = umsgpack.unpackb(datagram[21:])
    assert datagram == b"\x01" + message_id + umsgpack.packb([tuple(node) for node in near[: len(listed)]])


@given(st.lists(envelopes, max_size=34), st.lists(nodes, max_size=21), times, st.integers(0, 40))
def test_what_was_found_has_the_bytes_of_umsgpack(
    held: list[bytes], near: list[NodeTuple], now: int, skip: int
) -> None:
    result = wire.found_result(held, encoded(near), skip) + wire.time_result(now)
    assert result == umsgpack.packb(umsgpack.unpackb(result))


REQUESTS = {
    "ping": wire.Ping, "stun": wire.Stun, "store": wire.Store, "find_node": wire.FindNode, "find_value": wire.FindValue,
}  # fmt: skip


@given(ids, st.sampled_from(sorted(REQUESTS)), ids, ids, carried.filter(lambda value: value == value))
def test_what_rpcudp_sends_is_read(message_id: bytes, name: str, caller: bytes, key: bytes, value: Any) -> None:
    arguments = {"ping": (caller,), "stun": (), "store": (caller, key, value)}.get(name, (caller, key))
    request = wire.decode_request(b"\x00" + message_id + umsgpack.packb([name, arguments]))
    assert type(request) is REQUESTS[name]
    if isinstance(request, wire.FindValue):
        assert request.arguments == wire.Wanted(caller, key, 0)
    elif isinstance(request, wire.Store):
        assert request.read() == (caller, key, value if type(value) is bytes else None)
    else:
        assert repr(request.arguments) == repr(arguments)


def test_what_is_to_be_stored_and_cannot_be_an_envelope_is_not_taken_apart() -> None:
    junk = [{} for _ in range(9000)]
    datagram = b"\x00" + bytes(20) + umsgpack.packb(["store", [bytes(20), bytes(20), junk]])
    before = sys.getallocatedblocks()
    request = wire.decode_request(datagram)
    assert isinstance(request, wire.Store)
    assert request.read() == (bytes(20), bytes(20), None)
    assert sys.getallocatedblocks() - before < 1000


@given(st.binary(max_size=300))
def test_arbitrary_bytes_never_raise(data: bytes) -> None:
    for frame in (data, bytes(21) + data, bytes(21) + b"\x92\xa4ping" + data):
        request = wire.decode_request(frame)
        assert request is None or type(request) in REQUESTS.values()
        for read in wire.READERS.values():
            read(frame)


@pytest.mark.parametrize(
    "content",
    [b"", b"\xc1", b"\x81\x80\x01", b"\xa2\xff\xfe", b"\x91" * 9000 + b"\xc0", b"\xdd\xff\xff\xff\xff", b"\x01\x01",
     b"\xdf\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xc7\x0c\xff" + b"\xff" * 12, b"\xd7\xff" + b"\xff" * 8],
    ids=["nothing", "reserved", "map as key", "bad UTF-8", "deep", "endless array", "trailing", "endless map",
         "endless text", "time 96", "time 64"],
)  # fmt: skip
def test_hostile_msgpack_is_nothing(content: bytes) -> None:
    for read in wire.READERS.values():
        assert read(bytes(21) + content) is None
    assert wire.decode_request(bytes(21) + content) is None
    assert wire.decode_request(bytes(21) + b"\x92\xa4ping\x91" + content) is None


@pytest.mark.parametrize(
    "content", [["ping"], ["ping", [ID], 1], ["ping", {}], [b"ping", [ID]], [1, [ID]], {"ping": [ID]}, None]
)
def test_a_request_is_a_name_and_a_list_of_arguments(content: Any) -> None:
    assert wire.decode_request(bytes(21) + umsgpack.packb(content)) is None
    assert wire.decode_request(bytes(21) + umsgpack.packb(["ping", [ID]])) == wire.Ping((ID,))


# -- what fits -------------------------------------------------------------------------------------------------------


def read_back(result: bytes) -> Any:
    """The result as a stock node reads it."""
    assert len(wire.response(bytes(20), result)) <= 1232
    return umsgpack.unpackb(result)


def found(held: list[bytes], near: list[NodeTuple], now: int = START, skip: int = 0) -> Any:
    reply = read_back(wire.found_result(held, encoded(near), skip) + wire.time_result(now))
    return reply | {"nodes": [NodeTuple(*node) for node in reply["nodes"]]}


def named(near: list[NodeTuple]) -> list[NodeTuple]:
    datagram = wire.response(bytes(20), wire.nodes_array(encoded(near)))
    return [NodeTuple(*node) for node in read_back(datagram[21:])]


def order_of(envelopes: list[bytes], near: list[NodeTuple], now: int, skip: int) -> dict[str, Any]:
    """What the contract says a reply holds, by the simplest of ways: add one thing after another while it fits."""
    left = envelopes[skip:]
    reply: dict[str, Any] = {"value": left[0] if left else None, "records": [], "nodes": [], "more": False, "now": now}
    for items, where in ((near[:4], "nodes"), (left[1:], "records"), (near[4:], "nodes")):
        for item in items:
            reply[where].append(item)
            if 21 + len(umsgpack.packb(reply)) > 1232:
                reply[where].pop()
                break
    reply["more"] = 1 + len(reply["records"]) < len(left)
    return reply


@given(st.lists(envelopes, max_size=34), st.lists(nodes, max_size=21), st.integers(2**40, 2**42), st.integers(0, 40))
def test_every_reply_to_find_value_fits_a_datagram(
    held: list[bytes], near: list[NodeTuple], now: int, skip: int
) -> None:
    reply = found(held, near, now, skip)
    left = held[skip:]
    assert reply["value"] == (left[0] if left else None)
    assert reply["records"] == left[1 : 1 + len(reply["records"])]
    assert reply["more"] is (len(reply["records"]) + 1 < len(left))
    assert reply["now"] == now
    assert reply["nodes"] == near[: len(reply["nodes"])]
    expected = order_of(held, near, now, skip)
    if all(len(each) >= 240 for each in left):  # few enough that no header grows
        assert len(expected["records"]) - len(reply["records"]) in (0, 1)
        assert len(expected["nodes"][:4]) - len(reply["nodes"][:4]) in (0, 1)


@given(envelopes, st.lists(nodes, max_size=40), st.integers(2**40, 2**42))
def test_a_reply_with_one_envelope_has_the_bytes_of_umsgpack_and_all_nodes_that_fit(
    envelope: bytes, near: list[NodeTuple], now: int
) -> None:
    def packed(count: int) -> bytes:
        named = [tuple(node) for node in near[:count]]
        return umsgpack.packb({"value": envelope, "records": [], "nodes": named, "more": False, "now": now})

    result = wire.found_result([envelope], encoded(near)) + wire.time_result(now)
    count = len(umsgpack.unpackb(result)["nodes"])
    assert result == packed(count)
    assert 21 + len(result) <= 1232
    assert count == len(near) or 21 + len(packed(count + 1)) > 1232 - 4  # room is kept for longer headers


@given(envelopes, st.lists(nodes, max_size=24), st.integers(2**40, 2**42))
def test_one_envelope_and_all_nodes_are_as_any_other_answer_where_they_fit(
    envelope: bytes, near: list[NodeTuple], now: int
) -> None:
    result = wire.found_result([envelope], encoded(near)) + wire.time_result(now)
    alone = wire.found_alone(envelope, wire.nodes_array(encoded(near)))
    if alone is None:
        assert 21 + len(result) > 1232 - 80  # there was no room for another node, or for the last of these
    else:
        assert wire.fit(encoded(near))
        assert alone + wire.time_result(now) == result


@pytest.mark.parametrize("count", [0, 15, 16, 20])
def test_one_envelope_and_all_nodes_are_sent_up_to_the_last_byte_of_a_datagram_and_no_further(count: int) -> None:
    near = [NodeTuple(bytes([number]) * 20, HERE, 8468) for number in range(count)]
    array, last = wire.nodes_array(encoded(near)), 0
    for size in range(1300):
        alone = wire.found_alone(bytes(size), array)
        if alone is not None:
            last = 21 + len(alone + wire.time_result(START))
    assert 1232 - 8 < last <= 1232  # room is kept for longer headers


def test_nodes_fit_up_to_the_last_byte() -> None:
    room = 1232 - 21 - 3
    assert wire.fit([bytes(room - 40), bytes(40)])
    assert not wire.fit([bytes(room - 40), bytes(41)])


@given(st.lists(nodes, max_size=60))
def test_every_list_of_nodes_fits_a_datagram(near: list[NodeTuple]) -> None:
    reply = named(near)
    assert reply == near[: len(reply)]
    assert wire.fit(encoded(near)) is (len(reply) == len(near))
    if len(reply) < len(near):
        sizes = [len(encode_node(*node)) for node in near]
        assert 21 + 3 + sum(sizes[: len(reply) + 1]) > 1232


NEAR = [NodeTuple(bytes([n]) * 20, f"203.0.113.{n}", 8468) for n in range(1, 21)]


def test_twenty_nodes_fit_one_datagram() -> None:
    assert len(named(NEAR)) == 20


def test_a_reply_is_filled_in_the_order_of_the_contract() -> None:
    small = [bytes([n]) * 100 for n in range(8)]
    everything = found(small[:2], NEAR[:6], START)
    assert everything == {
        "value": small[0], "records": [small[1]], "nodes": NEAR[:6], "more": False,
        "now": START,
    }  # fmt: skip
    records_first = found(small, NEAR, START)
    assert records_first["records"] == small[1:]
    assert 4 < len(records_first["nodes"]) < 20
    for size, nodes_there in ((265, 9), (330, 4)):  # of which a record more, or a node less, would be another order
        crowded = found([bytes([n]) * size for n in range(8)], NEAR, START)
        assert (len(crowded["records"]), len(crowded["nodes"])) == (2, nodes_there)
        assert crowded["more"]
    largest = found([bytes(1000), bytes(1000)], NEAR, START)
    assert largest["value"] == bytes(1000)
    assert largest["records"] == []
    assert 1 <= len(largest["nodes"]) <= 4
    assert largest["more"]


def test_no_envelope_is_ever_skipped_over() -> None:
    held = [bytes(100), bytes([1]) * 1000, bytes([2]) * 100]
    reply = found(held, [], START)
    assert reply["records"] == held[1:2]
    reply = found([bytes(600), bytes([1]) * 1000, bytes([2]) * 100], [], START)
    assert reply["records"] == []  # the third fits, the second does not: a reader skips by count
    assert reply["more"]


@given(st.lists(envelopes, min_size=1, max_size=32), st.lists(nodes, max_size=20))
def test_a_reader_that_skips_sees_every_envelope(held: list[bytes], near: list[NodeTuple]) -> None:
    seen: list[bytes] = []
    for _ in range(40):
        result = wire.found_result(held, encoded(near), len(seen)) + wire.time_result(START)
        reply = wire.read_found(wire.response(ID, result))
        assert reply is not None
        seen += reply.envelopes
        if not reply.more:
            break
    assert seen == held


# Lists whose sizes are every one around the bound: what is drawn by chance does not hit it.
def test_no_list_of_nodes_is_one_byte_too_long() -> None:
    for length in range(2, 46):
        named([NodeTuple(ID, "1" * length, 65535)] * 60)


@pytest.mark.parametrize(("others", "near"), [(0, 0), (0, 20), (12, 0), (12, 20)])
def test_no_reply_to_find_value_is_one_byte_too_long(others: int, near: int) -> None:
    for length in range(1, 1001):
        found([bytes(length), *[bytes(100)] * others], [NodeTuple(ID, "1" * 45, 65535)] * near)


def test_a_reply_to_store_with_the_largest_envelope_fits() -> None:
    read_back(wire.stored_result(2**63, "ttl_too_long", bytes(1000)))
    request = wire.encode_request(bytes(20), "store", (bytes(20), bytes(20), bytes(1000)))
    assert len(request) <= 1232


# -- what is read ----------------------------------------------------------------------------------------------------


def response_of(value: object) -> bytes:
    return bytes(21) + msgspec.msgpack.encode(value)


@given(anything)
def test_reading_arbitrary_values_never_raises(value: Any) -> None:
    for each in (value, {"value": value}, {"value": b"", "records": value, "nodes": [], "now": value, "more": value},
                 {"value": b"", "nodes": value}, [value], [[value] * 3], [[bytes(20), value, value]],
                 {"ok": value, "reason": value, "held": value, "now": value}):  # fmt: skip
        reply = wire.read_found(response_of(each))
        assert reply is None or all(type(envelope) is bytes for envelope in reply.envelopes)
        assert reply is None or all(type(node) is NodeTuple for node in reply.nodes)
        stored = wire.read_stored(response_of(each))
        assert stored is None or stored.held is None or type(stored.held) is bytes
        assert type(wire.read_id(response_of(each))) in (bytes, type(None))
        assert type(wire.read_address(response_of(each))) in (tuple, type(None))


@given(st.lists(nodes, max_size=20))
def test_nodes_come_back(near: list[NodeTuple]) -> None:
    assert wire.read_found(response_of(near)) == Found([], near)


@pytest.mark.parametrize(
    "node",
    [
        (ID, HERE, 0), (ID, HERE, 65536), (ID, HERE, -1),
        (ID, "0.0.0.0", 1), (ID, "::", 1), (ID, "224.0.0.1", 1), (ID, "ff02::1", 1),
        (ID, "::ffff:224.0.0.1", 1), (ID, "::ffff:0.0.0.0", 1), (ID, "::ffff:e000:1", 1),
        (ID, "localhost", 1), (ID, "", 1), (ID, "1.2.3", 1), (ID, "1.2.3.4\x00", 1), (ID, "1.2.3.4 ", 1),
        (ID, "fe80::1%eth0", 1), (ID, "fe80::1%\x00", 1), (ID, "fe80::1%\u2024", 1),
        (bytes(20), HERE, 1), (ID[1:], HERE, 1), (ID + b"x", HERE, 1),
    ],
)  # fmt: skip
def test_a_node_that_nobody_could_ask_is_told_from_others(node: tuple[bytes, str, int]) -> None:
    assert not is_askable(NodeTuple(*node))
    assert is_askable(NodeTuple(ID, HERE, 1))
    assert is_askable(NodeTuple(ID, "fe80::1", 65535))


@pytest.mark.parametrize(
    "value",
    [None, 1, "x", b"x", {}, {"a": 1},
     [["AQEBAQEBAQEBAQEBAQEBAQEBAQE=", HERE, 1]], [1], [[ID, HERE]], [[ID, HERE, 1, 1]], [["x" * 20, HERE, 1]],
     [[ID, b"127.0.0.1", 1]], [[ID, HERE, True]], [[ID, HERE, 1.0]], [[ID, HERE, "1"]]],
)  # fmt: skip
def test_what_is_no_list_of_nodes_is_nothing(value: Any) -> None:
    assert wire.read_found(response_of(value)) is None


def test_no_more_than_40_nodes_of_a_reply_are_looked_at() -> None:
    for reply in ([[ID, HERE, 1]] * 1000, {"value": None, "nodes": [[ID, HERE, 1]] * 1000}):
        found = wire.read_found(response_of(reply))
        assert found is not None
        assert len(found.nodes) == 40


def test_a_found_reply_of_ours_and_of_a_stock_node_is_read() -> None:
    result = wire.found_result([b"a", b"b"], encoded(NEAR[:1])) + wire.time_result(START)
    assert wire.read_found(wire.response(ID, result)) == Found([b"a", b"b"], NEAR[:1], False, START)
    assert wire.read_found(response_of({"value": b"a"})) == Found([b"a"], [])
    assert wire.read_found(response_of({"value": "text"})) == Found([], [])
    assert wire.read_found(response_of([list(NEAR[0])])) == Found([], NEAR[:1])
    assert wire.read_found(response_of([])) == Found([], [])
    for nonsense in ({}, {"value": b"a", "nodes": 1}, {"value": b"a", "records": 1}, True):
        assert wire.read_found(response_of(nonsense)) is None


def test_a_stored_reply_of_ours_and_of_a_stock_node_is_read() -> None:
    assert wire.read_stored(response_of(True)) == Stored(True)
    assert wire.read_stored(response_of(False)) == Stored(False)
    assert wire.read_stored(wire.response(ID, wire.stored_result(START))) == Stored(True, None, None, START)
    refused = wire.response(ID, wire.stored_result(START, "stale", b"h"))
    assert wire.read_stored(refused) == Stored(False, "stale", b"h", START)
    odd = {"ok": 1, "reason": "x" * 40, "held": "x", "now": 1.5}
    assert wire.read_stored(response_of(odd)) == Stored(False)
    assert wire.read_stored(response_of({"ok": True, "reason": "no\nword"})) == Stored(True)
    for nonsense in (None, 1, 0, b"", "True", []):
        assert wire.read_stored(response_of(nonsense)) is None


@pytest.mark.parametrize("now", [0, -1, 2**63, 7_258_118_400_000, 1.0, "1", True, None])
def test_a_time_that_cannot_be_is_no_time(now: Any) -> None:
    stored = wire.read_stored(response_of({"ok": True, "now": now}))
    assert stored is not None
    assert stored.now is None
