"""The routing table: verified contacts, the k truly closest of them, and who yields when a bucket is full.

A contact is here because its address answered a query of ours, never because somebody named it. The table sends
nothing: it says whom to ping and is told who answered and who did not.
"""

import functools
import ipaddress
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterator

from kademlia.node import Node
from kademlia.routing import KBucket, RoutingTable

from plasm_dht.clock import Clock
from plasm_dht.dht.ids import ID_BYTES, TRANSIENT_ID, Address, NodeTuple

# Missed answers in a row that make a contact stale: one is a lost datagram (the paper, section 4.1, waits for several).
STALE_AFTER = 2
# A stale contact without a replacement is kept this long (s), so that a broken link of our own empties no table.
STALE_KEPT = 24 * 3600
# A bucket without a lookup for this long (s) is refreshed (the paper, section 2.3).
LONELY_AFTER = 3600
# Contacts of one network in a full bucket before the next one yields first.
NETWORK_SHARE = 2
# Depth of the buckets away from our own id: a bucket is split until its depth is a multiple of this (the paper, 4.2).
SPLIT_BITS = 5


@functools.lru_cache(maxsize=16384)
def network_of(ip: str) -> str | None:
    """The /24 (IPv6: /64) of an address; `None` for loopback and private ones, where many nodes are neighbours."""
    address = ipaddress.ip_address(ip)
    if address.is_private or address.is_loopback or address.is_link_local:
        return None
    return str(ipaddress.ip_network((ip, 24 if address.version == 4 else 64), strict=False))


class Contact(Node):  # type: ignore[misc]  # the base library has no types
    """A node that can be asked: its id (20 bytes), its address (ip, port), and how it answered us.

    `named` is how the wire names it.
    """

    id: bytes
    ip: str
    port: int
    long_id: int

    def __init__(self, node_id: bytes, ip: str, port: int) -> None:
        super().__init__(node_id, ip, port)
        self.missed = 0
        self.missed_since = 0.0
        self.heard_at = 0.0

        self.address: Address = (ip, port)
        self.named = NodeTuple(node_id, ip, port)

    @property
    def is_stale(self) -> bool:
        """Whether it missed so many answers in a row that it is asked last and handed out to nobody."""
        return self.missed >= STALE_AFTER


class Bucket(KBucket):  # type: ignore[misc]  # the base library has no types
    """A k-bucket that ages by our clock. Its replacement cache holds verified contacts, the latest last."""

    def __init__(self, lower: int, upper: int, ksize: int, clock: Clock) -> None:
        self.clock = clock
        super().__init__(lower, upper, ksize, replacementNodeFactor=1)

    def touch_last_updated(self) -> None:
        """Note a lookup in this bucket's range."""
        self.last_updated = self.clock.monotonic()

    def split(self) -> tuple["Bucket", "Bucket"]:
        """Two buckets, one for each half of the range, with the contacts of this one.

        A bucket that can be split never had replacements: it was split when it was full.
        """
        middle = (self.range[0] + self.range[1]) // 2
        lower = Bucket(self.range[0], middle, self.ksize, self.clock)
        upper = Bucket(middle + 1, self.range[1], self.ksize, self.clock)
        for contact in self.nodes.values():
            (lower if contact.long_id <= middle else upper).add_node(contact)
        lower.last_updated = upper.last_updated = self.last_updated
        return lower, upper

    def depth(self) -> int:
        """The bits that all ids of the range share."""
        size: int = self.range[1] - self.range[0] + 1
        return ID_BYTES * 8 + 1 - size.bit_length()

    def yielding(self, newcomer: Contact) -> Contact | None:
        """Who makes room for a verified newcomer in a full bucket: a stale contact, else the third of one network."""
        for contact in self.nodes.values():
            if contact.is_stale:
                return contact  # type: ignore[no-any-return]
        share = Counter(network_of(contact.ip) for contact in self.nodes.values())
        if network_of(newcomer.ip) is not None and share[network_of(newcomer.ip)] >= NETWORK_SHARE:
            return None
        for contact in reversed(self.nodes.values()):
            network = network_of(contact.ip)
            if network is not None and share[network] > NETWORK_SHARE:
                return contact  # type: ignore[no-any-return]
        return None


