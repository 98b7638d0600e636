"""The signed record: its bytes, its rules, and which of two wins."""

import datetime
import itertools
from typing import Any

import msgspec
import pytest
import umsgpack
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from hypothesis import given
from hypothesis import strategies as st
from kademlia.utils import digest

from plasm_dht.errors import RecordError
from plasm_dht.identity import Identity
from plasm_dht.record import (
    Record,
    bound_key,
    check_name,
    check_value,
    decode,
    freshest_first,
    keys_of,
    merge,
    shared_key,
    sign,
    verify,
)

PRIVATE = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC = bytes.fromhex("03a107bff3ce10be1d70dd18e74bc09967e4d6309ba50d5f1ddc8664125531b8")
IDENTITY = Identity(PRIVATE)
OTHERS = [Identity(Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32)) for n in range(3)]

# (name, seq, issued_at, expires_at, withdrawn, value) and the envelope that PRIVATE signs of it.
GOLDEN: dict[str, tuple[tuple[str, int, int, int, bool, Any], str]] = {
    "live": (
        ("/phase/stable/arm64/manifest", 1800000000000, 1800000000000, 1800003600000, False, b"\x01pointer"),
        "504c52310f32284df1040df6148e14f7ce26d1739e021c47c3245a64ba8d5ba163d67400c1fc92f97ce3c310ab2cb668fffa"
        "83fc65d25fcab8bab2ad979fd807891d750997bc2f70686173652f737461626c652f61726d36342f6d616e6966657374c420"
        "03a107bff3ce10be1d70dd18e74bc09967e4d6309ba50d5f1ddc8664125531b8cf000001a3185c5000cf000001a3185c5000"
        "cf000001a318933e80c2c40801706f696e746572",
    ),
    "tombstone": (
        ("/phase/stable/arm64/manifest", 1800000000001, 1800000000001, 1800003600000, True, b""),
        "504c5231adf4e011f9b6e7ca402109b35a4e48ade381695a53accc7eb88ec31a22a4f45d582be661da686ac99a6dde106e7a"
        "68d4db1c8a46520b893a8df0fef9f5d0040d97bc2f70686173652f737461626c652f61726d36342f6d616e6966657374c420"
        "03a107bff3ce10be1d70dd18e74bc09967e4d6309ba50d5f1ddc8664125531b8cf000001a3185c5001cf000001a3185c5001"
        "cf000001a318933e80c3c400",
    ),
    "positive int": (
        ("any/name", 1, 2, 3, False, 18446744073709551615),
        "504c52319df23fdbd91d3404bc372fee14348ca3281ea6652d4ea47a5632d37e5a155d810e3dfae496fc7e71ecd949e78f79"
        "378747e61e2a0b909923723b0e7ea7d2d10997a8616e792f6e616d65c42003a107bff3ce10be1d70dd18e74bc09967e4d630"
        "9ba50d5f1ddc8664125531b8010203c2cfffffffffffffffff",
    ),
    "negative int": (
        ("any/name", 1, 2, 3, False, -9223372036854775808),
        "504c523159ff1d875d99ee2f605f1a4915b656c53b2124f19df6ba916cfea896a6f3750483d788058bf078e8b90aaee31878"
        "5297c35a7bacb51059b5abdc124d7efc200697a8616e792f6e616d65c42003a107bff3ce10be1d70dd18e74bc09967e4d630"
        "9ba50d5f1ddc8664125531b8010203c2d38000000000000000",
    ),
    "float": (
        ("any/name", 1, 2, 3, False, 0.5),
        "504c52313598679fa5cf289a35c7904418efce5cdf0b995775984c879fb54cd1fcf8d99dfadac2693bc7c11d142598b4cd0f"
        "97db96e4fd06376d368b7991a420994cd10397a8616e792f6e616d65c42003a107bff3ce10be1d70dd18e74bc09967e4d630"
        "9ba50d5f1ddc8664125531b8010203c2cb3fe0000000000000",
    ),
    "true": (
        ("any/name", 1, 2, 3, False, True),
        "504c52310686c18b948c8300d058a6caebdbfca3f52d241ff24d27271e086f4fbe6ffbc1718e1f4decb84dd623f86b0f61e8"
        "bba0762053608ee113f21748f54c5c81bc0097a8616e792f6e616d65c42003a107bff3ce10be1d70dd18e74bc09967e4d630"
        "9ba50d5f1ddc8664125531b8010203c2c3",
    ),
    "false": (
        ("any/name", 1, 2, 3, False, False),
        "504c5231906a24f3be77538815d1fc06f524f827871abea08dcd5717415e8d80d272c6a8775ca9540bb3a30f1b1a4ceff818"
        "350115b267c96bf9d40749cdeb534a3e7d0197a8616e792f6e616d65c42003a107bff3ce10be1d70dd18e74bc09967e4d630"
        "9ba50d5f1ddc8664125531b8010203c2c2",
    ),
    "text": (
        ("ä", 1, 2, 3, False, "größe"),
        "504c523130cbfae35f7a39a817997cc3f1331bc15b8c85cc9ad1f59020ccd51cf6f5e678a80bc4161af4e4bd0c8fc4581e7c"
        "0ada300e81b6f1d53e3476923a063133390397a2c3a4c42003a107bff3ce10be1d70dd18e74bc09967e4d6309ba50d5f1ddc"
        "8664125531b8010203c2a76772c3b6c39f65",
    ),
    "bytes": (
        ("any/name", 1, 2, 3, False, b"\x00\x01\x02\x03\x04\x05\x06\x07"),
        "504c523146384c0041054d50b25575a1a44f78109085d378e1abe342b73cd438b725091a1838cbf0c548a3e450260f6c4539"
        "fc4edc8ff2d1fef255fc3bfba8711142740597a8616e792f6e616d65c42003a107bff3ce10be1d70dd18e74bc09967e4d630"
        "9ba50d5f1ddc8664125531b8010203c2c4080001020304050607",
    ),
}

names = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=60)
values = st.one_of(
    st.integers(-(2**63), 2**64 - 1),
    st.floats(allow_nan=False),
    st.booleans(),
    st.text(st.characters(exclude_categories=("Cs",)), max_size=100),
    st.binary(max_size=300),
)
times = st.integers(0, 2**64 - 1)


def independent(fields: list[Any], private: Ed25519PrivateKey = PRIVATE, prefix: bytes = b"PLR1") -> bytes:
    """An envelope made by umsgpack and cryptography alone."""
    return signed(umsgpack.packb(fields), private, prefix)


def signed(body: bytes, private: Ed25519PrivateKey = PRIVATE, prefix: bytes = b"PLR1") -> bytes:
    return prefix + private.sign(b"plasm-dht record v1\x00" + body) + body


def refused(envelope: object) -> bool:
    """Whether decoding or verifying refuses it."""
    try:
        return not verify(decode(envelope))
    except RecordError:
        return True


def reason(envelope: object) -> str:
    with pytest.raises(RecordError) as caught:
        decode(envelope)
    return caught.value.reason


# -- bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fields", "envelope"), GOLDEN.values(), ids=GOLDEN)
def test_a_record_has_the_bytes_of_the_contract(fields: tuple[str, int, int, int, bool, Any], envelope: str) -> None:
    name, seq, issued_at, expires_at, withdrawn, value = fields
    golden = bytes.fromhex(envelope)
    body = golden[68:]
    assert umsgpack.unpackb(body) == [name, PUBLIC, seq, issued_at, expires_at, withdrawn, value]
    Ed25519PublicKey.from_public_bytes(PUBLIC).verify(golden[4:68], b"plasm-dht record v1\x00" + body)
    assert independent([name, PUBLIC, seq, issued_at, expires_at, withdrawn, value]) == golden
    record = sign(IDENTITY, name, value, seq=seq, issued_at=issued_at, expires_at=expires_at, withdrawn=withdrawn)
    assert record.envelope == golden
    assert decode(golden) == record
    assert type(decode(golden).value) is type(value)
    assert verify(decode(golden))


def test_the_signature_is_over_the_prefix_and_the_body() -> None:
    body = umsgpack.packb(["a", PUBLIC, 1, 2, 3, False, b""])
    assert not verify(decode(b"PLR1" + PRIVATE.sign(body) + body))
    assert not verify(decode(b"PLR1" + PRIVATE.sign(b"plasm-dht record v1" + body) + body))
    with pytest.raises(InvalidSignature):
        PRIVATE.public_key().verify(sign(IDENTITY, "a", 1, seq=1, issued_at=1, expires_at=2).envelope[4:68], body)


def test_the_shared_key_is_kademlias_digest_and_the_bound_key_has_the_publisher_in_it() -> None:
    record = sign(IDENTITY, "/phase/stable/arm64/manifest", b"", seq=1, issued_at=1, expires_at=2)
    assert shared_key(record.name) == digest(record.name)
    assert bound_key(PUBLIC, record.name) == digest(b"\x00" + PUBLIC + record.name.encode())
    assert keys_of(record) == (digest(record.name), digest(b"\x00" + PUBLIC + record.name.encode()))
    assert bound_key(OTHERS[0].public_key, record.name) != bound_key(OTHERS[1].public_key, record.name)


