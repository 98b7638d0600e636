"""The pointer in the DHT and the signed manifest: bytes that stay as they are, and input that is never trusted."""

import base64
import hashlib
import json
from contextlib import suppress
from dataclasses import replace
from typing import NamedTuple

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from plasm_dht import record
from plasm_dht.errors import ArtifactsError, VerificationError
from plasm_dht.identity import Identity
from plasm_dht.provider.manifest import (
    MANIFEST_LIFETIME,
    MAX_MANIFEST,
    MAX_PROVIDER_NAME,
    MAX_URL,
    MAX_VERSION,
    Pointer,
    build_manifest,
    check_target,
    record_name,
    verify_manifest,
)

IDENTITY = Identity(Ed25519PrivateKey.from_private_bytes(bytes(range(32))))
CREATED = 1_700_000_000_123


class File(NamedTuple):
    role: str
    filename: str
    size: int
    sha256: str


FILES = (File("kernel", "vmlinuz-6.1 é", 5, hashlib.sha256(b"hello").hexdigest()), File("x.cfg", "x.cfg", 0, "0" * 64))
POINTER = Pointer("http://10.0.0.1:8080/stable/arm64/manifest.json", "1.2", "rack-7", bytes(range(32)), 1234)


def manifest(**changes) -> bytes:
    arguments = {
        "target": "stable/arm64",
        "version": "1.2",
        "files": FILES,
        "base_url": "http://10.0.0.1:8080",
        "manifest_version": 7,
        "created_at": CREATED,
    }
    return build_manifest(IDENTITY, **(arguments | changes))


def signed(document: dict) -> bytes:
    """A manifest that our key signed, whatever the document says."""
    data = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    sig = base64.b64encode(IDENTITY.sign(hashlib.sha256(data).digest())).decode()
    envelope = {
        "signatures": [{"keyid": IDENTITY.publisher_id, "sig": sig}],
        "signed": {"data": base64.b64encode(data).decode()},
    }
    return json.dumps(document | envelope).encode()


def document() -> dict:
    parsed = json.loads(manifest())
    return {key: value for key, value in parsed.items() if key not in ("signatures", "signed")}


# Targets


@pytest.mark.parametrize("target", ["stable/arm64", "a/b", "0.9_x-y/amd64", "a" * 63 + "/" + "b" * 63])
def test_a_channel_and_an_architecture_make_a_target(target):
    assert check_target(target) == target


@pytest.mark.parametrize(
    "target",
    [
        "",
        "stable",
        "stable/",
        "/arm64",
        "a/b/c",
        "Stable/arm64",
        ".x/arm64",
        "a" * 64 + "/b",
        "a/b\n",
        "é/b",
        "../b",
        "dht/b",
    ],
)
def test_anything_else_is_refused_with_one_line_that_names_it(target):
    with pytest.raises(ArtifactsError) as caught:
        check_target(target)
    assert repr(target) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_of_one_that_is_too_long_the_line_shows_no_more_than_could_be_right():
    with pytest.raises(ArtifactsError) as caught:
        check_target("a" * 2**20 + "/b")
    assert str(caught.value).startswith(f"{'a' * 127!r}... is no CHANNEL/ARCH: ")


def test_the_record_of_a_target_has_the_name_of_the_contract():
    assert record_name("stable/arm64") == "/phase/stable/arm64/manifest"


# The pointer


def test_the_bytes_of_a_pointer_never_change():
    golden = (
        "9601d92f687474703a2f2f31302e302e302e313a383038302f737461626c652f61726d36342f6d616e69666573742e6a736f6ea3312e32"
        "a67261636b2d37c420000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1fcd04d2"
    )
    assert POINTER.encode().hex() == golden
    assert Pointer.decode(bytes.fromhex(golden)) == POINTER


def test_the_largest_pointer_of_the_longest_target_fits_a_record():
    url = "http://h/" + "x" * (MAX_URL - 9)
    pointer = Pointer(url, "v" * MAX_VERSION, "p" * MAX_PROVIDER_NAME, bytes(32), MAX_MANIFEST)
    name = record_name("a" * 63 + "/" + "b" * 63)
    record.sign(IDENTITY, name, pointer.encode(), seq=2**64 - 1, issued_at=2**63 - 2, expires_at=2**63 - 1)


