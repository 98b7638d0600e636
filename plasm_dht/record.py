"""The signed record: encode, decode, verify, and which of two wins. Pure: no clock, no storage, no network.

    envelope  = "PLR1" (4 bytes) + signature (64 bytes) + body
    body      = msgpack array [name, publisher (32 bytes), seq, issued_at, expires_at, withdrawn, value]
    signature = Ed25519 over b"plasm-dht record v1\\x00" + body, exactly the received bytes

Nothing here trusts its input. `decode` tells whether bytes have the shape of a record, `verify` whether the publisher
signed them; only what passed both is evidence of anything.
"""

import functools
import hashlib
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import msgspec

from plasm_dht.errors import ConfigError, RecordError
from plasm_dht.identity import Identity, publisher_id
from plasm_dht.identity import verify as verify_signature

MAGIC = b"PLR1"
SIGNED_PREFIX = b"plasm-dht record v1\x00"
BODY_OFFSET = len(MAGIC) + 64
# An RPC carrying an envelope of this size fits a datagram of 1,232 bytes: IPv6's least MTU of 1,280 (RFC 8200, 5) less
# 40 bytes of IPv6 and 8 of UDP header.
MAX_ENVELOPE = 1000
MAX_NAME = 255
# The longest life of a record (s), and the part of its life after which it is refreshed.
MAX_TTL = 604_800
REFRESH_AT = 2 / 3

Value = int | float | bool | str | bytes
_VALUE_TYPES = (int, float, bool, str, bytes)
# The range of msgpack's integers; Python's own have none.
_MIN_INT, _MAX_INT = -(2**63), 2**64 - 1
# No record comes after one with this `seq`, and only who has the publisher's key can make it.
MAX_SEQ = _MAX_INT


class _Body(msgspec.Struct, array_like=True, forbid_unknown_fields=True, frozen=True, gc=False):
    name: str
    publisher: bytes
    seq: int
    issued_at: int
    expires_at: int
    withdrawn: bool
    value: Any  # msgspec knows no union of str and bytes: `decode` checks it


_encode = msgspec.msgpack.Encoder().encode
_decode_body = msgspec.msgpack.Decoder(_Body).decode


@dataclass(frozen=True, slots=True)
class Record:
    """A record as its publisher signed it.

    Attributes:
        name: what it is about, 1 to 255 bytes of UTF-8 without control characters.
        public_key: the publisher's Ed25519 key, 32 bytes.
        seq: strictly growing per publisher and name; unsigned.
        issued_at: Unix ms.
        expires_at: Unix ms; the record is live while `now < expires_at`.
        withdrawn: whether it is a tombstone; its value is then `b""`.
        value: int, float, bool, str or bytes.
        envelope: the signed bytes, at most 1,000.
    """

    name: str
    public_key: bytes
    seq: int
    issued_at: int
    expires_at: int
    withdrawn: bool
    value: Value
    envelope: bytes

    @property
    def publisher(self) -> str:
        """The publisher id, `ed25519:` and 64 hex digits."""
        return publisher_id(self.public_key)

    @property
    def rank(self) -> tuple[int, bytes]:
        """Of one publisher and name the record of the highest rank wins: by seq, on a tie by the bytes."""
        return self.seq, self.envelope

    @property
    def freshness(self) -> tuple[int, int, bytes]:
        """Of several publishers the record of the greatest freshness comes first."""
        return self.issued_at, self.seq, self.envelope

    def is_live(self, now: int) -> bool:
        """Whether it is a result at `now` (Unix ms): neither expired nor withdrawn."""
        return not self.withdrawn and now < self.expires_at


def check_name(name: str) -> str:
    """The name itself, or a `RecordError` (`malformed`) that says what is wrong with it."""
    if not isinstance(name, str):
        raise TypeError(f"a name is a str, not {type(name).__name__}")
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        raise RecordError("malformed", f"name {name!r} is not valid UTF-8") from None
    if not 1 <= size <= MAX_NAME:
        raise RecordError("malformed", f"name {name[:40]!r} has {size} bytes of UTF-8: it must have 1 to {MAX_NAME}")
    if not name.isprintable() and any(unicodedata.category(char) == "Cc" for char in name):
        raise RecordError("malformed", f"name {name!r} has a control character: none is allowed")
    return name


def check_value(value: Value) -> Value:
    """The value itself.

    Raises `TypeError` for a type that a record cannot hold and `RecordError` (`malformed`) for an integer out of range.
    """
    if type(value) not in _VALUE_TYPES:
        raise TypeError(f"a value is an int, float, bool, str or bytes, not {type(value).__name__}")
    if type(value) is int and not _MIN_INT <= value <= _MAX_INT:
        raise RecordError("malformed", f"value {value} is out of range: an int is from -2**63 to 2**64 - 1")
    return value