@given(name=names, value=values, seq=times, issued_at=times, expires_at=times)
def test_what_is_signed_comes_back(name: str, value: Any, seq: int, issued_at: int, expires_at: int) -> None:
    record = sign(IDENTITY, name, value, seq=seq, issued_at=issued_at, expires_at=expires_at)
    again = decode(record.envelope)
    assert again == record
    assert (again.name, again.public_key, again.seq, again.issued_at, again.expires_at, again.withdrawn) == (
        name, PUBLIC, seq, issued_at, expires_at, False,
    )  # fmt: skip
    assert again.value == value
    assert type(again.value) is type(value)
    assert again.publisher == f"ed25519:{PUBLIC.hex()}"
    assert verify(again)
    assert umsgpack.unpackb(record.envelope[68:])[0] == name


# -- tampering -------------------------------------------------------------------------------------------------------

LIVE = bytes.fromhex(GOLDEN["live"][1])
TOMBSTONE = bytes.fromhex(GOLDEN["tombstone"][1])


@pytest.mark.parametrize("envelope", [LIVE, TOMBSTONE], ids=["live", "tombstone"])
def test_any_mutated_byte_is_refused(envelope: bytes) -> None:
    for position, flip in itertools.product(range(len(envelope)), (0x01, 0x80, 0xFF)):
        mutated = bytearray(envelope)
        mutated[position] ^= flip
        assert refused(bytes(mutated)), position


@given(data=st.data(), value=values)
def test_any_mutated_byte_of_any_record_is_refused(data: st.DataObject, value: Any) -> None:
    envelope = sign(IDENTITY, "any/name", value, seq=7, issued_at=8, expires_at=9).envelope
    position = data.draw(st.integers(0, len(envelope) - 1))
    mutated = bytearray(envelope)
    mutated[position] ^= data.draw(st.integers(1, 255))
    assert refused(bytes(mutated))


def test_truncations_and_extensions_are_malformed() -> None:
    for length in range(len(LIVE)):
        assert reason(LIVE[:length]) == "malformed"
    for tail in (b"\x00", b"\xc0", b"\x01", LIVE, LIVE[68:]):
        assert reason(LIVE + tail) == "malformed"


@given(st.binary(max_size=1100))
def test_decoding_arbitrary_bytes_raises_nothing_but_a_record_error(data: bytes) -> None:
    for envelope in (data, b"PLR1" + data, LIVE[:68] + data, LIVE[:68] + b"\x97" + data):
        assert refused(envelope)


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=300)
    | st.binary(max_size=40) | st.datetimes(timezones=st.just(datetime.UTC)),
    lambda inner: st.lists(inner, max_size=8) | st.dictionaries(st.text(max_size=5) | st.integers(0, 9), inner,
                                                                max_size=4),
    max_leaves=20,
)  # fmt: skip


@given(anything)
def test_decoding_arbitrary_objects_raises_nothing_but_a_record_error(value: Any) -> None:
    body = msgspec.msgpack.encode(value)
    assert refused(value)
    assert refused(signed(body))
    assert refused(
        signed(b"\x97" + umsgpack.packb("a") + umsgpack.packb(PUBLIC) + b"\x01\x01\x02\xc2" + b"\x91" + body)
    )


@pytest.mark.parametrize(
    "tail",
    [b"\x81\x80\x01", b"\xc1", b"\xa2\xff\xfe", b"\x91" * 800 + b"\xc0", b"\xdd\xff\xff\xff\xff", b"\xd4\x05\x00"],
    ids=["map as key", "reserved", "bad UTF-8", "deep", "endless array", "extension"],
)
def test_hostile_msgpack_is_malformed(tail: bytes) -> None:
    body = b"\x97" + umsgpack.packb("a") + umsgpack.packb(PUBLIC) + b"\x01\x01\x02\xc2" + tail
    assert reason(signed(body)) == "malformed"


def test_what_is_nested_too_deep_to_be_read_where_the_stack_is_deep_already_is_malformed() -> None:
    body = b"\x97" + umsgpack.packb("a") + umsgpack.packb(PUBLIC) + b"\x01\x01\x02\xc2" + b"\x91" * 800 + b"\xc0"

    def below(calls: int) -> str | None:
        return below(calls - 1) if calls else reason(signed(body))

    assert below(500) == "malformed"


# -- fields ----------------------------------------------------------------------------------------------------------

GOOD: list[Any] = ["any/name", PUBLIC, 1, 2, 3, False, b"value"]


