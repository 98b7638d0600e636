"""The datagram path: requests answered where they arrive, calls matched with their answers, who may ask and how fast.

A handler returns its reply, and one place sends it. No task is made for a request, but for a store whose sender has to
be pinged first. Nothing that arrives can raise: what is not of the right shape is dropped and counted.
"""

import asyncio
import contextlib
import os
from collections.abc import Callable, Coroutine
from typing import Any, TypeAlias

from kademlia.node import Node
from kademlia.protocol import KademliaProtocol
from rpcudp.protocol import RPCProtocol

from plasm_dht.clock import Clock
from plasm_dht.dht import density, ids, stats, wire
from plasm_dht.dht.answers import Answers
from plasm_dht.dht.call import Call
from plasm_dht.dht.ids import Address
from plasm_dht.dht.limits import SILENT_FOR, VERIFIED_FOR, RateLimit, Said, Seen
from plasm_dht.dht.roundtrip import RoundTrips
from plasm_dht.dht.routing import STALE_AFTER, Contact, PlasmRoutingTable
from plasm_dht.dht.storage import ACCEPTED, RecordStorage, Verdict
from plasm_dht.dht.udp import BATCH, SHORT_BATCH, UdpSocket, sender_of
from plasm_dht.dht.wire import NO_ANSWER, Outcome
from plasm_dht.record import Record

# A store waits this long in all (s), so that the holder's ping-back fits inside.
STORE_TIMEOUT = 4.0
# An address that stores has this long to answer our ping (s).
PING_BACK = 2.0
# Pings to strangers under way at once; beyond it a stranger stays unverified.
MAX_PINGS = 512
# Contacts of which k are not near a key, in multiples of k: of one distance hardly more than 2k are known.
AROUND = 4

# The response to a request, given its sender and its message id; a coroutine where somebody has to be asked first.
Handler: TypeAlias = Callable[[Address, bytes, Any], bytes | Coroutine[Any, Any, bytes]]


