"""The routing table: verified contacts, the k truly closest of them, and who yields when a bucket is full.

A contact is here because its address answered a query of ours, never because somebody named it. The table sends
nothing: it says whom to ping and is told who answered and who did not.
"""

import functools
import ipaddress
from collections import Counter
from collections.abc import Callable, Iterator

from kademlia.node import Node
from kademlia.routing import KBucket, RoutingTable

from plasm_dht.clock import Clock
from plasm_dht.dht.distance import ByDistance
from plasm_dht.dht.ids import ID_BYTES, TRANSIENT_ID, Address, encode_node

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
# Multiples of k that are known at one distance before strangers from there are no longer pinged. One k is enough to
# route; two, so that of the 60 or so nearest to us, which share records with us, all are known.
WELCOME_UP_TO = 2


@functools.lru_cache(maxsize=16384)
def network_of(ip: str) -> str | None:
    """The /24 (IPv6: /64) of an address; `None` for loopback and private ones, where many nodes are neighbours."""
    address = ipaddress.ip_address(ip)
    if address.is_private or address.is_loopback or address.is_link_local:
        return None
    return str(ipaddress.ip_network((ip, 24 if address.version == 4 else 64), strict=False))


class Contact(Node):  # type: ignore[misc]  # the base library has no types
    """A node that can be asked: its id (20 bytes), its address (ip, port), and how it answered us.

    `encoded` is how the wire names it, while it is in the routing table.
    """

    id: bytes
    ip: str
    port: int
    long_id: int
    encoded = b""

    def __init__(self, node_id: bytes, ip: str, port: int) -> None:
        super().__init__(node_id, ip, port)
        self.missed = 0
        self.missed_since = 0.0
        self.heard_at = 0.0
        self.address: Address = (ip, port)

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
        contacts: list[Contact] = list(self.nodes.values())
        for contact in contacts:
            if contact.is_stale:
                return contact
        share = Counter(network_of(contact.ip) for contact in contacts)
        if network_of(newcomer.ip) is not None and share[network_of(newcomer.ip)] >= NETWORK_SHARE:
            return None
        for contact in reversed(contacts):
            network = network_of(contact.ip)
            if network is not None and share[network] > NETWORK_SHARE:
                return contact
        return None


