"""One request of ours that waits for its answer."""

import asyncio

from plasm_dht.dht import wire
from plasm_dht.dht.ids import Address
from plasm_dht.dht.routing import Contact
from plasm_dht.dht.wire import Outcome


class Call:
    """Who was asked, what, when and how often; `future` is its outcome, `timer` what happens without an answer."""

    __slots__ = (
        "address",
        "contact",
        "datagram",
        "future",
        "is_ping",
        "is_store",
        "read",
        "sent_at",
        "sent_twice",
        "timer",
    )

    def __init__(self, address: Address, contact: Contact | None, name: str, datagram: bytes) -> None:
        loop = asyncio.get_running_loop()
        self.address = address
        self.contact = contact
        self.datagram = datagram
        self.future: asyncio.Future[Outcome] = loop.create_future()
        self.is_ping = name == "ping"
        self.is_store = name == "store"
        self.read = wire.READERS[name]
        self.sent_at = loop.time()
        self.sent_twice = False
        self.timer: asyncio.TimerHandle