@pytest.mark.parametrize(
    ("position", "value"),
    [
        (0, ""), (0, "a" * 256), (0, "a\nb"), (0, "a\x00b"), (0, "a\x7f"), (0, "a\x85"), (0, b"a"), (0, 1), (0, None),
        (1, PUBLIC[:31]), (1, PUBLIC + b"\x00"), (1, "x" * 32), (1, b""),
        (2, -1), (2, 1.0), (2, True), (2, "1"), (2, None),
        (3, -1), (3, 2.0), (3, False), (4, -1), (4, 3.5), (4, None),
        (5, 0), (5, 1), (5, None), (5, "x"),
        (6, None), (6, [1]), (6, {"a": 1}), (6, []),
    ],
)  # fmt: skip
def test_a_field_out_of_its_range_is_malformed(position: int, value: Any) -> None:
    fields = [*GOOD]
    assert decode(independent(fields))
    fields[position] = value
    assert reason(independent(fields)) == "malformed"


@pytest.mark.parametrize("fields", [[], GOOD[:6], [*GOOD, 1], {"name": "a"}, None, "text"])
def test_a_body_that_is_no_array_of_seven_is_malformed(fields: Any) -> None:
    assert reason(independent(fields)) == "malformed"


def test_another_magic_is_malformed() -> None:
    assert reason(independent(GOOD, prefix=b"PLR2")) == "malformed"
    assert reason(independent(GOOD, prefix=b"plr1")) == "malformed"
    assert reason(b"") == "malformed"


@pytest.mark.parametrize("value", [b"x", "", 0, False, 0.0])
def test_a_tombstone_with_a_value_is_malformed(value: Any) -> None:
    assert reason(independent(["any/name", PUBLIC, 1, 2, 3, True, value])) == "malformed"
    assert decode(independent(["any/name", PUBLIC, 1, 2, 3, True, b""])).withdrawn


@pytest.mark.parametrize("envelope", [None, 1, "PLR1", bytearray(LIVE), [LIVE], {"value": LIVE}, memoryview(LIVE)])
def test_what_is_not_bytes_is_malformed(envelope: object) -> None:
    assert reason(envelope) == "malformed"


def test_a_well_signed_body_in_another_msgpack_form_counts_as_the_received_bytes() -> None:
    longer = (
        b"\xdc\x00\x07"  # array 16
        + b"\xda\x00\x08any/name"  # str 16
        + b"\xc5\x00\x20" + PUBLIC  # bin 16
        + b"\xcd\x00\x01" + b"\xcf\x00\x00\x00\x00\x00\x00\x00\x02" + b"\xd0\x03"  # uint 16, uint 64, int 8
        + b"\xc2"
        + b"\xc6\x00\x00\x00\x05value"  # bin 32
    )  # fmt: skip
    envelope = signed(longer)
    record = decode(envelope)
    assert (record.name, record.seq, record.issued_at, record.expires_at, record.value) == (
        "any/name",
        1,
        2,
        3,
        b"value",
    )
    assert record.envelope == envelope
    assert verify(record)
    assert record.envelope != independent(GOOD)


# -- size ------------------------------------------------------------------------------------------------------------


def test_an_envelope_has_at_most_1000_bytes() -> None:
    overhead = len(sign(IDENTITY, "any/name", bytes(300), seq=1, issued_at=2, expires_at=3).envelope) - 300
    largest = sign(IDENTITY, "any/name", bytes(1000 - overhead), seq=1, issued_at=2, expires_at=3)
    assert len(largest.envelope) == 1000
    assert decode(largest.envelope) == largest
    with pytest.raises(RecordError, match="1001 bytes: at most 1000") as caught:
        sign(IDENTITY, "any/name", bytes(1001 - overhead), seq=1, issued_at=2, expires_at=3)
    assert caught.value.reason == "too_large"
    above = independent(["any/name", PUBLIC, 1, 2, 3, False, bytes(1001 - overhead)])
    assert len(above) == 1001
    assert reason(above) == "too_large"
    assert reason(bytes(1001)) == "too_large"
    assert reason(bytes(1000)) == "malformed"


# -- names and values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["a", "/phase/stable/arm64/manifest", "ä", "日本", "🚀", "a" * 255, "ä" * 127, " ", "a\u200bb", "\u2028"]
)
def test_a_name_is_up_to_255_bytes_of_utf_8(name: str) -> None:
    assert check_name(name) == name
    assert decode(sign(IDENTITY, name, 1, seq=1, issued_at=1, expires_at=2).envelope).name == name