class PlasmRoutingTable(RoutingTable):  # type: ignore[misc]  # the base library has no types
    """kademlia's routing table with exact closest sets, verified contacts and our clock."""

    def __init__(self, protocol: object, ksize: int, node: Node, clock: Clock) -> None:
        self.clock = clock
        # Called when the last live contact has become stale.
        self.on_alone: Callable[[], None] | None = None
        # Grows with each change of what is handed out.
        self.version = 0
        super().__init__(protocol, ksize, node)

    def flush(self) -> None:
        """Forget everybody."""
        self.buckets = [Bucket(0, 2 ** (ID_BYTES * 8) - 1, self.ksize, self.clock)]
        self.version += 1
        self._live: ByDistance[Contact] = ByDistance()
        self._stale: ByDistance[Contact] = ByDistance()
        self._by_id: dict[int, Contact] = {}
        self.by_address: dict[Address, Contact] = {}  # to be read only

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Contact]:
        return iter(self._by_id.values())

    def live(self) -> list[Contact]:
        """Every contact that is not stale."""
        return [contact for contact in self._by_id.values() if not contact.is_stale]

    @property
    def live_count(self) -> int:
        """How many contacts are not stale."""
        return len(self._live)

    def find(self, node_id: bytes) -> Contact | None:
        """The contact with this id."""
        return self._by_id.get(int.from_bytes(node_id))

    def at(self, address: Address) -> Contact | None:
        """The contact with this (ip, port)."""
        return self.by_address.get(address)

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
        if self.count_at((node.long_id ^ self.node.long_id).bit_length() - 1) >= WELCOME_UP_TO * self.ksize:
            return False  # who we ask ourselves enters without a ping; else each request costs two more datagrams
        bucket = self.buckets[self.get_bucket_for(node)]
        return len(bucket) < self.ksize or self._splits(bucket) or any(each.is_stale for each in bucket.nodes.values())

    def count_at(self, bit: int) -> int:
        """How many live contacts first differ from our id at this bit (159 is the highest): the paper's k-bucket."""
        low = (self.node.long_id >> bit ^ 1) << bit
        return self._live.count_between(low, low + (1 << bit))

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
        for replaced in (known, self.by_address.get(contact.address)):  # one address is one node
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
        limit = self.clock.monotonic() - STALE_KEPT
        for contact in list(self._stale):
            if contact.missed_since < limit:
                self._drop(contact, promote=True)

    def closest(self, key: int, k: int, *, stale: bool = False) -> list[Contact]:
        """Exactly the k contacts of the smallest XOR distance to the key, nearest first; `stale`: only stale ones."""
        return self._those(stale=stale).closest(key, k)

    def nearest(self, key: int, k: int) -> tuple[list[Contact], list[Contact], list[int]]:
        """The k closest live contacts, in no order; who comes next, or nobody; the bits of the key that decide it.

        For all keys that are alike in these bits (159 is the highest), in this order, it is the same contacts and bits.
        """
        return self._live.nearest(key, k)

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

    def neglected(self) -> list[Bucket]:
        """Of each distance (the paper's k-bucket) without a lookup in the last hour the bucket without one for longest.

        A distance may be split into 31 buckets: that makes room, and must not make 31 times the upkeep.
        """
        oldest: dict[int, Bucket] = {}
        newest: dict[int, float] = {}
        for bucket in self.buckets:
            bit = 0 if bucket.has_in_range(self.node) else (bucket.range[0] ^ self.node.long_id).bit_length()
            if bit not in oldest or bucket.last_updated < oldest[bit].last_updated:
                oldest[bit] = bucket
            newest[bit] = max(newest.get(bit, 0.0), bucket.last_updated)
        limit = self.clock.monotonic() - LONELY_AFTER
        return [bucket for bit, bucket in oldest.items() if newest[bit] <= limit]

    def thin_ranges(self) -> Iterator[tuple[int, int]]:
        """(lowest, highest id) of each distance with fewer than k live contacts, farthest first, as they are by then.

        Only of those farther than the k closest contacts: what is nearer is in a lookup of our own id.
        """
        own = self.node.long_id
        for bit in reversed(range(ID_BYTES * 8)):
            near = self.closest(own, self.ksize)
            if len(near) < self.ksize or (near[-1].long_id ^ own) >> bit:
                return
            if self.count_at(bit) < self.ksize:
                low = (own >> bit ^ 1) << bit
                yield low, low + (1 << bit) - 1

    def _those(self, *, stale: bool) -> ByDistance[Contact]:
        return self._stale if stale else self._live

    def _set_missed(self, contact: Contact, missed: int) -> None:
        """Count the missed answers of a contact in the table."""
        was_stale = contact.is_stale
        contact.missed = missed
        if contact.is_stale != was_stale:
            self._those(stale=was_stale).remove(contact.long_id)
            self._those(stale=contact.is_stale).add(contact.long_id, contact)
            self.version += 1
            if self.on_alone is not None and not self._live:
                self.on_alone()
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
        self._those(stale=contact.is_stale).add(contact.long_id, contact)
        self._by_id[contact.long_id] = contact
        contact.encoded = encode_node(contact.id, *contact.address)
        self.version += 1
        self.by_address[contact.address] = contact

    def _drop(self, contact: Contact, *, promote: bool) -> None:
        bucket = self.buckets[self.get_bucket_for(contact)]
        del bucket.nodes[contact.id]
        self._those(stale=contact.is_stale).remove(contact.long_id)
        del self._by_id[contact.long_id]
        self.version += 1
        if self.by_address.get(contact.address) is contact:
            del self.by_address[contact.address]
        while promote and bucket.replacement_nodes:
            _, replacement = bucket.replacement_nodes.popitem()
            if self.is_new_node(replacement) and replacement.address not in self.by_address:
                bucket.add_node(replacement)
                self._index(replacement)
                return
