"""The boot manifest document and the pointer to it that is stored in the DHT.

Pure: no clock, no file, no network. `Pointer.decode` and `verify_manifest` trust nothing that they are given and raise
`VerificationError` alone.
"""

import base64
import hashlib
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, Protocol, Self
from urllib.parse import quote, urlsplit

import msgspec

from plasm_dht.errors import ArtifactsError, VerificationError
from plasm_dht.identity import Identity, publisher_id
from plasm_dht.identity import verify as verify_signature

# The name under which the document is served; no artifact can have it.
MANIFEST_FILE = "manifest.json"
_PART = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
# The gateway answers under /dht/, so a channel of this name could not be reached.
RESERVED_CHANNEL = "dht"
# 30 days, and a new manifest after half of them: a client with an old copy has two weeks to find the new one (ms).
MANIFEST_LIFETIME = 30 * 86_400_000
REBUILD_AFTER = MANIFEST_LIFETIME // 2
# A manifest of 1,000 artifacts has about 700 KiB; a client reads no more than this into memory (bytes).
MAX_MANIFEST = 2**20
# Two parts of 63 characters, and the slash.
MAX_TARGET = 127
# A record has 1,000 bytes, of which at least 670 are left for these three (bytes of UTF-8).
MAX_URL = 480
MAX_VERSION = 64
MAX_PROVIDER_NAME = 100
# NAME_MAX of Linux (bytes).
MAX_FILENAME = 255
# URLs of an artifact and signatures of a manifest: an honest one has one or two, and every signature costs a check.
MAX_CHOICES = 16
_TEMPORARY = (".tmp", ".part", "~")
# The characters of RFC 3986, 2: anything else must be percent-encoded, so nothing in a URL can end a line or a quote.
_URL = re.compile(r"[A-Za-z0-9\-._~:/?#\[\]@!$&'()*+,;=%]+")
_MAX_SIZE = 2**63 - 1


def check_target(text: str) -> str:
    """The `CHANNEL/ARCH` itself, or an `ArtifactsError` that says what is wrong with it."""
    parts = text.split("/")
    if len(parts) != 2 or not all(_PART.fullmatch(part) for part in parts):
        raise ArtifactsError(
            f"{text[:MAX_TARGET]!r}{'...' * (len(text) > MAX_TARGET)} is no CHANNEL/ARCH: each part has 1 to 63 of "
            "a-z 0-9 . _ - and starts with a letter or a digit"
        )
    if parts[0] == RESERVED_CHANNEL:
        raise ArtifactsError(f"{text!r}: the channel {RESERVED_CHANNEL!r} is the gateway's, use another name")
    return text


def record_name(target: str) -> str:
    """The DHT name under which the pointer to the manifest of a `CHANNEL/ARCH` is published."""
    return f"/phase/{target}/manifest"


def _check_text(what: str, text: str, limit: int) -> None:
    """Raises `ValueError` unless the text has 1 to `limit` bytes of UTF-8 and no control character."""
    if not 1 <= len(text.encode()) <= limit:  # a lone surrogate raises UnicodeEncodeError, a ValueError
        raise ValueError(f"{what} {text[:40]!r} must have 1 to {limit} bytes of UTF-8")
    if any(unicodedata.category(char) == "Cc" for char in text):
        raise ValueError(f"{what} {text!r} has a control character: none is allowed")


def _check_url(url: str) -> None:
    """Raises `ValueError` unless it is an http or https URL with a host and without a password."""
    _check_text("URL", url, MAX_URL)
    parts = urlsplit(url)
    valid = _URL.fullmatch(url) and parts.scheme in ("http", "https") and parts.hostname and "@" not in parts.netloc
    if not valid or parts.port == 0:  # .port raises ValueError when it is no number below 65,536
        raise ValueError(f"URL {url!r} is not http://HOST/... or https://HOST/... in ASCII, percent-encoded")


def is_ignored(name: str) -> bool:
    """Whether a file or folder of this name is a temporary or hidden one, that is no artifact yet."""
    return name.startswith(".") or name.endswith(_TEMPORARY)


def check_filename(name: str) -> str:
    """The file name itself, or a `ValueError` when it is not one that every file system and terminal can take."""
    _check_text("file name", name, MAX_FILENAME)
    if name.startswith(".") or "/" in name or "\\" in name:
        raise ValueError(f"file name {name!r} must not start with a dot or have a slash or backslash in it")
    return name