BAD_FIELDS = [
    {"url": "ftp://host/x"},
    {"url": "http:///x"},
    {"url": "http://host/a b"},
    {"url": "http://host/\n"},
    {"url": "http://host:99999/"},
    {"url": "http://[::1/"},
    {"url": "http://user:secret@host/"},
    {"url": "http://h/" + "x" * MAX_URL},
    {"url": "javascript:alert(1)"},
    {"version": ""},
    {"version": "1\x1b[2J"},
    {"version": "v" * (MAX_VERSION + 1)},
    {"provider_name": "a\nb"},
    {"provider_name": "p" * (MAX_PROVIDER_NAME + 1)},
    {"manifest_sha256": bytes(31)},
    {"manifest_size": 0},
    {"manifest_size": MAX_MANIFEST + 1},
]


@pytest.mark.parametrize("change", BAD_FIELDS)
def test_a_field_out_of_its_bounds_is_neither_published_nor_believed(change):
    pointer = replace(POINTER, **change)
    raw = [1, pointer.url, pointer.version, pointer.provider_name, pointer.manifest_sha256, pointer.manifest_size]
    with pytest.raises(ArtifactsError):
        pointer.encode()
    with pytest.raises(VerificationError):
        Pointer.decode(msgspec.msgpack.encode(raw))


@pytest.mark.parametrize(
    "data",
    [
        None,
        7,
        "text",
        b"",
        POINTER.encode() + b"\x00",
        POINTER.encode()[:-1],
        b"\x96\x02" + POINTER.encode()[2:],
        b"\x97" + POINTER.encode()[1:] + b"\x00",
        msgspec.msgpack.encode([1, "http://h/", "1", "p", "s" * 32, 5]),
        msgspec.msgpack.encode({"url": "http://h/"}),
        b"\x91" * 5000,
    ],
)
def test_what_is_no_pointer_is_refused(data):
    with pytest.raises(VerificationError):
        Pointer.decode(data)


@given(st.one_of(st.binary(max_size=200), st.integers(), st.text(), st.none()))
def test_no_value_of_a_record_raises_anything_else(data):
    with pytest.raises(VerificationError):
        Pointer.decode(data)


@given(st.integers(0, len(POINTER.encode()) - 1), st.integers(1, 255))
def test_a_mutated_pointer_is_a_valid_one_or_refused(position, change):
    data = bytearray(POINTER.encode())
    data[position] ^= change
    try:
        pointer = Pointer.decode(bytes(data))
    except VerificationError:
        return
    assert Pointer.decode(pointer.encode()) == pointer != POINTER


# The manifest


def test_the_bytes_of_a_manifest_never_change():
    assert hashlib.sha256(manifest()).hexdigest() == "6fc1e3ed8a7dd75c0a7aecef4741575daa1bd95c1b207775a510059681fad993"
    assert base64.b64decode(json.loads(manifest())["signed"]["data"]).decode() == (
        '{"arch":"arm64","artifacts":{"kernel":{"filename":"vmlinuz-6.1 é","hash":"sha256:'
        '2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824","size":5,"urls":['
        '"http://10.0.0.1:8080/stable/arm64/vmlinuz-6.1%20%C3%A9"]},"x.cfg":{"filename":"x.cfg","hash":"sha256:'
        '0000000000000000000000000000000000000000000000000000000000000000","size":0,"urls":['
        '"http://10.0.0.1:8080/stable/arm64/x.cfg"]}},"channel":"stable","created_at":"2023-11-14T22:13:20Z",'
        '"expires_at":"2023-12-14T22:13:20Z","manifest_version":7,"version":"1.2"}'
    )


