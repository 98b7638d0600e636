"""Bytes that are documents: records, pointers, manifests, settings. Only the documented errors may come out."""

import base64
import hashlib
import json
import tempfile
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from plasm_dht.config import Override, Settings, format_address, load, parse_address, parse_seconds
from plasm_dht.dht.storage import RecordStorage
from plasm_dht.errors import ConfigError, PlasmError, RecordError, VerificationError
from plasm_dht.provider.manifest import Manifest, Pointer, build_manifest, verify_manifest
from plasm_dht.record import MAGIC, SIGNED_PREFIX, Record, decode, keys_of, verify
from tests.dht.support import IDENTITIES, START, ManualClock, forged, record
from tests.fuzz.guard import require
from tests.fuzz.source import NUMBERS, TEXTS, Source, anything, mutated, packed

REFUSALS = {
    "too_large", "malformed", "wrong_key", "clock", "expired", "ttl_too_long", "stale", "bad_signature", "conflict",
    "full",
}  # fmt: skip
ENVELOPE = record(b"value").envelope
RECORDS, BYTES = 12, 4000
SECONDS = (*(0.0,) * 12, 0.001, 0.5, 30.0, 4000.0)

# -- records ---------------------------------------------------------------------------------------------------------


class Holder:
    """A storage: what one input leaves there the next one meets."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.storage = RecordStorage(max_records=RECORDS, max_bytes=BYTES, clock=self.clock)
        self.storage.attach(bytes(20), self.clock)


class _Holding:
    now = Holder()


def renew() -> None:
    """A storage with nothing in it."""
    _Holding.now = Holder()


def _envelope(source: Source, now: int) -> bytes:
    kind = source.below(6)
    if kind == 0:
        return source.rest()
    by = source.pick(IDENTITIES)
    if kind == 1:
        return mutated(source, source.pick((ENVELOPE, record(b"new", by=by, issued_at=now).envelope)))
    if kind == 2:  # what nobody signed
        return forged(record(source.some(), by=by, issued_at=now))
    times = (now, now, now + 300_000, now + 300_001, now + 3_600_000, now + 604_800_001, *NUMBERS)
    fields: list[Any] = [
        source.pick(TEXTS), by.public_key, source.pick(times), source.pick(times[:5]),
        now + source.pick((1, 0, 60_000, 3_600_000, 604_800_000)), source.one_in(6), anything(source),
    ]  # fmt: skip
    if fields[5] and source.below(3):
        fields[6] = b""
    while source.one_in(4):
        fields[source.below(7)] = anything(source)
    body = packed(source, fields)
    return MAGIC + by.sign(SIGNED_PREFIX + body) + body


def record_bytes(data: bytes) -> None:
    """An envelope: decoded, verified, stored under its keys and under a wrong one."""
    source = Source(data)
    storage, clock = _Holding.now.storage, _Holding.now.clock
    clock.advance(source.pick(SECONDS))
    envelope = _envelope(source, clock.wall())
    try:
        decoded: Record | None = decode(envelope)
    except RecordError as error:
        require(error.reason in ("too_large", "malformed"), f"decode refuses with {error.reason}")
        require(str(error).isprintable() or not error.args, f"more than one line: {error}")
        decoded = None
    else:
        _check_fields(decoded)
    keys = [bytes(20)] if decoded is None else [*keys_of(decoded), bytes(20)]
    for key in keys:
        verdict = storage.store(key, envelope)
        require(verdict.reason is None or verdict.reason in REFUSALS, f"refused with {verdict.reason}")
        if verdict.reason is None:
            assert decoded is not None
            require(verify(decoded) and key != bytes(20), "what nobody signed was accepted")
            held = storage.holding(key, decoded.public_key)
            require(held is not None and held.envelope == envelope, "accepted, and not held")
        storage.get(key)
    require(decoded is None or decoded.envelope is envelope, "other bytes than those received")
    require(storage.records <= RECORDS and storage.bytes <= BYTES, f"{storage.records} records, {storage.bytes} bytes")
    require(len(storage._expiry) == storage.records, "the order of expiry is not that of the records")


def _check_fields(decoded: Record) -> None:
    """Whatever was decoded is what the contract allows, whoever signed it."""
    name, numbers = decoded.name, (decoded.seq, decoded.issued_at, decoded.expires_at)
    require(0 < len(name.encode()) <= 255, f"a name of {len(name.encode())} bytes")
    require(not any(unicodedata.category(each) == "Cc" for each in name), f"a control character in {name!r}")
    require(len(decoded.public_key) == 32, f"a publisher of {len(decoded.public_key)} bytes")
    require(all(type(each) is int and 0 <= each < 2**64 for each in numbers), f"numbers like {numbers}")
    require(type(decoded.value) in (int, float, bool, str, bytes), f"a value like {decoded.value!r}")
    require(not decoded.withdrawn or decoded.value == b"", "a tombstone with a value")


# -- pointers and manifests ------------------------------------------------------------------------------------------

URLS = (
    "http://10.0.0.1:8080/stable/arm64/manifest.json", "https://h/", "http://[::1]:80/x", "http://[::1", "ftp://x/",
    "http://u:p@h/", "http://h:0/", "http://h:99999/", "http://h:x/", "http://\u2100/", "http://h/\n", "http:///x",
    "//h/x", "http://h/" + "x" * 480, "http://[v1.x]/", "http://[fe80::1%25eth0]/", "file:///etc/passwd",
)  # fmt: skip


class File(msgspec.Struct):
    """What a manifest says of a file."""

    role: str
    filename: str
    size: int
    sha256: str


BY = IDENTITIES[0]
MANIFEST = build_manifest(
    BY, target="stable/arm64", version="1.2", base_url="http://10.0.0.1:8080", manifest_version=7, created_at=START,
    files=[File("kernel", "vmlinuz", 5, "0a" * 32), File("x.cfg", "x.cfg", 0, "0" * 64)],
)  # fmt: skip
POINTER = Pointer(URLS[0], "1.2", "rack-7", bytes(range(32)), 1234).encode()


def pointer_bytes(data: bytes) -> None:
    """The value of a record that should be a pointer."""
    source = Source(data)
    kind = source.below(4)
    if kind == 0:
        value: Any = source.rest()
    elif kind == 1:
        value = mutated(source, POINTER)
    elif kind == 2:
        value = anything(source)
    else:
        fields: list[Any] = [1, source.pick(URLS), source.pick(TEXTS), source.pick(TEXTS), bytes(32), 1234]
        if source.below(2):
            fields[source.below(6)] = anything(source)
        value = packed(source, fields)
    try:
        pointer = Pointer.decode(value)
    except VerificationError as error:
        _one_line(error)
    else:
        require(pointer.url.isprintable() and pointer.url.lower().startswith("http"), f"a URL like {pointer.url!r}")
        require(Pointer.decode(pointer.encode()) == pointer, "it does not survive being encoded")


# Stands for a number that Python neither writes nor reads.
HUGE = "@huge"


def dumps(document: Any, **options: Any) -> str:
    """JSON; also of a number that Python does not write."""
    return json.dumps(document, **options).replace(f'"{HUGE}"', "1" * 5000)


def as_json(source: Source, depth: int = 3) -> Any:
    """A value of JSON, nested a little."""
    kind = source.below(9 if depth else 7)
    if kind == 0:
        return source.pick((*NUMBERS, 10**30, HUGE))
    if kind < 3:
        return source.pick(TEXTS + URLS)
    if kind < 7:
        return source.pick((None, True, 0.5, 1e308, source.some().decode("latin-1"), "sha256:" + "0" * 64))
    if kind == 7:
        return [as_json(source, depth - 1) for _ in range(source.below(5))]
    return {source.pick(TEXTS): as_json(source, depth - 1) for _ in range(source.below(4))}


TIMES = (
    "2027-01-15T08:00:00Z", "0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-12:00", "2027-01-15", "0000-00-00T00:00Z",
    "2027-01-15T08:00:00", "2027-06-30T23:59:60Z",
)  # fmt: skip


def unsigned(manifest: bytes) -> dict[str, Any]:
    """What a manifest says, without its signature."""
    return {key: value for key, value in json.loads(manifest).items() if key not in ("signatures", "signed")}


def varied(source: Source, manifest: bytes) -> dict[str, Any]:
    """What the manifest says with up to three things in it changed."""
    document = unsigned(manifest)
    artifacts = document["artifacts"]
    first = next(iter(artifacts.values()))
    changes: list[Callable[[], object]] = [
        lambda: document.update({source.pick(list(document)): as_json(source)}),
        lambda: document.pop(source.pick(list(document))),
        lambda: document.update({source.pick(("created_at", "expires_at")): source.pick(TIMES)}),
        lambda: first.update({source.pick(("filename", "hash", "size", "urls")): as_json(source)}),
        lambda: first.update({"urls": [source.pick(URLS) for _ in range(source.below(20))]}),
        lambda: artifacts.update({source.pick(TEXTS): dict(first)}),
        lambda: document.update({source.pick(TEXTS): as_json(source)}),
    ]
    for _ in range(source.below(4)):
        if not document:
            break
        source.pick(changes)()
    return document


def signed(document: dict[str, Any]) -> bytes:
    """What the publisher whom we trust has signed, whatever it says."""
    data = dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    signature = base64.b64encode(BY.sign(hashlib.sha256(data).digest())).decode()
    around = {
        "signatures": [{"keyid": BY.publisher_id, "sig": signature}],
        "signed": {"data": base64.b64encode(data).decode()},
    }
    return dumps(document | around).encode()


def manifest_bytes(data: bytes) -> None:
    """A `manifest.json`: made up, changed on its way, or signed by a trusted publisher who has gone mad."""
    source = Source(data)
    kind = source.below(5)
    if kind == 0:
        document = source.rest()
    elif kind == 1:
        document = mutated(source, MANIFEST)
    elif kind == 2:
        document = dumps(json.loads(MANIFEST) | {"signatures": as_json(source), "signed": as_json(source)}).encode()
    else:
        document = signed(varied(source, MANIFEST))
        document = mutated(source, document) if source.one_in(5) else document
    try:
        manifest = verify_manifest(document, BY.public_key)
    except VerificationError as error:
        _one_line(error)
    else:
        _check_manifest(manifest)


def _check_manifest(manifest: Manifest) -> None:
    for role, artifact in manifest.artifacts.items():
        require(role == artifact.role and len(artifact.sha256) == 64 and artifact.size >= 0, f"{artifact}")
        require("/" not in artifact.filename and not artifact.filename.startswith("."), f"{artifact.filename!r}")
        require(all(url.isprintable() for url in artifact.urls), f"{artifact.urls}")


# -- settings --------------------------------------------------------------------------------------------------------

SETTINGS = (
    "provider.name", "provider.artifacts_dir", "provider.http_host", "provider.http_port", "provider.base_url",
    "provider.dht.host", "provider.dht.port", "provider.dht.bootstrap", "provider.dht.record_ttl",
    "provider.dht.refresh_interval", "trust.publishers",
)  # fmt: skip
TABLES = ("provider", "provider.dht", "trust", "provider.x", "", "x.y", '"provider.dht"')
VALUES = (
    "1", "0", "-1", "65536", "0x" + "f" * 20, "0x" + "f" * 4000, "1e400", "nan", "inf", "0.1", "true", '""', '"a"',
    '"\\u0000"', '"~nobody-here/x"', '"http://h/"', '"http://[::1"', '"[::1]:8468"', '["10.0.0.1:1", "h:2"]', "[1]",
    '["ed25519:' + "0a" * 32 + '"]', "2027-01-15T08:00:00Z", "{a = 1}", "[" * 200, '"""\n"""', "3600", "60.5",
)  # fmt: skip
TYPED = (
    "", "1", "8468", "+5", "1e3", "1e999", "x" * 2000, "\x00", "\udcff", "~", "~/x", "~\udcff", "::1", "[::1]:1", "h:0",
    "h:99999", "a:b:c", "http://h", "http://h:x", "\u0661", "1_000", " 1", "9" * 5000, "\n", "\u2028", "%s", "nan",
    "ed25519:" + "0a" * 32, "http://\u2100.x/", "http://[v1]/",
)  # fmt: skip
_folder = tempfile.TemporaryDirectory(prefix="plasm-fuzz-")
_file = Path(_folder.name) / "plasm.toml"


def _toml(source: Source) -> bytes:
    kind = source.below(6)
    if kind == 0:
        return source.rest()
    lines = []
    for _ in range(source.below(8)):
        if source.below(3) == 0:
            lines.append(f"[{source.pick(TABLES)}]")
            continue
        key = source.pick(SETTINGS)
        key = key if source.below(3) else key.rpartition(".")[2]
        if source.one_in(8):
            key = source.pick(('"a\\nb"', '"\\u2028"', '"provider.name"', "a b", "'\x1b'", ""))
        elif source.one_in(8):
            key += "." + ".".join(source.pick(("a", "b")) * source.pick((1, 2, 3, 4, 5, 6, 7, 1100)))
        lines.append(f"{key} = {source.pick(VALUES)}")
    text = "\n".join(lines).encode()
    return mutated(source, text) if kind == 1 else text


def settings_bytes(data: bytes) -> None:
    """A settings file, and what flags and variables put over it."""
    source = Source(data)
    overrides = [
        Override(source.pick(SETTINGS), (text, source.pick(TYPED)) if source.one_in(3) else text, "PLASM_DHT_X")
        for text in (source.pick(TYPED) if source.below(4) else source.some().decode("utf-8", "surrogateescape")
                     for _ in range(source.below(4)))
    ]  # fmt: skip
    text = source.pick(TYPED)
    for parse in (parse_address, lambda typed: parse_seconds(typed, source="--ttl", least=1, most=10)):
        try:
            parse(text)
        except ConfigError as error:
            _one_line(error)
    _file.write_bytes(_toml(source))
    try:
        settings = load(_file if source.below(8) else None, overrides)
    except ConfigError as error:
        _one_line(error)
    else:
        _check_settings(settings)


def _check_settings(settings: Settings) -> None:
    require(1 <= len(settings.name.encode()) <= 100, f"name {settings.name!r}")
    require(0 <= settings.http_port < 65536 and 0 <= settings.dht.port < 65536, f"ports {settings}")
    require(1 <= settings.dht.record_ttl <= 604_800, f"ttl {settings}")
    require(settings.base_url is None or settings.base_url.isprintable(), f"URL {settings.base_url!r}")
    for address in settings.dht.bootstrap:
        require(parse_address(format_address(address)) == address, f"address {address!r}")


def _one_line(error: PlasmError) -> None:
    require(type(error) in (ConfigError, VerificationError), f"{error!r}")
    text = str(error)
    require(text.isprintable(), f"not one line: {text[:300]!r}")