@pytest.mark.parametrize("name", ["", "a" * 256, "ä" * 128, "a\x00", "\n", "\x1f", "\x7f", "\x80", "\x9f", "\ud800"])
def test_any_other_name_is_malformed(name: str) -> None:
    for check in (check_name, lambda name: sign(IDENTITY, name, 1, seq=1, issued_at=1, expires_at=2)):
        with pytest.raises(RecordError) as caught:
            check(name)
        assert caught.value.reason == "malformed"


@pytest.mark.parametrize("name", [b"a", None, 1])
def test_a_name_of_another_type_is_the_callers_bug(name: Any) -> None:
    with pytest.raises(TypeError):
        check_name(name)


@pytest.mark.parametrize("value", [None, [1], {"a": 1}, bytearray(b"x"), 1j, object()])
def test_a_value_of_another_type_is_the_callers_bug(value: Any) -> None:
    with pytest.raises(TypeError, match="int, float, bool, str or bytes"):
        sign(IDENTITY, "a", value, seq=1, issued_at=1, expires_at=2)


@pytest.mark.parametrize("value", [2**64, -(2**63) - 1, "\ud800"])
def test_a_value_that_msgpack_cannot_say_is_malformed(value: Any) -> None:
    with pytest.raises(RecordError) as caught:
        sign(IDENTITY, "a", value, seq=1, issued_at=1, expires_at=2)
    assert caught.value.reason == "malformed"


def test_the_ends_of_the_integer_range_are_values() -> None:
    for value in (2**64 - 1, -(2**63)):
        assert check_value(value) == value


@pytest.mark.parametrize("field", ["seq", "issued_at", "expires_at"])
@pytest.mark.parametrize("number", [-1, 2**64])
def test_no_record_is_signed_that_decoding_would_refuse(field: str, number: int) -> None:
    numbers = {"seq": 1, "issued_at": 1, "expires_at": 2} | {field: number}
    with pytest.raises(RecordError) as caught:
        sign(IDENTITY, "a", 1, **numbers)
    assert caught.value.reason == "malformed"


# -- which wins ------------------------------------------------------------------------------------------------------


def made(publisher: int, seq: int, value: int, issued_at: int = 0) -> Record:
    return sign(OTHERS[publisher], "any/name", value, seq=seq, issued_at=issued_at, expires_at=issued_at + 10)


POOL = [made(publisher, seq, value) for publisher in range(3) for seq in range(3) for value in range(3)]
records = st.lists(st.sampled_from(POOL), max_size=12)


@given(records, st.randoms(use_true_random=False))
def test_the_order_of_a_merge_never_matters(some: list[Record], random: Any) -> None:
    shuffled = [*some]
    random.shuffle(shuffled)
    assert merge(shuffled) == merge(some)


@given(records, records, records)
def test_a_merge_is_idempotent_commutative_and_associative(a: list[Record], b: list[Record], c: list[Record]) -> None:
    def merged(*lists: list[Record]) -> list[Record]:
        return list(merge(record for each in lists for record in each).values())

    assert merge(merged(a)) == merge(a)
    assert merge(merged(a, a)) == merge(a)
    assert merge(merged(a, b)) == merge(merged(b, a))
    assert merge(merged(merged(a, b), c)) == merge(merged(a, merged(b, c)))


@given(records)
def test_a_merge_keeps_the_greatest_of_each_publisher(some: list[Record]) -> None:
    for public_key, winner in merge(some).items():
        rivals = [record for record in some if record.public_key == public_key]
        assert winner == max(rivals, key=lambda record: (record.seq, record.envelope))
    assert set(merge(some)) == {record.public_key for record in some}


def test_a_winner_counts_even_when_it_is_no_result() -> None:
    long = sign(IDENTITY, "a", 1, seq=1, issued_at=0, expires_at=1000)
    short = sign(IDENTITY, "a", 2, seq=2, issued_at=0, expires_at=10)
    tombstone = sign(IDENTITY, "a", b"", seq=3, issued_at=0, expires_at=1000, withdrawn=True)
    assert merge([long, short]) == {PUBLIC: short}
    assert not short.is_live(10)
    assert short.is_live(9)
    assert merge([tombstone, long]) == {PUBLIC: tombstone}
    assert not tombstone.is_live(5)


def test_the_freshest_is_by_issue_then_seq_then_bytes() -> None:
    later, higher = made(0, 1, 0, issued_at=5), made(1, 9, 0, issued_at=4)
    lower = made(2, 8, 0, issued_at=4)
    twins = sorted((made(0, 3, 0), made(1, 3, 0)), key=lambda record: record.envelope)
    expected = [later, higher, lower, *reversed(twins)]
    for order in itertools.permutations(expected):
        assert freshest_first(order) == expected
