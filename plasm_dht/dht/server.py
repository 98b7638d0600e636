"""`PlasmServer`: a DHT node that publishes, finds, holds and takes back records.

It wires the rooms below it and owns their tasks; what they do is theirs.
"""

from __future__ import annotations  # what only a publisher or a holder needs is not imported for its name

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Coroutine, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Self, TypeVar

from plasm_dht.clock import Clock
from plasm_dht.dht import ids
from plasm_dht.dht.ids import Address
from plasm_dht.dht.membership import Membership, check_address
from plasm_dht.dht.protocol import PlasmProtocol
from plasm_dht.dht.read import Reader
from plasm_dht.dht.refused import RefusingServer
from plasm_dht.dht.routing import Contact
from plasm_dht.dht.stats import counted
from plasm_dht.dht.storage import DEFAULT_MAX_BYTES, DEFAULT_MAX_RECORDS, RecordStorage
from plasm_dht.errors import ConfigError, IdentityError, ListenError
from plasm_dht.identity import Identity
from plasm_dht.record import (
    MAX_TTL,
    REFRESH_AT,
    Record,
    Value,
    check_life,
    check_name,
    check_value,
    shared_key,
    sign,
)
from plasm_dht.values import format_address

if TYPE_CHECKING:
    from plasm_dht.dht.intent import Intent, Publication, Standing
    from plasm_dht.dht.observe import Event, Observer
    from plasm_dht.dht.publish import Publisher
    from plasm_dht.dht.refresh import Refresher
    from plasm_dht.dht.replicate import Replicator

log = logging.getLogger(__name__)
_Room = TypeVar("_Room")

DEFAULT_TTL = 3600
# A clean stop withdraws what it can in this time (s).
WITHDRAW_WITHIN = 3.0
# Records that one slice of forgetting looks at: 2 ms, to which a full garbage collection may add 8 to 16 at a million.
FORGET_SLICE = 100