def check_life(record_ttl: float, refresh_interval: float | None, *, what: str = "record_ttl") -> None:
    """Raise `ConfigError` for a life, or a time between two refreshes (s), that cannot be."""
    if isinstance(record_ttl, bool) or not isinstance(record_ttl, int | float) or not 1 <= record_ttl <= MAX_TTL:
        raise ConfigError(f"{what} is {record_ttl!r}: it must be from 1 to {MAX_TTL} seconds")
    if refresh_interval is not None and not 0 < refresh_interval < record_ttl:
        raise ConfigError(
            f"refresh_interval is {refresh_interval}: it must be above 0 and below record_ttl, {record_ttl} seconds"
        )


@functools.lru_cache(maxsize=4096)
def shared_key(name: str) -> bytes:
    """The 20-byte key where everybody publishes the name: kademlia's `digest(name)`."""
    return hashlib.sha1(name.encode(), usedforsecurity=False).digest()


@functools.lru_cache(maxsize=4096)
def bound_key(public_key: bytes, name: str) -> bytes:
    """The 20-byte key where only the holder of `public_key` can publish the name.

    No name has a NUL in it, so no shared key is the digest of the same bytes as a bound one.
    """
    return hashlib.sha1(b"\x00" + public_key + name.encode(), usedforsecurity=False).digest()


def keys_of(record: Record) -> tuple[bytes, bytes]:
    """The shared and the bound key of a record: the only two under which it may be held."""
    return shared_key(record.name), bound_key(record.public_key, record.name)


def sign(
    identity: Identity,
    name: str,
    value: Value,
    *,
    seq: int,
    issued_at: int,
    expires_at: int,
    withdrawn: bool = False,
) -> Record:
    """A new signed record. Times in Unix ms.

    Raises `TypeError` for a value of another type, `RecordError` (`malformed`) for a bad name or an integer out of
    range and `RecordError` (`too_large`) when the envelope has more than 1,000 bytes.
    """
    check_name(name)
    check_value(value)
    for field, number in {"seq": seq, "issued_at": issued_at, "expires_at": expires_at}.items():
        if not 0 <= number <= _MAX_INT:
            raise RecordError("malformed", f"{field} of {name!r} is {number}: it must be from 0 to 2**64 - 1")
    try:
        body = _encode([name, identity.public_key, seq, issued_at, expires_at, withdrawn, value])
    except UnicodeEncodeError:
        raise RecordError("malformed", f"value of {name!r} is not valid UTF-8") from None
    envelope = MAGIC + identity.sign(SIGNED_PREFIX + body) + body
    if len(envelope) > MAX_ENVELOPE:
        raise RecordError(
            "too_large",
            f"the record of {name!r} has {len(envelope)} bytes: at most {MAX_ENVELOPE} fit, shorten its value",
        )
    return Record(name, identity.public_key, seq, issued_at, expires_at, withdrawn, value, envelope)


def decode(envelope: object) -> Record:
    """The record in the bytes, unverified. Raises `RecordError`, `too_large` or `malformed`, and nothing else."""
    if not isinstance(envelope, bytes):
        raise RecordError("malformed", f"an envelope is bytes, not {type(envelope).__name__}")
    if len(envelope) > MAX_ENVELOPE:
        raise RecordError("too_large", f"an envelope of {len(envelope)} bytes: at most {MAX_ENVELOPE} are allowed")
    if not envelope.startswith(MAGIC):
        raise RecordError("malformed", "an envelope starts with PLR1: this one does not")
    try:
        body = _decode_body(memoryview(envelope)[BODY_OFFSET:])
        check_name(body.name)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, RecordError) as error:
        raise RecordError("malformed", f"the record's body is not as specified: {error}") from None
    valid = (
        len(body.publisher) == 32
        and body.seq >= 0
        and body.issued_at >= 0
        and body.expires_at >= 0
        and type(body.value) in _VALUE_TYPES
        and (not body.withdrawn or body.value == b"")
    )
    if not valid:
        raise RecordError("malformed", "a field of the record is out of its range, or a tombstone has a value")
    return Record(
        body.name,
        body.publisher,
        body.seq,
        body.issued_at,
        body.expires_at,
        body.withdrawn,
        body.value,
        envelope,
    )


def verify(record: Record) -> bool:
    """Whether the publisher named in the record signed exactly its bytes."""
    envelope = record.envelope
    return verify_signature(
        record.public_key, envelope[len(MAGIC) : BODY_OFFSET], SIGNED_PREFIX + envelope[BODY_OFFSET:]
    )


def merge(records: Iterable[Record]) -> dict[bytes, Record]:
    """The winner of each publisher, by public key, among records of one name. Live or not: the winner decides."""
    winners: dict[bytes, Record] = {}
    for record in records:
        held = winners.get(record.public_key)
        if held is None or record.rank > held.rank:
            winners[record.public_key] = record
    return winners


def freshest_first(records: Iterable[Record]) -> list[Record]:
    """The records in the order in which a reader sees them."""
    return sorted(records, key=lambda record: record.freshness, reverse=True)