class PlasmProtocol(KademliaProtocol):  # type: ignore[misc]  # the base library has no types
    """kademlia's RPCs over rpcudp's frames, answered synchronously.

    `spawn` runs a coroutine in the server's task group; `on_contact` is told of each new contact in the routing table.
    """

    def __init__(
        self,
        source_node: Node,
        storage: RecordStorage,
        ksize: int,
        *,
        clock: Clock,
        rate_limit: float | None,
        spawn: Callable[[Coroutine[Any, Any, None]], bool],
        on_contact: Callable[[Contact], None],
    ) -> None:
        # Not KademliaProtocol's own: it would make a routing table that ages by the system's clock.
        RPCProtocol.__init__(self)
        self.source_node = source_node
        self.storage = storage
        self.router = PlasmRoutingTable(self, ksize, source_node, clock)
        self.ksize = ksize
        self.clock = clock
        self.round_trips = RoundTrips()
        self.stats = stats.Stats()
        self.dropped = self.stats.dropped
        self._rate_limit = None if rate_limit is None else RateLimit(rate_limit)
        self._spawn = spawn
        self._on_contact = on_contact
        self._calls: dict[bytes, Call] = {}
        self._pings: dict[Address, asyncio.Future[Outcome]] = {}
        self._verified = Seen(VERIFIED_FOR)
        self._silent = Seen(SILENT_FOR)
        self._said = Said(VERIFIED_FOR)
        self._deferred: set[bytes] = set()
        self._near: tuple[int, list[int]] = (-1, [])  # how near our neighbours are, in this version of the table
        self._answers = Answers(self.router, storage, clock, ksize)
        self._socket: UdpSocket | None = None
        self._is_asyncios = False
        self._finds = {wire.FIND_NODE: self._answers.find_node, wire.FIND_VALUE: self._answers.find_value}
        self._own_id = wire.id_result(source_node.id)
        self._handlers: dict[type[wire.Request], Handler] = {
            wire.Ping: self.rpc_ping,
            wire.Stun: self.rpc_stun,
            wire.Store: self.rpc_store,
            wire.FindNode: self.rpc_find_node,
            wire.FindValue: self.rpc_find_value,
        }

    def __getattr__(self, name: str) -> Any:
        """No attribute becomes a remote call, as it does in the base."""
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    # -- datagrams in ------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.DatagramTransport) -> None:
        """Keep the transport, and get hold of its socket."""
        super().connection_made(transport)
        self._socket = UdpSocket.beneath(transport, self.error_received, self._responses_received)
        if hasattr(transport, "max_size"):  # else asyncio allocates 256 KiB to read a datagram
            transport.max_size = wire.MAX_READ + 1
            self._is_asyncios = True

    def connection_lost(self, exc: Exception | None) -> None:
        """Nobody will answer any more."""
        for call in list(self._calls.values()):
            self._finish(call, NO_ANSWER)
        self._calls.clear()
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def error_received(self, exc: OSError) -> None:
        """Count what the network reports back; the time-out says the same of the address concerned."""
        self.dropped["network_error"] += 1

    def datagram_received(self, data: bytes, addr: tuple[Any, ...]) -> None:
        """Answer what has arrived, this datagram first, and hand answers to the calls that wait for them."""
        self._answers.stamp()
        reply = self._receive(data, sender_of(addr))
        if reply is not None:
            self._send(reply, addr)
        self.stats.received += 1
        if self._socket is not None and self._is_asyncios:  # uvloop reads on by itself, up to 32 a turn
            self._drain(self._socket)

    def _responses_received(self, apart: UdpSocket) -> None:
        self._answers.stamp()
        self._drain(apart)

    def _drain(self, endpoint: UdpSocket) -> None:
        read, answered = endpoint.drain(self._receive, SHORT_BATCH if self._calls else BATCH)
        self.stats.received += read  # once for all of them: each datagram costs as little as before
        self.stats.sent += answered

    def _receive(self, data: bytes, sender: Address) -> bytes | None:
        """The response to a datagram, if it is a request that is answered at once.

        What nearly all requests are, a key and who asks for it, is taken apart here: that is what a flood is made of.
        """
        split = wire.SPLIT_FIND.get(len(data))
        if split is None:
            return self._receive_any(data, sender)
        kind, message_id, head, node_id, mark, key = split(data)
        find = self._finds.get(head)
        if find is None or kind != wire.REQUEST or mark != wire.ID_MARK:
            return self._receive_any(data, sender)
        if self._rate_limit is not None and not self._rate_limit.allows(sender[0], self.clock.monotonic()):
            self.dropped["rate_limit"] += 1
            return None
        contact = self.router.by_address.get(sender)
        if contact is None or contact.id != node_id or contact.missed >= STALE_AFTER:
            return find(message_id, key, self.welcome(sender, node_id))
        return find(message_id, key, contact.encoded)

    def _receive_any(self, data: bytes, sender: Address) -> bytes | None:
        response = None
        if not wire.HEADER < len(data) <= wire.MAX_READ:
            self.dropped["size"] += 1
        elif data[0] == 1:
            self._receive_response(data, sender)
        elif data[0] != 0:
            self.dropped["type"] += 1
        elif self._rate_limit is not None and not self._rate_limit.allows(sender[0], self.clock.monotonic()):
            self.dropped["rate_limit"] += 1
        else:
            response = self._receive_request(data, sender)
        self._answers.forget_outdated()
        return response

    def _receive_request(self, data: bytes, sender: Address) -> bytes | None:
        request = wire.decode_request(data)
        if request is None:
            self.dropped["malformed"] += 1
            return None
        message_id = data[1 : wire.HEADER]
        response = self._handlers[type(request)](sender, message_id, request)
        if isinstance(response, bytes):
            return response
        if message_id in self._deferred or len(self._deferred) >= MAX_PINGS:  # a resend, or a crowd
            self.dropped["busy"] += message_id not in self._deferred
            response.close()
        else:
            self._deferred.add(message_id)
            if not self._spawn(self._answer_later(message_id, sender, response)):
                self._deferred.discard(message_id)
                response.close()
        return None

    async def _answer_later(self, message_id: bytes, sender: Address, response: Coroutine[Any, Any, bytes]) -> None:
        try:
            self._send(await response, sender)
        finally:
            self._deferred.discard(message_id)

    def _send(self, datagram: bytes, address: tuple[Any, ...]) -> None:
        self.stats.sent += 1
        if self._socket is not None:
            self._socket.send(datagram, address)
        elif not self.transport.is_closing():
            self.transport.sendto(datagram, address)

    # -- requests of others ------------------------------------------------------------------------------------------

    def rpc_stun(self, sender: Address, message_id: bytes, request: wire.Stun) -> bytes:
        """The caller's address as seen from here."""
        return wire.response(message_id, wire.address_result(sender))

    def rpc_ping(self, sender: Address, message_id: bytes, request: wire.Ping) -> bytes:
        """Our id."""
        self.welcome(sender, request.arguments[0])
        return wire.response(message_id, self._own_id)

    def rpc_find_node(self, sender: Address, message_id: bytes, request: wire.FindNode) -> bytes:
        """The k live contacts closest to the key, as many as fit."""
        node_id, key = request.arguments
        return self._answers.find_node(message_id, key, self.welcome(sender, node_id))

    def rpc_find_value(self, sender: Address, message_id: bytes, request: wire.FindValue) -> bytes:
        """What is held under the key, or the closest nodes where nothing is."""
        wanted = request.arguments
        asker = self.welcome(sender, wanted.node_id)
        return self._answers.find_value(message_id, wanted.key, asker, wanted.skip)

    def rpc_store(self, sender: Address, message_id: bytes, request: wire.Store) -> bytes | Coroutine[Any, Any, bytes]:
        """Admit a record, or say why not; a coroutine when the sender's address has to answer a ping first."""
        node_id, key, envelope = request.read()
        self.welcome(sender, node_id)
        checked = self.storage.check(key, envelope)
        is_verified = self._verified.has(sender, self.clock.monotonic())
        if isinstance(checked, Verdict):
            if checked is ACCEPTED and is_verified:  # else anybody could put off our replication from any address
                self.storage.receive_again(key, envelope)
            return self._verdict(message_id, checked)
        if is_verified:
            return self._verdict(message_id, self.storage.admit(key, checked))
        return self._store_after_ping(sender, message_id, key, checked)

    async def _store_after_ping(self, sender: Address, message_id: bytes, key: bytes, record: Record) -> bytes:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PING_BACK):
                await asyncio.shield(self._ping(sender))
        if not self._verified.has(sender, self.clock.monotonic()):  # the answer may have come from another address
            return self._verdict(message_id, Verdict("unverified"))
        checked = self.storage.check(key, record.envelope)  # what is held may have changed meanwhile
        return self._verdict(message_id, self.storage.admit(key, checked) if isinstance(checked, Record) else checked)

    def _verdict(self, message_id: bytes, verdict: Verdict) -> bytes:
        self.stats.stores_received[verdict.reason or stats.ACCEPTED] += 1
        return wire.response(message_id, wire.stored_result(self.clock.wall(), verdict.reason, verdict.held))

    def welcome(self, sender: Address, node_id: bytes) -> bytes:
        """Ping a caller that the routing table does not know, or believes dead, if it would get a place there.

        Returns how the wire names the contact at its address, no bytes if there is none.
        """
        known = self.router.at(sender)
        if known is None or known.id != node_id or known.is_stale:
            self._meet(sender, node_id, known)
        return b"" if known is None else known.encoded

    def _meet(self, sender: Address, node_id: bytes, known: Contact | None) -> None:
        if node_id == ids.TRANSIENT_ID or sender in self._pings or len(self._pings) >= MAX_PINGS:
            return
        if known is None and not self.router.has_room_for(Node(node_id)):
            return
        if not self._silent.has(sender, self.clock.monotonic()):
            self._ping(sender)

    # -- calls of ours -----------------------------------------------------------------------------------------------

    def call_ping(self, node_to_ask: Contact) -> "asyncio.Future[Outcome]":
        """Whether it answers, and its id."""
        return self._ping(node_to_ask.address)

    def call_stun(self, node_to_ask: Contact) -> "asyncio.Future[Outcome]":
        """Our address as it sees it."""
        return self._call(node_to_ask.address, node_to_ask, "stun")

    def call_find_node(self, node_to_ask: Contact, node_to_find: Node) -> "asyncio.Future[Outcome]":
        """The nodes that it knows closest to the id."""
        return self._call(node_to_ask.address, node_to_ask, "find_node", self.source_node.id, node_to_find.id)

    def call_find_value(self, node_to_ask: Contact, node_to_find: Node, skip: int = 0) -> "asyncio.Future[Outcome]":
        """What it holds under the id, leaving out the first `skip` envelopes, or the nodes that it knows closest."""
        arguments = (self.source_node.id, node_to_find.id, skip) if skip else (self.source_node.id, node_to_find.id)
        return self._call(node_to_ask.address, node_to_ask, "find_value", *arguments)

    def call_store(self, node_to_ask: Contact, key: bytes, value: bytes) -> "asyncio.Future[Outcome]":
        """Whether it accepts the envelope under the key."""
        return self._call(node_to_ask.address, node_to_ask, "store", self.source_node.id, key, value)

    def node_count(self, *keys: bytes) -> float | None:
        """How many nodes there are, by how near our neighbours are, whoever crowds around a key; `None` without any."""
        own = self.source_node.long_id
        if self._near[0] != self.router.version:
            near = self.router.closest(own, AROUND * self.ksize)
            self._near = self.router.version, [own ^ each.long_id for each in near]
        return density.node_count(self._near[1], [own ^ int.from_bytes(key) for key in keys], self.ksize)

    def is_known(self, contact: Contact) -> bool:
        """Whether the node at this address has said this id lately."""
        there = self.router.at(contact.address)
        if there is not None and there.id == contact.id:
            return True
        return self._said.has(contact.address, contact.id, self.clock.monotonic())

    def ping_address(self, address: Address) -> "asyncio.Future[Outcome]":
        """The id of whoever is at the (ip, port)."""
        return self._ping(address)

    def _ping(self, address: Address) -> "asyncio.Future[Outcome]":
        """One ping an address at a time, whoever waits for it."""
        pinging = self._pings.get(address)
        if pinging is None:
            pinging = self._call(address, self.router.at(address), "ping", self.source_node.id)
            self._pings[address] = pinging
            pinging.add_done_callback(lambda _: self._pings.pop(address, None))
        return pinging

    def _call(
        self, address: Address, contact: Contact | None, name: str, *arguments: object
    ) -> "asyncio.Future[Outcome]":
        message_id = os.urandom(ids.ID_BYTES)  # unguessable, so that only who was asked can answer
        call = Call(address, contact, name, wire.encode_request(message_id, name, arguments))
        if not self.reaches(address[0]):
            call.future.set_result(NO_ANSWER)
            return call.future
        wait = self.round_trips.timeout(address)
        if call.is_store:
            wait = min(2 * wait, STORE_TIMEOUT / 2)  # the holder may ping us before it answers
        call.timer = asyncio.get_running_loop().call_later(wait, self._time_out, message_id, wait)
        self._calls[message_id] = call
        self._send(call.datagram, address)
        return call.future

    def reaches(self, ip: str) -> bool:
        """Whether a request to this IP address can leave: the socket is open, and of a family that gets there."""
        if self.transport is None or self.transport.is_closing():
            return False
        return self._socket is None or self._socket.reaches(ip)

    def _time_out(self, message_id: bytes, waited: float) -> None:
        call = self._calls[message_id]
        if not call.sent_twice:  # even if nobody waits any more: whether it lives is worth to know
            call.sent_twice = True
            wait = STORE_TIMEOUT - waited if call.is_store else waited
            call.timer = asyncio.get_running_loop().call_later(wait, self._time_out, message_id, wait)
            self._send(call.datagram, call.address)
            return
        del self._calls[message_id]
        self._silent.add(call.address, self.clock.monotonic())
        if not call.is_store:
            if call.contact is not None:
                self.router.miss(call.contact)
            there = self.router.at(call.address)
            # Most are dead: only who was near, and is given up now, may have become far.
            if self.round_trips.knows(call.address) and (there is None or there.is_stale):
                self.round_trips.back_off(call.address)
        self._finish(call, NO_ANSWER)

    def _receive_response(self, data: bytes, sender: Address) -> None:
        call = self._calls.pop(data[1 : wire.HEADER], None)
        if call is None:
            self.dropped["unasked"] += 1
            return
        result = call.read(data)
        if sender == call.address:
            self._answered(call, result)
        self._finish(call, (True, result))

    def _answered(self, call: Call, result: Any) -> None:
        """The address that was asked has answered: it is real, and so is the contact there."""
        now = self.clock.monotonic()
        self._verified.add(call.address, now)
        self._silent.discard(call.address)
        if call.sent_twice and not call.is_store:
            self.round_trips.back_off(call.address, late=True)
        elif not call.is_store:
            took = asyncio.get_running_loop().time() - call.sent_at
            self.round_trips.sample(call.address, took)
            self.stats.round_trips.add(took)
        contact = call.contact
        if result is None:  # junk is no answer
            if contact is not None:
                self.router.miss(contact)
            return
        if call.is_ping:  # the only answer that says who it is
            contact = Contact(result, *call.address)
            self._said.add(call.address, result, now)
        elif contact is None:
            return
        elif not self.is_known(contact):  # an id that somebody named does not enter, and drives out nobody
            if self.source_node.id != ids.TRANSIENT_ID:  # who will not stay asks for no more ids than a lookup needs
                self._meet(call.address, contact.id, self.router.at(call.address))
            return
        if self.router.add_contact(contact):
            self._on_contact(contact)

    def _finish(self, call: Call, outcome: Outcome) -> None:
        call.timer.cancel()
        if call.is_store:
            self.stats.note_store(*outcome)
        if not call.future.done():
            call.future.set_result(outcome)