class _Pointer(msgspec.Struct, array_like=True, forbid_unknown_fields=True, frozen=True, gc=False):
    format: Literal[1]
    url: str
    version: str
    provider_name: str
    manifest_sha256: bytes
    manifest_size: int


_encode_msgpack = msgspec.msgpack.Encoder().encode
_decode_pointer = msgspec.msgpack.Decoder(_Pointer).decode


@dataclass(frozen=True, slots=True)
class Pointer:
    """The value of a record in the DHT: where the manifest is, and what it must be.

    Attributes:
        url: http or https URL of `manifest.json`, at most 480 bytes.
        version: the version of the artifacts, at most 64 bytes of UTF-8.
        provider_name: who serves it, for people; at most 100 bytes of UTF-8.
        manifest_sha256: the SHA-256 of `manifest.json`, 32 bytes.
        manifest_size: its size in bytes, at most 1 MiB.
    """

    url: str
    version: str
    provider_name: str
    manifest_sha256: bytes
    manifest_size: int

    def encode(self) -> bytes:
        """Msgpack `[1, url, version, provider_name, sha256, size]`. Raises `ArtifactsError` when a field is invalid."""
        try:
            self._check()
        except ValueError as error:
            raise ArtifactsError(f"the manifest cannot be advertised: {error}") from None
        return _encode_msgpack(
            [1, self.url, self.version, self.provider_name, self.manifest_sha256, self.manifest_size]
        )

    @classmethod
    def decode(cls, data: object) -> Self:
        """The pointer in a record's value. Raises `VerificationError`, and nothing else, when it is none."""
        if not isinstance(data, bytes):
            raise VerificationError(f"the record's value is {type(data).__name__}, not the pointer to a manifest")
        try:
            raw = _decode_pointer(data)
            pointer = cls(raw.url, raw.version, raw.provider_name, raw.manifest_sha256, raw.manifest_size)
            pointer._check()
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise VerificationError(f"the record's value is not the pointer to a manifest: {error}") from None
        return pointer

    def _check(self) -> None:
        _check_url(self.url)
        _check_text("version", self.version, MAX_VERSION)
        _check_text("provider name", self.provider_name, MAX_PROVIDER_NAME)
        if len(self.manifest_sha256) != hashlib.sha256().digest_size:
            raise ValueError(f"the hash of the manifest has {len(self.manifest_sha256)} bytes: a SHA-256 has 32")
        if not 1 <= self.manifest_size <= MAX_MANIFEST:
            raise ValueError(f"manifest size {self.manifest_size} must be 1 to {MAX_MANIFEST} bytes")


class ServedFile(Protocol):
    """What a manifest says of a file; `plasm_dht.provider.artifacts.ArtifactFile` is one."""

    @property
    def role(self) -> str:
        """`kernel`, `initramfs`, `rootfs` or the file name."""

    @property
    def filename(self) -> str:
        """The last part of its URL."""

    @property
    def size(self) -> int:
        """Bytes."""

    @property
    def sha256(self) -> str:
        """64 hex digits."""


@dataclass(frozen=True, slots=True)
class Artifact:
    """One file as a verified manifest describes it. `size` in bytes, `sha256` as 64 hex digits."""

    role: str
    filename: str
    size: int
    sha256: str
    urls: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Manifest:
    """A verified manifest. Times in Unix ms; `artifacts` by role."""

    target: str
    version: str
    manifest_version: int
    created_at: int
    expires_at: int
    artifacts: dict[str, Artifact]


class _ArtifactEntry(msgspec.Struct, frozen=True):
    filename: str
    hash: Annotated[str, msgspec.Meta(pattern="^sha256:[0-9a-f]{64}\\Z")]
    size: Annotated[int, msgspec.Meta(ge=0, le=_MAX_SIZE)]
    urls: Annotated[list[str], msgspec.Meta(min_length=1, max_length=MAX_CHOICES)]


class _Document(msgspec.Struct, frozen=True):
    manifest_version: Annotated[int, msgspec.Meta(ge=0, le=_MAX_SIZE)]
    version: str
    channel: str
    arch: str
    created_at: Annotated[datetime, msgspec.Meta(tz=True)]
    expires_at: Annotated[datetime, msgspec.Meta(tz=True)]
    artifacts: dict[str, _ArtifactEntry]


class _Signature(msgspec.Struct, frozen=True):
    keyid: str
    sig: str