class PlasmRoutingTable(RoutingTable):  # type: ignore[misc]  # the base library has no types
    """kademlia's routing table with exact closest sets, verified contacts and our clock."""

    def __init__(self, protocol: object, ksize: int, node: Node, clock: Clock) -> None:
        self.clock = clock
        super().__init__(protocol, ksize, node)

    def flush(self) -> None:
        """Forget everybody."""
        self.buckets = [Bucket(0, 2 ** (ID_BYTES * 8) - 1, self.ksize, self.clock)]
        self._ids: list[int] = []  # sorted, so that the closest are found by halving the range
        self._by_id: dict[int, Contact] = {}
        self._by_address: dict[Address, Contact] = {}
        self._stale_count = 0

    def __len__(self) -> int:
        return len(self._ids)

    def __iter__(self) -> Iterator[Contact]:
        return iter(self._by_id.values())

    def live(self) -> list[Contact]:
        """Every contact that is not stale."""
        return [contact for contact in self._by_id.values() if not contact.is_stale]

    @property
    def live_count(self) -> int:
        """How many contacts are not stale."""
        return len(self._ids) - self._stale_count

    def find(self, node_id: bytes) -> Contact | None:
        """The contact with this id."""
        return self._by_id.get(int.from_bytes(node_id))

    def at(self, address: Address) -> Contact | None:
        """The contact with this (ip, port)."""
        return self._by_address.get(address)

    def get_bucket_for(self, node: Node) -> int:
        """The index of the bucket in whose range the node falls."""
        low, high = 0, len(self.buckets) - 1
        while low < high:
            middle = (low + high) // 2
            if node.long_id <= self.buckets[middle].range[1]:
                high = middle
            else:
                low = middle + 1
        return low

    def has_room_for(self, node: Node) -> bool:
        """Whether an unknown id would get a place if it answered: only then is it worth a ping."""
        if node.id in (TRANSIENT_ID, self.node.id):
            return False
        bucket = self.buckets[self.get_bucket_for(node)]
        return len(bucket) < self.ksize or self._splits(bucket) or any(each.is_stale for each in bucket.nodes.values())

    def is_new_node(self, node: Node) -> bool:
        """Whether no contact has this id."""
        return node.long_id not in self._by_id

    def add_contact(self, node: Node) -> bool:
        """Take in a contact whose address has answered. Returns whether it is in the table now and was not before."""
        if node.id in (TRANSIENT_ID, self.node.id):
            return False
        known = self._by_id.get(node.long_id)
        if known is not None and (known.address == (node.ip, node.port) or not known.is_stale):
            # An id that moved is followed once its old address has stopped to answer.
            if known.address == (node.ip, node.port):
                self._set_missed(known, 0)
                known.heard_at = self.clock.monotonic()
            return False
        contact = node if isinstance(node, Contact) else Contact(node.id, node.ip, node.port)
        contact.missed = 0
        contact.heard_at = self.clock.monotonic()
        for replaced in (known, self._by_address.get(contact.address)):  # one address is one node
            if replaced is not None:
                self._drop(replaced, promote=self.get_bucket_for(replaced) != self.get_bucket_for(contact))
        return self._place(contact)

    def remove_contact(self, node: Node) -> None:
        """Forget a contact; the latest of its bucket's replacements moves up."""
        contact = self._by_id.get(node.long_id)
        if contact is not None:
            self._drop(contact, promote=True)

    def miss(self, contact: Contact) -> None:
        """Note that an answer is missing. A stale contact goes when a verified replacement is there, else stays."""
        known = self._by_id.get(contact.long_id)
        if known is None or known.address != contact.address:
            return
        self._set_missed(known, known.missed + 1)
        if known.is_stale and self.buckets[self.get_bucket_for(known)].replacement_nodes:
            self._drop(known, promote=True)

    def expire_stale(self) -> None:
        """Forget who has been stale for a day."""
        if not self._stale_count:
            return
        limit = self.clock.monotonic() - STALE_KEPT
        for contact in [each for each in self._by_id.values() if each.is_stale and each.missed_since < limit]:
            self._drop(contact, promote=True)

    def closest(self, key: int, k: int, *, stale: bool = False) -> list[Contact]:
        """Exactly the k contacts of the smallest XOR distance to the key, nearest first; `stale`: only stale ones."""
        if stale and not self._stale_count:
            return []
        found: list[Contact] = []
        self._collect(key, k, stale, 0, len(self._ids), ID_BYTES * 8 - 1, found)
        return found[:k]

    def find_neighbors(self, node: Node, k: int | None = None, exclude: Node | None = None) -> list[Contact]:
        """The k closest live contacts, nearest first, without the node itself and whoever has `exclude`'s address."""
        k = k or self.ksize
        found = self.closest(node.long_id, k + 2)
        home = (exclude.ip, exclude.port) if exclude is not None else None
        return [contact for contact in found if contact.id != node.id and contact.address != home][:k]

    def touch(self, node: Node) -> None:
        """Note that a lookup went to this id, so that its bucket needs no refresh."""
        self.buckets[self.get_bucket_for(node)].touch_last_updated()

    def lonely_buckets(self) -> list[Bucket]:
        """The buckets without a lookup in the last hour."""
        limit = self.clock.monotonic() - LONELY_AFTER
        return [bucket for bucket in self.buckets if bucket.last_updated <= limit]

    def _collect(self, key: int, k: int, stale: bool, low: int, high: int, bit: int, found: list[Contact]) -> None:
        """Append the contacts of `_ids[low:high]`, which agree above `bit`, nearest to the key first, up to k."""
        ids = self._ids
        while high - low > k and bit >= 0:
            # Halve the range at the bit: the half that agrees with the key is nearer, whole, than the other.
            pivot = (ids[low] >> (bit + 1) << (bit + 1)) | (1 << bit)
            middle = bisect_left(ids, pivot, low, high)
            near, far = ((middle, high), (low, middle)) if key >> bit & 1 else ((low, middle), (middle, high))
            bit -= 1
            if near[0] < near[1]:
                self._collect(key, k, stale, *near, bit, found)
            if len(found) >= k:
                return
            low, high = far
        nearest = [self._by_id[each] for each in sorted(ids[low:high], key=key.__xor__)]
        found.extend(nearest if not self._stale_count else [each for each in nearest if each.is_stale is stale])

    def _set_missed(self, contact: Contact, missed: int) -> None:
        """Count the missed answers of a contact in the table."""
        was_stale = contact.is_stale
        contact.missed = missed
        self._stale_count += contact.is_stale - was_stale
        if missed == 1:
            contact.missed_since = self.clock.monotonic()

    def _splits(self, bucket: Bucket) -> bool:
        return bool(bucket.has_in_range(self.node)) or bucket.depth() % SPLIT_BITS != 0

    def _place(self, contact: Contact) -> bool:
        index = self.get_bucket_for(contact)
        bucket = self.buckets[index]
        while len(bucket) >= self.ksize and self._splits(bucket):
            self.split_bucket(index)
            index = self.get_bucket_for(contact)
            bucket = self.buckets[index]
        if len(bucket) >= self.ksize:
            yielding = bucket.yielding(contact)
            if yielding is None:
                bucket.add_node(contact)  # into the replacement cache
                return False
            self._drop(yielding, promote=False)
            if not yielding.is_stale:
                bucket.replacement_nodes[yielding.id] = yielding
        bucket.replacement_nodes.pop(contact.id, None)  # else it would replace itself when it has died
        bucket.add_node(contact)
        self._index(contact)
        return True

    def _index(self, contact: Contact) -> None:
        insort(self._ids, contact.long_id)
        self._by_id[contact.long_id] = contact
        self._stale_count += contact.is_stale
        self._by_address[contact.address] = contact

    def _drop(self, contact: Contact, *, promote: bool) -> None:
        bucket = self.buckets[self.get_bucket_for(contact)]
        del bucket.nodes[contact.id]
        del self._ids[bisect_left(self._ids, contact.long_id)]
        del self._by_id[contact.long_id]
        self._stale_count -= contact.is_stale
        if self._by_address.get(contact.address) is contact:
            del self._by_address[contact.address]
        while promote and bucket.replacement_nodes:
            _, replacement = bucket.replacement_nodes.popitem()
            if self.is_new_node(replacement) and replacement.address not in self._by_address:
                bucket.add_node(replacement)
                self._index(replacement)
                return