class PlasmServer(RefusingServer):
    """A node of the DHT.

    Args:
        identity: who publishes; without one the node holds and reads but publishes nothing.
        record_ttl: life of a record in seconds, 1 to 604,800.
        refresh_interval: seconds after which a record is signed and published anew; 2/3 of `record_ttl` by default.
        ksize, alpha: as in kademlia, how many hold a key (and fill a bucket), how many are asked at once.
        node_id: 20 bytes, zeros for a caller that will not stay; by default what `storage` remembers, or random.
        storage: a `RecordStorage` (else `TypeError`); by default one in memory.
        clock: where the time comes from.
        rate_limit: requests a second that one source address may send, bursts of twice that; `None`: no limit.
        quorum: holders that have to agree before `get` ends.
        max_ttl: longest life in seconds of a record that is accepted from others.
        max_records, max_bytes: how much is held, in records and in bytes of their envelopes.

    Raises `ConfigError` for a setting that is impossible.
    """

    def __init__(
        self,
        *,
        identity: Identity | None = None,
        record_ttl: float = DEFAULT_TTL,
        refresh_interval: float | None = None,
        ksize: int = 20,
        alpha: int = 3,
        node_id: bytes | None = None,
        storage: RecordStorage | None = None,
        clock: Clock | None = None,
        rate_limit: float | None = 2000,
        quorum: int = 3,
        max_ttl: int = MAX_TTL,
        max_records: int = DEFAULT_MAX_RECORDS,
        max_bytes: int = DEFAULT_MAX_BYTES,
    ) -> None:
        if storage is not None and not isinstance(storage, RecordStorage):
            raise TypeError(f"storage is a RecordStorage, whose records have a life, not a {type(storage).__name__}")
        check_life(record_ttl, refresh_interval)
        if node_id is not None and not ids.is_id(node_id):
            raise ConfigError(f"node_id is {node_id!r}: it must be 20 bytes")
        counts = {"ksize": ksize, "alpha": alpha, "quorum": quorum, "max_ttl": max_ttl}
        for name, count in (counts | {"max_records": max_records, "max_bytes": max_bytes}).items():
            if type(count) is not int or count < 1:
                raise ConfigError(f"{name} is {count!r}: it must be an integer of at least 1")
        if rate_limit is not None and not rate_limit >= 1:  # NaN too: it would answer nobody
            raise ConfigError(f"rate_limit is {rate_limit}: it must be at least 1 a second, or None for no limit")
        self.transport: asyncio.DatagramTransport | None
        self.clock = clock or Clock()
        if storage is None:
            storage = RecordStorage(max_records=max_records, max_bytes=max_bytes, max_ttl=max_ttl)
        super().__init__(ksize, alpha, node_id or storage.node_id, storage)
        self.storage: RecordStorage = storage  # the base takes an empty one for none
        self.storage.attach(self.node.id, self.clock)
        self.identity = identity
        self.record_ttl = record_ttl
        self.refresh_interval = record_ttl * REFRESH_AT if refresh_interval is None else refresh_interval
        self.quorum = quorum
        self._rate_limit = rate_limit
        self._tasks: asyncio.TaskGroup | None = None
        self._runner: asyncio.Task[None] | None = None
        self._membership: Membership | None = None
        self._reader: Reader | None = None
        self._observer: Observer | None = None
        self._publisher: Publisher | None = None
        self._refresher: Refresher | None = None
        self._replicator: Replicator | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # -- life of the node --------------------------------------------------------------------------------------------

    @property
    def is_transient(self) -> bool:
        """Whether this is a caller that will not stay: it has the zero id, is in nobody's table and stores nothing."""
        return bool(self.node.id == ids.TRANSIENT_ID)

    @property
    def address(self) -> Address:
        """(host, port) as bound. Raises `ListenError` when it does not listen."""
        host, port = self._listening(self.transport).get_extra_info("sockname")[:2]
        return host, port

    async def listen(self, port: int, interface: str = "0.0.0.0") -> None:  # noqa: S104  # kademlia's default
        """Bind the UDP port (0 picks one) and start. Raises `ListenError`."""
        if self.transport is not None:
            raise ListenError("this node listens already, or has stopped: make another one")
        loop = asyncio.get_running_loop()
        try:
            endpoint = loop.create_datagram_endpoint(self._create_protocol, local_addr=(interface, port))
            self.transport, self.protocol = await endpoint
        except OSError as error:
            raise ListenError(
                f"UDP {format_address((interface, port))} cannot be bound: {error.strerror or error}; "
                "name an address of this machine and a free port (0 picks one)"
            ) from None
        self._wire_rooms()
        started = asyncio.Event()
        self._runner = loop.create_task(self._run(started))
        self._runner.add_done_callback(_report)
        await started.wait()
        log.info("node %s listens on %s", self.node.id.hex(), format_address(self.address))

    async def close(self, *, withdraw: bool = True) -> None:
        """Withdraw what was published, within 3 s, then stop; `withdraw=False` leaves it to expire."""
        listening = self.transport is not None and not self.transport.is_closing()
        if withdraw and self._publisher is not None and listening:
            await self._withdraw_all()
        runner, self._runner = self._runner, None
        self.stop()
        if runner is not None:
            runner.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await runner
        await self.storage.close()

    def stop(self) -> None:
        """Stop at once and withdraw nothing, as kademlia does."""
        super().stop()
        if self._runner is not None:
            self._runner.cancel()

    async def wait_failed(self) -> None:
        """Return when the node has stopped; raise what made it stop, if something did."""
        runner = self._runner
        if runner is not None:
            await asyncio.wait({runner})
            if not runner.cancelled():
                runner.result()

    # -- the network -------------------------------------------------------------------------------------------------

    async def bootstrap(self, addrs: Iterable[Address], *, replace: bool = False) -> list[Contact]:
        """Join through the nodes at these (host, port); host names too. Returns the neighbours found, nearest first.

        The addresses are remembered: while there is no neighbour they are asked again, with growing pauses. They are
        added to those of an earlier call, or `replace` them.
        """
        addresses = [check_address(address) for address in addrs]
        return await self._listening(self._membership).bootstrap(addresses, replace=replace)

    async def seen_address(self, *, ipv4: bool = True, ipv6: bool = True) -> str | None:
        """The IP address of these families that most of our neighbours see us at; `None` when nobody said one."""
        return await self._listening(self._membership).seen_address(ipv4=ipv4, ipv6=ipv6)

    async def bootstrap_node(self, addr: Address) -> Contact | None:
        """The node at this (ip, port), if it answers a ping from there."""
        check_address(addr)
        _, node_id = await self._listening(self.protocol).ping_address(addr)
        contact = Contact(node_id, *addr) if ids.is_id(node_id) else None
        return contact if contact is not None and self.protocol.is_known(contact) else None

    def bootstrappable_neighbors(self) -> list[Address]:
        """(ip, port) of the k closest live contacts."""
        return [contact.address for contact in self.protocol.router.closest(self.node.long_id, self.ksize)]

    # -- records -----------------------------------------------------------------------------------------------------

    def set_life(self, record_ttl: float, refresh_interval: float | None = None) -> None:
        """From now on publish for `record_ttl` seconds and refresh after `refresh_interval`, as in the constructor.

        What is kept alive for the TTL of before gets the new one: at once if that is shorter, else with its next
        refresh. Raises `ConfigError`.
        """
        check_life(record_ttl, refresh_interval)
        before, self.record_ttl = self.record_ttl, record_ttl
        self.refresh_interval = record_ttl * REFRESH_AT if refresh_interval is None else refresh_interval
        for intent in self._publisher.set_ttl(before, record_ttl) if self._publisher is not None else ():
            if self._refresher is not None and record_ttl >= before:
                self._refresher.change(intent, self.refresh_interval, may_delay=record_ttl == before)
            else:  # a change: whoever holds the longer record is owed the shorter one
                self._spawn(self._publishing().refresh(intent.name, owed=True))

    async def publish(self, name: str, value: Value, *, ttl: float | None = None) -> Publication:
        """Publish the value under the name and keep it alive until it is withdrawn; again: replaces it.

        `ttl` is its life in seconds, `record_ttl` by default. Raises `IdentityError` without an identity, `TypeError`
        or `RecordError` for a name or value that a record cannot hold.
        """
        return await self._publish(name, value, ttl, keep_alive=True)

    async def set(self, key: str, value: Value, *, ttl: float | None = None) -> bool:
        """Publish the value once; a name that was kept alive is so no more. True if at least one holder, this node
        included, accepted. Raises as `publish` does.
        """
        publication = await self._publish(key, value, ttl, keep_alive=False)
        accepted = shared_key(key), self._identity().public_key
        return publication.stored > 0 or self.storage.holding(*accepted) is not None

    async def withdraw(self, name: str) -> Publication | None:
        """Take back what this identity has published under the name; `None` when nothing of it is alive, as far as this
        node and those that answer know: what an earlier run published, and nobody told of, is not looked for later.
        """
        check_name(name)
        publisher = self._publishing()
        if self._refresher is not None:
            self._refresher.cancel(name)
        return await publisher.withdraw(name)

    async def get(self, key: str, *, trust: Sequence[str] | None = None, timeout: float | None = None) -> Value | None:
        """The live value of the freshest publisher (in `trust`, publisher ids, if given); `None` when there is none.

        Ends as soon as `quorum` holders agree, at the latest after `timeout` seconds with what is known by then.
        """
        record = await self.get_record(key, trust=trust, timeout=timeout)
        return record.value if record is not None else None

    async def get_record(
        self, name: str, *, trust: Sequence[str] | None = None, timeout: float | None = None
    ) -> Record | None:
        """As `get`, the whole record."""
        records = await self._listening(self._reader).find(name, quorum=self.quorum, trust=trust, timeout=timeout)
        return records[0] if records else None

    async def get_records(
        self, name: str, *, trust: Sequence[str] | None = None, timeout: float | None = None
    ) -> list[Record]:
        """Every publisher's live record, freshest first, after asking all k closest holders."""
        return await self._listening(self._reader).find(name, quorum=None, trust=trust, timeout=timeout)

    def watch(self, name: str, *, trust: Sequence[str] | None = None) -> AsyncGenerator[Event, None]:
        """What becomes of each publisher's record (in `trust`, if given), starting with those that are live.

        For `async for`; it ends when the node stops. Close it (`aclose`) or cancel it to stop asking.
        """
        reader = self._listening(self._reader)
        if self._observer is None and self._runner is not None:
            from plasm_dht.dht.observe import Observer

            self._observer = Observer(self.protocol, self.clock, spawn=self._spawn, look_up=reader.look_up)
            self._runner.add_done_callback(self._observer.stop)
        return self._listening(self._observer).watch(name, trust)

    def standing(self, name: str) -> Standing | None:
        """How what is kept alive under the name stands; `None` when nothing is."""
        from plasm_dht.dht.intent import Standing

        intent = self._publisher.intents.get(name) if self._publisher is not None else None
        if intent is None or intent.record is None or not intent.kept_alive:
            return None
        refresh_in = self._refresher.due_in(name) if self._refresher is not None else None
        return Standing(intent.record.seq, intent.record.expires_at, refresh_in, intent.stored)

    def now(self) -> int:
        """Unix ms as the last reading made believe: the network's time where our own clock is wrong."""
        return self.clock.now() if self._reader is None else self._reader.now()

    # -- inside ------------------------------------------------------------------------------------------------------

    def _create_protocol(self) -> PlasmProtocol:
        return PlasmProtocol(
            self.node,
            self.storage,
            self.ksize,
            clock=self.clock,
            rate_limit=self._rate_limit,
            spawn=self._spawn,
            on_contact=self._on_contact,
        )

    def _wire_rooms(self) -> None:
        rooms: dict[str, Any] = {"k": self.ksize, "alpha": self.alpha}
        self._membership = Membership(self.protocol, self.clock, tidy=self._tidy, **rooms)
        self._reader = Reader(self.protocol, self.clock, repair=self._repair, **rooms)
        if not self.is_transient:
            from plasm_dht.dht.replicate import Replicator

            self._replicator = Replicator(self.protocol, self.clock, **rooms)
            self.storage.on_change = self._replicator.on_change
        if self.identity is not None:
            from plasm_dht.dht.publish import Publisher
            from plasm_dht.dht.refresh import Refresher

            self._publisher = Publisher(self.identity, self.protocol, self.clock, on_round=self._on_round, **rooms)
            self._refresher = Refresher(self._publisher.refresh, self.clock)

    async def _run(self, started: asyncio.Event) -> None:
        async with asyncio.TaskGroup() as self._tasks:
            for room in (self.storage, self._membership, self._replicator, self._publisher, self._refresher):
                if room is not None:
                    self._tasks.create_task(room.run())
            started.set()

    async def _tidy(self) -> None:
        """Forget what has ended."""
        while self.storage.forget(FORGET_SLICE) == FORGET_SLICE:  # noqa: ASYNC110  # in slices
            await asyncio.sleep(0)  # a node with many records must not pause
        if self._publisher is not None:
            self._publisher.expire()

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> bool:
        """Run it in the node's task group. False, and it is closed, when the node is stopping."""
        if self._tasks is not None and self._runner is not None and not self._runner.done():
            with contextlib.suppress(RuntimeError):  # the group takes no more when a part of it has failed
                self._tasks.create_task(coroutine)
                return True
        coroutine.close()
        return False

    def _on_contact(self, contact: Contact) -> None:
        if self._replicator is not None:
            self._replicator.on_contact(contact)
        if self._publisher is not None:
            self._publisher.on_contact()

    def _repair(self, pairs: Iterable[tuple[Contact, Record]], key: bytes) -> None:
        if self._replicator is not None:
            self._spawn(self._replicator.repair(pairs, key))

    def _on_round(self, intent: Intent, enough: bool, took: float) -> None:
        if self._refresher is not None:
            interval = self.refresh_interval if intent.ttl == self.record_ttl else intent.ttl * REFRESH_AT
            self._refresher.after_round(intent, min(interval, self.refresh_interval), enough=enough, took=took)

    async def _publish(self, name: str, value: Value, ttl: float | None, *, keep_alive: bool) -> Publication:
        check_name(name)
        check_value(value)
        life = self.record_ttl if ttl is None else ttl
        check_life(life, None, what="ttl")
        publisher = self._publishing()
        now = self.clock.now()
        sign(self._identity(), name, value, seq=now, issued_at=now, expires_at=now)  # what does not fit changes nothing
        if self._refresher is not None:
            self._refresher.cancel(name)
        return await publisher.publish(name, value, ttl=life, keep_alive=keep_alive)

    def _identity(self) -> Identity:
        if self.identity is None:
            raise IdentityError("this node has no identity, so it cannot publish: give it identity=Identity.load(path)")
        return self.identity

    def _publishing(self) -> Publisher:
        self._identity()
        return self._listening(self._publisher)

    def _listening(self, room: _Room | None) -> _Room:
        if room is None or self.transport is None or self.transport.is_closing():
            raise ListenError("this node does not listen: call listen(port), or make another one if it has stopped")
        return room

    async def _withdraw_all(self) -> None:
        assert self._publisher is not None  # noqa: S101  # the caller checked
        names = [intent.name for intent in self._publisher.intents.values() if intent.kept_alive]
        if not names:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(WITHDRAW_WITHIN), asyncio.TaskGroup() as group:
                for name in names:
                    group.create_task(self.withdraw(name))
        told = sum(self._publisher.has_told(name) for name in names)
        if told < len(names):
            log.warning("%d of %s withdrawn in time; the rest expires", told, counted(len(names), "record"))
        else:
            log.info("%s withdrawn", counted(told, "record"))


def _report(runner: asyncio.Task[None]) -> None:
    """Say it at once when a part of the node has failed: that is a bug, and nobody may be waiting for the task."""
    if not runner.cancelled() and (error := runner.exception()) is not None:
        log.critical("the node has stopped because a part of it failed", exc_info=error)