def test_a_client_that_knows_only_the_contract_verifies_the_signature():
    parsed = json.loads(manifest())
    data = base64.b64decode(parsed["signed"]["data"])
    signature = base64.b64decode(parsed["signatures"][0]["sig"])
    Ed25519PrivateKey.from_private_bytes(bytes(range(32))).public_key().verify(signature, hashlib.sha256(data).digest())
    assert parsed["signatures"][0]["keyid"] == IDENTITY.publisher_id
    canonical = json.dumps(document(), sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    assert data == canonical


def test_what_is_built_is_verified_and_read_back():
    read = verify_manifest(manifest(base_url="https://cdn.example.net/boot/"), IDENTITY.public_key)
    assert (read.target, read.version, read.manifest_version) == ("stable/arm64", "1.2", 7)
    assert read.created_at == CREATED // 1000 * 1000
    assert read.expires_at - read.created_at == MANIFEST_LIFETIME
    kernel = read.artifacts["kernel"]
    assert (kernel.filename, kernel.size, kernel.sha256) == FILES[0][1:]
    assert kernel.urls == ("https://cdn.example.net/boot/stable/arm64/vmlinuz-6.1%20%C3%A9",)


def test_a_manifest_of_another_key_is_refused():
    with pytest.raises(VerificationError, match="no valid signature of ed25519:"):
        verify_manifest(manifest(), Identity.generate().public_key)


def test_a_manifest_that_says_something_else_than_what_is_signed_is_refused():
    parsed = json.loads(manifest())
    parsed["artifacts"]["kernel"]["size"] = 6
    with pytest.raises(VerificationError, match="not what the document says"):
        verify_manifest(json.dumps(parsed).encode(), IDENTITY.public_key)


def test_a_changed_document_with_the_old_signature_is_refused():
    parsed = json.loads(manifest())
    changed = document() | {"version": "1.3"}
    data = json.dumps(changed, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    forged = changed | {"signatures": parsed["signatures"], "signed": {"data": base64.b64encode(data).decode()}}
    with pytest.raises(VerificationError, match="no valid signature"):
        verify_manifest(json.dumps(forged).encode(), IDENTITY.public_key)


def test_unknown_fields_that_are_signed_are_for_later_versions():
    assert verify_manifest(signed(document() | {"later": [1]}), IDENTITY.public_key).version == "1.2"


@pytest.mark.parametrize(
    "change",
    [
        {"filename": "../../etc/passwd"},
        {"filename": ".bashrc"},
        {"filename": "a\nb"},
        {"filename": "x.cfg"},  # the other artifact's
        {"hash": "sha256:00"},
        {"hash": "sha256:" + "0" * 64 + "\n"},
        {"size": -1},
        {"size": 2**70},
        {"urls": []},
        {"urls": ["file:///etc/passwd"]},
    ],
)
def test_a_signed_artifact_that_a_downloader_could_be_harmed_with_is_refused(change):
    evil = document()
    evil["artifacts"]["kernel"] |= change
    with pytest.raises(VerificationError):
        verify_manifest(signed(evil), IDENTITY.public_key)


@pytest.mark.parametrize(
    "change",
    [
        {"channel": "../x"},
        {"version": "1\x00"},
        {"created_at": "yesterday"},
        {"created_at": "2023-11-14T22:13:20"},  # of which time zone?
        {"manifest_version": 1.5},
        {"artifacts": {"../x": {"filename": "x", "hash": "sha256:" + "0" * 64, "size": 0, "urls": ["http://h/"]}}},
    ],
)
def test_a_signed_field_of_another_shape_is_refused(change):
    with pytest.raises(VerificationError):
        verify_manifest(signed(document() | change), IDENTITY.public_key)


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"{}", b"\xff", b"[" * 10_000, b'{"a":' * 10_000, b" " * (MAX_MANIFEST + 1)]
)
def test_what_is_no_manifest_is_refused(data):
    with pytest.raises(VerificationError):
        verify_manifest(data, IDENTITY.public_key)


@given(st.integers(0, len(manifest()) - 1), st.integers(1, 255))
def test_a_mutated_byte_changes_nothing_or_is_refused(position, change):
    data = bytearray(manifest())
    data[position] ^= change
    try:
        read = verify_manifest(bytes(data), IDENTITY.public_key)
    except VerificationError:
        return
    assert read == verify_manifest(manifest(), IDENTITY.public_key)  # white space between two fields


@given(
    st.recursive(
        st.none() | st.integers() | st.floats() | st.text(), lambda x: st.dictionaries(st.text(), x) | st.lists(x)
    )
)
def test_no_signed_document_raises_anything_else(value):
    with suppress(VerificationError):
        verify_manifest(signed(document() | {"artifacts": value}), IDENTITY.public_key)
    with pytest.raises(VerificationError):
        verify_manifest(json.dumps({"signatures": value, "signed": value}).encode(), IDENTITY.public_key)


def test_too_many_files_for_a_manifest_are_an_error_that_says_so():
    files = [File(f"file-{number}", f"file-{number}", 1, "0" * 64) for number in range(4000)]
    with pytest.raises(ArtifactsError, match="serve fewer files"):
        manifest(files=files)
