"""What is said of a record that was found, as `get --json` and the gateway say it."""

from collections.abc import Collection

from plasm_dht.provider.manifest import Pointer
from plasm_dht.record import Record


def facts(target: str, record: Record, pointer: Pointer, *, now: int, trusted: Collection[str]) -> dict[str, object]:
    """The fields of the JSON object. `now` in Unix ms; `trusted`: the publisher ids of a trust list."""
    return {
        "key": target,
        "url": pointer.url,
        "version": pointer.version,
        "publisher": record.publisher,
        "provider_name": pointer.provider_name,
        "seq": record.seq,
        "issued_at": record.issued_at,
        "expires_at": record.expires_at,
        "ttl_remaining": max(0, record.expires_at - now) / 1000,
        "manifest_sha256": pointer.manifest_sha256.hex(),
        "trusted": record.publisher in trusted,
    }
