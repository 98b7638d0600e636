"""A node that is fed datagrams: a real `PlasmServer` on a virtual-time loop, its socket a list of what it sends."""

import asyncio
import random
from collections import Counter, deque
from collections.abc import Callable
from contextlib import ExitStack, aclosing, suppress
from typing import Any
from unittest import mock

import msgspec

from plasm_dht.dht import answers, limits, nearest, protocol, roundtrip, storage, wire
from plasm_dht.dht.call import Call
from plasm_dht.dht.lookup import MAX_ASKED
from plasm_dht.dht.server import PlasmServer
from plasm_dht.errors import PlasmError
from plasm_dht.record import bound_key, shared_key
from tests.dht.support import HERE, IDENTITIES, START, HalfManualClock, forged, record
from tests.fuzz.guard import Stage, WatchedLoop, require
from tests.fuzz.source import Source, anything, mutated, packed

NAMES = ("/phase/stable/arm64/manifest", "any/name")
KEYS = [key for name in NAMES for key in (shared_key(name), bound_key(IDENTITIES[0].public_key, name))]
OWN_ID = b"\x55" * 20
IDS = (*(bytes([n]) * 20 for n in (0x54, 0x56, 0x15, 0x99, 0xFF)), OWN_ID, bytes(20), b"", b"\x01" * 19, b"\x01" * 300)
IPS = (
    "10.9.8.7", "198.51.100.4", "2001:db8::1", "::1", "0.0.0.0", "224.0.0.1", "255.255.255.255", "localhost", "",
    "1.2.3.4.5", "fe80::1%eth0", "fe80::1%\x00", "::ffff:10.0.0.1", "\u0661.1.1.1", "x" * 4000,
)  # fmt: skip
NAMED = ("ping", "stun", "store", "find_node", "find_value")
SECONDS = (*(0.0, 0.01, 0.1) * 6, *(0.5, 1.0) * 3, 2.5, 5.0)
LONG = (20.0, 61.0, 310.0, 3700.0)
# Every key that `dropped` may ever have: it is shown as a metric, so the network must not make up others.
REASONS = {
    "size", "type", "rate_limit", "malformed", "busy", "unasked", "network_error", "too_large", "wrong_key", "clock",
    "expired", "ttl_too_long", "stale", "unverified", "bad_signature", "conflict", "full",
}  # fmt: skip
# The tables' caps while a world is small, so that a few hundred datagrams fill them.
SMALL = (
    (limits, "MAX_ADDRESSES", 64), (roundtrip, "MAX_ADDRESSES", 64), (protocol, "MAX_PINGS", 12), (answers, "KEPT", 8),
    (nearest, "MAX_KEPT", 8),
    (storage, "MAX_PUBLISHERS", 6),
)  # fmt: skip
RECORDS, BYTES, TASKS = 24, 9000, 4
# What fits the least MTU of IPv6; not what the code believes.
MOST = 1232