_Signatures = Annotated[list[_Signature], msgspec.Meta(max_length=MAX_CHOICES)]


class _Signed(msgspec.Struct, frozen=True):
    data: str


def _canonical(document: dict[str, Any]) -> bytes:
    return msgspec.json.encode(document, order="sorted")


def _iso(milliseconds: int) -> str:
    return datetime.fromtimestamp(milliseconds // 1000, UTC).isoformat().replace("+00:00", "Z")


def build_manifest(
    identity: Identity,
    *,
    target: str,
    version: str,
    files: Iterable[ServedFile],
    base_url: str,
    manifest_version: int,
    created_at: int,
) -> bytes:
    """The signed `manifest.json` of a `CHANNEL/ARCH`; it expires 30 days after `created_at` (Unix ms).

    `base_url` is what `/CHANNEL/ARCH/FILE` is appended to. The same arguments give the same bytes. Raises
    `ArtifactsError` when the document is larger than 1 MiB.
    """
    channel, arch = check_target(target).split("/")
    document: dict[str, Any] = {
        "manifest_version": manifest_version,
        "version": version,
        "channel": channel,
        "arch": arch,
        "created_at": _iso(created_at),
        "expires_at": _iso(created_at + MANIFEST_LIFETIME),
        "artifacts": {
            file.role: {
                "filename": file.filename,
                "hash": f"sha256:{file.sha256}",
                "size": file.size,
                "urls": [f"{base_url.rstrip('/')}/{target}/{quote(file.filename, safe='')}"],
            }
            for file in files
        },
    }
    signed = _canonical(document)
    signature = identity.sign(hashlib.sha256(signed).digest())
    document["signatures"] = [{"keyid": identity.publisher_id, "sig": base64.b64encode(signature).decode()}]
    document["signed"] = {"data": base64.b64encode(signed).decode()}
    data = msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n"
    if len(data) > MAX_MANIFEST:
        raise ArtifactsError(
            f"the manifest of {target} has {len(data)} bytes: at most {MAX_MANIFEST} fit, serve fewer files"
        )
    return data


def verify_manifest(data: bytes, public_key: bytes) -> Manifest:
    """The manifest in the bytes, once it is proven that the holder of `public_key` (32 bytes) signed all of it.

    Raises `VerificationError`, and nothing else. Whether it is the target that was asked for, and whether it has
    expired, the caller decides: it has the name and the time.
    """
    if len(data) > MAX_MANIFEST:
        raise VerificationError(f"manifest.json has {len(data)} bytes: at most {MAX_MANIFEST} are allowed")
    try:
        return _verify(data, public_key)
    except (msgspec.MsgspecError, ArtifactsError, ValueError, ArithmeticError, RecursionError) as error:
        raise VerificationError(f"manifest.json cannot be trusted: {error}") from None


def _verify(data: bytes, public_key: bytes) -> Manifest:
    document = msgspec.json.decode(data, type=dict[str, Any])
    signatures = msgspec.convert(document.pop("signatures", None), _Signatures)
    signed = base64.b64decode(msgspec.convert(document.pop("signed", None), _Signed).data, validate=True)
    if signed != _canonical(document):
        raise ValueError("what is signed (signed.data) is not what the document says")
    digest = hashlib.sha256(signed).digest()
    keyid = publisher_id(public_key)
    ours = [base64.b64decode(signature.sig, validate=True) for signature in signatures if signature.keyid == keyid]
    if not any(verify_signature(public_key, signature, digest) for signature in ours):
        raise ValueError(f"it has no valid signature of {keyid}")
    return _typed(msgspec.convert(document, _Document))


def _typed(document: _Document) -> Manifest:
    target = check_target(f"{document.channel}/{document.arch}")
    _check_text("version", document.version, MAX_VERSION)
    artifacts = {}
    for role, entry in document.artifacts.items():
        check_filename(role)
        check_filename(entry.filename)
        for url in entry.urls:
            _check_url(url)
        sha256 = entry.hash.removeprefix("sha256:")
        artifacts[role] = Artifact(role, entry.filename, entry.size, sha256, tuple(entry.urls))
    if len({artifact.filename for artifact in artifacts.values()}) != len(artifacts):
        raise ValueError("two artifacts have the same file name")
    return Manifest(
        target,
        document.version,
        document.manifest_version,
        round(document.created_at.timestamp() * 1000),
        round(document.expires_at.timestamp() * 1000),
        artifacts,
    )