_random = random.Random(1)
ENVELOPES = [
    record(value, by=by, name=name, seq=seq, issued_at=START + ahead * 1000, life=life, withdrawn=withdrawn).envelope
    for value, by, name, seq, ahead, life, withdrawn in (
        (b"v" * (n * 37 % 400), IDENTITIES[n % 8], NAMES[n // 8 % 2], START + n // 16, *kind)
        for n in range(48)
        for kind in [_random.choice([(0, 3600, False), (0, 30, False), (0, 90_000, True), (-7200, 3600, False),
                                     (400, 3600, False), (0, 700_000, False), (100, 604_800, False)])]
    )
]  # fmt: skip
ENVELOPES += [record(b"v" * 800, by=by).envelope for by in IDENTITIES[:4]]
ENVELOPES += [forged(record(by=by)) for by in IDENTITIES[:4]]


class Line(asyncio.DatagramTransport):
    """The node's socket: what it sends is looked at and dropped."""

    def __init__(self, owner: Any) -> None:
        super().__init__()
        self.max_size = 0
        self.sent: deque[bytes] = deque(maxlen=32)
        self.count = 0
        self._owner = owner
        self._closing = False

    def sendto(self, data: Any, addr: Any = None) -> None:
        self.count += 1
        self.sent.append(data)
        require(len(data) <= MOST, f"a datagram of {len(data)} bytes is sent")
        require(data[0] < 2 and len(data) > wire.HEADER, f"a datagram of no known type is sent: {data[:40]!r}")
        host, port = addr[:2]  # a response goes to all of the address that its request came from
        require(type(host) is str and "\0" not in host and 0 <= port < 65536, f"sent to {addr!r}")
        require(len(host) <= 64, f"sent to an address that is none: {host[:80]!r}")

    def close(self) -> None:
        if not self._closing:
            self._closing = True
            asyncio.get_running_loop().call_soon(self._owner.connection_lost, None)

    def is_closing(self) -> bool:
        return self._closing

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return (HERE, 8468) if name == "sockname" else default


class LineLoop(WatchedLoop):
    """A virtual-time loop whose datagram sockets are lines."""

    async def create_datagram_endpoint(self, protocol_factory: Any, *args: Any, **options: Any) -> Any:
        owner = protocol_factory()
        line = Line(owner)
        owner.connection_made(line)
        return line, owner


class World(Stage):
    """One node, with caps that are reached soon, and whoever sends to it."""

    def __init__(self) -> None:
        super().__init__(LineLoop())
        self.patches = ExitStack()
        for where, name, value in SMALL:
            self.patches.enter_context(mock.patch.object(where, name, value))
        random.seed(1)
        self.datagrams = 0
        self.seen: deque[bytes] = deque([b"\x00"], maxlen=32)
        self.doing: set[asyncio.Task[Any]] = set()
        self.clock = HalfManualClock()
        self.node = PlasmServer(
            identity=IDENTITIES[0], node_id=OWN_ID, ksize=4, clock=self.clock, rate_limit=20, record_ttl=60,
            max_records=RECORDS, max_bytes=BYTES,
        )  # fmt: skip
        self.run(self.node.listen(8468))
        self.protocol: Any = self.node.protocol
        self.run(self.settle())
        self.base = len(asyncio.all_tasks(self.loop))
        steps: list[tuple[int, Callable[[Source], None]]] = [
            (3, self._raw), (8, self._request), (3, self._mutated_request), (8, self._answer), (4, self._answer_all),
            (2, self._replay), (2, self._burst), (2, self._do), (6, self._new_record), (1, self._fault),
        ]  # fmt: skip
        self.steps = [step for weight, step in steps for _ in range(weight)]
        self.built()

    # -- a script ----------------------------------------------------------------------------------------------------

    async def play(self, source: Source) -> None:
        """Feed it what the bytes say, 32 steps at most."""
        for _ in range(32):
            if not source:
                break
            source.pick(self.steps)(source)
            if source.one_in(3):
                await asyncio.sleep(source.pick(SECONDS))
            elif source.one_in(200):
                await asyncio.sleep(source.pick(LONG))
        await asyncio.sleep(0.05)
        self.check()

    def feed(self, data: bytes, address: tuple[Any, ...]) -> None:
        """One datagram arrives."""
        self.datagrams += 1
        self.seen.append(data)
        self.protocol.datagram_received(data, address)

    def _address(self, source: Source) -> tuple[Any, ...]:
        kind = source.below(12)
        if kind > 7:
            return source.pick(list(self.protocol._verified._times) or [("10.0.0.1", 8468)])
        if kind == 0:
            return f"2001:db8::{source.below(256):x}", 8468, 0, 0
        if kind == 1:
            return f"fe80::{source.below(16):x}%eth0", source.below(65536), 0, 2
        ip = f"10.0.{source.below(2)}.{source.below(256)}" if kind < 4 else f"198.51.{source.below(256)}.{kind}"
        return ip, 8468 if kind < 7 else source.below(65536)

    def _id(self, source: Source) -> bytes:
        return source.take(20).ljust(20, b"\x31") if source.below(2) else source.pick(IDS)

    def _envelope(self, source: Source) -> Any:
        kind = source.below(8)
        if kind == 0:
            return anything(source)
        envelope = source.pick(ENVELOPES)
        return mutated(source, envelope) if kind == 1 else envelope

    def _rival(self, source: Source) -> bytes:
        """What another host has said later with the node's own key."""
        now = self.clock.wall()
        return record(b"x", by=IDENTITIES[0], name=source.pick(NAMES), issued_at=now, seq=now + 10_000).envelope

    def _node(self, source: Source) -> Any:
        if source.one_in(12):
            return anything(source)
        ip = source.pick(IPS) if source.one_in(3) else f"10.1.{source.below(256)}.{source.below(256)}"
        return [self._id(source), ip, 8468 if source.below(4) else source.pick((0, 1, -1, 65535, 65536, 2**63))]

    def _raw(self, source: Source) -> None:
        address = self._address(source)
        head = source.pick((b"", b"\x00" + b"m" * 20, b"\x01" + b"m" * 20, b"\x02" + b"m" * 20))
        self.feed(head + source.some() * source.pick((1, 1, 1, 200, 3000)), address)

    def request(self, source: Source) -> bytes:
        """A request in the right shape, with arguments that may be anything."""
        name = source.pick(NAMED)
        key = source.pick(KEYS) if source.below(4) else self._id(source)
        arguments: list[Any] = {
            "ping": [self._id(source)], "stun": [], "store": [self._id(source), key, self._envelope(source)],
            "find_node": [self._id(source), key], "find_value": [self._id(source), key, source.below(70_000)],
        }[name]  # fmt: skip
        if source.one_in(8):
            arguments[source.below(len(arguments) + 1) :] = [anything(source)]
        message_id = source.below(256).to_bytes(20) if source.below(2) else source.take(20).ljust(20)
        return b"\x00" + message_id + packed(source, [name, arguments])

    def _request(self, source: Source) -> None:
        self.feed(self.request(source), self._address(source))

    def _mutated_request(self, source: Source) -> None:
        self.feed(mutated(source, self.request(source)), self._address(source))

    def _burst(self, source: Source) -> None:
        """One datagram, each time a little different, from many addresses."""
        data, address = self.request(source), self._address(source)
        for number in range(16):
            self.feed(data, (f"10.2.{number}.{source.below(256)}", 8468) if source.below(2) else address)
            data = mutated(source, data)

    def _new_record(self, source: Source) -> None:
        by, name = source.pick(IDENTITIES[:8]), source.pick(NAMES)
        now = self.clock.wall() + source.pick((0, 0, 0, 299_000, 301_000, -90_000))
        new = record(
            source.some() * source.pick((1, 4, 12)), by=by, name=name, issued_at=now, life=source.pick((60, 1, 3600)),
            seq=source.pick((now, now, 2**64 - 1, 0)), withdrawn=source.one_in(5),
        )  # fmt: skip
        key = source.pick((shared_key(name), bound_key(by.public_key, name), bytes(20)))
        self.feed(wire.encode_request(source.take(20).ljust(20), "store", (self._id(source), key, new.envelope)),
                  self._address(source))  # fmt: skip

    def _replay(self, source: Source) -> None:
        data = source.pick(self.seen) if source.below(2) else source.pick(self.protocol.transport.sent or [b"\x00"])
        self.feed(data, self._address(source))

    def _answer(self, source: Source) -> None:
        """An answer to a call that waits, of any content, from the address asked or from another."""
        calls = self.protocol._calls
        if not calls:
            return
        message_id = source.pick(list(calls))
        call = calls[message_id]
        content = packed(source, self._content(source, call))
        self.feed(b"\x01" + message_id + content, self._address(source) if source.one_in(4) else call.address)
        if source.one_in(4):
            self.feed(b"\x01" + message_id + content, call.address)

    def _answer_all(self, source: Source) -> None:
        """What an honest network would say."""
        for message_id, call in list(self.protocol._calls.items()):
            digit = sum(call.address[0].encode()) % 256
            nodes = [[bytes([digit ^ n]) * 20, f"10.1.{digit}.{n}", 8468] for n in range(source.below(6))]
            content: Any = {
                wire.read_id: bytes([digit, source.below(4)]) * 10, wire.read_address: list(call.address),
                wire.read_stored: True, wire.read_found: nodes,
            }[call.read]  # fmt: skip
            self.feed(b"\x01" + message_id + msgspec.msgpack.encode(content), call.address)

    def _content(self, source: Source, call: Call) -> Any:
        if source.one_in(8):
            return anything(source)
        if call.read is wire.read_id:
            return self._id(source)
        if call.read is wire.read_address:
            return [source.pick(IPS), source.below(65536)]
        nodes = [self._node(source) for _ in range(source.pick((0, 1, 5, 20, 60)))]
        now = self.clock.wall() if source.below(3) else anything(source)
        if call.read is wire.read_stored:
            reason = source.pick((None, "stale", "clock", "expired", "x" * 31, "a\nb", 7))
            held = source.pick((None, self._envelope(source), self._rival(source)))
            return source.pick((True, False, {"ok": False, "reason": reason, "held": held, "now": now}))
        if source.below(2):
            return nodes
        records = [self._envelope(source) for _ in range(source.below(8))]
        found = {"value": self._envelope(source), "records": records, "nodes": nodes, "more": True, "now": now}
        for name in list(found):
            if source.one_in(8):
                found[name] = anything(source)
        return found

    def _fault(self, source: Source) -> None:
        if source.below(2):
            self.protocol.error_received(OSError(111, "refused"))
        else:
            self.clock.stepped += source.pick((0, 0.5, 90, -90, 7200, -7200))

    # -- what the node itself does meanwhile -------------------------------------------------------------------------

    def _do(self, source: Source) -> None:
        """The node asks, so that there are calls that wait."""
        if len(self.doing) >= TASKS:
            return
        name = source.pick(NAMES)
        trust = [IDENTITIES[source.below(3)].publisher_id] if source.below(2) else None
        work = source.pick((
            lambda: self.node.get_record(name, trust=trust), lambda: self.node.get_records(name, trust=trust),
            lambda: self.node.publish(name, b"own"), lambda: self.node.set(name, 1), lambda: self.node.withdraw(name),
            lambda: self.node.bootstrap([("10.0.0.9", 8468)]), self.node.seen_address,
            lambda: self._follow(name, trust),
        ))  # fmt: skip
        task = self.loop.create_task(self._watched(work(), name, trust))
        self.doing.add(task)
        task.add_done_callback(self.doing.discard)

    async def _watched(self, work: Any, name: str, trust: list[str] | None) -> None:
        try:
            result = await work
        except PlasmError:
            return
        if isinstance(result, str):  # an address that is going to be in a URL
            require(len(result) < 46 and "%" not in result, f"our address is believed to be {result[:100]!r}")
        for each in result if isinstance(result, list) else [result]:
            if hasattr(each, "envelope"):
                require(each.name == name and (not trust or each.publisher in trust), f"a wrong record: {each}")

    async def _follow(self, name: str, trust: list[str] | None) -> None:
        with suppress(TimeoutError):
            async with aclosing(self.node.watch(name, trust=trust)) as events, asyncio.timeout(90):
                async for event in events:
                    ours = event.record.name == name and (not trust or event.record.publisher in trust)
                    require(ours, f"an event of a wrong record: {event}")

    # -- what must hold ----------------------------------------------------------------------------------------------

    def sizes(self) -> dict[str, tuple[int, int]]:
        """Of every table how much is in it, and what the most is."""
        node, store, router = self.protocol, self.node.storage, self.protocol.router
        most, pings = limits.MAX_ADDRESSES, protocol.MAX_PINGS
        room = len(router.buckets) * 2 * node.ksize
        publishers = max((len(store.held(key)) for key in list(store.keys())), default=0)
        # own records are held however full it is: two keys for each name
        own = 2 * len(NAMES)
        return {
            "verified": (len(node._verified._times), most), "silent": (len(node._silent._times), most),
            "said": (len(node._said._ids), most), "rate limit": (len(node._rate_limit._buckets), most),
            "round trips": (len(node.round_trips._estimates), roundtrip.MAX_ADDRESSES),
            "recent round trips": (len(node.round_trips._recent), roundtrip.RECENT),
            # those that others cause, and those of the lookups, which have whom they ask say its id
            "pings": (len(node._pings), pings * 2 + 8 + MAX_ASKED * node.ksize * TASKS),
            "deferred": (len(node._deferred), pings),
            "calls": (len(node._calls), pings * 2 + 8 + 100 * (TASKS + 2 * 4 + 4)),
            "found": (len(node._answers._found), answers.KEPT),
            "nearest": (node._answers._nearest.count, nearest.MAX_KEPT + 160),
            "found for": (sum(map(len, node._answers._found_for.values())), answers.KEPT),
            "records": (store.records, store.max_records + own), "bytes": (store.bytes, store.max_bytes + 1000 * own),
            "publishers": (publishers, storage.MAX_PUBLISHERS + 1), "buckets": (len(router.buckets), 161 * 32),
            "contacts": (len(router), room),
            "replacements": (max(len(each.replacement_nodes) for each in router.buckets), node.ksize),
            "tasks": (len(asyncio.all_tasks(self.loop)), self.base + pings + TASKS * 25 + 60),
        }  # fmt: skip

    def check(self) -> None:
        """Nothing is above its cap, and no reason was made up."""
        runner = self.node._runner
        if runner is not None and runner.done():
            runner.result()  # a part of the node has failed
        for name, (size, most) in self.sizes().items():
            require(size <= most, f"{name}: {size} of at most {most}")
        dropped: Counter[str] = self.protocol.dropped
        require(set(dropped) <= REASONS, f"unknown reasons: {set(dropped) - REASONS}")

    async def _finish(self) -> None:
        try:
            await self._come_to_rest()
        finally:
            await self.node.close(withdraw=False)
        require(not self.protocol._calls, "calls are left when the node has stopped")

    async def _come_to_rest(self) -> None:
        for task in list(self.doing):
            task.cancel()
        await asyncio.gather(*self.doing, return_exceptions=True)
        assert self.node._membership is not None
        await self.node._membership._see_to_table()
        await asyncio.sleep(30)
        require(not self.protocol._deferred, f"deferred for ever: {self.protocol._deferred}")
        late = [call for call in self.protocol._calls.values() if self.loop.time() - call.sent_at > 10]
        require(not late, f"{len(late)} calls wait for ever")
        require(len(self.protocol._pings) <= len(self.protocol._calls), "pings that nobody waits for")
        self.check()
        for name in NAMES:
            with suppress(PlasmError):
                await self.node.withdraw(name)
        await asyncio.sleep(150)
        for _ in range(20):  # a record that is replicated at this moment has a few, tombstones that are owed up to 16
            tasks = asyncio.all_tasks()
            if len(tasks) <= self.base + 10:
                break
            await asyncio.sleep(3)
        require(len(tasks) <= self.base + 10, f"tasks are left in the node: {tasks}")

    def end(self) -> None:
        """Stop the node; nothing of it may be left."""
        try:
            self.run(self._finish())
        finally:
            self.patches.close()
            super().end()
